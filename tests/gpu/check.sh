#!/usr/bin/env bash
# One command on a machine with a CUDA GPU: are the kernels right, does generation agree, how fast is it, and how long a context fits?
#
#   tests/gpu/check.sh [OUT_DIR]          (./gpu-check by default)
#
# Needs torch built for CUDA and an installed skvq; no Rust, no compiler, no network. The checkout must be that of the installed skvq, since
# its kernels/params.cuh says how kernels are called. Stages, in this order: environment, warmup, kernels, generation, calibration, bench, many, masked,
# prompt, weights, capacity, sanitizer (memcheck and racecheck, where compute-sanitizer is installed), ncu (with NCU=1). A failed stage does not stop the others.
# OUT_DIR has a log of each, summary.txt, kernels.json, generation.json, calibration.json, bench.json, bench.png, many.json, masked.json, prompt.json, weights.json and capacity.json.
# Exit status: 0 all right; 1 a kernel, an attention output or a generation is wrong; 2 another stage failed or did not finish.
# Settings: PYTHON (python), DEVICE (cuda), STAGES (all of them, by name), BUDGET (540 seconds for everything; a stage gets its share of what
# is left), MODEL (a local model whose generation is checked too; none), CAPACITY (options of `skvq bench capacity`; the shape of Llama 2 7B,
# filled with random rows), NCU.
set -u
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${1:-gpu-check}
python=${PYTHON:-python}
device=${DEVICE:-cuda}
budget=${BUDGET:-540}
stages=${STAGES:-environment warmup kernels generation calibration bench many masked prompt weights capacity sanitizer ncu}
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
summary=()
status=0

worse() { # a wrong result outweighs a stage that failed
    if [ "$status" -ne 1 ]; then status=$1; fi
}

skip() {
    echo "== $1: skipped, $2"
    summary+=("$(printf '%-12s    - s  skipped, %s' "$1" "$2")")
}

wanted() { # is a stage among STAGES?
    case " $stages " in *" $1 "*) return 0 ;; esac
    return 1
}

left() { # seconds of the budget that are left, at most so many
    local rest=$((budget - SECONDS))
    if [ "$rest" -gt "$1" ]; then rest=$1; fi
    echo "$rest"
}

# stage NAME SECONDS STATUS COMMAND…: STATUS is what a failure makes of the exit status, that of a timeout is 2. `skvq bench` says 3 where
# outputs were wrong, which is a 1 here.
stage() {
    local name=$1 seconds weight=$3 begin=$SECONDS code text
    seconds=$(left "$2")
    shift 3
    if [ "$seconds" -lt 5 ]; then
        skip "$name" "the budget of $budget s is spent" && worse 2
        return
    fi
    echo "== $name"
    timeout --kill-after=10 "$seconds" "$@" 2>&1 | tee "$out/$name.log"
    code=${PIPESTATUS[0]}
    case $code in
        0) text="ok" ;;
        3) text="WRONG outputs" && worse 1 ;;
        124 | 137) text="not finished after $seconds s" && worse 2 ;;
        *) text="FAILED (exit status $code)" && worse "$weight" ;;
    esac
    summary+=("$(printf '%-12s %4d s  %s' "$name" "$((SECONDS - begin))" "$text")")
}

tool() { # a program of the CUDA toolkit, on the path or where toolkits are
    local place
    command -v "$1" && return
    for place in "${CUDA_HOME:-}" "${CUDA_PATH:-}" /usr/local/cuda; do
        if [ -n "$place" ] && [ -x "$place/bin/$1" ]; then echo "$place/bin/$1" && return; fi
    done
    return 1
}

environment() {
    date -u
    uname -a
    nvidia-smi
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,power.limit --format=csv
    "$1" - <<'PYTHON'
import platform, skvq, torch
from skvq import _native
from skvq.cuda_runtime import find_nvrtc
print("python", platform.python_version(), "torch", torch.__version__, "CUDA", torch.version.cuda, "skvq", skvq.__version__)
print("NVRTC", find_nvrtc(), _native.cuda_nvrtc(find_nvrtc()))
print(_native.cuda_status())
assert torch.cuda.is_available() and _native.cuda_status()["usable"]
PYTHON
}
export -f environment
if wanted environment; then stage environment 60 2 bash -c 'environment "$0"' "$python"; fi

if wanted warmup; then
    # The shapes of a model with eight kv heads of 128: all that warmup reads of a model is its configuration.
    mkdir -p "$out/model"
    cat >"$out/model/config.json" <<'JSON'
{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "float16", "num_hidden_layers": 2, "vocab_size": 1000,
 "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072}
JSON
    stage warmup 120 2 "$python" -m skvq warmup "$out/model"
fi

if wanted kernels; then stage kernels 180 1 "$python" "$here/check_kernels.py" --device "$device" --json "$out/kernels.json"; fi

if wanted generation; then
    stage generation 150 1 "$python" "$here/check_generation.py" --device "$device" --model "${MODEL:-}" --json "$out/generation.json"
fi

if wanted calibration; then
    stage calibration 90 1 "$python" "$here/check_calibration.py" --device "$device" --json "$out/calibration.json"
fi

# Both stop by themselves when their time is over, and write what they have.
bench=("$python" -m skvq bench attend --device "$device")
if wanted bench; then
    plot=()
    if "$python" -c 'import matplotlib' >/dev/null 2>&1; then plot=(--plot "$out/bench.png"); fi
    seconds=$(left 260)
    stage bench "$seconds" 2 "${bench[@]}" --budget "$((seconds / 2))" --json "$out/bench.json" ${plot[@]+"${plot[@]}"}
fi

if wanted many; then
    seconds=$(left 60)
    stage many "$seconds" 2 "${bench[@]}" --quick --tokens 32768 --queries 512 --budget "$((seconds / 2))" --json "$out/many.json"
fi

if wanted masked; then
    seconds=$(left 40)
    stage masked "$seconds" 2 "${bench[@]}" --quick --tokens 32768 --batches 8 --masked --no-peers --budget "$((seconds / 2))" --json "$out/masked.json"
fi

if wanted prompt; then
    stage prompt "$(left 60)" 2 "$python" -m skvq bench prompt --device "$device" --dtype float16 --json "$out/prompt.json"
fi

if wanted weights; then
    stage weights "$(left 60)" 2 "$python" -m skvq bench weights --device "$device" --rows 1 8 64 512 --json "$out/weights.json"
fi

if wanted capacity; then
    seconds=$(left 150)
    # shellcheck disable=SC2086  # CAPACITY is a list of options
    stage capacity "$seconds" 2 env PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True "$python" -m skvq bench capacity --device "$device" \
        --budget "$((seconds / 2))" --json "$out/capacity.json" ${CAPACITY:-}
fi

# Each allocation of its own, so that the sanitizer sees where one ends.
small=("$python" "$here/check_kernels.py" --device "$device" --small)
if ! wanted sanitizer; then
    :
elif sanitizer=$(tool compute-sanitizer); then
    # The checks also call torch's attention, and racecheck reports hazards inside a kernel of cuDNN's: it looks at our kernels alone, by
    # what their mangled names begin with.
    for kind in memcheck racecheck; do
        ours=()
        if [ "$kind" = racecheck ]; then ours=(--kernel-name kns=_ZN4skvq); fi
        stage "$kind" 90 1 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$kind" ${ours[@]+"${ours[@]}"} --error-exitcode 9 "${small[@]}"
    done
else
    skip sanitizer "compute-sanitizer is not installed"
fi

if ! wanted ncu; then
    :
elif [ "${NCU:-0}" != 1 ]; then
    skip ncu "NCU=1 runs it"
elif profiler=$(tool ncu); then
    stage ncu 180 2 "$profiler" --set full --kernel-name regex:attend --launch-skip 3 --launch-count 2 --force-overwrite \
        --export "$out/attend" "${bench[@]}" --tokens 131072 --batches 8 --heads 8:32 --formats K2V1.6 --rounds 1 --no-peers
else
    skip ncu "ncu is not installed"
fi

echo "== summary"
printf '%s\n' "${summary[@]}" | tee "$out/summary.txt"
echo "logs and JSON: $out"
exit "$status"

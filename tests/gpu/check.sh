#!/usr/bin/env bash
# One command on a machine with a CUDA GPU: are the kernels right, and how fast are they?
#
#   tests/gpu/check.sh [OUT_DIR]          (./gpu-check by default)
#
# Needs torch built for CUDA and an installed skvq; no Rust, no compiler, no network. The checkout must be that of the installed skvq, since
# its kernels/params.cuh says how kernels are called. Stages: environment, warmup, kernels, sanitizer (where compute-sanitizer is
# installed), bench, ncu (with NCU=1). A failed stage does not stop the others. Logs, kernels.json and bench.json are in OUT_DIR.
# Exit status: 0 all right; 1 a kernel is wrong; 2 a stage other than those of correctness failed or did not finish.
# Settings: PYTHON (python), DEVICE (cuda), BUDGET (200 seconds of bench), NCU.
set -u
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${1:-gpu-check}
python=${PYTHON:-python}
device=${DEVICE:-cuda}
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
summary=()
status=0

worse() { # a wrong kernel outweighs a stage that failed
    if [ "$status" -ne 1 ]; then status=$1; fi
}

# stage NAME SECONDS STATUS COMMAND…: STATUS is what a failure makes of the exit status, that of a timeout is 2
stage() {
    local name=$1 seconds=$2 weight=$3 begin=$SECONDS code text
    shift 3
    echo "== $name"
    timeout --kill-after=10 "$seconds" "$@" 2>&1 | tee "$out/$name.log"
    code=${PIPESTATUS[0]}
    case $code in
        0) text="ok" ;;
        124 | 137) text="not finished after $seconds s" && worse 2 ;;
        *) text="FAILED (exit status $code)" && worse "$weight" ;;
    esac
    summary+=("$(printf '%-12s %4d s  %s' "$name" "$((SECONDS - begin))" "$text")")
}

skip() {
    echo "== $1: skipped, $2"
    summary+=("$(printf '%-12s    - s  skipped, %s' "$1" "$2")")
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
stage environment 60 2 bash -c 'environment "$0"' "$python"

# The shapes of a model with eight kv heads of 128: all that warmup reads of a model is its configuration.
mkdir -p "$out/model"
cat >"$out/model/config.json" <<'JSON'
{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "float16", "num_hidden_layers": 2, "vocab_size": 1000,
 "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072}
JSON
stage warmup 120 2 "$python" -m skvq warmup "$out/model"

stage kernels 180 1 "$python" "$here/check_kernels.py" --device "$device" --json "$out/kernels.json"

# Each allocation of its own, so that the sanitizer sees where one ends.
small=("$python" "$here/check_kernels.py" --device "$device" --small)
if sanitizer=$(tool compute-sanitizer); then
    for kind in memcheck racecheck; do
        stage "$kind" 90 1 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$kind" --error-exitcode 9 "${small[@]}"
    done
else
    skip sanitizer "compute-sanitizer is not installed"
fi

bench=("$python" "$here/bench_attend.py" --device "$device")
stage bench 300 1 "${bench[@]}" --budget "${BUDGET:-200}" --json "$out/bench.json"

if [ "${NCU:-0}" != 1 ]; then
    skip ncu "NCU=1 runs it"
elif profiler=$(tool ncu); then
    stage ncu 180 2 "$profiler" --set full --kernel-name regex:attend --launch-skip 3 --launch-count 2 --force-overwrite \
        --export "$out/attend" "${bench[@]}" --tokens 131072 --batch 8 --groups 4 --formats k2v1.6 --repeats 1 --no-sdpa
else
    skip ncu "ncu is not installed"
fi

echo "== summary"
printf '%s\n' "${summary[@]}" | tee "$out/summary.txt"
echo "logs and JSON: $out"
exit "$status"

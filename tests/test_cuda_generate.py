"""Generation with a cache on a device, the whole way: models, `PackedLayer`, `CudaLayer`, kernels in the emulator.

Is: tokens of a lossless cache against transformers' own; rows, attention and logits at the default's bits against the
store on the CPU; the changes of a cache (cuda_generate_cases.py). Is not: a word on a GPU; tensors are the CPU's here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tiny_directory
from cuda_kernel_driver import build_driver, harness
from cuda_stand_ins import build_nvrtc, run
from skvq.calibrate.fitted_options import fitted_key_options, fitted_value_options
from skvq.plan import LayerPlan
from skvq.warmup import AttentionShape, kernel_instances

sys.path.insert(0, str(Path(__file__).parent))
import cuda_generate_cases as cases

pytestmark = [
    pytest.mark.skipif(harness.compiler() is None, reason="no C++ compiler"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="drivers are found through LD_LIBRARY_PATH"),
]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A driver with what `skvq warmup` would compile for these layers, and an NVRTC that knows its names."""
    plans = [LayerPlan.from_config(config) for config in (cases.RAW, cases.LOW, cases.STATIC)]
    streams = [(plan.keys.options.resolved(), plan.values.options.resolved()) for plan in plans]
    shapes = [AttentionShape(64, "float32", 2, *options) for options in streams]
    fitted = fitted_key_options(cases.FITTED.keys, 64)
    assert fitted is not None
    values = fitted_value_options(cases.FITTED.values)
    shapes.append(AttentionShape(64, "float32", 2, fitted.resolved(), values.resolved(), turning=True))
    wanted = [x for shape in shapes for x in kernel_instances(shape) if x.file != "repack.cuh"]
    nvrtc = build_nvrtc(tmp_path_factory.mktemp("nvrtc"), 12, 4, "-DEMULATED", "-ldl")
    return build_driver(map(str, wanted)), nvrtc


def check(stand_ins: tuple[Path, str], *arguments: str) -> None:
    driver, nvrtc = stand_ins
    code = "import cuda_generate_cases as cases, sys\ncases.main(*sys.argv[1:])"
    printed, _ = run(code, driver, arguments, SKVQ_NVRTC=nvrtc, SKVQ_CACHE_DIR="")
    assert printed == "equal\n"


@pytest.mark.parametrize("way", cases.WAYS)
def test_a_lossless_cache_gives_the_same_tokens(stand_ins: tuple[Path, str], way: str) -> None:
    check(stand_ins, "same", "llama", "sdpa", way)


@pytest.mark.parametrize("family", ["gemma2", "gpt-oss"])
def test_softcap_and_sink_logits(stand_ins: tuple[Path, str], family: str) -> None:
    check(stand_ins, "same", family, "skvq", "greedy")


@pytest.mark.parametrize(("family", "attention"), [("llama", "sdpa"), ("gemma2", "skvq")])
def test_logits_are_close_at_low_bits(stand_ins: tuple[Path, str], family: str, attention: str) -> None:
    check(stand_ins, "close", family, attention)


def test_steps_of_one_launch_are_those_of_launches_apart(stand_ins: tuple[Path, str]) -> None:
    check(stand_ins, "steps")


def test_a_wrong_scale_is_found(stand_ins: tuple[Path, str]) -> None:
    check(stand_ins, "wrong", "gemma2", "skvq")


@pytest.mark.parametrize(("family", "attention"), [("llama", "sdpa"), ("gemma2", "skvq")])
def test_a_prompt_is_fitted_to(stand_ins: tuple[Path, str], family: str, attention: str) -> None:
    check(stand_ins, "fitted", family, attention)


def test_changes_of_a_cache(stand_ins: tuple[Path, str]) -> None:
    check(stand_ins, "changes")


@pytest.mark.parametrize("way", cases.CAPTURED)
def test_a_captured_step_is_replayed(stand_ins: tuple[Path, str], way: str) -> None:
    check(stand_ins, "replayed", way)


def test_the_script_for_a_gpu(stand_ins: tuple[Path, str], tmp_path: Path) -> None:
    """`gpu/check_generation.py` with tiny models and with one from a directory, as check.sh calls it."""
    driver, nvrtc = stand_ins
    model = tiny_directory.save(tmp_path / "model", "llama", head_dim=64, num_hidden_layers=2)
    script = Path(__file__).parent / "gpu" / "check_generation.py"
    command = [sys.executable, str(script), "--device", "cpu", "--small", "--model", str(model)]
    command += ["--prompt-tokens", "420", "--new-tokens", "5", "--json", str(tmp_path / "found.json")]
    paths = os.pathsep.join(filter(None, (str(driver), os.environ.get("LD_LIBRARY_PATH"))))
    own = {"LD_LIBRARY_PATH": paths, "PYTHONPATH": os.pathsep.join(sys.path), "SKVQ_NVRTC": nvrtc, "SKVQ_CACHE_DIR": ""}
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert [check["kind"] for check in found["checks"]] == ["tokens", "logits", "fitted", "tokens", "logits"]
    assert all(check["passed"] for check in found["checks"])
    assert all(0.0 < check["error"] < check["limit"] for check in found["checks"] if "error" in check)
    assert found["card"]["name"].startswith("Emulated")

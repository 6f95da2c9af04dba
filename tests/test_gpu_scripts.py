"""The scripts that check the kernels on a GPU, without one: on the emulated driver of kernels/emu, small.

Is: `check_kernels.py --small` from compilation by NVRTC to JSON; its arithmetic and that of `check_generation.py`
(which test_cuda_generate.py runs); the stages and exit status of check.sh. Is not: a word on streams and graphs, which
a GPU has to show; the benchmarks that check.sh calls are in test_cuda_bench.py.
"""

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from skvq import SkvqError
from skvq.cuda_runtime import find_nvrtc

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels" / "emu"))
sys.path.insert(0, str(Path(__file__).with_name("gpu")))
import check_calibration
import check_generation
import check_kernels
from harness import build, compiler, unit_of
from machine import FILES, instance_of

from tiny_models import build as build_model

GPU = Path(__file__).with_name("gpu")
NO_BASH = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of a process whose driver runs the scripts' kernels in the emulator."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the stand-in of the driver is found through LD_LIBRARY_PATH, which is Linux's")
    if compiler() is None:
        pytest.skip("needs a C++ compiler for the emulator")
    try:
        find_nvrtc()
    except SkvqError:
        pytest.skip("no NVRTC here")
    names = check_kernels.instances(check_kernels.SMALL_CODECS, check_kernels.SMALL_CALLS)
    headers = sorted(set(FILES.values()))
    units = {f"unit{index}.cpp": unit_of(names[index::4], headers) for index in range(4)}
    units["driver.cpp"] = '#define EMULATED_INSTANCES "registry.hpp"\n#include "emu/fake_cuda.cpp"\n'
    units["entry.cpp"] = '#include "emu/entry.cpp"\n'
    library = build("libcuda.so.1", units, ("-O0",), ("-shared", "-Wl,-soname,libcuda.so.1"))
    paths = os.pathsep.join(filter(None, (str(library.parent), os.environ.get("LD_LIBRARY_PATH"))))
    own = {"LD_LIBRARY_PATH": paths, "PYTHONPATH": os.pathsep.join(sys.path)}
    return os.environ | own | {"SKVQ_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}


def run(script: str, environment: dict[str, str], *arguments: str) -> str:
    """What a script prints; the test fails if it does."""
    command = [sys.executable, str(GPU / script), "--device", "cpu", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_kernels_are_right_in_the_emulated_driver(environment: dict[str, str], tmp_path: Path) -> None:
    printed = run("check_kernels.py", environment, "--small", "--json", str(tmp_path / "found.json"))
    assert "FAIL" not in printed
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["machine"]["card"]["name"].startswith("Emulated")
    done = [check for check in found["checks"] if "skipped" not in check]
    assert {check["kind"] for check in done} == {"encode", "append", "decode", "repack", "statistics", "attention"}
    assert all(check["passed"] for check in done)
    skipped = [check for check in found["checks"] if "skipped" in check]
    assert {(check["kind"], check["skipped"]) for check in skipped} == {
        ("streams", "needs a GPU"),
        ("graph", "needs a GPU"),
    }


def test_calibration_is_checked_against_itself(tmp_path: Path) -> None:
    environment = dict(os.environ) | {"PYTHONPATH": os.pathsep.join(sys.path)}
    printed = run("check_calibration.py", environment, "--json", str(tmp_path / "found.json"))
    assert "FAIL" not in printed
    checks = json.loads((tmp_path / "found.json").read_text())["checks"]
    assert all(check["passed"] for check in checks)
    assert [check["kind"] for check in checks] == ["statistics"] * 2 + ["weights"] * 2 + ["product"] * 3
    assert all(check["same_codes"] == 1.0 for check in checks[2:4])
    assert all(check["error"] > 0.0 for check in checks[4:])
    assert all(check["sums"] > 20 for check in checks[:2])


@pytest.mark.parametrize("check", [check_calibration.check_statistics, check_calibration.check_weights])
def test_another_model_is_noticed(check: Callable[[str, str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = itertools.count()
    monkeypatch.setattr(check_calibration, "build", lambda family: build_model(family, seed=next(seeds)))
    with pytest.raises(AssertionError, match=r"of the largest|a loss of|codes are those"):
        check("llama", "cpu")


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def test_a_missing_number_is_an_error() -> None:
    exact = torch.ones(2, 3, dtype=torch.float64)
    assert check_kernels.error_of(exact.float() + 0.5, exact) == 0.5
    assert check_kernels.error_of(torch.tensor([[1.0, math.nan, 1.0]]), exact[:1]) == math.inf
    results = check_kernels.Results()
    results.add("attention", "one", True)
    results.skip("graph", "two", "needs a GPU")
    assert results.failed == 0
    results.add("attention", "three", False)
    assert results.failed == 1


def test_expressions_are_taken_apart() -> None:
    layout = "skvq::Layout<skvq::keys, 64, 2, 64, 1, 1>"
    found = instance_of(f"skvq::fold<skvq::Half, {layout}>")
    assert (found.file, found.kernel, found.arguments) == ("attend.cuh", "skvq::fold", ("skvq::Half", layout))
    assert str(found) == f"skvq::fold<skvq::Half, {layout}>"


def test_likeliest_tokens_may_differ_where_they_are_close() -> None:
    expected = torch.tensor([[1.0, 0.99, -1.0], [0.5, 0.0, -2.0]])
    assert check_generation.agreement(expected, expected, 0.02)["same_tokens"] == 1.0
    found = torch.tensor([[0.99, 1.0, -1.0], [0.5, 0.0, -2.0]])
    assert check_generation.agreement(expected, found, 0.02)["same_tokens"] == 0.5
    with pytest.raises(AssertionError, match=r"logits differ by 2\.50e-01 of the largest"):
        check_generation.agreement(expected, torch.tensor([[1.0, 0.99, -1.0], [0.0, 0.0, -2.0]]), 0.02)
    with pytest.raises(AssertionError, match="logits differ by inf"):
        check_generation.agreement(expected, torch.full((2, 3), math.nan), 0.02)


def test_a_failed_generation_is_noted() -> None:
    def fails() -> dict[str, float]:
        raise AssertionError("tokens differ")

    results = check_generation.Results()
    results.run("tokens", "one", lambda: {"tokens": 3})
    results.run("tokens", "two", fails)
    assert results.failed == 1
    assert [check.get("reason") for check in results.checks] == [None, "tokens differ"]


# ---- check.sh --------------------------------------------------------------------------------------------------------


def check_sh(folder: Path, fails: str, status: int, **settings: str) -> subprocess.CompletedProcess[str]:
    """check.sh with a Python that does nothing, and fails where a name is among its arguments."""
    stub = folder / "python"
    stub.write_text(f'#!/bin/sh\ncase "$*" in *"{fails}"*) exit {status};; esac\necho "did $*"\n')
    stub.chmod(0o755)
    command = ["bash", str(GPU / "check.sh"), str(folder / "out")]
    own = {"PYTHON": str(stub), "PATH": "/usr/bin:/bin", "CUDA_HOME": "", "CUDA_PATH": ""} | settings
    return subprocess.run(
        command, env=os.environ | own, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60, check=False
    )


@NO_BASH
def test_check_sh_is_bash() -> None:
    subprocess.run(["bash", "-n", str(GPU / "check.sh")], check=True)


@NO_BASH
@pytest.mark.parametrize(
    ("fails", "status", "expected"),
    [
        ("nothing-at-all", 1, 0),
        ("check_kernels.py", 1, 1),
        ("check_generation.py", 1, 1),
        ("check_calibration.py", 1, 1),
        ("warmup", 1, 2),
        ("bench attend", 124, 2),
        ("bench attend", 1, 2),
        ("bench attend", 3, 1),
        ("bench capacity", 1, 2),
    ],
)
def test_check_sh_goes_on_and_says_what_failed(tmp_path: Path, fails: str, status: int, expected: int) -> None:
    done = check_sh(tmp_path, fails, status)
    assert done.returncode == expected, done.stdout + done.stderr
    summary = (tmp_path / "out" / "summary.txt").read_text()
    for stage in ("environment", "warmup", "kernels", "generation", "bench", "many", "masked", "capacity", "ncu"):
        assert stage in summary
    assert any(word in summary for word in ("FAILED", "WRONG", "not finished")) == (expected != 0)
    for stage, command in (("bench", "bench attend"), ("capacity", "bench capacity")):
        assert "did " in (tmp_path / "out" / f"{stage}.log").read_text() or fails == command


@NO_BASH
def test_check_sh_runs_the_stages_that_are_asked_for(tmp_path: Path) -> None:
    done = check_sh(
        tmp_path, "nothing-at-all", 1, STAGES="generation capacity", MODEL="/a/model", CAPACITY="--layers 2"
    )
    assert done.returncode == 0
    summary = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    assert [line.split()[0] for line in summary] == ["generation", "capacity"]
    assert "--model /a/model" in (tmp_path / "out" / "generation.log").read_text()
    assert "--layers 2" in (tmp_path / "out" / "capacity.log").read_text()


@NO_BASH
def test_check_sh_keeps_to_its_budget(tmp_path: Path) -> None:
    done = check_sh(tmp_path, "nothing-at-all", 1, BUDGET="4")
    assert done.returncode == 2
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert summary.count("skipped, the budget of 4 s is spent") == 11


@NO_BASH
def test_racecheck_looks_at_our_kernels_alone(tmp_path: Path) -> None:
    sanitizer = tmp_path / "bin" / "compute-sanitizer"
    sanitizer.parent.mkdir()
    sanitizer.write_text('#!/bin/sh\necho "sanitizer $*"\n')
    sanitizer.chmod(0o755)
    done = check_sh(tmp_path, "nothing-at-all", 1, STAGES="sanitizer", PATH=f"{sanitizer.parent}:/usr/bin:/bin")
    assert done.returncode == 0, done.stdout + done.stderr
    logs = [(tmp_path / "out" / f"{kind}.log").read_text() for kind in ("memcheck", "racecheck")]
    assert "--tool memcheck --error-exitcode 9" in logs[0]
    assert "--tool racecheck --kernel-name kns=_ZN4skvq --error-exitcode 9" in logs[1]
    assert all("check_kernels.py" in log for log in logs)

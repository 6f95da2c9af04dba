"""The scripts that check and time the kernels on a GPU, without one: on the emulated driver of kernels/emu, small.

Is: `check_kernels.py --small` and one line of `bench_attend.py` from compilation by NVRTC to JSON; their arithmetic;
the stages and exit status of check.sh. Is not: a word on speed, nor on streams and graphs, which a GPU has to show.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from skvq import SkvqError
from skvq.cuda_runtime import find_nvrtc

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels" / "emu"))
sys.path.insert(0, str(Path(__file__).with_name("gpu")))
import bench_attend
import check_kernels
from bench_attend import Report, Shape
from harness import build, compiler, unit_of
from machine import FILES, Machine, instance_of
from pipeline import Call
from timing import Clock

GPU = Path(__file__).with_name("gpu")
NO_BASH = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
BENCH = ["--formats", "k2v1.6", "--tokens", "128", "--batch", "1", "--groups", "4", "--kv-heads", "2", "--repeats", "1"]


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
    names += bench_attend.instances(bench_attend.formats(2)["k2v1.6"], [4])
    names = list(dict.fromkeys(names))
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
    assert {check["kind"] for check in done} == {"encode", "decode", "repack", "statistics", "attention"}
    assert all(check["passed"] for check in done)
    skipped = [check for check in found["checks"] if "skipped" in check]
    assert {(check["kind"], check["skipped"]) for check in skipped} == {
        ("streams", "needs a GPU"),
        ("graph", "needs a GPU"),
    }


def test_bench_measures_and_reports(environment: dict[str, str], tmp_path: Path) -> None:
    printed = run("bench_attend.py", environment, *BENCH, "--json", str(tmp_path / "found.json"))
    assert "1 measurements, all right" in printed
    found = json.loads((tmp_path / "found.json").read_text())
    (entry,) = found["packed"]
    assert entry["passed"]
    assert 0.0 < entry["error"] < bench_attend.ERROR
    assert entry["packed_bytes"] == 2 * 128 * (33 + 27)
    assert set(entry["stages"]) == {"fold", "attend", "unfold", "plain", "merge"}
    fastest = min(one["seconds"]["median"] for one in found["sdpa"] if "seconds" in one)
    assert entry["ratio"] == pytest.approx(fastest / entry["step"]["median"])
    share = entry["packed_bytes"] / entry["stages"]["attend"]["median"] / found["copy_bandwidth"]
    assert entry["attend_share"] == pytest.approx(share)
    assert all("seconds" in one or "unavailable" in one for one in found["sdpa"])
    assert found["misses"] == []


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def measured(seconds: float) -> dict[str, float]:
    return {"median": seconds, "least": seconds, "largest": seconds, "repeats": 1}


def test_the_table_tells_rates_and_misses(capsys: pytest.CaptureFixture[str]) -> None:
    shape = Shape(tokens=131072, batch=8, group=4, kv_heads=8)
    size = shape.packed_bytes(bench_attend.formats(8)["k2v1.6"])
    assert size == 8 * 8 * 131072 * 60
    assert shape.f16_bytes == 8 * 8 * (131072 + 4 + 128) * 512
    report = Report({"device": "cuda:0"}, copy_bandwidth=3e12)
    for name, seconds in (("flash", 1600e-6), ("math", 1.0)):
        report.sdpa.append({"name": name, "shape": dict(vars(shape)), "seconds": measured(seconds)})
    report.sdpa.append({"name": "cudnn", "shape": dict(vars(shape)), "unavailable": "why"})
    entry: dict[str, Any] = {"format": "k2v1.6", "shape": dict(vars(shape)), "error": 1e-4, "passed": True}
    entry |= {"packed_bytes": size, "step": measured(250e-6), "stages": {"attend": measured(200e-6)}}
    report.finish(entry, shape)
    assert entry["fastest_f16"] == "flash"
    assert entry["ratio"] == pytest.approx(6.4)
    assert entry["attend_share"] == pytest.approx(size / 200e-6 / 3e12)
    assert "83.9%" in capsys.readouterr().out
    assert report.misses() == ["k2v1.6, 131072 tokens, batch 8, ratio 4: 6.40x of f16, goal 7x"]
    report.skip("too large")
    assert report.skipped == ["too large"]


def test_splits_fill_the_card_and_stay_in_a_block() -> None:
    form = bench_attend.formats(8)["k2v1.6"]
    call = Call(form.keys, form.values, kv_heads=8, packed=524288)
    choices = bench_attend.pages_per_split_choices(call, 132)
    assert choices == sorted(choices)
    assert choices[-1] == math.ceil(4096 * 8 / (132 * 4))
    assert bench_attend.pages_per_split_choices(Call(form.keys, form.values, packed=128), 132) == [1]
    blocks = bench_attend.formats(8)["blocks"]
    choices = bench_attend.pages_per_split_choices(Call(blocks.keys, blocks.values, kv_heads=8, packed=524288), 132)
    assert set(choices) <= {1, 2}


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


def test_slow_work_is_repeated_less() -> None:
    machine = Machine.__new__(Machine)
    machine.device = torch.device("cpu")
    clock, runs = Clock(machine, repeats=3), []
    times = clock.median(lambda: runs.append(1))
    assert times["repeats"] == 3
    assert len(runs) == 4
    assert times["least"] <= times["median"] <= times["largest"]


# ---- check.sh --------------------------------------------------------------------------------------------------------


def check_sh(folder: Path, fails: str, status: int) -> subprocess.CompletedProcess[str]:
    """check.sh with a Python that does nothing, and fails where a name is among its arguments."""
    stub = folder / "python"
    stub.write_text(f'#!/bin/sh\ncase "$*" in *{fails}*) exit {status};; esac\necho "did $*"\n')
    stub.chmod(0o755)
    command = ["bash", str(GPU / "check.sh"), str(folder / "out")]
    own = {"PYTHON": str(stub), "PATH": "/usr/bin:/bin", "CUDA_HOME": "", "CUDA_PATH": ""}
    return subprocess.run(
        command, env=os.environ | own, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60, check=False
    )


@NO_BASH
def test_check_sh_is_bash() -> None:
    subprocess.run(["bash", "-n", str(GPU / "check.sh")], check=True)


@NO_BASH
@pytest.mark.parametrize(
    ("fails", "status", "expected"),
    [("nothing-at-all", 1, 0), ("check_kernels.py", 1, 1), ("warmup", 1, 2), ("bench_attend.py", 124, 2)],
)
def test_check_sh_goes_on_and_says_what_failed(tmp_path: Path, fails: str, status: int, expected: int) -> None:
    done = check_sh(tmp_path, fails, status)
    assert done.returncode == expected, done.stdout + done.stderr
    summary = (tmp_path / "out" / "summary.txt").read_text()
    for stage in ("environment", "warmup", "kernels", "bench", "ncu"):
        assert stage in summary
    assert ("FAILED" in summary or "not finished" in summary) == (expected != 0)
    assert "did " in (tmp_path / "out" / "bench.log").read_text() or fails == "bench_attend.py"

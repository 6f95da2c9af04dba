"""The command line: what is accepted, what is refused, what reaches the functions behind it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from skvq import cli, demo
from skvq.bench import attend, growth, machine
from skvq.demo import DemoOptions
from skvq.models import ExtraNotInstalledError, fast_dtype


@pytest.fixture
def demo_options(monkeypatch: pytest.MonkeyPatch) -> list[DemoOptions]:
    """The options of every call of the demo, which is not run."""
    calls: list[DemoOptions] = []
    monkeypatch.setattr(demo, "run_demo", lambda options: calls.append(options) or {})
    monkeypatch.setattr(demo, "print_report", lambda report: None)
    return calls


def test_demo_without_options_is_the_default(demo_options: list[DemoOptions]) -> None:
    assert cli.main(["demo"]) == 0
    assert demo_options == [DemoOptions(dtype=fast_dtype())]


def test_demo_options_arrive(demo_options: list[DemoOptions]) -> None:
    line = (
        "--model m --dtype float32 --attn skvq --key-bits 4 --value-bits 1.5 --window 64 --sinks 0 --prompt-tokens 100"
    )
    line += " --new-tokens 7 --scored-tokens 9 --json out.json --threads 2"
    assert cli.main(["demo", *line.split()]) == 0
    assert demo_options == [
        DemoOptions(
            model="m",
            dtype="float32",
            attention="skvq",
            key_bits=4.0,
            value_bits=1.5,
            window=64,
            sinks=0,
            prompt_tokens=100,
            new_tokens=7,
            scored_tokens=9,
            json=Path("out.json"),
            threads=2,
        )
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("demo --key-bits 5", "expected one of 16, 8, 4, 3, 2, 1.6, 1.5"),
        ("demo --value-bits two", "expected one of 16, 8, 4, 3, 2, 1.6, 1.5"),
        ("demo --window 0", "a whole number of at least 1"),
        ("demo --new-tokens 1", "a whole number of at least 2"),
        ("demo --attn flash", "invalid choice"),
        ("bench attend --formats K2", "expected 'raw' or like 'K2V1.6'"),
        ("bench attend --heads 8:30", "QUERY a multiple of KV"),
        ("bench", "the following arguments are required"),
        ("", "the following arguments are required"),
    ],
)
def test_bad_arguments_say_what_was_expected(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(line.split())
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("error", [ExtraNotInstalledError("no model here"), ValueError("too long"), OSError("no disk")])
def test_expected_errors_are_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(options: DemoOptions) -> None:
        raise error

    monkeypatch.setattr(demo, "run_demo", fail)
    assert cli.main(["demo"]) == 1
    assert capsys.readouterr().err == f"skvq: {error}\n"


def test_attend_options(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(attend, "run_attend", lambda options: calls.append(options) or {})
    assert cli.main(["bench", "attend"]) == 0
    assert cli.main(["bench", "attend", "--quick", "--warm", "--no-static"]) == 0
    line = "bench attend --heads 2:6 --batches 1 2 --tokens 512 --queries 3 --formats K2V2 raw"
    assert cli.main(line.split()) == 0
    plain, quick, own = calls
    assert plain == attend.AttendOptions()
    assert (quick.tokens, quick.batches, quick.warm, quick.static) == ((4096, 32768), (1,), True, False)
    assert (own.heads, own.batches, own.tokens, own.queries) == (((2, 6),), (1, 2), (512,), 3)
    assert own.formats == ("K2V2", "raw")


def test_json_file_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(growth, "run_growth", lambda options: {"benchmark": "growth", "tokens": options.tokens})
    target = tmp_path / "new folder" / "growth.json"
    assert cli.main(["bench", "growth", "--tokens", "512", "--json", str(target)]) == 0
    written = json.loads(target.read_text())
    assert set(written) == {"benchmark", "tokens", "load_average_at_start"}
    assert written["tokens"] == 512
    assert [path.name for path in target.parent.iterdir()] == ["growth.json"]


def test_a_busy_machine_is_mentioned(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 4)
    for load, warned in ((1.5, False), (2.5, True)):
        monkeypatch.setattr(machine.os, "getloadavg", lambda load=load: (load, 0.0, 0.0), raising=False)
        assert machine.warn_if_busy() == load
        assert ("load 2.5 on 4 cores" in capsys.readouterr().err) == warned


def test_threads_are_set_for_torch_and_skvq(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from skvq import _native

    before = torch.get_num_threads(), _native.num_threads()
    try:
        machine.set_threads(1)
        assert (torch.get_num_threads(), _native.num_threads()) == (1, 1)
        torch.set_num_threads(2)
        machine.set_threads(None)
        assert (torch.get_num_threads(), _native.num_threads()) == (2, 2)
        with pytest.raises(ValueError, match="threads is 0"):
            machine.set_threads(0)
    finally:
        torch.set_num_threads(before[0])
        _native.set_num_threads(before[1])


def test_python_dash_m_is_the_command() -> None:
    found = subprocess.run([sys.executable, "-m", "skvq", "--version"], capture_output=True, text=True, check=True)
    assert found.stdout.startswith("skvq ")


@pytest.mark.parametrize(
    ("capability", "expected"), [("AVX512", "bfloat16"), ("AVX2", "float32"), ("DEFAULT", "float32")]
)
def test_the_dtype_follows_the_processor(monkeypatch: pytest.MonkeyPatch, capability: str, expected: str) -> None:
    import argparse

    import torch

    from skvq.arguments import resolve_dtype

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    for given, wanted in (("auto", expected), ("float16", "float16")):
        arguments = argparse.Namespace(dtype=given)
        resolve_dtype(arguments)
        assert arguments.dtype == wanted
    resolve_dtype(argparse.Namespace())

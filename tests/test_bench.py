"""The benchmarks, on tiny grids: that they measure what they say and that their reports have the promised form."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_directory
from skvq.bench import attend, encode, generate, growth, layers, machine, plot, step
from skvq.bench.layers import Shape
from skvq.bench.timing import time_in_turns
from skvq.cli import main

REPORT_KEYS = {"benchmark", "machine", "settings", "rows"}
MACHINE_KEYS = {"processor", "cores", "platform", "python", "torch_threads", "skvq_threads", "isa", "versions", "time"}


def check(report: dict[str, Any], benchmark: str) -> list[dict[str, Any]]:
    """The form that all reports share; returns the rows."""
    assert set(report) >= REPORT_KEYS
    assert report["benchmark"] == benchmark
    assert set(report["machine"]) == MACHINE_KEYS
    json.dumps(report)
    return report["rows"]


@pytest.fixture
def copies_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy bandwidth is not measured."""
    monkeypatch.setattr(attend, "measure_copy_bandwidth", lambda: 1e10)


def test_formats() -> None:
    assert layers.parse_format("K2V1.6") == ("2", "1.6")
    assert layers.parse_format("raw") == ("raw", "raw")
    assert layers.parse_format("fitted") == ("2", "1.6")
    assert layers.parse_format("KrawV8") == ("raw", "8")
    for wrong in ("K2", "V2K2", "K5V2", "K2V1.6 ", "K1x6V2"):
        with pytest.raises(ValueError, match=r"expected 'raw' or like 'K2V1\.6'"):
            layers.parse_format(wrong)


@pytest.mark.parametrize("name", attend.FORMATS)
def test_every_format_of_the_benchmark_makes_a_layer(name: str) -> None:
    shape = Shape(num_key_value_heads=2, num_attention_heads=2, batch=1, tokens=600, head_dim=64)
    for static in (False, True):
        layer = layers.packed_layer(shape, name, static=static)
        for keys, values in layers.random_rows(shape, torch.bfloat16):
            layer.append(keys, values)
        assert layer.length == 600
        assert (layer.bits_per_element < 16) == (name != "raw")


def test_turns_are_fair_and_bounded() -> None:
    calls: list[str] = []
    contestants = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    times = time_in_turns(contestants, rounds=4, flush=lambda: calls.append("-"))
    assert "".join(calls) == "ab" + "-a-b" * 4
    assert times["a"].rounds == 4
    assert times["a"].fastest <= times["a"].median <= times["a"].slowest
    assert time_in_turns(contestants, rounds=100, seconds=0.0)["b"].rounds == 3


def test_copy_bandwidth_is_plausible() -> None:
    assert 1e8 < machine.measure_copy_bandwidth(mebibytes=8, rounds=3) < 1e13


def test_memory_of_the_process() -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc on this platform: reports say None")
    machine.release_free_memory()
    machine.reset_peak()
    before = machine.resident_bytes()
    block = torch.ones(2**24)
    peak = machine.peak_resident_bytes()
    assert before is not None
    assert peak is not None
    assert peak - before > 0.9 * block.nbytes


@pytest.mark.usefixtures("copies_fast")
@pytest.mark.parametrize("queries", [1, 40])
def test_attend(queries: int) -> None:
    shapes: dict[str, Any] = {"heads": ((1, 2), (2, 2)), "batches": (2,), "tokens": (700,), "head_dim": 64}
    options = attend.AttendOptions(formats=("K2V1.6", "raw"), queries=queries, rounds=1, warm=True, **shapes)
    rows = check(attend.run_attend(options), "attend")
    names = ["sdpa float32", "sdpa bfloat16", "K2V1.6", "K2V1.6 static", "raw"]
    assert [row["contestant"] for row in rows] == names * 2
    by_name = {row["contestant"]: row for row in rows[:5]}
    assert by_name["sdpa float32"]["times_faster_than_sdpa_float32"] == 1
    assert by_name["sdpa float32"]["bytes"] == 2 * 2 * 1 * 700 * 64 * 4
    assert by_name["raw"]["relative_distance"] < 0.02
    assert 0.02 < by_name["K2V1.6"]["relative_distance"] < 1
    assert by_name["K2V1.6"]["bits_per_element"] < 8
    for row in rows:
        assert row["gigabytes_per_second"] == pytest.approx(row["bytes"] / row["milliseconds"] / 1e6)
        assert row["share_of_copy_bandwidth"] == pytest.approx(row["gigabytes_per_second"] / 10)


@pytest.mark.usefixtures("copies_fast")
def test_attend_leaves_out_what_does_not_fit_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attend, "available_bytes", lambda: 10**6)
    options = attend.AttendOptions(formats=("raw",), heads=((1, 1),), batches=(1,), tokens=(65536,))
    (row,) = check(attend.run_attend(options), "attend")
    assert "needs about 0.2 GiB" in row["skipped"]


def test_encode() -> None:
    options = encode.EncodeOptions(
        formats=("K2V1.6", "raw"), head_dims=(64,), num_key_value_heads=1, tokens=512, rounds=1
    )
    rows = check(encode.run_encode(options), "encode")
    assert [(row["kind"], row["format"], row.get("static")) for row in rows] == [
        ("codec", "2", None),
        ("codec", "1.6", None),
        ("append", "K2V1.6", False),
        ("append", "K2V1.6", True),
        ("append", "raw", False),
    ]
    for row in rows:
        assert row["nanoseconds_per_row"] * row["rows_per_second"] == pytest.approx(1e9)


def test_encode_as_a_share_of_prefill(tmp_path: Path) -> None:
    model = str(tiny_directory.save(tmp_path / "model", "qwen3"))
    options = encode.EncodeOptions(
        formats=("K2V1.6",), head_dims=(), tokens=512, rounds=1, with_model=True, model=model, dtype="float32"
    )
    rows = check(encode.run_encode(options), "encode")
    assert [row["static"] for row in rows] == [False, True]
    for row in rows:
        assert row["full_attention_layers"] == 3
        assert row["share"] == pytest.approx(row["append_seconds"] / row["prefill_seconds"])


def test_step() -> None:
    options = step.StepOptions(tokens=(300,), num_key_value_heads=1, num_attention_heads=2, head_dim=64, steps=2)
    (row,) = check(step.run_step(options), "step")
    assert row["update_microseconds"] > 0
    assert row["attention_microseconds"] > 0
    assert 0 < row["kernel_microseconds"] < row["attention_microseconds"]
    assert row["overhead_microseconds"] > 0
    assert row["stock_microseconds"] > 0


def test_growth(tmp_path: Path) -> None:
    options = growth.GrowthOptions(num_key_value_heads=1, head_dim=64, tokens=2048, stretches=8)
    report = growth.run_growth(options)
    rows = check(report, "growth")
    assert [row["tokens"] for row in rows] == [256 * (i + 1) for i in range(8)]
    assert report["last_over_first_quarter"] > 0
    assert report["memory"]["layer_bytes"] > 0


def test_generate_runs_what_it_can_and_gives_reasons_for_the_rest(tmp_path: Path) -> None:
    model = str(tiny_directory.save(tmp_path / "model", "gemma3"))
    options = generate.GenerateOptions(
        model=model,
        dtype="float32",
        formats=((2.0, 1.6), (16.0, 16.0)),
        prompt_tokens=700,
        new_tokens=4,
        rounds=1,
        turns=5,
    )
    report = generate.run_generate(options)
    rows = {row["cache"]: row for row in check(report, "generate")}
    assert list(rows)[:3] == ["DynamicCache", "QuantizedDynamicCache K2V1.6", "QuantizedDynamicCache K16V16"]
    assert rows["QuantizedDynamicCache K16V16"]["same_tokens_as_dynamic_cache"] == 4
    assert rows["QuantizedDynamicCache K2V1.6"]["cache_bytes"] < rows["DynamicCache"]["cache_bytes"]
    assert rows["DynamicCache"]["step_speed_over_dynamic_cache"] == 1.0
    low, high = rows["QuantizedDynamicCache K2V1.6"]["step_speed_quartiles"]
    assert 0.0 < low <= rows["QuantizedDynamicCache K2V1.6"]["step_speed_over_dynamic_cache"] <= high
    others = [row for name, row in rows.items() if name.startswith("QuantizedCache")]
    assert len(others) == 5
    # The newest transformers refuse a model with sliding layers; older ones try, and some fail.
    assert all(row["skipped"] if "skipped" in row else row["decode_tokens_per_second"] > 0 for row in others)
    assert any("skipped" in row for row in others)
    plots(report, tmp_path)


def test_generate_runs_the_caches_that_are_named(tmp_path: Path) -> None:
    model, plan = str(tiny_directory.save(tmp_path / "model")), str(tmp_path / "plan.safetensors")
    assert main(["calibrate", model, "-o", plan, "--tokens", "200", "--dtype", "float32"]) == 0
    options = {"model": model, "dtype": "float32", "prompt_tokens": 400, "new_tokens": 3, "rounds": 1}
    report = generate.run_generate(generate.GenerateOptions(**options, plan=plan, caches=("plan", "K2V2")))
    rows = {row["cache"]: row for row in report["rows"]}
    assert list(rows) == ["DynamicCache", "QuantizedDynamicCache K2V2", "QuantizedDynamicCache plan"]
    assert rows["QuantizedDynamicCache plan"]["cache_bytes"] < rows["DynamicCache"]["cache_bytes"]
    with pytest.raises(ValueError, match="caches='K5': expected a part of one of the names DynamicCache, Quantized"):
        generate.run_generate(generate.GenerateOptions(**options, caches=("K5",)))


def plots(report: dict[str, Any], folder: Path) -> None:
    """Saves the plot of a report, as the command does."""
    pytest.importorskip("matplotlib", reason="plots need matplotlib, which the extra bench installs")
    plot.plot(report, folder / f"{report['benchmark']}.png")
    assert (folder / f"{report['benchmark']}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("copies_fast")
def test_plots(tmp_path: Path) -> None:
    shapes: dict[str, Any] = {"heads": ((1, 2),), "batches": (1,), "tokens": (300, 600), "head_dim": 64}
    plots(attend.run_attend(attend.AttendOptions(formats=("K2V2",), rounds=1, warm=True, **shapes)), tmp_path)
    plots(growth.run_growth(growth.GrowthOptions(num_key_value_heads=1, head_dim=64, tokens=512)), tmp_path)
    with pytest.raises(ValueError, match="there is no plot for benchmark 'step'"):
        plot.plot({"benchmark": "step"}, tmp_path / "step.png")

"""`skvq bench attend --device cuda` and `skvq bench capacity`: on the emulated driver and on the CPU, tiny.

Is: the whole way from the command line through the real store to JSON and plots, what is left out and why, goals, the
arithmetic of others' layouts. Is not: a word on speed, nor on graphs and events, which a GPU has to show.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cuda_kernel_driver import build_driver, harness
from cuda_stand_ins import build_nvrtc, run
from skvq import SkvqError, cli
from skvq.bench import attend_cuda, capacity, contestants, device, layers, plot, step_cuda
from skvq.bench.attend_cuda import CudaAttendOptions, Packed
from skvq.bench.capacity import CapacityOptions
from skvq.bench.layers import Shape
from skvq.warmup import AttentionShape, kernel_instances

HEADS, HEAD_DIM = (2, 4), 64
TINY = ["--layers", "2", "--heads", "4", "--kv-heads", "2", "--intermediate", "64", "--vocabulary", "50"]
TINY += ["--head-dim", str(HEAD_DIM)]

emulated = pytest.mark.skipif(
    harness.compiler() is None or not sys.platform.startswith("linux"),
    reason="needs a C++ compiler for the emulated driver, which is found through LD_LIBRARY_PATH",
)


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A driver with the kernels of these benchmarks, and an NVRTC that knows their names."""
    shape, names = Shape(*HEADS, 1, 1, HEAD_DIM), []
    for dtype, formats in (("float16", attend_cuda.FORMATS), ("float32", attend_cuda.FORMATS)):
        for name in formats:
            plan = layers.layer_plan(shape, name, static=False)
            streams = plan.keys.options.resolved(), plan.values.options.resolved()
            turning = plan.keys.shift_sine is not None
            attention = AttentionShape(HEAD_DIM, dtype, 2, *streams, turning=turning)
            names += kernel_instances(attention)
    nvrtc = build_nvrtc(tmp_path_factory.mktemp("nvrtc"), 12, 4, "-DEMULATED", "-ldl")
    return build_driver(str(x) for x in names if x.file != "repack.cuh"), nvrtc


def bench(stand_ins: tuple[Path, str], *arguments: str) -> str:
    """What a benchmark prints where the host stands in for a GPU."""
    driver, nvrtc = stand_ins
    code = "import cuda_bench_cases as cases, sys\ncases.main(*sys.argv[1:])"
    return run(code, driver, arguments, SKVQ_NVRTC=nvrtc, SKVQ_CACHE_DIR="")[0]


# ---- attend ----------------------------------------------------------------------------------------------------------

ATTEND = ["attend", "--device", "cuda", "--heads", "2:4", "--batches", "2", "--tokens", "600", "--rounds", "1"]


@emulated
def test_attend_measures_the_store_and_compares(stand_ins: tuple[Path, str], tmp_path: Path) -> None:
    found = tmp_path / "attend.json"
    printed = bench(stand_ins, *ATTEND, "--head-dim", str(HEAD_DIM), "--json", str(found))
    assert "WRONG" not in printed
    report = json.loads(found.read_text())
    assert report["benchmark"] == "attend"
    assert report["device"]["card"]["name"].startswith("Emulated")
    assert report["wrong"] == report["misses"] == []
    rows = {row["contestant"]: row for row in report["rows"]}
    packed = {name: row for name, row in rows.items() if row.get("kind") == "packed"}
    names = {"K2V1.6", "K2V1.6 static", "fitted", "plan"}
    assert set(packed) == names | {f"{name}{attend_cuda.APART}" for name in names}
    f16 = {name: row["milliseconds"] for name, row in rows.items() if row.get("kind") == "f16" and row["passed"]}
    assert "sdpa math" in f16
    fastest = min(f16, key=lambda name: f16[name])
    for name, row in packed.items():
        assert 0.0 < row["error"] < contestants.ERROR
        assert row["passed"]
        assert row["graph"] is False  # nothing is captured without a GPU
        assert row["fastest_f16"] == fastest
        assert row["times_faster_than_f16"] == pytest.approx(f16[fastest] / row["milliseconds"])
        assert row["gigabytes_per_second"] == pytest.approx(row["packed_bytes"] / row["milliseconds"] / 1e6)
        share = row["gigabytes_per_second"] * 1e9 / report["copy_bytes_per_second"]
        assert row["share_of_copy_bandwidth"] == pytest.approx(share)
        step = row["step"]
        assert step["graph"] is None
        assert step["step_milliseconds"] > 0.0
        assert step["attend_milliseconds"] > 0.0
        assert step["host_step_microseconds"] > 0.0
        assert step["host_attend_microseconds"] > 0.0
        assert (step["append_share"] is None) == (name.removesuffix(attend_cuda.APART) == "K2V1.6")
        assert step["no_kernels_because"] == "times of kernels need a GPU"
    # Two sequences, two heads, 17 + 14 bytes of a token that is neither sink nor in the window.
    for name in ("K2V1.6", "K2V1.6 static"):
        assert packed[name]["packed_bytes"] == 2 * 2 * (600 - 5 - 128) * (17 + 14)
    for name in packed:
        assert rows[name]["error_over"] == "own rows"
    assert rows["sdpa math"]["error_over"] == "given rows"
    for backend, package in (("quanto", "optimum.quanto"), ("hqq", "hqq")):
        row = rows[f"QuantizedCache {backend} 2 bits"]
        if importlib.util.find_spec(package.partition(".")[0]) is None:
            assert "You need to install" in row["skipped"]
            continue
        assert row["kind"] == "low-bit"
        assert row["error_over"] == "own rows"
        assert 0.0 < row["error"] < contestants.ERROR
        assert row["passed"]
        assert row["milliseconds"] > 0.0
        # 600 tokens, of which 63 are not packed yet and one is new; 2 bits and a scale and a zero point in 64 elements.
        assert row["packed_bytes"] == 2 * 2 * 2 * (600 - 64) * HEAD_DIM * (2 + 32 / 64) / 8
        assert row["bytes"] == row["packed_bytes"] + 2 * 2 * 2 * 63 * HEAD_DIM * 2
    for name in ("flash-attn with_kvcache", "flashinfer", "bitdecoding 2 bits", "kivi 2 bits"):
        assert "ModuleNotFoundError" in rows[name]["skipped"]
        assert printed.count(f"  {name:<26} left out") == 1
    pytest.importorskip("matplotlib", reason="plots need matplotlib, which the extra bench installs")
    plot.plot(report, tmp_path / "attend.png")
    assert (tmp_path / "attend.png").read_bytes().startswith(b"\x89PNG")


@emulated
def test_a_chunk_of_queries_is_compared_too(stand_ins: tuple[Path, str], tmp_path: Path) -> None:
    found = tmp_path / "many.json"
    printed = bench(stand_ins, *ATTEND, "--head-dim", str(HEAD_DIM), "--queries", "40", "--json", str(found))
    assert "WRONG" not in printed
    report = json.loads(found.read_text())
    assert report["settings"]["queries"] == 40
    packed = [row for row in report["rows"] if row.get("kind") == "packed"]
    assert {row["contestant"] for row in packed} == {"K2V1.6", "K2V1.6 static", "fitted", "plan"}
    for row in packed:
        assert row["queries"] == 40
        assert 0.0 < row["error"] < contestants.ERROR
        assert "step" not in row
    skipped = {row["contestant"]: row["skipped"] for row in report["rows"] if "skipped" in row}
    assert skipped["QuantizedCache hqq 2 bits"] == "ValueError: 40 queries: expected one, for a decode step"


@emulated
def test_layers_are_timed_with_a_mask_too(stand_ins: tuple[Path, str], tmp_path: Path) -> None:
    found, options = tmp_path / "masked.json", ["--head-dim", str(HEAD_DIM), "--masked", "--no-peers", "--no-static"]
    printed = bench(stand_ins, *ATTEND, *options, "--formats", "K2V1.6", "--json", str(found))
    assert "WRONG" not in printed
    rows = {row["contestant"]: row for row in json.loads(found.read_text())["rows"]}
    masked = rows[f"K2V1.6{layers.MASKED}"]
    assert 0.0 < masked["error"] < contestants.ERROR
    assert "step" not in masked
    assert "step" in rows["K2V1.6"]


@emulated
def test_attend_without_time_says_so(stand_ins: tuple[Path, str], tmp_path: Path) -> None:
    found = tmp_path / "attend.json"
    bench(stand_ins, *ATTEND, "--head-dim", str(HEAD_DIM), "--budget", "0", "--no-peers", "--json", str(found))
    report = json.loads(found.read_text())
    assert [row["skipped"] for row in report["rows"]] == ["the budget of 0 s is spent"]
    assert report["settings"]["budget"] == 0


def test_the_grid_shares_keys_and_values() -> None:
    options = CudaAttendOptions()
    sizes = list(options.shapes())
    assert len(sizes) == len(options.batches) * len(options.tokens)
    for shapes in sizes:
        assert [shape.num_attention_heads // shape.num_key_value_heads for shape in shapes] == [1, 4, 8]
        assert len({(shape.tokens, shape.batch, shape.num_key_value_heads) for shape in shapes}) == 1
    assert {shapes[0].tokens for shapes in sizes} == {32 << 10, 128 << 10, 512 << 10}
    assert {shapes[0].tokens for shapes in options.quick().shapes()} == {32 << 10, 128 << 10}


@pytest.mark.parametrize("length", [1, 70])
def test_an_output_is_compared_with_float64(length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (
        torch.randn(1, heads, n, 16, generator=generator) for heads, n in ((4, length), (2, 50), (2, 50))
    )
    exact = {0: contestants.exact_output(query[0], keys[0], values[0])}
    grouped = torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
    assert contestants.error_of(grouped, exact) < 1e-6
    # Another group's head, and a number that nobody wrote.
    assert contestants.error_of(grouped.flip(1), exact) > 0.1
    grouped[0, 3, 0, 5] = math.nan
    assert contestants.error_of(grouped, exact) == math.inf
    packed = Packed("one", "K2V1.6", None, True, 0, errors={4: 5e-3}, sdpa_errors={4: 1e-3})  # type: ignore[arg-type]
    assert not packed.passed(4)
    packed.sdpa_errors[4] = 3e-3
    assert packed.passed(4)
    packed.errors[4] = None
    assert packed.passed(4)


def measured(**changes: Any) -> dict[str, Any]:
    row = {"contestant": "K2V1.6 static", "kind": "packed", "tokens": 131072, "batch": 8, "num_key_value_heads": 8}
    row |= {
        "num_attention_heads": 32,
        "queries": 1,
        "share_of_copy_bandwidth": 0.9,
        "times_faster_than_f16": 7.5,
        "error": 1e-3,
    }
    return row | {"sdpa_error": 1e-3, "step": {"append_share": 0.02, "encode_share": 0.01}} | changes


def test_what_is_short_of_its_goal_is_told() -> None:
    name = "K2V1.6 static, {} tokens, batch 8, heads 8:32: "
    long, short = name.format(131072), name.format(2048)
    assert attend_cuda.misses([measured(), measured(kind="f16", share_of_copy_bandwidth=0.1)]) == []
    for changes, expected in (
        ({"share_of_copy_bandwidth": 0.43}, f"{long}43% of copy bandwidth, goal 80%"),
        ({"times_faster_than_f16": 6.4}, f"{long}6.40x of f16, goal 7x"),
        ({"error": 3e-3}, f"{long}error 3.0x of torch's, goal 2x"),
        ({"step": {"append_share": 0.05, "encode_share": None}}, f"{long}append takes 5.0% of a step, goal 3%"),
        (
            {"tokens": 2048, "share_of_copy_bandwidth": 0.1, "times_faster_than_f16": 0.9},
            f"{short}0.90x of f16, goal 1x",
        ),
    ):
        assert attend_cuda.misses([measured(**changes)]) == [expected]
    assert attend_cuda.misses([measured(queries=512, share_of_copy_bandwidth=0.1, times_faster_than_f16=0.9)]) == []
    assert attend_cuda.misses([measured(times_faster_than_f16=None, error=None, step=None)]) == []


def test_options_of_the_other_device_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for line in ("--device cuda --warm", "--budget 5", "--no-peers"):
        assert cli.main(["bench", "attend", *line.split()]) == 1
        assert "not an option of --device" in capsys.readouterr().err


def test_wrong_outputs_have_an_exit_status_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attend_cuda, "run_attend_cuda", lambda options, partial: {"wrong": ["row"]})
    assert cli.main(["bench", "attend", "--device", "cuda"]) == cli.WRONG == 3
    monkeypatch.setattr(attend_cuda, "run_attend_cuda", lambda options, partial: {"wrong": []})
    assert cli.main(["bench", "attend", "--device", "cuda"]) == 0


class FakeClock:
    """Of a GPU whose graphs are the work itself."""

    def __init__(self, captures: bool) -> None:
        self.device, self.captures = SimpleNamespace(is_cuda=True), captures

    def captured(self, work: Callable[[], None]) -> Callable[[], None] | None:
        work()
        return (lambda: None) if self.captures else None


class FakeLayer:
    """Notes what is asked of a layer."""

    def __init__(self) -> None:
        self.length, self.calls = 1000, list[tuple[str, int | None]]()

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: self.calls.append((name, *arguments))  # type: ignore[arg-type]


@pytest.mark.parametrize("captures", [True, False])
def test_a_layer_is_told_how_often_its_step_was_replayed(captures: bool) -> None:
    layer: Any = FakeLayer()
    clock: Any = FakeClock(captures)
    steps: list[str] = []
    with step_cuda.captured_step(clock, layer, lambda: steps.append("step"), 9) as (call, graph):
        assert graph == ("replayed" if captures else None)
        for _ in range(4):
            call()
    # Once while it is recorded; without a graph every call is one.
    assert len(steps) == (1 if captures else 5)
    expected = [("reserve", 1009), ("begin_capture",), ("end_capture",), ("replayed", 4 if captures else 0)]
    assert layer.calls == [*expected, ("release_capture",)]


# ---- others ----------------------------------------------------------------------------------------------------------


def test_kernels_are_told_apart_by_their_names() -> None:
    events = [
        ("void skvq::attend<skvq::Layout<(skvq::Stream)0, 128, 2>, skvq::Layout<(skvq::Stream)1, 128, 16>, 1>", 70.0),
        ("_ZN4skvq6encodeINS_4HalfENS_6LayoutILNS_6StreamE0ELi64EEEEEvNS_12EncodeParamsE", 2.0),
        ("_ZN4skvq6encodeINS_4HalfENS_6LayoutILNS_6StreamE1ELi64EEEEEvNS_12EncodeParamsE", 3.0),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<unsigned char>>", 9.0),
    ]
    assert device.kernel_seconds(events) == pytest.approx({"attend": 70e-6, "encode": 5e-6})


def test_a_device_is_cuda_or_refused() -> None:
    with pytest.raises(SkvqError, match=r"device='gpu': expected 'cuda' or 'cuda:N'"):
        device.BenchDevice("gpu")


# ---- capacity --------------------------------------------------------------------------------------------------------


def check_capacity(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The form of a report; its rows."""
    assert report["benchmark"] == "capacity"
    json.dumps(report)
    rows: list[dict[str, Any]] = report["rows"]
    fitting = [row for row in rows if row["fits"]]
    assert all(row["decode_tokens_per_second"] > 0.0 for row in fitting)
    assert report["longest"] == max(fitting, key=lambda row: row["tokens"])
    assert all("out of memory" in row["reason"] for row in rows if not row["fits"])
    return rows


def tiny_options(**changes: Any) -> CapacityOptions:
    sizes: dict[str, Any] = {"layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 32, "intermediate": 64}
    sizes |= {"device": "cpu", "vocabulary": 50, "dtype": "float32", "chunk": 512, "steps": 2}
    return CapacityOptions(**sizes | changes)


def test_the_longest_context_is_found_and_proved() -> None:
    limit = 3 << 20
    report = capacity.run_capacity(tiny_options(limit_gib=limit / 2**30))
    rows = check_capacity(report)
    longest = report["longest"]["tokens"]
    failed = min(row["tokens"] for row in rows if not row["fits"])
    assert longest < failed
    # It is the longest to about a hundredth of it (and the tokens that were decoded there).
    assert failed - longest <= longest / 100 + 25
    assert report["longest"]["used_bytes"] <= limit
    assert report["longest"]["used_bytes"] > 0.97 * limit
    assert report["longest"]["cache_bytes"] + report["weight_bytes"] == report["longest"]["used_bytes"]
    assert (report["stopped_by"], report["filled_by"]) == ("memory", "rows")
    # The formula knows no slack of pages, and takes the window of a short cache for that of a long one.
    assert 0.93 < longest / report["predicted_tokens"] < 1.07


@pytest.mark.parametrize("fill", ["rows", "prefill"])
def test_a_length_is_reached_by_doubling(fill: str, tmp_path: Path) -> None:
    partial: list[dict[str, Any]] = []
    options = tiny_options(tokens=2500, fill=fill, limit_gib=1.0, format="K4V4", static=True)
    report = capacity.run_capacity(options, partial.append)
    assert [row["tokens"] for row in check_capacity(report)] == [512, 1024, 2048, 2500]
    assert report["reached"] is True
    assert report["filled_by"] == fill
    assert len(partial) == 4
    # 2 layers, 2 heads, 16 + 1 bytes of keys and of values.
    assert report["bytes_per_token"] == 2 * 2 * 2 * (16 + 1)
    assert report["weight_bytes"] == sum(4 * x.numel() for x in _model(options).parameters()) + 4 * 16 * 2
    pytest.importorskip("matplotlib", reason="plots need matplotlib, which the extra bench installs")
    plot.plot(report, tmp_path / "capacity.png")
    assert (tmp_path / "capacity.png").read_bytes().startswith(b"\x89PNG")


def _model(options: CapacityOptions) -> Any:
    return capacity.random_model(capacity.model_config(options), options.dtype, torch.device("cpu"))


def test_a_length_that_does_not_fit_is_not_reached() -> None:
    report = capacity.run_capacity(tiny_options(tokens=10**6, limit_gib=2**20 / 2**30))
    check_capacity(report)
    assert report["reached"] is False
    assert report["stopped_by"] == "memory"


def test_growing_stops_when_time_is_over() -> None:
    report = capacity.run_capacity(tiny_options(budget=0.0))
    assert [row["tokens"] for row in check_capacity(report)] == [512]
    assert report["stopped_by"] == "budget"


def test_a_failed_growth_leaves_the_cache_as_it_was() -> None:
    options = tiny_options(limit_gib=1.0)
    place = capacity.Place(options)
    model = _model(options)
    growing = capacity.Growing(place, model, capacity.new_cache(options, model.config), options)
    with torch.inference_mode():
        growing.grow_to(700)
        update, calls = growing.cache.update, 0

        def fail(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 4:  # the second layer, in the second chunk
                raise MemoryError("no memory left")
            return update(*arguments)

        growing.cache.update = fail
        with pytest.raises(MemoryError):
            growing.grow_to(3000)
        growing.cache.update = update
        assert [layer.get_seq_length() for layer in growing.cache.layers] == [700, 700]
        growing.grow_to(900)
        assert growing.length == 900


def test_weights_are_made_in_their_dtype() -> None:
    before = torch.get_default_dtype()
    model = _model(tiny_options(dtype="float16"))
    assert {x.dtype for x in model.parameters()} == {torch.float16}
    assert torch.get_default_dtype() is before
    config = capacity.model_config(CapacityOptions())
    sizes = config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.vocab_size
    assert sizes == (32, 4096, 11008, 32000)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fill": "noise"}, "fill='noise': expected one of 'rows', 'prefill'"),
        ({"tokens": 1}, "tokens=1: expected at least 2"),
        ({"kv_heads": 3}, "kv_heads=3: expected a divisor of heads=4"),
        ({"limit_gib": 1e-6}, "no room for 512 tokens beside the weights"),
        ({"device": "tpu"}, "device='tpu': expected 'cuda' or 'cuda:N'"),
    ],
)
def test_bad_options_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SkvqError, match=message):
        capacity.run_capacity(tiny_options(**changes))


def test_sizes_beside_a_configuration_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for line, message in (
        ("--config here --heads 4", "heads=4: expected none beside config='here'"),
        ("--plan a.safetensors --static", "format, static: expected neither beside plan='a.safetensors'"),
    ):
        assert cli.main(["bench", "capacity", "--device", "cpu", *line.split()]) == 1
        assert message in capsys.readouterr().err


def test_layers_that_are_not_packed_are_refused(tmp_path: Path) -> None:
    import tiny_directory

    folder = tiny_directory.save(tmp_path / "model", "gemma3")
    with pytest.raises(SkvqError, match="config: layers with DynamicSlidingWindowLayer, expected full attention"):
        capacity.run_capacity(tiny_options(config=str(folder)))


@emulated
@pytest.mark.parametrize("fill", ["rows", "prefill"])
def test_capacity_on_the_store_of_a_device(stand_ins: tuple[Path, str], tmp_path: Path, fill: str) -> None:
    found = tmp_path / "capacity.json"
    line = [
        "capacity",
        "--device",
        "cuda",
        *TINY,
        "--dtype",
        "float32",
        "--chunk",
        "150",
        "--steps",
        "1",
        "--fill",
        fill,
    ]
    bench(stand_ins, *line, "--tokens", "420", "--json", str(found))
    report = json.loads(found.read_text())
    assert [row["tokens"] for row in check_capacity(report)] == [150, 300, 420]
    assert report["reached"] is True
    assert report["device"]["card"]["name"].startswith("Emulated")


@emulated
def test_products_of_weights_name_their_device(stand_ins: tuple[Path, str], tmp_path: Path) -> None:
    found = tmp_path / "weights.json"
    printed = bench(
        stand_ins, "weights", "--device", "cuda", "--shapes", "256x128", "--rows", "1", "--json", str(found)
    )
    report = json.loads(found.read_text())
    device = report["device"]
    assert device["card"]["name"].startswith("Emulated")
    assert device["torch"] == torch.__version__
    driver = ".".join(map(str, device["driver"]))
    assert printed.startswith(f"{device['card']['name']}, driver for CUDA {driver}, torch {torch.__version__}\n")
    assert len(report["products"]) == 1
    assert report["products"][0]["int4pack_bfloat16_ms"] > 0.0
    assert "packed_float32_ms" not in report["products"][0]  # our own product is for the CPU


def test_prompts_are_timed_with_every_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = "--layers 2 --heads 4 --kv-heads 2 --head-dim 32 --intermediate 64 --vocabulary 50 --dtype float32"
    line = f"bench prompt {sizes} --tokens 100 300 --rounds 1 --steps 2 --json {tmp_path / 'prompt.json'}"
    assert cli.main(line.split()) == 0
    report = json.loads((tmp_path / "prompt.json").read_text())
    printed = capsys.readouterr().out
    assert printed.startswith(f"{report['machine']['processor']}, torch {torch.__version__}, threads: ")
    assert printed.count("step ") == 6
    assert report["device"] is None
    rows = {(row["tokens"], row["cache"]): row for row in report["rows"]}
    assert set(rows) == {(tokens, cache) for tokens in (100, 300) for cache in ("DynamicCache", "blocks", "fitted")}
    for row in rows.values():
        assert 0.0 < row["prompt_fastest_milliseconds"] <= row["prompt_median_milliseconds"]
        assert row["step_milliseconds"] > 0.0
    assert {key for key, row in rows.items() if row["fitted_layers"]} == {(300, "fitted")}  # of eight times the head
    assert rows[300, "fitted"]["fitted_layers"] == 2
    assert rows[300, "blocks"]["nbytes"] < rows[300, "DynamicCache"]["nbytes"] == 2 * 2 * 2 * (300 + 3 + 2) * 32 * 4


def test_the_command_line_reaches_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[CapacityOptions] = []
    take: Callable[..., dict[str, Any]] = lambda options, partial: calls.append(options) or {}  # noqa: E731
    monkeypatch.setattr(capacity, "run_capacity", take)
    assert cli.main(["bench", "capacity"]) == 0
    line = "bench capacity --device cpu --layers 2 --fill prefill --tokens 9 --limit-gib 0.5 --static"
    assert cli.main(line.split()) == 0
    assert calls[0] == CapacityOptions()
    expected = CapacityOptions(device="cpu", layers=2, fill="prefill", tokens=9, limit_gib=0.5, static=True)
    assert calls[1] == expected

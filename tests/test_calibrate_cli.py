"""`skvq calibrate` and `skvq inspect`, from the command line to the files, on a tiny model."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_directory
from skvq import QuantizedDynamicCache, SkvqConfig, StreamOptions, cli
from skvq.calibrate import Statistics, calibrate, choose
from skvq.calibrate.static import static_plan
from skvq.evaluate.texts import cut_chunks, read_text
from skvq.inspect_plan import plan_report, plan_table
from skvq.model_layers import cache_argument
from skvq.models import load
from skvq.plan import StreamPlan
from skvq.plan_file import QuantizationPlan

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen.\n" * 90


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, two texts, and a plan that `skvq calibrate` made from one of them."""
    folder = tmp_path_factory.mktemp("calibrate")
    tiny_directory.save(folder / "model", "gemma3")
    (folder / "a.txt").write_text(TEXT, encoding="utf-8")
    line = f"calibrate {folder}/model --texts {folder}/a.txt#0-0.9 -o {folder}/plan --chunks 2 --tokens 300"
    line += f" --state {folder}/state --method static --key-bits 3 --window 16 --dtype float32"
    assert cli.main(line.split()) == 0
    return folder


def test_calibrate_writes_a_plan_for_the_model(folder: Path) -> None:
    model = load(str(folder / "model"), dtype="float32").model
    plan = QuantizationPlan.load(folder / "plan", model)
    assert list(plan.layers) == [1, 2]
    assert (plan.config.key_bits, plan.config.value_bits, plan.config.window) == (3, 1.6, 16)
    assert list(plan.header.texts) == ["a.txt#0-0.9"]
    assert plan.header.notes["tokens"] == 600
    statistics = Statistics.load(folder / "state", model)
    assert (statistics.options.window, statistics.chunks) == (16, 2)
    shift = plan.layers[2].keys.shift
    assert shift is not None
    assert torch.equal(shift, statistics.layers[2].keys.mean.float())
    cache = QuantizedDynamicCache.from_plan(model, folder / "plan")
    ids = torch.arange(200)[None] % 60 + 2
    model(ids[:, :-1], **cache_argument(model, cache))
    assert torch.isfinite(model(ids[:, -1:], **cache_argument(model, cache)).logits).all()


@pytest.mark.parametrize(
    ("options", "key_bits", "value_bits"),
    [
        ("", (2.0, 2.0), (1.5, 1.5)),
        ("--key-bits 2.5 --value-bits 16 --weights attention --no-noise", (2.5, 2.5), (16, 16)),
        ("--bits 1.8 --parts 8", (0.5, 4.0), (0.5, 4.0)),
    ],
)
def test_the_spectral_method(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: str,
    key_bits: tuple[float, float],
    value_bits: tuple[float, float],
) -> None:
    """From the command line to a cache that generates; the default."""
    tiny_directory.save(tmp_path / "model", "qwen3")
    line = f"calibrate {tmp_path}/model --texts {folder}/a.txt -o {tmp_path}/plan --chunks 2 --tokens 300 --window 16"
    line += f" --dtype float32 --state {tmp_path}/state --json {tmp_path}/report.json {options}"
    assert cli.main(line.split()) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    seconds = report["seconds"]
    assert 0 <= seconds["load"] + seconds["read"] + seconds["fit"] <= seconds["all"] + 0.3
    assert min(report["peak_bytes"], report["loading_peak_bytes"]) > report["model_bytes"] > 0
    assert (report["settings"]["tokens"], report["settings"]["model"]) == (300, "model")
    printed = capsys.readouterr().out
    assert "predicted cost of keys at" in printed
    assert "static " in printed
    assert " → parts " in printed
    assert "seconds, peak memory " in printed
    model = load(str(tmp_path / "model"), dtype="float32").model
    plan = QuantizationPlan.load(tmp_path / "plan", model)
    assert plan.header.method == "spectral"
    assert (plan.config.window, plan.config.sinks) == (16, 5)
    for layer in plan.layers.values():
        for stream, (low, high) in ((layer.keys, key_bits), (layer.values, value_bits)):
            assert low <= stream.options.bits <= high
            assert (stream.options.parts is None) == (stream.options.bits == 16)
        assert layer.keys.frequencies is not None
        assert (layer.keys.noise is None) == ("--no-noise" in options)
    notes = plan.header.notes
    assert notes["tokens"] == 600
    assert notes["predicted"]["keys"]["parts"] <= notes["predicted"]["keys"]["mean"]
    if "--bits" in options:
        assert 1.4 < plan.average_bits() <= 1.8
        [remark] = notes["remarks"]
        assert remark in printed
        # the best of what was measured
        figures = {float(x.rsplit(": ", 1)[1]): x for x in remark.split(" was ")[1].split("; ")}
        assert len(figures) > 1
        assert remark.startswith("bits are " + figures[min(figures)].split(" (")[0])
    else:
        assert notes["remarks"] == []
    ids = torch.arange(200)[None] % 60 + 2
    cache = QuantizedDynamicCache.from_plan(model, tmp_path / "plan")
    model(ids[:, :-1], **cache_argument(model, cache))
    assert torch.isfinite(model(ids[:, -1:], **cache_argument(model, cache)).logits).all()
    # the same statistics serve another fit, and the same fit makes the same plan
    first = (tmp_path / "plan").read_bytes()
    assert cli.main(line.split()) == 0
    assert (tmp_path / "plan").read_bytes() == first


def test_bits_are_chosen_on_a_piece_that_nothing_is_fitted_to(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = torch.randint(0, len(tiny_directory.CHARACTERS), (7000,), generator=torch.Generator().manual_seed(0))
    text = "".join(tiny_directory.CHARACTERS[i] for i in numbers)
    (tmp_path / "noise.txt").write_text(text, encoding="utf-8")
    fitted: list[list[torch.Tensor]] = []
    compared: list[tuple[int, torch.Tensor]] = []
    module = importlib.import_module("skvq.calibrate.collect")  # the package has a function of that name
    real_collect, real_best = module.collect, choose.best_shared

    def seen_collect(model: Any, chunks: Any, **options: Any) -> Any:
        fitted.append(list(chunks))
        return real_collect(model, chunks, **options)

    def seen_best(model: Any, statistics: Any, options: Any, plan_of: Any, token_ids: Any, **more: Any) -> Any:
        compared.append((statistics.chunks, token_ids))
        return real_best(model, statistics, options, plan_of, token_ids, **more)

    monkeypatch.setattr(module, "collect", seen_collect)
    monkeypatch.setattr(choose, "best_shared", seen_best)
    line = f"calibrate {folder}/model --texts {tmp_path}/noise.txt -o {tmp_path}/plan --chunks 2 --tokens 300 "
    line += f"--window 16 --dtype float32 --state {tmp_path}/state "
    assert cli.main([*line.split(), "--bits", "1.9"]) == 0
    tokenizer = load(str(folder / "model"), dtype="float32").tokenizer
    pieces = [x.token_ids for x in cut_chunks(tokenizer, [read_text(tmp_path / "noise.txt")], 3, 300)]
    assert [torch.equal(x, y) for x, y in zip(fitted[0], pieces[:2], strict=True)] == [True, True]
    [(chunks, held_out)] = compared
    assert chunks == 2
    assert torch.equal(held_out, pieces[2])
    assert not any(torch.equal(x, held_out) for x in fitted[0])
    # the state is that of the two pieces, whatever is fitted from it
    assert Statistics.load(tmp_path / "state").chunks == 2
    assert QuantizationPlan.load(tmp_path / "plan").header.notes["chunks"] == 2
    assert cli.main(line.split()) == 0
    assert len(compared) == 1
    assert len(fitted[1]) == 2


def test_the_packages_text_has_room_for_what_is_read_of_it(folder: Path, tmp_path: Path) -> None:
    line = f"calibrate {folder}/model -o {tmp_path}/plan --window 16 --dtype float32 --method"
    assert cli.main([*line.split(), "static"]) == 0
    header = QuantizationPlan.load(tmp_path / "plan").header
    assert list(header.texts) == ["northanger_abbey"]
    assert (header.notes["chunks"], header.notes["tokens"]) == (2, 4096)
    assert cli.main([*line.split(), "spectral", "--bits", "1.9", "--tokens", "300"]) == 0
    assert QuantizationPlan.load(tmp_path / "plan").header.notes["chunks"] == 1


def test_a_plan_in_one_call(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the command makes, to the byte; and from tokens of one's own."""
    line = f"calibrate {folder}/model --texts {folder}/a.txt -o {tmp_path}/plan --chunks 2 --tokens 300 --window 16"
    assert cli.main([*line.split(), "--value-bits", "2", "--dtype", "float32"]) == 0
    loaded = load(str(folder / "model"), dtype="float32")
    model, shared = loaded.model, {"value_bits": 2.0, "window": 16, "progress": False}
    capsys.readouterr()
    plan = calibrate(model, loaded.tokenizer, texts=[folder / "a.txt"], chunks=2, tokens=300, **shared)
    assert capsys.readouterr() == ("", "")
    plan.save(tmp_path / "own")
    assert (tmp_path / "own").read_bytes() == (tmp_path / "plan").read_bytes()
    pieces = [x.token_ids for x in cut_chunks(loaded.tokenizer, [read_text(folder / "a.txt")], 2, 300)]
    own = calibrate(model, token_ids=[pieces[0], pieces[1][None]], **shared)
    assert own.header.texts == {}
    assert own.header.notes == plan.header.notes
    assert all(torch.equal(own.layers[i].keys.matrix, x.keys.matrix) for i, x in plan.layers.items())
    ids = torch.arange(200)[None] % 60 + 2
    cache = QuantizedDynamicCache.from_plan(model, own)
    assert torch.isfinite(model(ids, **cache_argument(model, cache)).logits).all()
    chosen = calibrate(model, token_ids=pieces, bits=1.9, window=16, progress=False)
    assert chosen.header.notes["chunks"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "tokenizer=None: expected the model's tokenizer, or token_ids"),
        ({"token_ids": []}, "token_ids has 0 pieces: expected at least 1"),
        ({"token_ids": [torch.arange(200)], "bits": 2}, "token_ids has 1 pieces: expected at least 2"),
        ({"token_ids": [torch.arange(200)], "chunks": 1}, "expected neither texts nor chunks with it"),
        ({"keybits": 2}, "keybits=2: unknown option, expected some of method, key_bits"),
        ({"method": "best"}, "method='best': expected one of 'spectral', 'static'"),
        ({"method": "static", "parts": 2}, "parts=2: expected method='spectral' with it"),
        ({"bits": 2, "key_bits": 2}, "key_bits=2: expected either this or bits"),
        ({"tokens": 1}, "tokens=1: expected an integer of at least 2"),
        ({"chunks": 1.5}, "chunks=1.5: expected an integer of at least 1"),
        ({"window": 0}, "window=0"),
        ({"value_bits": 6}, "value_bits=6: expected a number above 0 and up to 5, or 16"),
    ],
)
def test_a_call_with_mistakes(folder: Path, options: dict[str, Any], message: str) -> None:
    model = load(str(folder / "model")).model
    with pytest.raises(ValueError, match=re.escape(message)):
        calibrate(model, **options)


def test_static_scales_give_every_channel_the_same_spread(folder: Path) -> None:
    statistics = Statistics.load(folder / "state")
    given = SkvqConfig(keys={"scale_exponent": 1.0}, values={"scale_exponent": 0.0, "bits": 2})
    for index, (keys, values) in static_plan(statistics, given).items():
        layer = statistics.layers[index]
        assert keys.scale is not None
        assert values.scale is not None
        assert keys.options.block == 0
        torch.testing.assert_close(layer.keys.variance.sqrt().float() / keys.scale, torch.ones_like(keys.scale))
        common = layer.values.variance.mean(-1, keepdim=True).sqrt().float()
        torch.testing.assert_close(values.scale, common.expand_as(values.scale))
    raw = static_plan(statistics, SkvqConfig(value_bits=16))
    assert all(values.scale is None and not values.options.is_packed for _, values in raw.values())


def test_inspect_prints_and_writes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(folder / "plan"), "--json", str(tmp_path / "plan.json")]) == 0
    printed = capsys.readouterr().out
    assert "static for gemma3_text" in printed
    assert "3 layers, 2 packed; sinks 5, window 16" in printed
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert "1, 2 keys 3 3.500 auto e4m3 lloyd-max norm 1.1 shift + scale + hadamard 0" in lines
    report = json.loads((tmp_path / "plan.json").read_text())
    assert report["counted_bits"]["keys"] == 3.5
    # 16 channels in two heads, a shift and a scale each, float32
    assert report["layers"]["2"]["values"]["static_bytes"] == 2 * 2 * 16 * 4
    assert report["layers"]["2"]["keys"]["static"] == ["shift", "scale"]


@pytest.mark.parametrize("with_rows", [False, True])
def test_inspect_draws(folder: Path, tmp_path: Path, with_rows: bool) -> None:
    line = f"inspect {folder}/plan --plot {tmp_path}/plan.png --layer 2 --head 1"
    line += f" --model {folder}/model --texts {folder}/a.txt --tokens 200 --dtype float32" if with_rows else ""
    assert cli.main(line.split()) == 0
    assert (tmp_path / "plan.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_every_kind_of_stream_can_be_drawn(folder: Path, tmp_path: Path) -> None:
    """Blocks, pairs, orders of channels, rows kept as they are; with and without a complete block."""
    from skvq.calibrate.statistics import Sample
    from skvq.inspect_plot import save_picture

    model = load(str(folder / "model")).model
    order = tuple(range(16))[::-1]
    pairs = {
        1: (StreamPlan(StreamOptions(bits=2, block=128)), StreamPlan(StreamOptions(bits=16))),
        2: (StreamPlan(StreamOptions(bits=1.5), permutation=order), StreamPlan(StreamOptions(bits=8))),
    }
    plan = QuantizationPlan.for_model(model, SkvqConfig(), pairs, method="all kinds")
    rows = {length: torch.randn(2, length, 16) for length in (300, 60)}
    for layer in pairs:
        for length, x in rows.items():
            sample = Sample(x, x, x, torch.arange(length))
            save_picture(plan, layer, tmp_path / f"{layer}_{length}.png", sample=sample)
    assert len(list(tmp_path.iterdir())) == 4
    assert " 1 values 16 16.000 - -" in " ".join(plan_table(plan).split())
    assert plan_report(plan)["layers"][2]["keys"]["static_bytes"] == 64


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("inspect {}/none", "no such file, expected a skvq quantization plan"),
        ("inspect {}/state", "kind 'calibration statistics', expected 'quantization plan'"),
        ("inspect {}/plan --layer 0 --plot x.png", "--layer 0: expected one of 1, 2"),
        ("inspect {}/plan --head 2 --plot x.png", "head=2: expected 0 to 1"),
        ("inspect {}/plan --texts {}/a.txt", "expected --plot FILE with them"),
        ("calibrate {}/model -o {}/p --key-bits 6", "key_bits=6.0: expected a number above 0 and up to 5, or 16"),
        ("calibrate {}/model -o {}/p --bits 2 --value-bits 2", "value_bits=2.0: expected either this or bits"),
        ("calibrate {}/model -o {}/p --method static --bits 2", "bits=2.0: expected method='spectral' with it"),
        ("calibrate {}/model -o {}/p --method static --no-noise", "noise=False: expected method='spectral' with it"),
        ("calibrate {}/model -o {}/p --method static --key-bits 2.5", "key_bits=2.5: expected one of 16, 8, 4"),
        ("calibrate {}/model -o {}/none/plan", "expected a file in an existing directory"),
        ("calibrate {}/model --texts {}/a.txt -o {}/p --tokens 9000", "has no 9000 tokens left for its chunk 1"),
        ("calibrate {}/model --texts {}/a.txt {}/a.txt -o {}/p", "texts: two are named 'a.txt', expected names that"),
        (
            "calibrate {}/model --texts {}/a.txt -o {}/p --tokens 300 --chunks 2 --window 16 --state {}/state",
            "the state of a pass with texts",
        ),
    ],
)
def test_mistakes_are_one_line(folder: Path, line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(line.replace("{}", str(folder)).split()) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len([x for x in error.splitlines() if x.startswith("skvq: ")]) == 1


def test_the_command_line_loads_no_torch_for_its_help() -> None:
    code = "import sys; from skvq import cli; cli.build_parser(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"

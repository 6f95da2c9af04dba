"""The comparison: measures against a direct computation, intervals, texts kept apart, resuming, report, commands."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from skvq import SkvqConfig, StreamOptions, cli, evaluate
from skvq.evaluate import Geometry, Method, MethodCache, Settings, Where, compare, measure, parse_method
from skvq.evaluate.ablations import ablate
from skvq.evaluate.divergence import ChunkReference, OutputHead, block_error
from skvq.evaluate.report import Estimate, Report
from skvq.evaluate.simulation import Simulator
from skvq.evaluate.texts import Text, check_apart, check_not_fitted, cut_chunks, digests, packaged_texts, read_text
from skvq.model_layers import cache_argument
from skvq.plan import StreamPlan
from skvq.plan_file import QuantizationPlan
from tiny_directory import save
from tiny_models import build, prompts

SETTINGS = Settings(window=24, sinks=3, score_from=40)


class HalfAsLarge(Method):
    """What a researcher would write: a name, bits, and the rows that are read back."""

    name = "half as large"

    def bits(self, geometry: Geometry, keys: bool) -> float:
        return 15.0

    def fake_quantize(self, rows: Tensor, where: Where) -> Tensor:
        return rows / 2


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three texts of 9000 characters, as good as random."""
    folder, generator = tmp_path_factory.mktemp("texts"), torch.Generator().manual_seed(0)
    letters = "abcdefghijklmnopqrstuvwxyz .\n"
    paths = []
    for index in range(3):
        numbers = torch.randint(0, len(letters), (9000,), generator=generator).tolist()
        # lines long enough to be passages
        lines = ("".join(letters[i] for i in numbers)).replace("\n", " ")
        paths.append(folder / f"text{index}.txt")
        paths[-1].write_text("\n".join(lines[i : i + 100] for i in range(0, 9000, 100)))
    return paths


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"), "llama")


def stepped_logits(model: Any, method: Method, token_ids: Tensor) -> Tensor:
    cache = MethodCache(model.config, method, SETTINGS.window, SETTINGS.sinks)
    steps = [model(x[None], **cache_argument(model, cache), use_cache=True).logits[0] for x in token_ids.split(1)]
    return torch.cat(steps)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_measures_are_those_of_decoding(family: str) -> None:
    """KL divergence, agreement and loss from the logits of a decoded text. gemma2 has a final softcap."""
    model, token_ids = build(family, final_logit_softcapping=None if family == "llama" else 8.0), prompts(1, 120)[0]
    method = parse_method("rotation:bits=2")
    report = measure(model, ["full", method], [token_ids], settings=SETTINGS)
    exact, row = report.rows
    assert (exact["bits"], exact["bits_at_length"]) == (16.0, 16.0)
    full = stepped_logits(model, parse_method("full"), token_ids)[40:-1].double().log_softmax(-1)
    this = stepped_logits(model, method, token_ids)[40:-1].double().log_softmax(-1)
    targets = token_ids[41:, None]
    assert row["kl"] == pytest.approx(float((full.exp() * (full - this)).sum(-1).mean()), rel=0.02)
    assert row["kl"] > 0.01
    assert row["loss"] == pytest.approx(float(-this.gather(-1, targets).mean()), rel=1e-3)
    assert row["rise"] == pytest.approx(float((full - this).gather(-1, targets).mean()), rel=0.02, abs=1e-4)
    agreement = float((full.argmax(-1) == this.argmax(-1)).double().mean())
    assert row["top1"] == pytest.approx(agreement, abs=0.03)
    assert (exact["top1"], exact["scored"]) == (1.0, 79)
    assert abs(exact["kl"]) < 1e-5
    assert abs(exact["rise"]) < 1e-5


def test_counted_bits_at_length() -> None:
    model = build("qwen3")
    report = measure(model, ["rtn:bits=2,group=32", "kivi:bits=2"], [prompts(1, 120)[0]], settings=SETTINGS)
    rtn, kivi = report.rows
    assert (rtn["bits"], rtn["packed_tokens"]) == (3.0, 120 - 24 - 3)
    assert rtn["bits_at_length"] == pytest.approx((93 * 3 + 27 * 16) / 120)
    assert (kivi["bits"], kivi["packed_tokens"]) == (3.0, 64)
    assert kivi["bits_at_length"] == pytest.approx((64 * 3 + 56 * 16) / 120)


def test_a_method_in_ten_lines() -> None:
    report = measure(
        build("llama"), [HalfAsLarge(), "ours:keys.block=0,values.block=0"], [prompts(1, 90)[0]], settings=SETTINGS
    )
    summaries = {summary.method: summary for summary in report.summaries()}
    mine = summaries["half as large"]
    assert mine.bits == 15.0
    assert mine.kl.mean > 0.01
    assert "half as large" in report.table()
    assert "<td>half as large</td>" in report._repr_html_()


def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, chunks, log = build("llama"), [prompts(1, 90, seed)[0] for seed in (1, 2)], tmp_path / "log.jsonl"
    methods = ["full", "kivi:bits=2,group=16", "wkvquant"]
    calibration = [prompts(1, 60, 9)[0]]
    passes: list[str] = []
    run = Simulator.run

    def counted(self: Simulator, token_ids: Tensor, attention: Any) -> Tensor:
        passes.append(type(attention).__name__)
        return run(self, token_ids, attention)

    monkeypatch.setattr(Simulator, "run", counted)
    measure(model, methods[:2], chunks[:1], settings=SETTINGS, log=log)
    assert len(passes) == 3  # the reference and two methods
    with log.open("a") as file:
        file.write('{"cut off')
    passes.clear()
    report = measure(model, methods, chunks, calibration, settings=SETTINGS, log=log)
    # chunk 1: reference and wkvquant; chunk 2: reference and all; calibration once
    assert sorted(passes) == ["MethodPass"] * 6 + ["_Collector"]
    assert [(row["method"], row["chunk"]) for row in report.rows] == [
        (parse_method(method).name, f"chunk {index}") for index in (0, 1) for method in methods
    ]
    passes.clear()
    again = measure(model, methods, chunks, calibration, settings=SETTINGS, log=log)
    assert passes == []
    assert again.table() == report.table()
    # other settings, another model or another calibration are other rows
    measure(model, methods[:1], chunks[:1], settings=Settings(window=23, sinks=3, score_from=40), log=log)
    measure(build("llama", seed=1), methods[:1], chunks[:1], settings=SETTINGS, log=log)
    assert len(passes) == 4
    measure(model, ["wkvquant"], chunks[:1], [prompts(1, 61, 9)[0]], settings=SETTINGS, log=log)
    assert len(passes) == 7
    measure(model, ["full"], chunks[:1], [prompts(1, 61, 9)[0]], settings=SETTINGS, log=log)
    assert len(passes) == 7


def test_a_cut_line_of_the_log_does_not_swallow_the_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"cut off')
    model, chunk = build("llama"), prompts(1, 90)[0]
    measure(model, ["full"], [chunk], settings=SETTINGS, log=log)
    assert "line 1 is not a row" in capsys.readouterr().err
    assert len(log.read_text().splitlines()) == 2
    assert json.loads(log.read_text().splitlines()[1])["method"] == "full precision"


def test_intervals() -> None:
    def rows(*values: float) -> list[dict[str, Any]]:
        same = dict.fromkeys(("key_bits", "value_bits", "bits", "bits_at_length"), 2.0)
        errors = {f"{name}_block_error": 0.3 for name in ("kl", "top1", "rise")}
        return [
            {"method": "a", "tokens": 9, "scored": 4, "kl": x, "top1": x, "rise": x, "full_loss": 0.0} | same | errors
            for x in values
        ]

    [summary] = Report({}, rows(1.0, 2.0, 3.0)).summaries()
    # t for 2 degrees of freedom is 4.303, the standard deviation 1
    assert summary.kl.mean == 2.0
    assert summary.kl.half_width == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    assert summary.kl.block_error == pytest.approx(0.3 / math.sqrt(3))
    assert summary.perplexity_rise.mean == pytest.approx(math.e**2 - 1)
    [single] = Report({}, rows(1.0)).summaries()
    assert math.isnan(single.kl.half_width)
    assert single.kl.text(2) == "1.00 ± 0.30 s.e."
    assert Estimate(1.0, 0.5, 0.1).text(1, "+") == "+1.0 ± 0.5"
    assert math.isnan(block_error(torch.ones(100)))
    runs = torch.randn(64 * 400, generator=torch.Generator().manual_seed(0))
    assert block_error(runs) == pytest.approx(1 / math.sqrt(64 * 400), rel=0.1)


def test_texts_that_overlap_are_refused(texts: list[Path], tmp_path: Path) -> None:
    first, second = (read_text(path) for path in texts[:2])
    check_apart([first], [second])
    copied = tmp_path / "copy.txt"
    copied.write_text(first.content)
    mixed = tmp_path / "mixed.txt"
    mixed.write_text(second.content + first.content[: len(first.content) // 4])
    for same in (texts[0], copied, mixed, f"{texts[0]}#0.4-1"):
        with pytest.raises(ValueError, match="overlap"):
            check_apart([read_text(same)], [read_text(f"{texts[0]}#0-0.6")])
    check_apart([read_text(f"{texts[0]}#0-0.5")], [read_text(f"{texts[0]}#0.5-1")])
    halves = [read_text(f"{texts[0]}#{part}") for part in ("0-0.5", "0.5-1")]
    assert halves[0].content + halves[1].content == first.content
    assert halves[1].name == "text0.txt#0.5-1"
    for part in ("0.5-0.5", "0.9-0.1", "0-2", "0.1.2-1"):
        with pytest.raises(ValueError, match="0 <= FROM < TO <= 1"):
            read_text(f"{texts[0]}#{part}")


def test_names_are_of_the_file_and_the_part(texts: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(texts[0].parent)
    sources = ("text0.txt", "./text0.txt", "../" + texts[0].parent.name + "//text0.txt", "./text0.txt#0-0.5")
    assert [read_text(x).name for x in sources] == ["text0.txt"] * 3 + ["text0.txt#0-0.5"]
    assert digests([read_text(x) for x in sources[2:]]) == {read_text(x).name: read_text(x).sha256 for x in sources[2:]}
    with pytest.raises(ValueError, match=r"two are named 'text0.txt', expected names that tell them apart"):
        digests([read_text(x) for x in sources])


@pytest.mark.parametrize(
    ("fitted", "measured", "overlap"),
    [
        ("text0.txt", "text0.txt", True),
        ("text0.txt", "copy.txt", True),
        ("text0.txt#0-0.5", "half.txt", True),
        ("text0.txt#0-0.5", "text0.txt", True),
        ("text0.txt", "text0.txt#0.5-1", True),
        ("text0.txt#0-0.5", "text0.txt#0.4-1", True),
        ("text0.txt#0.2-0.3", "copy.txt#0-1", True),
        ("text0.txt#0-0.5", "text0.txt#0.5-1", False),
        ("text0.txt#0-0.5", "copy.txt#0.5-1", False),
        ("text0.txt", "text1.txt", False),
        ("text0.txt#0-0.5", "other/text0.txt", False),  # another file of the same name
    ],
)
def test_what_was_fitted_to_an_evaluation_text_is_known(
    texts: list[Path], fitted: str, measured: str, overlap: bool
) -> None:
    """By names and digests alone, which is what a plan holds."""
    folder, content = texts[0].parent, texts[0].read_text()
    (folder / "other").mkdir(exist_ok=True)
    for name, written in (("copy.txt", content), ("half.txt", content[: len(content) // 2]), ("other/text0.txt", "x")):
        (folder / name).write_text(written)
    held = digests([read_text(folder / fitted), read_text(texts[2])])
    evaluation = [read_text(texts[1]), read_text(folder / measured)] if overlap else [read_text(folder / measured)]
    if not overlap:
        check_not_fitted("a plan", held, evaluation)
        return
    name = Path(measured).name
    with pytest.raises(
        ValueError, match=f"a plan was fitted to '{fitted}' .* overlaps with the evaluation text '{name}'"
    ):
        check_not_fitted("a plan", held, evaluation)


def test_names_that_are_no_parts_are_whole_texts() -> None:
    [text] = packaged_texts(["mansfield_park"])
    for name in ("mansfield_park", "mine", "mine#0.9-0.1", "mine#0.1.2-1"):
        with pytest.raises(ValueError, match="overlaps with the evaluation text 'mansfield_park'"):
            check_not_fitted("a plan", {name: text.sha256}, [text])
        check_not_fitted("a plan", {name: "ab" * 32}, [text])


def test_plans_that_were_fitted_to_an_evaluation_text_are_refused(
    directory: Path, texts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    model, stream = build("llama"), StreamPlan(StreamOptions(bits=4))
    held = digests([read_text(f"{texts[0]}#0-0.5")])
    plan = QuantizationPlan.for_model(
        model, SkvqConfig(), dict.fromkeys(range(3), (stream, stream)), method="", texts=held
    )
    plan.save(tmp_path / "a.safetensors")
    spec, tokenizer = f"plan:{tmp_path}/a.safetensors", AutoTokenizer.from_pretrained(directory)
    sizes: dict[str, Any] = {"chunks": 1, "tokens": 300, "score_from": 200}
    apart = compare(model, tokenizer, [spec], [f"{texts[0]}#0.5-1"], **sizes)
    assert apart.rows[0]["kl"] > 0.0
    assert ablate(model, tokenizer, spec, ["sinks"], [f"{texts[0]}#0.5-1"], **sizes).ablations
    message = r"plan '.*a.safetensors' was fitted to 'text0.txt#0-0.5'"
    with pytest.raises(ValueError, match=message):
        compare(model, tokenizer, ["full", spec], [texts[1], f"{texts[0]}#0.4-1"], **sizes)
    with pytest.raises(ValueError, match=message):
        ablate(model, tokenizer, spec, ["sinks"], [texts[0]], **sizes)
    for command in (["compare", "--methods", "full", spec], ["ablate", "--base", spec]):
        assert cli.main(["eval", *command, "--model", str(directory), "--texts", str(texts[0])]) == 1
        assert "was fitted to 'text0.txt#0-0.5'" in capsys.readouterr().err


class Characters:
    """A tokenizer of single characters."""

    bos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool) -> Any:
        return type("Encoded", (), {"input_ids": [2 + ord(character) % 200 for character in text]})()


def test_chunks_take_turns_and_do_not_overlap() -> None:
    texts = [Text("a", "".join(chr(32 + i % 90) for i in range(1000))), Text("b", "b" * 1000)]
    chunks = cut_chunks(Characters(), texts, 4, 40)
    assert [chunk.name for chunk in chunks] == ["a:0", "b:0", "a:1", "b:1"]
    assert {chunk.token_ids.numel() for chunk in chunks} == {40}
    starts = [200, 520]
    for chunk, start in zip(chunks[::2], starts, strict=True):
        expected = [1] + [2 + ord(c) % 200 for c in texts[0].content[start : start + 39]]
        assert chunk.token_ids.tolist() == expected
    with pytest.raises(ValueError, match="'a' has no 400 tokens left for its chunk 2"):
        cut_chunks(Characters(), texts, 3, 400)


def test_command_line_from_end_to_end(
    directory: Path, texts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [
        "eval",
        "compare",
        "--model",
        str(directory),
        "--dtype",
        "float32",
        "--chunks",
        "2",
        "--tokens",
        "150",
        "200",
    ]
    line += ["--methods", "full", "kivi:group=16", "wkvquant", "--texts", str(texts[0]), str(texts[1])]
    line += ["--calibration-texts", str(texts[2]), "--calibration-chunks", "1", "--calibration-tokens", "100"]
    line += ["--score-from", "60", "--window", "32", "--log", str(tmp_path / "log.jsonl")]
    assert cli.main([*line, "--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]) == 0
    shown = capsys.readouterr().out
    assert "chunks of 150 tokens, 178 scored" in shown
    assert "chunks of 200 tokens, 278 scored" in shown
    assert "KIVI 2-bit g16" in shown
    saved = json.loads((tmp_path / "out.json").read_text())
    assert len(saved["rows"]) == len((tmp_path / "log.jsonl").read_text().splitlines()) == 12
    assert saved["settings"]["window"] == 32
    assert [text["name"] for text in saved["settings"]["texts"]] == ["text0.txt", "text1.txt"]
    summary = saved["summaries"][1]
    assert (summary["method"], summary["chunks"]) == ("KIVI 2-bit g16", 2)
    assert summary["kl"]["mean"] > 0.0
    assert (tmp_path / "out.png").stat().st_size > 5000
    assert cli.main([*line[:-2], "--calibration-texts", str(texts[0])]) == 1
    assert "overlap" in capsys.readouterr().err
    assert cli.main([*line[:-2], "--methods", "rtn", "rtn"]) == 1
    assert "given twice" in capsys.readouterr().err


def test_without_texts_the_packages_own_serve(directory: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    report = compare(build("llama"), tokenizer, ["kivi"], chunks=1, tokens=180, score_from=100)
    assert report.settings["texts"][0]["name"] == "mansfield_park"
    assert report.rows[0]["scored"] == 79


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": []}, "methods is empty"),
        ({"methods": ["oscar"]}, "needs calibration"),
        ({"settings": Settings(score_from=95)}, "expected more than score_from"),
    ],
)
def test_bad_requests_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure(build("llama"), **({"methods": ["full"], "chunks": [prompts(1, 90)[0]]} | arguments))
    with pytest.raises(ValueError, match="window=-1"):
        Settings(window=-1)


def test_models_with_unknown_logits_are_refused() -> None:
    model = build("llama")
    model.lm_head.register_forward_hook(lambda module, args, output: output**3)
    with pytest.raises(ValueError, match="not a linear map"):
        OutputHead(model)
    simulator = Simulator(build("llama"))
    with pytest.raises(ValueError, match="score_from=9: expected"):
        ChunkReference(simulator, OutputHead(simulator.model), prompts(1, 10)[0], 9, 2, 2)


def test_names_are_imported_when_used() -> None:
    assert set(evaluate.__all__) <= set(dir(evaluate))
    assert evaluate.compare is compare
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        evaluate.nothing  # noqa: B018


def test_the_notebook_and_the_docs_run() -> None:
    docs = Path(__file__).parent.parent / "docs"
    notebook = json.loads((docs / "evaluate.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    names: dict[str, Any] = {}
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for source in code:
        exec(compile(source, "evaluate.ipynb", "exec"), names)
    kept = {summary.method: summary.kl.mean for summary in names["report"].summaries()}
    assert kept["1-bit, two means, centred"] < kept["1-bit, two means"]
    # the class of the page is that of the notebook
    page = (docs / "evaluate.md").read_text(encoding="utf-8")
    [method] = [source.partition("class TwoMeans")[2] for source in code if "class TwoMeans(Method)" in source]
    assert method.strip() in page

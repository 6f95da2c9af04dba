"""Ablations: which rows the tables have and what is left out, rows that are those of `compare`, resuming, commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from skvq import cli
from skvq.evaluate import Settings, compare, parse_method
from skvq.evaluate.ablations import TABLES, Ablation, Ablations, _Base, _FittedOnce, _plan, ablate
from skvq.evaluate.cli import ABLATION_TABLES
from skvq.evaluate.methods.skvq import Skvq
from skvq.evaluate.simulation import Simulator
from tiny_directory import save
from tiny_models import build

SETTINGS = Settings(window=24, sinks=3, score_from=40)
SIZES: dict[str, Any] = {"chunks": 1, "tokens": 200, "calibration_chunks": 1, "calibration_tokens": 80}
REGIONS: dict[str, Any] = {"window": 24, "sinks": 3, "score_from": 150}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


def planned(base: str, family: str = "llama", **changes: Any) -> tuple[dict[str, Ablation], list[str]]:
    ablations, left_out = _plan(_Base(base, SETTINGS, build(family, **changes), 300), None)
    return {ablation.name: ablation for ablation in ablations}, left_out


def texts_of(ablation: Ablation) -> list[str]:
    return [f"{variant.text}{'*' * variant.is_base}" for variant in ablation.variants]


def test_tables_of_the_papers_method() -> None:
    # two heads of 16 channels
    tables, left_out = planned("skvq:bits=2,group=16")
    assert left_out == []
    assert {name: texts_of(x) for name, x in tables.items()} == {
        "window": ["0", "1", "24*", "32", "64", "128", "256"],
        "sinks": ["0", "1", "3*", "5", "16", "64"],
        "search": ["0*", "16", "64"],
        "group": ["16*", "32"],
        "reorder": ["off", "on*"],
        "clip": ["fitted*", "0.85", "0.9", "0.92", "0.94", "0.96", "1"],
        "metadata": ["e4m3*", "fp16"],
        "rope": ["after RoPE*", "before RoPE"],
    }
    assert tables["group"].left_out == [
        f"group {size}: group={size}: expected at most the 32 channels of all heads" for size in (64, 128)
    ]
    [refused] = tables["clip"].left_out
    assert refused.startswith("clip 1.1: ")
    assert "expected a number above 0 and up to 1" in refused
    for ablation in tables.values():
        for variant in ablation.variants:
            assert parse_method(variant.spec).name  # every row can be given to `compare`
            others = SETTINGS if ablation.name not in ("window", "sinks") else variant.settings
            assert variant.settings == others
    changed = parse_method(tables["rope"].variants[1].spec)
    assert isinstance(changed, Skvq)
    assert (changed.pre_rope, changed.group, changed.key_bits) == (True, 16, 2)
    tables, _ = planned("skvq-pre-rope:bits=2,group=16")
    assert texts_of(tables["rope"]) == ["after RoPE", "before RoPE*"]
    assert texts_of(tables["search"]) == ["0*", "16", "64"]


def test_tables_of_ours() -> None:
    tables, left_out = planned("ours:keys.block=128,values.block=128", "qwen3")
    assert {name: texts_of(x) for name, x in tables.items()} == {
        "window": ["1", "24*", "32", "64", "128", "256"],
        "sinks": ["0", "1", "3*", "5", "16", "64"],
        "search": ["0", "16", "64*"],
        "group": ["32*"],
        "clip": ["0.85", "0.9", "0.92", "0.94", "0.96", "1*", "1.1"],
        "metadata": ["e4m3*", "fp16"],
    }
    assert tables["window"].left_out[0] == "window 0: window=0: expected an integer of at least 1"
    assert len(tables["group"].left_out) == 2
    assert [line.split(":")[0] for line in left_out] == ["table reorder", "table rope"]
    config = parse_method(tables["clip"].variants[0].spec).config  # type: ignore[attr-defined]
    assert (config.keys.clip, config.values.clip, config.keys.block) == (0.85, 0.85, 128)
    # an option for both streams gives way to those of the streams
    tables, _ = planned("ours:group_size=32,keys.block=0,values.block=0", "qwen3", head_dim=64)
    assert texts_of(tables["group"]) == ["32*", "64"]


def test_a_shared_method_asks_for_what_its_own_does() -> None:
    for spec in ("ours", "kivi:sink_search=16", "skvq-pre-rope", "skvq"):
        own, shared = parse_method(spec), _FittedOnce(spec)
        for name in ("unit", "waits", "needs_calibration", "before_rope", "uses_queries", "sink_search"):
            assert getattr(shared, name) == getattr(own, name), name


def test_what_leaves_nothing_to_pack_is_left_out() -> None:
    ablations, _ = _plan(_Base("rtn", SETTINGS, build("llama"), 100), ["window", "group"])
    window, group = ablations
    assert texts_of(window) == ["0", "1", "24*", "32", "64"]
    assert window.left_out[0].endswith(
        "window=128 and sinks=3 leave nothing to pack of 100 tokens, expected longer chunks"
    )
    assert texts_of(group) == ["16", "128*"]  # for heads of 16 channels the same
    assert "expected a divisor of the head's 16 channels" in group.left_out[0]
    with pytest.raises(ValueError, match="base='rtn': window=24 and sinks=3 leave nothing"):
        _Base("rtn", SETTINGS, build("llama"), 20)


def test_rows_are_those_of_compare(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, log = build("llama"), tmp_path / "log.jsonl"
    fits: list[str] = []
    prepare = Skvq.prepare

    def counted(self: Skvq, rows: Any) -> None:
        fits.append(self.name)
        prepare(self, rows)

    monkeypatch.setattr(Skvq, "prepare", counted)
    tables = ["window", "reorder", "metadata"]
    found = ablate(model, tokenizer, "skvq:bits=2,group=16", tables, **SIZES, **REGIONS, log=log)
    # the base of all tables and windows is fitted once, and so are the two others
    assert sorted(fits) == ["SKVQ 2-bit g16", "SKVQ 2-bit g16 fp16", "SKVQ 2-bit g16 no reorder"]
    assert len(log.read_text().splitlines()) == 8  # six windows, no reorder, fp16
    [window, reorder, metadata] = found.ablations
    assert texts_of(window) == ["0", "1", "24*", "32", "64", "128"]
    bases = [next(x for x in ablation.report.summaries() if "(base)" in x.method) for ablation in found.ablations]
    assert len({base.kl.mean for base in bases}) == 1
    kl = {variant.text: x.kl.mean for variant, x in zip(window.variants, window.report.summaries(), strict=True)}
    assert kl["0"] > kl["64"] > 0.0
    e4m3, fp16 = metadata.report.summaries()
    assert fp16.bits == pytest.approx(2 * e4m3.bits - 2)
    # the same rows from `compare`, and from the log without a forward pass
    monkeypatch.setattr(Simulator, "run", None)
    for ablation, row in ((window, 1), (reorder, 0)):
        variant = ablation.variants[row]
        regions = REGIONS | {"window": variant.settings.window}
        [direct] = compare(model, tokenizer, [variant.spec], **SIZES, **regions, log=log).summaries()
        assert direct.kl.mean == ablation.report.summaries()[row].kl.mean
    again = ablate(model, tokenizer, "skvq:bits=2,group=16", tables, **SIZES, **REGIONS, log=log)
    assert again.to_dict() == found.to_dict()
    assert isinstance(again, Ablations)


@pytest.mark.parametrize(
    ("base", "tables", "message"),
    [
        ("skvq:bits=2", ["nothing"], "tables: 'nothing': expected some of window, sinks"),
        ("ours", ["reorder"], "tables: 'reorder': base='ours' has no such option, expected some of window, sinks, sea"),
        ("kivi:bits=2", ["rope"], "tables: 'rope': base='kivi:bits=2' has no such option"),
        ("nothing", None, "base: method 'nothing': unknown, expected one of"),
        ("skvq:bits=7", None, "base: method 'skvq:bits=7': key_bits=7: expected one of"),
    ],
)
def test_bad_requests_are_refused(tokenizer: Any, base: str, tables: list[str] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ablate(build("llama"), tokenizer, base, tables, **(SIZES | {"tokens": 400}), **REGIONS)


def test_command_line_from_end_to_end(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    letters = "abcdefghijklmnopqrstuvwxyz ."
    texts = []
    for index in range(2):
        numbers = torch.randint(0, len(letters), (6000,), generator=generator).tolist()
        texts.append(tmp_path / f"text{index}.txt")
        texts[-1].write_text("".join(letters[i] for i in numbers))
    line = ["eval", "ablate", "--model", str(directory), "--dtype", "float32", "--chunks", "2", "--tokens", "150"]
    line += ["--texts", str(texts[0]), "--calibration-texts", str(texts[1]), "--window", "32", "--score-from", "60"]
    line += ["--base", "ours:keys.block=0,values.block=0", "--log", str(tmp_path / "log.jsonl")]
    assert cli.main([*line, "--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]) == 0
    shown = capsys.readouterr().out
    assert "== clip, base ours:keys.block=0,values.block=0" in shown
    assert "window 32 (base)" in shown
    assert "left out: window 0: window=0" in shown
    assert "left out: table reorder: base 'ours:keys.block=0,values.block=0' has no such option" in shown
    saved = json.loads((tmp_path / "out.json").read_text())
    assert list(saved["tables"]) == ["window", "sinks", "search", "group", "clip", "metadata"]
    assert (saved["settings"]["window"], saved["settings"]["base"]) == (32, "ours:keys.block=0,values.block=0")
    assert saved["tables"]["clip"]["summaries"][0]["kl"]["half_width"] > 0.0
    assert len(saved["left_out"]) == 2
    assert (tmp_path / "out.png").stat().st_size > 5000
    assert cli.main([*line, "--tables", "rope"]) == 1
    assert "has no such option, expected some of window" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*line, "--tables", "nothing"])
    assert "--tables: invalid choice: 'nothing' (choose from" in capsys.readouterr().err
    assert tuple(TABLES) == ABLATION_TABLES

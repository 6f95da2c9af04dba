"""The demo: finding and assembling the packaged model, its measures, and whole runs on tiny random models."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache

import tiny_directory
from demo_model import skip_without_the_demo_model
from skvq import QuantizedDynamicCache, demo, evaluate, models
from skvq.demo import PACKED, STOCK, DemoOptions, print_report, run_demo
from skvq.model_layers import cache_argument, layers_for_progress
from skvq.models import ExtraNotInstalledError, ModelFileError, PackagedModel
from tiny_models import SEEING, build, build_seeing, prompts

PARTS = (b"GGUF first part ", b"and the second")
FAKE = PackagedModel(
    name="fake",
    title="Fake model",
    distributions=("skvq-fake-part1", "skvq-fake-part2"),
    part_pattern=r"\.gguf\.part\d+$",
    sha256=hashlib.sha256(b"".join(PARTS)).hexdigest(),
    extra="demo",
)


def install(site: Path, name: str, part: bytes | None, extra_file: bool = False) -> None:
    """An installed distribution as pip leaves it: metadata, a record, and the part (None: recorded, but not there)."""
    package = name.replace("-", "_")
    files = [f"{package}/data/model.gguf.part0"] + ([f"{package}/data/model.gguf.part9"] if extra_file else [])
    (site / package / "data").mkdir(parents=True)
    if part is not None:
        for file in files:
            (site / file).write_bytes(part)
    info = site / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the import path, and a cache folder of the test's own."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


# ---- the packaged model ----------------------------------------------------------------------------------------------


def test_cache_directory_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert models.cache_directory() == tmp_path / "skvq"
    for value in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert models.cache_directory() == Path.home() / ".cache" / "skvq"


def test_parts_are_found_in_order_without_importing_them(site: Path) -> None:
    for name, part in zip(FAKE.distributions, PARTS, strict=True):
        install(site, name, part)
    (site / "skvq_fake_part1" / "__init__.py").write_text("raise RuntimeError('imported')")
    assert tuple(path.read_bytes() for path in models.find_parts(FAKE)) == PARTS


def test_a_missing_package_names_the_extra(site: Path) -> None:
    install(site, FAKE.distributions[0], PARTS[0])
    with pytest.raises(ExtraNotInstalledError, match=r"skvq-fake-part2.*pip install 'skvq\[demo\]'"):
        models.find_parts(FAKE)


@pytest.mark.parametrize(
    ("part", "extra_file", "message"), [(PARTS[0], True, "lists 2 files"), (None, False, "there is no such file")]
)
def test_a_package_without_its_part_is_refused(site: Path, part: bytes | None, extra_file: bool, message: str) -> None:
    install(site, FAKE.distributions[0], part, extra_file)
    with pytest.raises(ModelFileError, match=message):
        models.find_parts(FAKE)


def test_assembled_file_appears_only_if_its_hash_is_right(tmp_path: Path) -> None:
    parts = [tmp_path / "0", tmp_path / "1"]
    for path, content in zip(parts, PARTS, strict=True):
        path.write_bytes(content)
    folder = tmp_path / "out"
    with pytest.raises(ModelFileError, match="SHA-256"):
        models.assemble(parts[::-1], folder / "model.gguf", FAKE.sha256)
    assert list(folder.iterdir()) == []
    assert models.assemble(parts, folder / "model.gguf", FAKE.sha256).read_bytes() == b"".join(PARTS)
    assert [path.name for path in folder.iterdir()] == ["model.gguf"]


def test_demo_model_is_converted_once(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conversions: list[bytes] = []

    def convert(gguf: Path, target: Path) -> Path:
        conversions.append(gguf.read_bytes())
        with models._folder_in_the_making(target) as folder:
            (folder / "config.json").write_text("{}")
        return target

    monkeypatch.setattr(models, "convert_gguf", convert)
    monkeypatch.setattr(models, "_require", lambda module, extra: None)
    for name, part in zip(FAKE.distributions, PARTS, strict=True):
        install(site, name, part)
    reports: list[str] = []
    first = models.demo_model_directory(FAKE, report=reports.append)
    assert models.demo_model_directory(FAKE, report=reports.append) == first
    assert conversions == [b"".join(PARTS)]
    assert len(reports) == 2
    assert [path.name for path in first.parent.iterdir()] == [FAKE.folder_name]


def interrupt(file: Path) -> None:
    """What Ctrl-C does in the middle of saving."""
    file.write_text("")
    raise KeyboardInterrupt


def test_an_interrupted_conversion_leaves_nothing_and_a_faster_one_wins(tmp_path: Path) -> None:
    target = tmp_path / "model"
    interrupted = models._folder_in_the_making(target)
    with pytest.raises(KeyboardInterrupt), interrupted as folder:
        interrupt(folder / "half")
    assert list(tmp_path.iterdir()) == []
    with models._folder_in_the_making(target) as folder:
        (folder / "mine").write_text("")
        target.mkdir()
        (target / "theirs").write_text("")
    assert [path.name for path in target.iterdir()] == ["theirs"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("name", [demo.PROMPT_TEXT, demo.HELD_OUT_TEXT])
def test_packaged_texts(name: str) -> None:
    text = models.packaged_text(name)
    assert text.isascii()
    assert 30_000 < len(text) < 40_000


# ---- measures --------------------------------------------------------------------------------------------------------


def direct_scores(model: Any, token_ids: torch.Tensor, context: int) -> torch.Tensor:
    """Log-probabilities of one forward pass without a cache, of the tokens that `stream_scores` scores."""
    return model(token_ids, use_cache=False).logits[0, context:-1].log_softmax(-1)


@pytest.mark.parametrize("chunk", [1, 5, 64])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_perplexity_is_that_of_one_forward_pass(family: str, chunk: int) -> None:
    model, token_ids, context = build(family), prompts(1, 90), 60
    scores = direct_scores(model, token_ids, context)
    expected = math.exp(-scores.gather(1, token_ids[0, context + 1 :, None]).mean().item())
    found = evaluate.perplexity(model, token_ids, context, DynamicCache(config=model.config), chunk)
    assert found == pytest.approx(expected, rel=1e-4)


def test_compare_measures_divergence_from_the_first_cache() -> None:
    model, token_ids, context = build("llama"), prompts(1, 400), 360
    caches = {
        "stock": DynamicCache(config=model.config),
        "again": DynamicCache(config=model.config),
        "packed": QuantizedDynamicCache(model.config, window=16, sinks=2),
    }
    counted: list[int] = []
    found = evaluate.compare_caches(model, token_ids, context, caches, chunk=8, report=counted.append)
    assert sum(counted) == 39
    assert found["again"] == found["stock"]
    assert (found["stock"].kl_divergence, found["stock"].top1_agreement) == (0.0, 1.0)
    assert found["packed"].kl_divergence > 1e-3
    packed = QuantizedDynamicCache(model.config, window=16, sinks=2)
    assert evaluate.perplexity(model, token_ids, context, packed, 8) == pytest.approx(found["packed"].perplexity)
    assert packed.stats()["packed"] == 3 * 5
    reference = direct_scores(model, token_ids, context)
    packed_scores = list(
        evaluate.stream_scores(model, token_ids, context, QuantizedDynamicCache(model.config, window=16, sinks=2), 8)
    )
    expected = (reference.exp() * (reference - torch.cat(packed_scores))).sum(-1).mean().item()
    assert found["packed"].kl_divergence == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("family", SEEING)
def test_progress_of_a_prompt_counts_the_layers_of_the_text_decoder(family: str) -> None:
    model, seen = build_seeing(family), list[str]()
    assert len(layers_for_progress(model)) == 3
    cache = DynamicCache(config=model.config)
    evaluate.generate(model, prompts(1, 40), 2, cache, report=lambda stage, count: seen.append(stage))
    assert seen == ["prefill"] * 3 + ["decode"] * 2
    assert not any(module._forward_hooks for module in model.modules())


def test_progress_without_known_layers_is_none() -> None:
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=99))
    assert layers_for_progress(model) == []


@pytest.mark.parametrize(("context", "chunk", "message"), [(0, 1, "context is 0"), (9, 1, "context"), (4, 0, "chunk")])
def test_perplexity_refuses_bad_input(context: int, chunk: int, message: str) -> None:
    model = build("llama")
    with pytest.raises(ValueError, match=message):
        evaluate.perplexity(model, prompts(1, 10), context, DynamicCache(config=model.config), chunk)
    with pytest.raises(ValueError, match="token_ids has shape"):
        evaluate.perplexity(model, prompts(2, 10), 4, DynamicCache(config=model.config))


def test_generation_is_greedy_and_timed() -> None:
    model, token_ids = build("llama"), prompts(1, 40)
    seen: list[str] = []
    cache = DynamicCache(config=model.config)
    run = evaluate.generate(model, token_ids, 6, cache, report=lambda stage, count: seen.append(stage))
    expected = model.generate(token_ids, max_new_tokens=6, do_sample=False)[0, 40:].tolist()
    assert run.token_ids == expected
    assert len(run.step_seconds) == 5
    assert seen == ["prefill"] * 3 + ["decode"] * 6
    assert run.prefill_tokens_per_second > 0
    assert run.decode_tokens_per_second > 0
    assert not any(layer._forward_hooks for layer in model.model.layers)
    with pytest.raises(ValueError, match="new_tokens is 1"):
        evaluate.generate(model, token_ids, 1, cache)


def test_bytes_of_caches() -> None:
    model, token_ids = build("gemma3"), prompts(1, 300)
    stock, packed = DynamicCache(config=model.config), QuantizedDynamicCache(model.config, window=16, sinks=2)
    for cache in (stock, packed):
        assert evaluate.bytes_of_cache(cache, model.config).total == 0
        model(token_ids, **cache_argument(model, cache))
    held = evaluate.bytes_of_cache(stock, model.config)
    one_token = 2 * 2 * 16 * 4  # keys and values, heads, channels, float32
    assert held.full_layers == [1, 2]
    assert held.per_layer == [23 * one_token, 300 * one_token, 300 * one_token]
    assert held.per_full_layer == 300 * one_token
    smaller = evaluate.bytes_of_cache(packed, model.config)
    assert smaller.total == packed.nbytes
    assert smaller.per_layer[0] == held.per_layer[0]
    grown = evaluate.bytes_of_full_layer_at(
        lambda: DynamicCache(config=model.config), model.config, (2, 16), (2, 16), 5000, torch.float32
    )
    assert grown == 5000 * one_token


def test_a_model_without_full_attention_has_nothing_to_pack() -> None:
    with pytest.raises(ValueError, match="no layer with full attention"):
        evaluate.full_attention_layers(build("mistral-window").config)


# ---- the whole -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_demo_on_a_tiny_model(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "LONG_CONTEXT", 5000)
    options = DemoOptions(
        model=str(tiny_directory.save(tmp_path / "model", family)),
        dtype="float32",
        prompt_tokens=400,
        new_tokens=6,
        scored_tokens=20,
        window=32,
        json=tmp_path / "demo.json",
    )
    report = run_demo(options)
    assert json.loads((tmp_path / "demo.json").read_text()) == json.loads(json.dumps(report))
    assert set(report) == {
        "command",
        "machine",
        "model",
        "options",
        "runs",
        "same_tokens_at_start",
        "load_average_at_start",
        "seconds",
    }
    assert list(report["runs"]) == [STOCK, PACKED]
    stock, packed = report["runs"][STOCK], report["runs"][PACKED]
    assert set(packed) - set(stock) == {"bits_per_element", "stats"}
    assert packed["stats"]["packed"] > 0
    assert packed["stats"]["decoded"] == {}
    for key in ("cache_bytes", "cache_bytes_per_full_layer", "cache_bytes_per_full_layer_at_128k"):
        assert packed[key] < stock[key]
    assert stock["cache_bytes_of_other_layers"] == packed["cache_bytes_of_other_layers"]
    assert stock["bits_per_element_of_full_layers"] == 32
    assert len(stock["token_ids"]) == len(packed["token_ids"]) == 6
    assert stock["held_out"]["tokens"] == 20
    print_report(report, width=100)
    shown = capsys.readouterr().out
    for text in ("decode, tokens/s", "cache at 128K tokens", "perplexity, 20 held-out tokens", "decoded to plain"):
        assert text in shown


def test_pass_through_demo_generates_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "LONG_CONTEXT", 600)
    model = str(tiny_directory.save(tmp_path / "model"))
    report = run_demo(
        DemoOptions(model=model, dtype="float32", key_bits=16, value_bits=16, prompt_tokens=300, new_tokens=12)
    )
    assert report["same_tokens_at_start"] == 12
    assert report["runs"][PACKED]["held_out"]["kl_divergence"] == pytest.approx(0, abs=1e-6)


def test_a_prompt_longer_than_the_text_is_refused(tmp_path: Path) -> None:
    model = str(tiny_directory.save(tmp_path / "model"))
    with pytest.raises(ValueError, match=r"northanger_abbey' has \d+ tokens with this tokenizer, 99999 were asked for"):
        run_demo(DemoOptions(model=model, prompt_tokens=99999))
    with pytest.raises(ValueError, match="new_tokens is 1, expected at least 2"):
        DemoOptions(new_tokens=1)


@pytest.mark.model
@pytest.mark.parametrize("prompt", [30, 200])
def test_pass_through_gives_the_tokens_of_the_stock_cache_on_a_real_model(prompt: int) -> None:
    """The tokens of the shorter prompt wait for sinks; most of the longer one lies in the store, as it came."""
    skip_without_the_demo_model()
    loaded = models.load(dtype="float32")
    ids = models.packaged_tokens(loaded.tokenizer, demo.PROMPT_TEXT, prompt)
    packed = QuantizedDynamicCache(loaded.model.config, key_bits=16, value_bits=16, window=70, sinks=5)
    options = {"max_new_tokens": 48, "do_sample": False}
    wanted, found = (
        loaded.model.generate(ids, **cache_argument(loaded.model, cache), **options)
        for cache in (DynamicCache(config=loaded.model.config), packed)
    )
    assert wanted.shape[1] > prompt + 8
    assert torch.equal(found, wanted)
    assert packed.stats()["decoded"] == {}
    assert packed.stats()["packed"] > 0


@pytest.mark.model
def test_demo_model_from_its_package() -> None:
    skip_without_the_demo_model()
    report = run_demo(DemoOptions(prompt_tokens=512, new_tokens=8, scored_tokens=32))
    assert report["model"]["full_attention_layers"] == 3
    stock, packed = report["runs"][STOCK], report["runs"][PACKED]
    assert packed["cache_bytes_per_full_layer_at_128k"] < stock["cache_bytes_per_full_layer_at_128k"] / 7
    assert packed["stats"]["decoded"] == {}
    assert packed["held_out"]["kl_divergence"] < 0.2

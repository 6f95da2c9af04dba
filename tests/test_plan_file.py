"""Plans of whole models: their file, whom it refuses, and the cache that packs by one."""

import copy
import dataclasses
import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import parts_examples
import tiny_models
from skvq import QuantizedDynamicCache, SkvqConfig, SkvqError, StreamOptions
from skvq.fingerprint import ModelFingerprint
from skvq.inspect_plan import plan_report, plan_table
from skvq.layer import PackedLayer
from skvq.model_layers import cache_argument
from skvq.plan import LayerPlan, StreamPlan
from skvq.plan_file import FILE_NAME, PlanHeader, QuantizationPlan

HEADS, D = 2, 16
LLAMA = tiny_models.CONFIGS["llama"]()
PAIRS = tuple((0.25 * n - 0.9, 0.1 * n) for n in range(8))


def static(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    orders = tuple(tuple(torch.randperm(D, generator=generator).tolist()) for _ in range(HEADS))
    return {
        "shift": torch.randn(HEADS, D, generator=generator),
        "scale": torch.rand(HEADS, D, generator=generator) + 0.5,
        "permutation": orders,
    }


def streams() -> dict[int, tuple[StreamPlan, StreamPlan]]:
    """Every layer another packing: blocks, static data, own codebooks, rows kept as they are."""
    return {
        0: (StreamPlan(StreamOptions(bits=3, block=128)), StreamPlan(StreamOptions(bits=1.6, block=128))),
        1: (
            StreamPlan(StreamOptions(bits=2, codebook=(-1.5, -0.4, 0.4, 1.55)), **static(1)),
            StreamPlan(StreamOptions(bits=1.5, codebook=PAIRS, clip=0.9), shift=static(2)["shift"]),
        ),
        2: (
            StreamPlan(StreamOptions(bits=4, rotation="identity", refinements=2), permutation=tuple(range(D))[::-1]),
            StreamPlan(StreamOptions(bits=16)),
        ),
    }


def plan(config: Any = LLAMA, **changes: Any) -> QuantizationPlan:
    options = SkvqConfig(window=8, sinks=2, **changes)
    texts, notes = {"novel.txt": "ab" * 32}, {"chunks": 4, "cost": 0.25}
    return QuantizationPlan.for_model(config, options, streams(), method="tried by hand", texts=texts, notes=notes)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    plan().save(tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def fields_of(stream: StreamPlan) -> dict[str, Any]:
    values = {x.name: getattr(stream, x.name) for x in dataclasses.fields(stream)}
    return {name: x.tolist() if isinstance(x, torch.Tensor) else x for name, x in values.items()}


def assert_same(one: QuantizationPlan, other: QuantizationPlan) -> None:
    assert (one.header, one.config, one.bits) == (other.header, other.config, other.bits)
    assert list(one.layers) == list(other.layers)
    for index, layer in one.layers.items():
        twin = other.layers[index]
        assert (layer.window, layer.sinks, layer.nonfinite) == (twin.window, twin.sinks, twin.nonfinite)
        assert fields_of(layer.keys) == fields_of(twin.keys)
        assert fields_of(layer.values) == fields_of(twin.values)


# ---- files


def test_a_loaded_plan_is_the_saved_one(saved: Path) -> None:
    assert_same(QuantizationPlan.load(saved, LLAMA), plan())


def test_the_same_plan_gives_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    QuantizationPlan.load(saved).save(tmp_path / "b.safetensors")
    assert saved.read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert plan().sha256 == hashlib.sha256(saved.read_bytes()).hexdigest()
    assert plan(nonfinite="propagate").sha256 != plan().sha256
    assert len(list(tmp_path.iterdir())) == 2


def test_every_field_of_a_stream_is_saved(saved: Path) -> None:
    """A field that is added to `StreamPlan` must reach the file, too."""
    with safe_open(saved, framework="pt") as file:
        names = {name.rpartition(".")[2] for name in file.keys()}  # noqa: SIM118
    given = {x.name for x in dataclasses.fields(StreamPlan)} - {"options", *OF_PARTS}
    assert names == given


OF_PARTS = {"matrix", "inverse", "shift_sine", "frequencies", "noise"}


def plan_of_parts() -> QuantizationPlan:
    """Layer 1 of `streams` with parts instead: keys with all that there is, values with a matrix only."""
    keys = parts_examples.stream_plan(D, 0, HEADS)
    values = parts_examples.stream_plan(D, 1, HEADS, turning=False, noise=False)
    given = streams() | {1: (keys, dataclasses.replace(values, shift=None))}
    return QuantizationPlan.for_model(LLAMA, SkvqConfig(window=8, sinks=2), given, method="parts")


def test_plans_of_parts_are_saved(tmp_path: Path) -> None:
    made = plan_of_parts()
    made.save(tmp_path / "a")
    loaded = QuantizationPlan.load(tmp_path / "a", LLAMA)
    assert_same(loaded, made)
    loaded.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with safe_open(tmp_path / "a", framework="pt") as file:
        names = {x for x in file.keys() if x.startswith("layers.1.")}  # noqa: SIM118
    expected = {f"layers.1.keys.{x}" for x in OF_PARTS | {"shift"}}
    assert names == expected | {"layers.1.values.matrix", "layers.1.values.inverse"}
    # 3 bits, or 1, and a scale of one byte for 16 channels
    assert [loaded.bits[1][name].bits for name in ("keys", "values")] == [3.5, 1.5]
    assert "keys 3/4 bits, values 1/1.6/16 bits" in repr(loaded)
    table = " ".join(plan_table(loaded).split())
    assert "1 keys 3 3.500 3·16 row e4m3 lloyd-max norm 1 shift + shift_sine + matrix + noise 0" in table
    assert "1 values 1 1.500 1·16 row e4m3 lloyd-max norm 1 matrix 0" in table
    assert " 0 keys 3 3.750 - auto e4m3 lloyd-max norm 1 hadamard 128" in table
    assert plan_report(loaded)["layers"][1]["keys"]["static_bytes"] == 4 * (2 * 2 * D * D + 2 * 2 * D + 2 * D)


def test_plans_of_parts_are_checked(tmp_path: Path) -> None:
    made = plan_of_parts()
    pairs = {index: (layer.keys, layer.values) for index, layer in made.layers.items()}
    more_heads = parts_examples.stream_plan(D, 0, 3)
    with pytest.raises(SkvqError, match=r"layer 1: matrix: expected 1 or 2 matrices"):
        QuantizationPlan.for_model(LLAMA, made.config, pairs | {1: (more_heads, pairs[1][1])}, method="")
    bare = dataclasses.replace(pairs[1][0], matrix=None)
    with pytest.raises(SkvqError, match="layer 1: keys: matrix: expected one with parts"):
        QuantizationPlan.for_model(LLAMA, made.config, pairs | {1: (bare, pairs[1][1])}, method="")
    made.save(tmp_path / "a.safetensors")
    edit_header(tmp_path / "a.safetensors", lambda h: h["layers"]["1"]["keys"].update(parts=[[3, 32]]))
    with pytest.raises(SkvqError, match=r"layer 1: keys: parts=.*: expected widths that add up to head_dim=16"):
        QuantizationPlan.load(tmp_path / "a.safetensors")
    edit_header(tmp_path / "a.safetensors", lambda h: h["layers"]["1"]["keys"].update(bits=2))
    with pytest.raises(SkvqError, match=r"bits=2: expected 3\.0, the mean of parts"):
        QuantizationPlan.load(tmp_path / "a.safetensors")


@pytest.mark.parametrize("with_rows", [False, True])
def test_plans_of_parts_can_be_drawn(tmp_path: Path, with_rows: bool) -> None:
    from skvq.calibrate.statistics import Sample
    from skvq.inspect_plot import save_picture

    rows = torch.randn(HEADS, 40, D, generator=torch.Generator().manual_seed(0))
    sample = Sample(rows, rows, rows, torch.arange(40)) if with_rows else None
    save_picture(plan_of_parts(), 1, tmp_path / "a.png", head=1, sample=sample)
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def edit_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    outer = json.loads(data[8 : 8 + size])
    inner = json.loads(outer["__metadata__"]["skvq"])
    change(inner)
    outer["__metadata__"]["skvq"] = json.dumps(inner)
    text = json.dumps(outer).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.update(format_version=99), "format_version=99: expected 1, the one that this release reads"),
        (lambda h: h.update(kind="other"), "kind 'other', expected 'quantization plan'"),
        (lambda h: h.pop("method"), "'method' is missing"),
        (lambda h: h["layers"].pop("1"), "tensor layers.1.keys.permutation: not known"),
        (lambda h: h["layers"].pop("0"), "layers: got 1, 2, expected 0, 1, 2, all that are packed"),
        (lambda h: h["layers"]["0"].pop("keys"), "'keys'.*expected a complete file"),
        (lambda h: h["layers"]["0"]["keys"].update(bits=5), "bits=5: expected one of"),
        (lambda h: h["layers"]["0"]["keys"].update(colour=5), "colour"),
        (lambda h: h["fingerprint"].update(model_type="qwen3"), "config_hash=.*expected"),
        (lambda h: h.update(fingerprint=3), "fingerprint: got 3, expected the fields model_type"),
    ],
)
def test_damaged_headers_are_refused(saved: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    edit_header(saved, change)
    with pytest.raises(SkvqError, match=message) as caught:
        QuantizationPlan.load(saved)
    assert "a.safetensors" in str(caught.value)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_files_are_refused(saved: Path, keep: int) -> None:
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(SkvqError, match="damaged or not a safetensors file"):
        QuantizationPlan.load(saved)


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(SkvqError, match="a safetensors file without skvq's header"):
        QuantizationPlan.load(tmp_path / "model.safetensors")
    with pytest.raises(SkvqError, match="no such file"):
        QuantizationPlan.load(tmp_path / "none.safetensors")


def test_a_failed_save_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        plan(nonfinite="propagate").save(saved)
    assert saved.read_bytes() == before
    assert [x.name for x in saved.parent.iterdir()] == [saved.name]


def test_saved_for_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    plan().save_pretrained(tmp_path / "plan")
    assert {x.name for x in (tmp_path / "plan").iterdir()} == {FILE_NAME, "README.md", "config.json"}
    assert "library_name: skvq" in (tmp_path / "plan" / "README.md").read_text()
    assert_same(QuantizationPlan.from_pretrained(tmp_path / "plan"), plan())
    assert_same(QuantizationPlan.load(tmp_path / "plan"), plan())


# ---- which plans, for which models


def test_other_models_are_refused_with_what_differs(saved: Path) -> None:
    wider = tiny_models.CONFIGS["llama"]()
    wider.num_key_value_heads, wider.rope_parameters = 4, {"rope_theta": 5e5, "rope_type": "default"}
    message = (
        r"num_key_value_heads: expected \[2, 2, 2\], found \[4, 4, 4\]; rope.rope_theta: expected 10000.0, found 5"
    )
    with pytest.raises(SkvqError, match=message):
        QuantizationPlan.load(saved, wider)
    with pytest.raises(
        SkvqError, match=r"a.safetensors: the plan was made for another model: .*'llama', found 'qwen3'"
    ):
        QuantizedDynamicCache.from_plan(tiny_models.build("qwen3"), saved)
    layers = tiny_models.CONFIGS["llama"]()
    layers.num_hidden_layers = 2
    with pytest.raises(SkvqError, match=r"packed_layers: expected \[0, 1, 2\], found \[0, 1\]"):
        QuantizedDynamicCache.from_plan(layers, plan())


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_fingerprints_know_their_model(family: str) -> None:
    one = ModelFingerprint.of(tiny_models.CONFIGS[family]())
    assert one.differences(ModelFingerprint.of(tiny_models.build(family))) == []
    assert ModelFingerprint.from_dict(json.loads(json.dumps(one.to_dict()))) == one
    others = [ModelFingerprint.of(tiny_models.CONFIGS[name]()) for name in tiny_models.FAMILIES if name != family]
    assert all(one.differences(other) for other in others)
    assert one.config_hash not in {other.config_hash for other in others}


def test_plans_are_checked() -> None:
    given = streams()
    header = PlanHeader(ModelFingerprint.of(LLAMA), "method")
    with pytest.raises(SkvqError, match="layers: got 0, 2, expected 0, 1, 2"):
        QuantizationPlan.for_model(LLAMA, SkvqConfig(), {0: given[0], 2: given[2]}, method="")
    config = SkvqConfig()
    other = {
        index: LayerPlan(*pair, window=128 if index != 1 else 5, sinks=5, sink_search=config.sink_search)
        for index, pair in given.items()
    }
    with pytest.raises(SkvqError, match=r"layer 1: window=5: expected 128"):
        QuantizationPlan(header, config, other)
    wrong = given | {1: (StreamPlan(StreamOptions(), shift=torch.zeros(3, D)), given[1][1])}
    with pytest.raises(SkvqError, match=r"layer 1: .*shift"):
        QuantizationPlan.for_model(LLAMA, SkvqConfig(), wrong, method="")
    group = given | {2: (StreamPlan(StreamOptions(group_size=64)), given[2][1])}
    with pytest.raises(SkvqError, match="layer 2: keys: group_size=64"):
        QuantizationPlan.for_model(LLAMA, SkvqConfig(), group, method="")


def test_bits_are_counted() -> None:
    made = plan()
    metadata = 8 / D
    per_layer = [
        3 + metadata + 2 * 16 / 128,
        8 * 4 / D + metadata + 2 * 16 / 128,  # 16 ternary channels are 4 bytes
        2 + metadata,
        1.5 + metadata,
        4 + metadata,
        16.0,
    ]
    found = [x.bits for layer in made.bits.values() for x in (layer["keys"], layer["values"])]
    assert found == pytest.approx(per_layer)
    assert made.average_bits() == pytest.approx(sum(per_layer) / 6)
    assert made.average_bits(("keys",)) == pytest.approx(sum(per_layer[::2]) / 3)
    assert "keys 2/3/4 bits, values 1.5/1.6/16 bits" in repr(made)


# ---- the cache


def test_layers_pack_as_their_own_plans_say(saved: Path) -> None:
    model = tiny_models.build("llama")
    cache = QuantizedDynamicCache.from_plan(model, saved)
    model(tiny_models.prompts(2, 150), **cache_argument(model, cache))
    exact = QuantizedDynamicCache(LLAMA, key_bits=16, value_bits=16)
    model(tiny_models.prompts(2, 150), **cache_argument(model, exact))
    for index, (layer, twin) in enumerate(zip(cache.layers, exact.layers, strict=True)):
        alone = PackedLayer(plan().layers[index], index, layer.counts)
        alone.update(twin.keys, twin.values)
        assert torch.equal(layer.keys, alone.keys)
        assert torch.equal(layer.values, alone.values)
        for row, sinks in enumerate(layer.order[:, :2].tolist()):
            assert torch.equal(layer.keys[row, :, sinks], twin.keys[row, :, sinks])
        assert torch.equal(layer.keys[:, :, -8:], twin.keys[:, :, -8:])
        assert not torch.equal(layer.keys, twin.keys)
        assert torch.equal(layer.values, twin.values) == (index == 2)
    # and attention reads them
    one, other = (model(tiny_models.prompts(2, 1), **cache_argument(model, x)).logits for x in (cache, exact))
    assert float((one - other).abs().max()) > 0.0
    assert cache.stats()["packed"] == 3


def test_a_plan_without_static_data_is_the_config() -> None:
    model, config = tiny_models.build("gemma3"), SkvqConfig(window=8, sinks=2, keys={"block": 128})
    pairs = dict.fromkeys((1, 2), (StreamPlan(config.keys), StreamPlan(config.values)))
    by_plan = QuantizedDynamicCache.from_plan(
        model, QuantizationPlan.for_model(model, config, pairs, method="the default")
    )
    by_config = QuantizedDynamicCache(model.config, config)
    prompt = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    runs = [
        model.generate(tiny_models.prompts(1, 200), **cache_argument(model, x), **prompt).logits
        for x in (by_plan, by_config)
    ]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))
    assert by_plan.skvq_config == by_config.skvq_config
    assert by_plan.nbytes == by_config.nbytes


def test_regions_may_be_changed_and_nothing_else() -> None:
    cache = QuantizedDynamicCache.from_plan(LLAMA, plan(), window=20, nonfinite="propagate")
    assert (cache.skvq_config.window, cache.skvq_config.sinks) == (20, 2)
    assert {(x.plan.window, x.plan.sinks, x.plan.nonfinite) for x in cache.layers} == {(20, 2, "propagate")}
    with pytest.raises(SkvqError, match="key_bits=3: the packing is the plan's, expected some of window, sinks"):
        QuantizedDynamicCache.from_plan(LLAMA, plan(), key_bits=3)
    with pytest.raises(SkvqError, match="window=0: expected an integer of at least 1"):
        QuantizedDynamicCache.from_plan(LLAMA, plan(), window=0)


def test_a_cache_shows_its_plan() -> None:
    cache = QuantizedDynamicCache.from_plan(LLAMA, plan())
    title, *rows = repr(cache).splitlines()
    assert title == (
        "QuantizedDynamicCache(plan 'tried by hand', keys 2/3/4 bits, values 1.5/1.6/16 bits, sinks 2, window 8)"
    )
    assert [name in row for name, row in zip(("K3 V1.6", "K2 V1.5", "K4 V16"), rows[1:], strict=False)] == [True] * 3
    assert "K3 V1.6" in cache._repr_html_()
    assert "tried by hand" in cache._repr_html_()
    twin = copy.deepcopy(cache)
    assert twin.plan is cache.plan
    assert QuantizedDynamicCache(LLAMA).plan is None

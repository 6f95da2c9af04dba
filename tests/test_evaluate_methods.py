"""Methods of the comparison: counted bits, quantized rows against plain loops, and what calibration fits."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from skvq import SkvqConfig, StreamOptions
from skvq.evaluate.calibration_rows import CalibrationRows
from skvq.evaluate.methods import METHODS, Geometry, Method, Where, parse_method
from skvq.evaluate.methods.kvquant import fit_levels
from skvq.evaluate.methods.ours import Planned
from skvq.evaluate.methods.quantizers import nearest_level
from skvq.evaluate.methods.skvq import CLIP_GRID, cluster_channels
from skvq.evaluate.simulation import Simulator
from skvq.plan import LayerPlan, StreamPlan
from skvq.plan_file import QuantizationPlan
from tiny_models import build, prompts

HEADS, WIDTH = 2, 64
GEOMETRY = Geometry(layer=0, num_key_value_heads=HEADS, head_dim=WIDTH)
# of an element: keys, values; in the paper's terms where it has them
BITS = {
    "full": (16, 16),
    "rtn:bits=2,group=64": (2 + 32 / 64, 2 + 32 / 64),
    "rtn:bits=2,group=128": (2 + 32 / 64, 2 + 32 / 64),  # a group does not leave its head
    "rtn:key_bits=3,value_bits=1.5,group=32,metadata=e4m3": (3 + 16 / 32, 8 * 13 / 64 + 16 / 32),
    "kivi:bits=2": (3, 3),
    "kivi:bits=4,group=64": (4.5, 4.5),
    "rotation:bits=2": (2 + 16 / 64, 2 + 16 / 64),
    "quarot:bits=4,group=32": (5, 5),
    "skvq:bits=2,group=64": (2.25, 2.25),
    "skvq-pre-rope:bits=2,group=32,metadata=fp16": (3, 3),
    "wkvquant": (4.5, 4.5),
    # one outlier of 128 elements is 32 bits; values have a range of 32 bits a token
    "kvquant:bits=2": (2 + 32 / 128, 2 + 64 / 128),
    "kvquant:bits=3,outliers=0": (3, 3 + 32 / 128),
    "oscar:bits=2": (2.5, 2.5),
    "quanto:nbits=2": (2.5, 2.5),
    "hqq": (4.5, 4.5),
    "fp8": (8, 8),
    "ours:key_bits=2,value_bits=1.6": (
        2 + 8 / 64 + 8 * 4 * 64 / (256 * 64),
        8 * 13 / 64 + 8 / 64 + 8 * 130 / (256 * 64),
    ),
}


@functools.cache
def rows() -> CalibrationRows:
    """Two chunks of a tiny model whose key channels differ in mean and spread, as real ones do."""
    model = build("llama", head_dim=WIDTH)
    generator = torch.Generator().manual_seed(3)
    for layer in model.base_model.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            gain = torch.randn(projection.weight.shape[0], 1, generator=generator).exp()
            projection.weight.data *= gain
    return CalibrationRows(Simulator(model), [prompts(1, 300, seed)[0] for seed in (1, 2)])


def prepared(spec: str) -> Method:
    method = parse_method(spec)
    method.prepare(rows())
    return method


def error(method: Method, keys: bool, layer: int = 1) -> float:
    """Relative squared error of the rows that are not sinks."""
    wrong = total = 0.0
    for chunk in rows().of_layer(layer):
        given = chunk.stream(keys)[None, :, 5 : 5 + 256]
        read = method.fake_quantize(given, Where(layer, keys, 5, chunk.rope))
        assert read.shape == given.shape
        assert read.dtype == torch.float32
        wrong += float((read - given).square().sum())
        total += float((given - given.mean(2, keepdim=True)).square().sum())
    return wrong / total


def needs(spec: str) -> None:
    if spec.startswith(("quanto", "hqq")):
        pytest.importorskip("optimum.quanto" if spec.startswith("quanto") else "hqq")


@pytest.mark.parametrize("spec", BITS)
def test_counted_bits(spec: str) -> None:
    needs(spec)
    method = prepared(spec)
    assert (method.bits(GEOMETRY, True), method.bits(GEOMETRY, False)) == pytest.approx(BITS[spec])


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"full", "fp8", "plan", "ours", "balanced"}))
def test_more_bits_are_closer(name: str) -> None:
    needs(name)
    fewer, more = prepared(f"{name}:bits=2"), prepared(f"{name}:bits=4")
    for keys in (True, False):
        assert 0.0 < error(more, keys) < 0.35 * error(fewer, keys) < 0.5
    assert fewer.name != more.name
    assert fewer.identity() != more.identity()


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"full", "plan", "ours", "balanced", "rtn", "kivi", "hqq"}))
def test_rows_of_a_unit_do_not_depend_on_others(name: str) -> None:
    needs(name)
    method = prepared(name)
    chunk = next(rows().of_layer(0))
    for keys in (True, False):
        given = chunk.stream(keys)[None, :, : 4 * 32]
        whole = method.fake_quantize(given, Where(0, keys, 0, chunk.rope))
        later = method.fake_quantize(given[:, :, 64:], Where(0, keys, 64, chunk.rope))
        assert torch.allclose(whole[:, :, 64:], later, atol=2e-3 * float(given.abs().max()))
        batch = method.fake_quantize(given.repeat(2, 1, 1, 1), Where(0, keys, 0, chunk.rope))
        assert torch.allclose(batch[1:], whole, atol=1e-5 * float(given.abs().max()))


@pytest.mark.parametrize("name", ["skvq", "skvq-pre-rope", "wkvquant", "kvquant", "oscar", "fp8"])
def test_unprepared_methods_say_so(name: str) -> None:
    method = parse_method(name)
    assert method.needs_calibration
    chunk = next(rows().of_layer(0))
    with pytest.raises(ValueError, match="not prepared"):
        method.fake_quantize(chunk.keys[None], Where(0, True, 0, chunk.rope))


def test_kivi_by_plain_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(1, 1, 4, 8, generator=generator)
    method = parse_method("kivi:bits=2,group=4")
    found = {keys: method.fake_quantize(given, Where(0, keys, 0)) for keys in (True, False)}
    for token in range(4):
        for channel in range(8):
            group = given[0, 0, token, channel // 4 * 4 : channel // 4 * 4 + 4]
            for keys, members in ((True, given[0, 0, :, channel]), (False, group)):
                low = members.min().half().float()
                step = ((members.max() - members.min()) / 3).half().float()
                code = round(float((given[0, 0, token, channel] - low) / step))
                expected = min(3, max(0, code)) * step + low
                assert float(found[keys][0, 0, token, channel]) == pytest.approx(float(expected))


# ---- what calibration fits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre_rope", [False, True])
def test_skvq_takes_the_clip_of_least_attention_error(pre_rope: bool) -> None:
    method: Any = prepared(f"skvq:bits=2,group=32,pre_rope={str(pre_rope).lower()}")
    for keys in (True, False):
        chosen = method._clips[1, keys]
        errors = {}
        for clip in CLIP_GRID:
            method._clips[1, keys] = clip
            errors[clip] = sum(chunk.output_error(method, keys) for chunk in rows().of_layer(1))
        assert errors[chosen] == min(errors.values())
        assert len(set(errors.values())) > 3
        method._clips[1, keys] = chosen


def test_skvq_groups_channels_alike() -> None:
    points = torch.tensor([[-1.0, 1.0], [-9.0, 9.0], [-1.1, 1.0], [-9.1, 8.8], [-1.0, 0.9], [30.0, 40.0]])
    groups = sorted(sorted(members.tolist()) for members in cluster_channels(points, 3))
    assert groups == [[0, 2, 4], [1, 3], [5]]
    assert error(prepared("skvq:bits=2,group=16,clip=1"), True) < error(
        prepared("skvq:bits=2,group=16,clip=1,reorder=false"), True
    )


def test_kvquant_levels_beat_even_ones_and_outliers_help() -> None:
    sample = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).clamp(-4, 4) / 4
    levels = fit_levels(sample, torch.ones_like(sample), 2)
    even = torch.tensor([-0.75, -0.25, 0.25, 0.75])
    errors = [float((nearest_level(sample, x) - sample).square().mean()) for x in (levels, even)]
    assert errors[0] < 0.8 * errors[1]
    # 0.1175 of the variance is the optimum
    assert errors[0] == pytest.approx(0.1175 / 16, rel=0.05)
    for keys in (True, False):
        assert error(prepared("kvquant:bits=2,outliers=0.05"), keys) < error(
            prepared("kvquant:bits=2,outliers=0"), keys
        )


@pytest.mark.parametrize("keys", [True, False])
def test_kvquant_keeps_exactly_the_counted_outliers(keys: bool) -> None:
    method = prepared("kvquant:bits=2,outliers=0.03,pre_rope=false")
    chunk = next(rows().of_layer(0))
    given = chunk.stream(keys)[None]
    read = method.fake_quantize(given, Where(0, keys, 0, chunk.rope))
    exact = (read == given).transpose(1, 2).flatten(2).sum(-1)
    assert int(exact.min()) >= round(0.03 * HEADS * WIDTH)
    assert float(exact.float().mean()) < round(0.03 * HEADS * WIDTH) + 1.5


def test_fp8_saturates_where_transformers_has_nan() -> None:
    method: Any = prepared("fp8")
    chunk = next(rows().of_layer(0))
    given = 3 * chunk.keys[None]
    read = method.fake_quantize(given, Where(0, True, 0))
    limit = 448 * float(method._scales[0, True])
    assert float(read.abs().max()) == pytest.approx(limit)
    inside = given.abs() <= limit
    assert torch.allclose(read[inside], given[inside], rtol=0.07, atol=limit / 2**15)


def test_calibration_rows_are_what_the_model_attends_to() -> None:
    model = rows().model
    outputs: list[torch.Tensor] = []
    attention = model.base_model.layers[1].self_attn
    hook = attention.o_proj.register_forward_pre_hook(lambda module, args: outputs.append(args[0]))
    model(rows().token_ids[0][None], use_cache=False)
    hook.remove()
    chunk = next(rows().of_layer(1))
    found = chunk.attention_output(chunk.keys, chunk.values, 50)
    expected = outputs[0][0, -50:].unflatten(-1, (HEADS, -1, WIDTH)).permute(1, 2, 0, 3)
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))
    assert chunk.output_error(parse_method("full"), True) == 0.0
    assert model.config._attn_implementation == "sdpa"


# ---- this package's codec --------------------------------------------------------------------------------------------


def test_ours_follows_its_options_and_static_data() -> None:
    method: Any = parse_method("ours:key_bits=3,value_bits=2,keys.clip=1.2,values.block=128,keys.block=128")
    assert (method.config.keys.bits, method.config.keys.clip, method.config.values.block) == (3, 1.2, 128)
    assert (method.unit, method.unit_of(1), method.waits) == (128, 128, "exists")
    codec = LayerPlan.from_config(method.config).keys.codec("keys", WIDTH)
    assert method.bits(GEOMETRY, True) == pytest.approx(codec.bits_per_element)
    assert method.identity() != parse_method("ours").identity()
    shift = torch.randn(HEADS, WIDTH) * 4
    static = StreamPlan(parse_method("ours:keys.block=0,values.block=0").config.keys, shift=shift)  # type: ignore[attr-defined]
    method._plan = LayerPlan(static, method._plan.values, 8, 2)
    method._codecs = type(method._codecs)()
    given = shift[None, :, None] + 0.01 * torch.randn(1, HEADS, 7, WIDTH)
    read = method.fake_quantize(given, Where(0, True, 0))
    assert float((read - given).abs().max()) < 0.03


def test_a_plan_in_memory_is_its_file(tmp_path: Path) -> None:
    model, shift = build("llama", head_dim=WIDTH), torch.randn(HEADS, WIDTH)
    stream = StreamPlan(StreamOptions(bits=4), shift=shift)
    plan = QuantizationPlan.for_model(model, SkvqConfig(), dict.fromkeys(range(3), (stream, stream)), method="test")
    plan.save(tmp_path / "a.safetensors")
    file, memory = parse_method(f"plan:{tmp_path}/a.safetensors"), Planned(plan, "tried")
    assert (file.name, memory.name) == ("plan a", "tried")
    assert file.identity() == memory.identity()
    given = torch.randn(1, HEADS, 7, WIDTH)
    assert torch.equal(*(x.fake_quantize(given, Where(0, True, 5)) for x in (file, memory)))
    assert file.bits(GEOMETRY, True) == memory.bits(GEOMETRY, True)
    with pytest.raises(ValueError, match="plan 'tried' was made for another model"):
        memory.check_model(build("qwen3"))
    with pytest.raises(ValueError, match="plan 'tried': nothing for layer 3"):
        memory.layer_plan(3)
    with pytest.raises(ValueError, match="name='': expected one for a plan that is no file"):
        Planned(plan)


# ---- texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("none", "unknown, expected one of full, rtn"),
        ("rtn:bites=2", "unknown option bites=2, expected some of: bits, key_bits"),
        ("rtn:bits", "not an option, expected NAME=VALUE"),
        ("rtn:sink_search=-1", "sink_search=-1: expected an integer of at least 0"),
        ("rtn:sink_search=x", "sink_search='x'"),
        ("rtn:bits=7", "key_bits=7: expected one of 8, 6"),
        ("rtn:key_bits=2,bits=3", "key_bits is given twice"),
        ("rtn:metadata=fp32", "metadata='fp32'"),
        ("kivi:group=0", "group=0"),
        ("skvq:clip=2", "clip=2"),
        ("kvquant:bits=8", "expected one of 4, 3, 2"),
        ("kvquant:outliers=0.6", "outliers=0.6"),
        ("oscar:key_clip=0", "key_clip=0"),
        ("rotation:levels=x", "levels='x'"),
        ("ours:window=5", "the comparison's"),
        ("ours:keys.bit=5", "unknown option"),
        ("plan", "expected plan:FILE"),
    ],
)
def test_bad_specs_say_what_was_expected(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_method(spec)


def test_specs_reach_nested_options_and_lists() -> None:
    method: Any = parse_method(
        "ours:key_bits=2,keys.codebook=[-1.5,-0.4,0.4,1.5],keys.rotation=identity,keys.group_size=none"
    )
    assert method.config.keys.codebook == (-1.5, -0.4, 0.4, 1.5)
    assert method.config.keys.rotation == "identity"
    with pytest.raises(ValueError, match=r"group=48: expected a divisor"):
        parse_method("rtn:group=48").fake_quantize(torch.randn(1, 1, 2, 64), Where(0, True, 0))
    assert math.isclose(
        parse_method("rtn:bits=1.5").bits(GEOMETRY, True), parse_method("rtn:bits=1.6").bits(GEOMETRY, True)
    )

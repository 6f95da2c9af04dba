"""One forward pass of the simulation gives what decoding token by token gives, through both kinds of stepping cache.

Codes are decisions: a row on the edge between two of them may fall either way by float noise, and every later token
sees it. So most hidden states must agree within noise, and none may differ as much as by a window one token longer.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import parts_examples
import skvq
from skvq import SkvqConfig, StreamOptions
from skvq.evaluate.method_cache import MethodCache, MethodLayer
from skvq.evaluate.methods import Geometry, Method, parse_method
from skvq.evaluate.methods.base import Where
from skvq.evaluate.methods.ours import _Codecs, _PackedRows, reference_codec
from skvq.evaluate.region_rule import RegionRule
from skvq.evaluate.rope import Rotary, before_rope
from skvq.evaluate.simulation import AttentionCall, MethodPass, Simulator
from skvq.model_layers import cache_argument
from skvq.plan import LayerPlan, StreamPlan
from skvq.plan_file import QuantizationPlan
from skvq.reference_layer import ReferenceLayer
from skvq.sinks import reordered, text_order
from tiny_models import build, prompts

SINKS, WINDOW = 3, 24
# Of hidden states relative to their largest element. Float32 sums in another order differ by about 1e-6, a code that
# fell the other way by up to 1e-3, a window longer by one token by 1e-2 to 1e-1 in nearly all tokens.
MEDIAN, LARGEST = 1e-4, 1e-2
FAMILIES = ("llama", "qwen3", "gemma2", "gemma3", "gpt-oss", "kv-shared")
UNQUERIED = "ours:keys.block=128,keys.query_exponent=0"  # a MethodCache is given no queries
METHODS = ("full", "rtn:bits=2", "kivi:bits=2,group=16", "rotation:bits=2", UNQUERIED)


@functools.cache
def model(family: str) -> Any:
    return build(family)


def simulated(family: str, method: Method, token_ids: torch.Tensor, window: int = WINDOW) -> torch.Tensor:
    simulator = Simulator(model(family))
    with simulator.attached():
        return simulator.run(token_ids, simulator.method_pass(method, window, SINKS))


def stepped(family: str, cache: Any, token_ids: torch.Tensor, prompt: int = 1) -> torch.Tensor:
    """Last hidden states [T, hidden]: a prompt in one call, then token by token."""
    base = model(family).base_model
    pieces = [token_ids[:prompt], *token_ids[prompt:].split(1)]
    return torch.cat(
        [base(x[None], **cache_argument(base, cache), use_cache=True).last_hidden_state[0] for x in pieces]
    )


def distances(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return (found - expected).abs().amax(-1) / expected.abs().amax()


def assert_agree(found: torch.Tensor, expected: torch.Tensor) -> None:
    distance = distances(found, expected)
    assert float(distance.median()) < MEDIAN
    assert float(distance.max()) < LARGEST


CASES = [("llama", spec) for spec in METHODS] + [
    (family, spec) for family in FAMILIES[1:] for spec in ("kivi:bits=2,group=16", UNQUERIED)
]
CASES += [("llama", spec) for spec in ("kivi:bits=2,group=16,sink_search=64", "rtn:bits=3,sink_search=8")]


@pytest.mark.parametrize(("family", "spec"), CASES)
def test_simulation_is_stepping(family: str, spec: str) -> None:
    if family == "kv-shared" and not getattr(model(family).config, "kv_sharing_modes", None):
        pytest.skip("this transformers does not say which layers read another's keys, and the simulation refuses them")
    length = 150
    token_ids, method = prompts(1, length)[0], parse_method(spec)
    cache = MethodCache(model(family).config, method, WINDOW, SINKS)
    expected = stepped(family, cache, token_ids)
    assert_agree(simulated(family, method, token_ids), expected)
    packed = [layer.packed_tokens for layer in cache.layers if isinstance(layer, MethodLayer)]
    assert packed
    assert set(packed) == {RegionRule(SINKS, WINDOW, method.unit, method.waits).packed(length)} - {0}
    if spec != "full":
        assert float(distances(simulated(family, parse_method("full"), token_ids), expected)[120:].median()) > LARGEST
    if spec == "rtn:bits=2":
        wrong = simulated(family, method, token_ids, WINDOW + 1)
        assert float(distances(wrong, expected)[50:].median()) > 10 * MEDIAN


@pytest.mark.parametrize("window", [0, 1, 150])
def test_other_windows(window: int) -> None:
    token_ids, method = prompts(1, 90, 1)[0], parse_method("rotation:bits=2")
    cache = MethodCache(model("qwen3").config, method, window, SINKS)
    assert_agree(simulated("qwen3", method, token_ids, window), stepped("qwen3", cache, token_ids))


@pytest.mark.parametrize(
    "spec",
    [
        "ours:key_bits=4,value_bits=2,keys.block=0,values.block=0",
        "ours:key_bits=3,value_bits=1.6,keys.block=128",
        "ours:key_bits=2,value_bits=1.5,keys.block=128",
    ],
)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_simulation_is_the_packed_cache(family: str, spec: str) -> None:
    method: Any = parse_method(spec)
    token_ids = prompts(1, 300, 2)[0]
    cache = skvq.QuantizedDynamicCache(model(family).config, method.config, window=WINDOW, sinks=SINKS)
    expected = stepped(family, cache, token_ids)
    assert cache.stats()["decoded"] == {}
    assert_agree(simulated(family, method, token_ids), expected)


def test_simulation_is_the_packed_cache_of_a_plan(tmp_path: Path) -> None:
    """Layers differ: blocks, static data with a permutation of every head, values kept as they are."""
    llama, generator = model("llama"), torch.Generator().manual_seed(1)
    order = tuple(tuple(torch.randperm(16, generator=generator).tolist()) for _ in range(2))
    shift, scale = torch.randn(2, 16, generator=generator), torch.rand(2, 16, generator=generator) + 0.5
    static = StreamPlan(StreamOptions(bits=4), shift=shift, scale=scale, permutation=order)
    block = StreamPlan(StreamOptions(bits=3, block=128))
    streams = {0: (block, block), 1: (static, block), 2: (static, StreamPlan(StreamOptions(bits=16)))}
    path = tmp_path / "mixed.safetensors"
    config = SkvqConfig(window=WINDOW, sinks=SINKS)
    QuantizationPlan.for_model(llama, config, streams, method="test").save(path)
    method, token_ids = parse_method(f"plan:{path}"), prompts(1, 200, 4)[0]
    assert [method.unit_of(layer) for layer in range(3)] == [128, 128, 1]
    cache = skvq.QuantizedDynamicCache.from_plan(llama, path)
    found = simulated("llama", method, token_ids)
    assert_agree(found, stepped("llama", cache, token_ids))
    assert_agree(found, stepped("llama", MethodCache(llama.config, method, WINDOW, SINKS), token_ids))
    geometry = Geometry(layer=1, num_key_value_heads=2, head_dim=16)
    counted = QuantizationPlan.load(path).bits[1]["keys"].bits
    assert method.bits(geometry, True) == pytest.approx(counted)
    method.check_model(llama)
    with pytest.raises(ValueError, match="made for another model"):
        method.check_model(model("qwen3"))


class Parts(_PackedRows):
    """Rows of parts in every layer, with another matrix in each; no plan file, so none of the native codec."""

    def __init__(self, head_dim: int = 16, *, noise: bool) -> None:
        self.name, self._codecs = "parts", _Codecs()
        values = parts_examples.stream_plan(head_dim, 1, seed=7, turning=False, noise=False)
        self._plans = [
            LayerPlan(parts_examples.stream_plan(head_dim, 0, seed=seed, noise=noise), values, WINDOW, SINKS)
            for seed in range(3)
        ]

    def layer_plan(self, layer: int) -> LayerPlan:
        return self._plans[layer]


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("noise", [True, False])
def test_parts_are_simulated_as_the_twin_steps(noise: bool, softcap: float | None) -> None:
    """Positions of a mean that turns and noise off scores, grouped heads: against the slow store, token by token."""
    length, head_dim, generator = 90, 64, torch.Generator().manual_seed(5)
    method = Parts(head_dim, noise=noise)
    query, keys, values = (torch.randn(heads, length, head_dim, generator=generator) for heads in (4, 2, 2))
    call = AttentionCall(1, (0.3 * query).unflatten(0, (2, 2)), keys, values, None, softcap, None)
    found = MethodPass(method, WINDOW, SINKS, {1: 1}).attend(call).flatten(0, 1)
    plan = method.layer_plan(1)
    layer = ReferenceLayer(
        num_key_value_heads=2,
        keys=reference_codec(plan.keys, head_dim),
        values=reference_codec(plan.values, head_dim),
        sinks=SINKS,
        window=WINDOW,
        dtype="float32",
    )
    expected = torch.empty(1, 4, length, head_dim)
    for now in range(length):
        one = slice(now, now + 1)
        layer.append(keys[None, :, one], values[None, :, one])
        layer.attend(query[None, :, one], expected[:, :, one], scale=0.3, softcap=softcap)
    assert torch.allclose(found, expected[0], atol=2e-5)
    if noise:
        without = MethodPass(Parts(head_dim, noise=False), WINDOW, SINKS, {1: 1}).attend(call).flatten(0, 1)
        assert float((without - found)[:, WINDOW + SINKS + 20 :].abs().amax(-1).median()) > 1e-2


def test_parts_are_simulated_as_the_stepping_cache_steps() -> None:
    config, token_ids = model("llama").config, prompts(1, 100, 6)[0]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="parts: MethodCache")
        expected = stepped("llama", MethodCache(config, Parts(noise=False), WINDOW, SINKS), token_ids)
    found = simulated("llama", Parts(noise=False), token_ids)
    assert_agree(found, expected)
    exact = simulated("llama", parse_method("full"), token_ids)
    assert float(distances(exact, expected)[60:].median()) > LARGEST
    # noise is the one thing that it cannot do, and it says so
    with pytest.warns(UserWarning, match="parts: MethodCache does not take the noise"):
        silent = stepped("llama", MethodCache(config, Parts(noise=True), WINDOW, SINKS), token_ids)
    assert_agree(silent, expected)
    assert float(distances(simulated("llama", Parts(noise=True), token_ids), expected)[60:].median()) > LARGEST


def test_simulation_is_the_packed_cache_of_a_plan_of_parts(tmp_path: Path) -> None:
    llama, method = model("llama"), Parts(noise=True)
    static = StreamPlan(StreamOptions(bits=4), shift=torch.randn(2, 16, generator=torch.Generator().manual_seed(1)))
    streams = {index: (plan.keys, plan.values) for index, plan in enumerate(method._plans)}
    streams[2] = (streams[2][0], static)
    path = tmp_path / "parts.safetensors"
    QuantizationPlan.for_model(llama, SkvqConfig(window=WINDOW, sinks=SINKS), streams, method="test").save(path)
    planned, token_ids = parse_method(f"plan:{path}"), prompts(1, 300, 4)[0]
    cache = skvq.QuantizedDynamicCache.from_plan(llama, path)
    found = simulated("llama", planned, token_ids)
    assert_agree(found, stepped("llama", cache, token_ids))
    assert cache.stats()["decoded"] == {}
    geometry = Geometry(layer=1, num_key_value_heads=2, head_dim=16)
    assert (planned.bits(geometry, True), planned.bits(geometry, False)) == (3.5, 1.5)
    assert float(distances(simulated("llama", method, token_ids), found).median()) > MEDIAN


@pytest.mark.parametrize("prompt", [2, 60])
def test_a_prompt_attends_to_itself_exactly_and_packs_the_same(prompt: int) -> None:
    method: Any = parse_method(UNQUERIED)
    config, token_ids = model("qwen3").config, prompts(1, 200, 3)[0]
    caches = [
        MethodCache(config, method, WINDOW, SINKS),
        skvq.QuantizedDynamicCache(config, method.config, window=WINDOW, sinks=SINKS),
    ]
    first, second = (stepped("qwen3", cache, token_ids, prompt) for cache in caches)
    assert_agree(first, second)
    exact = model("qwen3").base_model(token_ids[None, :prompt], use_cache=False).last_hidden_state[0]
    assert torch.allclose(first[:prompt], exact, atol=1e-4)


def test_a_method_before_rope_gets_the_models_rotation() -> None:
    """Keys before RoPE do not depend on the position: `back` finds them, and simulation and stepping agree on them."""
    llama = model("llama")
    rope = Rotary(llama)(0)
    rows = torch.randn(1, 2, 5, 16, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(rope.back(rope.forward(rows, 31), 31), rows, atol=1e-5)
    assert not torch.allclose(rope.forward(rows, 31), rope.forward(rows, 30), atol=1e-2)
    hidden = llama.base_model.embed_tokens(prompts(1, 5))
    layer = llama.base_model.layers[0]
    before = layer.self_attn.k_proj(layer.input_layernorm(hidden)).unflatten(-1, (2, 16)).transpose(1, 2)
    cache: Any = MethodCache(llama.config, parse_method("full"))
    llama(prompts(1, 5), **cache_argument(llama, cache))
    assert torch.allclose(rope.back(cache.layers[0].keys, 0), before, atol=1e-4)
    token_ids = prompts(1, 120)[0]
    for search in (0, 64):
        method = parse_method(f"skvq:bits=4,pre_rope=true,reorder=false,clip=1,sink_search={search}")
        cache = MethodCache(llama.config, method, WINDOW, SINKS, Rotary(llama))
        assert_agree(simulated("llama", method, token_ids), stepped("llama", cache, token_ids))
        assert all((layer.order is None) == (search == 0) for layer in cache.layers)
    with pytest.raises(ValueError, match="expected Rotary"):
        MethodCache(llama.config, method)


class RoundedBeforeRope(Method):
    """Keys before RoPE are rounded to tenths; what was given of layer 0 is kept, row by row of the store."""

    name, before_rope, sink_search = "rounded before RoPE", True, 64

    def __init__(self) -> None:
        self.given: list[torch.Tensor] = []

    def bits(self, geometry: Geometry, keys: bool) -> float:
        return 16.0

    def fake_quantize(self, rows: torch.Tensor, where: Where) -> torch.Tensor:
        def quantize(plain: torch.Tensor) -> torch.Tensor:
            if where.layer == 0:
                self.given.append(plain)
            return plain.round(decimals=1)

        return before_rope(rows, where.rope, where.start, quantize) if where.keys else rows


def test_keys_before_rope_are_known_by_their_positions_where_sinks_are_chosen() -> None:
    """Against the projection's own output: each row is turned back, and forth, by the position of its token."""
    llama, token_ids = model("llama"), prompts(2, 120, 8)
    layer, base = llama.base_model.layers[0], llama.base_model
    hidden = layer.input_layernorm(base.embed_tokens(token_ids))
    before, values = (
        project(hidden).unflatten(-1, (2, 16)).transpose(1, 2)
        for project in (layer.self_attn.k_proj, layer.self_attn.v_proj)
    )
    tables = base.rotary_emb(hidden, torch.arange(120)[None])
    exact, rounded = (apply_rotary_pos_emb(x, x, *tables)[1] for x in (before, before.round(decimals=1)))
    order = text_order(exact, values, SINKS, 64, WINDOW)
    assert order is not None
    assert not torch.equal(order[0], order[1])
    packed = slice(SINKS, 120 - WINDOW)
    stored = reordered(before, order)
    # a prompt, and every later row as it leaves the window
    method = RoundedBeforeRope()
    cache = MethodCache(llama.config, method, WINDOW, SINKS, Rotary(llama))
    for piece in (token_ids[:, :60], *token_ids[:, 60:].split(1, dim=1)):
        llama(piece, **cache_argument(llama, cache))
    torch.testing.assert_close(torch.cat(method.given, dim=2)[:, :, : 120 - WINDOW - SINKS], stored[:, :, packed])
    found: Any = cache.layers[0]
    expected = reordered(exact, order)
    expected[:, :, packed] = reordered(rounded, order)[:, :, packed]
    torch.testing.assert_close(found.keys, expected, atol=1e-4, rtol=1e-4)
    # the simulation
    method = RoundedBeforeRope()
    simulated("llama", method, token_ids[1])
    [given] = method.given
    torch.testing.assert_close(given[0], stored[1, :, SINKS:], atol=1e-4, rtol=1e-4)


def test_the_rule_is_the_native_stores() -> None:
    config = model("llama").config
    for block, (sinks, window) in itertools.product((0, 128, 256), ((0, 1), (5, 40), (3, 200))):
        cache: Any = skvq.QuantizedDynamicCache(config, keys={"block": block}, window=window, sinks=sinks)
        rule = RegionRule(sinks, window, max(1, block), "exists")
        for length in range(1, 600, 7):
            count = length - cache.get_seq_length()
            cache.update(torch.randn(1, 2, count, 16), torch.randn(1, 2, count, 16), 0)
            assert cache.layers[0].native.packed_tokens == rule.packed(length), (block, sinks, window, length)


@pytest.mark.parametrize("waits", ["left", "exists"])
def test_the_rule_of_a_query_by_its_definition(waits: Any) -> None:
    sinks, window, unit = 2, 5, 4
    rule = RegionRule(sinks, window, unit, waits)
    lengths = torch.arange(1, 60)
    for length, packed in zip(lengths.tolist(), rule.packed(lengths).tolist(), strict=True):
        expected = 0
        for row in range(max(0, length - sinks)):
            last = row // unit * unit + unit - 1  # of its unit
            left = length - sinks - window
            expected += row < left and (last < left if waits == "left" else last < length - sinks)
        assert packed == expected == rule.packed(length)


def test_beams_and_crops_of_the_stepping_cache() -> None:
    llama, method = model("llama"), parse_method("rotation:bits=2")
    token_ids = prompts(2, 60)
    make = functools.partial(MethodCache, llama.config, method, 8, 2)
    kwargs: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": 0}
    beams = llama.generate(token_ids, **cache_argument(llama, make()), num_beams=3, **kwargs)
    alone = llama.generate(token_ids[1:], **cache_argument(llama, make()), num_beams=3, **kwargs)
    assert torch.equal(beams[1:], alone)
    cache: Any = make()
    stepped("llama", cache, token_ids[0])
    before = cache.layers[0].keys
    cache.crop(-6)
    # six rows came back into the window and stay packed
    assert (cache.get_seq_length(), cache.layers[0].packed_tokens) == (54, 50)
    assert torch.equal(cache.layers[0].keys, before[:, :, :54])
    llama(token_ids[:1, 54:], **cache_argument(llama, cache))
    assert cache.layers[0].packed_tokens == 50
    assert torch.allclose(cache.layers[0].keys, before, atol=1e-5)
    kivi: Any = MethodCache(llama.config, parse_method("kivi:group=32"), 8, 2)
    llama(token_ids, **cache_argument(llama, kivi))
    with pytest.raises(ValueError, match="cuts a unit of 32"):
        kivi.crop(-40)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((-1, 2), "sinks=-1"), ((1, -2), "window=-2"), ((1, 2, 0), "unit=0"), ((1, 2, 3, "x"), "waits='x'")],
)
def test_bad_rules_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RegionRule(*arguments)


def test_a_method_that_needs_queries_gets_them_in_the_simulation_only() -> None:
    llama, method = model("llama"), parse_method("ours:keys.block=128")
    with pytest.raises(ValueError, match="needs queries"):
        MethodCache(llama.config, method, WINDOW, SINKS)
    with pytest.raises(ValueError, match="expected the queries"):
        method.fake_quantize(torch.randn(1, 2, 128, 16), Where(0, True, 0))
    token_ids = prompts(1, 200)[0]
    unweighed = simulated("llama", parse_method(UNQUERIED), token_ids)
    assert float(distances(simulated("llama", method, token_ids), unweighed)[160:].median()) > LARGEST


def test_what_cannot_be_simulated_is_refused() -> None:
    simulator = Simulator(model("llama"))
    attention = simulator.method_pass(None, WINDOW, SINKS)
    with pytest.raises(ValueError, match="attached"):
        simulator.run(prompts(1, 9)[0], attention)
    with pytest.raises(ValueError, match="no layer with full attention"):
        Simulator(build("mistral-window"))

    class Wrong(type(parse_method("full"))):  # type: ignore[misc]
        def fake_quantize(self, rows: torch.Tensor, where: Any) -> torch.Tensor:
            return rows[:, :, 1:]

    with pytest.raises(ValueError, match="fake_quantize returned"):
        simulated("llama", Wrong(), prompts(1, 60)[0])
    assert model("llama").config._attn_implementation == "sdpa"

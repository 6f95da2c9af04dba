"""The "skvq" attention implementation: softcap, sink logits, several tokens over a past, layers that are not packed."""

import dataclasses
import inspect
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache
from transformers.masking_utils import sdpa_mask
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gpt_oss import modeling_gpt_oss

import skvq
from parts_examples import stream_plan
from skvq.attention import packed_mask, plain_attention, skvq_attention_forward
from skvq.layer import PackedLayer
from skvq.packed import AttentionCounts
from skvq.plan import LayerPlan
from tiny_models import build, prompts

B, HEADS, GROUPS, D = 2, 2, 2, 32
PAST = 300


def module(**attributes: Any) -> Any:
    """What attention functions read of a model's attention module."""
    defaults = {"num_key_value_groups": GROUPS, "is_causal": True, "head_dim": D, "training": False}
    return SimpleNamespace(**(defaults | attributes))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer() -> PackedLayer:
    config = skvq.SkvqConfig(window=20, sinks=3, keys=skvq.StreamOptions(block=128))
    made = PackedLayer(LayerPlan.from_config(config), 0, AttentionCounts())
    made.update(random(B, HEADS, PAST, D, seed=1), random(B, HEADS, PAST, D, seed=2))
    return made


def test_importing_skvq_changes_nothing() -> None:
    code = (
        "import sys, skvq; assert 'transformers' not in sys.modules; "
        "from transformers import AttentionInterface; import skvq.attention, skvq.cache; "
        "assert 'skvq' not in AttentionInterface(); skvq.register_attention(); assert 'skvq' in AttentionInterface(); "
        "assert {'QuantizedDynamicCache', 'weights'} <= set(dir(skvq)); skvq.__version__; "
        "assert callable(skvq.weights.load) and callable(skvq.calibrate.calibrate) and callable(skvq.evaluate.compare)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_registering_twice_is_registering_once() -> None:
    skvq.register_attention()
    before = dict(AttentionInterface()), dict(AttentionMaskInterface())
    skvq.register_attention()
    assert (dict(AttentionInterface()), dict(AttentionMaskInterface())) == before


SOFTCAPS = [None, 3.0]
SINKS = [None, random(HEADS * GROUPS, seed=5)]


@pytest.mark.parametrize("softcap", SOFTCAPS)
@pytest.mark.parametrize("sinks", SINKS, ids=["no sinks", "sinks"])
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.filterwarnings("ignore:the batch is padded on the left")
def test_handles_are_attended_as_their_decoded_rows(
    softcap: float | None, sinks: torch.Tensor | None, tokens: int, masked: bool
) -> None:
    made = layer()
    key, value = made.update(random(B, HEADS, tokens, D, seed=3), random(B, HEADS, tokens, D, seed=4))
    query = random(B, HEADS * GROUPS, tokens, D, seed=6)
    visible = torch.ones(tokens, PAST + tokens, dtype=torch.bool).tril(PAST).expand(B, 1, -1, -1).clone()
    if masked:
        visible[1, :, :, :37] = False
    mask = visible if masked else None
    got, weights = skvq_attention_forward(
        module(), query, key, value, mask, scaling=0.25, softcap=softcap, s_aux=sinks, sliding_window=None
    )
    assert weights is None
    counted = made.counts.as_dict()
    assert list(counted.pop("score_noise")) == [made.index]
    assert counted == {"packed": 1, "prefill": 1, "decoded": {}, "fitted": {}, "not_fitted": {}}
    keys, values = (x.decode().repeat_interleave(GROUPS, dim=1) for x in (key, value))  # type: ignore[attr-defined]
    wanted = plain_attention(query, keys, values, visible, 0.0, False, 0.25, softcap, sinks)
    assert got.shape == (B, tokens, HEADS * GROUPS, D)
    assert torch.allclose(got, wanted.transpose(1, 2), atol=1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_a_column_too_many_of_a_mask_is_left_out(packed: bool) -> None:
    """As in eager attention of transformers 5.0, whose StableLM and Persimmon make such masks where none is given."""
    made, new = layer(), (random(B, HEADS, 1, D, seed=3), random(B, HEADS, 1, D, seed=4))
    key, value = made.update(*new) if packed else new
    query, tokens = random(B, HEADS * GROUPS, 1, D, seed=6), key.shape[2]
    wide = torch.zeros(1, 1, 1, tokens + 1)
    wide[..., 5 if packed else 0] = -1.0
    wanted, got = (skvq_attention_forward(module(), query, key, value, x)[0] for x in (wide[..., :-1], wide))
    assert torch.equal(got, wanted)
    assert made.counts.as_dict()["decoded"] == {}


def additive(visible: torch.Tensor) -> torch.Tensor:
    return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("tokens", [1, 6])
def test_softcap_is_gemmas(tokens: int) -> None:
    query, key, value = (random(B, h, n, D, seed=s) for h, n, s in ((4, tokens, 1), (2, 6, 2), (2, 6, 3)))
    visible = torch.ones(1, 1, tokens, 6, dtype=torch.bool).tril(6 - tokens)
    wanted, _ = modeling_gemma2.eager_attention_forward(
        module(), query, key, value, additive(visible), scaling=0.3, softcap=2.0
    )
    for mask in (visible, None):
        got, _ = skvq_attention_forward(module(), query, key, value, mask, scaling=0.3, softcap=2.0)
        assert torch.allclose(got, wanted, atol=1e-6)


@pytest.mark.parametrize("tokens", [1, 6])
def test_sink_logits_are_those_of_gpt_oss(tokens: int) -> None:
    query, key, value = (random(B, h, n, D, seed=s) for h, n, s in ((4, tokens, 1), (2, 6, 2), (2, 6, 3)))
    visible = torch.ones(1, 1, tokens, 6, dtype=torch.bool).tril(6 - tokens)
    sinks = random(4, seed=7)
    wanted, _ = modeling_gpt_oss.eager_attention_forward(
        module(sinks=sinks), query, key, value, additive(visible), scaling=0.3
    )
    got, _ = skvq_attention_forward(module(), query, key, value, visible, scaling=0.3, s_aux=sinks)
    assert torch.allclose(got, wanted, atol=1e-6)


def test_plain_layers_take_the_stock_way() -> None:
    query, key, value = (random(B, h, 9, D, seed=s) for h, s in ((4, 1), (2, 2), (2, 3)))
    got, _ = skvq_attention_forward(module(), query, key, value, None, scaling=0.3)
    keys, values = key.repeat_interleave(2, dim=1), value.repeat_interleave(2, dim=1)
    wanted = torch.nn.functional.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=0.3)
    assert torch.allclose(got, wanted.transpose(1, 2), atol=1e-6)
    # without a mask, fewer queries than keys are the last tokens, not the first
    last, _ = skvq_attention_forward(module(), query[:, :, 6:], key, value, None, scaling=0.3)
    assert torch.allclose(last, got[:, 6:], atol=1e-6)
    # and a module that is not causal sees everything
    got, _ = skvq_attention_forward(module(is_causal=False), query, key, value, None, scaling=0.3)
    wanted = torch.nn.functional.scaled_dot_product_attention(query, keys, values, scale=0.3)
    assert torch.allclose(got, wanted.transpose(1, 2), atol=1e-6)


def cache_name(model: Any) -> str:
    """What transformers calls a cache: older versions know no other name."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def asked_mask(queries: int, tokens: int, **more: Any) -> torch.Tensor | None:
    """What transformers asks for, for the queries of the last of `tokens`."""
    asked: dict[str, Any] = {"q_length": queries, "q_offset": tokens - queries, "device": "cpu"}
    if "cache_position" in inspect.signature(sdpa_mask).parameters:  # transformers 5.0
        asked = {"cache_position": torch.arange(tokens - queries, tokens)}
    return packed_mask(batch_size=1, kv_length=tokens, kv_offset=0, **asked, **more)


def test_queries_of_the_last_tokens_need_no_mask() -> None:
    assert asked_mask(4, 9) is None
    assert asked_mask(4, 9, attention_mask=torch.ones(1, 9, dtype=torch.bool)) is None


def test_other_queries_have_the_mask_of_sdpa() -> None:
    visible = torch.ones(4, 9, dtype=torch.bool).tril(5)
    padding = torch.arange(9) >= 2
    found = asked_mask(4, 9, attention_mask=padding[None])
    assert found is not None
    assert torch.equal(found[0, 0], visible & padding)
    for more in ({"allow_is_causal_skip": False}, {"local_size": 3}, {"mask_function": lambda b, h, q, k: k <= q}):
        found = asked_mask(4, 9, **more)  # type: ignore[arg-type]
        assert found is not None
        assert torch.equal(found[0, 0], visible)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("packs", [False, True])
def test_chunks_give_the_logits_of_the_whole(family: str, packs: bool) -> None:
    model, tokens = build(family, "skvq"), prompts(1, 60)
    lossless = skvq.SkvqConfig(keys=skvq.StreamOptions(bits=16), values=skvq.StreamOptions(bits=16), window=8)
    cache = skvq.QuantizedDynamicCache(model.config, lossless) if packs else DynamicCache(config=model.config)
    with torch.no_grad():
        whole = model(tokens).logits
        parts = [model(part, **{cache_name(model): cache}).logits for part in tokens.split([21, 30, 9], dim=1)]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-4)


def test_a_cache_with_room_for_more_gives_the_logits_of_none() -> None:
    model, tokens = build("llama", "skvq"), prompts(1, 10)
    cache = StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        whole, name = model(tokens).logits, cache_name(model)
        parts = [model(part, **{name: cache}).logits for part in tokens.split([6, 3, 1], dim=1)]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-4)


def test_a_chunk_that_waits_knows_the_padding() -> None:
    model, tokens = build("llama", "skvq"), prompts(2, 20)
    visible = torch.ones(2, 20, dtype=torch.long)
    visible[1, :5] = 0
    found = []
    for later in ({"attention_mask": visible}, {}):
        cache = skvq.QuantizedDynamicCache(model, attention_mask=visible)
        with torch.no_grad():
            model(tokens[:, :12], attention_mask=visible[:, :12], **{cache_name(model): cache})
            found.append(model(tokens[:, 12:], **{cache_name(model): cache}, **later).logits)
    assert torch.allclose(*found, atol=1e-5)


@pytest.mark.parametrize("softcap", SOFTCAPS)
def test_what_packed_bytes_cannot_serve_is_decoded(softcap: float | None) -> None:
    made = layer()
    key, value = made.update(random(B, HEADS, 4, D, seed=3), random(B, HEADS, 4, D, seed=4))
    query = random(B, HEADS * GROUPS, 4, D, seed=6)
    packed, _ = skvq_attention_forward(module(), query, key, value, None, softcap=softcap)
    with torch.enable_grad():
        wanted_grad = query.clone().requires_grad_()
        decoded, _ = skvq_attention_forward(module(), wanted_grad, key, value, None, softcap=softcap)
        decoded.sum().backward()
    assert torch.allclose(packed, decoded, atol=1e-5)
    assert wanted_grad.grad is not None
    assert made.counts.packed == 1
    assert made.counts.decoded.total() == 2
    bias = random(1, HEADS * GROUPS, 4, PAST + 4, seed=8)
    biased, _ = skvq_attention_forward(module(), query, key, value, bias, softcap=softcap)
    assert not torch.allclose(biased, packed, atol=1e-3)
    assert made.counts.packed == 2


def test_softcap_with_a_position_bias() -> None:
    query, key, value = (random(B, h, 5, D, seed=s) for h, s in ((4, 1), (2, 2), (2, 3)))
    visible = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    bias = random(1, 4, 5, 5, seed=9)
    wanted, _ = modeling_gemma2.eager_attention_forward(
        module(), query, key, value, additive(visible) + bias, scaling=0.3, softcap=2.0
    )
    for mask in (visible, additive(visible)):
        got, _ = skvq_attention_forward(module(), query, key, value, mask, scaling=0.3, softcap=2.0, position_bias=bias)
        assert torch.allclose(got, wanted, atol=1e-5)


def test_dropout_leaves_weights_out() -> None:
    query, key, value = (random(B, 2, 5, D, seed=s) for s in (1, 2, 3))
    kept = plain_attention(query, key, value, None, 0.0, True, None, None, None)
    torch.manual_seed(0)
    dropped = plain_attention(query, key, value, None, 0.5, True, None, None, None)
    assert not torch.allclose(kept, dropped)


def layer_plan(name: str) -> LayerPlan:
    """The default format with values of so many bits, or rows of parts: "parts HEAD_DIM"."""
    if not name.startswith("parts"):
        return LayerPlan.from_config(skvq.SkvqConfig(key_bits=max(2.0, float(name)), value_bits=float(name)))
    head_dim = int(name.removeprefix("parts"))
    values = stream_plan(head_dim, 1, seed=7, turning=False, noise=False)
    return LayerPlan(stream_plan(head_dim, 0), values, 128, 5)


@pytest.mark.parametrize("name", ["1.5", "1.6", "2", "3", "4", "8", "parts 64", "parts 112", "parts 128", "parts 256"])
@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_queries_of_sixteen_bits_cost_the_rounding_of_the_result(dtype: torch.dtype, tokens: int, name: str) -> None:
    """However this processor multiplies them: as queries in float32, to one and a half roundings.

    Of many queries the worst output is looked at, and may be two and a half off.
    """
    plan = layer_plan(name)
    head_dim = int(name.removeprefix("parts")) if name.startswith("parts") else 64
    store = plan.build(2, head_dim, head_dim, dtype)
    store.append(*(random(1, 2, 2000, head_dim, seed=seed).to(dtype) for seed in (1, 2)))
    query = 2 * random(1, 8, tokens, head_dim, seed=3).to(dtype)
    short, exact = torch.empty_like(query), torch.empty_like(query, dtype=torch.float32)
    store.attend(query, short, scale=head_dim**-0.5)
    store.attend(query.float(), exact, scale=head_dim**-0.5)
    rounding = (exact.to(dtype).float() - exact).abs().max()
    assert (short.float() - exact).abs().max() <= (1.5 if tokens == 1 else 2.5) * rounding


@pytest.mark.parametrize("name", ["1.6", "4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hidden_row_that_is_no_number_breaks_nothing(dtype: torch.dtype, name: str) -> None:
    """Neither among few queries nor among many; one that is seen breaks every output."""
    plan = dataclasses.replace(layer_plan(name), nonfinite="propagate")
    store = plan.build(2, 64, 64, dtype)
    keys, values = (random(1, 2, 2000, 64, seed=seed).to(dtype) for seed in (1, 2))
    keys[:, :, 300, 3] = torch.nan
    values[:, :, 700, 5] = torch.inf
    store.append(keys, values)
    query = random(1, 8, 20, 64, seed=3).to(dtype)
    mask = torch.ones(1, 1, 1, 2000, dtype=torch.bool)
    mask[..., [300, 700]] = False
    many, few, broken = (torch.empty_like(query) for _ in range(3))
    store.attend(query, many, scale=0.1, mask=mask)
    for i in range(20):
        one = torch.empty_like(query[:, :, :1])
        store.attend(query[:, :, i : i + 1].contiguous(), one, scale=0.1, mask=mask)
        few[:, :, i : i + 1] = one
    assert many.isfinite().all()
    assert torch.allclose(many, few, atol=1e-4 if dtype == torch.float32 else 4e-3)
    store.attend(query, broken, scale=0.1)
    assert broken.isnan().all()

"""Handles: what runs on the packed bytes, what stays a handle, what decodes, and what is refused."""

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from skvq import SkvqConfig, SkvqError
from skvq.evaluate.methods.ours import reference_codec
from skvq.layer import PackedLayer
from skvq.packed import AttentionCounts, PackedStates
from skvq.plan import LayerPlan

B, HEADS, D = 2, 2, 32
PAST = 300
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def states(tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(B, HEADS, tokens, D, generator=generator).to(dtype) for _ in range(2))
    return keys, values


def query(heads: int, length: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(99)
    return torch.randn(B, heads, length, D, generator=generator).to(dtype)


def layer(dtype: torch.dtype = torch.float32, **options: Any) -> PackedLayer:
    """A layer with `PAST` tokens, most of them packed."""
    config = SkvqConfig.from_options(**({"window": 20, "sinks": 3, "keys": {"block": 128}} | options))
    made = PackedLayer(LayerPlan.from_config(config), 7, AttentionCounts())
    made.update(*states(PAST, dtype=dtype))
    return made


def step(made: PackedLayer, tokens: int = 1) -> tuple[PackedStates, PackedStates]:
    dtype = made.dtype if made.is_initialized else torch.float32
    key, value = made.update(*states(tokens, seed=1, dtype=dtype))
    assert isinstance(key, PackedStates)
    assert isinstance(value, PackedStates)
    return key, value


def counts(made: PackedLayer) -> tuple[int, int]:
    """Attention calls on packed bytes and decoded tensors."""
    return made.counts.packed, made.counts.decoded.total()


# ---- on the packed bytes


def test_a_prompt_is_attended_as_given() -> None:
    made = PackedLayer(LayerPlan.from_config(SkvqConfig(keys={"query_exponent": 0.0})), 0, AttentionCounts())
    keys, values = states(50)
    returned = made.update(keys, values)
    assert returned[0] is keys
    assert returned[1] is values
    assert made.counts.prefill == 1


def prompt_layer(count: int = 300) -> tuple[PackedLayer, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A layer that has been given a prompt, its keys and values, and the prompt's query."""
    made = PackedLayer(LayerPlan.from_config(SkvqConfig(window=16)), 0, AttentionCounts())
    keys, values = states(count)
    query = torch.randn(B, 2 * HEADS, count, D) * torch.linspace(0.1, 2.0, D)
    return made, keys, values, query


@pytest.mark.parametrize("repeated", [False, True])
def test_a_prompt_waits_for_its_queries(repeated: bool) -> None:
    made, keys, values, query = prompt_layer()
    key, value = made.update(keys, values)
    assert (made.get_seq_length(), made.counts.prefill) == (300, 1)
    wanted = sdpa(query, keys, values, is_causal=True, enable_gqa=True)
    if repeated:
        key, value = (
            x[:, :, None, :, :].expand(B, HEADS, 2, 300, D).reshape(B, 2 * HEADS, 300, D) for x in (key, value)
        )
    found = sdpa(query, key, value, is_causal=True, enable_gqa=not repeated)
    # Heads that are repeated before are another call of torch's kernel, and older ones add in another order there.
    assert torch.allclose(found, wanted, atol=1e-6) if repeated else torch.equal(found, wanted)
    assert made.waiting is None
    assert not made.wants_queries
    assert made.native.packed_tokens == 256
    squares = query.double().unflatten(1, (HEADS, 2)).square().sum((2, 3))
    for head in range(HEADS):
        expected = reference_codec(made.plan.keys, D).query_factors(squares[1, head])
        assert torch.equal(torch.from_dlpack(made.native.query_factors(1, head)), expected)
    assert counts(made) == (0, 0)
    # the handles go on giving the prompt, as plain tensors would
    made.update(*states(1))
    assert torch.equal(key.clone()[:, :HEADS] if not repeated else key.clone()[:, ::2], keys)


def test_a_prompt_whose_queries_nobody_shows_is_stored_without_them() -> None:
    made, keys, values, query = prompt_layer()
    key, _ = made.update(keys, values)
    assert torch.equal(torch.matmul(query[:, ::2], key.transpose(2, 3)), query[:, ::2] @ keys.transpose(2, 3))
    assert made.native.length == 0
    assert made.settle().packed_tokens == 256
    assert made.native.query_factors(0, 0) is None
    assert counts(made) == (0, 0)
    twin, *_ = prompt_layer()
    twin.update(keys, values)
    twin.update(*states(1))  # without any attention in between
    made.update(*states(1))
    assert torch.equal(twin.keys, made.keys)


def test_queries_of_steps_count_until_the_first_block() -> None:
    made, keys, values, query = prompt_layer(261)
    for token in range(261):
        handles = made.update(keys[:, :, token : token + 1], values[:, :, token : token + 1])
        assert made.native.wants_queries == (token < 260)
        sdpa(query[:, :, token : token + 1], *handles, enable_gqa=True)
    squares = query[:, :, :260].double().unflatten(1, (HEADS, 2)).square().sum((2, 3))
    expected = reference_codec(made.plan.keys, D).query_factors(squares[0, 1])
    assert torch.equal(torch.from_dlpack(made.native.query_factors(0, 1)), expected)


def test_a_waiting_prompt_is_part_of_the_layer() -> None:
    made, keys, values, query = prompt_layer()
    made.update(keys, values)
    twin = copy.deepcopy(made)
    assert twin.waiting is not None
    assert (twin.get_seq_length(), twin.settle().packed_tokens) == (300, 256)
    assert made.waiting is not None
    made.crop(-300)
    assert made.get_seq_length() == 0
    key, value = made.update(keys[:1], values[:1])
    made.reset()
    assert torch.equal(key.clone(), keys[:1])
    with pytest.raises(SkvqError, match="layer 0: keys"):
        made.update(torch.full_like(keys, torch.nan), values)
    assert (made.get_seq_length(), made.waiting) == (0, None)
    # a query that does not belong to the prompt has no say
    key, value = made.update(keys, values)
    sdpa(query[:, :, :, :].double(), key.double(), value.double(), enable_gqa=True)
    assert made.settle().query_factors(0, 0) is None


def test_handles_look_like_tensors() -> None:
    key, value = step(layer(torch.bfloat16))
    for handle in (key, value):
        assert handle.shape == torch.Size((B, HEADS, PAST + 1, D))
        assert handle.size(2) == PAST + 1
        assert (handle.dtype, handle.device, handle.ndim, handle.dim()) == (torch.bfloat16, torch.device("cpu"), 4, 4)
        assert len(handle) == B
        assert handle.numel() == B * HEADS * (PAST + 1) * D
        assert not handle.requires_grad
        assert handle.is_contiguous()
    assert "keys of layer 7" in repr(key)
    assert "values of layer 7" in str(value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [16, 4, 2, 1.6, 1.5])
@pytest.mark.parametrize("tokens", [1, 5])
def test_attention_on_packed_bytes_is_that_on_decoded_rows(dtype: torch.dtype, bits: float, tokens: int) -> None:
    made = layer(dtype, key_bits=bits, value_bits=bits)
    key, value = step(made, tokens)
    q = query(2 * HEADS, tokens, dtype)
    mask = torch.ones(tokens, PAST + tokens, dtype=torch.bool).tril(PAST)
    got = sdpa(q, key, value, attn_mask=mask, enable_gqa=True)
    assert type(got) is torch.Tensor
    assert got.dtype == dtype
    assert counts(made) == (1, 0)
    wanted = sdpa(q.float(), key.decode().float(), value.decode().float(), attn_mask=mask, enable_gqa=True)
    assert (got.float() - wanted).abs().max() < TOLERANCE[dtype]


@pytest.mark.filterwarnings("ignore:the batch is padded on the left")
def test_new_tokens_are_attended_unrounded() -> None:
    made = layer(window=1, keys={"block": 0}, sinks=0)
    fresh = states(5, seed=1)
    key, value = made.update(*fresh)
    assert made.native.window_tokens == 1
    assert torch.equal(key[:, :, PAST:], fresh[0])
    assert torch.equal(value[:, :, PAST:], fresh[1])
    assert not torch.equal(made.keys[:, :, PAST:], fresh[0])
    # the tokens before them are as stored
    assert torch.equal(key[:, :, :PAST], made.keys[:, :, :PAST])
    only_last = torch.zeros(1, PAST + 5, dtype=torch.bool)
    only_last[:, -1] = True
    got = sdpa(query(HEADS, 1), key, value, attn_mask=only_last)
    assert torch.allclose(got, fresh[1][:, :, -1:], atol=1e-6)


MASKS = {
    "none": lambda q, t: None,
    "two dimensions": lambda q, t: torch.rand(q.shape[2], t) > 0.3,
    "three dimensions": lambda q, t: torch.rand(q.shape[1], q.shape[2], t) > 0.3,
    "batch": lambda q, t: torch.rand(B, 1, 1, t) > 0.3,
    "heads": lambda q, t: torch.rand(1, q.shape[1], q.shape[2], t) > 0.3,
    "additive": lambda q, t: torch.randn(B, 1, q.shape[2], t),
    "additive with infinity": lambda q, t: torch.zeros(B, 1, 1, t).masked_fill(
        torch.rand(B, 1, 1, t) < 0.3, -torch.inf
    ),
    "expanded": lambda q, t: (torch.rand(B, 1, 1, t) > 0.3).expand(B, q.shape[1], q.shape[2], t),
    "every other column of a wider one": lambda q, t: (torch.rand(B, 1, q.shape[2], 2 * t) > 0.3)[..., ::2],
}


@pytest.mark.filterwarnings("ignore:the batch is padded on the left")
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("length", [1, 3])
def test_masks(name: str, length: int) -> None:
    torch.manual_seed(3)
    made = layer()
    key, value = step(made)
    q = query(2 * HEADS, length)
    mask = MASKS[name](q, PAST + 1)
    got = sdpa(q, key, value, attn_mask=mask, enable_gqa=True, scale=0.3)
    assert counts(made) == (1, 0)
    wanted = sdpa(q, key.decode(), value.decode(), attn_mask=mask, enable_gqa=True, scale=0.3)
    assert torch.allclose(got, wanted, atol=1e-5)


def test_transformers_ways_of_grouping_heads_stay_packed() -> None:
    from transformers.integrations.sdpa_attention import repeat_kv

    made = layer()
    key, value = step(made)
    q = query(3 * HEADS, 1)
    wanted = sdpa(q, key, value, enable_gqa=True)
    # heads of a group as queries of one head
    packed = sdpa(q.reshape(B, HEADS, 3, D), key, value).reshape(B, 3 * HEADS, 1, D)
    assert torch.allclose(packed, wanted, atol=1e-6)
    repeated_key, repeated_value = repeat_kv(key, 3), repeat_kv(value, 3)
    assert isinstance(repeated_key, PackedStates)
    assert repeated_key.shape == (B, 3 * HEADS, PAST + 1, D)
    assert torch.allclose(sdpa(q, repeated_key, repeated_value), wanted, atol=1e-6)
    assert counts(made) == (3, 0)
    assert torch.equal(repeated_key.decode(), key.decode().repeat_interleave(3, dim=1))
    assert torch.equal(repeat_kv(key, 1).decode(), key.decode())


def test_a_causal_call_that_is_the_whole_text_stays_packed() -> None:
    made = PackedLayer(LayerPlan.from_config(SkvqConfig(sink_search=0)), 0, AttentionCounts())
    key, value = step(made)
    got = sdpa(query(HEADS, 1), key, value, is_causal=True)
    assert torch.allclose(got, value.decode(), atol=1e-6)
    assert made.counts.packed == 1


# ---- what stays a handle


def test_what_stays_a_handle() -> None:
    made = layer()
    key, _ = step(made)
    kept = [
        key.contiguous(),
        key.detach(),
        key.cpu(),
        key.to("cpu"),
        key.to(torch.float32),
        key.to("cpu", torch.float32, non_blocking=True),
        key.to(device=torch.device("cpu"), dtype=torch.float32),
        key.reshape(B, HEADS, PAST + 1, D),
    ]
    assert all(handle is key for handle in kept)
    assert counts(made) == (0, 0)


def test_handles_hold_for_any_number_of_calls_until_the_layer_changes() -> None:
    made = layer()
    key, value = step(made)
    first = sdpa(query(HEADS, 1), key, value)
    assert torch.equal(sdpa(query(HEADS, 1), key, value), first)
    step(made)
    with pytest.raises(SkvqError, match=r"layer 7.*earlier state"):
        sdpa(query(HEADS, 1), key, value)
    with pytest.raises(SkvqError, match=r"layer 7.*earlier state"):
        key.decode()
    for change in (lambda: made.crop(-1), lambda: made.gather([1, 0]), made.reset):
        if made.is_initialized:
            key, value = step(made)
        change()
        with pytest.raises(SkvqError, match="earlier state"):
            key + 1


def test_deep_copies_belong_to_a_copy_of_the_layer() -> None:
    made = layer()
    key, value = step(made, 3)
    twin_key, twin_value = copy.deepcopy((key, value))
    step(made)
    q = query(HEADS, 1)
    assert sdpa(q, twin_key, twin_value).shape == q.shape
    made_twin, kept_key = copy.deepcopy((layer(), None))
    assert kept_key is None
    assert made_twin.get_seq_length() == PAST


# ---- what decodes


def test_everything_else_sees_plain_tensors() -> None:
    made = layer()
    key, value = step(made)
    plain = made.keys
    assert plain is not None
    results = {
        "transpose": (key.transpose(2, 3), plain.transpose(2, 3)),
        "slice": (key[:, :, -4:], plain[:, :, -4:]),
        "sum": (key.sum(), plain.sum()),
        "stack": (torch.stack([key, key]), torch.stack([plain, plain])),
        "cat": (torch.cat([plain, key], dim=2), torch.cat([plain, plain], dim=2)),
        "matmul": (torch.matmul(key, value.transpose(2, 3)), plain @ made.values.transpose(2, 3)),  # type: ignore[union-attr]
        "clone": (key.clone(), plain),
        "double": (key.double(), plain.double()),
        "to": (key.to(torch.float16), plain.half()),
        "copy": (key.to("cpu", copy=True), plain),
        "view": (key.view(B, -1), plain.view(B, -1)),
        "expand": (key[:, :, :, None].expand(-1, -1, -1, 2, -1), plain[:, :, :, None].expand(-1, -1, -1, 2, -1)),
        "function": (torch.reshape(key, (-1,)), plain.reshape(-1)),
        "isfinite": (torch.isfinite(key), torch.isfinite(plain)),
    }
    for name, (got, wanted) in results.items():
        assert type(got) is torch.Tensor, name
        assert torch.equal(got, wanted), name
    assert (key.numpy() == plain.numpy()).all()
    assert key.tolist() == plain.tolist()
    assert torch.equal(torch.from_dlpack(key), plain)
    assert counts(made)[0] == 0
    assert any(reason.startswith("operation") for reason in made.counts.decoded)


def test_saving_writes_plain_tensors() -> None:
    key, _ = step(layer())
    file = io.BytesIO()
    torch.save(key, file)
    file.seek(0)
    assert torch.equal(torch.load(file), key.decode())


def test_calls_that_need_plain_tensors_are_counted_with_their_reason() -> None:
    made = layer()
    key, value = step(made)
    q = query(HEADS, 1)
    plain_key, plain_value = key.decode(), value.decode()
    wanted = sdpa(q, plain_key, plain_value)
    with torch.enable_grad():
        assert torch.allclose(sdpa(q.clone().requires_grad_(), key, value), wanted, atol=1e-6)
    assert torch.allclose(sdpa(q, key, plain_value), wanted, atol=1e-6)
    assert torch.allclose(sdpa(q, value, key), sdpa(q, plain_value, plain_key), atol=1e-6)
    # torch's causal rule is aligned to the first key
    assert torch.allclose(sdpa(q, key, value, is_causal=True), plain_value[:, :, :1], atol=1e-6)
    one = torch.zeros(1, 1, 1, 1)
    assert torch.allclose(sdpa(q, key, value, attn_mask=one), wanted, atol=1e-6)
    sdpa(q, key, value, dropout_p=0.5)
    assert sdpa(q[:1], key, value).shape == q.shape
    assert counts(made)[0] == 0
    reasons = " ".join(made.counts.decoded)
    for word in ("gradient", "one update", "rearranged", "is_causal", "broadcast", "dropout", "differ in batch"):
        assert word in reasons, word


def test_torch_still_refuses_what_does_not_fit() -> None:
    key, value = step(layer())
    with pytest.raises(RuntimeError):
        sdpa(query(2 * HEADS, 1), key, value)
    with pytest.raises(RuntimeError):
        sdpa(query(HEADS, 1), key, value, attn_mask=torch.ones(1, 7, dtype=torch.bool))


def test_handles_cannot_be_written() -> None:
    key, _ = step(layer())
    before = key.decode()
    writes = [
        lambda: key.add_(1),
        lambda: key.copy_(before),
        lambda: key.__setitem__((0, 0), 0.0),
        lambda: torch.add(before, 1, out=key),
    ]
    for write in writes:
        with pytest.raises(SkvqError, match="read only use"):
            write()
    assert torch.equal(key.decode(), before)
    before.copy_(key)  # reading from it is fine


def test_decoding_on_every_step_warns_once() -> None:
    made = layer()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(6):
            key, value = step(made)
            key.transpose(2, 3)
            value.transpose(2, 3)
    messages = [str(warning.message) for warning in seen]
    assert len(messages) == 1
    assert "layer 7" in messages[0]
    assert "cache.stats()" in messages[0]


def test_decoding_now_and_then_does_not_warn() -> None:
    made = layer()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for index in range(8):
            key, _ = step(made)
            if index % 3 < 2:
                key.transpose(2, 3)

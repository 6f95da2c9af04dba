"""Left-padded batches: what is declared to be padding harms no other token, in the store and in `generate()`.

With static codecs a padded sequence is stored and attended to as the same sequence alone; with statistics of blocks,
whose borders padding moves, the slow twin says what is right.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

from skvq import QuantizedDynamicCache, SkvqError, _native
from skvq.reference import ReferenceCodec
from skvq.reference_layer import ReferenceLayer
from test_generate import MODES, PASS_THROUGH, cache_of, generate, inputs, packed_attention
from tiny_models import CONFIGS

HEADS, KEY_DIM, VALUE_DIM = 2, 64, 32
SINKS = 3


def both_layers(block: int, window: int, raw: bool = False) -> tuple[Any, Any]:
    options = {"codebook": "lloyd-max", "rule": "norm", "block": block}
    keys: dict[str, Any] = {"head_dim": KEY_DIM, "format": "raw"} if raw else {"head_dim": KEY_DIM, "format": "2"}
    keys |= {} if raw else options
    values: dict[str, Any] = {"head_dim": VALUE_DIM, "format": "1.6"} | options
    common: dict[str, Any] = {"num_key_value_heads": HEADS, "sinks": SINKS, "window": window, "dtype": "float32"}
    native = _native.Layer(keys=_native.Codec(**keys), values=_native.Codec(**values), **common)
    return native, ReferenceLayer(keys=ReferenceCodec(**keys), values=ReferenceCodec(**values), **common)


def rows_of(seed: int, batch: int, tokens: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(batch, HEADS, tokens, KEY_DIM, generator=generator) * 2 + 3
    keys[:, :, :40] *= 10  # what padding must not hand on to the statistics of others
    return keys, torch.randn(batch, HEADS, tokens, VALUE_DIM, generator=generator)


def decoded(layer: Any) -> tuple[Tensor, Tensor]:
    shape = (layer.batch_size, HEADS, layer.length)
    keys, values = torch.empty(*shape, KEY_DIM), torch.empty(*shape, VALUE_DIM)
    layer.decode_keys(keys)
    layer.decode_values(values)
    return keys, values


def append(layer: Any, rows: tuple[Tensor, Tensor], start: int, stop: int) -> None:
    layer.append(*(part[:, :, start:stop] for part in rows))


def regions(layer: Any) -> tuple[int, int, int]:
    return layer.sink_tokens, layer.packed_tokens, layer.window_tokens


paddings = st.lists(st.one_of(st.integers(0, 8), st.integers(0, 300)), min_size=2, max_size=3)
cuts = st.lists(st.integers(1, 200), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(
    padding=paddings,
    parts=cuts,
    window=st.sampled_from([1, 8, 150]),
    raw=st.booleans(),
    cropped=st.integers(0, 60),
    seed=st.integers(0, 2**16),
)
def test_a_padded_sequence_is_stored_as_if_alone(
    padding: list[int], parts: list[int], window: int, raw: bool, cropped: int, seed: int
) -> None:
    total = sum(parts)
    rows = rows_of(seed, len(padding), total)
    layer, _ = both_layers(0, window, raw)
    layer.set_padding(padding)
    done = 0
    for part in parts:
        append(layer, rows, done, done + part)
        done += part
    length = max(1, total - cropped)
    layer.crop(length)
    if length < total:
        append(layer, rows, length, total)
    query = torch.randn(len(padding), 2 * HEADS, 1, KEY_DIM)
    output = torch.full((len(padding), 2 * HEADS, 1, VALUE_DIM), torch.nan)
    layer.attend(query, output, scale=0.1, causal=True)
    found = decoded(layer)
    for row, count in enumerate(padding):
        if count >= total:
            assert not output[row].any()
            assert not any(part[row].any() for part in found)
            continue
        alone, _ = both_layers(0, window, raw)
        mine = tuple(part[row : row + 1, :, count:] for part in rows)
        append(alone, mine, 0, total - count)
        for part, wanted in zip(found, decoded(alone), strict=True):
            assert torch.equal(part[row, :, count:], wanted[0])
            assert not part[row, :, :count].any()
        single = torch.empty(1, 2 * HEADS, 1, VALUE_DIM)
        alone.attend(query[row : row + 1], single, scale=0.1, causal=True)
        assert torch.allclose(output[row], single[0], atol=2e-5)


@settings(max_examples=60, deadline=None)
@given(
    padding=paddings,
    parts=cuts,
    window=st.sampled_from([8, 150]),
    block=st.sampled_from([0, 128]),
    length=st.integers(1, 9),
    cropped=st.integers(0, 200),
    indices=st.lists(st.integers(0, 1), min_size=1, max_size=3),
    masked=st.booleans(),
    causal=st.booleans(),
    fresh=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_a_padded_batch_equals_the_twin(
    padding: list[int],
    parts: list[int],
    window: int,
    block: int,
    length: int,
    cropped: int,
    indices: list[int],
    masked: bool,
    causal: bool,
    fresh: bool,
    seed: int,
) -> None:
    native, twin = both_layers(block, window)
    rows, more = rows_of(seed, len(padding), sum(parts)), rows_of(seed + 1, len(indices), length)
    for layer in (native, twin):
        layer.set_padding(padding)
        done = 0
        for part in parts:
            append(layer, rows, done, done + part)
            done += part
        layer.crop(max(1, done - cropped))
        layer.gather(indices)
        append(layer, more, 0, length)
    assert regions(native) == regions(twin)
    assert all(torch.equal(a, b) for a, b in zip(decoded(native), decoded(twin), strict=True))
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(len(indices), 2 * HEADS, length, KEY_DIM, generator=generator)
    options: dict[str, Any] = {"scale": 0.05, "causal": causal}
    if masked:
        options["mask"] = torch.rand(len(indices), 1, length, native.length, generator=generator) > 0.3
    if fresh:
        options |= {"fresh_keys": more[0], "fresh_values": more[1]}
    outputs = [torch.full((len(indices), 2 * HEADS, length, VALUE_DIM), torch.nan) for _ in range(2)]
    native.attend(query, outputs[0], **options)
    twin.attend(query, outputs[1], **options)
    assert torch.allclose(*outputs, atol=3e-5, rtol=1e-5)


def test_padding_has_no_part_in_statistics() -> None:
    """The block that begins with 100 tokens of padding has the statistics of its other 28 rows."""
    native, _ = both_layers(128, 1)
    padding = 100
    rows = rows_of(0, 1, SINKS + 130)
    native.set_padding([padding])
    append(native, rows, 0, SINKS + 130)
    first = SINKS + padding
    codec = ReferenceCodec(head_dim=KEY_DIM, format="2", codebook="lloyd-max", rule="norm", block=128)
    real = rows[0][0, :, first : SINKS + 128]
    for head in range(HEADS):
        shift, scale = codec.block_statistics(real[head])
        wanted = codec.fake_quantize(real[head], head, (shift, scale))
        assert torch.equal(decoded(native)[0][0, head, first : SINKS + 128], wanted)


def test_what_is_refused() -> None:
    native, twin = both_layers(0, 8)
    rows = rows_of(0, 2, 20)
    native.set_padding([3, 0, 1])
    with pytest.raises(SkvqError, match=r"keys.*\[3"):
        append(native, rows, 0, 20)
    native.set_padding([3, 0])
    append(native, rows, 0, 20)
    with pytest.raises(SkvqError, match="without tokens"):
        native.set_padding([0, 0])
    append(twin, rows, 0, 20)
    with pytest.raises(ValueError, match="without tokens"):
        twin.set_padding([0, 0])
    native.reset()
    append(native, rows_of(0, 1, 20), 0, 20)  # another batch, none of it padding
    assert torch.equal(decoded(native)[0][:, :, :SINKS], rows_of(0, 1, 20)[0][:, :, :SINKS])


# ---- the cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [mode for mode, (_, padded, _) in MODES.items() if padded])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt-oss", "kv-shared"])
def test_pass_through_gives_the_tokens_of_the_stock_cache(family: str, mode: str) -> None:
    attention = packed_attention(family)
    wanted = generate(family, attention, mode, DynamicCache(config=CONFIGS[family]()))
    mask = inputs(MODES[mode][0], True)["attention_mask"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the batch is padded")
        cache = cache_of(family, attention_mask=mask, **PASS_THROUGH)
        assert torch.equal(generate(family, attention, mode, cache), wanted)
    assert cache.stats()["decoded"] == {}


@pytest.mark.parametrize("attention", ["sdpa", "skvq", "eager"])
@pytest.mark.filterwarnings("ignore:skvq decodes the whole cache")
def test_low_bits_agree_under_every_attention(attention: str) -> None:
    keys = {"block": 128, "query_exponent": 0.0 if attention == "eager" else 0.5}  # eager attention shows no queries
    options: dict[str, Any] = {"window": 8, "sinks": 2, "keys": keys}
    mask = inputs(3, True, 300)["attention_mask"]
    caches = [cache_of("llama", attention_mask=mask, **options) for _ in range(2)]
    wanted = generate("llama", "sdpa", "left-padded", caches[0], length=300)
    assert torch.equal(generate("llama", attention, "left-padded", caches[1], length=300), wanted)
    for one, other in zip(caches[0].layers, caches[1].layers, strict=True):
        assert one.native.packed_tokens == 256
        assert not one.keys[2, :, :14].any()
        assert torch.allclose(one.keys[:, :, 14:], other.keys[:, :, 14:], atol=1e-4)


def test_the_cache_is_told_once_and_warns_if_not() -> None:
    with pytest.warns(UserWarning, match="attention_mask"):
        generate("llama", "sdpa", "left-padded", cache_of("llama"), length=70)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    cache = cache_of("llama")
    cache.set_padding(mask)
    states = torch.randn(2, 2, 4, 16)
    with pytest.raises(SkvqError, match="batch 3"):
        cache.update(torch.randn(3, 2, 4, 16), torch.randn(3, 2, 4, 16), 0)
    cache.update(states, states, 0)
    assert not cache.layers[0].keys[0, :, :2].any()
    assert torch.equal(cache.layers[0].keys[0, :, 2:], states[0, :, 2:])
    with pytest.raises(SkvqError, match="holds tokens"):
        cache.set_padding(mask)
    twin = copy.deepcopy(cache)
    cache.reset()
    cache.update(states, states, 0)
    assert torch.equal(cache.layers[0].keys, states)
    twin.update(states, states, 1)
    assert not twin.layers[1].keys[0, :, :2].any()


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (torch.tensor([[1, 1], [1, 0]]), "row 1 is not zeros and then ones"),
        (torch.tensor([[0, 1, 0, 1]]), "row 0"),
        (torch.tensor([[1, 1], [0, 0]]), "row 1"),
        (torch.ones(2, 1, 1, 4), r"\(2, 1, 1, 4\), expected a tensor \[batch, tokens\]"),
        ([[1, 1]], "list"),
    ],
)
def test_masks_that_are_no_left_padding_are_refused(mask: Any, expected: str) -> None:
    with pytest.raises(SkvqError, match=expected):
        QuantizedDynamicCache(CONFIGS["llama"](), attention_mask=mask)

"""The laws of the store's regions, for any lengths, blocks and windows, on rows that the calls cannot be told from.

The store's state after a program of calls is its regions, its decoded rows and the count of its statistics; two
stores with the same state and the same later calls must stay alike, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skvq import _native

HEADS, KEY_DIM, VALUE_DIM = 2, 64, 80
STATISTICS = {"keys": 2 * 2 * KEY_DIM, "values": 2 * VALUE_DIM + 2}  # bytes of a block: fp16 shift and scale(s)

blocks = st.sampled_from([0, 128, 256])
windows = st.sampled_from([1, 16, 100, 128, 250, 300])
sinks = st.sampled_from([0, 5])
key_formats = st.sampled_from(["2", "raw"])


def make_layer(block: int, window: int, sinks: int, key_format: str = "2") -> Any:
    keys: dict[str, Any] = {"head_dim": KEY_DIM, "format": key_format}
    if key_format != "raw":
        keys |= {"codebook": "lloyd-max", "rule": "norm", "block": block}
    values = {"head_dim": VALUE_DIM, "format": "1.6", "codebook": "lloyd-max", "rule": "norm", "block": block}
    return _native.Layer(
        num_key_value_heads=HEADS,
        keys=_native.Codec(**keys),
        values=_native.Codec(**values, **({"scale_exponent": 0.0} if block else {})),
        sinks=sinks,
        window=window,
        dtype="float32",
    )


def rows_of(seed: int, tokens: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    """Keys and values whose means and spreads drift from token to token, so that every block has its own statistics."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(tokens)[:, None] / 50
    made = (torch.randn(batch, HEADS, tokens, width, generator=generator) for width in (KEY_DIM, VALUE_DIM))
    keys, values = (rows * (1 + time.sin().abs()) + time for rows in made)
    return keys, values


def append(layer: Any, rows: tuple[Tensor, Tensor], start: int, stop: int) -> None:
    if stop > start:
        layer.append(*(part[:, :, start:stop] for part in rows))


def decoded(layer: Any) -> tuple[Tensor, Tensor]:
    shape = (layer.batch_size, HEADS, layer.length)
    keys, values = torch.empty(*shape, KEY_DIM), torch.empty(*shape, VALUE_DIM)
    if layer.length:
        layer.decode_keys(keys)
        layer.decode_values(values)
    return keys, values


def regions(layer: Any) -> tuple[int, int, int]:
    return layer.sink_tokens, layer.packed_tokens, layer.window_tokens


def assert_alike(one: Any, other: Any) -> None:
    assert regions(one) == regions(other)
    assert all(torch.equal(a, b) for a, b in zip(decoded(one), decoded(other), strict=True))


@settings(max_examples=40, deadline=None)
@given(
    block=blocks,
    window=windows,
    sinks=sinks,
    key_format=key_formats,
    parts=st.lists(st.one_of(st.integers(1, 300), st.just(1)), min_size=1, max_size=6),
    seed=st.integers(0, 2**16),
)
def test_every_token_is_in_one_region_and_calls_do_not_matter(
    block: int, window: int, sinks: int, key_format: str, parts: list[int], seed: int
) -> None:
    total = sum(parts)
    rows = rows_of(seed, total)
    whole, stepped = (make_layer(block, window, sinks, key_format) for _ in range(2))
    append(whole, rows, 0, total)
    done = 0
    for part in parts:
        append(stepped, rows, done, done + part)
        done += part
        behind = max(0, done - sinks)
        with_statistics = behind // block * block if block else behind
        packed = min(max(0, behind - window), with_statistics)
        assert regions(stepped) == (min(done, sinks), packed, behind - packed)
        assert 0 <= behind - packed - min(behind, window) < max(1, block - window if block else 1)
    assert_alike(whole, stepped)
    keys, values = decoded(whole)
    for start, stop in ((0, whole.sink_tokens), (total - whole.window_tokens, total)):
        assert torch.equal(keys[:, :, start:stop], rows[0][:, :, start:stop])
        assert torch.equal(values[:, :, start:stop], rows[1][:, :, start:stop])
    packed_values = slice(whole.sink_tokens, total - whole.window_tokens)
    assert bool((values[:, :, packed_values] != rows[1][:, :, packed_values]).any(-1).all())


@settings(max_examples=40, deadline=None)
@given(
    block=blocks,
    window=windows,
    sinks=sinks,
    tokens=st.integers(1, 700),
    kept=st.floats(0, 1),
    more=st.integers(1, 300),
    seed=st.integers(0, 2**16),
)
def test_crop_then_append(block: int, window: int, sinks: int, tokens: int, kept: float, more: int, seed: int) -> None:
    length = int(kept * tokens)
    rows, other = rows_of(seed, tokens + more), rows_of(seed + 1, tokens + more)
    cropped, never = (make_layer(block, window, sinks) for _ in range(2))
    append(cropped, rows, 0, tokens)
    packed_rows = cropped.packed_tokens
    cropped.crop(length)
    append(never, rows, 0, length)
    assert cropped.sink_tokens == never.sink_tokens
    assert cropped.packed_tokens == max(0, min(packed_rows, length - sinks))
    # The same rows again: as if nothing had been cropped.
    again, straight = cropped.clone(), make_layer(block, window, sinks)
    append(again, rows, length, tokens + more)
    append(straight, rows, 0, tokens + more)
    assert_alike(again, straight)
    # Other rows: as if the cropped ones had never been there, unless rows that were packed early stay so.
    early = cropped.packed_tokens > never.packed_tokens
    boundary = sinks + (-(-cropped.packed_tokens // block) * block if block else cropped.packed_tokens)
    for layer in (cropped, never):
        append(layer, other, length, length + more)
    if not early:
        assert_alike(cropped, never)
    elif cropped.packed_tokens == never.packed_tokens:
        # A cut block keeps its statistics; the blocks after it are those of the rows that are there.
        for mine, theirs in zip(decoded(cropped), decoded(never), strict=True):
            assert torch.equal(mine[:, :, boundary:], theirs[:, :, boundary:])


@settings(max_examples=25, deadline=None)
@given(
    block=blocks,
    window=windows,
    tokens=st.integers(1, 500),
    more=st.integers(1, 300),
    indices=st.lists(st.integers(0, 2), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
)
def test_gathered_sequences_go_on_alone(
    block: int, window: int, tokens: int, more: int, indices: list[int], seed: int
) -> None:
    first, then = rows_of(seed, tokens, batch=3), rows_of(seed + 1, more, batch=len(indices))
    layer = make_layer(block, window, 5)
    append(layer, first, 0, tokens)
    untouched, before = layer.clone(), decoded(layer)
    layer.gather(indices)
    append(layer, then, 0, more)
    for row, index in enumerate(indices):
        alone = make_layer(block, window, 5)
        append(alone, (first[0][index : index + 1], first[1][index : index + 1]), 0, tokens)
        append(alone, (then[0][row : row + 1], then[1][row : row + 1]), 0, more)
        assert regions(alone) == regions(layer)
        pairs = zip(decoded(alone), decoded(layer), strict=True)
        assert all(torch.equal(mine[0], theirs[row]) for mine, theirs in pairs)
    assert all(torch.equal(a, b) for a, b in zip(before, decoded(untouched), strict=True))


def test_statistics_in_the_window_are_counted_and_forgotten() -> None:
    layer = make_layer(128, 300, 5)
    rows = rows_of(0, 400)
    append(layer, rows, 0, 5 + 127)
    before = layer.nbytes
    append(layer, rows, 132, 133)
    assert layer.packed_tokens == 0
    plain = 4 * (KEY_DIM + VALUE_DIM)
    # The window grows by whole steps of its own: only what is left after them is the statistics.
    statistics = HEADS * sum(STATISTICS.values())
    assert (layer.nbytes - before) % (HEADS * plain) == statistics
    append(layer, rows, 133, 140)
    layer.crop(133)
    assert (layer.nbytes - before) % (HEADS * plain) == statistics
    layer.crop(132)
    assert layer.nbytes % (HEADS * plain) == before % (HEADS * plain)

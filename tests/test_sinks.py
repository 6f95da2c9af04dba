"""The choice of sinks (skvq/sinks.py), and layers that keep what was chosen (skvq/layer.py)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from skvq import QuantizedDynamicCache
from skvq.layer import PackedLayer
from skvq.sinks import (
    inverse_order,
    keeps_first_rows,
    reordered,
    reordered_mask,
    searched,
    sink_mask,
    sink_order,
    sink_scores,
    tokens_needed,
)
from tiny_models import CONFIGS

HEADS, DIM = 2, 16
SINKS, SEARCH, WINDOW = 2, 24, 32


def rows(batch: int, tokens: int, planted: dict[int, tuple[int, ...]], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys about a common mean and values; planted tokens of a sequence have a key of zeros and a short value."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(batch, HEADS, tokens, DIM, generator=generator) + 3.0
    values = torch.randn(batch, HEADS, tokens, DIM, generator=generator)
    for row, positions in planted.items():
        for position in positions:
            keys[row, :, position] *= 0.01
            values[row, :, position] *= 0.1
    return keys, values


def layer(**options: Any) -> PackedLayer:
    config = CONFIGS["llama"]()
    given = {"window": WINDOW, "sinks": SINKS, "sink_search": SEARCH, "key_bits": 2, "value_bits": 2}
    block = {"keys": {"block": 0}, "values": {"block": 0}}
    found = QuantizedDynamicCache(config, **(given | block | options)).layers[0]
    assert isinstance(found, PackedLayer)
    return found


def all_rows(of: PackedLayer) -> tuple[Tensor, Tensor]:
    assert of.keys is not None
    assert of.values is not None
    return of.keys, of.values


def test_far_keys_with_short_values_are_chosen() -> None:
    keys, values = rows(2, 60, {0: (0, 11), 1: (5, 23)})
    order = sink_order(keys, values, SINKS, SEARCH)
    assert order is not None
    assert order[0].tolist() == [0, 11, *range(1, 11), *range(12, SEARCH)]
    assert order[1].tolist() == [5, 23, *range(5), *range(6, 23)]
    mask = sink_mask(keys, values, SINKS, SEARCH, WINDOW)
    assert [row.nonzero()[:, 0].tolist() for row in mask] == [[0, 11], [5, 23]]
    # a token beyond those that are searched is never one
    keys, values = rows(1, 60, {0: (7, SEARCH)})
    assert 7 in sink_mask(keys, values, SINKS, SEARCH, WINDOW)[0].nonzero()
    assert not bool(sink_mask(keys, values, SINKS, SEARCH, WINDOW)[0, SEARCH:].any())


def test_the_score_by_its_definition() -> None:
    keys, values = rows(1, 9, {0: (4,)}, seed=3)
    expected = torch.zeros(9)
    for head in range(HEADS):
        distance = (keys[0, head] - keys[0, head].median(0).values).square().sum(1)
        length = values[0, head].square().sum(1)
        expected += distance / distance.median() * length.median() / length
    torch.testing.assert_close(sink_scores(keys, values)[0], expected)


def test_rows_that_are_not_finite_are_no_sinks() -> None:
    keys, values = rows(1, 30, {0: (3, 9)})
    keys[0, 1, 4, 2], values[0, 0, 5, 1] = torch.nan, torch.inf
    assert sink_scores(keys, values)[0, [4, 5]].tolist() == [-1.0, -1.0]
    order = sink_order(keys, values, SINKS, SEARCH)
    assert order is not None
    assert order[0, :SINKS].tolist() == [3, 9]
    # all alike, and all zeros: the first ones
    same = torch.ones(1, HEADS, 30, DIM)
    assert sink_order(same, same, SINKS, SEARCH) is None
    assert sink_order(0 * same, 0 * same, SINKS, SEARCH) is None


def test_padding_stays_in_front() -> None:
    keys, values = rows(3, 40, {0: (12,), 1: (17, 18), 2: (39,)})
    order = sink_order(keys, values, SINKS, SEARCH, padding=(0, 10, 38))
    assert order is not None
    assert order.shape == (3, 40)
    assert 12 in order[0, :SINKS]
    assert order[0, SEARCH:].tolist() == list(range(SEARCH, 40))
    assert order[1].tolist() == [*range(10), 17, 18, *range(10, 17), *range(19, 40)]
    assert order[2].tolist() == list(range(40))  # two tokens are both sinks


@given(seed=st.integers(0, 100), batch=st.integers(1, 3), tokens=st.integers(4, 60), sinks=st.integers(1, 5))
def test_an_order_is_a_permutation_with_two_rising_runs(seed: int, batch: int, tokens: int, sinks: int) -> None:
    keys, values = rows(batch, tokens, {0: (tokens // 2,)}, seed)
    order = sink_order(keys, values, sinks, max(sinks + 1, SEARCH))
    if order is None:
        return
    span = order.shape[1]
    assert span == min(tokens, max(sinks + 1, SEARCH))
    for row in order.tolist():
        assert sorted(row) == list(range(span))
        assert all(a < b for run in (row[:sinks], row[sinks:]) for a, b in pairwise(run))
    assert torch.equal(reordered(reordered(keys, order), inverse_order(order)), keys)


def test_masks_follow_the_rows() -> None:
    keys, values = rows(2, 50, {0: (0, 11), 1: (5, 23)})
    order = sink_order(keys, values, SINKS, SEARCH)
    assert order is not None
    query = torch.randn(2, HEADS, 3, DIM)
    for shape in ((2, HEADS, 3, 50), (1, 1, 1, 50), (2, 1, 1, 50)):
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
        mask[..., -1] = True
        expected = scaled_dot_product_attention(query, keys, values, mask)
        moved = [reordered(x, order) for x in (keys, values)]
        found = scaled_dot_product_attention(query, *moved, reordered_mask(mask, order))
        torch.testing.assert_close(found, expected)
    plain = torch.ones(1, 1, 1, 50, dtype=torch.bool)
    assert reordered_mask(plain, order) is plain
    assert reordered_mask(plain, None) is plain


@pytest.mark.parametrize(
    ("search", "sinks", "window", "expected"), [(64, 5, 128, 64), (64, 5, 8, 13), (0, 5, 128, 0), (5, 5, 9, 0)]
)
def test_how_many_are_searched(search: int, sinks: int, window: int, expected: int) -> None:
    assert searched(search, sinks, window) == expected
    assert searched(search, 0, window) == 0
    assert tokens_needed(expected) == expected
    assert tokens_needed(expected, (0, 7, 3)) == (expected + 7 if expected else 0)


# ---- layers


def test_what_was_chosen_is_exact_and_nothing_else_of_the_past() -> None:
    keys, values = rows(2, 90, {0: (0, 11), 1: (5, 23)})
    packed = layer()
    packed.update(keys, values)
    found_keys, found_values = all_rows(packed)
    for row, sinks in ((0, [0, 11]), (1, [5, 23])):
        exact = (found_keys[row] == keys[row]).all(-1).all(0) & (found_values[row] == values[row]).all(-1).all(0)
        assert exact.nonzero()[:, 0].tolist() == [*sinks, *range(90 - WINDOW, 90)]
    first = layer(sink_search=0)
    first.update(keys, values)
    assert first.order is None
    exact = (all_rows(first)[0] == keys).all(-1).all(1)
    assert exact[0].nonzero()[:, 0].tolist() == [0, 1, *range(90 - WINDOW, 90)]


def test_attention_on_packed_bytes_is_that_of_the_decoded_rows() -> None:
    keys, values = rows(2, 90, {0: (0, 11), 1: (5, 23)})
    packed = layer()
    packed.update(keys, values)
    generator = torch.Generator().manual_seed(2)
    for count in (1, 4):
        new = [torch.randn(2, HEADS, count, DIM, generator=generator) for _ in range(2)]
        handles = packed.update(*new)
        query = torch.randn(2, 2 * HEADS, count, DIM, generator=generator)
        total = handles[0].shape[2]
        causal = torch.ones(count, total, dtype=torch.bool).tril(total - count)
        some = torch.rand(2, 1, count, total, generator=generator) < 0.7
        some[..., -count:] |= torch.eye(count, dtype=torch.bool)
        for mask in (causal, causal & some, torch.zeros(2, 1, count, total).masked_fill(~(causal & some), -3.0)):
            found = scaled_dot_product_attention(query, *handles, attn_mask=mask, enable_gqa=True)
            plain = [x.decode() for x in handles]  # type: ignore[attr-defined]
            expected = scaled_dot_product_attention(query, *plain, attn_mask=mask, enable_gqa=True)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cuts", [(24,), (60,), (24, 25, 70), tuple(range(1, 90)), (30, 31, 32), (7,), (16, 20)])
def test_any_cut_stores_the_same(cuts: tuple[int, ...]) -> None:
    keys, values = rows(2, 90, {0: (0, 11), 1: (5, 23)})
    whole, parts = layer(), layer()
    whole.update(keys, values)
    for begin, end in pairwise((0, *cuts, 90)):
        parts.update(keys[:, :, begin:end], values[:, :, begin:end])
    assert torch.equal(whole.order, parts.order)  # type: ignore[arg-type]
    for one, other in zip(all_rows(whole), all_rows(parts), strict=True):
        assert torch.equal(one, other)
    for name in ("sink_tokens", "packed_tokens", "window_tokens"):
        assert getattr(parts.native, name) == getattr(whole.native, name)


def test_a_short_first_call_waits_for_all_the_tokens_to_choose_from() -> None:
    keys, values = rows(1, 90, {0: (7, 20)})
    packed = layer()
    packed.update(keys[:, :, :16], values[:, :, :16])
    assert packed.order is None
    packed.update(keys[:, :, 16:], values[:, :, 16:])
    assert packed.order is not None
    assert packed.order[0, :SINKS].tolist() == [7, 20]
    exact = (all_rows(packed)[0] == keys).all(-1).all(1)[0]
    assert exact.nonzero()[:, 0].tolist() == [7, 20, *range(90 - WINDOW, 90)]


def test_changes_of_the_batch_take_the_order_along() -> None:
    keys, values = rows(3, 90, {0: (0, 11), 1: (5, 23), 2: (8, 9)})
    packed = layer()
    packed.update(keys, values)
    before = all_rows(packed)
    packed.reorder_cache(torch.tensor([2, 0, 0]))
    for one, other in zip(all_rows(packed), before, strict=True):
        assert torch.equal(one, other[[2, 0, 0]])
    packed.batch_select_indices(torch.tensor([1]))
    packed.batch_repeat_interleave(2)
    for one, other in zip(all_rows(packed), before, strict=True):
        assert torch.equal(one, other[[0, 0]])


@pytest.mark.parametrize("length", [70, 24, 23, 12, 3, 1])
def test_crops_keep_the_first_tokens(length: int) -> None:
    keys, values = rows(2, 90, {0: (0, 11), 1: (5, 23)})
    packed = layer()
    packed.update(keys, values)
    before = all_rows(packed)
    packed.crop(length - 90)
    assert packed.get_seq_length() == length
    for one, other in zip(all_rows(packed), before, strict=True):
        assert torch.equal(one, other[:, :, :length])
    packed.update(keys[:, :, length:], values[:, :, length:])
    exact = (all_rows(packed)[0] == keys).all(-1).all(1)
    for row, sinks in ((0, (0, 11)), (1, (5, 23))):
        assert all(bool(exact[row, sink]) for sink in sinks)
    packed.reset()
    assert packed.order is None


@pytest.mark.parametrize("length", [22, 12, 6])
def test_a_crop_that_keeps_all_sinks_touches_no_row(length: int) -> None:
    """What was packed stays so, beside the same sinks, whatever comes later."""
    keys, values = rows(2, 90, {0: (0, 4), 1: (2, 5)})
    packed = layer()
    packed.update(keys, values)
    before, order = all_rows(packed), packed.order
    assert order is not None
    packed.crop(length - 90)
    assert packed.waiting is None
    assert (packed.native.sink_tokens, packed.native.packed_tokens) == (SINKS, length - SINKS)
    assert packed.order is not None
    assert torch.equal(packed.order, order[:, :length])
    assert keeps_first_rows(order, length)
    more = rows(2, 200, {0: (0, 1), 1: (1, 3)}, seed=5)
    packed.update(*more)
    for one, other in zip(all_rows(packed), before, strict=True):
        assert torch.equal(one[:, :, :length], other[:, :, :length])
    exact = (all_rows(packed)[0][:, :, :length] == keys[:, :, :length]).all(-1).all(1)
    assert [row.nonzero()[:, 0].tolist() for row in exact] == [[0, 4], [2, 5]]
    packed.crop(4 - packed.get_seq_length())  # and a sink is removed
    assert not keeps_first_rows(order, 4)
    for one, other in zip(all_rows(packed), before, strict=True):
        assert torch.equal(one, other[:, :, :4])


@pytest.mark.parametrize("length", [23, 20, 4, 1])
def test_a_crop_where_nothing_is_packed_opens_the_choice_again(length: int) -> None:
    """The layer is as if the tokens that were removed had never been there."""
    keys, values = rows(2, SINKS + WINDOW, {0: (0, 11), 1: (5, 22)})
    more = rows(2, 90, {0: (0, 3), 1: (1, 2)}, seed=4)
    packed, never = layer(), layer()
    packed.update(keys, values)
    assert packed.order is not None
    packed.crop(length - SINKS - WINDOW)
    never.update(keys[:, :, :length], values[:, :, :length])
    for one in (packed, never):
        assert one.order is None
        one.update(*more)
    assert torch.equal(packed.order, never.order)  # type: ignore[arg-type]
    for found, wanted in zip(all_rows(packed), all_rows(never), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("length", [40, 12])
def test_a_crop_of_a_prompt_whose_queries_nobody_saw_keeps_its_first_tokens(length: int) -> None:
    keys, values = rows(2, 90, {0: (0, 11), 1: (5, 23)})
    asks: dict[str, Any] = {"keys": {"block": 128, "query_exponent": 0.5}, "values": {"block": 128}}
    packed = layer(**asks)
    packed.update(keys, values)
    assert packed.waiting is not None
    packed.crop(length - 90)
    for found, whole in zip(all_rows(packed), (keys, values), strict=True):
        assert torch.equal(found, whole[:, :, :length])


def test_an_error_leaves_the_layer_as_it_was() -> None:
    keys, values = rows(1, 90, {0: (0, 11)})
    broken = values.clone()
    broken[0, 1, 80, 3] = torch.nan
    packed = layer()
    with pytest.raises(ValueError, match="values"):
        packed.update(keys, broken)
    assert packed.get_seq_length() == 0
    packed.update(keys, values)
    assert packed.get_seq_length() == 90

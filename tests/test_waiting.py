"""Rows that wait in a layer until sinks can be chosen (skvq/waiting.py, skvq/layer.py).

The law: tokens that come in several calls leave the layer as they would in one, whatever happened in between.
"""

from __future__ import annotations

import copy
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import DynamicCache

from skvq import QuantizedDynamicCache, SkvqError
from skvq.attention import skvq_attention_forward
from skvq.layer import PackedLayer
from skvq.model_layers import cache_argument
from skvq.packed import PackedStates
from skvq.waiting import SeenQueries
from tiny_models import CONFIGS, build, prompts

HEADS, DIM, GROUP = 2, 16, 2
BLOCK: dict[str, Any] = {"keys": {"block": 128, "query_exponent": 0.5}, "values": {"block": 128}}
STATIC: dict[str, Any] = {"keys": {"block": 0}, "values": {"block": 0}}


def rows(tokens: int, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and queries; some tokens have keys near zero and short values."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(batch, HEADS, tokens, DIM, generator=generator) for _ in range(2))
    odd = torch.rand(batch, 1, tokens, 1, generator=generator) < 0.1
    query = torch.randn(batch, GROUP * HEADS, tokens, DIM, generator=generator) * torch.linspace(0.1, 2.0, DIM)
    return torch.where(odd, 0.05 * keys, keys + 3.0), torch.where(odd, 0.1 * values, values), query


def layer(padding: tuple[int, ...] = (), **options: Any) -> PackedLayer:
    cache = QuantizedDynamicCache(CONFIGS["llama"](), **({"key_bits": 2, "value_bits": 1.6} | options))
    made = cache.layers[0]
    assert isinstance(made, PackedLayer)
    made.padding = padding
    return made


def give(to: PackedLayer, given: tuple[Tensor, Tensor, Tensor], begin: int, end: int, shown: bool = False) -> Tensor:
    """One call and attention to it, with a causal mask; `shown`: attention that shows queries."""
    keys, values, query = (x[:, :, begin:end] for x in given)
    handles = to.update(keys, values)
    mask = torch.ones(end - begin, to.get_seq_length(), dtype=torch.bool).tril(to.get_seq_length() - (end - begin))
    if not shown:
        return handles[0]
    return sdpa(query, *handles, attn_mask=mask, enable_gqa=True)


def assert_alike(one: PackedLayer, other: PackedLayer) -> None:
    """The same order, regions, rows and factors of queries."""
    assert (one.order is None) == (other.order is None)
    assert one.order is None or torch.equal(one.order, other.order)  # type: ignore[arg-type]
    for name in ("length", "batch_size", "sink_tokens", "packed_tokens", "window_tokens"):
        assert getattr(one.native, name) == getattr(other.native, name), name
    assert one.get_seq_length() == other.get_seq_length()
    for mine, theirs in ((one.keys, other.keys), (one.values, other.values)):
        assert torch.equal(mine, theirs)  # type: ignore[arg-type]
    for sequence in range(one.native.batch_size):
        for head in range(HEADS):
            found, wanted = (x.native.query_factors(sequence, head) for x in (one, other))
            assert (found is None) == (wanted is None)
            assert found is None or torch.equal(torch.from_dlpack(found), torch.from_dlpack(wanted))


paddings = st.one_of(st.just(()), st.tuples(st.integers(0, 80), st.integers(0, 8)))
regions = st.sampled_from([(5, 128, 64), (2, 8, 64), (3, 40, 20), (0, 30, 64), (4, 60, 0), (5, 5, 7)])


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.one_of(st.integers(1, 12), st.integers(1, 200), st.just(1)), min_size=2, max_size=8),
    padding=paddings,
    region=regions,
    options=st.sampled_from([BLOCK, STATIC]),
    seed=st.integers(0, 2**16),
)
def test_calls_do_not_matter(
    parts: list[int], padding: tuple[int, ...], region: tuple[int, int, int], options: Any, seed: int
) -> None:
    sinks, window, search = region
    total, given_rows = sum(parts), rows(sum(parts), seed=seed)
    whole, stepped = (layer(padding, sinks=sinks, window=window, sink_search=search, **options) for _ in range(2))
    give(whole, given_rows, 0, total)
    for begin, end in pairwise((0, *accumulate(parts))):
        give(stepped, given_rows, begin, end)
    for one in (whole, stepped):
        one.settle()
    assert_alike(whole, stepped)


@settings(max_examples=40, deadline=None)
@given(
    parts=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    rest=st.integers(1, 250),
    padding=paddings,
    seed=st.integers(0, 2**16),
)
def test_queries_of_tokens_that_waited_count_as_those_of_one_call(
    parts: list[int], rest: int, padding: tuple[int, ...], seed: int
) -> None:
    needed = 64 + max(padding, default=0)
    starts = [0, *(x for x in accumulate(parts) if x < needed)]
    total = starts[-1] + rest
    given_rows = rows(total, seed=seed)
    whole, stepped = (layer(padding, window=60, **BLOCK) for _ in range(2))
    for one, cuts in ((whole, (0, total)), (stepped, (*starts, total))):
        for begin, end in pairwise(cuts):
            if one.padding and end <= max(one.padding):  # a sequence of nothing but padding has no attention
                return
            give(one, given_rows, begin, end, shown=True)
    assert (whole.waiting is None) == (stepped.waiting is None) == (total >= needed)
    more = rows(300, seed=seed + 1)
    for one in (whole, stepped):
        give(one, more, 0, 300)
        one.settle()
    assert_alike(whole, stepped)
    assert whole.native.packed_tokens >= 128


@settings(max_examples=30, deadline=None)
@given(
    parts=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    padding=st.tuples(st.integers(0, 90), st.integers(0, 5)),
    seed=st.integers(0, 2**16),
)
def test_a_padded_sequence_has_its_own_first_tokens_to_choose_from(
    parts: list[int], padding: tuple[int, ...], seed: int
) -> None:
    total = max(sum(parts), max(padding) + 64)
    given_rows = rows(total, seed=seed)
    batch = layer(padding, **STATIC)
    for begin, end in pairwise(sorted({0, *accumulate(parts[:-1]), total})):
        give(batch, given_rows, begin, end)
    batch.settle()
    for sequence, count in enumerate(padding):
        alone = layer(**STATIC)
        give(alone, tuple(x[sequence : sequence + 1, :, count:] for x in given_rows), 0, total - count)  # type: ignore[arg-type]
        alone.settle()
        for found, wanted in ((batch.keys, alone.keys), (batch.values, alone.values)):
            assert found is not None
            assert wanted is not None
            assert torch.equal(found[sequence, :, count:], wanted[0])
            assert not found[sequence, :, :count].any()


@pytest.mark.parametrize("options", [BLOCK, STATIC])
def test_attention_is_exact_up_to_the_call_that_brings_the_last_token(options: Any) -> None:
    given_rows = rows(200)
    keys, values, query = given_rows
    waits = layer(**options)
    for begin, end in pairwise((0, 9, 10, 11, 30, 63, 164)):
        found = give(waits, given_rows, begin, end, shown=True)
        mask = torch.ones(end - begin, end, dtype=torch.bool).tril(begin)
        known = keys[:, :, :end], values[:, :, :end]
        wanted = sdpa(query[:, :, begin:end], *known, attn_mask=mask, enable_gqa=True)
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
        assert (waits.waiting is None) == (end > 63)
    assert waits.counts.as_dict()["prefill"] == 6
    assert waits.counts.as_dict()["packed"] == 0
    give(waits, given_rows, 164, 165, shown=True)
    assert waits.counts.as_dict()["packed"] == 1
    assert waits.counts.as_dict()["decoded"] == {}


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_padding_stays_hidden_while_rows_wait(softcap: float | None) -> None:
    given_rows = rows(40)
    keys, values, query = given_rows
    waits = layer((6, 0), **BLOCK)
    give(waits, given_rows, 0, 20)
    module: Any = torch.nn.Module()
    module.num_key_value_groups = GROUP
    for begin, end in ((20, 21), (21, 30)):
        handles = waits.update(keys[:, :, begin:end], values[:, :, begin:end])
        visible = torch.ones(end - begin, end, dtype=torch.bool).tril(begin).repeat(2, 1, 1, 1)
        seen = visible.clone()
        seen[0, ..., :6] = False
        added = torch.zeros(seen.shape).masked_fill(~visible, -1e9)
        asks = query[:, :, begin:end]
        wanted, _ = skvq_attention_forward(
            module, asks, keys[:, :, :end], values[:, :, :end], seen, softcap=softcap, is_causal=True
        )
        for mask in (None, visible, added):
            found, _ = skvq_attention_forward(module, asks, *handles, mask, softcap=softcap, is_causal=True)
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
            if softcap is None and mask is not None:
                plain = sdpa(asks, *handles, attn_mask=mask, enable_gqa=True).transpose(1, 2)
                torch.testing.assert_close(plain, wanted, atol=1e-6, rtol=1e-6)
    assert waits.keys is not None
    assert not waits.keys[0, :, :6].any()
    assert torch.equal(waits.keys[0, :, 6:], keys[0, :, 6:30])


def test_changes_of_the_batch() -> None:
    given_rows, more = rows(40, batch=3), rows(60, batch=4, seed=1)
    chosen = [2, 2, 0, 0]
    waits = layer((3, 0, 9), **BLOCK)
    give(waits, given_rows, 0, 40, shown=True)
    waits.reorder_cache(torch.tensor([2, 1, 0]))
    waits.batch_select_indices(torch.tensor([True, False, True]))
    waits.batch_repeat_interleave(2)
    assert waits.batch_rows == 4
    assert waits.padding == (9, 9, 3, 3)
    straight = layer((9, 9, 3, 3), **BLOCK)
    give(straight, tuple(x[chosen] for x in given_rows), 0, 40, shown=True)  # type: ignore[arg-type]
    for one in (waits, straight):
        give(one, more, 0, 60, shown=True)
        give(one, rows(200, batch=4, seed=2), 0, 200, shown=True)
    assert_alike(waits, straight)
    few = layer(**BLOCK)
    give(few, given_rows, 0, 5)
    for indices in ([3], [-1], []):
        with pytest.raises(SkvqError, match="indices"):
            few.gather(indices)
    assert few.batch_rows == 3


@pytest.mark.parametrize("length", [20, 9, 3])
@pytest.mark.parametrize("tokens", [40, 150])
def test_a_crop_of_rows_that_wait(tokens: int, length: int) -> None:
    """Also of a prompt whose queries nobody has shown: the rows are as if the others had never been there."""
    given_rows, more = rows(tokens), rows(300, seed=3)
    waits, never = layer(**BLOCK), layer(**BLOCK)
    give(waits, given_rows, 0, 10, shown=True)
    give(waits, given_rows, 10, tokens, shown=tokens == 40)
    waits.crop(length - tokens)
    for begin, end in pairwise((0, *(x for x in (10,) if x < length), length)):
        give(never, given_rows, begin, end, shown=tokens == 40 or begin == 0)
    assert waits.get_seq_length() == length
    for one in (waits, never):
        give(one, more, 0, 300, shown=True)
    assert_alike(waits, never)
    waits.crop(-waits.get_seq_length())
    assert (waits.get_seq_length(), waits.waiting, waits.seen) == (0, None, {})
    waits.update(*(x[:1] for x in more[:2]))
    assert waits.batch_rows == 1


def test_a_crop_back_to_where_rows_wait_keeps_what_queries_said() -> None:
    given_rows = rows(90)
    waits = layer(**BLOCK)
    give(waits, given_rows, 0, 70, shown=True)
    assert waits.waiting is None
    waits.crop(-10)
    assert waits.waiting is not None
    give(waits, given_rows, 60, 90)
    give(waits, rows(200, seed=1), 0, 200)
    assert waits.native.query_factors(0, 0) is not None


def test_a_copy_waits_too() -> None:
    given_rows = rows(150)
    waits, straight = layer(**BLOCK), layer(**BLOCK)
    give(waits, given_rows, 0, 30, shown=True)
    handles = waits.update(*(x[:, :, 30:150] for x in given_rows[:2]))
    twin, twin_handles = copy.deepcopy((waits, handles))
    assert twin.waiting is not None
    for one, its in ((twin, twin_handles), (waits, handles)):
        assert one.waiting is not None
        sdpa(given_rows[2][:, :, 30:150], *its, is_causal=False, enable_gqa=True)
        assert one.waiting is None
    give(straight, given_rows, 0, 150, shown=True)
    assert_alike(waits, straight)
    assert_alike(twin, straight)
    twin.update(*(x[:, :, :1] for x in given_rows[:2]))
    assert waits.get_seq_length() == 150


@pytest.mark.parametrize("cuts", [(0, 30, 300), (0, 300)])
def test_reading_changes_nothing(cuts: tuple[int, ...]) -> None:
    given_rows = rows(300)
    cache = QuantizedDynamicCache(CONFIGS["llama"](), window=80, **BLOCK)
    read, unread = cache.layers[0], layer(window=80, **BLOCK)
    for begin, end in pairwise(cuts):
        keys, values, query = (x[:, :, begin:end] for x in given_rows)
        for one in (read, unread):
            handles = one.update(keys, values)
            if one is read:
                assert isinstance(handles[0], PackedStates)
                waiting, version = read.waiting, read.version
                elements = 2 * 2 * HEADS * DIM * end
                held = 4 * (elements + query[:, :, :1].numel() * begin)  # and queries of the calls before
                assert cache.nbytes == read.nbytes == held
                assert cache.bits_per_element == 8 * held / elements
                assert f"tokens 5 | 0 | {end - 5}, {held} bytes" in repr(read)
                assert "K2 V1.6" in repr(cache) + cache._repr_html_()
                assert cache.stats()["nonfinite_rows"] == {}
                assert cache.batch_size == 2
                assert torch.equal(read.keys, given_rows[0][:, :, :end])
                assert torch.equal(read.values, given_rows[1][:, :, :end])
                assert read.figures().tokens == cache.get_seq_length() == end
                copy.deepcopy(cache)
                assert (read.waiting, read.version) == (waiting, version)
            sdpa(query, *handles, enable_gqa=True)
    assert read.waiting is None
    assert_alike(read, unread)
    assert read.native.query_factors(0, 0) is not None
    order = 2 * 64 * 8  # int64 positions of two sequences
    assert read.nbytes == read.native.nbytes + order


class _Failing:
    """A store whose copies fail at the second append."""

    def __init__(self, store: Any, left: int = 1 << 30) -> None:
        self._store, self._left = store, left

    def clone(self) -> Any:
        return _Failing(self._store.clone(), 1)

    def append(self, *rows: Any) -> None:
        if not self._left:
            raise MemoryError("no memory")
        self._left -= 1
        self._store.append(*rows)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


@pytest.mark.parametrize("options", [BLOCK, STATIC])
@pytest.mark.parametrize("asks", [True, False])
def test_a_store_that_fails_leaves_the_rows_waiting(options: Any, asks: bool) -> None:
    given_rows = rows(200)
    waits, straight = layer(**options), layer(**options)
    for one in (waits, straight):
        give(one, given_rows, 0, 30, shown=True)
    before = waits.waiting, waits.get_seq_length(), waits.version, dict(waits.seen)
    store = waits.native
    waits.native = _Failing(store)  # type: ignore[assignment]
    waits_for_queries = options is BLOCK
    new = tuple(x[:, :, 30:200] for x in given_rows)
    if waits_for_queries:
        handles = waits.update(*new[:2])
        before = waits.waiting, waits.get_seq_length(), waits.version, dict(waits.seen)
        with pytest.raises(SkvqError, match="layer 0: no memory") if asks else pytest.raises(MemoryError):
            if asks:
                sdpa(new[2], *handles, enable_gqa=True)
            else:
                waits.update(*(x[:, :, :1] for x in new[:2]))
    else:
        with pytest.raises(MemoryError):
            waits.update(*new[:2])
    assert (waits.waiting, waits.get_seq_length(), waits.version, dict(waits.seen)) == before
    waits.native = store
    if waits_for_queries:
        sdpa(new[2], *handles, enable_gqa=True)
    else:
        give(waits, given_rows, 30, 200)
    give(straight, given_rows, 30, 200, shown=True)
    assert_alike(waits, straight)


def test_a_crop_that_fails_changes_nothing() -> None:
    given_rows = rows(200)
    packed = layer(window=16, **STATIC)
    give(packed, given_rows, 0, 200)
    keys, order, store = packed.keys, packed.order, packed.native

    class Failing(_Failing):
        def clone(self) -> Any:
            raise MemoryError("no memory")

    packed.native = Failing(store)  # type: ignore[assignment]
    with pytest.raises(MemoryError):
        packed.crop(1 - packed.get_seq_length())
    assert packed.order is order
    packed.native = store
    assert torch.equal(packed.keys, keys)  # type: ignore[arg-type]


def test_rows_with_a_gradient_wait_without_it() -> None:
    given_rows = rows(100)
    waits, straight = layer(**BLOCK), layer(**BLOCK)
    keys, values = (x[:, :, :30].clone().requires_grad_() for x in given_rows[:2])
    with torch.enable_grad():
        with pytest.warns(UserWarning, match="no gradient flows"):
            returned = waits.update(keys, values)
        assert returned[0] is keys
        assert returned[1] is values
        later = waits.update(*(x[:, :, 30:100].clone().requires_grad_() for x in given_rows[:2]))
        query = given_rows[2][:, :, 99:].clone().requires_grad_()
        sdpa(query, *later, enable_gqa=True).sum().backward()
    assert query.grad is not None
    assert keys.grad is None
    give(straight, given_rows, 0, 100)
    for one in (waits, straight):
        give(one, given_rows, 0, 100)
    assert torch.equal(waits.keys, straight.keys)  # type: ignore[arg-type]


def test_rows_that_wait_are_the_layers_own() -> None:
    """A model may write into its tensors after the call."""
    keys, values, _ = rows(30)
    waits = layer(**STATIC)
    given_keys = keys.clone()
    waits.update(given_keys, values)
    given_keys.zero_()
    assert torch.equal(waits.keys, keys)  # type: ignore[arg-type]


def test_layers_that_share_keys_are_told_apart() -> None:
    """Two attentions read every call: their queries count as those of two attentions that read one call."""
    given_rows = rows(100)
    other = given_rows[2].flip(3)
    waits, straight = layer(**BLOCK), layer(**BLOCK)
    for one, cuts in ((waits, (0, 20, 21, 50, 100)), (straight, (0, 100))):
        for begin, end in pairwise(cuts):
            handles = one.update(*(x[:, :, begin:end] for x in given_rows[:2]))
            for query in (given_rows[2], other):
                sdpa(query[:, :, begin:end], *handles, enable_gqa=True)
        give(one, rows(200, seed=1), 0, 200)
    assert_alike(waits, straight)
    assert waits.native.query_factors(0, 0) is not None


def test_queries_with_a_gap() -> None:
    first, last = torch.ones(1, 2, 4, 3), 2 * torch.ones(1, 2, 2, 3)
    seen = SeenQueries(first, 4)
    assert torch.equal(seen.followed_by(last, 6).query, torch.cat([first, last], 2))
    assert seen.followed_by(last, 9).begin == 7
    assert seen.of(4, 9) is None
    assert seen.of(0, 4) is not None
    assert seen.first(0) is None
    part = seen.first(3)
    assert part is not None
    assert (part.begin, part.end) == (0, 3)
    # what was not seen at the end of a text that is stored does not hide what was
    given_rows = rows(200)
    waits = layer(window=16, **BLOCK)
    give(waits, given_rows, 0, 20, shown=True)
    give(waits, given_rows, 20, 200)
    assert waits.settle().packed_tokens >= 128
    assert waits.native.query_factors(0, 0) is None  # of 20 tokens: too few


# ---- models


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_a_text_within_the_window_is_that_of_the_stock_cache(family: str) -> None:
    """At low bits too: nothing leaves the window. First few tokens that wait, then a store without packed rows."""
    model = build(family)
    for length, new in ((9, 30), (9, 80), (70, 50)):
        options = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        cache = QuantizedDynamicCache(model.config, window=length + new)
        wanted = model.generate(
            prompts(2, length), **cache_argument(model, DynamicCache(config=model.config)), **options
        )
        assert torch.equal(model.generate(prompts(2, length), **cache_argument(model, cache), **options), wanted)
        layers = [one for one in cache.layers if isinstance(one, PackedLayer)]
        assert all((one.waiting is not None) == (length + new < 64) for one in layers)
        assert all(one.figures().packed == 0 for one in layers)


def test_a_prompt_in_parts_is_packed_as_the_whole() -> None:
    """The first layer, whose keys do not hang on attention, has the same sinks and, but for rounding, the same rows."""
    model, ids = build("llama"), prompts(2, 400)
    caches = [QuantizedDynamicCache(model.config, window=32) for _ in range(2)]
    model(ids, **cache_argument(model, caches[0]))
    for begin, end in pairwise((0, 30, 31, 400)):
        model(ids[:, begin:end], **cache_argument(model, caches[1]))
    whole, parts = (cache.layers[0] for cache in caches)
    assert torch.equal(whole.order, parts.order)
    torch.testing.assert_close(parts.keys, whole.keys, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(parts.values, whole.values, atol=1e-3, rtol=1e-3)

"""Sinks of the evaluation's stepping cache (skvq/evaluate/method_cache.py): chosen when the packed cache does it."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from skvq import QuantizedDynamicCache
from skvq.evaluate import MethodCache, parse_method
from skvq.sinks import inverse_order, reordered
from test_waiting import STATIC, rows
from tiny_models import CONFIGS

SINKS, WINDOW = 5, 90


def method_layer(spec: str = "rtn:bits=3,sink_search=64") -> Any:
    return MethodCache(CONFIGS["llama"](), parse_method(spec), WINDOW, SINKS).layers[0]


def give(to: Any, given: tuple[Tensor, ...], begin: int, end: int) -> tuple[Tensor, Tensor]:
    keys, values = to.update(*(x[:, :, begin:end] for x in given[:2]))
    return keys, values


def assert_alike(one: Any, other: Any) -> None:
    assert one.packed_tokens == other.packed_tokens
    assert torch.equal(one.order, other.order)
    assert torch.equal(one.keys, other.keys)
    assert torch.equal(one.values, other.values)


@pytest.mark.parametrize("parts", [(30, 370), (1,) * 70, (63, 1, 300), (64, 100), (10, 20, 33, 2, 200)])
@pytest.mark.parametrize("spec", ["rtn:bits=3,sink_search=64", "kivi:bits=2,group=16,sink_search=64"])
def test_calls_do_not_matter(spec: str, parts: tuple[int, ...]) -> None:
    total, given = sum(parts), rows(sum(parts))
    whole, stepped = method_layer(spec), method_layer(spec)
    give(whole, given, 0, total)
    for begin, end in pairwise((0, *accumulate(parts))):
        found = give(stepped, given, begin, end)
        if begin < 64:  # exact up to the call with which sinks are chosen
            assert all(torch.equal(x, exact[:, :, :end]) for x, exact in zip(found, given, strict=False))
    assert_alike(whole, stepped)
    packed: Any = QuantizedDynamicCache(CONFIGS["llama"](), window=WINDOW, sinks=SINKS, **STATIC).layers[0]
    packed.update(*given[:2])
    assert torch.equal(packed.order, whole.order)


def test_crops() -> None:
    given, more = rows(300), rows(200, seed=1)
    cropped, never = method_layer(), method_layer()
    give(cropped, given, 0, 90)
    cropped.crop(-30)
    give(never, given, 0, 60)
    for one in (cropped, never):
        assert one.order is None
        give(one, more, 0, 200)
    assert_alike(cropped, never)
    # packed rows stay, with the sinks that were chosen
    packed = method_layer()
    give(packed, given, 0, 300)
    last = int(packed.order[:, :SINKS].max())
    before = reordered(packed.keys, inverse_order(packed.order))
    with pytest.raises(ValueError, match=f"a crop to {last} tokens: expected all chosen sinks"):
        packed.crop(last - 300)
    assert packed.get_seq_length() == 300
    packed.crop(last + 1 - 300)
    assert packed.packed_tokens == last + 1 - SINKS
    keys, _ = give(packed, more, 0, 200)
    assert torch.equal(keys[:, :, : last + 1], before[:, :, : last + 1])
    packed.crop(-packed.get_seq_length())
    give(packed, given, 0, 300)
    fresh = method_layer()
    give(fresh, given, 0, 300)
    assert_alike(packed, fresh)

"""Counted bits of a method: of packed elements, and of all stored elements at a length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .methods.base import Geometry, Method
from .region_rule import RegionRule

EXACT_BITS = 16.0


@dataclass(frozen=True)
class CountedBits:
    """Means over the full-attention layers, weighted by their elements."""

    key_bits: float  # of a packed element
    value_bits: float
    bits: float  # of both
    bits_at_length: float  # of a stored element at the measured length: sinks, window and waiting rows at 16 bits
    packed_tokens: int  # at that length


def counted_bits(method: Method, rule: RegionRule, layers: Sequence[Geometry], length: int) -> CountedBits:
    """The bits of a store of `length` tokens."""
    elements = [layer.width for layer in layers]
    keys, values = (
        sum(method.bits(layer, stream) * count for layer, count in zip(layers, elements, strict=True)) / sum(elements)
        for stream in (True, False)
    )
    packed = rule.packed(length)
    both = (keys + values) / 2
    at_length = (packed * both + (length - packed) * EXACT_BITS) / length
    return CountedBits(keys, values, both, at_length, packed)

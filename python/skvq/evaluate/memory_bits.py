"""Counted bits of a method: of packed elements, and of all stored elements at a length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    packed_tokens: int  # at that length, of the layer with fewest


def counted_bits(
    method: Method, rule: Callable[[int], RegionRule], layers: Sequence[Geometry], length: int
) -> CountedBits:
    """The bits of stores of `length` tokens; `rule` gives the regions of a layer."""
    elements = sum(layer.width for layer in layers)
    keys = values = at_length = 0.0
    for layer in layers:
        packed, own = rule(layer.layer).packed(length), [method.bits(layer, stream) for stream in (True, False)]
        keys += layer.width * own[0]
        values += layer.width * own[1]
        at_length += layer.width * (packed * sum(own) / 2 + (length - packed) * EXACT_BITS) / length
    keys, values, at_length = keys / elements, values / elements, at_length / elements
    fewest = min(rule(layer.layer).packed(length) for layer in layers)
    return CountedBits(keys, values, (keys + values) / 2, at_length, fewest)

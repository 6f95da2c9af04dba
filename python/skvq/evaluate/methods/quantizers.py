"""Arithmetic that several methods share: levels, counted bits of codes, minimum/maximum and listed-level quantizers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ...reference import METADATA, round_metadata
from .base import Method

TERNARY = (1.5, 1.6)  # "1.5 bit" of the SKVQ paper is three levels
GRID_BITS = (8, 6, 5, 4, 3, 2, *TERNARY, 1)


def check_bits(name: str, bits: float, allowed: tuple[float, ...] = GRID_BITS) -> float:
    """`bits` if it is allowed, else ValueError."""
    if isinstance(bits, bool) or bits not in allowed:
        raise ValueError(f"{name}={bits!r}: expected one of {', '.join(f'{x:g}' for x in allowed)}")
    return bits


def check_metadata(metadata: str) -> int:
    """Bits of one stored scale or zero point. Raises ValueError for another name than "e4m3" and "fp16"."""
    if metadata not in METADATA:
        raise ValueError(f"metadata={metadata!r}: expected one of {', '.join(map(repr, METADATA))}")
    return 8 * METADATA[metadata][0].itemsize


def level_count(bits: float) -> int:
    """Levels of a code of so many bits; 1.5 and 1.6 are three levels."""
    return 3 if bits in TERNARY else round(2**bits)


def code_bits(bits: float, width: int) -> float:
    """Bits of a stored code, on average over a row of `width`: ternary codes go five to a byte."""
    return 8 * math.ceil(width / 5) / width if bits in TERNARY else bits


def bits_label(key_bits: float, value_bits: float) -> str:
    """Like 2-bit, or K2 V1.6."""
    return f"{key_bits:g}-bit" if key_bits == value_bits else f"K{key_bits:g} V{value_bits:g}"


def group_size(wanted: int, width: int) -> int:
    """`wanted` channels, or the whole row where that is not longer. Raises ValueError if groups do not fill the row."""
    if wanted < 1:
        raise ValueError(f"group={wanted}: expected a positive number of channels")
    if width > wanted and width % wanted:
        raise ValueError(f"group={wanted}: expected a divisor of {width} channels, or at least as many")
    return min(wanted, width)


def min_max(groups: Tensor, axis: int, levels: int, metadata: str = "fp16", clip: float = 1.0) -> Tensor:
    """Asymmetric quantization between the minimum and the maximum along `axis`, each times `clip`.

    Minimum and step are rounded to `metadata`, and codes are made with the rounded ones.
    """
    low, high = groups.amin(axis, keepdim=True) * clip, groups.amax(axis, keepdim=True) * clip
    step = round_metadata((high - low) / (levels - 1), metadata)
    low = round_metadata(low, metadata)
    codes = ((groups - low) / step.clamp(min=1e-8)).round().clamp(0, levels - 1)
    return codes * step + low


def grouped_min_max(rows: Tensor, group: int, levels: int, metadata: str = "fp16", clip: float = 1.0) -> Tensor:
    """`min_max` of every row in groups of `group` channels."""
    groups = rows.unflatten(-1, (-1, group_size(group, rows.shape[-1])))
    return min_max(groups, -1, levels, metadata, clip).flatten(-2)


def nearest_level(rows: Tensor, levels: Tensor) -> Tensor:
    """Every element replaced by the nearest of `levels` (ascending)."""
    return levels[torch.bucketize(rows.contiguous(), (levels[1:] + levels[:-1]) / 2)]


@dataclass(eq=False)
class TwoStreams(Method):
    """A method with bits for keys and bits for values; its name is made in `__post_init__`."""

    ALLOWED_BITS: ClassVar[tuple[float, ...]] = GRID_BITS

    key_bits: float = 2
    value_bits: float = 2
    name: str = field(init=False)

    def __post_init__(self) -> None:
        check_bits("key_bits", self.key_bits, self.ALLOWED_BITS)
        check_bits("value_bits", self.value_bits, self.ALLOWED_BITS)

    def stream_bits(self, keys: bool) -> float:
        """Bits of a code of keys, or of values."""
        return self.key_bits if keys else self.value_bits

    @property
    def bits_label(self) -> str:
        """For the name, see `bits_label`."""
        return bits_label(self.key_bits, self.value_bits)

"""KIVI (Liu et al., arXiv 2402.02750): keys per channel in groups of tokens, values per token in groups of channels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import Geometry, Where
from .quantizers import TwoStreams, code_bits, group_size, grouped_min_max, level_count, min_max


@dataclass(eq=False)
class Kivi(TwoStreams):
    """Minimum and step in fp16 for every group: 3.0 bits at 2-bit codes and groups of 32.

    A group of tokens is packed when all its rows have left the window, KIVI's residual.
    """

    group: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group < 1:
            raise ValueError(f"group={self.group}: expected a positive number")
        self.unit = self.group
        self.name = f"KIVI {self.bits_label} g{self.group}"

    def bits(self, geometry: Geometry, keys: bool) -> float:
        """Codes and 32 bits a group."""
        bits = self.stream_bits(keys)
        group = self.group if keys else group_size(self.group, geometry.head_dim)
        return code_bits(bits, geometry.head_dim) + 32 / group

    def fake_quantize(self, rows: Tensor, where: Where) -> Tensor:
        """Whole groups of tokens."""
        if where.keys:
            return min_max(rows.unflatten(2, (-1, self.group)), 3, level_count(self.key_bits)).flatten(2, 3)
        return grouped_min_max(rows, self.group, level_count(self.value_bits))

"""Round to nearest, per token and group of channels, between minimum and maximum: what "naive" means in the papers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import Geometry, Where
from .quantizers import TwoStreams, check_metadata, code_bits, group_size, grouped_min_max, level_count


@dataclass(eq=False)
class Rtn(TwoStreams):
    """Asymmetric groups of `group` channels of one token; a step and a minimum of type `metadata` for each."""

    group: int = 128
    metadata: str = "fp16"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_metadata(self.metadata)
        self.name = f"RTN {self.bits_label} g{self.group}"
        if self.metadata != "fp16":
            self.name += f" {self.metadata}"

    def bits(self, geometry: Geometry, keys: bool) -> float:
        """Codes and two numbers a group."""
        bits = self.stream_bits(keys)
        metadata = 2 * check_metadata(self.metadata) / group_size(self.group, geometry.head_dim)
        return code_bits(bits, geometry.head_dim) + metadata

    def fake_quantize(self, rows: Tensor, where: Where) -> Tensor:
        """Row by row."""
        levels = level_count(self.stream_bits(where.keys))
        return grouped_min_max(rows, self.group, levels, self.metadata)

"""Round to nearest, per token and group of channels, between minimum and maximum: what "naive" means in the papers."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from .base import Geometry, Method, Where
from .quantizers import bits_label, check_bits, check_metadata, code_bits, group_size, grouped_min_max, level_count


@dataclass(eq=False)
class Rtn(Method):
    """Asymmetric groups of `group` channels of one token; a step and a minimum of type `metadata` for each."""

    key_bits: float = 2
    value_bits: float = 2
    group: int = 128
    metadata: str = "fp16"
    name: str = field(init=False)

    def __post_init__(self) -> None:
        check_bits("key_bits", self.key_bits)
        check_bits("value_bits", self.value_bits)
        check_metadata(self.metadata)
        self.name = f"RTN {bits_label(self.key_bits, self.value_bits)} g{self.group}"
        if self.metadata != "fp16":
            self.name += f" {self.metadata}"

    def bits(self, geometry: Geometry, keys: bool) -> float:
        """Codes and two numbers a group."""
        bits = self.key_bits if keys else self.value_bits
        metadata = 2 * check_metadata(self.metadata) / group_size(self.group, geometry.head_dim)
        return code_bits(bits, geometry.head_dim) + metadata

    def fake_quantize(self, rows: Tensor, where: Where) -> Tensor:
        """Row by row."""
        levels = level_count(self.key_bits if where.keys else self.value_bits)
        return grouped_min_max(rows, self.group, levels, self.metadata)

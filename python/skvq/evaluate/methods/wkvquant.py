"""WKVQuant's two-dimensional quantization (Yue et al., arXiv 2402.12065): static per channel, then dynamic per token.

Every channel is shifted and scaled to [-1, 1] by its range over calibration texts, then every group of channels of a
token is rounded between its minimum and maximum. The paper learns shift and scale by gradient; here they are the
range, its starting point.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .base import Geometry, Where
from .quantizers import TwoStreams, code_bits, group_size, grouped_min_max, level_count

if TYPE_CHECKING:
    from ..calibration_rows import CalibrationRows

SMALLEST_RANGE = 1e-6


@dataclass(eq=False)
class Wkvquant(TwoStreams):
    """Groups of `group` channels with fp16 minimum and step."""

    key_bits: float = 4
    value_bits: float = 4
    group: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        self.needs_calibration = True
        self._channels: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}  # shift and scale [Hkv, 1, D]
        self.name = f"WKVQuant-like {self.bits_label} g{self.group}"

    def prepare(self, rows: CalibrationRows) -> None:
        """Ranges of channels."""
        from ..calibration_rows import SINKS

        for layer in rows.layers:
            chunks = list(rows.of_layer(layer))
            for keys in (True, False):
                streams = [chunk.stream(keys)[:, SINKS:] for chunk in chunks]
                low = torch.stack([x.amin(1, keepdim=True) for x in streams]).amin(0)
                high = torch.stack([x.amax(1, keepdim=True) for x in streams]).amax(0)
                scale = ((high - low) / 2).clamp(min=SMALLEST_RANGE)
                self._channels[layer, keys] = ((high + low) / 2, scale)

    def bits(self, geometry: Geometry, keys: bool) -> float:
        """Codes and two fp16 numbers a group."""
        codes = code_bits(self.stream_bits(keys), geometry.head_dim)
        return codes + 32 / group_size(self.group, geometry.head_dim)

    def fake_quantize(self, rows: Tensor, where: Where) -> Tensor:
        """Token by token."""
        shift, scale = self.fitted(self._channels, where.layer, where.keys)
        levels = level_count(self.stream_bits(where.keys))
        return grouped_min_max((rows - shift) / scale, self.group, levels) * scale + shift

"""OSCAR-like (arXiv 2605.17757): rotations per head that follow the attention, then clipped groups of a token.

Keys are turned to the eigenvectors of the queries' second moment, values to those of the attention outputs'; a
Hadamard transform spreads what remains over the channels, in bit-reversed order. Groups of a token have an fp16
minimum and step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...reference import hadamard
from .base import Geometry, Where
from .quantizers import (
    TwoStreams,
    check_metadata,
    code_bits,
    group_size,
    grouped_min_max,
    level_count,
)

if TYPE_CHECKING:
    from ..calibration_rows import CalibrationRows

OUTPUTS = 1024  # last queries of a chunk whose attention outputs are used


@dataclass(eq=False)
class Oscar(TwoStreams):
    """The clips are the paper's."""

    group: int = 128
    key_clip: float = 0.96
    value_clip: float = 0.92
    metadata: str = "fp16"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_metadata(self.metadata)
        for option in ("key_clip", "value_clip"):
            if not 0.0 < getattr(self, option) <= 1.0:
                raise ValueError(f"{option}={getattr(self, option)!r}: expected a number above 0 and up to 1")
        self.needs_calibration = True
        self._rotations: dict[tuple[int, bool], Tensor] = {}  # [Hkv, D, D], rows are turned by x @ U
        self.name = f"OSCAR-like {self.bits_label} g{self.group}"

    def prepare(self, rows: CalibrationRows) -> None:
        """Second moments of queries and of attention outputs, and their eigenvectors."""
        for layer in rows.layers:
            moments: dict[bool, Tensor] = {}
            for chunk in rows.of_layer(layer):
                outputs = chunk.attention_output(chunk.keys, chunk.values, OUTPUTS)
                for keys, vectors in ((True, chunk.queries), (False, outputs)):
                    flat = vectors.flatten(1, 2).double()
                    moments[keys] = moments.get(keys, 0) + flat.mT @ flat
            for keys, moment in moments.items():
                # Largest first.
                self._rotations[layer, keys] = torch.linalg.eigh(moment).eigenvectors.flip(-1).float()

    def bits(self, geometry: Geometry, keys: bool) -> float:
        """Codes and two numbers a group."""
        codes = code_bits(self.stream_bits(keys), geometry.head_dim)
        return codes + 2 * check_metadata(self.metadata) / group_size(self.group, geometry.head_dim)

    def fake_quantize(self, rows: Tensor, where: Where) -> Tensor:
        """Token by token."""
        rotation = self.fitted(self._rotations, where.layer, where.keys)
        order = bit_reversal(rows.shape[-1])
        bits, clip = (self.key_bits, self.key_clip) if where.keys else (self.value_bits, self.value_clip)
        y = hadamard(rows @ rotation)[..., order]
        y = grouped_min_max(y, self.group, level_count(bits), self.metadata, clip)
        return hadamard(y[..., order.argsort()]) @ rotation.mT


def bit_reversal(width: int) -> Tensor:
    """The order of reversed binary digits; the identity where the width is not a power of two."""
    if width & (width - 1):
        return torch.arange(width)
    digits = width.bit_length() - 1
    return torch.tensor([int(format(i, f"0{digits}b")[::-1], 2) if digits else 0 for i in range(width)])

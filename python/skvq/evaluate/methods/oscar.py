"""OSCAR-like (arXiv 2605.17757): rotations that follow the attention, then clipped groups of a token.

Keys are turned to the eigenvectors of the queries' second moment, values to those of a moment weighted by attention; a
Hadamard transform spreads what remains over the channels, in bit-reversed order (R = U·H·P). A row is clipped at a
quantile of its magnitudes, and its groups have an fp16 minimum and step. That is the released code's arithmetic, but
for rotations, which are of a head here and of a layer there. Its window of 256, its 64 sinks and its float32 scales
are not used: all methods share the comparison's window and sinks, metadata are fp16.

Keys are not centred, there as here: where keys have a large constant part (the biases of Qwen2 and Qwen2.5) the step
follows that part, in which tokens do not differ, and the method collapses.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...reference import hadamard, round_metadata
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
    from ..calibration_rows import CalibrationRows, RowsOfLayer

OUTPUTS = 1024  # last queries of a chunk whose attention outputs are used
BOUND = 0.9810652732849121  # between the outer and the inner of four Lloyd-Max levels of a normal variable
STEP = 1.16 * 2 * 1.5095585584640503 / 3  # of the even levels that the release reads such codes back with


@dataclass(eq=False)
class Oscar(TwoStreams):
    """The clips are the paper's: the share of a row's magnitudes below the largest that is kept.

    `value_moment` "scores": values weighted by kᵀ(QᵀQ)k, as the release does; "outputs": the moment of the attention
    outputs, as the paper writes it. `levels` "lloyd-max", for 2 bits: the release's later codes, of a row's distance
    from its mean in standard deviations.
    """

    group: int = 128
    key_clip: float = 0.96
    value_clip: float = 0.92
    value_moment: str = "scores"
    levels: str = "uniform"
    metadata: str = "fp16"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_metadata(self.metadata)
        for option in ("key_clip", "value_clip"):
            if not 0.0 < getattr(self, option) <= 1.0:
                raise ValueError(f"{option}={getattr(self, option)!r}: expected a number above 0 and up to 1")
        choices = {"value_moment": ("scores", "outputs"), "levels": ("uniform", "lloyd-max")}
        for option, allowed in choices.items():
            if getattr(self, option) not in allowed:
                raise ValueError(f"{option}={getattr(self, option)!r}: expected {' or '.join(map(repr, allowed))}")
        if self.levels == "lloyd-max" and (self.key_bits, self.value_bits) != (2, 2):
            raise ValueError(f"levels='lloyd-max': expected 2 bits, not {self.bits_label}")
        self.needs_calibration = True
        self._rotations: dict[tuple[int, bool], Tensor] = {}  # [Hkv, D, D], rows are turned by x @ U
        self.name = f"OSCAR-like {self.bits_label}"
        self.name += f" g{self.group}" if self.levels == "uniform" else " Lloyd-Max"
        self.name += " outputs" if self.value_moment == "outputs" else ""

    def prepare(self, rows: CalibrationRows) -> None:
        """Second moments of queries and of weighted values, and their eigenvectors, of the smallest first."""
        for layer in rows.layers:
            queries = _sum(_square(chunk.queries.flatten(1, 2)) for chunk in rows.of_layer(layer))
            values = _sum(self._value_moment(chunk, queries) for chunk in rows.of_layer(layer))
            for keys, moment in ((True, queries), (False, values)):
                self._rotations[layer, keys] = torch.linalg.eigh(moment).eigenvectors.float()

    def _value_moment(self, chunk: RowsOfLayer, queries: Tensor) -> Tensor:
        """[Hkv, D, D] of one chunk, float64; `queries` is the sum of qqᵀ of all chunks."""
        if self.value_moment == "outputs":
            return _square(chunk.attention_output(chunk.keys, chunk.values, OUTPUTS).flatten(1, 2))
        keys = chunk.keys.double()
        weights = ((keys @ queries) * keys).sum(-1, keepdim=True)
        return _square(chunk.values * weights.clamp(min=0).sqrt())

    def bits(self, geometry: Geometry, keys: bool) -> float:
        """Codes and two numbers a group, or a row."""
        codes = code_bits(self.stream_bits(keys), geometry.head_dim)
        group = group_size(self.group, geometry.head_dim) if self.levels == "uniform" else geometry.head_dim
        return codes + 2 * check_metadata(self.metadata) / group

    def fake_quantize(self, rows: Tensor, where: Where) -> Tensor:
        """Token by token."""
        rotation = self.fitted(self._rotations, where.layer, where.keys)
        order = bit_reversal(rows.shape[-1]).flip(0)
        bits, clip = (self.key_bits, self.key_clip) if where.keys else (self.value_bits, self.value_clip)
        y = clip_rows(hadamard(rows @ rotation)[..., order], clip)
        if self.levels == "uniform":
            y = grouped_min_max(y, self.group, level_count(bits), self.metadata)
        else:
            y = _by_deviation(y, self.metadata)
        return hadamard(y[..., order.argsort()]) @ rotation.mT


def clip_rows(rows: Tensor, share: float) -> Tensor:
    """Rows [..., D] whose magnitudes do not exceed the one that is `share`·D places above the smallest of its row."""
    width = rows.shape[-1]
    place = min(int(share * width), width - 1)
    limit = rows.abs().sort(dim=-1).values[..., place : place + 1]
    return rows.clamp(-limit, limit)


def _by_deviation(rows: Tensor, metadata: str) -> Tensor:
    """Two bits: bounds of Lloyd-Max levels around a row's mean, read back as four even levels."""
    mean = rows.mean(-1, keepdim=True)
    deviation = rows.var(-1, unbiased=False, keepdim=True).add(1e-8).sqrt()
    codes = torch.bucketize((rows - mean) / deviation, torch.tensor([-BOUND, 0.0, BOUND]), right=True)
    step = round_metadata(STEP * deviation, metadata)
    return codes * step + round_metadata(mean - 1.5 * STEP * deviation, metadata)


def _square(rows: Tensor) -> Tensor:
    """Σ xxᵀ of rows [Hkv, n, D], float64 [Hkv, D, D]."""
    rows = rows.double()
    return rows.mT @ rows


def _sum(moments: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(moments)).sum(0)


def bit_reversal(width: int) -> Tensor:
    """The order of reversed binary digits; the identity where the width is not a power of two."""
    if width & (width - 1):
        return torch.arange(width)
    digits = width.bit_length() - 1
    return torch.tensor([int(format(i, f"0{digits}b")[::-1], 2) if digits else 0 for i in range(width)])

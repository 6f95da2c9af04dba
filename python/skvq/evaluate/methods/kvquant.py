"""KVQuant-like (Hooper et al., arXiv 2401.18079): non-uniform levels, keys per channel before RoPE, sparse outliers.

Keys: every channel is brought to [-1, 1] by quantiles of calibration texts. Values: every token by its own range. The
levels of a layer are the centres of k-means on normalized calibration values, keys drawn as often as queries use their
channel (for the paper's Fisher weights). The largest `outliers` of every token stay exact, and are counted with 16 bits
of value and 16 of index.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ...models import ExtraNotInstalledError
from ...reference import round_metadata
from ..rope import before_rope
from .base import Geometry, Where
from .quantizers import TwoStreams, nearest_level

if TYPE_CHECKING:
    from ..calibration_rows import CalibrationRows, RowsOfLayer

OUTLIER_BITS = 32
SAMPLES = 40_000  # of normalized values, for the levels
ROWS = 4096  # of calibration, for quantiles


@dataclass(frozen=True)
class _Stream:
    levels: Tensor  # [2^bits], ascending
    centre: Tensor | None = None  # [Hkv, 1, D], keys only
    scale: Tensor | None = None


@dataclass(eq=False)
class Kvquant(TwoStreams):
    """`outliers`: the share of a token's elements that stay exact (0: none); `pre_rope`: keys before RoPE."""

    ALLOWED_BITS: ClassVar[tuple[float, ...]] = (4, 3, 2)

    outliers: float = 0.01
    pre_rope: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.outliers < 0.5:
            raise ValueError(f"outliers={self.outliers!r}: expected a share from 0 to below 0.5")
        self.before_rope, self.needs_calibration = self.pre_rope, True
        self._streams: dict[tuple[int, bool], _Stream] = {}
        self.name = f"KVQuant-like {self.bits_label}"
        self.name += f" {100 * self.outliers:g} %" if self.outliers else ""
        self.name += "" if self.pre_rope else " post-RoPE"

    def prepare(self, rows: CalibrationRows) -> None:
        """Ranges of key channels, and the levels of every layer."""
        for layer in rows.layers:
            chunks = list(rows.of_layer(layer))
            self._streams[layer, True] = self._fit_keys(chunks)
            self._streams[layer, False] = self._fit_values(chunks)

    def _fit_keys(self, chunks: list[RowsOfLayer]) -> _Stream:
        from ..calibration_rows import SINKS

        keys = torch.cat([(x.keys_before_rope if self.pre_rope else x.keys)[:, SINKS:] for x in chunks], dim=1)
        keys = keys[:, :: max(1, keys.shape[1] // ROWS)]
        tail = max(self.outliers, 1e-4) / 2
        low, high = torch.quantile(keys, torch.tensor([tail, 1 - tail]), dim=1, keepdim=True)
        centre, scale = (high + low) / 2, ((high - low) / 2).clamp(min=1e-6)
        use = torch.stack([x.queries.square().mean((1, 2)) for x in chunks]).mean(0)[:, None]  # [Hkv, 1, D]
        normal = ((keys - centre) / scale).clamp(-1, 1)
        weight = (use * scale.square()).expand_as(normal)
        return _Stream(fit_levels(normal, weight, self.key_bits), centre, scale)

    def _fit_values(self, chunks: list[RowsOfLayer]) -> _Stream:
        from ..calibration_rows import SINKS

        tokens = torch.cat([x.values[:, SINKS:] for x in chunks], dim=1).transpose(0, 1).flatten(1)
        tokens = tokens[:: max(1, tokens.shape[0] // ROWS)]
        _, low, high = self._value_range(tokens)
        normal = _normalized(tokens, low, high).clamp(-1, 1)
        return _Stream(fit_levels(normal, torch.ones_like(normal), self.value_bits))

    def _count(self, width: int) -> int:
        return max(1, round(self.outliers * width)) if self.outliers else 0

    def _value_range(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which elements of tokens [..., width] are outliers, and the fp16 range [..., 1] of the others."""
        middle = tokens.median(-1, keepdim=True).values
        extreme = _largest((tokens - middle).abs(), self._count(tokens.shape[-1]))
        low = tokens.masked_fill(extreme, torch.inf).amin(-1, keepdim=True)
        high = tokens.masked_fill(extreme, -torch.inf).amax(-1, keepdim=True)
        return extreme, round_metadata(low, "fp16"), round_metadata(high, "fp16")

    def bits(self, geometry: Geometry, keys: bool) -> float:
        """Codes, outliers, and for values two fp16 numbers a token; what is fixed per channel is not counted."""
        sparse = OUTLIER_BITS * self._count(geometry.width) / geometry.width
        return self.key_bits + sparse if keys else self.value_bits + sparse + 32 / geometry.width

    def fake_quantize(self, rows: Tensor, where: Where) -> Tensor:
        """Token by token."""
        stream = self.fitted(self._streams, where.layer, where.keys)
        if not where.keys:
            tokens = rows.transpose(1, 2).flatten(2)
            extreme, low, high = self._value_range(tokens)
            read = nearest_level(_normalized(tokens, low, high), stream.levels)
            read = torch.where(extreme, tokens, read * (high - low) / 2 + (high + low) / 2)
            return read.unflatten(2, (rows.shape[1], -1)).transpose(1, 2)
        if self.pre_rope:
            return before_rope(rows, where.rope, where.start, lambda x: self._keys(x, stream))
        return self._keys(rows, stream)

    def _keys(self, rows: Tensor, stream: _Stream) -> Tensor:
        assert stream.centre is not None
        assert stream.scale is not None
        normal = (rows - stream.centre) / stream.scale
        tokens = normal.transpose(1, 2).flatten(2)
        extreme = _largest(tokens.abs(), self._count(tokens.shape[-1]))
        extreme = extreme.unflatten(2, (rows.shape[1], -1)).transpose(1, 2)
        return torch.where(extreme, rows, nearest_level(normal, stream.levels) * stream.scale + stream.centre)


def _normalized(tokens: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return (tokens - (high + low) / 2) / ((high - low) / 2).clamp(min=1e-6)


def _largest(size: Tensor, count: int) -> Tensor:
    """Which are the `count` largest of the last axis, as booleans."""
    found = torch.zeros(size.shape, dtype=torch.bool)
    return found.scatter_(-1, size.topk(count, dim=-1).indices, True) if count else found


def fit_levels(normal: Tensor, weight: Tensor, bits: float) -> Tensor:
    """Centres of k-means on a sample of `normal`, each value drawn with a probability in proportion to its weight."""
    try:
        from scipy.cluster.vq import kmeans2
    except ImportError:
        raise ExtraNotInstalledError("non-uniform levels need scipy: pip install scipy") from None
    values, weights = normal.flatten(), weight.flatten().double()
    generator = torch.Generator().manual_seed(0)
    reach = weights.cumsum(0)
    drawn = torch.searchsorted(reach, torch.rand(SAMPLES, generator=generator, dtype=torch.float64) * reach[-1])
    sample = values[drawn.clamp(max=values.numel() - 1)].double()
    start = torch.quantile(sample, (torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits)
    centres, _ = kmeans2(sample[:, None].numpy(), start[:, None].numpy(), minit="matrix", iter=50)
    return torch.from_numpy(centres[:, 0]).float().sort().values

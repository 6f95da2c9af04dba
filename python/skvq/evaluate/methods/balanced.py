"""Balanced transforms: keys and values through the linear transform that costs attention least, then one scale a row.

Fitted: a matrix for every layer and kv head (`calibrate.transform`), keys weighted by their queries, values by the
output projection. Taken from the rows: the mean of every block of tokens, which follows the slow drift of keys after
RoPE, and one spread. Hence codes of a symmetric Lloyd–Max grid, whose stored scale is Σd² / Σd·C: inner products with
a row that is read back are right on average, where the scale of least squared error would shrink them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ...calibrate.moments import centred_by_block
from ...calibrate.output_weight import output_weight
from ...calibrate.transform import balanced_transform
from ...config import FORMATS
from ...reference import LARGEST_SCALE, ReferenceCodec
from .base import Geometry, Where
from .quantizers import TwoStreams

if TYPE_CHECKING:
    from ..calibration_rows import CalibrationRows


@dataclass(eq=False)
class Balanced(TwoStreams):
    """Formats of the packed cache at `key_bits` and `value_bits`, behind calibrated matrices.

    `block`: tokens that share a mean. `unbiased`: the stored scale described above, else the one of the codec.
    """

    ALLOWED_BITS: ClassVar[tuple[float, ...]] = (4, 3, 2, 1.6, 1.5)

    block: int = 256
    damping: float = 1e-3
    unbiased: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.unit, self.waits, self.needs_calibration = self.block, "exists", True
        self.name = f"balanced {self.bits_label}"
        self.name += "" if self.unbiased else " (norm scale)"
        self._fitted: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}

    def prepare(self, rows: CalibrationRows) -> None:
        """Second moments of every layer in float64, and their transforms."""
        for layer in rows.layers:
            moments: dict[str, Tensor] = {}
            for chunk in rows.of_layer(layer):
                queries = chunk.queries.double().flatten(1, 2)
                _add(moments, "weight", queries.mT @ queries)
                _add(moments, "keys", self._block_moment(chunk.keys))
                _add(moments, "values", self._block_moment(chunk.values))
            weight = output_weight(rows.model, layer, *moments["values"].shape[:2])
            for keys in (True, False):
                name = "keys" if keys else "values"
                matrix, inverse = balanced_transform(moments[name], moments["weight"] if keys else weight, self.damping)
                self._fitted[layer, keys] = matrix.float(), inverse.float()

    def _block_moment(self, rows: Tensor) -> Tensor:
        """Σ (x - μ)(x - μ)ᵀ over whole blocks of rows [H, T, D], μ the block's mean: [H, D, D]."""
        from ..calibration_rows import SINKS

        centred = centred_by_block(rows[:, SINKS:].double(), self.block)
        if not centred.shape[1]:
            raise ValueError(
                f"calibration chunk of {rows.shape[1] - SINKS} tokens behind the sinks, expected {self.block}"
            )
        return centred.mT @ centred

    def _codec(self, keys: bool, head_dim: int) -> ReferenceCodec:
        name, _ = FORMATS[self.stream_bits(keys)]
        return ReferenceCodec(head_dim=head_dim, format=name, rotation="identity", unbiased=self.unbiased)

    def bits(self, geometry: Geometry, keys: bool) -> float:
        """Codes, scales, and of every block a mean per channel and one spread, both fp16."""
        statistics = 16 * (geometry.head_dim + 1) / (self.block * geometry.head_dim)
        return self._codec(keys, geometry.head_dim).bits_per_element + statistics

    def fake_quantize(self, rows: Tensor, where: Where) -> Tensor:
        """Block by block."""
        matrix, inverse = self.fitted(self._fitted, where.layer, where.keys)
        codec = self._codec(where.keys, rows.shape[-1])
        blocks = rows.unflatten(2, (-1, self.block))
        mean = blocks.mean(3, keepdim=True).clamp(-LARGEST_SCALE, LARGEST_SCALE).half().float()
        y = torch.einsum("bhntc,hjc->bhntj", blocks - mean, matrix)
        spread = y.square().mean((3, 4), keepdim=True).sqrt().clamp(2.0**-14, LARGEST_SCALE).half().float()
        y = y / spread
        read = codec.fake_quantize(y) * spread
        return (torch.einsum("bhntj,hcj->bhntc", read, inverse) + mean).flatten(2, 3)


def _add(moments: dict[str, Tensor], name: str, moment: Tensor) -> None:
    moments[name] = moments[name] + moment if name in moments else moment

"""The row codec in plain torch: the oracle of the tests and the simulator of the quality measurements.

Is: every format, rule, codebook and statistic of src/FORMAT.md, in the arithmetic order given there, so that its codes
and metadata equal the native codec's bit for bit. Is not: fast, and not used on the way of a generated token.
Shapes: rows [..., D] float32; codes [..., D] uint8 (format 1.5: [..., D/2]; parts: those of each part in order); scales
and zero points [..., D/G] float32; packed rows [..., row_bytes] uint8. Levels and bytes of codes are in
reference_codes.py, rows of parts in reference_parts.py, regions, blocks in time and attention in reference_layer.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .reference_codes import LEVEL_COUNTS, LevelCodes
from .reference_parts import HeadMap, RowParts

LANES = 16
FORMATS = (*LEVEL_COUNTS, "raw", "parts")
METADATA = {"e4m3": (torch.float8_e4m3fn, 448.0), "fp16": (torch.float16, 65504.0)}
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-14, 65504.0
QUERY_FLOOR = 1e-6  # of the mean square of queries over channels: less counts as this much

Statistics = tuple[Tensor, Tensor]


def round_metadata(x: Tensor, metadata: str) -> Tensor:
    """Round to the metadata type (nearest even, saturating; NaN stays NaN) and back to float32."""
    dtype, limit = METADATA[metadata]
    return x.clamp(-limit, limit).to(dtype).to(torch.float32)


def hadamard(x: Tensor) -> Tensor:
    """Orthonormal Walsh-Hadamard transform of the last axis, in blocks of the largest power of two that divides it."""
    width = x.shape[-1]
    block = width & -width
    h = 1
    while h < block:
        pairs = x.reshape(*x.shape[:-1], width // (2 * h), 2, h)
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack((low + high, low - high), dim=-2).reshape(x.shape)
        h *= 2
    return x * torch.tensor(1.0 / math.sqrt(block), dtype=torch.float32)


def lane_sum(x: Tensor) -> Tensor:
    """Sum of the last axis (a multiple of 16) in the order of FORMAT.md section 3.4."""
    parts = x.reshape(*x.shape[:-1], x.shape[-1] // LANES, LANES)
    total = parts[..., 0, :]
    for index in range(1, parts.shape[-2]):
        total = total + parts[..., index, :]
    for width in (8, 4, 2, 1):
        total = total[..., :width] + total[..., width : 2 * width]
    return total[..., 0]


# ---- the codec -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantized:
    """Codes and rounded metadata of rows: what the packed bytes mean."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None


class ReferenceCodec:
    """How the rows of one stream are packed; keywords as in `skvq._native.Codec`. `raw` rows are float32 here."""

    def __init__(
        self,
        *,
        head_dim: int,
        format: str,
        group_size: int | None = None,
        metadata: str = "e4m3",
        symmetric: bool = True,
        codebook: str | Sequence[float] | Sequence[tuple[float, float]] | None = None,
        rule: str = "norm",
        clip: float = 1.0,
        refinements: int = 0,
        unbiased: bool = False,
        rotation: str | None = None,
        permutation: Sequence[int] | Sequence[Sequence[int]] | None = None,
        block: int = 0,
        block_shift: bool = True,
        scale_exponent: float = 1.0,
        query_exponent: float = 0.0,
        shift: Tensor | None = None,
        scale: Tensor | None = None,
        parts: Sequence[tuple[int, int]] | None = None,
        matrix: Tensor | None = None,
        inverse: Tensor | None = None,
        shift_sine: Tensor | None = None,
        frequencies: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> None:
        _one_of("format", format, FORMATS)
        _one_of("metadata", metadata, tuple(METADATA))
        _one_of("rule", rule, ("norm", "range"))
        rotation = rotation or ("identity" if format == "parts" else "hadamard")
        _one_of("rotation", rotation, ("identity",) if format == "parts" else ("identity", "hadamard"))
        if head_dim <= 0 or head_dim % LANES:
            raise ValueError(f"head_dim={head_dim}: expected a positive multiple of {LANES}")
        of_parts = {"parts": parts, "matrix": matrix, "inverse": inverse, "shift_sine": shift_sine}
        of_parts |= {"frequencies": frequencies, "noise": noise}
        of_others: dict[str, Any] = {"group_size": group_size, "permutation": permutation, "scale": scale}
        of_others |= {"symmetric": None if symmetric else False, "rule": None if rule == "norm" else rule}
        of_others |= {"refinements": refinements or None, "unbiased": unbiased or None, "block": block or None}
        for name, value in (of_others if format == "parts" else of_parts).items():
            if value is not None:
                raise ValueError(f"{name}: expected none with format={format!r}")
        if format == "parts":
            group_size = head_dim
        if group_size is None:
            group_size = min(128, head_dim) if head_dim % min(128, head_dim) == 0 else head_dim
        if group_size not in (32, 64, 128, head_dim) or head_dim % group_size:
            raise ValueError(f"group_size={group_size}: expected 32, 64, 128 or head_dim={head_dim}, dividing head_dim")
        if block < 0 or block % 128:
            raise ValueError(f"block={block}: expected 0 or a multiple of 128")
        if block and (shift is not None or scale is not None):
            raise ValueError(f"block={block}: expected block=0 with a static shift or scale")
        for name, exponent in (("scale_exponent", scale_exponent), ("query_exponent", query_exponent)):
            if not 0.0 <= exponent <= 1.0:
                raise ValueError(f"{name}={exponent}: expected a number from 0 to 1")
        self.head_dim, self.format, self.group_size, self.metadata = head_dim, format, group_size, metadata
        self.symmetric, self.rule, self.refinements, self.rotation = symmetric, rule, refinements, rotation
        self.unbiased = unbiased
        self.clip = torch.tensor(clip, dtype=torch.float32)
        self.block, self.block_shift, self.scale_exponent = block, block_shift, scale_exponent
        self.query_exponent = query_exponent if block and format != "raw" else 0.0
        self.shift = None if shift is None else torch.as_tensor(shift, dtype=torch.float32)
        self.scale = None if scale is None else torch.as_tensor(scale, dtype=torch.float32)
        self.permutation = None if permutation is None else torch.as_tensor(permutation, dtype=torch.int64)
        self.map: HeadMap | None = None
        self._coder: LevelCodes | RowParts | None = None
        if format == "parts":
            if not isinstance(codebook, str | None):
                raise ValueError(f"codebook={codebook!r}: expected a name with parts")
            self._coder = RowParts(parts or (), head_dim, codebook or "lloyd-max")
            self.map = HeadMap(head_dim, matrix, inverse, shift, shift_sine, frequencies, noise)
        elif format != "raw":
            self._coder = LevelCodes(format, codebook)

    @property
    def coder(self) -> LevelCodes | RowParts:
        """Levels and codes. Raises ValueError for rows that are kept as they are."""
        if self._coder is None:
            raise ValueError(f"format={self.format!r}: rows have no codes")
        return self._coder

    @property
    def code_bytes(self) -> int:
        return 4 * self.head_dim if self._coder is None else self._coder.bytes_of(self.head_dim)

    @property
    def metadata_bytes(self) -> int:
        if self.format == "raw":
            return 0
        width = METADATA[self.metadata][0].itemsize
        return self.head_dim // self.group_size * width * (1 if self.symmetric else 2)

    @property
    def row_bytes(self) -> int:
        return self.code_bytes + self.metadata_bytes

    @property
    def statistics_bytes(self) -> int:
        """Bytes of one block's statistics for one sequence and head."""
        if not self.block:
            return 0
        return 2 * self.head_dim * self.block_shift + (2 * self.head_dim if self._scales_differ else 2)

    @property
    def _scales_differ(self) -> bool:
        return self.scale_exponent > 0.0 or self.query_exponent > 0.0

    @property
    def bits_per_element(self) -> float:
        """Codes, metadata and block statistics; pages, sinks and window are counted by the layer."""
        statistics = self.statistics_bytes / self.block if self.block else 0.0
        return 8.0 * (self.row_bytes + statistics) / self.head_dim

    def levels(self) -> list[float] | list[tuple[float, float]]:
        """The codebook: levels, or pairs for format "1.5". Raises ValueError for parts, each of which has its own."""
        if isinstance(self.coder, RowParts):
            raise ValueError("format='parts': expected one format for all channels")
        if self.format == "1.5":
            return [(float(x), float(y)) for x, y in self.coder.levels]
        return [float(level) for level in self.coder.levels]

    def block_statistics(self, rows: Tensor, factors: Tensor | None = None) -> Statistics:
        """Shift and scale [..., D] of the rows [..., N, D] of one block; rows that are not finite are left out. The
        `factors` [..., D] of `query_factors` go into the scales.
        """
        finite = torch.isfinite(rows).all(-1, keepdim=True)
        x = torch.where(finite, rows, 0.0).to(torch.float64)
        count = finite.sum(-2).clamp(min=1).to(torch.float64)
        mean = x.sum(-2) / count if self.block_shift else torch.zeros_like(x[..., 0, :])
        shift = mean.clamp(-LARGEST_SCALE, LARGEST_SCALE).to(torch.float32).to(torch.float16).to(torch.float32)
        variance = (torch.where(finite, x - shift[..., None, :].to(torch.float64), 0.0) ** 2).sum(-2) / count
        deviation, common = variance.sqrt(), variance.mean(-1, keepdim=True).sqrt()
        if not self._scales_differ:
            scale = common.expand_as(deviation)
        else:
            stand_in = 0.5 * self.query_exponent if factors is None else 0.0
            exponent = min(1.0, self.scale_exponent + stand_in)
            scale = deviation**exponent * common ** (1.0 - exponent)
            scale = scale if factors is None else scale * factors.to(torch.float64)
        rounded = scale.clamp(SMALLEST_SCALE, LARGEST_SCALE).to(torch.float32).to(torch.float16).to(torch.float32)
        return shift, torch.where(scale == 0.0, 1.0, rounded)

    def transform(self, rows: Tensor, head: int, statistics: Statistics | None, *, position: int = 0) -> Tensor:
        """Rows as the quantizer sees them; `position` is that of the first row along axis -2."""
        if self.map is not None:
            return self.map.forward(rows, head, position)
        shift, scale = self._shift_and_scale(head, statistics)
        y = rows if shift is None else rows - shift
        y = y if scale is None else y * (1.0 / scale)
        y = hadamard(y) if self.rotation == "hadamard" else y
        return y if self.permutation is None else y[..., self._permutation(head)]

    def inverse_transform(self, y: Tensor, head: int, statistics: Statistics | None, *, position: int = 0) -> Tensor:
        """What `transform` has done, undone."""
        if self.map is not None:
            return self.map.back(y, head, position)
        if self.permutation is not None:
            y = y[..., self._permutation(head).argsort()]
        y = hadamard(y) if self.rotation == "hadamard" else y
        shift, scale = self._shift_and_scale(head, statistics)
        y = y if scale is None else y * scale
        return y if shift is None else y + shift

    def quantize(
        self,
        rows: Tensor,
        head: int = 0,
        statistics: Statistics | None = None,
        nonfinite: str = "raise",
        *,
        position: int = 0,
    ) -> Quantized:
        """Codes, scales and zero points of rows [..., D]; `statistics` must broadcast against the rows.

        For a mean that turns, row i along axis -2 is at `position` + i.
        """
        _one_of("nonfinite", nonfinite, ("raise", "propagate"))
        if rows.shape[-1] != self.head_dim or rows.dtype != torch.float32:
            raise ValueError(f"rows: expected float32 [..., {self.head_dim}], got {rows.dtype} {tuple(rows.shape)}")
        finite = torch.isfinite(rows).all(-1)
        y = self.transform(torch.where(finite[..., None], rows, 0.0), head, statistics, position=position)
        y = y.reshape(*y.shape[:-1], self.head_dim // self.group_size, self.group_size)
        scale, zero = self._scale_and_zero(y)
        finite = finite & ~torch.isnan(scale).any(-1) & ~torch.isnan(zero).any(-1)
        if nonfinite == "raise" and not bool(finite.all()):
            raise ValueError(f"rows: {int((~finite).sum())} of {finite.numel()} are not finite")
        grouped = self._nearest(y, scale, zero)
        if self.unbiased:
            scale = self._unbiased_scale(y, scale, zero, grouped)
        codes = torch.where(finite[..., None], grouped.flatten(-2), 0)
        scale = torch.where(finite[..., None], scale, math.nan)
        return Quantized(codes, scale, None if self.symmetric else torch.where(finite[..., None], zero, 0.0))

    def dequantize(
        self, quantized: Quantized, head: int = 0, statistics: Statistics | None = None, *, position: int = 0
    ) -> Tensor:
        """Rows [..., D] as they are read back."""
        groups = self.head_dim // self.group_size
        codes = quantized.codes.reshape(*quantized.codes.shape[:-1], groups, -1)
        y = quantized.scale[..., None] * self.coder.values(codes)
        if quantized.zero is not None:
            y = y + quantized.zero[..., None]
        return self.inverse_transform(y.flatten(-2), head, statistics, position=position)

    def encode(
        self,
        rows: Tensor,
        head: int = 0,
        statistics: Statistics | None = None,
        nonfinite: str = "raise",
        *,
        position: int = 0,
    ) -> Tensor:
        """Rows [..., D] to bytes [..., row_bytes]."""
        if self.format == "raw":
            return rows.to(torch.float32).contiguous().view(torch.uint8)
        quantized = self.quantize(rows, head, statistics, nonfinite, position=position)
        dtype, _ = METADATA[self.metadata]
        parts = [quantized.scale] if quantized.zero is None else [quantized.scale, quantized.zero]
        metadata = torch.cat(parts, dim=-1).to(dtype).contiguous().view(torch.uint8)
        return torch.cat([self.coder.pack(quantized.codes), metadata], dim=-1)

    def decode(
        self, packed: Tensor, head: int = 0, statistics: Statistics | None = None, *, position: int = 0
    ) -> Tensor:
        """Bytes [..., row_bytes] to rows [..., D]."""
        if packed.shape[-1] != self.row_bytes:
            raise ValueError(f"packed: expected [..., {self.row_bytes}], got {tuple(packed.shape)}")
        if self.format == "raw":
            return packed.contiguous().view(torch.float32)
        dtype, _ = METADATA[self.metadata]
        metadata = packed[..., self.code_bytes :].contiguous().view(dtype).to(torch.float32)
        groups = self.head_dim // self.group_size
        zero = None if self.symmetric else metadata[..., groups:]
        codes = self.coder.unpack(packed[..., : self.code_bytes], self.head_dim)
        return self.dequantize(Quantized(codes, metadata[..., :groups], zero), head, statistics, position=position)

    def query_factors(self, squares: Tensor) -> Tensor | None:
        """Factors [..., D] on the scales of the channels from the mean squares [..., D] (float64) of the queries; None
        if the codec takes none, or all squares are 0.
        """
        mean = squares.mean(-1, keepdim=True)
        if not self.query_exponent or not bool((mean > 0.0).all()):
            return None
        logs = 0.5 * torch.maximum(squares, QUERY_FLOOR * mean).log()
        factors = ((logs.mean(-1, keepdim=True) - logs) * self.query_exponent).exp()
        return factors.to(torch.float32).to(torch.float16).to(torch.float32)

    def fake_quantize(
        self,
        x: Tensor,
        head: int = 0,
        statistics: Statistics | None = None,
        *,
        position: int = 0,
        factors: Tensor | None = None,
    ) -> Tensor:
        """Encode and decode x [..., D] in its own dtype. With a block and no statistics, x is [..., T, D], every
        complete block of T takes its own statistics (with `factors` [..., D], see `query_factors`), and a last
        incomplete block is returned as it is.
        """
        if self.format == "raw":
            return x
        rows = x.to(torch.float32)
        if not self.block or statistics is not None:
            quantized = self.quantize(rows, head, statistics, position=position)
            return self.dequantize(quantized, head, statistics, position=position).to(x.dtype)
        whole = rows.shape[-2] // self.block * self.block
        blocks = rows[..., :whole, :].unflatten(-2, (whole // self.block, self.block))
        shift, scale = self.block_statistics(blocks, None if factors is None else factors[..., None, :])
        statistics = (shift[..., None, :], scale[..., None, :])
        decoded = self.dequantize(self.quantize(blocks, head, statistics), head, statistics).flatten(-3, -2)
        return torch.cat([decoded.to(x.dtype), x[..., whole:, :]], dim=-2)

    def _shift_and_scale(self, head: int, statistics: Statistics | None) -> tuple[Tensor | None, Tensor | None]:
        if statistics is not None:
            return statistics
        if self.block:
            raise ValueError(f"statistics=None: expected (shift, scale), since block={self.block}")
        return (None if self.shift is None else self.shift[head], None if self.scale is None else self.scale[head])

    def _permutation(self, head: int) -> Tensor:
        assert self.permutation is not None
        return self.permutation if self.permutation.ndim == 1 else self.permutation[head]

    def _scale_and_zero(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Rounded scale and zero point [..., groups] of y [..., groups, G]."""
        size = torch.tensor(float(self.coder.coded(y).shape[-1]))
        zero = torch.zeros_like(y[..., 0])
        if self.rule == "norm":
            if not self.symmetric:
                zero = round_metadata(lane_sum(y) / size, self.metadata)
            d = self.coder.coded(y - zero[..., None])
            # Rounded once, as the processor does: torch's own square root of float32 may be a unit off.
            scale = self.clip * torch.sqrt((lane_sum(d * d) / size).to(torch.float64)).to(torch.float32)
        elif self.symmetric:
            scale = self.clip * y.abs().amax(-1) / self._largest_level()
        else:
            high, low = y.amax(-1), y.amin(-1)
            zero = round_metadata(self.clip * ((high + low) * 0.5), self.metadata)
            scale = self.clip * ((high - low) * 0.5) / self._largest_level()
        scale = round_metadata(scale, self.metadata)
        d = y - zero[..., None]
        for _ in range(self.refinements):
            levels = self.coder.values(self._nearest(y, scale, zero))
            numerator, denominator = lane_sum(d * levels), lane_sum(levels * levels)
            better = round_metadata(numerator / denominator, self.metadata)
            scale = torch.where(numerator > 0.0, better, scale)
        return scale, zero

    def _largest_level(self) -> Tensor:
        assert isinstance(self.coder, LevelCodes)
        return self.coder.levels.max()

    def _unbiased_scale(self, y: Tensor, scale: Tensor, zero: Tensor, codes: Tensor) -> Tensor:
        """The scale [..., groups] with which a decoded group d̂ has <d, d̂> = |d|²; `scale` where there is none."""
        d = y - zero[..., None]
        squares, products = lane_sum(d * d), lane_sum(d * self.coder.values(codes))
        quotient = squares / products
        exists = (scale > 0.0) & (products > 0.0) & torch.isfinite(products) & torch.isfinite(quotient)
        return torch.where(exists, round_metadata(quotient, self.metadata), scale)

    def _nearest(self, y: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Codes [..., groups, G] (pairs: [..., groups, G/2]) of y [..., groups, G]."""
        inverse = torch.where(scale == 0.0, 0.0, 1.0 / scale)
        return self.coder.nearest((y - zero[..., None]) * inverse[..., None])


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, allowed))}")

"""The row codec in plain torch: the oracle of the tests and the simulator of the quality measurements.

Is: every format, rule, codebook and statistic of src/FORMAT.md, in the arithmetic order given there, so that its codes
and metadata equal the native codec's bit for bit. Is not: fast, and not used on the way of a generated token.
Shapes: rows [..., D] float32; codes [..., D] uint8 (format 1.5: [..., D/2]); scales and zero points [..., D/G] float32;
packed rows [..., row_bytes] uint8. Regions, blocks in time and attention are in reference_layer.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

LANES = 16
LEVEL_COUNTS = {"8": 256, "4": 16, "3": 8, "2": 4, "1.6": 3, "1.5": 8}
FORMATS = (*LEVEL_COUNTS, "raw")
METADATA = {"e4m3": (torch.float8_e4m3fn, 448.0), "fp16": (torch.float16, 65504.0)}
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-14, 65504.0

# The eight codewords with the least mean squared error for a standard normal pair: 0.201206327 per channel (Lloyd
# iterations on exact radial and 200000-point angular quadrature from 24 random starts; the runner-up, one centre and
# seven around it, has 0.2034).
NORMAL_PAIRS = (
    (-1.40056229, -0.844749749),
    (-1.40056229, 0.844749749),
    (-0.48093155, 0.0),
    (0.0, -1.37701225),
    (0.0, 1.37701225),
    (0.48093155, 0.0),
    (1.40056229, -0.844749749),
    (1.40056229, 0.844749749),
)

Statistics = tuple[Tensor, Tensor]


@cache
def lloyd_max_levels(count: int) -> tuple[float, ...]:
    """Levels of least mean squared error for a standard normal variable, rounded to float32 (ascending)."""
    half = count // 2
    uniform = (torch.arange(count, dtype=torch.float64)[count - half :] + 0.5) / count
    positive = torch.special.ndtri(uniform) * math.sqrt(3.0)
    for _ in range(100):
        centroid, slope_low, slope_high = _cell_centroids(positive, odd=count % 2 == 1)
        jacobian = torch.diag(1.0 - slope_low - slope_high)
        jacobian -= torch.diag(slope_low[1:], -1) + torch.diag(slope_high[:-1], 1)
        # The lowest cell starts at 0 (even count) or at half its own level (odd): it has no lower neighbour.
        jacobian[0, 0] = 1.0 - (slope_low[0] if count % 2 else 0.0) - slope_high[0]
        step = torch.linalg.solve(jacobian, positive - centroid)
        positive = positive - step
        if float(step.abs().max()) < 1e-11:
            break
    else:
        raise ArithmeticError(f"Lloyd-Max levels for count={count} did not converge")
    levels = torch.cat([-positive.flip(0), torch.zeros(count % 2, dtype=torch.float64), positive])
    return tuple(levels.to(torch.float32).tolist())


def _cell_centroids(positive: Tensor, odd: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Centroid of each cell of the positive half, and half its derivative by the cell's lower and upper border."""
    first = positive[:1] * 0.5 if odd else torch.zeros(1, dtype=torch.float64)
    low = torch.cat([first, (positive[1:] + positive[:-1]) * 0.5])
    high = torch.cat([low[1:], torch.full((1,), math.inf, dtype=torch.float64)])
    density_low, density_high = (torch.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi) for x in (low, high))
    mass = 0.5 * (torch.special.erfc(low / math.sqrt(2.0)) - torch.special.erfc(high / math.sqrt(2.0)))
    centroid = (density_low - density_high) / mass
    slope_low = 0.5 * density_low * (centroid - low) / mass
    slope_high = torch.where(torch.isinf(high), 0.0, 0.5 * density_high * (high - centroid) / mass)
    return centroid, slope_low, slope_high


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


# ---- bytes of codes --------------------------------------------------------------------------------------------------


def _pack_fields(codes: Tensor, bits: int) -> Tensor:
    """`bits` wide fields; field k of byte b is code b + k * bytes."""
    fields = codes.reshape(*codes.shape[:-1], 8 // bits, -1).to(torch.int32)
    shifts = bits * torch.arange(8 // bits, dtype=torch.int32)
    return (fields << shifts[:, None]).sum(-2).to(torch.uint8)


def _unpack_fields(packed: Tensor, bits: int) -> Tensor:
    mask = (1 << bits) - 1
    return torch.cat([(packed >> (bits * k)) & mask for k in range(8 // bits)], dim=-1)


def _pack_three_bits(codes: Tensor) -> Tensor:
    weights = 1 << torch.arange(8, dtype=torch.int32)
    high = (codes >> 2).reshape(*codes.shape[:-1], -1, 8).to(torch.int32)
    return torch.cat([_pack_fields(codes & 3, 2), (high * weights).sum(-1).to(torch.uint8)], dim=-1)


def _unpack_three_bits(packed: Tensor, count: int) -> Tensor:
    low = _unpack_fields(packed[..., : count // 4], 2)
    bits = (packed[..., count // 4 :, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return low | (bits.reshape(*packed.shape[:-1], count) << 2)


def _pack_ternary(codes: Tensor) -> Tensor:
    width = codes.shape[-1]
    bytes_per_row = -(-width // 5)
    digits = torch.nn.functional.pad(codes, (0, 5 * bytes_per_row - width)).to(torch.int32)
    digits = digits.reshape(*codes.shape[:-1], 5, bytes_per_row)
    value = torch.zeros_like(digits[..., 0, :])
    for n in range(5):
        value = value * 3 + digits[..., n, :]
    return ((256 * value + 242) // 243).to(torch.uint8)


def _unpack_ternary(packed: Tensor, count: int) -> Tensor:
    value = packed.to(torch.int32)
    digits = []
    for _ in range(5):
        value = value * 3
        digits.append(value >> 8)
        value = value & 255
    return torch.cat(digits, dim=-1)[..., :count].to(torch.uint8)


def pack_codes(codes: Tensor, code_format: str) -> Tensor:
    """Codes [..., D] (format 1.5: pair indices [..., D/2]) to bytes."""
    if code_format in ("3", "1.5"):
        return _pack_three_bits(codes)
    if code_format == "1.6":
        return _pack_ternary(codes)
    return codes if code_format == "8" else _pack_fields(codes, int(code_format))


def unpack_codes(packed: Tensor, code_format: str, head_dim: int) -> Tensor:
    """The inverse of `pack_codes`."""
    if code_format in ("3", "1.5"):
        return _unpack_three_bits(packed, head_dim if code_format == "3" else head_dim // 2)
    if code_format == "1.6":
        return _unpack_ternary(packed, head_dim)
    return packed if code_format == "8" else _unpack_fields(packed, int(code_format))


def code_bytes(code_format: str, head_dim: int) -> int:
    if code_format == "raw":
        return 4 * head_dim
    if code_format == "1.6":
        return -(-head_dim // 5)
    return {"8": 16, "4": 8, "3": 6, "2": 4, "1.5": 3}[code_format] * head_dim // 16


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
        rotation: str = "hadamard",
        permutation: Sequence[int] | Sequence[Sequence[int]] | None = None,
        block: int = 0,
        block_shift: bool = True,
        scale_exponent: float = 1.0,
        shift: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> None:
        _one_of("format", format, FORMATS)
        _one_of("metadata", metadata, tuple(METADATA))
        _one_of("rule", rule, ("norm", "range"))
        _one_of("rotation", rotation, ("identity", "hadamard"))
        if head_dim <= 0 or head_dim % LANES:
            raise ValueError(f"head_dim={head_dim}: expected a positive multiple of {LANES}")
        if group_size is None:
            group_size = min(128, head_dim) if head_dim % min(128, head_dim) == 0 else head_dim
        if group_size not in (32, 64, 128, head_dim) or head_dim % group_size:
            raise ValueError(f"group_size={group_size}: expected 32, 64, 128 or head_dim={head_dim}, dividing head_dim")
        if block < 0 or block % 128:
            raise ValueError(f"block={block}: expected 0 or a multiple of 128")
        if block and (shift is not None or scale is not None):
            raise ValueError(f"block={block}: expected block=0 with a static shift or scale")
        if not 0.0 <= scale_exponent <= 1.0:
            raise ValueError(f"scale_exponent={scale_exponent}: expected a number from 0 to 1")
        self.head_dim, self.format, self.group_size, self.metadata = head_dim, format, group_size, metadata
        self.symmetric, self.rule, self.refinements, self.rotation = symmetric, rule, refinements, rotation
        self.unbiased = unbiased
        self.clip = torch.tensor(clip, dtype=torch.float32)
        self.block, self.block_shift, self.scale_exponent = block, block_shift, scale_exponent
        self.shift = None if shift is None else torch.as_tensor(shift, dtype=torch.float32)
        self.scale = None if scale is None else torch.as_tensor(scale, dtype=torch.float32)
        self.permutation = None if permutation is None else torch.as_tensor(permutation, dtype=torch.int64)
        if codebook is None:
            codebook = "uniform" if format == "8" else "lloyd-max"
        self.uniform = isinstance(codebook, str) and codebook == "uniform"
        self.codebook = torch.zeros(0) if format == "raw" else _codebook(codebook, format)
        self._largest_level = self.codebook.max() if self.codebook.numel() else torch.zeros(())
        if format != "raw" and float(self._largest_level) <= 0.0:
            raise ValueError(f"codebook={codebook!r}: expected a positive largest level")

    @property
    def code_bytes(self) -> int:
        return code_bytes(self.format, self.head_dim)

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
        return 2 * self.head_dim * self.block_shift + (2 * self.head_dim if self.scale_exponent > 0.0 else 2)

    @property
    def bits_per_element(self) -> float:
        """Codes, metadata and block statistics; pages, sinks and window are counted by the layer."""
        statistics = self.statistics_bytes / self.block if self.block else 0.0
        return 8.0 * (self.row_bytes + statistics) / self.head_dim

    def levels(self) -> list[float] | list[tuple[float, float]]:
        if self.format == "1.5":
            return [(float(x), float(y)) for x, y in self.codebook]
        return [float(level) for level in self.codebook]

    def block_statistics(self, rows: Tensor) -> Statistics:
        """Shift and scale [..., D] of the rows [..., N, D] of one block; rows that are not finite are left out."""
        finite = torch.isfinite(rows).all(-1, keepdim=True)
        x = torch.where(finite, rows, 0.0).to(torch.float64)
        count = finite.sum(-2).clamp(min=1).to(torch.float64)
        mean = x.sum(-2) / count if self.block_shift else torch.zeros_like(x[..., 0, :])
        shift = mean.clamp(-LARGEST_SCALE, LARGEST_SCALE).to(torch.float32).to(torch.float16).to(torch.float32)
        variance = (torch.where(finite, x - shift[..., None, :].to(torch.float64), 0.0) ** 2).sum(-2) / count
        deviation, common = variance.sqrt(), variance.mean(-1, keepdim=True).sqrt()
        if self.scale_exponent == 0.0:
            scale = common.expand_as(deviation)
        else:
            scale = deviation**self.scale_exponent * common ** (1.0 - self.scale_exponent)
        rounded = scale.clamp(SMALLEST_SCALE, LARGEST_SCALE).to(torch.float32).to(torch.float16).to(torch.float32)
        return shift, torch.where(scale == 0.0, 1.0, rounded)

    def transform(self, rows: Tensor, head: int, statistics: Statistics | None) -> Tensor:
        shift, scale = self._shift_and_scale(head, statistics)
        y = rows if shift is None else rows - shift
        y = y if scale is None else y * (1.0 / scale)
        y = hadamard(y) if self.rotation == "hadamard" else y
        return y if self.permutation is None else y[..., self._permutation(head)]

    def inverse_transform(self, y: Tensor, head: int, statistics: Statistics | None) -> Tensor:
        if self.permutation is not None:
            y = y[..., self._permutation(head).argsort()]
        y = hadamard(y) if self.rotation == "hadamard" else y
        shift, scale = self._shift_and_scale(head, statistics)
        y = y if scale is None else y * scale
        return y if shift is None else y + shift

    def quantize(
        self, rows: Tensor, head: int = 0, statistics: Statistics | None = None, nonfinite: str = "raise"
    ) -> Quantized:
        """Codes, scales and zero points of rows [..., D]; `statistics` must broadcast against the rows."""
        _one_of("nonfinite", nonfinite, ("raise", "propagate"))
        if rows.shape[-1] != self.head_dim or rows.dtype != torch.float32:
            raise ValueError(f"rows: expected float32 [..., {self.head_dim}], got {rows.dtype} {tuple(rows.shape)}")
        finite = torch.isfinite(rows).all(-1)
        y = self.transform(torch.where(finite[..., None], rows, 0.0), head, statistics)
        y = y.reshape(*y.shape[:-1], self.head_dim // self.group_size, self.group_size)
        scale, zero = self._scale_and_zero(y)
        finite = finite & ~torch.isnan(scale).any(-1) & ~torch.isnan(zero).any(-1)
        if nonfinite == "raise" and not bool(finite.all()):
            raise ValueError(f"rows: {int((~finite).sum())} of {finite.numel()} are not finite")
        grouped = self._codes(y, scale, zero)
        if self.unbiased:
            scale = self._unbiased_scale(y, scale, zero, grouped)
        codes = torch.where(finite[..., None], grouped.flatten(-2), 0)
        scale = torch.where(finite[..., None], scale, math.nan)
        return Quantized(codes, scale, None if self.symmetric else torch.where(finite[..., None], zero, 0.0))

    def dequantize(self, quantized: Quantized, head: int = 0, statistics: Statistics | None = None) -> Tensor:
        groups = self.head_dim // self.group_size
        codes = quantized.codes.reshape(*quantized.codes.shape[:-1], groups, -1)
        y = quantized.scale[..., None] * self._levels_of(codes)
        if quantized.zero is not None:
            y = y + quantized.zero[..., None]
        return self.inverse_transform(y.flatten(-2), head, statistics)

    def encode(
        self, rows: Tensor, head: int = 0, statistics: Statistics | None = None, nonfinite: str = "raise"
    ) -> Tensor:
        """Rows [..., D] to bytes [..., row_bytes]."""
        if self.format == "raw":
            return rows.to(torch.float32).contiguous().view(torch.uint8)
        quantized = self.quantize(rows, head, statistics, nonfinite)
        dtype, _ = METADATA[self.metadata]
        parts = [quantized.scale] if quantized.zero is None else [quantized.scale, quantized.zero]
        metadata = torch.cat(parts, dim=-1).to(dtype).contiguous().view(torch.uint8)
        return torch.cat([pack_codes(quantized.codes, self.format), metadata], dim=-1)

    def decode(self, packed: Tensor, head: int = 0, statistics: Statistics | None = None) -> Tensor:
        """Bytes [..., row_bytes] to rows [..., D]."""
        if packed.shape[-1] != self.row_bytes:
            raise ValueError(f"packed: expected [..., {self.row_bytes}], got {tuple(packed.shape)}")
        if self.format == "raw":
            return packed.contiguous().view(torch.float32)
        dtype, _ = METADATA[self.metadata]
        metadata = packed[..., self.code_bytes :].contiguous().view(dtype).to(torch.float32)
        groups = self.head_dim // self.group_size
        zero = None if self.symmetric else metadata[..., groups:]
        codes = unpack_codes(packed[..., : self.code_bytes], self.format, self.head_dim)
        return self.dequantize(Quantized(codes, metadata[..., :groups], zero), head, statistics)

    def fake_quantize(self, x: Tensor, head: int = 0, statistics: Statistics | None = None) -> Tensor:
        """Encode and decode x [..., D] in its own dtype. With a block and no statistics, x is [..., T, D], every
        complete block of T takes its own statistics, and a last incomplete block is returned as it is.
        """
        if self.format == "raw":
            return x
        rows = x.to(torch.float32)
        if not self.block or statistics is not None:
            return self.dequantize(self.quantize(rows, head, statistics), head, statistics).to(x.dtype)
        whole = rows.shape[-2] // self.block * self.block
        blocks = rows[..., :whole, :].unflatten(-2, (whole // self.block, self.block))
        shift, scale = self.block_statistics(blocks)
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
        size = torch.tensor(float(self.group_size))
        zero = torch.zeros_like(y[..., 0])
        if self.rule == "norm":
            if not self.symmetric:
                zero = round_metadata(lane_sum(y) / size, self.metadata)
            d = y - zero[..., None]
            scale = self.clip * torch.sqrt(lane_sum(d * d) / size)
        elif self.symmetric:
            scale = self.clip * y.abs().amax(-1) / self._largest_level
        else:
            high, low = y.amax(-1), y.amin(-1)
            zero = round_metadata(self.clip * ((high + low) * 0.5), self.metadata)
            scale = self.clip * ((high - low) * 0.5) / self._largest_level
        scale = round_metadata(scale, self.metadata)
        d = y - zero[..., None]
        for _ in range(self.refinements):
            levels = self._levels_of(self._codes(y, scale, zero))
            numerator, denominator = lane_sum(d * levels), lane_sum(levels * levels)
            better = round_metadata(numerator / denominator, self.metadata)
            scale = torch.where(numerator > 0.0, better, scale)
        return scale, zero

    def _unbiased_scale(self, y: Tensor, scale: Tensor, zero: Tensor, codes: Tensor) -> Tensor:
        """The scale [..., groups] with which a decoded group d̂ has <d, d̂> = |d|²; `scale` where there is none."""
        d = y - zero[..., None]
        squares, products = lane_sum(d * d), lane_sum(d * self._levels_of(codes))
        quotient = squares / products
        exists = (scale > 0.0) & (products > 0.0) & torch.isfinite(products) & torch.isfinite(quotient)
        return torch.where(exists, round_metadata(quotient, self.metadata), scale)

    def _codes(self, y: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Codes [..., groups, G] (pairs: [..., groups, G/2]) of y [..., groups, G]."""
        inverse = torch.where(scale == 0.0, 0.0, 1.0 / scale)
        t = (y - zero[..., None]) * inverse[..., None]
        if self.format == "1.5":
            return self._pair_codes(t)
        if self.uniform:
            count = LEVEL_COUNTS[self.format]
            return torch.floor((t + (count - 1) / 2).clamp(0.0, count - 1.0) + 0.5).to(torch.uint8)
        thresholds = (self.codebook[:-1] + self.codebook[1:]) * 0.5
        return torch.bucketize(t, thresholds, right=False).to(torch.uint8)

    def _pair_codes(self, t: Tensor) -> Tensor:
        first, second = t.split(self.group_size // 2, dim=-1)
        best = torch.full_like(first, -math.inf)
        codes = torch.zeros(first.shape, dtype=torch.uint8)
        for index, (x, y) in enumerate(self.codebook):
            score = (first * x + second * y) - (x * x + y * y) * 0.5
            codes = torch.where(score > best, index, codes).to(torch.uint8)
            best = torch.maximum(score, best)
        return codes

    def _levels_of(self, codes: Tensor) -> Tensor:
        """Levels [..., groups, G] of grouped codes."""
        levels = self.codebook[codes.to(torch.int64)]
        return torch.cat([levels[..., 0], levels[..., 1]], dim=-1) if self.format == "1.5" else levels


def _codebook(codebook: str | Sequence[float] | Sequence[tuple[float, float]], code_format: str) -> Tensor:
    count = LEVEL_COUNTS[code_format]
    if isinstance(codebook, str):
        named = {"1.5": ("lloyd-max",), "8": ("uniform",)}.get(code_format, ("lloyd-max", "uniform"))
        _one_of("codebook", codebook, named)
        if codebook == "uniform":
            return torch.arange(count, dtype=torch.float32) - (count - 1) / 2
        return torch.tensor(NORMAL_PAIRS if code_format == "1.5" else lloyd_max_levels(count), dtype=torch.float32)
    levels = torch.as_tensor(codebook, dtype=torch.float32)
    shape = (count, 2) if code_format == "1.5" else (count,)
    if tuple(levels.shape) != shape or not bool(torch.isfinite(levels).all()):
        raise ValueError(f"codebook={codebook!r}: expected {shape} finite numbers for code_format {code_format!r}")
    if levels.ndim == 1 and not bool((levels[1:] > levels[:-1]).all()):
        raise ValueError(f"codebook={codebook!r}: expected ascending levels")
    return levels


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, allowed))}")

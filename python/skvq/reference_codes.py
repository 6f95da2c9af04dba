"""Codes of the row formats in plain torch: levels, the nearest level, and the bytes they are packed into.

Is: sections 1 and 5 of src/FORMAT.md and step 5 of section 3, for reference.py (one format) and reference_parts.py
(parts of several). Is not: scales, transforms.
Shapes: channels [..., n] float32 in units of their scale; codes [..., n] uint8 (format 1.5: pair indices [..., n/2]).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

LEVEL_COUNTS = {"8": 256, "4": 16, "3": 8, "2": 4, "1.6": 3, "1.5": 8}

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


# Distance of so many evenly spaced levels of least mean squared error for a standard normal variable.
EVEN_STEPS = {2: 1.5957691, 4: 0.9956867, 8: 0.5860194, 16: 0.3352006, 32: 0.1881388}


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


@cache
def evenly_spaced_levels(count: int) -> tuple[float, ...]:
    """The same of levels that are evenly spaced around 0: 2, 4, 8, 16 or 32 of them (src/FORMAT.md section 6)."""
    step = torch.tensor(EVEN_STEPS[count], dtype=torch.float32)
    return tuple(((torch.arange(count, dtype=torch.float32) - (count - 1) * 0.5) * step).tolist())


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
    return torch.cat([_pack_fields(codes & 3, 2), pack_string(codes >> 2, 1)], dim=-1)


def _unpack_three_bits(packed: Tensor, count: int) -> Tensor:
    return _unpack_fields(packed[..., : count // 4], 2) | (unpack_string(packed[..., count // 4 :], 1) << 2)


def pack_string(codes: Tensor, bits: int) -> Tensor:
    """One string of bits, the lowest first: code c has bits b·c …, bit k is bit k mod 8 of byte k div 8."""
    string = (codes[..., None] >> torch.arange(bits, dtype=torch.uint8)) & 1
    weights = 1 << torch.arange(8, dtype=torch.int32)
    return (string.flatten(-2).unflatten(-1, (-1, 8)).to(torch.int32) * weights).sum(-1).to(torch.uint8)


def unpack_string(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_string`."""
    string = (packed[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1
    weights = 1 << torch.arange(bits, dtype=torch.uint8)
    return (string.flatten(-2).unflatten(-1, (-1, bits)) * weights).sum(-1).to(torch.uint8)


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
    """Bytes that the codes of head_dim channels take."""
    if code_format == "raw":
        return 4 * head_dim
    if code_format == "1.6":
        return -(-head_dim // 5)
    return {"8": 16, "4": 8, "3": 6, "2": 4, "1.5": 3}[code_format] * head_dim // 16


# ---- levels ----------------------------------------------------------------------------------------------------------


def nearest_level(t: Tensor, levels: Tensor) -> Tensor:
    """How many of the thresholds between ascending levels are below t, which is the number of the nearest level."""
    thresholds = (levels[:-1] + levels[1:]) * 0.5
    return torch.bucketize(t.contiguous(), thresholds, right=False).to(torch.uint8)


class LevelCodes:
    """The levels of one format, and codes as indices of them; for channels [..., n] that are paired within n."""

    def __init__(
        self, code_format: str, codebook: str | Sequence[float] | Sequence[tuple[float, float]] | None = None
    ) -> None:
        if codebook is None:
            codebook = "uniform" if code_format in ("8", "2") else "lloyd-max"
        self.format = code_format
        self.uniform = isinstance(codebook, str) and codebook == "uniform"
        self.levels = _codebook(codebook, code_format)
        if float(self.levels.max()) <= 0.0:
            raise ValueError(f"codebook={codebook!r}: expected a positive largest level")

    def count(self, width: int) -> int:
        """Codes of `width` channels."""
        return width // 2 if self.format == "1.5" else width

    def bytes_of(self, width: int) -> int:
        """Bytes of the codes of `width` channels."""
        return code_bytes(self.format, width)

    def coded(self, channels: Tensor) -> Tensor:
        """Those of the channels [..., n] that have codes: all."""
        return channels

    def nearest(self, t: Tensor) -> Tensor:
        """Codes [..., n] (pairs: [..., n/2]) of t [..., n], which is in units of the scale."""
        if self.format == "1.5":
            return self._nearest_pairs(t)
        if self.uniform:
            count = LEVEL_COUNTS[self.format]
            return torch.floor((t + (count - 1) / 2).clamp(0.0, count - 1.0) + 0.5).to(torch.uint8)
        return nearest_level(t, self.levels)

    def _nearest_pairs(self, t: Tensor) -> Tensor:
        first, second = t.split(t.shape[-1] // 2, dim=-1)
        best = torch.full_like(first, -math.inf)
        codes = torch.zeros(first.shape, dtype=torch.uint8)
        for index, (x, y) in enumerate(self.levels):
            score = (first * x + second * y) - (x * x + y * y) * 0.5
            codes = torch.where(score > best, index, codes).to(torch.uint8)
            best = torch.maximum(score, best)
        return codes

    def values(self, codes: Tensor) -> Tensor:
        """The levels [..., n] that codes stand for."""
        levels = self.levels[codes.to(torch.int64)]
        return torch.cat([levels[..., 0], levels[..., 1]], dim=-1) if self.format == "1.5" else levels

    def pack(self, codes: Tensor) -> Tensor:
        """Codes of whole rows to bytes."""
        return pack_codes(codes, self.format)

    def unpack(self, packed: Tensor, width: int) -> Tensor:
        """Bytes to the codes of rows of `width` channels."""
        return unpack_codes(packed, self.format, width)


def _codebook(codebook: str | Sequence[float] | Sequence[tuple[float, float]], code_format: str) -> Tensor:
    count = LEVEL_COUNTS[code_format]
    if isinstance(codebook, str):
        named = {"1.5": ("lloyd-max",), "8": ("uniform",)}.get(code_format, ("lloyd-max", "uniform"))
        if codebook not in named:
            raise ValueError(f"codebook={codebook!r}: expected one of {', '.join(map(repr, named))}")
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

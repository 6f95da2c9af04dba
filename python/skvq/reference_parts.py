"""Rows of parts behind a matrix (src/FORMAT.md section 6) in plain torch, for the codec of reference.py.

Is: codes of several widths in one row (`RowParts`), and the linear map of a calibrated head with its mean, which may
turn with the row's position, and its noise (`HeadMap`). Is not: scales, rounding, bytes of the metadata (reference.py).
Shapes: rows [..., n, D] float32, row i of the last but one axis at position + i; y likewise; matrices [H, D, D].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .reference_codes import evenly_spaced_levels, lloyd_max_levels, nearest_level, pack_string, unpack_string

PART_WIDTH_UNIT = 16
MOST_BITS = 5
SPAN = 256  # positions that share an entry of the tables of large angles


CODEBOOKS = {"lloyd-max": lloyd_max_levels, "uniform": evenly_spaced_levels}


def part_levels(bits: int, codebook: str = "lloyd-max") -> Tensor:
    """Levels [2**bits] of a part's codes, of the codebook "lloyd-max" or "uniform"."""
    return torch.tensor(CODEBOOKS[codebook](1 << bits), dtype=torch.float32)


class RowParts:
    """Codes of rows that are cut into parts, each with its own bits; what has 0 bits, the end, reads back as 0.

    Codes [..., n] are those of the n channels with bits, which come first.
    """

    def __init__(self, parts: Sequence[tuple[int, int]], head_dim: int, codebook: str = "lloyd-max") -> None:
        if codebook not in CODEBOOKS:
            raise ValueError(f"codebook={codebook!r}: expected one of {', '.join(map(repr, CODEBOOKS))} with parts")
        self.codebook = codebook
        self.parts = tuple((int(bits), int(width)) for bits, width in parts)
        for index, (bits, width) in enumerate(self.parts):
            if not 0 <= bits <= MOST_BITS or (bits == 0 and (index + 1 < len(self.parts) or index == 0)):
                raise ValueError(f"parts={self.parts}: expected 1 to {MOST_BITS} bits, and 0 for the last only")
            if width <= 0 or width % PART_WIDTH_UNIT:
                raise ValueError(f"parts: width {width}: expected a positive multiple of {PART_WIDTH_UNIT}")
        if sum(width for _, width in self.parts) != head_dim:
            raise ValueError(f"parts={self.parts}: expected widths that add up to head_dim={head_dim}")
        self.head_dim = head_dim
        self._bits = [bits for bits, _ in self.parts if bits]
        self._widths = [width for bits, width in self.parts if bits]
        self._levels = [part_levels(bits, codebook) for bits in self._bits]

    def bytes_of(self, width: int) -> int:
        """Bytes of the codes of a row, whose width is known."""
        return sum(self._bytes())

    def _bytes(self) -> list[int]:
        return [bits * width // 8 for bits, width in zip(self._bits, self._widths, strict=True)]

    def coded(self, channels: Tensor) -> Tensor:
        """Those of the channels [..., D] that have codes."""
        return channels[..., : sum(self._widths)]

    def nearest(self, t: Tensor) -> Tensor:
        """Codes of t [..., D], which is in units of the scale."""
        pieces = zip(self.coded(t).split(self._widths, dim=-1), self._levels, strict=True)
        return torch.cat([nearest_level(piece, levels) for piece, levels in pieces], dim=-1)

    def values(self, codes: Tensor) -> Tensor:
        """The levels [..., D] that codes stand for."""
        pieces = zip(codes.to(torch.int64).split(self._widths, dim=-1), self._levels, strict=True)
        levels = torch.cat([levels[piece] for piece, levels in pieces], dim=-1)
        return torch.nn.functional.pad(levels, (0, self.head_dim - levels.shape[-1]))

    def pack(self, codes: Tensor) -> Tensor:
        """Codes of whole rows to bytes: a string of the low four bits, and of five bits one of the high ones."""
        strings = []
        for piece, bits in zip(codes.split(self._widths, dim=-1), self._bits, strict=True):
            strings.append(pack_string(piece & 15, min(bits, 4)))
            if bits > 4:
                strings.append(pack_string(piece >> 4, 1))
        return torch.cat(strings, dim=-1)

    def unpack(self, packed: Tensor, width: int) -> Tensor:
        """Bytes to the codes of rows."""
        codes = []
        for piece, bits, count in zip(packed.split(self._bytes(), dim=-1), self._bits, self._widths, strict=True):
            low = min(bits, 4) * count // 8
            high = unpack_string(piece[..., low:], 1) << 4 if bits > 4 else 0
            codes.append(unpack_string(piece[..., :low], min(bits, 4)) | high)
        return torch.cat(codes, dim=-1)


def turn_tables(frequencies: Tensor, position: int, count: int) -> tuple[Tensor, Tensor]:
    """C(t) and S(t), float32 [count, D] each, of the positions t = position, position + 1, …

    A position is SPAN·i + j; cosines and sines of both angles are computed in float64 and rounded once.
    """
    positions = torch.arange(position, position + count)
    theta = frequencies.to(torch.float64)
    far = (positions.div(SPAN, rounding_mode="floor") * SPAN)[:, None].to(torch.float64) * theta
    near = positions.remainder(SPAN)[:, None].to(torch.float64) * theta
    cos_far, sin_far, cos_near, sin_near = (x.to(torch.float32) for x in (far.cos(), far.sin(), near.cos(), near.sin()))
    return cos_far * cos_near - sin_far * sin_near, sin_far * cos_near + cos_far * sin_near


def matrix_product(matrix: Tensor, rows: Tensor) -> Tensor:
    """Rows [..., D] times a matrix [D, D], y_j = Σ_c M[j][c]·u_c: from 0, in the order of c, no step fused."""
    total, step = torch.zeros_like(rows), torch.empty_like(rows)
    columns = matrix.mT.contiguous()
    for c in range(matrix.shape[1]):
        torch.mul(rows[..., c, None], columns[c], out=step)
        total.add_(step)
    return total


class HeadMap:
    """y = M·(x - m(t)) and x = B·y + m(t), and what noise takes off a score."""

    def __init__(
        self,
        head_dim: int,
        matrix: Tensor | None,
        inverse: Tensor | None,
        shift: Tensor | None,
        shift_sine: Tensor | None,
        frequencies: Tensor | None,
        noise: Tensor | None,
    ) -> None:
        if matrix is None or inverse is None:
            raise ValueError("matrix, inverse: expected both with parts")
        if (shift_sine is None) != (frequencies is None):
            raise ValueError("shift_sine, frequencies: expected both or neither")
        if shift_sine is not None and shift is None:
            raise ValueError("shift: expected one beside shift_sine")
        heads = matrix.shape[0]
        self.matrix = _checked("matrix", matrix, (heads, head_dim, head_dim))
        self.inverse = _checked("inverse", inverse, (heads, head_dim, head_dim))
        self.shift = None if shift is None else _checked("shift", shift, (heads, head_dim))
        self.shift_sine = None if shift_sine is None else _checked("shift_sine", shift_sine, (heads, head_dim))
        self.frequencies = None if frequencies is None else _checked("frequencies", frequencies, (head_dim,))
        self.noise = None if noise is None else _checked("noise", noise, (head_dim,))
        if self.noise is not None and bool((self.noise < 0.0).any()):
            raise ValueError("noise: expected no negative number")

    def mean(self, head: int, position: int, count: int) -> Tensor:
        """m(t) of `count` positions, float32 [count, D]."""
        if self.shift is None:
            return torch.zeros(count, self.matrix.shape[-1])
        if self.shift_sine is None or self.frequencies is None:
            return self.shift[head].expand(count, -1)
        cosine, sine = turn_tables(self.frequencies, position, count)
        return self.shift[head] * cosine + self.shift_sine[head] * sine

    def forward(self, rows: Tensor, head: int, position: int) -> Tensor:
        """Rows [..., n, D] to y."""
        return matrix_product(self.matrix[head], rows - self._mean_of(rows, head, position))

    def back(self, y: Tensor, head: int, position: int) -> Tensor:
        """y to rows [..., n, D]."""
        return matrix_product(self.inverse[head], y) + self._mean_of(y, head, position)

    def _mean_of(self, rows: Tensor, head: int, position: int) -> Tensor:
        mean = self.mean(head, position, rows.shape[-2] if rows.ndim > 1 else 1)
        return mean if rows.ndim > 1 else mean[0]

    def score_noise(self, queries: Tensor, head: int) -> Tensor:
        """½·Σ_j κ_j (Bᵀq)_j² [...] of queries [..., D] that are scaled as scores are.

        Times a row's squared scale, this is taken off the score of the row.
        """
        if self.noise is None:
            return torch.zeros(queries.shape[:-1], dtype=queries.dtype)
        folded = queries @ self.inverse[head].to(queries.dtype)
        return 0.5 * (folded.square() * self.noise.to(queries.dtype)).sum(-1)


def _checked(name: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    found = torch.as_tensor(value, dtype=torch.float32)
    if tuple(found.shape) != shape or not bool(torch.isfinite(found).all()):
        raise ValueError(f"{name}: expected finite numbers {list(shape)}, got {list(found.shape)}")
    return found

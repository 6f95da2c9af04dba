"""Linear layers and embeddings that keep their weights packed, on our own product (src/backend/weights.rs).

Few rows of inputs (decoding) go through the packed codes in float32, within float noise of the same weights unpacked.
Many (prompts) go through torch's matrix product, over pieces of the weights that are unpacked for it.
Shapes: weight [O, I], groups of `group_size` inputs, G = I / group_size; hidden states [..., I] → [..., O].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import _native
from .._native import SkvqError
from .grid import QuantizedWeight

BLOCK, LANES = 128, 16  # inputs whose 4-bit codes lie together, and words that they fill
FEW_ROWS = 16  # up to which the packed product is faster than unpacking (docs/weights.md)
PIECE = 1 << 22  # weights that are unpacked at a time, 16 MiB


def pack_digits(codes: Tensor) -> Tensor:
    """Codes below 16, uint8 [O, I], as our product reads them: uint8 [O, 64 · ceil(I / 128)]."""
    padded = nn.functional.pad(codes, (0, -codes.shape[1] % BLOCK))
    digits = padded.unflatten(1, (-1, BLOCK // LANES, LANES)).transpose(2, 3)  # [O, blocks, lane, digit]
    return (digits[..., 0::2] | digits[..., 1::2] << 4).flatten(1).contiguous()


def unpack_digits(packed: Tensor, inputs: int) -> Tensor:
    """The codes of `pack_digits`, uint8 [O, inputs]."""
    halves = packed.unflatten(1, (-1, LANES, BLOCK // LANES // 2))
    digits = torch.stack([halves & 15, halves >> 4], -1).flatten(3)
    return digits.transpose(2, 3).flatten(1)[:, :inputs]


def pack_sixes(codes: Tensor) -> Tensor:
    """Codes below 64, uint8 [O, I] with I a multiple of 16, as our product reads them: uint8 [O, 12 · I / 16]."""
    vectors = codes.unflatten(1, (-1, LANES))
    low, high = vectors & 15, vectors >> 4
    halves = low[..., 0::2] | low[..., 1::2] << 4
    pairs = high[..., 0::4] | high[..., 1::4] << 2 | high[..., 2::4] << 4 | high[..., 3::4] << 6
    return torch.cat([halves, pairs], -1).flatten(1).contiguous()


def unpack_sixes(packed: Tensor) -> Tensor:
    """The codes of `pack_sixes`, uint8 [O, I]."""
    halves, pairs = packed.unflatten(1, (-1, LANES // 2 + LANES // 4)).split((LANES // 2, LANES // 4), -1)
    low = torch.stack([halves & 15, halves >> 4], -1).flatten(-2)
    high = torch.stack([pairs >> shift & 3 for shift in (0, 2, 4, 6)], -1).flatten(-2)
    return (low | high << 4).flatten(1)


class PackedWeight(nn.Module):
    """The weight of a linear layer or an embedding, packed: 4 bits for codes of up to 4 bits, 6 for those of 6, else 8.

    Buffers: codes uint8 [O, bytes of a row], scales [O, G] in bfloat16 where that is exact, else float32, zeros
    uint8 [O, G].
    """

    def __init__(self, weight: QuantizedWeight, bits: int) -> None:
        """Raises SkvqError if groups are not multiples of 32."""
        super().__init__()
        self.out_features, self.in_features = weight.codes.shape
        self.group_size, self.bits = weight.group_size, next(x for x in (4, 6, 8) if bits <= x)
        if not self.serves(weight):
            raise SkvqError(f"packed: groups of {self.group_size} inputs, expected a multiple of 32")
        half = weight.scale.bfloat16()
        scales = half if torch.equal(half.float(), weight.scale) else weight.scale.float()
        self.register_buffer("codes", self._packed(weight.codes))
        self.register_buffer("scales", scales.contiguous())
        self.register_buffer("zeros", weight.zero.to(torch.uint8).contiguous())

    def _packed(self, codes: Tensor) -> Tensor:
        if self.bits == 4:
            return pack_digits(codes)
        return pack_sixes(codes) if self.bits == 6 else codes.contiguous()

    def _unpacked(self, packed: Tensor) -> Tensor:
        if self.bits == 4:
            return unpack_digits(packed, self.in_features)
        return unpack_sixes(packed) if self.bits == 6 else packed

    @staticmethod
    def serves(weight: QuantizedWeight) -> bool:
        """Whether our product knows its group size."""
        return weight.group_size % 32 == 0

    def decoded(self) -> Tensor:
        """All of it, float32 [O, I]."""
        output = torch.empty(self.out_features, self.in_features)
        _native.weights_decode(*self._parts(), output, bits=self.bits)
        return output

    def _parts(self) -> tuple[Any, Any, Any]:
        return self.codes, self.scales, self.zeros

    def multiply(self, rows: Tensor) -> Tensor:
        """Rows [N, I] times the weight, [N, O] in their dtype; sums in float32."""
        if rows.shape[0] > FEW_ROWS:
            return self._multiply_many(rows)
        output = torch.empty(rows.shape[0], self.out_features)
        _native.weights_multiply(rows.detach().float().contiguous(), *self._parts(), output, bits=self.bits)
        return output.to(rows.dtype)

    def _multiply_many(self, rows: Tensor) -> Tensor:
        from ..models import fast_dtype

        # A processor without fast products of 16 bits does them several times slower than those of 32.
        exact = rows if str(rows.dtype) == f"torch.{fast_dtype()}" else rows.float()
        output = torch.empty(rows.shape[0], self.out_features, dtype=rows.dtype)
        step = max(1, PIECE // self.in_features)
        piece = torch.empty(min(step, self.out_features), self.in_features)
        for first in range(0, self.out_features, step):
            weights = piece[: min(step, self.out_features - first)]
            _native.weights_decode(*self._parts(), weights, bits=self.bits, first=first)
            output[:, first : first + step] = exact @ weights.to(exact.dtype).T
        return output

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the weight, float32 [..., I], for int64 ids [...] below O."""
        codes, scales, zeros = (part[ids.flatten()] for part in self._parts())
        groups = self._unpacked(codes).unflatten(1, (-1, self.group_size)).float()
        made: Tensor = ((groups - zeros[..., None].float()) * scales[..., None].float()).flatten(1)
        return made.unflatten(0, ids.shape)

    def extra_repr(self) -> str:
        """Sizes, for people."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bits={self.bits}, group_size={self.group_size}"


class PackedLinear(nn.Module):
    """A linear layer: hidden [..., I] → [..., O] in the same dtype."""

    def __init__(self, weight: PackedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.packed = weight
        self.out_features, self.in_features = weight.out_features, weight.in_features
        self.register_buffer("bias", None if bias is None else bias.detach())

    @property
    def weight(self) -> Tensor:
        """Unpacked, float32 [O, I], made anew whenever it is asked for."""
        return self.packed.decoded()

    def forward(self, hidden: Tensor) -> Tensor:
        made = self.packed.multiply(hidden.reshape(-1, self.in_features)).unflatten(0, hidden.shape[:-1])
        return made if self.bias is None else made + self.bias


class PackedEmbedding(nn.Module):
    """An embedding: ids [...] → rows [..., I] in `dtype`, times the model's factor."""

    def __init__(self, weight: PackedWeight, dtype: torch.dtype, factor: float) -> None:
        super().__init__()
        self.packed, self.dtype, self.factor = weight, dtype, factor

    def forward(self, ids: Tensor) -> Tensor:
        return (self.packed.rows(ids) * self.factor).to(self.dtype)

"""Codes in the words of compressed-tensors' `pack-quantized` format.

A stream of `bits`-bit codes, least significant bits first, in int32 words: element i of a row has the bits
[i·bits, (i+1)·bits) of the row, and may reach over two words (3 bits). Weights are packed along their inputs, zero
points along the outputs. Codes are unsigned here; for compressed-tensors the same bits are signed
numbers plus 2^(bits−1).
Shapes: codes uint8 [R, N], words int32 [R, ⌈N · bits / 32⌉].
"""

from __future__ import annotations

import torch
from torch import Tensor

from .grid import QuantizedWeight, WeightOptions

WORD = 32


def pack(codes: Tensor, bits: int) -> Tensor:
    """Words of rows of codes."""
    rows, count = codes.shape
    padded = -(-count // WORD) * WORD
    values = torch.nn.functional.pad(codes.to(torch.int64), (0, padded - count)).unflatten(1, (-1, WORD))
    words = torch.zeros(rows, padded // WORD, bits, dtype=torch.int64)
    for index in range(WORD):
        word, offset = divmod(index * bits, WORD)
        words[..., word] |= values[..., index] << offset
        if offset + bits > WORD:
            words[..., word + 1] |= values[..., index] >> (WORD - offset)
    low = words.flatten(1)[:, : -(-count * bits // WORD)] & 0xFFFFFFFF
    return (low - ((low >> 31) << 32)).to(torch.int32).contiguous()


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of every row."""
    rows, stored = words.shape
    groups = -(-count // WORD)
    held = torch.nn.functional.pad(words.to(torch.int64) & 0xFFFFFFFF, (0, groups * bits - stored))
    held = held.unflatten(1, (groups, bits))
    codes = torch.empty(rows, groups, WORD, dtype=torch.uint8)
    for index in range(WORD):
        word, offset = divmod(index * bits, WORD)
        value = held[..., word] >> offset
        if offset + bits > WORD:
            value = value | (held[..., word + 1] << (WORD - offset))
        codes[..., index] = (value & (2**bits - 1)).to(torch.uint8)
    return codes.flatten(1)[:, :count].contiguous()


def packed_tensors(weight: QuantizedWeight, options: WeightOptions) -> dict[str, Tensor]:
    """The tensors of one linear layer: weight_packed, weight_scale, weight_zero_point, weight_shape."""
    return {
        "weight_packed": pack(weight.codes, options.bits),
        "weight_scale": weight.scale.clone(),
        "weight_zero_point": pack(weight.zero.T, options.bits).T.contiguous(),
        "weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int64),
    }


def unpacked_weight(packed: Tensor, scale: Tensor, zero: Tensor, shape: tuple[int, int], bits: int) -> QuantizedWeight:
    """The inverse of `packed_tensors`."""
    outputs, inputs = shape
    zeros = unpack(zero.T.contiguous(), bits, outputs).T.contiguous()
    return QuantizedWeight(unpack(packed, bits, inputs), scale.float(), zeros)

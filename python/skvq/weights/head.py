"""The output layer and the embedding at 8, 6 or 4 bits, rounded when a checkpoint is loaded.

They are a quarter of a small model: left in 16 bits they outweigh the quantized decoder. Is: one copy of the codes for
both where the model ties them, on our own product. Is not: part of the checkpoint, whose output layer and embedding
stay plain.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._native import SkvqError
from .blocks import replace_module
from .grid import QuantizedWeight, WeightOptions, encode
from .product import PackedEmbedding, PackedLinear, PackedWeight

HEAD_BITS = (16, 8, 6, 4)
MIDDLE, LARGEST = 128, 127.0  # of symmetric 8-bit codes
GROUP = 32  # inputs of a group of 4-bit codes; at 8 bits a row has one scale
SIX_BIT_GROUPS = (128, 64, GROUP)  # the first that divides the inputs
ROWS = 1 << 14  # that are rounded at a time


def quantized_head(weight: Tensor, bits: int) -> QuantizedWeight:
    """A weight [V, H]: 8 bits with a scale for each row, 6 or 4 bits between minimum and maximum of each group."""
    group = GROUP if bits == 4 else next(x for x in SIX_BIT_GROUPS if weight.shape[1] % x == 0)
    options = WeightOptions(bits, group)
    parts = [_eight_bits(rows) if bits == 8 else encode(rows.float(), options) for rows in weight.split(ROWS)]
    return QuantizedWeight(*(torch.cat([getattr(part, x) for part in parts]) for x in ("codes", "scale", "zero")))


def _eight_bits(rows: Tensor) -> QuantizedWeight:
    scale = (rows.float().abs().amax(1, keepdim=True) / LARGEST).clamp(min=2.0**-24).bfloat16().float()
    codes = (rows.float() / scale).round_().clamp_(-LARGEST, LARGEST) + MIDDLE
    return QuantizedWeight(codes.to(torch.uint8), scale, torch.full(scale.shape, MIDDLE, dtype=torch.uint8))


def quantize_head(model: Any, bits: int) -> None:
    """Replace output layer and embedding.

    Raises:
        SkvqError: the output layer has a bias, is not a linear layer, or its inputs are no multiple of 32.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not isinstance(head, nn.Linear) or getattr(head, "bias", None) is not None or head.in_features % GROUP:
        expected = f"a linear layer without bias and with a multiple of {GROUP} inputs"
        raise SkvqError(f"head_bits={bits}: the output layer is {head}, expected {expected}")
    tied = head.weight.data_ptr() == embedding.weight.data_ptr()
    factor, dtype = float(getattr(embedding, "embed_scale", 1.0)), embedding.weight.dtype
    made = PackedWeight(quantized_head(head.weight.data, bits), bits)
    table = made if tied else PackedWeight(quantized_head(embedding.weight.data, bits), bits)
    replace_module(model, _name_of(model, head), PackedLinear(made, None))
    replace_module(model, _name_of(model, embedding), PackedEmbedding(table, dtype, factor))


def _name_of(model: Any, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)

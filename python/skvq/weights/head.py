"""The output layer and the embedding at 8 bits, rounded when a checkpoint is loaded.

They are a quarter of a small model: left in 16 bits they outweigh the quantized decoder. Is: a scale for each row, one
copy of the codes for both where the model ties them, torch's own int8 product. Is not: part of the checkpoint, whose
output layer and embedding stay plain.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._native import SkvqError
from .blocks import replace_module

LARGEST = 127.0


class Int8Linear(nn.Module):
    """An output layer with codes int8 [V, H] and a scale for each row: input [..., H], output [..., V]."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        scale = (weight.float().abs().amax(1) / LARGEST).clamp(min=2.0**-24).to(torch.bfloat16)
        codes = (weight.float() / scale.float()[:, None]).round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    def forward(self, hidden: Tensor) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1]).to(torch.bfloat16).contiguous()
        made = torch.ops.aten._weight_int8pack_mm(rows, self.codes, self.scale)
        return made.to(hidden.dtype).unflatten(0, hidden.shape[:-1])


class Int8Rows(nn.Module):
    """The embedding that reads the codes of an `Int8Linear`; ids [...] → rows [..., H] times the model's factor."""

    def __init__(self, table: Int8Linear, dtype: torch.dtype, factor: float) -> None:
        super().__init__()
        codes: Any = table.codes
        scale: Any = table.scale
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.dtype, self.factor = dtype, factor

    def forward(self, ids: Tensor) -> Tensor:
        codes: Any = self.codes
        scale: Any = self.scale
        made = codes[ids].float() * (scale[ids].float() * self.factor)[..., None]
        return made.to(self.dtype)


def quantize_head(model: Any) -> None:
    """Replace output layer and embedding.

    Raises:
        SkvqError: the output layer has a bias, or is not a linear layer.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not isinstance(head, nn.Linear) or getattr(head, "bias", None) is not None:
        raise SkvqError(f"head_bits=8: the output layer is {head}, expected a linear layer without bias")
    tied = head.weight.data_ptr() == embedding.weight.data_ptr()
    factor, dtype = float(getattr(embedding, "embed_scale", 1.0)), embedding.weight.dtype
    made = Int8Linear(head.weight.data)
    replace_module(model, _name_of(model, head), made)
    table = made if tied else Int8Linear(embedding.weight.data)
    replace_module(model, _name_of(model, embedding), Int8Rows(table, dtype, factor))


def _name_of(model: Any, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)

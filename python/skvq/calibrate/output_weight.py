"""What the output projection of a layer makes of an error in a value: read from a model's weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..model_layers import decoder_of


def output_weight(model: Any, layer: int, heads: int, head_dim: int) -> Tensor:
    """Σ Wₒᵀ Wₒ over the query heads of each kv head, float64 [Hkv, Dv, Dv].

    Raises ValueError if the layer has no `self_attn.o_proj` to read it from.
    """
    try:
        projection = decoder_of(model).layers[layer].self_attn.o_proj.weight.detach().double()
    except AttributeError as error:
        raise ValueError(f"layer {layer} has no self_attn.o_proj: expected a Llama-like model ({error})") from None
    per_head = projection.unflatten(1, (heads, -1, head_dim))  # [hidden, Hkv, group, Dv]
    return torch.einsum("ohgd,ohge->hde", per_head, per_head)

"""A model's rotary embedding, forward and back, for methods that quantize keys before RoPE.

A transformers cache gets keys after RoPE. `Rope.back` takes them where they were before, with the model's own tables
and its own `apply_rotary_pos_emb` (so how it pairs channels does not matter here); `Rope.forward` rotates again.
Is not: exact for half-precision models, whose keys were rounded after RoPE.
Shapes: rows float32 [B, H, n, D] at places start, start + 1, … of a text or store; positions int64 [1|B, n], tables
float32 [1|B, n, D].
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..model_layers import decoder_of

Tables = tuple[Tensor, Tensor]


class Rope:
    """The rotation of one layer; `order` int64 [B, span]: the positions of a store's first rows (skvq/sinks.py)."""

    def __init__(
        self, tables: Callable[[Tensor], Tables], apply: Callable[..., Any], order: Tensor | None = None
    ) -> None:
        self._tables, self._apply, self._order = tables, apply, order
        self._two = "k" in inspect.signature(apply).parameters

    def in_order(self, order: Tensor | None) -> Rope:
        """The same rotation for rows of a store in this order; None: in that of the text."""
        return Rope(self._tables, self._apply, order)

    def forward(self, rows: Tensor, start: int) -> Tensor:
        """Rotate rows as the model does."""
        cos, sin = self._tables_of(rows, start)
        return self._turn(rows, cos, sin)

    def back(self, rows: Tensor, start: int) -> Tensor:
        """The inverse of `forward`, also where the tables carry a factor (YaRN)."""
        cos, sin = self._tables_of(rows, start)
        square = cos.square() + sin.square()
        return self._turn(rows, cos / square, -sin / square)

    def _tables_of(self, rows: Tensor, start: int) -> Tables:
        end = start + rows.shape[2]
        positions = torch.arange(start, end)[None]
        if self._order is not None and start < self._order.shape[1]:
            first = self._order[:, start:end].to(positions.device)
            positions = torch.cat([first, positions[:, first.shape[1] :].expand(first.shape[0], -1)], dim=1)
        return self._tables(positions)

    def _turn(self, rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned = self._apply(rows, rows[:, :, :, :], cos, sin)[1] if self._two else self._apply(rows, cos, sin)
        result: Tensor = turned
        return result


class Rotary:
    """The rotations of a model's layers, made when first asked for. `Rotary(model)` changes nothing.

    `dtype`: of the tables of cosines and sines; None: the model's, as its keys are rotated.
    """

    def __init__(self, model: Any, dtype: torch.dtype | None = None) -> None:
        self._model = model
        self._dtype = dtype or model.dtype
        self._ropes: dict[int, Rope] = {}

    def __call__(self, layer: int) -> Rope:
        """The rotation of layer `layer`. Raises ValueError if the model's family is not one that can be turned back."""
        if layer not in self._ropes:
            self._ropes[layer] = self._make(layer)
        return self._ropes[layer]

    def _make(self, layer: int) -> Rope:
        base = decoder_of(self._model)
        kind = type(base).__name__
        rotary = getattr(base, "rotary_emb", None)
        attention = getattr(base.layers[layer], "self_attn", None)
        apply = getattr(sys.modules.get(type(attention).__module__), "apply_rotary_pos_emb", None)
        if rotary is None or apply is None:
            raise ValueError(f"{kind} layer {layer}: no rotary embedding found, expected one for keys before RoPE")
        types = getattr(base.config, "layer_types", None)
        by_type = "layer_type" in inspect.signature(rotary.forward).parameters
        options = {"layer_type": types[layer]} if by_type and types else {}
        example = torch.empty(1, dtype=self._dtype, device=self._model.device)

        def tables(positions: Tensor) -> Tables:
            with torch.no_grad():
                # a copy: some rotations change with the largest position that they have seen
                cos, sin = copy.deepcopy(rotary)(example, positions.to(example.device), **options)
            return cos.float(), sin.float()

        rope = Rope(tables, apply)
        self._check(rope, kind, layer)
        return rope

    def _check(self, rope: Rope, kind: str, layer: int) -> None:
        config = decoder_of(self._model).config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        rows = torch.linspace(-1, 1, 3 * head_dim, device=self._model.device).reshape(1, 1, 3, head_dim)
        try:
            close = torch.allclose(rope.back(rope.forward(rows, 7), 7), rows, atol=1e-4)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"{kind} layer {layer}: its rotary embedding cannot be turned back ({error})") from error
        if not close:
            raise ValueError(f"{kind} layer {layer}: its rotary embedding cannot be turned back")


def before_rope(rows: Tensor, rope: Rope | None, start: int, quantize: Callable[[Tensor], Tensor]) -> Tensor:
    """`quantize` applied to keys as they were before RoPE, `start` being the place of the first one in its text or, if
    `rope` has an order, its store. Raises ValueError where the rotation is not known.
    """
    if rope is None:
        raise ValueError("rope=None: expected the model's rotation, since keys are quantized before RoPE")
    return rope.forward(quantize(rope.back(rows, start)), start)

"""Queries, keys and values of calibration texts, for methods that are fitted to them.

The model runs over the texts once, in full precision, when a method first asks; what its full-attention layers saw is
held in the model's dtype and shared by all methods of a comparison.
Shapes: queries [Hq, T, D] (scaled as the attention scales them), keys and values [Hkv, T, D]; given out in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .methods.base import Method, Where
from .rope import Rope, Rotary
from .simulation import AttentionCall, MethodPass, Simulator

SINKS = 5  # first tokens of a chunk, of another kind than the rest: most methods leave them out of their statistics
LAST_QUERIES = 256  # of a chunk, whose attention output is compared


@dataclass(frozen=True)
class RowsOfLayer:
    """One layer over one calibration chunk, float32. Keys are after RoPE; `rope` turns them back."""

    layer: int
    queries: Tensor  # [Hkv, group, T, D], scaled
    keys: Tensor  # [Hkv, T, D]
    values: Tensor
    softcap: float | None
    rope: Rope | None

    @property
    def keys_before_rope(self) -> Tensor:
        """[Hkv, T, D]. Raises ValueError if the model's rotation is not known."""
        if self.rope is None:
            raise ValueError("rope=None: expected the model's rotation")
        return self.rope.back(self.keys[None], 0)[0]

    def stream(self, keys: bool) -> Tensor:
        """Keys or values, [Hkv, T, D]."""
        return self.keys if keys else self.values

    def output_error(self, method: Method, keys: bool, last: int = LAST_QUERIES) -> float:
        """Squared error of the attention output of the `last` queries when the keys (or the values) behind the sinks
        are quantized by `method`, the other stream exact.
        """
        rows = self.stream(keys)
        whole = (rows.shape[1] - SINKS) // method.unit * method.unit
        where = Where(self.layer, keys, SINKS, self.rope)
        read = method.fake_quantize(rows[None, :, SINKS : SINKS + whole], where)[0]
        read = torch.cat([rows[:, :SINKS], read, rows[:, SINKS + whole :]], dim=1)
        streams = (read, self.values) if keys else (self.keys, read)
        exact = self.attention_output(self.keys, self.values, last)
        return float((self.attention_output(*streams, last) - exact).square().sum())

    def attention_output(self, keys: Tensor, values: Tensor, last: int) -> Tensor:
        """Causal attention of the `last` queries over given keys and values, [Hkv, group, last, Dv]."""
        length = keys.shape[1]
        last = min(last, length)
        query = self.queries[:, :, length - last :]
        scores = (query.flatten(1, 2) @ keys.transpose(1, 2)).unflatten(1, (query.shape[1], last))
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        hidden = torch.ones(last, length, dtype=torch.bool).triu(length - last + 1)
        weights = scores.masked_fill_(hidden, -math.inf).softmax(-1)
        return (weights.flatten(1, 2) @ values).unflatten(1, (query.shape[1], last))


class CalibrationRows:
    """What the full-attention layers of a model see in `token_ids` (chunks, int64 [T] each)."""

    def __init__(self, simulator: Simulator, token_ids: Sequence[Tensor]) -> None:
        if not token_ids:
            raise ValueError("token_ids is empty: expected at least one calibration chunk")
        self.token_ids = list(token_ids)
        self.rotary: Rotary = simulator.rotary
        self._simulator = simulator
        self._held: dict[int, list[AttentionCall]] = {}

    @property
    def model(self) -> Any:
        """The model."""
        return self._simulator.model

    @property
    def layers(self) -> list[int]:
        """Indices of the layers with rows."""
        return sorted(self._simulator.full_layers)

    def of_layer(self, layer: int) -> Iterator[RowsOfLayer]:
        """The rows of one layer, chunk by chunk."""
        if not self._held:
            self._collect()
        try:
            rope = self.rotary(layer)
        except ValueError:
            rope = None  # only methods before RoPE need it, and say so
        for call in self._held[layer]:
            yield RowsOfLayer(layer, call.query.float(), call.keys.float(), call.values.float(), call.softcap, rope)

    def _collect(self) -> None:
        collector = _Collector(self._simulator, self.model.dtype)
        with torch.inference_mode(), self._simulator.attached():
            for chunk in self.token_ids:
                self._simulator.run(chunk, collector)
        self._held = collector.held


class _Collector:
    """An attention pass in full precision that keeps what it is given."""

    def __init__(self, simulator: Simulator, dtype: torch.dtype) -> None:
        self._exact = MethodPass(None, 0, 0, simulator.owners)
        self._dtype = dtype
        self.held: dict[int, list[AttentionCall]] = {layer: [] for layer in simulator.full_layers}

    def attend(self, call: AttentionCall) -> Tensor:
        if call.layer in self.held:
            query, keys, values = (x.to(self._dtype) for x in (call.query, call.keys, call.values))
            kept = AttentionCall(call.layer, query, keys, values, None, call.softcap, None)
            self.held[call.layer].append(kept)
        return self._exact.attend(call)

"""`PromptFit`: how the keys of one prompt are best packed, from its own keys, values and queries.

A long prompt says itself what a calibration would say of other texts: the mean of its keys before RoPE, their
covariance, and what the queries that look at them make of an error. Keys get all of a plan (spectral_plan.py): the mean
that turns, the matrix, parts with their own bits. Values only lose their mean: a matrix for them would take as much
memory again, and one that is fitted to one text harms another that follows it (tests/bench/LOG.md). Neither needs
statistics of blocks, so no row waits for any.

Is: the fit of one layer. Is not: the decision when a layer is fitted (layer.py).
Shapes: keys [B, Hkv, n, Dk], values [B, Hkv, n, Dv], queries [B, Hq, L, Dk] of the tokens from position `begin` on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._native import SkvqError
from ..config import StreamOptions
from ..evaluate.rope import Rotary, decoder_of
from ..plan import LayerPlan, StreamPlan
from ..sinks import sink_mask
from ..waiting import SeenQueries, WaitingRows
from .allocate import cheapest
from .fitted_options import fitted_key_options, fitted_value_options, of_parts
from .moments import AttentionMoments, StreamMoments
from .spectral import StreamFit
from .spectral_plan import fit_key_moments
from .turning import TurnedMoments, Turning, turning_or_reason

TOKENS = 32768  # of a sequence that are looked at, from the beginning
ROWS = 8192  # keys among them, evenly spaced; of all sequences together
QUERIES = 256  # likewise queries
DAMPING = 1e-2


class PromptFit:
    """Fits layers of one model, whose rotations it looks at when first asked for one."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._rotary = Rotary(model, torch.float32)
        self._turnings: dict[tuple[Any, int], Turning | str] = {}

    def fitted(
        self, plan: LayerPlan, index: int, rows: WaitingRows, seen: SeenQueries, padding: Sequence[int] = ()
    ) -> LayerPlan | str:
        """`plan` with keys and values fitted to these rows, or why that is not possible.

        Args:
            plan: of a layer without static data, keys of at most 5 bits.
            index: of the layer.
            rows: keys and values of all tokens of a prompt.
            seen: the queries of some of them.
            padding: tokens in front of each sequence that do not count; empty: none.
        """
        turning = self._turning(index, rows.keys.shape[3], rows.keys.device)
        if isinstance(turning, str):
            return turning
        moments = _Moments(rows, turning)
        scaling, softcap, sink_logits = self._attention_of(index, rows.keys.shape[3])
        for row in range(rows.keys.shape[0]):
            pad = padding[row] if padding else 0
            first = max(0, seen.begin - pad)
            looked_at = slice(pad, pad + TOKENS)
            begin = pad + first - seen.begin
            queries = seen.query[row, :, begin : begin + max(0, TOKENS - first)].float() * scaling
            keys, values = rows.keys[row, :, looked_at].float(), rows.values[row, :, looked_at].float()
            moments.add(plan, keys, values, queries, first, {"softcap": softcap, "sink_logits": sink_logits})
        return moments.plan(plan)

    def _turning(self, index: int, head_dim: int, device: torch.device) -> Turning | str:
        try:
            types = getattr(decoder_of(self._model).config, "layer_types", None)
        except ValueError as error:
            return str(error)
        key = types[index] if types and index < len(types) else None, head_dim
        if key not in self._turnings:
            self._turnings[key] = turning_or_reason(self._rotary, index, head_dim, device)
        return self._turnings[key]

    def _attention_of(self, index: int, head_dim: int) -> tuple[float, float | None, Tensor | None]:
        """What scores are multiplied by, their cap, and the logits that join every softmax."""
        decoder = decoder_of(self._model)
        attention = decoder.layers[index].self_attn
        scaling, sinks = getattr(attention, "scaling", None), getattr(attention, "sinks", None)
        softcap = getattr(decoder.config, "attn_logit_softcapping", None)
        logits = sinks.detach() if isinstance(sinks, Tensor) else None
        return head_dim**-0.5 if scaling is None else float(scaling), softcap, logits


class _Moments:
    """Sums over the sequences of a prompt."""

    def __init__(self, rows: WaitingRows, turning: Turning) -> None:
        (self.batch, heads, _, key_dim), value_dim = rows.keys.shape, rows.values.shape[3]
        device = rows.keys.device
        self.keys = StreamMoments.empty(heads, key_dim, device)
        self.turned = TurnedMoments.empty(heads, turning)
        self.attention = AttentionMoments.empty(heads, key_dim, value_dim, device)
        self.value_sum = torch.zeros(heads, value_dim, dtype=torch.float64, device=device)
        self.is_finite = True

    def add(
        self, plan: LayerPlan, keys: Tensor, values: Tensor, queries: Tensor, first: int, options: dict[str, Any]
    ) -> None:
        """One sequence: keys and values [Hkv, n, D], scaled queries [Hq, L, Dk] of its tokens from `first` on."""
        extremes = torch.stack([x for rows in (keys, values, queries) if rows.numel() for x in rows.aminmax()])
        self.is_finite &= bool(extremes.isfinite().all())
        if not self.is_finite:
            return
        is_sink = sink_mask(keys[None], values[None], plan.sinks, plan.sink_search, plan.window)[0]
        kept = (~is_sink).nonzero()[:, 0]
        kept = kept[:: max(1, kept.numel() * self.batch // ROWS)]
        if kept.numel() == 0 or queries.shape[1] == 0:
            return
        self.keys.update(keys[:, kept], 0)
        self.turned.update(keys[:, kept], kept)
        self.value_sum += values[:, kept].sum(1, dtype=torch.float64)
        stride = max(1, min(queries.shape[1], queries.shape[1] * self.batch // QUERIES))
        self.attention.update(
            queries, keys, values, first=first, is_sink=is_sink, window=plan.window, stride=stride, **options
        )

    def plan(self, plan: LayerPlan) -> LayerPlan | str:
        """What the sums say, or why they say nothing."""
        if not self.is_finite:
            return "keys, values or queries are not finite"
        if not float(self.attention.query_weight.sum()) > 0.0:
            return "no query attends to a token that would be packed"
        try:
            weight = self.attention.weighted_query_moment
            fit = fit_key_moments(weight, self.keys, self.turned, damping=DAMPING)
            keys = self._keys(fit, plan.keys.options)
        except (SkvqError, RuntimeError) as error:  # too few bits for parts, or no eigenvalues
            return str(error)
        return dataclasses.replace(plan, keys=keys, values=self._values(plan.values))

    @staticmethod
    def _keys(fit: StreamFit, given: StreamOptions) -> StreamPlan:
        options = fitted_key_options(given, fit.shape[1])
        if options is None:
            options = of_parts(given, cheapest("key_bits", fit.candidates(4, fit.own), given.bits).parts)
        assert options.parts is not None
        return dataclasses.replace(fit.plan(options.parts, noise=True), options=options)

    def _values(self, values: StreamPlan) -> StreamPlan:
        options = fitted_value_options(values.options)
        if options is values.options:
            return values
        return StreamPlan(options, shift=(self.value_sum / int(self.keys.count)).float().cpu())

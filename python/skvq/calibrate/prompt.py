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
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .._native import SkvqError
from ..config import StreamOptions
from ..evaluate.rope import Rotary
from ..model_layers import decoder_of
from ..plan import LayerPlan, StreamPlan
from ..sinks import sink_order
from ..waiting import SeenQueries, WaitingRows
from .allocate import cheapest
from .fitted_options import fitted_codebook, fitted_key_options, fitted_value_options, of_parts
from .prompt_sums import PromptMoments, PromptSums, Scoring
from .side_by_side import one_core_each
from .spectral_plan import fit_key_moments, key_plan
from .turning import Turning, turning_or_reason

TOKENS = 32768  # of a sequence that are looked at, from the beginning
DAMPING = 1e-2

TurningKey = tuple[Any, int, torch.device]  # type of the layer, head_dim, device

# Rotations that fits of a decoder have found. Looked at again by each, as they may have been changed.
_found: WeakKeyDictionary[Any, dict[TurningKey, Turning]] = WeakKeyDictionary()


class PromptFit:
    """Fits layers of one model, whose rotations it looks at when first asked for one."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._rotary = Rotary(model, torch.float32)
        self._turnings: dict[TurningKey, Turning | str] = {}

    @torch.no_grad()
    def fitted(
        self,
        plan: LayerPlan,
        index: int,
        rows: WaitingRows,
        seen: SeenQueries,
        padding: Sequence[int] = (),
        order: Tensor | None = None,
    ) -> LayerPlan | str:
        """`plan` with keys and values fitted to these rows, or why that is not possible.

        Args:
            plan: of a layer without static data, keys of at most 5 bits.
            index: of the layer.
            rows: keys and values of all tokens of a prompt.
            seen: the queries of some of them.
            padding: tokens in front of each sequence that do not count; empty: none.
            order: in which the first rows will be stored, sinks in front (sinks.py); None: found here.
        """
        turning = self._turning(index, rows.keys.shape[3], rows.keys.device)
        if isinstance(turning, str):
            return turning
        if order is None and plan.searched:
            order = sink_order(rows.keys, rows.values, plan.sinks, plan.searched, padding)
        batch = rows.keys.shape[0]
        sums = PromptSums(batch, plan.window, turning, self._scoring(index, rows.keys.shape[3]))
        for row in range(batch):
            pad = padding[row] if padding else 0
            first = max(0, seen.begin - pad)
            looked_at = slice(pad, pad + TOKENS)
            begin = pad + first - seen.begin
            queries = seen.query[row, :, begin : begin + max(0, TOKENS - first)]
            keys, values = rows.keys[row, :, looked_at], rows.values[row, :, looked_at]
            places = torch.arange(keys.shape[1], device=keys.device)
            if order is not None:
                places = torch.cat([order[row, pad:] - pad, places[order.shape[1] - pad :]])
            sums.add(keys, values, queries, first, places[: plan.sinks], places[plan.sinks :])
        moments = sums.read()
        return moments if isinstance(moments, str) else _fitted(plan, moments)

    def _turning(self, index: int, head_dim: int, device: torch.device) -> Turning | str:
        try:
            decoder = decoder_of(self._model)
        except ValueError as error:
            return str(error)
        types = getattr(decoder.config, "layer_types", None)
        key = types[index] if types and index < len(types) else None, head_dim, device
        if key not in self._turnings:
            found = _found.setdefault(decoder, {})
            turning = turning_or_reason(self._rotary, index, head_dim, device, found.get(key))
            if isinstance(turning, Turning):
                found[key] = turning
            self._turnings[key] = turning
        return self._turnings[key]

    def _scoring(self, index: int, head_dim: int) -> Scoring:
        """How the layer's queries look at keys."""
        decoder = decoder_of(self._model)
        attention = decoder.layers[index].self_attn
        scaling, sinks = getattr(attention, "scaling", None), getattr(attention, "sinks", None)
        return Scoring(
            scaling=head_dim**-0.5 if scaling is None else float(scaling),
            softcap=getattr(decoder.config, "attn_logit_softcapping", None),
            sink_logits=sinks.detach() if isinstance(sinks, Tensor) else None,
        )


def _fitted(plan: LayerPlan, moments: PromptMoments) -> LayerPlan | str:
    """The plan by what was found of the prompt."""
    try:
        with one_core_each():
            keys = _keys(moments, plan.keys.options)
    except (SkvqError, RuntimeError) as error:  # too few bits for parts, or no eigenvalues
        return str(error)
    return dataclasses.replace(plan, keys=keys, values=_values(plan.values, moments.value_mean))


def _keys(moments: PromptMoments, given: StreamOptions) -> StreamPlan:
    found = moments.query_moment, moments.static, moments.turned
    options = fitted_key_options(given, moments.query_moment.shape[-1])
    if options is not None:
        assert options.parts is not None
        plan = key_plan(*found, options.parts, damping=DAMPING, codebook=fitted_codebook(given))
    else:
        fit = fit_key_moments(*found, damping=DAMPING, codebook=fitted_codebook(given))
        parts = cheapest("key_bits", fit.candidates(4, fit.own), given.bits).parts
        options, plan = of_parts(given, parts), fit.plan(parts, noise=True)
    return dataclasses.replace(plan, options=options)


def _values(values: StreamPlan, mean: Tensor) -> StreamPlan:
    options = fitted_value_options(values.options)
    return values if options is values.options else StreamPlan(options, shift=mean.float())

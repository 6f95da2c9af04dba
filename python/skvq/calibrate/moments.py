"""Moments of rows that arrive in chunks: what calibration knows of keys, values and queries.

Is: streaming accumulators of fixed size, in float64 where they sum. Is not: where rows come from (collect.py).
Shapes: rows float32 [H, n, D]; H the kv heads; matrices float64 [H, D, D].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .._native import SkvqError

# The histogram of a channel has equal bins over BIN_RANGE standard deviations to both sides of the mean, both of the
# first chunk: a quantile is known to a 32nd of that deviation. Rows beyond are counted in the outermost bins, whose
# outer borders are the extremes.
BIN_RANGE, BINS_PER_DEVIATION = 8, 32
QUERY_ROWS = 64  # queries whose probabilities are held at once, of long texts fewer:
PROBABILITIES = 1 << 26  # numbers of one kind, of all heads
BINS = 2 * BIN_RANGE * BINS_PER_DEVIATION + 2


def centred_by_block(rows: Tensor, block: int) -> Tensor:
    """The whole blocks of rows [H, n, D], each row about the mean of its block: [H, n // block · block, D]."""
    blocks = rows[:, : rows.shape[1] // block * block].unflatten(1, (-1, block))
    return (blocks - blocks.mean(2, keepdim=True)).flatten(1, 2)


@dataclass
class StreamMoments:
    """Moments of one stream of one layer, per kv head; every field is a tensor.

    Attributes:
        count: rows seen by each head, int64 [].
        mean, comoment: mean [H, D], and the sum over rows of (x − mean)(x − mean)ᵀ [H, D, D].
        block_count, block_comoment: rows in whole blocks, and the same sum about each block's own mean.
        low, high: extremes, float32 [H, D].
        centre, width: middle and bin width of the histograms, float32 [H, D].
        histogram: counts, int32 [H, D, BINS].
    """

    count: Tensor
    mean: Tensor
    comoment: Tensor
    block_count: Tensor
    block_comoment: Tensor
    low: Tensor
    high: Tensor
    centre: Tensor
    width: Tensor
    histogram: Tensor

    @classmethod
    def empty(cls, heads: int, dim: int, device: torch.device) -> StreamMoments:
        """Of no rows."""
        wide: dict[str, Any] = {"dtype": torch.float64, "device": device}
        return cls(
            count=torch.zeros((), dtype=torch.int64),
            mean=torch.zeros(heads, dim, **wide),
            comoment=torch.zeros(heads, dim, dim, **wide),
            block_count=torch.zeros((), dtype=torch.int64),
            block_comoment=torch.zeros(heads, dim, dim, **wide),
            low=torch.full((heads, dim), math.inf, device=device),
            high=torch.full((heads, dim), -math.inf, device=device),
            centre=torch.zeros(heads, dim, device=device),
            width=torch.ones(heads, dim, device=device),
            histogram=torch.zeros(heads, dim, BINS, dtype=torch.int32, device=device),
        )

    def update(self, rows: Tensor, block: int) -> None:
        """Add rows float32 [H, n, D]; whole blocks of `block` rows, from the first on, count as blocks (0: none)."""
        n = rows.shape[1]
        if n == 0:
            return
        self._to(rows.device)
        mean = rows.mean(1, dtype=torch.float64)
        centred = rows - mean[:, None].float()
        # The product is about the float32 mean; the difference to the mean itself is far below its rounding.
        comoment = (centred.transpose(1, 2) @ centred).double()
        before = int(self.count)
        if before == 0:
            self._place_histogram(mean, comoment.diagonal(dim1=1, dim2=2) / n)
        drift = mean - self.mean
        share = n / (before + n)
        self.comoment += comoment + drift[:, :, None] * drift[:, None, :] * (before * share)
        self.mean += drift * share
        self.count += n
        self.low, self.high = torch.minimum(self.low, rows.amin(1)), torch.maximum(self.high, rows.amax(1))
        self._count_bins(rows)
        if block:
            blocks = centred_by_block(rows, block)
            self.block_comoment += (blocks.transpose(1, 2) @ blocks).double()
            self.block_count += blocks.shape[1]

    def _place_histogram(self, mean: Tensor, variance: Tensor) -> None:
        # Channels that are constant so far get a width of their own size.
        deviation = variance.sqrt().float()
        floor = (mean.abs().float() * 1e-4).clamp(min=1e-12)
        self.centre, self.width = mean.float(), torch.maximum(deviation, floor) / BINS_PER_DEVIATION

    def _count_bins(self, rows: Tensor) -> None:
        heads, _, dim = rows.shape
        position = ((rows - self.centre[:, None]) / self.width[:, None]).floor_() + BINS // 2
        index = position.clamp_(0, BINS - 1).to(torch.int64)
        index += BINS * torch.arange(heads * dim, device=rows.device).reshape(heads, 1, dim)
        counts = torch.bincount(index.flatten(), minlength=heads * dim * BINS)
        self.histogram += counts.reshape(heads, dim, BINS).to(torch.int32)

    def _to(self, device: torch.device) -> None:
        for field in fields(self):
            if field.name not in ("count", "block_count"):
                setattr(self, field.name, getattr(self, field.name).to(device))

    # ---- what the sums mean ------------------------------------------------------------------------------------------

    @property
    def variance(self) -> Tensor:
        """Float64 [H, D], divided by the number of rows."""
        return self.covariance.diagonal(dim1=1, dim2=2)

    @property
    def covariance(self) -> Tensor:
        """About the mean of all rows, float64 [H, D, D]."""
        return self.comoment / self._at_least_one(self.count, "rows")

    @property
    def second_moment(self) -> Tensor:
        """E[x xᵀ], float64 [H, D, D]."""
        return self.covariance + self.mean[:, :, None] * self.mean[:, None, :]

    @property
    def block_covariance(self) -> Tensor:
        """About the mean of each row's own block, float64 [H, D, D]. Raises SkvqError if no block was complete."""
        return self.block_comoment / self._at_least_one(self.block_count, "whole blocks")

    @staticmethod
    def _at_least_one(count: Tensor, what: str) -> int:
        if int(count) == 0:
            raise SkvqError(f"statistics of no {what}: expected longer or more chunks")
        return int(count)

    def quantile(self, probability: float) -> Tensor:
        """The value below which this share of each channel's rows lies, float32 [H, D], from the histograms."""
        if not 0.0 <= probability <= 1.0:
            raise SkvqError(f"probability={probability!r}: expected a number from 0 to 1")
        target = probability * self._at_least_one(self.count, "rows")
        counts = self.histogram.double()
        cumulative = counts.cumsum(-1)
        index = (cumulative < target).sum(-1, keepdim=True).clamp(max=BINS - 1)
        inside = target - (cumulative - counts).gather(-1, index)[..., 0]
        part = (inside / counts.gather(-1, index)[..., 0].clamp(min=1.0)).clamp(0.0, 1.0).float()
        index = index[..., 0]
        border = self.centre + (index - BINS // 2) * self.width
        left = torch.where(index == 0, self.low, border)
        right = torch.where(index == BINS - 1, self.high, border + self.width)
        return (left + part * (right - left)).clamp(self.low, self.high)


@dataclass
class AttentionMoments:
    """How attention uses the packed tokens, per kv head; every field is a float64 tensor.

    With p the probability that query q gives to token t, o the query's output, and sums over the queries that were
    looked at and the tokens that are packed for them:

    Attributes:
        mass: Σ p, by region: sinks, packed, window [H, 3].
        query_weight: Σ w_q with w_q = Σ_t p² |v_t − o|²: an error e_t of every key, independent over tokens, changes
            the output of q by the power Σ_t p² (q·e_t)² |v_t − o|², to first order [H].
        query_moment: Σ w_q q qᵀ of the scaled queries [H, D, D].
        value_weight: Σ w_t with w_t = Σ_q p²: an error e_t of every value, independent over tokens, changes outputs
            by the power w_t |e_t|² [H].
        value_sum, value_moment: Σ w_t v_t [H, D] and Σ w_t v_t v_tᵀ [H, D, D].
        output_moment: Σ o oᵀ of the queries that were looked at [H, D, D].
    """

    mass: Tensor
    query_weight: Tensor
    query_moment: Tensor
    value_weight: Tensor
    value_sum: Tensor
    value_moment: Tensor
    output_moment: Tensor

    @classmethod
    def empty(cls, heads: int, key_dim: int, value_dim: int, device: torch.device) -> AttentionMoments:
        """Of no queries."""
        square = (heads, value_dim, value_dim)
        shapes = ((heads, 3), (heads,), (heads, key_dim, key_dim), (heads,), (heads, value_dim), square, square)
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def update(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        is_sink: Tensor,
        window: int,
        stride: int,
        first: int = 0,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
    ) -> None:
        """Add every `stride`th of the scaled queries float32 [Hq, L, D] over keys and values float32 [Hkv, T, D].

        The queries are of the tokens from `first` on. `is_sink`, bool [T], says which tokens are never packed, wherever
        they are. The others are packed for a query as soon as they are `window` tokens behind it.
        """
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name).to(keys.device))
        heads, length = keys.shape[:2]
        token = torch.arange(length, device=keys.device)
        token_weight = torch.zeros(heads, length, dtype=torch.float64, device=keys.device)
        lengths = values.square().sum(-1)[:, None, :, None]
        at_once = max(1, min(QUERY_ROWS, PROBABILITIES // (queries.shape[0] * length)))
        for positions in token[first + stride - 1 : first + queries.shape[1] : stride].split(at_once):
            end = int(positions[-1]) + 1
            q = queries[:, positions - first].unflatten(0, (heads, -1))
            p = _probabilities(q @ keys[:, None, :end].transpose(-1, -2), positions, softcap, sink_logits)
            packed = ~is_sink[:end] & (token[:end] <= positions[:, None] - window)
            sinks, share = p[..., is_sink[:end]].sum(-1), (p * packed).sum(-1)
            regions = torch.stack([sinks, share, p.sum(-1) - sinks - share], dim=-1)
            self.mass += regions.sum((1, 2), dtype=torch.float64)
            output = p @ values[:, None, :end]
            power = (p * packed).square_()
            # |v − o|² in its three parts
            weight = (power @ lengths[..., :end, :])[..., 0] + output.square().sum(-1) * power.sum(-1)
            weight = (weight - 2.0 * ((power @ values[:, None, :end]) * output).sum(-1)).clamp_(min=0.0)
            self.query_weight += weight.sum((1, 2), dtype=torch.float64)
            weighted = (q * weight[..., None].sqrt()).flatten(1, 2)
            self.query_moment += (weighted.transpose(1, 2) @ weighted).double()
            token_weight[:, :end] += power.sum((1, 2), dtype=torch.float64)
            flat = output.flatten(1, 2)
            self.output_moment += (flat.transpose(1, 2) @ flat).double()
        self.value_weight += token_weight.sum(-1)
        self.value_sum += (values * token_weight[..., None]).sum(1)
        weighted = values * token_weight.sqrt().float()[..., None]
        self.value_moment += (weighted.transpose(1, 2) @ weighted).double()

    @property
    def weighted_query_moment(self) -> Tensor:
        """Σ w q qᵀ / Σ w, float64 [H, D, D]."""
        return self.query_moment / self.query_weight.clamp(min=1e-300)[:, None, None]

    def weighted_value_covariance(self, mean: Tensor) -> Tensor:
        """Covariance of values about a given mean [H, D], weighted by the attention they get, float64 [H, D, D]."""
        weight = self.value_weight.clamp(min=1e-300)[:, None, None]
        cross = (self.value_sum[:, :, None] * mean[:, None, :]) / weight
        return self.value_moment / weight - cross - cross.mT + mean[:, :, None] * mean[:, None, :]


def _probabilities(scores: Tensor, positions: Tensor, softcap: float | None, sink_logits: Tensor | None) -> Tensor:
    """Of scores [Hkv, group, L, T] of the queries at `positions` [L]; with sink logits [Hq] rows sum to less than 1."""
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    tokens = torch.arange(scores.shape[-1], device=scores.device)
    scores = scores.masked_fill(tokens > positions[:, None], -math.inf)
    return softmax_beside(sink_logits, scores)


def softmax_beside(sink_logits: Tensor | None, scores: Tensor) -> Tensor:
    """Over the last dimension of [Hkv, group, L, T]; with sink logits [Hq] rows sum to less than 1."""
    if sink_logits is None:
        return scores.softmax(-1)
    logits = sink_logits.float().reshape(*scores.shape[:2], 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, logits], dim=-1).softmax(-1)[..., :-1]

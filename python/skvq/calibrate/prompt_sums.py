"""`PromptSums`: what a fit has to know of the rows of one prompt, summed where they are and read at once.

Is: those sums of moments.py and turning.py that a fit reads, and no others. As all rows of a prompt are there, their
means come first and products are about them; products of rows are float32, `CHUNK` rows at a time, added in float64.
On a GPU that takes few launches, and nothing waits for it before `read`. Is not: sums of rows that come one after the
other (moments.py), or what is made of them (prompt.py).
Shapes: keys [Hkv, n, Dk], values [Hkv, n, Dv], queries [Hq, L, Dk] of one sequence, of any dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import moments
from .spectral import Mean
from .spectral_plan import KeyMoments
from .turning import Turning

ROWS = 8192  # keys that are looked at, evenly spaced; of all sequences together, about
QUERIES = 256  # likewise queries
CHUNK = 512  # rows of one product
PROBABILITIES_ON_CPU = 1 << 21  # numbers of one kind, of all heads: what stays near a core
WIDTH_UNIT = 4  # floats of what a GPU reads at once


@dataclass(frozen=True, eq=False)
class Scoring:
    """How a layer attends.

    Attributes:
        scaling: what scores are multiplied by.
        softcap: their cap, if they have one.
        sink_logits: [Hq], what joins every softmax, if something does.
    """

    scaling: float
    softcap: float | None = None
    sink_logits: Tensor | None = None


@dataclass(frozen=True, eq=False)
class PromptMoments:
    """What the sums say, float32 on the CPU.

    Attributes:
        query_weight: Σ w of `AttentionMoments`, [Hkv].
        query_moment: Σ w q qᵀ / Σ w, [Hkv, Dk, Dk].
        static, turned: keys about their mean, and about their mean before the rotation.
        value_mean: [Hkv, Dv].
    """

    query_weight: Tensor
    query_moment: Tensor
    static: KeyMoments
    turned: KeyMoments
    value_mean: Tensor


class PromptSums:
    """Sums over the sequences of a prompt.

    Args:
        batch: sequences that will be added.
        window: most recent tokens, which a query sees as they are.
        turning: the rotation of the keys, on their device.
        scoring: how queries look at them.
    """

    def __init__(self, batch: int, window: int, turning: Turning, scoring: Scoring) -> None:
        self._batch, self._window, self._turning, self._scoring = batch, window, turning, scoring
        self._extremes: list[Tensor] = []
        self._keys: list[Tensor] = []
        self._positions: list[Tensor] = []
        self._value_sums: list[Tensor] = []
        self._queries: list[Tensor] = []
        self._weights: list[Tensor] = []

    def add(self, keys: Tensor, values: Tensor, queries: Tensor, first: int, sinks: Tensor, others: Tensor) -> None:
        """One sequence; queries, without the scaling, are of its tokens from `first` on.

        `sinks` and `others`, int64, are the positions of the tokens that are never packed and of all others, in order.
        """
        self._extremes += [x for rows in (keys, values, queries) if rows.numel() for x in rows.aminmax()]
        if others.numel() == 0 or queries.shape[1] == 0:
            return
        kept = others[:: max(1, others.numel() * self._batch // ROWS)]
        self._keys.append(keys.index_select(1, kept))
        self._positions.append(kept)
        self._value_sums.append(values.index_select(1, kept).sum(1, dtype=torch.float32))
        stride = max(1, min(queries.shape[1], queries.shape[1] * self._batch // QUERIES))
        chosen = queries[:, stride - 1 :: stride].float() * self._scoring.scaling
        chosen = chosen.unflatten(0, (keys.shape[0], -1))
        weight = self._attended(chosen, keys.float(), values.float(), first + stride - 1, stride, sinks)
        self._queries.append(chosen.flatten(1, 2))
        self._weights.append(weight.flatten(1, 2))

    def _attended(
        self, queries: Tensor, keys: Tensor, values: Tensor, first: int, stride: int, sinks: Tensor
    ) -> Tensor:
        """w_q = Σ p² |v − o|² over packed tokens (moments.py), float32 [Hkv, group, m], of the scaled queries
        [Hkv, group, m, D] of the tokens first, first + stride, …
        """
        heads, group, count, _ = queries.shape
        length, dim = values.shape[1:]
        # v, |v|² and 1 of tokens that are packed: what p² is multiplied with, for |v − o|² in its three parts
        parts = values.new_zeros(heads, length, -(-(dim + 2) // WIDTH_UNIT) * WIDTH_UNIT)
        parts[..., :dim] = values
        parts[..., dim] = values.square().sum(-1)
        parts[..., dim + 1].fill_(1.0)
        parts.index_fill_(1, sinks, 0.0)
        at_once = self._at_once(heads * group * length, keys.device)
        columns = torch.arange((min(at_once, count) - 1) * stride + 1 + self._window, device=keys.device)
        behind = columns > columns[: (min(at_once, count) - 1) * stride + 1 : stride, None]  # [i, j]: j > i · stride
        outputs, sums = [], []
        for start in range(0, count, at_once):
            q = queries[:, :, start : start + at_once]
            rows, position = q.shape[2], first + start * stride
            end = position + (rows - 1) * stride + 1
            scores = (q.flatten(1, 2) @ keys[:, :end].mT).unflatten(1, (group, rows))
            if self._scoring.softcap is not None:
                scores = scores.div_(self._scoring.softcap).tanh_().mul_(self._scoring.softcap)
            scores[..., position:].masked_fill_(behind[:rows, : end - position], -torch.inf)
            p = moments.softmax_beside(self._scoring.sink_logits, scores).flatten(1, 2)
            outputs.append((p @ values[:, :end]).unflatten(1, (group, rows)))
            power = p.square_()
            # columns from position - window on, of which those behind the diagonal are in some query's window
            begin = position - self._window
            recent = power.unflatten(1, (group, rows))[..., max(0, begin) :]
            recent.masked_fill_(behind[:rows, max(0, -begin) : end - begin], 0.0)
            sums.append((power @ parts[:, :end]).unflatten(1, (group, rows)))
        output, total = _joined(outputs, 2), _joined(sums, 2)
        cross = (total[..., :dim] * output).sum(-1)
        weight = total[..., dim] + output.square().sum(-1) * total[..., dim + 1] - 2.0 * cross
        return weight.clamp_(min=0.0)

    @staticmethod
    def _at_once(numbers: int, device: torch.device) -> int:
        """Queries whose probabilities are held at once, if those of one are so many."""
        limit = PROBABILITIES_ON_CPU if device.type == "cpu" else moments.PROBABILITIES
        return max(1, min(moments.QUERY_ROWS, limit // numbers))

    def read(self) -> PromptMoments | str:
        """What the sums say, or why they say nothing. Waits for a GPU, as nothing before does."""
        sums = {"extremes": torch.stack(self._extremes)}
        if self._keys:
            sums |= self._key_sums() | self._query_sums()
            sums["value_mean"] = torch.stack(self._value_sums).sum(0) / sum(x.numel() for x in self._positions)
            sums["frequencies"] = self._turning.frequencies
        found = _on_cpu(sums)
        if not bool(found["extremes"].isfinite().all()):
            return "keys, values or queries are not finite"
        if not (self._keys and float(found["query_weight"].sum()) > 0.0):
            return "no query attends to a token that would be packed"
        return PromptMoments(
            query_weight=found["query_weight"],
            query_moment=found["query_moment"],
            static=KeyMoments(found["covariances"][0], Mean(found["mean"])),
            turned=KeyMoments(
                found["covariances"][1], Mean(found["turned"], found["turned_sine"], found["frequencies"])
            ),
            value_mean=found["value_mean"],
        )

    def _query_sums(self) -> dict[str, Tensor]:
        weight = _joined(self._weights, 1)
        total = weight.sum(1, dtype=torch.float64)
        weighted = _joined(self._queries, 1) * weight[..., None].sqrt()
        moment = (weighted.mT @ weighted) / total.clamp(min=1e-300)[:, None, None]
        return {"query_weight": total, "query_moment": moment}

    def _key_sums(self) -> dict[str, Tensor]:
        """Means [H, D], and covariances [2, H, D, D] about them."""
        turning, partner = self._turning, self._turning.partner
        keys, positions = _joined(self._keys, 1).float(), _joined(self._positions, 0)
        heads, count, dim = keys.shape
        cos, sin = (x.float() for x in turning.tables(positions))
        mean = keys.mean(1)
        # The mean of R_tᵀ x: x cos − (Jx) sin, with J applied to the sum
        turned = (keys * cos).mean(1) - turning.quarter((keys * sin[:, partner]).mean(1))
        turned_sine = turning.quarter(turned)
        chunks = -(-count // CHUNK)
        about = keys.new_empty(2, heads, chunks * CHUNK, dim)
        about[:, :, count:].zero_()
        torch.sub(keys, mean[:, None], out=about[0, :, :count])
        z = torch.addcmul(keys, turned[:, None], cos, value=-1.0, out=about[1, :, :count])
        z.addcmul_(turned_sine[:, None], sin, value=-1.0)
        rows = about.view(-1, CHUNK, dim)
        products = (rows.mT @ rows).view(2, heads, chunks, dim, dim)
        covariances = products.sum(2, dtype=torch.float64) / count
        return {"mean": mean, "turned": turned, "turned_sine": turned_sine, "covariances": covariances}


def _joined(tensors: list[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Float32 copies on the CPU, in one transfer."""
    flat = torch.cat([x.float().flatten() for x in tensors.values()]).cpu()
    parts = flat.split([x.numel() for x in tensors.values()])
    return {name: part.view(x.shape) for (name, x), part in zip(tensors.items(), parts, strict=True)}

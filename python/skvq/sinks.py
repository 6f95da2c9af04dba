"""Which tokens are attention sinks: a few of the first ones, chosen by what their keys and values look like.

The tokens that a model gives much of its attention for want of a better place are not always the very first: in
Qwen2.5 the first comma or full stop is one, wherever it stands. Their keys lie far from all others and their values
are short. Packed with the others such a key is off by several times the usual error, and since half of the attention
may go there, that error is most of what a packed cache costs (tests/bench/LOG.md). So the rows that are kept in full
precision are chosen among the first `sink_search` tokens.

The choice is a matter of the text, not of the calls that it comes in: it is made once as many tokens are known as are
looked at (`tokens_needed`), and until then none is stored.

Is: the choice, when it is made, and the order that it puts rows into: the chosen ones first, then the others as they
were. Attention does not mind the order of what it attends to, so a store that is given its rows in this order needs to
know nothing more. Is not: a store.
Shapes: keys [B, Hkv, n, Dk], values [B, Hkv, n, Dv], an order int64 [B, span]: the positions of the first `span` rows
of a store.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LARGEST_RATIO = 1e4  # of a distance or a length to the usual one, so that a row of zeros does not hide all others
FAR = 1 << 40


def searched(search: int, sinks: int, window: int) -> int:
    """Among how many first tokens sinks are chosen, 0 for no choice. None of them may be packed before the choice."""
    span = min(search, sinks + window)
    return span if 0 < sinks < span else 0


def tokens_needed(span: int, padding: Sequence[int] = ()) -> int:
    """How many tokens of a batch must be known before its sinks are chosen: `span` (`searched`) behind every padding.

    A text that ends before needs no choice: without padding, all of it fits into sinks and window. 0 for no choice.
    """
    return span + max(padding, default=0) if span else 0


def sink_scores(keys: Tensor, values: Tensor, valid: Tensor | None = None) -> Tensor:
    """How much each token looks like a sink, float32 [B, n]; `valid` [B, n] says which rows count, None: all.

    Of every head: the squared distance of the key from the median key over the usual one, times the usual squared
    length of a value over the value's; added over heads. Rows that are not finite, or do not count, have -1.
    """
    keys, values = keys.float(), values.float()
    if valid is not None:
        hidden = ~valid[:, None, :, None]
        keys, values = keys.masked_fill(hidden, torch.nan), values.masked_fill(hidden, torch.nan)
    distance = (keys - keys.nanmedian(2, keepdim=True).values).square().sum(-1)
    length = values.square().sum(-1)
    far = _ratio(distance, distance.nanmedian(2, keepdim=True).values)
    short = _ratio(length.nanmedian(2, keepdim=True).values, length)
    finite = (distance.isfinite() & length.isfinite()).all(1)
    return (far * short).sum(1).masked_fill(~finite, -1.0)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    tiny = torch.finfo(torch.float32).tiny
    return (part / whole.clamp(min=tiny)).clamp(max=LARGEST_RATIO)


def sink_order(keys: Tensor, values: Tensor, sinks: int, search: int, padding: Sequence[int] = ()) -> Tensor | None:
    """The order that has the sinks in front; None if that is how rows lie already.

    Args:
        keys: of the first n tokens of every sequence.
        values: likewise.
        sinks: how many are chosen, fewer than `search`.
        search: among how many tokens behind the padding; a sequence that has no more than `sinks` stays as it is.
        padding: tokens of padding in front of each sequence; empty: none. They stay in front.
    """
    batch, length = keys.shape[0], keys.shape[2]
    pads = torch.tensor(list(padding) or [0] * batch)
    span = min(length, int(pads.max()) + search)
    pads = pads.to(keys.device)[:, None]
    place = torch.arange(span, device=keys.device).expand(batch, span)
    valid = (place >= pads) & (place < pads + search) if padding else None
    scores = sink_scores(keys[:, :, :span], values[:, :, :span], valid)
    best = scores.argsort(dim=1, descending=True, stable=True)[:, :sinks]
    chosen = torch.zeros(batch, span, dtype=torch.bool, device=keys.device).scatter_(1, best, True)
    chosen &= (scores >= 0.0) & (span - pads > sinks)
    rank = torch.where(place < pads, place - FAR, torch.where(chosen, place, place + FAR))
    order = rank.argsort(dim=1, stable=True)
    return None if order.device.type == "cpu" and torch.equal(order, place) else order


def text_order(keys: Tensor, values: Tensor, sinks: int, search: int, window: int) -> Tensor | None:
    """The order that a cache gives the rows of whole texts; None: as they came, as in a text that is too short."""
    span = searched(search, sinks, window)
    return sink_order(keys, values, sinks, span) if 0 < tokens_needed(span) <= keys.shape[2] else None


def sink_mask(keys: Tensor, values: Tensor, sinks: int, search: int, window: int) -> Tensor:
    """Which of n tokens a cache keeps as sinks, bool [B, n]: those it chooses, or the first ones of a short text."""
    batch, length = keys.shape[0], keys.shape[2]
    order = text_order(keys, values, sinks, search, window)
    if order is None:
        return torch.arange(length, device=keys.device).expand(batch, length) < sinks
    return torch.zeros(batch, length, dtype=torch.bool, device=keys.device).scatter_(1, order[:, :sinks], True)


def inverse_order(order: Tensor) -> Tensor:
    """Where in a store the first positions lie [B, span]."""
    return order.argsort(dim=1)


def keeps_first_rows(order: Tensor | None, length: int) -> bool:
    """Whether the first `length` rows of a store are those of the first `length` tokens; reads an order back."""
    return order is None or bool((order[:, :length] < length).all())


def reordered_positions(order: Tensor, length: int) -> Tensor:
    """The token of each of `length` rows of a store of one sequence, whose order is [1, span]."""
    return torch.cat([order[0], torch.arange(order.shape[1], length, device=order.device)])


def taken(rows: Tensor, order: Tensor) -> Tensor:
    """The first `span` rows [B, H, span, D] of `rows` [B, H, n, D], by an order or its inverse."""
    index = order[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[3])
    return rows[:, :, : order.shape[1]].gather(2, index)


def reordered(rows: Tensor, order: Tensor | None) -> Tensor:
    """All rows [B, H, n, D], the first ones by an order or its inverse; `rows` itself without one."""
    if order is None:
        return rows
    return torch.cat([taken(rows, order), rows[:, :, order.shape[1] :]], dim=2)


def reordered_mask(mask: Tensor, order: Tensor | None) -> Tensor:
    """A mask [B|1, Hq|1, L|1, T] whose first columns are those of the rows of a store."""
    if order is None:
        return mask
    span = order.shape[1]
    first = mask[..., :span]
    if mask.device.type == "cpu" and bool((first == first[..., :1]).all()):
        return mask
    batch = max(mask.shape[0], order.shape[0])
    index = order[:, None, None, :].expand(batch, *mask.shape[1:3], -1)
    first = first.expand(batch, -1, -1, -1).gather(3, index)
    return torch.cat([first, mask[..., span:].expand(batch, -1, -1, -1)], dim=3)

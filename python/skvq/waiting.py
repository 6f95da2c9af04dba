"""Rows of one layer that are known and not stored yet, and the queries that were seen meanwhile.

Is: plain tensors in the model's dtype, in the order of positions, what the changes of a cache do to them, and their
way into a store. Is not: the decision how long they wait (layer.py), nor the choice of sinks (sinks.py).
Shapes: keys [B, Hkv, n, Dk], values [B, Hkv, n, Dv], queries [B, Hq, L, Dk]. Nothing here is written in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from ._native import CudaLayer, Layer
from .sinks import taken


@dataclass(frozen=True, eq=False)
class WaitingRows:
    """Keys and values of all tokens that a layer was given."""

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def length(self) -> int:
        """Tokens."""
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Of keys and values."""
        return self.keys.nbytes + self.values.nbytes

    def owned(self) -> WaitingRows:
        """A copy: a model may use the memory of what it gave away again before these rows are stored."""
        return WaitingRows(self.keys.clone(), self.values.clone())

    def followed_by(self, keys: torch.Tensor, values: torch.Tensor) -> WaitingRows:
        """With those of the next tokens."""
        return WaitingRows(torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2))

    def first(self, length: int) -> WaitingRows:
        """Of the first tokens, without the memory of the others."""
        return WaitingRows(self.keys[:, :, :length].clone(), self.values[:, :, :length].clone())

    def gathered(self, indices: list[int]) -> WaitingRows:
        """New batch row i is old row `indices[i]`."""
        return WaitingRows(self.keys[indices], self.values[indices])


@dataclass(frozen=True, eq=False)
class SeenQueries:
    """Queries of the L tokens before position `end`."""

    query: torch.Tensor
    end: int

    @property
    def begin(self) -> int:
        """Position of the first token."""
        return self.end - self.query.shape[2]

    def followed_by(self, query: torch.Tensor, end: int) -> SeenQueries:
        """With those of the tokens before `end`; alone, if tokens between them were not seen."""
        if end - query.shape[2] != self.end:
            return SeenQueries(query, end)
        return SeenQueries(torch.cat([self.query, query], dim=2), end)

    def of(self, begin: int, end: int) -> torch.Tensor | None:
        """Of the last of the tokens [begin, end), a range that these queries do not end in the midst of."""
        if end > self.end or end <= self.begin:
            return None
        return self.query[:, :, max(0, begin - self.begin) : end - self.begin]

    def first(self, length: int) -> SeenQueries | None:
        """Of the first tokens of the text; None if these are others."""
        if length >= self.end:
            return self
        return SeenQueries(self.query[:, :, : length - self.begin].clone(), length) if length > self.begin else None

    def gathered(self, indices: list[int]) -> SeenQueries:
        """New batch row i is old row `indices[i]`."""
        return SeenQueries(self.query[indices], self.end)


def fill(store: Layer | CudaLayer, rows: WaitingRows, order: torch.Tensor | None, seen: SeenQueries | None) -> None:
    """Append rows to a store without tokens, the first ones by their order, with the queries that were seen of them."""
    given = first = (rows.keys, rows.values)
    span = 0
    if order is not None:
        first, span = (taken(rows.keys, order), taken(rows.values, order)), order.shape[1]
    cuts = {0, span, rows.length, rows.length if seen is None else seen.end}
    for begin, end in pairwise(sorted(cuts)):
        keys, values = (x[:, :, begin:end] for x in (first if end <= span else given))
        store.append(keys, values, None if seen is None else seen.of(begin, end))

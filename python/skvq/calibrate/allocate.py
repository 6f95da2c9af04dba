"""How many bits each part of a row gets: exact search of the cheapest choice under a budget.

Is: the error of the formats' codebooks (`MSE`), the shapes of parts, the candidates of one stream of one layer with
their predicted costs, and the choice among them: for one stream, or for all streams of a model together. Is not: where
costs come from (spectral.py).

Parts are given in order of what an error there costs, with bits that do not rise. Neighbours with the same bits become
one part: a transform that spreads errors over both costs no more than two transforms do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations_with_replacement, groupby
from typing import TypeVar

import torch

from .._native import SkvqError

# Mean squared error of the Lloyd-Max quantizer of a standard normal variable, by bits: J. Max, "Quantizing for minimum
# distortion", IRE Trans. Inf. Theory 6 (1960), table I, with more digits. One bit: 1 - 2/π; no bits: the variance.
MSE: dict[int, float] = {0: 1.0, 1: 1.0 - 2.0 / math.pi, 2: 0.1174818, 3: 0.0345478, 4: 0.0095010, 5: 0.0025047}
# The same of levels that are evenly spaced, as far as has the least error (table II there).
EVEN_MSE: dict[int, float] = {0: 1.0, 1: 1.0 - 2.0 / math.pi, 2: 0.1188461, 3: 0.0374397, 4: 0.0115429, 5: 0.0034952}
ERRORS = {"lloyd-max": MSE, "uniform": EVEN_MSE}  # by the codebook of `StreamOptions`
ALLOWED_BITS = tuple(MSE)
MOST_EVEN_BITS = 2.5
WIDTH_UNIT = 16  # channels of a part: a multiple (src/FORMAT.md section 6)

Parts = tuple[tuple[int, int], ...]
Key = TypeVar("Key")


def error_of(bits: int, codebook: str = "lloyd-max") -> float:
    """What the bits of a channel of unit variance are chosen by: the quantizer's error, before the decoder's gain.

    The error of a decoded channel is MSE / (1 - MSE), since the decoder divides by 1 - MSE. Choosing by that gives
    fewer parts with one bit, and measured KL divergences that are a third higher (tests/bench/LOG.md).
    """
    return ERRORS[codebook][bits]


def even_if_few(bits: float) -> str:
    """Codebook of the parts of keys of so many mean bits."""
    return "uniform" if bits <= MOST_EVEN_BITS else "lloyd-max"


def equal_error(bits: float, codebook: str = "lloyd-max") -> float:
    """`error_of` for channels alike that have `bits` on average, from the two nearest whole numbers of bits."""
    low = min(math.floor(bits), max(ALLOWED_BITS) - 1)
    share = bits - low
    return (1.0 - share) * error_of(low, codebook) + share * error_of(low + 1, codebook)


def part_count(head_dim: int, wanted: int) -> int:
    """Parts of equal width, a multiple of 16: `wanted` where that divides, else the most below it that do, else (where
    only one part of whole units fits) one for every 16 channels.

    Raises SkvqError if `wanted` is not positive or the head cannot be cut.
    """
    if wanted < 1:
        raise SkvqError(f"parts={wanted!r}: expected an integer of at least 1")
    if head_dim < WIDTH_UNIT or head_dim % WIDTH_UNIT:
        raise SkvqError(f"head_dim={head_dim}: expected a positive multiple of {WIDTH_UNIT}")
    units = head_dim // WIDTH_UNIT
    count = max(x for x in range(1, wanted + 1) if units % x == 0)
    return units if count == 1 and wanted > 1 else count


def merged(bits: Sequence[int], width: int) -> Parts:
    """(bits, width) of runs of equal bits."""
    return tuple((value, width * len(list(run))) for value, run in groupby(bits))


@dataclass(frozen=True)
class Candidate:
    """One choice for one stream.

    Attributes:
        parts: (bits, width) of every part.
        bits: mean bits of a channel, codes only.
        cost: predicted.
    """

    parts: Parts
    bits: float
    cost: float


@lru_cache
def shapes(count: int, width: int) -> tuple[Parts, ...]:
    """All ways to give `count` parts bits that do not rise, the first at least 1."""
    descending = sorted(ALLOWED_BITS, reverse=True)
    return tuple(merged(x, width) for x in combinations_with_replacement(descending, count) if x[0])


def mean_bits(parts: Parts) -> float:
    """Mean bits of a channel, codes only."""
    return sum(bits * width for bits, width in parts) / sum(width for _, width in parts)


def candidates(head_dim: int, parts: int, cost: Callable[[Parts], float]) -> list[Candidate]:
    """The cheapest choice of every mean, in rising order of bits; those that a choice of fewer bits beats are left
    out.
    """
    count = part_count(head_dim, parts)
    found = [Candidate(x, mean_bits(x), cost(x)) for x in shapes(count, head_dim // count)]
    kept: list[Candidate] = []
    for candidate in sorted(found, key=lambda x: (x.bits, x.cost)):
        if not kept or candidate.cost < kept[-1].cost:
            kept.append(candidate)
    return kept


def cheapest(name: str, given: Sequence[Candidate], bits: float) -> Candidate:
    """The candidate of least cost with at most `bits` on average. Raises SkvqError if all need more."""
    fitting = [x for x in given if x.bits <= bits + 1e-9]
    if not fitting:
        raise SkvqError(f"{name}={bits:g}: expected at least {given[0].bits:g}, the fewest bits of {given[0].parts}")
    return min(fitting, key=lambda x: x.cost)


@dataclass(frozen=True)
class Share:
    """One stream of one layer among all.

    Attributes:
        candidates: what it may be given.
        elements: channels of one token, of all heads: what its bits weigh.
    """

    candidates: Sequence[Candidate]
    elements: int


def allocate(shares: Mapping[Key, Share], bits: float) -> dict[Key, Candidate]:
    """A candidate for every share, of least total cost with at most `bits` on average over all elements.

    Exact, by dynamic programming over the bits that are spent, in steps of the greatest common divisor of what
    candidates cost.

    Raises:
        SkvqError: even the smallest candidates need more.
    """
    spend = {key: [round(x.bits * share.elements) for x in share.candidates] for key, share in shares.items()}
    elements = sum(share.elements for share in shares.values())
    least = sum(min(x) for x in spend.values())
    budget = math.floor(bits * elements + 1e-6)
    if budget < least:
        raise SkvqError(f"bits={bits:g}: expected at least {least / elements:g}, the fewest that parts can have")
    step = math.gcd(*(x - min(given) for given in spend.values() for x in given)) or 1
    room = min((budget - least) // step, sum(max(x) - min(x) for x in spend.values()) // step)
    # best[u]: least cost of the shares so far when they take at most u steps beyond the least
    best = torch.zeros(room + 1, dtype=torch.float64)
    choices: list[torch.Tensor] = []
    for key, share in shares.items():
        options = torch.full((len(share.candidates), room + 1), math.inf, dtype=torch.float64)
        for row, (candidate, used) in enumerate(zip(share.candidates, spend[key], strict=True)):
            extra = (used - min(spend[key])) // step
            if extra <= room:
                options[row, extra:] = best[: room + 1 - extra] + candidate.cost
        best, choice = options.min(0)
        choices.append(choice)
    found: dict[Key, Candidate] = {}
    left = room
    for key, choice in reversed(list(zip(shares, choices, strict=True))):
        index = int(choice[left])
        left -= (spend[key][index] - min(spend[key])) // step
        found[key] = shares[key].candidates[index]
    return {key: found[key] for key in shares}

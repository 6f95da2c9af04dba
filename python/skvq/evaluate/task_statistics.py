"""Small statistics of the tasks: intervals for shares and means."""

from __future__ import annotations

import math
from collections.abc import Sequence


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a share by Wilson's score, which stays inside 0 … 1 and is not empty at either end."""
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"successes is {successes} of {trials}, expected 0 … trials, and trials of at least 1")
    from scipy.stats import binomtest

    interval = binomtest(successes, trials).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (0 for a single value)."""
    if not values:
        raise ValueError("values is empty, expected at least one")
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, 0.0
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))

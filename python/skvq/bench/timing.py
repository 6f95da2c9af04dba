"""Timing of several contestants in one run, in turns, so that whatever else the machine does hits all of them alike.

A layer's cache is not in the processor's cache when its turn comes in a model: between two calls a large buffer is
read (by one thread, so that no thread pool is kept awake by it), unless `warm` is asked for. Times are seconds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

_FLUSH_BYTES = 1 << 28


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median and the spread of several."""

    median: float
    fastest: float
    slowest: float
    rounds: int


class CacheFlush:
    """Reads 256 MiB to push everything else out of the processor's caches."""

    def __init__(self) -> None:
        self._buffer = np.ones(_FLUSH_BYTES // 8)

    def __call__(self) -> None:
        self._buffer.sum()


def host_seconds(call: Callable[[], object]) -> float:
    """Of one call, by the host's clock."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def time_in_turns(
    contestants: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 9,
    seconds: float = 20.0,
    flush: Callable[[], object] | None = None,
    once: Callable[[Callable[[], object]], float] = host_seconds,
) -> dict[str, Timing]:
    """Calls every contestant once unmeasured, then in turns until `rounds` rounds are done or, after at least 3,
    `seconds` are spent. `once` makes and times a call.
    """
    for call in contestants.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    started = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - started > seconds:
            break
        for name, call in contestants.items():
            if flush is not None:
                flush()
            times[name].append(once(call))
    return {name: Timing(statistics.median(found), min(found), max(found), len(found)) for name, found in times.items()}

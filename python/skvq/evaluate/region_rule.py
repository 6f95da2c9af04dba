"""Which tokens of a store are exact and which are packed, at any length: sinks | packed | waiting and window.

Is: the one rule that the parallel simulation and the stepping cache share. Is not: anything that holds rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

import torch

Waits = Literal["left", "exists"]
Count = TypeVar("Count", int, torch.Tensor)


@dataclass(frozen=True)
class RegionRule:
    """The first `sinks` and the last `window` tokens are exact, the ones between are packed as their unit allows.

    A unit is `unit` rows, counted from the first row behind the sinks, that need each other to be packed. With `waits`
    "left" it is packed as a whole once all its rows have left the window; with "exists" its statistics are fixed as
    soon as its last row is there, and its rows are packed one by one as they leave the window.
    """

    sinks: int
    window: int
    unit: int = 1
    waits: Waits = "left"

    def __post_init__(self) -> None:
        for name, least in (("sinks", 0), ("window", 0), ("unit", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least {least}")
        if self.waits not in ("left", "exists"):
            raise ValueError(f"waits={self.waits!r}: expected 'left' or 'exists'")

    def known(self, length: Count) -> Count:
        """Rows behind the sinks whose packed form is fixed, or could be, when `length` tokens are stored."""
        return _not_negative(length - self.sinks) // self.unit * self.unit

    def packed(self, length: Count) -> Count:
        """Rows behind the sinks that are packed when `length` tokens are stored."""
        left = _not_negative(length - self.sinks - self.window)
        if self.waits == "left":
            return left // self.unit * self.unit
        known = self.known(length)
        if isinstance(left, int) and isinstance(known, int):
            return min(left, known)
        return torch.minimum(left, known)


def _not_negative(count: Count) -> Count:
    return max(0, count) if isinstance(count, int) else count.clamp(min=0)

"""Calibration: statistics of a model's keys, values and queries, and the plans that are fitted to them.

`calibrate` makes a plan in one call (run.py). `collect` runs a model over texts once and keeps `Statistics` of bounded
size (collect.py, statistics.py). Names are imported when first used: the command line lists its commands without
loading torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .collect import collect
    from .moments import AttentionMoments, StreamMoments
    from .run import CalibrateOptions, calibrate
    from .statistics import CollectOptions, LayerStatistics, Sample, Statistics
    from .turning import TurnedMoments

__all__ = [
    "AttentionMoments",
    "CalibrateOptions",
    "CollectOptions",
    "LayerStatistics",
    "Sample",
    "Statistics",
    "StreamMoments",
    "TurnedMoments",
    "calibrate",
    "collect",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "collect": ("collect",),
        "moments": ("AttentionMoments", "StreamMoments"),
        "run": ("CalibrateOptions", "calibrate"),
        "statistics": ("CollectOptions", "LayerStatistics", "Sample", "Statistics"),
        "turning": ("TurnedMoments",),
    },
)

"""Calibration: statistics of a model's keys, values and queries, and the plans that are fitted to them.

`collect` runs a model over texts once and keeps `Statistics` of bounded size (collect.py, statistics.py).
"""

from __future__ import annotations

from .collect import collect
from .statistics import LayerStatistics, Sample, Statistics

__all__ = ["LayerStatistics", "Sample", "Statistics", "collect"]

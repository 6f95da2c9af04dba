"""Calibration: statistics of a model's keys, values and queries, and the plans that are fitted to them.

`collect` runs a model over texts once and keeps `Statistics` of bounded size (collect.py, statistics.py). Names are
imported when first used: the command line lists its commands without loading torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .collect import collect
    from .moments import AttentionMoments, StreamMoments
    from .statistics import CollectOptions, LayerStatistics, Sample, Statistics

__all__ = [
    "AttentionMoments",
    "CollectOptions",
    "LayerStatistics",
    "Sample",
    "Statistics",
    "StreamMoments",
    "collect",
]

_MODULES = {
    "collect": ("collect",),
    "moments": ("AttentionMoments", "StreamMoments"),
    "statistics": ("CollectOptions", "LayerStatistics", "Sample", "Statistics"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

"""`skvq bench growth`: one layer grows token by token, as in decoding, to 128K tokens.

Shows that old data is never copied: the time of an append stays flat (medians over equal stretches), and the peak of
the process's memory stays close to what the finished layer holds.
"""

from __future__ import annotations

import statistics
import time
from array import array
from dataclasses import asdict, dataclass
from typing import Any

import torch

from . import layers
from .layers import Shape
from .machine import make_report, peak_resident_bytes, release_free_memory, reset_peak, resident_bytes


@dataclass(frozen=True)
class GrowthOptions:
    """What `skvq bench growth` does."""

    format: str = "K2V1.6"
    num_key_value_heads: int = 8
    head_dim: int = 128
    tokens: int = 131072
    static: bool = False
    stretches: int = 32


def _grow(layer: Any, rows: list[tuple[torch.Tensor, torch.Tensor]], seconds: array[float]) -> None:
    """Appends len(seconds) tokens one by one and writes the seconds of every append; `rows` are used in turn."""
    for token in range(len(seconds)):
        key, value = rows[token % len(rows)]
        start = time.perf_counter()
        layer.append(key, value)
        seconds[token] = time.perf_counter() - start


def run_growth(options: GrowthOptions) -> dict[str, Any]:
    """Grows one layer (after a short one that warms everything up) and prints what it took."""
    shape = Shape(options.num_key_value_heads, options.num_key_value_heads, 1, options.tokens, options.head_dim)
    size = (1, options.num_key_value_heads, 256, options.head_dim)
    keys, values = torch.randn(size).to(torch.bfloat16), torch.randn(size).to(torch.bfloat16)
    pieces = [(keys[:, :, i : i + 1], values[:, :, i : i + 1]) for i in range(256)]
    _grow(layers.packed_layer(shape, options.format, static=options.static), pieces, array("d", bytes(8 * 2048)))
    layer = layers.packed_layer(shape, options.format, static=options.static)
    timings = array("d", [0.0]) * options.tokens  # written before the baseline of memory is taken
    release_free_memory()
    before = resident_bytes()
    reset_peak()
    _grow(layer, pieces, timings)
    peak, after = peak_resident_bytes(), resident_bytes()
    release_free_memory()
    trimmed = resident_bytes()
    length = options.tokens // options.stretches
    rows = []
    for index in range(options.stretches):
        stretch = timings[index * length : (index + 1) * length]
        rows.append(
            {
                "tokens": (index + 1) * length,
                "microseconds_per_append_median": statistics.median(stretch) * 1e6,
                "microseconds_per_append_mean": statistics.fmean(stretch) * 1e6,
                "slowest_milliseconds": max(stretch) * 1e3,
            }
        )
    quarter = max(1, options.stretches // 4)
    flat = statistics.median(row["microseconds_per_append_mean"] for row in rows[-quarter:]) / statistics.median(
        row["microseconds_per_append_mean"] for row in rows[:quarter]
    )
    memory: dict[str, Any] = {"layer_bytes": int(layer.nbytes), "bits_per_element": float(layer.bits_per_element)}
    if before is not None and peak is not None and after is not None and trimmed is not None:
        memory |= {
            "resident_growth": after - before,
            "peak_growth": peak - before,
            "resident_growth_without_free_memory": trimmed - before,
            "peak_over_final": (peak - before) / (trimmed - before),
            "peak_over_layer_bytes": (peak - before) / int(layer.nbytes),
        }
    else:
        memory |= {"resident_growth": None, "reason": "no /proc on this platform"}
    for row in rows[:: max(1, options.stretches // 8)]:
        print(
            f"to {row['tokens']:>7} tokens: {row['microseconds_per_append_mean']:8.2f} µs per append, "
            f"slowest {row['slowest_milliseconds']:.3f} ms"
        )
    print(f"last quarter over first quarter: {flat:.3f}; {memory}")
    return make_report("growth", asdict(options), rows, last_over_first_quarter=flat, memory=memory)

"""`skvq bench attend`: attention of one layer on packed bytes, of a decode step or of more queries, against torch's
scaled_dot_product_attention in float32 and bfloat16.

All contestants of a shape exist at once, hold the same random rows and take turns. Per row of the report:
milliseconds (median), the ratio to both SDPAs, bytes of the packed layer, GB/s of them, the share of the measured
copy bandwidth, and the relative distance of the output from float32 SDPA (a check that the work was done; random rows
are the worst case of a low-bit format, so it is large there).

Not here: the cost of a step around the kernel (`step`), encoding (`encode`).
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from . import layers
from .layers import Shape
from .machine import available_bytes, make_report, measure_copy_bandwidth
from .timing import CacheFlush, Timing, time_in_turns

FORMATS = ("K2V1.6", "fitted", "plan", "K2V2", "K2V1.5", "K4V4", "K8V8", "raw")
HEADS = ((8, 32), (32, 32))
BATCHES = (1, 8)
TOKENS = (4096, 8192, 16384, 32768, 65536, 131072)


@dataclass(frozen=True)
class AttendOptions:
    """The grid of `skvq bench attend`."""

    formats: tuple[str, ...] = FORMATS
    heads: tuple[tuple[int, int], ...] = HEADS
    batches: tuple[int, ...] = BATCHES
    tokens: tuple[int, ...] = TOKENS
    head_dim: int = 128
    queries: int = 1  # of a call, each of which sees all tokens; 1: a decode step
    static: bool = True  # also formats without the statistics they take from the rows by default
    rounds: int = 9
    warm: bool = False
    memory_share: float = 0.6  # of the available memory that one shape may take

    def quick(self) -> AttendOptions:
        """A grid for a minute or two."""
        return replace(self, heads=((8, 32),), batches=(1,), tokens=(4096, 32768), rounds=7)

    def shapes(self) -> list[Shape]:
        """The grid, cheapest first within each pair of head counts."""
        return [
            Shape(num_key_value_heads=kv, num_attention_heads=query, batch=batch, tokens=tokens, head_dim=self.head_dim)
            for kv, query in self.heads
            for batch in self.batches
            for tokens in self.tokens
        ]


def _bytes_needed(shape: Shape, formats: tuple[str, ...]) -> int:
    """An upper estimate: both SDPAs' keys and values, the packed copies, one piece of random rows."""
    bits = 0.0
    for name in formats:
        for one in layers.parse_format(name):
            bits += 2 * (
                16.0 if one == "raw" else float(one) + 0.25
            )  # two contestants each: static and block statistics
    return int(shape.elements * (2 * (4 + 2) + bits / 8))


def _sdpa(
    shape: Shape, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, out: list[torch.Tensor]
) -> Callable[[], None]:
    grouped = shape.num_attention_heads != shape.num_key_value_heads

    def call() -> None:
        out[:] = [F.scaled_dot_product_attention(query, keys, values, enable_gqa=grouped)]

    return call


def _packed(layer: Any, query: torch.Tensor, output: torch.Tensor, scale: float) -> Callable[[], None]:
    return lambda: layer.attend(query, output, scale=scale)


def _fill(shape: Shape, packed: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Appends the same rows to every packed layer, and returns them, bfloat16 [batch, num_key_value_heads, tokens,
    head_dim].
    """
    size = (shape.batch, shape.num_key_value_heads, shape.tokens, shape.head_dim)
    keys, values = torch.empty(size, dtype=torch.bfloat16), torch.empty(size, dtype=torch.bfloat16)
    start = 0
    for key_rows, value_rows in layers.random_rows(shape, torch.bfloat16):
        for layer in packed.values():
            layer.append(key_rows, value_rows)
        stop = start + key_rows.shape[2]
        keys[:, :, start:stop], values[:, :, start:stop] = key_rows, value_rows
        start = stop
    return keys, values


def _measure(
    shape: Shape, options: AttendOptions, flush: CacheFlush | None, copy_bandwidth: float
) -> list[dict[str, Any]]:
    packed = {}
    for name in options.formats:
        packed[name] = layers.packed_layer(shape, name, static=False)
        if options.static and layers.has_statistics(name):
            packed[f"{name} static"] = layers.packed_layer(shape, name, static=True)
    keys, values = _fill(shape, packed)
    query = torch.randn(shape.batch, shape.num_attention_heads, options.queries, shape.head_dim).to(torch.bfloat16)
    outputs = {name: torch.empty_like(query) for name in packed}
    results: dict[str, list[torch.Tensor]] = {"sdpa float32": [], "sdpa bfloat16": []}
    contestants = {
        "sdpa float32": _sdpa(shape, query.float(), keys.float(), values.float(), results["sdpa float32"]),
        "sdpa bfloat16": _sdpa(shape, query, keys, values, results["sdpa bfloat16"]),
    }
    for name, layer in packed.items():
        contestants[name] = _packed(layer, query, outputs[name], shape.head_dim**-0.5)
    times = time_in_turns(contestants, rounds=options.rounds, flush=flush)
    exact = results["sdpa float32"][0]
    held = {"sdpa float32": 8 * shape.elements, "sdpa bfloat16": 4 * shape.elements} | {
        name: int(layer.nbytes) for name, layer in packed.items()
    }
    found = {"sdpa float32": exact, "sdpa bfloat16": results["sdpa bfloat16"][0]} | outputs
    return [
        _row(shape, name, times, held[name], copy_bandwidth, float((found[name].float() - exact).norm() / exact.norm()))
        for name in contestants
    ]


def _row(
    shape: Shape, name: str, times: dict[str, Timing], held: int, copy_bandwidth: float, distance: float
) -> dict[str, Any]:
    timing = times[name]
    return asdict(shape) | {
        "contestant": name,
        "milliseconds": timing.median * 1e3,
        "fastest_milliseconds": timing.fastest * 1e3,
        "slowest_milliseconds": timing.slowest * 1e3,
        "rounds": timing.rounds,
        "times_faster_than_sdpa_float32": times["sdpa float32"].median / timing.median,
        "times_faster_than_sdpa_bfloat16": times["sdpa bfloat16"].median / timing.median,
        "bytes": held,
        "bits_per_element": 8 * held / (2 * shape.elements),
        "gigabytes_per_second": held / timing.median / 1e9,
        "share_of_copy_bandwidth": held / timing.median / copy_bandwidth,
        "relative_distance": distance,
    }


def _print_row(row: dict[str, Any]) -> None:
    print(
        f"  {row['contestant']:<20}{row['milliseconds']:>10.3f} ms{row['times_faster_than_sdpa_bfloat16']:>9.2f}x bf16"
        f"{row['times_faster_than_sdpa_float32']:>9.2f}x f32{row['gigabytes_per_second']:>8.2f} GB/s"
        f"{row['share_of_copy_bandwidth']:>7.0%} of copy{row['bits_per_element']:>8.3f} bits"
        f"{row['relative_distance']:>9.4f} off",
        flush=True,
    )


def run_attend(options: AttendOptions) -> dict[str, Any]:
    """Measures the grid; a shape that does not fit in memory becomes a row with the reason."""
    copy_bandwidth = measure_copy_bandwidth()
    print(
        f"copy bandwidth, read and write counted: {copy_bandwidth / 1e9:.1f} GB/s, {torch.get_num_threads()} threads",
        flush=True,
    )
    flush = None if options.warm else CacheFlush()
    rows: list[dict[str, Any]] = []
    for shape in options.shapes():
        print(shape, flush=True)
        needed, available = _bytes_needed(shape, options.formats), available_bytes()
        if available is not None and needed > options.memory_share * available:
            reason = (
                f"needs about {needed / 2**30:.1f} GiB, and may take {options.memory_share:.0%} "
                f"of the available {available / 2**30:.1f} GiB"
            )
            rows.append(asdict(shape) | {"skipped": reason})
            print(f"  skipped: {reason}", file=sys.stderr, flush=True)
            continue
        found = _measure(shape, options, flush, copy_bandwidth)
        for row in found:
            _print_row(row)
        rows += found
        gc.collect()
    return make_report("attend", asdict(options), rows, copy_bytes_per_second=copy_bandwidth)

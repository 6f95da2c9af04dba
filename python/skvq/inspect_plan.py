"""What a plan holds, for people and for programs: `skvq inspect`.

Is: a table with a line for every run of equal layers, and the same figures as plain values. Is not: the picture
(inspect_plot.py).
"""

from __future__ import annotations

import dataclasses
from itertools import groupby
from typing import Any

from .display import human_bytes
from .plan import StreamPlan
from .plan_file import QuantizationPlan

STATIC = tuple(x.name for x in dataclasses.fields(StreamPlan) if x.name != "options")
_HEADER = (
    "layer",
    "rows",
    "bits",
    "counted",
    "parts",
    "group",
    "metadata",
    "codebook",
    "rule",
    "clip",
    "transform",
    "block",
)
_PARTS = _HEADER.index("parts")


def plan_report(plan: QuantizationPlan) -> dict[str, Any]:
    """Everything but the static data itself, ready for JSON."""
    layers = {
        index: {
            name: {
                "options": stream.options.to_dict(),
                "counted_bits": plan.bits[index][name].bits if name in plan.bits[index] else None,
                "static": _static(stream),
                "static_bytes": _static_bytes(stream),
            }
            for name, stream in (("keys", layer.keys), ("values", layer.values))
        }
        for index, layer in plan.layers.items()
    }
    return {
        "method": plan.header.method,
        "skvq_version": plan.header.skvq_version,
        "fingerprint": plan.header.fingerprint.to_dict(),
        "texts": plan.header.texts,
        "notes": plan.header.notes,
        "window": plan.config.window,
        "sinks": plan.config.sinks,
        "counted_bits": {
            "keys": plan.average_bits(("keys",)),
            "values": plan.average_bits(("values",)),
            "average": plan.average_bits(),
        },
        "layers": layers,
    }


def plan_table(plan: QuantizationPlan) -> str:
    """Title, a line for every run of layers that are packed alike, and the sums."""
    rows: list[tuple[str, ...]] = [_HEADER]
    for name in ("keys", "values"):
        cells = [(index, _cells(plan, index, name)) for index in plan.layers]
        for figures, members in groupby(cells, key=lambda pair: pair[1]):
            indices = [index for index, _ in members]
            rows.append((_layer_numbers(indices), name, *figures))
    if not any(x.options.parts for layer in plan.layers.values() for x in (layer.keys, layer.values)):
        rows = [(*row[:_PARTS], *row[_PARTS + 1 :]) for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    fingerprint, averages = plan.header.fingerprint, [plan.average_bits(x) for x in (("keys",), ("values",))]
    static = sum(_static_bytes(x) for layer in plan.layers.values() for x in (layer.keys, layer.values))
    texts = ", ".join(plan.header.texts) or "no texts named"
    return "\n".join(
        [
            f"{plan.header.method} for {fingerprint.model_type}, made by skvq {plan.header.skvq_version} from {texts}",
            f"  {fingerprint.num_hidden_layers} layers, {len(plan.layers)} packed; sinks {plan.config.sinks}, "
            f"window {plan.config.window}",
            *("  " + line for line in lines),
            f"  counted bits: keys {averages[0]:.3f}, values {averages[1]:.3f}, average {plan.average_bits():.3f}; "
            f"static data {human_bytes(static)}",
        ]
    )


def _layer_numbers(indices: list[int]) -> str:
    """Such as "0-23", or "5, 11, 17" where layers between are not packed."""
    if len(indices) > 2 and indices == list(range(indices[0], indices[-1] + 1)):
        return f"{indices[0]}-{indices[-1]}"
    if len(indices) > 4:
        return f"{indices[0]}, {indices[1]} … {indices[-1]}"
    return ", ".join(map(str, indices))


def _cells(plan: QuantizationPlan, index: int, name: str) -> tuple[str, ...]:
    stream: StreamPlan = getattr(plan.layers[index], name)
    options, counted = stream.options.resolved(), plan.bits[index].get(name)
    bits = f"{counted.bits:.3f}" if counted else "-"
    if not options.is_packed:
        return (f"{options.bits:g}", bits, *["-"] * (len(_HEADER) - 4))
    codebook = options.codebook if isinstance(options.codebook, str) else f"own, {len(options.codebook or ())}"
    group = "auto" if options.group_size is None else str(options.group_size)
    if options.parts is not None:
        group = "row"
    rule = str(options.rule) + ("" if options.symmetric else " + zero") + (" unbiased" if options.unbiased else "")
    transform = [x for x in _static(stream) if x not in ("frequencies", "inverse")]
    transform += [] if "matrix" in transform else [options.rotation]
    return (
        f"{options.bits:g}",
        bits,
        parts_label(stream),
        group,
        str(options.metadata),
        codebook,
        rule,
        f"{options.clip:g}",
        " + ".join(transform),
        str(options.block),
    )


def parts_label(stream: StreamPlan) -> str:
    """Bits and width of every part, such as "4·32 3·32 0·64"; "-" without parts."""
    return " ".join(f"{bits}·{width}" for bits, width in stream.options.parts or ()) or "-"


def _static(stream: StreamPlan) -> list[str]:
    return [name for name in STATIC if getattr(stream, name) is not None]


def _static_bytes(stream: StreamPlan) -> int:
    values = [getattr(stream, name) for name in _static(stream)]
    # A permutation is kept as one byte or two for each channel; four, as in a store, is the safe figure.
    return sum(x.nbytes if hasattr(x, "nbytes") else 4 * _count(x) for x in values)


def _count(order: Any) -> int:
    return sum(_count(x) if isinstance(x, tuple) else 1 for x in order)

"""Plots of benchmark reports (matplotlib, extra `bench`): one picture per report, made from its JSON alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..models import ExtraNotInstalledError
from .layers import APART, MASKED


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ExtraNotInstalledError("plots need matplotlib: pip install 'skvq[bench]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _attend(report: dict[str, Any], pyplot: Any) -> Any:
    rows = [row for row in report["rows"] if "skipped" not in row and not row["contestant"].endswith((APART, MASKED))]
    panels = sorted({(row["num_key_value_heads"], row["num_attention_heads"], row["batch"]) for row in rows})
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    formats = list(dict.fromkeys(name.removesuffix(" static") for name in names))
    others = {row["contestant"] for row in rows if row.get("kind", row["contestant"][:4]) in ("sdpa", "f16", "low-bit")}
    size = (5.2 * len(panels) + 1.5, 4.2)
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, squeeze=False, sharey=True)
    for axis, panel in zip(axes[0], panels, strict=True):
        inside = [
            row for row in rows if (row["num_key_value_heads"], row["num_attention_heads"], row["batch"]) == panel
        ]
        for name in names:
            points = sorted((row["tokens"], row["milliseconds"]) for row in inside if row["contestant"] == name)
            colour = f"C{formats.index(name.removesuffix(' static'))}"
            style = "--" if name in others else ":" if name.endswith(" static") else "-"
            xs, ys = [x for x, _ in points], [y for _, y in points]
            axis.plot(xs, ys, style, color=colour, marker="o", markersize=3, label=name)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_title(f"{panel[0]} kv heads, {panel[1]} query heads, batch {panel[2]}", fontsize=10)
        axis.set_xlabel("tokens")
        axis.grid(alpha=0.3)
    queries = report["settings"].get("queries", 1)
    axes[0][0].set_ylabel("ms per layer and " + ("decode step" if queries == 1 else f"call of {queries} queries"))
    axes[0][-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return figure


def _generate(report: dict[str, Any], pyplot: Any) -> Any:
    rows = [row for row in report["rows"] if "skipped" not in row]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 0.45 * len(rows) + 1.5), sharey=True)
    names = [row["cache"] for row in rows]
    for axis, key, scale, label in (
        (axes[0], "decode_tokens_per_second", 1.0, "decode, tokens/s"),
        (axes[1], "cache_bytes_per_full_layer", 2.0**-20, "MiB per full-attention layer"),
    ):
        axis.barh(names, [row[key] * scale for row in rows])
        axis.set_xlabel(label)
        axis.grid(alpha=0.3, axis="x")
    axes[0].invert_yaxis()
    figure.suptitle(f"{report['model']}, {report['settings']['prompt_tokens']} tokens of prompt", fontsize=10)
    return figure


def _growth(report: dict[str, Any], pyplot: Any) -> Any:
    figure, axis = pyplot.subplots(figsize=(6, 4))
    axis.plot(
        [row["tokens"] for row in report["rows"]], [row["microseconds_per_append_mean"] for row in report["rows"]]
    )
    axis.set_xlabel("tokens in the layer")
    axis.set_ylabel("µs per append")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    return figure


def _capacity(report: dict[str, Any], pyplot: Any) -> Any:
    rows = sorted((row for row in report["rows"] if row["fits"]), key=lambda row: int(row["tokens"]))
    figure, axis = pyplot.subplots(figsize=(6, 4))
    axis.plot([row["tokens"] for row in rows], [row["decode_tokens_per_second"] for row in rows], marker="o")
    axis.axvline(report["longest"]["tokens"], linestyle=":", color="grey")
    axis.set_xlabel(f"tokens in the cache, filled by {report['filled_by']}")
    axis.set_ylabel("decode, tokens/s")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    return figure


_PLOTS = {"attend": _attend, "capacity": _capacity, "generate": _generate, "growth": _growth}


def plot(report: dict[str, Any], path: Path) -> None:
    """Saves the plot of a report of one of the benchmarks above (format by the file's ending)."""
    if report["benchmark"] not in _PLOTS:
        raise ValueError(f"there is no plot for benchmark {report['benchmark']!r}, only for {', '.join(_PLOTS)}")
    pyplot = _pyplot()
    figure = _PLOTS[report["benchmark"]](report, pyplot)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)

"""Pictures of the tasks' reports (matplotlib, extra `bench`): made from the JSON alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..bench.plot import _pyplot


def plot_retrieval(report: dict[str, Any], path: Path) -> None:
    """A heat map of the accuracy, length by depth, for every task (rows) and cache (columns)."""
    pyplot = _pyplot()
    cells = {(x["cache"], x["task"], x["length"], x["depth"]): x["accuracy"] for x in report["grid"]}
    names, tasks = (list(dict.fromkeys(x[field] for x in report["grid"])) for field in ("cache", "task"))
    lengths = sorted({x["length"] for x in report["grid"]})
    depths = report["settings"]["depths"]
    size = (1.1 + (0.75 * len(lengths) + 0.5) * len(names), 1.0 + (0.35 * depths + 0.9) * len(tasks))
    figure, axes = pyplot.subplots(
        len(tasks), len(names), figsize=size, squeeze=False, sharex=True, sharey=True, layout="constrained"
    )
    picture = None
    for row, task in enumerate(tasks):
        for column, name in enumerate(names):
            axis = axes[row][column]
            shares = [
                [cells.get((name, task, length, depth), float("nan")) for length in lengths] for depth in range(depths)
            ]
            picture = axis.imshow(shares, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            for y, line in enumerate(shares):
                for x, share in enumerate(line):
                    if share == share:
                        color = "black" if 0.2 < share < 0.8 else "white"
                        axis.text(x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=color)
            axis.set_xticks(range(len(lengths)), [_length(length) for length in lengths], fontsize=7)
            axis.set_yticks(range(depths), [f"{100 * (d + 0.5) / depths:.0f} %" for d in range(depths)], fontsize=7)
            if row == 0:
                title = name.removesuffix(".safetensors").replace(":", ":\n").replace(",", ",\n")
                axis.set_title(title, fontsize=7)
            if column == 0:
                axis.set_ylabel(f"{task}, depth", fontsize=8)
            if row == len(tasks) - 1:
                axis.set_xlabel("tokens", fontsize=8)
    figure.suptitle(f"{report['model']}: right answers, %", fontsize=9)
    figure.colorbar(picture, ax=axes, shrink=0.8, fraction=0.03)
    _save(pyplot, figure, path)


def plot_generation(report: dict[str, Any], path: Path) -> None:
    """KL divergence and agreement of the likeliest token along the forced text."""
    if not report["drift"]:
        raise ValueError("the report has no cache beside the reference: there is no drift to plot")
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name in dict.fromkeys(row["cache"] for row in report["drift"]):
        own = [row for row in report["drift"] if row["cache"] == name]
        middles = [(row["from"] + row["to"]) / 2 for row in own]
        errors = [row["kl_error"] for row in own]
        axes[0].errorbar(
            middles, [row["kl"] for row in own], yerr=errors, capsize=2, marker="o", markersize=3, label=name
        )
        axes[1].plot(middles, [row["top1_agreement"] for row in own], marker="o", markersize=3, label=name)
    axes[0].set_ylabel("KL divergence from full precision, nats")
    axes[0].set_ylim(bottom=0)
    axes[1].set_ylabel("same likeliest token")
    for axis in axes:
        axis.set_xlabel("generated token")
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=7)
    figure.suptitle(f"{report['model']}, along a text of full precision", fontsize=10)
    _save(pyplot, figure, path)


def _length(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)


def _save(pyplot: Any, figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140, bbox_inches="tight")
    pyplot.close(figure)

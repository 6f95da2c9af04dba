"""What a comparison found: rows of one method, length and chunk each, their means with intervals, table, JSON, plot.

Intervals are 95 % t-intervals over chunks, where there is more than one; beside them stands the standard error from
runs of 64 tokens within chunks. Perplexity rises are exp(mean difference of losses) - 1.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..models import ExtraNotInstalledError
from .memory_bits import EXACT_BITS

_MARKERS = "os^vDPX*<>"
Row = dict[str, Any]  # a JSON object: see `comparison.measure`
_COLUMNS = ("method", "bits", "K", "V", "bits at length", "KL (nats)", "top-1 %", "perplexity %", "chunks")


@dataclass(frozen=True)
class Estimate:
    """A mean, the half width of its 95 % interval over chunks (NaN for one chunk), its error within chunks."""

    mean: float
    half_width: float
    block_error: float

    def scaled(self, factor: float) -> Estimate:
        """In another unit."""
        return Estimate(self.mean * factor, self.half_width * factor, self.block_error * factor)

    def text(self, digits: int, sign: str = "") -> str:
        """`mean ± half width`; for one chunk the within-chunk error, marked with s.e."""
        width, mark = (self.block_error, " s.e.") if math.isnan(self.half_width) else (self.half_width, "")
        spread = "" if math.isnan(width) else f" ± {width:.{digits}f}{mark}"
        return f"{self.mean:{sign}.{digits}f}{spread}"


@dataclass(frozen=True)
class Summary:
    """One method at one length."""

    method: str
    tokens: int
    chunks: int
    scored: int
    key_bits: float
    value_bits: float
    bits: float
    bits_at_length: float
    kl: Estimate
    top1: Estimate  # share
    rise: Estimate  # of the loss, nats
    full_perplexity: float

    @property
    def perplexity_rise(self) -> Estimate:
        """Relative; the interval is that of the loss."""
        rise = math.exp(self.rise.mean) - 1
        slope = math.exp(self.rise.mean)
        return Estimate(rise, slope * self.rise.half_width, slope * self.rise.block_error)

    def cells(self) -> tuple[str, ...]:
        """As in the table."""
        kl_digits = 4 if self.kl.mean >= 0.01 else 5
        return (
            self.method,
            f"{self.bits:.3f}",
            f"{self.key_bits:.3f}",
            f"{self.value_bits:.3f}",
            f"{self.bits_at_length:.2f}",
            self.kl.text(kl_digits),
            self.top1.scaled(100).text(2),
            self.perplexity_rise.scaled(100).text(2, "+"),
            str(self.chunks),
        )


def _estimate(rows: Sequence[Row], name: str) -> Estimate:
    values, weights = [row[name] for row in rows], [row["scored"] for row in rows]
    mean = sum(x * w for x, w in zip(values, weights, strict=True)) / sum(weights)
    return Estimate(mean, _half_width(values), error_within_chunks(rows, name))


def error_within_chunks(rows: Sequence[Row], name: str) -> float:
    """Standard error of the mean of figure `name` over the scored tokens of all rows, from blocks of tokens of each
    chunk; NaN where a row has none.
    """
    weights, errors = [row["scored"] for row in rows], [row[f"{name}_block_error"] for row in rows]
    known = [math.nan if x is None else x for x in errors]
    return math.sqrt(sum((x * w) ** 2 for x, w in zip(known, weights, strict=True))) / sum(weights)


def _half_width(values: Sequence[float]) -> float:
    if len(values) < 2:
        return math.nan
    try:
        from scipy.stats import t
    except ImportError:
        raise ExtraNotInstalledError("intervals over chunks need scipy: pip install scipy") from None
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1))
    return float(t.ppf(0.975, len(values) - 1)) * deviation / math.sqrt(len(values))


@dataclass
class Report:
    """All rows of a comparison and its settings."""

    settings: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    def summaries(self) -> list[Summary]:
        """For each length and method, in the order of the rows."""
        groups: dict[tuple[int, str], list[Row]] = {}
        for row in self.rows:
            groups.setdefault((row["tokens"], row["method"]), []).append(row)
        return [self._summary(tokens, name, rows) for (tokens, name), rows in sorted(groups.items(), key=_by_length)]

    def _summary(self, tokens: int, name: str, rows: list[Row]) -> Summary:
        scored = sum(row["scored"] for row in rows)
        full_loss = sum(row["full_loss"] * row["scored"] for row in rows) / scored
        counted: dict[str, float] = {x: rows[0][x] for x in ("key_bits", "value_bits", "bits", "bits_at_length")}
        return Summary(
            method=name,
            tokens=tokens,
            chunks=len(rows),
            scored=scored,
            kl=_estimate(rows, "kl"),
            top1=_estimate(rows, "top1"),
            rise=_estimate(rows, "rise"),
            full_perplexity=math.exp(full_loss),
            **counted,
        )

    def table(self) -> str:
        """Text, one part for each length."""
        parts = []
        for tokens, members in self._by_length().items():
            lines = [_COLUMNS, *(summary.cells() for summary in members)]
            widths = [max(len(line[column]) for line in lines) for column in range(len(_COLUMNS))]
            body = ["  ".join(_aligned(line, widths)).rstrip() for line in lines]
            parts.append("\n".join([self._title(tokens, members), *body]))
        return "\n\n".join(parts)

    __str__ = table

    def _title(self, tokens: int, members: Sequence[Summary]) -> str:
        keys = ("model", "window", "sinks")
        settings = ", ".join(f"{key} {self.settings[key]}" for key in keys if key in self.settings)
        scored = max(member.scored for member in members)
        return (
            f"{settings}; chunks of {tokens} tokens, {scored} scored, full-precision perplexity "
            f"{members[0].full_perplexity:.3f}"
        )

    def _by_length(self) -> dict[int, list[Summary]]:
        parts: dict[int, list[Summary]] = {}
        for summary in self.summaries():
            parts.setdefault(summary.tokens, []).append(summary)
        return parts

    def _repr_html_(self) -> str:
        parts = []
        for tokens, members in self._by_length().items():
            head = "".join(f"<th>{html.escape(column)}</th>" for column in _COLUMNS)
            cells = ("".join(f"<td>{html.escape(cell)}</td>" for cell in member.cells()) for member in members)
            body = "".join(f"<tr>{line}</tr>" for line in cells)
            title = html.escape(self._title(tokens, members))
            parts.append(f"<div><b>{title}</b><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>")
        return "".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: settings, summaries, rows."""
        summaries = [asdict(x) | {"perplexity_rise": asdict(x.perplexity_rise)} for x in self.summaries()]
        return {"settings": self.settings, "summaries": without_nan(summaries), "rows": self.rows}

    def save_json(self, path: Path) -> None:
        """Write `to_dict`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    def save_plot(self, path: Path) -> None:
        """Bits of a packed element against KL divergence (logarithmic), one panel for each length; format by ending.

        Raises ExtraNotInstalledError without matplotlib, ValueError if there is nothing to draw.
        """
        from ..bench.plot import _pyplot

        pyplot = _pyplot()
        parts = self._by_length()
        if not parts:
            raise ValueError("nothing was measured: there is nothing to plot")
        figure, axes = pyplot.subplots(1, len(parts), figsize=(7.5 * len(parts), 5.5), squeeze=False, sharey=True)
        for axis, (tokens, members) in zip(axes[0], parts.items(), strict=True):
            _draw(axis, [member for member in members if member.kl.mean > 1e-6])
            axis.set_title(f"{self.settings.get('model', '')}, {tokens} tokens", fontsize=10)
        axes[0][0].set_ylabel("KL divergence from full precision (nats)")
        figure.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=140)
        pyplot.close(figure)


def _draw(axis: Any, members: Sequence[Summary]) -> None:
    """Unpacked rows, at 16 bits, are what rounding alone does: a line."""
    for member in members:
        if member.bits >= EXACT_BITS:
            axis.axhline(member.kl.mean, color="0.6", lw=0.8, ls="--", label=member.method)
            axis.legend(fontsize=7, loc="lower right")
    packed = [member for member in members if member.bits < EXACT_BITS]
    families = list(dict.fromkeys(member.method.split()[0] for member in packed))
    for member in packed:
        family = families.index(member.method.split()[0])
        spread = member.kl.block_error if math.isnan(member.kl.half_width) else member.kl.half_width
        error = None if math.isnan(spread) else [[min(spread, 0.9 * member.kl.mean)], [spread]]
        marker, colour = _MARKERS[(family + family // 10) % len(_MARKERS)], f"C{family % 10}"
        axis.errorbar(member.bits, member.kl.mean, yerr=error, fmt=marker, color=colour, markersize=5, lw=0.8)
        place = (member.bits, member.kl.mean)
        axis.annotate(member.method, place, fontsize=6, xytext=(4, 3), textcoords="offset points")
    axis.set_yscale("log")
    axis.margins(x=0.15)
    axis.set_xlabel("bits of a packed element, everything counted")
    axis.grid(alpha=0.3)


def _by_length(item: tuple[tuple[int, str], list[Row]]) -> int:
    return item[0][0]


def _aligned(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    first = line[0].ljust(widths[0])
    return [first, *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]


def without_nan(value: Any) -> Any:
    convert: dict[type, Callable[[Any], Any]] = {
        dict: lambda x: {key: without_nan(item) for key, item in x.items()},
        list: lambda x: [without_nan(item) for item in x],
        float: lambda x: None if math.isnan(x) else x,
    }
    return convert.get(type(value), lambda x: x)(value)

"""What a cache looks like: a table for `repr`, the same with bars for notebooks.

Is: text and HTML from plain figures of layers. Is not: anything that reads tensors.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

_COLOURS = {"sinks": "#c2410c", "packed": "#2563eb", "window": "#94a3b8"}
_BAR_PIXELS = 320


@dataclass(frozen=True)
class LayerFigures:
    """Regions, bytes and stored elements of one layer."""

    kind: str
    batch: int
    heads: int
    sinks: int
    packed: int
    window: int
    nbytes: int
    elements: int

    @property
    def tokens(self) -> int:
        return self.sinks + self.packed + self.window

    @property
    def bits(self) -> str:
        """Bits of a stored element, everything counted."""
        return f"{8 * self.nbytes / self.elements:.2f}" if self.elements else "-"


def human_bytes(count: int) -> str:
    """`count` with a binary unit."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"


def _runs(layers: Sequence[LayerFigures]) -> list[tuple[str, LayerFigures]]:
    """Neighbouring layers with equal figures as one row."""
    rows = []
    for figures, members in groupby(enumerate(layers), key=lambda pair: pair[1]):
        indices = [index for index, _ in members]
        rows.append((f"{indices[0]}-{indices[-1]}" if len(indices) > 1 else str(indices[0]), figures))
    return rows


def _total(layers: Sequence[LayerFigures]) -> str:
    nbytes, elements = sum(x.nbytes for x in layers), sum(x.elements for x in layers)
    bits = f", {8 * nbytes / elements:.2f} bits per element" if elements else ""
    return f"{human_bytes(nbytes)}{bits}"


def text_table(title: str, layers: Sequence[LayerFigures]) -> str:
    """A table with one row for each run of equal layers; bytes are those of one layer."""
    header = ("layer", "kind", "batch", "heads", "sinks", "packed", "window", "bytes", "bits")
    rows: list[tuple[str, ...]] = [header]
    for name, x in _runs(layers):
        figures = (x.batch, x.heads, x.sinks, x.packed, x.window)
        rows.append((name, x.kind, *map(str, figures), human_bytes(x.nbytes), x.bits))
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([title, *("  " + line for line in lines), f"  total {_total(layers)}"])


def html_table(title: str, layers: Sequence[LayerFigures]) -> str:
    """The table as HTML, the regions of every row as a bar whose length is the number of tokens."""
    longest = max((x.tokens for x in layers), default=0) or 1
    legend = " ".join(f'<span style="color:{colour}">&#9632;</span> {name}' for name, colour in _COLOURS.items())
    head = "".join(f"<th>{name}</th>" for name in ("layer", "kind", "tokens", legend, "bytes", "bits"))
    body = "".join(
        f"<tr><td>{name}</td><td>{html.escape(x.kind)}</td><td>{x.tokens}</td><td>{_bar(x, longest)}</td>"
        f"<td>{human_bytes(x.nbytes)}</td><td>{x.bits}</td></tr>"
        for name, x in _runs(layers)
    )
    return (
        f"<div><b>{html.escape(title)}</b><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        f"total {_total(layers)}</div>"
    )


def _bar(figures: LayerFigures, longest: int) -> str:
    cells = []
    for name, colour in _COLOURS.items():
        tokens = getattr(figures, name)
        if tokens:
            width = max(1, round(_BAR_PIXELS * tokens / longest))
            style = f"display:inline-block;height:12px;width:{width}px;background:{colour}"
            cells.append(f'<span style="{style}" title="{name}: {tokens}"></span>')
    return f'<span style="white-space:nowrap;font-size:0">{"".join(cells)}</span>'

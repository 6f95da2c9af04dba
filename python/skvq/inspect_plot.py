"""A picture of one layer of a plan: static data and codebook, and channels before and after the transform.

Is: matplotlib (extra `bench`). Is not: anything that computes more than the codec's twin does (reference.py).
Shapes: rows of a sample [Hkv, n, D], any floating type.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._native import SkvqError
from .bench.plot import _pyplot
from .calibrate.statistics import Sample
from .config import Parts
from .evaluate.methods.ours import reference_codec
from .plan import StreamPlan
from .plan_file import QuantizationPlan
from .reference import ReferenceCodec
from .reference_codes import LevelCodes
from .reference_parts import part_levels

_INK = "#475569"
_BEFORE, _AFTER = "#c2410c", "#2563eb"


def save_picture(
    plan: QuantizationPlan, layer: int, path: Path | str, *, head: int = 0, sample: Sample | None = None
) -> None:
    """Draw kv head `head` of one layer; with a sample also its channels before and after the transform.

    Raises:
        SkvqError: there is no such layer or head.
        ExtraNotInstalledError: matplotlib is missing.
    """
    pyplot = _pyplot()
    if layer not in plan.layers:
        raise SkvqError(f"layer={layer}: expected one of {', '.join(map(str, plan.layers))}")
    fingerprint = plan.header.fingerprint
    heads = fingerprint.num_key_value_heads[fingerprint.packed_layers.index(layer)]
    if heads is not None and head >= heads:
        raise SkvqError(f"head={head}: expected 0 to {heads - 1}")
    columns = 3 + 2 * (sample is not None)
    figure, axes = pyplot.subplots(2, columns, figsize=(4.4 * columns, 6.4), squeeze=False, layout="constrained")
    for row, name in zip(axes, ("keys", "values"), strict=True):
        stream: StreamPlan = getattr(plan.layers[layer], name)
        _draw_channels(row[0], stream, head)
        _draw_matrix(figure, row[1], stream, head)
        _draw_codebook(row[2], stream)
        row[0].set_ylabel(name, fontsize=13)
        if sample is not None:
            _draw_transform(row[3], row[4], stream, getattr(sample, name)[head].float(), head, plan.config.sinks)
    model = f"{fingerprint.model_type}, layer {layer}, kv head {head}"
    figure.suptitle(f"{plan.header.method}: {model}")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _head_of(values: Any, head: int) -> Tensor:
    """A static field of one head: [D] or [D, D]."""
    found = torch.as_tensor(values)
    return found if found.ndim == 1 else found[head]


def _empty(axis: Any, text: str) -> None:
    axis.text(0.5, 0.5, text, ha="center", va="center", transform=axis.transAxes, color=_INK, wrap=True)
    axis.set_xticks([])
    axis.set_yticks([])


def _draw_channels(axis: Any, stream: StreamPlan, head: int) -> None:
    axis.set_title("shift ± scale of the channels", fontsize=10)
    if stream.shift is None and stream.scale is None:
        what = f"from blocks of {stream.options.block} rows" if stream.options.block else "none"
        _empty(axis, f"no static shift or scale:\n{what}")
        return
    shift = None if stream.shift is None else _head_of(stream.shift, head)
    scale = None if stream.scale is None else _head_of(stream.scale, head)
    middle = torch.zeros_like(scale) if shift is None and scale is not None else shift
    assert middle is not None
    channel = torch.arange(middle.shape[0])
    axis.plot(channel, middle, ".", color=_INK, markersize=3)
    if scale is not None:
        axis.fill_between(channel, middle - scale, middle + scale, step="mid", color=_AFTER, alpha=0.35, linewidth=0)
    axis.set_xlabel("channel")


def _draw_matrix(figure: Any, axis: Any, stream: StreamPlan, head: int) -> None:
    if stream.matrix is not None:
        axis.set_title("matrix", fontsize=10)
        entries = _head_of(stream.matrix, head)
        limit = float(entries.abs().max()) or 1.0
        image = axis.imshow(entries, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        figure.colorbar(image, ax=axis, shrink=0.8)
        axis.set_xlabel("channel")
    elif stream.permutation is not None:
        axis.set_title(f"order of the channels after {stream.options.rotation}", fontsize=10)
        order = _head_of(stream.permutation, head)
        axis.plot(torch.arange(order.shape[0]), order, ".", color=_INK, markersize=4)
        axis.set_xlabel("place")
    else:
        axis.set_title("transform", fontsize=10)
        _empty(axis, f"rotation: {stream.options.rotation}")


def _draw_codebook(axis: Any, stream: StreamPlan) -> None:
    axis.set_title(f"codebook, {stream.options.bits:g} bits", fontsize=10)
    if not stream.options.is_packed:
        _empty(axis, "rows are kept as they are")
        return
    if stream.options.parts is not None:
        _draw_parts(axis, stream.options.parts, str(stream.options.resolved().codebook))
        return
    options = stream.options.resolved()
    levels = LevelCodes(options.format, options.codebook).levels
    if levels.ndim == 2:
        axis.plot(levels[:, 0], levels[:, 1], "o", color=_AFTER)
        axis.set_aspect("equal", adjustable="datalim")
        axis.grid(alpha=0.3)
        return
    if levels.numel() <= 16:
        axis.vlines((levels[:-1] + levels[1:]) / 2, 0, 1, color=_INK, linestyle=":", linewidth=1)
    axis.vlines(levels, 0, 1, color=_AFTER, linewidth=2 if levels.numel() <= 16 else 0.4)
    axis.set_yticks([])
    axis.set_xlabel("level (dotted: borders), in scales")


def _draw_parts(axis: Any, parts: Parts, codebook: str) -> None:
    """The levels of every part, the first on top."""
    axis.set_title(f"levels of {len(parts)} parts", fontsize=10)
    for row, (bits, _) in enumerate(parts):
        levels = part_levels(bits, codebook) if bits else torch.zeros(1)
        axis.vlines(levels, row - 0.35, row + 0.35, color=_AFTER, linewidth=2)
    axis.set_yticks(range(len(parts)), [f"{bits}·{width}" for bits, width in parts])
    axis.invert_yaxis()
    axis.set_xlabel("level, in scales")


def _draw_transform(before: Any, after: Any, stream: StreamPlan, rows: Tensor, head: int, sinks: int) -> None:
    """Box plots of the rows [n, D] behind the sinks, and of what the quantizer sees of them."""
    rows = rows[sinks:]
    before.set_title("channels before", fontsize=10)
    after.set_title("channels after", fontsize=10)
    seen, decoded, exact = _transformed(stream, rows, head, sinks)
    _boxes(before, rows, _BEFORE)
    if seen.shape[0] == 0:
        _empty(after, "no complete block" if stream.options.is_packed else "rows are kept as they are")
        return
    _boxes(after, seen, _AFTER)
    spread = (exact - exact.mean(0)).square().sum()
    error = float((decoded - exact).square().sum() / spread)
    after.set_title(f"channels after (error {100 * error:.1f} % of the variance)", fontsize=10)


def _transformed(stream: StreamPlan, rows: Tensor, head: int, position: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [n, D] as the quantizer sees them, as they are read back, and as they were; n may shrink to whole blocks."""
    if not stream.options.is_packed:
        return rows[:0], rows[:0], rows[:0]
    codec: ReferenceCodec = reference_codec(stream, rows.shape[1])
    if not codec.block:
        read = codec.fake_quantize(rows, head, position=position)
        return codec.transform(rows, head, None, position=position), read, rows
    whole = rows.shape[0] // codec.block * codec.block
    if not whole:
        return rows[:0], rows[:0], rows[:0]
    blocks = rows[:whole].unflatten(0, (-1, codec.block))
    shift, scale = codec.block_statistics(blocks)
    statistics = (shift[:, None], scale[:, None])
    decoded = codec.fake_quantize(blocks, head, statistics)
    return codec.transform(blocks, head, statistics).flatten(0, 1), decoded.flatten(0, 1), rows[:whole]


def _boxes(axis: Any, rows: Tensor, colour: str) -> None:
    """For every channel the middle half, the middle 98 % and the extremes."""
    channel = torch.arange(rows.shape[1])
    marks = torch.quantile(rows, torch.tensor([0.0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.0]), dim=0)
    axis.vlines(channel, marks[1], marks[5], color=colour, alpha=0.45, linewidth=1)
    axis.vlines(channel, marks[2], marks[4], color=colour, linewidth=2.5)
    for extreme in (marks[0], marks[6]):
        axis.plot(channel, extreme, ".", color=_INK, markersize=1.5)
    axis.plot(channel, marks[3], "_", color="white", markersize=3)
    axis.axhline(0.0, color=_INK, linewidth=0.5)
    axis.set_xlabel("channel")

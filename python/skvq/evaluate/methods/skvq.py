"""SKVQ as its paper describes it (Duanmu et al., arXiv 2405.06219): channel reorder, clipped groups, FP8 metadata.

Channels of all heads of a layer are clustered by their range over calibration texts, so that a group holds channels
alike (groups of unequal size, as in the paper's release); every group of a token has a minimum and a step, both
shrunk by alpha, which is chosen per layer by the error of the attention output. Keys after RoPE or, as the paper has
them, before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...models import ExtraNotInstalledError
from ..rope import before_rope
from .base import Geometry, Where
from .quantizers import TwoStreams, check_metadata, code_bits, level_count, min_max

if TYPE_CHECKING:
    from ..calibration_rows import CalibrationRows, RowsOfLayer

CLIP_GRID = (1.0, 0.98, 0.96, 0.94, 0.92, 0.88, 0.84, 0.8)
_STARTS = 10  # of the clustering


@dataclass(eq=False)
class Skvq(TwoStreams):
    """`group` channels on average in a group; `clip` None chooses alpha, `reorder` false leaves channels in place."""

    group: int = 64
    metadata: str = "e4m3"
    reorder: bool = True
    clip: float | None = None
    pre_rope: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_metadata(self.metadata)
        if self.group < 2:
            raise ValueError(f"group={self.group}: expected at least 2 channels")
        if self.clip is not None and not 0.0 < self.clip <= 1.0:
            raise ValueError(f"clip={self.clip!r}: expected a number above 0 and up to 1, or none")
        self.before_rope = self.pre_rope
        self.needs_calibration = self.reorder or self.clip is None
        self._groups: dict[tuple[int, bool], list[Tensor]] = {}  # channels of each group, of all heads of a layer
        self._clips: dict[tuple[int, bool], float] = {}
        parts = [f"SKVQ {self.bits_label} g{self.group}"]
        parts += ["pre-RoPE"] * self.pre_rope + ["no reorder"] * (not self.reorder)
        parts += [f"clip {self.clip:g}"] if self.clip is not None else []
        parts += ["fp16"] if self.metadata == "fp16" else []
        self.name = " ".join(parts)

    def prepare(self, rows: CalibrationRows) -> None:
        """Ranges and groups, then alpha."""
        for layer in rows.layers:
            chunks = list(rows.of_layer(layer))
            for keys in (True, False):
                if self.reorder:
                    self._groups[layer, keys] = self._clusters(chunks, keys)
                if self.clip is None:
                    self._clips[layer, keys] = self._best_clip(chunks, layer, keys)

    def _clusters(self, chunks: list[RowsOfLayer], keys: bool) -> list[Tensor]:
        from ..calibration_rows import SINKS

        streams = [x.keys_before_rope if keys and self.pre_rope else x.stream(keys) for x in chunks]
        low = torch.stack([x[:, SINKS:].amin(1) for x in streams]).amin(0).flatten()
        high = torch.stack([x[:, SINKS:].amax(1) for x in streams]).amax(0).flatten()
        return cluster_channels(torch.stack([low, high], dim=1), max(1, round(low.numel() / self.group)))

    def _best_clip(self, chunks: list[RowsOfLayer], layer: int, keys: bool) -> float:
        errors = {}
        for clip in CLIP_GRID:
            self._clips[layer, keys] = clip
            errors[clip] = sum(chunk.output_error(self, keys) for chunk in chunks)
        return min(errors, key=errors.__getitem__)

    def bits(self, geometry: Geometry, keys: bool) -> float:
        """Codes, and two numbers a group."""
        width = geometry.width
        groups = len(self._groups_of(geometry.layer, keys, width))
        codes = code_bits(self.stream_bits(keys), width)
        return codes + 2 * check_metadata(self.metadata) * groups / width

    def fake_quantize(self, rows: Tensor, where: Where) -> Tensor:
        """Token by token."""
        if where.keys and self.pre_rope:
            return before_rope(rows, where.rope, where.start, lambda x: self._quantize(x, where))
        return self._quantize(rows, where)

    def _quantize(self, rows: Tensor, where: Where) -> Tensor:
        tokens = rows.transpose(1, 2).flatten(2)
        levels = level_count(self.stream_bits(where.keys))
        clip = self._clips.get((where.layer, where.keys), 1.0) if self.clip is None else self.clip
        read = torch.empty_like(tokens)
        for channels in self._groups_of(where.layer, where.keys, tokens.shape[-1]):
            read[..., channels] = min_max(tokens[..., channels], -1, levels, self.metadata, clip)
        return read.unflatten(2, (rows.shape[1], -1)).transpose(1, 2)

    def _groups_of(self, layer: int, keys: bool, width: int) -> list[Tensor]:
        if not self.reorder:
            return list(torch.arange(width).split(self.group))
        return self.fitted(self._groups, layer, keys)


def cluster_channels(points: Tensor, count: int) -> list[Tensor]:
    """Channels in `count` clusters (or fewer, if some stay empty) by k-means on `points` [channels, features]."""
    try:
        from scipy.cluster.vq import kmeans2
    except ImportError:
        raise ExtraNotInstalledError("clustering channels needs scipy: pip install scipy") from None
    data = points.double().numpy()
    best, least = None, float("inf")
    for seed in range(_STARTS):
        centres, labels = kmeans2(data, count, minit="++", seed=seed, missing="warn")
        error = float(((data - centres[labels]) ** 2).sum())
        if error < least:
            best, least = torch.from_numpy(labels).long(), error
    assert best is not None
    return [members for label in range(count) if len(members := (best == label).nonzero()[:, 0])]

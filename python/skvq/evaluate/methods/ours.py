"""This package's own codec, through its twin in plain torch: with the options of `SkvqConfig`, or with a plan file."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...config import SkvqConfig, StreamOptions
from ...plan import LayerPlan, StreamPlan
from ...reference import ReferenceCodec
from .base import Geometry, Method, ReadBack, Where
from .quantizers import bits_label

if TYPE_CHECKING:
    from ...plan_file import QuantizationPlan
    from ..texts import Text


def reference_codec(plan: StreamPlan, head_dim: int) -> ReferenceCodec:
    """The codec of a stream, in plain torch: its options and static data under the same names."""
    options = plan.options.resolved()
    if not options.is_packed:
        return ReferenceCodec(head_dim=head_dim, format=options.format)
    chosen = {item.name: getattr(options, item.name) for item in dataclasses.fields(StreamOptions)}
    del chosen["bits"]
    static = {item.name: getattr(plan, item.name) for item in dataclasses.fields(StreamPlan) if item.name != "options"}
    chosen |= {name: value for name, value in static.items() if value is not None}
    return ReferenceCodec(head_dim=head_dim, format=options.format, **chosen)


def has_static_data(plan: StreamPlan) -> bool:
    """Whether heads differ, so that each must be coded by itself."""
    return any(
        getattr(plan, item.name) is not None for item in dataclasses.fields(StreamPlan) if item.name != "options"
    )


def _uses_queries(keys: StreamOptions) -> bool:
    return keys.is_packed and keys.block > 0 and keys.query_exponent > 0.0


class _Codecs:
    """Codecs of layers and streams, made once."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, bool, int], ReferenceCodec] = {}

    def get(self, plan: LayerPlan, layer: int, keys: bool, head_dim: int) -> ReferenceCodec:
        key = (layer, keys, head_dim)
        if key not in self._made:
            self._made[key] = reference_codec(plan.keys if keys else plan.values, head_dim)
        return self._made[key]


class _PackedRows(Method):
    """Rows coded by `ReferenceCodec` as the plan of their layer says."""

    waits = "exists"
    _codecs: _Codecs

    def layer_plan(self, layer: int) -> LayerPlan:
        """The plan of one layer."""
        raise NotImplementedError

    def unit_of(self, layer: int) -> int:
        """The block of the layer's streams, 1 without."""
        plan = self.layer_plan(layer)
        blocks = (x.options.block for x in (plan.keys, plan.values) if x.options.is_packed)
        return math.lcm(*(max(1, block) for block in blocks))

    def bits(self, geometry: Geometry, keys: bool) -> float:
        """Codes, metadata and statistics of blocks, as the codec counts them."""
        plan = self.layer_plan(geometry.layer)
        codec = self._codecs.get(plan, geometry.layer, keys, geometry.head_dim)
        return 16.0 if codec.format == "raw" else codec.bits_per_element

    def fake_quantize(self, rows: Tensor, where: Where) -> Tensor:
        """Encoded and decoded."""
        return self.read_back(rows, where).rows

    def read_back(self, rows: Tensor, where: Where) -> ReadBack:
        """Encoded and decoded, and the squared scale of a row where the plan takes noise off scores."""
        plan = self.layer_plan(where.layer)
        codec = self._codecs.get(plan, where.layer, where.keys, rows.shape[-1])
        if not has_static_data(plan.keys if where.keys else plan.values):
            return ReadBack(codec.fake_quantize(rows, factors=self._query_factors(codec, where)))
        heads = range(rows.shape[1])
        if codec.map is None or codec.map.noise is None:
            read = [codec.fake_quantize(rows[:, head], head, position=where.start) for head in heads]
            return ReadBack(torch.stack(read, dim=1))
        coded = [codec.quantize(rows[:, head], head, position=where.start) for head in heads]
        read = [codec.dequantize(coded[head], head, position=where.start) for head in heads]
        return ReadBack(torch.stack(read, dim=1), torch.stack([x.scale[..., 0].square() for x in coded], dim=1))

    def _query_factors(self, codec: ReferenceCodec, where: Where) -> Tensor | None:
        """From the queries before the token that completes the first block: what a store sees step by step."""
        if not where.keys or not codec.query_exponent:
            return None
        if where.queries is None:
            raise ValueError(f"{self.name}: where.queries=None: expected the queries, which say how keys are packed")
        seen = where.queries[:, :, : where.start + codec.block - 1].double()
        return codec.query_factors(seen.square().mean((1, 2)))

    def score_noise(self, queries: Tensor, layer: int) -> Tensor:
        """½·Σ_j κ_j (Bᵀq)_j²."""
        codec = self._codecs.get(self.layer_plan(layer), layer, True, queries.shape[-1])
        assert codec.map is not None
        return torch.stack([codec.map.score_noise(queries[head], head) for head in range(queries.shape[0])])


@dataclass(eq=False)
class Ours(_PackedRows):
    """The packed cache without a plan; `options` are fields of `SkvqConfig` (not window and sinks)."""

    options: dict[str, Any] = field(default_factory=dict)
    config: SkvqConfig | None = None
    name: str = field(init=False)

    def __post_init__(self) -> None:
        for name in ("window", "sinks", "nonfinite"):
            if name in self.options:
                raise ValueError(f"ours: {name} is the comparison's, not a method's")
        if "fit_tokens" in self.options:
            raise ValueError("ours: fit_tokens is for caches with a prompt, here is none: see skvq eval generation")
        self.config = SkvqConfig.from_options(self.config, **self.options)
        self._plan = LayerPlan.from_config(self.config)
        self._codecs = _Codecs()
        self.unit = self.unit_of(0)
        self.uses_queries = _uses_queries(self.config.keys)
        self.sink_search = self.config.sink_search
        self.name = f"skvq {bits_label(self.config.key_bits, self.config.value_bits)}"
        others = {name: value for name, value in self.options.items() if name not in ("key_bits", "value_bits")}
        if others:
            self.name += f" ({', '.join(_flat(others))})"

    def layer_plan(self, layer: int) -> LayerPlan:
        """One plan for all."""
        return self._plan

    def identity(self) -> dict[str, Any]:
        """The complete configuration, so that a changed default is another method."""
        assert self.config is not None
        return {"class": "Ours", "config": self.config.to_dict()}


def _flat(options: dict[str, Any], prefix: str = "") -> list[str]:
    parts = []
    for name, value in options.items():
        inner = _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [f"{prefix}{name}={value}"]
        parts += inner
    return parts


@dataclass(eq=False)
class Planned(_PackedRows):
    """The packed cache with a calibrated plan: a file, or one in memory under a name of its own."""

    source: Path | QuantizationPlan
    name: str = ""

    def __post_init__(self) -> None:
        from ...plan_file import QuantizationPlan

        if isinstance(self.source, QuantizationPlan):
            if not self.name:
                raise ValueError("name='': expected one for a plan that is no file")
            self._plan, self._what = self.source, f"plan {self.name!r}"
        else:
            self.source = Path(self.source)
            self._plan, self._what = QuantizationPlan.load(self.source), f"plan {str(self.source)!r}"
            self.name = self.name or f"plan {self.source.stem}"
        self._layers: dict[int, LayerPlan] = dict(self._plan.layers)
        self._codecs = _Codecs()
        self.unit = math.lcm(*(self.unit_of(layer) for layer in self._layers))
        self.uses_queries = any(_uses_queries(plan.keys.options) for plan in self._layers.values())
        self.sink_search = self._plan.config.sink_search

    def layer_plan(self, layer: int) -> LayerPlan:
        """The plan of one layer. Raises ValueError if the plan has none."""
        if layer not in self._layers:
            raise ValueError(f"{self._what}: nothing for layer {layer}, expected all packed layers")
        return self._layers[layer]

    def check_model(self, model: Any) -> None:
        """Raise SkvqError, naming what differs."""
        self._plan.check(model, self._what)

    def check_texts(self, texts: Sequence[Text]) -> None:
        """Raise ValueError if the plan was fitted to one of them, or to a part of its file that overlaps with it."""
        from ..texts import check_not_fitted

        check_not_fitted(self._what, self._plan.header.texts, texts)

    def identity(self) -> dict[str, Any]:
        """The file's contents, and what a file of before leaves to the default."""
        if isinstance(self.source, Path):
            digest = hashlib.sha256(self.source.read_bytes()).hexdigest()
        else:
            digest = self.source.sha256
        return {"class": "Planned", "sha256": digest, "sink_search": self.sink_search}

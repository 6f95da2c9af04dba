"""`QuantizationPlan`: the calibrated plans of all layers of one model, and their file.

Is: one safetensors file with a versioned header, refused by models it was not made for; the same plan gives the same
bytes, and a loaded plan equals the saved one exactly. Is not: how a plan is found (calibrate/), or what a layer does
with it (plan.py).

Tensors are named `layers.INDEX.keys.FIELD` after the fields of `StreamPlan` and have their shapes; a permutation is
int64 [D] or [Hkv, D]. Everything else is in the header. There is one version: `parts` are named only where there are
some, so a plan without them is the same bytes as ever, and a release that knows none refuses the option by its name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelHubMixin, hf_hub_download
from torch import Tensor

from ._native import SkvqError
from .config import SkvqConfig, StreamOptions
from .fingerprint import ModelFingerprint
from .plan import LayerPlan, StreamPlan
from .tensor_file import read_tensors, take, tensor_bytes, write_tensors

KIND, VERSION = "quantization plan", 1
FILE_NAME = "plan.safetensors"
REGION_OPTIONS = ("window", "sinks", "sink_search", "nonfinite")
_STREAMS = ("keys", "values")
_STATIC = tuple(x.name for x in dataclasses.fields(StreamPlan) if x.name != "options")
_CARD = """---
{{ card_data }}
---

A quantization plan for the key/value cache of [skvq](https://pypi.org/project/skvq/), not a model:

    cache = skvq.QuantizedDynamicCache.from_plan(model, QuantizationPlan.from_pretrained("this repository"))
"""


@dataclass(frozen=True)
class PlanHeader:
    """What a plan is and where it comes from.

    Attributes:
        fingerprint: the model it was made for.
        method: how it was found, for people.
        texts: name and SHA-256 of the calibration texts.
        notes: settings and figures of the calibration, plain values.
        skvq_version: of the release that made it.
    """

    fingerprint: ModelFingerprint
    method: str
    texts: dict[str, str] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    skvq_version: str = field(default_factory=lambda: _version())


@dataclass(frozen=True)
class StreamBits:
    """One stream of one layer.

    Attributes:
        bits: counted bits of a packed element: codes, metadata and block statistics.
        elements: of one token.
    """

    bits: float
    elements: int


class QuantizationPlan(ModelHubMixin, library_name="skvq", tags=["kv-cache"], model_card_template=_CARD):
    """The plan of every layer that a cache packs.

    Besides `save` and `load` there are `save_pretrained`, `from_pretrained` and `push_to_hub` of huggingface_hub.

    Attributes:
        header: the model, the method, the texts.
        config: window, sinks, sink_search and nonfinite of all layers, and the options that layers may differ from.
        layers: by index.

    Raises:
        SkvqError: layers are missing, or one cannot be packed as its plan says.
    """

    def __init__(self, header: PlanHeader, config: SkvqConfig, layers: Mapping[int, LayerPlan]) -> None:
        self.header, self.config = header, config
        self.layers: dict[int, LayerPlan] = dict(sorted(layers.items()))
        expected = header.fingerprint.packed_layers
        if tuple(self.layers) != expected:
            raise SkvqError(f"layers: got {_numbers(self.layers)}, expected {_numbers(expected)}, all that are packed")
        self.bits: dict[int, dict[str, StreamBits]] = {
            index: self._checked(index, layer) for index, layer in self.layers.items()
        }

    @classmethod
    def for_model(
        cls,
        model_or_config: Any,
        config: SkvqConfig,
        streams: Mapping[int, tuple[StreamPlan, StreamPlan]],
        *,
        method: str,
        texts: Mapping[str, str] | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> QuantizationPlan:
        """A plan from the key and the value plan of every packed layer of a model, by index."""
        header = PlanHeader(ModelFingerprint.of(model_or_config), method, dict(texts or {}), dict(notes or {}))
        return cls(header, config, _layers(config, streams))

    def with_regions(self, **overrides: Any) -> QuantizationPlan:
        """The same packing with another window, other sinks or another rule for rows that are not finite.

        Raises:
            SkvqError: anything else is asked for, which would be another plan.
        """
        for name, value in overrides.items():
            if name not in REGION_OPTIONS:
                raise SkvqError(
                    f"{name}={value!r}: the packing is the plan's, expected some of {', '.join(REGION_OPTIONS)}"
                )
        config = self.config.replace(**overrides)
        if config == self.config:
            return self
        streams = {index: (layer.keys, layer.values) for index, layer in self.layers.items()}
        return QuantizationPlan(self.header, config, _layers(config, streams))

    def check(self, model_or_config: Any, what: str = "the plan") -> None:
        """Raise SkvqError, naming the differing fields, if the plan was not made for this model."""
        self.header.fingerprint.check(model_or_config, what)

    def _checked(self, index: int, layer: LayerPlan) -> dict[str, StreamBits]:
        """Bits of both streams. Builds an empty store, which finds whatever does not fit."""
        for name in REGION_OPTIONS:
            if getattr(layer, name) != getattr(self.config, name):
                raise SkvqError(
                    f"layer {index}: {name}={getattr(layer, name)!r}: expected {getattr(self.config, name)!r}, "
                    "the same in all layers"
                )
        fingerprint = self.header.fingerprint
        place = fingerprint.packed_layers.index(index)
        heads, configured = fingerprint.num_key_value_heads[place], fingerprint.head_dims[place]
        key_dim, value_dim = _head_dim(layer.keys, configured), _head_dim(layer.values, configured)
        if heads is None or key_dim is None or value_dim is None:
            # The configuration leaves the shape open and there is no static data: the first keys will tell.
            return {}
        try:
            layer.check(key_dim, value_dim)
            layer.build(heads, key_dim, value_dim, torch.float32)
            return {
                "keys": StreamBits(_counted(layer.keys, "keys", key_dim), heads * key_dim),
                "values": StreamBits(_counted(layer.values, "values", value_dim), heads * value_dim),
            }
        except SkvqError as error:
            raise SkvqError(f"layer {index}: {error}") from None

    # ---- figures -----------------------------------------------------------------------------------------------------

    def average_bits(self, streams: tuple[str, ...] = _STREAMS) -> float:
        """Counted bits of a packed element over all layers, of keys and values together or of one of them."""
        counted = [layer[name] for layer in self.bits.values() for name in streams if name in layer]
        elements = sum(x.elements for x in counted)
        return sum(x.bits * x.elements for x in counted) / elements if elements else 0.0

    def describe_bits(self) -> str:
        """Such as "keys 2 bits, values 1.5/2 bits"."""
        parts = []
        for name in _STREAMS:
            found = sorted({getattr(layer, name).options.bits for layer in self.layers.values()})
            parts.append(f"{name} {'/'.join(f'{bits:g}' for bits in found)} bits")
        return ", ".join(parts)

    def __repr__(self) -> str:
        return (
            f"QuantizationPlan({self.header.method!r} for {self.header.fingerprint.model_type}, "
            f"{self.describe_bits()}, {self.average_bits():.2f} counted bits, sinks {self.config.sinks}, "
            f"window {self.config.window})"
        )

    def __deepcopy__(self, memo: Any) -> QuantizationPlan:
        """This plan: nothing changes one."""
        return self

    # ---- files -------------------------------------------------------------------------------------------------------

    def save(self, path: Path | str) -> None:
        """Write one safetensors file."""
        write_tensors(path, KIND, VERSION, *self._contents())

    @property
    def sha256(self) -> str:
        """Of the file that `save` writes."""
        return hashlib.sha256(tensor_bytes(KIND, VERSION, *self._contents())).hexdigest()

    def _contents(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Header and tensors."""
        tensors = {}
        for index, name, stream in self._streams():
            for static in _STATIC:
                value = getattr(stream, static)
                if value is not None:
                    tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.int64)
                    tensors[f"layers.{index}.{name}.{static}"] = tensor
        options: dict[str, dict[str, Any]] = {str(index): {} for index in self.layers}
        for index, name, stream in self._streams():
            options[str(index)][name] = stream.options.to_dict()
        header = {
            "fingerprint": self.header.fingerprint.to_dict(),
            "method": self.header.method,
            "texts": self.header.texts,
            "notes": self.header.notes,
            "skvq_version": self.header.skvq_version,
            "config": self.config.to_dict(),
            "layers": options,
            "counted_bits": {name: self.average_bits((name,)) for name in _STREAMS},
        }
        return header, tensors

    @classmethod
    def load(cls, path: Path | str, model_or_config: Any = None) -> QuantizationPlan:
        """The plan of a file, or of a directory that `save_pretrained` wrote.

        Raises:
            SkvqError: the file is missing, damaged, of another kind or version, or not made for the given model.
        """
        path = Path(path) / FILE_NAME if Path(path).is_dir() else Path(path)
        header, tensors = read_tensors(path, KIND, VERSION)
        values = {x: take(path, header, x) for x in ("method", "texts", "notes", "skvq_version")}
        try:
            fingerprint = ModelFingerprint.from_dict(take(path, header, "fingerprint"))
            config = SkvqConfig.from_dict(take(path, header, "config"))
            streams = {
                int(index): tuple(_stream(f"layers.{index}.{name}", given[name], tensors) for name in _STREAMS)
                for index, given in take(path, header, "layers").items()
            }
            unknown = sorted(set(tensors) - {x for index in streams for x in _names(index)})
            if unknown:
                raise SkvqError(f"tensor {unknown[0]}: not known to this release")
            plan = cls(PlanHeader(fingerprint, **values), config, _layers(config, streams))  # type: ignore[arg-type]
        except (KeyError, TypeError, AttributeError, SkvqError) as error:
            text = f"{error!r}, expected a complete file" if not isinstance(error, SkvqError) else str(error)
            raise SkvqError(f"{path}: {text}") from None
        if model_or_config is not None:
            plan.check(model_or_config, f"{path}: the plan")
        return plan

    def _streams(self) -> Iterator[tuple[int, str, StreamPlan]]:
        for index, layer in self.layers.items():
            for name in _STREAMS:
                yield index, name, getattr(layer, name)

    def _save_pretrained(self, save_directory: Path) -> None:
        self.save(save_directory / FILE_NAME)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> QuantizationPlan:
        """From a directory, or from the hub with the options of `hf_hub_download`."""
        options.pop("config", None)  # what the mixin read: the file has it too
        if Path(model_id).is_dir():
            return cls.load(model_id)
        return cls.load(hf_hub_download(repo_id=model_id, filename=FILE_NAME, **options))


def _version() -> str:
    try:
        return importlib.metadata.version("skvq")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _layers(config: SkvqConfig, streams: Mapping[int, tuple[StreamPlan, StreamPlan]]) -> dict[int, LayerPlan]:
    regions = {name: getattr(config, name) for name in REGION_OPTIONS}
    return {index: LayerPlan(keys, values, **regions) for index, (keys, values) in streams.items()}


def _stream(prefix: str, options: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> StreamPlan:
    static: dict[str, Any] = {x: tensors[f"{prefix}.{x}"] for x in _STATIC if f"{prefix}.{x}" in tensors}
    if "permutation" in static:
        order = static["permutation"].tolist()
        static["permutation"] = tuple(tuple(x) if isinstance(x, list) else x for x in order)
    return StreamPlan(StreamOptions(**options), **static)


def _names(index: int) -> Iterator[str]:
    yield from (f"layers.{index}.{name}.{static}" for name in _STREAMS for static in _STATIC)


def _counted(stream: StreamPlan, name: str, head_dim: int) -> float:
    return stream.codec(name, head_dim).bits_per_element if stream.options.is_packed else 16.0


def _head_dim(stream: StreamPlan, configured: int | None) -> int | None:
    """The head size that the configuration or, where it leaves it open, the static data says."""
    if configured is None:
        for name in _STATIC:
            value = getattr(stream, name)
            if isinstance(value, Tensor):
                return int(value.shape[-1])
    return configured


def _numbers(indices: Any) -> str:
    return ", ".join(map(str, indices)) or "none"

"""`Statistics`: what one pass over calibration texts keeps of a model, and its file.

Is: moments per layer and head, a few whole sequences of rows for later fits, and the record of what they come from.
Is not: the pass itself (collect.py), or the sums (moments.py). The size depends on the model and on the options, not
on how much text was read. One file holds both a finished pass and the state of an interrupted one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._native import SkvqError
from ..fingerprint import ModelFingerprint
from ..tensor_file import read_tensors, take, write_tensors
from .moments import AttentionMoments, StreamMoments
from .turning import TurnedMoments

KIND, VERSION = "calibration statistics", 3


@dataclass(frozen=True)
class CollectOptions:
    """What a pass keeps.

    Attributes:
        block: rows that share a mean in block-centred covariances; blocks are of rows without the sinks.
        sinks: tokens of a chunk whose keys and values count nowhere but in samples: a cache never packs them. Of the
            queries the first `sinks` are left out.
        window: most recent tokens, which the queries of `attention` see as they are.
        sample_tokens: tokens of all samples together (0: no samples).
        sample_length: tokens of one sample, taken from a chunk's beginning.
        query_stride: every so manyth query of a sample is kept.
        attention_stride: every so manyth query is looked at for `attention` (0: none).
        before_rope: whether keys are also counted as they are before the rotary embedding.
        sink_search: among how many first tokens the sinks are chosen, by each layer's keys and values as in a cache
            (sinks.py), but not in chunks that are shorter; 0: the first tokens are the sinks.
    """

    block: int = 256
    sinks: int = 5
    window: int = 128
    sample_tokens: int = 4096
    sample_length: int = 2048
    query_stride: int = 8
    attention_stride: int = 8
    before_rope: bool = False
    sink_search: int = 64

    def __post_init__(self) -> None:
        least = {"block": 1, "window": 1, "sample_length": 1, "query_stride": 1}
        for x in fields(self):
            value = getattr(self, x.name)
            if x.name == "before_rope":
                if not isinstance(value, bool):
                    raise SkvqError(f"before_rope={value!r}: expected True or False")
            elif not isinstance(value, int) or isinstance(value, bool) or value < least.get(x.name, 0):
                raise SkvqError(f"{x.name}={value!r}: expected an integer of at least {least.get(x.name, 0)}")

    @classmethod
    def of(cls, **options: Any) -> CollectOptions:
        """From keywords. Raises SkvqError for unknown ones."""
        names = [x.name for x in fields(cls)]
        for name in options:
            if name not in names:
                raise SkvqError(f"{name}={options[name]!r}: unknown option, expected some of {', '.join(names)}")
        return cls(**options)

    @property
    def sample_slots(self) -> int:
        """Chunks that samples are kept of."""
        return -(-self.sample_tokens // self.sample_length)


@dataclass
class Sample:
    """The beginning of one chunk in one layer, in the model's dtype, from its first token on, sinks included.

    Attributes:
        keys, values: as a cache gets them [Hkv, n, D].
        queries: [Hq, m, D], without the softmax scale, of the tokens `query_positions`.
        query_positions: int64 [m].
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    query_positions: Tensor


@dataclass
class LayerStatistics:
    """One layer.

    Attributes:
        keys, values: moments of the rows that a cache may pack, after RoPE.
        queries: moments of the queries times `scaling`, those of a kv head's whole group together.
        scaling: what attention multiplies scores by.
        keys_turned: moments of the keys about their mean before RoPE, turned to each position. None if the model's
            rotation does not allow it.
        turning_refused: why `keys_turned` is None.
        keys_before_rope: None unless asked for.
        attention: None if `attention_stride` is 0.
        samples: by slot; the same chunks in every layer.
    """

    keys: StreamMoments
    values: StreamMoments
    queries: StreamMoments
    scaling: float
    keys_turned: TurnedMoments | None = None
    turning_refused: str = ""
    keys_before_rope: StreamMoments | None = None
    attention: AttentionMoments | None = None
    samples: dict[int, Sample] = field(default_factory=dict)


@dataclass
class Statistics:
    """What a pass over calibration texts found.

    Attributes:
        fingerprint: the model.
        options: what was kept.
        chunks, tokens: how much was read, sinks included.
        chunks_sha256: of the token numbers of all chunks in order, chained chunk by chunk.
        texts: name and SHA-256 of the texts that the chunks are from, as the caller gave them.
        layers: by index; the layers that a cache packs.
    """

    fingerprint: ModelFingerprint
    options: CollectOptions = field(default_factory=CollectOptions)
    chunks: int = 0
    tokens: int = 0
    chunks_sha256: str = ""
    texts: dict[str, str] = field(default_factory=dict)
    layers: dict[int, LayerStatistics] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    def save(self, path: Path | str) -> None:
        """Write one safetensors file; the same statistics give the same bytes."""
        header: dict[str, Any] = {x: getattr(self, x) for x in ("chunks", "tokens", "chunks_sha256", "texts")}
        header |= {"fingerprint": self.fingerprint.to_dict(), "options": asdict(self.options)}
        header["scaling"] = {str(index): layer.scaling for index, layer in self.layers.items()}
        header["turning_refused"] = {str(index): layer.turning_refused for index, layer in self.layers.items()}
        write_tensors(path, KIND, VERSION, header, self._tensors())

    @classmethod
    def load(cls, path: Path | str, model_or_config: Any = None) -> Statistics:
        """The inverse of `save`.

        Raises:
            SkvqError: the file is missing, damaged or of another kind, or not of the given model.
        """
        header, tensors = read_tensors(path, KIND, VERSION)
        values = {x: take(path, header, x) for x in ("chunks", "tokens", "chunks_sha256", "texts")}
        fingerprint = ModelFingerprint.from_dict(take(path, header, "fingerprint"))
        if model_or_config is not None:
            fingerprint.check(model_or_config, f"{path}: the statistics")
        try:
            options = CollectOptions(**take(path, header, "options"))
            scaling = take(path, header, "scaling")
            refused = take(path, header, "turning_refused")
            layers = {int(x): _layer(f"layers.{x}", tensors, scaling[x], refused[x]) for x in scaling}
        except (TypeError, KeyError, ValueError) as error:
            raise SkvqError(f"{path}: {error}, expected complete {KIND}") from None
        return cls(fingerprint=fingerprint, options=options, layers=dict(sorted(layers.items())), **values)

    def _tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for index, layer in self.layers.items():
            for name in ("keys", "values", "queries", *_OPTIONAL):
                part = getattr(layer, name)
                if part is not None:
                    tensors |= {f"layers.{index}.{name}.{x.name}": getattr(part, x.name) for x in fields(part)}
            for slot, sample in layer.samples.items():
                tensors |= {f"layers.{index}.samples.{slot}.{name}": x for name, x in vars(sample).items()}
        return tensors

    def describe(self) -> str:
        """One line for people."""
        heads = {
            f"{h}x{d}" for h, d in zip(self.fingerprint.num_key_value_heads, self.fingerprint.head_dims, strict=True)
        }
        return (
            f"{self.fingerprint.model_type}, {len(self.layers)} packed layers of {', '.join(sorted(heads))}, "
            f"{self.chunks} chunks, {self.tokens} tokens, {self.nbytes / 2**20:.0f} MiB"
        )


_OPTIONAL = ("keys_turned", "keys_before_rope", "attention")


def _layer(prefix: str, tensors: Mapping[str, Tensor], scaling: float, refused: str) -> LayerStatistics:
    def part(kind: type, name: str) -> Any:
        found = {x.name: tensors.get(f"{prefix}.{name}.{x.name}") for x in fields(kind)}
        if all(tensor is None for tensor in found.values()) and name in _OPTIONAL:
            return None
        missing = [x for x, tensor in found.items() if tensor is None]
        if missing:
            raise KeyError(f"tensor {prefix}.{name}.{missing[0]} is missing")
        return kind(**found)

    start = f"{prefix}.samples."
    slots = {int(name[len(start) :].split(".")[0]) for name in tensors if name.startswith(start)}
    return LayerStatistics(
        keys=part(StreamMoments, "keys"),
        values=part(StreamMoments, "values"),
        queries=part(StreamMoments, "queries"),
        scaling=float(scaling),
        keys_turned=part(TurnedMoments, "keys_turned"),
        turning_refused=str(refused),
        keys_before_rope=part(StreamMoments, "keys_before_rope"),
        attention=part(AttentionMoments, "attention"),
        samples={slot: part(Sample, f"samples.{slot}") for slot in sorted(slots)},
    )


def chained_sha256(before: str, token_ids: Tensor) -> str:
    """SHA-256 of the chunks so far and one more, int64 [T]."""
    data = token_ids.to("cpu", torch.int64).contiguous().numpy().tobytes()
    return hashlib.sha256(before.encode() + data).hexdigest()

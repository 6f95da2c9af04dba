"""What a plan must know of a model to be refused by another one.

Is: the fields of a configuration that decide the shapes, positions and statistics of keys and values. Is not: the
weights: a fine-tuned model has its base model's fingerprint, and may try its base model's plan.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ._native import SkvqError
from .model_layers import decoder_config, head_dim_of, kv_heads, packed_layers

# Further fields of the decoder's configuration, taken where it has them.
_CONFIG_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "attention_bias",
    "attn_logit_softcapping",
    "num_kv_shared_layers",
    "query_pre_attn_scalar",
    "rms_norm_eps",
    "sliding_window",
)


@dataclass(frozen=True)
class ModelFingerprint:
    """The model that a plan was made for.

    Attributes:
        model_type: of the decoder's configuration.
        num_hidden_layers: all layers.
        packed_layers: indices of the layers that a cache packs.
        num_key_value_heads, head_dims: of the packed layers, in their order; None where the configuration leaves it
            open.
        rope: the rotary embedding's parameters.
        config: other fields of the configuration that matter.
    """

    model_type: str
    num_hidden_layers: int
    packed_layers: tuple[int, ...]
    num_key_value_heads: tuple[int | None, ...]
    head_dims: tuple[int | None, ...]
    rope: dict[str, Any]
    config: dict[str, Any]

    @classmethod
    def of(cls, model_or_config: Any) -> ModelFingerprint:
        """Of a model, or of its configuration. Raises SkvqError for models that a cache cannot serve."""
        config = config_of(model_or_config)
        decoder, packed = decoder_config(config), packed_layers(config)
        rope = getattr(decoder, "rope_parameters", None)
        return cls(
            model_type=str(getattr(decoder, "model_type", type(decoder).__name__)),
            num_hidden_layers=int(decoder.num_hidden_layers),
            packed_layers=tuple(packed),
            num_key_value_heads=tuple(kv_heads(x) for x in packed.values()),
            head_dims=tuple(head_dim_of(x) for x in packed.values()),
            rope=_plain(rope if isinstance(rope, Mapping) else {}),
            config=_plain({x: getattr(decoder, x) for x in _CONFIG_FIELDS if getattr(decoder, x, None) is not None}),
        )

    @property
    def config_hash(self) -> str:
        """SHA-256 of all fields."""
        return hashlib.sha256(json.dumps(_plain(asdict(self)), sort_keys=True).encode()).hexdigest()

    def differences(self, found: ModelFingerprint) -> list[str]:
        """The fields in which `found` is not this model, with both values."""
        expected, other = self._flat(), found._flat()
        return [
            f"{name}: expected {expected.get(name)!r}, found {other.get(name)!r}"
            for name in dict.fromkeys((*expected, *other))
            if expected.get(name) != other.get(name)
        ]

    def check(self, model_or_config: Any, what: str) -> None:
        """Raise SkvqError, naming the differing fields, if `what` was not made for this model."""
        differing = self.differences(ModelFingerprint.of(model_or_config))
        if differing:
            raise SkvqError(f"{what} was made for another model: {'; '.join(differing)}")

    def _flat(self) -> dict[str, Any]:
        """All fields, those of `config` beside the others; `rope` in its parts."""
        values = _plain(asdict(self))
        config, rope = values.pop("config"), values.pop("rope")
        return values | {x: config[x] for x in config if x not in values} | {f"rope.{x}": rope[x] for x in rope}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; `from_dict` is the inverse."""
        return _plain(asdict(self)) | {"config_hash": self.config_hash}

    @classmethod
    def from_dict(cls, values: Any) -> ModelFingerprint:
        """The inverse of `to_dict`. Raises SkvqError if a field is missing or the hash is not that of the fields."""
        names = [field.name for field in fields(cls)]
        if not isinstance(values, Mapping) or any(name not in values for name in names):
            raise SkvqError(f"fingerprint: got {values!r:.80}, expected the fields {', '.join(names)}")
        tuples = {name: tuple(values[name]) for name in ("packed_layers", "num_key_value_heads", "head_dims")}
        fingerprint = cls(**({name: values[name] for name in names} | tuples))
        if values.get("config_hash") != fingerprint.config_hash:
            raise SkvqError(
                f"fingerprint: config_hash={values.get('config_hash')!r}: expected {fingerprint.config_hash!r}, the "
                "hash of the other fields"
            )
        return fingerprint


def config_of(model_or_config: Any) -> Any:
    """The configuration of a model, or the given configuration."""
    return (
        model_or_config
        if hasattr(model_or_config, "get_text_config")
        else getattr(model_or_config, "config", model_or_config)
    )


def _plain(value: Any) -> Any:
    """Only what JSON has, so that a loaded fingerprint equals the one that was saved."""
    return json.loads(json.dumps(value, sort_keys=True, default=str))

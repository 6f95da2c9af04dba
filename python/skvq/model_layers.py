"""Which layers of a model a cache packs: full attention, one after another, from the model's configuration.

Is: the refusal of models whose cache cannot be packed, what the configuration says of each layer's heads, the module
that has the layers, and the argument by which a model takes a cache. Is not: anything about packing itself.
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers import cache_utils
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ._native import SkvqError

# Kinds of layers in a model's configuration that a cache of packed and sliding layers can serve. Layers without
# attention ("moe", "mlp") and layers that share another layer's cache have none of their own.
SERVED_LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention", "moe", "mlp", "dummy")
# Stock layers that stay as they are. Older transformers have no dummy layers.
KEPT_LAYERS = (DynamicSlidingWindowLayer, getattr(cache_utils, "DummyLayer", DynamicSlidingWindowLayer))
# Attributes of models with a recurrent state; older transformers do not name such layers in the configuration.
_STATE_SPACE = ("mamba_", "ssm_", "state_size")
# Attributes of configurations whose heads differ between layers, or between keys and values.
_UNEVEN_HEADS = ("global_head_dim", "v_head_dim", "qk_head_dim", "attention_head_dim")


def decoder_config(config: Any) -> Any:
    """The text decoder's configuration. Raises SkvqError for models whose cache cannot be packed."""
    if not hasattr(config, "get_text_config"):
        raise SkvqError(f"config: got {type(config).__name__}, expected a model's configuration such as model.config")
    decoder = config.get_text_config(decoder=True)
    model_type = getattr(decoder, "model_type", type(decoder).__name__)
    if getattr(config, "is_encoder_decoder", False) or getattr(decoder, "is_encoder_decoder", False):
        raise SkvqError(f"config: {model_type} is an encoder-decoder model, expected a decoder-only model")
    if getattr(decoder, "kv_lora_rank", None):
        raise SkvqError(
            f"config: {model_type} has multi-head latent attention (kv_lora_rank={decoder.kv_lora_rank}), "
            "expected a model that caches keys and values for every head"
        )
    recurrent = [name for name in vars(decoder) if name.startswith(_STATE_SPACE)]
    if recurrent:
        raise SkvqError(f"config: {model_type} has recurrent layers ({recurrent[0]}), expected attention in all layers")
    for index, layer_type in enumerate(getattr(decoder, "layer_types", None) or ()):
        if layer_type not in SERVED_LAYER_TYPES:
            raise SkvqError(
                f"config: layer {index} of {model_type} is {layer_type!r}, expected one of "
                f"{', '.join(map(repr, SERVED_LAYER_TYPES))}"
            )
    return decoder


def decoder_of(model: Any) -> Any:
    """The module of a model that has its decoder's `layers`, also of one that sees images, whose decoder lies deeper.

    Raises:
        SkvqError: there is none where transformers puts it.
    """
    found: Any = getattr(model, "base_model", None)
    if not hasattr(found, "layers") and hasattr(found, "get_decoder"):
        found = found.get_decoder()
    if not hasattr(found, "layers"):
        raise SkvqError(f"{type(model).__name__}: no layers found, expected a decoder of transformers")
    return found


def layers_for_progress(model: Any) -> list[Any]:
    """The modules of the decoder's layers, whose calls tell how far a prompt is; none where they are not found."""
    try:
        return list(decoder_of(model).layers)
    except SkvqError:
        return []


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """`cache` as the keyword argument that the model's `forward` and `generate` take it by.

    It is `cache` from transformers 5.24 on and `past_key_values` before.
    """
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {name: cache}


def head_dim_of(layer_config: Any) -> int | None:
    """The layer's head size, None if the configuration leaves it open (the first keys will tell)."""
    if any(getattr(layer_config, name, None) for name in _UNEVEN_HEADS):
        return None
    head_dim = getattr(layer_config, "head_dim", None)
    if head_dim is None:
        hidden, heads = getattr(layer_config, "hidden_size", None), getattr(layer_config, "num_attention_heads", None)
        head_dim = hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else None
    return head_dim if isinstance(head_dim, int) else None


def stock_layers(config: Any) -> list[Any]:
    """The empty layers that transformers itself makes for the model."""
    try:
        layers: list[Any] = DynamicCache(config=config).layers
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise SkvqError(f"config: transformers builds no dynamic cache for it ({reason})") from error
    if not layers:
        raise SkvqError("config: expected a model with at least one attention layer")
    return layers


def kept(layer: Any, index: int) -> Any:
    """`layer`, one that stays as transformers makes it. Raises SkvqError for kinds that a cache does not serve."""
    if type(layer) not in KEPT_LAYERS:
        raise SkvqError(
            f"config: layer {index} needs a {type(layer).__name__} cache, expected full, sliding or chunked attention"
        )
    return layer


def layer_configs(config: Any) -> list[Any]:
    """The configuration of every layer that has a cache of its own, in the order of `stock_layers`."""
    decoder, count = decoder_config(config), len(stock_layers(config))
    # Older transformers have one configuration for all layers.
    return (list(getattr(decoder, "per_layer_config", None) or ()) or [decoder] * count)[:count]


def packed_layers(config: Any) -> dict[int, Any]:
    """The configuration of every layer that a cache packs, by index."""
    pairs = zip(stock_layers(config), layer_configs(config), strict=True)
    return {index: options for index, (layer, options) in enumerate(pairs) if type(layer) is DynamicLayer}


def kv_heads(layer_config: Any) -> int | None:
    """The layer's heads of keys and values, None if the configuration leaves it open."""
    for name in ("num_key_value_heads", "num_attention_heads"):
        heads = getattr(layer_config, name, None)
        if isinstance(heads, int):
            return heads
    return None

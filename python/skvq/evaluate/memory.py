"""Bytes that a cache holds, layer by layer, for any transformers cache.

A packed layer says so itself (`nbytes`). For every other layer all tensors it keeps are counted by their elements:
keys and values, and the codes, scales and zero points of quantized layers. Storage behind a view that is about to be
freed is not counted.

Not here: the memory of the process (see `bench.machine`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

# Attributes in which transformers' cache layers hold keys and values.
_HELD_IN = ("keys", "values", "_quantized_keys", "_quantized_values")


@dataclass(frozen=True)
class CacheBytes:
    """`per_layer[i]` bytes in layer i; `full_layers`: the indices of the layers that attend to everything."""

    per_layer: list[int]
    full_layers: list[int]

    @property
    def total(self) -> int:
        return sum(self.per_layer)

    @property
    def full_attention(self) -> int:
        return sum(self.per_layer[i] for i in self.full_layers)

    @property
    def per_full_layer(self) -> float:
        return self.full_attention / len(self.full_layers)


def full_attention_layers(config: Any) -> list[int]:
    """Indices of the layers of a model's config that attend to the whole past, and so are the ones that get packed.

    Raises ValueError if there is none."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    layers = DynamicCache(config=config).layers
    found = [index for index, layer in enumerate(layers) if type(layer) is DynamicLayer]
    if not found:
        raise ValueError(f"a {config.model_type!r} model has no layer with full attention: there is nothing to pack")
    return found


def _tensors(held: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    if id(held) in seen:
        return
    seen.add(id(held))
    if isinstance(held, torch.Tensor):
        if hasattr(held, "__tensor_flatten__"):
            for name in held.__tensor_flatten__()[0]:
                yield from _tensors(getattr(held, name), seen)
        else:
            yield held
    elif isinstance(held, dict):
        for item in held.values():
            yield from _tensors(item, seen)
    elif isinstance(held, list | tuple):
        for item in held:
            yield from _tensors(item, seen)


def bytes_of_layer(layer: Any) -> int:
    """Bytes held by one cache layer (0 before its first update)."""
    if hasattr(layer, "nbytes"):
        return int(layer.nbytes)
    seen: set[int] = set()
    held = [tensor for name in _HELD_IN for tensor in _tensors(getattr(layer, name, None), seen)]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


def bytes_of_cache(cache: Any, config: Any) -> CacheBytes:
    """Bytes of every layer of a transformers cache that serves a model with this config."""
    return CacheBytes(
        per_layer=[bytes_of_layer(layer) for layer in cache.layers], full_layers=full_attention_layers(config)
    )


def bytes_of_full_layer_at(
    make_cache: Callable[[], Any],
    config: Any,
    key_shape: tuple[int, int],
    value_shape: tuple[int, int],
    length: int,
    dtype: torch.dtype,
) -> int:
    """Bytes that the first full-attention layer of `make_cache()` holds after `length` tokens, measured by filling it
    with random rows.

    key_shape and value_shape: (num_key_value_heads, head_dim)."""
    from ..packed import show_queries

    cache, layer = make_cache(), full_attention_layers(config)[0]
    chunk = min(length, 4096)
    keys, values = (torch.randn(1, heads, chunk, head_dim).to(dtype) for heads, head_dim in (key_shape, value_shape))
    for start in range(0, length, chunk):
        tokens = min(chunk, length - start)
        handles = cache.update(keys[:, :, :tokens], values[:, :, :tokens], layer)
        show_queries(handles, keys[:, :, :tokens])  # as a model's would: what a layer is packed with goes by them
    return bytes_of_layer(cache.layers[layer])

"""Models with tied embeddings, and with layers that have no attention and so no cache ("moe", "mlp")."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, cache_utils

from skvq import QuantizedDynamicCache
from skvq.layer import PackedLayer
from skvq.model_layers import cache_argument
from tiny_models import LAYERS, build, prompts

PASS_THROUGH: dict[str, Any] = {"key_bits": 16, "value_bits": 16, "window": 8, "sinks": 2}
LOW_BITS: dict[str, Any] = {"window": 8, "sinks": 2, "keys": {"block": 0}}
OPTIONS: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


class NoAttention(torch.nn.Module):
    """In the place of a layer's attention: nothing that would need a cache."""

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None


def without_attention(layers: tuple[int, ...]) -> Any:
    """A model whose layers with these indices are plain perceptrons, as its configuration says."""
    model = build("llama")
    kinds = ["full_attention"] * LAYERS
    for index in layers:
        model.model.layers[index].self_attn = NoAttention()
        kinds[index] = "moe" if index % 2 else "mlp"
    model.config.layer_types = kinds
    return model


def tokens(model: Any, cache: Any, **options: Any) -> torch.Tensor:
    ids: torch.Tensor = model.generate(prompts(2, 30), **cache_argument(model, cache), **(OPTIONS | options))
    return ids


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_tied_embeddings(family: str) -> None:
    model = build(family, tie_word_embeddings=True)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    wanted = tokens(model, DynamicCache(config=model.config))
    cache = QuantizedDynamicCache(model.config, **PASS_THROUGH)
    assert torch.equal(tokens(model, cache), wanted)
    assert cache.stats()["packed"] > 0
    assert cache.stats()["decoded"] == {}


@pytest.mark.skipif(not hasattr(cache_utils, "DummyLayer"), reason="this transformers has no layers without a cache")
@pytest.mark.parametrize("plain", [(1,), (0,), (0, 2)])
def test_layers_without_attention(plain: tuple[int, ...]) -> None:
    model = without_attention(plain)
    for options in ({}, {"num_beams": 3}):
        wanted = tokens(model, DynamicCache(config=model.config), **options)
        cache = QuantizedDynamicCache(model.config, **PASS_THROUGH)
        assert torch.equal(tokens(model, cache, **options), wanted)
        assert cache.stats()["packed"] > 0
        assert cache.stats()["decoded"] == {}
    kinds = [isinstance(layer, PackedLayer) for layer in cache.layers]
    assert kinds == [index not in plain for index in range(LAYERS)]


@pytest.mark.skipif(not hasattr(cache_utils, "DummyLayer"), reason="this transformers has no layers without a cache")
def test_changes_and_figures_beside_layers_without_attention() -> None:
    model = without_attention((0, 2))
    cache = QuantizedDynamicCache(model.config, **LOW_BITS)
    tokens(model, cache)
    layer: Any = cache.layers[1]
    length = cache.get_seq_length()
    assert length == 41
    assert (cache.batch_size, cache.nbytes) == (2, layer.nbytes)
    elements = layer.keys.numel() + layer.values.numel()
    assert cache.bits_per_element == pytest.approx(8 * cache.nbytes / elements)
    assert [line.split()[1] for line in repr(cache).splitlines()[2:5]] == ["none", "K2", "none"]
    assert cache._repr_html_().count("<tr>") == 1 + LAYERS
    before = layer.keys
    twin = copy.deepcopy(cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(layer.keys, before[[1, 0]])
    cache.batch_repeat_interleave(2)
    assert torch.equal(layer.keys, before[[1, 1, 0, 0]])
    cache.batch_select_indices(torch.tensor([0, 2]))
    assert torch.equal(layer.keys, before[[1, 0]])
    cache.crop(-5)
    assert cache.get_seq_length() == length - 5
    assert torch.equal(layer.keys, before[[1, 0], :, : length - 5])
    assert torch.equal(twin.layers[1].keys, before)
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes, cache.batch_size) == (0, 0, -1)
    assert torch.equal(tokens(model, cache), tokens(model, QuantizedDynamicCache(model.config, **LOW_BITS)))

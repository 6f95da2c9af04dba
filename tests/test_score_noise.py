"""Keys far from zero, as large key biases make them: the default cache holds them, and one that does not says so.

On tiny models of every family with packed layers. Their keys get a mean before RoPE in the channels that it turns
slowly, where models with key biases have their largest; a mean in fast channels is no mean any more after RoPE.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from transformers import Cache, DynamicCache

from skvq import QuantizedDynamicCache, register_attention
from skvq.calibrate.turning import find_turning
from skvq.evaluate import MethodCache, parse_method
from skvq.evaluate.rope import Rotary
from skvq.model_layers import cache_argument
from skvq.packed import LARGEST_SCORE_NOISE
from tiny_models import FAMILIES, PACKED_LAYERS, build, prompts

PROMPT, TOKENS = 600, 640  # of the prompt and in all; by default blocks of 256 rows and a window of 128
SIZE = 50.0  # of the means; other keys have a spread of about 1
SLOW = 0.3  # radians that a slow channel turns by, at most, in a block
# KL divergence of the default, and its share of that of RTN. Found: 0.001 to 0.06, 0.02 to 0.12.
LARGEST, SHARE = 0.1, 0.25
# No statistics, no rotation.
BAD: dict[str, Any] = {"keys": {"block": 0, "rotation": "identity"}, "values": {"block": 0}}


def with_key_means(family: str) -> Any:
    """A model whose attention is not so sharp that any noise is the end of it, and whose keys have a mean."""
    register_attention()
    model = build(family, "skvq", initializer_range=0.1)
    generator, config = torch.Generator().manual_seed(0), model.config
    for index, layer in enumerate(model.base_model.layers):
        attention = layer.self_attn
        if attention.scaling == 1.0:  # a model that leaves the scale of scores to what the norm of queries has learnt
            attention.q_norm.weight *= attention.head_dim**-0.5
        names = [name for name in ("k_norm", "k_proj", "qkv_proj") if hasattr(attention, name)]
        if not names:
            continue  # reads the keys of another layer
        frequencies = find_turning(Rotary(model)(index), attention.head_dim).frequencies
        slow = 256 * frequencies < SLOW
        assert 0 < int(slow.sum()) < attention.head_dim
        signs = torch.randn(config.num_key_value_heads, attention.head_dim, generator=generator).sign()
        mean = SIZE * slow * signs
        before = config.num_attention_heads * attention.head_dim
        added = {
            "k_norm": mean[0],
            "k_proj": mean.flatten(),
            "qkv_proj": torch.nn.functional.pad(mean.flatten(), (before, mean.numel())),
        }[names[0]]
        getattr(attention, names[0]).register_forward_hook(lambda _module, _given, output, added=added: output + added)
    return model


def continued(model: Any, cache: Cache) -> tuple[torch.Tensor, list[str]]:
    """Log-probabilities [T, vocabulary] behind a prompt, and the warnings of keys that are far off."""
    token_ids = prompts(1, TOKENS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(token_ids[:, :PROMPT], **cache_argument(model, cache), use_cache=True)
        if isinstance(cache, QuantizedDynamicCache):
            # a prompt attends to itself as it is: so far nothing can be known
            assert cache.stats()["score_noise"] == {}
            assert not [x for x in caught if "packing puts the scores" in str(x.message)]
        logits = model(token_ids[:, PROMPT:], **cache_argument(model, cache), use_cache=True).logits
    found = [str(x.message) for x in caught if "packing puts the scores of keys off" in str(x.message)]
    return logits[0].double().log_softmax(-1), found


@pytest.mark.parametrize("family", [family for family in FAMILIES if PACKED_LAYERS[family]])
def test_large_key_means_do_not_break_the_default_cache(family: str) -> None:
    model = with_key_means(family)
    exact, _ = continued(model, DynamicCache(config=model.config))

    def divergence(cache: Cache) -> tuple[float, list[str]]:
        found, messages = continued(model, cache)
        return float((exact.exp() * (exact - found)).sum(-1).mean()), messages

    default, bad = QuantizedDynamicCache(model.config), QuantizedDynamicCache(model.config, **BAD)
    kept, messages = divergence(default)
    # keys by minimum and maximum; values at 8 bits cost nothing beside them
    lost, _ = divergence(MethodCache(model.config, parse_method("rtn:key_bits=2,value_bits=8")))
    assert 0.0 < kept < LARGEST
    assert kept < SHARE * lost
    noise = default.stats()["score_noise"]
    assert len(noise) == PACKED_LAYERS[family]
    assert max(noise.values()) < LARGEST_SCORE_NOISE
    assert messages == []
    # what loses the keys is known to, at the first step that attends to packed ones, and says so once
    broken, messages = divergence(bad)
    assert broken > kept / SHARE
    assert min(bad.stats()["score_noise"].values()) > LARGEST_SCORE_NOISE
    assert len(messages) == 1
    assert "use more key_bits, or a plan" in messages[0]

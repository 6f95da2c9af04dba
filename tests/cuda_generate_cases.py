"""Tiny models whose cache is in `CudaLayer`s under the emulated driver, beside the store on the CPU.

Is: what test_cuda_generate.py runs in a process of its own. Is not: collected by pytest.
"""

from __future__ import annotations

import contextlib
import copy
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import tiny_models
from cuda_store_cases import STREAM, Memory
from skvq import QuantizedDynamicCache, SkvqConfig, SkvqError, cuda_store
from skvq._native import CudaLayer, Layer
from skvq.attention import register_attention

WINDOW, SINKS = 12, 3
RAW = SkvqConfig(key_bits=16, value_bits=16, window=WINDOW, sinks=SINKS)
# The default, but for blocks that short prompts fill.
LOW = SkvqConfig(keys={"block": 128}, values={"block": 128}, window=WINDOW, sinks=SINKS)
# Of the largest logit: kernels work with f16 levels, queries and weights.
LOGIT_ERROR = 5e-3
MEMORY = Memory()


@contextlib.contextmanager
def on_device() -> Iterator[None]:
    """Caches keep CPU tensors in a `CudaLayer` meanwhile."""
    cuda_store.stand_in = cuda_store.DeviceAccess(0, MEMORY.allocate, lambda: STREAM, host_memory=True)
    try:
        yield
    finally:
        cuda_store.stand_in = None


def model_of(family: str, attention: str = "sdpa", **changes: Any) -> Any:
    if family == "llama":
        changes["num_hidden_layers"] = 2
    return tiny_models.build(family, attention, head_dim=64, **changes)


def both(run: Callable[[], Any]) -> tuple[Any, Any]:
    """What `run` gives on the CPU and on the device."""
    expected = run()
    with on_device():
        return expected, run()


def store_kinds(cache: QuantizedDynamicCache) -> set[type]:
    return {type(layer.native) for layer in cache._packed_layers()}


def generate(model: Any, config: SkvqConfig | None, prompt: torch.Tensor, mask: torch.Tensor, **options: Any) -> Any:
    """Tokens, and the cache if there is a configuration."""
    cache = None
    if config is not None:
        cache = QuantizedDynamicCache(model.config, config, attention_mask=mask)
        options["past_key_values"] = cache
    tokens = model.generate(
        prompt, attention_mask=mask, max_new_tokens=10, do_sample=False, disable_compile=True, **options
    )
    return tokens, cache


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "chunked": {"prefill_chunk_size": 17},
    "lookup": {"prompt_lookup_num_tokens": 4},
}


def padded_prompt(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and mask, the first sequence with seven of padding where there are several."""
    prompt, mask = tiny_models.prompts(batch, length), torch.ones(batch, length, dtype=torch.long)
    if batch > 1:
        prompt[0, :7], mask[0, :7] = 0, 0
    return prompt, mask


def same_tokens(family: str, attention: str, way: str) -> None:
    """A lossless cache on the device gives the tokens of transformers' own."""
    model, options = model_of(family, attention), WAYS[way]
    prompt, mask = padded_prompt(1 if way == "lookup" else 2, 45)
    if way == "lookup":
        prompt[:, 20:40] = prompt[:, :20]
    expected, _ = generate(model, None, prompt, mask, **options)
    with on_device():
        found, cache = generate(model, RAW, prompt, mask, **options)
    assert torch.equal(expected, found), (expected, found)
    assert store_kinds(cache) == {CudaLayer}
    stats = cache.stats()
    assert stats["packed"] > 0
    assert stats["decoded"] == {}, stats
    assert all(layer.figures().packed for layer in cache._packed_layers())


def close_logits(family: str, attention: str) -> None:
    """At low bits both stores lead to the same logits, token by token and for several tokens at once."""
    model = model_of(family, attention)
    prompt, mask = padded_prompt(2, 170)
    more = tiny_models.prompts(2, 24, seed=1)

    def run() -> tuple[list[torch.Tensor], QuantizedDynamicCache]:
        cache = QuantizedDynamicCache(model.config, LOW, attention_mask=mask)
        seen, logits, start = mask, [], 0
        with torch.inference_mode():
            model(prompt, attention_mask=mask, past_key_values=cache)
            for count in (1, 1, 9, 1, 3, 1):
                tokens = more[:, start : start + count]
                seen = torch.cat([seen, torch.ones_like(tokens)], 1)
                positions = (seen.cumsum(1) - 1)[:, -count:]
                found = model(tokens, attention_mask=seen, position_ids=positions, past_key_values=cache)
                logits.append(found.logits)
                start += count
        return logits, cache

    (expected, cpu), (found, device) = both(run)
    assert store_kinds(cpu) == {Layer}
    assert store_kinds(device) == {CudaLayer}
    errors = [float((a - b).abs().max() / a.abs().max()) for a, b in zip(expected, found, strict=True)]
    assert max(errors) <= LOGIT_ERROR, errors
    for a, b in zip(cpu._packed_layers(), device._packed_layers(), strict=True):
        assert (a.native.packed_tokens, a.wants_queries) == (b.native.packed_tokens, b.wants_queries)
        assert b.native.packed_tokens >= 128
        assert a.wants_queries is False
        for mine, theirs in ((a.keys, b.keys), (a.values, b.values)):
            assert float((mine - theirs).abs().max()) <= 0.02 * float(mine.abs().max())
    ours, theirs = (cache.stats() for cache in (device, cpu))
    assert ours["packed"] == theirs["packed"]
    for index, noise in theirs["score_noise"].items():
        assert abs(ours["score_noise"][index] - noise) <= 0.01 * noise
    print("largest error of logits", max(errors), file=sys.stderr)


def changes_of_a_cache() -> None:
    """Copies, crops, selections and resets, and what is refused."""
    model = model_of("llama")
    prompt = tiny_models.prompts(2, 40)

    def logits_of(cache: QuantizedDynamicCache, tokens: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return model(tokens, past_key_values=cache).logits

    def run() -> list[torch.Tensor]:
        cache = QuantizedDynamicCache(model.config, RAW)
        found = [logits_of(cache, prompt), logits_of(cache, prompt[:, :1])]
        twin = copy.deepcopy(cache)
        cache.crop(-5)
        cache.batch_select_indices(torch.tensor([1]))
        found.append(logits_of(cache, prompt[:1, 3:5]))
        cache.batch_repeat_interleave(3)
        found.append(logits_of(cache, prompt[:1, 5:6].expand(3, 1)))
        found.append(logits_of(twin, prompt[:, 7:8]))
        twin.reset()
        found.append(logits_of(twin, prompt[:1, :9]))
        found += [cache.layers[1].keys, cache.layers[1].values]
        return found

    for expected, found in zip(*both(run), strict=True):
        assert float((expected - found).abs().max()) <= 1e-4 * float(expected.abs().max())

    with on_device():
        cache = QuantizedDynamicCache(model.config, LOW)
        keys, values = torch.randn(2, 1, 2, 200, 64)
        keys[0, 1, 70, 5] = torch.nan
        cache.update(keys, values, 0)
        assert cache.stats()["nonfinite_rows"] == {0: 1}
        before = cache.layers[0].get_seq_length()
        wrong: list[tuple[Any, str]] = [
            ((keys.to("meta"), values.to("meta")), "key_states: on device meta, expected cpu or cuda"),
            ((keys[:, :1], values[:, :1]), "expected torch.float32 with batch 1, 2 heads and head_dim 64"),
            ((keys, values.half()), "value_states: torch.float16"),
        ]
        for tensors, message in wrong:
            with pytest.raises(SkvqError, match=re.escape(message)):
                cache.update(*tensors, 0)
        assert cache.layers[0].get_seq_length() == before
        handle, _ = cache.update(keys[:, :, :1], values[:, :, :1], 0)
        assert handle.shape == (1, 2, 201, 64)
        assert (handle + 0.0).isnan().any()
        assert cache.nbytes > 0


def main(what: str, *arguments: str) -> None:
    torch.set_num_threads(1)
    # torch's own CUDA must not meet the stand-in for the driver.
    torch.cuda.is_available = torch.cuda.is_current_stream_capturing = lambda: False
    register_attention()
    {"same": same_tokens, "close": close_logits, "changes": changes_of_a_cache}[what](*arguments)
    print("equal")

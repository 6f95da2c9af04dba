"""`skvq bench step`: what one decode step of one layer costs beyond the attention kernel itself.

A step is `cache.update` (window eviction, encoding of one row, DLPack) and `scaled_dot_product_attention` on what it
returns, as a model calls them, layer after layer, so that no layer is in the processor's cache only because it was just
used. The kernel is the arithmetic of `Layer.attend`, which the native module times within the same step: the difference
of two passes would have the noise of both, at thousands of tokens more than what is measured. "overhead" is the rest,
in µs per layer. Beside it stands what the stock cache takes in the same place, right after a packed step of the same
length, for a text of a few tokens: Python and torch's operators, with next to nothing to copy or to compute.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from ..packed import show_queries
from .layers import options_of
from .machine import make_report


@dataclass(frozen=True)
class StepOptions:
    """What `skvq bench step` measures."""

    format: str = "K2V1.6"
    tokens: tuple[int, ...] = (256, 1024, 4096)
    num_key_value_heads: int = 8
    num_attention_heads: int = 32
    head_dim: int = 128
    layers: int = 16  # of the cache: a model goes from layer to layer
    steps: int = 25  # each through all layers
    dtype: str = "bfloat16"


def _make_cache(options: StepOptions) -> Any:
    from transformers import LlamaConfig

    from ..cache import QuantizedDynamicCache

    config = LlamaConfig(
        num_hidden_layers=options.layers,
        num_attention_heads=options.num_attention_heads,
        num_key_value_heads=options.num_key_value_heads,
        head_dim=options.head_dim,
        hidden_size=options.num_attention_heads * options.head_dim,
    )
    return QuantizedDynamicCache(config, skvq_config=options_of(options.format, static=False))


def _measure(options: StepOptions, tokens: int) -> dict[str, Any]:
    dtype = getattr(torch, options.dtype)
    cache = _make_cache(options)
    keys, values = (torch.randn(1, options.num_key_value_heads, tokens, options.head_dim).to(dtype) for _ in range(2))
    query = torch.randn(1, options.num_attention_heads, 1, options.head_dim).to(dtype)
    for layer in range(options.layers):
        show_queries(cache.update(keys, values, layer), query)
    key, value = keys[:, :, :1].contiguous(), values[:, :, :1].contiguous()
    grouped = options.num_attention_heads != options.num_key_value_heads
    stock = DynamicCache()
    update, attention, kernel, stock_step = [], [], [], []
    with torch.no_grad():
        for _ in range(options.steps):
            for layer in range(options.layers):
                start = time.perf_counter()
                all_keys, all_values = cache.update(key, value, layer)
                updated = time.perf_counter()
                F.scaled_dot_product_attention(query, all_keys, all_values, enable_gqa=grouped)
                attention.append(time.perf_counter() - updated)
                update.append(updated - start)
                kernel.append(cache.layers[layer].native.attend_seconds)
        for _ in range(options.steps):
            for layer in range(options.layers):
                all_keys, all_values = cache.update(key, value, layer)
                F.scaled_dot_product_attention(query, all_keys, all_values, enable_gqa=grouped)
                start = time.perf_counter()
                all_keys, all_values = stock.update(key, value, layer)
                F.scaled_dot_product_attention(query, all_keys, all_values, enable_gqa=grouped)
                stock_step.append(time.perf_counter() - start)
    micro = {
        name: statistics.median(found) * 1e6
        for name, found in (("update", update), ("attention", attention), ("kernel", kernel), ("stock", stock_step))
    }
    overhead = [a + b - c for a, b, c in zip(update, attention, kernel, strict=True)]
    return {
        "tokens": tokens,
        "update_microseconds": micro["update"],
        "attention_microseconds": micro["attention"],
        "kernel_microseconds": micro["kernel"],
        "overhead_microseconds": statistics.median(overhead) * 1e6,
        "stock_microseconds": micro["stock"],
    }


def run_step(options: StepOptions) -> dict[str, Any]:
    """Measures every length and prints it."""
    rows = [_measure(options, tokens) for tokens in options.tokens]
    for row in rows:
        print(
            f"{row['tokens']:>7} tokens: update {row['update_microseconds']:8.1f} µs, "
            f"attention {row['attention_microseconds']:9.1f} µs, kernel {row['kernel_microseconds']:9.1f} µs: "
            f"{row['overhead_microseconds']:7.1f} µs beyond the kernel (stock cache, few tokens: "
            f"{row['stock_microseconds']:.1f} µs)"
        )
    return make_report("step", asdict(options), rows)

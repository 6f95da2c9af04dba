"""`skvq bench encode`: what it costs to encode the rows that leave the window, alone and as a share of a model's
prefill.

A row is one head vector of one token. Two kinds of rows in the report: "codec" (Codec.encode of one head, one thread,
in and out through numpy) and "append" (the store's own path: Layer.append of a prompt, all threads). With a model,
its prefill of the same prompt is timed too, and "share" is the time its full-attention layers take to append the
prompt, over that.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from ..plan import StreamPlan
from . import layers
from .attend import FORMATS
from .layers import Shape
from .machine import make_report
from .timing import time_in_turns


@dataclass(frozen=True)
class EncodeOptions:
    """What `skvq bench encode` measures."""

    formats: tuple[str, ...] = FORMATS
    head_dims: tuple[int, ...] = (64, 128, 256)
    num_key_value_heads: int = 8
    tokens: int = 8192
    rounds: int = 7
    with_model: bool = False
    model: str | None = None  # directory or hub id; None: the packaged model
    dtype: str = "bfloat16"


def _codec_rows(options: EncodeOptions, head_dim: int) -> list[dict[str, Any]]:
    names = sorted(
        {one for name in options.formats for one in layers.parse_format(name)} - {"raw"}, key=float, reverse=True
    )
    rows = torch.randn(options.tokens, head_dim).numpy()
    codecs = {
        name: StreamPlan(layers.options_of(f"K{name}V{name}", static=True).values).codec("values", head_dim)
        for name in names
    }
    times = time_in_turns({name: partial(codec.encode, rows) for name, codec in codecs.items()}, rounds=options.rounds)
    return [
        {
            "kind": "codec",
            "format": name,
            "head_dim": head_dim,
            "nanoseconds_per_row": times[name].median / options.tokens * 1e9,
            "rows_per_second": options.tokens / times[name].median,
            "bits_per_element": float(codecs[name].bits_per_element),
        }
        for name in names
    ]


def time_append(shape: Shape, name: str, static: bool, rounds: int, dtype: str = "bfloat16") -> float:
    """Seconds to append a prompt of random rows to an empty layer; the median of `rounds`."""
    pieces = list(layers.random_rows(shape, getattr(torch, dtype)))
    keys, values = (torch.cat([piece[i] for piece in pieces], dim=2) for i in (0, 1))
    times = []
    for _ in range(rounds + 1):
        layer = layers.packed_layer(shape, name, static=static, dtype=dtype)
        start = time.perf_counter()
        layer.append(keys, values)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _append_rows(options: EncodeOptions, head_dim: int) -> list[dict[str, Any]]:
    shape = Shape(options.num_key_value_heads, options.num_key_value_heads, 1, options.tokens, head_dim)
    rows = []
    for name in options.formats:
        for static in (False, True) if layers.has_statistics(name) else (False,):
            seconds = time_append(shape, name, static, options.rounds)
            count = 2 * shape.num_key_value_heads * shape.tokens
            rows.append(
                {
                    "kind": "append",
                    "format": name,
                    "static": static,
                    "head_dim": head_dim,
                    "nanoseconds_per_row": seconds / count * 1e9,
                    "rows_per_second": count / seconds,
                    "milliseconds": seconds * 1e3,
                }
            )
    return rows


def _prefill_rows(options: EncodeOptions) -> list[dict[str, Any]]:
    """The share of a model's prefill that appending the prompt to its packed layers takes."""
    from transformers import DynamicCache

    from ..evaluate import full_attention_layers
    from ..model_layers import cache_argument
    from ..models import load, packaged_tokens

    loaded = load(options.model, dtype=options.dtype, report=lambda text: print(text, flush=True))
    config = loaded.model.config
    prompt = packaged_tokens(loaded.tokenizer, "northanger_abbey", min(options.tokens, 4096))
    seconds = []
    cache = DynamicCache(config=config)
    for _ in range(3):
        cache = DynamicCache(config=config)
        start = time.perf_counter()
        with torch.no_grad():
            loaded.model(prompt, **cache_argument(loaded.model, cache), use_cache=True, logits_to_keep=1)
        seconds.append(time.perf_counter() - start)
    prefill = statistics.median(seconds)
    full = full_attention_layers(config)
    keys: Any = getattr(cache.layers[full[0]], "keys")  # noqa: B009  (the attribute is not part of the protocol)
    shape = Shape(keys.shape[1], keys.shape[1], 1, prompt.shape[1], keys.shape[3])
    rows = []
    for name in options.formats:
        for static in (False, True) if layers.has_statistics(name) else (False,):
            append = time_append(shape, name, static, options.rounds, options.dtype) * len(full)
            rows.append(
                {
                    "kind": "prefill",
                    "model": loaded.name,
                    "format": name,
                    "static": static,
                    "tokens": prompt.shape[1],
                    "full_attention_layers": len(full),
                    "prefill_seconds": prefill,
                    "append_seconds": append,
                    "share": append / prefill,
                }
            )
    return rows


def run_encode(options: EncodeOptions) -> dict[str, Any]:
    """Measures the grid and prints it."""
    rows = []
    for head_dim in options.head_dims:
        rows += _codec_rows(options, head_dim) + _append_rows(options, head_dim)
    if options.with_model:
        rows += _prefill_rows(options)
    for row in rows:
        if row["kind"] == "prefill":
            print(
                f"prefill of {row['tokens']} tokens, {row['model']}: {row['prefill_seconds']:.2f} s; "
                f"{row['format']:<7}{'static' if row['static'] else '':<7}{row['append_seconds'] * 1e3:9.2f} ms "
                f"= {row['share']:.2%}"
            )
        else:
            static = "static" if row.get("static") else ""
            print(
                f"{row['kind']:<7}{row['format']:<8}head_dim {row['head_dim']:<4}{static:<7}"
                f"{row['nanoseconds_per_row']:>9.1f} ns/row{row['rows_per_second'] / 1e6:>8.2f} M rows/s"
            )
    return make_report("encode", asdict(options), rows)

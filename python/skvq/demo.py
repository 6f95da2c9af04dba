"""`skvq demo`: one prompt over a long real text, with the stock DynamicCache and with the packed cache, side by side.

Measures for both: the generated text, tokens per second, bytes of the cache (all layers; one full-attention layer;
the same layer after 128K tokens, really filled), perplexity of a held-out passage, and for the packed one the KL
divergence from the stock cache's predictions. Returns a JSON-ready report and prints it.

Not here: finding the model (`models`), the measures themselves (`evaluate`), argument parsing (`cli`).
"""

from __future__ import annotations

import gc
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from .bench.machine import describe_machine, set_threads, warn_if_busy, write_json

STOCK = "DynamicCache"
PACKED = "QuantizedDynamicCache"
LONG_CONTEXT = 131072
PROMPT_TEXT = "northanger_abbey"
HELD_OUT_TEXT = "mansfield_park"


@dataclass(frozen=True)
class DemoOptions:
    """What `skvq demo` runs."""

    model: str | None = None  # directory or hub id; None: the packaged model
    dtype: str = "bfloat16"
    attention: str = "sdpa"
    key_bits: float = 2
    value_bits: float = 1.6
    window: int = 128
    sinks: int = 5
    prompt_tokens: int = 4096
    new_tokens: int = 96
    scored_tokens: int = 768
    chunk: int = 8  # tokens scored per forward call
    threads: int | None = None
    json: Path | None = None

    def __post_init__(self) -> None:
        smallest = {"prompt_tokens": 1, "new_tokens": 2, "scored_tokens": 1, "chunk": 1}
        for name, least in smallest.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {least}")


@contextmanager
def _bar(label: str, total: int, unit: str) -> Iterator[Callable[[int], object]]:
    from tqdm import tqdm

    with tqdm(
        total=total, desc=f"{label:<32}", unit=f" {unit}", leave=False, file=sys.stderr, dynamic_ncols=True
    ) as bar:
        yield bar.update


@contextmanager
def _bars_in_turn(stages: dict[str, tuple[str, int, str]]) -> Iterator[Callable[[str, int], None]]:
    """One bar after the other: that of a stage (label, total, unit) opens when the stage reports first."""
    with ExitStack() as shown:
        bars: dict[str, Callable[[int], object]] = {}

        def report(stage: str, count: int) -> None:
            if stage not in bars:
                shown.close()
                bars[stage] = shown.enter_context(_bar(*stages[stage]))
            bars[stage](count)

        yield report


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _cache_makers(model: Any, options: DemoOptions) -> dict[str, Callable[[], Any]]:
    from transformers import DynamicCache

    from .cache import QuantizedDynamicCache

    packing = {name: getattr(options, name) for name in ("key_bits", "value_bits", "window", "sinks")}
    return {
        STOCK: lambda: DynamicCache(config=model.config),
        PACKED: lambda: QuantizedDynamicCache(model, **packing),
    }


def _generate(loaded: Any, options: DemoOptions, make_cache: Callable[[], Any], name: str) -> dict[str, Any]:
    """One run over the prompt: text, speed, bytes."""
    from .evaluate import bytes_of_cache, generate
    from .model_layers import layers_for_progress
    from .models import packaged_tokens

    prompt = packaged_tokens(loaded.tokenizer, PROMPT_TEXT, options.prompt_tokens)
    cache, config = make_cache(), loaded.model.config
    layers = len(layers_for_progress(loaded.model))
    stages = {
        "prefill": (f"{name}: prompt", layers, "layers"),
        "decode": (f"{name}: new", options.new_tokens, "tokens"),
    }
    with _bars_in_turn(stages) as report_step:
        run = generate(loaded.model, prompt, options.new_tokens, cache, report=report_step)
    held = bytes_of_cache(cache, config)
    report: dict[str, Any] = {
        "text": loaded.tokenizer.decode(run.token_ids, skip_special_tokens=True),
        "token_ids": run.token_ids,
        "prefill_tokens_per_second": run.prefill_tokens_per_second,
        "decode_tokens_per_second": run.decode_tokens_per_second,
        "cache_tokens": options.prompt_tokens + options.new_tokens - 1,
        "cache_bytes": held.total,
        "cache_bytes_per_full_layer": held.per_full_layer,
        "cache_bytes_of_other_layers": held.total - held.full_attention,
    }
    if name == PACKED:
        report["bits_per_element"] = cache.bits_per_element
        report["stats"] = cache.stats()
    return report


def _long_context(loaded: Any, makers: dict[str, Callable[[], Any]]) -> dict[str, int]:
    """Bytes of one full-attention layer at 128K tokens, by filling it."""
    import torch

    from .evaluate import bytes_of_full_layer_at, full_attention_layers
    from .model_layers import cache_argument

    config = loaded.model.config
    probe = makers[STOCK]()
    with torch.no_grad():
        loaded.model(torch.zeros(1, 1, dtype=torch.long), **cache_argument(loaded.model, probe), use_cache=True)
    layer: Any = probe.layers[full_attention_layers(config)[0]]
    shapes = [(states.shape[1], states.shape[3]) for states in (layer.keys, layer.values)]
    found = {}
    for name, make in makers.items():
        _say(f"filling one layer of {name} with {LONG_CONTEXT} tokens")
        found[name] = bytes_of_full_layer_at(make, config, shapes[0], shapes[1], LONG_CONTEXT, layer.keys.dtype)
        gc.collect()
    return found


def _scores(loaded: Any, options: DemoOptions, makers: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    from .evaluate import compare_caches
    from .models import packaged_tokens

    count = options.prompt_tokens + options.scored_tokens + 1
    passage = packaged_tokens(loaded.tokenizer, HELD_OUT_TEXT, count)
    _say(f"scoring {options.scored_tokens} tokens of another text after {options.prompt_tokens} of its tokens")
    with _bar("held-out passage", options.scored_tokens, "tokens") as report:
        caches = {name: make() for name, make in makers.items()}
        scores = compare_caches(loaded.model, passage, options.prompt_tokens, caches, options.chunk, report)
    return {name: asdict(score) for name, score in scores.items()}


def _add_bits_per_element(runs: dict[str, dict[str, Any]], itemsize: int) -> None:
    """Bits of one stored element in the full-attention layers, everything that is held counted."""
    for suffix in ("", "_at_128k"):
        key = f"cache_bytes_per_full_layer{suffix}"
        elements = runs[STOCK][key] / itemsize
        for run in runs.values():
            run[f"bits_per_element_of_full_layers{suffix}"] = 8 * run[key] / elements


def run_demo(options: DemoOptions) -> dict[str, Any]:
    """Runs both caches and returns the report (also written to `options.json`, if given). Prints progress on stderr
    only.
    """
    from transformers.utils import logging as transformers_logging

    from .evaluate import full_attention_layers, warm_up
    from .models import load, packaged_tokens

    started, load_average = time.perf_counter(), warn_if_busy()
    transformers_logging.set_verbosity_error()
    set_threads(options.threads)
    loaded = load(options.model, dtype=options.dtype, attention=options.attention, report=_say)
    warm_up(loaded.model, packaged_tokens(loaded.tokenizer, PROMPT_TEXT, 64))
    config = loaded.model.config
    makers = _cache_makers(loaded.model, options)
    full_layers = full_attention_layers(config)
    runs: dict[str, dict[str, Any]] = {}
    for name, make in makers.items():
        runs[name] = _generate(loaded, options, make, name)
        gc.collect()
    for name, scores in _scores(loaded, options, makers).items():
        runs[name]["held_out"] = scores
    for name, size in _long_context(loaded, makers).items():
        others = runs[name]["cache_bytes_of_other_layers"]
        runs[name]["cache_bytes_per_full_layer_at_128k"] = size
        runs[name]["cache_bytes_at_128k"] = size * len(full_layers) + others
    _add_bits_per_element(runs, loaded.model.dtype.itemsize)
    pairs = zip(runs[STOCK]["token_ids"], runs[PACKED]["token_ids"], strict=True)
    same = next((i for i, (stock, packed) in enumerate(pairs) if stock != packed), options.new_tokens)
    report = {
        "command": "demo",
        "machine": describe_machine(),
        "model": {
            "name": loaded.name,
            "parameters": sum(parameter.numel() for parameter in loaded.model.parameters()),
            "layers": config.get_text_config(decoder=True).num_hidden_layers,
            "full_attention_layers": len(full_layers),
        },
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()},
        "runs": runs,
        "same_tokens_at_start": same,
        "load_average_at_start": load_average,
        "seconds": time.perf_counter() - started,
    }
    if options.json is not None:
        write_json(report, options.json)
    return report


def _mebibytes(size: float) -> str:
    return f"{size / 2**20:,.2f} MiB"


def _table(report: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows (label, stock, packed, note)."""
    stock, packed = report["runs"][STOCK], report["runs"][PACKED]

    def sizes(label: str, key: str) -> tuple[str, str, str, str]:
        return label, _mebibytes(stock[key]), _mebibytes(packed[key]), f"{stock[key] / packed[key]:.2f} times smaller"

    def speeds(label: str, key: str) -> tuple[str, str, str, str]:
        return label, f"{stock[key]:.1f}", f"{packed[key]:.1f}", f"{packed[key] / stock[key]:.2f} times"

    def held_out(key: str) -> tuple[float, float]:
        return stock["held_out"][key], packed["held_out"][key]

    before, after = held_out("perplexity")
    model = report["model"]
    return [
        speeds("prompt, tokens/s", "prefill_tokens_per_second"),
        speeds("decode, tokens/s", "decode_tokens_per_second"),
        sizes(f"cache, {stock['cache_tokens']} tokens, all {model['layers']} layers", "cache_bytes"),
        sizes(f"  one of its {model['full_attention_layers']} full-attention layers", "cache_bytes_per_full_layer"),
        sizes("cache at 128K tokens, all layers", "cache_bytes_at_128k"),
        sizes("  one full-attention layer", "cache_bytes_per_full_layer_at_128k"),
        (
            "bits per element there, all counted",
            f"{stock['bits_per_element_of_full_layers']:g}",
            f"{packed['bits_per_element_of_full_layers']:.3f}",
            f"{packed['bits_per_element_of_full_layers_at_128k']:.3f} at 128K tokens",
        ),
        (
            f"perplexity, {stock['held_out']['tokens']} held-out tokens",
            f"{before:.3f}",
            f"{after:.3f}",
            f"{after / before - 1:+.2%}",
        ),
        ("KL divergence from stock, nats", "0", f"{packed['held_out']['kl_divergence']:.4f}", ""),
        ("same likeliest next token", "100 %", f"{packed['held_out']['top1_agreement']:.1%}", ""),
    ]


def print_report(report: dict[str, Any], width: int | None = None) -> None:
    """Prints what `run_demo` returned, for people, on stdout."""
    width = min(width or shutil.get_terminal_size((120, 40)).columns, 140)
    options, stock, packed = report["options"], report["runs"][STOCK], report["runs"][PACKED]
    parameters = report["model"]["parameters"] / 1e6
    print(
        f"\n{report['model']['name']}, {parameters:.0f}M parameters, {options['dtype']} · "
        f"{options['key_bits']:g}-bit keys, {options['value_bits']:g}-bit values, "
        f"window {options['window']}, sinks {options['sinks']}\n"
    )
    row = "{:<44}{:>16}{:>24}   {}"
    print(row.format("", STOCK, PACKED, "").rstrip())
    for line in _table(report):
        print(row.format(*line).rstrip())
    stats = packed["stats"]
    print(
        f"\n{stats['packed']} attention calls on packed bytes, {stats['prefill']} in full precision for the prompt, "
        f"decoded to plain tensors: {stats['decoded'] or 'never'}"
    )
    column = (width - 3) // 2
    print(
        f"\nthe text after {options['prompt_tokens']} tokens of Northanger Abbey "
        f"(the first {report['same_tokens_at_start']} tokens are the same):\n"
    )
    print(f"{STOCK:<{column}} │ {PACKED}\n{'─' * column}─┼─{'─' * column}")
    columns = [textwrap.wrap(" ".join(run["text"].split()), column) for run in (stock, packed)]
    for left, right in zip_longest(*columns, fillvalue=""):
        print(f"{left:<{column}} │ {right}")
    print(f"\n{report['seconds']:.0f} s in all" + (f"; figures in {options['json']}" if options["json"] else ""))

"""`skvq bench generate`: tokens per second and bytes of a real model's generation, with every kind of cache.

The contestants: DynamicCache, the packed cache in several formats, and transformers' own QuantizedCache (quanto, hqq,
fp8). One that cannot run here (its package is missing, or it refuses the model, as QuantizedCache does with sliding
layers) is a row with the reason. Rounds take turns; a figure is the median of the rounds. On a machine that is shared a
round of a minute may be twice as slow as the next, so speeds are compared step by step: the caches of the last round
take single steps in turns, and `step_speed_over_dynamic_cache` is the median of the ratios of a turn, with quartiles
(between the rounds: `decode_speed_over_dynamic_cache`). `peak_bytes_over_model` is
the rise of the process's peak memory during decoding over its memory before the run: it shows what decoding the whole
past costs, which the bytes of the cache do not. Linux only, else None.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from .machine import make_report, peak_resident_bytes, release_free_memory, reset_peak, resident_bytes

PACKED_FORMATS = ((2.0, 1.6), (2.0, 2.0), (2.0, 1.5), (4.0, 4.0), (16.0, 16.0))


@dataclass(frozen=True)
class GenerateOptions:
    """What `skvq bench generate` runs."""

    model: str | None = None  # directory or hub id; None: the packaged model
    dtype: str = "bfloat16"
    attention: str = "sdpa"
    formats: tuple[tuple[float, float], ...] = PACKED_FORMATS  # (key_bits, value_bits)
    window: int = 128
    sinks: int = 5
    prompt_tokens: int = 4096
    new_tokens: int = 48
    rounds: int = 2
    plan: str | None = None  # a file: one more packed cache
    turns: int = 24  # of single steps of all caches
    caches: tuple[str, ...] = ()  # only those whose names contain one of these, beside DynamicCache; none: all


MakeCache = Callable[[], Any]


def _contestants(model: Any, options: GenerateOptions) -> dict[str, MakeCache]:
    from transformers import DynamicCache, QuantizedCache

    from ..cache import QuantizedDynamicCache
    from ..evaluate.methods.stock import STOCK_OPTIONS

    config = model.config

    def packed(key_bits: float, value_bits: float) -> MakeCache:
        return lambda: QuantizedDynamicCache(
            model, key_bits=key_bits, value_bits=value_bits, window=options.window, sinks=options.sinks
        )

    def stock(backend: str, **settings: Any) -> MakeCache:
        return lambda: QuantizedCache(backend, config, **(STOCK_OPTIONS[backend] | settings))

    found: dict[str, MakeCache] = {"DynamicCache": lambda: DynamicCache(config=config)}
    for key_bits, value_bits in options.formats:
        found[f"QuantizedDynamicCache K{key_bits:g}V{value_bits:g}"] = packed(key_bits, value_bits)
    if (plan := options.plan) is not None:
        found["QuantizedDynamicCache plan"] = lambda: QuantizedDynamicCache.from_plan(model, plan)
    for bits in (4, 2):
        found[f"QuantizedCache quanto {bits} bits"] = stock("quanto", nbits=bits)
        found[f"QuantizedCache hqq {bits} bits"] = stock("hqq", nbits=bits)
    found["QuantizedCache fp8"] = stock("fp8")
    unknown = [part for part in options.caches if not any(part in name for name in found)]
    if unknown:
        raise ValueError(f"caches={unknown[0]!r}: expected a part of one of the names {', '.join(found)}")
    first = next(iter(found))
    wanted = options.caches or ("",)
    return {name: make for name, make in found.items() if name == first or any(part in name for part in wanted)}


def _start_of_decoding() -> None:
    release_free_memory()
    reset_peak()


def _one_run(loaded: Any, prompt: Any, options: GenerateOptions, cache: Any) -> dict[str, Any]:
    from ..evaluate import bytes_of_cache, generate

    release_free_memory()
    before = resident_bytes()
    run = generate(loaded.model, prompt, options.new_tokens, cache, first_token=_start_of_decoding)
    peak = peak_resident_bytes()
    held = bytes_of_cache(cache, loaded.model.config)
    return {
        "prefill_tokens_per_second": run.prefill_tokens_per_second,
        "decode_tokens_per_second": run.decode_tokens_per_second,
        "cache_bytes": held.total,
        "cache_bytes_per_full_layer": held.per_full_layer,
        "peak_bytes_over_model": None if peak is None or before is None else peak - before,
        "token_ids": run.token_ids,
    }


def _step_ratios(model: Any, caches: dict[str, tuple[Any, int]], turns: int) -> dict[str, list[float]]:
    """How many times as fast as the first cache's step that of each one is, turn by turn.

    Args:
        model: whose forward call is a step.
        caches: and the last token, which is not in the cache yet.
        turns: all take one step in each, in another order every time.
    """
    import torch

    from ..model_layers import cache_argument

    names, found = list(caches), dict[str, list[float]]()
    tokens = {name: torch.tensor([[token]]) for name, (_, token) in caches.items()}
    for turn in range(turns):
        seconds = {}
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            with torch.no_grad():
                logits = model(tokens[name], **cache_argument(model, caches[name][0]), use_cache=True).logits
            tokens[name] = logits[:, -1:].argmax(-1)
            seconds[name] = time.perf_counter() - start
        for name in names:
            found.setdefault(name, []).append(seconds[names[0]] / seconds[name])
    return found


def _measure(
    loaded: Any, prompt: Any, options: GenerateOptions, contestants: dict[str, MakeCache]
) -> list[dict[str, Any]]:
    runs: dict[str, list[dict[str, Any]]] = {}
    reasons: dict[str, str] = {}
    last: dict[str, tuple[Any, int]] = {}
    for turn in range(options.rounds):
        for name, make in contestants.items():
            if name in reasons:
                continue
            print(f"round {turn + 1} of {options.rounds}: {name}", file=sys.stderr, flush=True)
            last.pop(name, None)  # frees the cache of the round before
            try:
                cache = make()
                run = _one_run(loaded, prompt, options, cache)
                runs.setdefault(name, []).append(run)
                last[name] = cache, run["token_ids"][-1]
            except Exception as error:
                if not name.startswith("QuantizedCache"):
                    raise
                reasons[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    print(f"{options.turns} turns of single steps", file=sys.stderr, flush=True)
    ratios = _step_ratios(loaded.model, last, options.turns)
    stock = runs["DynamicCache"]
    rows = []
    for name in contestants:
        if name in reasons:
            rows.append({"cache": name, "skipped": reasons[name]})
            continue
        found = runs[name]
        row: dict[str, Any] = {"cache": name}
        for key in ("prefill_tokens_per_second", "decode_tokens_per_second"):
            row[key] = statistics.median(run[key] for run in found)
        for key in ("cache_bytes", "cache_bytes_per_full_layer"):
            row[key] = found[0][key]
        peaks = [run["peak_bytes_over_model"] for run in found]
        row["peak_bytes_over_model"] = None if None in peaks else min(peaks)
        row["decode_speed_over_dynamic_cache"] = row["decode_tokens_per_second"] / statistics.median(
            run["decode_tokens_per_second"] for run in stock
        )
        row["step_speed_over_dynamic_cache"] = statistics.median(ratios[name])
        low, _, high = statistics.quantiles(ratios[name], n=4)
        row["step_speed_quartiles"] = [low, high]
        row["same_tokens_as_dynamic_cache"] = sum(
            a == b for a, b in zip(found[0]["token_ids"], stock[0]["token_ids"], strict=True)
        )
        rows.append(row)
    return rows


def _print_rows(rows: list[dict[str, Any]]) -> None:
    print(
        f"{'':<32}{'prompt t/s':>11}{'decode t/s':>11}{'ratio':>7}{'of steps':>9}{'cache MiB':>11}"
        f"{'per full layer':>15}{'peak MiB':>10}"
    )
    for row in rows:
        if "skipped" in row:
            print(f"{row['cache']:<32} not run: {row['skipped']}")
            continue
        peak = "–" if row["peak_bytes_over_model"] is None else f"{row['peak_bytes_over_model'] / 2**20:.1f}"
        print(
            f"{row['cache']:<32}{row['prefill_tokens_per_second']:>11.1f}{row['decode_tokens_per_second']:>11.2f}"
            f"{row['decode_speed_over_dynamic_cache']:>7.2f}{row['step_speed_over_dynamic_cache']:>9.2f}"
            f"{row['cache_bytes'] / 2**20:>11.2f}"
            f"{row['cache_bytes_per_full_layer'] / 2**20:>15.3f}{peak:>10}"
        )


def run_generate(options: GenerateOptions) -> dict[str, Any]:
    """Runs every contestant on the packaged text and prints the table."""
    from transformers.utils import logging as transformers_logging

    from ..evaluate import warm_up
    from ..models import load, packaged_tokens

    transformers_logging.set_verbosity_error()
    loaded = load(
        options.model,
        dtype=options.dtype,
        attention=options.attention,
        report=lambda text: print(text, file=sys.stderr, flush=True),
    )
    contestants = _contestants(loaded.model, options)
    prompt = packaged_tokens(loaded.tokenizer, "northanger_abbey", options.prompt_tokens)
    warm_up(loaded.model, prompt)
    rows = _measure(loaded, prompt, options, contestants)
    _print_rows(rows)
    return make_report("generate", asdict(options), rows, model=loaded.name)

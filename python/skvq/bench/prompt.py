"""`skvq bench prompt`: what a prompt and a step behind it take with transformers' cache, and with packed ones.

The model has random weights (by default a few layers of the shape of Llama 3 8B), so nothing is downloaded. Caches take
turns: transformers' `DynamicCache`; "blocks", made from the configuration, with statistics of blocks; "fitted", made
from the model, whose keys are fitted to the prompt as it comes (calibrate/prompt.py). A step is launched by the host,
as `generate` does it. Times are medians.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..model_layers import cache_argument
from .capacity import CapacityOptions, model_config, random_model
from .device import Place
from .machine import make_report

WARM_STEPS = 3
KINDS: dict[str, Callable[[list[float]], float]] = {"median": statistics.median, "fastest": min, "slowest": max}


@dataclass(frozen=True)
class PromptOptions:
    """What `skvq bench prompt` builds and times.

    Attributes:
        layers, heads, kv_heads, head_dim, intermediate, vocabulary, dtype: of a Llama.
        tokens: of the prompts, each read at once.
        rounds: prompts of a length with each cache.
        steps: that are timed behind the last one.
    """

    device: str = "cpu"
    layers: int = 4
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    intermediate: int = 14336
    vocabulary: int = 32000
    dtype: str = "bfloat16"
    tokens: tuple[int, ...] = (2048, 8192)
    rounds: int = 3
    steps: int = 16


def _caches(model: Any) -> dict[str, Callable[[], Any]]:
    from transformers import DynamicCache

    from ..cache import QuantizedDynamicCache

    return {
        "DynamicCache": lambda: DynamicCache(config=model.config),
        "blocks": lambda: QuantizedDynamicCache(model.config),
        "fitted": lambda: QuantizedDynamicCache(model),
    }


def run_prompt(options: PromptOptions) -> dict[str, Any]:
    """Reads prompts with every cache, and prints the table.

    Raises:
        SkvqError: the device cannot be used, or sizes that do not fit together.
    """
    place = Place(options.device)
    print(place.title(), flush=True)
    sizes = ("layers", "heads", "kv_heads", "head_dim", "intermediate", "vocabulary", "dtype")
    config = model_config(CapacityOptions(**{name: getattr(options, name) for name in sizes}))
    model = random_model(config, options.dtype, place.device)
    caches, rows = _caches(model), list[dict[str, Any]]()
    with torch.no_grad():
        for tokens in options.tokens:
            found = _rows_of(place, options, model, caches, tokens)
            rows += found
            for row in found:
                print(_line(row, found[0]), flush=True)
    return make_report("prompt", asdict(options), rows, device=place.describe())


def _rows_of(
    place: Place, options: PromptOptions, model: Any, caches: dict[str, Callable[[], Any]], tokens: int
) -> list[dict[str, Any]]:
    """One for each cache, behind one prompt that is not timed."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator(place.device).manual_seed(tokens)
    prompt = torch.randint(vocabulary, (1, tokens), generator=generator, device=place.device)
    times: dict[str, list[float]] = {name: [] for name in caches}
    rows: dict[str, dict[str, Any]] = {}
    for turn in range(options.rounds + 1):
        for name, make in caches.items():
            cache = make()
            seconds = place.seconds(functools.partial(model, prompt, **cache_argument(model, cache), logits_to_keep=1))
            if turn:
                times[name].append(seconds)
            if turn == options.rounds:
                rows[name] = _row(place, options, model, cache)
            del cache
    return [
        {"tokens": tokens, "cache": name}
        | {f"prompt_{kind}_milliseconds": 1e3 * of(times[name]) for kind, of in KINDS.items()}
        | rows[name]
        for name in caches
    ]


def _row(place: Place, options: PromptOptions, model: Any, cache: Any) -> dict[str, Any]:
    """Of steps behind a prompt, and of the cache."""
    token = torch.zeros(1, 1, dtype=torch.long, device=place.device)
    step = functools.partial(model, token, **cache_argument(model, cache))
    steps = [place.seconds(step) for _ in range(WARM_STEPS + options.steps)][WARM_STEPS:]
    stats = cache.stats() if hasattr(cache, "stats") else {}
    nbytes = cache.nbytes if hasattr(cache, "nbytes") else sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)
    return {
        "step_milliseconds": 1e3 * statistics.median(steps),
        "nbytes": int(nbytes),
        "fitted_layers": len(stats.get("fitted", {})),
        "not_fitted": {str(layer): why for layer, why in stats.get("not_fitted", {}).items()},
    }


def _line(row: dict[str, Any], first: dict[str, Any]) -> str:
    prompt = row["prompt_median_milliseconds"]
    return (
        f"{row['tokens']:>8} tokens  {row['cache']:<13}{prompt:>10.1f} ms "
        f"({prompt / first['prompt_median_milliseconds']:.2f}x)  step {row['step_milliseconds']:.2f} ms  "
        f"{row['nbytes'] / 2**20:.1f} MiB"
    )

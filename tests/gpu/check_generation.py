"""Generation with a cache on a GPU: the tokens and logits of caches that are known to be right.

Is: tiny random models (../cuda_generate_cases.py), their lossless cache against transformers' own, token by token, the
default's bits against the store on the CPU, a captured step against steps that the host launches, and layers whose
tokens enter with their attention against launches apart; likewise a real model, `--model PATH`, if there is one. Models
run in float32, so that what differs is the cache's. Is not: timed.
`--device cpu` is for the stand-in of kernels/emu.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cuda_generate_cases as cases
import tiny_models
from skvq import QuantizedDynamicCache, SkvqConfig, _native
from skvq.attention import register_attention
from skvq.bench import layers
from skvq.model_layers import cache_argument

MODEL_ERROR = 2e-2  # of the largest logit: a code on the edge of two levels may fall either way
FULL: list[tuple[str, Callable[..., dict[str, Any]], tuple[str, ...]]] = [
    *[("tokens", cases.same_tokens, ("llama", "sdpa", way)) for way in cases.WAYS],
    *[("tokens", cases.same_tokens, (family, "skvq", "greedy")) for family in ("gemma2", "gpt-oss")],
    *[("logits", cases.close_logits, case) for case in (("llama", "sdpa"), ("gemma2", "skvq"))],
    *[("fitted", cases.fitted_prompt, case) for case in (("llama", "sdpa"), ("gemma2", "skvq"))],
    ("changes", cases.changes_of_a_cache, ()),
]
# Steps whose token enters with its attention, of forms that the benchmark has compiled, or will.
STEPS = [
    ("K2V1.6", layers.Shape(8, 32, 1, 1500), "float16"),
    ("K2V1.6", layers.Shape(4, 4, 5, 700), "float16"),
    ("fitted", layers.Shape(8, 32, 2, 1500), "float16"),
    ("plan", layers.Shape(4, 8, 1, 2000), "float16"),
]
SMALL = [case for case in FULL if case[2] in (("llama", "sdpa", "greedy"), ("llama", "sdpa"))]


@dataclass
class Results:
    """What was found, printed as it comes."""

    checks: list[dict[str, Any]] = field(default_factory=list)

    def run(self, kind: str, name: str, check: Callable[[], dict[str, Any]]) -> None:
        """Notes what a check returns, or why it failed."""
        start, found, reason = time.perf_counter(), {}, None
        try:
            found = check()
        except AssertionError as error:
            reason = str(error).strip()[:2000] or "an assertion without words"
        entry = {"kind": kind, "name": name, "passed": reason is None, "seconds": time.perf_counter() - start}
        self.checks.append(entry | found | ({} if reason is None else {"reason": reason}))
        text = ", ".join(f"{key} {value:.3g}" for key, value in found.items()) if reason is None else reason
        print(f"{'ok  ' if reason is None else 'FAIL'} {kind:<8} {name:<28} {text}", flush=True)

    @property
    def failed(self) -> int:
        return sum(not check["passed"] for check in self.checks)


# ---- a captured step -------------------------------------------------------------------------------------------------


def captured_tokens(place: torch.device, config: SkvqConfig) -> dict[str, Any]:
    """A decode step of a model as one graph of torch's, replayed, gives the tokens of steps that the host launches."""
    model = cases.model_of("llama").to(place)
    prompt, count = tiny_models.prompts(1, config.fit_tokens or 60).to(place), 250
    expected = greedy(model, QuantizedDynamicCache(model, config), prompt, count)
    cache = QuantizedDynamicCache(model, config)
    first = greedy(model, cache, prompt, 3)
    cache.reserve(prompt.shape[1] + count)
    token, position = first[:, -1:].to(place), torch.tensor([[cache.get_seq_length()]], device=place)
    graph, given, found = torch.cuda.CUDAGraph(), cache_argument(model, cache), [first]
    with torch.inference_mode():
        with cache.capturing(), torch.cuda.graph(graph):
            logits = model(token, position_ids=position, **given, use_cache=True).logits
            token.copy_(logits[:, -1:].argmax(-1))
            position.add_(1)
        for _ in range(count - 3):
            graph.replay()
            found.append(token.cpu())
    cache.replayed(count - 3)
    assert cache.stats()["nonfinite_rows"] == {}
    assert torch.equal(torch.cat(found, 1), expected), (found, expected)
    return {"tokens": count}


# ---- a real model ----------------------------------------------------------------------------------------------------


def logits_along(model: Any, cache: Any, prompt: Tensor, tokens: Tensor) -> Tensor:
    """Logits [n + 1, vocabulary] after a prompt [1, T] and after each of n tokens [1, n], on the CPU."""
    given, found = cache_argument(model, cache), []
    with torch.inference_mode():
        for step in (prompt, *tokens.split(1, 1)):
            found.append(model(step.to(model.device), **given, use_cache=True, logits_to_keep=1).logits[0, -1].cpu())
    return torch.stack(found)


def greedy(model: Any, cache: Any, prompt: Tensor, count: int) -> Tensor:
    """The likeliest tokens [1, n] after a prompt, each put in again."""
    given, token, found = cache_argument(model, cache), prompt.to(model.device), []
    with torch.inference_mode():
        for _ in range(count):
            token = model(token, **given, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
            found.append(token.cpu())
    return torch.cat(found, 1)


def agreement(expected: Tensor, found: Tensor, limit: float) -> dict[str, Any]:
    """Compares logits [n, vocabulary]: their largest difference, of the largest logit of a step. Within the limit
    another token can be the likeliest only where both are closer than twice as much.
    """
    error = float(((expected - found).abs().amax(-1) / expected.abs().amax(-1)).nan_to_num(math.inf).max())
    assert error <= limit, f"logits differ by {error:.2e} of the largest, limit {limit:g}"
    same = (expected.argmax(-1) == found.argmax(-1)).float().mean()
    return {"error": error, "limit": limit, "same_tokens": float(same)}


def check_model(results: Results, place: torch.device, path: str, prompt_tokens: int, new_tokens: int) -> None:
    from transformers import DynamicCache

    from skvq.models import load, packaged_tokens

    loaded = load(path, dtype="float32")
    model, config = loaded.model, loaded.model.config
    prompt = packaged_tokens(loaded.tokenizer, "northanger_abbey", prompt_tokens)
    on_cpu = QuantizedDynamicCache(config)
    tokens = greedy(model, on_cpu, prompt, new_tokens)
    on_cpu.reset()
    expected = logits_along(model, on_cpu, prompt, tokens)
    model.to(place)

    def lossless() -> dict[str, Any]:
        stock = greedy(model, DynamicCache(config=config), prompt, new_tokens)
        with cases.on_device(place):
            packed = greedy(
                model, QuantizedDynamicCache(config, SkvqConfig(key_bits=16, value_bits=16)), prompt, new_tokens
            )
        assert torch.equal(stock, packed), (stock, packed)
        return {"tokens": packed.numel()}

    def low_bits() -> dict[str, Any]:
        with cases.on_device(place):
            cache = QuantizedDynamicCache(config)
            found = logits_along(model, cache, prompt, tokens)
        assert cases.store_kinds(cache) == {_native.CudaLayer}
        assert any(layer.figures().packed for layer in cache._packed_layers()), "nothing was packed"
        return agreement(expected, found, MODEL_ERROR)

    results.run("tokens", f"{loaded.name}, lossless", lossless)
    results.run("logits", f"{loaded.name}, default", low_bits)


# ---- command ---------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu with a fake driver")
    parser.add_argument("--small", action="store_true", help="two cases")
    parser.add_argument("--model", default="", help="a model's directory; none: tiny random models only")
    parser.add_argument("--prompt-tokens", type=int, default=600, help="of the real model: more than a block of rows")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--json", type=Path, help="where to write what was found")
    options = parser.parse_args()
    status = _native.cuda_status()
    if not status["usable"]:
        raise SystemExit(f"CUDA cannot be used here: {status['reason']}")
    place, results, start = torch.device(options.device), Results(), time.perf_counter()
    if place.type == "cpu":
        cases.stay_on_the_cpu()
    register_attention()
    for kind, check, arguments in SMALL if options.small else FULL:
        name = ", ".join(arguments) or "llama"
        results.run(kind, name, lambda check=check, arguments=arguments: check(place, *arguments))
    if place.type == "cuda":
        for name, config in (("static", cases.STATIC), ("fitted", cases.FITTED), ("blocks", cases.LOW)):
            results.run("graph", f"llama, {name}", lambda config=config: captured_tokens(place, config))
        for form, shape, dtype in STEPS:
            run = functools.partial(cases.steps_of_one_launch, place, form, shape, dtype)
            results.run("steps", f"{form}, {shape}, {dtype}", run)
    else:
        print("skip graph    needs a GPU")
    if options.model:
        check_model(results, place, options.model, options.prompt_tokens, options.new_tokens)
    seconds = time.perf_counter() - start
    if options.json:
        card = status["devices"][place.index or 0]
        written = {"device": str(place), "card": card, "torch": torch.__version__, "seconds": seconds}
        options.json.write_text(json.dumps(written | {"checks": results.checks}, indent=1) + "\n")
    print(f"{len(results.checks)} checks, {results.failed} failed, {seconds:.0f} s")
    return int(results.failed > 0)


if __name__ == "__main__":
    sys.exit(main())

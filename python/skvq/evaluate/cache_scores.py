"""Perplexity through a cache: a text is scored the way it would be generated, on top of what the cache holds.

The first `context` tokens are one prefill call. The rest goes through the model in steps of `chunk` tokens, so that
every scored token attends to the cache's own past (packed, if the cache packs); only the other tokens of its own step
are seen as they are. `chunk = 1` is exactly decoding. The token right after the prefill is not scored: its prediction
used no past.

Not here: texts, models, tasks. Shapes: token_ids int64 [1, context + scored + 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..model_layers import cache_argument

ReportTokens = Callable[[int], object]


@dataclass(frozen=True)
class CacheScore:
    """How well a model predicts a passage through one cache, and how far its predictions are from a reference
    cache's.
    """

    tokens: int
    perplexity: float
    kl_divergence: float  # mean KL(reference || this) per token, nats
    top1_agreement: float  # share of tokens for which both caches' likeliest next token is the same


def _check(token_ids: torch.Tensor, context: int, chunk: int) -> None:
    if token_ids.dim() != 2 or token_ids.shape[0] != 1:
        raise ValueError(f"token_ids has shape {list(token_ids.shape)}, expected [1, tokens]")
    if not 0 < context < token_ids.shape[1] - 1:
        raise ValueError(f"context is {context}, expected 1 … {token_ids.shape[1] - 2} for {token_ids.shape[1]} tokens")
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}, expected at least 1")


def stream_scores(
    model: Any, token_ids: torch.Tensor, context: int, cache: Any, chunk: int = 8
) -> Iterator[torch.Tensor]:
    """Fills `cache` with the context, then yields for each step the log-probabilities of the next token, f32 [n,
    vocabulary], n ≤ chunk.

    Row r of all steps together predicts `token_ids[0, context + 1 + r]`."""
    _check(token_ids, context, chunk)
    last = token_ids.shape[1] - 1
    with torch.no_grad():
        model(token_ids[:, :context], **cache_argument(model, cache), use_cache=True, logits_to_keep=1)
    for start in range(context, last, chunk):
        with torch.no_grad():
            step = token_ids[:, start : min(start + chunk, last)]
            logits = model(step, **cache_argument(model, cache), use_cache=True).logits[0]
            scores = logits.float().log_softmax(-1)
        yield scores


def perplexity(model: Any, token_ids: torch.Tensor, context: int, cache: Any, chunk: int = 8) -> float:
    """exp of the mean negative log-likelihood of `token_ids[0, context + 1:]` through `cache` (see `stream_scores`)."""
    targets = token_ids[0, context + 1 :]
    total, done = 0.0, 0
    for scores in stream_scores(model, token_ids, context, cache, chunk):
        wanted = targets[done : done + len(scores)]
        total -= scores.gather(1, wanted[:, None]).double().sum().item()
        done += len(scores)
    return math.exp(total / done)


def compare_caches(
    model: Any,
    token_ids: torch.Tensor,
    context: int,
    caches: Mapping[str, Any],
    chunk: int = 8,
    report: ReportTokens = lambda _: None,
) -> dict[str, CacheScore]:
    """Scores the same passage through several caches in step; the first of `caches` is the reference of the others.

    Nothing but one step's log-probabilities per cache is held. `report` is called with the number of tokens each step
    scored.
    """
    targets = token_ids[0, context + 1 :]
    names = list(caches)
    sums = {name: {"nll": 0.0, "kl": 0.0, "same": 0.0} for name in names}
    done = 0
    streams = [stream_scores(model, token_ids, context, caches[name], chunk) for name in names]
    for step in zip(*streams, strict=True):
        reference = step[0]
        wanted = targets[done : done + len(reference), None]
        probabilities, likeliest = reference.exp(), reference.argmax(-1)
        for name, scores in zip(names, step, strict=True):
            sums[name]["nll"] -= scores.gather(1, wanted).double().sum().item()
            sums[name]["kl"] += (probabilities * (reference - scores)).double().sum().item()
            sums[name]["same"] += (scores.argmax(-1) == likeliest).sum().item()
        done += len(reference)
        report(len(reference))
    return {
        name: CacheScore(
            tokens=done,
            perplexity=math.exp(total["nll"] / done),
            kl_divergence=total["kl"] / done,
            top1_agreement=total["same"] / done,
        )
        for name, total in sums.items()
    }

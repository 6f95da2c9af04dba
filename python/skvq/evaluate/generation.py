"""Greedy generation with a stopwatch: the tokens, and the time of the prompt and of each decode step.

Used by `skvq demo` and `skvq bench generate`. Not here: caches, reports. Times are seconds of the wall clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..model_layers import cache_argument, layers_for_progress

ReportStep = Callable[[str, int], object]


@dataclass(frozen=True)
class Generation:
    """One greedy run over a prompt."""

    token_ids: list[int]  # the new ones
    prompt_tokens: int
    prefill_seconds: float  # until the first new token was there
    step_seconds: list[float]  # one per further token

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.prefill_seconds

    @property
    def decode_tokens_per_second(self) -> float:
        """From the median step, so that a moment of other work on the machine does not count."""
        return 1.0 / statistics.median(self.step_seconds)


class _Stopwatch:
    """A transformers streamer: `put` gets the prompt first, then every new token."""

    def __init__(self, report: ReportStep, first_token: Callable[[], object]) -> None:
        self.token_ids: list[int] = []
        self.moments: list[float] = []
        self._saw_prompt = False
        self._report = report
        self._first_token = first_token

    def put(self, value: torch.Tensor) -> None:
        if not self._saw_prompt:
            self._saw_prompt = True
            return
        self.moments.append(time.perf_counter())
        self.token_ids += value.flatten().tolist()
        if len(self.moments) == 1:
            self._first_token()
        self._report("decode", 1)

    def end(self) -> None:
        """Nothing is left to flush."""


@contextmanager
def _report_layers(model: Any, report: ReportStep) -> Iterator[None]:
    """Reports ("prefill", 1) as each decoder layer of the first forward call returns."""
    hooks: list[Any] = []

    def remove() -> None:
        while hooks:
            hooks.pop().remove()

    def report_layer(*_: Any) -> None:  # returns None: a hook's return value would replace the layer's output
        report("prefill", 1)

    layers = layers_for_progress(model)
    for layer in layers:
        hooks.append(layer.register_forward_hook(report_layer))
    if layers:
        hooks.append(layers[-1].register_forward_hook(lambda *_: remove()))
    try:
        yield
    finally:
        remove()


def warm_up(model: Any, token_ids: torch.Tensor) -> None:
    """One forward pass and two decode steps over a few tokens, so that weights are in memory and thread pools awake."""
    with torch.no_grad():
        model.generate(token_ids[:, :64], max_new_tokens=3, min_new_tokens=3, do_sample=False, num_beams=1)


def generate(
    model: Any,
    token_ids: torch.Tensor,
    new_tokens: int,
    cache: Any,
    report: ReportStep = lambda *_: None,
    first_token: Callable[[], object] = lambda: None,
) -> Generation:
    """Continues `token_ids` (int64 [1, n]) greedily by exactly `new_tokens` ≥ 2 tokens through `cache`, with
    `model.generate`.

    `report` is called with "prefill" once per layer and "decode" once per token, `first_token` when the prompt is
    done.
    """
    if new_tokens < 2:
        raise ValueError(
            f"new_tokens is {new_tokens}, expected at least 2 (the first one belongs to the prompt's time)"
        )
    watch = _Stopwatch(report, first_token)
    with _report_layers(model, report):
        start = time.perf_counter()
        model.generate(
            token_ids,
            attention_mask=torch.ones_like(token_ids),
            **cache_argument(model, cache),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            top_k=None,
            top_p=None,
            temperature=None,
            streamer=watch,
        )
    return Generation(
        token_ids=watch.token_ids,
        prompt_tokens=token_ids.shape[1],
        prefill_seconds=watch.moments[0] - start,
        step_seconds=[later - earlier for earlier, later in zip(watch.moments, watch.moments[1:], strict=False)],
    )

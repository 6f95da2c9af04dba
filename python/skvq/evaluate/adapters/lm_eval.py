"""EleutherAI's lm-eval (package `lm_eval`) through any cache: its HFLM with our cache in every request.

HFLM scores a choice with one forward pass over context and continuation, which attends to itself in full precision, so
that a packed cache would change nothing. Here

- log-likelihoods: the context is one call, shared by all continuations of that context, and the continuation comes in
  later calls of `chunk` tokens, which read the packed past. Rolling log-likelihoods (perplexity tasks) have a context
  of one token, so nearly all of their text is read from the cache.
- generation: HFLM's own `model.generate`, with an empty cache in every batch; all tokens but the first read the packed
  past.

Not here: tasks and their data, which `lm_eval` finds and downloads itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...model_layers import cache_argument
from ...models import ExtraNotInstalledError
from ..shared_prefill import MakeCache, as_token_ids, continue_with, copy_of, read_context

try:
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ExtraNotInstalledError(
        f"the lm-eval adapter needs EleutherAI's lm_eval ({error}): pip install 'skvq[tasks]'"
    ) from error

# (texts or None, context's token numbers, continuation's)
Request = tuple[tuple[str, str] | None, list[int], list[int]]


class CacheLM(HFLM):
    """A loaded model that answers lm-eval's requests through caches of `make_cache`.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        make_cache: makes an empty cache; its prefill must attend in full precision.
        chunk: tokens of a continuation that one call scores.
        **options: HFLM's, such as `batch_size` (of generation; log-likelihoods go one by one) or `max_length`.
    """

    def __init__(self, model: Any, tokenizer: Any, make_cache: MakeCache, chunk: int = 8, **options: Any) -> None:
        if chunk < 1:
            raise ValueError(f"chunk is {chunk}, expected at least 1")
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", **options)
        self.make_cache = make_cache
        self.chunk = chunk

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        from tqdm import tqdm

        answers: dict[int, tuple[float, bool]] = {}
        # Continuations of one context follow each other, so that it is read once.
        order = sorted(range(len(requests)), key=lambda index: (-len(requests[index][1]), requests[index][1]))
        with tqdm(total=len(requests), disable=disable_tqdm, desc="log-likelihoods through the cache") as bar:
            for context, members in itertools.groupby(order, key=lambda index: requests[index][1]):
                for index, answer in self._answers(context, [(i, requests[i][2]) for i in members]):
                    answers[index] = answer
                    texts = requests[index][0]
                    if texts is not None:
                        self.cache_hook.add_partial("loglikelihood", texts, answer)
                    bar.update(1)
        return [answers[index] for index in range(len(requests))]

    def _answers(
        self, context: list[int], continuations: list[tuple[int, list[int]]]
    ) -> list[tuple[int, tuple[float, bool]]]:
        """Each continuation's log-likelihood, and whether greedy decoding would write it."""
        found = []
        filled: dict[int, tuple[Any, torch.Tensor]] = {}  # by the context's length, which long continuations cut
        for index, continuation in continuations:
            # from the left, as HFLM does: the model sees at most max_length tokens, the last token only as a target
            kept = context[-max(self.max_length + 1 - len(continuation), 1) :]
            if len(kept) not in filled:
                filled[len(kept)] = self._read(kept)
            cache, scores = filled[len(kept)]
            found.append((index, self._score(copy_of(cache, self.model), scores, continuation)))
        return found

    def _read(self, context: list[int]) -> tuple[Any, torch.Tensor]:
        """A cache with the context, and the log-probabilities of the next token."""
        cache = self.make_cache()
        if len(context) == 1:  # nothing to attend to: the first token of a rolling text
            return cache, continue_with(self.model, cache, as_token_ids(context, self.model), keep=1)[0]
        prefill = read_context(self.model, as_token_ids(context, self.model))
        return prefill.fill(cache), prefill.log_probabilities

    def _score(self, cache: Any, scores: torch.Tensor, continuation: Sequence[int]) -> tuple[float, bool]:
        total, is_greedy = float(scores[continuation[0]]), int(scores.argmax()) == continuation[0]
        for start in range(0, len(continuation) - 1, self.chunk):
            wanted = continuation[start + 1 : start + 1 + self.chunk]
            step = as_token_ids(continuation[start : start + len(wanted)], self.model)
            rows = continue_with(self.model, cache, step)
            targets = as_token_ids(wanted, self.model)[0]
            total += float(rows.gather(1, targets[:, None]).double().sum())
            is_greedy = is_greedy and bool((rows.argmax(-1) == targets).all())
        return total, is_greedy

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **generation: Any) -> Any:
        generation |= cache_argument(self.model, self.make_cache())
        return super()._model_generate(context, max_length, stop, **generation)


def find_tasks(include_path: Path | None = None) -> Any:
    """lm-eval's own tasks, and those whose configurations (YAML) are in a folder."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=None if include_path is None else str(include_path))


def run_lm_eval(
    model: Any, tokenizer: Any, make_cache: MakeCache, tasks: Sequence[Any], chunk: int = 8, **options: Any
) -> dict[str, Any]:
    """`lm_eval.simple_evaluate` through a cache; returns its results.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        make_cache: makes an empty cache.
        tasks: names that lm_eval knows, or its task configurations.
        chunk: tokens of a continuation that one call scores.
        **options: those of `simple_evaluate` (`task_manager`, `limit`, `num_fewshot`, `apply_chat_template`, ...).
    """
    import lm_eval

    adapted = CacheLM(model, tokenizer, make_cache, chunk)
    results: dict[str, Any] = lm_eval.simple_evaluate(model=adapted, tasks=list(tasks), **options)
    return results


def scores(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures of lm-eval's results: one row {"task", "figure", "value", "error"} each, error None if unknown."""
    rows = []
    for task, figures in results["results"].items():
        for name, value in figures.items():
            measure, _, filter_name = name.partition(",")
            if isinstance(value, bool) or not isinstance(value, int | float) or "_stderr" in measure or not filter_name:
                continue
            error = figures.get(f"{measure}_stderr,{filter_name}")
            known = error if isinstance(error, int | float) else None
            rows.append({"task": task, "figure": name, "value": value, "error": known})
    return rows

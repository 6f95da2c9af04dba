"""Retrieval through a cache: is what stands somewhere in a long context still found when the past is packed?

A prefill attends to itself in full precision, so a question that is part of it would read no packed key. Two settings:

- `"chunk"` (default): the context is one call, the question a second one. The question's tokens and the answer's read
  the packed past, as in a second turn of a chat, or with a prompt that is cached for many questions.
- `"whole"`: context and question are one call; only the answer's tokens after the first read the packed past.

The context is prefilled once and handed to every cache (shared_prefill.py). An answer is greedy and right if its first
number is the one asked for. `nll` is the mean negative log-likelihood of the right answer's tokens: finer than right
or wrong where cases are few. Not here: the cases (retrieval_cases.py), the pictures (task_plots.py).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .retrieval_cases import TASKS, Case, CaseMaker, Haystack, PromptFormat, Question
from .shared_prefill import (
    MakeCache,
    SharedPrefill,
    as_token_ids,
    can_copy,
    continue_with,
    copies,
    copy_of,
    end_tokens,
    greedy,
    read_context,
)
from .task_records import RecordFile
from .task_statistics import wilson_interval

KEY = ("task", "length", "case", "depth", "cache")
PREFILLS = ("chunk", "whole")
_ANSWER_SLACK = 4  # tokens beyond the right answer's: a space, a quote, an article


@dataclass(frozen=True)
class RetrievalOptions:
    """What a retrieval run asks."""

    tasks: tuple[str, ...] = ("needle",)
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192)  # tokens of a whole prompt, at most
    depths: int = 5
    cases: int = 3  # contexts for every length; each has a question for every depth
    hops: int = 2  # assignments of a chain of `variables`
    prefill: str = "chunk"
    chat: bool | None = None  # None: the tokenizer's chat template if it has one
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown or not self.tasks:
            raise ValueError(f"tasks are {list(self.tasks)}, expected some of {', '.join(TASKS)}")
        if self.prefill not in PREFILLS:
            raise ValueError(f"prefill is {self.prefill!r}, expected one of {', '.join(PREFILLS)}")
        for name in ("depths", "cases", "hops"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths are {list(self.lengths)}, expected at least one, all positive")


def is_right(answer: str, wanted: str) -> bool:
    """Whether the first number of an answer is the one asked for."""
    found = re.search(r"\d+", answer)
    return found is not None and found.group() == wanted


class _Run:
    def __init__(
        self, model: Any, tokenizer: Any, caches: Mapping[str, MakeCache], options: RetrievalOptions, text: str
    ) -> None:
        self.model, self.tokenizer, self.caches, self.options = model, tokenizer, caches, options
        self.format = PromptFormat(tokenizer, options.chat)
        haystack = Haystack.from_text(text, lambda texts: [len(self.format.encode(x)) for x in texts])
        self.maker = CaseMaker(self.format, haystack, depths=options.depths, hops=options.hops, seed=options.seed)
        self.stop = end_tokens(model, tokenizer)

    def questions(self, case: Case, names: list[str]) -> Iterator[tuple[Question, str, dict[str, Any]]]:
        """Each question, the name of each cache, and its answer."""
        asks = self._in_a_later_call if self.options.prefill == "chunk" else self._in_one_call
        return asks(case, names)

    def _in_a_later_call(self, case: Case, names: list[str]) -> Iterator[tuple[Question, str, dict[str, Any]]]:
        ids = as_token_ids(self.format.context(case.introduction, case.context), self.model)
        context = read_context(self.model, ids)
        for name in names:
            filled = self._filled(context, name)
            bits = context.bits(filled(), self.model.config)
            for question in case.questions:
                asked = as_token_ids(self.format.question(question.text, question.answer_start), self.model)
                scores = continue_with(self.model, cache := filled(), asked, keep=1)[0]
                yield question, name, self._answer(question, self._asked(cache, filled, asked), scores, bits)

    def _filled(self, context: SharedPrefill, name: str) -> MakeCache:
        return copies(lambda: context.fill(self.caches[name]()), self.model)

    def _asked(self, cache: Any, filled: MakeCache, asked: torch.Tensor) -> MakeCache:
        """Makes caches that hold context and question; `cache` is one already."""
        if can_copy(cache):
            return lambda: copy_of(cache, self.model)

        def ask_again() -> Any:
            again = filled()
            continue_with(self.model, again, asked, keep=1)
            return again

        return ask_again

    def _in_one_call(self, case: Case, names: list[str]) -> Iterator[tuple[Question, str, dict[str, Any]]]:
        for question in case.questions:
            ids = self.format.prompt(case, question)
            whole = read_context(self.model, as_token_ids(ids.context + ids.question, self.model))
            for name in names:
                filled = self._filled(whole, name)
                bits = whole.bits(filled(), self.model.config)
                yield question, name, self._answer(question, filled, whole.log_probabilities, bits)

    def _answer(self, question: Question, ready: MakeCache, scores: torch.Tensor, bits: float) -> dict[str, Any]:
        """The greedy answer and the likelihood of the right one; `ready` makes caches that hold all but the answer."""
        right = self.format.encode(f" {question.answer}")
        total = -float(scores[right[0]])
        if len(right) > 1:
            later = continue_with(self.model, ready(), as_token_ids(right[:-1], self.model))
            total -= sum(float(later[row, token]) for row, token in enumerate(right[1:]))
        token_ids = greedy(self.model, ready(), scores, len(right) + _ANSWER_SLACK, self.stop)
        answer = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return {
            "answer": answer,
            "right": is_right(answer, question.answer),
            "nll": total / len(right),
            "bits": bits,
        }


def retrieval_settings(model_name: str, options: RetrievalOptions, text: str, **more: Any) -> dict[str, Any]:
    """What the records of one file must have in common; tasks, lengths, cases and caches may grow."""
    shared = {name: getattr(options, name) for name in ("depths", "hops", "prefill", "chat", "seed")}
    return {"model": model_name, **shared, "texts": hashlib.sha256(text.encode()).hexdigest()[:16], **more}


def run_retrieval(
    model: Any,
    tokenizer: Any,
    caches: Mapping[str, MakeCache],
    options: RetrievalOptions,
    text: str,
    records: RecordFile | None = None,
    report: Callable[[int, str], object] = lambda *_: None,
) -> list[dict[str, Any]]:
    """Asks every question through every cache that `records` (key: `KEY`) does not have an answer for yet.

    `report` gets the number of answers that are done and what is being asked. Returns one record per answer.
    """
    if not caches:
        raise ValueError("caches is empty, expected at least one")
    records = RecordFile(None, {}, KEY) if records is None else records
    run = _Run(model, tokenizer, caches, options, text)
    found: list[dict[str, Any]] = []
    for task in options.tasks:
        for length in options.lengths:
            for index in range(options.cases):
                found += _run_case(run, task, length, index, records, report)
    return found


def _run_case(
    run: _Run, task: str, length: int, index: int, records: RecordFile, report: Callable[[int, str], object]
) -> list[dict[str, Any]]:
    label, names, depths = f"{task} {length}", list(run.caches), range(run.options.depths)
    known = {(depth, name): records.get(task, length, index, depth, name) for depth in depths for name in names}
    missing = [name for name in names if any(known[depth, name] is None for depth in depths)]
    report(len(depths) * (len(names) - len(missing)), label)
    if missing:
        case = run.maker.make(task, length, index)
        for question, name, answer in run.questions(case, missing):
            record = {"task": task, "length": length, "case": index, "depth": question.depth, "cache": name}
            record |= {"tokens": run.maker.tokens(case), "wanted": question.answer, **answer}
            known[question.depth, name] = records.add(record)
            report(1, label)
    return [record for record in known.values() if record is not None]


# ---- figures ---------------------------------------------------------------------------------------------------------


def grid(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Accuracy and mean nll of each cell: cache × task × length × depth."""
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        cells.setdefault(tuple(record[name] for name in ("cache", "task", "length", "depth")), []).append(record)
    return [
        dict(zip(("cache", "task", "length", "depth"), cell, strict=True))
        | {
            "cases": len(found),
            "accuracy": sum(record["right"] for record in found) / len(found),
            "nll": sum(record["nll"] for record in found) / len(found),
        }
        for cell, found in cells.items()
    ]


def summary(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each cache and task: accuracy with its 95 % interval (Wilson), nll, and in how many cells the
    accuracy is below, and above, that of the first cache.
    """
    cells = grid(records)
    accuracy = {(cell["cache"], cell["task"], cell["length"], cell["depth"]): cell["accuracy"] for cell in cells}
    names = list(dict.fromkeys(record["cache"] for record in records))
    rows = []
    for task in dict.fromkeys(record["task"] for record in records):
        places = list(dict.fromkeys((cell["length"], cell["depth"]) for cell in cells if cell["task"] == task))
        for name in names:
            own = [record for record in records if (record["cache"], record["task"]) == (name, task)]
            if not own:
                continue
            right = sum(record["right"] for record in own)
            low, high = wilson_interval(right, len(own))
            pairs = [(accuracy[name, task, x, y], accuracy[names[0], task, x, y]) for x, y in places]
            longest = max(own, key=lambda record: int(record["length"]))
            rows.append(
                {
                    "cache": name,
                    "task": task,
                    "answers": len(own),
                    "accuracy": right / len(own),
                    "accuracy_low": low,
                    "accuracy_high": high,
                    "nll": sum(record["nll"] for record in own) / len(own),
                    "cells": len(pairs),
                    "cells_below_first": sum(mine < first for mine, first in pairs),
                    "cells_above_first": sum(mine > first for mine, first in pairs),
                    "bits_at_longest": longest["bits"],
                }
            )
    return rows


def table(records: list[dict[str, Any]], depths: int) -> str:
    """The summary, and for each task the accuracy by length and depth, as text."""
    cells = {(x["cache"], x["task"], x["length"], x["depth"]): x for x in grid(records)}
    names = list(dict.fromkeys(record["cache"] for record in records))
    lengths = sorted({record["length"] for record in records})
    width = max(12, *map(len, names)) + 2
    lines = [
        f"{'task':<11}{'cache':<{width}}{'right':>7}{'95 % interval':>15}{'nll':>8}{'below':>7}{'above':>7}{'bits':>7}"
    ]
    for row in summary(records):
        interval = f"{row['accuracy_low']:.2f} … {row['accuracy_high']:.2f}"
        lines.append(
            f"{row['task']:<11}{row['cache']:<{width}}{row['accuracy']:>7.2f}{interval:>15}{row['nll']:>8.3f}"
            f"{row['cells_below_first']:>7}{row['cells_above_first']:>7}{row['bits_at_longest']:>7.2f}"
        )
    for task in dict.fromkeys(record["task"] for record in records):
        shares = "".join(f"{100 * (depth + 0.5) / depths:>6.0f} %" for depth in range(depths))
        lines += ["", f"{task:<11}{'':<{width}}{'length':>7}{shares}"]
        for name in names:
            for length in lengths:
                found = [cells.get((name, task, length, depth)) for depth in range(depths)]
                shown = "".join(f"{'–' if x is None else format(x['accuracy'], '.2f'):>8}" for x in found)
                lines.append(f"{'':<11}{name:<{width}}{length:>7}{shown}")
    return "\n".join(lines)


def retrieval_report(
    records: list[dict[str, Any]], model_name: str, options: RetrievalOptions, **more: Any
) -> dict[str, Any]:
    """The JSON report: rows are the summary, `grid` the cells, `answers` every answer."""
    from ..bench.machine import make_report

    settings = asdict(options) | more
    return make_report("retrieval", settings, summary(records), model=model_name, grid=grid(records), answers=records)

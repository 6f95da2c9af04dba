"""Long generation: does a packed cache stay with full precision over a thousand tokens and more?

Two measures, for each prompt and cache, the first cache being the reference (full precision):

- free-running: the greedy continuation beside the reference's. Two texts part for good at their first different token,
  so equality says little; how the text itself fares is told by its perplexity under full precision and its repetitions.
- forced: the cache is led along one text, which full precision wrote, and its predictions are compared with full
  precision's at every token: KL divergence and agreement of the likeliest token by position, in buckets. Does the error
  grow with what is packed? This is the robust figure. The text may also be a given one. Otherwise it is sampled with a
  seed, by default from the model's own distribution: greedy text, and that of a low temperature, falls into loops in
  which every token is easy and the error seems to shrink. The text's repetitions and its nll in each bucket say whether
  it did.

A forced step takes `chunk` tokens in one call; up to chunk - 1 tokens more than in decoding one by one are packed when
a token is scored. Not here: pictures (task_plots.py), timing (generation.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from itertools import pairwise
from typing import Any

import torch

from .shared_prefill import (
    MakeCache,
    SharedPrefill,
    as_token_ids,
    continue_with,
    greedy,
    read_context,
)
from .task_records import RecordFile
from .task_statistics import mean_and_error

KEY = ("prompt", "cache", "measure")
FREE, FORCED, TEXT = "free", "forced", "text"
_RUN = 4  # tokens of the runs that are looked for again
Report = Callable[[int, str], object]


@dataclass(frozen=True)
class LongGenerationOptions:
    """What a run generates."""

    new_tokens: int = 1024
    bucket: int = 100  # positions that one figure of the drift stands for
    chunk: int = 8  # tokens of a forced step
    temperature: float = 1.0  # of the forced text; 0: greedy
    top_p: float = 1.0
    free: bool = True  # also generate freely with every cache
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in {"new_tokens": 2, "bucket": 1, "chunk": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {least}")
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}, expected 0 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, expected above 0 and up to 1")


# ---- measures of two texts -------------------------------------------------------------------------------------------


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Tokens before the first different one."""
    for place, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            return place
    return min(len(ours), len(theirs))


def similarity(ours: Sequence[int], theirs: Sequence[int]) -> float:
    """Share of tokens in common blocks (difflib's ratio): 1 for equal texts; texts may be shifted."""
    return SequenceMatcher(None, list(ours), list(theirs), autojunk=False).ratio()


def repetition(token_ids: Sequence[int], run: int = _RUN) -> float:
    """Share of the runs of `run` tokens that stood in the text before."""
    runs = [tuple(token_ids[i : i + run]) for i in range(len(token_ids) - run + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


# ---- running ---------------------------------------------------------------------------------------------------------


def sample(
    model: Any, cache: Any, log_probabilities: torch.Tensor, count: int, options: LongGenerationOptions, report: Report
) -> list[int]:
    """`count` tokens drawn with temperature and top_p, always the same for a seed; greedy at temperature 0."""
    if options.temperature == 0:
        return greedy(model, cache, log_probabilities, count, report=lambda n: report(n, "text"))
    generator = torch.Generator().manual_seed(options.seed)
    found: list[int] = []
    while True:
        probabilities, order = (log_probabilities.cpu() / options.temperature).softmax(-1).sort(descending=True)
        probabilities[probabilities.cumsum(-1) - probabilities >= options.top_p] = 0
        found.append(int(order[torch.multinomial(probabilities, 1, generator=generator)]))
        report(1, "text")
        if len(found) == count:
            return found
        log_probabilities = continue_with(model, cache, as_token_ids(found[-1:], model), keep=1)[0]


def _negative_log_likelihood(model: Any, context: SharedPrefill, make: MakeCache, token_ids: list[int]) -> float:
    """Mean over the tokens of a continuation, under full precision (one call)."""
    total = -float(context.log_probabilities[token_ids[0]])
    ids = as_token_ids(token_ids, model)
    scores = continue_with(model, context.fill(make()), ids[:, :-1])
    total -= float(scores.gather(1, ids[0, 1:, None]).double().sum())
    return total / len(token_ids)


def forced_scores(
    model: Any,
    context: SharedPrefill,
    caches: Mapping[str, Any],
    reference: Any,
    token_ids: list[int],
    chunk: int,
    report: Report = lambda *_: None,
) -> dict[str, dict[str, list[float]]]:
    """Leads every cache (empty ones) along `token_ids` beside `reference`; for each cache and token after the first
    {"kl": KL(reference || cache) in nats, "same": 1 where the likeliest tokens agree, "nll": of the token}.
    """
    for cache in (reference, *caches.values()):
        context.fill(cache)
    found: dict[str, dict[str, list[float]]] = {name: {"kl": [], "same": [], "nll": []} for name in caches}
    last = len(token_ids) - 1
    for start in range(0, last, chunk):
        stop = min(start + chunk, last)
        step = as_token_ids(token_ids[start:stop], model)
        wanted = as_token_ids(token_ids[start + 1 : stop + 1], model)[0, :, None]
        theirs = continue_with(model, reference, step)
        probabilities, likeliest = theirs.exp(), theirs.argmax(-1)
        for name, cache in caches.items():
            ours = continue_with(model, cache, step)
            found[name]["kl"] += (probabilities * (theirs - ours)).double().sum(-1).tolist()
            found[name]["same"] += (ours.argmax(-1) == likeliest).double().tolist()
            found[name]["nll"] += (-ours.gather(1, wanted)[:, 0]).double().tolist()
        report(stop - start, "forced")
    return found


def run_long_generation(
    model: Any,
    prompts: Sequence[Sequence[int]],
    caches: Mapping[str, MakeCache],
    options: LongGenerationOptions,
    records: RecordFile | None = None,
    report: Report = lambda *_: None,
    *,
    continuations: Sequence[Sequence[int]] | None = None,
) -> list[dict[str, Any]]:
    """Runs what `records` (key: `KEY`) lacks; returns its records of these prompts and caches.

    prompts: token numbers, at least 2 each. The first of `caches` is the reference of the others.
    continuations: `options.new_tokens` of each prompt, which caches are led along in place of a text that is sampled.
    `report` gets the number of tokens generated or scored, and which of the two.
    """
    if not caches:
        raise ValueError("caches is empty, expected at least one, the reference first")
    records = RecordFile(None, {}, KEY) if records is None else records
    found: list[dict[str, Any]] = []
    for index, token_ids in enumerate(prompts):
        given = None if continuations is None else list(continuations[index])
        found += _Prompt(model, index, token_ids, caches, options, records, report, given).run()
    return found


class _Prompt:
    """One prompt with every cache."""

    def __init__(
        self,
        model: Any,
        index: int,
        token_ids: Sequence[int],
        caches: Mapping[str, MakeCache],
        options: LongGenerationOptions,
        records: RecordFile,
        report: Report,
        given: list[int] | None,
    ) -> None:
        self.given = given
        self.model, self.index, self.caches, self.options = model, index, caches, options
        self.records, self.report = records, report
        self.token_ids = token_ids
        self.reference = next(iter(caches))
        self._context: SharedPrefill | None = None

    @property
    def context(self) -> SharedPrefill:
        if self._context is None:
            self._context = read_context(self.model, as_token_ids(self.token_ids, self.model))
        return self._context

    def run(self) -> list[dict[str, Any]]:
        found = [self._free(name) for name in self.caches] if self.options.free else []
        others = [name for name in self.caches if name != self.reference]
        if others:
            found.append(self._text())
            found += self._forced(others, found[-1]["token_ids"])
        return found

    def _add(self, name: str, measure: str, **figures: Any) -> dict[str, Any]:
        record = {"prompt": self.index, "cache": name, "measure": measure, "prompt_tokens": len(self.token_ids)}
        return self.records.add(record | figures)

    def _free(self, name: str) -> dict[str, Any]:
        known = self.records.get(self.index, name, FREE)
        if known is not None:
            self.report(self.options.new_tokens, "free")
            return known
        cache = self.context.fill(self.caches[name]())
        found = greedy(
            self.model,
            cache,
            self.context.log_probabilities,
            self.options.new_tokens,
            report=lambda count: self.report(count, "free"),
        )
        nll = _negative_log_likelihood(self.model, self.context, self.caches[self.reference], found)
        return self._add(name, FREE, token_ids=found, nll=nll, repetition=repetition(found))

    def _text(self) -> dict[str, Any]:
        """The text that all caches are led along."""
        known = self.records.get(self.index, self.reference, TEXT)
        if known is not None:
            self.report(self.options.new_tokens, "text")
            return known
        if self.given is not None:
            found = self.given
            self.report(len(found), "text")
        else:
            cache = self.context.fill(self.caches[self.reference]())
            scores, count = self.context.log_probabilities, self.options.new_tokens
            found = sample(self.model, cache, scores, count, self.options, self.report)
        return self._add(self.reference, TEXT, token_ids=found, repetition=repetition(found))

    def _forced(self, names: list[str], text: list[int]) -> list[dict[str, Any]]:
        missing = [name for name in names if self.records.get(self.index, name, FORCED) is None]
        if missing:
            caches = {name: self.caches[name]() for name in missing}
            reference = self.caches[self.reference]()
            scores = forced_scores(self.model, self.context, caches, reference, text, self.options.chunk, self.report)
            for name in missing:
                rounded = {key: [round(x, 6) for x in values] for key, values in scores[name].items()}
                bits = self.context.bits(caches[name], self.model.config)
                self._add(name, FORCED, bits=bits, **rounded)
        else:
            self.report(self.options.new_tokens - 1, "forced")
        return [known for name in names if (known := self.records.get(self.index, name, FORCED)) is not None]


# ---- figures ---------------------------------------------------------------------------------------------------------


def drift(records: Sequence[dict[str, Any]], bucket: int) -> list[dict[str, Any]]:
    """Mean KL divergence, agreement and nll of each cache in each bucket of positions, over all prompts.

    A bucket that is less than half full joins the one before it.
    """
    forced = [record for record in records if record["measure"] == FORCED]
    rows = []
    for name in dict.fromkeys(record["cache"] for record in forced):
        own = [record for record in forced if record["cache"] == name]
        count = max(len(record["kl"]) for record in own)
        edges = [*range(0, max(count - bucket // 2, 1), bucket), count]
        for begin, end in pairwise(edges):
            kl = [x for record in own for x in record["kl"][begin:end]]
            same = [x for record in own for x in record["same"][begin:end]]
            mean, error = mean_and_error(kl)
            nll = [x for record in own for x in record["nll"][begin:end]]
            row = {"cache": name, "from": begin + 1, "to": end, "kl": mean, "kl_error": error}
            rows.append(row | {"top1_agreement": sum(same) / len(same), "nll": sum(nll) / len(nll)})
    return rows


def summary(records: Sequence[dict[str, Any]], bucket: int) -> list[dict[str, Any]]:
    """One row for each cache; what was not measured is None. The first cache with records is the reference.

    `drift`: mean KL of the second half of the positions over that of the first half; 1 is no drift.
    """
    kept = {(record["prompt"], record["cache"], record["measure"]): record for record in records}
    names = list(dict.fromkeys(record["cache"] for record in records))
    prompts = sorted({record["prompt"] for record in records})
    rows = []
    for name in names:
        row: dict[str, Any] = {"cache": name, "prompts": len(prompts)}
        free = [kept[prompt, name, FREE] for prompt in prompts if (prompt, name, FREE) in kept]
        base = [kept[record["prompt"], names[0], FREE] for record in free]
        row |= _free_figures(free, base) | _forced_figures(
            [kept[prompt, name, FORCED] for prompt in prompts if (prompt, name, FORCED) in kept], bucket
        )
        rows.append(row)
    return rows


def _free_figures(free: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, Any]:
    names = ("first_difference", "equal_tokens", "similarity", "repetition", "perplexity_under_reference")
    if not free:
        return dict.fromkeys(names)
    pairs = [(ours["token_ids"], theirs["token_ids"]) for ours, theirs in zip(free, base, strict=True)]
    equal = [sum(a == b for a, b in zip(*pair, strict=True)) / len(pair[0]) for pair in pairs]
    figures = (
        sum(first_difference(*pair) for pair in pairs) / len(pairs),
        sum(equal) / len(pairs),
        sum(similarity(*pair) for pair in pairs) / len(pairs),
        sum(record["repetition"] for record in free) / len(free),
        math.exp(sum(record["nll"] for record in free) / len(free)),
    )
    return dict(zip(names, figures, strict=True))


def _forced_figures(forced: list[dict[str, Any]], bucket: int) -> dict[str, Any]:
    names = ("kl", "kl_error", "kl_95th_percentile", "top1_agreement", "perplexity", "drift", "bits")
    if not forced:
        return dict.fromkeys(names)
    kl = [x for record in forced for x in record["kl"]]
    same = [x for record in forced for x in record["same"]]
    nll = [x for record in forced for x in record["nll"]]
    halves = [
        [x for record in forced for x in record["kl"][part]]
        for part in (slice(None, len(forced[0]["kl"]) // 2), slice(len(forced[0]["kl"]) // 2, None))
    ]
    # Tokens near each other are not independent: the error is that of means over runs of `bucket` tokens.
    runs = [record["kl"][i : i + bucket] for record in forced for i in range(0, len(record["kl"]), bucket)]
    mean, error = mean_and_error(kl)[0], mean_and_error([mean_and_error(run)[0] for run in runs])[1]
    first = mean_and_error(halves[0])[0] if halves[0] else 0.0
    figures = (
        mean,
        error,
        sorted(kl)[int(0.95 * (len(kl) - 1))],
        sum(same) / len(same),
        math.exp(sum(nll) / len(nll)),
        mean_and_error(halves[1])[0] / first if first > 0 else None,
        forced[-1]["bits"],
    )
    return dict(zip(names, figures, strict=True))


_COLUMNS = (
    ("kl", "KL", "7.4f"),
    ("kl_error", "±", "7.4f"),
    ("kl_95th_percentile", "KL 95 %", "8.3f"),
    ("top1_agreement", "top-1", "6.3f"),
    ("drift", "drift", "6.2f"),
    ("first_difference", "parts at", "8.0f"),
    ("equal_tokens", "equal", "6.3f"),
    ("similarity", "similar", "7.3f"),
    ("repetition", "repeats", "7.3f"),
    ("perplexity_under_reference", "text ppl", "8.2f"),
    ("bits", "bits", "6.2f"),
)


def table(records: Sequence[dict[str, Any]], bucket: int) -> str:
    """The summary, and the KL divergence by position, as text."""
    rows = summary(records, bucket)
    width = max(12, *(len(row["cache"]) for row in rows)) + 2
    lines = [f"{'cache':<{width}}" + "".join(f"{title:>{_width(title, form)}}" for _, title, form in _COLUMNS)]
    for row in rows:
        shown = ("–" if row[key] is None else format(row[key], form.strip()) for key, _, form in _COLUMNS)
        cells = (f"{x:>{_width(title, form)}}" for x, (_, title, form) in zip(shown, _COLUMNS, strict=True))
        lines.append(f"{row['cache']:<{width}}" + "".join(cells))
    found = drift(records, bucket)
    if found:
        first = found[0]["cache"]
        ends = "".join(f"{row['to']:>8}" for row in found if row["cache"] == first)
        lines += ["", f"{'KL up to token':<{width}}{ends}"]
        for name in dict.fromkeys(row["cache"] for row in found):
            lines.append(f"{name:<{width}}" + "".join(f"{x['kl']:>8.4f}" for x in found if x["cache"] == name))
        lines.append(
            f"{'nll of the text':<{width}}" + "".join(f"{x['nll']:>8.2f}" for x in found if x["cache"] == first)
        )
        repeated = [record["repetition"] for record in records if record["measure"] == TEXT]
        lines.append(f"share of the text's {_RUN}-token runs that repeat: {sum(repeated) / len(repeated):.2f}")
    return "\n".join(lines)


def _width(title: str, form: str) -> int:
    return max(len(title), int(form.split(".")[0])) + 2


def long_generation_report(
    records: Sequence[dict[str, Any]], model_name: str, options: LongGenerationOptions, **more: Any
) -> dict[str, Any]:
    """The JSON report: rows are the summary, `drift` the buckets, `records` everything."""
    from ..bench.machine import make_report

    settings = asdict(options) | more
    rows = summary(records, options.bucket)
    return make_report(
        "generation", settings, rows, model=model_name, drift=drift(records, options.bucket), records=list(records)
    )

"""LongBench's English tasks through any cache, from JSON lines that are on this machine.

Data: one file `TASK.jsonl` for each task, every line an object with `context`, `input`, `answers` (list) and
`all_classes` (list or null), as LongBench publishes them. The instructions below are this project's own: caches can
be compared with each other by them; for figures beside published ones give LongBench's own `dataset2prompt.json`.

Prompts longer than `max_tokens` lose their middle, as in LongBench. With `prefill="chunk"` (default) the context is one
call and what follows it a second one, so that the question reads the packed past (see retrieval.py).
Scores are 0 … 1. Not here: downloads.
"""

from __future__ import annotations

import difflib
import json
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...models import ExtraNotInstalledError
from ..retrieval_cases import PromptFormat
from ..shared_prefill import MakeCache, as_token_ids, continue_with, end_tokens, greedy, read_context
from ..task_records import RecordFile
from ..task_statistics import mean_and_error

KEY = ("task", "number", "cache")
Example = Mapping[str, Any]
Score = Callable[[str, str, Sequence[str]], float]  # answer, one right answer, all classes


# ---- scores ----------------------------------------------------------------------------------------------------------


def normalized_words(text: str) -> list[str]:
    """Lower case, no punctuation, no articles (SQuAD's rule)."""
    plain = "".join(x for x in text.lower() if x not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def word_f1(answer: str, wanted: str, classes: Sequence[str] = ()) -> float:
    """F1 of the words in common."""
    ours, theirs = normalized_words(answer), normalized_words(wanted)
    common = sum((Counter(ours) & Counter(theirs)).values())
    if not common:
        return 0.0
    precision, recall = common / len(ours), common / len(theirs)
    return 2 * precision * recall / (precision + recall)


def rouge_l(answer: str, wanted: str, classes: Sequence[str] = ()) -> float:
    """F measure of the longest common subsequence (package `rouge-score`)."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ExtraNotInstalledError("ROUGE-L needs the package rouge-score: pip install 'skvq[tasks]'") from None
    score: float = RougeScorer(["rougeL"]).score(wanted, answer)["rougeL"].fmeasure
    return score


def class_accuracy(answer: str, wanted: str, classes: Sequence[str]) -> float:
    """1 for the right class alone; its share of the classes that the answer names."""
    named = [name for name in classes if name in answer]
    # A name inside a longer one that is named too does not count for itself.
    named = [name for name in named if name == wanted or not (name in wanted and wanted in answer)]
    return 1.0 / len(named) if wanted in named else 0.0


def numbers_share(answer: str, wanted: str, classes: Sequence[str] = ()) -> float:
    """Share of the numbers in the answer that are the one in `wanted`."""
    numbers, right = re.findall(r"\d+", answer), re.findall(r"\d+", wanted)[:1]
    return sum(number in right for number in numbers) / len(numbers) if numbers else 0.0


def first_code_line(answer: str) -> str:
    """The first line that is code, not a comment or a fence."""
    lines = (line for line in answer.lstrip("\n").split("\n"))
    return next((line for line in lines if not re.search(r"`|#|//", line)), "")


def code_similarity(answer: str, wanted: str, classes: Sequence[str] = ()) -> float:
    """difflib's ratio of the first code line and the right one."""
    return difflib.SequenceMatcher(None, first_code_line(answer), wanted).ratio()


# ---- tasks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """How one LongBench task is asked and scored."""

    prompt: str  # with {context}, and {input} where the task has one
    score: Score
    new_tokens: int
    chat: bool = True  # False: the model goes on with the text (few-shot examples, code)
    first_line: bool = False  # the answer is the first line of what is generated


_BRIEF = "Answer with a few words from the text only, without an explanation."
_DOCUMENTS = f"Answer a question from these documents.\n\n{{context}}\n\nQuestion: {{input}}\n{_BRIEF}\nAnswer:"

TASKS: dict[str, Task] = {
    "narrativeqa": Task(
        f"Read this story.\n\n{{context}}\n\nQuestion on the story: {{input}}\n{_BRIEF}\nAnswer:", word_f1, 128
    ),
    "qasper": Task(
        "Read this scientific article.\n\n{context}\n\nQuestion on the article: {input}\n"
        'Answer in one phrase or sentence, with "yes" or "no", or with "unanswerable" if the article does not say.\n'
        "Answer:",
        word_f1,
        128,
    ),
    "multifieldqa_en": Task(
        f"Read this text.\n\n{{context}}\n\nQuestion on the text: {{input}}\n{_BRIEF}\nAnswer:", word_f1, 64
    ),
    "hotpotqa": Task(_DOCUMENTS, word_f1, 32),
    "2wikimqa": Task(_DOCUMENTS, word_f1, 32),
    "musique": Task(_DOCUMENTS, word_f1, 32),
    "gov_report": Task("Here is a report.\n\n{context}\n\nSummarize it on one page.\nSummary:", rouge_l, 512),
    "qmsum": Task(
        "Here is the transcript of a meeting.\n\n{context}\n\nAnswer in a few sentences: {input}\nAnswer:", rouge_l, 512
    ),
    "multi_news": Task(
        "Here are several news articles.\n\n{context}\n\nSummarize them on one page.\nSummary:", rouge_l, 512
    ),
    "trec": Task("Name the type of the last question.\n\n{context}\n{input}", class_accuracy, 64, False, True),
    "triviaqa": Task(
        "Answer the last question from its passage, as the examples do.\n\n{context}\n\n{input}",
        word_f1,
        32,
        False,
        True,
    ),
    "samsum": Task(
        "Summarize the last dialogue, as the examples do.\n\n{context}\n\n{input}", rouge_l, 128, False, True
    ),
    "passage_count": Task(
        "Some of these paragraphs repeat others.\n\n{context}\n\n"
        "How many different paragraphs are there? Answer with the number only.\nAnswer:",
        numbers_share,
        32,
    ),
    "passage_retrieval_en": Task(
        "Here are numbered paragraphs.\n\n{context}\n\nThis is a summary of one of them:\n\n{input}\n\n"
        'Which one? Answer with "Paragraph" and its number only.\nAnswer:',
        numbers_share,
        32,
    ),
    "lcc": Task("{context}", code_similarity, 64, False),
    "repobench-p": Task("{context}{input}", code_similarity, 64, False),
}


@dataclass(frozen=True)
class LongBenchOptions:
    """What a run asks."""

    tasks: tuple[str, ...] = ()  # empty: every task whose file is there
    limit: int | None = None  # examples of a task
    max_tokens: int = 8192  # of a prompt
    prefill: str = "chunk"

    def __post_init__(self) -> None:
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown:
            raise ValueError(f"task is {unknown[0]!r}, expected one of {', '.join(TASKS)}")
        if self.prefill not in ("chunk", "whole"):
            raise ValueError(f"prefill is {self.prefill!r}, expected 'chunk' or 'whole'")
        if self.max_tokens < 4:
            raise ValueError(f"max_tokens is {self.max_tokens}, expected at least 4")


def read_examples(folder: Path, task: str, limit: int | None = None) -> list[Example]:
    """The examples of a task. Raises ValueError for a file that is not there or lacks a field."""
    path = folder / f"{task}.jsonl"
    if not path.is_file():
        raise ValueError(f"{path} is not there: expected LongBench's data as one TASK.jsonl for each task")
    examples: list[Example] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            example = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
        missing = [name for name in ("context", "input", "answers") if name not in example]
        if missing:
            raise ValueError(f"{path}, line {number}: no field {missing[0]!r}, expected context, input and answers")
        examples.append(example)
    return examples[:limit]


def score_answer(task: str, answer: str, example: Example) -> float:
    """The best score of an answer against any of the right ones."""
    rule = TASKS[task]
    if rule.first_line:
        answer = answer.lstrip("\n").split("\n")[0]
    classes = example.get("all_classes") or ()
    return max((rule.score(answer, wanted, classes) for wanted in example["answers"]), default=0.0)


def cut_middle(token_ids: list[int], length: int) -> list[int]:
    """At most `length` tokens: the first half of them and the last."""
    if len(token_ids) <= length:
        return token_ids
    return token_ids[: length - length // 2] + token_ids[len(token_ids) - length // 2 :]


class _Asker:
    """Prompts and answers of one model."""

    def __init__(self, model: Any, tokenizer: Any, options: LongBenchOptions, prompts: Mapping[str, str]) -> None:
        self.model, self.tokenizer, self.options, self.prompts = model, tokenizer, options, prompts
        self.chat, self.plain = PromptFormat(tokenizer), PromptFormat(tokenizer, chat=False)
        self.stop = end_tokens(model, tokenizer)

    def parts(self, task: str, example: Example) -> tuple[list[int], list[int]]:
        """Token numbers of the prompt up to the end of the context, and of the rest (at least one token)."""
        prompt = self.prompts.get(task, TASKS[task].prompt)
        before, _, after = prompt.partition("{context}")
        first, second = (part.replace("{input}", example["input"]) for part in (before, after))
        form = self.chat if TASKS[task].chat else self.plain
        context, rest = form.frame(first + example["context"], second)
        room = self.options.max_tokens - len(rest)
        if room < 2:
            raise ValueError(
                f"max_tokens is {self.options.max_tokens}, but task {task!r} has a question of {len(rest)}"
            )
        context = cut_middle(context, room)
        return (context, rest) if rest else (context[:-1], context[-1:])

    def answers(self, task: str, example: Example, caches: Mapping[str, MakeCache]) -> dict[str, str]:
        """What the model generates through each cache."""
        context, rest = self.parts(task, example)
        whole = self.options.prefill == "whole"
        prefill = read_context(self.model, as_token_ids(context + rest if whole else context, self.model))
        found = {}
        for name, make in caches.items():
            cache = prefill.fill(make())
            if whole:
                scores = prefill.log_probabilities
            else:
                scores = continue_with(self.model, cache, as_token_ids(rest, self.model), keep=1)[0]
            token_ids = greedy(self.model, cache, scores, TASKS[task].new_tokens, self.stop)
            found[name] = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return found


def run_longbench(
    model: Any,
    tokenizer: Any,
    caches: Mapping[str, MakeCache],
    folder: Path,
    options: LongBenchOptions,
    prompts: Mapping[str, str] | None = None,
    records: RecordFile | None = None,
    report: Callable[[int, str], object] = lambda *_: None,
) -> list[dict[str, Any]]:
    """Answers of every cache to what `records` (key: `KEY`) lacks; one record per answer, with its score.

    prompts: other instructions for some tasks, with {context} and {input}.
    """
    tasks = options.tasks or tuple(task for task in TASKS if (folder / f"{task}.jsonl").is_file())
    if not tasks:
        raise ValueError(f"{folder} has no TASK.jsonl of LongBench's English tasks ({', '.join(TASKS)})")
    records = RecordFile(None, {}, KEY) if records is None else records
    asker = _Asker(model, tokenizer, options, prompts or {})
    found = []
    for task in tasks:
        for number, example in enumerate(read_examples(folder, task, options.limit)):
            missing = {name: make for name, make in caches.items() if records.get(task, number, name) is None}
            if missing:
                for name, answer in asker.answers(task, example, missing).items():
                    score = score_answer(task, answer, example)
                    records.add({"task": task, "number": number, "cache": name, "answer": answer, "score": score})
            found += [known for name in caches if (known := records.get(task, number, name)) is not None]
            report(1, task)
    return found


def summary(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean score of each task and cache with its standard error."""
    pairs = dict.fromkeys((record["task"], record["cache"]) for record in records)
    rows = []
    for task, name in pairs:
        scores = [record["score"] for record in records if (record["task"], record["cache"]) == (task, name)]
        mean, error = mean_and_error(scores)
        rows.append({"task": task, "cache": name, "examples": len(scores), "score": mean, "score_error": error})
    return rows


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """The summary as text: tasks below each other, caches side by side, their mean last."""
    rows = {(row["task"], row["cache"]): row for row in summary(records)}
    tasks, names = (list(dict.fromkeys(key[place] for key in rows)) for place in (0, 1))
    widths = [max(len(name), 14) + 2 for name in names]
    lines = [f"{'task':<22}{'examples':>9}" + "".join(f"{x:>{w}}" for x, w in zip(names, widths, strict=True))]
    for task in tasks:
        cells = [f"{100 * rows[task, x]['score']:.1f} ± {100 * rows[task, x]['score_error']:.1f}" for x in names]
        count = rows[task, names[0]]["examples"]
        lines.append(f"{task:<22}{count:>9}" + "".join(f"{x:>{w}}" for x, w in zip(cells, widths, strict=True)))
    means = [100 * sum(rows[task, name]["score"] for task in tasks) / len(tasks) for name in names]
    lines.append(f"{'mean':<22}{'':>9}" + "".join(f"{x:>{w}.1f}" for x, w in zip(means, widths, strict=True)))
    return "\n".join(lines)

"""Seeded cases of the retrieval tasks, cut to a length in tokens, and the prompts made of them.

- `needle`: sentences that give a number for a name, hidden in real text; one at each depth, so that one context serves
  a question for every depth and each needle has the others as distractors.
- `lines`: a list of lines with a name and a number each, nothing else (as in LongEval).
- `variables`: chains of assignments in real text; the last variable of a chain must be traced to its number (as in
  RULER). One chain in each depth's share of the context.

Depth k of n is the middle of the k-th n-th of the context, (k + ½) / n: neither the sinks nor the window.
Every answer is a number of five digits that occurs once. Not here: models, caches, scores.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

TASKS = ("needle", "lines", "variables")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_ADJECTIVES = _words(
    "amber brave calm dusty eager faint gentle hollow ivory jolly keen lively mellow narrow olive proud quiet rusty "
    "silver tender upper velvet wooden yellow ancient bitter clever distant early frozen golden hidden"
)
_NOUNS = _words(
    "anchor basket candle drawer engine feather garden hammer island jacket kettle ladder mirror needle orchard pillow "
    "quarry ribbon saddle teapot umbrella village wagon window barrel castle desert falcon glacier harbour lantern "
    "meadow"
)
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"”']?\s+")
_CONTEXT_MARK = "@@context-goes-here@@"


@dataclass(frozen=True)
class Question:
    """One question about a context."""

    depth: int  # 0 … depths - 1
    text: str
    answer_start: str  # what the answer begins with, up to the number
    answer: str  # the number


@dataclass(frozen=True)
class Case:
    """A context and a question for every depth."""

    introduction: str
    context: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Prompt:
    """Token numbers of the two parts of a prompt."""

    context: list[int]  # beginning of the text or chat, introduction, context
    question: list[int]  # question, end of the user's turn, beginning of the answer


class PromptFormat:
    """How a tokenizer's model is asked: its chat template, or "Question: … Answer: …" where it has none."""

    def __init__(self, tokenizer: Any, chat: bool | None = None) -> None:
        """chat: None for the template where there is one; True demands it (ValueError if it is missing)."""
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if chat and not has_template:
            raise ValueError("chat is True, but the tokenizer has no chat template")
        self.chat = has_template if chat is None else chat
        self._tokenizer = tokenizer
        self._before, self._after = self._frame()

    def _frame(self) -> tuple[str, str]:
        if not self.chat:
            return "", "\nAnswer:"
        text = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": _CONTEXT_MARK}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,  # for the templates that know it
        )
        before, _, after = text.partition(_CONTEXT_MARK)
        return before, after

    def encode(self, text: str) -> list[int]:
        """Token numbers of a text, nothing added."""
        found: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return found

    def _beginning(self) -> list[int]:
        """What the tokenizer puts before a text; a chat template writes it out itself."""
        if self.chat:
            return []
        added: list[int] = self._tokenizer("").input_ids
        return [token for token in added[:1] if token == self._tokenizer.bos_token_id]

    def context(self, introduction: str, context: str) -> list[int]:
        """The first part of a prompt; it ends with a blank line, so that the parts can be tokenized apart."""
        return self._beginning() + self.encode(f"{self._before}{introduction}\n\n{context}\n\n")

    def question(self, text: str, answer_start: str = "") -> list[int]:
        """The second part of a prompt, up to and with the answer's given beginning."""
        label = "" if self.chat else "Question: "
        space = " " if answer_start and not self._after.endswith(("\n", " ")) else ""
        return self.encode(f"{label}{text}{self._after}{space}{answer_start}")

    def frame(self, first: str, second: str) -> tuple[list[int], list[int]]:
        """Token numbers of a user's turn (without a template: of the plain text) that is cut in two."""
        after = self._after if self.chat else ""
        return self._beginning() + self.encode(self._before + first), self.encode(second + after)

    def prompt(self, case: Case, question: Question) -> Prompt:
        """Both parts."""
        return Prompt(
            self.context(case.introduction, case.context), self.question(question.text, question.answer_start)
        )


@dataclass(frozen=True)
class Haystack:
    """Real text as sentences with their lengths in tokens."""

    sentences: tuple[str, ...]
    lengths: tuple[int, ...]

    @classmethod
    def from_text(cls, text: str, count_tokens: Callable[[list[str]], list[int]]) -> Haystack:
        """Cuts a text at the ends of its sentences."""
        sentences = [" ".join(part.split()) for part in _SENTENCE_END.split(text)]
        kept = [sentence for sentence in sentences if sentence]
        if not kept:
            raise ValueError("the text of the haystack is empty")
        return cls(tuple(kept), tuple(count_tokens([f" {sentence}" for sentence in kept])))

    def passage(self, start: float, room: int) -> list[str]:
        """Whole sentences that follow each other, at most `room` tokens; `start` in 0 … 1 picks one of the possible
        places.

        Raises ValueError if the text is shorter than that.
        """
        total = sum(self.lengths)
        if total < room:
            raise ValueError(
                f"the texts have {total} tokens, a context needs {room} of them: give more with --texts, or shorter "
                "lengths"
            )
        to_skip, first = start * (total - room), 0
        while to_skip >= self.lengths[first]:
            to_skip -= self.lengths[first]
            first += 1
        found, left = [], room
        for sentence, length in zip(self.sentences[first:], self.lengths[first:], strict=True):
            left -= length
            if left < 0:
                break
            found.append(sentence)
        return found


class CaseMaker:
    """Makes the cases of one model's tokenizer and one haystack."""

    def __init__(
        self, format: PromptFormat, haystack: Haystack, *, depths: int = 5, hops: int = 2, seed: int = 0
    ) -> None:
        """hops: assignments of a chain of `variables`, 1 or more, the one with the number included."""
        for name, value in (("depths", depths), ("hops", hops)):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        self.format = format
        self.haystack = haystack
        self.depths = depths
        self.hops = hops
        self.seed = seed

    def make(self, task: str, length: int, index: int) -> Case:
        """Case number `index` of a task; no prompt made of it has more than `length` tokens.

        Raises ValueError for an unknown task, or a length that is too short for it.
        """
        makers = {"needle": self._needle, "lines": self._lines, "variables": self._variables}
        if task not in makers:
            raise ValueError(f"task is {task!r}, expected one of {', '.join(TASKS)}")
        room = length
        for attempt in range(8):
            if room < 16 * self.depths:
                break
            case = makers[task](random.Random(f"{self.seed}/{task}/{length}/{index}"), room)
            excess = self.tokens(case) - length
            if excess <= 0:
                return case
            room -= excess + 8 * attempt  # whole sentences: a few tokens less may change nothing
        raise ValueError(f"length is {length}, too short for task {task!r} with {self.depths} depths")

    def tokens(self, case: Case) -> int:
        """Tokens of the longest prompt of a case."""
        questions = [len(self.format.question(x.text, x.answer_start)) for x in case.questions]
        return len(self.format.context(case.introduction, case.context)) + max(questions)

    def _hide(self, rng: random.Random, room: int, hidden: list[tuple[float, str]]) -> str:
        """A passage of the haystack with sentences put in at their shares of its length, `room` tokens in all."""
        room -= sum(len(self.format.encode(f" {sentence}")) for _, sentence in hidden)
        passage = self.haystack.passage(rng.random(), max(room, 0))
        ends = [0]
        for sentence in passage:
            ends.append(ends[-1] + len(sentence))
        pieces: list[str] = []
        waiting = sorted(hidden)
        for number in range(len(passage) + 1):
            while waiting and ends[number] >= waiting[0][0] * ends[-1]:
                pieces.append(waiting.pop(0)[1])
            pieces += passage[number : number + 1]
        return " ".join(pieces)

    def _middle(self, depth: int) -> float:
        return (depth + 0.5) / self.depths

    def _needle(self, rng: random.Random, room: int) -> Case:
        names, numbers = _names(rng, self.depths), _numbers(rng, self.depths)
        needles = [f"The access code of the {name} is {number}." for name, number in zip(names, numbers, strict=True)]
        questions = tuple(
            Question(
                depth=depth,
                text=f"What is the access code of the {names[depth]} that the text mentions?",
                answer_start=f"The access code of the {names[depth]} is",
                answer=numbers[depth],
            )
            for depth in range(self.depths)
        )
        context = self._hide(rng, room, [(self._middle(depth), needles[depth]) for depth in range(self.depths)])
        return Case("The following text mentions several access codes. Remember them.", context, questions)

    def _lines(self, rng: random.Random, room: int) -> Case:
        sample = len(self.format.encode("line amber anchor: the register holds 12345\n"))
        count = min(max(room // sample, self.depths), len(_ADJECTIVES) * len(_NOUNS))
        names, numbers = _names(rng, count), _numbers(rng, count)
        lines = [f"line {name}: the register holds {number}\n" for name, number in zip(names, numbers, strict=True)]
        lengths = [len(self.format.encode(line)) for line in lines]
        while len(lines) > self.depths and sum(lengths) > room:
            lines.pop()
            lengths.pop()
        asked = [int(self._middle(depth) * len(lines)) for depth in range(self.depths)]
        questions = tuple(
            Question(
                depth=depth,
                text=f"Which number does the register of line {names[line]} hold?",
                answer_start=f"In line {names[line]} the register holds",
                answer=numbers[line],
            )
            for depth, line in enumerate(asked)
        )
        return Case("Here is a list of lines. Remember which number each line holds.", "".join(lines), questions)

    def _variables(self, rng: random.Random, room: int) -> Case:
        labels = [name.replace(" ", "_") for name in _names(rng, self.depths * self.hops)]
        numbers = _numbers(rng, self.depths)
        hidden, questions = [], []
        for depth in range(self.depths):
            chain = labels[depth * self.hops : (depth + 1) * self.hops]
            for hop, (label, value) in enumerate(zip(chain, [numbers[depth], *chain], strict=False)):
                place = (depth + (hop + 0.5) / self.hops) / self.depths
                hidden.append((place, f"Let {label} = {value}."))
            questions.append(
                Question(
                    depth=depth,
                    text=f"Trace variable {chain[-1]} back through the assignments in the text. "
                    "Which number does it have?",
                    answer_start=f"Variable {chain[-1]} has the number",
                    answer=numbers[depth],
                )
            )
        introduction = "The following text contains assignments to variables. Keep track of them."
        return Case(introduction, self._hide(rng, room, hidden), tuple(questions))


def _names(rng: random.Random, count: int) -> list[str]:
    pairs = [f"{adjective} {noun}" for adjective in _ADJECTIVES for noun in _NOUNS]
    if count > len(pairs):
        raise ValueError(f"{count} names are needed, there are {len(pairs)}")
    return rng.sample(pairs, count)


def _numbers(rng: random.Random, count: int) -> list[str]:
    return [str(number) for number in rng.sample(range(10000, 100000), count)]

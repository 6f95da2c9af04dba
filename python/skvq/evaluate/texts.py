"""Texts to calibrate on and texts to evaluate on: read, kept apart, cut into chunks of tokens.

A text is a file, or a part of one: `novel.txt` or `novel.txt#0-0.5` (the first half). Without files, the package's own
excerpts serve.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models import packaged_text

EVALUATION_TEXTS = ("mansfield_park",)  # of the package
CALIBRATION_TEXTS = ("northanger_abbey",)
CHARACTERS_PER_TOKEN = 8  # more than any tokenizer takes for prose, so that a slice of text holds enough tokens
_PART = re.compile(r"(?P<path>.+)#(?P<start>[0-9.]+)-(?P<end>[0-9.]+)")
_ALL = (0.0, 1.0)
_PASSAGE = 80  # shortest line that counts as a passage of its own
_SHARED = 0.02  # share of passages in common from which two texts overlap


@dataclass(frozen=True)
class Text:
    """A text and where it is from.

    Attributes:
        name: of the file, and the part of it that this is.
        content: what is read.
        whole: contents of the file that it is from; None: the content itself.
        share: which part of that it is: from, to.
    """

    name: str
    content: str
    whole: str | None = None
    share: tuple[float, float] = _ALL

    @property
    def sha256(self) -> str:
        """Of the content."""
        return _sha256(self.content)

    def described(self) -> dict[str, str]:
        """Name and SHA-256, for a report."""
        return {"name": self.name, "sha256": self.sha256}


def read_text(source: str | Path) -> Text:
    """The text of a file, or of a part of it (`FILE#FROM-TO`, shares of its length).

    Raises ValueError if the part is not one, OSError if the file cannot be read.
    """
    match = _PART.fullmatch(str(source))
    path, share = (Path(source), _ALL) if match is None else (Path(match["path"]), _share(str(source), match))
    content = path.read_text(encoding="utf-8", errors="ignore")
    part = content[_characters(content, share)]
    if not part.strip():
        raise ValueError(f"text {str(source)!r} is empty")
    suffix = "" if match is None else str(source)[len(match["path"]) :]
    return Text(path.name + suffix, part, content, share)


def _share(source: str, match: re.Match[str]) -> tuple[float, float]:
    try:
        start, end = float(match["start"]), float(match["end"])
    except ValueError:
        start, end = 1.0, 0.0
    if not 0.0 <= start < end <= 1.0:
        raise ValueError(f"text {source!r}: expected FILE#FROM-TO with 0 <= FROM < TO <= 1")
    return start, end


def _characters(content: str, share: tuple[float, float]) -> slice:
    """Those of a part."""
    return slice(int(share[0] * len(content)), int(share[1] * len(content)))


def _sha256(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()


def packaged_texts(names: Sequence[str]) -> list[Text]:
    """Texts that the package ships."""
    return [Text(name, packaged_text(name)) for name in names]


def check_apart(calibration: Sequence[Text], evaluation: Sequence[Text]) -> None:
    """Raise ValueError if a calibration text shares its contents, or passages, with an evaluation text."""
    for fitted in calibration:
        passages = _passages(fitted)
        for measured in evaluation:
            common = passages & _passages(measured)
            smaller = min(len(passages), len(_passages(measured)))
            if fitted.sha256 == measured.sha256 or len(common) > _SHARED * smaller:
                raise ValueError(
                    f"calibration text {fitted.name!r} and evaluation text {measured.name!r} overlap "
                    f"({len(common)} passages in common): expected different texts"
                )


def digests(texts: Sequence[Text]) -> dict[str, str]:
    """SHA-256 by name, as plans keep them. Raises ValueError if two texts have one name."""
    found = {text.name: text.sha256 for text in texts}
    if len(found) < len(texts):
        names = [text.name for text in texts]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"texts: two are named {repeated!r}, expected names that tell them apart")
    return found


def check_not_fitted(what: str, fitted: Mapping[str, str], evaluation: Sequence[Text]) -> None:
    """Raise ValueError if something was fitted to an evaluation text, or to a part of its file that overlaps with it.

    Names and digests tell that much: the part that a name says, cut from the file at hand, has the digest or has not.
    Passages that two files share are not found, nor is a file that was changed since.

    Args:
        what: was fitted, for the message, such as "plan 'a.safetensors'".
        fitted: SHA-256 of the texts that it was fitted to, by names as of `Text`: what `digests` gave.
        evaluation: the texts that it is to be measured on.
    """
    for name, sha256 in fitted.items():
        for measured in evaluation:
            if sha256 == measured.sha256 or _is_overlapping_part(name, sha256, measured):
                raise ValueError(
                    f"{what} was fitted to {name!r} (SHA-256 {sha256[:12]}…), which overlaps with the evaluation text "
                    f"{measured.name!r}: expected other texts, or parts of a file that do not overlap"
                )


def _is_overlapping_part(name: str, sha256: str, measured: Text) -> bool:
    """Whether `name` is a part of the file that `measured` is from, or all of it, and has characters of `measured`."""
    match = _PART.fullmatch(name)
    try:
        share = _ALL if match is None else _share(name, match)
    except ValueError:  # a name of someone else's making
        share = _ALL
    whole = measured.content if measured.whole is None else measured.whole
    fitted, own = _characters(whole, share), _characters(whole, measured.share)
    return max(fitted.start, own.start) < min(fitted.stop, own.stop) and sha256 == _sha256(whole[fitted])


def evaluation_and_calibration(
    texts: Sequence[str | Path], calibration_texts: Sequence[str | Path]
) -> tuple[list[Text], list[Text]]:
    """Both, from files or parts of files; the package's own where none are given. Raises ValueError if they overlap."""
    evaluation = [read_text(source) for source in texts] or packaged_texts(EVALUATION_TEXTS)
    calibration = [read_text(source) for source in calibration_texts] or packaged_texts(CALIBRATION_TEXTS)
    check_apart(calibration, evaluation)
    return evaluation, calibration


def _passages(text: Text) -> set[str]:
    """Long lines; in a text without line breaks, sentences."""
    lines = (" ".join(line.split()) for line in re.split(r"\n+|(?<=[.!?]) ", text.content))
    return {line for line in lines if len(line) >= _PASSAGE}


@dataclass(frozen=True)
class Chunk:
    """A piece of text as tokens."""

    name: str  # text and number
    token_ids: Tensor  # int64 [T]

    @property
    def sha256(self) -> str:
        """Of the tokens."""
        return hashlib.sha256(repr(self.token_ids.tolist()).encode()).hexdigest()


def cut_chunks(tokenizer: Any, texts: Sequence[Text], count: int, tokens: int) -> list[Chunk]:
    """`count` chunks of `tokens` tokens, taken in turn from the texts, each text from its second fifth on.

    A chunk begins with the tokenizer's first token, if it has one. Raises ValueError where a text is too short.
    """
    chunks = []
    for index in range(count):
        text, turn = texts[index % len(texts)], index // len(texts)
        reach = CHARACTERS_PER_TOKEN * tokens
        start = len(text.content) // 5 + turn * reach
        ids = tokenizer(text.content[start : start + reach], add_special_tokens=False).input_ids
        first = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        ids = (first + ids)[:tokens]
        if len(ids) < tokens:
            raise ValueError(
                f"text {text.name!r} has no {tokens} tokens left for its chunk {turn + 1} of {tokens} tokens: "
                "expected fewer or shorter chunks, or more texts"
            )
        chunks.append(Chunk(f"{text.name}:{turn}", torch.tensor(ids)))
    return chunks

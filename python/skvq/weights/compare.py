"""`compare_weights`: quantized weights, alone and with a quantized cache, against the full-precision model on text.

A candidate is `WEIGHTS` or `WEIGHTS+METHOD`. WEIGHTS is `full`, `rtn` with options (`rtn:bits=4,group_size=128`), or a
checkpoint's directory, with options of how it runs (`w4:backend=packed,head_bits=8`; unpacked if there are none);
METHOD is one of `skvq eval compare`: `plan:FILE`, `kivi:bits=2`, ... Predictions are compared
token by token with those of the full-precision model with an exact cache, in float32, as in evaluate/divergence.py.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..evaluate.comparison import Settings
from ..evaluate.divergence import ChunkReference, OutputHead, TokenMeasures, block_error
from ..evaluate.methods import Method, parse_method
from ..evaluate.progress import progress_bar
from ..evaluate.report import error_within_chunks, without_nan
from ..evaluate.simulation import Simulator
from ..evaluate.spec_options import parse_options
from ..evaluate.texts import Chunk
from ..models import load
from .blocks import check_layers, decoder_layers, linear_layers
from .grid import WeightOptions, encode
from .running import load as load_checkpoint

FULL = "full"


@dataclass(frozen=True)
class Candidate:
    """Weights and a method for the cache, as named."""

    text: str
    weights: str
    cache: str

    @classmethod
    def parse(cls, text: str) -> Candidate:
        """Raises ValueError if a part is not known, or a directory is missing."""
        weights, plus, cache = text.partition("+")
        if not weights or (plus and not cache):
            raise ValueError(f"candidate {text!r}: expected WEIGHTS or WEIGHTS+METHOD")
        name = weights.partition(":")[0]
        if name == "rtn":
            WeightOptions(**parse_options(f"candidate {text!r}", weights[4:]))
        elif name != FULL:
            folder, options = _folder_and_options(text, weights)
            if not Path(folder).is_dir():
                raise ValueError(f"candidate {text!r}: expected full, rtn:OPTIONS, or the directory of a checkpoint")
            if not options.keys() <= {"backend", "head_bits"}:
                raise ValueError(f"candidate {text!r}: options {', '.join(options)}, expected backend or head_bits")
        parse_method(cache or FULL)
        return cls(text, weights, cache or FULL)


def _folder_and_options(text: str, weights: str) -> tuple[str, dict[str, Any]]:
    folder, colon, options = weights.rpartition(":")
    if not colon or "=" not in options or Path(weights).is_dir():
        return weights, {}
    return folder, parse_options(f"candidate {text!r}", options)


def weights_model(source: str, weights: str) -> Any:
    """The model `source` in float32 with weights as named: full, `rtn:OPTIONS`, or those of a checkpoint."""
    if weights == FULL:
        return load(source, dtype="float32").model
    if weights.partition(":")[0] != "rtn":
        folder, running = _folder_and_options(weights, weights)
        return load_checkpoint(folder, dtype=torch.float32, **({"backend": "dequantized"} | running))
    options = WeightOptions(**parse_options(weights, weights[4:]))
    model = load(source, dtype="float32").model
    check_layers(model, options)
    for layer in decoder_layers(model):
        for linear in linear_layers(layer).values():
            linear.weight.data.copy_(encode(linear.weight.data, options).dequantize())
    return model


def compare_weights(
    source: str,
    candidates: Sequence[str],
    chunks: Sequence[Chunk],
    settings: Settings | None = None,
    *,
    progress: bool = False,
    finished: Callable[[list[dict[str, Any]]], object] = lambda _: None,
) -> list[dict[str, Any]]:
    """A row for every candidate and chunk.

    Args:
        source: the full-precision model, a directory or hub id.
        candidates: as at the head of this file.
        chunks: int64 [T] each, T above `score_from` + 1.
        settings: window, sinks, the first scored token.
        progress: a bar on stderr.
        finished: is given all rows after every candidate, so that a long run leaves something.

    Raises:
        ValueError: a candidate is not known, given twice, or its method does not fit the model or needs calibration.
    """
    settings = settings or Settings()
    parsed = [Candidate.parse(text) for text in candidates]
    if not parsed or len({x.text for x in parsed}) < len(parsed):
        raise ValueError(f"candidates: got {list(candidates)}, expected at least one, each once")
    rows: list[dict[str, Any]] = []
    first = next((x.text for x in parsed if x.text != FULL), FULL)
    order = {x.weights: place for place, x in reversed(list(enumerate(parsed)))}
    known: dict[tuple[str, int], TokenMeasures] = {}
    with torch.inference_mode(), progress_bar(len(parsed) * len(chunks), "runs", wanted=progress) as advance:
        base = weights_model(source, FULL)
        references = _references(base, chunks, settings)
        held: tuple[str, Any] = (FULL, base)
        for candidate in sorted(parsed, key=lambda x: (order[x.weights], x.cache != FULL)):
            if held[0] != candidate.weights:
                held = ("", None)
                gc.collect()
                held = (candidate.weights, weights_model(source, candidate.weights))
            method = _method(candidate, held[1])
            simulator = Simulator(held[1])
            head = OutputHead(held[1])
            for place, (chunk, reference) in enumerate(zip(chunks, references, strict=True)):
                advance(0, f"{candidate.text} | {chunk.name}")
                with simulator.attached():
                    measured = reference.against(simulator, head).measure(method)
                known[candidate.text, place] = measured
                row = {
                    "candidate": candidate.text,
                    "weights": candidate.weights,
                    "cache": candidate.cache,
                    "chunk": chunk.name,
                    "tokens": chunk.token_ids.numel(),
                    **measured.summary(),
                    **_differences(measured, known.get((first, place)), known.get((candidate.weights, place))),
                }
                rows.append(without_nan(row))
                advance(1, None)
            finished(rows)
    return rows


def _differences(own: TokenMeasures, first: TokenMeasures | None, alone: TokenMeasures | None) -> dict[str, float]:
    """Of the divergence from the first candidate's, of the loss from that of the weights alone, token by token."""
    found: dict[str, float] = {}
    for name, other, field in (("kl_difference", first, "divergence"), ("over_weights", alone, "loss")):
        if other is not None:
            difference = getattr(own, field) - getattr(other, field)
            found |= {name: float(difference.mean()), f"{name}_block_error": block_error(difference)}
    return found


def _references(base: Any, chunks: Sequence[Chunk], settings: Settings) -> list[ChunkReference]:
    simulator, head = Simulator(base), OutputHead(base)
    with simulator.attached():
        return [
            ChunkReference(simulator, head, chunk.token_ids, settings.score_from, settings.window, settings.sinks)
            for chunk in chunks
        ]


def _method(candidate: Candidate, model: Any) -> Method:
    method = parse_method(candidate.cache)
    method.check_model(model)
    if method.needs_calibration:
        raise ValueError(
            f"candidate {candidate.text!r}: {method.name} is fitted to texts, expected a plan or a method "
            "without calibration"
        )
    return method


def summarize(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over chunks for every candidate: kl, top1, perplexity, rise over full precision in %; `kl_difference` to
    the first candidate that is not full precision; for a quantized cache, the rise over the same weights with an exact
    one.
    `*_error`: standard errors over the scored tokens (None where a chunk is too short for one), for both differences
    of the same tokens' differences; seeds and calibration texts vary beside them.
    """
    found = []
    for text in dict.fromkeys(row["candidate"] for row in rows):
        own = [row for row in rows if row["candidate"] == text]
        mean = {name: statistics.fmean(row[name] for row in own) for name in ("kl", "top1", "loss", "full_loss")}
        rise = mean["loss"] - mean["full_loss"]
        difference, difference_error = _mean_and_error(own, "kl_difference")
        over, over_error = _mean_and_error(own, "over_weights") if own[0]["cache"] != FULL else (None, None)
        row = {
            "candidate": text,
            "kl": mean["kl"],
            "kl_error": error_within_chunks(own, "kl"),
            "kl_difference": difference,
            "kl_difference_error": difference_error,
            "top1": mean["top1"],
            "perplexity": math.exp(mean["loss"]),
            "rise_percent": 100.0 * math.expm1(rise),
            "rise_percent_error": 100.0 * math.exp(rise) * error_within_chunks(own, "rise"),
            "rise_over_weights_percent": None if over is None else 100.0 * math.expm1(over),
            "rise_over_weights_percent_error": (
                None if over is None or over_error is None else 100.0 * math.exp(over) * over_error
            ),
            "chunks": len(own),
        }
        found.append(without_nan(row))
    return found


def _mean_and_error(rows: Sequence[dict[str, Any]], name: str) -> tuple[float | None, float | None]:
    """None where a row has no such figure."""
    if any(row.get(name) is None for row in rows):
        return None, None
    return statistics.fmean(row[name] for row in rows), error_within_chunks(rows, name)


COLUMNS = (  # title, figure, form, factor
    ("KL (nats)", "kl", ".5f", 1.0),
    ("KL - first", "kl_difference", "+.5f", 1.0),
    ("top-1 %", "top1", ".2f", 100.0),
    ("perplexity", "perplexity", ".4f", 1.0),
    ("rise %", "rise_percent", "+.2f", 1.0),
    ("over weights %", "rise_over_weights_percent", "+.3f", 1.0),
)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """`summarize` for people; ± is one standard error over the scored tokens."""
    found = summarize(rows)
    cells = [["", *(title for title, *_ in COLUMNS)]]
    cells += [[row["candidate"], *(_cell(row, *column[1:]) for column in COLUMNS)] for row in found]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join(
        "  ".join(
            text.rjust(width) if i else text.ljust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    )


def _cell(row: dict[str, Any], name: str, form: str, factor: float) -> str:
    if row[name] is None:
        return ""
    error = row.get(f"{name}_error")
    return f"{factor * row[name]:{form}}" + ("" if error is None else f" ± {error:{form.lstrip('+')}}")

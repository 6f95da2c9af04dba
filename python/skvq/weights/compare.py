"""`compare_weights`: quantized weights, alone and with a quantized cache, against the full-precision model on text.

A candidate is `WEIGHTS` or `WEIGHTS+METHOD`. WEIGHTS is `full`, `rtn` with options (`rtn:bits=4,group_size=128`), or a
checkpoint's directory; METHOD is one of `skvq eval compare`: `plan:FILE`, `kivi:bits=2`, ... Predictions are compared
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
from ..evaluate.divergence import ChunkReference, OutputHead
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
        elif name != FULL and not Path(weights).is_dir():
            raise ValueError(f"candidate {text!r}: expected full, rtn:OPTIONS, or the directory of a checkpoint")
        parse_method(cache or FULL)
        return cls(text, weights, cache or FULL)


def weights_model(source: str, weights: str) -> Any:
    """The model `source` in float32 with weights as named: full, `rtn:OPTIONS`, or those of a checkpoint."""
    if weights == FULL:
        return load(source, dtype="float32").model
    if weights.partition(":")[0] != "rtn":
        return load_checkpoint(weights, dtype=torch.float32, backend="dequantized")
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
    with torch.inference_mode(), progress_bar(len(parsed) * len(chunks), "runs", wanted=progress) as advance:
        base = weights_model(source, FULL)
        references = _references(base, chunks, settings)
        held: tuple[str, Any] = (FULL, base)
        for candidate in sorted(parsed, key=lambda x: [y.weights for y in parsed].index(x.weights)):
            if held[0] != candidate.weights:
                held = ("", None)
                gc.collect()
                held = (candidate.weights, weights_model(source, candidate.weights))
            method = _method(candidate, held[1])
            simulator = Simulator(held[1])
            head = OutputHead(held[1])
            for chunk, reference in zip(chunks, references, strict=True):
                advance(0, f"{candidate.text} | {chunk.name}")
                with simulator.attached():
                    measured = reference.against(simulator, head).measure(method).summary()
                row = {
                    "candidate": candidate.text,
                    "weights": candidate.weights,
                    "cache": candidate.cache,
                    "chunk": chunk.name,
                    "tokens": chunk.token_ids.numel(),
                    **measured,
                }
                rows.append(without_nan(row))
                advance(1, None)
            finished(rows)
    return rows


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
    """Means over chunks for every candidate: kl, top1, perplexity, rise over full precision in %, and, for a quantized
    cache, its rise over the same weights with an exact one. `kl_error`, `rise_percent_error`: standard errors over the
    scored tokens (None where a chunk is too short for one); seeds and calibration texts vary beside them.
    """
    found = []
    for text in dict.fromkeys(row["candidate"] for row in rows):
        own = [row for row in rows if row["candidate"] == text]
        losses = [row["loss"] for row in own]
        mean = {name: statistics.fmean(row[name] for row in own) for name in ("kl", "top1", "loss", "full_loss")}
        alone = [row["loss"] for row in rows if row["candidate"] == own[0]["weights"]]
        over = None
        if own[0]["cache"] != FULL and len(alone) == len(losses):
            over = 100.0 * math.expm1(mean["loss"] - statistics.fmean(alone))
        rise = mean["loss"] - mean["full_loss"]
        row = {
            "candidate": text,
            "kl": mean["kl"],
            "kl_error": error_within_chunks(own, "kl"),
            "top1": mean["top1"],
            "perplexity": math.exp(mean["loss"]),
            "rise_percent": 100.0 * math.expm1(rise),
            "rise_percent_error": 100.0 * math.exp(rise) * error_within_chunks(own, "rise"),
            "rise_over_weights_percent": over,
            "chunks": len(own),
        }
        found.append(without_nan(row))
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """`summarize` for people; ± is one standard error over the scored tokens."""
    width = max(len(row["candidate"]) for row in rows)
    lines = [f"{'':<{width}}{'KL (nats)':>19}{'top-1 %':>9}{'perplexity':>12}{'rise %':>17}{'over weights %':>16}"]
    for row in summarize(rows):
        over = "" if row["rise_over_weights_percent"] is None else f"{row['rise_over_weights_percent']:+.3f}"
        kl, rise = _with_error(row, "kl", ".5f"), _with_error(row, "rise_percent", "+.2f")
        figures = f"{kl:>19}{100 * row['top1']:>9.2f}{row['perplexity']:>12.4f}{rise:>17}{over:>16}"
        lines.append(f"{row['candidate']:<{width}}{figures}")
    return "\n".join(lines)


def _with_error(row: dict[str, Any], name: str, form: str) -> str:
    error = row[f"{name}_error"]
    return f"{row[name]:{form}}" + ("" if error is None else f" ± {error:{form.lstrip('+')}}")

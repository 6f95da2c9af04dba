"""`compare`: methods side by side on the same model, texts, window and sinks. `measure` is the same without texts.

Every method, chunk and length gives one row. With `log`, rows are appended to a JSON-lines file as they are found, and
rows that the file has already (same model, tokens, method and settings) are taken from it: a run that was stopped goes
on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .calibration_rows import CalibrationRows
from .divergence import ChunkReference, OutputHead
from .memory_bits import counted_bits
from .methods import Method, parse_method
from .progress import progress_bar
from .region_rule import RegionRule
from .report import Report, Row, without_nan
from .simulation import Simulator, rule_of
from .texts import Chunk, cut_chunks, evaluation_and_calibration


@dataclass(frozen=True)
class Settings:
    """What all methods of a comparison share."""

    window: int = 128
    sinks: int = 5
    score_from: int = 512  # the first token of a chunk whose prediction of the next is scored

    def __post_init__(self) -> None:
        for name in ("window", "sinks", "score_from"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 0")


def measure(
    model: Any,
    methods: Sequence[str | Method],
    chunks: Sequence[Chunk | Tensor],
    calibration: Sequence[Chunk | Tensor] = (),
    *,
    settings: Settings | None = None,
    log: Path | None = None,
    progress: bool = False,
    name: str | None = None,
) -> Report:
    """Compare methods on chunks of tokens (int64 [T]).

    Args:
        model: a causal language model of transformers, on the CPU.
        methods: texts for `parse_method`, or methods.
        chunks: what predictions are scored on, of one or several lengths.
        calibration: what methods that need it are fitted to.
        settings: window, sinks, the first scored token.
        log: JSON lines, appended and read back.
        progress: a bar on stderr.
        name: of the model, in the report.

    Raises:
        ValueError: a method is not known or named like another, needs calibration and there is none, a chunk is too
            short, or the model cannot be simulated.
    """
    settings = settings or Settings()
    chosen = [parse_method(method) if isinstance(method, str) else method for method in methods]
    _check_names(chosen)
    pieces, fitted = _chunks(chunks, "chunk"), _chunks(calibration, "calibration")
    for method in chosen:
        method.check_model(model)
        if method.needs_calibration and not fitted:
            raise ValueError(f"{method.name} needs calibration: expected calibration texts")
    for piece in pieces:
        if piece.token_ids.numel() < settings.score_from + 2:
            raise ValueError(
                f"chunk {piece.name!r} has {piece.token_ids.numel()} tokens, expected more than "
                f"score_from + 1 = {settings.score_from + 1}"
            )
    common = {
        "model": name or type(model).__name__,
        "fingerprint": fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "calibration": [piece.sha256[:16] for piece in fitted],
    } | asdict(settings)
    done = _read_log(log)
    report = Report({**common, "calibration_texts": [piece.name for piece in fitted]})
    with torch.inference_mode():
        run = _Run(model, chosen, fitted, settings, common, done, log)
        with progress_bar(len(pieces) * len(chosen), "runs", wanted=progress) as advance:
            for piece in pieces:
                report.rows += run.rows_of(piece, advance)
    return report


class _Run:
    """The loop over chunks and methods; what is dear is made when a row needs it."""

    def __init__(
        self,
        model: Any,
        methods: Sequence[Method],
        calibration: Sequence[Chunk],
        settings: Settings,
        common: Mapping[str, Any],
        done: Mapping[str, Row],
        log: Path | None,
    ) -> None:
        self.methods, self.settings, self.common, self.done, self.log = methods, settings, common, done, log
        self.simulator = Simulator(model)
        self.layers = [self.simulator.geometry(layer) for layer in sorted(self.simulator.full_layers)]
        tokens = [piece.token_ids for piece in calibration]
        self.calibration = CalibrationRows(self.simulator, tokens) if tokens else None
        # Before any is prepared: a method is known by its options, and by the calibration texts in the key.
        self._identities = {method.name: method.identity() for method in methods}
        self._prepared: set[int] = set()
        self._head: OutputHead | None = None

    def rows_of(self, piece: Chunk, advance: Any) -> list[Row]:
        """One row a method."""
        rows, reference = [], None
        for method in self.methods:
            key = self._key(piece, method)
            row = self.done.get(key)
            if row is None:
                advance(0, f"{method.name} | {piece.name}")
                self._prepare(method)
                self._head = self._head or OutputHead(self.simulator.model)
                with self.simulator.attached():
                    settings = self.settings
                    reference = reference or ChunkReference(
                        self.simulator,
                        self._head,
                        piece.token_ids,
                        settings.score_from,
                        settings.window,
                        settings.sinks,
                    )
                    row = {"key": key} | self._row(piece, method, reference)
                _append_log(self.log, row)
            rows.append({**row, "method": method.name, "chunk": piece.name})
            advance(1, None)
        return rows

    def _prepare(self, method: Method) -> None:
        if self.calibration is not None and id(method) not in self._prepared:
            method.prepare(self.calibration)
            self._prepared.add(id(method))

    def _row(self, piece: Chunk, method: Method, reference: ChunkReference) -> Row:
        start = time.perf_counter()
        measured = reference.measure(method).summary()
        length = piece.token_ids.numel()
        bits = counted_bits(method, lambda layer: self._rule(method, layer), self.layers, length)
        row = {
            "method": method.name,
            "identity": self._identities[method.name],
            "chunk": piece.name,
            "chunk_sha256": piece.sha256,
            "tokens": length,
            **asdict(bits),
            **measured,
            **self.common,
            "seconds": round(time.perf_counter() - start, 2),
        }
        found: Row = without_nan(row)
        return found

    def _rule(self, method: Method, layer: int) -> RegionRule:
        return rule_of(method, layer, self.settings.window, self.settings.sinks)

    def _key(self, piece: Chunk, method: Method) -> str:
        parts: dict[str, Any] = dict(self.common) | {"chunk": piece.sha256, "method": self._identities[method.name]}
        parts.pop("model")
        if not method.needs_calibration:
            parts.pop("calibration")
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def fingerprint(model: Any) -> str:
    """A hash of the configuration and of a few weights of every parameter."""
    digest = hashlib.sha256()
    config = {name: value for name, value in model.config.to_dict().items() if not name.startswith("_")}
    ignored = ("transformers_version", "dtype", "torch_dtype", "attn_implementation")
    digest.update(repr(sorted((k, repr(v)) for k, v in config.items() if k not in ignored)).encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        some = flat[:: max(1, flat.numel() // 16)][:16].float().tolist()
        digest.update(f"{name} {tuple(parameter.shape)} {some}".encode())
    return digest.hexdigest()[:16]


def compare(
    model: Any,
    tokenizer: Any,
    methods: Sequence[str | Method],
    texts: Sequence[str | Path] = (),
    calibration_texts: Sequence[str | Path] = (),
    *,
    chunks: int = 2,
    tokens: int | Sequence[int] = 2048,
    calibration_chunks: int = 4,
    calibration_tokens: int = 2048,
    window: int = 128,
    sinks: int = 5,
    score_from: int = 512,
    log: Path | None = None,
    progress: bool = False,
    name: str | None = None,
) -> Report:
    """Compare methods on texts; without any, on the package's own.

    Args:
        model: a causal language model of transformers, on the CPU.
        tokenizer: the model's.
        methods: texts for `parse_method`, or instances of `Method`.
        texts: files, or parts of files (`FILE#0-0.5`).
        calibration_texts: likewise, for methods that are fitted; they must not overlap with `texts`.
        chunks: evaluated chunks of each length, taken in turn from the texts.
        tokens: the length of a chunk, or several lengths.
        calibration_chunks: chunks of the calibration texts.
        calibration_tokens: length of a calibration chunk.
        window: most recent tokens kept exact.
        sinks: first tokens kept exact.
        score_from: the first token of a chunk whose prediction of the next is scored.
        log: JSON lines, appended and read back, so that a stopped run goes on where it was.
        progress: a bar on stderr.
        name: of the model, in the report.

    Raises:
        ValueError: as `measure`; also texts that overlap or are too short, or a plan that was fitted to one of them.

    Example:
        >>> print(compare(model, tokenizer, ["kivi:bits=2", "ours", MyMethod()]).table())
    """
    evaluation, fitted = evaluation_and_calibration(texts, calibration_texts)
    chosen = [parse_method(method) if isinstance(method, str) else method for method in methods]
    for method in chosen:
        method.check_texts(evaluation)
    lengths = [tokens] if isinstance(tokens, int) else list(tokens)
    pieces = [piece for length in lengths for piece in cut_chunks(tokenizer, evaluation, chunks, length)]
    calibration = []
    if any(method.needs_calibration for method in chosen):
        calibration = cut_chunks(tokenizer, fitted, calibration_chunks, calibration_tokens)
    settings = Settings(window=window, sinks=sinks, score_from=score_from)
    report = measure(model, chosen, pieces, calibration, settings=settings, log=log, progress=progress, name=name)
    report.settings["texts"] = [text.described() for text in evaluation]
    return report


def _check_names(methods: Sequence[Method]) -> None:
    names = [method.name for method in methods]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated or not names:
        raise ValueError(f"methods: {repeated[0]!r} is given twice" if repeated else "methods is empty: expected one")


def _chunks(given: Sequence[Chunk | Tensor], label: str) -> list[Chunk]:
    return [x if isinstance(x, Chunk) else Chunk(f"{label} {index}", x) for index, x in enumerate(given)]


def _read_log(log: Path | None) -> dict[str, Row]:
    if log is None or not log.exists():
        return {}
    rows = {}
    for number, line in enumerate(log.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            rows[row["key"]] = row
        except (json.JSONDecodeError, KeyError, TypeError):
            print(f"skvq: {log}, line {number} is not a row of a comparison and is left out", file=sys.stderr)
    return rows


def _append_log(log: Path | None, row: Row) -> None:
    if log is None:
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab+") as file:
        # A line that was cut off when a run was stopped must not swallow this one.
        if file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            file.write(b"\n")
        file.write(json.dumps(row).encode() + b"\n")

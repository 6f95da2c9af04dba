"""`calibrate`: a plan for a model in one call, as `skvq calibrate` makes it.

Is: what is read by default, and the way from texts over statistics to a plan. Is not: the pass over the texts
(collect.py) or the fits (spectral_plan.py, static.py). Torch and transformers are imported when it is called.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._native import SkvqError

if TYPE_CHECKING:
    from torch import Tensor

    from ..config import SkvqConfig
    from ..evaluate.texts import Text
    from ..plan_file import QuantizationPlan
    from .statistics import Statistics

METHODS = ("spectral", "static")
CHUNKS, PACKAGED_CHUNKS = 16, 2  # pieces that are read where none are asked for; the package's text is short
OF_SPECTRAL = ("bits", "parts", "weights", "key_levels", "value_levels")


@dataclass(frozen=True)
class CalibrateOptions:
    """What is read and fitted. None: the method's own default.

    Attributes:
        method: "spectral": parts behind a matrix, a mean that turns with the position; "static": a shift and a scale
            per channel, a baseline.
        key_bits, value_bits: of codes: up to 5 on average, or 16 (2 and 1.5); for "static" 16, 8, 4, 3, 2, 1.6 or 1.5.
        bits: instead of both, counted bits of an element with its scales, shared out over all layers, keys and values.
        parts, weights, key_levels, value_levels, noise: see `SpectralOptions`.
        chunks: pieces of the texts that the plan is fitted to (16; of the package's text 2, with `bits` 1).
        tokens: of a piece.
        window, sinks: of the caches that the plan is for, as in `SkvqConfig`.
    """

    method: str = METHODS[0]
    key_bits: float | None = None
    value_bits: float | None = None
    bits: float | None = None
    parts: int | None = None
    weights: str | None = None
    key_levels: str | None = None
    value_levels: str | None = None
    noise: bool = True
    chunks: int | None = None
    tokens: int = 2048
    window: int | None = None
    sinks: int | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise SkvqError(f"method={self.method!r}: expected one of {', '.join(map(repr, METHODS))}")
        if self.method == "static":
            given = {name: getattr(self, name) for name in OF_SPECTRAL if getattr(self, name) is not None}
            given |= {} if self.noise else {"noise": False}
            for name, value in given.items():
                raise SkvqError(f"{name}={value!r}: expected method='spectral' with it")
        for name in ("key_bits", "value_bits"):
            value = getattr(self, name)
            if self.bits is not None and value is not None:
                raise SkvqError(f"{name}={value!r}: expected either this or bits, which shares bits out")
        for name, least in (("chunks", 1), ("tokens", 2)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise SkvqError(f"{name}={value!r}: expected an integer of at least {least}")

    def given(self, *names: str) -> dict[str, Any]:
        """Those of the options that are not None, by name."""
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True)
class Calibration:
    """What a calibration made.

    Attributes:
        plan: the plan.
        statistics: what it was fitted to.
        summary: what the fit should gain, in lines; "" for a static plan.
        seconds: "read" and "fit".
    """

    plan: QuantizationPlan
    statistics: Statistics
    summary: str
    seconds: dict[str, float]


def calibrate(
    model: Any,
    tokenizer: Any = None,
    *,
    texts: Sequence[Path | str] = (),
    token_ids: Sequence[Tensor] | None = None,
    state_path: Path | str | None = None,
    progress: bool = True,
    **options: Any,
) -> QuantizationPlan:
    """A plan of the cache, fitted to a model on texts.

        >>> plan = calibrate(model, tokenizer, texts=["notes.txt"], value_bits=2)
        >>> plan.save("plan.safetensors")
        >>> cache = QuantizedDynamicCache.from_plan(model, plan)

    Args:
        model: a causal language model of transformers. A GPU reads faster; how `bits` are shared out is measured on a
            CPU only.
        tokenizer: the model's; not needed with `token_ids`.
        texts: files, or parts of them as "FILE#0-0.5"; none: the package's own short text.
        token_ids: pieces of text as int64 [T] or [1, T] in place of tokenizer and texts, all of which are read; with
            `bits` the last one, of a model on a CPU, is what the choice is measured on.
        state_path: a file for the statistics: a call that was interrupted goes on, others reuse it.
        progress: bars on stderr.
        **options: fields of `CalibrateOptions`: key_bits, value_bits, bits, method and others.

    Raises:
        SkvqError: an option is unknown or not possible, or the model has no layer with full attention.
        ValueError: too little text, or neither tokenizer nor token_ids.
    """
    from ..evaluate.texts import read_text

    found = run_calibration(
        model,
        tokenizer,
        options_of(options),
        texts=[read_text(x) for x in texts],
        token_ids=token_ids,
        state_path=state_path,
        progress=progress,
    )
    return found.plan


def options_of(options: dict[str, Any]) -> CalibrateOptions:
    """From keywords. Raises SkvqError for unknown ones."""
    names = list(CalibrateOptions.__dataclass_fields__)
    for name, value in options.items():
        if name not in names:
            raise SkvqError(f"{name}={value!r}: unknown option, expected some of {', '.join(names)}")
    return CalibrateOptions(**options)


def run_calibration(
    model: Any,
    tokenizer: Any,
    options: CalibrateOptions,
    *,
    texts: Sequence[Text] = (),
    token_ids: Sequence[Tensor] | None = None,
    state_path: Path | str | None = None,
    progress: bool = True,
    say: Callable[[str], None] = lambda _line: None,
) -> Calibration:
    """As `calibrate`, with more of what was found; `say` gets a line when the texts have been read."""
    from ..config import SkvqConfig
    from ..plan_file import QuantizationPlan
    from .collect import collect

    of_config = ("key_bits", "value_bits") if options.method == "static" else ()
    config = SkvqConfig.from_options(**options.given(*of_config, "window", "sinks"))
    spectral = _spectral_options(options)  # wrong ones are refused before anything is read
    start = time.monotonic()
    # What bits are chosen by is measured on the CPU only, on a piece that is no part of the statistics or their state.
    held_out = int(options.bits is not None and model.device.type == "cpu")
    pieces, sha256 = _pieces(tokenizer, options, texts, token_ids, held_out)
    count = len(pieces) - held_out
    statistics = collect(
        model,
        pieces[:count],
        sinks=config.sinks,
        sink_search=config.sink_search,
        window=config.window,
        texts=sha256,
        state_path=state_path,
        total=count,
        progress=progress,
    )
    say(f"read: {statistics.describe()}")
    read = time.monotonic()
    streams: Any
    notes: dict[str, Any]
    if spectral is None:
        from .static import static_plan

        streams, notes, summary = static_plan(statistics, config), {}, ""
    else:
        chunk = pieces[count] if held_out else None
        streams, notes, summary = _fit(model, statistics, spectral, config, chunk, progress)
    notes |= {"chunks": statistics.chunks, "tokens": statistics.tokens, "chunks_sha256": statistics.chunks_sha256}
    plan = QuantizationPlan.for_model(
        model, config, streams, method=options.method, texts=statistics.texts, notes=notes
    )
    seconds = {"read": read - start, "fit": time.monotonic() - read}
    return Calibration(plan, statistics, summary, seconds)


def _pieces(
    tokenizer: Any,
    options: CalibrateOptions,
    texts: Sequence[Text],
    token_ids: Sequence[Tensor] | None,
    held_out: int,
) -> tuple[list[Tensor], dict[str, str]]:
    """Token numbers to read, with `held_out` more at the end, and the SHA-256 of the texts by name."""
    from ..evaluate.texts import CALIBRATION_TEXTS, cut_chunks, digests, packaged_texts

    if token_ids is not None:
        if texts or options.chunks is not None:
            raise ValueError("token_ids: expected neither texts nor chunks with it, all of it is read")
        if len(token_ids) <= held_out:
            raise ValueError(f"token_ids has {len(token_ids)} pieces: expected at least {1 + held_out}")
        return list(token_ids), {}
    if tokenizer is None:
        raise ValueError("tokenizer=None: expected the model's tokenizer, or token_ids")
    found = texts or packaged_texts(CALIBRATION_TEXTS)
    sha256 = digests(found)
    count = options.chunks or (CHUNKS if texts else PACKAGED_CHUNKS - held_out)
    chunks = cut_chunks(tokenizer, found, count + held_out, options.tokens)
    return [chunk.token_ids for chunk in chunks], sha256


def _spectral_options(options: CalibrateOptions) -> Any:
    """What is fitted, None for a static plan."""
    if options.method == "static":
        return None
    from .spectral_plan import SpectralOptions

    return SpectralOptions(**options.given("key_bits", "value_bits", *OF_SPECTRAL), noise=options.noise)


def _fit(
    model: Any, statistics: Statistics, options: Any, config: SkvqConfig, chunk: Tensor | None, progress: bool
) -> tuple[Any, dict[str, Any], str]:
    """Streams, notes and a summary. Every layer has options of its own; those of the plan say no more than the regions.

    `chunk`: what the choice of shared bits is measured on; None: the estimate decides.
    """
    from ..plan_file import QuantizationPlan
    from .choose import best_shared
    from .spectral_plan import SpectralPlan, spectral_plan

    def plan_of(fitted: SpectralPlan) -> QuantizationPlan:
        return QuantizationPlan.for_model(model, config, fitted.streams, method="spectral")

    if chunk is None:
        found = spectral_plan(model, statistics, options)
    else:
        found = best_shared(model, statistics, options, plan_of, chunk, progress=progress)
    return found.streams, found.notes, found.describe()

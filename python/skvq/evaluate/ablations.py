"""`ablate`: SKVQ's ablation tables, one option of a base method varied at a time, all else as the base has it.

Is: which settings a table has, what of them is left out and why, and the result: tables, JSON, a picture of panels.
Is not: the measuring, which is `comparison.measure`. The model is loaded once, a method that several tables need is
fitted once, and a row that several tables share (the base is in all of them) is measured once.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import SkvqConfig
from .calibration_rows import CalibrationRows
from .comparison import Settings, measure
from .methods import Geometry, Method, Where, parse_method
from .methods.base import ReadBack
from .methods.ours import Ours, Planned
from .methods.registry import SHORT
from .methods.skvq import Skvq
from .report import Report, Summary
from .simulation import Simulator, rule_of
from .spec_options import parse_options
from .texts import Chunk, cut_chunks, evaluation_and_calibration

TABLES: dict[str, tuple[Any, ...]] = {
    "window": (0, 1, 32, 64, 128, 256),
    "sinks": (0, 1, 5, 16, 64),
    "search": (0, 16, 64),  # tokens among which sinks are chosen; 0: the first ones are
    "group": (32, 64, 128),  # and the head's size
    "reorder": (False, True),
    "clip": (0.85, 0.9, 0.92, 0.94, 0.96, 1.0, 1.1),
    "metadata": ("e4m3", "fp16"),
    "rope": (False, True),  # whether keys are quantized before RoPE
}
_REGIONS = ("window", "sinks")
# The names that a method's options may have; ours has one for each stream.
_OPTIONS: dict[str, tuple[tuple[str, ...], ...]] = {
    "group": (("group",),),
    "reorder": (("reorder",),),
    "clip": (("clip",), ("key_clip", "value_clip")),
    "metadata": (("metadata",),),
    "rope": (("pre_rope",),),
}
_OPTIONS_OF_OURS = {
    table: (f"keys.{name}", f"values.{name}")
    for table, name in (("group", "group_size"), ("clip", "clip"), ("metadata", "metadata"))
}
_WORDS = {"reorder": {False: "off", True: "on"}, "rope": {False: "after RoPE", True: "before RoPE"}}


# ---- which settings --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """One row of a table: a base method with one thing changed."""

    text: str  # the value
    spec: str  # for `parse_method`
    settings: Settings
    is_base: bool


@dataclass
class Ablation:
    """One table: `report` has a row for each variant, length and chunk; `left_out` says which values are not there."""

    name: str
    variants: list[Variant]
    left_out: list[str]
    report: Report = field(default_factory=lambda: Report({}))


class _Base:
    """The method that is varied, and the sizes of the model that say which values there are."""

    def __init__(self, spec: str, settings: Settings, model: Any, shortest: int) -> None:
        self.name, _, rest = spec.partition(":")
        try:
            self.method = parse_method(spec)
        except ValueError as error:
            raise ValueError(f"base: {error}") from error
        self.spec, self.settings, self.model, self.shortest = spec, settings, model, shortest
        self.options = {} if self.name == "plan" else parse_options(f"base {spec!r}", rest, SHORT)
        simulator = Simulator(model)
        self.layers = [simulator.geometry(layer) for layer in sorted(simulator.full_layers)]
        refused = self._refusal(self.method, settings)
        if refused:
            raise ValueError(f"base={spec!r}: {refused}")

    def option_names(self, table: str) -> tuple[str, ...]:
        """The options that `table` varies; none where the method has no such option."""
        if isinstance(self.method, Planned):
            return ()
        if table == "search":  # of any method
            return ("sink_search",)
        if isinstance(self.method, Ours):
            return _OPTIONS_OF_OURS.get(table, ())
        made: Any = self.method  # the registry's methods are dataclasses
        known = {item.name for item in dataclasses.fields(made) if item.init}
        return next((names for names in _OPTIONS[table] if known.issuperset(names)), ())

    def has(self, table: str) -> bool:
        """Whether the method can be varied so."""
        return table in _REGIONS or bool(self.option_names(table))

    def ablation(self, table: str) -> Ablation:
        """The variants of one table, the base among them."""
        own = getattr(self.settings, table) if table in _REGIONS else self._own_value(table)
        values = [*TABLES[table], *({x.head_dim for x in self.layers} if table == "group" else ())]
        found = Ablation(table, [], [])
        for value in _ordered(values, own):
            text, is_base = _text(table, value), value == own
            if is_base:
                found.variants.append(Variant(text, self.spec, self.settings, True))
                continue
            try:
                found.variants.append(self._variant(table, value, text))
            except ValueError as error:
                found.left_out.append(f"{table} {text}: {error}")
        return found

    def _variant(self, table: str, value: Any, text: str) -> Variant:
        spec, settings, method = self.spec, self.settings, self.method
        if table in _REGIONS:
            settings = dataclasses.replace(settings, **{table: value})
        else:
            if table == "group":
                self._check_group(value)
            spec = self._spec_with(table, value)
            method = parse_method(spec)
        refused = self._refusal(method, settings)
        if refused:
            raise ValueError(refused)
        return Variant(text, spec, settings, False)

    def _refusal(self, method: Method, settings: Settings) -> str:
        """Why a method cannot be measured so, or nothing."""
        try:
            method.check_model(self.model)
            if isinstance(method, (Ours, Planned)):
                SkvqConfig(window=settings.window, sinks=settings.sinks)  # the packed cache needs a window
            rules = [rule_of(method, x.layer, settings.window, settings.sinks) for x in self.layers]
            if not method.needs_calibration:
                for geometry, keys in itertools.product(self.layers, (True, False)):
                    method.bits(geometry, keys)
        except ValueError as error:
            return str(error)
        if not any(rule.packed(self.shortest) for rule in rules):
            return (
                f"window={settings.window} and sinks={settings.sinks} leave nothing to pack of "
                f"{self.shortest} tokens, expected longer chunks"
            )
        return ""

    def _check_group(self, group: int) -> None:
        """The paper's method groups channels of all heads of a layer, the others those of one."""
        for geometry in self.layers:
            if isinstance(self.method, Skvq) and group > geometry.width:
                raise ValueError(f"group={group}: expected at most the {geometry.width} channels of all heads")
            if not isinstance(self.method, Skvq) and geometry.head_dim % group:
                raise ValueError(f"group={group}: expected a divisor of the head's {geometry.head_dim} channels")

    def _own_value(self, table: str) -> Any:
        values = []
        for name in self.option_names(table):
            stream, dot, inner = name.partition(".")
            values.append(self._stream_value(stream, inner) if dot else getattr(self.method, name))
        return values[0] if len(set(values)) == 1 else tuple(values)

    def _stream_value(self, stream: str, name: str) -> Any:
        assert isinstance(self.method, Ours)
        options = getattr(self.method.config, stream).resolved()
        value = getattr(options, name)
        if name == "group_size" and value is None:
            head = self.layers[0].head_dim
            return 128 if head % 128 == 0 else head
        return value

    def _spec_with(self, table: str, value: Any) -> str:
        options = {name: dict(x) if isinstance(x, dict) else x for name, x in self.options.items()}
        if isinstance(self.method, Ours) and table == "group":
            options.pop("group_size", None)  # the streams' own below
        for name in self.option_names(table):
            outer, dot, inner = name.partition(".")
            held = options.setdefault(outer, {}) if dot else options
            held[inner or outer] = value
        return f"{self.name}:{','.join(_option_texts(options))}"


def _ordered(values: Sequence[Any], own: Any) -> list[Any]:
    """Without repetitions, and with the base's own: in its place among numbers, else in front."""
    merged = list(dict.fromkeys(values if own in values else [own, *values]))
    numbers = all(isinstance(x, (int, float)) for x in merged)
    return sorted(merged) if numbers else merged


def _text(table: str, value: Any) -> str:
    if isinstance(value, tuple):
        return "/".join(_text(table, x) for x in value)
    if value is None:
        return "fitted"
    if isinstance(value, bool):
        return _WORDS[table][value]
    return value if isinstance(value, str) else f"{value:g}"


def _option_texts(options: Mapping[str, Any], prefix: str = "") -> list[str]:
    parts = []
    for name, value in options.items():
        if isinstance(value, dict):
            parts += _option_texts(value, f"{name}.")
        else:
            parts.append(f"{prefix}{name}={value if isinstance(value, str) else json.dumps(value)}")
    return parts


def _plan(base: _Base, tables: Sequence[str] | None) -> tuple[list[Ablation], list[str]]:
    """The tables, and why others are left out. Tables that were named must be there."""
    for table in tables or ():
        if table not in TABLES:
            raise ValueError(f"tables: {table!r}: expected some of {', '.join(TABLES)}")
    having = [table for table in TABLES if base.has(table)]
    lacking = [table for table in TABLES if table not in having]
    for table in tables or ():
        if table in lacking:
            raise ValueError(
                f"tables: {table!r}: base={base.spec!r} has no such option, expected some of {', '.join(having)}"
            )
    wanted = having if tables is None else dict.fromkeys(tables)
    left_out = [f"table {table}: base {base.spec!r} has no such option" for table in lacking if tables is None]
    return [base.ablation(table) for table in wanted], left_out


# ---- measuring -------------------------------------------------------------------------------------------------------


class _FittedOnce(Method):
    """A method as it is, named by its text, that calls of `measure` share: the first that needs it fits it."""

    def __init__(self, spec: str) -> None:
        self.inner = parse_method(spec)
        self.name = spec
        self.waits, self.unit = self.inner.waits, self.inner.unit
        self.needs_calibration, self.before_rope = self.inner.needs_calibration, self.inner.before_rope
        self.uses_queries, self.sink_search = self.inner.uses_queries, self.inner.sink_search
        self._identity = self.inner.identity()  # before it is fitted, as `measure` takes it
        self._is_fitted = False

    def prepare(self, rows: CalibrationRows) -> None:
        """Once."""
        if not self._is_fitted:
            self.inner.prepare(rows)
            self._is_fitted = True

    def bits(self, geometry: Geometry, keys: bool) -> float:
        return self.inner.bits(geometry, keys)

    def fake_quantize(self, rows: Tensor, where: Where) -> Tensor:
        return self.inner.fake_quantize(rows, where)

    def read_back(self, rows: Tensor, where: Where) -> ReadBack:
        return self.inner.read_back(rows, where)

    def score_noise(self, queries: Tensor, layer: int) -> Tensor:
        return self.inner.score_noise(queries, layer)

    def unit_of(self, layer: int) -> int:
        return self.inner.unit_of(layer)

    def check_model(self, model: Any) -> None:
        self.inner.check_model(model)

    def identity(self) -> dict[str, Any]:
        """Of the method: its rows in a log are those of `compare`."""
        return self._identity


def _measure(ablations: Sequence[Ablation], model: Any, chunks: Sequence[Chunk], **common: Any) -> dict[str, Any]:
    """Fills the reports; what the tables share is measured once. Returns the settings of the last measurement."""
    methods: dict[str, _FittedOnce] = {}  # by identity
    of_spec: dict[str, _FittedOnce] = {}
    wanted: dict[Settings, dict[str, _FittedOnce]] = {}
    variants = [variant for ablation in ablations for variant in ablation.variants]
    # The base's settings first: most methods are fitted there, from one pass over the calibration texts.
    for variant in sorted(variants, key=lambda x: not x.is_base):
        if variant.spec not in of_spec:
            made = _FittedOnce(variant.spec)
            of_spec[variant.spec] = methods.setdefault(json.dumps(made.identity(), sort_keys=True), made)
        method = of_spec[variant.spec]
        wanted.setdefault(variant.settings, {})[method.name] = method
    reports = {
        settings: measure(model, list(named.values()), chunks, settings=settings, **common)
        for settings, named in wanted.items()
    }
    for ablation in ablations:
        for variant in ablation.variants:
            found = reports[variant.settings]
            kept = {name: x for name, x in found.settings.items() if name != ablation.name}
            ablation.report.settings = kept
            label = f"{ablation.name} {variant.text}{' (base)' if variant.is_base else ''}"
            rows = (row for row in found.rows if row["method"] == of_spec[variant.spec].name)
            ablation.report.rows += [{**row, "method": label, "spec": variant.spec} for row in rows]
    return next(iter(reports.values())).settings


def ablate(
    model: Any,
    tokenizer: Any,
    base: str = "skvq:bits=2",
    tables: Sequence[str] | None = None,
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
) -> Ablations:
    """SKVQ's ablations (arXiv 2405.06219) of one method; arguments as of `compare`.

    `base` is a text for `parse_method`; `tables` are some of `TABLES`, None: all that the base has options for, the
    others are listed as left out.

    Raises:
        ValueError: as `compare`; also an unknown table, or a table whose option the method has not.
    """
    evaluation, fitted = evaluation_and_calibration(texts, calibration_texts)
    lengths = [tokens] if isinstance(tokens, int) else list(tokens)
    settings = Settings(window=window, sinks=sinks, score_from=score_from)
    varied = _Base(base, settings, model, min(lengths))
    varied.method.check_texts(evaluation)
    ablations, left_out = _plan(varied, tables)
    pieces = [piece for length in lengths for piece in cut_chunks(tokenizer, evaluation, chunks, length)]
    specs = {variant.spec for ablation in ablations for variant in ablation.variants}
    calibration = []
    if any(parse_method(spec).needs_calibration for spec in specs):
        calibration = cut_chunks(tokenizer, fitted, calibration_chunks, calibration_tokens)
    common = {"calibration": calibration, "log": log, "progress": progress, "name": name}
    shared = _measure(ablations, model, pieces, **common)
    described = [text.described() for text in evaluation]
    return Ablations({**shared, **dataclasses.asdict(settings), "base": base, "texts": described}, ablations, left_out)


# ---- the result ------------------------------------------------------------------------------------------------------


@dataclass
class Ablations:
    """All tables; `left_out` says which are not there."""

    settings: dict[str, Any]
    ablations: list[Ablation]
    left_out: list[str]

    def table(self) -> str:
        """Text: each table, and what is left out of it."""
        parts = []
        for ablation in self.ablations:
            missing = [f"left out: {reason}" for reason in ablation.left_out]
            title = f"== {ablation.name}, base {self.settings['base']}"
            parts.append("\n".join([title, ablation.report.table(), *missing]))
        if self.left_out:
            parts.append("\n".join(f"left out: {reason}" for reason in self.left_out))
        return "\n\n".join(parts)

    __str__ = table

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: settings, every table as `Report.to_dict` with what is left out, tables left out."""
        tables = {x.name: x.report.to_dict() | {"left_out": x.left_out} for x in self.ablations}
        return {"settings": self.settings, "tables": tables, "left_out": self.left_out}

    def save_json(self, path: Path) -> None:
        """Write `to_dict`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    def save_plot(self, path: Path) -> None:
        """A panel for each table: KL divergence (logarithmic) of its rows, with their bits; format by ending.

        Raises ExtraNotInstalledError without matplotlib.
        """
        from ..bench.plot import _pyplot

        pyplot = _pyplot()
        columns = min(4, len(self.ablations))
        lines = math.ceil(len(self.ablations) / columns)
        figure, axes = pyplot.subplots(lines, columns, figsize=(4 * columns, 3.2 * lines), squeeze=False, sharey=True)
        for axis in axes.flat[len(self.ablations) :]:
            axis.set_visible(False)
        for axis, ablation in zip(axes.flat, self.ablations, strict=False):
            _draw(axis, ablation)
        for row in axes:
            row[0].set_ylabel("KL divergence (nats)", fontsize=8)
        figure.suptitle(f"{self.settings.get('model', '')}, {self.settings['base']}; ring: the base", fontsize=10)
        figure.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=140)
        pyplot.close(figure)


def _draw(axis: Any, ablation: Ablation) -> None:
    """One line for each length; a row without a divergence has no place on a logarithmic axis."""
    lengths: dict[int, list[Summary]] = {}
    for summary in ablation.report.summaries():
        lengths.setdefault(summary.tokens, []).append(summary)
    for index, (tokens, members) in enumerate(lengths.items()):
        shown = [(x, member) for x, member in enumerate(members) if member.kl.mean > 1e-6]
        for x, member in shown:
            spread = member.kl.block_error if math.isnan(member.kl.half_width) else member.kl.half_width
            error = None if math.isnan(spread) else [[min(spread, 0.9 * member.kl.mean)], [spread]]
            axis.errorbar(x, member.kl.mean, yerr=error, fmt="o", color=f"C{index}", markersize=4, lw=0.8)
            if ablation.variants[x].is_base:
                axis.plot(x, member.kl.mean, "o", markersize=9, fillstyle="none", color="0.3", lw=0.8)
        places, heights = [x for x, _ in shown], [member.kl.mean for _, member in shown]
        axis.plot(places, heights, color=f"C{index}", lw=0.8, label=f"{tokens} tokens")
    first = next(iter(lengths.values()))
    ticks = [f"{variant.text}\n{x.bits:.2f} b" for variant, x in zip(ablation.variants, first, strict=True)]
    axis.set_xticks(range(len(ticks)), ticks, fontsize=6)
    axis.set_yscale("log")
    axis.margins(x=0.1)
    axis.grid(alpha=0.3)
    axis.set_title(ablation.name, fontsize=9)
    if len(lengths) > 1:
        axis.legend(fontsize=6)

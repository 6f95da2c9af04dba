"""Options of the packed cache: one frozen dataclass for a stream (keys or values), one for the cache.

Is: values and their checks, and the defaults of the method in one place (`KEY_DEFAULTS`, `VALUE_DEFAULTS`).
Is not: calibrated data (plan.py), and it knows nothing of models: whether a group divides a head is checked by plan.py.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

from ._native import SkvqError

Codebook = str | tuple[float, ...] | tuple[tuple[float, float], ...]
Parts = tuple[tuple[int, int], ...]

# bits -> (name of the format in src/FORMAT.md, number of levels; 0: the rows are kept as they are)
FORMATS: dict[float, tuple[str, int]] = {
    16: ("raw", 0),
    8: ("8", 256),
    4: ("4", 16),
    3: ("3", 8),
    2: ("2", 4),
    1.6: ("1.6", 3),
    1.5: ("1.5", 8),
}
BITS = tuple(FORMATS)
PART_BITS = (5, 4, 3, 2, 1, 0)
PART_WIDTH_UNIT = 16
GROUP_SIZES = (32, 64, 128)
PAGE_ROWS = 128


# ---- checks ----------------------------------------------------------------------------------------------------------


def _known(prefix: str, options: Mapping[str, Any], cls: type) -> None:
    names = [field.name for field in dataclasses.fields(cls)]
    for name in options:
        if name not in names:
            raise SkvqError(f"{prefix}{name}={options[name]!r}: unknown option, expected some of {', '.join(names)}")


def _checked_bits(name: str, value: object, allowed: tuple[float, ...] = BITS) -> float:
    for bits in allowed:
        if not isinstance(value, bool) and value == bits:
            return bits
    raise SkvqError(f"{name}={value!r}: expected one of {', '.join(map(str, allowed))}")


def _checked_parts(parts: object) -> Parts:
    if not isinstance(parts, (list, tuple)) or not parts:
        raise SkvqError(f"parts={parts!r}: expected pairs (bits, width), one for every part")
    found = []
    for part in parts:
        if not isinstance(part, (list, tuple)) or len(part) != 2:
            raise SkvqError(f"parts: {part!r}: expected a pair (bits, width)")
        bits, width = int(_checked_bits("parts: bits", part[0], PART_BITS)), part[1]
        if not isinstance(width, int) or isinstance(width, bool) or width <= 0 or width % PART_WIDTH_UNIT:
            raise SkvqError(f"parts: width={width!r}: expected a positive multiple of {PART_WIDTH_UNIT}")
        found.append((bits, width))
    if not all(bits for bits, _ in found[: max(1, len(found) - 1)]):
        raise SkvqError(f"parts={parts!r}: expected 0 bits for the last part only, behind others")
    return tuple(found)


def _mean_bits(parts: Parts) -> float:
    return sum(bits * width for bits, width in parts) / sum(width for _, width in parts)


def _checked_codebook(codebook: object, bits: float) -> Codebook | None:
    if codebook is None:
        return None
    if isinstance(codebook, str) or bits in (8, 16):
        named = {1.5: ("lloyd-max",), 8: ("uniform",)}.get(bits, ("lloyd-max", "uniform"))
        _one_of(f"bits={bits}: codebook", codebook, named)
        return cast(str, codebook)
    count = FORMATS[bits][1]
    wanted = f"{count} pairs of numbers" if bits == 1.5 else f"{count} ascending numbers, the last above 0"
    refused = SkvqError(f"codebook={codebook!r}: expected 'lloyd-max', 'uniform' or {wanted} for bits={bits}")
    if not isinstance(codebook, (list, tuple)) or len(codebook) != count:
        raise refused
    if bits == 1.5:
        if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 and all(map(_finite, pair)) for pair in codebook):
            raise refused
        return tuple((float(x), float(y)) for x, y in codebook)
    if not all(map(_finite, codebook)):
        raise refused
    levels = tuple(float(x) for x in codebook)
    if any(low >= high for low, high in pairwise(levels)) or levels[-1] <= 0.0:
        raise refused
    return levels


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _number(name: str, value: object) -> float:
    if not _finite(value):
        raise SkvqError(f"{name}={value!r}: expected a finite number")
    return cast(float, value)


def _integer(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise SkvqError(f"{name}={value!r}: expected an integer of at least {least}")


def _boolean(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise SkvqError(f"{name}={value!r}: expected True or False")


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SkvqError(f"{name}={value!r}: expected one of {', '.join(map(repr, allowed))}")


# ---- options ---------------------------------------------------------------------------------------------------------


class _DefaultBits(float):
    """The default of `bits`, which gives way to the mean of `parts`; a number that somebody named does not."""


_DEFAULT_BITS = _DefaultBits(2)
# What does not go with parts, and the values that say nothing else. "hadamard", the default, becomes "identity".
_WITH_PARTS: dict[str, tuple[Any, ...]] = {
    "group_size": (None,),
    "symmetric": (True,),
    "codebook": (None, "lloyd-max", "uniform"),
    "rule": (None, "norm"),
    "refinements": (0,),
    "unbiased": (False,),
    "rotation": ("identity", "hadamard"),
    "block": (0,),
    "block_shift": (True,),
    "scale_exponent": (1.0,),
    "query_exponent": (0.0,),
}


@dataclass(frozen=True)
class StreamOptions:
    """How the rows of one stream, the keys or the values, are packed (src/FORMAT.md).

    Attributes:
        bits: 16 (rows stay in the model's dtype), 8, 4, 3, 2, 1.6 (ternary: three levels, the paper's "1.5 bit") or
            1.5 (a 3-bit index for every pair of channels). With parts: their mean, which need not be named.
        group_size: channels that share a scale: 32, 64, 128 or the head's size; None: min(128, head size), or the
            whole head where 128 does not divide it.
        metadata: "e4m3" or "fp16", the type of scales and zero points. None: "fp16" for 8 bits, where a scale that E4M3
            rounds by up to 6 % would cost a quarter more error, "e4m3" for fewer.
        symmetric: a scale only; otherwise a scale and a zero point.
        codebook: "lloyd-max" (optimal for a normal variable), "uniform", or the levels themselves, ascending (for
            1.5 bits: eight pairs). None: "uniform" for 8 bits, which has no other, and for 2, where it has 1 % more
            error and attention on a GPU needs no look-up; "lloyd-max" for other bits. With parts one of the names,
            "uniform" being levels as far from each other as has the least error for each part's bits.
        rule: "norm" (scale from the root mean square) or "range" (from the largest magnitude, or minimum and maximum).
            None: "range" with the uniform codebook if it is named or has 8 bits, else "norm".
        clip: factor on the scale, SKVQ's alpha.
        refinements: least-squares steps on the scale after the first codes.
        unbiased: whether the stored scale keeps inner products with a decoded row right on average, instead of its
            squared error least.
        rotation: "hadamard" or "identity".
        block: 0, or a multiple of 128: this many rows share a shift and a scale per channel, taken from the rows.
        block_shift: whether a block's statistics hold the channel means.
        scale_exponent: 1 standardizes every channel of a block, 0 keeps their proportions.
        query_exponent: power of what the prompt's queries put on a channel, by which its scale in a block is smaller;
            for keys only. ½ beside a scale_exponent of ½ costs least if channels are independent.
        parts: bits and width of every part of a row behind a calibrated matrix (src/FORMAT.md section 6): 1 to 5 bits,
            for the last also 0, and widths that are multiples of 16 and add up to the head's size. Only `metadata`,
            `clip` and the name of a codebook go with them; the rotation is "identity", since the matrix is in its
            place, and the rule "norm".
    """

    bits: float = _DEFAULT_BITS
    group_size: int | None = None
    metadata: str | None = None
    symmetric: bool = True
    codebook: Codebook | None = None
    rule: str | None = None
    clip: float = 1.0
    refinements: int = 0
    unbiased: bool = False
    rotation: str = "hadamard"
    block: int = 0
    block_shift: bool = True
    scale_exponent: float = 1.0
    query_exponent: float = 0.0
    parts: Parts | None = None

    def __post_init__(self) -> None:
        if self.parts is None:
            object.__setattr__(self, "bits", _checked_bits("bits", self.bits))
        else:
            self._take_parts(_checked_parts(self.parts))
        if self.group_size is not None:
            _integer("group_size", self.group_size, 16)
        if self.metadata is not None:
            _one_of("metadata", self.metadata, ("e4m3", "fp16"))
        _boolean("symmetric", self.symmetric)
        if self.parts is None:
            object.__setattr__(self, "codebook", _checked_codebook(self.codebook, self.bits))
        if self.rule is not None:
            _one_of("rule", self.rule, ("norm", "range"))
        if not 0.0 < _number("clip", self.clip) <= 16.0:
            raise SkvqError(f"clip={self.clip!r}: expected a number above 0 and up to 16")
        _integer("refinements", self.refinements, 0)
        _boolean("unbiased", self.unbiased)
        _one_of("rotation", self.rotation, ("hadamard", "identity"))
        _integer("block", self.block, 0)
        if self.block % PAGE_ROWS:
            raise SkvqError(f"block={self.block}: expected 0 or a multiple of {PAGE_ROWS}")
        _boolean("block_shift", self.block_shift)
        for name in ("scale_exponent", "query_exponent"):
            if not 0.0 <= _number(name, getattr(self, name)) <= 1.0:
                raise SkvqError(f"{name}={getattr(self, name)!r}: expected a number from 0 to 1")

    def _take_parts(self, parts: Parts) -> None:
        mean = _mean_bits(parts)
        if self.bits is not _DEFAULT_BITS and self.bits != mean:
            raise SkvqError(f"bits={self.bits!r}: expected {mean!r}, the mean of parts={parts!r}, or none")
        for name, allowed in _WITH_PARTS.items():
            value = getattr(self, name)
            if value not in allowed:
                expected = " or ".join(map(repr, allowed))
                raise SkvqError(f"{name}={value!r}: expected {expected} with parts, which replace it")
        for name, value in (("parts", parts), ("bits", mean), ("rotation", "identity")):
            object.__setattr__(self, name, value)

    @property
    def format(self) -> str:
        """Name of the row format in src/FORMAT.md."""
        return "parts" if self.parts is not None else FORMATS[self.bits][0]

    @property
    def is_packed(self) -> bool:
        """False for 16 bits, where rows pass through unchanged."""
        return self.format != "raw"

    def resolved(self) -> StreamOptions:
        """The same options with codebook, rule and metadata chosen where they are None."""
        if self.parts is not None:
            codebook = self.codebook or "lloyd-max"
            return dataclasses.replace(self, codebook=codebook, rule="norm", metadata=self.metadata or "e4m3")
        codebook = self.codebook or ("uniform" if self.bits in (2, 8) else "lloyd-max")
        # Four levels a unit apart are, to 0.4 %, those that a normal variable of that deviation has least error with.
        by_norm = codebook != "uniform" or (self.codebook is None and self.bits == 2)
        rule = self.rule or ("norm" if by_norm else "range")
        metadata = self.metadata or ("fp16" if self.bits == 8 else "e4m3")
        return dataclasses.replace(self, codebook=codebook, rule=rule, metadata=metadata) if self.is_packed else self

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; `parts` only where there are some."""
        values = dataclasses.asdict(self)
        if isinstance(self.codebook, tuple):
            values["codebook"] = [list(x) if isinstance(x, tuple) else x for x in self.codebook]
        if self.parts is None:
            del values["parts"]
        else:
            values["parts"] = [list(part) for part in self.parts]
        return values


# The method's defaults, the best measured without calibration (tests/bench/LOG.md). Keys have channels far from zero,
# whose distance drifts with the position: mean and spread are taken block by block. An error costs what queries make of
# it, and must not shrink what they see. Values need the mean only.
KEY_DEFAULTS = StreamOptions(bits=2, block=256, unbiased=True, scale_exponent=0.5, query_exponent=0.5)
VALUE_DEFAULTS = StreamOptions(bits=1.6, block=256, scale_exponent=0.0)
MOST_FITTED_BITS = 5
FIT_TOKENS_PER_CHANNEL = 8  # the matrices of keys then take a quarter of what the prompt does in 16 bits, later less


def is_default_method(options: StreamOptions, defaults: StreamOptions) -> bool:
    """Whether `options` are the defaults of a stream but for bits, metadata and a factor on scales."""
    if options.parts is not None:
        return False
    return options == dataclasses.replace(defaults, bits=options.bits, metadata=options.metadata, clip=options.clip)


def _block_of(stream: object) -> Any:
    """The block size that somebody chose for a stream, None if nobody did."""
    return stream.get("block") if isinstance(stream, Mapping) else getattr(stream, "block", None)


def _changed(options: StreamOptions, changes: Mapping[str, Any]) -> StreamOptions:
    """`options` with fields changed. New parts bring their own bits, and replace options that knew no parts."""
    if changes.get("parts") is None:
        return dataclasses.replace(options, **changes)
    base = options if options.parts is not None else StreamOptions(parts=changes["parts"])
    return dataclasses.replace(base, **{"bits": _DEFAULT_BITS, **changes})


# Default of fields that `SkvqConfig.__post_init__` always fills in.
_UNSET: Any = None


@dataclass(frozen=True)
class SkvqConfig:
    """Options of a `QuantizedDynamicCache`; every field is also a keyword argument of that class.

    `keys` and `values` may be given as `StreamOptions`, as a mapping of the options that differ from the defaults, or
    left out; afterwards both are complete and agree with `key_bits`, `value_bits` and `group_size`.

    Attributes:
        key_bits, value_bits: bits of a packed element: 16 (pass-through), 8, 4, 3, 2, 1.6 or 1.5 (default 2 and 1.6);
            the mean of a stream's parts, where it has some.
        group_size: for keys and values, see `StreamOptions`.
        window: the most recent tokens, kept in the model's dtype (the current one included).
        sinks: tokens at the beginning, kept in the model's dtype.
        sink_search: among how many first tokens the sinks are chosen, by their keys and values (sinks.py); 0: the very
            first ones are. At most `sinks` + `window` are looked at. Until as many are there, nothing is packed.
        keys, values: everything about the packing of keys and of values.
        nonfinite: "raise" refuses keys or values with NaN or infinity; "propagate" stores such rows as NaN. On a GPU
            both store them, and `cache.stats()` counts them.
        fit_tokens: in a cache that was made from a model, what a first prompt of at least so many tokens is packed with
            is fitted to it (calibrate/prompt.py), if the keys' options are the defaults but for bits (up to 5),
            metadata and clip. None: 8 times the head's size; 0: never.

    Raises:
        SkvqError: a value is not one of those above; the message names argument, value and what was expected.
    """

    key_bits: float = _UNSET
    value_bits: float = _UNSET
    group_size: int | None = None
    window: int = 128
    sinks: int = 5
    sink_search: int = 64
    keys: StreamOptions = _UNSET
    values: StreamOptions = _UNSET
    nonfinite: str = "raise"
    fit_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.fit_tokens is not None:
            _integer("fit_tokens", self.fit_tokens, 0)
        if self.group_size is not None:
            _integer("group_size", self.group_size, 16)
        _integer("window", self.window, 1)
        _integer("sinks", self.sinks, 0)
        _integer("sink_search", self.sink_search, 0)
        _one_of("nonfinite", self.nonfinite, ("raise", "propagate"))
        given_streams = self.keys, self.values
        for stream, defaults in (("key", KEY_DEFAULTS), ("value", VALUE_DEFAULTS)):
            given, others = given_streams if stream == "key" else given_streams[::-1]
            if _block_of(given) is None and _block_of(others) is not None:
                # Keys and values leave the window together, so they have blocks of one size.
                block = _block_of(others)
                defaults = dataclasses.replace(defaults, block=block)
            options = self._resolve(stream, given, getattr(self, f"{stream}_bits"), defaults)
            object.__setattr__(self, f"{stream}s", options)
            object.__setattr__(self, f"{stream}_bits", options.bits)
        if self.values.query_exponent:
            raise SkvqError(f"values.query_exponent={self.values.query_exponent!r}: expected 0, queries meet keys only")
        blocks = {options.block for options in (self.keys, self.values) if options.is_packed} - {0}
        if len(blocks) > 1:
            raise SkvqError(
                f"keys.block={self.keys.block}, values.block={self.values.block}: expected one size, or 0 for one"
            )

    def _resolve(self, stream: str, given: object, bits: float | None, defaults: StreamOptions) -> StreamOptions:
        name = f"{stream}s"
        changes: dict[str, Any] = {}
        if given is None or isinstance(given, Mapping):
            changes = {} if given is None else dict(given)
            _known(f"{name}=", changes, StreamOptions)
            given_bits, given_group = changes.get("bits"), changes.get("group_size")
            base = _changed(defaults, changes) if changes.get("parts") is not None else defaults
        elif isinstance(given, StreamOptions):
            given_bits, given_group, base = given.bits, given.group_size, given
        else:
            raise SkvqError(f"{name}={given!r}: expected a StreamOptions, a mapping of its fields, or None")
        if base.parts is not None:
            given_bits = base.bits
        elif bits is not None:
            bits = _checked_bits(f"{stream}_bits", bits)
        outer = (f"{stream}_bits", bits, given_bits), ("group_size", self.group_size, given_group)
        for argument, ours, theirs in outer:
            if ours is not None and theirs is not None and ours != theirs:
                field = argument.removeprefix(f"{stream}_")
                raise SkvqError(
                    f"{argument}={ours!r}: expected {theirs!r} as in {name}.{field}, or give one of the two "
                    "(config.replace(...) changes both)"
                )
        if bits is not None:
            changes["bits"] = bits
        if self.group_size is not None:
            changes["group_size"] = self.group_size
        return _changed(base, changes)

    def tokens_to_fit(self, head_dim: int) -> int:
        """The shortest first prompt that keys of this head size are fitted to, 0 for none."""
        if self.key_bits > MOST_FITTED_BITS or not is_default_method(self.keys, KEY_DEFAULTS):
            return 0
        return FIT_TOKENS_PER_CHANNEL * head_dim if self.fit_tokens is None else self.fit_tokens

    @classmethod
    def from_options(cls, config: SkvqConfig | None = None, **options: Any) -> SkvqConfig:
        """`config` (the defaults if None) with `options` changed."""
        if config is None:
            _known("", options, cls)
            return cls(**options)
        if not isinstance(config, SkvqConfig):
            raise SkvqError(f"skvq_config={config!r}: expected a SkvqConfig or None")
        return config.replace(**options)

    def replace(self, **changes: Any) -> SkvqConfig:
        """A copy with fields changed; `key_bits`, `value_bits` and `group_size` reach into `keys` and `values`."""
        _known("", changes, SkvqConfig)
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)} | changes
        for stream, options in (("key", self.keys), ("value", self.values)):
            given = changes.get(f"{stream}s")
            inner = dict(given) if isinstance(given, Mapping) else {}
            if given is None or isinstance(given, Mapping):
                for name in ("bits", "group_size"):
                    outer = name if name == "group_size" else f"{stream}_bits"
                    if outer in changes:
                        inner.setdefault(name, changes[outer])
                fields[f"{stream}s"] = _changed(options, inner)
            if f"{stream}_bits" not in changes:
                fields[f"{stream}_bits"] = None
        if "group_size" not in changes and ("keys" in changes or "values" in changes):
            fields["group_size"] = None
        return SkvqConfig(**fields)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; `from_dict` is the inverse."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return values | {"keys": self.keys.to_dict(), "values": self.values.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SkvqConfig:
        """A config from `to_dict`, or from any mapping of some of the fields."""
        if not isinstance(values, Mapping):
            raise SkvqError(f"values={values!r}: expected a mapping of SkvqConfig's fields")
        return cls.from_options(**values)

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> SkvqConfig:
        """The inverse of `to_json`."""
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise SkvqError(f"text={text[:40]!r}: expected JSON of SkvqConfig's fields ({error})") from None

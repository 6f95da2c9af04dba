"""Methods named on the command line: `full`, `kivi:bits=2`, `ours:key_bits=3,keys.clip=1.1`, `plan:FILE`, ...

A text is `NAME` or `NAME:OPTION=VALUE,...`. Options are the fields of the method's class; `bits` (or `nbits`) stands
for `key_bits` and `value_bits` together. Adding a method is one file and one line below.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from .base import Method


@dataclass(frozen=True)
class Entry:
    """Where a method's class is (imported when first named), and options that its name stands for."""

    module: str  # of this package
    class_name: str
    options: dict[str, Any] = field(default_factory=dict)

    def load(self) -> Any:
        """The class."""
        return getattr(import_module(f".{self.module}", __package__), self.class_name)


METHODS = {
    "full": Entry("full", "Full"),
    "rtn": Entry("rtn", "Rtn"),
    "kivi": Entry("kivi", "Kivi"),
    "skvq": Entry("skvq", "Skvq"),
    "skvq-pre-rope": Entry("skvq", "Skvq", {"pre_rope": True}),
    "wkvquant": Entry("wkvquant", "Wkvquant"),
    "rotation": Entry("rotation", "Rotation"),
    "quarot": Entry("rotation", "Rotation", {"levels": "uniform"}),
    "kvquant": Entry("kvquant", "Kvquant"),
    "oscar": Entry("oscar", "Oscar"),
    "quanto": Entry("stock", "Quanto"),
    "hqq": Entry("stock", "Hqq"),
    "fp8": Entry("stock", "Fp8"),
    "balanced": Entry("balanced", "Balanced"),
    "ours": Entry("ours", "Ours"),
    "plan": Entry("ours", "Planned"),
}


def parse_method(spec: str) -> Method:
    """The method that `spec` names, not prepared. Raises ValueError that says what was expected."""
    name, _, rest = spec.partition(":")
    if name not in METHODS:
        raise ValueError(f"method {spec!r}: unknown, expected one of {', '.join(METHODS)}")
    made = METHODS[name].load()
    if name == "plan":
        if not rest:
            raise ValueError(f"method {spec!r}: expected plan:FILE")
        options: dict[str, Any] = {"path": Path(rest)}
    elif name == "ours":
        options = {"options": _options(spec, rest)}
    else:
        options = METHODS[name].options | _options(spec, rest)
        _check_names(spec, made, options)
    try:
        method: Method = made(**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"method {spec!r}: {error}") from error
    return method


def _check_names(spec: str, made: Any, options: dict[str, Any]) -> None:
    known = [item.name for item in dataclasses.fields(made) if item.init]
    for name, value in options.items():
        if name not in known:
            shorter = ["bits"] if "key_bits" in known else []
            expected = ", ".join(shorter + known) or "none"
            raise ValueError(f"method {spec!r}: unknown option {name}={value!r}, expected some of: {expected}")


def _options(spec: str, text: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for part in _split(text):
        name, equals, value = part.partition("=")
        if not equals or not name:
            raise ValueError(f"method {spec!r}: {part!r} is not an option, expected NAME=VALUE")
        outer, dot, inner = name.partition(".")
        names = ["key_bits", "value_bits"] if name in ("bits", "nbits") else [inner if dot else outer]
        held = options.setdefault(outer, {}) if dot else options
        for each in names:
            if not isinstance(held, dict) or each in held:
                raise ValueError(f"method {spec!r}: {each} is given twice")
            held[each] = _value(value)
    return options


def _split(text: str) -> list[str]:
    """At commas outside brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "[") - (character == "]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part for part in parts if part]


def _value(text: str) -> Any:
    lowered = text.lower()
    try:
        return json.loads({"none": "null"}.get(lowered, lowered))
    except json.JSONDecodeError:
        return text

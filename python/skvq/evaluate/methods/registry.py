"""Methods named on the command line: `full`, `kivi:bits=2`, `ours:key_bits=3,keys.clip=1.1`, `plan:FILE`, ...

A text is `NAME` or `NAME:OPTION=VALUE,...`. Options are the fields of the method's class; `bits` (or `nbits`) stands
for `key_bits` and `value_bits` together, and `sink_search=N` gives any method sinks that are chosen (skvq/sinks.py).
Adding a method is one file and one line below.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from ..spec_options import parse_options
from .base import Method

BOTH = ("key_bits", "value_bits")
SHORT = {"bits": BOTH, "nbits": BOTH}


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
    made, search = METHODS[name].load(), None
    if name == "plan":
        if not rest:
            raise ValueError(f"method {spec!r}: expected plan:FILE")
        options: dict[str, Any] = {"source": Path(rest)}
    elif name == "ours":
        options = {"options": parse_options(f"method {spec!r}", rest, SHORT)}
    else:
        options = METHODS[name].options | parse_options(f"method {spec!r}", rest, SHORT)
        search = options.pop("sink_search", None)
        _check_names(spec, made, options)
    try:
        method: Method = made(**options)
        if search is not None:
            _choose_sinks(method, search)
    except (TypeError, ValueError) as error:
        raise ValueError(f"method {spec!r}: {error}") from error
    return method


def _choose_sinks(method: Method, search: Any) -> None:
    if not isinstance(search, int) or isinstance(search, bool) or search < 0:
        raise ValueError(f"sink_search={search!r}: expected an integer of at least 0")
    method.sink_search, method.name = search, f"{method.name}, sinks among {search}"


def _check_names(spec: str, made: Any, options: dict[str, Any]) -> None:
    known = [item.name for item in dataclasses.fields(made) if item.init]
    for name, value in options.items():
        if name not in known:
            shorter = ["bits"] if "key_bits" in known else []
            expected = ", ".join(shorter + known) or "none"
            raise ValueError(f"method {spec!r}: unknown option {name}={value!r}, expected some of: {expected}")

"""Options behind the colon of a text such as `packed:key_bits=2,keys.clip=1.1` or `kivi:bits=2`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def parse_options(what: str, text: str, short: Mapping[str, tuple[str, ...]] | None = None) -> dict[str, Any]:
    """`"a=1,keys.b=x"` as `{"a": 1, "keys": {"b": "x"}}`; a name in `short` stands for several.

    Raises ValueError that begins with `what` for a part that is no option, or one that is given twice.
    """
    options: dict[str, Any] = {}
    for part in _split(text) if text else []:
        name, equals, value = part.partition("=")
        if not (name and equals and value):
            raise ValueError(f"{what}: {part!r} is not an option, expected NAME=VALUE")
        outer, dot, inner = name.partition(".")
        held = options.setdefault(outer, {}) if dot else options
        for each in (short or {}).get(name, (inner or outer,)):
            if not isinstance(held, dict) or each in held:
                raise ValueError(f"{what}: {each} is given twice")
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
    return parts


def _value(text: str) -> Any:
    """A number, list, true, false or none; any other text as it is."""
    lowered = text.lower()
    try:
        return json.loads({"none": "null"}.get(lowered, lowered))
    except json.JSONDecodeError:
        pass
    try:
        number = float(text)
    except ValueError:
        return text
    return number if math.isfinite(number) else text

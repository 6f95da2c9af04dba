"""Names of a package that are imported when they are first used: `import skvq` and `skvq --help` load neither torch nor
transformers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def lazy_names(
    package: str, modules: Mapping[str, Sequence[str]], submodules: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` for `package`, whose submodules hold the names that `modules` lists; `submodules` are
    names themselves.
    """
    module_of = {name: module for module, names in modules.items() for name in names}

    def get(name: str) -> Any:
        if name in submodules:
            return import_module(f".{name}", package)
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f".{module_of[name]}", package), name)
        vars(sys.modules[package])[name] = value
        return value

    def names() -> list[str]:
        held = vars(sys.modules[package])
        return sorted({*held, *held["__all__"], *submodules})

    return get, names

"""skvq: a low-bit key/value cache for transformers, packed in Rust.

    >>> import skvq
    >>> cache = skvq.QuantizedDynamicCache(model.config)
    >>> model.generate(**inputs, past_key_values=cache)

Importing this package changes nothing elsewhere, and transformers is imported when it is first needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._native import SkvqError
from .config import SkvqConfig, StreamOptions

if TYPE_CHECKING:
    from .attention import register_attention
    from .cache import QuantizedDynamicCache

__all__ = ["QuantizedDynamicCache", "SkvqConfig", "SkvqError", "StreamOptions", "register_attention"]

_LAZY = {"QuantizedDynamicCache": "cache", "register_attention": "attention"}


def __getattr__(name: str) -> Any:
    """Names that need transformers, imported on first use."""
    from importlib import import_module, metadata

    if name == "__version__":
        return metadata.version("skvq")
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

"""skvq: a low-bit key/value cache for transformers, packed in Rust.

    >>> import skvq
    >>> cache = skvq.QuantizedDynamicCache(model)
    >>> model.generate(**inputs, past_key_values=cache)

Importing this package changes nothing elsewhere, and transformers is imported when it is first needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._native import SkvqError
from .config import SkvqConfig, StreamOptions
from .lazy import lazy_names

if TYPE_CHECKING:
    from . import calibrate, evaluate, weights
    from .attention import register_attention
    from .cache import QuantizedDynamicCache

__all__ = [
    "QuantizedDynamicCache",
    "SkvqConfig",
    "SkvqError",
    "StreamOptions",
    "calibrate",
    "evaluate",
    "register_attention",
    "weights",
]

_lazy_name, __dir__ = lazy_names(
    __name__,
    {"cache": ("QuantizedDynamicCache",), "attention": ("register_attention",)},
    submodules=("calibrate", "evaluate", "weights"),
)


def __getattr__(name: str) -> Any:
    """Names that need transformers, imported on first use, and the version."""
    if name == "__version__":
        from importlib.metadata import version

        return version("skvq")
    return _lazy_name(name)

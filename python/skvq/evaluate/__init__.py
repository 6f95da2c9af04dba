"""Measures of a cache on real text, and the comparison of methods of quantization.

    >>> from skvq.evaluate import Method, compare
    >>> print(compare(model, tokenizer, ["full", "kivi:bits=2", "ours", MyMethod()]).table())

Names are imported when first used: the command line lists its commands without loading torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .cache_scores import CacheScore, compare_caches, perplexity, stream_scores
    from .comparison import Settings, compare, measure
    from .generation import Generation, generate, warm_up
    from .memory import CacheBytes, bytes_of_cache, bytes_of_full_layer_at, full_attention_layers
    from .method_cache import MethodCache
    from .methods import Geometry, Method, Where, parse_method
    from .report import Report

__all__ = [
    "CacheBytes",
    "CacheScore",
    "Generation",
    "Geometry",
    "Method",
    "MethodCache",
    "Report",
    "Settings",
    "Where",
    "bytes_of_cache",
    "bytes_of_full_layer_at",
    "compare",
    "compare_caches",
    "full_attention_layers",
    "generate",
    "measure",
    "parse_method",
    "perplexity",
    "stream_scores",
    "warm_up",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "comparison": ("Settings", "compare", "measure"),
        "generation": ("Generation", "generate", "warm_up"),
        "memory": ("CacheBytes", "bytes_of_cache", "bytes_of_full_layer_at", "full_attention_layers"),
        "method_cache": ("MethodCache",),
        "methods": ("Geometry", "Method", "Where", "parse_method"),
        "cache_scores": ("CacheScore", "compare_caches", "perplexity", "stream_scores"),
        "report": ("Report",),
    },
)

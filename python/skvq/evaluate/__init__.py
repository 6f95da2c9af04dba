"""Measures of a cache on real text: perplexity, divergence from another cache, timed generation, bytes held."""

from .generation import Generation, generate, warm_up
from .memory import CacheBytes, bytes_of_cache, bytes_of_full_layer_at, full_attention_layers
from .perplexity import CacheScore, compare, perplexity, stream_scores

__all__ = [
    "CacheBytes",
    "CacheScore",
    "Generation",
    "bytes_of_cache",
    "bytes_of_full_layer_at",
    "compare",
    "full_attention_layers",
    "generate",
    "perplexity",
    "stream_scores",
    "warm_up",
]

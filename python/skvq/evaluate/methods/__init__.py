"""Ways of quantizing keys and values, each a small class (`base.Method`) in its own file."""

from .base import Geometry, Method, Where
from .registry import METHODS, parse_method

__all__ = ["METHODS", "Geometry", "Method", "Where", "parse_method"]

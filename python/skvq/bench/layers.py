"""Packed layers filled with random rows, for benchmarks that use the native module directly (no model, no
transformers).

A case's format is written like the paper does: "K2V1.6" (keys 2 bits, values ternary), "K4V4", "raw" (both in the
model's dtype). "plan" is a calibrated layer as `skvq calibrate` makes it, at 2 and 1.5 bits, with random matrices: keys
of 4, 3, 1 and 0 bits about a mean that turns, with the noise taken off, values of 3, 2, 1 and 0 bits. "fitted" is the
default after a fit to the prompt (calibrate/fitted_options.py): keys likewise, of 5, 2, 1 and 0 bits, ternary values.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .._native import CudaLayer, Layer
from ..calibrate.fitted_options import QUARTERS, fitted_value_options
from ..config import SkvqConfig, StreamOptions
from ..plan import LayerPlan, StreamPlan

# Behind the names of contestants that are there for comparison.
APART = ", launches apart"
MASKED = ", masked"
FILL_TOKENS = 4096
PLAN, FITTED = "plan", "fitted"
CPU = torch.device("cpu")
_FORMAT = re.compile(r"K(raw|8|4|3|2|1\.6|1\.5)V(raw|8|4|3|2|1\.6|1\.5)")


@dataclass(frozen=True)
class Shape:
    """One attention layer's sizes at decode: one query token per sequence."""

    num_key_value_heads: int
    num_attention_heads: int
    batch: int
    tokens: int
    head_dim: int = 128

    @property
    def elements(self) -> int:
        """Of keys (or of values)."""
        return self.batch * self.num_key_value_heads * self.tokens * self.head_dim

    def __str__(self) -> str:
        heads = f"{self.num_key_value_heads} kv, {self.num_attention_heads} query heads"
        return f"{heads}, batch {self.batch}, {self.tokens} tokens"


def parse_format(name: str) -> tuple[str, str]:
    """("2", "1.6") for "K2V1.6" and "fitted", ("raw", "raw") for "raw", ("2", "1.5") for "plan"; raises ValueError for
    others.
    """
    named = {"raw": ("raw", "raw"), PLAN: ("2", "1.5"), FITTED: ("2", "1.6")}
    if name in named:
        return named[name]
    match = _FORMAT.fullmatch(name)
    if match is None:
        raise ValueError(
            f"format is {name!r}, expected 'raw' or like 'K2V1.6' with 8, 4, 3, 2, 1.6, 1.5 or raw for each of K and "
            "V, or 'plan' or 'fitted'"
        )
    return str(match[1]), str(match[2])


def random_rows(
    shape: Shape, dtype: torch.dtype, seed: int = 0, device: torch.device = CPU
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of the whole length in pieces, each [batch, num_key_value_heads, ≤ FILL_TOKENS, head_dim]."""
    generator = torch.Generator(device).manual_seed(seed)
    for start in range(0, shape.tokens, FILL_TOKENS):
        size = (shape.batch, shape.num_key_value_heads, min(FILL_TOKENS, shape.tokens - start), shape.head_dim)
        keys, values = (torch.randn(size, generator=generator, device=device).to(dtype) for _ in range(2))
        yield keys, values


def options_of(name: str, *, static: bool) -> SkvqConfig:
    """The cache's options for a format, all else as by default; `static`: without statistics taken from the rows."""
    key_bits, value_bits = (16.0 if one == "raw" else float(one) for one in parse_format(name))
    streams = {"block": 0} if static else {}
    return SkvqConfig(key_bits=key_bits, value_bits=value_bits, keys=streams, values=streams)  # type: ignore[arg-type]


def has_statistics(name: str) -> bool:
    """Whether the default options for a format take statistics from the rows (else `static` changes nothing)."""
    if name in (PLAN, FITTED):
        return False
    options = options_of(name, static=False)
    return any(stream.is_packed and stream.block > 0 for stream in (options.keys, options.values))


def layer_plan(shape: Shape, name: str, *, static: bool) -> LayerPlan:
    """How a layer of this shape is packed in a format such as "K2V1.6", with the default window and sinks."""
    if name in (PLAN, FITTED):
        return _calibrated(shape, is_fitted=name == FITTED)
    return LayerPlan.from_config(options_of(name, static=static))


def packed_layer(shape: Shape, name: str, *, static: bool, dtype: str = "bfloat16") -> Layer:
    """An empty layer store on the CPU, of `layer_plan`."""
    plan = layer_plan(shape, name, static=static)
    store = plan.build(shape.num_key_value_heads, shape.head_dim, shape.head_dim, getattr(torch, dtype))
    assert isinstance(store, Layer)
    return store


def cuda_layer(shape: Shape, plan: LayerPlan, *, dtype: str, device: torch.device) -> CudaLayer:
    """An empty layer store on a GPU."""
    store = plan.build(shape.num_key_value_heads, shape.head_dim, shape.head_dim, getattr(torch, dtype), device)
    assert isinstance(store, CudaLayer)
    return store


def _calibrated(shape: Shape, *, is_fitted: bool) -> LayerPlan:
    heads, dim = shape.num_key_value_heads, shape.head_dim
    generator = torch.Generator().manual_seed(0)

    def stream(bits: tuple[int, ...], codebook: str | None = None, **static: Any) -> StreamPlan:
        matrix = torch.linalg.qr(torch.randn(heads, dim, dim, generator=generator))[0].contiguous()
        parts = tuple((x, dim // len(bits)) for x in bits)
        options = StreamOptions(parts=parts, codebook=codebook)
        return StreamPlan(options, matrix=matrix, inverse=matrix.mT.contiguous(), **static)

    mean = torch.randn(heads, dim, generator=generator)
    frequencies = 1e6 ** -(torch.arange(dim // 2) * 2.0 / dim)
    keys = stream(
        QUARTERS[2] if is_fitted else (4, 3, 1, 0),
        "uniform",
        shift=mean,
        shift_sine=torch.cat([-mean[:, dim // 2 :], mean[:, : dim // 2]], dim=1),
        frequencies=torch.cat([frequencies, frequencies]),
        noise=torch.full((dim,), 0.1),
    )
    config = SkvqConfig()
    # The random rows have no mean: one in the part without bits would be an error that does not average out.
    none = torch.zeros(heads, dim)
    if is_fitted:
        values = StreamPlan(fitted_value_options(config.values), shift=none)
    else:
        values = stream((3, 2, 1, 0), shift=none)
    return LayerPlan(keys, values, config.window, config.sinks)

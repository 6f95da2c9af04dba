"""What each layer of a cache is packed with: options plus static data, turned into native codecs and stores.

Is: the seam between options (config.py) and `_native`. `LayerPlan.from_config` gives every layer the same plan without
static data; a calibrated plan carries shift, scale and permutation per layer.
Is not: calibration. Shapes: shift and scale float32 [Hkv, D], permutation [D] or [Hkv][D].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch

from ._native import Codec, Layer, SkvqError
from .config import GROUP_SIZES, SkvqConfig, StreamOptions

HEAD_DIM_UNIT = 16
DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True, eq=False)
class StreamPlan:
    """Options and static data of one stream of one layer."""

    options: StreamOptions
    shift: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    permutation: tuple[int, ...] | tuple[tuple[int, ...], ...] | None = None

    def check(self, name: str, head_dim: int) -> None:
        """Raise SkvqError if heads of `head_dim` channels cannot be packed; `name` is "keys" or "values"."""
        if head_dim <= 0 or head_dim % HEAD_DIM_UNIT:
            raise SkvqError(f"{name}: head_dim={head_dim}: expected a positive multiple of {HEAD_DIM_UNIT}")
        group = self.options.group_size
        if group is not None and (group not in (*GROUP_SIZES, head_dim) or head_dim % group):
            allowed = sorted({size for size in GROUP_SIZES if head_dim % size == 0} | {head_dim})
            raise SkvqError(
                f"{name}: group_size={group}: expected one of {', '.join(map(str, allowed))} for head_dim={head_dim}"
            )

    def codec(self, name: str, head_dim: int) -> Codec:
        """The native codec of this stream."""
        self.check(name, head_dim)
        options = self.options.resolved()
        if not options.is_packed:
            return Codec(head_dim=head_dim, format=options.format)
        static: dict[str, Any] = {"shift": self.shift, "scale": self.scale, "permutation": self.permutation}
        return Codec(
            head_dim=head_dim,
            format=options.format,
            group_size=options.group_size,
            metadata=cast(str, options.metadata),
            symmetric=options.symmetric,
            codebook=options.codebook,
            rule=cast(str, options.rule),
            clip=options.clip,
            refinements=options.refinements,
            unbiased=options.unbiased,
            rotation=options.rotation,
            block=options.block,
            block_shift=options.block_shift,
            scale_exponent=options.scale_exponent,
            **{key: value for key, value in static.items() if value is not None},
        )


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """Everything one layer's store is built from, except the shapes that the first tokens bring."""

    keys: StreamPlan
    values: StreamPlan
    window: int
    sinks: int
    nonfinite: str = "raise"

    @classmethod
    def from_config(cls, config: SkvqConfig) -> LayerPlan:
        """The plan without static data: statistics, if any, come from the tokens themselves."""
        return cls(StreamPlan(config.keys), StreamPlan(config.values), config.window, config.sinks, config.nonfinite)

    def check(self, key_head_dim: int, value_head_dim: int) -> None:
        """Raise SkvqError if heads of these sizes cannot be packed."""
        self.keys.check("keys", key_head_dim)
        self.values.check("values", value_head_dim)

    def build(self, num_key_value_heads: int, key_head_dim: int, value_head_dim: int, dtype: torch.dtype) -> Layer:
        """An empty store."""
        if dtype not in DTYPE_NAMES:
            expected = ", ".join(DTYPE_NAMES.values())
            raise SkvqError(f"keys: dtype {dtype}: expected one of {expected}")
        return Layer(
            num_key_value_heads=num_key_value_heads,
            keys=self.keys.codec("keys", key_head_dim),
            values=self.values.codec("values", value_head_dim),
            sinks=self.sinks,
            window=self.window,
            dtype=DTYPE_NAMES[dtype],
            nonfinite=self.nonfinite,
        )

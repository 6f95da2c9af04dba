"""What each layer of a cache is packed with: options plus static data, turned into native codecs and stores.

Is: the seam between options (config.py) and `_native`. `LayerPlan.from_config` gives every layer the same plan without
static data; a calibrated plan carries shift, scale and permutation per layer, or a matrix with what belongs to it.
Is not: calibration. Shapes: shift, scale and shift_sine float32 [Hkv, D], permutation [D] or [Hkv][D], frequencies and
noise float32 [D], matrix and inverse float32 [Hkv, D, D].
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, cast

import torch

from . import cuda_store
from ._native import Codec, CudaLayer, Layer, SkvqError
from .config import GROUP_SIZES, SkvqConfig, StreamOptions
from .sinks import searched

HEAD_DIM_UNIT = 16
CPU = torch.device("cpu")
DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True, eq=False)
class StreamPlan:
    """Options and static data of one stream of one layer.

    Attributes:
        options: how rows are packed.
        shift: mean of the rows; with `shift_sine` of the keys before RoPE.
        scale: of the channels; not with parts.
        permutation: of the channels; not with parts.
        shift_sine: `shift` turned by a quarter. With it the mean of a key is shift·cos(θt) + shift_sine·sin(θt).
        frequencies: θ of every channel.
        matrix: M of src/FORMAT.md section 6, with which rows of parts are packed.
        inverse: B, with which they are read.
        noise: variance of every packed channel's error in units of the squared scale, taken off scores; keys only.
    """

    options: StreamOptions
    shift: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    permutation: tuple[int, ...] | tuple[tuple[int, ...], ...] | None = None
    shift_sine: torch.Tensor | None = None
    frequencies: torch.Tensor | None = None
    matrix: torch.Tensor | None = None
    inverse: torch.Tensor | None = None
    noise: torch.Tensor | None = None

    def check(self, name: str, head_dim: int) -> None:
        """Raise SkvqError if heads of `head_dim` channels cannot be packed; `name` is "keys" or "values"."""
        self._check_form(name, head_dim)
        if self.options.parts is not None:
            self._check_numbers(name)

    def _check_form(self, name: str, head_dim: int) -> None:
        """`check` without a look at numbers."""
        if head_dim <= 0 or head_dim % HEAD_DIM_UNIT:
            raise SkvqError(f"{name}: head_dim={head_dim}: expected a positive multiple of {HEAD_DIM_UNIT}")
        group = self.options.group_size
        if group is not None and (group not in (*GROUP_SIZES, head_dim) or head_dim % group):
            allowed = sorted({size for size in GROUP_SIZES if head_dim % size == 0} | {head_dim})
            raise SkvqError(
                f"{name}: group_size={group}: expected one of {', '.join(map(str, allowed))} for head_dim={head_dim}"
            )
        parts = self.options.parts
        if parts is None:
            for field in ("shift_sine", "frequencies", "matrix", "inverse", "noise"):
                self._expect(name, field, False, "without parts")
            return
        if sum(width for _, width in parts) != head_dim:
            raise SkvqError(f"{name}: parts={parts!r}: expected widths that add up to head_dim={head_dim}")
        self._check_static(name, head_dim)

    def _check_static(self, name: str, head_dim: int) -> None:
        """Raise SkvqError if what lies behind the rows of parts is incomplete or has other shapes."""
        for field in ("scale", "permutation"):
            self._expect(name, field, False, "with parts")
        for field in ("matrix", "inverse"):
            self._expect(name, field, True, "with parts")
        turns = self.shift_sine is not None or self.frequencies is not None
        for field in ("shift", "shift_sine", "frequencies") if turns else ():
            self._expect(name, field, True, "for a mean that turns")
        if name == "values":
            self._expect(name, "noise", False, "for values, which have no scores")
        heads = cast(torch.Tensor, self.matrix).shape[0]
        rows, channels, square = (heads, head_dim), (head_dim,), (heads, head_dim, head_dim)
        shapes = {"matrix": square, "inverse": square, "shift": rows, "shift_sine": rows}
        for field, shape in (shapes | {"frequencies": channels, "noise": channels}).items():
            value = getattr(self, field)
            if value is None:
                continue
            if not isinstance(value, torch.Tensor) or value.dtype != torch.float32 or tuple(value.shape) != shape:
                found = f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
                raise SkvqError(f"{name}: {field}: {found}, expected torch.float32 {list(shape)}")

    def _check_numbers(self, name: str) -> None:
        """Raise SkvqError if numbers behind the rows of parts are none, as a native codec does of itself."""
        for field in ("matrix", "inverse", "shift", "shift_sine", "frequencies", "noise"):
            value = getattr(self, field)
            if value is not None and not bool(torch.isfinite(value).all()):
                raise SkvqError(f"{name}: {field}: expected finite numbers, got a NaN or an infinity")
        if self.noise is not None and bool((self.noise < 0.0).any()):
            raise SkvqError(f"{name}: noise: {float(self.noise.min())}, expected no negative number")

    def _expect(self, name: str, field: str, present: bool, when: str) -> None:
        if (getattr(self, field) is not None) != present:
            raise SkvqError(f"{name}: {field}: expected {'one' if present else 'none'} {when}")

    @property
    def nbytes(self) -> int:
        """Of the static data."""
        tensors = (getattr(self, field.name) for field in dataclasses.fields(self))
        return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))

    def codec(self, name: str, head_dim: int) -> Codec:
        """The native codec of this stream. Raises SkvqError as `check` does."""
        self._check_form(name, head_dim)
        options = self.options.resolved()
        if not options.is_packed:
            return Codec(head_dim=head_dim, format=options.format)
        fields = (field.name for field in dataclasses.fields(self) if field.name != "options")
        static: dict[str, Any] = {field: getattr(self, field) for field in fields} | {"parts": options.parts}
        try:
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
                query_exponent=options.query_exponent,
                **{key: value for key, value in static.items() if value is not None},
            )
        except SkvqError as error:
            raise SkvqError(f"{name}: {error}") from None


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """Everything one layer's store is built from, except the shapes that the first tokens bring."""

    keys: StreamPlan
    values: StreamPlan
    window: int
    sinks: int
    nonfinite: str = "raise"
    sink_search: int = 0

    @classmethod
    def from_config(cls, config: SkvqConfig) -> LayerPlan:
        """The plan without static data: statistics, if any, come from the tokens themselves."""
        keys, values = StreamPlan(config.keys), StreamPlan(config.values)
        return cls(keys, values, config.window, config.sinks, config.nonfinite, config.sink_search)

    @property
    def nbytes(self) -> int:
        """Of the static data of both streams."""
        return self.keys.nbytes + self.values.nbytes

    def without_static_data(self) -> LayerPlan:
        """The options alone, once a store has been built."""
        return dataclasses.replace(self, keys=StreamPlan(self.keys.options), values=StreamPlan(self.values.options))

    @property
    def searched(self) -> int:
        """Among how many first tokens the sinks are chosen, 0 for no choice."""
        return searched(self.sink_search, self.sinks, self.window)

    def check(self, key_head_dim: int, value_head_dim: int) -> None:
        """Raise SkvqError if heads of these sizes cannot be packed."""
        self.keys.check("keys", key_head_dim)
        self.values.check("values", value_head_dim)

    def build(
        self,
        num_key_value_heads: int,
        key_head_dim: int,
        value_head_dim: int,
        dtype: torch.dtype,
        device: torch.device = CPU,
    ) -> Layer | CudaLayer:
        """An empty store, where keys and values of `device` go; both kinds have the same methods."""
        if dtype not in DTYPE_NAMES:
            expected = ", ".join(DTYPE_NAMES.values())
            raise SkvqError(f"keys: dtype {dtype}: expected one of {expected}")
        spec: dict[str, Any] = {
            "num_key_value_heads": num_key_value_heads,
            "keys": self.keys.codec("keys", key_head_dim),
            "values": self.values.codec("values", value_head_dim),
            "sinks": self.sinks,
            "window": self.window,
            "dtype": DTYPE_NAMES[dtype],
        }
        access = cuda_store.access(device)
        if access is None:
            return Layer(**spec, nonfinite=self.nonfinite)
        return cuda_store.new_cuda_layer(access, self.nonfinite, **spec)

"""The quantizers of transformers' QuantizedCache (quanto, hqq, fp8) under the comparison's window, sinks and metadata.

Is: their arithmetic, called through transformers' own layers on the rows that this package's rule packs. Is not: their
own rule (the whole prompt is quantized at once, the rest again and again whenever a residual of 128 tokens is full);
`skvq eval` runs those caches as they are in its generating tasks.

Whatever the docstring of transformers says, axis 0 of quanto (its default) and axis 1 of HQQ (what its guide advises)
make groups of channels of one token. A few key channels of Qwen2 and Qwen2.5 have large biases: they set the step of
their group, and both collapse.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...models import ExtraNotInstalledError
from .base import Geometry, Method, Where
from .quantizers import bits_label, check_bits

if TYPE_CHECKING:
    from ..calibration_rows import CalibrationRows

METADATA_BITS = 32  # a scale and a zero point of a group, in the dtype of a half-precision model
# What QuantizedCache is given for each of its backends, unless something else is asked for.
STOCK_OPTIONS: dict[str, dict[str, Any]] = {
    "quanto": {"nbits": 4},
    # hqq supports only this axis for both in transformers' layer
    "hqq": {"nbits": 4, "axis_key": 1, "axis_value": 1},
    "fp8": {},
}
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def quantized_layer(backend: str, bits: int, **options: Any) -> Any:
    """An empty layer of transformers' QuantizedCache: "quanto" or "hqq" at `bits` bits, with `STOCK_OPTIONS` but for
    `options`.

    Raises ImportError if the backend's package is missing, and transformers' ValueError for bits that it has not.
    """
    from transformers import cache_utils

    kinds = {"quanto": "QuantoQuantizedLayer", "hqq": "HQQQuantizedLayer"}
    if backend not in kinds:
        raise ValueError(f"backend={backend!r}: expected one of {', '.join(map(repr, kinds))}")
    return getattr(cache_utils, kinds[backend])(**(STOCK_OPTIONS[backend] | {"nbits": bits} | options))


@dataclass(eq=False)
class _Grouped(Method):
    """Groups of `group` channels of a token; quantized in `dtype`, as in a model of that dtype."""

    key_bits: int = 4
    value_bits: int = 4
    group: int = 64
    dtype: str = "bfloat16"
    name: str = field(init=False)

    def _check(self, label: str) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype={self.dtype!r}: expected one of {', '.join(map(repr, _DTYPES))}")
        self._layers: dict[int, Any] = {}
        for bits in (self.key_bits, self.value_bits):
            self._layer(bits)
        self.name = f"{label} {bits_label(self.key_bits, self.value_bits)} g{self.group}"

    def _make(self, bits: int) -> Any:
        """transformers' layer."""
        raise NotImplementedError

    def _layer(self, bits: int) -> Any:
        if bits not in self._layers:
            try:
                self._layers[bits] = self._make(bits)
            except ImportError as error:
                raise ExtraNotInstalledError(f"{type(self).__name__.lower()}: {error}") from error
            empty = torch.empty(1, 1, 1, self.group, dtype=_DTYPES[self.dtype])
            self._layers[bits].lazy_initialization(empty, empty)
        return self._layers[bits]

    def bits(self, geometry: Geometry, keys: bool) -> float:
        """Codes, and a scale and a zero point a group."""
        self._check_width(geometry.head_dim)
        return (self.key_bits if keys else self.value_bits) + METADATA_BITS / self.group

    def fake_quantize(self, rows: Tensor, where: Where) -> Tensor:
        """By the layer's own code."""
        self._check_width(rows.shape[-1])
        layer = self._layer(self.key_bits if where.keys else self.value_bits)
        given = rows.to(_DTYPES[self.dtype]).contiguous()
        axis = layer.axis_key if where.keys else layer.axis_value
        # Its tensors were not made under inference mode's rules: some of its in-place operations refuse such tensors.
        with torch.inference_mode(False), torch.no_grad():
            read = layer._dequantize(layer._quantize(given.clone(), axis=axis))
        return read.reshape(rows.shape).to(rows.dtype)

    def _check_width(self, head_dim: int) -> None:
        if head_dim % self.group:
            raise ValueError(f"{self.name}: group={self.group}: expected a divisor of head_dim={head_dim}")


@dataclass(eq=False)
class Quanto(_Grouped):
    """optimum-quanto, transformers' default axis 0: groups of 64 channels of a token. `key_axis` -1: keys in groups of
    64 tokens of a channel, which transformers offers but does not take by itself.
    """

    key_axis: int = 0

    def __post_init__(self) -> None:
        if self.key_axis not in (0, -1):
            raise ValueError(f"key_axis={self.key_axis!r}: expected 0 or -1")
        self._check("quanto")
        self.unit = self.group if self.key_axis else 1
        self.name += " keys per channel" if self.key_axis else ""

    def _make(self, bits: int) -> Any:
        return quantized_layer("quanto", bits, q_group_size=self.group, axis_key=self.key_axis)


@dataclass(eq=False)
class Hqq(_Grouped):
    """HQQ, axis 1: groups of 64 channels of a token, zero points improved by iterations over all rows at once.

    Axis 0 makes groups of elements as far apart as the number of rows has it: nothing that one pass could simulate.
    """

    def __post_init__(self) -> None:
        for option in ("key_bits", "value_bits"):
            # hqq itself unpacks three bits wrongly for most numbers of rows.
            check_bits(option, getattr(self, option), (8, 4, 2, 1))
        self._check("HQQ")

    def _make(self, bits: int) -> Any:
        return quantized_layer("hqq", bits, q_group_size=self.group)


@dataclass(eq=False)
class Fp8(Method):
    """E4M3 with one scale for a layer's keys and one for its values: from calibration texts, where transformers takes
    the prompt. Larger rows saturate, where transformers' cache has NaN.
    """

    name: str = field(default="fp8", init=False)

    def __post_init__(self) -> None:
        self.needs_calibration = True
        self._scales: dict[tuple[int, bool], Tensor] = {}

    def prepare(self, rows: CalibrationRows) -> None:
        """The largest magnitude of each stream."""
        largest = torch.finfo(torch.float8_e4m3fn).max
        for layer in rows.layers:
            chunks = list(rows.of_layer(layer))
            for keys in (True, False):
                size = torch.stack([chunk.stream(keys).abs().amax() for chunk in chunks]).amax()
                self._scales[layer, keys] = (size / largest).clamp(min=torch.finfo(torch.float32).tiny)

    def bits(self, geometry: Geometry, keys: bool) -> float:
        """8."""
        return 8.0

    def fake_quantize(self, rows: Tensor, where: Where) -> Tensor:
        """Element by element."""
        scale, largest = self.fitted(self._scales, where.layer, where.keys), torch.finfo(torch.float8_e4m3fn).max
        return (rows / scale).clamp(-largest, largest).to(torch.float8_e4m3fn).float() * scale

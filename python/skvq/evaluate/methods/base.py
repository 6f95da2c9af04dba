"""`Method`: what a way of quantizing keys and values must say to be compared.

A method is a subclass with a name, its counted bits, and `fake_quantize`; everything else has a default. It never sees
sinks, window or attention: the harness gives it rows to pack and reads back what it returns.
Shapes: rows float32 [B, Hkv, n, D].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from ..region_rule import Waits

if TYPE_CHECKING:
    from ..calibration_rows import CalibrationRows
    from ..rope import Rope
    from ..texts import Text


Fit = TypeVar("Fit")


@dataclass(frozen=True)
class Geometry:
    """Sizes of one stream of one layer, for counting bits."""

    layer: int
    num_key_value_heads: int
    head_dim: int

    @property
    def width(self) -> int:
        """Channels of a token in all heads."""
        return self.num_key_value_heads * self.head_dim


@dataclass(frozen=True)
class Where:
    """Where rows come from: layer, keys or values, the place of the first row in its store, the layer's rotation (if
    known) of rows at such places, and for methods that use them the queries [Hkv, group, T, D] of all tokens, scaled as
    scores are.
    """

    layer: int
    keys: bool
    start: int
    rope: Rope | None = None
    queries: Tensor | None = None


@dataclass(frozen=True)
class ReadBack:
    """Rows as they would be read back [B, Hkv, n, D], and a factor [B, Hkv, n] for each on `Method.score_noise`."""

    rows: Tensor
    noise: Tensor | None = None


class Method(ABC):
    """A way of quantizing keys and values.

    Attributes:
        name: as printed in tables; two methods of one comparison have two names.
        unit: rows that need each other to be packed, 1 for methods that treat every row alone. Units begin behind the
            sinks; `fake_quantize` gets whole units.
        waits: when a unit is packed, see `RegionRule`.
        needs_calibration: whether `prepare` must have run.
        before_rope: whether `fake_quantize` needs `where.rope` for keys.
        uses_queries: whether `fake_quantize` needs `where.queries` for keys; then `MethodCache` cannot serve it.
        sink_search: among how many first tokens its sinks are chosen (skvq/sinks.py); 0: they are the first ones.
            Rows come in the order of the store, chosen sinks in front, and positions count that way; `where.rope`
            knows which token each row is.
    """

    name: str
    unit: int = 1
    waits: Waits = "left"
    needs_calibration: bool = False
    before_rope: bool = False
    uses_queries: bool = False
    sink_search: int = 0

    @abstractmethod
    def bits(self, geometry: Geometry, keys: bool) -> float:
        """Bits of one packed element, everything counted that grows with the tokens: codes, scales, zero points,
        statistics of units, sparse outliers. Data fixed by calibration is not counted, as weights are not.
        """

    @abstractmethod
    def fake_quantize(self, rows: Tensor, where: Where) -> Tensor:
        """Rows as they would be read back from the packed store, in their shape and dtype."""

    def read_back(self, rows: Tensor, where: Where) -> ReadBack:
        """`fake_quantize`, and for keys how much noise a row has, if the method takes noise off scores."""
        return ReadBack(self.fake_quantize(rows, where))

    def score_noise(self, queries: Tensor, layer: int) -> Tensor:
        """What is taken off the scores of queries [Hkv, ..., D], scaled as scores are, for a key whose factor of noise
        is 1: [Hkv, ...]. Asked for only if `read_back` gives such factors.
        """
        raise NotImplementedError(f"{self.name}: score_noise")

    def prepare(self, rows: CalibrationRows) -> None:  # noqa: B027 - most methods have nothing to fit
        """Fit to keys, values and queries of calibration texts."""

    def unit_of(self, layer: int) -> int:
        """`unit`, where layers differ."""
        return self.unit

    def check_model(self, model: Any) -> None:  # noqa: B027 - most methods serve any model
        """Raise ValueError if the method was made for another model."""

    def check_texts(self, texts: Sequence[Text]) -> None:  # noqa: B027 - most methods come with nothing fitted
        """Raise ValueError if the method was fitted before, and to one of these evaluation texts."""

    def fitted(self, held: Mapping[tuple[int, bool], Fit], layer: int, keys: bool) -> Fit:
        """What `prepare` found for one stream of a layer. Raises ValueError if it has not run."""
        if (layer, keys) not in held:
            raise ValueError(f"{self.name} is not prepared: expected calibration texts")
        return held[layer, keys]

    def identity(self) -> dict[str, Any]:
        """What distinguishes this method from others in stored results, JSON-ready."""
        options = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return {"class": type(self).__name__, **{name: repr(value) for name, value in sorted(options.items())}}

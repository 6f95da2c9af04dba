"""Caches named on the command line: `dynamic`, `packed:key_bits=2,value_bits=1.5`, `quanto:nbits=2`, ...

Is: the way from such a text to a function that makes empty caches for one model.
Is not: the caches. A kind whose package is missing, or that refuses the model, fails here, before any model runs.

| kind | cache |
|---|---|
| `dynamic` | transformers' DynamicCache: full precision |
| `packed[:OPTIONS]` | QuantizedDynamicCache; fields of SkvqConfig, `keys.NAME` and `values.NAME` of a stream |
| `plan:FILE[,OPTIONS]` | the same with a calibrated plan |
| `method:SPEC` | a method of the comparison, simulated while generating |
| `quanto[:OPTIONS]`, `hqq[:OPTIONS]`, `fp8` | transformers' QuantizedCache |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..models import ExtraNotInstalledError
from .methods.stock import STOCK_OPTIONS
from .shared_prefill import MakeCache
from .spec_options import parse_options

if TYPE_CHECKING:
    from .texts import Text

KINDS = ("dynamic", "packed", "plan", "method", *STOCK_OPTIONS)


@dataclass(frozen=True)
class CacheDefaults:
    """What a cache is given unless its text says otherwise."""

    window: int = 128
    sinks: int = 5
    calibration: Sequence[Any] = ()  # chunks of token numbers, int64 [T] each, for methods that are fitted
    evaluation: Sequence[Text] = ()  # what caches are measured on; plans that were fitted to it are refused

    def regions(self) -> dict[str, int]:
        """Window and sinks, as keyword arguments."""
        return {"window": self.window, "sinks": self.sinks}


def _dynamic(spec: str, rest: str, model: Any, given: CacheDefaults) -> MakeCache:
    from transformers import DynamicCache

    if rest:
        raise ValueError(f"cache {spec!r}: dynamic takes no options")
    return lambda: DynamicCache(config=model.config)


def _packed(spec: str, rest: str, model: Any, given: CacheDefaults) -> MakeCache:
    from ..cache import QuantizedDynamicCache
    from ..config import SkvqConfig

    config = SkvqConfig.from_options(None, **{**given.regions(), **parse_options(f"cache {spec!r}", rest)})
    return lambda: QuantizedDynamicCache(model, config)


def _plan(spec: str, rest: str, model: Any, given: CacheDefaults) -> MakeCache:
    from ..cache import QuantizedDynamicCache
    from ..plan_file import QuantizationPlan
    from .texts import check_not_fitted

    path, _, options = rest.partition(",")
    if not path:
        raise ValueError(f"cache {spec!r}: expected plan:FILE or plan:FILE,NAME=VALUE")
    changes = {**given.regions(), **parse_options(f"cache {spec!r}", options)}
    plan = QuantizationPlan.load(path, model).with_regions(**changes)
    check_not_fitted(f"plan {path!r}", plan.header.texts, given.evaluation)
    return lambda: QuantizedDynamicCache.from_plan(model, plan)


def _method(spec: str, rest: str, model: Any, given: CacheDefaults) -> MakeCache:
    from .calibration_rows import CalibrationRows
    from .method_cache import MethodCache
    from .methods import parse_method
    from .rope import Rotary
    from .simulation import Simulator

    method = parse_method(rest)
    method.check_texts(given.evaluation)
    if method.needs_calibration:
        if not given.calibration:
            raise ValueError(f"{method.name} needs calibration texts, there are none")
        method.prepare(CalibrationRows(Simulator(model), given.calibration))
    rotary = Rotary(model) if method.before_rope else None
    return lambda: MethodCache(model.config, method, given.window, given.sinks, rotary)


def _stock(spec: str, rest: str, model: Any, given: CacheDefaults) -> MakeCache:
    from transformers import QuantizedCache

    kind = spec.partition(":")[0]
    options = STOCK_OPTIONS[kind] | parse_options(f"cache {spec!r}", rest)
    return lambda: QuantizedCache(kind, model.config, **options)


_MAKERS = {"dynamic": _dynamic, "packed": _packed, "plan": _plan, "method": _method} | dict.fromkeys(
    STOCK_OPTIONS, _stock
)


def parse_cache(spec: str, model: Any, given: CacheDefaults | None = None) -> MakeCache:
    """The maker of caches that `spec` names, tried once.

    Args:
        spec: `KIND` or `KIND:OPTIONS`, see the head of this file.
        model: the model that will run on the caches.
        given: `window` and `sinks` of the kinds that have them (packed, plan, method), calibration chunks, and the
            texts of the evaluation.

    Raises:
        ValueError: an unknown kind or option, a model that the cache refuses, or a plan that was fitted to a text of
            the evaluation.
        ExtraNotInstalledError: the cache needs a package that is missing.
    """
    kind, _, rest = spec.partition(":")
    if kind not in _MAKERS:
        raise ValueError(f"cache {spec!r}: unknown kind {kind!r}, expected one of {', '.join(KINDS)}")
    try:
        make = _MAKERS[kind](spec, rest, model, given or CacheDefaults())
        make()
    except ImportError as error:
        raise ExtraNotInstalledError(f"cache {spec!r} cannot be made here: {error}") from error
    except (ValueError, TypeError) as error:
        text = str(error)
        raise ValueError(text if text.startswith(f"cache {spec!r}") else f"cache {spec!r}: {text}") from error
    return make


def parse_caches(specs: Sequence[str], model: Any, given: CacheDefaults | None = None) -> dict[str, MakeCache]:
    """`parse_cache` for each of `specs`, by its text. Raises ValueError for a repeated one."""
    repeated = sorted({spec for spec in specs if list(specs).count(spec) > 1})
    if repeated:
        raise ValueError(f"cache {repeated[0]!r} is given twice")
    return {spec: parse_cache(spec, model, given) for spec in specs}

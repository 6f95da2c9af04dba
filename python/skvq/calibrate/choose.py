"""`best_shared`: which way of sharing bits out over keys, values and layers is best, by measurement.

The budget of `--bits` can be shared out over all streams by what errors should do to the attention outputs
(spectral_plan.py). That is a first-order estimate, layer by layer; what errors of early layers become further on it
does not know, and on some models an even split is better. So plans of both kinds are made, and the one stays whose
predictions have the least KL divergence from full precision on a piece of text that none of them was fitted to.

Is: the candidates and the choice. Is not: the fit, nor how predictions are measured (evaluate/).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch import Tensor

from .._native import SkvqError
from ..plan_file import QuantizationPlan
from .allocate import ALLOWED_BITS
from .spectral_plan import SpectralOptions, SpectralPlan, scale_bits, spectral_plan
from .statistics import Statistics

STEP = 0.25  # of mean bits, with four parts of equal width
KEYS_AHEAD = (0.0, 0.5, 1.0)  # bits that keys have more than values, in the even splits


def even_splits(codes: float) -> list[tuple[float, float]]:
    """Bits of keys and of values in steps of `STEP` that add up to at most twice `codes`, keys ahead or alike."""
    total, found = int(2 * codes / STEP + 1e-9), []
    for ahead in KEYS_AHEAD:
        keys = min(-(-(total + round(ahead / STEP)) // 2) * STEP, max(ALLOWED_BITS))
        values = total * STEP - keys
        if values > 0 and (keys, values) not in found:
            found.append((keys, values))
    return found


def best_shared(
    model: Any,
    statistics: Statistics,
    options: SpectralOptions,
    plan_of: Callable[[SpectralPlan], QuantizationPlan],
    token_ids: Tensor,
    *,
    progress: bool = False,
) -> SpectralPlan:
    """The best plan of `options.bits`; its remarks say what the candidates were and how they did.

    Args:
        model: on the CPU, where predictions are measured.
        statistics: what every candidate is fitted to.
        options: with `bits`.
        plan_of: a whole plan from what was fitted.
        token_ids: int64 [T], of which the predictions are compared, from the middle on; not of `statistics`.
        progress: a bar on stderr.
    """
    from ..evaluate.comparison import Settings, measure
    from ..evaluate.methods.ours import Planned

    assert options.bits is not None
    shared = spectral_plan(model, statistics, options)
    fitted = {"shared out by estimate": shared}
    shapes = [x.mean.shape for layer in statistics.layers.values() for x in (layer.keys, layer.values)]
    for keys, values in even_splits(options.bits - scale_bits(shapes)):
        even = replace(options, bits=None, key_bits=keys, value_bits=values)
        with suppress(SkvqError):  # heads too narrow for so few bits
            fitted[f"keys {keys:g}, values {values:g}"] = spectral_plan(model, statistics, even)
    plans = {name: plan_of(x) for name, x in fitted.items()}
    config = plans["shared out by estimate"].config
    settings = Settings(config.window, config.sinks, score_from=token_ids.numel() // 2)
    methods = [Planned(plan, name) for name, plan in plans.items()]
    report = measure(model, methods, [token_ids], settings=settings, progress=progress)
    divergence = {row["method"]: row["kl"] for row in report.rows}
    best = min(divergence, key=lambda name: divergence[name])
    figures = "; ".join(
        f"{name} ({plans[name].average_bits():.3f} bits): {value:.5f}" for name, value in divergence.items()
    )
    remark = f"bits are {best}: KL divergence on {token_ids.numel()} tokens that nothing is fitted to was {figures}"
    return replace(fitted[best], remarks=[*fitted[best].remarks, remark])

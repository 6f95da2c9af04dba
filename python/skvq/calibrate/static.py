"""The plainest fit: every channel's mean and spread over the calibration texts, before the rotation (DESIGN: μ and σ).

Is: a baseline that needs no statistics of a block at run time. Is not: aware of what queries use, or of the drift of
keys with the position.
"""

from __future__ import annotations

import dataclasses

from ..config import SkvqConfig, StreamOptions
from ..plan import StreamPlan
from .moments import StreamMoments
from .statistics import Statistics


def static_plan(statistics: Statistics, config: SkvqConfig) -> dict[int, tuple[StreamPlan, StreamPlan]]:
    """Key and value plan of every layer: the options of `config` with static shift and scale instead of blocks."""
    return {
        index: (_stream(layer.keys, config.keys), _stream(layer.values, config.values))
        for index, layer in statistics.layers.items()
    }


def _stream(moments: StreamMoments, options: StreamOptions) -> StreamPlan:
    """Shift: the mean. Scale: σ^p · c^(1−p), p the options' scale_exponent and c the head's root mean variance.

    The rule for scales that queries weigh does not go with it: keys take what was best without them.
    """
    if not options.is_packed:
        return StreamPlan(options)
    if options.query_exponent:
        exponent = min(1.0, options.scale_exponent + options.query_exponent / 2)
        options = dataclasses.replace(options, query_exponent=0.0, scale_exponent=exponent, unbiased=False, clip=1.1)
    variance = moments.variance
    common = variance.mean(-1, keepdim=True).sqrt()
    scale = variance.sqrt() ** options.scale_exponent * common ** (1.0 - options.scale_exponent)
    # A channel that never moves is stored by its shift alone.
    scale = scale.where(scale > 0.0, 1.0)
    return StreamPlan(
        dataclasses.replace(options, block=0), shift=moments.mean.float().cpu(), scale=scale.float().cpu()
    )

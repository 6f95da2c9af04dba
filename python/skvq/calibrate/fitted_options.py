"""What the options of a stream become when its layer is fitted to a prompt; known ahead, before any prompt.

Is: options. Is not: the fit (prompt.py). transformers is not imported.
"""

from __future__ import annotations

import dataclasses

from ..config import VALUE_DEFAULTS, StreamOptions, is_default_method
from .allocate import Parts, even_if_few, merged, part_count

# Bits of the quarters of a head, by mean. One choice for all layers and texts, so that a GPU's kernels are known ahead;
# the best of every layer is predicted to lose 1 to 10 % less (tests/bench/LOG.md).
QUARTERS: dict[float, tuple[int, ...]] = {
    1.5: (4, 2, 0, 0),
    1.6: (4, 2, 0, 0),
    2: (5, 2, 1, 0),
    3: (5, 3, 3, 1),
    4: (5, 5, 3, 3),
}


def fitted_key_options(options: StreamOptions, head_dim: int) -> StreamOptions | None:
    """What keys of these options are packed with after a fit; None for heads that have no quarters of whole units."""
    if part_count(head_dim, 4) != 4:
        return None
    return of_parts(options, merged(QUARTERS[options.bits], head_dim // 4))


def of_parts(options: StreamOptions, parts: Parts) -> StreamOptions:
    """Options of parts of keys that keep what goes with them of `options`."""
    codebook = fitted_codebook(options)
    return StreamOptions(parts=parts, codebook=codebook, clip=options.clip, metadata=options.metadata)


def fitted_codebook(options: StreamOptions) -> str:
    """Of the parts of keys of these options."""
    return even_if_few(options.bits)


def fitted_value_options(options: StreamOptions) -> StreamOptions:
    """Likewise for values: their mean is that of the prompt, if they are packed as they are by default."""
    if not (options.is_packed and is_default_method(options, VALUE_DEFAULTS)):
        return options
    return dataclasses.replace(options, block=0, unbiased=True)

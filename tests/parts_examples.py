"""Codecs of parts for the tests: parts for every head size, and random matrices and means that belong together.

Is: keywords of `ReferenceCodec` and `_native.Codec`, and the same as options and static data of a plan. Is not: fitted
to anything; matrices are far from orthogonal, so that a transposed one is noticed.
"""

from __future__ import annotations

from typing import Any

import torch

from skvq import StreamOptions
from skvq.plan import StreamPlan

PARTS: dict[int, list[tuple[tuple[int, int], ...]]] = {
    16: [((3, 16),), ((1, 16),)],
    32: [((5, 16), (1, 16)), ((2, 16), (0, 16))],
    64: [((2, 64),), ((4, 16), (2, 16), (1, 16), (0, 16))],
    80: [((3, 16), (1, 64)), ((4, 16), (1, 48), (0, 16))],
    96: [((5, 32), (3, 16), (2, 48)), ((1, 96),)],
    112: [((3, 48), (2, 48), (0, 16)), ((2, 16), (3, 96))],
    128: [((4, 32), (3, 32), (1, 32), (0, 32)), ((5, 16), (4, 16), (3, 16), (2, 48), (1, 32))],
    192: [((4, 48), (2, 80), (1, 48), (0, 16)), ((1, 192),)],
    256: [((5, 48), (4, 16), (3, 48), (2, 80), (1, 64)), ((2, 96), (0, 160))],
}
CASES = [(head_dim, index) for head_dim, lists in PARTS.items() for index in range(len(lists))]


def frequencies_of(head_dim: int, theta: float = 10000.0) -> torch.Tensor:
    """Of the channels of a rotary embedding that pairs the two halves of a head, float32 [D]."""
    half = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    return half.repeat(2).float()


def quarter_turn(mean: torch.Tensor) -> torch.Tensor:
    """What a rotary embedding that pairs the two halves makes of a mean [..., D] at a quarter turn."""
    first, second = mean.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def static_data(
    head_dim: int, heads: int = 2, seed: int = 0, *, turning: bool = True, noise: bool = True
) -> dict[str, torch.Tensor]:
    """Matrices, mean and noise, under the names that codecs and `StreamPlan` have for them."""
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(heads, head_dim, head_dim, generator=generator)).Q
    stretch = torch.rand(heads, head_dim, generator=generator) + 0.5
    found = {
        "matrix": (stretch[..., None] * rotation).contiguous(),
        "inverse": (1.05 * rotation.mT / stretch[:, None]).contiguous(),
        "shift": 3.0 * torch.randn(heads, head_dim, generator=generator),
    }
    if turning:
        found |= {"shift_sine": quarter_turn(found["shift"]), "frequencies": frequencies_of(head_dim)}
    if noise:
        found["noise"] = torch.rand(head_dim, generator=generator) * 0.2
    return found


def codec_options(head_dim: int, index: int = 0, heads: int = 2, seed: int = 0, **more: Any) -> dict[str, Any]:
    """Keywords of a codec; `more` overrides them, except `turning` and `noise`, for `static_data`."""
    choice = {name: more.pop(name) for name in ("turning", "noise") if isinstance(more.get(name), bool)}
    static = static_data(head_dim, heads, seed, **choice)
    return {"head_dim": head_dim, "format": "parts", "parts": PARTS[head_dim][index]} | static | more


def stream_plan(head_dim: int, index: int = 0, heads: int = 2, seed: int = 0, **choice: bool) -> StreamPlan:
    """The same as a plan."""
    return StreamPlan(StreamOptions(parts=PARTS[head_dim][index]), **static_data(head_dim, heads, seed, **choice))

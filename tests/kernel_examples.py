"""Codecs and masks that the tests of the CUDA kernels share, in the emulator and on a device."""

from __future__ import annotations

from typing import Any

import torch

from parts_examples import codec_options
from skvq.reference import ReferenceCodec

HEADS = 2
BLOCKS: dict[str, Any] = {"block": 128, "scale_exponent": 0.5}
# Of the largest output of attention: queries, levels and weights are f16, sums f32.
ERROR = {torch.float16: 1e-3, torch.bfloat16: 4e-3, torch.float32: 5e-4}


def codec(format: str = "2", head_dim: int = 64, **more: Any) -> ReferenceCodec:
    return ReferenceCodec(head_dim=head_dim, format=format, **more)


def parts(head_dim: int, index: int, **more: Any) -> ReferenceCodec:
    return ReferenceCodec(**codec_options(head_dim, index, heads=HEADS, **more))


def statics(head_dim: int) -> dict[str, Any]:
    """Shift, scale and a permutation of each head."""
    generator = torch.Generator().manual_seed(head_dim)
    return {
        "shift": torch.randn(HEADS, head_dim, generator=generator),
        "scale": 0.5 + torch.rand(HEADS, head_dim, generator=generator),
        "permutation": [torch.randperm(head_dim, generator=generator).tolist() for _ in range(HEADS)],
    }


def float_mask(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A bias that hides a fifth of the tokens."""
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(*shape, generator=generator)
    return bias.masked_fill(torch.rand(*shape, generator=generator) < 0.2, -torch.inf).to(dtype)

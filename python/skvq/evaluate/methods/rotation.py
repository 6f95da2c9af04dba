"""Rotations without calibration: TurboQuant-like (a norm per token, Lloyd–Max levels) and QuaRot-like (min/max groups).

TurboQuant: arXiv 2504.19874; QuaRot: arXiv 2404.00456. Rows are turned by a fixed orthogonal matrix, so that their
channels look normal, and quantized token by token. TurboQuant's one-bit sketch of the residual of keys is left out, as
vLLM's port leaves it out; that port also keeps two layers at either end in 16 bits and does not turn values.

Rows are not centred, there as here: an error is a share of a row's whole norm, so keys with a large constant part (the
biases of Qwen2 and Qwen2.5) lose what tells tokens apart, and these methods collapse.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ...reference import hadamard, round_metadata
from ...reference_codes import lloyd_max_levels
from .base import Geometry, Where
from .quantizers import (
    TwoStreams,
    check_metadata,
    code_bits,
    group_size,
    grouped_min_max,
    level_count,
    nearest_level,
)


@cache
def random_rotation(width: int, seed: int) -> Tensor:
    """A random orthogonal matrix, float32 [width, width], the same for the same seed."""
    normal = torch.randn(width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q, r = torch.linalg.qr(normal)
    return (q * r.diagonal().sign()).float()


@cache
def random_signs(width: int, seed: int) -> Tensor:
    """±1, float32 [width]."""
    return torch.randint(0, 2, (width,), generator=torch.Generator().manual_seed(seed)).float() * 2 - 1


@dataclass(eq=False)
class Rotation(TwoStreams):
    """`rotation` "hadamard" (random signs, then Walsh–Hadamard) or "random" (a random orthogonal matrix).

    With `levels` "lloyd-max" a row has one scale, its root mean square, or with `norm_correction` the one that gives
    the row that is read back its norm (the ports' setting); with "uniform" groups of `group` channels have a minimum
    and a step. Levels are those of a normal variable, less than 0.5 % worse than those of a head of 64 channels.
    """

    rotation: str = "hadamard"
    levels: str = "lloyd-max"
    group: int = 128
    metadata: str = "fp16"
    norm_correction: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_metadata(self.metadata)
        for option, allowed in (("rotation", ("hadamard", "random")), ("levels", ("lloyd-max", "uniform"))):
            if getattr(self, option) not in allowed:
                raise ValueError(f"{option}={getattr(self, option)!r}: expected {' or '.join(map(repr, allowed))}")
        family = "QuaRot-like" if self.levels == "uniform" else "TurboQuant-like"
        self.name = f"{family} {self.bits_label}"
        self.name += f" g{self.group}" if self.levels == "uniform" else ""
        self.name += " random" if self.rotation == "random" else ""
        self.name += "" if self.norm_correction or self.levels == "uniform" else " without norm correction"

    def bits(self, geometry: Geometry, keys: bool) -> float:
        """Codes, and one number a row or two a group."""
        numbers = 1 / geometry.head_dim if self.levels == "lloyd-max" else 2 / group_size(self.group, geometry.head_dim)
        codes = code_bits(self.stream_bits(keys), geometry.head_dim)
        return codes + check_metadata(self.metadata) * numbers

    def fake_quantize(self, rows: Tensor, where: Where) -> Tensor:
        """Row by row."""
        bits, width = self.stream_bits(where.keys), rows.shape[-1]
        signs = random_signs(width, self.seed)
        matrix = random_rotation(width, self.seed) if self.rotation == "random" else None
        y = hadamard(rows * signs) if matrix is None else rows @ matrix
        if self.levels == "uniform":
            y = grouped_min_max(y, self.group, level_count(bits), self.metadata)
        else:
            size = _root_mean_square(y)
            read = nearest_level(y / size.clamp(min=1e-20), torch.tensor(lloyd_max_levels(level_count(bits))))
            scale = size / _root_mean_square(read).clamp(min=1e-20) if self.norm_correction else size
            y = read * round_metadata(scale, self.metadata)
        return hadamard(y) * signs if matrix is None else y @ matrix.T


def _root_mean_square(rows: Tensor) -> Tensor:
    """[..., 1] of rows [..., D]."""
    return rows.square().mean(-1, keepdim=True).sqrt()

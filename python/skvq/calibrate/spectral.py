"""The spectral transform: channels in order of what their error costs, and rows of parts with bits by that order.

Is: closed-form linear algebra on moments, its predicted costs, and the static data of a stream (src/FORMAT.md
section 6). Is not: which moments (spectral_plan.py), or the choice of bits (allocate.py).

With S the covariance of a head's rows about their mean and W what an error costs (for keys the second moment of the
scaled queries, for values Σ Wₒᵀ Wₒ), the eigenvalues λ of S^½ W S^½ say what there is to lose: in the basis
λ^¼ Vᵀ S^-½ every channel has the variance √λ and an error of variance 1 costs √λ (transform.py). Sorted and cut into
parts, each behind a flat rotation that gives its channels one variance, a part with bits b costs
error(b) · (Σ √λ)² / width. Any F with F Fᵀ = S serves instead of S^½: the eigenvalues of Fᵀ W F are the same, and so is
λ^¼ Uᵀ F⁻¹ with its eigenvectors U. All in float64 on the CPU; leading dimension H, the kv heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass, fields
from functools import cache, lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..config import StreamOptions
from ..plan import StreamPlan
from .allocate import ERRORS, Candidate, Parts, candidates, equal_error, error_of
from .side_by_side import side_by_side
from .transform import factor_and_inverse, flat_rotation

SMALLEST_RATIO = 1e-9  # of an eigenvalue to the largest


@dataclass(frozen=True)
class Chain:
    """Predicted costs of one stream, step by step.

    Attributes:
        static: equal bits behind a scale per channel and a rotation, about the static mean.
        mean: the same about the mean that is used.
        transform: equal bits behind the fitted transform.
        parts: with parts.
    """

    static: float = 0.0
    mean: float = 0.0
    transform: float = 0.0
    parts: float = 0.0

    def __add__(self, other: Chain) -> Chain:
        return Chain(*(x + y for x, y in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, factor: float) -> Chain:
        return Chain(*(x * factor for x in astuple(self)))

    def __str__(self) -> str:
        names = ("static", "mean", "transform", "parts")
        return " → ".join(f"{name} {getattr(self, name):.4g}" for name in names)


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The balanced basis of a stream, its channels in falling order of what there is to lose.

    Attributes:
        basis, inverse: rows to channels and back, float64 [H, D, D]; of one head alone [D, D].
        spread: variance of every channel, which is also what an error of variance 1 costs there [H, D] or [D].
    """

    basis: Tensor
    inverse: Tensor
    spread: Tensor

    @classmethod
    def of(cls, covariance: Tensor, weight: Tensor) -> Spectrum:
        """From damped moments float64 [H, D, D]."""
        heads = side_by_side(lambda head: cls.of_head(covariance[head], weight[head]), covariance.shape[0])
        return cls(*(torch.stack([getattr(head, x.name) for head in heads]) for x in fields(cls)))

    @classmethod
    def of_head(cls, covariance: Tensor, weight: Tensor) -> Spectrum:
        """Of one head, from damped moments [D, D]."""
        factor, inverse = factor_and_inverse(covariance)
        values, vectors = torch.linalg.eigh(factor.mT @ weight @ factor, UPLO="U")
        values, vectors = values.flip(-1), vectors.flip(-1)
        spread = values.clamp(min=values[:1] * SMALLEST_RATIO).sqrt()
        quarter = spread.sqrt()
        return cls(quarter[:, None] * (vectors.mT @ inverse), (factor @ vectors) / quarter, spread)

    def harm(self, weight: Tensor) -> Tensor:
        """What an error of variance 1 in a channel costs by another weight [H, D, D]: [H, D]."""
        return (self.inverse * (weight @ self.inverse)).sum(-2)

    def cost(self, parts: Parts, harm: Tensor, codebook: str = "lloyd-max") -> float:
        """Predicted cost of all heads. A flat rotation spreads the errors of a part over its channels."""
        return self.costs(harm, codebook)(parts)

    def costs(self, harm: Tensor, codebook: str = "lloyd-max") -> Callable[[Parts], float]:
        """`cost` of many parts, of which several have the same channels."""

        @cache
        def of_channels(start: int, end: int) -> float:
            return float((self.spread[:, start:end].mean(-1) * harm[:, start:end].sum(-1)).sum())

        def of_parts(parts: Parts) -> float:
            ends = list(accumulate(width for _, width in parts))
            return sum(
                error_of(bits, codebook) * of_channels(end - width, end)
                for (bits, width), end in zip(parts, ends, strict=True)
            )

        return of_parts

    def matrices(self, parts: Parts, codebook: str = "lloyd-max") -> tuple[Tensor, Tensor]:
        """M and B of src/FORMAT.md section 6, float32: y = M (x − m) has unit variance, B has the gain 1 / (1 − MSE)
        for channels with codes.
        """
        rotation, mean, gain = _of_parts(parts, codebook)
        deviation = (self.spread @ mean).sqrt()
        forward = rotation @ (self.basis / deviation[..., :, None])
        back = (self.inverse * (deviation * gain)[..., None, :]) @ rotation.mT
        return forward.float(), back.float()


@lru_cache(maxsize=8)
def _of_parts(parts: Parts, codebook: str) -> tuple[Tensor, Tensor, Tensor]:
    """Of every part, side by side: its rotation and what gives a channel the mean of its part, float64 [D, D]; the
    decoder's gain, float64 [D]. Not to be written into.
    """
    unit: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    rotation = torch.block_diag(*(flat_rotation(width) for _, width in parts))
    mean = torch.block_diag(*(torch.full((width, width), 1.0 / width, **unit) for _, width in parts))
    error = ERRORS[codebook]
    gain = [torch.full((width,), 1.0 / (1.0 - error[bits]) if bits else 1.0, **unit) for bits, width in parts]
    return rotation, mean, torch.cat(gain)


def noise_of(parts: Parts, codebook: str = "lloyd-max") -> Tensor:
    """κ of src/FORMAT.md section 6, float32 [D]: the variance of the errors of ŷ, in units of the scale squared.

    Of a Lloyd-Max quantizer, and of one whose evenly spaced levels are as far apart as is best, E[ŷ²] = E[y ŷ] =
    1 − MSE, so ŷ = (1 − MSE) y + an error of variance MSE (1 − MSE). (Behind the gain of B that is MSE / (1 − MSE).)
    A channel without codes is off by itself.
    """
    error = ERRORS[codebook]
    return torch.cat(
        [torch.full((width,), error[bits] * (1.0 - error[bits]) if bits else 1.0) for bits, width in parts]
    )


@dataclass(frozen=True, eq=False)
class Mean:
    """Of the rows of a stream, as src/FORMAT.md section 6 takes it off.

    Attributes:
        shift: [H, D].
        shift_sine, frequencies: of one that turns, [H, D] and float32 [D].
    """

    shift: Tensor
    shift_sine: Tensor | None = None
    frequencies: Tensor | None = None

    def plan(
        self, parts: Parts, matrix: Tensor, inverse: Tensor, *, noise: bool, codebook: str = "lloyd-max"
    ) -> StreamPlan:
        """Of rows of parts about it, with M and B float32 [H, D, D]."""
        return StreamPlan(
            StreamOptions(parts=parts, codebook=codebook),
            shift=self.shift.float(),
            shift_sine=None if self.shift_sine is None else self.shift_sine.float(),
            frequencies=self.frequencies,
            matrix=matrix,
            inverse=inverse,
            noise=noise_of(parts, codebook) if noise else None,
        )


@dataclass(frozen=True, eq=False)
class Objective:
    """What errors of one stream of one layer cost.

    Attributes:
        weight: float64 [H, D, D].
        unit: what costs are divided by.
    """

    weight: Tensor
    unit: float


@dataclass(frozen=True, eq=False)
class StreamFit:
    """One stream of one layer, fitted up to its bits.

    Attributes:
        own: the objective that the transform is fitted to.
        output: the squared error of the attention output, relative to its power; None if it was not asked for.
        static_variance, variance: of the channels about the static mean and about the mean that is used [H, D].
        mean: that mean.
        codebook: of the parts.
    """

    spectrum: Spectrum
    own: Objective
    output: Objective | None
    static_variance: Tensor
    variance: Tensor
    mean: Mean
    codebook: str = "lloyd-max"

    @property
    def shape(self) -> tuple[int, int]:
        """Kv heads and channels."""
        return self.variance.shape[0], self.variance.shape[1]

    def candidates(self, parts: int, objective: Objective) -> list[Candidate]:
        """What the stream may be given, with costs by the objective."""
        costs = self.spectrum.costs(self.spectrum.harm(objective.weight), self.codebook)
        return candidates(self.shape[1], parts, lambda x: costs(x) / objective.unit)

    def chain(self, objective: Objective, bits: float, parts: Parts) -> Chain:
        """Predicted costs, those before the parts with equal `bits`."""
        harm, equal = self.spectrum.harm(objective.weight), equal_error(bits, self.codebook)
        diagonal = objective.weight.diagonal(dim1=-2, dim2=-1)
        costs = (
            equal * float((diagonal * self.static_variance).sum()),
            equal * float((diagonal * self.variance).sum()),
            equal * float((self.spectrum.spread.mean(-1) * harm.sum(-1)).sum()),
            self.spectrum.cost(parts, harm, self.codebook),
        )
        return Chain(*(cost / objective.unit for cost in costs))

    def plan(self, parts: Parts, *, noise: bool) -> StreamPlan:
        """With bits."""
        matrices = self.spectrum.matrices(parts, self.codebook)
        return self.mean.plan(parts, *matrices, noise=noise, codebook=self.codebook)

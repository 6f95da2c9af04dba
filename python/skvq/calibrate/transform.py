"""The linear transform of a head's rows that costs attention least: fitted from second moments, in closed form.

Is: mathematics on matrices [D, D] in float64. Is not: collection of the moments (collect.py) or a plan (plan_file.py).

A row x is stored as ŷ = Q(M (x - μ)) and read as M⁻¹ ŷ + μ. A quantizer with one scale for the row and equal bits for
every channel adds an error of about the same variance to every channel of M x, in proportion to the mean variance
there: tr(M S Mᵀ) / D, with S the covariance of the rows about the mean of their block. What the error costs is
measured by a weight W: for keys the second moment of the queries, E[q qᵀ], since a score is off by q·e; for values
what the output projection makes of an error, Σ Wₒᵀ Wₒ over the query heads that share the kv head. So

    cost(M) = tr(W M⁻¹ M⁻ᵀ) · tr(M S Mᵀ) / D

which depends on M through A = Mᵀ M only and is least at A = S^-½ (S^½ W S^½)^½ S^-½ (the geometric mean of S⁻¹ and W).
An orthogonal factor from the left is free: eigenvectors of the covariance, then a flat rotation, give every channel
the same variance, which is what a quantizer with one scale wants.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from .._native import SkvqError
from ..reference import hadamard

SMALLEST_EIGENVALUE = 1e-10  # of the largest, in a square root: what the moments cannot tell apart from nothing


def power(matrix: Tensor, exponent: float) -> Tensor:
    """A symmetric positive matrix [..., D, D] to a real power, its smallest eigenvalues raised to a floor."""
    values, vectors = torch.linalg.eigh(matrix)
    floor = values.amax(-1, keepdim=True) * SMALLEST_EIGENVALUE
    return (vectors * values.clamp(min=floor)[..., None, :] ** exponent) @ vectors.mT


def factor_and_inverse(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """F with F Fᵀ = a symmetric positive matrix [D, D], its smallest eigenvalues raised as in `power`, and F⁻¹.

    Cholesky's factor where no eigenvalue is that small, which takes a tenth of the time of an eigendecomposition.
    """
    upper, failed = torch.linalg.cholesky_ex(matrix, upper=True)  # as MKL is faster, here and in an eigendecomposition
    if not int(failed):
        unit = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        factor, inverse = upper.mT, torch.linalg.solve_triangular(upper.mT, unit, upper=False)
        # |F⁻¹|² is at least one over the smallest eigenvalue, the trace at least the largest
        if SMALLEST_EIGENVALUE * float(torch.linalg.vector_norm(inverse)) ** 2 * float(matrix.trace()) < 1.0:
            return factor, inverse
    values, vectors = torch.linalg.eigh(matrix)
    root = values.clamp(min=values[-1:] * SMALLEST_EIGENVALUE).sqrt()
    return vectors * root, (vectors / root).mT


@lru_cache
def flat_rotation(head_dim: int) -> Tensor:
    """An orthogonal matrix [D, D], float64 on the CPU, whose entries have (nearly) one magnitude: Hadamard where D is a
    power of two, otherwise Hartley's. Not to be written into: there is one of every size.
    """
    if head_dim & (head_dim - 1) == 0:
        return hadamard(torch.eye(head_dim, device="cpu")).sign().to(torch.float64) / math.sqrt(head_dim)
    steps = torch.arange(head_dim, dtype=torch.float64, device="cpu")
    angles = 2.0 * math.pi / head_dim * steps[:, None] * steps
    return (angles.cos() + angles.sin()) / math.sqrt(head_dim)


def damped(moment: Tensor, damping: float) -> Tensor:
    """`moment` [..., D, D] plus `damping` times its mean diagonal on the diagonal, float64; an all-zero one becomes the
    unit.
    """
    moment = moment.to(torch.float64, copy=True)
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    diagonal.add_(mean, alpha=damping)
    if bool((mean > 0.0).all()):
        return moment
    unit = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    return torch.where(mean[..., None] > 0.0, moment, unit)


def damped_diagonal(moment: Tensor, damping: float) -> Tensor:
    """The diagonal of `damped`, float64 [..., D]."""
    diagonal = moment.diagonal(dim1=-2, dim2=-1).double()
    mean = diagonal.mean(-1, keepdim=True)
    return torch.where(mean > 0.0, diagonal + damping * mean, 1.0)


def cost(matrix: Tensor, covariance: Tensor, weight: Tensor) -> Tensor:
    """The cost [...] above of transforms [..., D, D]."""
    inverse = torch.linalg.inv(matrix)
    spread = (matrix @ covariance @ matrix.mT).diagonal(dim1=-2, dim2=-1).sum(-1)
    harm = (inverse.mT @ weight @ inverse).diagonal(dim1=-2, dim2=-1).sum(-1)
    return harm * spread / matrix.shape[-1]


def balanced_transform(covariance: Tensor, weight: Tensor, damping: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Transforms of least cost and their inverses, float64 [..., D, D], one for every leading index.

    The transform is scaled so that a transformed row has unit variance per channel.

    Args:
        covariance: of the rows about the mean of their block, [..., D, D].
        weight: what an error costs, [..., D, D].
        damping: share of the mean diagonal that is added to both, so that directions without data stay harmless.

    Raises:
        SkvqError: shapes differ, are not square, or a number is not finite.
    """
    for name, moment in (("covariance", covariance), ("weight", weight)):
        if moment.ndim < 2 or moment.shape[-1] != moment.shape[-2] or moment.shape != covariance.shape:
            raise SkvqError(f"{name}: shape {tuple(moment.shape)}, expected {tuple(covariance.shape)} and square")
        if not bool(torch.isfinite(moment).all()):
            raise SkvqError(f"{name}: has NaN or infinity, expected finite numbers")
    s, w = (damped(0.5 * (moment + moment.mT), damping) for moment in (covariance, weight))
    root, inverse_root = power(s, 0.5), power(s, -0.5)
    mean = inverse_root @ power(root @ w @ root, 0.5) @ inverse_root
    half = power(mean, 0.5)
    spread = half @ s @ half
    _, vectors = torch.linalg.eigh(0.5 * (spread + spread.mT))
    matrix = flat_rotation(s.shape[-1]).to(s.device) @ vectors.mT @ half
    variance = (matrix @ s @ matrix.mT).diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    matrix = matrix / variance.sqrt()
    return matrix, torch.linalg.inv(matrix)

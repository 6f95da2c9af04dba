"""The closed-form transform of calibration: optimal, flat, and safe with what has no data."""

from __future__ import annotations

import pytest
import torch

from skvq import SkvqError
from skvq.calibrate.transform import balanced_transform, cost, damped, flat_rotation, power


def moment(dim: int, seed: int, spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(dim, dim, dtype=torch.float64, generator=generator)
    scales = torch.exp(spread * torch.randn(dim, dtype=torch.float64, generator=generator))
    return basis @ torch.diag(scales) @ basis.T / dim


@pytest.mark.parametrize("dim", [16, 64, 80, 96, 112, 128])
def test_flat_rotation_is_orthogonal_and_flat(dim: int) -> None:
    rotation = flat_rotation(dim)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(dim, dtype=torch.float64), atol=1e-7, rtol=0)
    assert float(rotation.abs().max()) <= (2.0 / dim) ** 0.5 + 1e-6


@pytest.mark.parametrize(("dim", "seed"), [(16, 0), (64, 1), (80, 2)])
def test_no_other_transform_costs_less(dim: int, seed: int) -> None:
    covariance, weight = moment(dim, seed), moment(dim, seed + 100)
    matrix, inverse = balanced_transform(covariance, weight, damping=0.0)
    torch.testing.assert_close(matrix @ inverse, torch.eye(dim, dtype=torch.float64), atol=1e-6, rtol=0)
    best = float(cost(matrix, covariance, weight))
    # The least possible: the squared nuclear norm of S^1/2 W^1/2, over D.
    least = float(torch.linalg.svdvals(power(covariance, 0.5) @ power(weight, 0.5)).sum() ** 2) / dim
    assert best == pytest.approx(least, rel=1e-4)
    diagonal = torch.diag((weight.diagonal() / covariance.diagonal()) ** 0.25)
    for other in (torch.eye(dim, dtype=torch.float64), diagonal, power(covariance, -0.5)):
        assert best < float(cost(other, covariance, weight))
    for step in range(8):
        noise = torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        assert best < float(cost(matrix + 0.02 * matrix.abs().mean() * noise, covariance, weight))


@pytest.mark.parametrize("dim", [64, 96, 128])
def test_transformed_channels_share_one_variance(dim: int) -> None:
    covariance, weight = moment(dim, 3), moment(dim, 4)
    matrix, _ = balanced_transform(covariance, weight)
    variance = (matrix @ damped(covariance, 1e-3) @ matrix.T).diagonal()
    assert float(variance.mean()) == pytest.approx(1.0, rel=1e-9)
    spread = float(variance.max() / variance.min())
    assert spread < (1.001 if dim & (dim - 1) == 0 else 2.5)


def test_heads_are_fitted_apart_and_dead_channels_are_harmless() -> None:
    covariance = torch.stack([moment(32, 5), moment(32, 6), torch.zeros(32, 32, dtype=torch.float64)])
    weight = torch.stack([moment(32, 7), moment(32, 8), moment(32, 9)])
    covariance[1, :4] = covariance[1, :, :4] = 0.0
    weight[1, :4] = weight[1, :, :4] = 0.0
    matrix, inverse = balanced_transform(covariance, weight)
    assert bool(torch.isfinite(matrix).all())
    assert bool(torch.isfinite(inverse).all())
    alone, _ = balanced_transform(covariance[0], weight[0])
    torch.testing.assert_close(matrix[0], alone)


def test_wrong_moments_are_refused() -> None:
    good = moment(16, 1)
    with pytest.raises(SkvqError, match="weight: shape"):
        balanced_transform(good, moment(32, 1))
    broken = good.clone()
    broken[0, 0] = float("nan")
    with pytest.raises(SkvqError, match="covariance: has NaN"):
        balanced_transform(broken, good)

"""Rounding that makes up for itself: against GPTQ written plainly in float64, and what it is for."""

import pytest
import torch

from skvq import SkvqError
from skvq.weights import ReconstructOptions, WeightOptions, reconstruct
from skvq.weights.compensation import DAMPING, compensate
from skvq.weights.grid import encode, fake_quantize, grid, ranges, round_to_grid
from tiny_models import build, prompts


def inputs(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """Correlated, as those of a trained model are, with channels of unlike size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) * torch.logspace(0, -1, width)[:, None] / width**0.5
    noise = 0.05 * torch.randn(rows, width, generator=generator)
    sizes = torch.rand(width, generator=generator) + 0.2
    return (torch.randn(rows, width, generator=generator) @ mix + noise) * sizes


def weight(outputs: int, width: int) -> torch.Tensor:
    return torch.randn(outputs, width, generator=torch.Generator().manual_seed(3))


def plain_gptq(
    w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, moment: torch.Tensor, options: WeightOptions
) -> torch.Tensor:
    """ŵ by the optimal update after every single column, the inverse shrunk by elimination, in float64."""
    w, moment = w.double().clone(), moment.double()
    width = w.shape[1]
    order = moment.diagonal().argsort(descending=True)
    inverse = torch.linalg.inv(moment + DAMPING * moment.diagonal().mean() * torch.eye(width))
    made = torch.empty_like(w)
    left = torch.ones(width, dtype=torch.bool)
    for column in order.tolist():
        group = column // options.group_size
        made[:, column] = round_to_grid(w[:, column], scale[:, group].double(), zero[:, group].double(), options.levels)
        error = (w[:, column] - made[:, column]) / inverse[column, column]
        left[column] = False
        w[:, left] -= error[:, None] * inverse[column, left]
        row = inverse[column].clone()
        inverse = inverse - torch.outer(row, row) / row[column]
    return made


@pytest.mark.parametrize(("bits", "width"), [(4, 96), (3, 160), (8, 64)])
def test_it_is_gptq(bits: int, width: int) -> None:
    options, w, x = WeightOptions(bits, 32), weight(24, width), inputs(300, width)
    moment = x.T @ x / len(x)
    scale, zero = grid(w, options)
    ours = encode(compensate(w, options, scale, zero, moment), options, known=ranges(w, options)).dequantize()
    theirs = plain_gptq(w, scale, zero, moment, options).float()
    same = torch.isclose(ours, theirs, rtol=0.0, atol=1e-5)
    # one code that falls to the other side in float32 changes what is put onto the columns behind it
    assert float(same.float().mean()) > 0.98
    error, reference = (((q - w) @ x.T).square().mean() for q in (ours, theirs))
    assert float(error) == pytest.approx(float(reference), rel=0.02)


def test_outputs_are_closer_than_by_nearest_on_inputs_that_were_not_seen() -> None:
    options, w = WeightOptions(3, 32), weight(32, 128)
    x, held = inputs(2000, 128).split(1000)
    scale, zero = grid(w, options)
    made = encode(compensate(w, options, scale, zero, x.T @ x / len(x)), options, known=ranges(w, options))
    nearest = encode(w, options)
    errors = [((q.dequantize() - w) @ held.T).square().mean() for q in (made, nearest)]
    assert float(errors[0]) < 0.6 * float(errors[1])


def test_training_begins_with_the_compensated_codes() -> None:
    options, w, x = WeightOptions(4, 32), weight(16, 64), inputs(200, 64)
    clips = torch.full((16, 2), 2.0)
    scale, zero = grid(w, options, clips, clips)
    moved, known = compensate(w, options, scale, zero, x.T @ x / len(x)), ranges(w, options)
    trained = fake_quantize(moved, options, clips, clips, known)
    assert torch.equal(trained, encode(moved, options, clips, clips, known=known).dequantize())
    assert not torch.equal(trained, encode(w, options, clips, clips).dequantize())


def test_inputs_that_are_always_zero_or_alike() -> None:
    options, w, x = WeightOptions(4, 32), weight(16, 64), inputs(200, 64)
    x[:, 5], x[:, 40] = 0.0, x[:, 41]
    for moment in (x.T @ x / len(x), torch.zeros(64, 64)):
        scale, zero = grid(w, options)
        moved = compensate(w, options, scale, zero, moment)
        assert bool(torch.isfinite(moved).all())
    torch.testing.assert_close(moved, w)  # nothing is known: nothing is put anywhere


@pytest.mark.parametrize("moment", [torch.eye(32), torch.full((64, 64), torch.nan)])
def test_moments_that_cannot_be(moment: torch.Tensor) -> None:
    options, w = WeightOptions(4, 32), weight(16, 64)
    with pytest.raises(SkvqError, match=r"moment: got .* expected \(64, 64\) finite mean products"):
        compensate(w, options, *grid(w, options), moment)


def test_a_moment_that_is_not_positive() -> None:
    options, w = WeightOptions(4, 32), weight(16, 64)
    with pytest.raises(SkvqError, match="positive definite once damped"):
        compensate(w, options, *grid(w, options), torch.diag(torch.tensor([100.0, -90.0] * 32)))


@pytest.mark.parametrize("epochs", [0, 2])
def test_blocks_of_a_model(epochs: int) -> None:
    """Their losses on the calibration texts are below those of rounding to nearest."""
    losses = []
    for rounding in ("nearest", "compensated"):
        options = ReconstructOptions(epochs=epochs, rounding=rounding, loss="mse", ahead=0)
        found = reconstruct(build("qwen3"), prompts(4, 32), WeightOptions(3, 32), options)
        losses.append([row["after"] for row in found.log])
    assert all(made < nearest for nearest, made in zip(*losses, strict=True))

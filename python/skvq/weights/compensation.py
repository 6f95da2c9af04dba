"""Rounding that makes up for itself (GPTQ, arXiv 2210.17323): the error of one input is put onto those not yet rounded.

Is: for one linear layer, the weight as it is right before each of its columns is rounded, so that rounding *that*
weight to nearest on the same grid gives the compensated codes; clips can be trained from there. Columns are taken in
falling order of their inputs' mean square, groups stay where they are. Is not: the grid (grid.py).
Shapes: weight float32 [O, I], scale and zero [O, G], moment float32 [I, I], the mean of x·xᵀ over calibration inputs x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._native import SkvqError
from .grid import WeightOptions, round_to_grid

DAMPING = 0.01  # of the mean of the moment's diagonal, added to it
MOST_DAMPING = 1.0
COLUMNS = 128  # whose errors reach the columns behind them in one product


def compensate(weight: Tensor, options: WeightOptions, scale: Tensor, zero: Tensor, moment: Tensor) -> Tensor:
    """The weight [O, I] whose rounding to the nearest level of `scale` and `zero` compensates for itself.

    Raises:
        SkvqError: the moment is not finite, or not of the weight's inputs.
    """
    inputs = weight.shape[1]
    if moment.shape != (inputs, inputs) or not bool(torch.isfinite(moment).all()):
        raise SkvqError(
            f"moment: got {tuple(moment.shape)}, expected ({inputs}, {inputs}) finite mean products of the inputs"
        )
    with torch.no_grad():
        order = moment.diagonal().argsort(descending=True)
        factor = _factor(moment[order][:, order])
        group = order // options.group_size
        left, rounded_from = weight.float()[:, order], torch.empty_like(weight, dtype=torch.float32)
        for first in range(0, inputs, COLUMNS):
            last = min(first + COLUMNS, inputs)
            block, part = left[:, first:last].clone(), factor[first:last, first:last]
            errors = torch.empty_like(block)
            for i in range(last - first):
                column, at = block[:, i].clone(), group[first + i]
                rounded_from[:, order[first + i]] = column
                made = round_to_grid(column, scale[:, at], zero[:, at], options.levels)
                errors[:, i] = (column - made) / part[i, i]
                block[:, i + 1 :].addr_(errors[:, i], part[i, i + 1 :], alpha=-1.0)
            left[:, last:].addmm_(errors, factor[first:last, last:], alpha=-1.0)
        return rounded_from


def _factor(moment: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped moment's inverse."""
    mean = float(moment.diagonal().mean())
    damping = DAMPING
    while damping <= MOST_DAMPING:
        damped = moment + torch.eye(moment.shape[0], device=moment.device) * (damping * mean if mean > 0.0 else 1.0)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed) and bool(torch.isfinite(upper).all()):
                return upper
        damping *= 10.0
    raise SkvqError("moment: expected mean products of inputs, which are positive definite once damped")

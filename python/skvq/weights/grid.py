"""The grid of quantized weights: groups of one output channel's inputs between a clipped minimum and maximum.

Is: scale and zero point of every group, codes, and the same in a differentiable form for training the clips
(straight-through: rounding passes gradients on, as in OmniQuant's learnable weight clipping).
Is not: which clips (reconstruction.py), or how codes lie on disk (packing.py).
Shapes: weight float32 [O, I], groups of `group_size` inputs G = I / group_size, scale, zero and clips float32 [O, G],
codes uint8 [O, I].

    high = σ(h) · max(w, 0)    low = σ(l) · min(w, 0)    scale = bf16((high − low) / (2^bits − 1))
    zero = round(−low / scale)    code = clamp(round(w / scale + r) + zero, 0, 2^bits − 1)    ŵ = (code − zero) · scale

r is 0, or between −1/2 and 1/2 where rounding is learnt (as in SignRound, arXiv 2309.05516).

The scale is rounded to bfloat16, so that a checkpoint means the same in every dtype it is loaded in, and 0 is always on
the grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._native import SkvqError

BITS = (3, 4, 6, 8)
OPEN_CLIP = 4.0  # OmniQuant's first logit: σ(4) = 0.982
SMALLEST_SCALE = 2.0**-24
SEARCHED = tuple(1.0 - 0.02 * step for step in range(26))  # fractions of the range that `search_clips` tries


@dataclass(frozen=True)
class WeightOptions:
    """How weights are quantized.

    Attributes:
        bits: of a code: 3, 4, 6 or 8.
        group_size: inputs of one output channel that share scale and zero point; it must divide the inputs of every
            quantized linear layer.

    Raises:
        SkvqError: another number of bits, or a group size that is not a positive multiple of 32.
    """

    bits: int = 4
    group_size: int = 128

    def __post_init__(self) -> None:
        if self.bits not in BITS or isinstance(self.bits, bool):
            raise SkvqError(f"bits={self.bits!r}: expected one of {', '.join(map(str, BITS))}")
        if not isinstance(self.group_size, int) or self.group_size < 32 or self.group_size % 32:
            raise SkvqError(f"group_size={self.group_size!r}: expected a positive multiple of 32")

    @property
    def levels(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    @property
    def bits_per_weight(self) -> float:
        """Codes, a 16-bit scale and a zero point of `bits` bits for every group."""
        return self.bits + (16 + self.bits) / self.group_size

    def check(self, name: str, weight: Tensor) -> None:
        """Raise SkvqError if the weight [O, I] of the layer `name` cannot be cut into groups."""
        inputs = weight.shape[1]
        if weight.ndim != 2 or inputs % self.group_size:
            fitting = [size for size in (32, 64, 96, 128, 256) if inputs % size == 0]
            expected = f"one of {', '.join(map(str, fitting))}" if fitting else "to leave this layer out (ignore)"
            raise SkvqError(
                f"group_size={self.group_size}: {name} has {inputs} inputs, which it does not divide: "
                f"expected {expected}"
            )


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """One weight as stored.

    Attributes:
        codes: uint8 [O, I].
        scale: float32 [O, G], exact in bfloat16.
        zero: uint8 [O, G].
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor

    @property
    def group_size(self) -> int:
        """Inputs of a group."""
        return self.codes.shape[1] // self.scale.shape[1]

    def to(self, device: torch.device) -> QuantizedWeight:
        """On a device."""
        return QuantizedWeight(self.codes.to(device), self.scale.to(device), self.zero.to(device))

    def dequantize(self) -> Tensor:
        """ŵ float32 [O, I], in the arithmetic of compressed-tensors."""
        groups = self.codes.unflatten(1, (-1, self.group_size)).float()
        return ((groups - self.zero[..., None].float()) * self.scale[..., None]).flatten(1)


class _RoundSTE(torch.autograd.Function):
    """round(x), or x in bfloat16, whose gradient is that of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, to_bfloat16: bool) -> Tensor:
        return x.bfloat16().float() if to_bfloat16 else x.round()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None


class _FakeQuantize(torch.autograd.Function):
    """ŵ of groups w and offsets r (or None) [O, G, g] with scale and zero [O, G, 1]; gradients for all but w.

    Written out because autograd would hold five tensors of the weight's size where two do. With v = w / scale:
    inside the grid ∂ŵ/∂scale = round(v + r) − v, ∂ŵ/∂zero = 0 and ∂ŵ/∂r = scale, beyond it code − zero, −scale and 0.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, zero: Tensor, offset: Tensor | None, levels: int) -> Tensor:
        steps = _codes(weight, scale, zero, offset).clamp_(0, levels).sub_(zero)
        ctx.save_for_backward(weight, scale, zero, offset)
        ctx.levels = levels
        return steps.mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        weight, scale, zero, offset = ctx.saved_tensors
        gradient, codes = gradients[0], _codes(weight, scale, zero, offset)
        held = codes.clamp(0, ctx.levels)
        outside = held != codes
        by_scale = held.sub_(zero).sub_((weight / scale).masked_fill_(outside, 0.0))
        for_scale = (gradient * by_scale).sum(-1, keepdim=True)
        for_zero = -scale * (gradient * outside).sum(-1, keepdim=True)
        for_offset = None if offset is None else (gradient * scale).masked_fill_(outside, 0.0)
        return None, for_scale, for_zero, for_offset, None


def round_to_grid(weight: Tensor, scale: Tensor, zero: Tensor, levels: int) -> Tensor:
    """ŵ of weights with scale and zero of their own shape."""
    return _codes(weight, scale, zero, None).clamp_(0, levels).sub_(zero).mul_(scale)


def _codes(weight: Tensor, scale: Tensor, zero: Tensor, offset: Tensor | None) -> Tensor:
    """Codes before they are held within the levels."""
    steps = weight / scale
    if offset is not None:
        steps.add_(offset)
    return steps.round_().add_(zero)


def _ranges(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Groups [O, G, g], their minimum (at most 0) and maximum (at least 0) [O, G, 1]."""
    groups = weight.unflatten(1, (-1, group_size))
    return groups, groups.amin(-1, keepdim=True).clamp(max=0.0), groups.amax(-1, keepdim=True).clamp(min=0.0)


def ranges(weight: Tensor, options: WeightOptions) -> tuple[Tensor, Tensor]:
    """Minimum (at most 0) and maximum (at least 0) of every group, [O, G, 1]."""
    return _ranges(weight, options.group_size)[1:]


def _grid(low: Tensor, high: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Scale and zero, differentiable."""
    scale = _RoundSTE.apply(((high - low) / levels).clamp(min=SMALLEST_SCALE), True)
    zero = _RoundSTE.apply(-low / scale, False).clamp(0, levels)
    return scale, zero


def grid(
    weight: Tensor,
    options: WeightOptions,
    low_clip: Tensor | None = None,
    high_clip: Tensor | None = None,
    known: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale and zero [O, G] of a weight float32 [O, I] with clips, or of its whole ranges; `known` as in `encode`."""
    low, high = ranges(weight, options) if known is None else known
    if low_clip is not None:
        low = low * low_clip.sigmoid()[..., None]
    if high_clip is not None:
        high = high * high_clip.sigmoid()[..., None]
    scale, zero = _grid(low, high, options.levels)
    return scale[..., 0], zero[..., 0]


def fake_quantize(
    weight: Tensor,
    options: WeightOptions,
    low_clip: Tensor,
    high_clip: Tensor,
    known: tuple[Tensor, Tensor] | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """ŵ float32 [O, I] with gradients for the clips, logits of fractions of minimum and maximum [O, G].

    `known`: the weight's `ranges`, if they are known already. `offset`: r [O, I], which gets a gradient too.
    """
    groups = weight.unflatten(1, (-1, options.group_size))
    scale, zero = (x[..., None] for x in grid(weight, options, low_clip, high_clip, known))
    offsets = None if offset is None else offset.unflatten(1, (-1, options.group_size))
    made: Tensor = _FakeQuantize.apply(groups, scale, zero, offsets, options.levels)
    return made.flatten(1)


def encode(
    weight: Tensor,
    options: WeightOptions,
    low_clip: Tensor | None = None,
    high_clip: Tensor | None = None,
    offset: Tensor | None = None,
    known: tuple[Tensor, Tensor] | None = None,
) -> QuantizedWeight:
    """The weight float32 [O, I] as stored; round-to-nearest between minimum and maximum without clips and offsets.

    `known`: ranges to clip, where they are not the weight's own.

    Raises:
        SkvqError: a weight that is not finite, or that the group size does not fit.
    """
    options.check("the weight", weight)
    if not bool(torch.isfinite(weight).all()):
        raise SkvqError("weight: expected finite numbers, got a NaN or an infinity")
    with torch.no_grad():
        groups = weight.float().unflatten(1, (-1, options.group_size))
        scale, zero = (x[..., None] for x in grid(weight.float(), options, low_clip, high_clip, known))
        offsets = None if offset is None else offset.unflatten(1, (-1, options.group_size))
        codes = _codes(groups, scale, zero, offsets).clamp_(0, options.levels)
        return QuantizedWeight(codes.to(torch.uint8).flatten(1), scale[..., 0].clone(), zero[..., 0].to(torch.uint8))


def search_clips(weight: Tensor, options: WeightOptions, importance: Tensor, trainable: bool) -> tuple[Tensor, Tensor]:
    """Clips (logits, [O, G] each) of the least Σ importance · (ŵ − w)², one fraction for both ends of a group.

    Args:
        weight: float32 [O, I].
        options: of the grid.
        importance: float32 [I], the mean square of every input on calibration texts.
        trainable: no logit above OPEN_CLIP, where the gradient of σ vanishes.
    """
    with torch.no_grad():
        groups, low, high = _ranges(weight, options.group_size)
        weights = importance.float().unflatten(0, (-1, options.group_size))
        best = torch.full(groups.shape[:2], torch.inf, device=weight.device)
        chosen = torch.ones_like(best)
        for share in SEARCHED:
            scale, zero = _grid(low * share, high * share, options.levels)
            made = round_to_grid(groups, scale, zero, options.levels)
            error = made.sub_(groups).square_().mul_(weights).sum(-1)
            better = error < best
            best, chosen = torch.where(better, error, best), chosen.masked_fill(better, share)
        logit = torch.logit(chosen)
        if trainable:
            logit = logit.clamp(max=OPEN_CLIP)
        return logit, logit.clone()

"""The mean of keys that a model rotates by their position, and the moments of keys about it.

Is: `Turning`, the rotation R_t of a rotary embedding as R_t m = m·cos(θ t) + (Jm)·sin(θ t), with a frequency θ for
every channel and J the quarter-turn, a permutation with signs (src/FORMAT.md section 6); `find_turning`, which reads
both from a model's own rotation; `TurnedMoments`, streaming sums about R_t μ. Is not: the pass over texts (collect.py).
Shapes: rows float32 [H, n, D], their positions int64 [n]; matrices float64 [H, D, D].
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .._native import SkvqError
from ..evaluate.rope import Rope

# Positions 2^k: a float32 product of such a position and a frequency is exact, so the angles there tell the frequency
# to the last bit. Far positions also show rotations that change with the length, such as dynamic NTK and longrope.
DOUBLINGS = 20
ANGLE_TOLERANCE = 1e-5  # of an angle that is known to about 4e-7
PROBES = (1, 100, 5000)


@dataclass(frozen=True, eq=False)
class Turning:
    """A rotation by the position.

    Attributes:
        frequencies: θ, float32 [D]; 0 for a channel that is not rotated.
        partner: the channel that each is rotated with, int64 [D]; itself where it is not rotated.
        sign: of the partner in the quarter-turn, float32 [D]: (Jm)_c = sign_c · m_partner(c); 0 where not rotated.
    """

    frequencies: Tensor
    partner: Tensor
    sign: Tensor

    def to(self, device: torch.device) -> Turning:
        """On another device."""
        return Turning(*(getattr(self, field.name).to(device) for field in fields(self)))

    def quarter(self, rows: Tensor) -> Tensor:
        """J of rows [..., D]."""
        return rows[..., self.partner] * self.sign.to(rows.dtype)

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos(θ t) and sin(θ t) of the positions int64 [n], float64 [n, D]."""
        angles = positions.to(self.frequencies.device, torch.float64)[:, None] * self.frequencies.double()
        return angles.cos(), angles.sin()

    def matrix(self, position: int) -> Tensor:
        """R_t, float64 [D, D]."""
        cos, sin = self.tables(torch.tensor([position]))
        unit = torch.eye(self.frequencies.numel(), dtype=torch.float64, device=self.frequencies.device)
        return (unit * cos + self.quarter(unit) * sin).mT


@torch.no_grad()
def find_turning(rope: Rope, head_dim: int, device: torch.device | None = None) -> Turning:
    """The frequencies and the quarter-turn of a model's rotation, checked against it.

    A factor that the model multiplies keys by on the way (attention_scaling) is left to the mean, which is taken of
    rotated keys.

    Raises:
        ValueError: the rotation is not one of pairs of channels by an angle in proportion to the position.
    """
    device = device or torch.device("cpu")
    doublings = [2**doubling for doubling in range(1, DOUBLINGS + 1)]
    at = _matrices_at(rope, {1, *doublings, *PROBES}, head_dim, device)
    turning, factor = _first_guess(at[1])
    theta, sign = turning.frequencies.double(), turning.sign.double()
    for position in doublings:
        own, other = at[position].diagonal(), at[position].gather(1, turning.partner[:, None])[:, 0] * sign
        angle = torch.where(sign == 0.0, 0.0, torch.atan2(other, own)) - theta * position
        angle -= (angle / (2 * torch.pi)).round() * 2 * torch.pi
        if float(angle.abs().max()) > ANGLE_TOLERANCE:
            raise ValueError(f"the angles at position {position} are not in proportion to the position")
        theta = theta + angle / position
    turning = Turning(theta.float(), turning.partner, turning.sign)
    for position in PROBES:
        error = _error_at(position, at[position], factor, turning)
        if error > _allowed_error(position, turning):
            raise ValueError(f"at position {position} it is off by {error:.2g}")
    return turning.to(device)


@torch.no_grad()
def still_turns(turning: Turning, rope: Rope) -> bool:
    """Whether the rotation is the one that was found before: near, at the farthest position that was looked at, where
    frequencies show, and between.
    """
    device, dim = turning.frequencies.device, turning.frequencies.numel()
    far = 2**DOUBLINGS
    at = _matrices_at(rope, {1, PROBES[-1], far}, dim, device)
    factor, known = torch.linalg.vector_norm(at[1], dim=1), turning.to(torch.device("cpu"))
    allowed = {x: _allowed_error(x, known) for x in PROBES} | {far: ANGLE_TOLERANCE}
    return all(_error_at(x, matrix, factor, known) <= allowed[x] for x, matrix in at.items())


def _matrices_at(rope: Rope, positions: Collection[int], head_dim: int, device: torch.device) -> dict[int, Tensor]:
    """What the model does to a row at each position, which it sees alone, float64 [D, D] on the CPU."""
    rows = torch.eye(head_dim, device=device)[None, :, None]
    matrices = torch.stack([rope.forward(rows, position)[0, :, 0].mT for position in positions]).cpu().double()
    return dict(zip(positions, matrices, strict=True))


def _error_at(position: int, matrix: Tensor, factor: Tensor, turning: Turning) -> float:
    """By how much the rotation is off that gave the matrix, with the factors of channels."""
    return float((matrix / factor[:, None] - turning.matrix(position)).abs().max())


def _allowed_error(position: int, turning: Turning) -> float:
    """float32 angles are known to half a unit in the last place, tables to another."""
    return (position * float(turning.frequencies.max()) + 8.0) * 2.0**-23


def _first_guess(first: Tensor) -> tuple[Turning, Tensor]:
    """Pairs, signs, roughly the frequencies and the factor of every channel, from the matrix at position 1."""
    own = first.diagonal()
    others = first - torch.diag(own)
    if int((others != 0.0).sum(1).max()) > 1:
        raise ValueError("it mixes more than two channels, expected pairs")
    channels = torch.arange(first.shape[0], device=first.device)
    rotated = (others != 0.0).any(1)
    partner = torch.where(rotated, (others != 0.0).int().argmax(1), channels)
    value = others.gather(1, partner[:, None])[:, 0]
    sign = value.sign()
    turning = Turning(torch.atan2(value.abs(), own).where(rotated, 0.0).float(), partner, sign.float())
    if not torch.equal(partner[partner], channels) or not torch.equal(sign[partner], -sign):
        raise ValueError("channels are not rotated in pairs")
    return turning, torch.hypot(own, value)


@dataclass
class TurnedMoments:
    """Moments of one layer's rotated keys about R_t μ, μ the mean of the keys before the rotation; all tensors.

    Rows are summed about the reference R_t μ₀, with μ₀ the mean of the first chunk; what μ differs from μ₀ by is
    corrected exactly when the sums are read, since the sums with cos(θ t) and sin(θ t) are kept too. A factor of the
    rotation is part of μ.

    Attributes:
        count: rows, int64 [].
        frequencies, partner, sign: the rotation.
        reference: μ₀ [H, D].
        comoment: Σ z zᵀ with z = x − R_t μ₀ [H, D, D].
        cross: Σ z (cos(θ t), sin(θ t))ᵀ [H, D, 2D].
        turns: Σ (cos, sin)(cos, sin)ᵀ over the same rows [2D, 2D].
    """

    count: Tensor
    frequencies: Tensor
    partner: Tensor
    sign: Tensor
    reference: Tensor
    comoment: Tensor
    cross: Tensor
    turns: Tensor

    @classmethod
    def empty(cls, heads: int, turning: Turning) -> TurnedMoments:
        """Of no rows."""
        dim = turning.frequencies.numel()
        wide: dict[str, Any] = {"dtype": torch.float64, "device": turning.frequencies.device}
        return cls(
            count=torch.zeros((), dtype=torch.int64),
            frequencies=turning.frequencies,
            partner=turning.partner,
            sign=turning.sign,
            reference=torch.zeros(heads, dim, **wide),
            comoment=torch.zeros(heads, dim, dim, **wide),
            cross=torch.zeros(heads, dim, 2 * dim, **wide),
            turns=torch.zeros(2 * dim, 2 * dim, **wide),
        )

    @property
    def turning(self) -> Turning:
        """The rotation."""
        return Turning(self.frequencies, self.partner, self.sign)

    def update(self, keys: Tensor, positions: Tensor) -> None:
        """Add keys [H, n, D] of one chunk, after the rotation by their positions int64 [n]."""
        for field in fields(self):
            if field.name != "count":
                setattr(self, field.name, getattr(self, field.name).to(keys.device))
        cos, sin = self.turning.tables(positions)
        if int(self.count) == 0:
            self.reference = (keys * cos - self.turning.quarter(keys) * sin).mean(1)
        mean = self.reference[:, None] * cos + self.turning.quarter(self.reference)[:, None] * sin
        z, tables = (keys - mean).float(), torch.cat([cos, sin], dim=-1).float()
        self.comoment += (z.mT @ z).double()
        self.cross += (z.mT @ tables).double()
        self.turns += (tables.mT @ tables).double()
        self.count += keys.shape[1]

    @property
    def drift(self) -> Tensor:
        """μ − μ₀, float64 [H, D]: the mean of R_tᵀ z."""
        self._check_count()
        dim = self.frequencies.numel()
        cosine, sine = self.cross.split(dim, dim=-1)
        turned = sine[:, self.partner, torch.arange(dim, device=sine.device)] * self.sign.double()
        return (cosine.diagonal(dim1=1, dim2=2) - turned) / int(self.count)

    @property
    def mean(self) -> Tensor:
        """μ, float64 [H, D]."""
        return self.reference + self.drift

    @property
    def mean_sine(self) -> Tensor:
        """Jμ, what sin(θ t) multiplies, float64 [H, D]."""
        return self.turning.quarter(self.mean)

    @property
    def covariance(self) -> Tensor:
        """E[(x − R_t μ)(x − R_t μ)ᵀ], float64 [H, D, D]."""
        drift = self.drift
        # R_t δ as a map of (cos, sin): [H, D, 2D]
        change = torch.cat([torch.diag_embed(drift), torch.diag_embed(self.turning.quarter(drift))], dim=-1)
        cross = self.cross @ change.mT
        total: Tensor = self.comoment - cross - cross.mT + change @ self.turns @ change.mT
        return total / int(self.count)

    def _check_count(self) -> None:
        if int(self.count) == 0:
            raise SkvqError("statistics of no rows: expected longer or more chunks")


def turning_or_reason(
    rotary: Any, layer: int, head_dim: int, device: torch.device, known: Turning | None = None
) -> Turning | str:
    """The rotation of a layer, or why its mean cannot turn; `known` is what was found before, on the same device."""
    try:
        rope = rotary(layer)
        if known is not None and still_turns(known, rope):
            return known
        return find_turning(rope, head_dim, device)
    except (ValueError, RuntimeError, TypeError) as error:
        return f"rotation not known: {error}"

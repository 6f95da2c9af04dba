"""From statistics to a spectral plan: which moments are fitted, the bits of every layer, and what it should gain.

Is: the choice of mean, weights and objectives for keys and values, and the report of predicted costs. Is not: the
algebra (spectral.py) or the search for bits (allocate.py).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._native import SkvqError
from ..config import StreamOptions
from ..plan import StreamPlan
from .allocate import ERRORS, MSE, Candidate, Parts, Share, allocate, cheapest, even_if_few
from .moments import AttentionMoments, StreamMoments
from .output_weight import output_weight
from .side_by_side import side_by_side
from .spectral import Chain, Mean, Objective, Spectrum, StreamFit
from .statistics import LayerStatistics, Statistics
from .transform import damped, damped_diagonal
from .turning import TurnedMoments

WEIGHTS = ("query", "attention")
SCALE_BITS = 8  # one E4M3 scale for a row
RAW = 16.0
STREAMS = ("keys", "values")


@dataclass(frozen=True)
class SpectralOptions:
    """What is fitted.

    Attributes:
        key_bits, value_bits: mean bits of the codes of every layer, up to 5, or 16 to leave the rows as they are.
        bits: instead of both, counted bits of an element (with the scales) over all layers, keys and values together.
        parts: wanted parts of a row, of equal width, before those with equal bits are joined.
        key_levels, value_levels: of the parts. "uniform": evenly spaced, which kernels of a GPU need not look up;
            "lloyd-max": the other has 1 % more error for codes of two bits, 40 % for those of five. None: the former
            for keys of up to 2.5 mean bits, or such `bits`, where it costs nothing along texts; of values it costs 2 %.
        weights: "query" weighs keys by all queries alike and values alike; "attention" weighs queries by what errors
            of their scores do to the output, and values by the attention they get.
        noise: whether scores are corrected for the noise of packed keys.
        damping: share of the mean diagonal that is added to both moments.
    """

    key_bits: float = 2.0
    value_bits: float = 1.5
    bits: float | None = None
    parts: int = 4
    key_levels: str | None = None
    value_levels: str | None = None
    weights: str = "attention"
    noise: bool = True
    damping: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("key_bits", "value_bits", "bits"):
            value = getattr(self, name)
            most = max(MSE) + (name == "bits")  # counted bits have scales
            if value is not None and not (0 < value <= most or (name != "bits" and value == RAW)):
                raw = "" if name == "bits" else ", or 16"
                raise SkvqError(f"{name}={value!r}: expected a number above 0 and up to {most}{raw}")
        if not isinstance(self.parts, int) or self.parts < 1:
            raise SkvqError(f"parts={self.parts!r}: expected an integer of at least 1")
        for name in ("key_levels", "value_levels"):
            value = getattr(self, name)
            if value is not None and value not in ERRORS:
                raise SkvqError(f"{name}={value!r}: expected one of {', '.join(map(repr, ERRORS))}")
        if self.weights not in WEIGHTS:
            raise SkvqError(f"weights={self.weights!r}: expected one of {', '.join(map(repr, WEIGHTS))}")
        if self.damping < 0.0:
            raise SkvqError(f"damping={self.damping!r}: expected a number of at least 0")

    def codebook(self, stream: str) -> str:
        """Of the parts of "keys" or "values"."""
        if stream == "values":
            return self.value_levels or "lloyd-max"
        return self.key_levels or even_if_few(self.key_bits if self.bits is None else self.bits)

    def stream_bits(self, stream: str) -> float:
        """Of "keys" or "values"."""
        return self.key_bits if stream == "keys" else self.value_bits


# ---- statistics to fits ----------------------------------------------------------------------------------------------


def _attention(layer: LayerStatistics, index: int) -> AttentionMoments:
    if layer.attention is None:
        raise SkvqError("attention_stride=0: expected statistics of the attention, a stride of at least 1")
    if not float(layer.attention.query_weight.sum()) > 0.0:
        raise SkvqError(
            f"layer {index}: no query of the statistics attends to a packed token, expected chunks longer than sinks "
            "and window"
        )
    return layer.attention


def _output_power(attention: AttentionMoments, output: Tensor) -> float:
    """Σ |Wₒ o|² of the queries that the moments are of, heads apart."""
    return max(float((attention.output_moment.cpu() * output).sum()), 1e-300)


def fit_keys(layer: LayerStatistics, index: int, output: Tensor, options: SpectralOptions) -> StreamFit:
    """Keys of one layer; `output` float64 [H, Dv, Dv]: what the output projection makes of errors in values.

    The mean turns with the position if the rotation is known and less is lost then: a layer may be one whose keys are
    not rotated at all.
    """
    weight = layer.queries.second_moment.cpu()
    if options.weights == "attention":
        weight = _attention(layer, index).weighted_query_moment.cpu()
    joint = None
    if options.bits is not None:
        found = _attention(layer, index)
        gain = output.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        joint = Objective(gain * found.query_moment.cpu(), _output_power(found, output))
    turned = None if layer.keys_turned is None else KeyMoments.turned(layer.keys_turned)
    return fit_key_moments(
        weight,
        KeyMoments.static(layer.keys),
        turned,
        damping=options.damping,
        output=joint,
        codebook=options.codebook("keys"),
    )


@dataclass(frozen=True, eq=False)
class KeyMoments:
    """Keys about a mean, on the CPU.

    Attributes:
        covariance: float64 or float32 [H, D, D].
        mean: that mean.
    """

    covariance: Tensor
    mean: Mean

    @classmethod
    def static(cls, keys: StreamMoments) -> KeyMoments:
        """About the mean of all keys."""
        return cls(keys.covariance.cpu(), Mean(keys.mean.cpu()))

    @classmethod
    def turned(cls, keys: TurnedMoments) -> KeyMoments:
        """About their mean before the rotation, turned to each position."""
        return cls(keys.covariance.cpu(), Mean(keys.mean.cpu(), keys.mean_sine.cpu(), keys.frequencies.cpu()))


def fit_key_moments(
    weight: Tensor,
    static: KeyMoments,
    turned: KeyMoments | None,
    *,
    damping: float,
    output: Objective | None = None,
    codebook: str = "lloyd-max",
) -> StreamFit:
    """Keys, from what their errors cost, float64 or float32 [H, D, D], and their moments about either mean."""
    about = _nearer(weight, static, turned, damping)
    harm = damped(weight.cpu(), damping)
    return StreamFit(
        spectrum=Spectrum.of(damped(about.covariance, damping), harm),
        own=Objective(harm, float(harm.shape[0])),
        output=output,
        static_variance=damped_diagonal(static.covariance, damping),
        variance=damped_diagonal(about.covariance, damping),
        mean=about.mean,
        codebook=codebook,
    )


def key_plan(
    weight: Tensor,
    static: KeyMoments,
    turned: KeyMoments | None,
    parts: Parts,
    *,
    damping: float,
    codebook: str = "lloyd-max",
) -> StreamPlan:
    """`fit_key_moments(…).plan(parts, noise=True)`, in one task for every head."""
    about = _nearer(weight, static, turned, damping)

    def matrices(head: int) -> tuple[Tensor, Tensor]:
        covariance, harm = damped(about.covariance[head], damping), damped(weight[head], damping)
        return Spectrum.of_head(covariance, harm).matrices(parts, codebook)

    matrix, inverse = zip(*side_by_side(matrices, weight.shape[0]), strict=True)
    return about.mean.plan(parts, torch.stack(matrix), torch.stack(inverse), noise=True, codebook=codebook)


def _nearer(weight: Tensor, static: KeyMoments, turned: KeyMoments | None, damping: float) -> KeyMoments:
    """About the mean behind which a scale per channel loses less, for equal bits, over all heads."""
    if turned is None:
        return static
    harm = damped_diagonal(weight.cpu(), damping)
    loss = [(damped_diagonal(x.covariance, damping) * harm).sum() for x in (turned, static)]
    return turned if float(loss[0]) < float(loss[1]) else static


def fit_values(layer: LayerStatistics, index: int, output: Tensor, options: SpectralOptions) -> StreamFit:
    """Values of one layer, likewise."""
    mean = layer.values.mean.cpu()
    covariance = layer.values.covariance.cpu()
    if options.weights == "attention":
        covariance = _attention(layer, index).weighted_value_covariance(layer.values.mean).cpu()
    covariance, weight = damped(covariance, options.damping), damped(output, options.damping)
    joint = None
    if options.bits is not None:
        found = _attention(layer, index)
        joint = Objective(output * found.value_weight.cpu()[:, None, None], _output_power(found, output))
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    return StreamFit(
        spectrum=Spectrum.of(covariance, weight),
        own=Objective(weight, float((covariance * weight).sum())),
        output=joint,
        static_variance=variance,
        variance=variance,
        mean=Mean(mean),
        codebook=options.codebook("values"),
    )


def output_weights(model: Any, statistics: Statistics) -> tuple[dict[int, Tensor], str]:
    """Σ Wₒᵀ Wₒ of every layer, float64 [H, Dv, Dv] on the CPU, and why they are plain ones ("" if they are not)."""
    weights: dict[int, Tensor] = {}
    try:
        for index, layer in statistics.layers.items():
            heads, dim = layer.values.mean.shape
            weights[index] = output_weight(model, index, heads, dim).cpu()
    except (ValueError, RuntimeError) as error:
        for index, layer in statistics.layers.items():
            heads, dim = layer.values.mean.shape
            weights[index] = torch.eye(dim, dtype=torch.float64).repeat(heads, 1, 1)
        return weights, f"errors of values count alike in all channels: {error}"
    return weights, ""


# ---- fits to a plan --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SpectralPlan:
    """What was fitted, and what it should gain.

    Attributes:
        streams: key and value plan of every layer.
        options: what was asked for.
        chains: predicted costs by stream. Means over layers of: for keys the squared error of a score, for values the
            squared error of the output relative to that of no value at all but their mean; with `bits` for both the
            squared error of the attention output relative to its power.
        mean_bits: of codes, by stream, without the scales.
        remarks: what could not be done, in sentences.
    """

    streams: dict[int, tuple[StreamPlan, StreamPlan]]
    options: SpectralOptions
    chains: dict[str, Chain]
    mean_bits: dict[str, float]
    remarks: list[str] = field(default_factory=list)

    @property
    def notes(self) -> dict[str, Any]:
        """Plain values, for the plan's header."""
        predicted = {name: asdict(chain) for name, chain in self.chains.items()}
        return {
            "spectral": asdict(self.options),
            "code_bits": self.mean_bits,
            "predicted": predicted,
            "remarks": self.remarks,
        }

    def describe(self) -> str:
        """A line for every stream, one for their sum where costs are alike, and the remarks."""
        units = {"keys": "squared error of a score", "values": "share of their spread"}
        if self.options.bits is not None:
            units = dict.fromkeys(units, "share of the attention output")
        lines = [
            f"predicted cost of {name} at {self.mean_bits[name]:.4g} bits, {units[name]}: {chain}"
            for name, chain in self.chains.items()
        ]
        if self.options.bits is not None and len(self.chains) > 1:
            lines.append(f"predicted cost of both: {sum(self.chains.values(), Chain())}")
        return "\n".join([*lines, *(f"note: {remark}" for remark in self.remarks)])


def spectral_plan(model: Any, statistics: Statistics, options: SpectralOptions) -> SpectralPlan:
    """Fits every packed layer of the model that the statistics are of.

    Raises:
        SkvqError: the bits are too few for parts, or the statistics lack what the options need.
    """
    outputs, remark = output_weights(model, statistics)
    fits: dict[tuple[int, str], StreamFit] = {}
    for index, layer in statistics.layers.items():
        for name, fit in (("keys", fit_keys), ("values", fit_values)):
            if options.bits is not None or options.stream_bits(name) != RAW:
                fits[index, name] = fit(layer, index, outputs[index], options)
    chosen = _choose(fits, options)
    streams = {
        index: (
            _stream(fits.get((index, "keys")), chosen.get((index, "keys")), noise=options.noise),
            _stream(fits.get((index, "values")), chosen.get((index, "values")), noise=False),
        )
        for index in statistics.layers
    }
    chains, bits = _predict(fits, chosen, options)
    remarks = [*_mean_remarks(statistics, fits), *([remark] if remark else [])]
    return SpectralPlan(streams, options, chains, bits, remarks)


def _objective(fit: StreamFit) -> Objective:
    """The one that bits are given by."""
    return fit.own if fit.output is None else fit.output


def scale_bits(shapes: Collection[tuple[int, ...]]) -> float:
    """Bits of the scales of rows, for an element of all streams together; `shapes` are their kv heads and channels."""
    return sum(SCALE_BITS * heads for heads, _ in shapes) / sum(heads * dim for heads, dim in shapes)


def _choose(fits: Mapping[tuple[int, str], StreamFit], options: SpectralOptions) -> dict[tuple[int, str], Candidate]:
    """Bits of every stream of every layer."""
    given = {key: fit.candidates(options.parts, _objective(fit)) for key, fit in fits.items()}
    if options.bits is None:
        return {
            (index, name): cheapest(f"{name.removesuffix('s')}_bits", given[index, name], options.stream_bits(name))
            for index, name in fits
        }
    elements = {key: fit.shape[0] * fit.shape[1] for key, fit in fits.items()}
    scales = scale_bits([fit.shape for fit in fits.values()])
    if options.bits <= scales:
        raise SkvqError(f"bits={options.bits:g}: expected more than {scales:g}, the bits of the scales alone")
    return allocate({key: Share(given[key], elements[key]) for key in fits}, options.bits - scales)


def _predict(
    fits: Mapping[tuple[int, str], StreamFit],
    chosen: Mapping[tuple[int, str], Candidate],
    options: SpectralOptions,
) -> tuple[dict[str, Chain], dict[str, float]]:
    """Means of the chains over layers, and of the bits; steps before the parts have the bits that parts have."""
    sizes = {key: fit.shape[0] * fit.shape[1] for key, fit in fits.items()}

    def mean(keys: list[tuple[int, str]]) -> float:
        return sum(chosen[key].bits * sizes[key] for key in keys) / sum(sizes[key] for key in keys)

    chains: dict[str, Chain] = {}
    bits: dict[str, float] = {}
    for name in STREAMS:
        own = [key for key in fits if key[1] == name]
        if own:
            bits[name] = mean(own)
            equal = bits[name] if options.bits is None else mean(list(fits))
            total = sum((fits[x].chain(_objective(fits[x]), equal, chosen[x].parts) for x in own), Chain())
            chains[name] = total * (1.0 / len(own))
    return chains, bits


def _stream(fit: StreamFit | None, choice: Candidate | None, *, noise: bool) -> StreamPlan:
    if fit is None or choice is None:
        return StreamPlan(StreamOptions(bits=RAW))
    return fit.plan(choice.parts, noise=noise)


def _mean_remarks(statistics: Statistics, fits: Mapping[tuple[int, str], StreamFit]) -> list[str]:
    """Which layers have a static mean of keys, and why."""
    reasons: dict[str, list[int]] = {}
    for index, layer in statistics.layers.items():
        fit = fits.get((index, "keys"))
        if fit is not None and fit.mean.shift_sine is None:
            reason = layer.turning_refused or "less is lost than with one that turns"
            reasons.setdefault(reason, []).append(index)
    return [
        f"keys of layers {', '.join(map(str, layers))} have a static mean: {reason}"
        for reason, layers in reasons.items()
    ]

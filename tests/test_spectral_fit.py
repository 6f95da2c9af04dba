"""The spectral fit: codes by what errors cost, predicted and measured; bits against brute force; every step a gain."""

from __future__ import annotations

import itertools
from dataclasses import astuple
from typing import Any

import pytest
import torch
import transformers

import tiny_models
from skvq import SkvqError
from skvq.calibrate import Statistics, collect
from skvq.calibrate.allocate import (
    ALLOWED_BITS,
    ERRORS,
    MSE,
    Candidate,
    Share,
    allocate,
    candidates,
    cheapest,
    equal_error,
    error_of,
    mean_bits,
    part_count,
    shapes,
)
from skvq.calibrate.spectral import Chain, Spectrum, noise_of
from skvq.calibrate.spectral_plan import SpectralOptions, fit_keys, fit_values, output_weights, spectral_plan
from skvq.calibrate.transform import balanced_transform, cost, damped
from skvq.plan import StreamPlan
from skvq.reference_parts import HeadMap, RowParts, part_levels

PARTS = ((4, 32), (3, 32), (1, 32), (0, 32))


def moment(dim: int, seed: int, spread: float = 1.5, heads: int = 1) -> torch.Tensor:
    """Positive matrices [heads, dim, dim] with a wide spectrum."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(heads, dim, dim, dtype=torch.float64, generator=generator)
    scales = torch.exp(spread * torch.randn(heads, dim, dtype=torch.float64, generator=generator))
    return basis @ torch.diag_embed(scales) @ basis.mT / dim


def gaussian(covariance: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Rows float64 [count, D] of a covariance [D, D]."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, covariance.shape[-1], dtype=torch.float64, generator=generator)
    return rows @ torch.linalg.cholesky(covariance).mT


def without_gain(stream: tuple[torch.Tensor, torch.Tensor], parts: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrices of a decoder that takes levels as they are: bits are chosen by its error."""
    gain = torch.cat([torch.full((width,), 1.0 / (1.0 - MSE[bits]) if bits else 1.0) for bits, width in parts])
    return stream[0], stream[1] / gain


def coded(stream: tuple[torch.Tensor, torch.Tensor], parts: Any, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rows [n, D] of one head through the codec of the format, with its E4M3 scale: y, ŷ and decoded rows."""
    matrix, inverse = stream
    head = HeadMap(rows.shape[-1], matrix, inverse, None, None, None, None)
    names = RowParts([(f"{bits:g}", width) for bits, width in parts], rows.shape[-1])
    y = head.forward(rows.float(), 0, 0)
    scale = names.coded(y).square().mean(-1, keepdim=True).sqrt().to(torch.float8_e4m3fn).float()
    decoded = names.values(names.nearest(y / scale)) * scale
    return y, decoded, head.back(decoded, 0, 0)


# ---- constants and shapes


@pytest.mark.parametrize("codebook", list(ERRORS))
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_errors_are_those_of_the_codebooks(bits: int, codebook: str) -> None:
    """Against the levels themselves, by integration."""
    levels, expected = part_levels(bits, codebook), ERRORS[codebook][bits]
    x = torch.linspace(-10, 10, 400_001, dtype=torch.float64)
    density = torch.exp(-0.5 * x * x) / (2 * torch.pi) ** 0.5 * (x[1] - x[0])
    read = levels.double()[torch.bucketize(x, (levels[1:] + levels[:-1]).double() / 2)]
    assert float((density * (x - read).square()).sum()) == pytest.approx(expected, abs=2e-7)
    # what the gain makes of it
    gained = read / (1 - expected)
    assert float((density * (x - gained).square()).sum()) == pytest.approx(expected / (1 - expected), rel=1e-4)
    noise = float((density * (read - (1 - expected) * x).square()).sum())
    assert noise == pytest.approx(float(noise_of(((bits, 16),), codebook)[0]), rel=1e-4)
    if codebook == "uniform":  # no other distance has less error
        for factor in (0.98, 1.02):
            other = levels.double() * factor
            read = other[torch.bucketize(x, (other[1:] + other[:-1]) / 2)]
            assert float((density * (x - read).square()).sum()) > expected + 1e-6


def test_equal_error_goes_through_whole_bits() -> None:
    assert [equal_error(x) for x in range(6)] == pytest.approx([error_of(x) for x in ALLOWED_BITS])
    assert error_of(2) < equal_error(1.5) < error_of(1)


@pytest.mark.parametrize(
    ("dim", "wanted", "count"),
    [(128, 4, 4), (128, 8, 8), (64, 4, 4), (64, 8, 4), (96, 4, 3), (80, 4, 5), (256, 4, 4), (32, 4, 2), (16, 4, 1)],
)
def test_parts_are_of_equal_width(dim: int, wanted: int, count: int) -> None:
    assert part_count(dim, wanted) == count
    assert dim % (16 * count) == 0


def test_shapes_fall_and_join_equal_bits() -> None:
    assert shapes(1, 16) == (((5, 16),), ((4, 16),), ((3, 16),), ((2, 16),), ((1, 16),))
    found = shapes(4, 32)
    assert ((2, 128),) in found
    assert ((4, 32), (1, 64), (0, 32)) in found
    assert all(all(a[0] > b[0] for a, b in itertools.pairwise(parts)) for parts in found)
    assert all(sum(width for _, width in parts) == 128 for parts in found)
    assert len(set(found)) == len(found) == 125  # 126 falling choices of six, without that of no bits


# ---- one stream


def test_matrices_give_unit_variance_and_undo_each_other() -> None:
    covariance, weight = moment(128, 1, heads=2), moment(128, 2, heads=2)
    spectrum = Spectrum.of(covariance, weight)
    matrix, inverse = (x.double() for x in spectrum.matrices(PARTS))
    variance = (matrix @ covariance @ matrix.mT).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(variance, torch.ones_like(variance), atol=1e-4, rtol=0)
    gain = (matrix @ inverse).diagonal(dim1=1, dim2=2)
    expected = torch.cat([torch.full((w,), 1 / (1 - MSE[b]) if b else 1.0) for b, w in PARTS]).double()
    torch.testing.assert_close(gain, expected.expand(2, -1), atol=1e-4, rtol=0)
    assert bool((spectrum.spread[:, 1:] <= spectrum.spread[:, :-1]).all())
    torch.testing.assert_close(spectrum.harm(weight), spectrum.spread, atol=2e-3, rtol=1e-6)


def test_one_part_is_the_balanced_transform() -> None:
    covariance, weight = damped(moment(64, 3), 1e-3), damped(moment(64, 4), 1e-3)
    spectrum = Spectrum.of(covariance, weight)
    balanced, _ = balanced_transform(covariance[0], weight[0], damping=0.0)
    found = spectrum.cost(((2, 64),), spectrum.harm(weight))
    assert found == pytest.approx(error_of(2) * float(cost(balanced, covariance[0], weight[0])), rel=1e-6)


@pytest.mark.parametrize("parts", [PARTS, ((2, 128),), ((3, 64), (1, 64)), ((2, 64), (0, 64)), ((4, 128),)])
def test_predicted_cost_is_the_measured_error_of_scores(parts: Any) -> None:
    # the wider the spectrum of one part, the less its channels are like independent ones: at a spread of 1 a single
    # part of 2 bits costs a fifth more than predicted, several parts do not
    covariance, weight = moment(128, 5, 0.5), moment(128, 6, 0.5)
    spectrum = Spectrum.of(damped(covariance, 1e-3), damped(weight, 1e-3))
    rows = gaussian(covariance[0], 4000, 1)
    queries = gaussian(weight[0], 2000, 2)
    _, _, read = coded(without_gain(spectrum.matrices(parts), parts), parts, rows)
    error = queries @ (read.double() - rows).mT
    predicted = spectrum.cost(parts, spectrum.harm(weight))
    assert float(error.square().mean()) == pytest.approx(predicted, rel=0.15)
    # and for a weight that the transform was not fitted to
    other = moment(128, 7, 0.5)
    error = gaussian(other[0], 2000, 3) @ (read.double() - rows).mT
    assert float(error.square().mean()) == pytest.approx(spectrum.cost(parts, spectrum.harm(other)), rel=0.15)


def test_products_are_right_on_average() -> None:
    covariance, weight = moment(128, 8), moment(128, 9)
    matrices = Spectrum.of(covariance, weight).matrices(PARTS)
    rows = gaussian(covariance[0], 6000, 4)
    y, _, read = coded(matrices, PARTS, rows)
    # queries that see coded channels only: what the last part holds is lost
    seen = torch.randn(64, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    seen[:, 96:] = 0.0
    queries = seen @ matrices[0][0].double()
    exact, found = queries @ rows.mT, queries @ read.double().mT
    slope = (exact * found).sum(1) / exact.square().sum(1)
    assert float(slope.mean()) == pytest.approx(1.0, abs=0.01)
    assert float((slope - 1.0).abs().max()) < 0.05
    torch.testing.assert_close(y.square().mean(0), torch.ones(128), atol=0.12, rtol=0)


def test_noise_is_the_variance_of_errors_in_units_of_the_scale() -> None:
    covariance, weight = moment(128, 10), moment(128, 11)
    matrices = Spectrum.of(covariance, weight).matrices(PARTS)
    rows = gaussian(covariance[0], 6000, 6)
    y, decoded, read = coded(matrices, PARTS, rows)
    # ŷ less its part along y, over the squared scale, channel by channel
    shrink = torch.cat([torch.full((w,), 1 - MSE[b] if b else 0.0) for b, w in PARTS])
    coded_power = y[:, :96].square().mean(-1, keepdim=True)
    measured = ((decoded - shrink * y).square() / coded_power).mean(0)[:96]
    torch.testing.assert_close(measured, noise_of(PARTS)[:96], rtol=0.12, atol=2e-3)
    # the noise of a score, as FORMAT.md takes it off, is that of q·(x̂ - x)
    query = gaussian(weight[0], 1, 7).float()
    head = HeadMap(128, *matrices, None, None, None, noise_of(PARTS))
    half = head.score_noise(query, 0)
    assert half is not None
    error = query.double() @ (read.double() - rows).mT
    assert 2 * float(half * coded_power.mean()) == pytest.approx(float(error.square().mean()), rel=0.1)


# ---- bits


def test_cheapest_against_all_shapes() -> None:
    spectrum = Spectrum.of(moment(64, 12, heads=2), moment(64, 13, heads=2))
    price = lambda parts: spectrum.cost(parts, spectrum.spread)  # noqa: E731
    given = candidates(64, 4, price)
    for bits in (0.25, 0.6, 1.0, 1.5, 1.8, 2.0, 3.3, 4.0):
        best = min(price(x) for x in shapes(4, 16) if mean_bits(x) <= bits)
        found = cheapest("key_bits", given, bits)
        assert found.cost == pytest.approx(best)
        assert found.bits <= bits
    with pytest.raises(SkvqError, match=r"key_bits=0\.2: expected at least 0\.25"):
        cheapest("key_bits", given, 0.2)


@pytest.mark.parametrize("seed", range(8))
def test_allocation_against_brute_force(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shares = {}
    for number, elements in enumerate((64, 64, 32, 96)):
        costs = (torch.rand(5, generator=generator) * 3).cumsum(0).flip(0).tolist()
        given = [Candidate(((1, 16),), bits, c) for bits, c in zip((0.5, 1.0, 1.5, 2.0, 3.0), costs, strict=True)]
        shares[number] = Share(given, elements)
    total = sum(x.elements for x in shares.values())
    for bits in (0.5, 0.9, 1.7, 2.25, 3.0, 4.0):
        best = min(
            sum(x.cost for x in choice)
            for choice in itertools.product(*(x.candidates for x in shares.values()))
            if sum(x.bits * s.elements for x, s in zip(choice, shares.values(), strict=True)) <= bits * total + 1e-9
        )
        found = allocate(shares, bits)
        assert sum(x.cost for x in found.values()) == pytest.approx(best)
        assert sum(found[key].bits * share.elements for key, share in shares.items()) <= bits * total + 1e-9
    with pytest.raises(SkvqError, match=r"bits=0\.4: expected at least 0\.5"):
        allocate(shares, 0.4)


# ---- models


def biased(family: str) -> Any:
    """A tiny model with large means of keys before RoPE, and strong directions in keys and queries."""
    options: dict[str, Any] = {
        "llama": {"head_dim": 64, "attention_bias": True},
        "qwen2": {"head_dim": 64},
        "smollm3": {"attention_bias": True, "no_rope_layers": [1, 0, 1], "use_sliding_window": False},
    }[family]
    name = {"llama": "LlamaConfig", "qwen2": "Qwen2Config", "smollm3": "SmolLM3Config"}[family]
    config = tiny_models._config(name, hidden_size=256, **options)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in model.base_model.layers:
            for name, bias in (("q_proj", 0.0), ("k_proj", 4.0), ("v_proj", 0.1)):
                projection = getattr(layer.self_attn, name)
                projection.weight *= 0.1
                mix = torch.randn(projection.weight.shape[0], 6, generator=generator)
                projection.weight += 0.03 * mix @ torch.randn(6, projection.weight.shape[1], generator=generator)
                projection.bias.copy_(bias * torch.randn(projection.bias.shape, generator=generator))
    return model


OPTIONS: dict[str, Any] = {"sinks": 3, "window": 16, "sample_tokens": 0, "attention_stride": 2}


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def model(request: pytest.FixtureRequest) -> Any:
    return biased(request.param)


@pytest.fixture(scope="module")
def statistics(model: Any) -> Statistics:
    return collect(model, [tiny_models.prompts(1, 400, seed)[0] for seed in range(3)], **OPTIONS)


def falls(chain: Chain) -> bool:
    return all(later <= earlier * (1 + 1e-9) for earlier, later in itertools.pairwise(astuple(chain)))


@pytest.mark.parametrize("weights", ["query", "attention"])
@pytest.mark.parametrize(("key_bits", "value_bits"), [(2, 1.5), (1, 1), (3.25, 2.4)])
def test_every_step_lowers_its_objective(
    model: Any, statistics: Statistics, weights: str, key_bits: float, value_bits: float
) -> None:
    options = SpectralOptions(key_bits=key_bits, value_bits=value_bits, weights=weights)
    found = spectral_plan(model, statistics, options)
    assert found.remarks == []
    for chain in found.chains.values():
        assert falls(chain)
    # the biases turn with the position, so a mean that does not leaves them in the keys
    assert found.chains["keys"].mean < 0.5 * found.chains["keys"].static
    assert found.chains["keys"].parts < 0.9 * found.chains["keys"].transform
    assert found.mean_bits["keys"] <= key_bits
    assert found.mean_bits["values"] <= value_bits
    for keys, values in found.streams.values():
        assert keys.frequencies is not None
        assert keys.noise is not None
        assert values.frequencies is values.shift_sine is values.noise is None
        for name, stream in (("keys", keys), ("values", values)):
            stream.check(name, 64)
            assert stream.options.bits <= (key_bits if name == "keys" else value_bits)


@pytest.mark.parametrize("seed", range(3))
def test_every_step_lowers_its_objective_on_random_moments(seed: int) -> None:
    """Values of a layer whose statistics are random; keys have another mean on top."""
    model = biased("llama")
    found = collect(model, [tiny_models.prompts(1, 300, seed)[0]], **OPTIONS)
    for index, layer in found.layers.items():
        rows = int(layer.keys.count)
        layer.values.comoment = moment(64, seed, heads=2) * rows
        layer.queries.comoment = moment(64, seed + 9, heads=2) * int(layer.queries.count)
        for bits in (0.75, 1.5, 2.0, 2.6):
            options = SpectralOptions(key_bits=bits, value_bits=bits)
            output = moment(64, seed + 5, heads=2)
            for fit in (fit_keys(layer, index, output, options), fit_values(layer, index, output, options)):
                choice = cheapest("bits", fit.candidates(4, fit.own), bits)
                assert falls(fit.chain(fit.own, choice.bits, choice.parts))


@pytest.mark.parametrize("bits", [1.0, 1.8, 2.5])
@pytest.mark.parametrize("weights", ["query", "attention"])
def test_bits_are_shared_out_over_the_model(model: Any, statistics: Statistics, bits: float, weights: str) -> None:
    found = spectral_plan(model, statistics, SpectralOptions(bits=bits, weights=weights))
    counted = [stream.options.bits + 8 / 64 for layer in found.streams.values() for stream in layer]
    assert sum(counted) / len(counted) <= bits
    assert sum(counted) / len(counted) > bits - 0.1
    together = sum(found.chains.values(), Chain())
    assert together.parts < together.transform
    assert together.mean < together.static
    # no better than what sharing out could do with the same bits for every stream
    equal = SpectralOptions(bits=bits, weights=weights)
    total = 0.0
    outputs, _ = output_weights(model, statistics)
    for index, layer in statistics.layers.items():
        for fit in (fit_keys(layer, index, outputs[index], equal), fit_values(layer, index, outputs[index], equal)):
            assert fit.output is not None
            total += cheapest("bits", fit.candidates(4, fit.output), bits - 8 / 64).cost
    assert together.parts * len(found.streams) <= total * (1 + 1e-9)


def test_predicted_output_error_is_the_measured_one() -> None:
    """Errors as small as predicted ones assume: keys and values of one layer, four bits, first order."""
    model = biased("llama")
    chunk = tiny_models.prompts(1, 400, 7)[0]
    found = collect(model, [chunk], sinks=3, window=16, attention_stride=1, sample_tokens=400, sample_length=400)
    layer, sample = found.layers[1], found.layers[1].samples[0]
    projection = model.model.layers[1].self_attn.o_proj.weight.detach().double()
    heads = projection.unflatten(1, (4, 64))
    output = torch.stack([sum(heads[:, h].mT @ heads[:, h] for h in (2 * g, 2 * g + 1)) for g in range(2)])
    options = SpectralOptions(bits=4.0)
    queries = collect_queries(model, chunk)
    for keys, fit in ((True, fit_keys(layer, 1, output, options)), (False, fit_values(layer, 1, output, options))):
        parts = ((4, 64),)
        plan = fit.plan(parts, noise=False)
        streams = {"keys": sample.keys, "values": sample.values}
        name = "keys" if keys else "values"
        streams[name + "_read"] = decoded_stream(plan, parts, streams[name])
        exact = attend(queries, sample.keys, sample.values, sample.keys, sample.values)
        read = attend(
            queries,
            sample.keys,
            sample.values,
            streams.get("keys_read", sample.keys),
            streams.get("values_read", sample.values),
        )
        error = torch.einsum("htd,ohd->hto", read - exact, heads)
        power = torch.einsum("htd,ohd->hto", exact, heads).square().sum()
        assert fit.output is not None
        predicted = fit.spectrum.cost(parts, fit.spectrum.harm(fit.output.weight)) / fit.output.unit
        # the gain of the output projection is that of an average direction for keys
        assert float(error.square().sum() / power) == pytest.approx(predicted, rel=0.5 if keys else 0.2)


def collect_queries(model: Any, chunk: torch.Tensor) -> torch.Tensor:
    """Scaled queries of layer 1, float64 [Hq, T, D]."""
    found = collect(model, [chunk], sinks=3, window=16, sample_tokens=400, sample_length=400, query_stride=1)
    return found.layers[1].samples[0].queries.double() * found.layers[1].scaling


def decoded_stream(plan: StreamPlan, parts: Any, rows: torch.Tensor) -> torch.Tensor:
    """Rows [H, T, D] from position 0 on, each through its head."""
    assert plan.matrix is not None
    read = []
    for head in range(rows.shape[0]):
        both = HeadMap(64, plan.matrix, plan.inverse, plan.shift, plan.shift_sine, plan.frequencies, None)
        codes = RowParts([(f"{bits:g}", width) for bits, width in parts], 64)
        y = both.forward(rows[head], head, 0)
        scale = codes.coded(y).square().mean(-1, keepdim=True).sqrt().to(torch.float8_e4m3fn).float()
        read.append(both.back(codes.values(codes.nearest(y / scale)) * scale, head, 0))
    return torch.stack(read)


def attend(queries: torch.Tensor, keys: Any, values: Any, packed_keys: Any, packed_values: Any) -> torch.Tensor:
    """Outputs float64 [Hq, T, D]: behind 3 sinks and older than a window of 16, tokens are taken from the packed."""
    length = keys.shape[1]
    age = torch.arange(length)[:, None] - torch.arange(length)
    packed = (age >= 16) & (torch.arange(length) >= 3)
    outputs = []
    for h, q in enumerate(queries):
        k, v, pk, pv = (x[h // 2].double() for x in (keys, values, packed_keys, packed_values))
        scores = torch.where(packed, q @ pk.mT, q @ k.mT).masked_fill(age < 0, -torch.inf)
        p = scores.softmax(-1)
        outputs.append((p * packed) @ pv + (p * ~packed) @ v)
    return torch.stack(outputs)


def test_layers_without_a_turning_mean_say_so() -> None:
    model = biased("llama")
    found = collect(model, [tiny_models.prompts(1, 300, 1)[0]], **OPTIONS)
    found.layers[2].keys_turned, found.layers[2].turning_refused = None, "rotation not known: a test"
    plan = spectral_plan(model, found, SpectralOptions())
    assert plan.remarks == ["keys of layers 2 have a static mean: rotation not known: a test"]
    assert plan.remarks[0] in plan.describe()
    keys = plan.streams[2][0]
    assert keys.frequencies is None
    assert keys.shift is not None
    torch.testing.assert_close(keys.shift, found.layers[2].keys.mean.float())
    del model.model.layers[0].self_attn.o_proj
    assert "has no self_attn.o_proj" in spectral_plan(model, found, SpectralOptions()).remarks[1]


def test_keys_that_are_not_rotated_keep_a_static_mean() -> None:
    """SmolLM3 has layers without RoPE in a model that has it."""
    model = biased("smollm3")
    found = collect(model, [tiny_models.prompts(1, 300, 1)[0]], **OPTIONS)
    plan = spectral_plan(model, found, SpectralOptions())
    assert plan.remarks == ["keys of layers 1 have a static mean: less is lost than with one that turns"]
    assert [keys.frequencies is None for keys, _ in plan.streams.values()] == [False, True, False]
    assert falls(plan.chains["keys"])


def test_streams_may_be_left_alone() -> None:
    model = biased("llama")
    found = collect(model, [tiny_models.prompts(1, 300, 1)[0]], **OPTIONS)
    plan = spectral_plan(model, found, SpectralOptions(value_bits=16, noise=False, parts=8))
    for keys, values in plan.streams.values():
        assert not values.options.is_packed
        assert values.matrix is keys.noise is None
    assert list(plan.chains) == ["keys"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key_bits": 6}, r"key_bits=6: expected a number above 0 and up to 5, or 16"),
        ({"bits": 16}, r"bits=16: expected a number above 0 and up to 6"),
        ({"parts": 0}, r"parts=0: expected an integer of at least 1"),
        ({"weights": "key"}, r"weights='key': expected one of 'query', 'attention'"),
        ({"damping": -1.0}, r"damping=-1.0: expected a number of at least 0"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SkvqError, match=message):
        SpectralOptions(**options)


def test_statistics_must_have_what_options_need() -> None:
    model = biased("llama")
    short = collect(model, [tiny_models.prompts(1, 15, 1)[0]], **OPTIONS)
    with pytest.raises(SkvqError, match="expected chunks longer than sinks and window"):
        spectral_plan(model, short, SpectralOptions(bits=2))
    without = collect(model, [tiny_models.prompts(1, 50, 1)[0]], **(OPTIONS | {"attention_stride": 0}))
    with pytest.raises(SkvqError, match="attention_stride=0: expected"):
        spectral_plan(model, without, SpectralOptions(weights="attention"))
    with pytest.raises(SkvqError, match=r"bits=0\.1: expected more than 0\.125"):
        spectral_plan(model, collect(model, [tiny_models.prompts(1, 50, 1)[0]], **OPTIONS), SpectralOptions(bits=0.1))

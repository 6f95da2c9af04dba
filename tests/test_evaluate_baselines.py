"""Methods of others against what their authors' code computes: by hand, or by the package itself where it is there."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from skvq.evaluate.calibration_rows import CalibrationRows
from skvq.evaluate.methods import Geometry, Where, parse_method
from skvq.evaluate.methods.oscar import bit_reversal, clip_rows
from skvq.evaluate.simulation import Simulator
from tiny_models import build, prompts

WIDTH = 64
KEYS, VALUES = Where(1, True, 0), Where(1, False, 0)


@functools.cache
def rows() -> CalibrationRows:
    return CalibrationRows(Simulator(build("llama", head_dim=WIDTH)), [prompts(1, 150, seed)[0] for seed in (1, 2)])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def biased(tokens: int, size: float = 30.0) -> Tensor:
    """Keys [1, 2, tokens, WIDTH] as those of Qwen2.5: a few channels of each head are far from 0 and hardly vary."""
    keys = normal(1, 2, tokens, WIDTH)
    keys[..., :4] += size * torch.tensor([1.0, -0.7, 0.5, -1.2])
    return keys


def relative(read: Tensor, given: Tensor) -> float:
    """Squared error, as a share of what varies from token to token."""
    return float((read - given).square().sum() / (given - given.mean(2, keepdim=True)).square().sum())


# ---- OSCAR ---------------------------------------------------------------------------------------------------------


def sylvester(width: int) -> Tensor:
    """The Hadamard matrix, orthonormal, float64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < width:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / 2**0.5
    return matrix


def oscar_by_hand(row: Tensor, matrix: Tensor, clip: float, group: int) -> Tensor:
    """One row [D] through a dense rotation: clipped at a quantile, two bits with minimum and step of each group."""
    y = row.double() @ matrix
    limit = sorted(y.abs().tolist())[int(clip * len(y))]
    y = y.clamp(-limit, limit)
    for start in range(0, len(y), group):
        part = y[start : start + group]
        low = part.min().half().double()
        step = ((part.max() - part.min()) / 3).half().double()
        y[start : start + group] = ((part - low) / step + 0.5).floor().clamp(0, 3) * step + low
    return (y @ matrix.T).float()


@pytest.mark.parametrize("group", [64, 16])
@pytest.mark.parametrize("keys", [True, False])
def test_oscar_is_the_release_by_hand(keys: bool, group: int) -> None:
    """R = U·H·P: eigenvectors, Hadamard matrix, the column of rank i at place bit_reversal(i)."""
    method: Any = parse_method(f"oscar:bits=2,group={group}")
    method.prepare(rows())
    chunks = list(rows().of_layer(1))
    queries = sum(torch.einsum("hgtc,hgtd->hcd", x.queries.double(), x.queries.double()) for x in chunks)
    if keys:
        moment = queries
    else:
        moment = torch.zeros(2, WIDTH, WIDTH, dtype=torch.float64)
        for chunk in chunks:
            for head in range(2):
                for key, value in zip(chunk.keys[head].double(), chunk.values[head].double(), strict=True):
                    moment[head] += (key @ queries[head] @ key) * torch.outer(value, value)  # type: ignore[index]
    given = chunks[0].stream(keys)[None, :, 5:25]
    read = method.fake_quantize(given, KEYS if keys else VALUES)
    for head in range(2):
        sizes, vectors = torch.linalg.eigh(moment[head])  # type: ignore[index]
        places = torch.zeros(WIDTH, dtype=torch.long)
        for rank, column in enumerate(sizes.argsort(descending=True).tolist()):
            places[bit_reversal(WIDTH)[rank]] = column
        matrix = vectors @ sylvester(WIDTH) @ torch.eye(WIDTH, dtype=torch.float64)[:, places]
        by_hand = torch.stack([oscar_by_hand(x, matrix, 0.96 if keys else 0.92, group) for x in given[0, head]])
        # A code at a border may fall to either side.
        wrong = (read[0, head] - by_hand).abs().amax(-1) > 1e-3 * float(given.abs().max())
        assert int(wrong.sum()) <= 1


def test_oscar_clips_at_a_quantile_of_a_row() -> None:
    row = torch.tensor([[1.0, -9.0, 2.0, 3.0, -4.0, 5.0, 6.0, 7.0]])
    assert clip_rows(row, 0.8).tolist() == [[1.0, -7.0, 2.0, 3.0, -4.0, 5.0, 6.0, 7.0]]
    assert torch.equal(clip_rows(row, 1.0), row)
    assert bit_reversal(8).tolist() == [0, 4, 2, 6, 1, 5, 3, 7]
    assert bit_reversal(96).tolist() == list(range(96))


def test_oscar_by_deviation() -> None:
    """The release's later codes: bounds at 0 and ±0.981 deviations, four levels 1.1674 deviations apart."""
    method: Any = parse_method("oscar:bits=2,levels=lloyd-max,key_clip=1")
    method._rotations[1, True] = (sylvester(WIDTH).float()[bit_reversal(WIDTH).flip(0)]).T.repeat(2, 1, 1)
    given = normal(1, 2, 6, WIDTH, seed=3) + 0.3
    y = given[0, 0, 0] @ method._rotations[1, True][0] @ sylvester(WIDTH).float()
    y = y[bit_reversal(WIDTH).flip(0)]
    mean, deviation = float(y.mean()), float(y.std(correction=0))
    z = (y - mean) / deviation
    codes = (z >= -0.98107).float() + (z >= 0).float() + (z >= 0.98107).float()
    expected = (codes - 1.5) * (1.16 * 2 * 1.50956 / 3 * deviation) + mean
    back = torch.empty_like(expected)
    back[bit_reversal(WIDTH).flip(0)] = expected
    back = back @ sylvester(WIDTH).float() @ method._rotations[1, True][0].T
    assert torch.allclose(method.fake_quantize(given, KEYS)[0, 0, 0], back, atol=5e-3)
    assert method.bits(Geometry(1, 2, WIDTH), True) == 2.5
    with pytest.raises(ValueError, match="expected 2 bits"):
        parse_method("oscar:bits=3,levels=lloyd-max")


# ---- rotations without calibration ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rotation", ["hadamard", "random"])
def test_turboquant_keeps_the_norm_and_meets_lloyd_max(rotation: str) -> None:
    given = 3 * normal(1, 2, 500, WIDTH, seed=1)
    plain = parse_method(f"rotation:bits=2,rotation={rotation},norm_correction=false").fake_quantize(given, KEYS)
    # 0.1175 is the error of four Lloyd-Max levels for a normal variable
    assert float((plain - given).square().mean() / given.square().mean()) == pytest.approx(0.1175, rel=0.05)
    read = parse_method(f"rotation:bits=2,rotation={rotation}").fake_quantize(given, KEYS)
    assert torch.allclose(read.norm(dim=-1), given.norm(dim=-1), rtol=1e-3)
    assert torch.nn.functional.cosine_similarity(read, plain, dim=-1).min() > 0.9999


@pytest.mark.parametrize("spec", ["rotation:bits=4", "quarot:bits=2", "rtn:bits=2", "quanto:bits=2", "hqq:bits=2"])
def test_constant_parts_of_keys_break_what_does_not_centre(spec: str) -> None:
    """The failure on Qwen2.5: the error grows with a part of the keys that is the same for all tokens."""
    if spec.startswith(("quanto", "hqq")):
        pytest.importorskip("optimum.quanto" if spec.startswith("quanto") else "hqq")
    method, given = parse_method(spec), biased(128)
    assert relative(method.fake_quantize(given, KEYS), given) > 5 * relative(
        method.fake_quantize(biased(128, 0.0), KEYS), biased(128, 0.0)
    )
    per_channel = parse_method("kivi:bits=2").fake_quantize(given, KEYS)
    assert relative(per_channel, given) < 0.2


# ---- transformers' caches ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "bits", "axis"), [("quanto", 4, 0), ("quanto", 2, -1), ("hqq", 4, 1), ("hqq", 2, 1)])
def test_stock_methods_are_transformers_caches(name: str, bits: int, axis: int) -> None:
    """What a QuantizedCache holds after a prompt is what the method reads back of the same rows."""
    pytest.importorskip("optimum.quanto" if name == "quanto" else "hqq")
    from transformers import QuantizedCache

    keys, values = biased(128).bfloat16(), normal(1, 2, 128, WIDTH, seed=1).bfloat16()
    value_axis = 1 if name == "hqq" else 0
    cache = QuantizedCache(
        name, build("llama").config, nbits=bits, axis_key=axis, axis_value=value_axis, q_group_size=64
    )
    cache.update(keys, values, 0)
    layer: Any = cache.layers[0]
    method = parse_method(f"{name}:bits={bits}" + (f",key_axis={axis}" if axis == -1 else ""))
    for given, held, where in ((keys, layer._quantized_keys, KEYS), (values, layer._quantized_values, VALUES)):
        expected = layer._dequantize(held)
        assert expected.shape == given.shape
        assert torch.equal(method.fake_quantize(given.float(), where), expected.float())


@pytest.mark.parametrize("axis", [0, -1])
def test_quanto_by_hand(axis: int) -> None:
    """Axis 0: minimum and step of 64 channels of one token; axis -1: of 64 tokens of one channel."""
    pytest.importorskip("optimum.quanto")
    method = parse_method(f"quanto:bits=4,group=64,dtype=float32,key_axis={axis}")
    given = biased(64)
    assert (method.unit, method.bits(Geometry(0, 2, WIDTH), True)) == (64 if axis else 1, 4.5)
    among = 2 if axis else 3
    low, high = given.amin(among, keepdim=True), given.amax(among, keepdim=True)
    step = (high - low) / 15
    expected = ((given - low) / step).round().clamp(0, 15) * step + low
    assert torch.allclose(method.fake_quantize(given, KEYS), expected, atol=1e-4)
    assert relative(expected, given) < 0.01 if axis else relative(expected, given) > 0.2
    with pytest.raises(ValueError, match="key_axis=1"):
        parse_method("quanto:key_axis=1")

"""Our product of packed weights against the same weights unpacked, and its layout byte by byte."""

import copy

import pytest
import torch

from skvq import SkvqError, _native
from skvq.weights import WeightOptions
from skvq.weights.grid import QuantizedWeight, encode
from skvq.weights.product import (
    FEW_ROWS,
    PackedEmbedding,
    PackedLinear,
    PackedWeight,
    pack_digits,
    pack_sixes,
    unpack_digits,
    unpack_sixes,
)

SHAPES = [(1, 32, 32), (7, 96, 96), (33, 128, 64), (70, 896, 128), (48, 320, 32), (5, 512, 256)]


def example(outputs: int, inputs: int, group: int, bits: int) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(outputs + inputs + bits)
    return encode(torch.randn(outputs, inputs, generator=generator), WeightOptions(bits, group))


def test_golden_bytes_of_digits() -> None:
    """Input 16·j + l of a block of 128 is digit j of word l: byte 4·l + j / 2, its low half for even j."""
    codes = torch.zeros(1, 160, dtype=torch.uint8)
    for at, code in ((0, 1), (1, 2), (16, 3), (15, 4), (127, 5), (128, 6), (145, 7)):
        codes[0, at] = code
    packed = pack_digits(codes)
    assert packed.shape == (1, 128)
    expected = {0: 0x31, 4: 0x02, 60: 0x04, 63: 0x50, 64: 0x06, 68: 0x70}
    assert {i: x for i, x in enumerate(packed[0].tolist()) if x} == expected
    assert torch.equal(unpack_digits(packed, 160), codes)


def test_golden_bytes_of_sixes() -> None:
    """Twelve bytes for sixteen inputs: a string of their low four bits, and one of the two bits above."""
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    for at, code in ((0, 0b11_0101), (1, 0b10_0001), (15, 0b01_1111), (16, 0b11_0000), (22, 0b00_0111)):
        codes[0, at] = code
    packed = pack_sixes(codes)
    assert packed.shape == (1, 24)
    expected = {0: 0x15, 7: 0xF0, 8: 0b1011, 11: 0b0100_0000, 15: 0x07, 20: 0b11}
    assert {i: x for i, x in enumerate(packed[0].tolist()) if x} == expected
    assert torch.equal(unpack_sixes(packed), codes)


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
@pytest.mark.parametrize(("outputs", "inputs", "group"), SHAPES)
def test_products_and_rows(outputs: int, inputs: int, group: int, bits: int) -> None:
    weight = example(outputs, inputs, group, bits)
    plain, packed = weight.dequantize(), PackedWeight(weight, bits)
    assert torch.equal(packed.decoded(), plain)
    ids = torch.randint(0, outputs, (2, 3), generator=torch.Generator().manual_seed(1))
    assert torch.equal(packed.rows(ids), plain[ids])
    for isa in _native.available_isas():
        for count in (1, 2, 3, 5, FEW_ROWS):
            rows, found = torch.randn(count, inputs), torch.empty(count, outputs)
            _native.weights_multiply(rows, packed.codes, packed.scales, packed.zeros, found, bits=packed.bits, isa=isa)
            torch.testing.assert_close(found, rows @ plain.T, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [0, 1, FEW_ROWS, FEW_ROWS + 1, 100])
def test_layers_with_few_and_many_rows(dtype: torch.dtype, rows: int) -> None:
    weight, bias = example(70, 896, 128, 4), torch.randn(70).to(dtype)
    hidden = torch.randn(rows, 1, 896).to(dtype)
    found = PackedLinear(PackedWeight(weight, 4), bias)(hidden)
    exact = hidden.float() @ weight.dequantize().T + bias.float()
    assert found.dtype == dtype
    assert found.shape == (rows, 1, 70)
    resolution = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(found.float(), exact, rtol=resolution, atol=resolution * 30)


def test_large_layers_are_unpacked_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skvq.weights.product.PIECE", 3 * 128)
    weight = example(10, 128, 128, 4)
    rows = torch.randn(FEW_ROWS + 1, 128)
    torch.testing.assert_close(PackedWeight(weight, 4).multiply(rows), rows @ weight.dequantize().T)


def test_threads_share_the_outputs() -> None:
    weight = PackedWeight(example(700, 512, 128, 4), 4)
    rows, before = torch.randn(2, 512), _native.num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            _native.set_num_threads(threads)
            found.append(weight.multiply(rows))
    finally:
        _native.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_scales_that_bfloat16_cannot_hold_stay_in_float32() -> None:
    weight = example(4, 64, 32, 4)
    odd = QuantizedWeight(weight.codes, weight.scale + 1e-5, weight.zero)
    assert PackedWeight(weight, 4).scales.dtype == torch.bfloat16
    packed = PackedWeight(odd, 4)
    assert packed.scales.dtype == torch.float32
    assert torch.equal(packed.decoded(), odd.dequantize())


def test_copies_and_states_are_those_of_modules() -> None:
    layer = PackedLinear(PackedWeight(example(8, 64, 32, 4), 4), torch.randn(8))
    other = PackedLinear(PackedWeight(example(8, 64, 32, 4), 4), torch.zeros(8))
    other.load_state_dict(layer.state_dict())
    rows = torch.randn(3, 64)
    assert torch.equal(copy.deepcopy(layer)(rows), layer(rows))
    assert torch.equal(other(rows), layer(rows))


def test_embedding_rows_and_their_factor() -> None:
    weight = example(20, 64, 32, 8)
    ids = torch.tensor([[3, 19], [0, 3]])
    found = PackedEmbedding(PackedWeight(weight, 8), torch.bfloat16, 8.0)(ids)
    assert torch.equal(found, (weight.dequantize()[ids] * 8.0).bfloat16())


def test_bad_arguments() -> None:
    weight = PackedWeight(example(8, 64, 32, 4), 4)
    parts = {"codes": weight.codes, "scales": weight.scales, "zeros": weight.zeros}
    good = {"rows": torch.zeros(2, 64), **parts, "output": torch.full((2, 8), 7.0), "bits": 4}
    for name, value, message in (
        ("rows", torch.zeros(2, 64).bfloat16(), "rows: expected dtype float32"),
        ("rows", torch.zeros(2, 256), "codes: expected shape"),
        ("rows", torch.zeros(2, 96), "group_size: expected a multiple of 32 that divides the 96 inputs, found 48"),
        ("rows", torch.zeros(64, 2).T, "rows: expected a contiguous matrix"),
        ("codes", weight.codes[:, :32].contiguous(), r"codes: expected shape \[outputs, 64\], found \[8, 32\]"),
        ("codes", weight.codes.to(torch.int8), "codes: expected dtype uint8"),
        ("scales", weight.scales[:4], r"scales: expected shape \[8, groups"),
        ("scales", weight.scales.half(), "scales: expected dtype float32 or bfloat16"),
        ("zeros", weight.zeros[:, :1].contiguous(), "zeros: expected shape"),
        ("output", torch.zeros(2, 7), r"output: expected shape \[2, 8\]"),
        ("output", torch.zeros(2, 8).bfloat16(), "output: expected dtype float32"),
        ("bits", 5, "bits: expected 4, 6 or 8"),
    ):
        with pytest.raises(SkvqError, match=message):
            _native.weights_multiply(**(good | {name: value}))
    assert bool((good["output"] == 7.0).all())
    with pytest.raises(SkvqError, match="first: expected 4 rows below 8"):
        _native.weights_decode(*parts.values(), torch.zeros(4, 64), bits=4, first=5)
    with pytest.raises(SkvqError, match="packed: groups of 48 inputs"):
        PackedWeight(QuantizedWeight(torch.zeros(2, 48, dtype=torch.uint8), torch.ones(2, 1), torch.zeros(2, 1)), 4)

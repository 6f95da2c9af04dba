"""Rows of parts behind a matrix, in plain torch: bytes, arithmetic, means that turn, noise; and a store of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from parts_examples import CASES, PARTS, codec_options, frequencies_of, quarter_turn
from skvq.reference import ReferenceCodec
from skvq.reference_codes import pack_string, unpack_string
from skvq.reference_layer import ReferenceLayer
from skvq.reference_parts import RowParts, matrix_product, part_levels, turn_tables


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- bytes -----------------------------------------------------------------------------------------------------------


def test_codes_are_a_string_of_bits() -> None:
    codes = torch.tensor([1, 2, 3, 4, 5, 6, 7, 0, 7, 0, 0, 0, 0, 0, 0, 1], dtype=torch.uint8)
    assert pack_string(codes, 3).tolist() == [0b11010001, 0b01011000, 0b00011111, 7, 0, 0b00100000]
    for bits in (1, 2, 3, 4):
        some = torch.randint(0, 1 << bits, (3, 48), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
        packed = pack_string(some, bits)
        assert packed.shape == (3, bits * 6)
        assert torch.equal(unpack_string(packed, bits), some)
        for channel, bit in ((0, 0), (21, bits - 1), (47, 0)):
            place = bits * channel + bit
            assert bool(packed[1, place // 8] >> (place % 8) & 1) == bool(some[1, channel] >> bit & 1)


def test_where_the_codes_of_a_row_lie() -> None:
    """Part by part; five bits are a string of the low four, then one of the high ones."""
    parts = RowParts([(5, 16), (2, 16), (0, 16)], 48)
    codes = torch.zeros(32, dtype=torch.uint8)
    codes[3], codes[16 + 5] = 27, 3
    packed = parts.pack(codes)
    assert [(b, int(v)) for b, v in enumerate(packed) if v] == [(1, 11 << 4), (8, 1 << 3), (10 + 1, 3 << 2)]
    assert (parts.bytes_of(48), packed.shape) == (14, (14,))


def test_one_bit_has_the_two_levels_of_least_error() -> None:
    level = float(torch.tensor(math.sqrt(2.0 / math.pi), dtype=torch.float32))
    assert part_levels(1).tolist() == [-level, level]
    codes = RowParts([(1, 16)], 16).nearest(torch.tensor([-3.0, -1e-9, 0.0, 1e-9, 2.0] + [1.0] * 11))
    assert codes.tolist()[:5] == [0, 0, 0, 1, 1]


@pytest.mark.parametrize(("head_dim", "index"), CASES)
def test_codes_of_parts_survive_packing(head_dim: int, index: int) -> None:
    parts = RowParts(PARTS[head_dim][index], head_dim)
    t = normal(5, 2, head_dim) * 1.5
    codes = parts.nearest(t)
    packed = parts.pack(codes)
    assert packed.shape == (5, 2, sum(bits * width for bits, width in PARTS[head_dim][index]) // 8)
    assert torch.equal(parts.unpack(packed, head_dim), codes)
    values, first = parts.values(codes), 0
    assert values.shape == t.shape
    for bits, width in PARTS[head_dim][index]:
        channels = slice(first, first + width)
        nearest = (t[..., channels, None] - part_levels(bits)).abs().amin(-1) if bits else t[..., channels].abs()
        assert torch.allclose((values - t).abs()[..., channels], nearest, atol=1e-6)
        first += width


def test_a_row_by_hand() -> None:
    """|y| is 1 wherever there are codes, so the scale is 1; the last part has none and counts nowhere."""
    head_dim = 48
    sign = torch.where(torch.arange(head_dim) % 3 == 0, 1.0, -1.0)
    sign[32:] *= 100.0
    shift = torch.arange(head_dim).float()[None]
    codec = ReferenceCodec(
        head_dim=head_dim,
        format="parts",
        metadata="fp16",
        parts=[(4, 16), (1, 16), (0, 16)],
        matrix=torch.diag(torch.full((head_dim,), 0.5))[None],
        inverse=torch.diag(torch.full((head_dim,), 4.0))[None],
        shift=shift,
    )
    packed = codec.encode((2.0 * sign + shift[0])[None])[0].tolist()
    # of the 16 levels ±0.128, ±0.388, ±0.657, ±0.942, ±1.256, …, -1 has number 4 and 1 number 11
    codes = [11 if c % 3 == 0 else 4 for c in range(16)]
    assert packed[:8] == [codes[2 * b] | codes[2 * b + 1] << 4 for b in range(8)]
    assert packed[8:10] == [0b00100100, 0b01001001]  # channels 18, 21, 24, 27, 30
    assert bytes(packed[10:]) == np.float16(1.0).tobytes()
    assert (codec.code_bytes, codec.metadata_bytes, codec.row_bytes) == (10, 2, 12)
    assert codec.bits_per_element == 2.0
    decoded = codec.decode(torch.tensor([packed], dtype=torch.uint8))[0]
    levels = torch.tensor([float(part_levels(4)[11])] * 16 + [float(part_levels(1)[1])] * 16 + [0.0] * 16)
    assert torch.equal(decoded, sign.sign() * levels * 4.0 + shift[0])


@pytest.mark.parametrize(("head_dim", "index"), CASES)
@pytest.mark.parametrize("metadata", ["e4m3", "fp16"])
def test_bytes_say_what_codes_and_scale_say(head_dim: int, index: int, metadata: str) -> None:
    codec = ReferenceCodec(**codec_options(head_dim, index, metadata=metadata))
    rows = normal(7, head_dim) + 2.0
    packed = codec.encode(rows, 1, position=250)
    assert packed.shape == (7, codec.row_bytes)
    expected = codec.dequantize(codec.quantize(rows, 1, position=250), 1, position=250)
    assert torch.equal(codec.decode(packed, 1, position=250), expected)
    assert torch.equal(codec.fake_quantize(rows, 1, position=250), expected)
    assert codec.metadata_bytes == (1 if metadata == "e4m3" else 2)


def test_the_error_is_that_of_the_formats() -> None:
    """Normal y of spread 1: each channel loses what its format loses, a channel without codes all."""
    eye = torch.eye(128)[None]
    parts = [(5, 32), (3, 32), (2, 32), (1, 32)]
    codec = ReferenceCodec(head_dim=128, format="parts", metadata="fp16", parts=parts, matrix=eye, inverse=eye)
    rows = normal(6000, 128)
    assert codec.bits_per_element == 11 / 4 + 16 / 128
    error = (codec.fake_quantize(rows) - rows).square().mean(0).unflatten(0, (4, 32)).mean(-1)
    assert error.tolist() == pytest.approx([0.0025, 0.0345, 0.1175, 0.3634], rel=0.03)


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def test_the_matrix_product_adds_in_order() -> None:
    matrix, rows = normal(48, 48, seed=1), normal(3, 48, seed=2) * 1e3
    expected = np.zeros((3, 48), dtype=np.float32)
    for c in range(48):
        expected = expected + matrix[:, c].numpy()[None] * rows[:, c].numpy()[:, None]
    assert np.array_equal(matrix_product(matrix, rows).numpy(), expected)
    cancel = torch.zeros(1, 16)
    cancel[0, :3] = torch.tensor([1e8, 1.0, -1e8])
    assert not matrix_product(torch.ones(16, 16), cancel).any()
    assert matrix_product(torch.ones(16, 16), cancel.flip(-1)).tolist() == [[0.0] * 16]
    cancel[0, :3] = torch.tensor([1e8, -1e8, 1.0])
    assert matrix_product(torch.ones(16, 16), cancel).tolist() == [[1.0] * 16]


def test_the_scale_sums_lanes_over_the_parts_that_have_codes() -> None:
    eye = torch.eye(48)[None]
    codec = ReferenceCodec(
        head_dim=48,
        format="parts",
        metadata="fp16",
        clip=0.9,
        parts=[(2, 16), (1, 16), (0, 16)],
        matrix=eye,
        inverse=eye,
    )
    rows = normal(4, 48) * 3
    lanes = rows[:, :16] ** 2 + rows[:, 16:32] ** 2
    for width in (8, 4, 2, 1):
        lanes = lanes[:, :width] + lanes[:, width : 2 * width]
    scale = torch.tensor(0.9) * torch.sqrt(lanes[:, 0] / torch.tensor(32.0))
    assert torch.equal(codec.quantize(rows).scale[:, 0], scale.half().float())


@pytest.mark.parametrize("position", [0, 1, 255, 256, 5000, 131071, -1, -256, -700])
def test_the_mean_turns_as_a_rotary_embedding_turns_it(position: int) -> None:
    mean, theta = normal(64) * 5, frequencies_of(64)
    cosine, sine = turn_tables(theta, position, 3)
    found = mean * cosine + quarter_turn(mean) * sine
    angle = torch.arange(position, position + 3)[:, None].double() * theta.double()
    # transformers' `rotate_half`
    expected = mean.double() * angle.cos() + quarter_turn(mean).double() * angle.sin()
    assert float((found.double() - expected).abs().max()) < 4e-6


def test_every_row_has_its_own_position() -> None:
    codec = ReferenceCodec(**codec_options(64, 1))
    rows, start = normal(600, 64), -270
    whole = codec.encode(rows, 1, position=start)
    for index in (0, 13, 14, 15, 270, 300, 525, 526, 599):
        assert torch.equal(codec.encode(rows[index : index + 1], 1, position=start + index)[0], whole[index])
        assert torch.equal(codec.encode(rows[index], 1, position=start + index), whole[index])
    batch = codec.fake_quantize(rows.expand(2, 3, -1, -1), 1, position=start)
    assert torch.equal(batch[1, 2], codec.fake_quantize(rows, 1, position=start))
    assert not torch.equal(whole, codec.encode(rows, 1, position=start + 1))


def test_rows_near_a_turning_mean_come_back() -> None:
    options = codec_options(64, seed=3)
    codec = ReferenceCodec(**options | {"inverse": torch.linalg.inv(options["matrix"])})
    angle = torch.arange(1000, 1200)[:, None] * options["frequencies"]
    mean = options["shift"][0] * angle.cos() + options["shift_sine"][0] * angle.sin()
    rows = mean + 0.01 * normal(200, 64)
    assert float((codec.fake_quantize(rows, 0, position=1000) - rows).abs().max()) < 0.06
    assert float((codec.fake_quantize(rows, 0, position=0) - rows).abs().max()) > 0.5


def test_rows_that_are_not_finite_stay_alone() -> None:
    codec = ReferenceCodec(**codec_options(80, 1))
    rows = normal(6, 80)
    clean = codec.encode(rows)
    rows[2, 7], rows[4, 0] = math.nan, math.inf
    with pytest.raises(ValueError, match="2 of 6"):
        codec.encode(rows)
    packed = codec.encode(rows, nonfinite="propagate")
    assert not packed[2, : codec.code_bytes].any()
    assert torch.isnan(codec.decode(packed)[[2, 4]]).all()
    assert torch.equal(packed[[0, 1, 3, 5]], clean[[0, 1, 3, 5]])


def test_noise_is_what_the_error_does_to_an_exponent() -> None:
    """κ measured on the codec's own errors: then E[exp(q·x̂ - noise)] is E[exp(q·x)]."""
    options = codec_options(64, seed=5, turning=False, noise=False)
    options |= {"inverse": torch.linalg.inv(options["matrix"]), "parts": [(3, 32), (2, 32)], "metadata": "fp16"}
    codec = ReferenceCodec(**options)
    y = normal(40_000, 64, seed=6)
    rows = (y.double() @ options["inverse"][0].double().mT + options["shift"][0].double()).float()
    coded = codec.quantize(rows)
    decoded = codec.dequantize(coded)
    errors = (decoded - rows) @ options["matrix"][0].mT / coded.scale
    noisy = ReferenceCodec(**options, noise=errors.square().mean(0))
    query = 0.3 * normal(64, seed=7)
    assert noisy.map is not None
    taken = coded.scale[:, 0].square() * noisy.map.score_noise(query, 0)
    error = (decoded - rows) @ query
    assert float(taken.mean()) == pytest.approx(0.5 * float(error.var()), rel=0.05)
    assert float((error - taken).exp().mean()) == pytest.approx(1.0, abs=0.02)
    assert float(error.exp().mean()) > 1.04


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": [(2, 48)]}, "expected widths that add up to head_dim=64"),
        ({"parts": [(2, 40), (2, 24)]}, "width 40: expected a positive multiple of 16"),
        ({"parts": [(8, 64)]}, "expected 1 to 5 bits"),
        ({"parts": [(0, 64)]}, "0 for the last only"),
        ({"parts": [(0, 32), (2, 32)]}, "0 for the last only"),
        ({"parts": None}, "expected widths that add up"),
        ({"matrix": None}, "matrix, inverse: expected both"),
        ({"inverse": torch.zeros(2, 64, 63)}, r"inverse: expected finite numbers \[2, 64, 64\], got \[2, 64, 63\]"),
        ({"matrix": torch.full((2, 64, 64), math.nan)}, "matrix: expected finite"),
        ({"frequencies": None}, "shift_sine, frequencies: expected both or neither"),
        ({"shift": None}, "shift: expected one beside shift_sine"),
        ({"noise": torch.full((64,), -0.1)}, "noise: expected no negative number"),
        ({"group_size": 32}, "group_size: expected none with format='parts'"),
        ({"symmetric": False}, "symmetric: expected none"),
        ({"codebook": "nf4"}, "codebook='nf4': expected one of 'lloyd-max', 'uniform' with parts"),
        ({"codebook": [-1.0, 1.0]}, "codebook=.*: expected a name with parts"),
        ({"rule": "range"}, "rule: expected none"),
        ({"refinements": 1}, "refinements: expected none"),
        ({"unbiased": True}, "unbiased: expected none"),
        ({"rotation": "hadamard"}, "rotation='hadamard': expected one of 'identity'"),
        ({"permutation": list(range(64))}, "permutation: expected none"),
        ({"block": 128, "shift": None}, "block: expected none"),
        ({"scale": torch.ones(2, 64)}, "scale: expected none"),
        ({"format": "2"}, "parts: expected none with format='2'"),
    ],
)
def test_what_does_not_go_together_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReferenceCodec(**codec_options(64) | change)


# ---- the store -------------------------------------------------------------------------------------------------------

SINKS, WINDOW = 3, 8


def make_layer(**options: Any) -> ReferenceLayer:
    keys = ReferenceCodec(**codec_options(64, 1))
    values = ReferenceCodec(**codec_options(32, turning=False, noise=False, seed=1))
    common: dict[str, Any] = {"sinks": SINKS, "window": WINDOW, "dtype": "float32"}
    return ReferenceLayer(num_key_value_heads=2, keys=keys, values=values, **common | options)


def tokens(count: int, batch: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return normal(batch, 2, count, 64, seed=seed) * 2 + 1, normal(batch, 2, count, 32, seed=seed + 1)


def decoded(layer: ReferenceLayer) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = (torch.empty(layer.batch_size, 2, layer.length, width) for width in (64, 32))
    layer.decode_keys(keys)
    layer.decode_values(values)
    return keys, values


def test_a_row_is_packed_at_its_position() -> None:
    whole, stepped, rows = make_layer(), make_layer(), tokens(60)
    whole.append(*rows)
    for start in range(0, 60, 7):
        stepped.append(*(part[:, :, start : start + 7] for part in rows))
    assert whole.packed_tokens == 60 - SINKS - WINDOW
    codec = ReferenceCodec(**codec_options(64, 1))
    expected = codec.fake_quantize(rows[0][:, 1, SINKS : 60 - WINDOW], 1, position=SINKS)
    assert torch.equal(decoded(whole)[0][:, 1, SINKS : 60 - WINDOW], expected)
    assert all(torch.equal(a, b) for a, b in zip(decoded(whole), decoded(stepped), strict=True))
    assert whole.nbytes == 2 * 2 * (49 * (8 + 4 + 2 + 1 + 10 + 2 + 1) + 11 * 4 * (64 + 32))


def attended(layer: ReferenceLayer, query: torch.Tensor, **options: Any) -> torch.Tensor:
    output = torch.empty(*query.shape[:-1], 32)
    layer.attend(query, output, scale=0.2, **options)
    return output


def test_a_padded_sequence_is_stored_and_attended_to_as_if_alone() -> None:
    padding, rows, query = [0, 5, 30, 80], tokens(70, batch=4), normal(4, 4, 2, 64, seed=9)
    layer = make_layer()
    layer.set_padding(padding)
    for start in range(0, 70, 11):
        layer.append(*(part[:, :, start : start + 11] for part in rows))
    layer.gather([0, 1, 3, 2])
    padding = [0, 5, 80, 30]
    layer.crop(66)
    found = attended(layer, query, causal=True)
    order = [0, 1, 3, 2]
    for row, count in enumerate(padding):
        if count > 66:
            assert not found[row].any()
            continue
        alone = make_layer()
        alone.append(*(part[order[row] : order[row] + 1, :, count:] for part in rows))
        alone.crop(66 - count)
        for mine, theirs in zip(decoded(layer), decoded(alone), strict=True):
            assert torch.equal(mine[row, :, count:], theirs[0])
        assert torch.allclose(found[row], attended(alone, query[row : row + 1], causal=True)[0], atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_noise_is_taken_off_the_scores_of_packed_tokens(softcap: float | None) -> None:
    layer, rows, query = make_layer(), tokens(40), normal(2, 4, 1, 64, seed=4)
    layer.append(*rows)
    packed, codec = slice(SINKS, 40 - WINDOW), ReferenceCodec(**codec_options(64, 1))
    keys, values = decoded(layer)
    assert codec.map is not None
    for fresh in (0, 12):
        seen = keys.clone()
        scores, scales = torch.empty(2, 4, 1, 40), torch.zeros(2, 2, 40)
        for head in range(2):
            scales[:, head, packed] = codec.quantize(rows[0][:, head, packed], head, position=SINKS).scale[..., 0]
        if fresh:
            seen[:, :, -fresh:], scales[:, :, -fresh:] = rows[0][:, :, -fresh:], 0.0
        for head in range(4):
            folded = 0.2 * query[:, head] @ codec.map.inverse[head // 2]
            taken = 0.5 * scales[:, head // 2].square() * (folded.square() @ codec_options(64, 1)["noise"])
            scores[:, head] = 0.2 * query[:, head] @ seen[:, head // 2].mT - taken[:, None]
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        given = values.clone()
        options: dict[str, Any] = {"softcap": softcap}
        if fresh:
            given[:, :, -fresh:] = rows[1][:, :, -fresh:]
            options |= {"fresh_keys": rows[0][:, :, -fresh:], "fresh_values": rows[1][:, :, -fresh:]}
        expected = scores.softmax(-1) @ given.repeat_interleave(2, 1)
        assert torch.allclose(attended(layer, query, **options), expected, atol=1e-5)

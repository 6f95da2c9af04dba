"""Laws of the reference codec and the reference layer; the native ones are compared with them elsewhere."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from skvq.reference import ReferenceCodec, hadamard, lane_sum
from skvq.reference_codes import (
    LEVEL_COUNTS,
    NORMAL_PAIRS,
    code_bytes,
    lloyd_max_levels,
    pack_codes,
    unpack_codes,
)
from skvq.reference_layer import ReferenceLayer

HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("code_format", LEVEL_COUNTS)
def test_codes_survive_packing(code_format: str, head_dim: int) -> None:
    count = head_dim // 2 if code_format == "1.5" else head_dim
    codes = torch.randint(0, LEVEL_COUNTS[code_format], (7, 3, count), generator=torch.Generator().manual_seed(1)).to(
        torch.uint8
    )
    packed = pack_codes(codes, code_format)
    assert packed.dtype == torch.uint8
    assert packed.shape == (7, 3, code_bytes(code_format, head_dim))
    assert torch.equal(unpack_codes(packed, code_format, head_dim), codes)


def test_where_the_bits_lie() -> None:
    def channel(code_format: str, index: int, code: int, count: int = 64) -> list[tuple[int, int]]:
        codes = torch.zeros(count, dtype=torch.uint8)
        codes[index] = code
        return [(b, int(v)) for b, v in enumerate(pack_codes(codes, code_format)) if v]

    assert channel("8", 5, 200) == [(5, 200)]
    assert channel("4", 33, 9) == [(1, 9 << 4)]
    assert channel("2", 50, 3) == [(2, 3 << 6)]
    assert channel("3", 50, 5) == [(2, 1 << 6), (16 + 6, 1 << 2)]
    assert channel("1.5", 18, 7, count=32) == [(2, 3 << 4), (8 + 2, 1 << 2)]
    assert channel("1.6", 14, 2) == [(1, (256 * 2 * 27 + 242) // 243)]


def test_every_ternary_byte() -> None:
    digits = torch.cartesian_prod(*[torch.arange(3)] * 5).to(torch.uint8)
    packed = pack_codes(digits, "1.6")
    assert packed.unique().numel() == 243
    assert torch.equal(unpack_codes(packed, "1.6", 5), digits)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("code_format", [*LEVEL_COUNTS, "raw"])
@pytest.mark.parametrize("metadata", ["e4m3", "fp16"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_bytes_say_what_codes_and_metadata_say(code_format: str, head_dim: int, metadata: str, symmetric: bool) -> None:
    codec = ReferenceCodec(head_dim=head_dim, format=code_format, metadata=metadata, symmetric=symmetric, refinements=1)
    rows = normal(9, head_dim) * 3 + 0.5
    packed = codec.encode(rows)
    assert packed.shape == (9, codec.row_bytes)
    assert codec.row_bytes == codec.code_bytes + codec.metadata_bytes
    expected = rows if code_format == "raw" else codec.dequantize(codec.quantize(rows))
    assert torch.equal(codec.decode(packed), expected)
    assert torch.equal(codec.fake_quantize(rows), expected)


def test_bits_per_element_count_everything() -> None:
    codec = ReferenceCodec(head_dim=128, format="2", block=256)
    assert codec.bits_per_element == 8 * (32 + 1 + (256 + 256) / 256) / 128
    assert ReferenceCodec(head_dim=128, format="1.6", block=256, scale_exponent=0.0).statistics_bytes == 258
    assert ReferenceCodec(head_dim=128, format="1.6", group_size=32, symmetric=False).row_bytes == 26 + 8


# ---- codebooks and transforms ----------------------------------------------------------------------------------------


def cell_moments(low: float, high: float) -> tuple[float, float]:
    """Mass and centroid of a standard normal variable between two borders."""
    mass = 0.5 * (math.erfc(low / math.sqrt(2)) - math.erfc(high / math.sqrt(2)))
    return mass, (math.exp(-low * low / 2) - math.exp(-high * high / 2)) / math.sqrt(2 * math.pi) / mass


@pytest.mark.parametrize(
    ("count", "error"),
    [(2, 0.3633802), (3, 0.1901740), (4, 0.1174818), (8, 0.0345478), (16, 0.0095010), (256, 4.1185e-5)],
)
def test_lloyd_max_levels_are_centroids(count: int, error: float) -> None:
    levels = lloyd_max_levels(count)
    assert levels == tuple(-level for level in reversed(levels))
    borders = [-math.inf, *((a + b) / 2 for a, b in pairwise(levels)), math.inf]
    explained = 0.0
    for level, low, high in zip(levels, borders, borders[1:], strict=False):
        mass, centroid = cell_moments(low, high)
        assert level == pytest.approx(centroid, abs=3e-5 if count == 256 else 3e-7)
        explained += mass * centroid * centroid
    assert 1 - explained == pytest.approx(error, rel=1e-4)


def test_normal_pairs_are_centroids() -> None:
    points = normal(400_000, 2, seed=3).to(torch.float64)
    points = torch.cat([points, -points, points * torch.tensor([1.0, -1.0]), points * torch.tensor([-1.0, 1.0])])
    words = torch.tensor(NORMAL_PAIRS, dtype=torch.float64)
    nearest = torch.cdist(points, words).argmin(-1)
    for index, word in enumerate(words):
        assert torch.allclose(points[nearest == index].mean(0), word, atol=5e-3)
    assert float(((points - words[nearest]) ** 2).mean()) == pytest.approx(0.2012, abs=1e-3)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_hadamard_is_orthonormal_and_its_own_inverse(head_dim: int) -> None:
    matrix = hadamard(torch.eye(head_dim))
    assert torch.allclose(matrix @ matrix.T, torch.eye(head_dim), atol=1e-6)
    assert torch.allclose(matrix, matrix.T)
    block = head_dim & -head_dim
    assert torch.allclose(matrix.abs().amax(-1), torch.full((head_dim,), block**-0.5))


def test_lane_sum_order() -> None:
    x = normal(80)
    lanes = [sum(x[lane::16].tolist()[1:], x[lane].item()) for lane in range(16)]
    assert float(lane_sum(x)) == pytest.approx(sum(lanes), rel=1e-5)
    big = torch.zeros(32)
    big[0], big[8], big[16] = 1e8, 1.0, -1e8  # lane 0 cancels before lane 8 is added
    assert float(lane_sum(big)) == 1.0


@pytest.mark.parametrize(
    ("code_format", "error"), [("2", 0.1175), ("3", 0.0345), ("4", 0.0095), ("1.6", 0.1902), ("1.5", 0.2012)]
)
def test_error_of_normal_rows(code_format: str, error: float) -> None:
    rows = normal(4000, 128)
    codec = ReferenceCodec(head_dim=128, format=code_format, metadata="fp16", rotation="identity")
    assert float((codec.fake_quantize(rows) - rows).square().mean()) == pytest.approx(error, rel=0.02)


def test_refinements_lower_the_error() -> None:
    rows = normal(500, 64) ** 3
    errors = [
        float(
            (ReferenceCodec(head_dim=64, format="2", metadata="fp16", refinements=k).fake_quantize(rows) - rows)
            .square()
            .sum()
        )
        for k in range(4)
    ]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("rule", ["norm", "range"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("code_format", ["2", "1.6", "1.5"])
def test_static_parameters_and_permutation_undo_themselves(code_format: str, symmetric: bool, rule: str) -> None:
    shift, scale = normal(2, 64, seed=5) * 40, normal(2, 64, seed=6).abs() + 0.1
    order = [torch.randperm(64, generator=torch.Generator().manual_seed(head)).tolist() for head in range(2)]
    rows = normal(300, 64) * scale[1] + shift[1]
    codec = ReferenceCodec(
        head_dim=64,
        format=code_format,
        symmetric=symmetric,
        rule=rule,
        shift=shift,
        scale=scale,
        permutation=order,
        group_size=32,
    )
    error = (codec.decode(codec.encode(rows, head=1), head=1) - rows) / scale[1]
    assert float(error.square().mean()) < 0.45
    assert float(((codec.decode(codec.encode(rows, head=0), head=0) - rows) / scale[1]).square().mean()) > 1.0


def test_uniform_range_hits_both_ends() -> None:
    rows = torch.linspace(-3, 7, 64)[None]
    codec = ReferenceCodec(
        head_dim=64, format="4", codebook="uniform", rule="range", symmetric=False, rotation="identity", metadata="fp16"
    )
    decoded = codec.fake_quantize(rows)
    assert float((decoded - rows).abs().max()) < 10 / 15 / 2 + 0.01
    assert codec.quantize(rows).codes.unique().numel() == 16


# ---- rows that are not finite, and degenerate ones -------------------------------------------------------------------


@pytest.mark.parametrize("code_format", LEVEL_COUNTS)
def test_nan_rows_are_refused_or_stay_alone(code_format: str) -> None:
    codec = ReferenceCodec(head_dim=64, format=code_format, symmetric=False)
    rows = normal(6, 64)
    clean = codec.encode(rows)
    rows[2, 7], rows[4, 0] = math.nan, math.inf
    with pytest.raises(ValueError, match="2 of 6"):
        codec.encode(rows)
    packed = codec.encode(rows, nonfinite="propagate")
    assert not packed[2, : codec.code_bytes].any()
    decoded = codec.decode(packed)
    assert torch.isnan(decoded[[2, 4]]).all()
    assert torch.equal(packed[[0, 1, 3, 5]], clean[[0, 1, 3, 5]])


def test_block_statistics_leave_out_what_is_not_finite() -> None:
    codec = ReferenceCodec(head_dim=64, format="2", block=128)
    rows = normal(128, 64) * 5 + 3
    spoilt = torch.cat([rows, torch.full((1, 64), math.nan)])
    for clean, other in zip(codec.block_statistics(rows), codec.block_statistics(spoilt), strict=True):
        assert torch.equal(clean, other)


@pytest.mark.parametrize(("exponent", "ratio"), [(0.0, 1.0), (0.5, 10.0), (1.0, 100.0)])
def test_scale_exponent(exponent: float, ratio: float) -> None:
    codec = ReferenceCodec(head_dim=64, format="2", block=128, scale_exponent=exponent, block_shift=False)
    rows = normal(128, 64).sign()
    rows[:, 0] *= 100
    shift, scale = codec.block_statistics(rows)
    assert not shift.any()
    assert float(scale[0] / scale[1]) == pytest.approx(ratio, rel=2e-3)


def test_constant_and_zero_channels() -> None:
    codec = ReferenceCodec(head_dim=64, format="2", block=128)
    for value in (0.0, 7.0):
        rows = torch.full((128, 64), value)
        shift, scale = codec.block_statistics(rows)
        assert torch.equal(shift, rows[0])
        assert torch.equal(scale, torch.ones(64))
        assert torch.equal(codec.fake_quantize(rows), rows)


@pytest.mark.parametrize(
    ("keyword", "value"),
    [("head_dim", 72), ("format", "5"), ("group_size", 48), ("metadata", "fp8"), ("rule", "max"),
     ("rotation", "random"), ("block", 100), ("scale_exponent", 1.5), ("codebook", "normal"),
     ("codebook", [3.0, 2.0, 1.0, 0.0])],
)  # fmt: skip
def test_errors_name_the_argument(keyword: str, value: object) -> None:
    with pytest.raises(ValueError, match=keyword):
        ReferenceCodec(**{"head_dim": 64, "format": "2", keyword: value})  # type: ignore[arg-type]


# ---- regions ---------------------------------------------------------------------------------------------------------


def make_layer(
    block: int = 0, window: int = 16, sinks: int = 3, code_format: str = "2", **options: object
) -> ReferenceLayer:
    keys = ReferenceCodec(head_dim=64, format=code_format, block=block)
    values = ReferenceCodec(head_dim=32, format=code_format)
    return ReferenceLayer(
        num_key_value_heads=2,
        keys=keys,
        values=values,
        sinks=sinks,
        window=window,
        dtype="float32",
        **options,  # type: ignore[arg-type]
    )


def tokens(count: int, batch: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return normal(batch, 2, count, 64, seed=seed) * 2 + 1, normal(batch, 2, count, 32, seed=seed + 1)


def decoded(layer: ReferenceLayer) -> tuple[torch.Tensor, torch.Tensor]:
    keys = torch.empty(layer.batch_size, 2, layer.length, 64)
    values = torch.empty(layer.batch_size, 2, layer.length, 32)
    layer.decode_keys(keys)
    layer.decode_values(values)
    return keys, values


@pytest.mark.parametrize("block", [0, 128])
@pytest.mark.parametrize("chunk", [1, 7, 300])
def test_regions(block: int, chunk: int) -> None:
    layer, (keys, values) = make_layer(block), tokens(300)
    for start in range(0, 300, chunk):
        layer.append(keys[:, :, start : start + chunk], values[:, :, start : start + chunk])
        behind = max(0, layer.length - 3)
        with_statistics = behind // block * block if block else behind
        assert layer.packed_tokens == min(max(0, behind - 16), with_statistics)
        assert layer.sink_tokens + layer.packed_tokens + layer.window_tokens == layer.length
    got, _ = decoded(layer)
    exact = torch.ones(300, dtype=torch.bool)
    exact[3 : 3 + layer.packed_tokens] = False
    assert torch.equal(got[:, :, exact], keys[:, :, exact])
    assert not torch.equal(got[:, :, ~exact], keys[:, :, ~exact])
    whole = make_layer(block)
    whole.append(keys, values)
    assert all(torch.equal(a, b) for a, b in zip(decoded(whole), decoded(layer), strict=True))
    assert whole.nbytes == layer.nbytes


def test_block_rows_take_their_own_statistics() -> None:
    layer, (keys, values) = make_layer(128), tokens(3 + 256 + 16)
    layer.append(keys, values)
    codec = ReferenceCodec(head_dim=64, format="2", block=128)
    assert torch.equal(decoded(layer)[0][:, :, 3:259], codec.fake_quantize(keys[:, :, 3:259]))
    assert layer.bits_per_element == 8 * layer.nbytes / (2 * 2 * 275 * (64 + 32))


@pytest.mark.parametrize("block", [0, 128])
@pytest.mark.parametrize("length", [290, 280, 200, 131, 100, 3, 2, 0])
def test_crop_and_go_on(block: int, length: int) -> None:
    layer, (keys, values) = make_layer(block), tokens(300)
    layer.append(keys, values)
    before, packed = decoded(layer), layer.packed_tokens
    layer.crop(length)
    assert layer.length == length
    assert layer.packed_tokens == max(0, min(packed, length - 3))
    assert all(torch.equal(a, b[:, :, :length]) for a, b in zip(decoded(layer), before, strict=True))
    more = tokens(300 - length, seed=9)
    layer.append(*more)
    assert layer.packed_tokens == packed
    assert torch.equal(decoded(layer)[0][:, :, -16:], torch.cat([keys[:, :, :length], more[0]], 2)[:, :, -16:])


def test_a_cut_block_keeps_its_statistics() -> None:
    keys = ReferenceCodec(head_dim=64, format="2", block=256)
    values = ReferenceCodec(head_dim=32, format="2", block=128)
    layer = ReferenceLayer(num_key_value_heads=2, keys=keys, values=values, sinks=3, window=16, dtype="float32")
    layer.append(*tokens(3 + 256 + 16 + 200))
    assert layer.packed_tokens == 256
    before = decoded(layer)
    layer.crop(3 + 100)
    layer.append(*(rows[:, :, 103 : 3 + 120 + 16] for rows in tokens(475)))
    assert layer.packed_tokens == 120
    layer.append(*(rows[:, :, 139:258] for rows in tokens(475)))
    assert layer.packed_tokens == 128  # the values' second block was dropped, so it waits for its last row
    layer.append(*(rows[:, :, 258:259] for rows in tokens(475)))
    assert layer.packed_tokens == 240
    layer.append(*(rows[:, :, 259:475] for rows in tokens(475)))
    assert layer.packed_tokens == 256
    assert all(torch.equal(a, b) for a, b in zip(decoded(layer), before, strict=True))


def test_a_cut_block_without_packed_rows_forgets_its_statistics() -> None:
    rows, other = tokens(3 + 150), tokens(3 + 150, seed=5)
    layer, straight = make_layer(128, window=150), make_layer(128, window=150)
    layer.append(*rows)
    exact, statistics = 2 * 2 * 153 * (64 + 32) * 4, 2 * 2 * (64 + 64) * 2
    assert (layer.packed_tokens, layer.nbytes) == (0, exact + statistics)
    layer.crop(3 + 100)
    straight.append(*(part[:, :, :103] for part in rows))
    assert layer.nbytes == straight.nbytes
    for each in (layer, straight):
        each.append(*(part[:, :, :150] for part in other))
    assert layer.packed_tokens == 100
    assert all(torch.equal(a, b) for a, b in zip(decoded(layer), decoded(straight), strict=True))


def test_gather_clone_reset() -> None:
    layer, (keys, values) = make_layer(128), tokens(200, batch=3)
    layer.append(keys, values)
    other = layer.clone()
    layer.gather([2, 0, 0, 1])
    assert layer.batch_size == 4
    assert other.batch_size == 3
    assert torch.equal(decoded(layer)[0], decoded(other)[0][[2, 0, 0, 1]])
    layer.append(*tokens(100, batch=4, seed=2))
    assert layer.packed_tokens == 256
    assert other.length == 200
    layer.reset()
    assert (layer.length, layer.batch_size, layer.nbytes) == (0, 0, 0)


def test_refused_append_changes_nothing() -> None:
    layer, (keys, values) = make_layer(), tokens(40)
    layer.append(keys, values)
    spoilt = values[:, :, :1].clone()
    spoilt[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="values"):
        layer.append(keys[:, :, :1], spoilt)
    assert layer.length == 40
    layer = make_layer(nonfinite="propagate")
    values[1, 1, 10, 3] = math.nan
    layer.append(keys, values)
    assert torch.isnan(decoded(layer)[1][1, 1, 10]).all()
    assert int(torch.isnan(decoded(layer)[1]).sum()) == 32


# ---- attention -------------------------------------------------------------------------------------------------------


def test_attention_equals_sdpa_on_decoded_rows() -> None:
    layer, (keys, values) = make_layer(), tokens(60)
    layer.append(keys, values)
    query, output = normal(2, 4, 5, 64, seed=4), torch.empty(2, 4, 5, 32)
    got_keys, got_values = (rows.repeat_interleave(2, 1) for rows in decoded(layer))
    causal = torch.ones(5, 60, dtype=torch.bool).tril(55)
    left_padded = torch.arange(60)[None, None, None] >= torch.tensor([0, 20])[:, None, None, None]
    for mask in (None, left_padded, normal(1, 4, 5, 60, seed=8)):
        layer.attend(query, output, scale=0.1, mask=mask, causal=True)
        bias = torch.zeros(2, 4, 5, 60).masked_fill(~causal, -math.inf)
        if mask is not None:
            bias = bias.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else bias + mask
        expected = torch.nn.functional.scaled_dot_product_attention(
            query, got_keys, got_values, attn_mask=bias, scale=0.1
        )
        assert torch.allclose(output, expected, atol=1e-5)


def test_fresh_rows_are_read_in_full_precision() -> None:
    layer, (keys, values) = make_layer(), tokens(60)
    layer.append(keys, values)
    query, output, expected = normal(2, 2, 60, 64, seed=4), torch.empty(2, 2, 60, 32), torch.empty(2, 2, 60, 32)
    layer.attend(query, output, scale=0.1, causal=True, fresh_keys=keys, fresh_values=values)
    exact = make_layer(code_format="raw")
    exact.append(keys, values)
    exact.attend(query, expected, scale=0.1, causal=True)
    assert torch.equal(output, expected)


def test_softcap_sink_logits_and_empty_sight() -> None:
    layer, (keys, values) = make_layer(), tokens(8)
    layer.append(keys, values)
    query, output = normal(2, 2, 1, 64, seed=4), torch.empty(2, 2, 1, 32)
    layer.attend(query, output, scale=1.0, softcap=2.0, sink_logits=torch.tensor([0.0, 50.0]))
    scores = 2.0 * torch.tanh((query @ keys.transpose(-1, -2)) / 2.0)
    weights = torch.cat([scores, torch.tensor([0.0, 50.0])[None, :, None, None].expand(2, 2, 1, 1)], -1).softmax(-1)[
        ..., :8
    ]
    assert torch.allclose(output, weights @ values, atol=1e-5)
    layer.attend(query, output, scale=1.0, mask=torch.zeros(1, 1, 1, 8, dtype=torch.bool))
    assert not output.any()


def test_a_masked_nan_harms_nobody() -> None:
    layer, (keys, values) = make_layer(nonfinite="propagate"), tokens(40)
    keys[0, :, 5], values[0, :, 5] = math.nan, math.nan
    layer.append(keys, values)
    query, output = normal(2, 2, 1, 64, seed=4), torch.empty(2, 2, 1, 32)
    layer.attend(query, output, scale=0.1)
    assert torch.isnan(output[0]).all()
    assert torch.isfinite(output[1]).all()
    layer.attend(query, output, scale=0.1, mask=torch.arange(40)[None, None, None] != 5)
    assert torch.isfinite(output).all()

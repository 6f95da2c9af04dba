"""The grid of quantized weights and its words: against plain arithmetic, autograd and compressed-tensors' packing."""

import pytest
import torch

from skvq import SkvqError
from skvq.weights.grid import OPEN_CLIP, QuantizedWeight, WeightOptions, encode, fake_quantize, search_clips
from skvq.weights.packing import pack, packed_tensors, unpack, unpacked_weight

BITS = (3, 4, 8)


def weight(outputs: int = 24, inputs: int = 96, seed: int = 0) -> torch.Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


def clips(outputs: int, groups: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(outputs, groups, generator=generator) + 1.0 for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("bits", BITS)
def test_weights_of_the_grid_stay(bits: int) -> None:
    """Groups whose codes reach both ends are read back exactly."""
    options, generator = WeightOptions(bits, 32), torch.Generator().manual_seed(0)
    codes = torch.randint(0, options.levels + 1, (24, 3, 32), generator=generator)
    codes[..., 3], codes[..., 17] = 0, options.levels
    zero = torch.randint(0, options.levels + 1, (24, 3), generator=generator)
    scale = (torch.rand(24, 3, generator=generator) + 0.1).bfloat16().float()
    given = QuantizedWeight(codes.flatten(1).to(torch.uint8), scale, zero.to(torch.uint8))
    made = encode(given.dequantize(), options)
    assert torch.equal(made.codes, given.codes)
    assert torch.equal(made.scale, given.scale)
    assert torch.equal(made.zero, given.zero)


@pytest.mark.parametrize("bits", BITS)
def test_round_to_nearest_is_off_by_half_a_step(bits: int) -> None:
    options = WeightOptions(bits, 32)
    w = weight()
    made = encode(w, options)
    step = made.scale.repeat_interleave(32, 1)
    # the scale's rounding moves the ends of the range by up to 2^bits · 2^-9 steps, the zero point's by half a step
    assert bool(((made.dequantize() - w).abs() <= step * (1.0 + 2.0 ** (bits - 8))).all())
    inside = (made.codes > 0) & (made.codes < options.levels)
    assert bool(((made.dequantize() - w).abs() <= 0.5001 * step)[inside].all())


def test_zero_is_on_the_grid() -> None:
    w = weight().abs() + 1.0
    w[:, ::5] = 0.0
    made = encode(w, WeightOptions(4, 32)).dequantize()
    assert bool((made[:, ::5] == 0.0).all())


def test_a_group_of_zeros() -> None:
    w = weight()
    w[:, :32] = 0.0
    made = encode(w, WeightOptions(4, 32)).dequantize()
    assert bool((made[:, :32] == 0.0).all())
    assert bool(torch.isfinite(made).all())


def offsets(seed: int = 7) -> torch.Tensor:
    return torch.rand(weight().shape, generator=torch.Generator().manual_seed(seed)) - 0.5


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("offset", [None, offsets()])
def test_training_and_storing_make_the_same_weight(bits: int, offset: torch.Tensor | None) -> None:
    options, (low, high) = WeightOptions(bits, 32), clips(24, 3)
    trained = fake_quantize(weight(), options, low, high, offset=offset)
    assert torch.equal(trained, encode(weight(), options, low, high, offset).dequantize())


def test_an_offset_of_half_a_step_rounds_up_or_down() -> None:
    options, w = WeightOptions(8, 32), weight()
    nearest = encode(w, options)
    up, down = (encode(w, options, None, None, torch.full_like(w, side * 0.49)).codes.int() for side in (1, -1))
    moved = (up - down)[(nearest.codes > 0) & (nearest.codes < 255)]
    assert bool(((up >= nearest.codes) & (down <= nearest.codes)).all())
    assert set(moved.tolist()) == {0, 1}  # 0 where the weight lies on a level, nearly
    assert float((moved == 1).float().mean()) > 0.9


@pytest.mark.parametrize("learnt", [False, True])
def test_gradients_are_those_of_straight_through_arithmetic(learnt: bool) -> None:
    """Against the same grid written with autograd."""
    options, (low, high), w = WeightOptions(4, 32), clips(24, 3), weight()
    leaves = [low, high, *([offsets()] if learnt else [])]
    probe = weight(seed=5)

    def straight(x: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        return rounded.detach() + (x - x.detach())  # exactly `rounded`: half-way sums would fall off the grid

    def clamped(x: torch.Tensor) -> torch.Tensor:
        """clamp(0, 15), whose gradient passes at both ends: every group has codes there."""
        return torch.where((x >= 0) & (x <= 15), x, x.detach().clamp(0, 15))

    def plain(low: torch.Tensor, high: torch.Tensor, offset: torch.Tensor | None = None) -> torch.Tensor:
        groups = w.unflatten(1, (-1, 32))
        least = groups.amin(-1, keepdim=True).clamp(max=0) * low.sigmoid()[..., None]
        most = groups.amax(-1, keepdim=True).clamp(min=0) * high.sigmoid()[..., None]
        scale = (most - least) / 15
        scale = straight(scale, scale.bfloat16().float())
        zero = straight(-least / scale, (-least / scale).round())
        steps = groups / scale if offset is None else groups / scale + offset.unflatten(1, (-1, 32))
        codes = clamped(straight(steps, steps.round()) + zero)
        return ((codes - zero) * scale).flatten(1)

    found = []
    with torch.enable_grad():
        for make in (lambda a, b, c=None: fake_quantize(w, options, a, b, offset=c), plain):
            held = [x.clone().requires_grad_() for x in leaves]
            (make(*held) * probe).sum().backward()
            found.append([x.grad for x in held])
    for ours, theirs in zip(*found, strict=True):
        assert float(theirs.abs().max()) > 0.1
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_searched_clips_beat_the_whole_range() -> None:
    options, w = WeightOptions(3, 32), weight(64, 96)
    importance = torch.rand(96, generator=torch.Generator().manual_seed(2)) ** 4 + 1e-3
    low, high = search_clips(w, options, importance, False)

    def error(made: torch.Tensor) -> float:
        return float(((made - w).square() * importance).sum())

    whole, searched = error(encode(w, options).dequantize()), error(encode(w, options, low, high).dequantize())
    assert searched < 0.95 * whole
    assert float(search_clips(w, options, importance, True)[0].max()) <= OPEN_CLIP


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [32, 40, 96])
def test_words_round_trip(bits: int, count: int) -> None:
    codes = torch.randint(0, 2**bits, (7, count), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    assert torch.equal(unpack(pack(codes, bits), bits, count), codes)


def test_golden_words() -> None:
    """Least significant bits first; a 3-bit code reaches over two words."""
    codes = torch.arange(32, dtype=torch.uint8)[None] % 16
    assert pack(codes, 4)[0].tolist()[:2] == [0x76543210, 0xFEDCBA98 - (1 << 32)]
    three = torch.zeros(1, 32, dtype=torch.uint8)
    three[0, 10] = 0b111  # bits 30, 31 and 32
    assert pack(three, 3)[0].tolist() == [0xC0000000 - (1 << 32), 1, 0]


@pytest.mark.parametrize("bits", BITS)
def test_words_are_those_of_compressed_tensors(bits: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(0, 2**bits, (24, 96), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    signed = (codes.int() - 2 ** (bits - 1)).to(torch.int8)
    if bits == 3 and helpers.pack_to_int32(signed, 3).shape[1] != 9:
        pytest.skip("this compressed-tensors packs ten 3-bit codes into a word: dense packing came with 0.18")
    assert torch.equal(pack(codes, bits), helpers.pack_to_int32(signed, bits))
    assert torch.equal(pack(codes.T, bits).T, helpers.pack_to_int32(signed, bits, packed_dim=0))


@pytest.mark.parametrize("bits", BITS)
def test_tensors_of_a_checkpoint_round_trip(bits: int) -> None:
    options = WeightOptions(bits, 32)
    made = encode(weight(), options)
    held = packed_tensors(made, options)
    parts = [held[x] for x in ("weight_packed", "weight_scale", "weight_zero_point")]
    back = unpacked_weight(parts[0], parts[1], parts[2], (24, 96), bits)
    assert torch.equal(back.dequantize(), made.dequantize())
    size = sum(8 * x.numel() * x.element_size() for x in parts) / (24 * 96)
    # float32 scales in the file, 16 bits counted; zero points fill whole words
    assert size == pytest.approx(options.bits_per_weight + 16 / 32, rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"bits": 5}, "bits=5: expected one of 3, 4, 6, 8"), ({"group_size": 100}, "group_size=100: expected a positive")],
)
def test_bad_options(options: dict[str, int], message: str) -> None:
    with pytest.raises(SkvqError, match=message):
        WeightOptions(**options)


def test_a_group_that_does_not_divide() -> None:
    with pytest.raises(SkvqError, match=r"group_size=128: the weight has 96 inputs.*expected one of 32, 96"):
        encode(weight(), WeightOptions(4, 128))


def test_a_weight_that_is_not_finite() -> None:
    w = weight()
    w[3, 4] = torch.nan
    with pytest.raises(SkvqError, match="expected finite numbers"):
        encode(w, WeightOptions(4, 32))

"""The native codec of rows of parts against its twin in plain torch: bytes equal, decoded rows equal."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from parts_examples import CASES, codec_options, stream_plan
from skvq import SkvqError, _native
from skvq.config import SkvqConfig
from skvq.evaluate.methods.ours import reference_codec
from skvq.plan import LayerPlan
from skvq.reference import ReferenceCodec
from skvq.reference_layer import ReferenceLayer

ISAS = [*_native.available_isas(), "reference"]


def rows_of(head_dim: int, count: int = 150, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, head_dim, generator=generator) * torch.randn(head_dim, generator=generator).exp()
    rows[3], rows[4], rows[5, ::2] = 0.0, 1e-30, 0.0
    return rows


def assert_equal(options: dict[str, Any], rows: torch.Tensor, head: int, position: int) -> None:
    native, twin = _native.Codec(**options), ReferenceCodec(**options)
    wanted = twin.encode(rows, head, position=position)
    for isa in ISAS:
        packed = np.from_dlpack(native.encode(rows, head, isa=isa, position=position))
        assert np.array_equal(packed, wanted.numpy()), isa
    decoded = torch.from_dlpack(native.decode(wanted, head, position=position))
    assert torch.equal(decoded, twin.decode(wanted, head, position=position))


@pytest.mark.parametrize(("head_dim", "index"), CASES)
@pytest.mark.parametrize(("turning", "codebook"), [(True, "lloyd-max"), (False, "lloyd-max"), (True, "uniform")])
@pytest.mark.parametrize("position", [0, 5, 200, 4096 - 70, -300])
def test_bytes_and_rows_equal_the_twin(head_dim: int, index: int, turning: bool, codebook: str, position: int) -> None:
    assert_equal(codec_options(head_dim, index, turning=turning, codebook=codebook), rows_of(head_dim), 1, position)


@settings(max_examples=60, deadline=None)
@given(
    case=st.sampled_from(CASES),
    metadata=st.sampled_from(["e4m3", "fp16"]),
    codebook=st.sampled_from(["lloyd-max", "uniform"]),
    clip=st.sampled_from([1.0, 0.92, 1.3]),
    turning=st.booleans(),
    head=st.integers(0, 2),
    position=st.integers(-1000, 140_000),
    seed=st.integers(0, 2**16),
)
@example(
    case=(16, 0), metadata="fp16", codebook="lloyd-max", clip=1.0, turning=True, head=0, position=0, seed=121
)  # a scale at a tie
def test_any_options_and_positions(
    case: tuple[int, int],
    metadata: str,
    codebook: str,
    clip: float,
    turning: bool,
    head: int,
    position: int,
    seed: int,
) -> None:
    static = {"heads": 3, "seed": seed, "turning": turning}
    options = codec_options(*case, **static, metadata=metadata, codebook=codebook, clip=clip)
    assert_equal(options, rows_of(case[0], 40, seed), head, position)


def test_without_a_mean_and_by_default_at_position_0() -> None:
    options = codec_options(64, 1, turning=False, noise=False)
    del options["shift"]
    assert_equal(options, rows_of(64), 0, 77)
    turning = _native.Codec(**codec_options(64, 1))
    packed = turning.encode(rows_of(64))
    assert np.array_equal(np.from_dlpack(packed), np.from_dlpack(turning.encode(rows_of(64), position=0)))


@pytest.mark.parametrize(("head_dim", "index"), CASES)
def test_sizes_equal_the_twin(head_dim: int, index: int) -> None:
    options = codec_options(head_dim, index)
    native, twin = _native.Codec(**options), ReferenceCodec(**options)
    for name in ("head_dim", "format", "row_bytes", "code_bytes", "metadata_bytes", "block"):
        assert getattr(native, name) == getattr(twin, name), name
    assert native.bits_per_element == pytest.approx(twin.bits_per_element)
    with pytest.raises(SkvqError, match="parts"):
        native.levels()


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"parts": [(2, 48)]}, "parts"),
        ({"parts": [(2, 40), (2, 24)]}, "parts"),
        ({"parts": [(6, 64)]}, "parts"),
        ({"parts": [(0, 64)]}, "parts"),
        ({"parts": [(0, 32), (2, 32)]}, "parts"),
        ({"parts": None}, "parts"),
        ({"matrix": None}, "matrix"),
        ({"inverse": None}, "inverse"),
        ({"matrix": torch.zeros(2, 64, 63)}, "matrix"),
        ({"inverse": torch.full((2, 64, 64), torch.nan)}, "inverse"),
        ({"frequencies": None}, "frequencies|shift_sine"),
        ({"shift_sine": None}, "frequencies|shift_sine"),
        ({"shift": None}, "shift"),
        ({"frequencies": torch.zeros(63)}, "frequencies|shift"),
        ({"noise": torch.full((64,), -0.1)}, "noise"),
        ({"noise": torch.zeros(63)}, "noise"),
        ({"group_size": 32}, "parts"),
        ({"symmetric": False}, "parts"),
        ({"codebook": "nf4"}, "codebook"),
        ({"codebook": [-1.0, 1.0]}, "codebook"),
        ({"rule": "range"}, "parts"),
        ({"refinements": 1}, "parts"),
        ({"unbiased": True}, "parts"),
        ({"rotation": "hadamard"}, "parts"),
        ({"format": "2"}, "parts"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], name: str) -> None:
    with pytest.raises(SkvqError, match=name):
        _native.Codec(**codec_options(64) | change)


def test_broken_rows_are_marked() -> None:
    codec, rows = _native.Codec(**codec_options(64, 1)), torch.ones(3, 64)
    rows[1, 5] = torch.inf
    decoded = torch.from_dlpack(codec.decode(torch.from_dlpack(codec.encode(rows))))
    assert decoded[1].isnan().all()
    assert decoded[[0, 2]].isfinite().all()


# ---- plans and the store ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("head_dim", "index"), CASES)
def test_a_plan_makes_both_codecs_alike(head_dim: int, index: int) -> None:
    plan = stream_plan(head_dim, index)
    native, twin = plan.codec("keys", head_dim), reference_codec(plan, head_dim)
    rows = rows_of(head_dim)
    wanted = twin.encode(rows, 1, position=31)
    assert np.array_equal(np.from_dlpack(native.encode(rows, 1, position=31)), wanted.numpy())


@pytest.mark.parametrize(("head_dim", "index"), [(64, 1), (80, 0), (128, 0), (256, 0)])
@pytest.mark.parametrize("padding", [None, [0, 37], [150, 3]])
def test_a_store_of_parts_equals_the_twin(head_dim: int, index: int, padding: list[int] | None) -> None:
    """Decoded rows bit for bit, attention to float accuracy: positions, padding, noise, crops, fresh rows."""
    keys, values = stream_plan(head_dim, index), stream_plan(head_dim, 0, seed=3, turning=False, noise=False)
    config = SkvqConfig(window=16, sinks=3)
    native = LayerPlan(keys, values, config.window, config.sinks).build(2, head_dim, head_dim, torch.float32)
    twin = ReferenceLayer(
        num_key_value_heads=2,
        keys=reference_codec(keys, head_dim),
        values=reference_codec(values, head_dim),
        sinks=config.sinks,
        window=config.window,
        dtype="float32",
    )
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(2, 2, 2, 420, head_dim, generator=generator)
    query = torch.randn(2, 4, 5, head_dim, generator=generator)
    for layer in (native, twin):
        if padding:
            layer.set_padding(padding)
        for start, stop in ((0, 300), (300, 301), (301, 400)):
            layer.append(rows[0, :, :, start:stop], rows[1, :, :, start:stop])
        layer.crop(390)
        layer.gather([1, 0])
        layer.append(rows[0, :, :, 390:], rows[1, :, :, 390:])
    assert (native.packed_tokens, native.length) == (twin.packed_tokens, twin.length)
    for name in ("decode_keys", "decode_values"):
        found, expected = (torch.empty(2, 2, 420, head_dim) for _ in range(2))
        getattr(native, name)(found)
        getattr(twin, name)(expected)
        assert torch.equal(found, expected), name
    fresh = {"fresh_keys": rows[0, :, :, 390:], "fresh_values": rows[1, :, :, 390:]}
    for options in ({}, {"softcap": 3.0}, fresh):
        found, expected = (torch.empty(2, 4, 5, head_dim) for _ in range(2))
        for layer, output in ((native, found), (twin, expected)):
            layer.attend(query, output, scale=head_dim**-0.5, causal=True, **options)
        assert torch.allclose(found, expected, atol=2e-4), options.keys()


# ---- golden bytes


def golden() -> list[tuple[dict[str, Any], int, list[bytes], torch.Tensor]]:
    """Keywords of the codec, position of the first row, the bytes of the rows, and the rows."""
    folder = Path(__file__).parent / "golden"
    specification = importlib.util.spec_from_file_location("make_parts", folder / "make_parts.py")
    assert specification is not None
    assert specification.loader is not None
    sys.path.insert(0, str(folder))
    try:
        made = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(made)
    finally:
        sys.path.remove(str(folder))
    cases = []
    for line in (folder / "parts.txt").read_text().splitlines():
        options, rows = line.split(" | ")
        head_dim, parts, metadata, position = options.split()
        wanted = [bytes.fromhex(row) for row in rows.split()]
        cases.append((made.options(int(head_dim), parts, metadata), int(position), wanted, made.rows(int(head_dim))))
    return cases


def test_golden_bytes_of_parts() -> None:
    cases = golden()
    assert len(cases) >= 8
    for options, position, wanted, rows in cases:
        for codec in (_native.Codec(**options), ReferenceCodec(**options)):
            packed = torch.from_dlpack(codec.encode(rows, position=position))
            assert [bytes(row.tolist()) for row in packed] == wanted, options["parts"]

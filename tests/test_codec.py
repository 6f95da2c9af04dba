"""The native codec against its twin in plain torch: bytes equal, decoded rows equal; and the golden bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skvq import SkvqError, _native
from skvq.reference import ReferenceCodec

GOLDEN = Path(__file__).parent / "golden" / "rows.txt"
HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256)
FORMATS = ("8", "4", "3", "2", "1.6", "1.5")
ISAS = [*_native.available_isas(), "reference"]


def golden_rows(head_dim: int) -> torch.Tensor:
    c, r = torch.arange(1, head_dim + 1), torch.arange(3)[:, None]
    values = ((7919 * c + 104729 * r) % 2003 - 1001).float() / 256
    values[2] /= 4096
    return values


def golden_cases() -> list[tuple[dict[str, Any], list[bytes]]]:
    cases = []
    for line in GOLDEN.read_text().splitlines():
        left, right = line.split(" | ")
        name, head_dim, group, metadata, symmetric, codebook, rule, rotation, refinements, unbiased = left.split()
        options = {
            "format": name,
            "head_dim": int(head_dim),
            "group_size": int(group),
            "metadata": metadata,
            "symmetric": symmetric == "True",
            "codebook": codebook,
            "rule": rule,
            "rotation": rotation,
            "refinements": int(refinements),
            "unbiased": unbiased == "True",
        }
        cases.append((options, [bytes.fromhex(row) for row in right.split()]))
    return cases


def encoded(codec: Any, rows: torch.Tensor, **options: Any) -> np.ndarray:
    return np.from_dlpack(codec.encode(rows, **options))


@pytest.mark.parametrize("isa", ISAS)
def test_golden_bytes(isa: str) -> None:
    for options, wanted in golden_cases():
        packed = encoded(_native.Codec(**options), golden_rows(options["head_dim"]), isa=isa)
        assert [row.tobytes() for row in packed] == wanted, options


def test_golden_bytes_of_the_twin() -> None:
    for options, wanted in golden_cases():
        packed = ReferenceCodec(**options).encode(golden_rows(options["head_dim"]))
        assert [bytes(row.tolist()) for row in packed] == wanted, options


@st.composite
def codec_options(draw: st.DrawFn) -> dict[str, Any]:
    head_dim = draw(st.sampled_from(HEAD_DIMS))
    name = draw(st.sampled_from(FORMATS))
    groups = [size for size in (32, 64, 128, head_dim) if head_dim % size == 0]
    uniform = name == "8" or (name != "1.5" and draw(st.booleans()))
    return {
        "format": name,
        "head_dim": head_dim,
        "group_size": draw(st.sampled_from(groups)),
        "metadata": draw(st.sampled_from(["e4m3", "fp16"])),
        "symmetric": draw(st.booleans()),
        "codebook": "uniform" if uniform else "lloyd-max",
        "rule": draw(st.sampled_from(["norm", "range"])),
        "clip": draw(st.sampled_from([1.0, 0.92, 0.5])),
        "refinements": draw(st.integers(0, 2)),
        "unbiased": draw(st.booleans()),
        "rotation": draw(st.sampled_from(["identity", "hadamard"])),
    }


@settings(max_examples=150, deadline=None)
@given(
    options=codec_options(),
    seed=st.integers(0, 2**16),
    permuted=st.booleans(),
    source=st.sampled_from(["none", "static", "block"]),
)
def test_bytes_and_rows_equal_the_twin(options: dict[str, Any], seed: int, permuted: bool, source: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    head_dim = options["head_dim"]
    rows = torch.randn(128, head_dim, generator=generator) * torch.randn(head_dim, generator=generator).exp()
    rows += 5 * torch.randn(head_dim, generator=generator)
    rows[3], rows[4], rows[5, ::2] = 0.0, 1e-30, 0.0
    if permuted:
        options["permutation"] = torch.randperm(head_dim, generator=generator).tolist()
    if source == "static":
        options["shift"] = torch.randn(1, head_dim, generator=generator)
        options["scale"] = torch.rand(1, head_dim, generator=generator) + 0.1
    if source == "block":
        options |= {"block": 128, "scale_exponent": 0.5, "query_exponent": 0.75 * (seed % 2)}
    native, twin = _native.Codec(**options), ReferenceCodec(**options)
    statistics = None
    if source == "block":
        factors = twin.query_factors(torch.rand(head_dim, generator=generator).double()) if seed % 3 else None
        statistics = twin.block_statistics(rows, factors)
        found = tuple(torch.from_dlpack(part) for part in native.block_statistics(rows, factors))
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, statistics, strict=True))
    wanted = twin.encode(rows, statistics=statistics)
    for isa in ISAS:
        packed = encoded(native, rows, statistics=statistics, isa=isa)
        assert np.array_equal(packed, wanted.numpy()), isa
    decoded = torch.from_dlpack(native.decode(wanted, statistics=statistics))
    assert torch.equal(decoded, twin.decode(wanted, statistics=statistics))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("metadata", ["e4m3", "fp16"])
def test_sizes_and_levels_equal_the_twin(head_dim: int, name: str, metadata: str) -> None:
    for symmetric in (True, False):
        options: dict[str, Any] = {"format": name, "head_dim": head_dim, "metadata": metadata, "symmetric": symmetric}
        codebook = "uniform" if name in ("8", "2") else "lloyd-max"
        native, twin = _native.Codec(**options), ReferenceCodec(**options, codebook=codebook)
        assert (native.row_bytes, native.code_bytes, native.metadata_bytes) == (
            twin.row_bytes,
            twin.code_bytes,
            twin.metadata_bytes,
        )
        assert native.bits_per_element == pytest.approx(twin.bits_per_element)
        assert np.allclose(native.levels(), twin.levels(), rtol=1e-7)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"head_dim": 100}, ["head_dim", "multiple of 16", "100"]),
        ({"head_dim": 80, "group_size": 64}, ["group_size", "64", "80"]),
        ({"format": "2.5"}, ["format", "2.5"]),
        ({"metadata": "fp8"}, ["metadata", "fp8"]),
        ({"rule": "mse"}, ["rule", "mse"]),
        ({"rotation": "random"}, ["rotation", "random"]),
        ({"codebook": [0.0, 1.0]}, ["codebook", "4 levels"]),
        ({"codebook": [0.0, 2.0, 1.0, 3.0]}, ["codebook", "ascending"]),
        ({"codebook": [(0.0, 1.0)] * 8}, ["codebook", "pairs"]),
        ({"format": "1.5", "codebook": "uniform"}, ["codebook", "uniform"]),
        ({"clip": 0.0}, ["clip", "positive"]),
        ({"block": 100}, ["block", "128", "100"]),
        ({"block": 128, "scale_exponent": 2.0}, ["scale_exponent", "2"]),
        ({"permutation": [0, 0]}, ["permutation"]),
        ({"scale": torch.zeros(1, 128)}, ["scale", "positive"]),
        ({"shift": torch.full((1, 128), torch.nan)}, ["shift", "finite"]),
        ({"shift": torch.zeros(1, 64)}, ["shift", "128"]),
        ({"block": 128, "shift": torch.zeros(1, 128)}, ["block"]),
        ({"shift": torch.zeros(2, 128), "scale": torch.ones(3, 128)}, ["scale", "2", "3"]),
    ],
)
def test_errors_name_argument_value_and_expectation(options: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(SkvqError) as error:
        _native.Codec(**({"head_dim": 128, "format": "2"} | options))
    assert all(name in str(error.value) for name in names), str(error.value)


def test_broken_rows_are_marked() -> None:
    codec = _native.Codec(head_dim=64, format="2")
    rows = torch.ones(3, 64)
    rows[1, 5] = torch.inf
    decoded = torch.from_dlpack(codec.decode(torch.from_dlpack(codec.encode(rows))))
    assert decoded[1].isnan().all()
    assert decoded[[0, 2]].isfinite().all()

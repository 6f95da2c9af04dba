"""q·m(t) of packed rows by turning.cuh in the host emulator against float64.

Frequencies of a rotary embedding, of a part of the channels, all different; ragged rows, padding, groups, several query
tiles, items shared out among any number of blocks, queries that are not numbers.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from parts_examples import frequencies_of

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels" / "emu"))
import harness
from harness import DTYPES, aligned, params, strides
from pipeline import TURNING_THREADS, wave_fields

pytestmark = pytest.mark.skipif(harness.compiler() is None, reason="no C++ compiler")

# Of all amplitudes: three products of halves miss 2^-22 of each, f32 tables and sums as much, not all the same way.
STEP = 1.1 * 2.0**-15  # of a range, which is twice what all amplitudes make together, or up to 9 % more
ERROR = STEP + 2.0**-23
ERROR_OF_HALVES = STEP + 2.0**-11  # one product: of either side half a step of f16


def partial(head_dim: int, rotated: int) -> Tensor:
    """Channels behind the rotated ones do not turn."""
    return torch.cat([frequencies_of(rotated), torch.zeros(head_dim - rotated)])


def different(head_dim: int) -> Tensor:
    return torch.linspace(1.0, 0.001, head_dim)


@dataclass(frozen=True)
class Case:
    """`query_tiles`: as many as there are queries for where 0."""

    name: str
    frequencies: Tensor
    origins: tuple[int, ...] = (4,)
    packed: int = 600
    group: int = 4
    length: int = 1
    dtype: torch.dtype = torch.float32
    kv_heads: int = 2
    query_tiles: int = 0
    blocks: int = 3
    schedule: str = "forward"

    @property
    def head_dim(self) -> int:
        return len(self.frequencies)

    @property
    def tiles(self) -> int:
        return self.query_tiles or -(-self.group * self.length // 8)

    @property
    def kernel(self) -> str:
        return f"skvq::turning<{DTYPES[self.dtype]}, {self.head_dim}>"


ROTARY = frequencies_of(64)
CASES = [
    Case("group 1", ROTARY, group=1, packed=3000, origins=(4, -700)),
    Case("group 2", ROTARY, group=2, packed=1000),
    Case("group 3", ROTARY, group=3, packed=257, origins=(0, 255, -1)),
    Case("group 4, one block", ROTARY, blocks=1, origins=(4, -300)),
    Case("group 8, many blocks", ROTARY, group=8, blocks=50, origins=(0, -256, 513)),
    Case("group 16", ROTARY, group=16, packed=300, blocks=4),
    Case("20 queries, an empty tile", ROTARY, group=5, length=4, packed=130, query_tiles=4),
    Case("one row", ROTARY, packed=1, origins=(255, 256, -1)),
    Case("no row", ROTARY, packed=0),
    Case("far away", ROTARY, packed=400, origins=(100_000,)),
    Case("half, 128", frequencies_of(128), dtype=torch.float16, packed=500),
    Case("bfloat, 128, a quarter turns", partial(128, 32), dtype=torch.bfloat16, group=8),
    Case("half of the channels turn", partial(64, 32), group=2),
    Case("nothing turns", torch.zeros(64), group=1),
    Case("all different", different(64)),
    Case("all different, 128", different(128), kv_heads=1),
    Case("80", frequencies_of(80), packed=200),
    Case("bfloat, 208", frequencies_of(208), dtype=torch.bfloat16, kv_heads=1),
    Case("half, 256", frequencies_of(256), dtype=torch.float16, packed=300),
    Case("all different, 256", different(256), dtype=torch.float16, kv_heads=1, packed=300),
]


@pytest.fixture(scope="module")
def kernels() -> harness.Kernels:
    return harness.Kernels([case.kernel for case in CASES], ["turning.cuh"])


def make_query(case: Case) -> Tensor:
    shape = (len(case.origins), case.kv_heads * case.group, case.length, case.head_dim)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(case.dtype)


def means(case: Case) -> tuple[Tensor, Tensor]:
    mean, quarter = torch.randn(2, case.kv_heads, case.head_dim, generator=torch.Generator().manual_seed(2))
    return 3.0 * mean, 3.0 * quarter


def run(case: Case, kernels: harness.Kernels, query: Tensor) -> Tensor:
    """q·m(t) [batch, kv heads, query tiles · 8, capacity], NaN where nothing is written."""
    batch, capacity = len(case.origins), case.packed + 3
    mean, quarter = means(case)
    first = min(case.origins) // 256
    spans = 256 * torch.arange(first, (max(case.origins) + case.packed) // 256 + 1)
    angles = spans[:, None].double() * case.frequencies.double()
    tables = {"spans": torch.stack([angles.cos(), angles.sin()], 1).float().contiguous(), "first_span": first}
    transform = params("TransformParams", shift=mean.contiguous(), shift_sine=quarter.contiguous(), **tables)
    bias = aligned(batch, case.kv_heads, case.tiles, 8 * (4 + 2 * capacity))
    arguments = params(
        "TurningParams",
        query=query,
        **strides(query, "query_batch_stride query_head_stride query_position_stride"),
        bias=bias,
        origins=torch.tensor(case.origins, dtype=torch.int32),
        lengths=torch.tensor([case.packed, 0, 0, 0], dtype=torch.int32),
        transform=transform,
        **wave_fields(case.frequencies),
        capacity=capacity,
        scale=case.head_dim**-0.5,
        kv_heads=case.kv_heads,
        group=case.group,
        length=case.length,
        query_tiles=case.tiles,
        batch=batch,
    )
    kernels.launch(case.kernel, (case.blocks,), TURNING_THREADS, arguments, schedule=case.schedule)
    ranges = bias[..., :32].contiguous().view(torch.float32).flatten(2)
    words = bias[..., 32:].contiguous().view(torch.int16)
    if case.group * case.length > 1:  # two queries of a row lie together
        words = words.view(batch, case.kv_heads, case.tiles * 4, capacity, 2).transpose(-1, -2)
    words = words.reshape(batch, case.kv_heads, case.tiles * 8, capacity).to(torch.int32) & 0xFFFF
    places = (words << 8 | 0x3F000000).view(torch.float32)
    return torch.where(words == 0xFFFF, math.nan, ranges[..., None] * (places - 1.5))  # what nobody wrote has all bits


def expected(case: Case, query: Tensor) -> tuple[Tensor, Tensor]:
    """In float64, for queries and rows that there are: [batch, kv heads, group · length, packed], and the sum of all
    amplitudes [batch, kv heads, group · length, 1]."""
    mean, quarter = (x.double() for x in means(case))
    scale = torch.tensor(case.head_dim**-0.5, dtype=torch.float32).double()
    queries = query.double().view(len(case.origins), case.kv_heads, case.group * case.length, case.head_dim) * scale
    positions = torch.tensor(case.origins)[:, None] + torch.arange(case.packed)
    angles = (positions[..., None].double() * case.frequencies.double())[:, None]
    turned = mean[:, None] * angles.cos() + quarter[:, None] * angles.sin()
    return queries @ turned.mT, (queries.abs() * torch.hypot(mean, quarter)[:, None]).sum(-1, keepdim=True)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_every_row_has_its_product(case: Case, kernels: harness.Kernels) -> None:
    query = make_query(case)
    found, (exact, amplitudes) = run(case, kernels, query), expected(case, query)
    queries = case.group * case.length
    written = found[:, :, :queries, : case.packed].double()
    limit = ERROR if case.dtype == torch.float32 else ERROR_OF_HALVES
    assert ((written - exact).abs() <= limit * amplitudes).all()
    # The second one of a pair is written with the first.
    assert found[:, :, queries + (queries % 2 if queries > 1 else 0) :].isnan().all()
    assert found[:, :, :, case.packed :].isnan().all()


@pytest.mark.parametrize("schedule", ["reverse", "random:7"])
def test_order_of_threads_changes_nothing(schedule: str, kernels: harness.Kernels) -> None:
    for name in ("group 4, one block", "half, 256"):
        case = next(case for case in CASES if case.name == name)
        query = make_query(case)
        other = run(dataclasses.replace(case, schedule=schedule), kernels, query)
        assert torch.equal(run(case, kernels, query).view(torch.int32), other.view(torch.int32))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_query_that_is_not_finite_keeps_it_to_itself(value: float, kernels: harness.Kernels) -> None:
    case = next(case for case in CASES if case.name == "group 4, one block")
    query = make_query(case)
    before = run(case, kernels, query)
    query[0, 1, 0, 40] = value
    after = run(case, kernels, query)
    assert after[0, 0, 1].isnan().all()
    after[0, 0, 1] = before[0, 0, 1]
    assert torch.equal(after.view(torch.int32), before.view(torch.int32))


@pytest.mark.parametrize("power", [-60, 60])
def test_the_size_of_a_query_does_not_matter(power: int, kernels: harness.Kernels) -> None:
    case = next(case for case in CASES if case.name == "group 4, one block")
    query = make_query(case)
    found, scaled = (run(case, kernels, x)[:, :, :4, : case.packed] for x in (query, query * 2.0**power))
    assert torch.equal(scaled, found * 2.0**power)

"""Attention over rows in the model's type, by plain.cuh and merge.cuh alone, against float64.

All four regions in one launch: sinks, a window in a ring, fresh rows with strides of the caller's, a past in pages.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernel_examples import ERROR

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels" / "emu"))
import harness
from harness import DTYPES, PAGE_ROWS, aligned, params, strides
from pipeline import plain_region, plain_regions

pytestmark = pytest.mark.skipif(harness.compiler() is None, reason="no C++ compiler")

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Case:
    """Rows of each region, and how they lie.

    Attributes:
        shift: elements by which fresh rows and queries miss a multiple of 16 bytes.
        gap: elements between fresh rows.
        on_device: the window's beginning in the ring is read behind the lengths.
    """

    name: str
    dtype: torch.dtype = F16
    key_width: int = 128
    value_width: int = 128
    group: int = 4
    length: int = 1
    sinks: int = 5
    past: int = 0
    window: int = 45
    fresh: int = 0
    shift: int = 0
    gap: int = 0
    on_device: bool = False
    causal: bool = False
    softcap: float = 0.0
    padding: int = 0
    masked: bool = False
    sink_logits: bool = False
    rows_per_split: int = 32

    @property
    def kernels(self) -> tuple[str, str]:
        element = DTYPES[self.dtype]
        plain = f"skvq::plain<{element}, {self.key_width}, {self.value_width}>"
        return plain, f"skvq::merge<{element}, {self.value_width}>"


BATCH, HEADS = 2, 2
CASES = [
    Case("one token"),
    Case("one query", group=1, window=128),
    Case("eight queries", group=8, window=70, dtype=BF16),
    Case("f32", dtype=F32, group=3, fresh=9),
    Case("64", key_width=64, value_width=64, group=4, window=100),
    Case("64, eight queries", key_width=64, value_width=64, group=8, past=150),
    Case("80", key_width=80, value_width=80, group=5),
    Case("96, f32", key_width=96, value_width=96, dtype=F32),
    Case("112", key_width=112, value_width=112, dtype=BF16, group=7),
    Case("192", key_width=192, value_width=192, group=8),
    Case("192 and 128", key_width=192, value_width=128, group=3),
    Case("64 and 128", key_width=64, value_width=128, group=2),
    Case("192, f32", key_width=192, value_width=192, dtype=F32, group=6),
    Case("256", key_width=256, value_width=256, group=5),
    Case("256, f32", key_width=256, value_width=256, dtype=F32, group=8, window=17),
    Case("ring on the device", on_device=True, window=50),
    Case("past in pages", past=300, rows_per_split=130),
    Case("prompt", fresh=21, length=21, causal=True, window=12, past=20, group=2),
    Case("prompt longer than a tile", fresh=30, length=30, causal=True, sinks=0, window=0, group=1),
    Case("unaligned", fresh=40, length=3, causal=True, shift=1, window=3),
    Case("unaligned strides", fresh=40, gap=3, shift=0, dtype=BF16),
    Case("unaligned, f32", fresh=10, shift=1, dtype=F32),
    Case("unaligned, 80", fresh=10, shift=4, gap=8, key_width=80, value_width=80),
    Case("gaps of 16 bytes", fresh=40, gap=8),
    Case("softcap and mask", softcap=5.0, masked=True, fresh=7, length=2, group=3, past=40),
    Case("padding", padding=30, past=60, window=30, fresh=4, length=4, causal=True),
    Case("padding into the window", padding=70, past=60, window=30),
    Case("sink logits", sink_logits=True, group=5, length=2),
    Case("nothing there", sinks=0, window=0),
    Case("many states", past=1000, rows_per_split=16, group=2),
]


@pytest.fixture(scope="module")
def kernels() -> harness.Kernels:
    return harness.Kernels([name for case in CASES for name in case.kernels], ["plain.cuh", "merge.cuh"])


def strided(x: Tensor, shift: int, gap: int) -> Tensor:
    """The same numbers [..., n, D], `shift` elements behind an aligned address and rows `gap` elements apart."""
    width = x.shape[-1]
    raw = aligned(x.numel() // width * (width + gap) + shift, dtype=x.dtype)
    found = raw[shift:].view(*x.shape[:-1], width + gap)[..., :width]
    found.copy_(x)
    return found


def in_ring(x: Tensor, first: int, room: int) -> Tensor:
    ring = torch.full((*x.shape[:2], room, x.shape[3]), math.nan, dtype=x.dtype)
    ring[:, :, (first + torch.arange(x.shape[2])) % room] = x
    return strided(ring, 0, 0)


def in_pages(x: Tensor) -> tuple[Tensor, Tensor]:
    count = -(-x.shape[2] // PAGE_ROWS)
    pages = aligned(*x.shape[:2], count * PAGE_ROWS, x.shape[3], dtype=x.dtype)
    pages[:, :, : x.shape[2]] = x
    starts = pages.view(BATCH, HEADS, count, PAGE_ROWS * x.shape[3])[..., 0]
    table = torch.tensor([start.data_ptr() for start in starts.flatten()], dtype=torch.int64)
    return pages, table


class Example:
    """Random rows of a case, and what of them is NaN."""

    def __init__(self, case: Case) -> None:
        self.case, generator = case, torch.Generator().manual_seed(5)

        def rows(count: int, width: int, heads: int = HEADS) -> Tensor:
            return torch.randn(BATCH, heads, count, width, generator=generator).to(case.dtype)

        self.counts = (case.sinks, case.window, case.fresh, case.past)
        self.keys = [rows(count, case.key_width) for count in self.counts]
        self.values = [rows(count, case.value_width) for count in self.counts]
        self.query = rows(case.length, case.key_width, HEADS * case.group)
        self.total = sum(self.counts)
        heads = HEADS * case.group
        self.mask = torch.randn(BATCH, heads, case.length, self.total, generator=generator) if case.masked else None
        if self.mask is not None:
            self.mask[self.mask > 1.0] = -math.inf
        self.sink_logits = torch.randn(heads, generator=generator) if case.sink_logits else None
        self.paddings = [0, case.padding]

    def expected(self) -> Tensor:
        case = self.case
        tokens = (0, case.sinks + case.past, case.sinks + case.past + case.window, case.sinks)
        shape = (BATCH, HEADS, case.group, case.length)
        query = self.query.double().view(*shape, -1) * case.key_width**-0.5
        scores = torch.einsum("bhgld,bhtd->bhglt", query, torch.cat(self.keys, 2).double())
        scores = case.softcap * torch.tanh(scores / case.softcap) if case.softcap else scores
        for b, padding in enumerate(self.paddings):
            numbers = [torch.arange(count) + token for count, token in zip(self.counts, tokens, strict=True)]
            seen = [torch.ones(case.sinks, dtype=torch.bool)]
            seen += [numbers[1] >= (padding + case.sinks if padding else 0)]
            seen += [numbers[2] >= padding, numbers[3] >= padding + case.sinks]
            numbers[0] = numbers[0] + padding
            token = torch.cat(numbers)
            if self.mask is not None:
                scores[b] += self.mask[b][..., token].view(*shape[1:], -1)
            if case.causal:
                limit = self.total - case.length + torch.arange(case.length)
                scores[b].masked_fill_(token > limit[:, None], -math.inf)
            scores[b].masked_fill_(~torch.cat(seen), -math.inf)
        extra = torch.full((*shape, 1), -math.inf, dtype=torch.float64)
        if self.sink_logits is not None:
            extra = self.sink_logits.double().view(1, HEADS, case.group, 1, 1).expand(*shape, 1)
        weights = torch.cat([scores, extra], -1).softmax(-1)[..., :-1].nan_to_num()
        return torch.einsum("bhglt,bhtd->bhgld", weights, torch.cat(self.values, 2).double()).flatten(1, 2)

    def run(self, kernels: harness.Kernels, schedule: str = "forward") -> Tensor:
        case, (plain, merge) = self.case, self.case.kernels
        room, first = case.window + 6, case.window  # the ring's end is inside the window
        lengths = torch.tensor([case.past, case.sinks, case.window, first], dtype=torch.int32)
        query = strided(self.query, case.shift, case.gap)
        fresh = [strided(rows[2], case.shift, case.gap) for rows in (self.keys, self.values)]
        sinks = [strided(rows[0], 0, 0) for rows in (self.keys, self.values)]
        rings = [in_ring(rows[1], first, room) for rows in (self.keys, self.values)]
        pages = [in_pages(rows[3]) for rows in (self.keys, self.values)]
        splits = [-(-count // case.rows_per_split) for count in self.counts]
        ring = {"ring_first": -1 if case.on_device else first, "ring_rows": room}
        table = {"key_table": pages[0][1], "value_table": pages[1][1], "table_pages": -(-case.past // PAGE_ROWS)}
        regions = [
            plain_region(0, *sinks, splits[0]),
            plain_region(1, *rings, splits[1], **ring),
            plain_region(2, *fresh, splits[2]),
            plain_region(3, *fresh, splits[3], **table),
        ]
        for region in regions:
            region.rows_per_split = case.rows_per_split
        tiles, count = -(-case.group * case.length // 8) + 1, sum(splits)  # one tile without queries
        states = aligned(BATCH, HEADS * tiles, 8, count, 4 + case.value_width, dtype=torch.float32)
        shape = {"kv_heads": HEADS, "group": case.group, "length": case.length, "query_tiles": tiles}
        paddings = torch.tensor(self.paddings, dtype=torch.int32) if case.padding else None
        fields: dict[str, Any] = {"causal": int(case.causal), "softcap": case.softcap, "paddings": paddings}
        fields["total_from_lengths_plus"] = case.fresh
        if self.mask is not None:
            fields |= {"mask": self.mask, "kind": 1, **strides(self.mask, "batch_stride head_stride position_stride")}
        mask = params("MaskParams", **fields)
        arguments = params(
            "PlainParams",
            query=query,
            **strides(query, "query_batch_stride query_head_stride query_position_stride"),
            states=states,
            lengths=lengths,
            mask=mask,
            regions=plain_regions(regions),
            scale=case.key_width**-0.5,
            fresh_rows=case.fresh,
            state_count=count,
            **shape,
        )
        if count:
            kernels.launch(plain, (count, HEADS * tiles, BATCH), 128, arguments, schedule=schedule)
        output = torch.full((BATCH, HEADS * case.group, case.length, case.value_width), math.nan, dtype=case.dtype)
        arguments = params(
            "MergeParams",
            states=states,
            output=output,
            **strides(output, "output_batch_stride output_head_stride output_position_stride"),
            sink_logits=self.sink_logits,
            state_count=count,
            **shape,
        )
        kernels.launch(merge, (HEADS * case.group * case.length, BATCH), 128, arguments, schedule=schedule)
        return output


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_rows_of_all_regions(case: Case, kernels: harness.Kernels) -> None:
    example = Example(case)
    found, exact = example.run(kernels), example.expected()
    assert float((found.double() - exact).abs().max()) <= ERROR[case.dtype] * max(1.0, float(exact.abs().max()))


@pytest.mark.parametrize("schedule", ["reverse", "random:3"])
def test_order_of_threads_changes_nothing(schedule: str, kernels: harness.Kernels) -> None:
    example = Example(next(case for case in CASES if case.name == "prompt"))
    assert torch.equal(example.run(kernels), example.run(kernels, schedule))


@pytest.mark.parametrize("side", ["keys", "values"])
def test_a_row_that_is_not_a_number_reaches_only_who_sees_it(side: str, kernels: harness.Kernels) -> None:
    example = Example(next(case for case in CASES if case.name == "prompt"))
    before = example.run(kernels)
    getattr(example, side)[2][0, 0, 10, 3] = math.nan
    found = example.run(kernels)
    group = example.case.group
    channels = slice(None) if side == "keys" else slice(3, 4)
    assert found[0, :group, 10:, channels].isnan().all()
    assert torch.equal(found[0, :group, :10], before[0, :group, :10])
    assert torch.equal(found[0, group:], before[0, group:])
    assert torch.equal(found[1], before[1])

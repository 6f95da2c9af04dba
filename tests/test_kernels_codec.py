"""Encoding and decoding kernels in the host emulator: bytes equal those of skvq.reference, decoded rows too.

Rows arrive in ragged portions, so that row blocks are read, completed and written again; and one by one through a ring,
by the kernel of a single row, whose pages are those of encode.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernel_examples import HEADS, statics
from parts_examples import codec_options
from skvq.reference import ReferenceCodec

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels" / "emu"))
import harness
from harness import PageFormat, strides
from pipeline import transform_of

pytestmark = pytest.mark.skipif(harness.compiler() is None, reason="no C++ compiler")


@dataclass
class Case:
    """A codec, the stream whose pages it writes, the type of the rows."""

    stream: str
    options: dict[str, Any]
    dtype: torch.dtype = torch.float32
    kv_heads: int = HEADS
    codec: ReferenceCodec = field(init=False)

    def __post_init__(self) -> None:
        self.codec = ReferenceCodec(**self.options)

    @property
    def page_format(self) -> PageFormat:
        return PageFormat.of(self.stream, self.codec)

    @property
    def name(self) -> str:
        return f"{self.codec.format}-{self.codec.head_dim}-{self.stream}"


def plain(format: str, head_dim: int, **more: Any) -> dict[str, Any]:
    return {"format": format, "head_dim": head_dim, **more}


RANGE = {"rule": "range", "clip": 0.9}
LEVELS = [-2.0, -0.25, 0.5, 1.75]
CASES = [
    Case("keys", plain("2", 128, refinements=2, unbiased=True, **statics(128)), torch.float16),
    Case("values", plain("1.6", 128, refinements=1), torch.bfloat16),
    Case("keys", codec_options(128, 1, heads=HEADS)),
    Case("values", codec_options(96, 0, heads=HEADS, turning=False, noise=False), torch.float16),
    Case("keys", codec_options(64, 1, heads=HEADS)),
    Case("keys", codec_options(128, 1, heads=HEADS, codebook="uniform"), torch.float16),
    Case("keys", codec_options(96, 0, heads=HEADS, codebook="uniform")),
    Case("values", plain("2", 112), torch.float16),
    Case("values", codec_options(64, 1, heads=HEADS, turning=False, noise=False, codebook="uniform"), torch.bfloat16),
    Case("values", plain("2", 64, symmetric=False, metadata="fp16", group_size=32, codebook="uniform", **RANGE)),
    Case("keys", plain("2", 80, codebook=LEVELS, rotation="identity", **RANGE)),
    Case("values", plain("1.6", 64, symmetric=False, rotation="identity", **RANGE)),
    Case("keys", plain("1.5", 80, refinements=1, unbiased=True)),
    Case("values", plain("1.5", 64, group_size=32, **RANGE)),
    Case("keys", plain("3", 112, refinements=1)),
    Case("values", plain("4", 192, group_size=64, codebook="uniform", symmetric=False, **RANGE), torch.float16),
    Case("keys", plain("4", 64, metadata="fp16")),
    Case("values", plain("8", 256, symmetric=False, metadata="fp16", **RANGE), torch.bfloat16),
    Case("keys", plain("2", 64, block=128, scale_exponent=0.5), torch.float16),
    Case("values", plain("1.6", 80, block=128, block_shift=False), torch.float16),
]


def instances(case: Case) -> list[str]:
    layout, element = case.page_format.expression, harness.DTYPES[case.dtype]
    names = [
        f"encode<{element}, {layout}>",
        f"append_row<{element}, {layout}, {layout}>",
        f"decode<float, {layout}>",
        f"decode<{element}, {layout}>",
        f"page_to_rows<{layout}>",
    ]
    if case.codec.block:
        names.append(f"block_statistics<{element}, {case.codec.head_dim}>")
    return [f"skvq::{name}" for name in names]


@pytest.fixture(scope="module")
def kernels() -> harness.Kernels:
    headers = ["append.cuh", "encode.cuh", "decode.cuh", "statistics.cuh", "repack.cuh"]
    return harness.Kernels([name for case in CASES for name in instances(case)], headers, ("-O0",))


def flat_levels(codec: ReferenceCodec) -> Tensor:
    """The f32 levels as encode.cuh wants them."""
    if codec.format != "parts":
        return codec.coder.levels.contiguous()
    levels = torch.zeros(62)
    for bits, own in zip(codec.coder._bits, codec.coder._levels, strict=True):
        levels[(1 << bits) - 2 : (2 << bits) - 2] = own
    return levels


def codec_params(case: Case, statistics: tuple[Tensor, Tensor] | None = None) -> harness.Structure:
    codec = case.codec
    return harness.params(
        "CodecParams",
        levels=flat_levels(codec),
        transform=transform_of(codec, statistics, case),  # type: ignore[arg-type]
        clip=float(codec.clip),
        rule=int(codec.rule == "range"),
        refinements=codec.refinements,
        unbiased=int(codec.unbiased),
        uniform=int(codec.format != "parts" and codec.coder.uniform),
    )


def encode(
    case: Case, kernels: harness.Kernels, rows: Tensor, portions: list[int], **more: Any
) -> tuple[Any, Tensor, int]:
    """Rows [B, H, n, D] to pages, in portions. Returns the pages, their table and the number of refused rows."""
    pages, table = harness.new_pages(case.page_format, rows.shape[2], *rows.shape[:2])
    refused, first = torch.zeros(1, dtype=torch.int32), 0
    for count in portions:
        encode_some(case, kernels, rows, table, refused, (first, count), **more)
        first += count
    return pages, table, int(refused)


def encode_some(
    case: Case,
    kernels: harness.Kernels,
    rows: Tensor,
    table: Tensor,
    refused: Tensor,
    part: tuple[int, int],
    **more: Any,
) -> None:
    """The rows first … first + count − 1 of `rows` to the pages of a table."""
    first, count = part
    piece = rows[:, :, first : first + count]
    arguments = harness.params(
        "EncodeParams",
        rows=piece,
        **strides(piece),
        pages=table,
        origins=more["origins"],
        refused=refused,
        codec=codec_params(case, more.get("statistics")),
        first_row=first,
        row_count=count,
        page_capacity=table.shape[-1],
        kv_heads=case.kv_heads,
    )
    grid = ((first + count - 1) // 16 - first // 16 + 1, case.kv_heads, rows.shape[0])
    name = f"skvq::encode<{harness.DTYPES[case.dtype]}, {case.page_format.expression}>"
    kernels.launch(name, grid, 256, arguments, schedule=more.get("schedule", "forward"))


@dataclass
class Ring:
    """A window of rows [B, H, n, D] of two streams of one codec, whose oldest row is packed when a new one comes."""

    case: Case
    kernels: harness.Kernels
    streams: tuple[Tensor, Tensor]
    window: int
    room: int
    more: dict[str, Any]

    def __post_init__(self) -> None:
        batch, heads, count, width = self.streams[0].shape
        self.pages = [harness.new_pages(self.case.page_format, count, batch, heads) for _ in self.streams]
        self.rings = [torch.full((batch, heads, self.room, width), math.nan, dtype=self.case.dtype) for _ in range(2)]
        self.refused = torch.zeros(1, dtype=torch.int32)
        self.lengths = torch.zeros(4, dtype=torch.int32)

    def fill(self, packed: int, window: int) -> None:
        """The rows behind the `packed` first ones, by the host."""
        for rows, ring in zip(self.streams, self.rings, strict=True):
            for row in range(packed, packed + window):
                ring[:, :, row % self.room] = rows[:, :, row]
        self.lengths.copy_(torch.tensor([packed, 3, window, packed % self.room]))

    def encode(self, first: int, count: int) -> None:
        """More rows at once, as a longer append does."""
        for rows, (_, table) in zip(self.streams, self.pages, strict=True):
            encode_some(self.case, self.kernels, rows, table, self.refused, (first, count), **self.more)
        self.fill(first + count, self.window)

    def append(self) -> None:
        """One more token, by the kernel."""
        packed, _, window, first = self.lengths.tolist()
        leaves, new = int(window == self.window), packed + window
        self.lengths[0] += leaves
        self.lengths[2] += 1 - leaves
        self.lengths[3] = (first + leaves) % self.room
        codec, places = codec_params(self.case, self.more.get("statistics")), []
        for rows, ring, (_, table) in zip(self.streams, self.rings, self.pages, strict=True):
            row = rows[:, :, new]
            own = strides(row, "batch_stride head_stride")
            places.append(harness.params("AppendStream", row=row, **own, ring=ring, pages=table, codec=codec))
        batch, heads = self.streams[0].shape[:2]
        arguments = harness.params(
            "AppendParams",
            keys=places[0],
            values=places[1],
            origins=self.more["origins"],
            refused=self.refused,
            lengths=self.lengths,
            leaves=leaves,
            ring_rows=self.room,
            page_capacity=self.pages[0][1].shape[-1],
            kv_heads=heads,
        )
        layout = self.case.page_format.expression
        name = f"skvq::append_row<{harness.DTYPES[self.case.dtype]}, {layout}, {layout}>"
        self.kernels.launch(name, (2, heads, batch), 256, arguments, schedule=self.more.get("schedule", "forward"))

    def check_window(self) -> None:
        packed, _, window, first = self.lengths.tolist()
        for rows, ring in zip(self.streams, self.rings, strict=True):
            for index in range(window):
                found, expected = ring[:, :, (first + index) % self.room], rows[:, :, packed + index]
                assert torch.equal(found.nan_to_num(), expected.nan_to_num())


def decode(case: Case, kernels: harness.Kernels, table: Tensor, rows: Tensor, first: int, **more: Any) -> Tensor:
    """Packed rows from `first` on into a tensor like `rows`."""
    found = torch.full_like(rows, math.nan)
    count, uniform = rows.shape[2], case.codec.format != "parts" and case.codec.coder.uniform
    arguments = harness.params(
        "DecodeParams",
        pages=table,
        rows=found,
        **strides(found),
        levels=None if uniform else flat_levels(case.codec),
        origins=more["origins"],
        transform=transform_of(case.codec, more.get("statistics"), case),  # type: ignore[arg-type]
        first_row=first,
        row_count=count,
        page_capacity=table.shape[-1],
        kv_heads=case.kv_heads,
    )
    blocks = (first + count - 1) // 16 - first // 16 + 1
    name = f"skvq::decode<{harness.DTYPES[rows.dtype]}, {case.page_format.expression}>"
    kernels.launch(name, (blocks, case.kv_heads, rows.shape[0]), 256, arguments)
    return found


def random_rows(case: Case, batch: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(case.codec.head_dim)
    rows = torch.randn(batch, case.kv_heads, count, case.codec.head_dim, generator=generator)
    rows = rows * (0.1 + 3.0 * torch.rand(count, 1, generator=generator)) + torch.randn(
        rows.shape[-1], generator=generator
    )
    rows[:, :, 3] = 0.0
    rows[:, :, 4] *= 1e-4
    rows[:, :, 5] *= 3e3
    return rows.to(case.dtype)


def statistics_by_kernel(case: Case, kernels: harness.Kernels, rows: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    codec = case.codec
    shape = (*rows.shape[:2], blocks, codec.head_dim)
    shift, scale = (harness.aligned(*shape, dtype=torch.float32) for _ in range(2))
    arguments = harness.params(
        "StatisticsParams",
        rows=rows,
        **strides(rows),
        shift=shift,
        scale=scale,
        exponent_alone=codec.scale_exponent,
        block=codec.block,
        block_capacity=blocks,
        kv_heads=case.kv_heads,
        with_shift=int(codec.block_shift),
    )
    name = f"skvq::block_statistics<{harness.DTYPES[rows.dtype]}, {codec.head_dim}>"
    kernels.launch(name, (blocks, *rows.shape[1::-1]), 256, arguments)
    return shift, scale


def by_reference(case: Case, rows: Tensor, b: int, h: int, statistics: Any, position: int) -> tuple[Tensor, Tensor]:
    """Bytes of the rows of one head, and what they read back as."""
    codec, exact, packed, read = case.codec, rows[b, h].float(), [], []
    step = codec.block or rows.shape[2]
    for first in range(0, rows.shape[2], step):
        own = None if statistics is None else tuple(s[b, h, first // step] for s in statistics)
        piece = exact[first : first + step]
        packed.append(codec.encode(piece, h, own, "propagate", position=position + first))
        read.append(codec.decode(packed[-1], h, own, position=position + first))
    return torch.cat(packed), torch.cat(read)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_codes_and_rows_are_those_of_the_reference(case: Case, kernels: harness.Kernels) -> None:
    batch, count = 2, 137
    rows = random_rows(case, batch, 256 if case.codec.block else count)
    rows[0, 0, 20, 7], rows[1, 1, 130, 0] = math.nan, math.inf
    statistics = None
    if case.codec.block:
        statistics = statistics_by_kernel(case, kernels, rows, 2)
        found = case.codec.block_statistics(rows.float().unflatten(2, (2, 128)))
        for ours, theirs in zip(statistics, found, strict=True):
            assert torch.equal(ours, theirs)
    rows = rows[:, :, :count].contiguous()
    origins = torch.tensor([5, -300], dtype=torch.int32)
    more: dict[str, Any] = {"statistics": statistics, "origins": origins}
    pages, table, refused = encode(case, kernels, rows, [3, 1, 1, 30, 93, 9], **more)
    assert refused == 2
    read_float = decode(case, kernels, table, rows[:, :, 2:].float(), 2, **more)
    read_model = decode(case, kernels, table, rows[:, :, 40:], 40, **more)
    codec = case.codec
    for b in range(batch):
        for h in range(case.kv_heads):
            expected, read = by_reference(case, rows, b, h, statistics, int(origins[b]))
            found = harness.unpack(kernels, case.page_format, table[b, h], count, codec.code_bytes, codec.row_bytes)
            assert torch.equal(found, expected)
            assert torch.equal(read_float[b, h].nan_to_num(1e9), read[2:].nan_to_num(1e9))
            assert torch.equal(read_model[b, h].nan_to_num(1e4), read[40:].to(case.dtype).nan_to_num(1e4))
    assert pages is not None


@pytest.mark.parametrize("schedule", ["reverse", "random:3"])
def test_order_of_threads_changes_nothing(schedule: str, kernels: harness.Kernels) -> None:
    for case in (CASES[0], CASES[8]):
        rows, origins = random_rows(case, 1, 40), torch.zeros(1, dtype=torch.int32)
        found = []
        for order in ("forward", schedule):
            pages, table, _ = encode(case, kernels, rows, [17, 23], origins=origins, schedule=order)
            sizes = case.codec.code_bytes, case.codec.row_bytes
            found.append(harness.unpack(kernels, case.page_format, table[0, 0], 40, *sizes))
            assert pages is not None
        assert torch.equal(*found)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_single_rows_are_packed_as_by_encode(case: Case, kernels: harness.Kernels) -> None:
    batch, window = 2, 4
    rows = random_rows(case, batch, 256)
    rows[0, 0, 20, 7], rows[1, 1, 130, 0], rows[0, 1, 134, 1] = math.nan, math.inf, math.nan
    more: dict[str, Any] = {"statistics": None, "origins": torch.tensor([5, -300], dtype=torch.int32)}
    if case.codec.block:
        more["statistics"] = statistics_by_kernel(case, kernels, rows, 2)
    streams = rows[:, :, :150].contiguous(), rows[:, :, 3:153].contiguous()
    # A ring with more room than rows, as one has that grows, and a full one.
    for room, once in ((window + 2, (0, 10, 27)), (window, (97, 25, 15))):
        first, count, single = once
        ring = Ring(case, kernels, streams, window, room, more)
        ring.fill(first, window)
        if first:
            ring.encode(0, first)
        ring.encode(first, count)
        for _ in range(single):
            ring.append()
        ring.check_window()
        packed, refused = first + count + single, 0
        for rows_of, (pages, _) in zip(streams, ring.pages, strict=True):
            portions = [part for part in (first, count) if part] + [1] * single
            expected, _, one = encode(case, kernels, rows_of, portions, **more)
            refused += one
            assert torch.equal(pages, expected)
        assert int(ring.refused) == refused
        assert int(ring.lengths[0]) == packed


def test_a_row_after_a_crop_leaves_nothing_of_those_that_were_there(kernels: harness.Kernels) -> None:
    for case in (CASES[0], CASES[1], CASES[3]):
        rows, origins = random_rows(case, 1, 60), torch.zeros(1, dtype=torch.int32)
        ring = Ring(case, kernels, (rows, rows), 4, 4, {"origins": origins})
        ring.encode(0, 30)
        ring.fill(19, 4)
        ring.append()
        pages, table, _ = encode(case, kernels, rows, [30], origins=origins)
        encode_some(case, kernels, rows, table, torch.zeros(1, dtype=torch.int32), (19, 1), origins=origins)
        assert torch.equal(ring.pages[1][0], pages)


def test_a_window_fills_before_rows_leave_it(kernels: harness.Kernels) -> None:
    case = CASES[0]
    rows = random_rows(case, 1, 20)
    ring = Ring(case, kernels, (rows, rows.flip(2)), 4, 5, {"origins": torch.zeros(1, dtype=torch.int32)})
    for packed in (0, 0, 0, 0, 1, 2):
        ring.append()
        assert int(ring.lengths[0]) == packed
        ring.check_window()
    assert ring.pages[0][0].float().std() > 0


@pytest.mark.parametrize("schedule", ["reverse", "random:5"])
def test_order_of_threads_changes_no_single_row(schedule: str, kernels: harness.Kernels) -> None:
    for case in (CASES[2], CASES[5], CASES[8]):
        rows, found = random_rows(case, 1, 40), []
        for order in ("forward", schedule):
            more = {"origins": torch.zeros(1, dtype=torch.int32), "schedule": order}
            ring = Ring(case, kernels, (rows, rows), 4, 4, more)
            ring.encode(0, 13)
            for _ in range(5):
                ring.append()
            found.append(ring.pages[0][0])
        assert torch.equal(*found)

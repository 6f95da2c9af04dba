"""A device that runs the CUDA kernels, driven from Python, and codecs on it.

Is: kernels compiled by NVRTC and launched through `skvq._native` on torch's memory and current stream; rows encoded,
decoded, repacked, block statistics. Is not: an oracle, nor the cache's own backend. Formats and parameter structs come
from kernels/emu, whose fake driver runs the same calls without a GPU when the device is "cpu".
Shapes: rows [B, H, n, D] in the model's type; a pool of pages [pages, page stride] uint8 and a table [B, H, pages of a
sequence] int64 of their addresses.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels" / "emu"))
from harness import DTYPES, KERNELS, PAGE_ROWS, PageFormat, Structure, params, strides
from pipeline import Call, transform_of

from skvq import _native
from skvq.cuda_runtime import KernelInstance, find_nvrtc
from skvq.reference import ReferenceCodec

FILES = {
    "rows_to_page": "repack.cuh",
    "page_to_rows": "repack.cuh",
    "encode": "encode.cuh",
    "append_row": "append.cuh",
    "attend_apart": "attend.cuh",
    "fold_turned": "turned.cuh",
    "decode": "decode.cuh",
    "block_statistics": "statistics.cuh",
    "fold": "attend.cuh",  # as `skvq warmup` names it, so that both find one file on disk
    "attend": "attend.cuh",
    "attend_many": "attend_many.cuh",
    "attend_once": "attend_once.cuh",
    "attend_rows": "attend_rows.cuh",
    "mask_reach": "reach.cuh",
    "mask_shows": "reach.cuh",
    "unpack": "unpack.cuh",
    "turning": "turning.cuh",
    "plain": "plain.cuh",
    "unfold": "merge.cuh",
    "merge": "merge.cuh",
}
ROW_BLOCK = 16
Statistics = tuple[Tensor, Tensor]


def instance_of(expression: str) -> KernelInstance:
    """A kernel by its C++ expression, "skvq::fold<float, skvq::Layout<…>>"."""
    kernel, _, rest = expression.partition("<")
    arguments, depth = [""], 0
    for character in rest[:-1]:
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "," and depth == 0:
            arguments.append("")
        else:
            arguments[-1] += character
    return KernelInstance(FILES[kernel.removeprefix("skvq::")], kernel, tuple(part.strip() for part in arguments))


# ---- the machine -----------------------------------------------------------------------------------------------------


class Machine:
    """A device that runs kernels: "cuda", or "cpu" where a fake driver is loaded.

    Attributes:
        device: of the tensors.
        index: of the device, as torch and the driver count.
        status: of `cuda_status()`.
    """

    def __init__(self, device: str) -> None:
        self.status = _native.cuda_status()
        if not self.status["usable"]:
            raise SystemExit(f"CUDA cannot be used here: {self.status['reason']}")
        self.device = torch.device(device)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", self.device.index or 0)
            torch.cuda.set_device(self.device)
            torch.zeros(1, device=self.device)  # torch makes its context before the kernels ask for it
        self.index = self.device.index or 0
        self.nvrtc = find_nvrtc()
        built, here = set(_native.testing.cuda_sources()), {path.name for path in KERNELS.glob("*.cuh")}
        if built != here:  # the structs that are passed are those of this checkout
            raise SystemExit(f"this checkout is not that of the installed skvq: kernels {sorted(built ^ here)} differ")

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def multiprocessors(self) -> int:
        return int(self.status["devices"][self.index]["multiprocessors"])

    def describe(self) -> dict[str, Any]:
        """Card, driver, torch, NVRTC."""
        card = self.status["devices"][self.index]
        found = {"device": str(self.device), "card": card, "driver": self.status["driver_version"]}
        found |= {"nvrtc": self.nvrtc, "nvrtc_version": _native.cuda_nvrtc(self.nvrtc)[0]}
        return found | {"torch": torch.__version__, "torch_cuda": torch.version.cuda}

    def compile(self, expressions: list[str]) -> int:
        """Compiles kernels on all threads. Returns how many were not on disk."""
        arch = self.status["devices"][self.index]["arch"]
        jobs = [(instance_of(expression).parts, arch) for expression in dict.fromkeys(expressions)]
        return sum(not kernel.cached for kernel in _native.cuda_compile_many(self.nvrtc, jobs))

    def launch(
        self,
        expression: str,
        grid: tuple[int, ...],
        threads: int,
        arguments: Structure | bytes,
        shared_bytes: int = 0,
        early: bool = False,
    ) -> None:
        """Puts a kernel on torch's current stream; `early`: it may begin before the one in front is done."""
        _native.testing.cuda_launch(
            self.nvrtc,
            instance_of(expression).parts,
            bytes(arguments),
            device=self.index,
            grid=(*grid, *[1] * (3 - len(grid))),
            block=(threads, 1, 1),
            shared_bytes=shared_bytes,
            stream=torch.cuda.current_stream(self.device).cuda_stream if self.is_cuda else 0,
            early=early,
        )

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def put(self, value: Any) -> Any:
        """Tensors on this device, contiguous; anything else as it is."""
        return value.to(self.device).contiguous() if isinstance(value, Tensor) else value

    def poisoned(self, *shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        """Memory at a multiple of 256 bytes, all bits set: floats that nobody has written are not numbers."""
        count = math.prod(shape) * torch.empty((), dtype=dtype).element_size()
        raw = torch.full((count + 256,), 0xFF, dtype=torch.uint8, device=self.device)
        start = -raw.data_ptr() % 256
        return raw[start : start + count].view(dtype).view(shape)


# Kernels that wait for the launches in front of them themselves, so that they may begin before those are done.
BEGIN_EARLY = {
    "fold",
    "fold_turned",
    "turning",
    "attend",
    "attend_apart",
    "attend_many",
    "attend_once",
    "plain",
    "unfold",
}
BEGIN_EARLY |= {"attend_rows", "mask_reach", "merge", "unpack"}


class MachineKernels:
    """A machine for `pipeline.run`: launches of a chain, each of which may begin early, and tensors on the device."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.put, self._chained = machine, machine.put, False

    def launch(
        self,
        expression: str,
        grid: tuple[int, ...],
        threads: int,
        arguments: Structure,
        *,
        shared_bytes: int = 0,
        schedule: str = "",
    ) -> None:
        """Puts a kernel on torch's current stream; the order of its threads is the device's."""
        early = instance_of(expression).kernel.removeprefix("skvq::") in BEGIN_EARLY
        before, self._chained = self._chained, early
        self.machine.launch(expression, grid, threads, arguments, shared_bytes, early=early and before)


# ---- codecs ----------------------------------------------------------------------------------------------------------


def transform_fields(
    machine: Machine, codec: ReferenceCodec, statistics: Statistics | None, kv_heads: int, last_position: int
) -> dict[str, Any]:
    """The fields of TransformParams, on the device; a mean that turns has its angles up to `last_position`."""
    fields: dict[str, Any] = transform_of(codec, statistics, Call(codec, codec, kv_heads=kv_heads)).kept
    if codec.map is not None and codec.map.shift_sine is not None:
        first = int(fields["first_span"])
        positions = 256 * torch.arange(first, last_position // 256 + 2, dtype=torch.float64)
        angles = positions[:, None] * codec.map.frequencies.double()
        fields["spans"] = torch.stack([angles.cos(), angles.sin()], 1).float()
    return {name: machine.put(value) for name, value in fields.items()}


def flat_levels(codec: ReferenceCodec) -> Tensor:
    """The f32 levels as encode and decode want them."""
    if codec.format != "parts":
        return codec.coder.levels.contiguous()
    levels = torch.zeros(62)
    for bits, own in zip(codec.coder._bits, codec.coder._levels, strict=True):
        levels[(1 << bits) - 2 : (2 << bits) - 2] = own
    return levels


def codec_instances(stream: str, codec: ReferenceCodec, dtype: torch.dtype) -> list[str]:
    """What `DeviceCodec` launches."""
    layout, element = PageFormat.of(stream, codec).expression, DTYPES[dtype]
    names = [f"encode<{element}, {layout}>", f"decode<float, {layout}>"]
    names += [f"append_row<{element}, {layout}, {layout}>", f"rows_to_page<{layout}>", f"page_to_rows<{layout}>"]
    names += [f"block_statistics<{element}, {codec.head_dim}>"] if codec.block else []
    return [f"skvq::{name}" for name in names]


class DeviceCodec:
    """One stream's codec on a machine: rows in, pages, rows out."""

    def __init__(self, machine: Machine, stream: str, codec: ReferenceCodec, kv_heads: int, last: int = 4096) -> None:
        self.machine, self.codec, self.kv_heads, self.last = machine, codec, kv_heads, last
        self.format = PageFormat.of(stream, codec)
        self.stride = self.page_bytes(stream, codec)
        self.levels = machine.put(flat_levels(codec))
        self.uniform = codec.format != "parts" and bool(codec.coder.uniform)

    @staticmethod
    def page_bytes(stream: str, codec: ReferenceCodec) -> int:
        """Of a page in the pool, where pages begin at multiples of 16 bytes."""
        return -(-PageFormat.of(stream, codec).page_bytes // 16) * 16

    def new_pages(self, batch: int, rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """A pool [pages, stride], the table [B, H, n] of a sequence's pages, scattered over it, and their indices."""
        count = -(-rows // PAGE_ROWS)
        pages = batch * self.kv_heads * count
        pool = self.machine.poisoned(pages, self.stride)
        order = torch.randperm(pages, generator=torch.Generator().manual_seed(seed)).to(self.machine.device)
        order = order.view(batch, self.kv_heads, count)
        return pool, order * self.stride + pool.data_ptr(), order

    def statistics(self, rows: Tensor) -> Statistics:
        """Shift and scale [B, H, blocks, D] of whole blocks."""
        batch, heads, count, width = rows.shape
        blocks = count // self.codec.block
        shift, scale = (self.machine.poisoned(batch, heads, blocks, width, dtype=torch.float32) for _ in range(2))
        arguments = params(
            "StatisticsParams",
            rows=rows,
            **strides(rows),
            shift=shift,
            scale=scale,
            exponent_alone=self.codec.scale_exponent,
            block=self.codec.block,
            block_capacity=blocks,
            kv_heads=heads,
            with_shift=int(self.codec.block_shift),
        )
        kernel = f"skvq::block_statistics<{DTYPES[rows.dtype]}, {width}>"
        self.machine.launch(kernel, (blocks, heads, batch), 256, arguments)
        self.machine.synchronize()
        return shift, scale

    def _common(self, table: Tensor, statistics: Statistics | None, origins: Tensor | None) -> dict[str, Any]:
        fields = transform_fields(self.machine, self.codec, statistics, self.kv_heads, self.last)
        common = {"pages": table, "transform": params("TransformParams", **fields), "origins": origins}
        return common | {"page_capacity": table.shape[-1], "kv_heads": self.kv_heads}

    def _packing(self, transform: Structure) -> Structure:
        codec = self.codec
        fields = {"clip": float(codec.clip), "rule": int(codec.rule == "range"), "refinements": codec.refinements}
        fields |= {"unbiased": int(codec.unbiased), "uniform": int(self.uniform), "levels": self.levels}
        return params("CodecParams", transform=transform, **fields)

    def encode(
        self,
        rows: Tensor,
        table: Tensor,
        portions: list[int],
        statistics: Statistics | None = None,
        origins: Tensor | None = None,
    ) -> int:
        """Rows [B, H, n, D] into pages, some at a time. Returns how many were refused."""
        first = 0
        refused = torch.zeros(1, dtype=torch.int32, device=self.machine.device)
        fields = self._common(table, statistics, origins)
        fields["codec"] = self._packing(fields.pop("transform"))
        kernel = f"skvq::encode<{DTYPES[rows.dtype]}, {self.format.expression}>"
        for count in portions:
            piece = rows[:, :, first : first + count]
            fields |= {"first_row": first, "row_count": count, "rows": piece, "refused": refused}
            blocks = (first + count - 1) // ROW_BLOCK - first // ROW_BLOCK + 1
            grid = (blocks, self.kv_heads, rows.shape[0])
            self.machine.launch(kernel, grid, 256, params("EncodeParams", **strides(piece), **fields))
            first += count
        self.machine.synchronize()  # the arguments' tensors live until here
        return int(refused)

    def append(
        self,
        rows: Tensor,
        tables: tuple[Tensor, Tensor],
        portion: tuple[int, int],
        statistics: Statistics | None = None,
        origins: Tensor | None = None,
    ) -> int:
        """Of rows [B, H, n, D], which are their own ring, those of a portion (first, count) one by one into the pages
        of both tables, as one launch does with keys and values. Returns how many were refused."""
        (first, count), (batch, heads, room, _), window = portion, rows.shape, 4
        refused = torch.zeros(1, dtype=torch.int32, device=self.machine.device)
        fields = self._common(tables[0], statistics, origins)
        codec = self._packing(fields.pop("transform"))
        del fields["pages"]
        kernel = f"skvq::append_row<{DTYPES[rows.dtype]}, {self.format.expression}, {self.format.expression}>"
        for row in range(first, first + count):
            new = rows[:, :, row + window].clone()
            strides_of = strides(new, "batch_stride head_stride")
            keys, values = (
                params("AppendStream", row=new, **strides_of, ring=rows, pages=table, codec=codec) for table in tables
            )
            lengths = self.machine.put(torch.tensor([row + 1, 0, window, row + 1], dtype=torch.int32))
            more = {"keys": keys, "values": values, "refused": refused, "lengths": lengths}
            arguments = params("AppendParams", **more, leaves=1, ring_rows=room, **fields)
            self.machine.launch(kernel, (2, heads, batch), 256, arguments)
            self.machine.synchronize()  # the arguments' tensors live until here
        return int(refused)

    def decode(
        self,
        table: Tensor,
        batch: int,
        first: int,
        count: int,
        statistics: Statistics | None = None,
        origins: Tensor | None = None,
        with_mean: bool = True,
    ) -> Tensor:
        """Packed rows [B, H, count, D] from `first` on, float32; without the mean of parts if so wanted."""
        found = self.machine.poisoned(batch, self.kv_heads, count, self.codec.head_dim, dtype=torch.float32)
        fields = self._common(table, statistics, origins)
        if not with_mean:
            fields["transform"].shift = fields["transform"].shift_sine = 0
        fields |= {"levels": None if self.uniform else self.levels, "first_row": first, "row_count": count}
        blocks = (first + count - 1) // ROW_BLOCK - first // ROW_BLOCK + 1
        arguments = params("DecodeParams", rows=found, **strides(found), **fields)
        grid = (blocks, self.kv_heads, batch)
        self.machine.launch(f"skvq::decode<float, {self.format.expression}>", grid, 256, arguments)
        self.machine.synchronize()
        return found

    def _repack(self, kernel: str, table: Tensor, codes: Tensor, numbers: Tensor) -> None:
        arguments = params("RepackParams", code_rows=codes, number_rows=numbers, pages=table, rows=codes.shape[0])
        grid = (-(-codes.shape[0] // ROW_BLOCK),)
        self.machine.launch(f"skvq::{kernel}<{self.format.expression}>", grid, 128, arguments)
        self.machine.synchronize()

    def from_rows(self, packed: Tensor, table: Tensor) -> None:
        """Rows of FORMAT.md [n, row_bytes] into the pages of one sequence and head."""
        packed = self.machine.put(packed)
        codes, numbers = packed.split([self.codec.code_bytes, self.codec.metadata_bytes], 1)
        self._repack("rows_to_page", table, codes.contiguous(), numbers.contiguous())

    def to_rows(self, table: Tensor, rows: int) -> Tensor:
        """The other way round."""
        codes = self.machine.poisoned(rows, self.codec.code_bytes)
        numbers = self.machine.poisoned(rows, self.codec.metadata_bytes)
        self._repack("page_to_rows", table, codes, numbers)
        return torch.cat([codes, numbers], 1)

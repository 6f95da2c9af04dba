"""Builds kernels for the host emulator and launches them from Python.

Is: g++ on a list of instances, ctypes mirrors of params.cuh (read from the file itself), formats as template arguments.
Is not: an oracle; that is skvq.reference.
Shapes: pages [n, page_bytes] uint8; a pointer table [n] int64 of their addresses.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

EMULATOR = Path(__file__).parent
KERNELS = EMULATOR.parent
PAGE_ROWS, BLOCK_ROWS = 128, 16
FLAGS = (
    "-std=c++17",
    "-O1",
    "-g1",
    "-w",
    "-ffp-contract=off",
    "-fPIC",
    "-DKERNEL_EMU",
    f"-I{KERNELS}",
    f"-I{EMULATOR}",
)
FORMAT_ARGUMENTS = {"8": 8, "4": 4, "3": 3, "2": 2, "1.6": 16, "1.5": 15, "parts": 0}
DTYPES = {torch.float32: "float", torch.float16: "skvq::Half", torch.bfloat16: "skvq::BFloat"}


# ---- formats ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PageFormat:
    """A Layout of layout.cuh: one stream's format on the device."""

    stream: str
    head_dim: int
    format: str
    group_size: int
    symmetric: bool = True
    metadata: str = "e4m3"
    parts: tuple[tuple[int, int], ...] = ()
    even: bool = False

    @classmethod
    def of(cls, stream: str, codec: Any) -> PageFormat:
        """The format of a `ReferenceCodec`."""
        parts = codec.coder.parts if codec.format == "parts" else ()
        if parts:
            even = codec.coder.codebook == "uniform"
        else:
            of_one_group = codec.symmetric and codec.group_size == codec.head_dim
            even = stream == "values" and codec.format == "2" and codec.coder.uniform and of_one_group
        return cls(stream, codec.head_dim, codec.format, codec.group_size, codec.symmetric, codec.metadata, parts, even)

    @property
    def expression(self) -> str:
        """The C++ type."""
        parts = sum((bits | width // 16 << 3) << 8 * index for index, (bits, width) in enumerate(self.parts))
        number_bytes = {"e4m3": 1, "fp16": 2}[self.metadata]
        arguments = [f"skvq::{self.stream}", self.head_dim, FORMAT_ARGUMENTS[self.format], self.group_size]
        arguments += [int(self.symmetric), number_bytes] + ([f"{parts}ull"] if parts or self.even else [])
        arguments += ["1"] if self.even else []
        return f"skvq::Layout<{', '.join(map(str, arguments))}>"

    @property
    def numbers(self) -> int:
        """Scales and zero points of a row."""
        return self.head_dim // self.group_size * (1 if self.symmetric else 2)

    @property
    def lane_bytes(self) -> int:
        """Bytes of codes of a lane in a row block, as PAGES.md counts them."""
        if self.format == "1.6":
            return -(-self.head_dim // 10)
        parts = [(bits, width // 8) for bits, width in self.parts if bits]
        if not parts:
            bits = 3 if self.format == "1.5" else int(self.format)
            parts = [(bits, self.head_dim // (16 if self.format == "1.5" else 8))]
        return sum(-(-bits * octets // 2) for bits, octets in parts)

    @property
    def page_bytes(self) -> int:
        return PAGE_ROWS // BLOCK_ROWS * 32 * self.lane_bytes + PAGE_ROWS * self.numbers * (
            1 if self.metadata == "e4m3" else 2
        )


def level_table(codec: Any) -> Structure:
    """The LevelTable of a `ReferenceCodec`."""
    table = PARAMS["LevelTable"]()

    def put(word: int, levels: Tensor) -> None:
        for index, bits in enumerate(levels.to(torch.float16).view(torch.int16).tolist()):
            table.low[word + index // 4] |= (bits & 255) << 8 * (index % 4)
            table.high[word + index // 4] |= (bits >> 8 & 255) << 8 * (index % 4)

    coder = codec.coder
    if codec.format == "parts":
        for bits, levels in zip(coder._bits, coder._levels, strict=True):
            put({1: 0, 2: 1, 3: 2, 4: 4, 5: 8}[bits], levels)
    elif codec.format == "1.5":
        put(2, coder.levels[:, 0])
        put(4, coder.levels[:, 1])
    elif codec.format != "8":
        put({"4": 4, "3": 2, "2": 1, "1.6": 1}[codec.format], coder.levels)
    if codec.format == "2":
        table.step = even_step(coder.levels.double().tolist())
    if codec.format == "parts" and coder.codebook == "uniform":
        table.step = 1.0  # queries have the steps
    table.correction = 1.0
    if codec.format in ("1.6", "2"):
        levels = coder.levels.double().flatten()
        rounded = levels.half().double()
        table.correction = float((levels @ rounded) / (rounded @ rounded))
    return table


def even_step(levels: list[float]) -> float:
    """The distance of four levels that are evenly spaced around 0, else 0, as `even_step` of src/cuda/pages.rs."""
    step = (levels[-1] - levels[0]) / 3
    even = all(
        abs(level - place * step) <= 5e-7 * step for level, place in zip(levels, (-1.5, -0.5, 0.5, 1.5), strict=True)
    )
    return step if even else 0.0


# ---- parameters ------------------------------------------------------------------------------------------------------

Structure = ctypes.Structure
SCALARS: dict[str, Any] = {
    "u8": ctypes.c_uint8,
    "u32": ctypes.c_uint32,
    "u64": ctypes.c_uint64,
    "i32": ctypes.c_int32,
    "i64": ctypes.c_int64,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}


def read_structures(*sources: Path) -> dict[str, Any]:
    """The structs of C++ files as ctypes structures."""
    found: dict[str, Any] = {}
    for source in sources:
        text = re.sub(r"//[^\n]*", "", source.read_text(encoding="utf-8"))
        for name, body in re.findall(r"struct (\w+) \{(.*?)\n\};", text, re.DOTALL):
            fields: list[tuple[str, Any]] = []
            for line in filter(None, (line.strip() for line in body.split(";"))):
                kind, names = line.split(maxsplit=1)
                field_type = SCALARS.get(kind) or found[kind]
                for field in names.split(","):
                    size = re.fullmatch(r"\s*(\w+)\[(\d+)\]\s*", field)
                    fields.append((size[1], field_type * int(size[2])) if size else (field.strip(), field_type))
            found[name] = type(name, (Structure,), {"_fields_": fields})
    return found


def structures() -> dict[str, Any]:
    """Parameter structs, those of the tests' own kernels included."""
    fragments = (EMULATOR / "fragments.cuh").read_text(encoding="utf-8")
    own = Path(tempfile.mkdtemp()) / "own.hpp"
    own.write_text("\n".join(re.findall(r"struct \w+Params \{.*?\n\};", fragments, re.DOTALL)))
    return read_structures(KERNELS / "params.cuh", own)


PARAMS: dict[str, Any] = structures()


def strides(rows: Tensor, names: str = "batch_stride head_stride row_stride") -> dict[str, int]:
    """The strides of the first axes under the names of their fields."""
    fields = names.split()
    return dict(zip(fields, rows.stride()[: len(fields)], strict=True))


def params(structure: str, /, **fields: Any) -> Structure:
    """A parameter struct; tensors become their addresses and stay alive with it. Fields not named are 0."""
    made = PARAMS[structure]()
    made.kept = fields
    known = {name for name, _ in made._fields_}
    for name, value in fields.items():
        if name not in known:
            raise KeyError(f"{structure} has no {name}")
        if isinstance(value, Tensor):
            value = value.data_ptr()
        setattr(made, name, 0 if value is None else value)
    return made


# ---- building and launching ------------------------------------------------------------------------------------------


class KernelError(RuntimeError):
    """What the emulator reports: divergence, deadlock, misuse."""


def compiler() -> str | None:
    """The C++ compiler."""
    return shutil.which(os.environ.get("CXX", "g++"))


@cache
def _build_directory() -> Path:
    return Path(tempfile.mkdtemp(prefix="skvq-kernels-"))


def _sources() -> list[Path]:
    return sorted([*KERNELS.glob("*.cuh"), *EMULATOR.glob("*.hpp"), *EMULATOR.glob("*.cpp"), *EMULATOR.glob("*.cuh")])


def build(name: str, units: dict[str, str], flags: tuple[str, ...] = (), link: tuple[str, ...] = ("-shared",)) -> Path:
    """Compile units (name to text) and emulator.cpp, two at a time, and link them; the same build is done once."""
    digest = hashlib.sha256(repr((units, flags, link)).encode() + b"".join(p.read_bytes() for p in _sources()))
    directory = _build_directory() / digest.hexdigest()[:16]
    target = directory / name
    if target.exists():
        return target
    directory.mkdir(exist_ok=True)
    commands = []
    for unit, text in {**units, "emulator.cpp": '#include "emu/emulator.cpp"\n'}.items():
        (directory / unit).write_text(text, encoding="utf-8")
        commands.append(
            [compiler() or "g++", *FLAGS, *flags, "-c", str(directory / unit), "-o", str(directory / f"{unit}.o")]
        )
    running: list[subprocess.Popen[str]] = []
    for command in commands:
        if len(running) == 2:
            _finish(running.pop(0))
        running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for process in running:
        _finish(process)
    objects = [command[-1] for command in commands]
    _finish(
        subprocess.Popen(
            [compiler() or "g++", *flags, *link, *objects, "-o", str(target), "-ldl"], stderr=subprocess.PIPE, text=True
        )
    )
    return target


def _finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(errors[:4000])


def unit_of(instances: list[str], headers: list[str]) -> str:
    """A translation unit with instances of kernels from headers."""
    includes = "".join(f'#include "{header}"\n' for header in headers)
    return f'{includes}#include "emu/registry.hpp"\n' + "".join(f"INSTANCE({instance})\n" for instance in instances)


class Kernels:
    """Instances of kernels in one shared library."""

    def __init__(self, instances: list[str], headers: list[str], flags: tuple[str, ...] = (), units: int = 2) -> None:
        instances = list(dict.fromkeys(instances))
        parts = [instances[index::units] for index in range(units)]
        texts = {f"unit{index}.cpp": unit_of(part, headers) for index, part in enumerate(parts) if part}
        texts["entry.cpp"] = '#include "emu/entry.cpp"\n'
        self.library = ctypes.CDLL(str(build("kernels.so", texts, flags)))
        text, pointer, size = ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t
        self.library.skvq_launch.argtypes = [text, pointer, pointer, size, pointer, size, text, size]

    def launch(
        self,
        kernel: str,
        grid: tuple[int, ...],
        threads: int,
        parameters: Structure,
        *,
        shared_bytes: int = 0,
        schedule: str = "forward",
    ) -> None:
        """Run a kernel. Raises KernelError with what the emulator has to say."""
        os.environ["EMULATOR_SCHEDULE"] = schedule
        sizes = (ctypes.c_uint32 * 3)(*grid, *[1] * (3 - len(grid)))
        message = ctypes.create_string_buffer(1000)
        failed = self.library.skvq_launch(
            kernel.encode(),
            sizes,
            (ctypes.c_uint32 * 3)(threads, 1, 1),
            shared_bytes,
            ctypes.byref(parameters),
            ctypes.sizeof(parameters),
            message,
            len(message),
        )
        if failed:
            raise KernelError(message.value.decode())

    @staticmethod
    def put(value: Any) -> Any:
        """A tensor where kernels find it, anything else as it is: here all memory is the host's."""
        return value


def aligned(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Memory as the device gives it: at a multiple of 256 bytes; what nobody has written is not a number."""
    count = 1
    for size in shape:
        count *= size
    item = torch.empty((), dtype=dtype).element_size()
    raw = torch.full((count * item + 512,), 0xFF, dtype=torch.uint8)
    start = -raw.data_ptr() % 256
    return raw[start : start + count * item].view(dtype).view(shape)


def new_pages(
    page_format: PageFormat, rows: int, *leading: int, put: Callable[[Tensor], Tensor] = Kernels.put
) -> tuple[Tensor, Tensor]:
    """Pages [*leading, pages, page_bytes] for rows, where `put` puts them, and the table of their addresses."""
    count = -(-rows // PAGE_ROWS)
    pages = put(aligned(*leading, count, -(-page_format.page_bytes // 256) * 256))
    flat = pages.view(-1, pages.shape[-1])
    addresses = torch.tensor([page.data_ptr() for page in flat], dtype=torch.int64)
    return pages, put(addresses.view(*leading, count))


def repack(kernels: Kernels, page_format: PageFormat, packed: Tensor, code_bytes: int) -> tuple[Tensor, Tensor]:
    """FORMAT.md rows [n, row_bytes] to pages and the table of their addresses."""
    pages, table = new_pages(page_format, packed.shape[0], put=kernels.put)
    code_rows, number_rows = (
        kernels.put(rows.contiguous()) for rows in (packed[:, :code_bytes], packed[:, code_bytes:])
    )
    arguments = params("RepackParams", code_rows=code_rows, number_rows=number_rows, pages=table, rows=packed.shape[0])
    blocks = -(-packed.shape[0] // BLOCK_ROWS)
    kernels.launch(f"skvq::rows_to_page<{page_format.expression}>", (blocks,), 128, arguments)
    return pages, table


def unpack(
    kernels: Kernels, page_format: PageFormat, table: Tensor, rows: int, code_bytes: int, row_bytes: int
) -> Tensor:
    """The other way round."""
    code_rows = torch.zeros(rows, code_bytes, dtype=torch.uint8)
    number_rows = torch.zeros(rows, row_bytes - code_bytes, dtype=torch.uint8)
    arguments = params("RepackParams", code_rows=code_rows, number_rows=number_rows, pages=table, rows=rows)
    kernels.launch(f"skvq::page_to_rows<{page_format.expression}>", (-(-rows // BLOCK_ROWS),), 128, arguments)
    return torch.cat([code_rows, number_rows], dim=1)

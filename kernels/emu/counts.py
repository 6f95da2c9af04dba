"""Instructions of the hot loops, counted in what the installed skvq compiles: `python kernels/emu/counts.py [ARCH …]`.

Is: the counts that PAGES.md quotes, printed, with registers and spills; needs NVRTC 13 and an nvdisasm, no GPU. Is not:
a time. `tests/test_kernels_nvrtc.py` fails where some of them grow.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import sass
from harness import PageFormat

from skvq._native import CompiledKernel, cuda_compile_many
from skvq.cuda_runtime import find_nvrtc
from skvq.reference import ReferenceCodec

D = 128
Parts = tuple[tuple[int, int], ...]
FIT: Parts = ((5, 32), (2, 32), (1, 32), (0, 32))
PLAN: Parts = ((4, 32), (3, 32), (1, 32), (0, 32))
PLAN_VALUES: Parts = ((3, 32), (2, 32), (1, 32), (0, 32))


def layout(stream: str, name: str) -> str:
    """Of a format without parts."""
    return PageFormat.of(stream, ReferenceCodec(head_dim=D, format=name)).expression


def parts(stream: str, pieces: Parts, even: bool = True) -> str:
    """Of parts."""
    return PageFormat(stream, D, "parts", D, parts=pieces, even=even).expression


K2, V2, TERNARY = layout("keys", "2"), layout("values", "2"), layout("values", "1.6")
FITTED, PLANNED = parts("keys", FIT), parts("keys", PLAN)


@dataclass(frozen=True)
class Loop:
    """A kernel whose innermost loop with products is counted, and how many row blocks a turn of it takes; 0: straight
    pieces with products or exponentials, for 64 rows and the queries of a warp.
    """

    name: str
    file: str
    kernel: str
    arguments: tuple[str, ...]
    row_blocks: int


def once(name: str, keys: str, values: str) -> Loop:
    """Of a decode step."""
    return Loop(name, "attend_once.cuh", "skvq::attend_once", ("skvq::Half", keys, values), 2)


LOOPS = (
    once("2 + 2 bits", K2, V2),
    once("2 bits + ternary", K2, TERNARY),
    once("fit, ternary values", FITTED, TERNARY),
    once("fit, two-bit values", FITTED, V2),
    once("plan", PLANNED, parts("values", PLAN_VALUES, even=False)),
    once("plan, evenly spaced values", PLANNED, parts("values", PLAN_VALUES)),
    Loop("many queries, 2 bits + ternary, 64 rows", "attend_many.cuh", "skvq::attend_many", (K2, TERNARY), 1),
    Loop("many queries, fit, 64 rows", "attend_many.cuh", "skvq::attend_many", (FITTED, TERNARY), 1),
    Loop("rows, 64 of them", "attend_rows.cuh", "skvq::attend_rows", ("skvq::Half", str(D), str(D)), 0),
    Loop("unpack, 2 bits", "unpack.cuh", "skvq::unpack", ("skvq::Half", K2), 1),
    Loop("unpack, fit", "unpack.cuh", "skvq::unpack", ("skvq::Half", FITTED), 1),
)


def counted(loop: Loop, compiled: CompiledKernel) -> Iterator[str]:
    """Cells of the table: all instructions, of integers and bits, of floats, products, registers, bytes spilled."""
    blocks = sass.blocks_of(sass.disassemble(compiled.cubin))
    if loop.row_blocks:
        lines = sass.matrix_loops(blocks)[0]
    else:
        hot = ("HMMA", "MUFU")
        lines = [x for b in blocks if sum(sass.name_of(x) in hot for x in b.instructions) >= 64 for x in b.instructions]
    pipes, each = sass.by_pipe(lines), max(1, loop.row_blocks)
    for count in (len(lines), pipes["alu"], pipes["fma"], pipes["matrix"]):
        yield f"{count / each:.0f}"
    registers = re.search(r"Used (\d+) registers", compiled.log)
    yield registers[1] if registers else ""
    yield str(max(map(int, re.findall(r"(\d+) bytes spill", compiled.log)), default=0))


def main() -> None:
    """Print a table for each architecture."""
    for arch in sys.argv[1:] or ["sm_80", "sm_90a"]:
        jobs = [((loop.file, loop.kernel, loop.arguments), arch) for loop in LOOPS]
        print(f"\n| {arch} | instructions | integers and bits | floats | products | registers | bytes spilled |")
        print("|---|---|---|---|---|---|---|")
        for loop, compiled in zip(LOOPS, cuda_compile_many(find_nvrtc(), jobs), strict=True):
            print(f"| {loop.name} | {' | '.join(counted(loop, compiled))} |")


if __name__ == "__main__":
    main()

"""Kernels compiled by NVRTC for every architecture: no spills, few registers, few instructions, the emulator's names.

Needs NVRTC 13 (`pip install nvidia-cuda-nvrtc`; torch's CUDA 13 builds bring it), no GPU and no header; nvdisasm for
counts. Older versions compile the kernels too (test_cuda_warmup.py), into code that these limits are not about.
"""

from __future__ import annotations

import ctypes
import re
import sys
import sysconfig
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

from skvq.cuda_runtime import major_version
from skvq.reference import ReferenceCodec

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels" / "emu"))
import cost
import harness
import sass
from harness import PageFormat

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a")
# Four blocks of 128 threads on a multiprocessor, fewer where wide codes, sixteen queries or wide heads need more.
FOUR_BLOCKS, THREE_BLOCKS, TWO_BLOCKS = 128, 168, 255


def layout(stream: str, name: str, head_dim: int = 128, **more: object) -> str:
    return PageFormat.of(stream, ReferenceCodec(head_dim=head_dim, format=name, **more)).expression  # type: ignore[arg-type]


def parts(stream: str, head_dim: int, *pieces: tuple[int, int]) -> str:
    return PageFormat(stream, head_dim, "parts", head_dim, parts=pieces).expression


def even_parts(head_dim: int, *pieces: tuple[int, int], stream: str = "keys") -> str:
    return PageFormat(stream, head_dim, "parts", head_dim, parts=pieces, even=True).expression


K2, V2, V16 = layout("keys", "2"), layout("values", "2"), layout("values", "1.6")
K4, V3 = layout("keys", "4", 64, symmetric=False), layout("values", "3", 64, group_size=32)
KP = parts("keys", 128, (4, 32), (3, 32), (2, 32), (1, 32))
VP = parts("values", 128, (3, 32), (2, 64), (0, 32))
VE = even_parts(128, (3, 32), (2, 32), (1, 32), (0, 32), stream="values")
VL = layout("values", "2", codebook="lloyd-max")
# Of a fit to the prompt, of a plan of two bits, of a fit to three.
KF = even_parts(128, (5, 32), (2, 32), (1, 32), (0, 32))
KE = even_parts(128, (4, 32), (3, 32), (1, 64))
K3 = parts("keys", 128, (5, 32), (3, 64), (1, 32))
TURNED = f"skvq::attend_once<skvq::Half, {KF}, {V16}>"
ATTEND = {
    f"skvq::attend<{K2}, {V16}, 1>": FOUR_BLOCKS,
    f"skvq::attend<{K2}, {V2}, 1>": FOUR_BLOCKS,
    f"skvq::attend_apart<{K2}, {V16}, 1>": FOUR_BLOCKS,
    f"skvq::attend<{K2}, {V2}, 2>": TWO_BLOCKS,
    f"skvq::attend<{KP}, {VP}, 1>": THREE_BLOCKS,
    f"skvq::attend<{KF}, {V16}, 1>": FOUR_BLOCKS,
    f"skvq::attend<{KE}, {VE}, 2>": TWO_BLOCKS,
    f"skvq::attend<{K2}, {VL}, 1>": FOUR_BLOCKS,
    f"skvq::attend<{even_parts(96, (5, 32), (1, 32), (0, 32))}, {layout('values', '1.6', 96)}, 1>": FOUR_BLOCKS,
    f"skvq::attend<{layout('keys', '2', 256)}, {layout('values', '2', 256)}, 1>": TWO_BLOCKS,
    f"skvq::attend<{K4}, {V3}, 1>": THREE_BLOCKS,
    f"skvq::attend<{layout('keys', '1.5')}, {layout('values', '8')}, 1>": TWO_BLOCKS,
}
ONCE = {
    f"skvq::attend_once<skvq::Half, {K2}, {V16}>": FOUR_BLOCKS,
    f"skvq::attend_once<skvq::BFloat, {K2}, {V2}>": FOUR_BLOCKS,
    TURNED: FOUR_BLOCKS,
    f"skvq::attend_once<skvq::Half, {KP}, {VP}>": THREE_BLOCKS,
    f"skvq::attend_once<skvq::Half, {KE}, {VP}>": THREE_BLOCKS,
    f"skvq::attend_once<skvq::Half, {KF}, {VE}>": FOUR_BLOCKS,
    f"skvq::attend_once<skvq::BFloat, {K3}, {V16}>": THREE_BLOCKS,
    f"skvq::attend_once<float, {K2}, {V16}>": THREE_BLOCKS,
    f"skvq::attend_once<skvq::Half, {layout('keys', '2', 256)}, {layout('values', '2', 256)}>": TWO_BLOCKS,
}
WIDE = layout("keys", "4", 256, group_size=32, symmetric=False)
WIDE_PARTS = parts("values", 256, (5, 64), (3, 64), (1, 128))
OTHERS = {
    f"skvq::append_row<skvq::Half, {K2}, {V16}>": 64,
    f"skvq::append_row<skvq::Half, {KP}, {VP}>": 128,
    f"skvq::append_row<float, {WIDE}, {WIDE_PARTS}>": 128,
    f"skvq::append_row<skvq::BFloat, {layout('keys', '1.5')}, {layout('values', '8')}>": 96,
    f"skvq::append_block<skvq::Half, {K2}, {V16}>": 128,
    f"skvq::append_block<float, {WIDE}, {layout('values', '8', 256)}>": 128,
    f"skvq::append_block<skvq::BFloat, {KP}, {V16}>": 128,
    f"skvq::fold<skvq::BFloat, {K2}>": 64,
    f"skvq::fold<skvq::BFloat, {KP}>": 96,
    f"skvq::fold<skvq::Half, {KF}>": 96,
    f"skvq::encode<skvq::Half, {KP}>": 96,
    f"skvq::encode<skvq::BFloat, {V16}>": 96,
    f"skvq::decode<skvq::Half, {VP}>": 64,
    "skvq::unfold<64>": 64,
    "skvq::unfold<96>": 64,
    "skvq::unfold<128>": 64,
    "skvq::unfold<256>": 168,
    "skvq::merge<skvq::Half, 128>": 64,
    "skvq::plain<skvq::BFloat, 128, 128>": THREE_BLOCKS,
    # One block of 512 threads.
    "skvq::turning<skvq::Half, 64>": 128,
    "skvq::turning<skvq::Half, 128>": 128,
    "skvq::turning<float, 128>": 128,
    "skvq::turning<skvq::BFloat, 256>": 128,
    "skvq::fold_turned<skvq::BFloat, 128>": 64,
    f"skvq::rows_to_page<{V16}>": 64,
    "skvq::block_statistics<skvq::Half, 128>": 64,
    "skvq::query_squares<skvq::Half, 256>": 96,
    "skvq::query_factors<256>": 64,
    f"skvq::scale_squares<{K2}>": 32,
    "skvq::clear_rows<skvq::u16>": 32,
    "skvq::copy_rows<skvq::U32x4>": 64,
    "skvq::poke<skvq::ManyWords>": 32,
}
# One block of 256 threads.
MANY = [(K2, V16), (K2, V2), (KP, VP), (KF, V16), (layout("keys", "2", 192), layout("values", "2", 192)), (K4, V3)]
MANY += [
    (layout("keys", "1.5"), layout("values", "8")),
    (layout("keys", "8", 192, group_size=64), layout("values", "8", 192)),
]
ATTEND_MANY = {f"skvq::attend_many<{k}, {v}>": TWO_BLOCKS for k, v in MANY}
# Two blocks of 128 threads, one where heads are wide; of unpack one of 256 or two.
ROWS = {
    "skvq::attend_rows<skvq::Half, 128, 128>": TWO_BLOCKS,
    "skvq::attend_rows<skvq::BFloat, 64, 64>": TWO_BLOCKS,
    "skvq::attend_rows<skvq::BFloat, 256, 256>": TWO_BLOCKS,
    "skvq::attend_rows<skvq::Half, 80, 80>": TWO_BLOCKS,
    "skvq::attend_rows<skvq::Half, 192, 128>": TWO_BLOCKS,
    "skvq::mask_reach<skvq::i32>": 64,
    f"skvq::unpack<skvq::Half, {K2}>": FOUR_BLOCKS,
    f"skvq::unpack<skvq::Half, {V16}>": FOUR_BLOCKS,
    f"skvq::unpack<skvq::BFloat, {KF}>": FOUR_BLOCKS,
    f"skvq::unpack<skvq::Half, {VP}>": FOUR_BLOCKS,
    f"skvq::unpack<skvq::Half, {K4}>": FOUR_BLOCKS,
    f"skvq::unpack<skvq::Half, {WIDE}>": TWO_BLOCKS,
    f"skvq::unpack<skvq::BFloat, {WIDE_PARTS}>": TWO_BLOCKS,
}
PRODUCTS_OF_ROWS = next(iter(ROWS))
HEADERS = [
    "attend.cuh",
    "attend_many.cuh",
    "attend_once.cuh",
    "attend_rows.cuh",
    "merge.cuh",
    "plain.cuh",
    "turning.cuh",
    "append.cuh",
    "append_block.cuh",
    "encode.cuh",
    "decode.cuh",
    "repack.cuh",
    "rows.cuh",
]
HEADERS += ["statistics.cuh", "queries.cuh", "noise.cuh", "reach.cuh", "unpack.cuh"]
# All kernels where they run most, those that must be fast everywhere.
JOBS = [
    (arch, expression)
    for arch in ARCHITECTURES
    for expression in (ATTEND if arch == "sm_90a" else list(ATTEND)[: 2 if arch == "sm_80" else 1])
]
JOBS += [
    (arch, expression)
    for arch in ARCHITECTURES
    for expression in (ONCE if arch == "sm_90a" else list(ONCE)[: 5 if arch == "sm_80" else 3])
]
JOBS += [("sm_80", expression) for expression in OTHERS]
JOBS += [("sm_90a", name) for name in OTHERS if any(x in name for x in ("append_row", "turning", "fold"))]
JOBS += [(arch, next(iter(ATTEND_MANY))) for arch in ARCHITECTURES if arch != "sm_90a"]
JOBS += [("sm_90a", expression) for expression in ATTEND_MANY]
JOBS += [(arch, PRODUCTS_OF_ROWS) for arch in ARCHITECTURES if arch not in ("sm_80", "sm_90a")]
JOBS += [(arch, expression) for arch in ("sm_80", "sm_90a") for expression in ROWS]


@cache
def nvrtc() -> ctypes.CDLL | None:
    places = sorted(Path(sysconfig.get_paths()["purelib"]).glob("nvidia/**/libnvrtc.so.*"))
    found = [path for path in places if (major_version(str(path)) or 0) >= 13]
    if not found:
        return None
    # Some wheels' libraries find their other half only if it is loaded already.
    for builtins in found[0].parent.glob("libnvrtc-builtins.so*"):
        ctypes.CDLL(str(builtins))
    return ctypes.CDLL(str(found[0]))


pytestmark = pytest.mark.skipif(nvrtc() is None, reason="no NVRTC 13: pip install nvidia-cuda-nvrtc")


def compile_one(job: tuple[str, str]) -> tuple[str, str, bytes]:
    """Log, lowered name and CUBIN of one kernel."""
    arch, expression = job
    library, program = nvrtc(), ctypes.c_void_p()
    assert library is not None
    sources = {path.name: path.read_bytes() for path in harness.KERNELS.glob("*.cuh")}
    texts, names = (
        (ctypes.c_char_p * len(sources))(*values) for values in (sources.values(), map(str.encode, sources))
    )
    source = "".join(f'#include "{header}"\n' for header in HEADERS).encode()
    assert library.nvrtcCreateProgram(ctypes.byref(program), source, b"kernels.cu", len(sources), texts, names) == 0
    assert library.nvrtcAddNameExpression(program, expression.encode()) == 0
    options = [f"--gpu-architecture={arch}", "-std=c++17", "-default-device", "--ptxas-options=-v"]
    status = library.nvrtcCompileProgram(
        program, len(options), (ctypes.c_char_p * len(options))(*map(str.encode, options))
    )

    def text(what: str) -> bytes:
        size = ctypes.c_size_t()
        getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(library, f"nvrtcGet{what}")(program, buffer)
        return buffer.raw

    log = text("ProgramLog").rstrip(b"\0").decode()
    assert status == 0, log
    lowered = ctypes.c_char_p()
    library.nvrtcGetLoweredName(program, expression.encode(), ctypes.byref(lowered))
    name = (lowered.value or b"").decode()
    cubin = text("CUBIN")
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return log, name, cubin


@cache
def compiled() -> dict[tuple[str, str], tuple[str, str, bytes]]:
    """All jobs, two at a time: the compiler has no lock of Python's."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(JOBS, pool.map(compile_one, JOBS), strict=True))


@pytest.mark.parametrize("job", JOBS, ids=[f"{arch}-{index}" for index, (arch, _) in enumerate(JOBS)])
def test_no_spills_and_few_registers(job: tuple[str, str]) -> None:
    log, name, cubin = compiled()[job]
    assert name
    assert cubin[:4] == b"\x7fELF"
    # A function of the kernel's own, such as pow, has a line of its own.
    spilled = [int(n) for n in re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", log)]
    assert len(spilled) >= 3, log
    assert not any(spilled), log
    used = re.search(r"Used (\d+) registers", log)
    assert used
    arch, expression = job
    most = {**ATTEND, **ATTEND_MANY, **ONCE, **OTHERS, **ROWS}[expression]
    if expression == TURNED and arch == "sm_120a":
        most = THREE_BLOCKS
    assert int(used[1]) <= most


@pytest.mark.skipif(sass.disassembler() is None, reason="no nvdisasm: it is in CUDA's toolkit and in Triton")
@pytest.mark.parametrize(("arch", "formats"), cost.COUNTED, ids=map("-".join, cost.COUNTED))
def test_a_row_block_takes_no_more_instructions_than_pages_md_says(arch: str, formats: str) -> None:
    instructions, alu, products = cost.COUNTED[arch, formats]
    values = {"2 + 2 bits": V2, "2 bits + ternary": V16}[formats]
    found = sass.cost_of(
        sass.disassemble(compiled()[arch, f"skvq::attend<{K2}, {values}, 1>"][2]), products, row_blocks=2
    )
    assert found["all"] <= instructions * cost.SLACK, found
    assert found["alu"] <= alu * cost.SLACK, found


@pytest.mark.skipif(sass.disassembler() is None, reason="no nvdisasm: it is in CUDA's toolkit and in Triton")
@pytest.mark.parametrize(("arch", "formats"), cost.COUNTED, ids=map("-".join, cost.COUNTED))
def test_one_launch_takes_hardly_more_instructions_a_row_block(arch: str, formats: str) -> None:
    instructions, _, products = cost.COUNTED[arch, formats]
    expression = list(ONCE)[("2 bits + ternary", "2 + 2 bits").index(formats)]
    found = sass.cost_of(sass.disassemble(compiled()[arch, expression][2]), products, row_blocks=2)
    assert found["all"] <= instructions * 1.05, found


@pytest.mark.skipif(sass.disassembler() is None, reason="no nvdisasm: it is in CUDA's toolkit and in Triton")
@pytest.mark.parametrize("arch", cost.TURNED_COUNTED)
def test_a_mean_that_turns_takes_no_more_instructions_than_pages_md_says(arch: str) -> None:
    instructions, alu, products = cost.TURNED_COUNTED[arch]
    cubin = compiled()[arch, TURNED][2]
    loops = [sass.by_pipe(lines) for lines in sass.matrix_loops(sass.blocks_of(sass.disassemble(cubin)))]
    assert loops[0]["matrix"] == 2 * products  # two row blocks a turn
    assert loops[0].total() <= 2 * instructions * cost.SLACK
    assert loops[0]["alu"] <= 2 * alu * cost.SLACK


@pytest.mark.skipif(sass.disassembler() is None, reason="no nvdisasm: it is in CUDA's toolkit and in Triton")
@pytest.mark.parametrize("arch", cost.MANY_COUNTED)
def test_many_queries_take_no_more_instructions_than_pages_md_says(arch: str) -> None:
    counted, _, _, matrix = cost.MANY_COUNTED[arch]
    cubin = compiled()[arch, next(iter(ATTEND_MANY))][2]
    loops = [sass.by_pipe(lines) for lines in sass.matrix_loops(sass.blocks_of(sass.disassemble(cubin)))]
    # Products with values are there twice: for rows that all see, and for others.
    assert loops[0]["matrix"] == matrix * 3 / 2
    assert loops[0].total() <= counted * cost.SLACK


@pytest.mark.skipif(sass.disassembler() is None, reason="no nvdisasm: it is in CUDA's toolkit and in Triton")
@pytest.mark.parametrize("arch", cost.ROWS_COUNTED)
def test_products_of_rows_take_no_more_instructions_than_pages_md_says(arch: str) -> None:
    counted, products = cost.ROWS_COUNTED[arch]
    blocks = sass.blocks_of(sass.disassemble(compiled()[arch, PRODUCTS_OF_ROWS][2]))
    names = [Counter(map(sass.name_of, block.instructions)) for block in blocks]
    # Scores, weights, products with values: each in one piece, whose operands come four matrices at a time.
    straight = [count for count in names if count["HMMA"] + count["MUFU"] >= 64]
    assert sorted((count["HMMA"], count["LDSM"], count["MUFU"]) for count in straight) == [
        (0, 0, 64),
        (products // 2, 32, 0),
        (products // 2, 48, 0),
    ]
    assert sum(count.total() for count in straight) <= counted * cost.SLACK
    copies = [line for block in blocks for line in block.instructions if "LDGSTS" in line]
    assert copies
    assert all(".128" in line for line in copies)


@pytest.mark.skipif(sass.disassembler() is None, reason="no nvdisasm: it is in CUDA's toolkit and in Triton")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize(("element", "count", "chains"), [("float", 24, 3), ("skvq::Half", 8, 2)])
def test_steps_of_a_mean_that_turns_stay_in_registers(arch: str, element: str, count: int, chains: int) -> None:
    blocks = sass.blocks_of(sass.disassemble(compiled()[arch, f"skvq::turning<{element}, 128>"][2]))
    (products,) = [block for block in blocks if any("HMMA" in line for line in block.instructions)]
    names = [sass.name_of(line) for line in products.instructions]
    assert names.count("HMMA") == count  # high, low of steps, low of amplitudes in f32: sums side by side
    # Only where the table has further passes, which one of a rotary embedding has not.
    assert all(line.startswith("@") for line in products.instructions if sass.name_of(line) == "LDG")
    sums = [re.search(r"HMMA\.16816\.F32 \w+, [\w.]+, [\w.]+, (\w+)", line) for line in products.instructions]
    chain = [found[1] for found in sums if found]
    assert all(len(set(chain[i : i + chains])) == chains for i in range(0, count, chains))


@pytest.mark.skipif(harness.compiler() is None, reason="no C++ compiler")
def test_compilers_give_kernels_the_same_names() -> None:
    expressions = [f"skvq::attend<{K2}, {V16}, 1>", f"skvq::decode<skvq::Half, {VP}>", f"skvq::rows_to_page<{V16}>"]
    kernels = harness.Kernels(expressions, HEADERS)
    names = {expression: name for (_, expression), (_, name, _) in compiled().items()}
    for expression in expressions:
        kernels.library.skvq_mangled.restype = ctypes.c_char_p
        assert kernels.library.skvq_mangled(expression.encode()).decode() == names[expression]

"""Machine instructions of a kernel's hot loop, counted in a cubin by nvdisasm.

Is: basic blocks, the innermost loops with matrix instructions, their instructions by the pipe that executes them.
Is not: a simulator; what a loop does in rare cases is left out.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);")
LABEL = re.compile(r"^(\.L_\w+):")
TARGET = re.compile(r"`\((\.L_\w+)\)")
# Names by the pipe that executes them. Of sm_80 to sm_90 the one of integers and bits, "alu", takes half of what can be
# issued: 64 lanes a clock and multiprocessor (CUDA C++ programming guide, throughput of arithmetic instructions).
NAMES = {
    "matrix": "HMMA IMMA QMMA",
    "alu": "LOP3 PLOP3 PRMT SHF SGXT IADD3 LEA ISETP FSETP FMNMX FMNMX3 IMNMX VIMNMX VIADD IABS SEL FSEL P2R R2P BMSK "
    "F2FP F2F I2FP MOV CS2R VOTE LOP SHL SHR IADD POPC FLO FCHK VABSDIFF",
    "fma": "FFMA FMUL FADD IMAD HFMA2 HADD2 HMUL2 HSETP2 FADD2 FMUL2 FFMA2",
    "special": "MUFU I2F F2I",
    "memory": "LDG LD LDS LDC LDCU STG ST STS SHFL MOVM LDSM LDGSTS S2R S2UR",
    "control": "BRA BSSY BSYNC WARPSYNC NOP EXIT BREAK CALL RET NANOSLEEP YIELD BAR DEPBAR",
}
PIPES = {name: pipe for pipe, names in NAMES.items() for name in names.split()}


@cache
def disassembler() -> str | None:
    """nvdisasm: of the path, or the one that Triton brings."""
    found = shutil.which("nvdisasm")
    brought = Path(sysconfig.get_paths()["purelib"]) / "triton/backends/nvidia/bin/nvdisasm"
    return found or (str(brought) if brought.exists() else None)


@dataclass
class Block:
    """Instructions without a jump in or out."""

    instructions: list[str] = field(default_factory=list)
    after: list[int] = field(default_factory=list)


def name_of(instruction: str) -> str:
    """LOP3 of "@!P0 LOP3.LUT R1, …"."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0].split(".")[0]


def pipe_of(instruction: str) -> str:
    """A key of NAMES, or "uniform" or "other"."""
    name = name_of(instruction)
    return PIPES.get(name) or ("uniform" if name.startswith(("U", "R2UR")) else "other")


def blocks_of(text: str) -> list[Block]:
    """Basic blocks of the one function of a disassembly."""
    blocks, labels, current = [Block()], {}, 0
    jumps: list[tuple[int, str, bool]] = []
    for line in text.splitlines():
        if label := LABEL.match(line):
            if blocks[current].instructions:
                blocks.append(Block())
                blocks[current].after.append(current + 1)
                current += 1
            labels[label[1]] = current
        elif found := INSTRUCTION.match(line):
            instruction = found[2].strip()
            blocks[current].instructions.append(instruction)
            if name_of(instruction) in ("BRA", "EXIT", "RET", "BREAK"):
                always = not instruction.startswith("@") and not re.search(r"BRA(\.\w+)* !?U?P\d", instruction)
                if target := TARGET.search(instruction):
                    jumps.append((current, target[1], always))
                blocks.append(Block())
                if not always:
                    blocks[current].after.append(current + 1)
                current += 1
    for index, label, _ in jumps:
        if label in labels:
            blocks[index].after.append(labels[label])
    return blocks


def loop_of(blocks: list[Block], head: int, tail: int) -> set[int]:
    """Blocks of the natural loop of the jump back from tail to head."""
    before: dict[int, list[int]] = {}
    for index, block in enumerate(blocks):
        for other in block.after:
            before.setdefault(other, []).append(index)
    found, pending = {head, tail}, [tail]
    while pending:
        at = pending.pop()
        if at == head:
            continue
        for other in before.get(at, []):
            if other not in found:
                found.add(other)
                pending.append(other)
    return found


def is_rare(blocks: list[Block], index: int) -> bool:
    """Whether a block is for a new reference of the softmax (shuffles) or an optional product (jumped over)."""
    lines, after = blocks[index].instructions, blocks[index].after
    jumped_over = any(
        index in block.after and set(after) <= set(block.after) for block in blocks if len(block.after) == 2
    )
    return any("SHFL" in line for line in lines) or (jumped_over and any(pipe_of(line) == "matrix" for line in lines))


def matrix_loops(blocks: list[Block]) -> list[list[str]]:
    """Instructions of the innermost loops with matrix instructions, without their rare blocks."""
    loops: dict[int, set[int]] = {}
    for tail, block in enumerate(blocks):
        for head in block.after:
            if head <= tail:
                loops[head] = loops.get(head, set()) | loop_of(blocks, head, tail)
    found = []
    for head, members in sorted(loops.items()):
        # What only rare blocks lead to is rare too.
        usual, pending = {head}, [head]
        while pending:
            reached = {i for i in blocks[pending.pop()].after if i in members and not is_rare(blocks, i)} - usual
            usual |= reached
            pending += reached
        lines = [line for index in sorted(usual) for line in blocks[index].instructions]
        inner = any(other < members for other in loops.values())
        if not inner and any(pipe_of(line) == "matrix" for line in lines):
            found.append(lines)
    return found


def cost_of(text: str, products: tuple[int, int], row_blocks: int) -> dict[str, float]:
    """Instructions a row block, all and by pipe, of the loop with `row_blocks` times so many products (f16, bytes).

    Raises ValueError if there is none.
    """
    for lines in matrix_loops(blocks_of(text)):
        names = by_name(lines)
        if (names["HMMA"], names["IMMA"]) == tuple(count * row_blocks for count in products):
            pipes = by_pipe(lines)
            return {"all": len(lines) / row_blocks, **{pipe: count / row_blocks for pipe, count in pipes.items()}}
    raise ValueError(f"no loop has {row_blocks} times {products} products of f16 and of bytes")


def disassemble(cubin: bytes) -> str:
    """The text of a cubin's code."""
    tool = disassembler()
    if tool is None:
        raise FileNotFoundError("nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-c", file.name], check=True, capture_output=True, text=True).stdout


def by_pipe(lines: list[str]) -> Counter[str]:
    return Counter(pipe_of(line) for line in lines)


def by_name(lines: list[str]) -> Counter[str]:
    return Counter(name_of(line) for line in lines)

"""`_native.CudaLayer` beside `_native.Layer`: one random program of appends, crops, gathers and reads for both.

Is: what test_cuda_store.py runs in a process of its own, under the emulated driver, whose device memory is the host's.
Is not: collected by pytest.
"""

from __future__ import annotations

import random
import sys
import weakref
from dataclasses import dataclass
from typing import Any

import torch

from parts_examples import codec_options
from skvq import _native

STREAM = 3
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Of the largest output: queries, levels and weights are f16 in the kernels.
ERROR = {"float32": 1.5e-3, "float16": 2e-3, "bfloat16": 8e-3}
DECODE_ERROR = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 8e-3}


def statics(head_dim: int, seed: int) -> dict[str, Any]:
    """Shift, scale and a permutation of each of two heads."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "shift": torch.randn(2, head_dim, generator=generator),
        "scale": 0.5 + torch.rand(2, head_dim, generator=generator),
        "permutation": [torch.randperm(head_dim, generator=generator).tolist() for _ in range(2)],
    }


@dataclass
class Case:
    """Codecs by their options, and how large the program is."""

    keys: dict[str, Any]
    values: dict[str, Any]
    dtype: str
    sinks: int = 3
    window: int = 20
    batch: int = 2
    group: int = 2
    padding: tuple[int, ...] = ()
    steps: int = 14
    longest: int = 170
    seeds: tuple[int, ...] = (0, 1)
    kv_heads: int = 2


def parts(index: int, head_dim: int = 64, **more: Any) -> dict[str, Any]:
    return codec_options(head_dim, index, heads=2, **more)


BLOCKS = {"block": 128, "scale_exponent": 0.5}
LONG_BLOCKS = {"block": 256, "scale_exponent": 1.0}
CASES = {
    "static": Case(
        {"head_dim": 64, "format": "2", **statics(64, 0)},
        {"head_dim": 64, "format": "1.6", **statics(64, 1)},
        "float32",
    ),
    "parts": Case(parts(1), parts(1, turning=False, noise=False), "float16", sinks=2, window=33),
    "blocks": Case(
        {"head_dim": 64, "format": "2", **BLOCKS},
        {"head_dim": 64, "format": "1.6", "unbiased": True, **BLOCKS, "block_shift": False},
        "bfloat16",
        window=40,
        batch=1,
        longest=300,
        steps=10,
    ),
    "padded": Case(
        {"head_dim": 64, "format": "2", **statics(64, 0)},
        {"head_dim": 64, "format": "1.6", **statics(64, 1)},
        "float32",
        sinks=4,
        padding=(0, 150),
    ),
    "padded parts": Case(
        parts(1), parts(1, turning=False, noise=False), "float16", sinks=4, window=12, padding=(9, 0), seeds=(2,)
    ),
    "padded blocks": Case(
        {"head_dim": 64, "format": "2", **BLOCKS},
        {"head_dim": 64, "format": "1.6", "unbiased": True, **BLOCKS, "block_shift": False},
        "bfloat16",
        padding=(30, 0),
        seeds=(3,),
        longest=200,
    ),
    "other formats, two tiles": Case(
        {
            "head_dim": 64,
            "format": "4",
            "symmetric": False,
            "metadata": "fp16",
            "group_size": 32,
            "rule": "range",
            "refinements": 1,
            "rotation": "identity",
        },
        {"head_dim": 96, "format": "1.5", "metadata": "fp16"},
        "float32",
        group=10,
        batch=1,
        steps=6,
        seeds=(4,),
    ),
    "long blocks": Case(
        {"head_dim": 64, "format": "2", **LONG_BLOCKS},
        {"head_dim": 64, "format": "1.6", **statics(64, 1)},
        "float32",
        longest=400,
        steps=8,
        batch=1,
        seeds=(5,),
    ),
    "no sinks, window of one": Case(
        {"head_dim": 64, "format": "2", **statics(64, 0)},
        {"head_dim": 64, "format": "1.6", **statics(64, 1)},
        "float32",
        sinks=0,
        window=1,
        batch=1,
    ),
}


class Memory:
    """Lends tensors as torch's allocator on a GPU would: at multiples of 256 bytes, with nothing useful in them."""

    def __init__(self) -> None:
        self.lent = 0
        self.left = -1  # calls until one fails; negative: none does

    def allocate(self, count: int) -> torch.Tensor:
        self.left -= 1
        if self.left == 0:
            raise MemoryError("no memory left")
        raw = torch.full((count + 256,), 0xFF, dtype=torch.uint8)
        start = -raw.data_ptr() % 256
        tensor = raw[start : start + count]
        self.lent += count
        weakref.finalize(tensor, self._back, count)
        return tensor

    def _back(self, count: int) -> None:
        self.lent -= count


class Pair:
    """Both layers, of the same tokens."""

    def __init__(self, case: Case, nvrtc: str) -> None:
        self.case, self.memory = case, Memory()
        codecs = {side: _native.Codec(**options) for side, options in (("keys", case.keys), ("values", case.values))}
        common = {"num_key_value_heads": case.kv_heads, "sinks": case.sinks, "window": case.window, "dtype": case.dtype}
        self.cpu = _native.Layer(**common, **codecs, nonfinite="propagate")
        self.cuda = _native.CudaLayer(
            **common, **codecs, allocate=self.memory.allocate, nvrtc=nvrtc, stream=STREAM, host_memory=True
        )
        self.constant_bytes = self.memory.lent
        if case.padding:
            self.cpu.set_padding(list(case.padding))
            self.cuda.set_padding(list(case.padding))

    def copy(self) -> Pair:
        twin = Pair.__new__(Pair)
        twin.__dict__.update(self.__dict__)
        twin.cpu, twin.cuda = self.cpu.clone(), self.cuda.clone(stream=STREAM)
        return twin

    def rows(self, generator: torch.Generator, count: int) -> list[torch.Tensor]:
        """Keys and values, as a model's transposed projections lie in memory."""
        batch, found = self.cpu.batch_size or self.case.batch, []
        for options in (self.case.keys, self.case.values):
            width = options["head_dim"]
            x = torch.randn(batch, count, self.case.kv_heads, width, generator=generator)
            found.append((x * 2.0 + torch.linspace(-1, 1, width)).to(DTYPES[self.case.dtype]).transpose(1, 2))
        return found

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.cpu.append(keys, values)
        self.cuda.append(keys, values, stream=STREAM)

    def check(self, generator: torch.Generator) -> None:
        """The same regions, rows and attention."""
        for name in ("length", "batch_size", "sink_tokens", "packed_tokens", "window_tokens"):
            assert getattr(self.cpu, name) == getattr(self.cuda, name), name
        if not any(self.case.padding):
            self.check_rows()
        self.check_attention(generator, 1)
        if self.cpu.length >= 3:
            self.check_attention(generator, 3, causal=True, softcap=20.0)
        mask = torch.randn(1, 1, 1, self.cpu.length, generator=generator)
        mask[torch.rand(mask.shape, generator=generator) < 0.3] = -torch.inf
        self.check_attention(generator, 1, mask=mask, sink_logits=torch.randn(self.query_heads, generator=generator))

    def check_and_grow(self, generator: torch.Generator) -> None:
        self.check(generator)
        self.append(*self.rows(generator, 30))
        self.check(generator)

    def check_rows(self) -> None:
        for side, options in (("keys", self.case.keys), ("values", self.case.values)):
            shape = (self.cpu.batch_size, self.case.kv_heads, self.cpu.length, options["head_dim"])
            found = [torch.full(shape, torch.nan, dtype=DTYPES[self.case.dtype]) for _ in range(2)]
            getattr(self.cpu, f"decode_{side}")(found[0])
            getattr(self.cuda, f"decode_{side}")(found[1], stream=STREAM)
            expected, found_rows = (x.float() for x in found)
            error = float((expected - found_rows).abs().max()) / max(1.0, float(expected.abs().max()))
            assert error <= DECODE_ERROR[self.case.dtype], f"{side}: {error:.2e}"

    @property
    def query_heads(self) -> int:
        return self.case.kv_heads * self.case.group

    def check_attention(self, generator: torch.Generator, length: int, **more: Any) -> None:
        dtype, width = DTYPES[self.case.dtype], self.case.keys["head_dim"]
        query = torch.randn(self.cpu.batch_size, self.query_heads, length, width, generator=generator).to(dtype)
        shape = (*query.shape[:3], self.case.values["head_dim"])
        expected, found = (torch.full(shape, torch.nan, dtype=dtype) for _ in range(2))
        scale = width**-0.5
        self.cpu.attend(query, expected, scale=scale, **more)
        workspace = self.memory.allocate(self.cuda.workspace_bytes(self.query_heads, length))
        self.cuda.attend(query, found, workspace=workspace, scale=scale, stream=STREAM, **more)
        largest = max(1.0, float(expected.float().abs().max()))
        error = float((expected.float() - found.float()).abs().max()) / largest
        assert error <= ERROR[self.case.dtype], f"attention of {length}, {sorted(more)}: {error:.2e}"


def run_program(case: Case, nvrtc: str, seed: int) -> None:
    """One program; what is done is told if it fails."""
    pair, choose, generator = Pair(case, nvrtc), random.Random(seed), torch.Generator().manual_seed(seed)
    told: list[str] = []
    kept: list[Pair] = []
    try:
        for step in range(case.steps):
            length = pair.cpu.length
            kinds = ["one", "some"] if step < 3 else ["one", "one", "some", "crop", "gather", "copy"]
            kind = "prompt" if step == 0 else choose.choice(kinds)
            if kind == "crop" and length > 1:
                keep = choose.randrange(1, length)
                told.append(f"crop {keep}")
                pair.cpu.crop(keep)
                pair.cuda.crop(keep, stream=STREAM)
            elif kind == "gather":
                batch = pair.cpu.batch_size
                indices = [choose.randrange(batch) for _ in range(choose.randrange(1, 4))]
                told.append(f"gather {indices}")
                pair.cpu.gather(indices)
                pair.cuda.gather(indices, stream=STREAM)
            elif kind == "copy":
                told.append("copy")
                kept = [*kept[-1:], pair.copy()]
            else:
                longest = case.longest if kind != "one" else 1
                count = choose.randrange(longest // 2, longest) + 1 if kind == "prompt" else choose.randint(1, longest)
                told.append(f"append {count}")
                pair.append(*pair.rows(generator, count))
            pair.check(generator)
        told.append("the copies")
        while kept:
            kept.pop().check_and_grow(generator)
        told.append("reset")
        pair.cuda.reset()
        assert pair.memory.lent == pair.constant_bytes, (pair.memory.lent, pair.constant_bytes)
    except Exception:
        print(f"seed {seed}: {', '.join(told)}", file=sys.stderr)
        raise


def main(nvrtc: str, name: str) -> None:
    torch.set_num_threads(1)
    for seed in CASES[name].seeds:
        run_program(CASES[name], nvrtc, seed)
    print("equal")

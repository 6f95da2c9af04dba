"""`_native.CudaLayer` beside `_native.Layer`: one random program of appends, crops, gathers and reads for both.

Is: what test_cuda_store.py runs in a process of its own, under the emulated driver, whose device memory is the host's.
Is not: collected by pytest.
"""

from __future__ import annotations

import ctypes
import dataclasses
import random
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from parts_examples import codec_options, frequencies_of
from skvq import SkvqError, _native
from skvq.config import PAGE_ROWS
from skvq.warmup import QUERY_TILE

STREAM = 3
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Of the largest output: queries, levels and weights are f16 in the kernels.
ERROR = {"float32": 1.5e-3, "float16": 2e-3, "bfloat16": 8e-3}
# A scale of a block is one step off where sums in another order round the other way.
FP16_STEP = 2.0**-10
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
    workspace_bytes: int | None = None
    # Queries of a kv head of a call for the kernel of many, or 0: odd, and more than a block of it has.
    many: int = 0
    # Of a step that is captured: tokens of the prompt whose queries have their say.
    shown: int = 20
    # Likewise: packed rows that a crop leaves of the prompt, or 0: nothing is cropped.
    cropped: int = 0

    @property
    def limit(self) -> float:
        """Of attention, of the largest output. Queries here look at channels that those of the prompt did not: where
        these had their say folded ones are large where keys are small; what f16 rounds off the products does not cancel
        as the products do.
        """
        # With a mean that turns f16 or 15 bits round what queries make of it, too.
        return ERROR[self.dtype] * (4 if "query_exponent" in self.keys else 1.5 if "shift_sine" in self.keys else 1)


def parts(index: int, head_dim: int = 64, **more: Any) -> dict[str, Any]:
    return codec_options(head_dim, index, heads=2, **more)


BLOCKS = {"block": 128, "scale_exponent": 0.5}
BLOCK_VALUES = {"head_dim": 64, "format": "1.6", "unbiased": True, **BLOCKS, "block_shift": False}
LONG_BLOCKS = {"block": 256, "scale_exponent": 1.0}
# The default without a plan, in blocks of 128.
QUERIED = {"head_dim": 64, "format": "2", "unbiased": True, **BLOCKS, "query_exponent": 0.5}
MANY = 133
PIECES = 520  # of static keys
CASES = {
    "many queries": Case(
        {"head_dim": 64, "format": "2", **statics(64, 0)},
        {"head_dim": 64, "format": "1.6", **statics(64, 1)},
        "float32",
        steps=4,
        seeds=(14,),
        many=MANY,
    ),
    "many queries, padded parts": Case(
        parts(1), parts(1, turning=False, noise=False), "float16", padding=(9, 0), steps=3, seeds=(15,), many=MANY
    ),
    "many queries, padded blocks": Case(
        {"head_dim": 64, "format": "2", **BLOCKS},
        BLOCK_VALUES,
        "bfloat16",
        padding=(30, 0),
        steps=3,
        longest=300,
        seeds=(16,),
        many=MANY,
    ),
    "many queries of wide heads": Case(
        {"head_dim": 208, "format": "2"},
        {"head_dim": 64, "format": "1.6", **statics(64, 1)},
        "float32",
        batch=1,
        steps=2,
        seeds=(17,),
        many=MANY,
    ),
    "pieces": Case(
        parts(1, codebook="uniform"),
        {"head_dim": 64, "format": "1.6", **statics(64, 1)},
        "float16",
        batch=1,
        steps=2,
        longest=700,
        seeds=(19,),
        many=PIECES,
    ),
    # There is room for 512 rows at a time.
    "pieces of wide heads": Case(
        parts(0, head_dim=256),
        {"head_dim": 208, "format": "1.6", "rotation": "hadamard"},
        "bfloat16",
        batch=1,
        steps=2,
        longest=900,
        seeds=(20,),
        many=MANY,
        workspace_bytes=1_950_000,
    ),
    "pieces of raw rows": Case(
        parts(1, noise=False),
        {"head_dim": 64, "format": "raw"},
        "float16",
        padding=(3, 0),
        steps=3,
        seeds=(21,),
        many=MANY,
    ),
    "static": Case(
        {"head_dim": 64, "format": "2", **statics(64, 0)},
        {"head_dim": 64, "format": "1.6", **statics(64, 1)},
        "float32",
    ),
    "parts": Case(parts(1), parts(1, turning=False, noise=False), "float16", sinks=2, window=33),
    "even parts": Case(
        parts(1, codebook="uniform"), {"head_dim": 64, "format": "1.6", **statics(64, 1)}, "float16", sinks=2, window=33
    ),
    "even parts of wide heads": Case(
        parts(0, head_dim=80, codebook="uniform"),
        parts(1, turning=False, noise=False),
        "bfloat16",
        seeds=(18,),
        many=MANY,
    ),
    "parts, float32": Case(parts(0), parts(1, turning=False, noise=False), "float32", sinks=2, window=33),
    # Few frequencies in a wide head: a launch of their own, too.
    "parts, some channels turn": Case(
        parts(1, head_dim=256, frequencies=torch.cat([frequencies_of(64), torch.zeros(192)])),
        parts(1, turning=False, noise=False),
        "float16",
        sinks=2,
        window=33,
    ),
    "blocks": Case(
        {"head_dim": 64, "format": "2", **BLOCKS},
        BLOCK_VALUES,
        "bfloat16",
        window=40,
        batch=1,
        longest=300,
        steps=10,
    ),
    "blocks of values": Case(
        {"head_dim": 64, "format": "2", **statics(64, 0)},
        BLOCK_VALUES,
        "bfloat16",
        window=40,
        batch=1,
        longest=300,
        steps=5,
        seeds=(3,),
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
        BLOCK_VALUES,
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
    "queried": Case(
        QUERIED, {"head_dim": 64, "format": "1.6", **BLOCKS}, "float32", longest=260, steps=12, seeds=(6, 7)
    ),
    "queried, padded": Case(
        QUERIED | {"scale_exponent": 0.0, "block_shift": False},
        {"head_dim": 80, "format": "1.6", **statics(80, 1)},
        "float16",
        padding=(0, 40),
        longest=200,
        group=3,
        seeds=(8,),
    ),
    "queried, alone": Case(
        QUERIED | {"block": 256},
        {"head_dim": 64, "format": "1.6", **statics(64, 1)},
        "float32",
        batch=1,
        kv_heads=2,
        longest=400,
        steps=8,
        seeds=(9,),
    ),
    "raw": Case(
        {"head_dim": 64, "format": "raw"},
        {"head_dim": 80, "format": "raw"},
        "bfloat16",
        batch=2,
        padding=(0, 9),
        longest=280,
        seeds=(10,),
    ),
    "raw keys": Case(
        {"head_dim": 64, "format": "raw"}, {"head_dim": 64, "format": "1.6", **BLOCKS}, "float32", seeds=(11,)
    ),
    "raw values": Case(
        parts(1, noise=False), {"head_dim": 64, "format": "raw"}, "float16", padding=(3, 0), seeds=(12,)
    ),
    # Queries one token at a time, or two of three.
    "little workspace": Case(
        {"head_dim": 64, "format": "2", **BLOCKS},
        BLOCK_VALUES,
        "bfloat16",
        padding=(30, 0),
        steps=6,
        seeds=(13,),
        workspace_bytes=90_000,
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
        self.kept: list[torch.Tensor] | None = None  # while a graph is captured, which keeps what is lent meanwhile

    def allocate(self, count: int) -> torch.Tensor:
        self.left -= 1
        if self.left == 0:
            raise MemoryError("no memory left")
        raw = torch.full((count + 256,), 0xFF, dtype=torch.uint8)
        start = -raw.data_ptr() % 256
        tensor = raw[start : start + count]
        self.lent += count
        if self.kept is not None:
            self.kept.append(tensor)
        weakref.finalize(tensor, self._back, count)
        return tensor

    def _back(self, count: int) -> None:
        self.lent -= count


class Pair:
    """Both layers, of the same tokens."""

    def __init__(self, case: Case, nvrtc: str) -> None:
        self.case, self.memory = case, Memory()
        # Beside replays of a captured step: a layer each of whose steps the host launches.
        self.launched: Any = None
        codecs = {side: _native.Codec(**options) for side, options in (("keys", case.keys), ("values", case.values))}
        common = {"num_key_value_heads": case.kv_heads, "sinks": case.sinks, "window": case.window, "dtype": case.dtype}
        self.cpu = _native.Layer(**common, **codecs, nonfinite="propagate")
        self.cuda = _native.CudaLayer(
            **common,
            **codecs,
            allocate=self.memory.allocate,
            nvrtc=nvrtc,
            stream=lambda: STREAM,
            host_memory=True,
            workspace_bytes=case.workspace_bytes,
        )
        self.constant_bytes = self.memory.lent
        if case.padding:
            self.cpu.set_padding(list(case.padding))
            self.cuda.set_padding(list(case.padding))

    def copy(self) -> Pair:
        twin = Pair.__new__(Pair)
        twin.__dict__.update(self.__dict__)
        twin.cpu, twin.cuda = self.cpu.clone(), self.cuda.clone()
        return twin

    def rows(self, generator: torch.Generator, count: int) -> list[torch.Tensor]:
        """Keys and values, as a model's transposed projections lie in memory."""
        batch, found = self.cpu.batch_size or self.case.batch, []
        for options in (self.case.keys, self.case.values):
            width = options["head_dim"]
            x = torch.randn(batch, count, self.case.kv_heads, width, generator=generator)
            found.append((x * 2.0 + torch.linspace(-1, 1, width)).to(DTYPES[self.case.dtype]).transpose(1, 2))
        return found

    def append(self, keys: torch.Tensor, values: torch.Tensor, query: torch.Tensor | None = None) -> None:
        for layer in (self.cpu, self.cuda):
            layer.append(keys, values, query)

    def queries(self, generator: torch.Generator, batch: int, length: int) -> torch.Tensor:
        """Random ones that look more at some channels than at others, one of them not finite."""
        width = self.case.keys["head_dim"]
        x = torch.randn(batch, length, self.query_heads, width, generator=generator) * torch.logspace(-1.5, 1.0, width)
        x[-1, length // 2, 0, 3] = torch.nan
        return x.to(DTYPES[self.case.dtype]).transpose(1, 2)

    def check_queries(self, generator: torch.Generator) -> None:
        """The same wish for queries and the same factors; then both see some."""
        assert self.cpu.wants_queries == self.cuda.wants_queries
        for batch in range(self.cpu.batch_size):
            for head in range(self.case.kv_heads):
                expected, found = (layer.query_factors(batch, head) for layer in (self.cpu, self.cuda))
                assert (expected is None) == (found is None)
                if expected is not None and found is not None:
                    ratio = torch.from_dlpack(found) / torch.from_dlpack(expected)
                    assert float((ratio - 1.0).abs().max()) <= FP16_STEP, ratio
        query = self.queries(generator, self.cpu.batch_size, min(5, self.cpu.length))
        for layer in filter(None, (self.cpu, self.cuda, self.launched)):
            layer.observe_queries(query)

    def check(self, generator: torch.Generator) -> None:
        """The same regions, rows and attention."""
        for name in ("length", "batch_size", "sink_tokens", "packed_tokens", "window_tokens"):
            assert getattr(self.cpu, name) == getattr(self.cuda, name), name
        if "query_exponent" in self.case.keys:
            self.check_queries(generator)
        self.check_rows()
        self.check_noise(generator)
        self.check_attention(generator, 1)
        if self.cpu.length >= 3:
            self.check_attention(generator, 3, causal=True, softcap=20.0)
        for count in {1, min(40, self.cpu.length), self.cpu.length}:
            keys, values = (rows[:, :, -count:] for rows in self.rows(generator, count))
            more = {"causal": count < self.cpu.length, "fresh_keys": keys, "fresh_values": values}
            self.check_attention(generator, min(3, count), **more)
        if self.case.many:
            self.check_many(generator, -(-self.case.many // self.case.group))
        mask = torch.randn(1, 1, 1, self.cpu.length, generator=generator)
        mask[torch.rand(mask.shape, generator=generator) < 0.3] = -torch.inf
        if self.cpu.length >= 3:
            rows = torch.rand(1, self.query_heads, 3, self.cpu.length, generator=generator) < 0.7
            self.check_attention(generator, 3, mask=rows, causal=True)
            # As transformers makes one of padding: rows that lie in the same place.
            tokens = torch.arange(self.cpu.length)
            paddings = torch.tensor(self.case.padding or [0] * self.cpu.batch_size)[: self.cpu.batch_size]
            shown = (tokens >= paddings[:, None])[:, None, None].expand(-1, self.query_heads, 3, -1)
            if shown.shape[0] == self.cpu.batch_size:
                self.check_attention(generator, 3, mask=shown, causal=True)
        self.check_attention(generator, 1, mask=mask, sink_logits=torch.randn(self.query_heads, generator=generator))

    def decode_steps(self, generator: torch.Generator, count: int, seed: int) -> None:
        """Tokens one by one, as a model brings them: each is attended to at once, by one reader or two, or by none."""
        choose = random.Random(seed)
        for _ in range(count):
            self.append(*self.rows(generator, 1))
            for _ in range(choose.choice((0, 1, 1, 1, 2))):
                mask = torch.randn(1, 1, 1, self.cpu.length, generator=generator)
                mask[..., :-1][torch.rand(mask[..., :-1].shape, generator=generator) < 0.3] = -torch.inf
                sinks = torch.randn(self.query_heads, generator=generator)
                # That hides nothing, or the row that leaves the window with this token.
                shown = torch.ones(1, 1, 1, self.cpu.length, dtype=torch.bool)
                edge = shown.clone()
                edge[..., max(0, self.cpu.length - 1 - self.case.window)] = False
                kinds: tuple[dict[str, Any], ...] = ({}, {}, {"softcap": 20.0}, {"mask": mask}, {"sink_logits": sinks})
                kinds += ({"mask": shown}, {"mask": edge})
                more = choose.choice(kinds)
                self.check_attention(generator, 1, both=False, **more)

    def check_many(self, generator: torch.Generator, length: int) -> None:
        """Calls of many queries: a draft that is in the store, a chunk that is not, a mask."""
        if self.cpu.length <= length:
            return
        self.check_attention(generator, length, causal=True)
        keys, values = self.rows(generator, length)
        self.check_attention(generator, length, causal=True, fresh_keys=keys, fresh_values=values)
        mask = torch.randn(1, self.query_heads, length, self.cpu.length, generator=generator)
        self.check_attention(generator, length, mask=mask, softcap=20.0)

    def check_and_grow(self, generator: torch.Generator) -> None:
        self.check(generator)
        self.append(*self.rows(generator, 30))
        self.check(generator)

    def check_noise(self, generator: torch.Generator) -> None:
        query = torch.randn(self.cpu.batch_size, self.query_heads, 2, self.case.keys["head_dim"], generator=generator)
        query = query.to(DTYPES[self.case.dtype])
        expected, found = (layer.score_noise(query, 0.125) for layer in (self.cpu, self.cuda))
        assert abs(expected - found) <= 1e-5 * expected, (expected, found)

    def check_bits(self) -> None:
        """Replayed steps have left the rows of launched ones, to the last bit, in the same regions."""
        for name in ("length", "sink_tokens", "packed_tokens", "window_tokens", "wants_queries"):
            assert getattr(self.cuda, name) == getattr(self.launched, name), name
        for side, options in (("keys", self.case.keys), ("values", self.case.values)):
            shape = (self.cuda.batch_size, self.case.kv_heads, self.cuda.length, options["head_dim"])
            found = [torch.full(shape, torch.nan, dtype=DTYPES[self.case.dtype]) for _ in range(2)]
            for layer, rows in zip((self.cuda, self.launched), found, strict=True):
                getattr(layer, f"decode_{side}")(rows)
            assert torch.equal(*found), side

    def check_rows(self) -> None:
        for side, options in (("keys", self.case.keys), ("values", self.case.values)):
            shape = (self.cpu.batch_size, self.case.kv_heads, self.cpu.length, options["head_dim"])
            found = [torch.full(shape, torch.nan, dtype=DTYPES[self.case.dtype]) for _ in range(2)]
            getattr(self.cpu, f"decode_{side}")(found[0])
            getattr(self.cuda, f"decode_{side}")(found[1])
            expected, found_rows = (x.float() for x in found)
            error = float((expected - found_rows).abs().max()) / max(1.0, float(expected.abs().max()))
            assert error <= DECODE_ERROR[self.case.dtype], f"{side}: {error:.2e}"

    @property
    def query_heads(self) -> int:
        return self.case.kv_heads * self.case.group

    def check_attention(self, generator: torch.Generator, length: int, *, both: bool = True, **more: Any) -> None:
        """Of random queries of the last `length` tokens; `both`: with one launch and with many, where that can be."""
        dtype, width = DTYPES[self.case.dtype], self.case.keys["head_dim"]
        query = torch.randn(self.cpu.batch_size, self.query_heads, length, width, generator=generator).to(dtype)
        shape = (*query.shape[:3], self.case.values["head_dim"])
        expected = torch.full(shape, torch.nan, dtype=dtype)
        scale = width**-0.5
        self.cpu.attend(query, expected, scale=scale, **more)
        largest = max(1.0, float(expected.float().abs().max()))
        before = self.cuda.one_launch
        for one_launch in (None, False, True) if both and self.case.group * length <= QUERY_TILE else (before,):
            found = torch.full(shape, torch.nan, dtype=dtype)
            self.cuda.one_launch = one_launch
            self.cuda.attend(query, found, scale=scale, **more)
            error = float((expected.float() - found.float()).abs().max()) / largest
            told = f"attention of {length}, {sorted(more)}, one launch {one_launch}: {error:.2e}"
            assert error <= self.case.limit, told
        self.cuda.one_launch = before


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
                pair.cuda.crop(keep)
            elif kind == "gather":
                batch = pair.cpu.batch_size
                indices = [choose.randrange(batch) for _ in range(choose.randrange(1, 4))]
                told.append(f"gather {indices}")
                pair.cpu.gather(indices)
                pair.cuda.gather(indices)
            elif kind == "copy":
                told.append("copy")
                kept = [*kept[-1:], pair.copy()]
            else:
                longest = case.longest if kind != "one" else 1
                count = choose.randrange(longest // 2, longest) + 1 if kind == "prompt" else choose.randint(1, longest)
                told.append(f"append {count}")
                keys, values = pair.rows(generator, count)
                query = None
                if "query_exponent" in case.keys and choose.random() < 0.5:
                    told.append("queried")
                    query = pair.queries(generator, keys.shape[0], choose.randint(1, count))
                pair.append(keys, values, query)
                if kind == "one":
                    told.append("steps")
                    pair.decode_steps(generator, 4, step)
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


# ---- steps that are captured and replayed ----------------------------------------------------------------------------


def capture(work: Callable[[], object], memory: Memory) -> Callable[[], None]:
    """Records what `work` puts on the emulated driver's stream; the call given back replays it."""
    driver = ctypes.CDLL("libcuda.so.1")
    stream, graph = ctypes.c_void_p(STREAM), ctypes.c_void_p()
    memory.kept = []
    assert driver.cuStreamBeginCapture_v2(stream, 0) == 0
    try:
        work()
    finally:
        ended = driver.cuStreamEndCapture(stream, ctypes.byref(graph))
    kept, memory.kept = memory.kept, None
    assert ended == 0

    def replay(kept: list[torch.Tensor] = kept) -> None:
        assert driver.cuGraphLaunch(graph, stream) == 0

    return replay


@dataclass
class Step:
    """A step of one token through the same tensors every time, on both layers."""

    pair: Pair
    generator: torch.Generator

    def __post_init__(self) -> None:
        case, dtype = self.pair.case, DTYPES[self.pair.case.dtype]
        self.keys, self.values = self.pair.rows(self.generator, 1)
        self.query = torch.empty(self.pair.cpu.batch_size, self.pair.query_heads, 1, case.keys["head_dim"], dtype=dtype)
        shape = (*self.query.shape[:3], case.values["head_dim"])
        self.expected, self.found = (torch.full(shape, torch.nan, dtype=dtype) for _ in range(2))
        self.observes = self.pair.cuda.wants_queries
        self.renew()

    def renew(self) -> None:
        """Another token."""
        for target, source in zip((self.keys, self.values), self.pair.rows(self.generator, 1), strict=True):
            target.copy_(source)
        self.query.copy_(torch.randn(self.query.shape, generator=self.generator))

    def on_cuda(self) -> None:
        self.pair.cuda.append(self.keys, self.values)
        self.pair.cuda.attend(self.query, self.found, scale=0.125, softcap=30.0)
        if self.observes:
            self.pair.cuda.observe_queries(self.query)

    def on_others(self) -> None:
        """On the CPU, and on the device by the host's launches."""
        for layer in filter(None, (self.pair.cpu, self.pair.launched)):
            layer.append(self.keys.clone(), self.values.clone())  # which may wait for attention, or for the next call
            if self.observes:
                layer.observe_queries(self.query)
        self.pair.cpu.attend(self.query, self.expected, scale=0.125, softcap=30.0)
        if self.pair.launched is not None and self.pair.cpu.length % 3:
            again = torch.empty_like(self.found)
            self.pair.launched.attend(self.query, again, scale=0.125, softcap=30.0)
            self.expect_alike(self.found, again)

    def compare(self) -> None:
        self.expect_alike(self.expected, self.found)

    def go(self, run: Callable[[], object]) -> None:
        """Another token, by `run` and on the others, compared."""
        self.renew()
        run()
        self.on_others()
        self.compare()

    def expect_alike(self, expected: torch.Tensor, found: torch.Tensor) -> None:
        expected, found = expected.float(), found.float()
        error = float((expected - found).abs().max()) / max(1.0, float(expected.abs().max()))
        assert error <= self.pair.case.limit, f"after {self.pair.cpu.length} tokens: {error:.2e}"


def refused(call: Callable[[], object], message: str) -> None:
    """The call must fail with words that contain the message."""
    try:
        call()
    except SkvqError as error:
        found = str(error)
    else:
        found = "nothing was refused"
    assert message in found, found


# Changes of the cases above whose steps are captured: one, some or none of a block's rows leave the window when the
# block is complete, and rows of a window wait or do not.
REPLAYED = {
    "window of a block": dataclasses.replace(CASES["blocks"], window=128),
    "window of more than a block": dataclasses.replace(CASES["blocks of values"], window=150, sinks=1, batch=2),
    "one row leaves a block": dataclasses.replace(CASES["padded blocks"], window=127, sinks=0),
    "blocks, window of one": dataclasses.replace(CASES["queried"], window=1),
    "queries that had their say": dataclasses.replace(CASES["queried, padded"], shown=40),
    "parts beside blocks": dataclasses.replace(CASES["parts"], values={"head_dim": 64, "format": "1.6", **BLOCKS}),
    # The rest of a block that has statistics comes anew, and the block is not completed a second time.
    "cropped blocks": dataclasses.replace(CASES["blocks"], cropped=80),
    # One token has as many queries as a chunk.
    "many queries of a head": dataclasses.replace(
        CASES["static"], dtype="float16", batch=1, kv_heads=2, group=64, many=64, window=70
    ),
    "many queries of a head, blocks": dataclasses.replace(
        CASES["blocks"], dtype="float16", group=64, many=64, kv_heads=2
    ),
}


def give_prompt(pair: Pair, generator: torch.Generator) -> None:
    """The tokens before a step that is captured, the same to all layers."""
    case, layers = pair.case, (pair.cpu, pair.cuda, pair.launched)
    rows = pair.rows(generator, max(case.padding, default=0) + case.sinks + case.window + 90)
    query = pair.queries(generator, case.batch, case.shown) if case.keys.get("query_exponent") else None
    for layer in layers:
        layer.append(*rows, query)
    if case.cropped:
        rows = pair.rows(generator, case.window)
        for layer in layers:
            layer.crop(case.sinks + case.cropped)
            layer.append(*rows)


def replay_program(case: Case, nvrtc: str) -> None:
    """Eager steps, a captured one, its replays, over ends of pages, of blocks and of the ring; everything compared."""
    pair, generator = Pair(case, nvrtc), torch.Generator().manual_seed(0)
    pair.launched = Pair(case, nvrtc).cuda
    give_prompt(pair, generator)
    block = max(options.get("block", 0) for options in (case.keys, case.values))
    prompt, replays = pair.cpu.length, block + 170 if block else 140
    capacity = prompt + replays + 6
    pair.cuda.reserve(capacity)
    assert pair.cuda.capacity == capacity
    held = pair.cuda.nbytes
    step = Step(pair, generator)
    step.on_cuda()
    step.on_others()
    step.compare()

    pair.cuda.begin_capture()
    step.found.fill_(torch.nan)
    replay = capture(step.on_cuda, pair.memory)
    assert step.found.isnan().all()  # nothing ran
    pair.cuda.end_capture()
    assert pair.cuda.length == pair.cpu.length
    refused(lambda: pair.cuda.append(step.keys, step.values), "append: expected replayed(steps) before")

    told = 0
    for count in range(1, replays + 1):
        step.go(replay)
        if count in (1, 40, replays):
            if count > 1:
                refused(pair.cuda.nonfinite_rows, "expected replayed(steps) for every replay")
            pair.cuda.replayed(count - told)
            told = count
            pair.check_bits()
            pair.check(generator)
    assert pair.cuda.nbytes == held
    # Eager steps go on where replays end, and the other way round.
    for run in (step.on_cuda, replay, step.on_cuda):
        step.go(run)
        if run is replay:
            pair.cuda.replayed(1)
    pair.check_bits()
    pair.check(generator)
    for call in (lambda: pair.cuda.crop(prompt), pair.cuda.clone, lambda: pair.cuda.gather([0]), pair.cuda.reset):
        refused(call, "expected release_capture() before")
    left = capacity - pair.cpu.length
    assert left == 2
    refused(lambda: pair.cuda.replayed(left + 1), f"steps: expected at most {left}")
    pair.cuda.release_capture()
    pair.launched = None
    twin = pair.copy()
    assert twin.cuda.capacity is None
    if pair.cpu.packed_tokens % 128:  # otherwise the next row begins a page of its own
        refused(pair.cuda.begin_capture, "pages that no copy of the layer shares")
    pair.check_and_grow(generator)
    twin.check_and_grow(generator)
    pair.cpu.crop(prompt)
    pair.cuda.crop(prompt)
    assert pair.cuda.capacity is None
    pair.check_and_grow(generator)


def replay_too_often(case: Case, nvrtc: str) -> None:
    """Replays beyond what is reserved write to no foreign memory, and are noticed. `reserve` changes nothing if there
    is no memory.
    """
    pair, generator = Pair(case, nvrtc), torch.Generator().manual_seed(0)
    prompt = case.sinks + case.window + 120
    pair.append(*pair.rows(generator, prompt))
    for left in (1, 2, 3):
        pair.memory.left = left
        refused(lambda: pair.cuda.reserve(prompt + 1000), "no memory left")
        assert pair.cuda.capacity is None
    pair.check(generator)
    pair.cuda.reserve(prompt + 8)  # the end of a page
    step = Step(pair, generator)
    pair.cuda.begin_capture()
    replay = capture(step.on_cuda, pair.memory)
    pair.cuda.end_capture()
    for _ in range(8):
        step.go(replay)
    pair.cuda.replayed(8)
    pair.check(generator)
    assert pair.cuda.nonfinite_rows() == 0
    replay()
    refused(pair.cuda.nonfinite_rows, "1 too many")
    refused(lambda: pair.cuda.replayed(1), "steps: expected at most 0")


def reserve_again(case: Case, nvrtc: str) -> None:
    """A second `reserve` where a page has just ended gives other pages, also to the row that is packed ahead."""
    for captures in (True, False):
        pair, generator = Pair(case, nvrtc), torch.Generator().manual_seed(0)
        prompt = case.sinks + case.window + PAGE_ROWS
        pair.append(*pair.rows(generator, prompt))
        assert pair.cuda.packed_tokens == PAGE_ROWS
        pair.cuda.reserve(prompt + 10)
        pair.cuda.reserve(prompt + 20)
        step = Step(pair, generator)
        run: Callable[[], object] = step.on_cuda
        if captures:
            pair.cuda.begin_capture()
            run = capture(step.on_cuda, pair.memory)
            pair.cuda.end_capture()
        for _ in range(3):
            step.go(run)
        if captures:
            pair.cuda.replayed(3)
            pair.cuda.one_launch = False
            step.go(step.on_cuda)  # the step that is replayed finds its row packed all the same
            step.go(run)
            pair.cuda.replayed(1)
        pair.check(generator)


def replay_without_a_block(case: Case, nvrtc: str) -> None:
    """All that is reserved waits for the rest of the first block: attention has no packed rows, at no replay."""
    pair, generator = Pair(case, nvrtc), torch.Generator().manual_seed(0)
    prompt = case.sinks + case.window + 10
    pair.append(*pair.rows(generator, prompt))
    pair.cuda.reserve(case.sinks + case.keys["block"] - 1)
    step = Step(pair, generator)
    pair.cuda.begin_capture()
    replay = capture(step.on_cuda, pair.memory)
    pair.cuda.end_capture()
    steps = case.keys["block"] - 1 - case.window - 10
    for _ in range(steps):
        step.go(replay)
    pair.cuda.replayed(steps)
    pair.check(generator)
    pair.cuda.release_capture()
    pair.check_and_grow(generator)


def main_replay(nvrtc: str, name: str) -> None:
    torch.set_num_threads(1)
    replay_program((CASES | REPLAYED)[name], nvrtc)
    if name in ("static", "blocks"):
        replay_too_often(CASES[name], nvrtc)
    if name == "static":
        reserve_again(CASES[name], nvrtc)
    if name == "blocks":
        replay_without_a_block(CASES[name], nvrtc)
    print("equal")


def main(nvrtc: str, name: str) -> None:
    torch.set_num_threads(1)
    for seed in CASES[name].seeds:
        run_program(CASES[name], nvrtc, seed)
    print("equal")

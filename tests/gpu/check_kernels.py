"""Correctness of every CUDA kernel on a device: bytes and rows against skvq.reference, attention against float64.

Is: encode, decode, repack and block statistics on ragged portions of rows, append_row on single ones; attention over
packed rows of several formats, head sizes and group ratios, with masks, padding, blocks and means that turn, its error
beside that of torch's attention in the model's type over the same decoded rows; another stream; two streams at once; a
captured graph.
Is not: timed (that is `skvq bench attend --device cuda`). `--small` is for compute-sanitizer; `--device cpu` for the
fake driver of kernels/emu.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels" / "emu"))
import pipeline
from decode_attention import DecodeAttention, Past
from machine import DeviceCodec, Machine, MachineKernels, Statistics, codec_instances
from pipeline import Call, Rows

from kernel_examples import BLOCKS, ERROR, HEADS, codec, float_mask, parts, statics
from skvq.reference import ReferenceCodec

TIMES_SDPA = 2.0  # what an error is to stay within, of torch's; told, and no failure
FP16_STEP = 2.0**-10  # of a block's statistics, whose last bit hangs on the machine's pow


@dataclass
class CodecCase:
    """A codec, the stream whose pages it writes, the type of the rows."""

    stream: str
    codec: ReferenceCodec
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        block = ", blocks" if self.codec.block else ""
        return f"{self.codec.format}, {self.codec.head_dim}, {self.stream}{block}"


TWO = codec()
NO_MEAN: dict[str, Any] = {"turning": False, "noise": False}
EVEN: dict[str, Any] = {"codebook": "uniform"}
RANGE: dict[str, Any] = {"rule": "range", "clip": 0.9}
REFINED = codec("2", 128, refinements=2, unbiased=True, **statics(128))
SMALL_CODECS = [
    CodecCase("keys", REFINED, torch.float16),
    CodecCase("values", codec("1.6", 128, refinements=1), torch.float16),
    CodecCase("keys", parts(64, 1), torch.float16),
    CodecCase("keys", codec(**BLOCKS), torch.float16),
]
CODECS = [
    *SMALL_CODECS,
    CodecCase("keys", parts(128, 1)),
    CodecCase("keys", parts(128, 1, **EVEN), torch.float16),
    CodecCase("keys", parts(80, 1, **EVEN), torch.bfloat16),
    CodecCase("values", parts(96, 0, **NO_MEAN), torch.float16),
    CodecCase("values", parts(128, 1, **NO_MEAN, **EVEN), torch.float16),
    CodecCase("values", codec("2", 64, symmetric=False, metadata="fp16", group_size=32, codebook="uniform", **RANGE)),
    CodecCase("keys", codec("2", 80, codebook=[-2.0, -0.25, 0.5, 1.75], rotation="identity", **RANGE)),
    CodecCase("keys", codec("1.5", 80, refinements=1, unbiased=True)),
    CodecCase("values", codec("1.5", group_size=32, **RANGE)),
    CodecCase("keys", codec("3", 112, refinements=1), torch.bfloat16),
    CodecCase("values", codec("4", 192, group_size=64, codebook="uniform", symmetric=False, **RANGE), torch.float16),
    CodecCase("values", codec("8", 256, symmetric=False, metadata="fp16", **RANGE), torch.bfloat16),
    CodecCase("values", codec("1.6", 80, block=128, block_shift=False), torch.float16),
]
PAIR = (codec(head_dim=128), codec("1.6", 128))
SMALL_CALLS = [
    Call(*PAIR, group=4, name="2 and ternary"),
    Call(*PAIR, group=8, length=1, packed=300, window=0, pages_per_split=2, name="2 and ternary, ratio 8, no window"),
    Call(parts(64, 1), parts(64, 1, **NO_MEAN), group=2, packed=200, name="parts, turning"),
    Call(codec(**BLOCKS), codec("1.6", **BLOCKS), group=2, packed=300, name="blocks"),
    Call(TWO, TWO, group=4, length=33, many=True, packed=200, name="many queries"),
    Call(TWO, codec("1.6"), group=4, length=33, pieces=128, packed=200, name="pieces"),
    Call(parts(64, 1, **EVEN), TWO, length=70, pieces=128, packed=200, causal=True, window=30, name="pieces, turning"),
    Call(*PAIR, group=4, once=True, name="one launch, 2 and ternary"),
    Call(parts(64, 1), parts(64, 1, **NO_MEAN), group=2, packed=200, once=True, name="one launch, parts, turning"),
    Call(parts(64, 1, **EVEN), codec("1.6"), group=2, packed=400, once=True, name="one launch, even parts, turning"),
]
SPLIT = {"packed": 3001, "window": 131, "pages_per_split": 3}
CALLS = [
    *SMALL_CALLS,
    Call(*PAIR, batch=3, group=1, name="2 and ternary, long", **SPLIT),
    Call(*PAIR, group=4, length=130, many=True, causal=True, name="many queries, causal, long", **SPLIT),
    Call(*PAIR, group=8, length=12, many=True, softcap=9.0, name="many queries, softcap", **SPLIT),
    Call(parts(128, 1), parts(128, 0, **NO_MEAN), length=64, many=True, name="many queries, parts, turning", **SPLIT),
    Call(codec(**BLOCKS), codec("1.6", **BLOCKS), group=2, length=40, many=True, packed=1500, name="many, blocks"),
    Call(codec("8", 192), codec("4", 192), group=2, length=40, many=True, packed=500, name="many queries, 192"),
    Call(*PAIR, group=8, name="2 and ternary, ratio 8, long", **SPLIT),
    Call(*PAIR, group=8, once=True, name="one launch, ratio 8, long", **SPLIT),
    Call(codec(**BLOCKS), codec("1.6", **BLOCKS), group=2, packed=1500, once=True, name="one launch, blocks"),
    Call(parts(128, 1), parts(128, 0, **NO_MEAN), group=8, once=True, name="one launch, parts, ratio 8", **SPLIT),
    Call(TWO, TWO, batch=2, paddings=(0, 100), window=30, packed=200, group=2, once=True, name="one launch, padding"),
    Call(parts(128, 1), codec("1.6", 128), group=4, once=True, name="one launch, parts, ternary, ratio 4", **SPLIT),
    Call(parts(128, 1), codec("1.6", 128), group=4, name="parts, turning, ternary, ratio 4", **SPLIT),
    Call(parts(128, 1, **EVEN), codec("1.6", 128), group=4, once=True, name="one launch, even parts, ratio 4", **SPLIT),
    Call(parts(128, 0, **EVEN), parts(128, 0, **NO_MEAN), group=8, name="even parts, turning, ratio 8", **SPLIT),
    Call(
        parts(80, 1, **EVEN), codec("2", 80), dtype=torch.bfloat16, packed=450, once=True, name="one launch, even, 80"
    ),
    Call(
        parts(192, 0, **EVEN), codec("2", 192), dtype=torch.float32, group=3, name="even parts, 192, float32", **SPLIT
    ),
    Call(parts(128, 1, **EVEN), codec("1.6", 128), group=16, tiles=2, name="even parts, ratio 16", **SPLIT),
    Call(parts(128, 1, **EVEN), codec("1.6", 128), length=64, many=True, name="many queries, even parts", **SPLIT),
    Call(
        PAIR[0], parts(128, 1, **NO_MEAN, **EVEN), group=4, once=True, name="one launch, even values of parts", **SPLIT
    ),
    Call(PAIR[0], parts(128, 1, **NO_MEAN, **EVEN), group=16, tiles=2, name="even values of parts, ratio 16", **SPLIT),
    Call(PAIR[0], parts(96, 0, **NO_MEAN, **EVEN), length=64, many=True, name="many queries, even values", **SPLIT),
    Call(
        parts(112, 0, **EVEN),
        codec("1.6", 112),
        batch=2,
        paddings=(0, 330),
        packed=1100,
        length=64,
        pages_per_split=3,
        many=True,
        name="many queries, turning, padding",
    ),
    Call(
        parts(128, 0, **EVEN), codec("2", 192), length=64, many=True, name="many queries, turning, one buffer", **SPLIT
    ),
    Call(*PAIR, group=4, length=130, pieces=1024, causal=True, name="pieces, causal, long", **SPLIT),
    Call(parts(128, 1, **EVEN), codec("1.6", 128), length=600, pieces=1024, name="pieces, turning, long", **SPLIT),
    Call(
        parts(96, 1),
        parts(96, 0, **NO_MEAN),
        length=64,
        pieces=512,
        name="pieces, parts",
        **SPLIT,
    ),
    Call(codec(**BLOCKS), codec("1.6", **BLOCKS), group=2, length=40, pieces=512, packed=1500, name="pieces, blocks"),
    Call(
        codec("2", 256, rotation="hadamard"),
        codec("1.6", 256),
        group=4,
        length=20,
        pieces=1024,
        name="pieces, 256",
        **SPLIT,
    ),
    Call(
        parts(256, 0), codec("2", 208), dtype=torch.bfloat16, length=70, pieces=512, name="pieces, 256 and 208", **SPLIT
    ),
    Call(codec("1.5", 80), codec("8", 112), group=3, length=30, pieces=512, packed=900, name="pieces, 80 and 112"),
    Call(TWO, codec("4"), group=2, length=60, softcap=9.0, pieces=256, packed=700, rising=2.0, name="pieces, softcap"),
    Call(
        TWO,
        TWO,
        batch=2,
        length=70,
        paddings=(0, 300),
        mask=float_mask(2, 1, 70, 725) > -0.5,
        packed=700,
        pieces=256,
        name="pieces, padding, mask",
    ),
    Call(
        *PAIR,
        length=150,
        packed=700,
        window=200,
        mask=torch.ones(1, 1, 150, 905, dtype=torch.bool).tril(755),
        pieces=512,
        name="pieces, a causal mask",
    ),
    Call(parts(64, 1), codec("1.6"), batch=2, paddings=(0, 270), packed=650, once=True, name="one launch, one query"),
    Call(parts(96, 0), codec("2", 96), dtype=torch.bfloat16, group=3, packed=450, once=True, name="one launch, 96"),
    Call(codec(codebook="lloyd-max"), TWO, group=4, packed=300, name="2, levels looked up"),
    Call(codec("2", 96), codec("1.6", 96), group=4, packed=300, name="2 and ternary, 96"),
    Call(*PAIR, group=16, tiles=2, name="2 and ternary, ratio 16", **SPLIT),
    Call(parts(128, 1), parts(128, 0, **NO_MEAN), group=8, name="parts, turning, ratio 8", **SPLIT),
    Call(parts(128, 0, **NO_MEAN), parts(128, 0, **NO_MEAN), group=4, name="parts, ratio 4", **SPLIT),
    Call(parts(64, 1, turning=False), parts(96, 0, **NO_MEAN), group=3, name="parts with noise, 64 and 96"),
    Call(TWO, TWO, dtype=torch.bfloat16, batch=2, group=8, packed=333, pages_per_split=2, name="2, bfloat16"),
    Call(codec(**statics(64)), codec(**statics(64)), dtype=torch.float32, group=2, length=2, name="statics, float32"),
    Call(codec("2", 128, **BLOCKS), codec("1.6", 128, **BLOCKS), group=4, packed=1500, name="blocks, long"),
    Call(codec("3", group_size=32), codec("3", group_size=32), group=1, packed=17, name="3, groups of 32"),
    Call(codec("1.5", 80), codec("1.5", 80), group=4, packed=1, name="pairs, 80"),
    Call(codec("1.5", group_size=32), codec("1.5", group_size=32), packed=129, name="pairs, groups of 32"),
    Call(
        codec("4", 96, symmetric=False, metadata="fp16"),
        codec("2", 96, symmetric=False, metadata="fp16", group_size=32),
        name="4 and 2, zero points",
    ),
    Call(codec("8", 64, symmetric=False, group_size=64), codec("8", 64, metadata="fp16"), packed=40, name="8"),
    Call(codec("1.6", 112), codec("4", 112), group=5, packed=33, name="ternary and 4, 112"),
    Call(codec("2", 192), codec("1.6", 192), group=16, tiles=2, packed=140, name="192, two tiles"),
    Call(codec("2", 256), codec("2", 256), group=8, packed=1048, name="256"),
    Call(codec("2", 192), codec("1.6", 128), kv_heads=1, group=2, packed=16, name="widths differ"),
    Call(TWO, TWO, group=4, length=5, causal=True, softcap=7.0, window=3, name="causal, softcap, 20 queries"),
    Call(TWO, TWO, batch=2, paddings=(0, 100), window=30, packed=200, group=2, name="padding"),
    Call(TWO, TWO, batch=2, paddings=(210, 7), mask=float_mask(2, 1, 1, 225), packed=200, name="padding, mask"),
    Call(TWO, TWO, mask=float_mask(1, 1, 1, 175) > 0.0, name="boolean mask"),
    Call(TWO, TWO, mask=torch.zeros(1, 1, 1, 175, dtype=torch.bool), name="nothing seen"),
    Call(TWO, TWO, sink_logits=torch.tensor([0.5, -1.0, 2.0, 0.0]), group=2, name="sink logits"),
    Call(TWO, TWO, sinks=0, window=0, packed=256, name="packed rows only"),
]


@dataclass
class Results:
    """What was found, printed as it comes."""

    checks: list[dict[str, Any]] = field(default_factory=list)

    def add(self, kind: str, name: str, passed: bool, text: str = "", **numbers: Any) -> None:
        self.checks.append({"kind": kind, "name": name, "passed": passed, **numbers})
        print(f"{'ok  ' if passed else 'FAIL'} {kind:<10} {name:<40} {text}", flush=True)

    def skip(self, kind: str, name: str, reason: str) -> None:
        self.checks.append({"kind": kind, "name": name, "skipped": reason})
        print(f"skip {kind:<10} {name:<40} {reason}", flush=True)

    @property
    def failed(self) -> int:
        return sum(not check.get("passed", True) for check in self.checks)


# ---- codecs ----------------------------------------------------------------------------------------------------------


def random_rows(case: CodecCase, batch: int, count: int) -> Tensor:
    """Rows of very different sizes, some of zeros; two are not finite."""
    width = case.codec.head_dim
    generator = torch.Generator().manual_seed(width)
    rows = torch.randn(batch, HEADS, count, width, generator=generator)
    rows = rows * (0.1 + 3.0 * torch.rand(count, 1, generator=generator)) + torch.randn(width, generator=generator)
    rows[:, :, 3] = 0.0
    rows[:, :, 4] *= 1e-4
    rows[:, :, 5] *= 3e3
    rows[0, 0, 20, 7], rows[1, 1, 130, 0] = math.nan, math.inf
    return rows.to(case.dtype)


def check_codec(machine: Machine, case: CodecCase, results: Results) -> None:
    """Encode in ragged portions, pages back to rows, decode: equal to the reference to the last bit."""
    batch, count = 2, 137
    rows = random_rows(case, batch, 256)
    device, reference = DeviceCodec(machine, case.stream, case.codec, HEADS), case.codec
    statistics: Statistics | None = None
    if reference.block:
        statistics = device.statistics(machine.put(rows))
        expected = reference.block_statistics(rows.float().unflatten(2, (256 // reference.block, reference.block)))
        pairs = zip(statistics, expected, strict=True)
        step = max(float(((a.cpu() - b).abs() / b.abs().clamp(min=1e-6)).max()) for a, b in pairs)
        results.add("statistics", case.name, step <= FP16_STEP, f"largest relative difference {step:.1e}", error=step)
    ring = machine.put(rows.contiguous())
    rows = rows[:, :, :count].contiguous()
    origins = torch.tensor([5, -300], dtype=torch.int32)
    pool, table, _ = device.new_pages(batch, count)
    refused = device.encode(machine.put(rows), table, [3, 1, 1, 30, 93, 9], statistics, machine.put(origins))
    read = device.decode(table, batch, 2, count - 2, statistics, machine.put(origins)).cpu()
    copy_pool, copy_table, _ = device.new_pages(batch, count, seed=1)
    single_pools, single_tables = zip(*[device.new_pages(batch, count, seed=seed)[:2] for seed in (2, 3)], strict=True)
    for own_table in single_tables:
        device.encode(machine.put(rows[:, :, :9]), own_table, [9], statistics, machine.put(origins))
    refused_singles = device.append(ring, single_tables, (9, count - 9), statistics, machine.put(origins))
    wrong_singles = wrong_codes = wrong_rows = wrong_repacked = 0
    for b in range(batch):
        for h in range(HEADS):
            packed, expected_rows = by_reference(reference, rows[b, h], h, b, statistics, int(origins[b]))
            found = device.to_rows(table[b, h].contiguous(), count).cpu()
            device.from_rows(packed, copy_table[b, h].contiguous())
            wrong_codes += int((found != packed).any(1).sum())
            for own_table in single_tables:
                single = device.to_rows(own_table[b, h].contiguous(), count).cpu()
                wrong_singles += int((single != packed).any(1).sum())
            wrong_repacked += int((device.to_rows(copy_table[b, h].contiguous(), count).cpu() != packed).any(1).sum())
            wrong_rows += int((read[b, h].nan_to_num(1e9) != expected_rows[2:].nan_to_num(1e9)).any(1).sum())
    del pool, copy_pool, single_pools
    results.add("encode", case.name, wrong_codes == 0 and refused == 2, f"{wrong_codes} rows differ, {refused} refused")
    text = f"{wrong_singles} rows differ, {refused_singles} refused"
    results.add("append", case.name, wrong_singles == 0 and refused_singles == 4, text)
    results.add("decode", case.name, wrong_rows == 0, f"{wrong_rows} rows differ")
    results.add("repack", case.name, wrong_repacked == 0, f"{wrong_repacked} rows differ")


def by_reference(
    codec: ReferenceCodec, rows: Tensor, head: int, batch: int, statistics: Statistics | None, position: int
) -> tuple[Tensor, Tensor]:
    """Bytes of the rows of one head, and what they read back as."""
    packed, read, step = [], [], codec.block or rows.shape[0]
    for first in range(0, rows.shape[0], step):
        own = None if statistics is None else tuple(s[batch, head, first // step].cpu() for s in statistics)
        piece = rows[first : first + step].float()
        packed.append(codec.encode(piece, head, own, "propagate", position=position + first))
        read.append(codec.decode(packed[-1], head, own, position=position + first))
    return torch.cat(packed), torch.cat(read)


# ---- attention -------------------------------------------------------------------------------------------------------


def past_of(machine: Machine, call: Call, rows: Rows) -> Past:
    """The rows of a call on the device, as a cache holds them."""
    tables, pools = [], []
    for stream, its_codec, packed in (("keys", call.keys, rows.key_bytes), ("values", call.values, rows.value_bytes)):
        device = DeviceCodec(machine, stream, its_codec, call.kv_heads)
        pool, table, _ = device.new_pages(call.batch, call.packed)
        for b in range(call.batch):
            for h in range(call.kv_heads):
                device.from_rows(packed[b, h], table[b, h].contiguous())
        tables.append(table)
        pools.append(pool)
    regions = [slice(0, call.sinks), slice(call.sinks + call.packed, call.total)]
    sinks, window = ((machine.put(rows.keys[:, :, r]), machine.put(rows.values[:, :, r])) for r in regions)
    key_statistics, value_statistics = (
        None if pair is None else (machine.put(pair[0]), machine.put(pair[1]))
        for pair in (rows.key_statistics, rows.value_statistics)
    )
    return Past(*tables, sinks, window, key_statistics, value_statistics, tuple(pools))


def error_of(found: Tensor, exact: Tensor) -> float:
    """Largest difference, of the largest output; infinite if a number is missing."""
    difference = (found.cpu().double() - exact).abs().max()
    return float(difference.nan_to_num(math.inf)) / max(1.0, float(exact.abs().max()))


def sdpa_error(machine: Machine, call: Call, rows: Rows, exact: Tensor) -> float | None:
    """The error of torch's attention in the model's type (f16 for float32) over the same decoded rows; None where it
    does not know what the call asks for.
    """
    noise = call.keys.map is not None and call.keys.map.noise is not None
    special = call.softcap or call.sink_logits is not None or call.paddings is not None
    if special or noise or call.causal or call.mask is not None:
        return None
    dtype = torch.float16 if call.dtype == torch.float32 else call.dtype
    past = slice(call.sinks, call.sinks + call.packed)
    keys, values = rows.keys.clone(), rows.values.clone()
    keys[:, :, past], values[:, :, past] = rows.read_keys.to(call.dtype), rows.read_values.to(call.dtype)
    keys, values = (x.repeat_interleave(call.group, 1) for x in (keys, values))
    query, keys, values = (x.to(dtype).to(machine.device) for x in (rows.query, keys, values))
    return error_of(torch.nn.functional.scaled_dot_product_attention(query, keys, values), exact)


def check_call(machine: Machine, call: Call, results: Results) -> None:
    rows = pipeline.make_rows(call)
    exact = pipeline.expected(call, rows)
    found = pipeline.run(call, rows, MachineKernels(machine))
    machine.synchronize()
    error, limit, other = error_of(found, exact), ERROR[call.dtype], sdpa_error(machine, call, rows, exact)
    if other is None:
        beside = "torch's attention cannot do this"
    else:
        beside = f"torch's {other:.1e}, {error / other if other else math.inf:.2f}x"
        beside += "" if error <= TIMES_SDPA * other else f" (more than {TIMES_SDPA:g}x)"
    passed = error <= limit and not (call.name == "nothing seen" and bool(found.any()))
    text = f"error {error:.1e} of at most {limit:.0e}; {beside}"
    results.add("attention", call.name, passed, text, error=error, limit=limit, sdpa_error=other)


def check_streams(machine: Machine, call: Call, results: Results) -> None:
    """A step on another stream, in its order, and two steps at once on two streams."""
    if not machine.is_cuda:
        results.skip("streams", call.name, "needs a GPU")
        return
    rows = pipeline.make_rows(call)
    query, past = machine.put(rows.query), past_of(machine, call, rows)
    queries = [query, query.flip(-1).contiguous()]
    expected = [DecodeAttention(machine, call, past, one).run().clone() for one in queries]
    machine.synchronize()
    steps = [DecodeAttention(machine, call, past, torch.zeros_like(query)) for _ in queries]
    streams = [torch.cuda.Stream(machine.device) for _ in queries]
    machine.synchronize()
    for one, step, stream in zip(queries, steps, streams, strict=True):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)  # what runs on another stream comes too early
            step.query.copy_(one)
            step.run()
    machine.synchronize()
    equal = [torch.equal(step.output, other) for step, other in zip(steps, expected, strict=True)]
    results.add("streams", call.name, all(equal), f"two streams at once, equal: {equal}")


def check_graph(machine: Machine, call: Call, results: Results) -> None:
    """A captured step, replayed for other queries and for fewer rows, equals the launches one by one."""
    if not machine.is_cuda:
        results.skip("graph", call.name, "needs a GPU")
        return
    rows = pipeline.make_rows(call)
    query, past = machine.put(rows.query), past_of(machine, call, rows)
    step, eager = (DecodeAttention(machine, call, past, query.clone()) for _ in range(2))
    step.run()  # loads the kernels, which a capture does not allow
    machine.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run()
    fewer = machine.put(torch.tensor([call.packed // 2 + 3, call.sinks, call.window // 2, 0], dtype=torch.int32))
    for name, other, lengths in (("other queries", query.flip(1), step.lengths.clone()), ("fewer rows", query, fewer)):
        for one in (step, eager):
            one.query.copy_(other)
            one.lengths.copy_(lengths)
            one.output.fill_(math.nan)
        graph.replay()
        eager.run()
        machine.synchronize()
        equal = torch.equal(step.output, eager.output) and not bool(step.output.isnan().any())
        results.add("graph", f"{call.name}, {name}", equal, "replay equals the launches one by one" if equal else "")


# ---- command ---------------------------------------------------------------------------------------------------------


def instances(codecs: list[CodecCase], calls: list[Call]) -> list[str]:
    """Expressions of all kernels that the checks launch."""
    found = [name for case in codecs for name in codec_instances(case.stream, case.codec, case.dtype)]
    found += [name for call in calls for name in call.instances()]
    return list(dict.fromkeys(found))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu with a fake driver")
    parser.add_argument("--small", action="store_true", help="few cases, for compute-sanitizer")
    parser.add_argument("--json", type=Path, help="where to write what was found")
    parser.add_argument("--list", action="store_true", help="print the kernels and stop")
    options = parser.parse_args()
    codecs, calls = (SMALL_CODECS, SMALL_CALLS) if options.small else (CODECS, CALLS)
    if options.list:
        print(json.dumps(instances(codecs, calls)))
        return 0
    torch.set_grad_enabled(False)
    machine, results, start = Machine(options.device), Results(), time.perf_counter()
    described = machine.describe()
    print(json.dumps(described))
    compiled = machine.compile(instances(codecs, calls))
    print(f"{compiled} kernels compiled in {time.perf_counter() - start:.1f} s", flush=True)
    for case in codecs:
        check_codec(machine, case, results)
    for call in calls:
        check_call(machine, call, results)
    for call in (*calls[:4], *[call for call in calls if call.once][:2]):
        check_streams(machine, call, results)
        check_graph(machine, call, results)
    seconds = time.perf_counter() - start
    if options.json:
        written = {"machine": described, "small": options.small, "seconds": seconds, "checks": results.checks}
        options.json.write_text(json.dumps(written, indent=1) + "\n")
    skipped = sum("skipped" in check for check in results.checks)
    done = len(results.checks) - skipped
    print(f"{done} checks, {results.failed} failed, {skipped} skipped, {seconds:.0f} s")
    return int(results.failed > 0)


if __name__ == "__main__":
    sys.exit(main())

"""`skvq bench attend --device cuda`: decode attention of one layer through the store on a GPU, against every way to
attend in f16 that runs there, and whole decode steps of the layer.

All contestants of a shape exist at once and take turns: each a captured graph, timed by CUDA events, the second-level
cache overwritten before. The f16 ones attend to rows that the packed layer decoded. Before that every output is
compared with attention in float64 over those same rows; a ratio is to the fastest f16 one that was right.

Napkin: head_dim 128, keys of 2 bits, ternary values, e4m3 scales: 33 + 27 bytes of a token and kv head, f16 512, so
8.5x at equal bandwidth. 512K tokens of 8 kv heads are 252 MB, 75 µs at 3.35 TB/s. With many queries (a chunk of a
prompt, all of which see all tokens) products bound everyone: then there is no goal, nor a step.

`gigabytes_per_second` counts packed codes and scales, without window, sinks, statistics and unused rows of pages.
"""

from __future__ import annotations

import functools
import gc
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._native import CudaLayer, cuda_compile_many
from ..cuda_runtime import KernelInstance, find_nvrtc
from ..evaluate.progress import progress_bar
from ..plan import LayerPlan
from ..warmup import QUERY_TILE, AttentionShape, kernel_instances
from . import layers
from .contestants import (
    ERROR,
    TIMES_SDPA,
    Contestant,
    compared_sequences,
    error_of,
    exact_output,
    exact_outputs,
    others,
)
from .device import GIB, BenchDevice, Clock, first_line, is_out_of_memory
from .layers import APART, MASKED, Shape
from .machine import make_report
from .step_cuda import measure_step
from .timing import Timing, time_in_turns

FORMATS = ("K2V1.6", "fitted", "plan")
HEADS = ((8, 8), (8, 32), (8, 64))
BATCHES = (1, 8)
TOKENS = (32768, 131072, 524288)
SHARE_GOAL = 0.8  # of copy bandwidth, by packed bytes
APPEND_GOAL = 0.03  # of a step, by what packs the row that leaves the window
DECODING = {"append.cuh", "decode.cuh", "encode.cuh", "queries.cuh", "rows.cuh", "statistics.cuh"}
FULL_CHIP_TOKENS = 32 << 10  # from here on the goals of bandwidth hold


@dataclass(frozen=True)
class CudaAttendOptions:
    """The grid of `skvq bench attend --device cuda`.

    Attributes:
        queries: tokens of a call, each of which sees all that is stored; 1: a decode step.
        budget: seconds after which no further shape begins.
        peers: whether others are timed.
        masked: whether packed layers are timed with a mask, too, that hides nothing, as left-padded batches have one.
    """

    device: str = "cuda"
    formats: tuple[str, ...] = FORMATS
    heads: tuple[tuple[int, int], ...] = HEADS
    batches: tuple[int, ...] = BATCHES
    tokens: tuple[int, ...] = TOKENS
    head_dim: int = 128
    queries: int = 1
    dtype: str = "float16"
    static: bool = True
    rounds: int = 30
    budget: float = math.inf
    peers: bool = True
    masked: bool = False

    def quick(self) -> CudaAttendOptions:
        """A grid for a minute."""
        return replace(self, heads=((8, 32),), batches=(1,), tokens=(32768, 131072), rounds=15)

    @property
    def one_launch(self) -> bool:
        """Whether a kv head never has more queries than one launch takes."""
        return self.queries * max(query // kv for kv, query in self.heads) <= QUERY_TILE

    def shapes(self) -> Iterator[list[Shape]]:
        """Shapes that differ in their query heads only, and so share keys and values."""
        for tokens in self.tokens:
            for batch in self.batches:
                for kv in dict.fromkeys(kv for kv, _ in self.heads):
                    queries = [query for other, query in self.heads if other == kv]
                    yield [Shape(kv, query, batch, tokens, self.head_dim) for query in queries]


def ratio_goal(tokens: int) -> float:
    """How many times faster than f16 attention is to be."""
    return 7.0 if tokens >= 128 << 10 else 6.0 if tokens >= 32 << 10 else 1.0


# ---- contestants -----------------------------------------------------------------------------------------------------


@dataclass
class Packed:
    """A packed layer, filled, and how its attention is launched.

    Attributes:
        form: how rows are packed, such as "K2V1.6".
        one_launch: as `CudaLayer.one_launch`: None, or False for comparison, which is the same where None has launches
            apart anyway.
        mask: of every call, bool [B, 1, 1, T], or None.
        packed_bytes: of codes and scales, without what pages have unused.
        sdpa_errors: of torch's attention in f16 over the rows it decodes to, by query heads.
        errors: its own, likewise; None: not compared.
    """

    name: str
    form: str
    layer: CudaLayer
    static: bool
    packed_bytes: int
    one_launch: bool | None = None
    mask: Tensor | None = None
    errors: dict[int, float | None] = field(default_factory=dict)
    sdpa_errors: dict[int, float | None] = field(default_factory=dict)

    def attend(self, query: Tensor, output: Tensor) -> None:
        """Attention of query [B, Hq, L, D] to output, likewise."""
        self.layer.one_launch = self.one_launch
        self.layer.attend(query, output, scale=query.shape[3] ** -0.5, mask=self.mask)

    def passed(self, query_heads: int) -> bool:
        """Whether its output was right, or nobody could tell."""
        error, other = self.errors.get(query_heads), self.sdpa_errors.get(query_heads)
        return error is None or error <= max(ERROR, TIMES_SDPA * (other or 0.0))


def _names(options: CudaAttendOptions) -> Iterator[tuple[str, str, bool]]:
    """Contestant, format, static: as `skvq bench attend` on the CPU has them."""
    for name in options.formats:
        yield name, name, not layers.has_statistics(name)
        if options.static and layers.has_statistics(name):
            yield f"{name} static", name, True


def _plan(shape: Shape, name: str, static: bool) -> LayerPlan:
    """How rows are packed. The noise that a calibrated layer takes off its scores is 0 here: it costs as much, and the
    output then is attention to the decoded rows, with which it is compared.
    """
    plan = layers.layer_plan(shape, name, static=static)
    if plan.keys.noise is None:
        return plan
    return replace(plan, keys=replace(plan.keys, noise=torch.zeros_like(plan.keys.noise)))


def compile_ahead(device: BenchDevice, options: CudaAttendOptions) -> int:
    """Compiles all kernels on all threads, with a progress bar. Returns how many were not on disk."""
    wanted: dict[KernelInstance, None] = {}
    for kv, query in options.heads:
        shape = Shape(kv, query, 1, 1, options.head_dim)
        for _, name, static in _names(options):
            plan = _plan(shape, name, static)
            streams = plan.keys.options.resolved(), plan.values.options.resolved()
            turning = plan.keys.shift_sine is not None
            attention = AttentionShape(options.head_dim, options.dtype, query // kv, *streams, turning=turning)
            instances = kernel_instances(attention)
            wanted |= dict.fromkeys(x for x in instances if x.file != "repack.cuh")
            compared = kernel_instances(replace(attention, dtype="float32"))
            wanted |= dict.fromkeys(x for x in compared if x.file in DECODING)
    jobs = [(instance.parts, device.status["arch"]) for instance in wanted]
    with progress_bar(len(jobs), "kernel") as advance:
        compiled = cuda_compile_many(find_nvrtc(), jobs, done=lambda _: advance(1, None))
    return sum(not kernel.cached for kernel in compiled)


def _row_bytes(plan: LayerPlan, head_dim: int) -> int:
    """Of a packed row of keys and one of values."""
    return int(plan.keys.codec("keys", head_dim).row_bytes + plan.values.codec("values", head_dim).row_bytes)


def _fill(device: BenchDevice, options: CudaAttendOptions, shape: Shape) -> list[Packed]:
    """Every packed layer, with the same random rows."""
    found = []
    for label, name, static in _names(options):
        layer = layers.cuda_layer(shape, _plan(shape, name, static), dtype=options.dtype, device=device.place)
        found.append(Packed(label, name, layer, static, 0))
    for keys, values in layers.random_rows(shape, getattr(torch, options.dtype), device=device.place):
        for packed in found:
            packed.layer.append(keys, values)
    for packed, (_, name, static) in zip(found, _names(options), strict=True):
        rows = shape.batch * shape.num_key_value_heads * packed.layer.packed_tokens
        packed.packed_bytes = rows * _row_bytes(_plan(shape, name, static), shape.head_dim)
    ways: list[tuple[str, dict[str, Any]]] = [(APART, {"one_launch": False})] if options.one_launch else []
    if options.masked:
        mask = torch.ones(shape.batch, 1, 1, shape.tokens, dtype=torch.bool, device=device.place)
        ways.append((MASKED, {"mask": mask}))
    return [
        way
        for x in found
        for way in (x, *(replace(x, name=f"{x.name}{name}", errors={}, sdpa_errors={}, **how) for name, how in ways))
    ]


# ---- correctness -----------------------------------------------------------------------------------------------------


def _decoded_rows(device: BenchDevice, options: CudaAttendOptions, shape: Shape, packed: Packed) -> list[Tensor]:
    """Keys and values [compared sequences, Hkv, T, D] of what a layer holds, in float32.

    A layer in f16 would round what it decodes, and be charged with it. Codes are made from float32 in either, so one in
    float32 has the same.
    """
    sequences = compared_sequences(shape.batch)
    few, place = replace(shape, batch=len(sequences)), device.place
    layer = layers.cuda_layer(few, _plan(shape, packed.form, packed.static), dtype="float32", device=place)
    for pair in layers.random_rows(shape, getattr(torch, options.dtype), device=place):
        layer.append(*(rows[sequences].float() for rows in pair))
    size = (few.batch, few.num_key_value_heads, few.tokens, few.head_dim)
    found = [torch.empty(size, device=place) for _ in range(2)]
    layer.decode_keys(found[0])
    layer.decode_values(found[1])
    return found


def _compare(
    packed: Packed, queries: dict[int, Tensor], keys: Tensor, values: Tensor, decoded: Sequence[Tensor]
) -> None:
    """Notes the errors of a layer's attention, against `decoded`, and of torch's, over the same rows in f16.

    Keys and values [B, Hkv, T, D] are room for the latter.
    """
    if packed.one_launch is None and packed.mask is None:  # which are in there already otherwise
        packed.layer.decode_keys(keys)
        packed.layer.decode_values(values)
    for heads, query in queries.items():
        exact, output = exact_outputs(query, keys, values), torch.full_like(query, math.nan)
        own = {index: exact_output(query[index], *rows) for index, *rows in zip(exact, *decoded, strict=True)}
        packed.attend(query, output)
        packed.errors[heads] = error_of(output, own)
        folded = query.view(query.shape[0], keys.shape[1], -1, query.shape[3])
        packed.sdpa_errors[heads] = error_of(F.scaled_dot_product_attention(folded, keys, values).view_as(query), exact)


# ---- measurements ----------------------------------------------------------------------------------------------------


def _packed_contestant(clock: Clock, packed: Packed, query: Tensor) -> Contestant:
    heads, output = query.shape[1], torch.empty_like(query)
    work = functools.partial(packed.attend, query, output)
    call, graph = clock.recorded(work)
    held, error = int(packed.layer.nbytes), packed.errors.get(heads)
    size = packed.packed_bytes
    return Contestant(packed.name, "packed", call, held, size, error, True, packed.passed(heads), graph)


def _row(
    shape: Shape, queries: int, contestant: Contestant, times: dict[str, Timing], fastest: str | None, copy: float
) -> dict[str, Any]:
    timing = times[contestant.name]
    rate = contestant.packed_bytes / timing.median
    return asdict(shape) | {
        "queries": queries,
        "contestant": contestant.name,
        "kind": contestant.kind,
        "milliseconds": timing.median * 1e3,
        "fastest_milliseconds": timing.fastest * 1e3,
        "slowest_milliseconds": timing.slowest * 1e3,
        "rounds": timing.rounds,
        "graph": contestant.graph,
        "bytes": contestant.nbytes,
        "packed_bytes": contestant.packed_bytes,
        "gigabytes_per_second": rate / 1e9,
        "share_of_copy_bandwidth": rate / copy,
        "fastest_f16": fastest,
        "times_faster_than_f16": None if fastest is None else times[fastest].median / timing.median,
        "error": contestant.error,
        "error_over": "own rows" if contestant.own_rows else "given rows",
        "passed": contestant.passed,
    }


def _measure_attention(
    clock: Clock, options: CudaAttendOptions, shape: Shape, found: list[Packed], rows: tuple[Tensor, Tensor] | None
) -> list[dict[str, Any]]:
    generator = torch.Generator(clock.device.place).manual_seed(1)
    query = _query(clock.device, options, shape, generator)
    contestants = [_packed_contestant(clock, packed, query) for packed in found]
    running, left_out = others(clock, query, *rows) if options.peers and rows is not None else ([], [])
    contestants += running
    skipped = [asdict(shape) | {"contestant": x.name, "skipped": x.reason} for x in left_out]
    times = time_in_turns({x.name: x.call for x in contestants}, rounds=options.rounds, once=clock.once)
    right = [x.name for x in contestants if x.kind == "f16" and x.passed]
    fastest = min(right, key=lambda name: times[name].median, default=None)
    measured = [_row(shape, options.queries, x, times, fastest, clock.copy_bandwidth) for x in contestants]
    for row, packed in zip(measured, found, strict=False):
        row["sdpa_error"] = packed.sdpa_errors.get(shape.num_attention_heads)
    return measured + skipped


def _query(device: BenchDevice, options: CudaAttendOptions, shape: Shape, generator: torch.Generator) -> Tensor:
    size = (shape.batch, shape.num_attention_heads, options.queries, shape.head_dim)
    return torch.randn(size, generator=generator, device=device.place).to(getattr(torch, options.dtype))


# ---- the table -------------------------------------------------------------------------------------------------------


def _print_row(row: dict[str, Any]) -> None:
    if "skipped" in row:
        print(f"  {row['contestant']:<26} left out: {row['skipped']}", flush=True)
        return
    ratio = "-" if row["times_faster_than_f16"] is None else f"{row['times_faster_than_f16']:.2f}x f16"
    error = "unchecked" if row["error"] is None else f"{row['error']:.1e} off"
    wrong = "" if row["passed"] else "  WRONG"
    print(
        f"  {row['contestant']:<26}{row['milliseconds'] * 1e3:>11.1f} µs{ratio:>12}"
        f"{row['gigabytes_per_second']:>9.1f} GB/s{row['share_of_copy_bandwidth']:>7.1%} of copy{error:>13}{wrong}",
        flush=True,
    )


def _print_step(name: str, step: dict[str, Any]) -> None:
    shares = [f"{text} {step[key]:.1%}" for key, text in SHARES.items() if step.get(key) is not None]
    whole, attention = (1e3 * step[f"{part}_milliseconds"] for part in ("step", "attend"))
    print(
        f"  {name + ', step':<26}{whole:>11.1f} µs, attention {attention:.1f}"
        f"; host {step['host_step_microseconds']:.0f} µs, attention {step['host_attend_microseconds']:.0f}"
        f"{'; ' if shares else ''}{', '.join(shares)}",
        flush=True,
    )


SHARES = {"append_share": "append", "encode_share": "encoding"}


def misses(rows: list[dict[str, Any]]) -> list[str]:
    """Measurements of packed rows short of a goal: of bandwidth, ratio, error, and an append's share of a step. Not of
    those that are there for comparison.
    """
    found = []
    for row in rows:
        if row.get("kind") != "packed" or row["contestant"].endswith((APART, MASKED)):
            continue
        heads = f"{row['num_key_value_heads']}:{row['num_attention_heads']}"
        name = f"{row['contestant']}, {row['tokens']} tokens, batch {row['batch']}, heads {heads}"
        decodes = row["queries"] == 1
        if decodes and row["tokens"] >= FULL_CHIP_TOKENS and row["share_of_copy_bandwidth"] < SHARE_GOAL:
            share = row["share_of_copy_bandwidth"]
            found.append(f"{name}: {share:.0%} of copy bandwidth, goal {SHARE_GOAL:.0%}")
        ratio, goal = row["times_faster_than_f16"], ratio_goal(row["tokens"])
        if decodes and ratio is not None and ratio < goal:
            found.append(f"{name}: {ratio:.2f}x of f16, goal {goal:g}x")
        if row["error"] is not None and row.get("sdpa_error") and row["error"] > TIMES_SDPA * row["sdpa_error"]:
            found.append(f"{name}: error {row['error'] / row['sdpa_error']:.1f}x of torch's, goal {TIMES_SDPA:g}x")
        step = row.get("step") or {}
        for key, text in SHARES.items():
            if step.get(key) is not None and step[key] > APPEND_GOAL:
                found.append(f"{name}: {text} takes {step[key]:.1%} of a step, goal {APPEND_GOAL:.0%}")
    return found


# ---- command ---------------------------------------------------------------------------------------------------------


def _f16_rows(device: BenchDevice, options: CudaAttendOptions, shape: Shape) -> tuple[Tensor, Tensor] | str:
    """Room for keys and values that are not packed, or why there is none."""
    decoded = 8 * shape.elements // shape.batch * len(compared_sequences(shape.batch))
    need = int(4 * shape.elements * 1.3) + decoded + (GIB if device.is_cuda else 0)
    free = device.free_bytes()
    if free is not None and need > free:
        return f"keys and values that are not packed need {need / GIB:.1f} GiB, {free / GIB:.1f} are free"
    size = (shape.batch, shape.num_key_value_heads, shape.tokens, shape.head_dim)
    dtype = getattr(torch, options.dtype)
    return torch.empty(size, dtype=dtype, device=device.place), torch.empty(size, dtype=dtype, device=device.place)


def _measure(clock: Clock, options: CudaAttendOptions, shapes: list[Shape]) -> list[dict[str, Any]]:
    """All query heads of one size of keys and values."""
    device, rows = clock.device, list[dict[str, Any]]()
    found = _fill(device, options, shapes[0])
    plain = _f16_rows(device, options, shapes[0])
    if isinstance(plain, str):
        rows += [asdict(shape) | {"contestant": "f16", "skipped": plain} for shape in shapes]
    else:
        generator = torch.Generator(device.place).manual_seed(2)
        queries = {shape.num_attention_heads: _query(device, options, shape, generator) for shape in shapes}
        decoded: list[Tensor] = []
        for packed in found:
            if packed.one_launch is None and packed.mask is None:
                decoded.clear()
                decoded += _decoded_rows(device, options, shapes[0], packed)
            _compare(packed, queries, *plain, decoded)
        decoded.clear()
    for shape in shapes:
        rows += _measure_attention(clock, options, shape, found, None if isinstance(plain, str) else plain)
    del plain
    for shape in shapes if options.queries == 1 else ():
        generator = torch.Generator(device.place).manual_seed(3)
        query = _query(device, options, shape, generator)
        steps = {}
        for packed in found:
            if packed.mask is not None:
                continue  # of as many tokens as there are now
            packed.layer.one_launch = packed.one_launch
            steps[packed.name] = measure_step(clock, packed.layer, packed.static, query, options.rounds)
        for row in rows:
            if row["contestant"] in steps and row["num_attention_heads"] == shape.num_attention_heads:
                row["step"] = steps[row["contestant"]]
    return rows


def run_attend_cuda(
    options: CudaAttendOptions, partial: Callable[[dict[str, Any]], None] = lambda _: None
) -> dict[str, Any]:
    """Measures the grid and prints it; a shape that does not fit, or for which time is over, is a row with the reason.

    The report's "wrong" has the rows of packed contestants whose output was not that of float64. `partial` gets the
    report so far after every size of keys and values.
    """
    start = time.perf_counter()
    device = BenchDevice(options.device)
    described = device.describe()
    print(device.title(), flush=True)
    compiled = compile_ahead(device, options)
    print(f"{compiled} kernels compiled in {time.perf_counter() - start:.1f} s", flush=True)
    clock, rows, told = Clock(device), list[dict[str, Any]](), set[tuple[str, str]]()
    with torch.no_grad():
        copy = clock.copy_bandwidth
        print(f"copy bandwidth, read and write counted: {copy / 1e9:.1f} GB/s", flush=True)
        for shapes in options.shapes():
            print(f"{shapes[0].num_key_value_heads} kv heads, batch {shapes[0].batch}, {shapes[0].tokens} tokens")
            if time.perf_counter() - start > options.budget:
                found = _skipped(shapes, f"the budget of {options.budget:g} s is spent")
            else:
                try:
                    found = _measure(clock, options, shapes)
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    found = _skipped(shapes, first_line(error))
            _print(shapes, found, told)
            rows += found
            partial(_report(options, device, described, copy, rows))
            gc.collect()
            device.free_bytes()
    report = _report(options, device, described, copy, rows)
    for text in report["misses"]:
        print(f"short of its goal: {text}")
    return report


def _report(
    options: CudaAttendOptions, device: BenchDevice, described: dict[str, Any], copy: float, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    settings = asdict(options) | {"budget": None if math.isinf(options.budget) else options.budget}
    wrong = [row for row in rows if row.get("kind") == "packed" and not row["passed"]]
    more = {"copy_bytes_per_second": copy, "misses": misses(rows) if device.is_cuda else [], "wrong": wrong}
    return make_report("attend", settings, rows, device=described, **more)


def _skipped(shapes: list[Shape], reason: str) -> list[dict[str, Any]]:
    print(f"  skipped: {reason}", file=sys.stderr, flush=True)
    return [asdict(shape) | {"skipped": reason} for shape in shapes]


def _print(shapes: list[Shape], rows: list[dict[str, Any]], told: set[tuple[str, str]]) -> None:
    """The table of some shapes; why a contestant is left out is told once."""
    for shape in shapes:
        own = [x for x in rows if x["num_attention_heads"] == shape.num_attention_heads and "contestant" in x]
        print(f" {shape.num_attention_heads} query heads")
        for row in own:
            reason = (row["contestant"], row.get("skipped", ""))
            if reason not in told:
                _print_row(row)
            if reason[1]:
                told.add(reason)
        for row in own:
            if row.get("step"):
                _print_step(row["contestant"], row["step"])

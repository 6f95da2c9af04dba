"""Decode attention over packed rows on a GPU: how fast, how close to the memory's roof, how much faster than f16.

Is: copy bandwidth of the card; a step (fold, turning, attend, unfold, plain, merge) as one captured graph for several
lengths, batches and group ratios, each first compared with float64 over the decoded rows; every backend of torch's
attention in f16 at equal shapes, in a graph likewise; a table and JSON. Is not: a decode step of a model.

Napkin: head_dim 128, K of 2 bits and ternary V, e4m3 scales: 33 + 27 bytes of a token and kv head, f16 512. At equal
bandwidth that is 8.5x. A size of T tokens reads T·60·(kv heads)·(batch) bytes: 512K tokens of 8 kv heads 252 MB, 75 µs
at 3.35 TB/s. Queries add nothing to the bytes of a split but its state of 4.2 KB, which is why a split has many pages.

Timing: CUDA events around a graph's replay, after warm-up, median over repeats; a buffer larger than the L2 is written
before each. Splits are what the fastest of a few numbers was, by a short run before.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels" / "emu"))
from harness import PAGE_ROWS
from kernels import DecodeAttention, Past
from machine import DeviceCodec, Machine, codec_instances
from pipeline import Call
from timing import GIB, Clock, copy_bandwidth, free_bytes, only, sdpa_variants

from parts_examples import codec_options
from skvq.reference import ReferenceCodec

HEAD_DIM, SINKS, WINDOW = 128, 4, 128
ERROR = 1e-3  # of the largest output, f16
PERIOD = 2048  # rows that are encoded; longer sequences repeat their pages
SHARE_GOAL = 0.8  # of copy bandwidth, by attend on packed bytes
BLOCKS_PER_PROCESSOR = 4  # of attend, by its registers
WAVES = (1, 2, 4, 8, 16)  # of blocks of threads over the card that are tried


def ratio_goal(tokens: int) -> float:
    """How many times faster than f16 attention a step is to be."""
    return 7.0 if tokens >= 128 << 10 else 6.0 if tokens >= 32 << 10 else 1.0


@dataclass(frozen=True)
class Format:
    """How keys and values are packed."""

    name: str
    keys: ReferenceCodec
    values: ReferenceCodec


def formats(kv_heads: int) -> dict[str, Format]:
    """2 bits and ternary; the same with statistics of blocks; parts of 2 bits on average; parts whose mean turns."""

    def parts(turning: bool) -> ReferenceCodec:
        return ReferenceCodec(**codec_options(HEAD_DIM, 0, heads=kv_heads, turning=turning, noise=False))

    def plain(format: str, block: int = 0) -> ReferenceCodec:
        return ReferenceCodec(head_dim=HEAD_DIM, format=format, block=block, scale_exponent=0.5)

    return {
        "k2v1.6": Format("k2v1.6", plain("2"), plain("1.6")),
        "blocks": Format("blocks", plain("2", 256), plain("1.6", 256)),
        "parts": Format("parts", parts(False), parts(False)),
        "turning": Format("turning", parts(True), parts(False)),
    }


@dataclass(frozen=True)
class Shape:
    """Of one measurement."""

    tokens: int
    batch: int
    group: int
    kv_heads: int

    @property
    def sequences(self) -> int:
        return self.batch * self.kv_heads

    @property
    def f16_bytes(self) -> int:
        """Of keys and values in f16."""
        return self.sequences * (self.tokens + SINKS + WINDOW) * 2 * HEAD_DIM * 2

    def packed_bytes(self, form: Format) -> int:
        """Of packed keys and values: whole pages, of which all rows are read."""
        pages = -(-self.tokens // PAGE_ROWS)
        codecs = (DeviceCodec.page_bytes(stream, codec) for stream, codec in streams(form))
        return self.sequences * pages * sum(codecs)

    def workspace_bytes(self) -> int:
        """At most, of a step: a state of eight queries for each page, twice, biases and folded queries of blocks."""
        pages = -(-self.tokens // PAGE_ROWS)
        tiles = self.sequences * -(-self.group // 8)
        return tiles * pages * (2 * 8 * (4 + HEAD_DIM) * 4 + 8 * PAGE_ROWS * 4 + 8 * HEAD_DIM * 4)


def streams(form: Format) -> tuple[tuple[str, ReferenceCodec], tuple[str, ReferenceCodec]]:
    return ("keys", form.keys), ("values", form.values)


# ---- packed rows -----------------------------------------------------------------------------------------------------


@dataclass
class Packed:
    """A sequence of `tokens` rows whose pages repeat those of the first `period` rows, which were encoded.

    Attributes:
        decoded: rows [1, H, period, D] of keys without their mean if that turns, float64; then of values.
    """

    past: Past
    period: int
    decoded: tuple[Tensor, Tensor]


def packed_rows(machine: Machine, form: Format, shape: Shape) -> Packed:
    """Random rows in pages that lie scattered over the pool, and what they decode to."""
    period = min(PERIOD, shape.tokens)
    unit = max(PAGE_ROWS, form.keys.block, form.values.block)
    if shape.tokens % period or period % unit:
        raise SystemExit(f"tokens={shape.tokens}: expected a multiple of {PERIOD}, or of {unit} below it")
    generator = torch.Generator(machine.device).manual_seed(0)

    def rows(*leading: int) -> Tensor:
        sizes = (*leading, HEAD_DIM)
        return torch.randn(sizes, generator=generator, device=machine.device).to(torch.float16)

    tables, statistics, decoded, pools = [], [], [], []
    origins = machine.put(torch.full((shape.batch,), SINKS, dtype=torch.int32))
    for stream, codec in streams(form):
        device = DeviceCodec(machine, stream, codec, shape.kv_heads, last=SINKS + period)
        sample = rows(1, shape.kv_heads, period)
        own = device.statistics(sample) if codec.block else None
        source_pool, source_table, source_order = device.new_pages(1, period)
        if device.encode(sample, source_table, [period], own, origins):
            raise SystemExit("random rows were refused")
        turns = codec.map is not None and codec.map.shift_sine is not None
        decoded.append(device.decode(source_table, 1, 0, period, own, origins, with_mean=not turns).double())
        pool, table, order = device.new_pages(shape.batch, shape.tokens)
        page = torch.arange(table.shape[-1], device=machine.device) % source_order.shape[-1]
        for sequence in order:
            pool.index_copy_(0, sequence.flatten(), source_pool[source_order[0][:, page].flatten()])
        if own is not None:
            blocks = torch.arange(shape.tokens // codec.block, device=machine.device) % own[0].shape[2]
            own = tuple(x[:, :, blocks].expand(shape.batch, -1, -1, -1).contiguous() for x in own)
        tables.append(table)
        pools.append(pool)
        statistics.append(own)
    leading = (shape.batch, shape.kv_heads)
    sinks, window = ((rows(*leading, count), rows(*leading, count)) for count in (SINKS, WINDOW))
    past = Past(*tables, sinks, window, statistics[0], statistics[1], tuple(pools))
    return Packed(past, period, (decoded[0], decoded[1]))


def exact_output(call: Call, packed: Packed, query: Tensor, batch: int) -> Tensor:
    """The output of one sequence [H, group, D] in float64."""
    heads, repeated = call.kv_heads, call.packed // packed.period
    q = query[batch].double().view(heads, call.group, HEAD_DIM) * HEAD_DIM**-0.5
    keys, values = (rows[0] for rows in packed.decoded)
    scores = (q @ keys.mT)[:, :, None]  # [H, group, 1, period]
    if call.turns:
        assert call.keys.map is not None
        scores = scores + turning_scores(call, q).view(heads, call.group, repeated, packed.period)
    else:
        scores = scores + math.log(repeated)
    regions = [packed.past.sinks, packed.past.window]
    plain_keys, plain_values = (torch.cat([pair[i][batch] for pair in regions], 1).double() for i in range(2))
    plain = q @ plain_keys.mT
    largest = torch.maximum(scores.amax((2, 3)), plain.amax(-1))
    weights, plain = (scores - largest[..., None, None]).exp().sum(2), (plain - largest[..., None]).exp()
    return (weights @ values + plain @ plain_values) / (weights.sum(-1) + plain.sum(-1))[..., None]


def turning_scores(call: Call, q: Tensor) -> Tensor:
    """q·m(t) [H, group, packed] of a mean that turns, some rows at a time."""
    head_map, found = call.keys.map, []
    mean, quarter = (x.double().to(q.device) for x in (head_map.shift, head_map.shift_sine))
    theta = head_map.frequencies.double().to(q.device)
    for first in range(0, call.packed, 1 << 16):
        end = min(call.packed, first + (1 << 16))
        angles = torch.arange(call.sinks + first, call.sinks + end, device=q.device).double()[:, None] * theta
        found.append((q * mean[:, None]) @ angles.cos().T + (q * quarter[:, None]) @ angles.sin().T)
    return torch.cat(found, -1)


# ---- measurements ----------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """What was measured, as JSON has it and as a table."""

    machine: dict[str, Any]
    copy_bandwidth: float
    sdpa: list[dict[str, Any]] = field(default_factory=list)
    packed: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def skip(self, reason: str) -> None:
        self.skipped.append(reason)
        print(f"skipped: {reason}", flush=True)

    def fastest_sdpa(self, shape: Shape) -> dict[str, Any] | None:
        """The fastest of torch's attentions at a shape."""
        own = [entry for entry in self.sdpa if entry["shape"] == vars(shape) and "seconds" in entry]
        return min(own, key=lambda entry: entry["seconds"]["median"], default=None)

    def finish(self, entry: dict[str, Any], shape: Shape) -> dict[str, Any]:
        """Adds to a measurement what follows from it: rates, shares, ratio."""
        attend, step, size = entry["stages"]["attend"]["median"], entry["step"]["median"], entry["packed_bytes"]
        fastest = self.fastest_sdpa(shape)
        entry["attend_bandwidth"], entry["step_bandwidth"] = size / attend, size / step
        entry["attend_share"] = size / attend / self.copy_bandwidth
        entry["step_share"] = size / step / self.copy_bandwidth
        entry["fastest_f16"] = fastest and fastest["name"]
        entry["ratio"] = fastest and fastest["seconds"]["median"] / step
        entry["ratio_goal"] = ratio_goal(shape.tokens)
        self.packed.append(entry)
        print(self.line(entry), flush=True)
        return entry

    HEADER = (
        f"{'format':<9}{'tokens':>8}{'batch':>6}{'group':>6}{'step µs':>10}{'attend µs':>11}{'GB/s':>7}{'of copy':>9}"
        f"{'f16 µs':>10}{'ratio':>7}{'error':>10}  fastest f16"
    )

    def line(self, entry: dict[str, Any]) -> str:
        shape = entry["shape"]
        ratio = entry["ratio"]
        f16 = "-" if ratio is None else f"{ratio * entry['step']['median'] * 1e6:.1f}"
        return (
            f"{entry['format']:<9}{shape['tokens']:>8}{shape['batch']:>6}{shape['group']:>6}"
            f"{entry['step']['median'] * 1e6:>10.1f}{entry['stages']['attend']['median'] * 1e6:>11.1f}"
            f"{entry['attend_bandwidth'] / 1e9:>7.0f}{entry['attend_share']:>9.1%}{f16:>10}"
            f"{'-' if ratio is None else format(ratio, '.2f'):>7}{entry['error']:>10.1e}  {entry['fastest_f16'] or '-'}"
            f"{'' if entry['passed'] else '  WRONG'}"
        )

    def write(self, path: Path | None) -> None:
        """As JSON, where one is wanted; after every size, so that what was measured outlives an interruption."""
        if path is not None:
            written = {**vars(self), "head_dim": HEAD_DIM, "sinks": SINKS, "window": WINDOW, "misses": self.misses()}
            path.write_text(json.dumps(written, indent=1) + "\n")

    def misses(self) -> list[str]:
        """Measurements short of a goal: share of copy bandwidth where the chip is full, ratio to f16. On CPU none."""
        found: list[str] = []
        if self.machine["device"] == "cpu":
            return found
        for entry in self.packed:
            shape = entry["shape"]
            name = f"{entry['format']}, {shape['tokens']} tokens, batch {shape['batch']}, ratio {shape['group']}"
            if shape["tokens"] >= 32 << 10 and entry["attend_share"] < SHARE_GOAL:
                found.append(f"{name}: attend at {entry['attend_share']:.0%} of copy bandwidth, goal {SHARE_GOAL:.0%}")
            if entry["ratio"] is not None and entry["ratio"] < entry["ratio_goal"]:
                found.append(f"{name}: {entry['ratio']:.2f}x of f16, goal {entry['ratio_goal']:g}x")
        return found


def pages_per_split_choices(call: Call, processors: int) -> list[int]:
    """Pages of a split so that the blocks of threads fill the card some times; with blocks, at most one block's."""
    pages = -(-call.packed // PAGE_ROWS)
    columns = call.batch * call.kv_heads * call.query_tiles // call.tiles
    wanted = {-(-pages * columns // (waves * processors * BLOCKS_PER_PROCESSOR)) for waves in WAVES}
    block = min((codec.block // PAGE_ROWS for codec in (call.keys, call.values) if codec.block), default=0)
    if block:
        return sorted({math.gcd(block, 1 << max(1, want).bit_length() - 1) for want in wanted})
    return sorted(max(1, min(pages, want)) for want in wanted)


def best_splits(machine: Machine, clock: Clock, call: Call, past: Past, query: Tensor) -> tuple[Any, list[Any]]:
    """The fastest of a few ways to split, prepared, and what each took."""
    tried: list[dict[str, Any]] = []
    best: tuple[float, DecodeAttention | None] = (math.inf, None)
    processors = machine.status["devices"][machine.index]["multiprocessors"]
    for pages_per_split in dict.fromkeys(pages_per_split_choices(call, processors)):
        attention = DecodeAttention(machine, replace(call, pages_per_split=pages_per_split), past, query)
        seconds = clock.median(clock.recorded(attention.run), 5)["median"]
        tried.append({"pages_per_split": pages_per_split, "splits": attention.splits, "seconds": seconds})
        if seconds < best[0]:
            best = (seconds, attention)
    return best[1], tried


def measure_packed(machine: Machine, clock: Clock, report: Report, form: Format, shape: Shape, packed: Packed) -> bool:
    """One line of the table. Returns whether the output was right."""
    call = Call(
        form.keys,
        form.values,
        batch=shape.batch,
        kv_heads=shape.kv_heads,
        group=shape.group,
        sinks=SINKS,
        packed=shape.tokens,
        window=WINDOW,
        tiles=-(-shape.group // 8),
    )
    generator = torch.Generator(machine.device).manual_seed(1)
    sizes = (shape.batch, shape.kv_heads * shape.group, 1, HEAD_DIM)
    query = torch.randn(sizes, generator=generator, device=machine.device).to(torch.float16)
    attention, tried = best_splits(machine, clock, call, packed.past, query)
    attention.output.fill_(math.nan)
    step = clock.recorded(attention.run)
    error = 0.0
    for batch in {0, shape.batch - 1}:
        exact = exact_output(call, packed, query, batch)
        found = attention.output[batch].double().view_as(exact)
        largest = max(float(exact.abs().max()), 1e-3)
        error = max(error, float((found - exact).abs().max().nan_to_num(math.inf)) / largest)
    entry: dict[str, Any] = {"format": form.name, "shape": dict(vars(shape)), "error": error, "passed": error <= ERROR}
    entry |= {"packed_bytes": shape.packed_bytes(form), "splits": attention.splits, "tried": tried}
    entry["pages_per_split"] = attention.call.pages_per_split
    entry["step"] = clock.median(step)
    stages = dict.fromkeys(launch.stage for launch in attention.launches)
    entry["stages"] = {
        stage: clock.median(clock.recorded(lambda stage=stage: attention.run_stage(stage)), 20) for stage in stages
    }
    report.finish(entry, shape)
    return bool(entry["passed"])


def measure_sdpa(machine: Machine, clock: Clock, report: Report, shape: Shape, keys: Tensor, values: Tensor) -> None:
    """Each backend at a shape; why one cannot goes into the report."""
    sizes = (shape.batch, shape.kv_heads * shape.group, 1, HEAD_DIM)
    query = torch.randn(sizes, device=machine.device).to(torch.float16)
    for name, backend, call in sdpa_variants(query, keys, values):
        entry: dict[str, Any] = {"name": name, "shape": dict(vars(shape))}
        try:
            with only(backend):
                entry["seconds"] = clock.median(clock.recorded(call))
        except RuntimeError as error:  # out of memory is one, too
            entry["unavailable"] = str(error).strip().split("\n")[0][:200]
            machine.synchronize()
        report.sdpa.append(entry)


# ---- command ---------------------------------------------------------------------------------------------------------


def measure(machine: Machine, clock: Clock, report: Report, options: argparse.Namespace) -> bool:
    """All sizes. Returns whether all outputs were right."""
    right, all_formats, start = True, formats(options.kv_heads), time.perf_counter()
    print(Report.HEADER)
    for tokens in options.tokens:
        for batch in options.batch:
            shapes = [Shape(tokens, batch, group, options.kv_heads) for group in options.groups]
            name = f"{tokens} tokens, batch {batch}"
            if time.perf_counter() - start > options.budget:
                report.skip(f"{name}: {options.budget:.0f} s are over")
                continue
            if not options.no_sdpa:
                need, free = int(1.3 * shapes[0].f16_bytes) + GIB, free_bytes(machine)
                if need > free:
                    report.skip(f"{name}, f16: needs {need / GIB:.1f} GiB, {free / GIB:.1f} are free")
                else:
                    sizes = (batch, options.kv_heads, tokens + SINKS + WINDOW, HEAD_DIM)
                    keys, values = (
                        torch.empty(sizes, dtype=torch.float16, device=machine.device).normal_() for _ in range(2)
                    )
                    for shape in shapes:
                        measure_sdpa(machine, clock, report, shape, keys, values)
                    del keys, values
            for form in (all_formats[name] for name in options.formats):
                size = shapes[0].packed_bytes(form)
                need, free = 2 * size + max(s.workspace_bytes() for s in shapes) + GIB, free_bytes(machine)
                if need > free:
                    report.skip(f"{name}, {form.name}: needs {need / GIB:.1f} GiB, {free / GIB:.1f} are free")
                    continue
                packed = packed_rows(machine, form, shapes[0])
                for shape in shapes:
                    right &= measure_packed(machine, clock, report, form, shape, packed)
                del packed
            report.write(options.json)
    return right


def instances(form: Format, groups: list[int]) -> list[str]:
    """Kernels of a format."""
    found = [name for stream, codec in streams(form) for name in codec_instances(stream, codec, torch.float16)]
    for group in groups:
        found += Call(form.keys, form.values, group=group, tiles=-(-group // 8)).instances()
    return list(dict.fromkeys(found))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu with a fake driver")
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 131072, 524288, 8192, 2048])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 4, 8], help="query heads of a kv head")
    parser.add_argument("--formats", nargs="+", default=["k2v1.6", "parts"], choices=list(formats(1)))
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no further size begins")
    parser.add_argument("--no-sdpa", action="store_true", help="without torch's attention")
    parser.add_argument("--json", type=Path, help="where to write what was measured")
    parser.add_argument("--list", action="store_true", help="print the kernels and stop")
    return parser.parse_args(arguments)


def main() -> int:
    options, start = parse(), time.perf_counter()
    kernels = [k for name in options.formats for k in instances(formats(options.kv_heads)[name], options.groups)]
    if options.list:
        print(json.dumps(kernels))
        return 0
    torch.set_grad_enabled(False)
    machine = Machine(options.device)
    described = machine.describe()
    print(json.dumps(described))
    print(f"{machine.compile(kernels)} kernels compiled in {time.perf_counter() - start:.1f} s")
    clock = Clock(machine, options.repeats)
    report = Report(described, copy_bandwidth(machine, clock))
    print(f"copy: {report.copy_bandwidth / 1e9:.0f} GB/s, read and written", flush=True)
    right = measure(machine, clock, report, options)
    report.write(options.json)
    for miss in report.misses():
        print(f"short of its goal: {miss}")
    seconds = time.perf_counter() - start
    print(f"{len(report.packed)} measurements, {'all right' if right else 'WRONG outputs'}, {seconds:.0f} s")
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())

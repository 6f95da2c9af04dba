"""The command `skvq`: `skvq demo`, `skvq warmup`, `skvq bench attend | encode | step | growth | generate | weights |
prompt | capacity`, and the commands of evaluate/cli.py, calibrate/cli.py and weights/cli.py.

Only parses arguments, calls what does the work, writes JSON and plots, and turns expected errors into one line and
exit status 1. A benchmark that found its outputs wrong has exit status 3. torch and transformers are imported when a
command runs, not before.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from .arguments import (
    DTYPES,
    add_attention,
    add_counts,
    add_model,
    add_model_operand,
    add_output,
    parse_bits,
    region_counts,
    resolve_dtype,
    whole_number,
)

WRONG = 3


def _heads(text: str) -> tuple[int, int]:
    parts = text.split(":")
    if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts) or int(parts[1]) % int(parts[0]):
        raise argparse.ArgumentTypeError(f"{text!r}, expected KV:QUERY such as 8:32, QUERY a multiple of KV")
    return int(parts[0]), int(parts[1])


def _format(text: str) -> str:
    from .bench.layers import parse_format

    try:
        parse_format(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser("demo", help="a real model with the stock and with the packed cache, side by side")
    add_model(parser)
    add_attention(parser)
    parser.add_argument(
        "--key-bits", type=parse_bits, default=2.0, metavar="BITS", help="16, 8, 4, 3, 2, 1.6 or 1.5 (default: 2)"
    )
    parser.add_argument(
        "--value-bits", type=parse_bits, default=1.6, metavar="BITS", help="likewise (default: 1.6, ternary)"
    )
    add_counts(parser, region_counts(1))
    parser.add_argument(
        "--prompt-tokens", type=whole_number(1), default=4096, metavar="N", help="(default: %(default)s)"
    )
    parser.add_argument("--new-tokens", type=whole_number(2), default=96, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--scored-tokens",
        type=whole_number(1),
        default=768,
        metavar="N",
        help="of the held-out passage (default: %(default)s)",
    )
    add_output(parser, plot=False)
    parser.set_defaults(run=_run_demo)


def _run_demo(arguments: argparse.Namespace) -> None:
    from .demo import DemoOptions, print_report, run_demo

    print_report(run_demo(DemoOptions(**_fields(DemoOptions, arguments))))


def _fields(options: type, arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments that are fields of a dataclass of options; those that were not given are left to its defaults."""
    known = options.__dataclass_fields__  # type: ignore[attr-defined]
    return {name: value for name, value in vars(arguments).items() if name in known and value is not None}


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser("bench", help="benchmarks").add_subparsers(dest="benchmark", required=True)

    attend = bench.add_parser("attend", help="attention on packed bytes against torch SDPA and others")
    attend.add_argument("--device", default="cpu", metavar="D", help="cpu, cuda or cuda:N (default: cpu)")
    attend.add_argument("--quick", action="store_true", help="8:32 heads, batch 1, two lengths only")
    attend.add_argument("--formats", type=_format, nargs="+", metavar="F", help="such as K2V1.6 K4V4 raw")
    attend.add_argument(
        "--heads", type=_heads, nargs="+", metavar="KV:QUERY", help="(default: 8:32 32:32; cuda: 8:8 8:32 8:64)"
    )
    attend.add_argument("--batches", type=whole_number(1), nargs="+", metavar="N", help="(default: 1 8)")
    attend.add_argument(
        "--tokens", type=whole_number(1), nargs="+", metavar="N", help="(default: 4096 … 131072; cuda: 32768 … 524288)"
    )
    attend.add_argument("--head-dim", type=whole_number(16), metavar="D", help="(default: 128)")
    attend.add_argument(
        "--queries",
        type=whole_number(1),
        metavar="N",
        help="of a call, each of which sees all tokens (default: 1)",
    )
    attend.add_argument("--rounds", type=whole_number(1), metavar="N", help="(default: 9; cuda: 30)")
    attend.add_argument(
        "--no-static", dest="static", action="store_false", default=None, help="leave out formats without statistics"
    )
    attend.add_argument(
        "--warm", action="store_true", default=None, help="cpu: do not clear the processor's caches between calls"
    )
    attend.add_argument(
        "--memory-share", type=float, metavar="X", help="cpu: of the available memory one shape may take (default: 0.6)"
    )
    attend.add_argument("--dtype", choices=DTYPES[1:], help="cuda: of keys, values and queries (default: float16)")
    attend.add_argument("--budget", type=float, metavar="S", help="cuda: seconds after which no further shape begins")
    attend.add_argument(
        "--no-peers", dest="peers", action="store_false", default=None, help="cuda: time packed rows only"
    )
    attend.add_argument(
        "--masked", action="store_true", default=None, help="cuda: time packed rows with a mask that hides nothing, too"
    )
    add_output(attend, plot=True)
    attend.set_defaults(run=_run_attend)

    encode = bench.add_parser("encode", help="encoding of rows, and its share of a model's prefill")
    encode.add_argument("--formats", type=_format, nargs="+", metavar="F")
    encode.add_argument("--head-dims", type=whole_number(16), nargs="+", metavar="D", help="(default: 64 128 256)")
    encode.add_argument("--tokens", type=whole_number(256), metavar="N", help="(default: 8192)")
    encode.add_argument(
        "--with-model",
        action="store_true",
        default=None,
        help="also time a model's prefill (--model, or the packaged one)",
    )
    add_model(encode)
    add_output(encode, plot=False)
    encode.set_defaults(run=_run_simple, benchmark_name="encode", options_name="EncodeOptions")

    step = bench.add_parser("step", help="one decode step of a layer beyond the attention kernel")
    step.add_argument("--format", type=_format, metavar="F", help="(default: K2V1.6)")
    step.add_argument("--tokens", type=whole_number(256), nargs="+", metavar="N", help="(default: 256 1024 4096)")
    step.add_argument("--steps", type=whole_number(2), metavar="N", help="(default: 25)")
    add_output(step, plot=False)
    step.set_defaults(run=_run_simple, benchmark_name="step", options_name="StepOptions")

    growth = bench.add_parser("growth", help="one layer grows token by token: time of an append, peak memory")
    growth.add_argument("--format", type=_format, metavar="F", help="(default: K2V1.6)")
    growth.add_argument("--tokens", type=whole_number(256), metavar="N", help="(default: 131072)")
    add_output(growth, plot=True)
    growth.set_defaults(run=_run_simple, benchmark_name="growth", options_name="GrowthOptions")

    generate = bench.add_parser("generate", help="a model's generation with every kind of cache")
    add_model(generate)
    add_attention(generate)
    generate.add_argument("--prompt-tokens", type=whole_number(1), metavar="N", help="(default: 4096)")
    generate.add_argument("--new-tokens", type=whole_number(2), metavar="N", help="(default: 48)")
    generate.add_argument("--rounds", type=whole_number(1), metavar="N", help="(default: 2)")
    generate.add_argument("--turns", type=whole_number(2), metavar="N", help="of single steps of all (default: 24)")
    generate.add_argument("--plan", metavar="FILE", help="one more packed cache, with this calibrated plan")
    generate.add_argument(
        "--caches",
        nargs="+",
        metavar="NAME",
        help="parts of the names of those to run, such as K2V2 hqq (default: all)",
    )
    add_output(generate, plot=True)
    generate.set_defaults(run=_run_simple, benchmark_name="generate", options_name="GenerateOptions")

    weights = bench.add_parser("weights", help="quantized weights: products of every backend, decoding, memory")
    weights.add_argument("--model", metavar="PATH_OR_ID", help="of full precision")
    weights.add_argument(
        "--checkpoint", metavar="DIR", help="of `skvq quantize`, for the same model (without both: products alone)"
    )
    weights.add_argument(
        "--shapes", nargs="+", metavar="OxI", help="of products without a checkpoint (default: those of Llama 2 7B)"
    )
    weights.add_argument("--device", metavar="D", help="cpu, cuda or cuda:N (default: cpu)")
    weights.add_argument("--plan", metavar="FILE", help="of the packed cache (default: the default format)")
    weights.add_argument("--rows", type=whole_number(1), nargs="+", metavar="N", help="of a product (default: 1 256)")
    weights.add_argument("--tokens", type=whole_number(1), metavar="N", help="in the cache (default: 8192)")
    weights.add_argument("--new-tokens", type=whole_number(1), metavar="N", help="timed (default: 8)")
    weights.add_argument(
        "--dtypes",
        nargs="+",
        choices=("bfloat16", "float32", "float16"),
        help="of activations and full-precision weights; ratios are to the first (default: bfloat16 float32)",
    )
    add_output(weights, plot=False)
    weights.set_defaults(run=_run_simple, benchmark_name="weights", options_name="WeightsOptions")

    _add_prompt(bench)
    _add_capacity(bench)


def _add_numbers(parser: argparse.ArgumentParser, *numbers: tuple[str, int | str, str]) -> None:
    """Options of whole numbers from 1 on: name, default, what it is."""
    for option, default, text in numbers:
        parser.add_argument(option, type=whole_number(1), metavar="N", help=f"{text} (default: {default})")


def _add_prompt(bench: Any) -> None:
    parser = bench.add_parser(
        "prompt",
        help="what a prompt takes with transformers' cache, the default, and a fit to the prompt",
        description="Builds a model with random weights (by default four layers of the shape of Llama 3 8B) and times "
        "prompts with every cache, and steps behind them.",
    )
    parser.add_argument("--device", metavar="D", help="cpu, cuda or cuda:N (default: cpu)")
    _add_numbers(
        parser,
        ("--layers", 4, "of the model"),
        ("--heads", 32, "query heads"),
        ("--kv-heads", 8, "of keys and values"),
        ("--head-dim", 128, "channels of one"),
        ("--intermediate", 14336, "channels of its products"),
        ("--vocabulary", 32000, "tokens"),
        ("--rounds", 3, "prompts of a length with each cache"),
        ("--steps", 16, "that are timed behind a prompt"),
    )
    parser.add_argument("--dtype", choices=DTYPES[1:], help="of the model (default: bfloat16)")
    parser.add_argument("--tokens", type=whole_number(2), nargs="+", metavar="N", help="(default: 2048 8192)")
    add_output(parser, plot=False)
    parser.set_defaults(run=_run_simple, benchmark_name="prompt", options_name="PromptOptions")


def _add_capacity(bench: Any) -> None:
    parser = bench.add_parser(
        "capacity",
        help="the longest context that fits beside a model's weights, and its decode rate",
        description="Builds a model with random weights (by default of the shape of Llama 2 7B), grows its packed "
        "cache until no more fits, and times decoding on the way.",
    )
    parser.add_argument("--device", default="cuda", metavar="D", help="cuda, cuda:N or cpu (default: %(default)s)")
    parser.add_argument("--config", metavar="PATH", help="directory or file of a model's configuration")
    _add_numbers(
        parser,
        ("--layers", 32, "of the model without --config"),
        ("--heads", 32, "query heads, likewise"),
        ("--kv-heads", "those of --heads", "likewise"),
        ("--head-dim", 128, "likewise"),
        ("--intermediate", 11008, "likewise"),
        ("--vocabulary", 32000, "likewise"),
        ("--chunk", 2048, "tokens by which the cache grows at a time"),
        ("--steps", 16, "tokens that are decoded and timed at a length"),
    )
    parser.add_argument("--dtype", choices=DTYPES[1:], help="of the weights (default: float16)")
    parser.add_argument("--format", type=_format, metavar="F", help="of the cache (default: K2V1.6)")
    parser.add_argument("--static", action="store_true", default=None, help="without statistics of blocks of rows")
    parser.add_argument("--plan", metavar="FILE", help="of the cache, calibrated for --config")
    parser.add_argument(
        "--fill",
        choices=("rows", "prefill"),
        help="grow by random keys and values, or let the model read random tokens, in a time that is quadratic in the "
        "length (default: rows)",
    )
    parser.add_argument("--tokens", type=whole_number(2), metavar="N", help="show that so many fit, and stop there")
    parser.add_argument("--limit-gib", type=float, metavar="X", help="of weights and cache (default: the device's)")
    parser.add_argument("--budget", type=float, metavar="S", help="seconds after which the cache grows no further")
    add_output(parser, plot=True)
    parser.set_defaults(run=_run_capacity)


def _add_warmup(commands: Any) -> None:
    parser = commands.add_parser(
        "warmup",
        help="compile the CUDA kernels of a model ahead",
        description="Compiles the CUDA kernels that a model needs, from its configuration alone, and keeps them on "
        "disk; no GPU is needed.",
    )
    add_model_operand(parser)
    parser.add_argument("--arch", nargs="+", metavar="SM", help="such as sm_90a (default: of this machine's GPUs)")
    parser.add_argument("--plan", type=Path, metavar="FILE", help="of a calibrated cache (default: default options)")
    parser.add_argument("--dtype", choices=DTYPES[1:], help="of the model (default: its configuration's)")
    parser.set_defaults(run=_run_warmup)


def _run_warmup(arguments: argparse.Namespace) -> None:
    from .warmup import WarmupOptions, run_warmup

    run_warmup(WarmupOptions(**_tuples(_fields(WarmupOptions, arguments))))


def _tuples(given: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def _prepare(arguments: argparse.Namespace) -> None:
    from .bench.machine import set_threads, warn_if_busy

    set_threads(arguments.threads)
    arguments.load_average = warn_if_busy()


def _finish(report: dict[str, Any], arguments: argparse.Namespace) -> int:
    """Writes what is wanted of a report. Returns the exit status: `WRONG` if an output was."""
    report["load_average_at_start"] = arguments.load_average
    if arguments.json is not None:
        from .bench.machine import write_json

        write_json(report, arguments.json)
    if getattr(arguments, "plot", None) is not None:
        from .bench.plot import plot

        plot(report, arguments.plot)
    return WRONG if report.get("wrong") else 0


def _run_attend(arguments: argparse.Namespace) -> int:
    on_cpu = arguments.device == "cpu"
    module = import_module("skvq.bench.attend" if on_cpu else "skvq.bench.attend_cuda")
    options = module.AttendOptions if on_cpu else module.CudaAttendOptions
    run = module.run_attend if on_cpu else module.run_attend_cuda
    given = _tuples(_fields(options, arguments))
    for name in ("warm", "memory_share", "dtype", "budget", "peers", "masked"):
        if getattr(arguments, name) is not None and name not in given:
            raise ValueError(f"{name}={getattr(arguments, name)!r}: not an option of --device {arguments.device}")
    _prepare(arguments)
    start = options().quick() if arguments.quick else options()
    more = {} if on_cpu else {"partial": _writer(arguments)}
    return _finish(run(options(**(vars(start) | given)), **more), arguments)


def _run_capacity(arguments: argparse.Namespace) -> int:
    from .bench.capacity import CapacityOptions, run_capacity

    for name in ("layers", "heads", "kv_heads", "head_dim", "intermediate", "vocabulary"):
        if arguments.config is not None and (size := getattr(arguments, name)) is not None:
            raise ValueError(f"{name}={size}: expected none beside config={arguments.config!r}, which says it")
    if arguments.plan is not None and (arguments.format is not None or arguments.static):
        raise ValueError(
            f"format, static: expected neither beside plan={arguments.plan!r}, which says how rows are packed"
        )
    _prepare(arguments)
    options = CapacityOptions(**_fields(CapacityOptions, arguments))
    return _finish(run_capacity(options, partial=_writer(arguments)), arguments)


def _writer(arguments: argparse.Namespace) -> Callable[[dict[str, Any]], None]:
    """Writes a report that is not complete, where one is wanted, so that it outlives an interruption."""
    from .bench.machine import write_json

    def write(report: dict[str, Any]) -> None:
        if arguments.json is not None:
            write_json(report | {"load_average_at_start": arguments.load_average}, arguments.json)

    return write


def _run_simple(arguments: argparse.Namespace) -> int:
    """Every benchmark whose module has `run_NAME(OPTIONS)`."""
    _prepare(arguments)
    module = import_module(f"skvq.bench.{arguments.benchmark_name}")
    options = getattr(module, arguments.options_name)
    run = getattr(module, f"run_{arguments.benchmark_name}")
    return _finish(run(options(**_tuples(_fields(options, arguments)))), arguments)


def _version() -> str:
    try:
        return importlib.metadata.version("skvq")
    except importlib.metadata.PackageNotFoundError:
        return "(run from its sources, not installed)"


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="skvq", description="A packed low-bit key/value cache for Hugging Face transformers."
    )
    parser.add_argument("--version", action="version", version=f"skvq {_version()}")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_demo(commands)
    _add_bench(commands)
    _add_warmup(commands)
    from .calibrate import cli as calibrate_cli
    from .evaluate import cli as evaluate_cli
    from .weights import cli as weights_cli

    evaluate_cli.add_commands(commands)
    calibrate_cli.add_commands(commands)
    weights_cli.add_commands(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = build_parser().parse_args(argv)
    from .models import ExtraNotInstalledError, ModelFileError

    try:
        resolve_dtype(arguments)
        status: int | None = arguments.run(arguments)
    except (ExtraNotInstalledError, ModelFileError, ValueError, OSError) as error:
        print(f"skvq: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return status or 0

"""The commands `skvq calibrate` and `skvq inspect`.

Only parses arguments and calls what does the work; torch and transformers are imported when a command runs.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..arguments import (
    add_counts,
    add_dtype,
    add_model,
    add_model_operand,
    add_output,
    add_texts,
    region_counts,
    whole_number,
)
from .run import CHUNKS, METHODS, OF_SPECTRAL, PACKAGED_CHUNKS, options_of, run_calibration

if TYPE_CHECKING:
    from ..plan_file import QuantizationPlan

WEIGHTS = ("query", "attention")  # as in spectral_plan.py, which loads torch
LEVELS = ("uniform", "lloyd-max")
OPTIONS = ("method", "key_bits", "value_bits", "bits", *OF_SPECTRAL[1:], "chunks", "tokens", "window", "sinks")


def add_commands(commands: Any) -> None:
    """Adds both commands to the subparsers of the command line."""
    _add_calibrate(commands)
    _add_inspect(commands)


# ---- calibrate -------------------------------------------------------------------------------------------------------


def _add_calibrate(commands: Any) -> None:
    parser = commands.add_parser(
        "calibrate",
        help="fit a plan to a model on texts",
        description="Reads texts with a model once, fits what its layers are packed with, and writes a plan for "
        "QuantizedDynamicCache.from_plan.",
    )
    add_model_operand(parser)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the plan, .safetensors")
    add_texts(parser)
    parser.add_argument(
        "--method",
        choices=METHODS,
        default=METHODS[0],
        help="spectral: parts behind a matrix, a mean that turns with the position; static: a shift and a scale per "
        "channel, a baseline (default: %(default)s)",
    )
    parser.add_argument(
        "--key-bits",
        type=_bits,
        metavar="BITS",
        help="of codes: up to 4 on average, or 16 (default: 2); for static 16, 8, 4, 3, 2, 1.6 or 1.5",
    )
    parser.add_argument("--value-bits", type=_bits, metavar="BITS", help="likewise (default: 1.5, for static 1.6)")
    _add_spectral(parser)
    parser.add_argument(
        "--chunks",
        type=whole_number(1),
        metavar="N",
        help=f"pieces of text that the plan is fitted to (default: {CHUNKS}, of the package's text {PACKAGED_CHUNKS}, "
        "with --bits 1)",
    )
    add_counts(parser, {**region_counts(1), "--tokens": (2, 2048, "of a piece")})
    parser.add_argument(
        "--state",
        type=Path,
        metavar="FILE",
        help="keep statistics there: a run that was stopped goes on, others reuse it",
    )
    add_dtype(parser)
    parser.add_argument("--device", default="cpu", metavar="NAME", help="such as cuda (default: cpu)")
    add_output(parser, plot=False)
    parser.set_defaults(run=_run_calibrate)


def _add_spectral(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("for --method spectral")
    group.add_argument(
        "--bits",
        type=_bits,
        metavar="BITS",
        help="instead of both: counted bits of an element with its scales, shared out over all layers, keys and values "
        "by estimate, or evenly if that measures better on one more piece of the texts (on a CPU)",
    )
    group.add_argument(
        "--parts", type=whole_number(1), metavar="N", help="of a row that may differ in bits (default: 4)"
    )
    group.add_argument(
        "--weights",
        choices=WEIGHTS,
        help="what errors are weighed by: all queries alike, or what attention does with them (default: attention)",
    )
    levels = "evenly spaced, which a GPU need not look up, or of least error"
    for stream, default in (
        ("key", "uniform up to 2.5 bits of keys on average, or --bits 2.5, lloyd-max above"),
        ("value", "lloyd-max"),
    ):
        group.add_argument(
            f"--{stream}-levels", choices=LEVELS, help=f"of the parts of {stream}s: {levels} (default: {default})"
        )
    group.add_argument("--no-noise", action="store_true", help="do not correct scores for the noise of packed keys")


def _bits(text: str) -> float:
    """Bits on average."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value <= 16.0:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number above 0 and up to 16")
    return value


def _run_calibrate(arguments: argparse.Namespace) -> None:
    from ..bench.machine import peak_of_process, release_free_memory, reset_peak, set_threads, write_json
    from ..display import human_bytes
    from ..evaluate.texts import digests, read_text
    from ..inspect_plan import plan_table
    from ..models import load

    start = time.monotonic()
    given = {name: getattr(arguments, name) for name in OPTIONS if getattr(arguments, name) is not None}
    options = options_of(given | {"noise": not arguments.no_noise})
    if not arguments.output.parent.is_dir():
        raise ValueError(f"--output {str(arguments.output)!r}: expected a file in an existing directory")
    texts = [read_text(x) for x in arguments.texts]
    digests(texts)  # mistakes in them are told before a model is loaded
    set_threads(arguments.threads)
    loaded = load(arguments.model, dtype=arguments.dtype)
    model = loaded.model.to(arguments.device)
    # Loading reads the files through memory that the system counts as this process's, though it can take it back.
    loading_peak = peak_of_process()
    release_free_memory()
    reset_peak()
    loaded_at = time.monotonic()
    found = run_calibration(
        model,
        loaded.tokenizer,
        options,
        texts=texts,
        state_path=arguments.state,
        say=print,
    )
    if found.summary:
        print(found.summary)
    plan = found.plan
    plan.save(arguments.output)
    print(plan_table(plan))
    print(f"written: {arguments.output}")
    end, working_peak = time.monotonic(), peak_of_process()
    peaks = f"{human_bytes(loading_peak)} while loading, {human_bytes(working_peak)} afterwards"
    print(f"{end - start:.0f} seconds, peak memory {peaks}")
    if arguments.json is not None:
        seconds = {"load": loaded_at - start, **found.seconds, "all": end - start}
        report = _report(arguments, plan, loaded, seconds)
        write_json(report | {"loading_peak_bytes": loading_peak, "peak_bytes": working_peak}, arguments.json)


def _report(
    arguments: argparse.Namespace, plan: QuantizationPlan, loaded: Any, seconds: dict[str, float]
) -> dict[str, Any]:
    """What a calibration took, and what it made."""
    from ..bench.machine import describe_machine
    from ..inspect_plan import plan_report

    settings = {name: value for name, value in vars(arguments).items() if isinstance(value, (str, int, float))}
    return {
        "settings": settings | {"model": Path(loaded.name).name},
        "machine": describe_machine(),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "model_bytes": sum(x.nbytes for x in loaded.model.parameters()),
        "plan": {name: value for name, value in plan_report(plan).items() if name != "layers"},
    }


# ---- inspect ---------------------------------------------------------------------------------------------------------


def _add_inspect(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect",
        help="what a plan holds, as a table and as a picture of a layer",
        description="With --texts (and --model) a short text is read, and the picture shows the channels of keys and "
        "values before and after the plan's transform.",
    )
    parser.add_argument("plan", type=Path, metavar="PLAN", help="a plan file, or a directory that has one")
    parser.add_argument(
        "--layer", type=whole_number(0), metavar="N", help="of the picture (default: the first packed one)"
    )
    parser.add_argument("--head", type=whole_number(0), default=0, metavar="N", help="of the picture (default: 0)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="save a picture there (.png, .svg; needs matplotlib)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there")
    parser.add_argument("--texts", nargs="+", metavar="FILE", help="read the beginning of the first, for the picture")
    parser.add_argument("--tokens", type=whole_number(2), default=1024, metavar="N", help="read (default: %(default)s)")
    add_model(parser)
    parser.set_defaults(run=_run_inspect)


def _run_inspect(arguments: argparse.Namespace) -> None:
    from ..inspect_plan import plan_report, plan_table
    from ..plan_file import QuantizationPlan

    plan = QuantizationPlan.load(arguments.plan)
    layer = next(iter(plan.layers)) if arguments.layer is None else arguments.layer
    if layer not in plan.layers:
        raise ValueError(f"--layer {layer}: expected one of {', '.join(map(str, plan.layers))}, those that are packed")
    if (arguments.texts or arguments.model) and arguments.plot is None:
        raise ValueError("--texts and --model are for the picture: expected --plot FILE with them")
    print(plan_table(plan))
    if arguments.json is not None:
        from ..bench.machine import write_json

        write_json(plan_report(plan), arguments.json)
    if arguments.plot is not None:
        from ..inspect_plot import save_picture

        rows = _sample(arguments, plan) if arguments.texts or arguments.model else None
        save_picture(plan, layer, arguments.plot, head=arguments.head, sample=rows.get(layer) if rows else None)
        print(f"written: {arguments.plot}")


def _sample(arguments: argparse.Namespace, plan: QuantizationPlan) -> dict[int, Any]:
    """Rows of every layer from the beginning of a text."""
    from ..evaluate.texts import CALIBRATION_TEXTS, cut_chunks, packaged_texts, read_text
    from ..models import load
    from .collect import collect

    loaded = load(arguments.model, dtype=arguments.dtype)
    plan.check(loaded.model, f"{arguments.plan}: the plan")
    texts = [read_text(x) for x in arguments.texts or ()] or packaged_texts(CALIBRATION_TEXTS)
    chunks = [x.token_ids for x in cut_chunks(loaded.tokenizer, texts[:1], 1, arguments.tokens)]
    length = arguments.tokens
    found = collect(loaded.model, chunks, sinks=0, sample_tokens=length, sample_length=length, attention_stride=0)
    return {index: layer.samples[0] for index, layer in found.layers.items()}

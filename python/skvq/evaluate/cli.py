"""The command `skvq eval`: arguments of `compare` and `ablate`; those of the tasks are in tasks_cli.py.

Only parses arguments and calls what does the work; torch and transformers are imported when a command runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..arguments import add_counts, add_model, add_output, add_texts, region_counts, whole_number

DEFAULT_METHODS = ("full", "kivi:bits=2", "rotation:bits=2", "ours")
ABLATION_TABLES = ("window", "sinks", "search", "group", "reorder", "clip", "metadata", "rope")  # of ablations.py


def add_commands(commands: Any) -> None:
    """Adds `eval` with its subcommands to the subparsers of the command line."""
    from ..weights import cli as weights_cli
    from . import tasks_cli

    parser = commands.add_parser("eval", help="quality of methods and caches on real text")
    subcommands = parser.add_subparsers(dest="evaluation", required=True)
    _add_compare(subcommands)
    _add_ablate(subcommands)
    tasks_cli.add_commands(subcommands)
    weights_cli.add_evaluation(subcommands)


def _add_compare(subcommands: Any) -> None:
    parser = subcommands.add_parser(
        "compare",
        help="KL divergence, top-1 agreement and perplexity of methods at their counted bits",
        description="Methods under the same window, sinks, metadata accounting and texts, simulated exactly in one "
        "forward pass per chunk. Methods: full, rtn, kivi, skvq, skvq-pre-rope, wkvquant, rotation, quarot, kvquant, "
        "oscar, quanto, hqq, fp8, balanced, ours, plan:FILE; options follow a colon, such as "
        "'ours:key_bits=3,keys.clip=1.1'.",
    )
    add_model(parser)
    parser.add_argument(
        "--methods", nargs="+", metavar="M", default=list(DEFAULT_METHODS), help="(default: %(default)s)"
    )
    _add_measuring(parser)
    parser.set_defaults(run=_run_compare)


def _add_ablate(subcommands: Any) -> None:
    parser = subcommands.add_parser(
        "ablate",
        help="tables in which one option of a method is varied",
        description="One table for each of window, sinks, their search, group size, reorder, clip, metadata, and keys "
        "before or after RoPE, as far as the base has the option; what is left out is listed with its reason.",
    )
    add_model(parser)
    parser.add_argument(
        "--tables",
        nargs="+",
        choices=ABLATION_TABLES,
        metavar="T",
        help=f"some of {', '.join(ABLATION_TABLES)} (default: all that the base has options for)",
    )
    parser.add_argument(
        "--base", metavar="METHOD", default="skvq:bits=2", help="what is varied, as in compare (default: %(default)s)"
    )
    _add_measuring(parser)
    parser.set_defaults(run=_run_ablate)


def _add_measuring(parser: argparse.ArgumentParser) -> None:
    """Texts, sizes, log and outputs, which `compare` and `ablate` share."""
    add_texts(parser)
    parser.add_argument(
        "--calibration-texts", nargs="+", metavar="FILE", default=[], help="for methods that need them; not --texts"
    )
    counts = {
        "--chunks": (1, 2, "evaluated chunks of each length"),
        "--score-from": (0, 512, "first token whose next token is scored"),
        **region_counts(0),
        "--calibration-chunks": (1, 4, "of --calibration-texts"),
        "--calibration-tokens": (2, 2048, "of a calibration chunk"),
    }
    add_counts(parser, counts)
    parser.add_argument(
        "--tokens",
        type=whole_number(2),
        nargs="+",
        default=[2048],
        metavar="N",
        help="of a chunk, one or several lengths",
    )
    parser.add_argument(
        "--log", type=Path, metavar="FILE", help="JSON lines, appended: a run that was stopped goes on where it was"
    )
    add_output(parser, plot=True)


def _run_compare(arguments: argparse.Namespace) -> None:
    from .comparison import compare
    from .methods import parse_method

    methods = [parse_method(spec) for spec in arguments.methods]
    model, tokenizer, options = _measuring(arguments)
    _output(arguments, compare(model, tokenizer, methods, **options))


def _run_ablate(arguments: argparse.Namespace) -> None:
    from .ablations import ablate
    from .methods import parse_method

    parse_method(arguments.base)  # refused before a model is loaded
    model, tokenizer, options = _measuring(arguments)
    _output(arguments, ablate(model, tokenizer, arguments.base, arguments.tables, **options))


def _measuring(arguments: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    """Model, tokenizer, and what `compare` and `ablate` take besides."""
    from ..bench.machine import set_threads
    from ..models import load

    set_threads(arguments.threads)
    loaded = load(arguments.model, dtype=arguments.dtype)
    names = "texts calibration_texts chunks tokens calibration_chunks calibration_tokens window sinks score_from log"
    options = {name: getattr(arguments, name) for name in names.split()}
    return loaded.model, loaded.tokenizer, options | {"progress": True, "name": Path(loaded.name).name}


def _output(arguments: argparse.Namespace, report: Any) -> None:
    """The table, and the files that are wanted."""
    from ..bench.machine import describe_machine

    report.settings["machine"] = describe_machine()
    print(report.table())
    if arguments.json is not None:
        report.save_json(arguments.json)
    if arguments.plot is not None:
        report.save_plot(arguments.plot)

"""Arguments that several commands of `skvq` share: whole numbers, bits, the model, the regions, texts and outputs.

Only argparse; torch and transformers are not imported.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from .config import BITS

DTYPES = ("auto", "bfloat16", "float32", "float16")


def parse_bits(text: str) -> float:
    """Bits of a packed element."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if value not in BITS:
        raise argparse.ArgumentTypeError(f"{text!r}, expected one of {', '.join(f'{bits:g}' for bits in BITS)}")
    return value


def whole_number(least: int) -> Callable[[str], int]:
    """What parses a whole number of at least `least`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number of at least {least}")
        return value

    return parse


def add_model(parser: argparse.ArgumentParser) -> None:
    """`--model` and `--dtype`."""
    parser.add_argument(
        "--model", metavar="PATH_OR_ID", help="a model directory or hub id (default: the packaged Gemma 3 270M)"
    )
    add_dtype(parser)


def add_model_operand(parser: argparse.ArgumentParser) -> None:
    """The model as an operand, MODEL."""
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="a model directory or hub id (default: the packaged Gemma 3 270M)"
    )


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """`--dtype`; `resolve_dtype` turns "auto" into a name before a command runs."""
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default=DTYPES[0],
        help="of the model (default: %(default)s, bfloat16 where this processor multiplies it fast, else float32)",
    )


def resolve_dtype(arguments: argparse.Namespace) -> None:
    """Replaces the dtype "auto", if the command has one."""
    if getattr(arguments, "dtype", None) == DTYPES[0]:
        from .models import fast_dtype

        arguments.dtype = fast_dtype()


def add_attention(parser: argparse.ArgumentParser) -> None:
    """`--attn`."""
    parser.add_argument(
        "--attn",
        dest="attention",
        choices=("sdpa", "skvq", "eager"),
        default="sdpa",
        help="attention implementation (default: %(default)s)",
    )


def add_output(parser: argparse.ArgumentParser, *, plot: bool) -> None:
    """`--json`, `--threads` and, if wanted, `--plot`."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    add_threads(parser)
    if plot:
        parser.add_argument(
            "--plot", type=Path, metavar="FILE", help="save a plot there (.png, .svg; needs matplotlib)"
        )


def add_threads(parser: argparse.ArgumentParser) -> None:
    """`--threads`, for `set_threads` of bench/machine.py."""
    parser.add_argument("--threads", type=whole_number(1), metavar="N", help="of torch and skvq (default: torch's)")


def region_counts(least_window: int) -> dict[str, tuple[int, int, str]]:
    """`--window` and `--sinks`, for `add_counts`."""
    return {
        "--window": (least_window, 128, "most recent tokens kept as they are"),
        "--sinks": (0, 5, "first tokens kept as they are"),
    }


def add_counts(parser: argparse.ArgumentParser, counts: Mapping[str, tuple[int, int, str]]) -> None:
    """Options that are whole numbers: name -> (least, default, what it is)."""
    for option, (least, default, text) in counts.items():
        parser.add_argument(
            option, type=whole_number(least), default=default, metavar="N", help=f"{text} (default: {default})"
        )


def add_texts(parser: argparse.ArgumentParser) -> None:
    """`--texts`."""
    parser.add_argument(
        "--texts", nargs="+", metavar="FILE", default=[], help="or FILE#0.5-1 for a part (default: the package's)"
    )

"""The commands `skvq quantize` and `skvq eval weights`.

Only parses arguments and calls what does the work; torch and transformers are imported when a command runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..arguments import add_counts, add_model_operand, add_output, add_texts, add_threads, region_counts, whole_number

# As in reconstruction.py and grid.py, which load torch.
LOSSES = ("mae", "mse")
STARTS = ("search", "open", "range")
ROUNDINGS = ("nearest", "compensated", "learnt")
WEIGHT_BITS = (3, 4, 6, 8)
TRAINED_EPOCHS = 4


def add_commands(commands: Any) -> None:
    """Adds `quantize` to the subparsers of the command line."""
    parser = commands.add_parser(
        "quantize",
        help="a checkpoint with low-bit weights, and a plan of its cache",
        description="Quantizes the decoder's linear layers block by block against the full-precision model (WKVQuant) "
        "and writes a compressed-tensors checkpoint that plain transformers loads, with a plan for the packed cache.",
    )
    add_model_operand(parser)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="of the checkpoint and plans")
    parser.add_argument("--bits", type=int, choices=WEIGHT_BITS, default=4, help="of a weight (default: %(default)s)")
    parser.add_argument("--loss", choices=LOSSES, help="mean absolute or squared error (default: mae)")
    parser.add_argument(
        "--start",
        choices=STARTS,
        help="clips before training: the best fraction of every group's range, 0.982, or 1 (default: search)",
    )
    parser.add_argument(
        "--rounding",
        choices=ROUNDINGS,
        help="of weights: to the nearest level, with errors put onto inputs not yet rounded (GPTQ), or which way is "
        "trained with the clips (default: compensated)",
    )
    parser.add_argument("--rate", type=float, metavar="X", help="learning rate of the clips' logits (default: 0.05)")
    parser.add_argument("--ignore", nargs="+", metavar="NAME", default=[], help="ends of names of layers to leave")
    parser.add_argument(
        "--kv-bits", type=int, choices=(2, 3, 4, 8), help="also train WKVQuant's 2-D quantization of the cache"
    )
    parser.add_argument("--key-bits", type=float, metavar="BITS", help="of the fitted plan's keys (default: 2)")
    parser.add_argument("--value-bits", type=float, metavar="BITS", help="of its values (default: 1.5)")
    parser.add_argument("--no-plan", action="store_true", help="fit no plan")
    add_texts(parser)
    parser.add_argument(
        "--epochs",
        type=whole_number(0),
        metavar="N",
        help="of training over the samples, for each block (default: 0, which gives nearly the same in a fraction of "
        f"the time; {TRAINED_EPOCHS} with --kv-bits or another --rounding, which live on it)",
    )
    counts = {
        "--group-size": (32, 128, "inputs that share a scale"),
        "--ahead": (0, 1, "next blocks whose outputs count in the loss"),
        "--batch": (1, 1, "samples of a step"),
        "--samples": (1, 16, "calibration samples"),
        "--tokens": (2, 512, "of a sample"),
        "--seed": (0, 0, "of their order"),
        **region_counts(1),
        "--plan-chunks": (1, 4, "pieces of text the plan is fitted to"),
        "--plan-tokens": (2, 2048, "of a piece"),
    }
    add_counts(parser, counts)
    parser.add_argument(
        "--state", type=Path, metavar="DIR", help="keep finished blocks there: a run that was stopped goes on"
    )
    parser.add_argument(
        "--device", default="cpu", metavar="NAME", help="where blocks are worked on, such as cuda (default: cpu)"
    )
    add_threads(parser)
    parser.set_defaults(run=_run_quantize)


def _run_quantize(arguments: argparse.Namespace) -> None:
    from ..bench.machine import set_threads
    from ..calibrate.spectral_plan import SpectralOptions
    from ..display import human_bytes
    from .channels import ChannelOptions
    from .grid import WeightOptions
    from .quantize import QuantizeOptions, quantize_model
    from .reconstruction import ReconstructOptions

    chosen = ("loss", "start", "rounding", "rate")
    given = {x: getattr(arguments, x) for x in chosen if getattr(arguments, x) is not None}
    channels = None
    if arguments.kv_bits is not None:
        channels = ChannelOptions(arguments.kv_bits, arguments.window, arguments.sinks)
    epochs = arguments.epochs
    if epochs is None:
        epochs = 0 if channels is None and arguments.rounding in (None, "compensated") else TRAINED_EPOCHS
    plan_bits = {x: getattr(arguments, x) for x in ("key_bits", "value_bits") if getattr(arguments, x) is not None}
    if arguments.no_plan and plan_bits:
        raise ValueError("--no-plan: expected neither --key-bits nor --value-bits with it")
    options = QuantizeOptions(
        weights=WeightOptions(arguments.bits, arguments.group_size),
        reconstruct=ReconstructOptions(
            ahead=arguments.ahead,
            epochs=epochs,
            batch=arguments.batch,
            seed=arguments.seed,
            ignore=tuple(arguments.ignore),
            channels=channels,
            **given,
        ),
        texts=tuple(arguments.texts),
        samples=arguments.samples,
        tokens=arguments.tokens,
        plan=None if arguments.no_plan else SpectralOptions(**plan_bits),
        plan_chunks=arguments.plan_chunks,
        plan_tokens=arguments.plan_tokens,
        window=arguments.window,
        sinks=arguments.sinks,
    )
    set_threads(arguments.threads)
    report = quantize_model(arguments.model, arguments.output, options, state=arguments.state, device=arguments.device)
    if report["plan"] is not None:
        print(report["plan"])
    print(f"written: {arguments.output}, {human_bytes(report['checkpoint_bytes'])}")
    print(f"{report['seconds']['all']:.0f} seconds, peak memory {human_bytes(report['peak_bytes'])}")


def add_evaluation(subcommands: Any) -> None:
    """Adds `weights` to the subparsers of `skvq eval`."""
    parser = subcommands.add_parser(
        "weights",
        help="KL divergence, top-1 agreement and perplexity of quantized weights, alone and with a quantized cache",
        description="Candidates: full, rtn:bits=4, or a checkpoint's directory, each alone or as WEIGHTS+METHOD with a "
        "method of `skvq eval compare`, such as out/w4+plan:out/w4/plan.safetensors.",
    )
    parser.add_argument("--model", required=True, metavar="PATH_OR_ID", help="the full-precision model")
    parser.add_argument("--candidates", nargs="+", required=True, metavar="C", help="WEIGHTS or WEIGHTS+METHOD")
    add_texts(parser)
    counts = {
        "--chunks": (1, 2, "evaluated chunks"),
        "--tokens": (2, 2048, "of a chunk"),
        "--score-from": (0, 512, "first token whose next token is scored"),
        **region_counts(0),
    }
    add_counts(parser, counts)
    add_output(parser, plot=False)
    parser.set_defaults(run=_run_evaluation)


def _run_evaluation(arguments: argparse.Namespace) -> None:
    from transformers import AutoTokenizer

    from ..bench.machine import make_report, set_threads, write_json
    from ..evaluate.comparison import Settings
    from ..evaluate.methods import parse_method
    from ..evaluate.texts import EVALUATION_TEXTS, cut_chunks, packaged_texts, read_text
    from .compare import Candidate, compare_weights, summarize, table

    texts = [read_text(x) for x in arguments.texts] or packaged_texts(EVALUATION_TEXTS)
    for text in arguments.candidates:  # refused before a model is loaded
        parse_method(Candidate.parse(text).cache).check_texts(texts)
    settings = Settings(arguments.window, arguments.sinks, arguments.score_from)
    set_threads(arguments.threads)
    chunks = cut_chunks(AutoTokenizer.from_pretrained(arguments.model), texts, arguments.chunks, arguments.tokens)
    noted = {
        "window": settings.window,
        "sinks": settings.sinks,
        "score_from": settings.score_from,
        "texts": [text.described() for text in texts],
    }

    def keep(rows: list[dict[str, Any]]) -> None:
        if arguments.json is not None:
            report = make_report("weights", noted, rows, model=Path(arguments.model).name, summary=summarize(rows))
            write_json(report, arguments.json)

    rows = compare_weights(arguments.model, arguments.candidates, chunks, settings, progress=True, finished=keep)
    print(table(rows))

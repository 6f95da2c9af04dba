"""The tasks of `skvq eval`: `retrieval`, `generation`, `longbench` and `lm-eval`.

Is: arguments, progress bars, and the way from a run to its table, JSON and plot. Is not: the tasks themselves.
torch and transformers are imported when a command runs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..arguments import add_attention, add_counts, add_model, add_output, add_texts, whole_number
from .progress import progress_bar

_CACHES = (
    "dynamic (full precision, best given first), packed[:OPTIONS], plan:FILE, method:SPEC, quanto[:OPTIONS], "
    "hqq[:OPTIONS], fp8; options as in packed:key_bits=2,value_bits=1.5 (default: %(default)s)"
)


def add_commands(subcommands: Any) -> None:
    """Adds the tasks to the subparsers of `skvq eval`."""
    _add_retrieval(subcommands)
    _add_generation(subcommands)
    _add_longbench(subcommands)
    _add_lm_eval(subcommands)


def _add_caches(parser: argparse.ArgumentParser) -> None:
    """The model and the caches that it runs with."""
    add_model(parser)
    add_attention(parser)
    parser.add_argument("--caches", nargs="+", metavar="CACHE", default=["dynamic", "packed"], help=_CACHES)
    parser.add_argument("--window", type=whole_number(1), default=128, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--sinks", type=whole_number(0), default=5, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--calibration-texts", nargs="+", metavar="FILE", default=[], help="for methods that are fitted to texts"
    )


def _add_common(parser: argparse.ArgumentParser, *, plot: bool, texts: bool) -> None:
    _add_caches(parser)
    if texts:
        add_texts(parser)
    parser.add_argument(
        "--records", type=Path, metavar="FILE", help="JSON lines, kept up to date: a run that was stopped goes on there"
    )
    add_output(parser, plot=plot)


def _add_retrieval(subcommands: Any) -> None:
    parser = subcommands.add_parser("retrieval", help="is a number that stands in a long context still found?")
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=("needle", "lines", "variables"),
        default=["needle"],
        help="(default: needle)",
    )
    parser.add_argument(
        "--lengths",
        type=whole_number(1),
        nargs="+",
        default=[1024, 2048, 4096, 8192],
        metavar="N",
        help="tokens of a prompt (default: 1024 2048 4096 8192)",
    )
    add_counts(
        parser,
        {
            "--depths": (1, 5, "places in a context that are asked for"),
            "--cases": (1, 3, "contexts of each length"),
            "--hops": (1, 2, "assignments in a chain of the task variables"),
            "--seed": (0, 0, "of the cases"),
        },
    )
    parser.add_argument(
        "--prefill",
        choices=("chunk", "whole"),
        default="chunk",
        help="chunk: the question is a later call and reads the packed past; whole: only the answer does "
        "(default: chunk)",
    )
    parser.add_argument("--no-chat", dest="chat", action="store_false", default=None, help="without the chat template")
    _add_common(parser, plot=True, texts=True)
    parser.set_defaults(run=_run_retrieval)


def _add_generation(subcommands: Any) -> None:
    parser = subcommands.add_parser("generation", help="long generation beside full precision: drift and agreement")
    add_counts(
        parser,
        {
            "--prompts": (1, 2, "passages of the texts to go on from"),
            "--prompt-tokens": (2, 512, "of a prompt"),
            "--new-tokens": (2, 1024, "generated after each prompt"),
            "--bucket": (1, 100, "tokens that one figure of the drift stands for"),
            "--chunk": (1, 8, "tokens of a forced step"),
            "--seed": (0, 0, "of the sampled text"),
        },
    )
    parser.add_argument(
        "--temperature", type=float, default=1.0, metavar="X", help="of the forced text, 0: greedy (default: 1)"
    )
    parser.add_argument("--top-p", type=float, default=1.0, metavar="X", help="likewise (default: 1)")
    parser.add_argument(
        "--forced-only", dest="free", action="store_false", help="leave out the free generation of every cache"
    )
    parser.add_argument(
        "--own-text",
        action="store_true",
        help="force caches along the passages as they go on, not a sampled text",
    )
    _add_common(parser, plot=True, texts=True)
    parser.set_defaults(run=_run_generation)


def _add_longbench(subcommands: Any) -> None:
    parser = subcommands.add_parser("longbench", help="LongBench's English tasks, where their data is present")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="with one TASK.jsonl for each task")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", default=[], help="(default: those that are there)")
    parser.add_argument("--limit", type=whole_number(1), metavar="N", help="examples of a task (default: all)")
    parser.add_argument(
        "--max-tokens", type=whole_number(4), default=8192, metavar="N", help="of a prompt (default: %(default)s)"
    )
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="LongBench's dataset2prompt.json")
    parser.add_argument("--prefill", choices=("chunk", "whole"), default="chunk", help="see retrieval")
    _add_common(parser, plot=False, texts=False)
    parser.set_defaults(run=_run_longbench)


def _add_lm_eval(subcommands: Any) -> None:
    parser = subcommands.add_parser("lm-eval", help="tasks of EleutherAI's lm-eval through a cache")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", required=True, help="names that lm-eval knows")
    parser.add_argument(
        "--include-path", type=Path, metavar="FOLDER", help="with configurations (YAML) of further tasks"
    )
    _add_caches(parser)
    parser.add_argument("--limit", type=whole_number(1), metavar="N", help="examples of a task (default: all)")
    parser.add_argument(
        "--few-shot", type=whole_number(0), metavar="N", help="examples in a prompt (default: the task's)"
    )
    parser.add_argument("--chat", action="store_true", help="use the tokenizer's chat template")
    add_counts(parser, {"--chunk": (1, 8, "tokens of a continuation that one call scores")})
    add_output(parser, plot=False)
    parser.set_defaults(run=_run_lm_eval)


# ---- running ---------------------------------------------------------------------------------------------------------


def _load(arguments: argparse.Namespace) -> tuple[Any, dict[str, Callable[[], Any]]]:
    """The model, and the makers of the caches by their texts."""
    from ..bench.machine import set_threads
    from ..models import load
    from .cache_spec import CacheDefaults, parse_caches
    from .texts import check_apart, cut_chunks, read_text

    fitted, evaluation = [read_text(source) for source in arguments.calibration_texts], _texts(arguments)
    check_apart(fitted, evaluation)
    set_threads(arguments.threads)
    loaded = load(arguments.model, dtype=arguments.dtype, attention=arguments.attention)
    chunks = [chunk.token_ids for chunk in cut_chunks(loaded.tokenizer, fitted, 4, 2048)] if fitted else []
    given = CacheDefaults(arguments.window, arguments.sinks, chunks, evaluation)
    return loaded, parse_caches(arguments.caches, loaded.model, given)


def _texts(arguments: argparse.Namespace) -> list[Any]:
    """Those of the evaluation; none for a task that brings its own."""
    from .texts import EVALUATION_TEXTS, packaged_texts, read_text

    if not hasattr(arguments, "texts"):
        return []
    return [read_text(source) for source in arguments.texts] or packaged_texts(EVALUATION_TEXTS)


def _common(arguments: argparse.Namespace) -> dict[str, Any]:
    """What records of every task must agree in, beside their options."""
    return {
        "dtype": arguments.dtype,
        "window": arguments.window,
        "sinks": arguments.sinks,
        "calibration_texts": [str(source) for source in arguments.calibration_texts],
    }


def _options(options: type, arguments: argparse.Namespace) -> Any:
    known = options.__dataclass_fields__  # type: ignore[attr-defined]
    given = {name: value for name, value in vars(arguments).items() if name in known}
    return options(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def _write(report: dict[str, Any], arguments: argparse.Namespace) -> None:
    from ..bench.machine import write_json

    if arguments.json is not None:
        write_json(report, arguments.json)


def _model_name(name: str) -> str:
    return Path(name).name


def _run_retrieval(arguments: argparse.Namespace) -> None:
    from .retrieval import KEY, RetrievalOptions, retrieval_report, retrieval_settings, run_retrieval, table
    from .task_plots import plot_retrieval
    from .task_records import RecordFile

    options: RetrievalOptions = _options(RetrievalOptions, arguments)
    text = "\n".join(x.content for x in _texts(arguments))
    loaded, caches = _load(arguments)
    name = _model_name(loaded.name)
    settings = retrieval_settings(name, options, text, **_common(arguments))
    records = RecordFile(arguments.records, settings, KEY)
    total = len(options.tasks) * len(options.lengths) * options.cases * options.depths * len(caches)
    with progress_bar(total, "answers") as report:
        found = run_retrieval(loaded.model, loaded.tokenizer, caches, options, text, records, report)
    print(table(found, options.depths))
    result = retrieval_report(found, name, options, caches=list(caches), **_common(arguments))
    _write(result, arguments)
    if arguments.plot is not None:
        plot_retrieval(result, arguments.plot)


def _run_generation(arguments: argparse.Namespace) -> None:
    from .long_generation import KEY, LongGenerationOptions, long_generation_report, run_long_generation, table
    from .task_plots import plot_generation
    from .task_records import RecordFile
    from .texts import cut_chunks

    options: LongGenerationOptions = _options(LongGenerationOptions, arguments)
    texts = _texts(arguments)
    loaded, caches = _load(arguments)
    name = _model_name(loaded.name)
    prompt_tokens, own = arguments.prompt_tokens, options.new_tokens if arguments.own_text else 0
    chunks = cut_chunks(loaded.tokenizer, texts, arguments.prompts, prompt_tokens + own)
    shared = vars(options).copy()
    for free_to_change in ("bucket", "free"):
        shared.pop(free_to_change)
    # The first cache is the reference of every record.
    settings = {"model": name, "reference": arguments.caches[0], **shared, **_common(arguments)}
    settings |= {"prompt_tokens": prompt_tokens, "texts": [text.sha256[:16] for text in texts]}
    settings |= {"own_text": True} if own else {}
    records = RecordFile(arguments.records, settings, KEY)
    prompts = [chunk.token_ids[:prompt_tokens].tolist() for chunk in chunks]
    continuations = [chunk.token_ids[prompt_tokens:].tolist() for chunk in chunks] if own else None
    forced = 2 * options.new_tokens - 1 if len(caches) > 1 else 0
    total = len(prompts) * (options.new_tokens * options.free * len(caches) + forced)
    with progress_bar(total, "tokens") as report:
        found = run_long_generation(
            loaded.model, prompts, caches, options, records, report, continuations=continuations
        )
    print(table(found, options.bucket))
    more = {"prompt_tokens": prompt_tokens, "own_text": bool(own), "prompts": [chunk.name for chunk in chunks]}
    result = long_generation_report(found, name, options, caches=list(caches), **more, **_common(arguments))
    _write(result, arguments)
    if arguments.plot is not None:
        plot_generation(result, arguments.plot)


def _run_longbench(arguments: argparse.Namespace) -> None:
    from ..bench.machine import make_report
    from .adapters.longbench import KEY, LongBenchOptions, run_longbench, summary, table
    from .task_records import RecordFile

    options: LongBenchOptions = _options(LongBenchOptions, arguments)
    prompts = json.loads(arguments.prompts.read_text(encoding="utf-8")) if arguments.prompts is not None else {}
    loaded, caches = _load(arguments)
    name = _model_name(loaded.name)
    settings = {"model": name, "max_tokens": options.max_tokens, "prefill": options.prefill, "prompts": prompts}
    records = RecordFile(arguments.records, settings | _common(arguments), KEY)
    with progress_bar(0, "examples") as report:
        found = run_longbench(loaded.model, loaded.tokenizer, caches, arguments.data, options, prompts, records, report)
    print(table(found))
    given = {**vars(options), **_common(arguments), "own_prompts": not prompts}
    _write(make_report("longbench", given, summary(found), model=name, answers=found), arguments)


def _run_lm_eval(arguments: argparse.Namespace) -> None:
    from ..bench.machine import make_report
    from .adapters.lm_eval import find_tasks, run_lm_eval, scores

    loaded, caches = _load(arguments)
    tasks = find_tasks(arguments.include_path)
    rows: list[dict[str, Any]] = []
    for spec, make in caches.items():
        results = run_lm_eval(
            loaded.model,
            loaded.tokenizer,
            make,
            arguments.tasks,
            arguments.chunk,
            task_manager=tasks,
            limit=arguments.limit,
            num_fewshot=arguments.few_shot,
            apply_chat_template=arguments.chat,
        )
        rows += [{"cache": spec, **row} for row in scores(results)]
    width = max(12, *map(len, caches)) + 2
    print(f"{'task':<24}{'figure':<28}{'cache':<{width}}{'value':>9}{'±':>9}")
    for row in sorted(rows, key=lambda row: (row["task"], row["figure"])):
        error = "–" if row["error"] is None else f"{row['error']:.4f}"
        print(f"{row['task']:<24}{row['figure']:<28}{row['cache']:<{width}}{row['value']:>9.4f}{error:>9}")
    given = {"tasks": arguments.tasks, "limit": arguments.limit, "few_shot": arguments.few_shot, **_common(arguments)}
    _write(make_report("lm-eval", given, rows, model=_model_name(loaded.name)), arguments)

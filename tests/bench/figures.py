"""Repeats the figures of docs/figures.md: runs the demo and the benchmarks one after the other, and prints their tables
in Markdown.

Is: a list of commands, and tables made from the JSON they leave. Is not: a measurement of its own. Nothing else
should run on the machine meanwhile. What is in OUT already is not run again, so an interrupted run goes on where it
stopped.

    python tests/bench/figures.py OUT                 # all of it, about an hour on two cores
    python tests/bench/figures.py OUT --only attend step
    python tests/bench/figures.py OUT --tables        # only print the tables of what is there
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

COMMANDS: dict[str, list[str]] = {
    "demo": ["demo"],
    "attend": ["bench", "attend"],
    "encode": ["bench", "encode", "--with-model"],
    "step": ["bench", "step"],
    "growth": ["bench", "growth"],
    "generate": ["bench", "generate"],
}
WITH_PLOT = ("attend", "growth", "generate")


def run(name: str, out: Path) -> None:
    """Runs one command unless its JSON is there."""
    target = out / f"{name}.json"
    if target.exists():
        print(f"{target} is there already", file=sys.stderr)
        return
    command = [sys.executable, "-m", "skvq", *COMMANDS[name], "--json", str(target)]
    if name in WITH_PLOT:
        command += ["--plot", str(out / f"{name}.png")]
    print(" ".join(command), file=sys.stderr, flush=True)
    with (out / f"{name}.txt").open("w") as log:
        subprocess.run(command, stdout=log, check=True)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, figures to the right."""
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def demo(report: dict[str, Any]) -> str:
    stock, packed = report["runs"].values()
    mebibyte = 2**20
    rows = [
        (f"cache, {stock['cache_tokens']} tokens, MiB", "cache_bytes", mebibyte, ".2f"),
        ("  per full-attention layer, MiB", "cache_bytes_per_full_layer", mebibyte, ".3f"),
        ("cache at 128K tokens, MiB", "cache_bytes_at_128k", mebibyte, ".1f"),
        ("  per full-attention layer, MiB", "cache_bytes_per_full_layer_at_128k", mebibyte, ".2f"),
        ("decode, tokens/s", "decode_tokens_per_second", 1, ".1f"),
        ("prompt, tokens/s", "prefill_tokens_per_second", 1, ".0f"),
    ]
    lines = [[label, *(format(run[key] / unit, form) for run in (stock, packed))] for label, key, unit, form in rows]
    for label, key in (("perplexity", "perplexity"), ("KL divergence", "kl_divergence"), ("top-1", "top1_agreement")):
        lines.append([label, *(f"{run['held_out'][key]:.4f}" for run in (stock, packed))])
    return table([report["model"]["name"], *report["runs"]], lines)


def attend(report: dict[str, Any]) -> str:
    rows = [
        [
            f"{row['num_key_value_heads']} / {row['num_attention_heads']}, batch {row['batch']}, {row['tokens']}",
            row["contestant"],
            f"{row['milliseconds']:.3f}",
            f"{row['times_faster_than_sdpa_bfloat16']:.1f}",
            f"{row['times_faster_than_sdpa_float32']:.1f}",
            f"{row['gigabytes_per_second']:.2f}",
            f"{row['share_of_copy_bandwidth']:.0%}",
        ]
        for row in report["rows"]
        if "skipped" not in row
    ]
    head = ["kv / query heads, tokens", "contestant", "ms", "× bf16 SDPA", "× f32 SDPA", "GB/s", "share of copy"]
    return table(head, rows)


def encode(report: dict[str, Any]) -> str:
    rows = []
    for row in report["rows"]:
        name = row["format"] + (", static" if row.get("static") else "")
        if row["kind"] == "prefill":
            rows.append(
                [f"prefill of {row['tokens']}", name, "", f"{row['append_seconds'] * 1e3:.1f} ms, {row['share']:.2%}"]
            )
        else:
            rows.append([row["kind"], name, str(row["head_dim"]), f"{row['nanoseconds_per_row']:.0f} ns/row"])
    return table(["what", "format", "head_dim", "cost"], rows)


def step(report: dict[str, Any]) -> str:
    keys = ("update_microseconds", "attention_microseconds", "kernel_microseconds", "overhead_microseconds")
    rows = [[str(row["tokens"]), *(f"{row[key]:.1f}" for key in keys)] for row in report["rows"]]
    return table(["tokens", "update, µs", "attention, µs", "kernel, µs", "beyond the kernel, µs"], rows)


def growth(report: dict[str, Any]) -> str:
    rows = [[str(row["tokens"]), f"{row['microseconds_per_append_mean']:.2f}"] for row in report["rows"][3::4]]
    memory = report["memory"]
    return table(["to tokens", "µs per append"], rows) + (
        f"\nlast quarter over first: {report['last_over_first_quarter']:.3f}; {memory}\n"
    )


def generate(report: dict[str, Any]) -> str:
    rows = []
    for row in report["rows"]:
        if "skipped" in row:
            rows.append([row["cache"], "–", "–", row["skipped"]])
            continue
        speed, size = row["decode_tokens_per_second"], row["cache_bytes_per_full_layer"] / 2**20
        rows.append([row["cache"], f"{speed:.1f}", f"{size:.3f}", ""])
    return table(["cache", "decode, tokens/s", "MiB per full-attention layer", "why not"], rows)


TABLES = {"demo": demo, "attend": attend, "encode": encode, "step": step, "growth": growth, "generate": generate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--tables", action="store_true")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.only:
        if not arguments.tables:
            run(name, arguments.out)
        path = arguments.out / f"{name}.json"
        if path.exists():
            report = json.loads(path.read_text())
            machine = report["machine"]
            print(
                f"## {name}\n\n{machine['processor']}, {machine['cores']} cores, {machine['isa']}, {machine['time']}\n"
            )
            print(TABLES[name](report))


if __name__ == "__main__":
    main()

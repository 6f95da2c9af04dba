"""What tests of attention kernels in the emulator ask of every call."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch

from kernel_examples import BLOCKS, ERROR, codec, float_mask, parts, statics

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels" / "emu"))
import harness
import pipeline
from pipeline import Call

TWO, TERNARY = codec(**statics(64)), codec("1.6", **statics(64))


def many_queries(keys: Any, values: Any, name: str, **more: Any) -> Call:
    """A call of 66 queries of a kv head."""
    return Call(keys, values, name=name, **({"group": 2, "length": 33} | more))


# Of many queries, for whichever kernels take them.
MANY_CALLS = [
    many_queries(codec(head_dim=128), codec("1.6", 128), "128, 140 queries", group=4, length=35, packed=200),
    many_queries(
        parts(64, 1),
        parts(96, 0, turning=False, noise=False),
        "parts, turning, causal into the past",
        packed=300,
        causal=True,
        window=9,
    ),
    many_queries(
        parts(128, 1, turning=False), parts(128, 0, turning=False, noise=False), "parts, 128", kv_heads=2, packed=150
    ),
    many_queries(
        parts(64, 1),
        TWO,
        "turned, mask, softcap, bfloat16",
        packed=290,
        softcap=6.0,
        mask=float_mask(1, 4, 33, 315),
        dtype=torch.bfloat16,
    ),
    many_queries(TWO, parts(96, 0, turning=False, noise=False, codebook="uniform"), "even values, 96", packed=290),
    many_queries(codec(**BLOCKS), codec("1.6", **BLOCKS), "blocks", packed=300, dtype=torch.bfloat16),
    many_queries(codec("1.5", 80), codec("1.5", 80), "pairs, 80", packed=129, length=8, group=1),
    many_queries(
        codec("4", 96, symmetric=False, metadata="fp16"),
        codec("2", 96, symmetric=False, metadata="fp16", group_size=32),
        "4, zeros",
    ),
    many_queries(codec("8", 64, symmetric=False, group_size=64), codec("8", 64, metadata="fp16"), "8", packed=140),
    many_queries(codec("2", 192), codec("1.6", 192), "192", packed=140),
    many_queries(codec("2", 192), codec("1.6", 112), "widths differ", kv_heads=1, packed=70),
    many_queries(TWO, TWO, "softcap", softcap=7.0, packed=130, length=9),
    many_queries(TWO, TWO, "padding", batch=2, paddings=(0, 100), window=30, packed=200),
    many_queries(TWO, TWO, "padding, mask", batch=2, paddings=(210, 7), mask=float_mask(2, 1, 33, 225), packed=200),
    many_queries(TWO, TWO, "boolean mask", mask=float_mask(1, 4, 33, 175) > 0.0),
    many_queries(TWO, TWO, "nothing seen", mask=torch.zeros(1, 1, 1, 175, dtype=torch.bool)),
]


def check(call: Call, kernels: harness.Kernels) -> torch.Tensor:
    """Runs a call and compares it with float64."""
    rows = pipeline.make_rows(call)
    found, exact = pipeline.run(call, rows, kernels), pipeline.expected(call, rows)
    largest = max(1.0, float(exact.abs().max()))
    error = float((found.double() - exact).abs().max()) / largest
    assert error <= ERROR[call.dtype], f"error {error:.2e}"
    return found


def check_order(call: Call, schedule: str, kernels: harness.Kernels) -> None:
    """The order in which threads run changes no bit."""
    rows = pipeline.make_rows(call)
    first = pipeline.run(call, rows, kernels)
    assert torch.equal(first, pipeline.run(dataclasses.replace(call, schedule=schedule), rows, kernels))

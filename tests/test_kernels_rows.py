"""Many queries over rows in the model's type, and over a past that is unpacked for them, against float64.

All formats, head sizes, transforms with and without a mean that turns, masks, padding, pieces of the past, ragged
numbers of queries and rows, and the order in which threads run.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from pathlib import Path

import pytest
import torch

from attention_checks import MANY_CALLS, TERNARY, TWO, check, check_order, many_queries
from kernel_examples import BLOCKS, codec, float_mask, parts

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels" / "emu"))
import harness
import pipeline
from pipeline import Call

pytestmark = pytest.mark.skipif(harness.compiler() is None, reason="no C++ compiler")

call = functools.partial(many_queries, pieces=128)


CALLS = [
    call(TWO, TERNARY, "2 and ternary", packed=300, pieces=256),
    call(parts(80, 1, codebook="uniform"), TERNARY, "even parts, 80, turning", packed=300, dtype=torch.bfloat16),
    call(parts(128, 1, codebook="uniform"), TWO, "even parts, 128", packed=290, kv_heads=2),
    call(
        parts(112, 0, codebook="uniform"),
        codec("1.6", 112),
        "turned, padding",
        batch=2,
        paddings=(0, 330),
        packed=700,
        pieces=384,
    ),
    call(codec(rotation="hadamard", **BLOCKS), codec(rotation="hadamard"), "blocks, rotated", packed=400, pieces=256),
    call(codec(head_dim=96, rotation="hadamard"), codec("4", 96, rotation="hadamard"), "rotated, 96", packed=129),
    call(codec("3", group_size=32), codec("3", group_size=32), "3, groups of 32", packed=17),
    call(codec("2", 256, rotation="hadamard"), codec("1.6", 256), "256", packed=200, length=7, window=40),
    call(
        parts(256, 0),
        parts(256, 1, turning=False, noise=False),
        "parts, 256, turning",
        packed=300,
        causal=True,
        window=5,
    ),
    call(codec("2", 208), codec("2", 160), "208 and 160", packed=150, length=40, group=3),
    call(TWO, TWO, "a causal mask", mask=torch.ones(1, 1, 33, 315, dtype=torch.bool).tril(282), packed=290),
    call(
        TWO,
        TWO,
        "a causal mask of the lowest numbers",
        mask=torch.zeros(1, 1, 33, 315).masked_fill(~torch.ones(33, 315, dtype=torch.bool).tril(282), -3.4028234e38),
        packed=290,
    ),
    call(TWO, TWO, "all are lowered", mask=torch.full((1, 1, 1, 175), -65504.0, dtype=torch.float16)),
    call(TWO, TWO, "all are lowered, float32", mask=torch.full((1, 1, 1, 175), -3.4028234e38)),
    call(TWO, TWO, "mask of f16", mask=float_mask(1, 1, 33, 315, dtype=torch.float16), packed=290),
    call(TWO, TWO, "sink logits", sink_logits=torch.randn(4, generator=torch.Generator().manual_seed(2))),
    call(TWO, codec("4"), "rising", packed=700, pieces=256, rising=2.0),
    call(TWO, TWO, "window alone", packed=128, window=150, sinks=70, causal=True, length=100),
    *(dataclasses.replace(call, pieces=128) for call in MANY_CALLS),
]
MASKED = next(call for call in CALLS if call.name == "boolean mask")


@pytest.fixture(scope="module")
def kernels() -> harness.Kernels:
    return harness.Kernels([name for call in CALLS for name in call.instances()], pipeline.HEADERS)


@pytest.mark.parametrize("call", CALLS, ids=[call.name for call in CALLS])
def test_attention_of_many_queries(call: Call, kernels: harness.Kernels) -> None:
    found = check(call, kernels)
    if call.name == "nothing seen":
        assert not found.any()


@pytest.mark.parametrize("schedule", ["reverse", "random:7"])
def test_order_of_threads_changes_nothing(schedule: str, kernels: harness.Kernels) -> None:
    for call in (CALLS[0], MASKED, next(call for call in CALLS if call.name == "192")):
        check_order(call, schedule, kernels)


def test_packed_rows_that_are_not_numbers_reach_only_who_sees_them(kernels: harness.Kernels) -> None:
    rows = pipeline.make_rows(MASKED)
    before = pipeline.run(MASKED, rows, kernels)
    for packed in (rows.key_bytes, rows.value_bytes):
        kept = packed[:, 0, 70].clone()
        packed[:, 0, 70, -1:] = 0x7F
        found = pipeline.run(MASKED, rows, kernels)
        packed[:, 0, 70] = kept
        check_spoilt(found, before, MASKED.sinks + 70)


@pytest.mark.parametrize(("side", "number"), [("keys", math.nan), ("values", math.nan), ("values", math.inf)])
def test_rows_of_the_window_that_are_not_numbers_reach_only_who_sees_them(
    side: str, number: float, kernels: harness.Kernels
) -> None:
    rows = pipeline.make_rows(MASKED)
    before = pipeline.run(MASKED, rows, kernels)
    getattr(rows, side)[:, 0, -4, 3] = number
    found = pipeline.run(MASKED, rows, kernels)
    check_spoilt(found, before, MASKED.total - 4)


def test_weights_beside_a_large_one_are_not_lost(kernels: harness.Kernels) -> None:
    call = Call(TWO, TERNARY, pieces=128, window=300, packed=10)
    rows = pipeline.make_rows(call)
    # All but the sink have 2^-22 of its weight, and values for it.
    rows.query[:] = 1.0
    rows.keys[:, :, 0], rows.keys[:, :, 1:] = 15.0 / 8.0, 0.0
    rows.values[:, :, -call.window :] += 6000.0
    exact = pipeline.expected(call, rows)
    found = pipeline.run(call, rows, kernels).double()
    assert float((found - exact).abs().max()) < 2e-3 * float(exact.abs().max())
    assert float((exact - rows.values[:, :, :1]).abs().max()) > 0.05  # what would be missing


def check_spoilt(found: torch.Tensor, before: torch.Tensor, token: int) -> None:
    """Outputs of the first kv head are spoilt where the mask shows the token, all others are as before."""
    assert MASKED.mask is not None
    broken = MASKED.mask[0, :, :, token] & (torch.arange(4) < MASKED.group)[:, None]
    assert torch.equal(found[0].isnan().all(-1), broken)
    assert broken.any()
    assert torch.equal(found[0][~broken], before[0][~broken])

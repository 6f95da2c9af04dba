"""The kernel of many queries in the host emulator against float64 attention over what skvq.reference reads back.

Ragged numbers of queries and rows, all formats, masks, padding, block statistics, parts with a mean that turns, and the
order in which threads run.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path

import pytest
import torch

from attention_checks import MANY_CALLS, TERNARY, TWO, check, check_order, many_queries
from kernel_examples import codec, parts

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels" / "emu"))
import harness
import pipeline
from pipeline import Call

pytestmark = pytest.mark.skipif(harness.compiler() is None, reason="no C++ compiler")

call = functools.partial(many_queries, many=True)


CALLS = [
    call(TWO, TERNARY, "2 and ternary", packed=300, pages_per_split=2),
    call(parts(80, 1, codebook="uniform"), TERNARY, "even parts, 80, turning", packed=300),
    call(parts(128, 1, codebook="uniform"), TWO, "even parts, 128", packed=290, kv_heads=2, dtype=torch.float32),
    call(
        parts(112, 0, codebook="uniform"),
        codec("1.6", 112),
        "turned, padding, a page's second half",
        batch=2,
        paddings=(0, 330),
        packed=700,
        pages_per_split=3,
    ),
    call(parts(128, 0), codec("2", 160), "turned, one buffer", packed=500, pages_per_split=2),
    call(parts(128, 0), TWO, "a launch before, float32", packed=200, dtype=torch.float32),
    call(codec("3", group_size=32), codec("3", group_size=32), "3, groups of 32", packed=17, dtype=torch.float32),
    call(codec("2", 192, group_size=64), codec("2", 160), "192, groups", packed=200, length=7),
    call(TWO, codec("4"), "rising", packed=700, pages_per_split=9, rising=2.0),
    *(dataclasses.replace(call, many=True) for call in MANY_CALLS),
]


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
    for call in (CALLS[0], next(call for call in CALLS if call.name == "192")):
        check_order(call, schedule, kernels)


def test_a_row_that_is_not_a_number_reaches_only_who_sees_it(kernels: harness.Kernels) -> None:
    call = next(call for call in CALLS if call.name == "boolean mask")
    assert call.mask is not None
    rows = pipeline.make_rows(call)
    before = pipeline.run(call, rows, kernels)
    seen = call.mask[0, :, :, call.sinks + 70]
    for packed in (rows.key_bytes, rows.value_bytes):
        kept = packed[:, 0, 70].clone()
        packed[:, 0, 70, -1:] = 0x7F
        found = pipeline.run(call, rows, kernels)
        packed[:, 0, 70] = kept
        broken = seen & (torch.arange(4) < call.group)[:, None]
        assert torch.equal(found[0].isnan().all(-1), broken)
        assert broken.any()
        assert torch.equal(found[0][~broken], before[0][~broken])

"""The kernel of many queries in the host emulator against float64 attention over what skvq.reference reads back.

Ragged numbers of queries and rows, all formats, masks, padding, block statistics, parts with a mean that turns, and the
order in which threads run.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from attention_checks import check, check_order
from kernel_examples import BLOCKS, codec, float_mask, parts, statics

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels" / "emu"))
import harness
import pipeline
from pipeline import Call

pytestmark = pytest.mark.skipif(harness.compiler() is None, reason="no C++ compiler")

TWO, TERNARY = codec(**statics(64)), codec("1.6", **statics(64))


def call(keys: Any, values: Any, name: str, **more: Any) -> Call:
    return Call(keys, values, many=True, name=name, **({"group": 2, "length": 33} | more))


CALLS = [
    call(TWO, TERNARY, "2 and ternary", packed=300, pages_per_split=2),
    call(codec(head_dim=128), codec("1.6", 128), "128, 140 queries", group=4, length=35, packed=200),
    call(
        parts(64, 1),
        parts(96, 0, turning=False, noise=False),
        "parts, turning, causal into the past",
        packed=300,
        causal=True,
        window=9,
    ),
    call(parts(128, 1, turning=False), parts(128, 0, turning=False, noise=False), "parts, 128", kv_heads=2, packed=150),
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
    call(
        parts(64, 1),
        TWO,
        "turned, mask, softcap, bfloat16",
        packed=290,
        softcap=6.0,
        mask=float_mask(1, 4, 33, 315),
        dtype=torch.bfloat16,
    ),
    call(parts(128, 0), codec("2", 160), "turned, one buffer", packed=500, pages_per_split=2),
    call(parts(128, 0), TWO, "a launch before, float32", packed=200, dtype=torch.float32),
    call(TWO, parts(96, 0, turning=False, noise=False, codebook="uniform"), "even values, 96", packed=290),
    call(codec(**BLOCKS), codec("1.6", **BLOCKS), "blocks", packed=300, dtype=torch.bfloat16),
    call(codec("3", group_size=32), codec("3", group_size=32), "3, groups of 32", packed=17, dtype=torch.float32),
    call(codec("1.5", 80), codec("1.5", 80), "pairs, 80", packed=129, length=8, group=1),
    call(
        codec("4", 96, symmetric=False, metadata="fp16"),
        codec("2", 96, symmetric=False, metadata="fp16", group_size=32),
        "4, zeros",
    ),
    call(codec("8", 64, symmetric=False, group_size=64), codec("8", 64, metadata="fp16"), "8", packed=140),
    call(codec("2", 192), codec("1.6", 192), "192", packed=140),
    call(codec("2", 192, group_size=64), codec("2", 160), "192, groups", packed=200, length=7),
    call(codec("2", 192), codec("1.6", 112), "widths differ", kv_heads=1, packed=70),
    call(TWO, TWO, "softcap", softcap=7.0, packed=130, length=9),
    call(TWO, TWO, "padding", batch=2, paddings=(0, 100), window=30, packed=200),
    call(TWO, TWO, "padding, mask", batch=2, paddings=(210, 7), mask=float_mask(2, 1, 33, 225), packed=200),
    call(TWO, TWO, "boolean mask", mask=float_mask(1, 4, 33, 175) > 0.0),
    call(TWO, TWO, "nothing seen", mask=torch.zeros(1, 1, 1, 175, dtype=torch.bool)),
    call(TWO, codec("4"), "rising", packed=700, pages_per_split=9, rising=2.0),
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

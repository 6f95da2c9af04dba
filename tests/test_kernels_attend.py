"""Attention kernels in the host emulator against float64 attention over what skvq.reference reads back.

Ragged lengths, all formats, grouped queries, masks, padding, block statistics, parts with a mean that turns, and the
order in which threads run.
"""

from __future__ import annotations

import dataclasses
import functools
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
from harness import strides
from pipeline import Call

pytestmark = pytest.mark.skipif(harness.compiler() is None, reason="no C++ compiler")

TWO = codec()
PLAIN_VALUES = {"turning": False, "noise": False}
LEVEL = {"codebook": "uniform"}
UNEVEN, EVEN, LEVELS = [-1.25, 0.25, 1.0], [-1.0, 0.25, 1.5], [-2.0, -0.25, 0.5, 1.75]
CALLS = [
    Call(codec(head_dim=128), codec("1.6", 128), group=4, name="2 and ternary, 128"),
    Call(parts(128, 1), parts(128, 0, turning=False, noise=False), group=8, packed=300, name="parts, turning, 128"),
    Call(parts(128, 1), TWO, group=4, packed=300, name="parts, turning, four queries"),
    Call(parts(64, 1), TWO, dtype=torch.bfloat16, group=2, length=3, packed=400, name="parts, turning, six queries"),
    Call(parts(64, 1, turning=False), parts(96, 0, turning=False, noise=False), group=3, name="parts, 64 and 96"),
    Call(parts(256, 1, turning=False), parts(80, 0, turning=False, noise=False), packed=40, name="parts, 256 and 80"),
    Call(codec(codebook="lloyd-max"), TWO, group=4, packed=300, name="2, levels looked up"),
    # Evenly spaced: products of bytes, of an even and an odd number of tiles, of more than there are registers for.
    Call(parts(128, 1, **LEVEL), codec("1.6", 128), group=8, packed=300, name="even parts, 128"),
    Call(
        parts(128, 0, **LEVEL),
        TWO,
        dtype=torch.bfloat16,
        group=4,
        packed=300,
        name="even parts and channels without codes",
    ),
    Call(
        parts(80, 0, **LEVEL),
        codec("1.6", 80, codebook=UNEVEN),
        group=2,
        length=3,
        packed=400,
        name="even parts, uneven values",
    ),
    Call(
        parts(192, 0, **LEVEL),
        codec("2", 192),
        dtype=torch.float32,
        group=3,
        packed=190,
        name="even parts, 192, float32",
    ),
    Call(
        parts(256, 0, turning=False, **LEVEL),
        parts(80, 0, turning=False, noise=False, **LEVEL),
        packed=40,
        name="even parts, 256 and 80",
    ),
    Call(TWO, parts(128, 1, **PLAIN_VALUES, **LEVEL), group=4, packed=300, name="even values, 128"),
    Call(codec("1.5", 80), parts(80, 0, **PLAIN_VALUES, **LEVEL), packed=150, name="even values, 80"),
    Call(
        TWO,
        parts(96, 0, **PLAIN_VALUES, **LEVEL),
        group=16,
        tiles=2,
        packed=290,
        rising=2.0,
        name="even values, two tiles",
    ),
    Call(
        TWO, parts(192, 0, **PLAIN_VALUES, **LEVEL), dtype=torch.float32, packed=190, name="even values, 192, float32"
    ),
    Call(parts(96, 0, **LEVEL), TWO, group=16, tiles=2, packed=290, name="even parts, two tiles"),
    Call(parts(192, 1, **LEVEL), TWO, group=12, tiles=2, packed=290, name="even parts, two wide tiles"),
    Call(codec(head_dim=96), codec("1.6", 96), group=4, packed=300, name="2 and ternary, a word alone"),
    Call(codec(head_dim=32), codec(head_dim=32), group=2, packed=300, name="2, one word"),
    Call(TWO, TWO, dtype=torch.bfloat16, batch=2, group=8, packed=333, pages_per_split=2, name="2, batch, bfloat16"),
    Call(
        codec(**statics(64)), codec(**statics(64)), dtype=torch.float32, group=2, length=2, name="2, statics, float32"
    ),
    Call(codec(**BLOCKS), codec("1.6", **BLOCKS), group=2, packed=300, name="blocks"),
    Call(codec("3", group_size=32), codec("3", group_size=32), group=1, packed=17, name="3, groups of 32"),
    Call(codec("1.5", 80), codec("1.5", 80), group=4, packed=1, name="pairs, 80"),
    Call(codec("1.5", 64, group_size=32), codec("1.5", 64, group_size=32), packed=129, name="pairs, groups of 32"),
    Call(
        codec("4", 96, symmetric=False, metadata="fp16"),
        codec("2", 96, symmetric=False, metadata="fp16", group_size=32),
        name="4, zeros",
    ),
    Call(codec("8", 64, symmetric=False, group_size=64), codec("8", 64, metadata="fp16"), packed=40, name="8"),
    Call(codec("1.6", 112), codec("4", 112), group=5, packed=33, name="112"),
    Call(codec("2", 192), codec("1.6", 192), group=16, tiles=2, packed=140, name="192, two tiles"),
    Call(codec("2", 256), codec("2", 256), group=8, packed=48, name="256"),
    Call(codec("2", 192), codec("1.6", 128), kv_heads=1, group=2, packed=16, name="widths differ"),
    Call(TWO, TWO, group=4, length=5, causal=True, softcap=7.0, window=3, name="causal, softcap, 20 queries"),
    Call(TWO, TWO, group=4, length=4, tiles=2, causal=True, window=0, sinks=1, name="causal into the past, no window"),
    Call(TWO, TWO, batch=2, paddings=(0, 100), window=30, packed=200, group=2, name="padding"),
    Call(
        TWO, TWO, batch=2, paddings=(210, 7), mask=float_mask(2, 1, 1, 225), packed=200, group=2, name="padding, mask"
    ),
    Call(TWO, TWO, mask=float_mask(1, 4, 3, 175, dtype=torch.bfloat16), group=2, length=3, name="bfloat16 mask"),
    Call(TWO, TWO, mask=float_mask(1, 1, 1, 175) > 0.0, name="boolean mask"),
    Call(TWO, TWO, mask=torch.zeros(1, 1, 1, 175, dtype=torch.bool), name="nothing seen"),
    Call(
        TWO,
        TWO,
        batch=2,
        paddings=(0, 150),
        mask=torch.arange(725) >= torch.tensor([0, 150])[:, None, None, None],
        packed=700,
        pages_per_split=2,
        group=2,
        name="a mask of padding",
    ),
    Call(
        TWO,
        codec("1.6"),
        mask=torch.zeros(1, 1, 3, 625).masked_fill(torch.ones(3, 625).triu(623) > 0, -torch.inf),
        packed=600,
        group=2,
        length=3,
        name="a causal mask",
    ),
    Call(
        TWO,
        TWO,
        batch=2,
        mask=torch.arange(625)[None, None, None] != torch.tensor([600, 301])[:, None, None, None],
        packed=600,
        group=2,
        name="a mask that hides a row of one sequence",
    ),
    Call(TWO, TWO, sink_logits=torch.tensor([0.5, -1.0, 2.0, 0.0]), group=2, name="sink logits"),
    Call(TWO, TWO, sinks=0, window=0, packed=256, name="packed rows only"),
    Call(
        codec(head_dim=128),
        codec("1.6", 128),
        group=8,
        packed=1000,
        pages_per_split=7,
        rising=2.0,
        name="rising, ternary",
    ),
    Call(TWO, codec("4"), group=8, packed=700, pages_per_split=9, rising=2.0, name="rising, 4"),
    Call(TWO, TWO, batch=2, packed=700, pages_per_split=2, long_splits=2, group=2, name="splits of two lengths"),
    Call(
        codec("8"), codec("8"), group=16, tiles=2, packed=650, pages_per_split=9, rising=1.0, name="rising, two tiles"
    ),
    Call(TWO, codec("1.6", 80, codebook=UNEVEN), packed=290, pages_per_split=2, name="uneven ternary levels"),
    Call(TWO, codec("1.6", 64, codebook=EVEN), packed=290, pages_per_split=2, name="even ternary levels about 0.25"),
    Call(codec(codebook=LEVELS), codec(codebook=LEVELS), packed=290, name="levels without symmetry"),
    Call(TWO, codec("1.6", 64, symmetric=False, group_size=32), packed=290, name="ternary with zeros, groups"),
    Call(TWO, codec("1.6", 64, symmetric=False), packed=290, name="ternary with zeros"),
]
# Each warp with a split of its own: as many as warps, some more, none that are whole.
APART = [
    Call(codec(**BLOCKS), codec("1.6", **BLOCKS), group=2, packed=1300, name="blocks"),
    Call(codec(head_dim=128), codec("1.6", 128), batch=2, group=4, packed=512, name="2 and ternary, 128"),
    Call(TWO, codec("4"), group=8, packed=700, rising=2.0, name="rising, 4"),
    Call(parts(128, 1), parts(128, 0, turning=False, noise=False), group=8, packed=300, name="parts, turning"),
    Call(
        parts(64, 1, **LEVEL), parts(64, 0, turning=False, noise=False), group=8, packed=600, name="even parts, turning"
    ),
    Call(codec("8", 64, symmetric=False, group_size=64), codec("8", 64, metadata="fp16"), packed=600, name="8"),
    Call(TWO, TWO, group=4, length=4, tiles=2, causal=True, softcap=7.0, packed=290, name="causal, softcap, two tiles"),
    Call(TWO, TWO, batch=2, paddings=(0, 100), window=30, packed=600, group=2, name="padding"),
    Call(TWO, TWO, mask=torch.arange(625)[None, None, None] != 620, packed=600, name="a mask that hides no packed row"),
]
APART = [dataclasses.replace(call, apart=True, name=f"apart: {call.name}") for call in APART]
# One launch, where a tile has all queries of a kv head.
ONCE = [
    dataclasses.replace(call, once=True, name=f"once: {call.name}")
    for call in CALLS
    if call.tiles == 1 and call.group * call.length <= 8
]
MANY_BLOCKS = codec(**BLOCKS)
ONCE.append(
    Call(MANY_BLOCKS, MANY_BLOCKS, group=8, packed=900, paddings=(300,), once=True, name="once: many blocks, padding")
)
# The mean turns in that launch, page by page.
ONCE += [
    Call(parts(128, 0), codec("1.6", 128), group=4, packed=1000, pages_per_split=4, once=True, name="turned, ternary"),
    Call(
        parts(64, 1), parts(64, 0, **PLAIN_VALUES), packed=390, pages_per_split=2, once=True, name="turned, one query"
    ),
    Call(
        parts(80, 1), codec("2", 80), dtype=torch.bfloat16, group=3, packed=450, once=True, name="turned, 80, bfloat16"
    ),
    Call(
        parts(96, 0),
        parts(96, 0, **PLAIN_VALUES),
        batch=2,
        paddings=(0, 270),
        group=5,
        packed=650,
        pages_per_split=3,
        once=True,
        name="turned, 96, padding",
    ),
    Call(
        parts(128, 1), TWO, group=2, length=3, causal=True, softcap=5.0, packed=290, once=True, name="turned, softcap"
    ),
    Call(
        parts(128, 1, **LEVEL),
        codec("1.6", 128),
        group=4,
        packed=1000,
        pages_per_split=4,
        once=True,
        name="turned, even parts",
    ),
    Call(
        parts(64, 1, **LEVEL),
        TWO,
        dtype=torch.bfloat16,
        batch=2,
        paddings=(0, 270),
        packed=650,
        once=True,
        name="turned, even parts, padding",
    ),
    Call(
        parts(112, 0, **LEVEL),
        codec("1.6", 112),
        group=2,
        length=3,
        causal=True,
        softcap=5.0,
        packed=290,
        once=True,
        name="turned, even parts, softcap",
    ),
    Call(
        parts(64, 1, **LEVEL),
        TWO,
        batch=2,
        paddings=(0, 270),
        mask=torch.arange(675) >= torch.tensor([0, 270])[:, None, None, None],
        packed=650,
        once=True,
        name="turned, a mask of padding",
    ),
    Call(parts(112, 0), TWO, dtype=torch.float32, group=2, packed=390, once=True, name="a launch before, float32"),
    Call(parts(192, 0), codec("2", 192), group=2, packed=290, once=True, name="a launch before, 192"),
    Call(TWO, codec("1.6", 64), group=5, packed=1300, once=True, merges=False, name="once: a launch that merges"),
]
CALLS += APART + ONCE


@pytest.fixture(scope="module")
def kernels() -> harness.Kernels:
    return harness.Kernels([name for call in CALLS for name in call.instances()], pipeline.HEADERS)


@pytest.mark.parametrize("call", CALLS, ids=[call.name for call in CALLS])
def test_attention_over_packed_rows(call: Call, kernels: harness.Kernels) -> None:
    found = check(call, kernels)
    if call.name == "nothing seen":
        assert not found.any()


@pytest.mark.parametrize("name", ["2, statics, float32", "blocks", "112", "causal, softcap, 20 queries"])
def test_queries_that_do_not_exist_are_neither_written_nor_read(
    name: str, kernels: harness.Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = next(call for call in CALLS if call.name == name)
    made: list[torch.Tensor] = []

    def aligned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        made.append(harness.aligned(*shape, dtype=dtype))
        return made[-1]

    rows = pipeline.make_rows(call)
    monkeypatch.setattr(pipeline, "aligned", aligned)
    found = pipeline.run(call, rows, kernels)
    assert found.isfinite().all()
    folded, extras = made[:2]
    # Of each word or pair of octets, four lanes a query.
    registers = 4 if call.as_bytes else 2
    of_query = folded.unflatten(-1, (-1, 8, 4 * registers)).transpose(4, 5).flatten(3, 4)
    queries = call.group * call.length
    # Threads go by pairs of queries of the fullest tile, and write zeros where there is no query for them.
    of_tile = min(8, queries + queries % 2)
    place, of_extras = torch.arange(call.query_tiles * 8), extras.flatten(3, 4)
    nobodys, zeros = place % 8 >= of_tile, (place >= queries) & (place % 8 < of_tile)
    assert call.query_tiles * 8 > queries
    # What nobody has written is ones in all bits: not a number.
    assert of_query[:, :, :, nobodys].eq(-1).all()
    assert of_extras[:, :, :, nobodys].isnan().all()
    assert not of_query[:, :, :, zeros].any()
    assert of_extras[:, :, :, zeros][..., 0].eq(1.0).all()
    assert not of_extras[:, :, :, zeros][..., 1:].any()
    assert of_query[:, :, :, :queries].flatten(4).any(-1).all()
    assert of_extras[:, :, :, :queries].isfinite().all()


def launch_by_name(kernels: harness.Kernels, name: str, *arguments: Any) -> None:
    kernels.launch(f"skvq::{name}", *arguments)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float16, torch.bfloat16])
def test_masks_that_show_all_packed_rows_are_known(dtype: torch.dtype, kernels: harness.Kernels) -> None:
    """Hidden tokens at every place where loads of sixteen bytes begin and end, of rows that begin anywhere."""
    hidden = [5, 6, 20, 21, 22, 23, 300, 301, 302, 303, 304, 4, 305, 1000]
    shown = torch.ones(len(hidden), 1, 2, 333, dtype=torch.bool)
    for row, token in enumerate(hidden[:-1]):
        shown[row, 0, 1, token] = False
    mask = shown if dtype == torch.bool else torch.zeros(shown.shape).masked_fill(~shown, -1.0).to(dtype)
    call = Call(TWO, TWO, batch=len(hidden), kv_heads=1, length=2, packed=300, window=28, mask=mask)
    fields = strides(mask.expand(-1, call.kv_heads, -1, -1), "batch_stride head_stride position_stride")
    kinds = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3, torch.bool: 4}
    arguments = harness.params("MaskParams", mask=mask, kind=kinds[dtype], **fields)
    lengths = torch.tensor([300, 5, 28, 0], dtype=torch.int32)
    launch = functools.partial(launch_by_name, kernels)
    found = pipeline.reach_of(call, arguments, lengths, kernels, launch)[..., 0]
    assert found[:, 0, 0].all()
    assert found[:, 0, 1].tolist() == [int(not 5 <= token < 305) for token in hidden]


@pytest.mark.parametrize(
    "name", ["a causal mask", "apart: a mask that hides no packed row", "turned, a mask of padding"]
)
def test_a_mask_that_shows_all_packed_rows_is_read_no_more(
    name: str, kernels: harness.Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = next(call for call in CALLS if call.name == name)
    rows = pipeline.make_rows(call)
    before, find = pipeline.run(call, rows, kernels), pipeline.reach_of
    assert call.mask is not None
    mask = call.mask.clone()
    mask[..., 395:505] = False if mask.dtype == torch.bool else -1.0  # in a page of which all is seen
    hiding = dataclasses.replace(call, mask=mask)
    assert not torch.equal(pipeline.run(hiding, rows, kernels), before)
    monkeypatch.setattr(pipeline, "reach_of", lambda *arguments: find(*arguments).fill_(1))
    assert torch.equal(pipeline.run(hiding, rows, kernels), before)


@pytest.mark.parametrize("schedule", ["reverse", "random:7"])
def test_order_of_threads_changes_nothing(schedule: str, kernels: harness.Kernels) -> None:
    for call in (*CALLS[:2], APART[1], *ONCE[:2]):
        check_order(call, schedule, kernels)


def test_a_row_that_is_not_a_number_reaches_only_who_sees_it(kernels: harness.Kernels) -> None:
    call = next(call for call in CALLS if call.name == "boolean mask")
    assert call.mask is not None
    rows = pipeline.make_rows(call)
    hidden = int((~call.mask[0, 0, 0, 5:150]).nonzero()[0])
    seen = int(call.mask[0, 0, 0, 5:150].nonzero()[0])
    before = pipeline.run(call, rows, kernels)
    for where, spreads in ((hidden, False), (seen, True)):
        for packed in (rows.key_bytes, rows.value_bytes):
            kept = packed[:, 0, where].clone()
            packed[:, 0, where, -1:] = 0x7F
            found = pipeline.run(call, rows, kernels)
            packed[:, 0, where] = kept
            assert bool(found[:, 0].isnan().all()) == spreads
            assert torch.equal(found[:, 1], before[:, 1])
            assert spreads or torch.equal(found, before)


@pytest.mark.parametrize("stream", ["key_bytes", "value_bytes"])
def test_a_row_that_is_not_a_number_reaches_those_who_see_whole_pages(stream: str, kernels: harness.Kernels) -> None:
    call = next(call for call in CALLS if call.name == "rising, ternary")
    rows = pipeline.make_rows(call)
    before = pipeline.run(call, rows, kernels)
    packed = getattr(rows, stream)
    packed[:, 0, 200, -1:] = 0x7F
    found = pipeline.run(call, rows, kernels)
    assert found[:, : call.group].isnan().all()
    assert torch.equal(found[:, call.group :], before[:, call.group :])


@pytest.mark.parametrize("values", ["1.6", "2"])
def test_rounded_levels_leave_outputs_as_they_are(values: str) -> None:
    # All levels of a codebook that f16 makes larger would make every output larger by as much, 3e-4 of it.
    call = Call(
        codec(head_dim=128),
        codec(values, 128),
        dtype=torch.float32,
        group=4,
        packed=600,
        pages_per_split=4,
        name=values,
    )
    rows = pipeline.make_rows(call)
    kernels = harness.Kernels(call.instances(), pipeline.HEADERS)
    found, exact = pipeline.run(call, rows, kernels), pipeline.expected(call, rows)
    assert float((found.double() - exact).norm() / exact.norm()) <= 1e-4

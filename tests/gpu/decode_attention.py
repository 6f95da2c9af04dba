"""Decode attention by kernels: fold, turning, attend, unfold, plain, merge, or attend_once in place of all or most of
them, with arguments prepared once.

Is: a step that is launches alone and can be captured in a graph. Is not: an oracle, nor the cache's own backend.
Shapes: query and output [B, H·group, L, D]; pages as in machine.py.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels" / "emu"))
from harness import PAGE_ROWS, Structure, level_table, params, strides
from machine import Machine, Statistics, instance_of, transform_fields
from pipeline import MOST_SPLITS_PER_STATE, TURNING_THREADS, Call, plain_region, plain_regions, wave_fields

from skvq.reference import ReferenceCodec

WINDOW_ROWS_PER_SPLIT = 32
WEIGHT_UNIT = 4.0


@dataclass
class Past:
    """What a decode step attends to. Tensors on the device.

    Attributes:
        key_table: pages of keys [B, H, capacity]; likewise value_table.
        sinks: rows [B, H, n, D] of keys, then of values.
        window: likewise.
        key_statistics: of blocks [B, H, blocks, D]; likewise value_statistics.
        pools: memory of the pages, kept alive.
    """

    key_table: Tensor
    value_table: Tensor
    sinks: Statistics
    window: Statistics
    key_statistics: Statistics | None = None
    value_statistics: Statistics | None = None
    pools: tuple[Tensor, ...] = ()


@dataclass
class Launch:
    """One prepared launch."""

    kernel: str
    grid: tuple[int, ...]
    arguments: bytes
    kept: Structure = field(repr=False)
    threads: int = 128
    shared_bytes: int = 0

    @property
    def stage(self) -> str:
        """The kernel's name."""
        return instance_of(self.kernel).kernel.removeprefix("skvq::")


def default_splits_per_state(call: Call, splits: int) -> int:
    """How many splits become one state: few where each has a transform to undo, about as many as states else."""
    if call.once:
        return 1
    blocks = call.keys.block or call.values.block
    return 2 if blocks else min(MOST_SPLITS_PER_STATE, math.isqrt(max(1, splits - 1)) + 1)


class DecodeAttention:
    """The launches of one attention call over a `Past`, with workspaces of their own.

    `query`, `lengths` and `output` may be written or read between runs; everything else is fixed, as a captured graph
    has it. `lengths` is {packed, sinks, window, 0} rows, at most those of the call.
    """

    def __init__(
        self, machine: Machine, call: Call, past: Past, query: Tensor, splits_per_state: int | None = None
    ) -> None:
        self.machine, self.call, self.past = machine, call, past
        self.query = query.contiguous()
        self.launches: list[Launch] = []
        self.lengths = machine.put(torch.tensor([call.packed, call.sinks, call.window, 0], dtype=torch.int32))
        self._shape = {"kv_heads": call.kv_heads, "group": call.group, "length": call.length}
        self._shape |= {"query_tiles": call.query_tiles}
        self._tiles = call.kv_heads * call.query_tiles
        self.splits = call.splits
        self.splits_per_state = splits_per_state or default_splits_per_state(call, self.splits)
        unfolded = -(-self.splits // self.splits_per_state)
        self._window_splits = max(1, -(-call.window // WINDOW_ROWS_PER_SPLIT))
        self.state_count = 1 + self._window_splits + unfolded
        width = 4 + call.values.head_dim
        self.packed_states = machine.poisoned(call.batch, self._tiles, 8, self.splits, width, dtype=torch.float32)
        self.states = machine.poisoned(call.batch, self._tiles, 8, self.state_count, width, dtype=torch.float32)
        shape = (call.batch, call.kv_heads * call.group, call.length, call.values.head_dim)
        self.output = machine.poisoned(*shape, dtype=call.dtype)
        self._prepare_queries()
        self._prepare_mask()
        self._prepare_attend()
        self._prepare_unfold(unfolded)
        self._prepare_plain()
        self._prepare_merge()
        if call.once:
            self._join_launches()

    def run(self) -> Tensor:
        """Launches all kernels. Returns `output`."""
        for index, launch in enumerate(self.launches):
            self._launch(launch, early=index > 0)
        return self.output

    def run_stage(self, stage: str) -> None:
        """Launches those kernels of a step alone; what they read is what an earlier run left."""
        for launch in self.launches:
            if launch.stage == stage:
                self._launch(launch)

    def _launch(self, launch: Launch, early: bool = False) -> None:
        shape = (launch.grid, launch.threads)
        self.machine.launch(launch.kernel, *shape, launch.arguments, shared_bytes=launch.shared_bytes, early=early)

    def _add(self, kernel: str, grid: tuple[int, ...], structure: str, **fields: Any) -> None:
        arguments = params(structure, **fields)
        self.launches.append(Launch(f"skvq::{kernel}", grid, bytes(arguments), arguments))

    def _transform(self, codec: ReferenceCodec, statistics: Statistics | None) -> Structure:
        last = self.call.sinks + self.call.packed + 256
        return params("TransformParams", **transform_fields(self.machine, codec, statistics, self.call.kv_heads, last))

    def _prepare_queries(self) -> None:
        call, machine, (keys, _) = self.call, self.machine, self.call.formats
        self._key_blocks = 1 if self.past.key_statistics is None else self.past.key_statistics[0].shape[2]
        leading = (call.batch, call.kv_heads, self._key_blocks, call.query_tiles)
        width = keys.head_dim
        self.folded = machine.poisoned(*leading, width // 16 * 64, dtype=torch.int32)
        self.extras = machine.poisoned(*leading, 8, 4 + width // keys.group_size, dtype=torch.float32)
        noise = machine.put(call.keys.map.noise) if call.keys.map is not None else None
        transform = self._transform(call.keys, self.past.key_statistics)
        names = "query_batch_stride query_head_stride query_position_stride"
        self._common = {"query": self.query, **strides(self.query, names), "lengths": self.lengths, **self._shape}
        self._common["scale"] = width**-0.5
        fields = {"folded": self.folded, "extras": self.extras, "noise": noise, "transform": transform}
        fields["as_bytes"] = int(call.as_bytes)
        grid = (self._key_blocks, self._tiles, call.batch)
        self._add(f"fold<{call.element}, {keys.expression}>", grid, "FoldParams", **self._common, **fields)
        self.launches[-1].threads = call.row_threads(call.keys)
        self.bias: Tensor | None = None
        self._bias_capacity = call.packed
        if call.turns:
            self.bias = machine.poisoned(call.batch, self._tiles * 8, call.packed, dtype=torch.float32)
            paddings = call.paddings or (0,) * call.batch
            origins = machine.put(torch.tensor([call.sinks - padding for padding in paddings], dtype=torch.int32))
            fields = {"bias": self.bias, "origins": origins, "transform": transform, "capacity": call.packed}
            fields |= {name: machine.put(value) for name, value in wave_fields(call.keys.map.frequencies).items()}
            fields["batch"] = call.batch
            grid = (machine.multiprocessors,)
            self._add(f"turning<{call.element}, {width}>", grid, "TurningParams", **self._common, **fields)
            self.launches[-1].threads = TURNING_THREADS

    def _prepare_mask(self) -> None:
        call, machine = self.call, self.machine
        paddings = None if call.paddings is None else machine.put(torch.tensor(call.paddings, dtype=torch.int32))
        fields: dict[str, Any] = {"paddings": paddings, "causal": int(call.causal), "softcap": call.softcap}
        if call.mask is not None:
            mask = machine.put(call.mask)
            kinds = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3, torch.bool: 4}
            expanded = mask.expand(call.batch, call.kv_heads * call.group, call.length, call.total)
            fields |= {"mask": mask, "kind": kinds[mask.dtype]}
            fields |= strides(expanded, "batch_stride head_stride position_stride")
        self._mask = params("MaskParams", **fields)

    def _prepare_attend(self) -> None:
        call = self.call
        grid, threads, shared_bytes = call.attend_launch(self.splits)
        self._add(
            call.attend,
            grid,
            "AttendParams",
            key_pages=self.past.key_table,
            value_pages=self.past.value_table,
            folded=self.folded,
            extras=self.extras,
            bias=self.bias,
            states=self.packed_states,
            lengths=self.lengths,
            bias_capacity=self._bias_capacity,
            mask=self._mask,
            key_levels=level_table(call.keys),
            value_levels=level_table(call.values),
            weight_unit=WEIGHT_UNIT,
            as_bytes=int(call.as_bytes),
            page_capacity=self.past.key_table.shape[-1],
            pages_per_split=call.pages_per_split,
            splits=self.splits,
            **call.split_pages,
            pages_per_key_block=call.keys.block // PAGE_ROWS,
            key_blocks=self._key_blocks,
            **self._shape,
        )
        self.launches[-1] = replace(self.launches[-1], threads=threads, shared_bytes=shared_bytes)

    def _prepare_unfold(self, unfolded: int) -> None:
        call = self.call
        self._add(
            f"unfold<{call.values.head_dim}>",
            (unfolded, self._tiles, call.batch),
            "UnfoldParams",
            packed=self.packed_states,
            states=self.states,
            transform=self._transform(call.values, self.past.value_statistics),
            splits=self.splits,
            splits_per_state=self.splits_per_state,
            first_state=1 + self._window_splits,
            state_count=self.state_count,
            pages_per_split=call.pages_per_split,
            kv_heads=call.kv_heads,
            query_tiles=call.query_tiles,
            queries=call.group * call.length,
        )
        self.launches[-1].threads = call.row_threads(call.values)

    def _prepare_plain(self) -> None:
        call = self.call
        regions = [plain_region(0, *self.past.sinks, 1), plain_region(1, *self.past.window, self._window_splits)]
        self._add(
            f"plain<{call.element}, {call.keys.head_dim}, {call.values.head_dim}>",
            (1 + self._window_splits, self._tiles, call.batch),
            "PlainParams",
            **self._common,
            states=self.states,
            mask=self._mask,
            regions=plain_regions(regions),
            state_count=self.state_count,
        )

    def _join_launches(self) -> None:
        """One launch in place of all but turning, and of merge where the call says so, with their arguments."""
        found = {launch.stage: launch for launch in self.launches}
        stages = ("fold", "attend_once", "unfold", "plain", "merge")
        fold, attend, unfold, plain, merge = (found[name] for name in stages)
        fields = {"fold": fold.kept, "attend": attend.kept, "plain": plain.kept, "values": unfold.kept.transform}
        fields |= {"merge": merge.kept, "first_state": 1 + self._window_splits}
        if self.call.merges:
            fields["merges"] = 1
            fields["arrivals"] = self.machine.put(torch.zeros(self.call.batch, self.call.kv_heads, dtype=torch.int32))
        arguments = params("OnceParams", **fields)
        grid = (*attend.grid[:2], self.splits + 1 + self._window_splits)
        once = replace(attend, grid=grid, arguments=bytes(arguments), kept=arguments)
        joined = (fold, unfold, plain, *([merge] if self.call.merges else []))
        self.launches = [once if x is attend else x for x in self.launches if all(x is not other for other in joined)]

    def _prepare_merge(self) -> None:
        call = self.call
        self._add(
            f"merge<{call.element}, {call.values.head_dim}>",
            (call.kv_heads * call.group * call.length, call.batch),
            "MergeParams",
            states=self.states,
            output=self.output,
            **strides(self.output, "output_batch_stride output_head_stride output_position_stride"),
            sink_logits=self.machine.put(call.sink_logits),
            state_count=self.state_count,
            **self._shape,
        )

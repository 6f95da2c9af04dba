"""Attention by kernels, end to end: fold, attend, plain, unfold, merge as a backend launches them, in the emulator;
or attend_once in place of all, or of all but the last.

Is: the launches and their workspaces for rows that skvq.reference has packed; the same call in float64. Is not: fast.
Shapes: keys [B, H, T, Dk], values [B, H, T, Dv] in the model's type, query [B, H·group, L, Dk].
T = sinks + packed + window.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from harness import (
    DTYPES,
    PAGE_ROWS,
    PARAMS,
    Kernels,
    PageFormat,
    Structure,
    aligned,
    level_table,
    params,
    repack,
    strides,
)
from torch import Tensor

from skvq.reference import ReferenceCodec

HEADERS = ["repack.cuh", "attend.cuh", "attend_many.cuh", "attend_once.cuh", "merge.cuh", "plain.cuh", "turning.cuh"]
HEADERS += ["attend_rows.cuh", "reach.cuh", "unpack.cuh"]
QUERY_TILE = 8
# Threads of a block of attend_many.cuh, its query tiles, and rows that it unpacks at a time.
MANY_THREADS, MANY_TILES, MANY_ROWS = 256, 16, 64
TURNING_THREADS = 512
# Threads of a block of attend_rows.cuh and of unpack.cuh.
ROWS_THREADS, UNPACK_THREADS = 128, 256
ATTEND_WARPS = 4
# Splits that `unfold` takes for one state.
MOST_SPLITS_PER_STATE = 16
# Of `turning`: any number of blocks divides its items.
TURNING_BLOCKS = 3


@dataclass
class Call:
    """One attention call. `paddings` has the tokens before each sequence; keys grow by 1 + `rising` to the last.

    `many`: the packed rows are for attend_many.cuh, which takes an even number of tiles.
    `apart`: each warp has a split of its own. `once`: one launch, of up to eight queries of a kv head, which merges,
    too, unless `merges` says otherwise. `pieces`: the past is unpacked so many rows at a time, for attend_rows.cuh.
    """

    keys: ReferenceCodec
    values: ReferenceCodec
    dtype: torch.dtype = torch.float16
    batch: int = 1
    kv_heads: int = 2
    group: int = 1
    length: int = 1
    sinks: int = 5
    packed: int = 150
    window: int = 20
    paddings: tuple[int, ...] | None = None
    mask: Tensor | None = None
    causal: bool = False
    softcap: float = 0.0
    sink_logits: Tensor | None = None
    pages_per_split: int = 1
    long_splits: int | None = None  # splits behind so many have a page each; None: all are as long
    tiles: int = 1
    many: bool = False
    apart: bool = False
    once: bool = False
    merges: bool = True
    pieces: int = 0
    rising: float = 0.0
    schedule: str = "forward"
    seed: int = 0
    name: str = field(default="", compare=False)

    @property
    def total(self) -> int:
        return self.sinks + self.packed + self.window

    @property
    def query_tiles(self) -> int:
        tiles = 2 if self.many else self.tiles
        return -(-self.group * self.length // (QUERY_TILE * tiles)) * tiles

    @property
    def attend(self) -> str:
        """The kernel of the packed rows."""
        k, v = (page_format.expression for page_format in self.formats)
        if self.many:
            return f"attend_many<{k}, {v}>"
        if self.once:
            return f"attend_once<{self.element}, {k}, {v}>"
        return f"attend{'_apart' if self.apart else ''}<{k}, {v}, {self.tiles}>"

    @property
    def as_bytes(self) -> bool:
        """Whether queries are folded to bytes, as `takes_bytes` of src/cuda/constants.rs."""
        keys, values = self.formats
        if keys.even:
            return not self.many and sum(width for bits, width in keys.parts if bits) * self.tiles <= 256
        fits = keys.head_dim % 32 == 0 and keys.head_dim * self.tiles <= 256 and keys.group_size == keys.head_dim
        levels = self.values.coder.levels.tolist() if values.format == "1.6" else [-1.0, 0.0, 1.0]
        even = levels == [-levels[2], 0.0, levels[2]]
        half = self.dtype != torch.float32
        return half and not self.many and keys.format == "2" and fits and even and level_table(self.keys).step != 0

    @property
    def reaches(self) -> bool:
        """Whether a launch finds out what a mask shows."""
        return self.mask is not None and (self.by_rows or not self.many)

    @property
    def by_rows(self) -> bool:
        """Whether rows in the model's type are multiplied on tensor cores."""
        return (self.many or self.pieces > 0) and self.dtype != torch.float32

    @property
    def turned(self) -> bool:
        """Whether the keys' mean turns in the launch of packed rows, as `Shape.turned` of src/cuda/store/attend.rs."""
        if not self.turns or not (self.once or self.many) or self.dtype == torch.float32:
            return False
        width = self.keys.head_dim
        return width <= 128 and 2 * len(set(self.keys.map.frequencies.tolist())) <= width

    def row_threads(self, codec: ReferenceCodec) -> int:
        """Of a block of fold or unfold, by the codec of keys or values, as `row_threads` of launches.rs."""
        queries = min(QUERY_TILE, self.group * self.length)
        return 128 if codec.map is not None else 16 * (queries + queries % 2)

    @property
    def splits(self) -> int:
        """Of the packed rows."""
        pages, long = -(-self.packed // PAGE_ROWS), self.long_splits
        if long is None:
            return max(1, -(-pages // self.pages_per_split))
        return long + max(0, pages - long * self.pages_per_split)

    @property
    def split_pages(self) -> dict[str, int]:
        """Fields of AttendParams."""
        if self.long_splits is None:
            return {"long_splits": self.splits + 1, "short_pages": self.pages_per_split}
        return {"long_splits": self.long_splits, "short_pages": 1}

    def attend_launch(self, splits: int) -> tuple[tuple[int, int, int], int, int]:
        """Its grid, threads and bytes of shared memory."""
        if not self.many:
            blocks = -(-splits // ATTEND_WARPS) if self.apart else splits
            return (self.kv_heads * self.query_tiles // self.tiles, self.batch, blocks), 32 * ATTEND_WARPS, 0
        buffers = 2 if self.keys.head_dim + self.values.head_dim <= 256 else 1
        shared = sum(2 * rows.head_dim + 4 * rows.numbers for rows in self.formats) * MANY_ROWS * buffers
        return (splits, self.kv_heads * -(-self.query_tiles // MANY_TILES), self.batch), MANY_THREADS, shared

    @property
    def formats(self) -> tuple[PageFormat, PageFormat]:
        return PageFormat.of("keys", self.keys), PageFormat.of("values", self.values)

    @property
    def element(self) -> str:
        return DTYPES[self.dtype]

    @property
    def turns(self) -> bool:
        return self.keys.map is not None and self.keys.map.shift_sine is not None

    def instances(self) -> list[str]:
        """Expressions of all kernels of the call."""
        k, v = (page_format.expression for page_format in self.formats)
        t, dk, dv = self.element, self.keys.head_dim, self.values.head_dim
        names = [f"rows_to_page<{k}>", f"rows_to_page<{v}>"]
        names += [] if self.once and self.merges else [f"merge<{t}, {dv}>"]
        names += [] if self.once else [f"fold<{t}, {k}>"]
        names += [] if self.once or self.by_rows else [f"plain<{t}, {dk}, {dv}>"]
        names += [f"attend_rows<{t}, {dk}, {dv}>"] if self.by_rows else []
        names += [f"mask_{'reach' if self.by_rows else 'shows'}<skvq::i32>"] if self.reaches else []
        names += [f"unpack<{t}, {k}>", f"unpack<{t}, {v}>"] if self.pieces else [self.attend]
        names += [] if self.once or self.pieces else [f"unfold<{dv}>"]
        names += [f"turning<{t}, {dk}>"] if self.turns and not self.turned and not self.pieces else []
        names += [f"fold_turned<{t}, {dk}>"] if self.turned and self.many else []
        return [f"skvq::{name}" for name in names]


@dataclass
class Rows:
    """Random rows of a call as a cache holds them: plain, packed, and what the packed ones read back as (float32)."""

    keys: Tensor
    values: Tensor
    query: Tensor
    key_bytes: Tensor
    value_bytes: Tensor
    read_keys: Tensor
    read_values: Tensor
    key_scales: Tensor
    key_statistics: tuple[Tensor, Tensor] | None
    value_statistics: tuple[Tensor, Tensor] | None


def make_rows(call: Call) -> Rows:
    """Rows with an offset in every channel; the packed ones go through the reference codec."""
    generator = torch.Generator().manual_seed(call.seed)

    def rows(width: int) -> Tensor:
        x = torch.randn(call.batch, call.kv_heads, call.total, width, generator=generator)
        offset = torch.randn(call.kv_heads, 1, width, generator=generator)
        return (x * (0.5 + torch.rand(width, generator=generator)) + offset).to(call.dtype)

    keys, values = rows(call.keys.head_dim), rows(call.values.head_dim)
    keys = (keys * (1.0 + call.rising * torch.linspace(0.0, 1.0, call.total))[:, None]).to(call.dtype)
    heads = call.kv_heads * call.group
    query = torch.randn(call.batch, heads, call.length, call.keys.head_dim, generator=generator).to(call.dtype)
    packed = slice(call.sinks, call.sinks + call.packed)
    found: list[Any] = []
    for codec, x in ((call.keys, keys), (call.values, values)):
        exact = x[:, :, packed].float()
        statistics = None
        if codec.block:
            blocks = math.ceil(call.packed / codec.block)
            statistics = tuple(
                torch.stack(pieces, 2)
                for pieces in zip(
                    *[
                        codec.block_statistics(exact[:, :, b * codec.block : (b + 1) * codec.block])
                        for b in range(blocks)
                    ],
                    strict=True,
                )
            )
        packed_bytes = torch.zeros(*exact.shape[:3], codec.row_bytes, dtype=torch.uint8)
        read, scales = torch.zeros_like(exact), torch.zeros(exact.shape[:3])
        for b in range(call.batch):
            position = call.sinks - (call.paddings or [0] * call.batch)[b]
            for h in range(call.kv_heads):
                step = codec.block or call.packed
                for first in range(0, call.packed, step):
                    part = slice(first, first + step)
                    own = None if statistics is None else tuple(s[b, h, first // step] for s in statistics)
                    where = {"position": position + first}
                    packed_bytes[b, h, part] = codec.encode(exact[b, h, part], h, own, **where)
                    read[b, h, part] = codec.decode(packed_bytes[b, h, part], h, own, **where)
                    scales[b, h, part] = codec.quantize(exact[b, h, part], h, own, **where).scale[..., 0]
        found.append((packed_bytes, read, scales, statistics))
    (kb, kr, ks, kst), (vb, vr, _, vst) = found
    return Rows(keys, values, query, kb, vb, kr, vr, ks, kst, vst)


def expected(call: Call, rows: Rows) -> Tensor:
    """The call in float64 [B, H·group, L, Dv]."""
    past = slice(call.sinks, call.sinks + call.packed)
    keys, values = rows.keys.double(), rows.values.double()
    keys[:, :, past], values[:, :, past] = rows.read_keys.double(), rows.read_values.double()
    query = rows.query.double() * call.keys.head_dim**-0.5
    shape = (call.batch, call.kv_heads, call.group, call.length)
    scores = torch.einsum("bhgld,bhtd->bhglt", query.view(*shape, -1), keys)
    if call.keys.map is not None:
        for head in range(call.kv_heads):
            noise = call.keys.map.score_noise(query.view(*shape, -1)[:, head], head)
            scores[:, head, :, :, past] -= noise[..., None] * rows.key_scales[:, head, None, None].double().square()
    if call.softcap:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    tokens = torch.arange(call.total)
    token = tokens.expand(call.batch, -1).clone()
    visible = torch.ones(call.batch, 1, 1, 1, call.total, dtype=torch.bool)
    for b, padding in enumerate(call.paddings or []):
        token[b, : call.sinks] += padding
        visible[b] = (tokens < call.sinks) | (tokens >= padding + call.sinks)
    if call.mask is not None:
        mask = call.mask.expand(call.batch, call.kv_heads * call.group, call.length, call.total)
        mask = mask.gather(-1, token[:, None, None].expand_as(mask)).view(*shape, -1)
        if mask.dtype == torch.bool:
            visible = visible & mask
        else:
            scores = scores + mask.double()
    if call.causal:
        limit = call.total - call.length + torch.arange(call.length)
        visible = visible & (token[:, None, None, None] <= limit[:, None])
    scores = scores.masked_fill(~visible, -math.inf)
    if call.sink_logits is not None:
        sinks = call.sink_logits.double().view(1, call.kv_heads, call.group, 1, 1).expand(*shape, 1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    output = torch.einsum("bhglt,bhtd->bhgld", weights.nan_to_num(), values)
    return output.flatten(1, 2)


def placed(kernels: Kernels, structure: str, /, **fields: Any) -> Structure:
    """`params` of tensors where kernels find them."""
    return params(structure, **{name: kernels.put(value) for name, value in fields.items()})


def transform_of(
    codec: ReferenceCodec, statistics: tuple[Tensor, Tensor] | None, call: Call, kernels: Any = Kernels
) -> Structure:
    """TransformParams of a codec."""
    heads, width = call.kv_heads, codec.head_dim

    def per_head(value: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor | None:
        return None if value is None else value.to(dtype).expand(heads, width).contiguous()

    shift, scale = statistics if statistics is not None else (per_head(codec.shift), per_head(codec.scale))
    fields: dict[str, Any] = {"rotation": int(codec.rotation == "hadamard")}
    fields["permutation"] = per_head(codec.permutation, torch.int32)
    if statistics is not None:
        fields |= {"pages_per_block": codec.block // PAGE_ROWS, "block_count": shift.shape[2]}
    if codec.map is not None:
        fields |= {"matrix": codec.map.matrix.mT.contiguous(), "inverse": codec.map.inverse.contiguous()}
        shift = codec.map.shift
        if codec.map.shift_sine is not None:
            theta, first = codec.map.frequencies.double(), -4

            def table(positions: Tensor) -> Tensor:
                angles = positions[:, None].double() * theta
                return torch.stack([angles.cos(), angles.sin()], 1).float().contiguous()

            # Cases of tests without a call are short.
            last = max(8, getattr(call, "total", 0) // 256 + 2)
            spans = table(256 * torch.arange(first, last))
            fields |= {"shift_sine": codec.map.shift_sine.contiguous(), "spans": spans, "first_span": first}
            fields["steps"] = table(torch.arange(256))
    fields |= {
        "shift": None if shift is None else shift.contiguous(),
        "scale": None if scale is None else scale.contiguous(),
    }
    return placed(kernels, "TransformParams", **fields)


def wave_fields(frequencies: Tensor) -> dict[str, Any]:
    """The fields of TurningParams that follow from the frequencies of a mean that turns [D], as params.cuh has them."""
    width, of_channels = len(frequencies), frequencies.tolist()
    distinct = list(dict.fromkeys(of_channels))
    pass_steps = width // 16 if width <= 128 else -(-width // 64)
    steps = -(-len(distinct) // (8 * pass_steps)) * pass_steps
    angles = torch.arange(256)[:, None] * torch.tensor(distinct, dtype=torch.float64)
    waves = torch.zeros(256, 8 * steps, 2, dtype=torch.float64)
    waves[:, : len(distinct)] = torch.stack([angles.cos(), angles.sin()], -1)
    # Rows: tile, i % 2, g; waves: k-step, i / 2, t, cosine or sine.
    exact = waves.view(16, 2, 8, steps, 2, 4, 2).permute(0, 3, 2, 5, 4, 1, 6)
    high = exact.half()
    fragments = torch.stack([high, (exact - high.double()).half()]).contiguous()
    places = [distinct.index(theta) for theta in of_channels]
    channels = sorted(range(width), key=places.__getitem__)
    starts = [sum(place < index for place in places) for index in range(len(distinct) + 1)]
    return {
        "waves": fragments,
        "channels": torch.tensor(starts + channels, dtype=torch.int32),
        "frequencies": len(distinct),
    }


# Of the regions in the model's type by attend_rows.cuh.
ROW_SPLITS = 3


def reach_of(call: Call, mask: Structure, lengths: Tensor, kernels: Kernels, launch: Callable[..., None]) -> Tensor:
    """What reach.cuh finds in the call's mask, of many queries or of few."""
    assert call.mask is not None
    batch, heads, positions, tokens = call.mask.shape
    reach = kernels.put(torch.full((batch, heads, positions, 4 if call.by_rows else 1), -1, dtype=torch.int32))
    fields = {"mask": mask, "reach": reach, "lengths": lengths, "tokens": tokens}
    arguments = placed(kernels, "ReachParams", heads=heads, positions=positions, **fields)
    name, threads = ("mask_reach", 128) if call.by_rows else ("mask_shows", 512)
    launch(f"{name}<skvq::i32>", (batch * heads * positions,), threads, arguments)
    return cast(Tensor, reach)


def rows_shape(call: Call) -> tuple[int, int, int]:
    """Queries of a block of attend_rows.cuh, rows of a tile, bytes of shared memory; as RowsShape there."""
    dk, dv = call.keys.head_dim, call.values.head_dim
    queries, rows = (64, 32) if max(dk, dv) > 128 else (128, 64)
    return queries, rows, (queries + rows) * (2 * dk + 16) + rows * (2 * dv + 16)


def row_region(kind: int, keys: Tensor, values: Tensor, tile: int) -> Structure:
    """A RowsRegion of rows [B, H, n, D] as they lie."""
    return params("RowsRegion", rows=plain_region(kind, keys, values, 0), tiles=-(-keys.shape[2] // tile))


def launch_rows(
    call: Call, regions: list[Structure], fields: dict[str, Any], kernels: Kernels, launch: Callable[..., None]
) -> None:
    """States of some regions by attend_rows.cuh."""
    queries, _, shared_bytes = rows_shape(call)
    tiles = sum(region.tiles for region in regions)
    fields = fields | {"tiles_per_split": -(-tiles // ROW_SPLITS)}
    arguments = placed(kernels, "RowsParams", regions=(PARAMS["RowsRegion"] * 4)(*regions), **fields)
    blocks = -(-call.group * call.length // queries)
    name = f"attend_rows<{call.element}, {call.keys.head_dim}, {call.values.head_dim}>"
    launch(name, (ROW_SPLITS, call.kv_heads * blocks, call.batch), ROWS_THREADS, arguments, shared_bytes)


def attend_rows(
    call: Call,
    parts: list[tuple[Tensor, Tensor]],
    fields: dict[str, Any],
    kernels: Kernels,
    launch: Callable[..., None],
) -> None:
    """States of sinks and window."""
    _, tile, _ = rows_shape(call)
    launch_rows(call, [row_region(kind, *rows, tile) for kind, rows in enumerate(parts)], fields, kernels, launch)


def attend_piece(
    call: Call,
    first: int,
    tables: tuple[tuple[Tensor, Structure], tuple[Tensor, Structure]],
    origins: Tensor,
    fields: dict[str, Any],
    kernels: Kernels,
    launch: Callable[..., None],
) -> None:
    """Unpacks the packed rows from `first` on and goes on with the states."""
    count = min(call.pieces, call.packed - first)
    room = -(-count // PAGE_ROWS) * PAGE_ROWS
    noise = call.keys.map is not None and call.keys.map.noise is not None
    squares = torch.full((call.batch, call.kv_heads, room), math.nan, dtype=torch.float32) if noise else None
    squares = kernels.put(squares)
    unpacked = []
    for codec, page_format, (table, transform) in zip((call.keys, call.values), call.formats, tables, strict=True):
        width = codec.head_dim
        rows = kernels.put(aligned(call.batch, call.kv_heads, count, width, dtype=call.dtype).fill_(math.nan))
        pages, slices = 2, width // unpack_slice(width)
        arguments = placed(
            kernels,
            "UnpackParams",
            pages=table,
            rows=rows,
            **strides(rows, "batch_stride head_stride row_stride"),
            squares=squares if codec is call.keys else None,
            origins=origins,
            transform=transform,
            levels=level_table(codec),
            first_row=first,
            row_count=count,
            page_capacity=table.shape[-1],
            kv_heads=call.kv_heads,
            pages_per_block=pages,
            squares_room=room,
        )
        grid = (-(-count // (PAGE_ROWS * pages)), call.kv_heads * slices, call.batch)
        name = f"unpack<{call.element}, {page_format.expression}>"
        launch(name, grid, UNPACK_THREADS, arguments, unpack_slice(width) * width * 4)
        unpacked.append(rows)
    _, tile, _ = rows_shape(call)
    region = row_region(3, *unpacked, tile)
    fields = fields | {"first_past": first, "past_rows": count, "past_room": room, "carries": 1, "squares": squares}
    launch_rows(call, [region], fields, kernels, launch)


def unpack_slice(width: int) -> int:
    """Channels that a block of unpack.cuh makes."""
    fitting = (s for s in range(width, 0, -16) if s * width * 4 <= 65536 and width % s == 0 and s % 16 == 0)
    return next(fitting)


def pages_of(kernels: Kernels, page_format: PageFormat, codec: ReferenceCodec, packed: Tensor) -> tuple[Tensor, Tensor]:
    """Pages of rows [B, H, n, row_bytes] and their table [B, H, capacity]; pages are kept alive by the first."""
    made = [repack(kernels, page_format, rows, codec.code_bytes) for rows in packed.flatten(0, 1)]
    table = torch.stack([table for _, table in made]).view(*packed.shape[:2], -1).contiguous()
    return [pages for pages, _ in made], table  # type: ignore[return-value]


def plain_region(kind: int, keys: Tensor, values: Tensor, splits: int, **fields: Any) -> Structure:
    """A PlainRegion of rows [B, H, n, D] as they lie."""
    for name, x in (("key", keys), ("value", values)):
        fields |= strides(x, f"{name}_batch_stride {name}_head_stride {name}_row_stride")
    fields |= {"kind": kind, "splits": splits, "rows_per_split": -(-max(1, keys.shape[2]) // max(1, splits))}
    return params("PlainRegion", key_rows=keys, value_rows=values, **fields)


def plain_regions(regions: list[Structure]) -> Any:
    """The array in PlainParams."""
    return (PARAMS["PlainRegion"] * 4)(*regions)


def run(call: Call, rows: Rows, kernels: Kernels) -> Tensor:
    """The call by kernels [B, H·group, L, Dv], where these run."""
    put = kernels.put
    params = functools.partial(placed, kernels)
    k, v = call.formats
    width_k, width_v = call.keys.head_dim, call.values.head_dim
    batch, heads, tiles = call.batch, call.kv_heads, call.query_tiles
    shape = {"kv_heads": heads, "group": call.group, "length": call.length, "query_tiles": tiles}
    query = put(rows.query.contiguous())
    query_strides = strides(query, "query_batch_stride query_head_stride query_position_stride")
    scale = width_k**-0.5
    lengths = torch.tensor([call.packed, call.sinks, call.window, 0], dtype=torch.int32)
    key_blocks = 1 if rows.key_statistics is None else rows.key_statistics[0].shape[2]
    key_transform = transform_of(call.keys, rows.key_statistics, call, kernels)
    value_transform = transform_of(call.values, rows.value_statistics, call, kernels)

    def launch(name: str, grid: tuple[int, ...], threads: int, arguments: Structure, shared_bytes: int = 0) -> None:
        kernels.launch(f"skvq::{name}", grid, threads, arguments, shared_bytes=shared_bytes, schedule=call.schedule)

    words = (width_k + 31) // 32 * 128 if call.formats[0].even else width_k // 16 * 64
    folded = put(aligned(batch, heads, key_blocks, tiles, words, dtype=torch.int32))
    extras = put(aligned(batch, heads, key_blocks, tiles, 8, 4 + width_k // k.group_size, dtype=torch.float32))
    noise = call.keys.map.noise if call.keys.map is not None else None
    common = {"query": query, **query_strides, "lengths": lengths, **shape, "scale": scale}
    fields = {"folded": folded, "extras": extras, "noise": noise, "as_bytes": int(call.as_bytes)}
    turned = params("WaveParams")
    origins = torch.tensor([call.sinks - (call.paddings or [0] * batch)[b] for b in range(batch)], dtype=torch.int32)
    if call.turned:
        waves = wave_fields(call.keys.map.frequencies)
        tables = {name: getattr(key_transform, name) for name in ("spans", "steps", "first_span")}
        turned = params("WaveParams", **waves, **tables, origins=origins)
    fold = params("FoldParams", **common, **fields, transform=key_transform)
    threads = call.row_threads(call.keys)
    if not call.once:
        launch(f"fold<{call.element}, {k.expression}>", (key_blocks, heads * tiles, batch), threads, fold)

    bias, capacity = None, call.packed + 3
    if call.turned and call.many:
        bias = put(aligned(batch, heads * tiles, 8 * (width_k + 1), dtype=torch.float32))
        arguments = params("FoldTurnedParams", fold=fold, waves=turned, factors=bias)
        launch(f"fold_turned<{call.element}, {width_k}>", (1, heads * tiles, batch), 128, arguments)
    paddings = torch.tensor(call.paddings, dtype=torch.int32) if call.paddings else None
    if call.turns and not call.turned and not call.pieces:
        bias = put(aligned(batch, heads * tiles * 8, 4 + 2 * capacity))
        fields = {"bias": bias, "origins": origins, "transform": key_transform, "capacity": capacity, "batch": batch}
        arguments = params("TurningParams", **common, **fields, **wave_fields(call.keys.map.frequencies))
        launch(f"turning<{call.element}, {width_k}>", (TURNING_BLOCKS,), TURNING_THREADS, arguments)

    mask_fields: dict[str, Any] = {"paddings": paddings, "causal": int(call.causal), "softcap": call.softcap}
    if call.mask is not None:
        kinds = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3, torch.bool: 4}
        expanded = call.mask.expand(batch, heads * call.group, call.length, call.total)
        mask_fields |= {"mask": call.mask, **strides(expanded, "batch_stride head_stride position_stride")}
        mask_fields["kind"] = kinds[call.mask.dtype]
    mask = params("MaskParams", **mask_fields)
    reach = reach_of(call, mask, lengths, kernels, launch) if call.reaches else None

    splits = call.splits + 1  # one more than there are rows for
    blocks = rows.key_statistics is not None or rows.value_statistics is not None
    per_state = 1 if call.once else 2 if blocks else min(splits, MOST_SPLITS_PER_STATE)
    unfolded = -(-splits // per_state)
    state_count = ROW_SPLITS if call.pieces else unfolded + ROW_SPLITS
    packed_states = put(aligned(batch, heads * tiles, 8, splits, 4 + width_v, dtype=torch.float32))
    states = put(aligned(batch, heads * tiles, 8, state_count, 4 + width_v, dtype=torch.float32))
    key_pages, key_table = pages_of(kernels, k, call.keys, rows.key_bytes)
    value_pages, value_table = pages_of(kernels, v, call.values, rows.value_bytes)
    attend = params(
        "AttendParams",
        key_pages=key_table,
        value_pages=value_table,
        folded=folded,
        extras=extras,
        bias=bias,
        states=packed_states,
        lengths=lengths,
        reach=reach,
        bias_capacity=capacity,
        turned=turned,
        mask=mask,
        key_levels=level_table(call.keys),
        value_levels=level_table(call.values),
        weight_unit=4.0,
        as_bytes=int(call.as_bytes),
        page_capacity=key_table.shape[-1],
        pages_per_split=call.pages_per_split,
        splits=splits,
        **call.split_pages,
        pages_per_key_block=call.keys.block // PAGE_ROWS,
        key_blocks=key_blocks,
        **shape,
    )
    unfold = params(
        "UnfoldParams",
        packed=packed_states,
        states=states,
        transform=value_transform,
        splits=splits,
        splits_per_state=per_state,
        first_state=3,
        state_count=state_count,
        pages_per_split=call.pages_per_split,
        kv_heads=heads,
        query_tiles=tiles,
        queries=call.group * call.length,
    )
    past = slice(0, call.sinks), slice(call.sinks + call.packed, call.total)
    parts = [(put(rows.keys[:, :, part].contiguous()), put(rows.values[:, :, part].contiguous())) for part in past]
    regions = [plain_region(0, *parts[0], 1), plain_region(1, *parts[1], 2)]
    row_fields = {**common, "mask": mask, "reach": reach, "states": states, "state_count": state_count}
    plain = params(
        "PlainParams",
        **common,
        states=states,
        mask=mask,
        regions=plain_regions(regions),
        state_count=state_count,
    )
    output = put(torch.full((batch, heads * call.group, call.length, width_v), math.nan, dtype=call.dtype))
    fields = strides(output, "output_batch_stride output_head_stride output_position_stride")
    sink_logits = call.sink_logits
    merge = params(
        "MergeParams", states=states, output=output, sink_logits=sink_logits, state_count=state_count, **fields, **shape
    )
    grid, threads, shared_bytes = call.attend_launch(splits)
    if call.once:
        arrivals = put(torch.zeros(batch, heads, dtype=torch.int32))
        own: dict[str, Any] = {
            "fold": fold,
            "attend": attend,
            "plain": plain,
            "values": value_transform,
            "merge": merge,
        }
        own |= {"merges": int(call.merges), "arrivals": arrivals if call.merges else None, "first_state": 3}
        arguments = params("OnceParams", **own)
        launch(call.attend, (grid[0], grid[1], splits + 3), threads, arguments)
        assert not arrivals.any(), "the next launch counts from 0"
    else:
        if not call.pieces:
            launch(call.attend, grid, threads, attend, shared_bytes)
            launch(f"unfold<{width_v}>", (unfolded, heads * tiles, batch), call.row_threads(call.values), unfold)
        if call.by_rows:
            attend_rows(call, parts, row_fields, kernels, launch)
        else:
            launch(f"plain<{call.element}, {width_k}, {width_v}>", (3, heads * tiles, batch), 128, plain)
        if call.pieces:
            row_fields |= {"extras": extras, "extras_width": extras.shape[-1]}
            tables = (key_table, key_transform), (value_table, value_transform)
            for first in range(0, call.packed, call.pieces):
                attend_piece(call, first, tables, origins, row_fields, kernels, launch)
    del key_pages, value_pages, parts  # alive until here
    if not (call.once and call.merges):
        launch(f"merge<{call.element}, {width_v}>", (heads * call.group * call.length, batch), 128, merge)
    return output

"""One attention layer's store in plain torch: the slow oracle of `skvq._native.Layer`.

Is: the regions sinks | packed | window, block statistics in time, and attention in float64 over what a reader of the
store sees. Is not: compact. Every token is kept as one row: exact in the sinks and the window, decoded where the store
would be packed.
Shapes: keys [B, Hkv, n, Dk], values [B, Hkv, n, Dv], query [B, Hq, L, Dk], mask [B|1, Hq|1, L|1, T].

Regions of T tokens: tokens [0, sinks) are exact for ever. Of the tokens behind them those older than the last `window`
are packed, as far as the blocks of both streams have statistics. A block gets them as soon as its last row is there,
in the window or not. When a crop cuts the block, it keeps them if one of its rows is packed, and forgets them if none
is; its missing rows are then packed one by one as they leave the window.

In a sequence that begins with p tokens of padding, the tokens [p, p + sinks) are the exact ones, the padding is zeros
that nobody sees and that no statistics count, and everything else is as without padding. Token number i of it is at
position i - p, for codecs with a mean that turns.

A codec of keys with noise takes ½·a²·Σ κ q'² off the score, before a softcap, of every token that is read as packed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .reference import ReferenceCodec, Statistics

LEAST_QUERIES = 32  # tokens whose queries must have been seen
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class _Stream:
    """The rows [B, H, T, D] (float32) of one stream and the statistics ([B, H, D] each) of its blocks."""

    def __init__(self, codec: ReferenceCodec, rows: Tensor, padding: Sequence[int]) -> None:
        self.codec = codec
        self.rows = rows[:, :, :0].to(torch.float32)
        self.blocks: list[Statistics] = []
        self.noise = self.rows[..., 0]  # squared scale [B, H, T] of packed rows, 0 of others
        self.append(rows, padding)

    def append(self, rows: Tensor, padding: Sequence[int]) -> None:
        self.rows = torch.cat([self.rows, rows.to(torch.float32)], dim=2)
        self.noise = torch.nn.functional.pad(self.noise, (0, rows.shape[2]))
        for sequence, count in enumerate(padding):
            self.rows[sequence, :, :count] = 0.0

    def completes_block(self, sinks: int) -> bool:
        """Whether a block is complete and has no statistics."""
        block = self.codec.block
        return bool(block) and (len(self.blocks) + 1) * block <= self.rows.shape[2] - sinks

    def fix_statistics(self, sinks: int, padding: Sequence[int], factors: Tensor | None) -> None:
        """Take the statistics of every block that has become complete; none of its rows is packed yet."""
        block = self.codec.block
        while self.completes_block(sinks):
            start = sinks + len(self.blocks) * block
            rows = self.rows[:, :, start : start + block].clone()
            for sequence, count in enumerate(padding):
                if count:  # statistics leave out what is not finite
                    rows[sequence, :, : max(0, count + sinks - start)] = math.nan
            self.blocks.append(self.codec.block_statistics(rows, factors))

    def packable(self, stop: int) -> int:
        """How many of the first `stop` rows behind the sinks have statistics to be packed with."""
        return min(stop, len(self.blocks) * self.codec.block) if self.codec.block else stop

    def pack(self, sinks: int, start: int, stop: int, nonfinite: str, padding: Sequence[int]) -> None:
        """Replace the rows [start, stop), counted behind the sinks, by their decoded values."""
        kept = [self.rows[sequence, :, : count + sinks].clone() for sequence, count in enumerate(padding)]
        block = self.codec.block
        while start < stop and self.codec.format != "raw":
            end = min(stop, (start // block + 1) * block) if block else stop
            rows = self.rows[:, :, sinks + start : sinks + end]
            for head in range(rows.shape[1]):
                statistics = None
                if block:
                    shift, scale = self.blocks[start // block]
                    statistics = (shift[:, head, None], scale[:, head, None])
                for some, position in self._positions(sinks + start, padding):
                    quantized = self.codec.quantize(rows[some, head], head, statistics, nonfinite, position=position)
                    rows[some, head] = self.codec.dequantize(quantized, head, statistics, position=position)
                    self.noise[some, head, sinks + start : sinks + end] = quantized.scale[..., 0].square()
            start = end
        for sequence, exact in enumerate(kept):
            self.rows[sequence, :, : exact.shape[1]] = exact
            self.noise[sequence, :, : exact.shape[1]] = 0.0

    def _positions(self, token: int, padding: Sequence[int]) -> list[tuple[slice, int]]:
        """The position of a token in the sequences of the batch, together where it is the same or does not matter."""
        if self.codec.map is None or not any(padding):
            return [(slice(None), token)]
        return [(slice(sequence, sequence + 1), token - count) for sequence, count in enumerate(padding)]

    def crop(self, length: int, sinks: int, packed: int) -> None:
        self.rows, self.noise = self.rows[:, :, :length].clone(), self.noise[:, :, :length].clone()
        block = self.codec.block
        if block:
            complete, begun = max(0, length - sinks) // block, math.ceil(packed / block)
            self.blocks = self.blocks[: max(complete, begun)]

    def gather(self, indices: Tensor) -> None:
        self.rows, self.noise = self.rows[indices], self.noise[indices]
        self.blocks = [(shift[indices], scale[indices]) for shift, scale in self.blocks]

    def nbytes(self, packed: int, element: int) -> int:
        """Bytes of codes, metadata, block statistics, sinks and window, without the unused rest of the last page."""
        batch, heads, length, width = self.rows.shape
        row = element * width if self.codec.format == "raw" else self.codec.row_bytes
        exact = (length - packed) * width * element
        return batch * heads * (packed * row + exact + len(self.blocks) * self.codec.statistics_bytes)


class ReferenceLayer:
    """Methods and keywords as in `skvq._native.Layer`; `isa` has no meaning here."""

    def __init__(
        self,
        *,
        num_key_value_heads: int,
        keys: ReferenceCodec,
        values: ReferenceCodec,
        sinks: int,
        window: int,
        dtype: str,
        nonfinite: str = "raise",
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}")
        if nonfinite not in ("raise", "propagate"):
            raise ValueError(f"nonfinite={nonfinite!r}: expected 'raise' or 'propagate'")
        if sinks < 0 or window < 0:
            raise ValueError(f"sinks={sinks}, window={window}: expected no negative number")
        self.num_key_value_heads, self.sinks, self.window = num_key_value_heads, sinks, window
        self.nonfinite = nonfinite
        self.dtype = DTYPES[dtype]
        self._codecs = (keys, values)
        self._streams: list[_Stream] = []
        self._packed = 0
        self._padding: list[int] = []
        self._forget_queries()

    # ---- regions -----------------------------------------------------------------------------------------------------

    @property
    def length(self) -> int:
        return self._streams[0].rows.shape[2] if self._streams else 0

    @property
    def batch_size(self) -> int:
        return self._streams[0].rows.shape[0] if self._streams else 0

    @property
    def sink_tokens(self) -> int:
        return min(self.length, self.sinks)

    @property
    def packed_tokens(self) -> int:
        return self._packed

    @property
    def window_tokens(self) -> int:
        return self.length - self.sink_tokens - self._packed

    @property
    def nbytes(self) -> int:
        return sum(stream.nbytes(self._packed, self.dtype.itemsize) for stream in self._streams)

    @property
    def bits_per_element(self) -> float:
        return 8.0 * self.nbytes / max(1, sum(stream.rows.numel() for stream in self._streams))

    # ---- changes -----------------------------------------------------------------------------------------------------

    def set_padding(self, padding: Sequence[int]) -> None:
        """Tokens of padding in front of each sequence that the first append will bring."""
        if self.length:
            raise ValueError(f"set_padding: expected a layer without tokens, got {self.length}")
        self._padding = list(padding)

    def append(self, keys: Tensor, values: Tensor, query: Tensor | None = None) -> None:
        """Add n tokens, query of the last of them, and pack what leaves the window. Refused, it changes nothing."""
        for name, rows, codec in zip(("keys", "values"), (keys, values), self._codecs, strict=True):
            batch = self.batch_size or len(self._padding) or keys.shape[0]
            expected = (batch, self.num_key_value_heads, keys.shape[2], codec.head_dim)
            if tuple(rows.shape) != expected or rows.dtype != self.dtype:
                raise ValueError(f"{name}: expected {self.dtype} {expected}, got {rows.dtype} {tuple(rows.shape)}")
            if self.nonfinite == "raise" and not bool(torch.isfinite(rows).all()):
                raise ValueError(f"{name}: {int((~torch.isfinite(rows)).any(-1).sum())} rows are not finite")
        if not self._streams:
            pairs = zip(self._codecs, (keys, values), strict=True)
            self._streams = [_Stream(codec, rows, self._padding) for codec, rows in pairs]
        else:
            for stream, rows in zip(self._streams, (keys, values), strict=True):
                stream.append(rows, self._padding)
        if query is not None:
            self.observe_queries(query)
        self._evict()

    # ---- queries -----------------------------------------------------------------------------------------------------

    def _forget_queries(self) -> None:
        self._squares = torch.zeros(())  # sums [B, Hkv, D]
        self._seen = torch.zeros(0)  # tokens [B]
        self._factors: Tensor | None = None

    @property
    def wants_queries(self) -> bool:
        return self._codecs[0].query_exponent > 0.0 and self._factors is None

    def observe_queries(self, query: Tensor) -> None:
        """Queries [B, Hq, L, Dk] of the last L tokens."""
        if not self.wants_queries:
            return
        rows = query.to(torch.float64).unflatten(1, (self.num_key_value_heads, -1))
        seen = torch.ones(query.shape[0], query.shape[2], dtype=torch.float64)
        for sequence, count in enumerate(self._padding):
            seen[sequence, : max(0, count - (self.length - query.shape[2]))] = 0.0
        rows = torch.where(torch.isfinite(rows).all(-1, keepdim=True), rows, 0.0)
        self._squares = self._squares + (rows.square() * seen[:, None, None, :, None]).sum((2, 3))
        self._seen = seen.sum(1) + (self._seen if self._seen.numel() else 0.0)

    def _fix_factors(self) -> None:
        """All sequences together: their tests see enough queries in all, or in none."""
        if self.wants_queries and self._seen.numel() and bool((self._seen >= LEAST_QUERIES).all()):
            self._factors = self._codecs[0].query_factors(self._squares)

    def _evict(self) -> None:
        stop = self.length - self.sinks - self.window
        if self._streams[0].completes_block(self.sinks):
            self._fix_factors()
        for stream in self._streams:
            factors = self._factors if stream is self._streams[0] else None
            stream.fix_statistics(self.sinks, self._padding, factors)
            stop = stream.packable(stop)
        stop = max(self._packed, stop)
        for stream in self._streams:
            stream.pack(self.sinks, self._packed, stop, self.nonfinite, self._padding)
        self._packed = stop

    def crop(self, length: int) -> None:
        """Forget every token from `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length={length}: expected 0 to {self.length}")
        self._packed = max(0, min(self._packed, length - self.sinks))
        for stream in self._streams:
            stream.crop(length, self.sinks, self._packed)

    def gather(self, indices: Sequence[int]) -> None:
        """New batch row i = old batch row indices[i]."""
        if any(not 0 <= index < self.batch_size for index in indices):
            raise ValueError(f"indices={list(indices)}: expected rows 0 to {self.batch_size - 1}")
        if self._padding:
            self._padding = [self._padding[index] for index in indices]
        for stream in self._streams:
            stream.gather(torch.tensor(list(indices), dtype=torch.int64))
        if self._seen.numel():
            self._seen, self._squares = self._seen[list(indices)], self._squares[list(indices)]
        if self._factors is not None:
            self._factors = self._factors[list(indices)]

    def reset(self) -> None:
        self._streams = []
        self._packed = 0
        self._padding = []
        self._forget_queries()

    def clone(self) -> ReferenceLayer:
        return copy.deepcopy(self)

    # ---- reads -------------------------------------------------------------------------------------------------------

    def decode_keys(self, output: Tensor) -> None:
        output.copy_(self._streams[0].rows)

    def decode_values(self, output: Tensor) -> None:
        output.copy_(self._streams[1].rows)

    def attend(
        self,
        query: Tensor,
        output: Tensor,
        *,
        scale: float,
        mask: Tensor | None = None,
        causal: bool = False,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
        fresh_keys: Tensor | None = None,
        fresh_values: Tensor | None = None,
    ) -> None:
        """Attention of query over all T tokens, written to output; a query that sees nothing gives zeros."""
        keys, values = self._read(0, fresh_keys), self._read(1, fresh_values)
        shared = query.shape[1] // self.num_key_value_heads
        keys, values = keys.repeat_interleave(shared, dim=1), values.repeat_interleave(shared, dim=1)
        scores = query.to(torch.float64) @ keys.transpose(-1, -2) * scale
        scores = scores - self._noise(query.to(torch.float64) * scale, fresh_keys)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        visible = torch.ones_like(scores, dtype=torch.bool)
        if causal:
            visible = visible.tril(self.length - query.shape[2])
        for sequence, count in enumerate(self._padding):
            visible[sequence, ..., :count] = False
        if mask is not None and mask.dtype == torch.bool:
            visible = visible & mask
        elif mask is not None:
            visible = visible & (mask != -math.inf)
            scores = scores + torch.where(mask == -math.inf, 0.0, mask.to(torch.float64))
        scores = scores.masked_fill(~visible, -math.inf)
        if sink_logits is not None:
            extra = sink_logits.to(torch.float64)[None, :, None, None].expand(*scores.shape[:-1], 1)
            scores = torch.cat([scores, extra], dim=-1)
        top = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).min)
        weights = torch.exp(scores - top)
        total = weights.sum(-1, keepdim=True)
        weights = torch.where(total == 0.0, 0.0, weights / total)[..., : self.length]
        # A token that is not finite spoils only the queries that see it (0 * NaN would spoil all).
        finite = torch.isfinite(values).all(-1)
        spoilt = (visible & ~finite[:, :, None, :]).any(-1, keepdim=True)
        attended = weights @ torch.where(finite[..., None], values, 0.0)
        output.copy_(torch.where(spoilt, math.nan, attended))

    def _noise(self, query: Tensor, fresh: Tensor | None) -> Tensor:
        """What noise takes off the scores [B, Hq, L, T] of queries [B, Hq, L, Dk] that are scaled as scores are."""
        factors, head_map = self._streams[0].noise.to(torch.float64), self._codecs[0].map
        if head_map is None:
            return torch.zeros(())
        if fresh is not None:
            factors[:, :, self.length - fresh.shape[2] :] = 0.0
        heads = query.unflatten(1, (self.num_key_value_heads, -1)).unbind(1)
        taken = torch.stack([head_map.score_noise(queries, head) for head, queries in enumerate(heads)], dim=1)
        return (taken[..., None] * factors[:, :, None, None]).flatten(1, 2)

    def _read(self, index: int, fresh: Tensor | None) -> Tensor:
        if not self._streams:
            raise ValueError("the layer is empty: expected an append first")
        rows = self._streams[index].rows.to(torch.float64)
        if fresh is not None:
            rows[:, :, self.length - fresh.shape[2] :] = fresh.to(torch.float64)
        return rows

"""`MethodCache`: a transformers cache that quantizes with any `Method`, step by step, and keeps what is read back.

Is: the stepping twin of the parallel simulation, for generation and tasks. A prompt attends to itself in full
precision, and so do all tokens up to the call with which sinks are chosen; a later call of several tokens attends to
them in full precision, and to those before as they are stored.
Is not: compact (decoded rows are held in the model's dtype), and for methods that know positions (keys before RoPE, a
mean that turns) not for left-padded batches, whose positions do not start at 0. Nor does it take noise off scores
(`Method.score_noise`): the model's attention makes them, from decoded rows. It warns once where a method asks for that;
the packed cache and the simulation do it.
Shapes: keys and values [B, Hkv, n, D].
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from ..layer import row_numbers
from ..sinks import inverse_order, keeps_first_rows, reordered, searched, sink_order, tokens_needed
from .memory_bits import EXACT_BITS
from .methods.base import Geometry, Method, Where
from .region_rule import RegionRule
from .rope import Rotary
from .simulation import rule_of

_NOISE = "{}: MethodCache does not take the noise of packed keys off scores, the packed cache and the simulation do"


class MethodLayer(DynamicLayer):
    """Sinks, packed past and window of one layer; `keys` and `values` hold what a reader sees.

    Sinks are chosen when and as `PackedLayer` does it, and lie in front from then on: `order` says where the first rows
    belong.
    Rows may be quantized before they leave the window, many at a time, since what a method makes of them is fixed as
    soon as their unit exists; they are read as quantized only once the rule says so.
    """

    def __init__(self, method: Method, rule: RegionRule, index: int, rotary: Rotary | None) -> None:
        super().__init__()
        self.method, self.rule, self.index = method, rule, index
        self._rope = rotary(index) if rotary is not None and method.before_rope else None
        self.packed_tokens = 0
        self._known = 0  # rows behind the sinks whose quantized form is in `_ahead` or in the store
        self._ahead: tuple[Tensor, Tensor] | None = None  # quantized rows [packed_tokens, _known)
        self._search = searched(method.sink_search, rule.sinks, rule.window)
        self._chosen = self._search == 0
        self.order: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store n tokens and return what they attend to."""
        past = self.get_seq_length()
        count = key_states.shape[2]
        waited = not self._chosen
        super().update(key_states, value_states)
        exact = self._rows()
        if waited and past + count >= tokens_needed(self._search):
            self._choose_sinks()
        self._pack(self.rule.packed(past + count))
        if waited or (past == 0 and count > 1):
            return exact
        keys, values = self._rows()
        if self.order is not None:
            keys, values = (reordered(x, inverse_order(self.order)) for x in (keys, values))
        if count == 1 or self.rule.sinks + self.packed_tokens <= past:
            return keys, values
        fresh = (key_states, value_states)
        keys, values = (torch.cat([x[:, :, :past], new], 2) for x, new in zip((keys, values), fresh, strict=True))
        return keys, values

    def _choose_sinks(self) -> None:
        keys, values = self._rows()
        self.order = sink_order(keys, values, self.rule.sinks, self._search)
        self.keys, self.values = reordered(keys, self.order), reordered(values, self.order)
        self._chosen = True

    def _rows(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def _pack(self, stop: int) -> None:
        """Let rows behind the sinks be read as quantized up to `stop`."""
        if stop <= self.packed_tokens:
            return
        if stop > self._known:
            self._look_ahead()
        assert self._ahead is not None
        count, begin = stop - self.packed_tokens, self.rule.sinks + self.packed_tokens
        rows, ahead = [], []
        for held, quantized in zip(self._rows(), self._ahead, strict=True):
            parts = [held[:, :, :begin], quantized[:, :, :count], held[:, :, begin + count :]]
            rows.append(torch.cat(parts, dim=2))
            ahead.append(quantized[:, :, count:])
        self.keys, self.values = rows
        self._ahead = (ahead[0], ahead[1])
        self.packed_tokens = stop

    def _look_ahead(self) -> None:
        known = self.rule.known(self.get_seq_length())
        begin, end = self.rule.sinks + self._known, self.rule.sinks + known
        made = []
        for held, is_key in zip(self._rows(), (True, False), strict=True):
            rows = held[:, :, begin:end].float()
            rope = self._rope.in_order(self.order) if is_key and self._rope is not None else None
            read = self.method.read_back(rows, Where(self.index, is_key, begin, rope))
            if read.rows.shape != rows.shape:
                found, expected = tuple(read.rows.shape), tuple(rows.shape)
                raise ValueError(f"{self.method.name}: fake_quantize returned {found}, expected {expected}")
            if read.noise is not None:
                warnings.warn(_NOISE.format(self.method.name), stacklevel=2)
            made.append(read.rows.to(held.dtype))
        before = self._ahead if self._ahead is not None else (made[0][:, :, :0], made[1][:, :, :0])
        keys, values = (torch.cat(pair, dim=2) for pair in zip(before, made, strict=True))
        self._ahead, self._known = (keys, values), known

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; what was packed stays packed.

        Where fewer tokens are left than sinks are chosen among and none of them is packed, the choice is open again.

        Raises ValueError if that would cut a unit of which rows are packed, whose exact rows are gone, or if it leaves
        packed rows of so few tokens without a sink that was chosen among more.
        """
        before = self.get_seq_length()
        length = before + tokens_to_remove if tokens_to_remove <= 0 else min(before, tokens_to_remove)
        packed = min(self.packed_tokens, max(0, length - self.rule.sinks))
        known = min(self._known, max(self.rule.known(max(0, length)), packed))
        reopens = length < tokens_needed(self._search) and not packed
        if not reopens and length < tokens_needed(self._search) and not keeps_first_rows(self.order, length):
            raise ValueError(f"a crop to {length} tokens: expected all chosen sinks among them, since some are packed")
        if known % self.rule.unit and not reopens:
            raise ValueError(
                f"{self.method.name}: a crop to {length} tokens cuts a unit of {self.rule.unit} packed rows"
            )
        held = self.keys, self.values
        super().crop(tokens_to_remove)
        if reopens:
            if self.order is not None:
                inverse = inverse_order(self.order)
                self.keys, self.values = (reordered(x, inverse)[:, :, :length] for x in held if x is not None)
            self.packed_tokens, self._known, self._ahead = 0, 0, None
            self.order, self._chosen = None, False
            return
        if self.order is not None:
            self.order = self.order[:, :length]
        if self._ahead is not None:
            self._ahead = (self._ahead[0][:, :, : known - packed], self._ahead[1][:, :, : known - packed])
        self.packed_tokens, self._known = packed, known

    def reset(self) -> None:
        """Forget all tokens."""
        self.is_initialized = False
        self.keys = self.values = None
        self.packed_tokens, self._known, self._ahead = 0, 0, None
        self.order, self._chosen = None, self._search == 0

    def _gather(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.get_seq_length():
            keys, values = self._rows()
            self.keys, self.values = change(keys), change(values)
            self.order = None if self.order is None else change(self.order)
            if self._ahead is not None:
                self._ahead = (change(self._ahead[0]), change(self._ahead[1]))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i of the batch becomes row `beam_idx[i]`."""
        self._gather(lambda x: x.index_select(0, beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row of the batch `repeats` times."""
        self._gather(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        if self.get_seq_length():
            rows = row_numbers(indices, self._rows()[0].shape[0])
            self._gather(lambda x: x[rows])

    @property
    def nbytes(self) -> int:
        """Counted bytes of the packed store that this layer stands for, sinks and window at 16 bits."""
        if not self.get_seq_length():
            return 0
        bits = 0.0
        for held, keys in zip(self._rows(), (True, False), strict=True):
            batch, heads, length, head_dim = held.shape
            element = self.method.bits(Geometry(self.index, heads, head_dim), keys)
            tokens = self.packed_tokens * element + (length - self.packed_tokens) * EXACT_BITS
            bits += batch * heads * head_dim * tokens
        return round(bits / 8)


class MethodCache(Cache):
    """A cache for `model.generate(past_key_values=...)` whose full-attention layers quantize with `method`.

    Args:
        config: the configuration of the model.
        method: prepared, if it needs calibration.
        window: the most recent tokens, exact.
        sinks: the first tokens, exact.
        rotary: `Rotary(model)`, for methods before RoPE.

    Raises:
        ValueError: a method before RoPE without `rotary`, or a window below 0.
    """

    def __init__(
        self, config: Any, method: Method, window: int = 128, sinks: int = 5, rotary: Rotary | None = None
    ) -> None:
        if method.before_rope and rotary is None:
            raise ValueError(f"rotary=None: expected Rotary(model), since {method.name} quantizes keys before RoPE")
        if method.uses_queries:
            raise ValueError(f"{method.name} needs queries, which a cache is not given: use QuantizedDynamicCache")
        stock = DynamicCache(config=config).layers
        layers: list[Any] = [
            MethodLayer(method, rule_of(method, index, window, sinks), index, rotary)
            if type(layer) is DynamicLayer
            else layer
            for index, layer in enumerate(stock)
        ]
        super().__init__(layers=layers)
        self.method = method

    def __repr__(self) -> str:
        return f"MethodCache({self.method.name}, {self.get_seq_length()} tokens)"

"""`PackedLayer`: one attention layer of the cache, in the protocol of transformers' cache layers.

Is: the way of keys and values into the native store, and the store's rows back as handles or tensors.
The store is where the first keys are: `Layer` in the CPU's memory, `CudaLayer` on a GPU, with the same methods.
Is not: the choice of which layers are packed (cache.py).
Shapes: keys [B, Hkv, n, Dk], values [B, Hkv, n, Dv].
"""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from ._native import CudaLayer, Layer, SkvqError
from .cuda_store import DEVICE_TYPES
from .display import LayerFigures
from .packed import AttentionCounts, PromptSnapshot, Snapshot
from .plan import DTYPE_NAMES, LayerPlan
from .sinks import inverse_order, reordered, sink_order, taken


def _stock_crop_takes_length() -> bool:
    try:
        DynamicLayer().crop(1)
    except ValueError:
        return False
    return True


# In older transformers a positive argument of `crop` is the length to keep, in the oldest 0 too; newer ones take the
# negative number of tokens to remove.
CROP_TAKES_LENGTH = _stock_crop_takes_length()
CROP_TAKES_LENGTH_ZERO = "max_length" in inspect.signature(DynamicLayer.crop).parameters


class PackedLayer(CacheLayerMixin):
    """Sinks, packed past and window of one layer.

    A prompt (several tokens into an empty layer) is attended in full precision. Where its queries have a say in how its
    keys are packed it waits for them: `update` returns handles that give back the given tensors (packed.py), and
    attention on them, or the next use of the layer, stores it. Afterwards `update` returns handles to what is packed; a
    call with several tokens attends to its own tokens in full precision and to those before as they are stored.

    Sinks are chosen among the first `plan.searched` tokens as soon as these are there, and the store is given them
    before the others: `order` says where its first rows belong. Tokens that come later, one by one or many at a time,
    change nothing about it; a first call of fewer tokens with a second one of many has the first one's to choose from.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = True

    _native: Layer | CudaLayer

    def __init__(self, plan: LayerPlan, index: int, counts: AttentionCounts) -> None:
        # Not the base's __init__: it assigns `keys` and `values`, which are computed here.
        self.plan = plan
        self.index = index
        self.counts = counts
        self.is_initialized = False
        self.padding: tuple[int, ...] = ()  # of each sequence of the next prompt
        self.waiting: tuple[torch.Tensor, torch.Tensor] | None = None  # a prompt that is not stored yet
        self.order: torch.Tensor | None = None  # positions [B, span] of the store's first rows; None: as they came
        self.sinks_chosen = plan.searched == 0
        self.wants_queries = False
        self.version = 0
        self.decoded_version = -1
        self.decoded_steps = 0

    @property
    def native(self) -> Layer | CudaLayer:
        """The native store, with everything in it."""
        if self.waiting is not None:
            self._store_prompt(None)
        return self._native

    @native.setter
    def native(self, store: Layer | CudaLayer) -> None:
        self._native = store

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Build the store for the shapes, the dtype and the device of the first keys and values."""
        problem = self._problem(key_states, value_states)
        if problem is not None:
            raise SkvqError(f"layer {self.index}: {problem}")
        heads, key_dim, value_dim = key_states.shape[1], key_states.shape[3], value_states.shape[3]
        try:
            self.native = self.plan.build(heads, key_dim, value_dim, key_states.dtype, key_states.device)
        except SkvqError as error:
            raise SkvqError(f"layer {self.index}: {error}") from None
        self.dtype, self.device = key_states.dtype, key_states.device
        self._heads, self.key_dim, self.value_dim = heads, key_dim, value_dim
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store n tokens; see the class for what is returned. After an error the layer is as before.

        Raises:
            SkvqError: keys or values are not [B, Hkv, n, D] of one dtype on one device, differ from what the layer
                holds, or have NaN or infinity (unless the configuration lets them through; a GPU's are counted).
        """
        was_initialized = self.is_initialized
        if not was_initialized:
            self.lazy_initialization(key_states, value_states)
        native = self.native
        past = native.length
        keys, values = key_states, value_states
        try:
            if past == 0 and self.padding:
                native.set_padding(self._padding_of(keys.shape[0]))
            needs_no_gradient = not (keys.requires_grad or values.requires_grad)
            if not needs_no_gradient:
                keys, values = self._detached(keys, values)
            if type(native) is CudaLayer:
                keys, values = _with_whole_rows(keys), _with_whole_rows(values)
            count = keys.shape[2]
            if count == 0 and past and self._problem(keys, values) is None:
                return self._snapshot().handles()
            waits = past == 0 and count > 1 and native.wants_queries and needs_no_gradient
            if waits:
                native.check(keys, values)
            else:
                self._append(keys, values)
        except Exception as error:
            problem = self._problem(key_states, value_states)
            if not was_initialized:
                self._drop_store()
            if problem is None and not isinstance(error, SkvqError):
                raise
            raise SkvqError(f"layer {self.index}: {problem or error}") from error
        self.version += 1
        if past == 0:
            self.wants_queries = native.wants_queries
            if waits:
                self.counts.prefill += 1
                self.waiting = (keys, values)
                return PromptSnapshot.of(self, keys, values).handles()
            if count > 1:
                self.counts.prefill += 1
                return key_states, value_states
        fresh = (keys, values) if count > 1 else (None, None)
        return self._snapshot(*fresh).handles()

    def _append(self, keys: torch.Tensor, values: torch.Tensor, query: torch.Tensor | None = None) -> None:
        """Rows to the store, with a choice of sinks where it is due; `query` is that of the last of these tokens."""
        if self.sinks_chosen:
            return self._native.append(keys, values, query)
        native, past, count, search = self._native, self._native.length, keys.shape[2], self.plan.searched
        if past == 0 and count >= search:
            order = sink_order(keys, values, self.plan.sinks, search, self._padding_of(keys.shape[0]))
            span = 0 if order is None else order.shape[1]
            if order is not None:
                known = 0 if query is None else max(0, query.shape[2] - (count - span))
                first = query[:, :, :known] if query is not None and known else None
                native.append(taken(keys, order), taken(values, order), first)
            if span < count:
                rest = None if query is None else query[:, :, -(count - span) :]
                try:
                    native.append(keys[:, :, span:], values[:, :, span:], rest)
                except Exception:
                    native.reset()  # as it was: without tokens
                    raise
            self.order, self.sinks_chosen = order, True
            return None
        if past > 0 and past + count > search:
            self._choose_sinks()
        return native.append(keys, values, query)

    def _choose_sinks(self) -> None:
        """Among stored tokens, all of them exact still."""
        native = self._native
        if self.plan.sinks < native.length <= self.plan.searched and not self.counts.capturing:
            rows = self._stored(True), self._stored(False)
            order = sink_order(*rows, self.plan.sinks, self.plan.searched, self._padding_of(native.batch_size))
            if order is not None:
                native.crop(0)
                native.append(*(reordered(x, order) for x in rows))
                self.order = order
        self.sinks_chosen = True

    def _stored(self, is_key: bool) -> torch.Tensor:
        """All rows as they are read, in the order of their positions."""
        output = torch.empty(self._shape(is_key), dtype=self.dtype, device=self.device)
        self.decode_into(output, is_key)
        return output

    def decode_into(self, output: torch.Tensor, is_key: bool) -> None:
        """Keys [B, Hkv, T, Dk] or values [B, Hkv, T, Dv] of all tokens, decoded."""
        native = self.native
        (native.decode_keys if is_key else native.decode_values)(output)
        if self.order is not None:
            output[:, :, : self.order.shape[1]] = taken(output, inverse_order(self.order))

    def _snapshot(self, keys: torch.Tensor | None = None, values: torch.Tensor | None = None) -> Snapshot:
        return Snapshot(self, self._shape(True), self._shape(False), self.dtype, self.device, keys, values)

    def take_queries(self, query: torch.Tensor) -> None:
        """Queries [B, Hq, L, Dk] of the last L tokens; see the class."""
        if self.waiting is not None:
            self._store_prompt(query)
        else:
            self._native.observe_queries(query)
        self.wants_queries = self._native.wants_queries

    def _store_prompt(self, query: torch.Tensor | None) -> None:
        assert self.waiting is not None
        (keys, values), self.waiting = self.waiting, None
        try:
            self._append(keys, values, query)
        except Exception as error:
            self._drop_store()
            raise SkvqError(f"layer {self.index}: {error}") from error

    def _padding_of(self, batch: int) -> list[int]:
        """Padding of each sequence of a batch in which `generate` has repeated every prompt; empty: none."""
        if not self.padding:
            return []
        repeats, rest = divmod(batch, len(self.padding))
        if rest:
            raise SkvqError(
                f"key_states: batch {batch}, expected a multiple of the {len(self.padding)} rows of the attention_mask "
                "that the cache was given"
            )
        return [count for count in self.padding for _ in range(repeats)]

    def _detached(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if torch.is_grad_enabled() and not self.counts.warned_of_gradients:
            self.counts.warned_of_gradients = True
            warnings.warn(
                "keys and values that need a gradient reached a packed cache: no gradient flows through stored tokens. "
                "Run the model under torch.no_grad() or torch.inference_mode().",
                UserWarning,
                stacklevel=3,
            )
        return keys.detach(), values.detach()

    def _problem(self, keys: torch.Tensor, values: torch.Tensor) -> str | None:
        """What is wrong with the form of keys and values, in words; None if nothing is."""
        for name, x in (("key_states", keys), ("value_states", values)):
            if not isinstance(x, torch.Tensor) or x.ndim != 4:
                got = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
                return f"{name}: got {got}, expected a tensor [batch, num_key_value_heads, tokens, head_dim]"
            if x.device.type not in DEVICE_TYPES:
                return f"{name}: on device {x.device}, expected {' or '.join(DEVICE_TYPES)}"
            if self.is_initialized and x.device != self.device:
                return f"{name}: on device {x.device}, expected {self.device} as the tokens stored before"
            if x.dtype not in DTYPE_NAMES:
                return f"{name}: dtype {x.dtype}, expected one of {', '.join(DTYPE_NAMES.values())}"
            if 0 in (x.shape[0], x.shape[1], x.shape[3]):
                return f"{name}: shape {tuple(x.shape)}, expected at least one sequence, head and channel"
        if keys.device != values.device:
            return f"value_states: on device {values.device}, expected {keys.device} as key_states"
        if keys.shape[:3] != values.shape[:3] or keys.dtype != values.dtype:
            return (
                f"value_states: {values.dtype} {tuple(values.shape)}, expected batch, heads, tokens and dtype of "
                f"key_states, {keys.dtype} {tuple(keys.shape)}"
            )
        if not self.is_initialized:
            return None
        batch = self.native.batch_size if self.native.length else keys.shape[0]
        for name, x, head_dim in (("key_states", keys, self.key_dim), ("value_states", values, self.value_dim)):
            if (x.shape[0], x.shape[1], x.shape[3]) != (batch, self._heads, head_dim) or x.dtype != self.dtype:
                return (
                    f"{name}: {x.dtype} {tuple(x.shape)}, expected {self.dtype} with batch {batch}, {self._heads} "
                    f"heads and head_dim {head_dim} as the tokens stored before"
                )
        return None

    # ---- lengths -----------------------------------------------------------------------------------------------------

    def get_seq_length(self) -> int:
        """Stored tokens."""
        if self.waiting is not None:
            return self.waiting[0].shape[2]
        return self._native.length if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        """Length and offset of the keys that a call with `query_length` new tokens attends to.

        Older transformers pass the tokens' positions instead of their number.
        """
        count = query_length.shape[0] if isinstance(query_length, torch.Tensor) else query_length
        return self.get_seq_length() + count, 0

    def get_max_length(self) -> int:
        """-1: the layer grows without a bound."""
        return -1

    # The name of older transformers.
    get_max_cache_shape = get_max_length

    @property
    def batch_rows(self) -> int:
        """Sequences in the store, 0 while it is empty."""
        return self.native.batch_size if self.get_seq_length() else 0

    # ---- reads -------------------------------------------------------------------------------------------------------

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]
        """All keys [B, Hkv, T, Dk], decoded; None while the layer is empty."""
        return self._decoded(True)

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        """All values [B, Hkv, T, Dv], decoded; None while the layer is empty."""
        return self._decoded(False)

    def _decoded(self, is_key: bool) -> torch.Tensor | None:
        if not self.get_seq_length():
            return None
        self.counts.decoded["layer.keys" if is_key else "layer.values"] += 1
        return self._stored(is_key)

    def _shape(self, is_key: bool) -> tuple[int, int, int, int]:
        native = self.native
        return native.batch_size, self._heads, native.length, self.key_dim if is_key else self.value_dim

    def figures(self) -> LayerFigures:
        """Regions, bytes and elements, for tables."""
        if not self.get_seq_length():
            return LayerFigures(self.kind, 0, 0, 0, 0, 0, self.nbytes, 0)
        native = self.native
        elements = native.batch_size * self._heads * native.length * (self.key_dim + self.value_dim)
        regions = (native.sink_tokens, native.packed_tokens, native.window_tokens)
        return LayerFigures(self.kind, native.batch_size, self._heads, *regions, self.nbytes, elements)

    @property
    def kind(self) -> str:
        """The formats of keys and values in short, such as "K2 V1.6"."""
        return f"K{self.plan.keys.options.bits:g} V{self.plan.values.options.bits:g}"

    @property
    def nbytes(self) -> int:
        """Bytes held: codes, metadata, statistics, sinks, window and unused page rows."""
        return self.native.nbytes if self.is_initialized else 0

    def nonfinite_rows(self) -> int:
        """Packed rows of keys and of values that were not finite, as a store on a GPU counts them; waits for it."""
        store = self.native if self.is_initialized else None
        return store.nonfinite_rows() if isinstance(store, CudaLayer) else 0

    def __repr__(self) -> str:
        x = self.figures()
        return f"PackedLayer({x.kind}, tokens {x.sinks} | {x.packed} | {x.window}, {x.nbytes} bytes)"

    # ---- changes -----------------------------------------------------------------------------------------------------

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens: a negative count (with older transformers also a length to keep, if positive).

        Tokens that were packed stay packed, also if they come within the window again. (But where fewer tokens are left
        than sinks are chosen among, the choice is open again, and these few are packed anew when the text has grown.)
        """
        length = self.length_after_crop(tokens_to_remove)
        if length < self.get_seq_length():
            native = self.native  # with a prompt that waits, and so with its order
            span = 0 if self.order is None else self.order.shape[1]
            if not length:
                native.reset()  # the next tokens may come in another batch size
                self.padding = ()
            elif length < span:
                rows = [self._stored(is_key)[:, :, :length] for is_key in (True, False)]
                native.crop(0)
                native.append(*rows)
            else:
                native.crop(length)
            if length < max(span, self.plan.searched):
                self.order, self.sinks_chosen = None, False
            self.version += 1

    def length_after_crop(self, tokens_to_remove: int) -> int:
        """The length that `crop` leaves. Raises SkvqError if there is none."""
        length = self.get_seq_length()
        if tokens_to_remove > 0 or (tokens_to_remove == 0 and CROP_TAKES_LENGTH_ZERO):
            if CROP_TAKES_LENGTH:
                return min(length, tokens_to_remove)
            raise SkvqError(f"tokens_to_remove={tokens_to_remove}: expected 0 or a negative number of tokens")
        if not self.is_initialized:
            return 0
        if length + tokens_to_remove < 0:
            raise SkvqError(f"tokens_to_remove={tokens_to_remove}: expected {-length} to 0 for {length} tokens")
        return length + tokens_to_remove

    def gather(self, indices: list[int]) -> None:
        """New batch row i is old row `indices[i]`; no packed data is copied."""
        if self.get_seq_length():
            padding = self._padding_of(self.native.batch_size)
            self.native.gather(indices)
            self.padding = tuple(padding[row] for row in indices) if padding else ()
            if self.order is not None:
                self.order = self.order[indices]
            self.version += 1

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i of the batch becomes row `beam_idx[i]`."""
        self.gather(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row of the batch `repeats` times."""
        self.gather([row for row in range(self.batch_rows) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices` (numbers, or a boolean for every row)."""
        self.gather(row_numbers(indices, self.batch_rows))

    def reset(self) -> None:
        """Forget all tokens and their padding; the next ones may have another batch size, dtype or number of heads."""
        self._drop_store()
        self.padding = ()

    def _drop_store(self) -> None:
        if self.is_initialized:
            del self._native
        self.is_initialized = False
        self.waiting = None
        self.order, self.sinks_chosen = None, self.plan.searched == 0
        self.wants_queries = False
        self.version += 1

    def offload(self) -> None:
        """Nothing to do: the store stays where the first keys were."""

    def prefetch(self) -> None:
        """Nothing to do: attention runs where the store is."""

    # ---- copies ------------------------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLayer:
        twin = PackedLayer.__new__(PackedLayer)
        twin.__dict__.update(self.__dict__)
        memo[id(self)] = twin
        twin.counts = copy.deepcopy(self.counts, memo)
        if self.is_initialized:
            twin._native = self.native.clone()
            twin.waiting = None
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise SkvqError(
            "a packed cache layer cannot be pickled or copied shallowly: use copy.deepcopy, or save its keys and values"
        )


def _with_whole_rows(x: torch.Tensor) -> torch.Tensor:
    """`x` with channels that lie together."""
    return x if x.stride(-1) == 1 else x.contiguous()


def row_numbers(indices: torch.Tensor, batch: int) -> list[int]:
    """Row numbers from what `batch_select_indices` takes. Raises SkvqError if one is outside the batch."""
    indices = torch.as_tensor(indices)
    if indices.dtype == torch.bool:
        if indices.shape != (batch,):
            raise SkvqError(f"indices: boolean of shape {tuple(indices.shape)}, expected ({batch},), one for every row")
        indices = indices.nonzero()[:, 0]
    rows: list[int] = indices.tolist() if indices.ndim else [int(indices)]
    if any(not -batch <= row < batch for row in rows):
        raise SkvqError(f"indices={rows}: expected rows from 0 to {batch - 1}")
    return [row % batch for row in rows] if batch else rows

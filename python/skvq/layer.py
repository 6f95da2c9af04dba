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
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from ._native import CudaLayer, Layer, SkvqError
from .display import LayerFigures
from .packed import AttentionCounts, PromptSnapshot, Snapshot, hides_first_token
from .plan import LayerPlan
from .sinks import inverse_order, keeps_first_rows, sink_order, taken, tokens_needed
from .states_form import HeldForm, form_problem
from .waiting import SeenQueries, WaitingRows, fill

if TYPE_CHECKING:
    from .calibrate.prompt import PromptFit


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


# A call with so many tokens may be a part of a prompt; candidates of assisted decoding are fewer.
CHUNK_TOKENS = 64


class Built(NamedTuple):
    """A store with rows, the order of its first ones, and the plan that it was built by."""

    store: Layer | CudaLayer
    order: torch.Tensor | None
    plan: LayerPlan


class PackedLayer(CacheLayerMixin):
    """Sinks, packed past and window of one layer.

    What is given to an empty layer waits, as plain tensors, until all that decides how it is packed is known, and is
    attended in full precision meanwhile: `update` returns tensors, or handles that give plain tensors back (packed.py).
    Sinks are chosen among the first `plan.searched` tokens of every sequence, so fewer of them wait for more, in as
    many calls as they come (sinks.py). Where queries have a say in how keys are packed, the call that completes them
    waits for its own: attention on what it returned, or the next use of the layer, stores all, the chosen rows first
    (`order` says where the store's first rows belong), as if it had come in one call.

    If the layer knows how (`fit`), and that is a prompt of at least `fit_tokens` whose queries were seen, what it is
    packed with is fitted to it first. That stays until the layer is empty again. A prompt that comes in calls of at
    least `CHUNK_TOKENS` waits until it has as many, or a call of fewer tokens comes.

    Afterwards `update` returns handles to what is packed; a call with several tokens attends to its own tokens in full
    precision and to those before as they are stored.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = True

    _native: Layer | CudaLayer

    def __init__(
        self,
        plan: LayerPlan,
        index: int,
        counts: AttentionCounts,
        *,
        fit: PromptFit | None = None,
        fit_tokens: int = 0,
    ) -> None:
        # Not the base's __init__: it assigns `keys` and `values`, which are computed here.
        self.plan = self._given_plan = plan  # of a fitted layer, `plan` has the options without the static data
        self.fit = fit
        self.fit_tokens = fit_tokens  # of the shortest prompt to fit to
        self._fitted_nbytes = 0
        self._has_unknown_padding = False  # as a mask says that hides tokens, of which the layer was not told
        self._waits_to_fit = False  # the tokens that wait are fewer than what the layer is fitted to
        self.index = index
        self.counts = counts
        self.is_initialized = False
        self.padding: tuple[int, ...] = ()  # of each sequence of the next prompt
        self.waiting: WaitingRows | None = None  # all tokens, while the store has none
        self.seen: dict[int, SeenQueries] = {}  # queries of waiting rows, by attention that reads them: mostly one
        self.readers = 0  # that have shown the queries of the last call
        self.order: torch.Tensor | None = None  # positions [B, span] of the store's first rows; None: as they came
        self.wants_queries = False
        self.version = 0
        self.decoded_version = -1
        self.decoded_steps = 0

    @property
    def native(self) -> Layer | CudaLayer:
        """The native store; without rows that wait, for which there is `settle`."""
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
        """Take n tokens; see the class for what is returned. After an error the layer is as before.

        Raises:
            SkvqError: keys or values are not [B, Hkv, n, D] of one dtype on one device, differ from what the layer
                holds, or have NaN or infinity (unless the configuration lets them through; a GPU's are counted).
        """
        was_initialized = self.is_initialized
        if not was_initialized:
            self.lazy_initialization(key_states, value_states)
        try:
            return self._updated(key_states, value_states)
        except Exception as error:
            problem = self._problem(key_states, value_states)
            if not was_initialized:
                self._drop_store()
            if problem is None and not isinstance(error, SkvqError):
                raise
            raise SkvqError(f"layer {self.index}: {problem or error}") from error

    def _updated(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = key_states, value_states
        needs_no_gradient = not (keys.requires_grad or values.requires_grad)
        if not needs_no_gradient:
            keys, values = self._detached(keys, values)
        if type(self._native) is CudaLayer:
            keys, values = _with_whole_rows(keys), _with_whole_rows(values)
        past, count, waiting = self.get_seq_length(), keys.shape[2], self.waiting
        if count == 0 and past and self._problem(keys, values) is None:
            return self._snapshot().handles() if waiting is None else self._waiting_handles(waiting)
        if past == 0 or (
            waiting is not None and (past < self._needed or (self._waits_to_fit and count >= CHUNK_TOKENS))
        ):
            rows = self._joined(keys, values, needs_no_gradient)
            if rows.length == 1 and self.waiting is None:
                return self._snapshot().handles()
            self.counts.prefill += 1
            if past == 0 and not (self.wants_queries and needs_no_gradient):
                return key_states, value_states
            return self._waiting_handles(rows)
        if waiting is None:
            self._native.append(keys, values)
        else:  # a prompt whose queries nobody showed
            self._check_joining(keys, values)
            built = self._built(waiting, self.seen.get(0))
            built.store.append(keys, values)
            self._hold(built)
        self._count_call()
        return self._snapshot(*((keys, values) if count > 1 else (None, None))).handles()

    def _count_call(self) -> None:
        self.version += 1
        self.readers = 0
        if self.waiting is None and self.seen:
            self.seen = {}

    @property
    def _needed(self) -> int:
        """Tokens that must be known before any is stored."""
        return tokens_needed(self.plan.searched, self.padding)

    @property
    def _is_fitted(self) -> bool:
        return self.plan is not self._given_plan

    @property
    def _may_be_fitted(self) -> bool:
        """Whether the layer is to be fitted to a prompt, and is not yet."""
        return self.fit is not None and not (self._is_fitted or self._has_unknown_padding)

    def _suffices_to_fit(self, length: int) -> bool:
        return length - max(self.padding, default=0) >= self.fit_tokens

    def _check_joining(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Refuse rows that cannot be stored with those that wait."""
        if self.waiting is not None and (problem := self._problem(keys, values)) is not None:
            raise SkvqError(problem)
        self._padding_of(keys.shape[0])
        self._native.check(keys, values)

    def _joined(self, keys: torch.Tensor, values: torch.Tensor, shows_queries: bool) -> WaitingRows:
        """All rows, those that wait and these: they wait on, or are stored if nothing is missing."""
        self._check_joining(keys, values)
        rows = WaitingRows(keys, values) if self.waiting is None else self.waiting.followed_by(keys, values)
        shows_queries &= self._native.wants_queries
        is_chunk = shows_queries and keys.shape[2] >= CHUNK_TOKENS
        self._waits_to_fit = is_chunk and self._may_be_fitted and not self._suffices_to_fit(rows.length)
        if rows.length < self._needed or self._waits_to_fit:
            self.waiting = rows = rows.owned() if self.waiting is None else rows
        elif shows_queries and rows.length > 1:
            self.waiting = rows
        else:
            self._hold(self._built(rows, self.seen.get(0)))
        self.wants_queries = self._native.wants_queries
        self._count_call()
        return rows

    def _waiting_handles(self, rows: WaitingRows) -> tuple[torch.Tensor, torch.Tensor]:
        return PromptSnapshot.of(self, rows.keys, rows.values, self._padding_of(rows.keys.shape[0])).handles()

    def _built(self, rows: WaitingRows, seen: SeenQueries | None) -> Built:
        """A store with these rows, of which these queries were seen; the layer stays as it is."""
        padding = self._padding_of(rows.keys.shape[0])
        order, plan = None, self.plan
        if plan.searched:
            order = sink_order(rows.keys, rows.values, plan.sinks, plan.searched, padding)
        plan = self._fitted(rows, seen, padding, order)
        store = self._native.clone() if plan is self.plan else self._new_store(plan)
        if padding and not store.batch_size:
            store.set_padding(padding)
        fill(store, rows, order, seen)
        return Built(store, order, plan)

    def _fitted(
        self, rows: WaitingRows, seen: SeenQueries | None, padding: list[int], order: torch.Tensor | None
    ) -> LayerPlan:
        """The plan fitted to these rows, or the layer's own if it is not to be fitted, was before, or cannot be."""
        if self.fit is None or seen is None or not self._suffices_to_fit(rows.length):
            return self.plan
        if not self._may_be_fitted:
            if self._has_unknown_padding:
                self.counts.not_fitted[self.index] = "padding that set_padding was not told of"
            return self.plan
        found = self.fit.fitted(self.plan, self.index, rows, seen, padding, order)
        if isinstance(found, LayerPlan):
            self.counts.fitted[self.index] = rows.length
            return found
        self.counts.not_fitted[self.index] = found
        return self.plan

    def _new_store(self, plan: LayerPlan) -> Layer | CudaLayer:
        return plan.build(self._heads, self.key_dim, self.value_dim, self.dtype, self.device)

    def _hold(self, built: Built) -> None:
        """Nothing waits any more."""
        self._native, self.order, self.waiting = built.store, built.order, None
        self._waits_to_fit = False
        self.wants_queries = built.store.wants_queries
        self.seen.pop(0, None)
        if built.plan is not self.plan:
            self._fitted_nbytes = built.plan.nbytes
            self.plan = built.plan.without_static_data()

    def settle(self) -> Layer | CudaLayer:
        """Store what waits, with the queries seen so far, and return the store.

        If that is fewer tokens than are looked at for sinks, these are chosen among what is there.
        """
        if self.waiting is not None:
            self._hold(self._built(self.waiting, self.seen.get(0)))
        return self._native

    def reserve(self, tokens: int) -> None:
        """Settle, and take memory for so many tokens in all; for stores on a GPU. Refused, it changes nothing."""
        waiting, seen = self.waiting, self.seen.get(0)
        built = Built(self._native, self.order, self.plan) if waiting is None else self._built(waiting, seen)
        if not isinstance(built.store, CudaLayer):
            raise SkvqError("a store on the CPU, expected one on a GPU")
        built.store.reserve(tokens)
        self._hold(built)

    def _stored(self, is_key: bool) -> torch.Tensor:
        """All rows as they are read, in the order of their positions."""
        output = torch.empty(self._shape(is_key), dtype=self.dtype, device=self.device)
        self.decode_into(output, is_key)
        return output

    def decode_into(self, output: torch.Tensor, is_key: bool) -> None:
        """Keys [B, Hkv, T, Dk] or values [B, Hkv, T, Dv] of all tokens of the store, decoded."""
        native = self._native
        (native.decode_keys if is_key else native.decode_values)(output)
        if self.order is not None:
            output[:, :, : self.order.shape[1]] = taken(output, inverse_order(self.order))

    def _snapshot(self, keys: torch.Tensor | None = None, values: torch.Tensor | None = None) -> Snapshot:
        return Snapshot(self, self._shape(True), self._shape(False), self.dtype, self.device, keys, values)

    def take_queries(self, query: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Queries [B, Hq, L, Dk] of the last L tokens; see the class. Layers that share these keys come one by one.

        If their mask [B|1, Hq|1, L|1, T] hides padding that the layer was not told of, positions are not known, and
        nothing is fitted.
        """
        if mask is not None and not self.padding and self._may_be_fitted:
            self._has_unknown_padding = hides_first_token(mask)
        length, reader = self.get_seq_length(), self.readers
        seen = self.seen.get(reader)
        seen = SeenQueries(query, length) if seen is None else seen.followed_by(query, length)
        if self.waiting is None:
            self._native.observe_queries(seen.query)
        elif length < self._needed or self._waits_to_fit:
            self.seen[reader] = seen
        else:
            try:
                built = self._built(self.waiting, seen)
            except Exception as error:
                raise SkvqError(f"layer {self.index}: {error}") from error
            self._hold(built)
        self.readers += 1
        self.wants_queries = self._native.wants_queries

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
                stacklevel=4,
            )
        return keys.detach(), values.detach()

    def _problem(self, keys: torch.Tensor, values: torch.Tensor) -> str | None:
        """What is wrong with the form of keys and values, in words; None if nothing is."""
        held = None
        if self.is_initialized:
            batch = self.batch_rows or None
            held = HeldForm(self.device, self.dtype, batch, self._heads, self.key_dim, self.value_dim)
        return form_problem(keys, values, held)

    # ---- lengths -----------------------------------------------------------------------------------------------------

    def get_seq_length(self) -> int:
        """Tokens, with those that wait."""
        if self.waiting is not None:
            return self.waiting.length
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
        """Sequences, 0 without tokens."""
        if self.waiting is not None:
            return self.waiting.keys.shape[0]
        return self._native.batch_size if self.get_seq_length() else 0

    # ---- reads -------------------------------------------------------------------------------------------------------

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]
        """All keys [B, Hkv, T, Dk], decoded, those that wait as they came; None while the layer is empty."""
        return self._decoded(True)

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        """All values [B, Hkv, T, Dv], decoded, those that wait as they came; None while the layer is empty."""
        return self._decoded(False)

    def _decoded(self, is_key: bool) -> torch.Tensor | None:
        if not self.get_seq_length():
            return None
        if self.waiting is not None:
            rows = (self.waiting.keys if is_key else self.waiting.values).clone()
            for row, count in zip(rows, self._padding_of(rows.shape[0]), strict=False):
                row[:, :count] = 0.0
            return rows
        self.counts.decoded["layer.keys" if is_key else "layer.values"] += 1
        return self._stored(is_key)

    def _shape(self, is_key: bool) -> tuple[int, int, int, int]:
        native = self._native
        return native.batch_size, self._heads, native.length, self.key_dim if is_key else self.value_dim

    def figures(self) -> LayerFigures:
        """Regions, bytes and elements, for tables; of tokens that wait none is packed."""
        batch, length = self.batch_rows, self.get_seq_length()
        if not length:
            return LayerFigures(self.kind, 0, 0, 0, 0, 0, self.nbytes, 0)
        native, sinks = self._native, min(length, self.plan.sinks)
        regions = (native.sink_tokens, native.packed_tokens, native.window_tokens)
        if self.waiting is not None:
            regions = (sinks, 0, length - sinks)
        elements = batch * self._heads * length * (self.key_dim + self.value_dim)
        return LayerFigures(self.kind, batch, self._heads, *regions, self.nbytes, elements)

    @property
    def kind(self) -> str:
        """The formats of keys and values in short, such as "K2 V1.6"."""
        fitted = " fitted" if self._is_fitted else ""
        return f"K{self.plan.keys.options.bits:g} V{self.plan.values.options.bits:g}{fitted}"

    @property
    def nbytes(self) -> int:
        """Bytes held: codes, metadata, statistics, sinks, window, unused page rows, the order of the first rows, what
        was fitted to the prompt; rows that wait, and queries that were seen of them.
        """
        order = 0 if self.order is None else self.order.nbytes
        waiting = 0 if self.waiting is None else self.waiting.nbytes
        seen = sum(x.query.nbytes for x in self.seen.values())
        return (self._native.nbytes if self.is_initialized else 0) + order + waiting + seen + self._fitted_nbytes

    def nonfinite_rows(self) -> int:
        """Packed rows of keys and of values that were not finite, as a store on a GPU counts them; waits for it."""
        store = self._native if self.is_initialized else None
        return store.nonfinite_rows() if isinstance(store, CudaLayer) else 0

    def __repr__(self) -> str:
        x = self.figures()
        return f"PackedLayer({x.kind}, tokens {x.sinks} | {x.packed} | {x.window}, {x.nbytes} bytes)"

    # ---- changes -----------------------------------------------------------------------------------------------------

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens: a negative count (with older transformers also a length to keep, if positive).

        Tokens that were packed stay packed, also if they come within the window again. Where fewer tokens are left than
        sinks are chosen among and none of them is packed, they wait again, as if the others had never been there.
        (But where, of so few tokens, some are packed and a chosen sink is removed, the packed ones wait as they are
        read, and are packed a second time when the text has grown.)
        """
        length, waiting = self.length_after_crop(tokens_to_remove), self.waiting
        if length == self.get_seq_length():
            return
        if not length:
            self._native.reset()  # the next tokens may come in another batch size
            if self._is_fitted:
                self._native = self._new_store(self._given_plan)
            self._forget_fit()
            self.waiting, self.seen, self.order, self.padding = None, {}, None, ()
        elif waiting is not None:
            self.waiting = waiting.first(length)
            self.seen = {reader: x for reader, seen in self.seen.items() if (x := seen.first(length)) is not None}
        elif length >= self._needed or self._packed_stay(length):
            self._native.crop(length)
            self.order = None if self.order is None else self.order[:, :length]
        else:
            self._native, self.waiting = self._first_rows(length)
            self.order, self.seen = None, {}
            self.wants_queries = self._native.wants_queries
        self.version += 1

    def _packed_stay(self, length: int) -> bool:
        """Whether a crop leaves packed tokens and they are among the first rows of the store, as all that are left."""
        packed = min(self._native.packed_tokens, length - self.plan.sinks)
        return packed > 0 and keeps_first_rows(self.order, length)

    def _first_rows(self, length: int) -> tuple[Layer | CudaLayer, WaitingRows]:
        """The first tokens as they are read, and a store without tokens that knows the queries that were seen."""
        store, span = self._native.clone(), 0 if self.order is None else self.order.shape[1]
        store.crop(max(length, span))
        made = []
        for width, decode in ((self.key_dim, store.decode_keys), (self.value_dim, store.decode_values)):
            shape = (store.batch_size, self._heads, store.length, width)
            rows = torch.empty(shape, dtype=self.dtype, device=self.device)
            decode(rows)
            if self.order is not None:
                rows[:, :, :span] = taken(rows, inverse_order(self.order))
            made.append(rows)
        store.crop(0)
        return store, WaitingRows(*made).first(length)

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
        batch, waiting = self.batch_rows, self.waiting
        if not batch:
            return
        padding = self._padding_of(batch)
        if waiting is not None:
            if not indices or any(not 0 <= row < batch for row in indices):
                raise SkvqError(f"indices: expected rows of the batch, 0..{batch}, got {indices}")
            waiting = waiting.gathered(indices)
        seen = {reader: x.gathered(indices) for reader, x in self.seen.items()}
        if self._native.batch_size:
            self._native.gather(indices)
        self.waiting, self.seen = waiting, seen
        self.padding = tuple(padding[row] for row in indices) if padding else ()
        if self.order is not None:
            self.order = self.order[indices]
        self.version += 1

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i of the batch becomes row `beam_idx[i]`. Raises SkvqError if there is none."""
        if self.batch_rows:
            self.gather(row_numbers(beam_idx, self.batch_rows))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row of the batch `repeats` times."""
        self.gather([row for row in range(self.batch_rows) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices` (numbers, or a boolean for every row). Raises SkvqError if there is none."""
        if self.batch_rows:
            self.gather(row_numbers(indices, self.batch_rows))

    def reset(self) -> None:
        """Forget all tokens and their padding; the next ones may have another batch size, dtype or number of heads."""
        self._drop_store()
        self.padding = ()

    def _forget_fit(self) -> None:
        """The plan is the one that was given again, and nothing is known of a prompt."""
        self.plan, self._fitted_nbytes = self._given_plan, 0
        self._waits_to_fit = self._has_unknown_padding = False

    def _drop_store(self) -> None:
        self._forget_fit()
        if self.is_initialized:
            del self._native
        self.is_initialized = False
        self.waiting, self.seen, self.readers = None, {}, 0
        self.order = None
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
            twin._native = self._native.clone()
            twin.seen = dict(self.seen)
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

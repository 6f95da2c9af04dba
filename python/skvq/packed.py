"""Handles to a layer's packed keys and values that models can pass to attention like tensors.

Is: `PackedStates`, a tensor subclass of the right shape, dtype and device that owns no data, and the `Snapshot` that
the two handles of one `update` share. `F.scaled_dot_product_attention` on such a pair runs on the packed bytes,
transformers' `repeat_kv` (index, expand, reshape) stays a handle, anything else decodes to a plain tensor, counted.
Is not: a copy. A handle reads the layer as it is and is refused once the layer has changed.
Shapes: [B, Hkv, T, D]; between the steps of `repeat_kv` [B, Hkv, r, T, D], after it [B, Hkv * r, T, D].
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch.utils._pytree import tree_map_only

from ._native import CudaLayer, Layer, SkvqError
from .sinks import reordered_mask

# A layer whose handles were decoded on this many updates in a row warns, once in a cache.
DECODED_STEPS_BEFORE_WARNING = 3
# Standard deviation of the error of a packed key's score, by the codec's own estimate, above which a cache warns
# (tests/bench/LOG.md): 0.5 for the defaults on Gemma 3 270M, 1.5 on Qwen2.5-Coder 0.5B (1.8 with those of before, which
# found one line among many no more), 0.3 with plans, 4 and more for settings that lose the text.
LARGEST_SCORE_NOISE = 1.5
# The reason for decoding that is nobody's fallback.
ASKED_FOR = "decode()"

_sdpa: Any = torch.nn.functional.scaled_dot_product_attention
_without_torch_function = torch._C.DisableTorchFunctionSubclass
_is_grad_enabled = torch.is_grad_enabled
# Functions that read memory without going through the dispatcher.
_READS_MEMORY = frozenset(
    getattr(torch.Tensor, name)
    for name in ("numpy", "tolist", "__array__", "__dlpack__", "__reduce_ex__", "data_ptr", "untyped_storage")
)
_BEFORE_REPEAT = (slice(None), slice(None), None, slice(None), slice(None))


class AttentionCounts:
    """How often the layers of one cache attended on packed bytes, and how often and why handles were decoded."""

    def __init__(self) -> None:
        self.packed = 0
        self.prefill = 0
        self.decoded: Counter[str] = Counter()
        self.warned = False
        self.looked_for_padding = False
        self.warned_of_gradients = False
        self.capturing = False  # launches are recorded and do not run
        self.score_noise: dict[int, float] = {}  # by layer
        self.fitted: dict[int, int] = {}  # tokens of the prompt that a layer was fitted to
        self.not_fitted: dict[int, str] = {}  # why a layer was not
        self.warned_of_noise = False

    def as_dict(self) -> dict[str, Any]:
        """Plain values; see `QuantizedDynamicCache.stats`."""
        noise = dict(sorted(self.score_noise.items()))
        found = {"packed": self.packed, "prefill": self.prefill, "decoded": dict(self.decoded), "score_noise": noise}
        return found | {"fitted": dict(self.fitted), "not_fitted": dict(self.not_fitted)}


class PackedSource(Protocol):
    """What a snapshot needs of a cache layer."""

    native: Layer | CudaLayer
    version: int
    index: int
    counts: AttentionCounts
    decoded_version: int
    decoded_steps: int
    padding: tuple[int, ...]
    order: torch.Tensor | None
    wants_queries: bool

    def take_queries(self, query: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Let the queries of the last tokens have their say in how keys are packed; stores a prompt that waits.

        `mask`: of attention, for the last of its tokens.
        """

    def decode_into(self, output: torch.Tensor, is_key: bool) -> None:
        """Keys or values of all tokens in the order of their positions."""


class Snapshot:
    """The keys and values that one `update` returned: a layer at one version, and the call's own rows unrounded."""

    __slots__ = ("device", "dtype", "fresh_keys", "fresh_values", "key_shape", "source", "value_shape", "version")

    def __init__(
        self,
        source: PackedSource,
        key_shape: tuple[int, int, int, int],
        value_shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        fresh_keys: torch.Tensor | None = None,
        fresh_values: torch.Tensor | None = None,
    ) -> None:
        self.source = source
        self.version = source.version
        self.key_shape = key_shape
        self.value_shape = value_shape
        self.dtype = dtype
        self.device = device
        self.fresh_keys = fresh_keys
        self.fresh_values = fresh_values

    def __deepcopy__(self, memo: dict[int, Any]) -> Snapshot:
        twin = type(self)(copy.deepcopy(self.source, memo), self.key_shape, self.value_shape, self.dtype, self.device)
        twin.version = self.version
        twin.fresh_keys, twin.fresh_values = self.fresh_keys, self.fresh_values
        memo[id(self)] = twin
        return twin

    def handles(self) -> tuple[PackedStates, PackedStates]:
        """The keys' and the values' handle."""
        return PackedStates(self, True, self.key_shape), PackedStates(self, False, self.value_shape)

    def attend(
        self,
        query: torch.Tensor,
        scale: float | None,
        mask: torch.Tensor | None = None,
        causal: bool = False,
        softcap: float | None = None,
        sink_logits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of query [B, Hq, L, Dk] on the packed bytes: [B, Hq, L, Dv] in the query's dtype.

        With `causal`, query l sees the tokens up to T - L + l. `mask` broadcasts to [B, Hq, L, T]: boolean (True: seen)
        or additive. `softcap` bounds the scores, `sink_logits` [Hq] join every softmax without a value.
        """
        source = self.source
        if source.version != self.version:
            raise self._stale()
        if source.counts.capturing:
            mask = None  # transformers makes one, of the tokens at hand, where nothing may be read back
        if mask is not None and not source.counts.looked_for_padding:
            source.counts.looked_for_padding = True
            if not source.padding and hides_first_token(mask):
                warnings.warn(
                    "the batch is padded on the left and the cache was not told: padding is kept in the places of "
                    "sinks and spoils the statistics of the rows beside it. Pass the tokenizer's mask: "
                    "QuantizedDynamicCache(model, attention_mask=inputs['attention_mask'])",
                    UserWarning,
                    stacklevel=2,
                )
        batch, heads, length, head_dim = query.shape
        output = query.new_empty((batch, heads, length, self.value_shape[3]))
        if mask is not None:
            mask = reordered_mask(mask, source.order)
        source.native.attend(
            query,
            output,
            scale=1.0 / math.sqrt(head_dim) if scale is None else scale,
            mask=mask,
            causal=causal,
            softcap=softcap,
            sink_logits=sink_logits,
            fresh_keys=self.fresh_keys,
            fresh_values=self.fresh_values,
        )
        source.counts.packed += 1
        if source.wants_queries:
            source.take_queries(query)
        if (
            source.index not in source.counts.score_noise
            and source.native.packed_tokens
            and not source.counts.capturing
        ):
            self._estimate_noise(query, scale)
        return output

    def _estimate_noise(self, query: torch.Tensor, scale: float | None) -> None:
        """Once for every layer: how far the scores of its packed keys are off, by the codec's own estimate."""
        source, counts = self.source, self.source.counts
        scale = 1.0 / math.sqrt(query.shape[3]) if scale is None else scale
        noise = source.native.score_noise(query, scale) ** 0.5
        counts.score_noise[source.index] = noise
        if noise > LARGEST_SCORE_NOISE and not counts.warned_of_noise:
            counts.warned_of_noise = True
            warnings.warn(
                f"layer {source.index}: packing puts the scores of keys off by about {noise:.1f} (standard deviation, "
                f"expected at most {LARGEST_SCORE_NOISE:g}), so answers may be wrong: use more key_bits, or a plan "
                "made for this model by `skvq calibrate`; to long prompts, a cache that is made from the model and not "
                "from its configuration fits one itself. cache.stats()['score_noise'] has all layers.",
                UserWarning,
                stacklevel=3,
            )

    def decode(self, is_key: bool, reason: str) -> torch.Tensor:
        """Keys or values as a plain tensor; `reason` is counted."""
        source = self.source
        if source.version != self.version:
            raise self._stale()
        output = torch.empty(self.key_shape if is_key else self.value_shape, dtype=self.dtype, device=self.device)
        source.decode_into(output, is_key)
        fresh = self.fresh_keys if is_key else self.fresh_values
        if fresh is not None:
            output[:, :, output.shape[2] - fresh.shape[2] :] = fresh
        source.counts.decoded[reason] += 1
        if reason is not ASKED_FOR:
            self._warn_once_if_every_step(reason)
        return output

    def _warn_once_if_every_step(self, reason: str) -> None:
        source = self.source
        if source.decoded_version != self.version:
            source.decoded_steps = source.decoded_steps + 1 if source.decoded_version == self.version - 1 else 1
            source.decoded_version = self.version
        if source.decoded_steps >= DECODED_STEPS_BEFORE_WARNING and not source.counts.warned:
            source.counts.warned = True
            warnings.warn(
                f"skvq decodes the whole cache of layer {source.index} on every step ({reason}), which is slow: "
                "attention on the packed bytes needs attn_implementation 'sdpa' or 'skvq' and a call under "
                "torch.no_grad(). cache.stats() counts both ways.",
                UserWarning,
                stacklevel=2,
            )

    def _stale(self) -> SkvqError:
        return SkvqError(
            f"layer {self.source.index}: these keys and values belong to an earlier state of the cache (version "
            f"{self.version}, now {self.source.version}): expected them to be used before the cache changes again"
        )


class PromptSnapshot(Snapshot):
    """The keys and values of a text that is not stored yet: a prompt, and calls that come before sinks are chosen.

    They are attended as they are; queries are seen on the way. Decoding gives plain tensors, at any time.
    """

    __slots__ = ("padding",)

    padding: Sequence[int]

    @classmethod
    def of(cls, source: Any, keys: torch.Tensor, values: torch.Tensor, padding: Sequence[int] = ()) -> PromptSnapshot:
        """Of keys [B, Hkv, T, Dk] and values [B, Hkv, T, Dv] that begin with `padding` [B] tokens of padding; `source`
        has at least `version`, `wants_queries` and `take_queries`.
        """
        key_shape, value_shape = (cast(tuple[int, int, int, int], tuple(x.shape)) for x in (keys, values))
        made = cls(source, key_shape, value_shape, keys.dtype, keys.device, keys, values)
        made.padding = padding
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Snapshot:
        twin = cast(PromptSnapshot, super().__deepcopy__(memo))
        twin.padding = self.padding
        return twin

    def mask(self, mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
        """A mask for the queries of the last `length` tokens, with padding hidden as in a store.

        The first call of a text brings its own mask; a sequence of nothing but padding sees what the mask lets it.
        """
        tokens = self.key_shape[2]
        if not self.padding or length == tokens:
            return mask
        padding = torch.tensor(self.padding, device=self.device)[:, None]
        seen = (torch.arange(tokens, device=self.device) >= padding) | (padding >= tokens)
        seen = seen[:, None, None]
        if mask is None:
            return seen
        return mask & seen if mask.dtype == torch.bool else torch.where(seen, mask, torch.finfo(mask.dtype).min)

    def attend(
        self,
        query: torch.Tensor,
        scale: float | None,
        mask: torch.Tensor | None = None,
        causal: bool = False,
        softcap: float | None = None,
        sink_logits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Not for prompts: see `prompt_tensors`."""
        raise SkvqError(f"layer {self.source.index}: expected a prompt to attend to its own tensors")

    def decode(self, is_key: bool, reason: str) -> torch.Tensor:
        """Keys or values as the layer was given them."""
        return cast(torch.Tensor, self.fresh_keys if is_key else self.fresh_values)


def show_queries(handles: tuple[torch.Tensor, torch.Tensor], query: torch.Tensor) -> None:
    """Let a prompt's queries [B, Hq, L, Dk] have their say without attention; `handles` are what `update` returned."""
    prompt_tensors(query, *handles)


def prompt_tensors(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The plain keys and values [B, Hq|Hkv, T, D] if these are handles to those of a prompt; shows the layer its
    queries and their mask.
    """
    if not (type(key) is PackedStates and type(value) is PackedStates and type(key._snapshot) is PromptSnapshot):
        return None
    snapshot = key._snapshot
    source = snapshot.source
    if source.version == snapshot.version and source.wants_queries and _fits(query, snapshot):
        source.take_queries(query.detach(), _four_dimensions(mask))
    return key.decode(), value.decode()


def prompt_mask(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
    """The mask for attention on the tensors that `prompt_tensors` gives for the handle `key`."""
    return cast(PromptSnapshot, cast(PackedStates, key)._snapshot).mask(mask, query.shape[2])


def _fits(query: torch.Tensor, snapshot: Snapshot) -> bool:
    """Whether a query is one of the last tokens of a snapshot."""
    if type(query) is not torch.Tensor or query.ndim != 4 or query.dtype != snapshot.dtype:
        return False
    (batch, heads, length, width), (key_batch, key_heads, tokens, key_width) = query.shape, snapshot.key_shape
    return (batch, width) == (key_batch, key_width) and heads % key_heads == 0 and 0 < length <= tokens


class PackedStates(torch.Tensor):
    """Keys or values of one cache layer, as the tensor that `update` returns; see the head of this file.

    It is read-only, holds for any number of uses until the layer changes, and needs no gradient.
    """

    _snapshot: Snapshot
    _is_key: bool
    _shape: torch.Size
    _repeats: int
    _ungrouped: bool

    @staticmethod
    def __new__(
        cls: type[PackedStates],
        snapshot: Snapshot,
        is_key: bool,
        shape: Sequence[int],
        repeats: int = 1,
        ungrouped: bool = False,
    ) -> PackedStates:
        """A handle of `shape`; `repeats` copies of every head, in a dimension of their own if `ungrouped`."""
        size = torch.Size(shape)
        handle: PackedStates = torch.Tensor._make_wrapper_subclass(
            cls, size, dtype=snapshot.dtype, device=snapshot.device
        )
        handle._snapshot = snapshot
        handle._is_key = is_key
        handle._shape = size
        handle._repeats = repeats
        handle._ungrouped = ungrouped
        return handle

    # Plain properties: models ask for these on every step, and the subclass protocol would cost a microsecond each.
    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """Size of the tensor this handle stands for."""
        return self._shape

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """The model's dtype."""
        return self._snapshot.dtype

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where the layer is."""
        return self._snapshot.device

    def decode(self, reason: str = ASKED_FOR) -> torch.Tensor:
        """The plain tensor that this handle stands for; `reason` is counted in `cache.stats()`."""
        plain = self._snapshot.decode(self._is_key, reason)
        if self._repeats == 1 and not self._ungrouped:
            return plain
        batch, heads, length, head_dim = plain.shape
        plain = plain[:, :, None].expand(batch, heads, self._repeats, length, head_dim)
        return plain if self._ungrouped else plain.reshape(batch, heads * self._repeats, length, head_dim)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        kind = "keys" if self._is_key else "values"
        return f"PackedStates({kind} of layer {self._snapshot.source.index}, {tuple(self._shape)}, {self.dtype})"

    # ---- what stays a handle -----------------------------------------------------------------------------------------

    def _as(self, shape: Sequence[int], repeats: int, ungrouped: bool) -> PackedStates:
        return PackedStates(self._snapshot, self._is_key, shape, repeats, ungrouped)

    def __getitem__(self, index: Any) -> torch.Tensor:
        """`x[:, :, None, :, :]`, the first step of `repeat_kv`, stays a handle."""
        if type(index) is tuple and index == _BEFORE_REPEAT and self._repeats == 1 and not self._ungrouped:
            batch, heads, length, head_dim = self._shape
            return self._as((batch, heads, 1, length, head_dim), 1, True)
        return super().__getitem__(index)

    def __setitem__(self, index: Any, value: Any) -> None:
        raise SkvqError(f"{self!r} cannot be written: expected a read only use")

    def expand(self, *sizes: Any) -> torch.Tensor:  # type: ignore[override]
        """The second step of `repeat_kv` stays a handle."""
        if self._ungrouped and self._repeats == 1 and len(sizes) == 5:
            batch, heads, _, length, head_dim = self._shape
            if (sizes[0], sizes[1], sizes[3], sizes[4]) == (batch, heads, length, head_dim) and sizes[2] > 0:
                return self._as(sizes, int(sizes[2]), True)
        return super().expand(*sizes)

    def reshape(self, *shape: Any) -> torch.Tensor:
        """The last step of `repeat_kv` stays a handle, and so does a reshape to the same shape."""
        if shape == self._shape:
            return self
        if self._ungrouped and len(shape) == 4:
            batch, heads, repeats, length, head_dim = self._shape
            if shape == (batch, heads * repeats, length, head_dim):
                return self._as(shape, self._repeats, False)
        return super().reshape(*shape)

    def contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> torch.Tensor:
        """This handle."""
        return self if memory_format is torch.contiguous_format else super().contiguous(memory_format=memory_format)

    def detach(self) -> PackedStates:
        """This handle: it never needs a gradient."""
        return self

    def cpu(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """This handle if it is on the CPU, otherwise a plain tensor there."""
        return self if self.device.type == "cpu" else super().cpu(*args, **kwargs)

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """This handle, if device and dtype stay; otherwise a plain tensor."""
        if not kwargs.get("copy", False) and len(args) < 4:
            named = {key: value for key, value in kwargs.items() if key in ("device", "dtype", "non_blocking")}
            first_is_tensor = bool(args) and isinstance(args[0], torch.Tensor)
            if len(named) == len(kwargs) and not first_is_tensor:
                device, dtype = torch._C._nn._parse_to(*args, **named)[:2]
                here = device is None or (device.type, device.index or 0) == (self.device.type, self.device.index or 0)
                if here and (dtype is None or dtype == self.dtype):
                    return self
        return super().to(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedStates:
        """A handle to a copy of the layer (the one `memo` knows, when a whole cache is copied)."""
        snapshot = copy.deepcopy(self._snapshot, memo)
        twin = PackedStates(snapshot, self._is_key, self._shape, self._repeats, self._ungrouped)
        memo[id(self)] = twin
        return twin

    # ---- everything else ---------------------------------------------------------------------------------------------

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Attention goes to the packed bytes; other functions to `__torch_dispatch__`."""
        if func is _sdpa:
            return _scaled_dot_product_attention(*args, **(kwargs or {}))
        if func in _READS_MEMORY:
            args = tree_map_only(PackedStates, lambda handle: handle.decode(_name(func)), tuple(args))
        with _without_torch_function():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Any operator gets plain tensors; one that would write into a handle is refused."""
        kwargs = dict(kwargs or {})
        if func._schema.is_mutable:
            _refuse_writes(func, args, kwargs)
        reason = _name(func)
        args, kwargs = tree_map_only(PackedStates, lambda handle: handle.decode(reason), (tuple(args), kwargs))
        return func(*args, **kwargs)


def _name(func: Any) -> str:
    schema = getattr(func, "_schema", None)
    return f"operation {schema.name if schema is not None else func.__name__}"


def _refuse_writes(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    for position, argument in enumerate(func._schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written and isinstance(value, PackedStates):
            raise SkvqError(f"{func._schema.name} would write into packed {value!r}: expected a read only use")


def _scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """torch's function where at least one operand is a handle."""
    prompt = prompt_tensors(query, key, value, attn_mask)
    if prompt is not None:
        if not is_causal:
            attn_mask = prompt_mask(query, key, attn_mask)
        return _sdpa(query, *prompt, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    reason = _why_not_packed(query, key, value, attn_mask, dropout_p)
    if reason is None:
        if query.shape[1] != key.shape[1] and not enable_gqa:
            reason = "query and keys differ in heads"
        elif is_causal and (attn_mask is not None or query.shape[2] != key.shape[2]):
            # torch aligns the causal mask to the upper left corner, which is no use for a cache.
            reason = "is_causal with a mask or with fewer queries than keys"
        else:
            return cast(PackedStates, key)._snapshot.attend(query, scale, _four_dimensions(attn_mask), is_causal)
    operands = (query, key, value, attn_mask)
    plain = tree_map_only(PackedStates, lambda handle: handle.decode(f"sdpa: {reason}"), operands)
    return _sdpa(*plain, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Attention [B, Hq, L, Dv] on two handles as in `Snapshot.attend`; None if the packed bytes cannot serve it."""
    if _why_not_packed(query, key, value, mask, dropout) is not None:
        return None
    if sink_logits is not None:
        if sink_logits.requires_grad and _is_grad_enabled():
            return None
        sink_logits = sink_logits.detach().to(torch.float32).reshape(-1)
    return cast(PackedStates, key)._snapshot.attend(query, scale, _four_dimensions(mask), causal, softcap, sink_logits)


def _why_not_packed(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, dropout: float
) -> str | None:
    """None if the packed bytes can serve this call, otherwise the reason."""
    if not (type(key) is PackedStates and type(value) is PackedStates and key._snapshot is value._snapshot):
        return "keys and values are not of one update"
    if not key._is_key or value._is_key or key._ungrouped or value._ungrouped or key._repeats != value._repeats:
        return "keys and values are rearranged"
    if type(query) is not torch.Tensor or query.ndim != 4:
        return "query is not a plain tensor of four dimensions"
    if query.device != key.device or (query.dtype != key.dtype and key.device.type != "cpu"):
        return "query and keys differ in device or dtype"
    batch, heads, length, _ = query.shape
    key_batch, key_heads, tokens, _ = key._shape
    if batch != key_batch or heads % key_heads:
        return "query and keys differ in batch or heads"
    if dropout > 0.0:
        return "dropout"
    if query.requires_grad and _is_grad_enabled():
        return "query needs a gradient"
    if mask is None:
        return None
    if type(mask) is not torch.Tensor or not 2 <= mask.ndim <= 4 or (mask.requires_grad and _is_grad_enabled()):
        return "mask is not a plain tensor of two to four dimensions without gradient"
    scores = (batch, heads, length, tokens)[4 - mask.ndim :]
    if mask.shape[-1] != tokens or any(x not in (1, y) for x, y in zip(mask.shape, scores, strict=True)):
        return "mask does not broadcast to the scores"
    return None


def hides_first_token(mask: torch.Tensor) -> bool:
    """Whether a mask [B|1, Hq|1, L|1, T] hides token 0 of a sequence from all its queries."""
    first = mask[..., 0].flatten(1)
    hidden = ~first if first.dtype == torch.bool else first < -1e4
    return bool(hidden.all(-1).any())


def _four_dimensions(mask: torch.Tensor | None) -> torch.Tensor | None:
    while mask is not None and mask.ndim < 4:
        mask = mask[None]
    return mask

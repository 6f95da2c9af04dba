"""A whole text through a model in one pass, every token seeing what a decoding step with a packed cache would see.

Is: an attention function in which a query at time t sees keys and values as the store holds them when t + 1 tokens are
in it: exact in sinks and window, quantized where packed (`RegionRule`). It agrees with decoding token by token through
`MethodCache`, at the cost of one forward pass. Layers that do not attend to everything stay exact.
Is not: for batches or padding, nor for a prompt that attends to itself in full precision: every token decodes.
Shapes: query [1, Hq, T, D], keys and values [1, Hkv, T, D], results [1, T, Hq, Dv].
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from ..sinks import reordered, reordered_positions, text_order
from .memory import full_attention_layers
from .methods.base import Geometry, Method, ReadBack, Where
from .region_rule import RegionRule
from .rope import Rotary

IMPLEMENTATION = "skvq_simulation"
QUERY_CHUNK = 256  # queries whose scores are held at once


@dataclass(frozen=True)
class AttentionCall:
    """One layer's attention, in float32: query [Hkv, group, T, D] (scaled), keys and values [Hkv, T, D]."""

    layer: int
    query: Tensor
    keys: Tensor
    values: Tensor
    sliding_window: int | None
    softcap: float | None
    sink_logits: Tensor | None  # [Hkv, group, 1, 1]


class AttentionPass(Protocol):
    """What answers the attention calls of one forward pass."""

    def attend(self, call: AttentionCall) -> Tensor:
        """The output [Hkv, group, T, Dv], float32."""


def rule_of(method: Method, layer: int, window: int, sinks: int) -> RegionRule:
    """The regions of one layer's store that packs with `method`."""
    return RegionRule(sinks, window, method.unit_of(layer), method.waits)


@dataclass(frozen=True)
class MethodPass:
    """Attention over sinks, packed past and window. `method` None, or a sliding layer: everything exact."""

    method: Method | None
    window: int
    sinks: int
    owners: Mapping[int, int]  # of each layer with full attention, the layer whose keys and values it reads
    rotary: Rotary | None = None

    def attend(self, call: AttentionCall) -> Tensor:
        """Query chunk by query chunk."""
        length = call.keys.shape[1]
        token, span, rule, order = torch.arange(length), 0, None, None
        if self.method is not None and call.layer in self.owners:
            rule = rule_of(self.method, self.owners[call.layer], self.window, self.sinks)
            rows = (call.keys[None], call.values[None])
            order = text_order(*rows, self.sinks, self.method.sink_search, self.window)
            if order is not None:
                # From here on keys and values lie as in the store; `token` says which token each one is.
                stored_keys, stored_values = (reordered(x, order)[0] for x in rows)
                call = replace(call, keys=stored_keys, values=stored_values)
                token, span = reordered_positions(order, length), order.shape[1]
        exact = (call.keys, call.values)
        packed = exact
        if rule is not None:
            assert self.method is not None
            stop = self.sinks + rule.known(length)
            if rule.packed(length):
                keys, values = (self._packed(call, x, stop, order) for x in (True, False))
                packed = (keys.rows[0], values.rows[0])
                if keys.noise is not None:
                    call, packed = self._with_noise(call), (_beside(keys.rows[0], -keys.noise[0]), packed[1])
                    exact = (call.keys, call.values)
        output = torch.empty(*call.query.shape[:-1], call.values.shape[-1])
        for start in range(0, length, QUERY_CHUNK):
            now = torch.arange(start, min(length, start + QUERY_CHUNK))
            packed_until = torch.zeros_like(now) if rule is None else rule.packed(now + 1)
            packed_until = packed_until + self.sinks if int(packed_until[-1]) else packed_until
            made = _attend_chunk(call, exact, packed, now, packed_until, token, span)
            output[:, :, start : start + QUERY_CHUNK] = made
        return output

    def _packed(self, call: AttentionCall, keys: bool, stop: int, order: Tensor | None) -> ReadBack:
        """Rows [1, Hkv, T, D] of which those behind the sinks and before `stop` are read back, with their noise."""
        assert self.method is not None
        rows, layer = call.keys if keys else call.values, self.owners[call.layer]
        rope = None
        if keys and self.rotary is not None and self.method.before_rope:
            rope = self.rotary(layer).in_order(order)
        given = rows[:, self.sinks : stop]
        queries = call.query if keys and self.method.uses_queries else None
        read = self.method.read_back(given[None], Where(layer, keys, self.sinks, rope, queries))
        if read.rows.shape != given[None].shape:
            found, expected = tuple(read.rows[0].shape), tuple(given.shape)
            raise ValueError(f"{self.method.name}: fake_quantize returned {found}, expected {expected}")
        whole = torch.cat([rows[:, : self.sinks], read.rows[0].float(), rows[:, stop:]], dim=1)[None]
        exact_rows = (self.sinks, rows.shape[1] - stop)
        return ReadBack(whole, None if read.noise is None else torch.nn.functional.pad(read.noise, exact_rows))

    def _with_noise(self, call: AttentionCall) -> AttentionCall:
        """Queries with one more channel, what noise takes off their scores, and exact keys with a 0 there."""
        assert self.method is not None
        taken = self.method.score_noise(call.query, self.owners[call.layer])
        zeros = torch.zeros(call.keys.shape[:-1])
        return replace(call, query=_beside(call.query, taken), keys=_beside(call.keys, zeros))


def _beside(rows: Tensor, channel: Tensor) -> Tensor:
    """Rows [..., D] and one more channel [...]."""
    return torch.cat([rows, channel[..., None]], dim=-1)


def _attend_chunk(
    call: AttentionCall,
    exact: tuple[Tensor, Tensor],
    packed: tuple[Tensor, Tensor],
    now: Tensor,
    packed_until: Tensor,
    token: Tensor,
    span: int,
) -> Tensor:
    """Output [Hkv, group, L, Dv] of the queries at times `now` [L]; query i sees rows [0, packed_until[i]) packed.

    Row j is of token `token[j]`; only the first `span` rows are in another order than their tokens.
    """
    start, end = int(now[0]), int(now[-1]) + 1
    first = 0 if call.sliding_window is None else max(0, start - call.sliding_window + 1)
    middle = max(first, int(packed_until[0]))
    group, count = call.query.shape[1], end - start
    query = call.query[:, :, start:end].flatten(1, 2)
    end = max(end, span)
    scores = (query @ packed[0][:, first:end].transpose(1, 2)).unflatten(1, (group, count))
    token = token[first:end]
    is_packed = torch.arange(middle, end) < packed_until[:, None]
    mixed = bool(is_packed.any())
    if packed is not exact:
        recent = (query @ exact[0][:, middle:end].transpose(1, 2)).unflatten(1, (group, count))
        scores[..., middle - first :] = torch.where(is_packed, scores[..., middle - first :], recent)
    if call.softcap is not None:
        scores = torch.tanh_(scores.div_(call.softcap)).mul_(call.softcap)
    hidden = token > now[:, None]
    if call.sliding_window is not None:
        hidden = hidden | (token <= now[:, None] - call.sliding_window)
    scores.masked_fill_(hidden, -math.inf)
    if call.sink_logits is not None:
        extra = call.sink_logits.expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, extra], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    weights = weights.flatten(1, 2)
    new = weights[..., middle - first :]
    is_packed = is_packed.repeat(group, 1)
    output = (new.masked_fill(is_packed, 0.0) if mixed else new) @ exact[1][:, middle:end]
    if middle > first:
        output += weights[..., : middle - first] @ packed[1][:, first:middle]
    if mixed:
        output += new.masked_fill(~is_packed, 0.0) @ packed[1][:, middle:end]
    return output.unflatten(1, (group, count))


def simulation_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    skvq_pass: AttentionPass | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """In the signature of transformers' attention functions; `skvq_pass` comes from the call of the model."""
    if skvq_pass is None:
        raise ValueError("this model does not hand keyword arguments on to its attention: it cannot be simulated")
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ValueError(f"query {tuple(query.shape)}, key {tuple(key.shape)}: expected one whole sequence")
    heads = key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    call = AttentionCall(
        layer=int(module.layer_idx),  # type: ignore[arg-type]
        query=query[0].float().unflatten(0, (heads, -1)) * scale,
        keys=key[0].float(),
        values=value[0].float(),
        sliding_window=sliding_window,
        softcap=softcap,
        sink_logits=None if s_aux is None else s_aux.float().reshape(heads, -1, 1, 1),
    )
    return skvq_pass.attend(call).flatten(0, 1).transpose(0, 1)[None].to(query.dtype), None


class Simulator:
    """A model whose forward passes are answered by an `AttentionPass`.

    Use as a context: inside, the model has the attention implementation "skvq_simulation", afterwards its own again.

    Raises:
        ValueError: a layer of the model attends in chunks, or no layer attends to everything.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.full_layers = frozenset(full_attention_layers(model.config))
        self.rotary = Rotary(model)
        config = model.config.get_text_config(decoder=True)
        if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
            raise ValueError("chunked attention cannot be simulated in one pass: expected full and sliding layers")
        self.owners = _owners(config, self.full_layers)

    @contextmanager
    def attached(self) -> Iterator[Simulator]:
        """Inside, `run` works."""
        AttentionInterface.register(IMPLEMENTATION, simulation_attention)
        AttentionMaskInterface.register(IMPLEMENTATION, lambda *_, **__: None)
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation(IMPLEMENTATION)
        try:
            yield self
        finally:
            self.model.set_attn_implementation(before)

    def run(self, token_ids: Tensor, attention: AttentionPass) -> Tensor:
        """The last hidden states [T, hidden] of token_ids [T], in the model's dtype."""
        if self.model.config._attn_implementation != IMPLEMENTATION:
            raise ValueError("Simulator.run: expected to be called inside `with simulator.attached():`")
        output = self.model.base_model(token_ids[None], use_cache=False, skvq_pass=attention)
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    def method_pass(self, method: Method | None, window: int, sinks: int) -> MethodPass:
        """The attention of a cache that packs with `method`; None: full precision."""
        return MethodPass(method, window, sinks, self.owners, self.rotary)

    def geometry(self, layer: int) -> Geometry:
        """Heads of one full-attention layer, from the configuration."""
        config = self.model.config.get_text_config(decoder=True)
        per_layer = getattr(config, "per_layer_config", None)
        options = per_layer[layer] if per_layer else config
        heads = getattr(options, "num_key_value_heads", None) or options.num_attention_heads
        head_dim = getattr(options, "head_dim", None) or options.hidden_size // options.num_attention_heads
        return Geometry(layer, heads, head_dim)


def _owners(config: Any, full_layers: frozenset[int]) -> dict[int, int]:
    """Of each layer with full attention, the layer whose keys and values it reads: mostly itself."""
    owners = {layer: layer for layer in full_layers}
    modes: Sequence[str] = getattr(config, "kv_sharing_modes", None) or ()
    sharing: Any = getattr(config, "num_kv_shared_layers", None)
    if not modes and sharing:
        raise ValueError("layers share keys and values: expected transformers that name which (kv_sharing_modes)")
    for layer, mode in enumerate(modes):
        if mode == "reuse" and config.layer_types[layer] == "full_attention":
            owners[layer] = max(other for other in full_layers if other < layer)
    return owners

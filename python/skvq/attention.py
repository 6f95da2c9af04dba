"""The attention implementation "skvq" for transformers: packed keys and values with all that models ask for.

Is: what the default "sdpa" with packed handles does, and beyond it logit softcap (Gemma 2) and attention-sink logits
(gpt-oss). Layers that are not packed, and prompts, get transformers' sdpa, or plain math where sdpa lacks the feature.
Is not: needed for models without these features: with "sdpa" their handles take the same way (packed.py).
Shapes: query [B, Hq, L, D], key and value [B, Hkv, T, D], result [B, L, Hq, Dv].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from .packed import PackedStates, packed_attention, prompt_mask, prompt_tensors

NAME = "skvq"


def register_attention() -> None:
    """Make `attn_implementation="skvq"` known to transformers; called again it changes nothing."""
    AttentionInterface.register(NAME, skvq_attention_forward)
    AttentionMaskInterface.register(NAME, packed_mask)


def packed_mask(
    *,
    batch_size: int,
    kv_length: int,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **more: Any,
) -> torch.Tensor | None:
    """transformers' mask for sdpa; None where queries of the last tokens see all tokens up to their own.

    `skvq_attention_forward` needs no mask there. One of 2048 queries over a million tokens would take 2 GB, and be read
    by every layer.
    """
    position = more.get("cache_position")  # of transformers 5.0
    queries = int(more["q_length"]) if position is None else position.shape[0]
    # Of a prompt in a cache with room for more transformers makes none: it aligns the rule to the first token.
    skips = allow_is_causal_skip and (queries == 1 or queries == kv_length)
    causal = mask_function is causal_mask_function and allow_is_causal_skip and local_size is None
    if causal and 1 < queries < kv_length and not torch.compiler.is_compiling():
        padding = None if attention_mask is None else attention_mask[:, :kv_length]
        shown = padding is None or (padding.shape[1] == kv_length and bool(padding.all()))
        if shown and _are_last_tokens(queries, kv_length, **more):
            return None
    return sdpa_mask(
        batch_size=batch_size,
        kv_length=kv_length,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=skips,
        **more,
    )


def _are_last_tokens(
    queries: int,
    kv_length: int,
    kv_offset: int = 0,
    q_offset: int | torch.Tensor = 0,
    cache_position: torch.Tensor | None = None,
    **_: Any,
) -> bool:
    """Whether the queries are of the last of `kv_length` tokens."""
    first = int(q_offset)
    if cache_position is not None:
        first, last = int(cache_position[0]), int(cache_position[-1])
        if last - first + 1 != queries:
            return False
    return kv_offset == 0 and first + queries == kv_length


def skvq_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer, in the signature of transformers' attention functions.

    Without a mask, query l of L sees the tokens up to T - L + l of a causal module. `softcap` bounds scores by
    softcap * tanh(score / softcap); `s_aux` [Hq] are logits that join each softmax without a value.
    """
    if attention_mask is not None and attention_mask.shape[-1] == key.shape[2] + 1:
        # transformers 5.0 makes one a column too wide for some families (StableLM, Persimmon), where it is given none
        attention_mask = attention_mask[..., :-1]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = bool(is_causal) and attention_mask is None and query.shape[2] > 1
    prompt = prompt_tensors(query, key, value, attention_mask)
    if prompt is not None:
        attention_mask = prompt_mask(query, key, attention_mask)
        key, value = prompt
    if isinstance(key, PackedStates) and position_bias is None:
        output = packed_attention(query, key, value, attention_mask, dropout, causal, scaling, softcap, s_aux)
        if output is not None:
            return output.transpose(1, 2).contiguous(), None
    if causal and query.shape[2] != key.shape[2]:
        # transformers' sdpa would align a causal rule without a mask to the first token.
        attention_mask, causal = _with_causality(attention_mask, query, key), False
    if softcap is None and s_aux is None:
        options = kwargs | {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
        if position_bias is not None:
            options["position_bias"] = position_bias
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return output, None
    if position_bias is not None:
        attention_mask = _with_bias(attention_mask, position_bias)
    groups = query.shape[1] // key.shape[1]
    keys, values = repeat_kv(_plain(key), groups), repeat_kv(_plain(value), groups)
    output = plain_attention(query, keys, values, attention_mask, dropout, causal, scaling, softcap, s_aux)
    return output.transpose(1, 2).contiguous(), None


def plain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
) -> torch.Tensor:
    """Attention [B, Hq, L, Dv] on plain tensors with softcap and sink logits, softmax in float32."""
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.float()
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if causal:
        mask = _with_causality(mask, query, key)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    if sink_logits is None:
        weights = scores.softmax(-1)
    else:
        sinks = sink_logits.float().reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
    if dropout > 0.0:
        weights = torch.nn.functional.dropout(weights, p=dropout)
    return weights.to(value.dtype) @ value


def _plain(states: torch.Tensor) -> torch.Tensor:
    if isinstance(states, PackedStates):
        return states.decode("skvq attention: not for the packed bytes")
    return states


def _with_causality(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """A boolean mask, or none, for queries of the last tokens, each of which sees those up to its own."""
    length, tokens = query.shape[2], key.shape[2]
    visible = torch.ones(1, 1, length, tokens, dtype=torch.bool, device=query.device).tril(tokens - length)
    return visible if mask is None else mask & visible


def _with_bias(mask: torch.Tensor | None, bias: torch.Tensor) -> torch.Tensor:
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return mask + bias

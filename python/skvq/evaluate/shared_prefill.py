"""One full-precision prefill of a context, shared by every cache that is to be compared on it.

In a prefill call the context attends to itself in full precision, whatever the cache: each layer's first `update`
returns the keys and values that it was given. So the hidden states, and with them the keys and values of every layer,
are the same for all caches. They are computed once, and `fill` hands them to a cache layer by layer, which leaves
it as its own prefill would have. That a cache returns what it was given is checked, not assumed. A cache may want to
see the queries, by which it packs keys, so they are kept as well.

Not here: prompts, scores. Shapes: token ids int64 [1, n]; keys and values [1, Hkv, n, D]; queries [1, Hq, n, D].
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from ..model_layers import cache_argument
from ..packed import PromptSnapshot, show_queries
from .memory import bytes_of_cache, full_attention_layers

MakeCache = Callable[[], Any]


@dataclass(frozen=True)
class SharedPrefill:
    """A context as a model read it."""

    token_ids: torch.Tensor  # int64 [1, n]
    keys: list[torch.Tensor | None]  # of each layer; None: the layer has no cache of its own
    values: list[torch.Tensor | None]
    queries: list[torch.Tensor | None]
    log_probabilities: torch.Tensor  # of the token after the context, float32 [vocabulary]

    def fill(self, cache: Any) -> Any:
        """Stores the context in an empty cache and returns it.

        Raises ValueError if the cache holds tokens already, or if its prefill would not attend in full precision.
        """
        if cache.get_seq_length():
            raise ValueError(f"cache holds {cache.get_seq_length()} tokens, expected an empty one")
        for index, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            if keys is None or values is None:
                continue
            handles = cache.update(keys, values, index)
            query = self.queries[index]
            if query is not None:
                show_queries(handles, query)
            for name, given, returned in zip(("keys", "values"), (keys, values), handles, strict=True):
                if returned is not given and not torch.equal(returned, given):
                    raise ValueError(
                        f"{type(cache).__name__} returns other {name} of layer {index} than it was given in the first "
                        "update, expected a cache whose prefill attends in full precision"
                    )
        return cache

    def bits(self, cache: Any, config: Any) -> float:
        """Bits per element that the full-attention layers of a cache hold, everything counted, after this context and
        whatever came later.
        """
        layers = full_attention_layers(config)
        held = [x for index in layers for x in (self.keys[index], self.values[index]) if x is not None]
        elements = sum(x.numel() for x in held) / self.token_ids.shape[1] * cache.get_seq_length(layers[0])
        return 8 * bytes_of_cache(cache, config).full_attention / elements


def as_token_ids(token_ids: Iterable[int], model: Any) -> torch.Tensor:
    """Token numbers as int64 [1, n] on the model's device."""
    return torch.tensor([list(token_ids)], dtype=torch.long, device=model.device)


class _Recorder(DynamicLayer):
    """A layer that keeps everything, the prompt's queries too."""

    query: torch.Tensor | None = None
    version = 0
    wants_queries = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """Handles that show this layer the queries of attention on them."""
        keys, values = super().update(key_states, value_states)
        return PromptSnapshot.of(self, keys, values).handles()

    def take_queries(self, query: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """All of the prompt. Layers that share these keys come later: the first, which owns them, counts."""
        self.wants_queries = False
        self.query = query


def read_context(model: Any, token_ids: torch.Tensor) -> SharedPrefill:
    """Runs the model over a context (int64 [1, n], n ≥ 2) and keeps what each layer would store."""
    if token_ids.dim() != 2 or token_ids.shape[0] != 1 or token_ids.shape[1] < 2:
        raise ValueError(f"token_ids has shape {list(token_ids.shape)}, expected [1, n] with n of at least 2")
    # Every layer keeps all rows, sliding ones too: any cache can then take what it needs.
    recorder: Any = Cache(layer_class_to_replicate=_Recorder)
    log_probabilities = continue_with(model, recorder, token_ids, keep=1)[0]
    held = [layer if layer.get_seq_length() else None for layer in recorder.layers]
    return SharedPrefill(
        token_ids=token_ids,
        keys=[layer and layer.keys for layer in held],
        values=[layer and layer.values for layer in held],
        queries=[layer and layer.query for layer in held],
        log_probabilities=log_probabilities,
    )


def can_copy(cache: Any) -> bool:
    """Whether `copy_of` can copy a cache: not transformers' QuantizedCache, whose quanto tensors refuse it."""
    from transformers import QuantizedCache

    return not isinstance(cache, QuantizedCache)


def copies(make: Callable[[], Any], model: Any) -> Callable[[], Any]:
    """A function that returns the cache that `make` returns, a new one at every call: copied from the first where that
    is possible, otherwise made again.
    """
    first = make()
    return (lambda: copy_of(first, model)) if can_copy(first) else make


def copy_of(cache: Any, model: Any) -> Any:
    """A cache with the same tokens that grows on its own; a method and parts of the model that it refers to are
    shared.
    """
    shared = [*model.modules(), model.config, getattr(cache, "method", None)]
    return copy.deepcopy(cache, {id(x): x for x in shared if x is not None})


def continue_with(model: Any, cache: Any, token_ids: torch.Tensor, keep: int = 0) -> torch.Tensor:
    """One forward call over `token_ids` on top of the cache: log-probabilities after the last `keep` tokens (0: after
    each), float32 [keep, vocabulary].
    """
    with torch.no_grad():
        logits = model(token_ids, **cache_argument(model, cache), use_cache=True, logits_to_keep=keep).logits[0]
        scores: torch.Tensor = logits.float().log_softmax(-1)
    return scores


def greedy(
    model: Any,
    cache: Any,
    log_probabilities: torch.Tensor,
    limit: int,
    stop: frozenset[int] = frozenset(),
    report: Callable[[int], object] = lambda _: None,
) -> list[int]:
    """Up to `limit` likeliest tokens, the first by `log_probabilities` [vocabulary]; ends before a token of `stop`.

    A plain loop, since `model.generate` applies whatever the model's generation settings ask for (Qwen2.5's: a
    repetition penalty), which would hide differences between caches.
    """
    found: list[int] = []
    while len(found) < limit:
        token = int(log_probabilities.argmax())
        if token in stop:
            break
        found.append(token)
        report(1)
        if len(found) < limit:
            log_probabilities = continue_with(model, cache, as_token_ids([token], model), keep=1)[0]
    return found


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends an answer, by the model's generation settings and the tokenizer."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    numbers = list(found) if isinstance(found, list | tuple) else [found]
    return frozenset(int(x) for x in [*numbers, getattr(tokenizer, "eos_token_id", None)] if x is not None)

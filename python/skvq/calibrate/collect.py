"""`collect`: one pass of a model over calibration text, keeping statistics of bounded size.

Is: an attention function that computes exact attention and shows rows to the moments on the way, the loop over
chunks, and its continuation after an interruption. Is not: the sums (moments.py), their file (statistics.py), or texts.
Shapes: query [1, Hq, T, D], key and value [1, Hkv, T, D]; token_ids int64 [T]; is_sink bool [T]. In every layer the
tokens that a cache would keep as sinks are left out of the moments of keys and values, wherever they are.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from .._native import SkvqError
from ..attention import skvq_attention_forward
from ..evaluate.rope import Rotary
from ..fingerprint import ModelFingerprint
from ..model_layers import decoder_config
from ..sinks import sink_mask
from .moments import AttentionMoments, StreamMoments
from .statistics import CollectOptions, LayerStatistics, Sample, Statistics, chained_sha256
from .turning import TurnedMoments, turning_or_reason

NAME = "skvq_collect"
SECONDS_BETWEEN_SAVES = 60.0  # of the state, at most, where one chunk does not take longer


def collect(
    model: Any,
    chunks: Iterable[Tensor],
    *,
    texts: Mapping[str, str] | None = None,
    state_path: Path | str | None = None,
    save_every: int = 8,
    total: int | None = None,
    progress: bool = False,
    **options: Any,
) -> Statistics:
    """Statistics of every layer that a cache packs, from one pass over `chunks`.

    Args:
        model: a causal language model of transformers, on any device; its attention function is replaced for the time
            of the call.
        chunks: token numbers [T] or [1, T], each read on its own from position 0.
        texts: name and SHA-256 of the texts, for the record.
        state_path: a file that holds the state after every `save_every` chunks, or every minute if chunks take longer,
            and at the end. If it exists, the pass goes on behind the chunks it has, and ends bit for bit as if it had
            not been interrupted.
        save_every: chunks between two saves of the state, at most.
        total: number of chunks, for the progress bar.
        progress: show a progress bar on stderr.
        **options: fields of `CollectOptions`: block, sinks, sample_tokens and others.

    Raises:
        SkvqError: a chunk has no token beyond the sinks, keys or values are not finite, a layer was not seen (the model
            does not use transformers' attention functions), or the state is of another model, text or options.
    """
    if save_every < 1:
        raise SkvqError(f"save_every={save_every!r}: expected an integer of at least 1")
    wanted = CollectOptions.of(**options)
    statistics = Statistics(ModelFingerprint.of(model), wanted, texts=dict(texts or {}))
    if not statistics.fingerprint.packed_layers:
        raise SkvqError(f"model: no layer of this {statistics.fingerprint.model_type} model has full attention")
    done, seen = 0, ""
    if state_path is not None and Path(state_path).is_file():
        statistics = _continued(Statistics.load(state_path, model), statistics, state_path)
        done = statistics.chunks
    saved = time.monotonic()
    collector = _Collector(statistics, Rotary(model), Rotary(model, torch.float32))
    with (
        _attention_of(model, collector),
        torch.no_grad(),
        tqdm(total=total, unit="chunk", desc="calibration", disable=not progress, file=sys.stderr) as bar,
    ):
        number = -1
        for number, chunk in enumerate(chunks):
            ids = _token_ids(chunk, number, wanted.sinks)
            seen = chained_sha256(seen, ids)
            if number >= done:
                collector.run(model, ids)
                statistics.chunks_sha256 = seen
                late = time.monotonic() - saved >= SECONDS_BETWEEN_SAVES
                if state_path is not None and (late or statistics.chunks % save_every == 0):
                    statistics.save(state_path)
                    saved = time.monotonic()
            elif number == done - 1 and seen != statistics.chunks_sha256:
                raise SkvqError(
                    f"{state_path}: the state of other text: the first {done} chunks differ from those it has"
                )
            bar.update()
    if number + 1 < done:
        raise SkvqError(f"{state_path}: the state of {done} chunks, but only {number + 1} were given")
    if statistics.chunks == 0:
        raise SkvqError("chunks: got none, expected at least one")
    if state_path is not None and statistics.chunks > done:
        statistics.save(state_path)
    return statistics


def _continued(found: Statistics, wanted: Statistics, path: Path | str) -> Statistics:
    for name in ("options", "texts"):
        if getattr(found, name) != getattr(wanted, name):
            raise SkvqError(
                f"{path}: the state of a pass with {name} {getattr(found, name)}, expected {getattr(wanted, name)}: "
                "name another file, or delete this one to begin again"
            )
    return found


def _token_ids(chunk: Tensor, number: int, sinks: int) -> Tensor:
    """The chunk as [T]. Raises SkvqError if it is not one sequence longer than the sinks."""
    shape = tuple(chunk.shape) if isinstance(chunk, Tensor) else type(chunk).__name__
    if isinstance(chunk, Tensor) and not chunk.is_floating_point():
        ids = chunk[0] if chunk.ndim == 2 and chunk.shape[0] == 1 else chunk
        if ids.ndim == 1 and ids.numel() > sinks:
            return ids
    raise SkvqError(f"chunk {number}: got {shape}, expected token numbers [T] or [1, T] with T above sinks={sinks}")


def sample_slot(chunk: int, slots: int) -> int | None:
    """Where the rows of this chunk are kept, None for nowhere: after any number of chunks each had the same chance."""
    if chunk < slots:
        return chunk
    generator = torch.Generator().manual_seed(chunk)
    slot = int(torch.randint(chunk + 1, (1,), generator=generator))
    return slot if slot < slots else None


# ---- the model -------------------------------------------------------------------------------------------------------

_ACTIVE: ContextVar[_Collector | None]


class _Collector:
    """Takes the rows of one chunk after the other into the statistics."""

    def __init__(self, statistics: Statistics, rotary: Rotary, exact_rotary: Rotary) -> None:
        self.statistics, self.options = statistics, statistics.options
        self.packed = set(statistics.fingerprint.packed_layers)
        self.rotary, self.exact_rotary = rotary, exact_rotary
        self.last: tuple[Tensor, int] | None = None
        self.seen: set[int] = set()
        self.slot: int | None = None

    def run(self, model: Any, ids: Tensor) -> None:
        """One chunk int64 [T]. After an error the statistics are not to be used any more."""
        statistics = self.statistics
        self.seen, self.last = set(), None
        self.slot = sample_slot(statistics.chunks, self.options.sample_slots)
        device = next(model.parameters()).device
        model.base_model(input_ids=ids[None].to(device), use_cache=False)
        self.last = None
        missing = sorted(self.packed - self.seen)
        if missing:
            raise SkvqError(
                f"model: layers {', '.join(map(str, missing))} did not call transformers' attention functions, "
                "expected a model whose attention implementation can be set"
            )
        statistics.chunks += 1
        statistics.tokens += ids.numel()

    def look(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float, extra: Mapping[str, Any]
    ) -> None:
        """The rows of one layer's attention; layers that are not packed are passed over."""
        index = getattr(module, "layer_idx", None)
        if index not in self.packed:
            # A layer that attends to another's keys and values: its queries count for that one.
            if self.last is not None and key is self.last[0]:
                self._queries(self.statistics.layers[self.last[1]], query, key.shape[1], scaling)
            return
        if query.shape[0] != 1 or query.shape[2] != key.shape[2] or index in self.seen:
            raise SkvqError(
                f"layer {index}: query {tuple(query.shape)}, key {tuple(key.shape)}: expected one whole sequence, once"
            )
        self.seen.add(index)
        self.last = (key, index)
        layer = self.statistics.layers.get(index)
        if layer is None:
            layer = self._new_layer(index, key, value, scaling)
            self.statistics.layers[index] = layer
            self.statistics.layers = dict(sorted(self.statistics.layers.items()))
        options, block = self.options, self.options.block
        keys, values = self._rows(index, "keys", key), self._rows(index, "values", value)
        is_sink = sink_mask(key, value, options.sinks, options.sink_search, options.window)[0]
        kept = (~is_sink).nonzero()[:, 0]
        layer.keys.update(keys[:, kept], block)
        layer.values.update(values[:, kept], block)
        self._queries(layer, query, key.shape[1], scaling)
        if layer.keys_turned is not None:
            layer.keys_turned.update(keys[:, kept], kept)
        if layer.keys_before_rope is not None:
            plain = self._before_rope(index, key)
            layer.keys_before_rope.update(plain[0, :, kept], block)
        if layer.attention is not None:
            layer.attention.update(
                query[0, :].float() * scaling,
                keys,
                values,
                is_sink=is_sink,
                window=options.window,
                stride=options.attention_stride,
                softcap=extra.get("softcap"),
                sink_logits=extra.get("s_aux"),
            )
        if self.slot is not None:
            layer.samples[self.slot] = self._sample(query[0], key[0], value[0])

    def _new_layer(self, index: int, key: Tensor, value: Tensor, scaling: float) -> LayerStatistics:
        turning = turning_or_reason(self.exact_rotary, index, key.shape[3], key.device)
        reason = turning if isinstance(turning, str) else ""
        heads, key_dim, value_dim, device = key.shape[1], key.shape[3], value.shape[3], key.device
        attention, before_rope = self.options.attention_stride > 0, self.options.before_rope
        return LayerStatistics(
            keys=StreamMoments.empty(heads, key_dim, device),
            values=StreamMoments.empty(heads, value_dim, device),
            queries=StreamMoments.empty(heads, key_dim, device),
            scaling=scaling,
            keys_turned=None if isinstance(turning, str) else TurnedMoments.empty(heads, turning),
            turning_refused=reason,
            keys_before_rope=StreamMoments.empty(heads, key_dim, device) if before_rope else None,
            attention=AttentionMoments.empty(heads, key_dim, value_dim, device) if attention else None,
        )

    def _rows(self, index: int, name: str, states: Tensor) -> Tensor:
        rows = states[0].float()
        if not bool(torch.isfinite(rows).all()):
            raise SkvqError(
                f"layer {index}: {name} of chunk {self.statistics.chunks} have NaN or infinity, expected finite numbers"
            )
        return rows

    def _before_rope(self, index: int, key: Tensor) -> Tensor:
        try:
            return self.rotary(index).back(key.float(), 0)
        except ValueError as error:
            raise SkvqError(f"before_rope=True: {error}") from None

    def _queries(self, layer: LayerStatistics, query: Tensor, heads: int, scaling: float) -> None:
        rows = query[0, :, self.options.sinks :].float() * scaling
        layer.queries.update(rows.unflatten(0, (heads, -1)).flatten(1, 2), 0)

    def _sample(self, query: Tensor, key: Tensor, value: Tensor) -> Sample:
        length, stride = min(key.shape[1], self.options.sample_length), self.options.query_stride
        positions = torch.arange(min(stride, length) - 1, length, stride)
        rows = (key[:, :length], value[:, :length], query[:, positions.to(query.device)])
        keys, values, queries = (x.to("cpu", copy=True).contiguous() for x in rows)
        return Sample(keys, values, queries, positions)


_ACTIVE = ContextVar("skvq_collector", default=None)


def _attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Exact attention, shown to the collector on the way."""
    collector = _ACTIVE.get()
    if collector is not None:
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        collector.look(module, query, key, value, scale, kwargs)
    return skvq_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)


@contextmanager
def _attention_of(model: Any, collector: _Collector) -> Iterator[None]:
    """The model's attention shows its rows to `collector`."""
    decoder = decoder_config(model.config)
    before, was_training = decoder._attn_implementation, model.training
    AttentionInterface.register(NAME, _attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.eval()
    model.set_attn_implementation(NAME)
    token = _ACTIVE.set(collector)
    try:
        if decoder._attn_implementation != NAME:
            raise SkvqError(f"model: a {type(model).__name__} keeps its own attention, expected one that can be set")
        yield
    finally:
        _ACTIVE.reset(token)
        model.set_attn_implementation(before)
        model.train(was_training)

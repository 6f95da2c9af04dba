"""`QuantizedDynamicCache`: a transformers cache whose full-attention layers are packed.

Is: the choice of layers, the refusal of models it cannot serve, the changes that concern all layers, and figures.
Is not: the store (the native module), the handles (packed.py), or one layer's protocol (layer.py).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from ._native import CudaLayer, SkvqError
from .attention import register_attention
from .config import SkvqConfig
from .display import LayerFigures, html_table, text_table
from .fingerprint import config_of
from .layer import PackedLayer, row_numbers
from .model_layers import decoder_config, head_dim_of, kept, layer_configs, stock_layers
from .packed import AttentionCounts
from .plan import LayerPlan

if TYPE_CHECKING:
    from .calibrate.prompt import PromptFit
    from .plan_file import QuantizationPlan


class QuantizedDynamicCache(Cache):
    """A low-bit key/value cache for `model.generate(past_key_values=...)` (SKVQ, arXiv 2405.06219).

    `sinks` tokens of the beginning and the last `window` of every full-attention layer stay in the model's dtype,
    those between are packed once, when they leave the window, and attention is computed on the packed bytes.
    Sliding-window layers keep transformers' own bounded layer.

    A cache that was made from the model itself fits what a long first prompt is packed with to that prompt, layer by
    layer (`SkvqConfig.fit_tokens`, docs/calibrate.md); one that was made from the configuration alone does not.

    Args:
        config: the model, or its configuration (`model.config`).
        skvq_config: options; the defaults are 2-bit keys and ternary values.
        attention_mask: of a left-padded batch, see `set_padding`.
        **options: fields of `SkvqConfig` that differ from `skvq_config`.

    Attributes:
        skvq_config: the options. With a plan, those that its layers may differ from: window, sinks, sink_search and
            nonfinite are of all layers, bits and other options of a layer are in `plan.layers`.
        plan: the calibrated plan of a cache made by `from_plan`, otherwise None.

    Raises:
        SkvqError: an option is not valid, or the model's cache cannot be packed; the message says what was expected.

    Example:
        >>> cache = QuantizedDynamicCache(model, key_bits=2, value_bits=1.6)
        >>> model.generate(**inputs, past_key_values=cache)
    """

    layers: list[Any]
    skvq_config: SkvqConfig
    plan: QuantizationPlan | None

    def __init__(
        self,
        config: Any,
        skvq_config: SkvqConfig | None = None,
        *,
        attention_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> None:
        self.skvq_config = SkvqConfig.from_options(skvq_config, **options)
        self.plan = None
        plan = LayerPlan.from_config(self.skvq_config)
        self._set_up(config_of(config), lambda _: plan, attention_mask, _prompt_fit(config, self.skvq_config))

    @classmethod
    def from_plan(
        cls,
        model_or_config: Any,
        plan: QuantizationPlan | Path | str,
        *,
        attention_mask: torch.Tensor | None = None,
        **overrides: Any,
    ) -> QuantizedDynamicCache:
        """A cache that packs every layer as a calibrated plan says.

        Args:
            model_or_config: the model, or its configuration.
            plan: a plan, its file, or a directory that its `save_pretrained` wrote.
            attention_mask: of a left-padded batch, see `set_padding`.
            **overrides: `window`, `sinks`, `sink_search` and `nonfinite`, where they shall differ from the plan's.

        Raises:
            SkvqError: the plan was made for another model (the message names the differing fields), its file is
                damaged, or another option is given.
        """
        from .plan_file import QuantizationPlan

        what = "the plan" if isinstance(plan, QuantizationPlan) else f"{plan}: the plan"
        if not isinstance(plan, QuantizationPlan):
            plan = QuantizationPlan.load(plan)
        plan.check(model_or_config, what)
        if overrides:
            plan = plan.with_regions(**overrides)
        cache = cls.__new__(cls)
        cache.skvq_config, cache.plan = plan.config, plan
        cache._set_up(config_of(model_or_config), plan.layers.__getitem__, attention_mask)
        return cache

    def _set_up(
        self,
        config: Any,
        plan_of: Callable[[int], LayerPlan],
        attention_mask: torch.Tensor | None,
        fit: PromptFit | None = None,
    ) -> None:
        self._counts = AttentionCounts()
        decoder = decoder_config(config)
        pairs = zip(stock_layers(config), layer_configs(config), strict=True)
        layers = [
            self._packed_layer(plan_of(index), index, layer_config, fit)
            if type(layer) is DynamicLayer
            else kept(layer, index)
            for index, (layer, layer_config) in enumerate(pairs)
        ]
        if not any(isinstance(layer, PackedLayer) for layer in layers):
            warnings.warn(
                f"no layer of this {getattr(decoder, 'model_type', '?')} model has full attention: its sliding layers "
                "are bounded already and nothing will be packed",
                UserWarning,
                stacklevel=3,
            )
        super().__init__(layers=layers)
        register_attention()
        if attention_mask is not None:
            self.set_padding(attention_mask)

    def _packed_layer(self, plan: LayerPlan, index: int, layer_config: Any, fit: PromptFit | None) -> PackedLayer:
        head_dim = head_dim_of(layer_config)
        if head_dim is not None:
            try:
                plan.check(head_dim, head_dim)
            except SkvqError as error:
                raise SkvqError(f"layer {index}: {error}") from None
        fit_tokens = 0 if fit is None or head_dim is None else self.skvq_config.tokens_to_fit(head_dim)
        return PackedLayer(plan, index, self._counts, fit=fit if fit_tokens else None, fit_tokens=fit_tokens)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store keys and values [B, Hkv, n, D] of layer `layer_idx`; returns what its attention takes."""
        layers = self.layers
        if not 0 <= layer_idx < len(layers):
            raise SkvqError(f"layer_idx={layer_idx}: expected 0 to {len(layers) - 1}, the configuration's layers")
        states: tuple[torch.Tensor, torch.Tensor] = layers[layer_idx].update(key_states, value_states, *args, **kwargs)
        return states

    def set_padding(self, attention_mask: torch.Tensor) -> None:
        """Say how the sequences of the next prompt are left-padded, before it is stored.

        Padding then takes no place of a sink, has no part in the statistics that rows are quantized with, and stays
        hidden from attention. Without this call a padded sequence is served too, with more error at low bits. It lasts
        until the cache is reset. Nothing of the batch is packed before its shortest sequence has as many tokens as
        sinks are chosen among.

        Args:
            attention_mask: [B, n] as the tokenizer made it, 0 for padding; each row may become several sequences.

        Raises:
            SkvqError: the cache holds tokens, or a row is not zeros followed by at least one other number.
        """
        padding = _left_padding(attention_mask)
        layers = self._packed_layers()
        if any(layer.get_seq_length() for layer in layers):
            raise SkvqError("set_padding: the cache holds tokens, expected it before the first ones")
        for layer in layers:
            layer.padding = padding

    # ---- changes of all layers: checked first, so that a refused one changes no layer ------------------------------

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens: 0 or a negative count (older transformers: also a length to keep, if positive).

        What was packed stays packed; where fewer tokens are left than sinks are chosen among, see `PackedLayer.crop`.
        """
        packed, stock = self._packed_layers(), self._stock_layers()
        for layer in packed:
            layer.length_after_crop(tokens_to_remove)
        for layer in (*stock, *packed):
            layer.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i of the batch becomes row `beam_idx[i]`; packed data is not copied."""
        self._gather(beam_idx, lambda layer: layer.reorder_cache(beam_idx))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices` of the batch."""
        self._gather(indices, lambda layer: layer.batch_select_indices(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row of the batch `repeats` times; packed data is not copied."""
        if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
            raise SkvqError(f"repeats={repeats!r}: expected a positive integer")
        for layer in self.layers:
            layer.batch_repeat_interleave(repeats)

    def _gather(self, indices: torch.Tensor, apply_to_stock: Any) -> None:
        rows = row_numbers(indices, self.batch_size) if self.batch_size > 0 else []
        for layer in self._stock_layers():
            apply_to_stock(layer)
        for layer in self._packed_layers():
            layer.gather(rows)

    # ---- steps on a GPU that are captured in a graph and replayed ----------------------------------------------------

    def reserve(self, tokens: int) -> None:
        """Take memory for so many tokens in all, so that a decode step can be captured; after the prompt.

        Of a text that is shorter than what sinks are chosen among (`sink_search`), they are chosen now.

        For layers whose keys and values are both packed. The layer may still grow beyond that, but not by replays. A
        crop gives back what was reserved.

        Raises:
            SkvqError: a layer is not on a GPU, has raw rows, or as many tokens already.
        """
        for layer, _ in self._stores_on_gpu("reserve"):
            try:
                layer.reserve(tokens)
            except SkvqError as error:
                raise SkvqError(f"layer {layer.index}: {error}") from None

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """A step of one token inside, with a graph of torch's around it, is recorded and does not run.

        The model must have made a step before and takes positions from a tensor. Masks are not read in the step:
        padding is what `set_padding` says. Afterwards each replay adds the token that lies in the step's input then;
        `replayed` tells the cache. Until `release_capture` it can be neither cropped, reordered, copied nor reset.

        With statistics of blocks (the default, of prompts too short for a fit) replays take them and pack rows as steps
        that are not captured do. As long as queries have their say in them (`query_exponent`; until a first block is
        complete behind 32 tokens), those of captured steps have it too.

        Example:
            >>> cache.reserve(prompt.shape[1] + 1000)
            >>> with cache.capturing(), torch.cuda.graph(graph):
            ...     logits = model(token, position_ids=position, past_key_values=cache).logits
            ...     token.copy_(logits[:, -1:].argmax(-1))
            ...     position.add_(1)
            >>> for _ in range(1000):
            ...     graph.replay()
            >>> cache.replayed(1000)
        """
        begun: list[tuple[PackedLayer, CudaLayer]] = []
        try:
            for layer, store in self._stores_on_gpu("capturing"):
                try:
                    store.begin_capture()
                except SkvqError as error:
                    raise SkvqError(f"layer {layer.index}: {error}") from None
                begun.append((layer, store))
            self._counts.capturing = True
            yield
        except BaseException:
            for layer, store in begun:
                _problem_of_end(layer, store)
                store.replayed(0)  # what was recorded in vain does not run
            raise
        else:
            problems = [problem for layer, store in begun if (problem := _problem_of_end(layer, store))]
            if problems:
                raise SkvqError(problems[0])
        finally:
            self._counts.capturing = False
            for layer, _ in begun:
                layer.version += 1

    def replayed(self, steps: int = 1) -> None:
        """The captured step has run so many times since this was last called. Needed before any other use of the cache.

        Raises:
            SkvqError: nothing is captured, or the tokens are more than were reserved.
        """
        for layer, store in self._stores_on_gpu("replayed"):
            store.replayed(steps)
            layer.version += 1

    def release_capture(self) -> None:
        """No captured step will run any more: the cache may change in every way again."""
        for _, store in self._stores_on_gpu("release_capture"):
            store.release_capture()

    def _stores_on_gpu(self, operation: str) -> list[tuple[PackedLayer, CudaLayer]]:
        found = []
        for index, layer in enumerate(self.layers):
            store = layer.native if isinstance(layer, PackedLayer) and layer.is_initialized else None
            if not isinstance(store, CudaLayer):
                kind = type(layer).__name__ if store is None else "a store on the CPU"
                raise SkvqError(f"{operation}: layer {index}: {kind}, expected a packed layer with tokens on a GPU")
            found.append((layer, store))
        return found

    # ---- figures -----------------------------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        """Sequences in the cache, -1 while it is empty."""
        for layer in self.layers:
            if isinstance(layer, PackedLayer):
                if layer.batch_rows:
                    return layer.batch_rows
            elif isinstance(getattr(layer, "keys", None), torch.Tensor) and layer.keys.ndim == 4:
                return int(layer.keys.shape[0])
        return -1

    @property
    def nbytes(self) -> int:
        """Bytes of all layers: codes, metadata, statistics, sinks and windows, and the tensors of sliding layers."""
        return sum(figures.nbytes for figures in self._figures())

    @property
    def bits_per_element(self) -> float:
        """8 * `nbytes` over the stored elements of keys and values; 0 while the cache is empty."""
        figures = self._figures()
        elements = sum(x.elements for x in figures)
        return 8.0 * sum(x.nbytes for x in figures) / elements if elements else 0.0

    def stats(self) -> dict[str, Any]:
        """Counts since the cache was made.

        Returns:
            "packed": attention calls computed on packed bytes; "prefill": calls attended in full precision: prompts,
            and tokens that came before sinks could be chosen (`sink_search`);
            "decoded": for each reason, how often keys or values of a layer were decoded to a plain tensor;
            "score_noise": for each layer with packed keys, the standard deviation of their scores' error as the codec
            expects it, at the first step that attended to any (where the cache warns if it is large: nothing is known
            when a model is loaded, or in a prompt, which attends to itself as it is);
            "fitted": for each layer whose packing was fitted to a prompt, the tokens of that; "not_fitted": for each
            layer where that was tried in vain, why;
            "nonfinite_rows": for each layer on a GPU that packed rows with a NaN or an infinity, how many (of keys and
            of values), for which this call waits.
        """
        broken = {layer.index: layer.nonfinite_rows() for layer in self._packed_layers()}
        return self._counts.as_dict() | {"nonfinite_rows": {index: count for index, count in broken.items() if count}}

    def __repr__(self) -> str:
        return text_table(self._title(), self._figures())

    def _repr_html_(self) -> str:
        return html_table(self._title(), self._figures())

    def _title(self) -> str:
        x = self.skvq_config
        bits = f"keys {x.key_bits:g} bits, values {x.value_bits:g} bits"
        if self.plan is not None:
            bits = f"plan {self.plan.header.method!r}, {self.plan.describe_bits()}"
        return f"{type(self).__name__}({bits}, sinks {x.sinks}, window {x.window})"

    def _packed_layers(self) -> list[PackedLayer]:
        return [layer for layer in self.layers if isinstance(layer, PackedLayer)]

    def _stock_layers(self) -> list[Any]:
        return [layer for layer in self.layers if not isinstance(layer, PackedLayer)]

    def _figures(self) -> list[LayerFigures]:
        return [x.figures() if isinstance(x, PackedLayer) else _stock_figures(x) for x in self.layers]


def _prompt_fit(model: Any, config: SkvqConfig) -> PromptFit | None:
    """What fits layers to a prompt, if this is a model and such are the options."""
    if not isinstance(model, torch.nn.Module) or config.fit_tokens == 0:
        return None
    from .calibrate.prompt import PromptFit

    return PromptFit(model)


def _problem_of_end(layer: PackedLayer, store: CudaLayer) -> str | None:
    """What is wrong with the step that a store has recorded, in words; its capture ends either way."""
    try:
        store.end_capture()
    except SkvqError as error:
        return f"layer {layer.index}: {error}"
    return None


def _left_padding(attention_mask: torch.Tensor) -> tuple[int, ...]:
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2 or 0 in attention_mask.shape:
        shape = tuple(getattr(attention_mask, "shape", ()))
        raise SkvqError(
            f"attention_mask: got {type(attention_mask).__name__} {shape}, expected a tensor [batch, tokens]"
        )
    seen = attention_mask.to("cpu") != 0
    padding = (~seen).sum(-1)
    wrong = (seen != (torch.arange(seen.shape[1]) >= padding[:, None])).any(-1) | ~seen.any(-1)
    if bool(wrong.any()):
        raise SkvqError(
            f"attention_mask: row {int(wrong.nonzero()[0])} is not zeros and then ones, expected padding on the left "
            "only (padding_side='left')"
        )
    counts: list[int] = padding.tolist()
    return tuple(counts) if any(counts) else ()


def _stock_figures(layer: Any) -> LayerFigures:
    kind = "sliding" if isinstance(layer, DynamicSlidingWindowLayer) else "none"
    keys, values = layer.keys, layer.values
    if not isinstance(keys, torch.Tensor) or keys.ndim != 4:
        return LayerFigures(kind, 0, 0, 0, 0, 0, 0, 0)
    nbytes, elements = keys.nbytes + values.nbytes, keys.numel() + values.numel()
    return LayerFigures(kind, keys.shape[0], keys.shape[1], 0, 0, keys.shape[2], nbytes, elements)

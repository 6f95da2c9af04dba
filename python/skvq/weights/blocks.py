"""The decoder layers of a model, one after another outside the model: what they are called with, their linear layers.

Is: the capture of the first layer's inputs and of every layer's arguments (masks and position embeddings differ by the
kind of a layer), and a window of layers that are worked on: in float32 on a device, while the model keeps the others on
the CPU as it has them. Is not: for left-padded batches; all samples have one length.
Shapes: token_ids int64 [S, T], streams float32 [S, T, H] on the CPU; a batch of one is on the device while it is used.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .._native import SkvqError
from ..model_layers import decoder_of
from .grid import WeightOptions

# Arguments of a layer that belong to generation, or that would keep a graph of the whole model alive.
_DROPPED = ("cache", "past_key_values", "past_key_value", "use_cache", "output_attentions")


@dataclass(frozen=True)
class LayerCall:
    """What the model calls one layer with, beside the hidden states."""

    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def __call__(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """The layer's output [B, T, H] for its input [B, T, H]."""
        made = layer(hidden, *self.arguments, **self.options)
        output: Tensor = made[0] if isinstance(made, tuple) else made
        return output

    def on(self, device: torch.device) -> LayerCall:
        """The same call with its tensors on a device."""
        return LayerCall(_moved(self.arguments, device), _moved(self.options, device))


def _moved(values: Any, device: torch.device) -> Any:
    return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, values)


@dataclass(frozen=True)
class Captured:
    """The stream that enters the first layer [S, T, H], and how every layer is called."""

    stream: Tensor
    calls: list[LayerCall]


class _StopError(Exception):
    """Raised behind the capture of the first layer's input: the rest of the model is not needed."""


def decoder_layers(model: Any) -> nn.ModuleList:
    """The layers of a causal language model of transformers, also of one that sees images.

    Raises:
        SkvqError: its decoder does not have them as `layers`.
    """
    layers = decoder_of(model).layers
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise SkvqError(f"model: the layers of a {type(model).__name__} are no list, expected a Llama-like decoder")
    return layers


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of the module that has this full name."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, new)


def linear_layers(layer: nn.Module, ignore: Sequence[str] = ()) -> dict[str, nn.Linear]:
    """The linear layers inside a decoder layer, by name, without those whose name ends in one of `ignore`."""
    return {
        name: module
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and not any(name.endswith(end) for end in ignore)
    }


def check_layers(model: Any, options: WeightOptions, ignore: Sequence[str] = ()) -> None:
    """Raise SkvqError if a linear layer cannot be cut into groups, or if there is none."""
    count = 0
    for index, layer in enumerate(decoder_layers(model)):
        for name, linear in linear_layers(layer, ignore).items():
            options.check(f"layers.{index}.{name}", linear.weight)
            count += 1
    if not count:
        raise SkvqError(f"ignore={tuple(ignore)!r}: expected to leave some linear layer of the decoder")


def _fits(layer: nn.Module, device: torch.device) -> bool:
    return all(x.device == device and x.dtype == torch.float32 for x in layer.parameters())


def working_layer(layer: nn.Module, device: torch.device) -> nn.Module:
    """The layer in float32 on a device: itself if it is that already, else a copy."""
    return layer if _fits(layer, device) else copy.deepcopy(layer).to(device, torch.float32)


class BlockWindow:
    """The decoder layers that are worked on, in float32 on one device. The model has the others, in its own dtype.

    A layer enters when it is first used and stays until it leaves.
    """

    def __init__(self, layers: nn.ModuleList, calls: Sequence[LayerCall], device: torch.device) -> None:
        self.device = device
        self._layers, self._calls = layers, calls
        self._held: dict[int, tuple[nn.Module, LayerCall]] = {}

    def __len__(self) -> int:
        return len(self._held)

    def layer(self, index: int) -> nn.Module:
        """The layer as it is worked on."""
        return self._entered(index)[0]

    def __call__(self, index: int, hidden: Tensor) -> Tensor:
        """The layer's output for its input, both [B, T, H] on the device."""
        layer, call = self._entered(index)
        return call(layer, hidden)

    def _entered(self, index: int) -> tuple[nn.Module, LayerCall]:
        if index not in self._held:
            self._held[index] = (working_layer(self._layers[index], self.device), self._calls[index].on(self.device))
        return self._held[index]

    def leave(self, index: int) -> None:
        """The layer's weights go back to the model, rounded to its dtype."""
        made, own = self._held.pop(index)[0], self._layers[index]
        if made is not own:
            values = dict(made.named_parameters())  # in another order where a weight was trained
            with torch.no_grad():
                for name, parameter in own.named_parameters():
                    parameter.copy_(values[name])

    def advance(self, index: int, stream: Tensor, batch: int) -> Tensor:
        """The stream behind one layer."""
        found = torch.empty_like(stream)
        with torch.no_grad():
            for hidden, output in zip(stream.split(batch), found.split(batch), strict=True):
                output.copy_(self(index, hidden.to(self.device)))
        return found


@contextmanager
def _outside_in_float32(model: Any, layers: nn.ModuleList) -> Iterator[None]:
    """Inside, what the decoder has besides its layers is in float32: embedding and last norm."""
    inside = {id(x) for x in layers.parameters()}
    outside = [x for x in model.base_model.parameters() if id(x) not in inside and x.is_floating_point()]
    before = [x.dtype for x in outside]
    try:
        for parameter in outside:
            parameter.data = parameter.data.float()
        yield
    finally:
        for parameter, dtype in zip(outside, before, strict=True):
            parameter.data = parameter.data.to(dtype)


@contextmanager
def _one_at_a_time(layer: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, a call of the layer runs it in float32 on the device and gives back tensors on the CPU."""
    if _fits(layer, device):
        yield
        return

    def run(*arguments: Any, **options: Any) -> Any:
        working = working_layer(layer, device)
        del working.forward  # copied with the rest, as hooks are, which have been called
        return _moved(working.forward(*_moved(arguments, device), **_moved(options, device)), torch.device("cpu"))

    layer.forward = run
    try:
        yield
    finally:
        del layer.forward


def capture(model: Any, token_ids: Tensor, batch: int, device: torch.device | None = None) -> Captured:
    """Runs the embedding for all samples, and the whole decoder for the first one, whose calls are kept.

    Args:
        model: a causal language model on the CPU, in any dtype; not changed.
        token_ids: int64 [S, T].
        batch: samples at once.
        device: where its layers run, one at a time in float32; None: the CPU.

    Raises:
        SkvqError: layers are not called one after another, each once with the output of the one before.
    """
    if token_ids.ndim != 2 or not token_ids.shape[0]:
        raise SkvqError(f"token_ids: got {tuple(token_ids.shape)}, expected samples [S, T] with S of at least 1")
    layers = decoder_layers(model)
    calls: list[LayerCall | None] = [None] * len(layers)
    hooks = []

    def keep(index: int) -> Any:
        def hook(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            if calls[index] is not None or not arguments:
                raise SkvqError(f"model: layer {index} is not called once with its hidden states")
            kept = {name: value for name, value in options.items() if name not in _DROPPED}
            calls[index] = LayerCall(tuple(arguments[1:]), kept)

        return hook

    device = device or torch.device("cpu")
    with torch.no_grad(), _outside_in_float32(model, layers):
        try:
            hooks += [x.register_forward_pre_hook(keep(i), with_kwargs=True) for i, x in enumerate(layers)]
            with ExitStack() as running:
                for layer in layers:
                    running.enter_context(_one_at_a_time(layer, device))
                model.base_model(token_ids[:1], use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        missing = [index for index, call in enumerate(calls) if call is None]
        if missing:
            raise SkvqError(f"model: layer {missing[0]} was not called, expected every layer to run")
        stream = torch.cat([_first_input(model, layers[0], ids) for ids in token_ids.split(batch)])
    return Captured(stream, [call for call in calls if call is not None])


def _first_input(model: Any, first: nn.Module, token_ids: Tensor) -> Tensor:
    found: list[Tensor] = []

    def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        found.append(arguments[0].detach())
        raise _StopError

    handle = first.register_forward_pre_hook(hook)
    try:
        model.base_model(token_ids, use_cache=False)
    except _StopError:
        pass
    finally:
        handle.remove()
    return found[0]


@dataclass(frozen=True)
class InputMoments:
    """Of one linear layer's inputs over the stream: mean squares float32 [I], mean products [I, I] if asked for."""

    power: Tensor
    products: Tensor | None


def input_moments(
    window: BlockWindow, index: int, stream: Tensor, batch: int, linears: dict[str, nn.Linear], products: bool
) -> dict[str, InputMoments]:
    """The moments of the inputs of every linear layer, by name, from one run of the decoder layer over the stream."""
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(linears, 0)

    def look(name: str) -> Any:
        def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            rows = arguments[0].detach().flatten(0, -2).float()
            total = rows.T @ rows if products else rows.square().sum(0)
            sums[name] = sums[name].add_(total) if name in sums else total
            counts[name] += rows.shape[0]

        return hook

    hooks = [module.register_forward_pre_hook(look(name)) for name, module in linears.items()]
    try:
        window.advance(index, stream, batch)
    finally:
        for hook in hooks:
            hook.remove()
    found = {name: total / max(1, counts[name]) for name, total in sums.items()}
    return {
        name: InputMoments(mean.diagonal().clone(), mean) if products else InputMoments(mean, None)
        for name, mean in found.items()
    }


def batches(samples: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Sample numbers in a random order, `batch` at a time."""
    yield from torch.randperm(samples, generator=generator).split(batch)

"""Cross-block reconstruction (WKVQuant): block by block, clips are trained against the full-precision stream, and with
them which way every weight is rounded.

A block is one decoder layer. Its input comes from the quantized blocks before it; the targets are the outputs of the
block and of the `ahead` next ones on the full-precision stream, and the loss is the sum of the mean absolute (or
squared) errors of all of them, the next blocks being in full precision. `ahead=0` with "mse" is OmniQuant's loss.

Is: the loop, its log and its state. Is not: the grid (grid.py), keys and values (channels.py), the checkpoint
(checkpoint.py). In memory besides the model, which stays in its own dtype on the CPU: 2 + ahead streams float32
[S, T, H] there; on the device the 1 + ahead blocks of the window in float32, and the activations of one batch.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import deque
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm import tqdm

from .._native import SkvqError
from ..model_layers import packed_layers
from ..plan import StreamPlan
from .blocks import (
    BlockWindow,
    InputMoments,
    batches,
    capture,
    check_layers,
    decoder_layers,
    input_moments,
    linear_layers,
)
from .channels import ChannelOptions, ChannelTraining, LayerChannels
from .compensation import compensate
from .grid import OPEN_CLIP, WeightOptions, encode, fake_quantize, grid, ranges, search_clips
from .packing import packed_tensors, unpacked_weight
from .state import BlockState, StateFolder

LOSSES = ("mae", "mse")
STARTS = ("search", "open", "range")
ROUNDINGS = ("nearest", "compensated", "learnt")
FINAL_RATE = 0.1  # of the first learning rate, at the end of the cosine


@dataclass(frozen=True)
class ReconstructOptions:
    """How clips, and shift and scale of keys and values, are found.

    Attributes:
        ahead: next blocks whose outputs count in the loss, the paper's k.
        loss: "mae" or "mse".
        start: "search": for every group the fraction of its range with the least error, inputs weighed by their mean
            square; "open": 0.982 of the range, as OmniQuant; "range": all of it, round-to-nearest.
        rounding: "nearest", as in WKVQuant; "compensated": the error of one input is put onto those not yet rounded
            (GPTQ), then clips are trained on the weights that came of it; "learnt": every weight has an offset between
            −1/2 and 1/2 before it is rounded, trained by the signs of its gradients with a rate that falls from
            1 / steps to 0 (SignRound).
        epochs: passes over the samples for each block; 0, the default, leaves the start as it is: with compensated
            rounding training gained nothing that the noise would not hide (docs/weights.md).
        batch: samples of a step.
        rate: AdamW's learning rate of the clips' logits.
        channel_rate: likewise, of shift and scale.
        seed: of the order of samples.
        ignore: ends of names of linear layers that stay as they are.
        channels: train two-dimensional quantization of the cache as well; None: weights only.

    Raises:
        SkvqError: a value is not one of those above.
    """

    ahead: int = 1
    loss: str = "mae"
    start: str = "search"
    rounding: str = "compensated"
    epochs: int = 0
    batch: int = 1
    rate: float = 0.05
    channel_rate: float = 0.01
    seed: int = 0
    ignore: tuple[str, ...] = ()
    channels: ChannelOptions | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("loss", LOSSES), ("start", STARTS), ("rounding", ROUNDINGS)):
            if getattr(self, name) not in allowed:
                raise SkvqError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(map(repr, allowed))}")
        for name, least in (("ahead", 0), ("epochs", 0), ("batch", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise SkvqError(f"{name}={value!r}: expected an integer of at least {least}")
        for name in ("rate", "channel_rate"):
            if not getattr(self, name) > 0.0:
                raise SkvqError(f"{name}={getattr(self, name)!r}: expected a number above 0")
        if self.start == "range" and self.epochs:
            raise SkvqError(f"start='range', epochs={self.epochs}: expected epochs=0, a clip of 1 cannot be trained")
        if self.rounding == "learnt" and not self.epochs:
            raise SkvqError("rounding='learnt', epochs=0: expected at least one epoch")


@dataclass(eq=False)
class Reconstruction:
    """What was found.

    Attributes:
        tensors: of the checkpoint, by their full names: weight_packed, weight_scale, ... of every quantized layer.
        channels: key and value plan of every packed layer, if they were trained.
        log: a row for every block: loss before and after, seconds.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    channels: dict[int, tuple[StreamPlan, StreamPlan]] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)


class _Clip(nn.Module):
    """The parametrization of a weight while its clips, and offsets before rounding, are trained."""

    def __init__(self, weight: Tensor, low: Tensor, high: Tensor, options: WeightOptions, learnt: bool) -> None:
        super().__init__()
        self.low, self.high, self.options = nn.Parameter(low), nn.Parameter(high), options
        self.ranges = ranges(weight, options)
        self.offset = nn.Parameter(torch.zeros_like(weight)) if learnt else None

    def forward(self, weight: Tensor) -> Tensor:
        return fake_quantize(weight, self.options, self.low, self.high, self.ranges, self.offset)


def reconstruct(
    model: Any,
    token_ids: Tensor,
    weights: WeightOptions | None = None,
    options: ReconstructOptions | None = None,
    *,
    state: Path | None = None,
    progress: bool = False,
    device: str | torch.device = "cpu",
) -> Reconstruction:
    """Quantize all linear layers of the decoder; the model's weights become the quantized ones.

    Args:
        model: a causal language model of transformers, on the CPU, in float32 or the dtype that it is stored in: blocks
            are worked on in float32, and the model's own weights are rounded to its dtype afterwards. Its embeddings,
            norms, biases and output layer stay as they are.
        token_ids: calibration samples of one length, int64 [S, T].
        weights: the grid.
        options: of the reconstruction.
        state: a folder that holds every finished block, so that an interrupted run goes on and ends the same.
        progress: a bar on stderr.
        device: where blocks are worked on, such as "cuda".

    Raises:
        SkvqError: a layer does not fit the group size, the model is not on the CPU, or the state is of another run.
    """
    weights, options = weights or WeightOptions(), options or ReconstructOptions()
    if model.device.type != "cpu":
        raise SkvqError(f"model: on {model.device}, expected it on the CPU: its blocks go to device={str(device)!r}")
    check_layers(model, weights, options.ignore)
    folder = StateFolder.open(state, model, token_ids, {"weights": asdict(weights), "options": asdict(options)})
    was_training = model.training
    model.eval().requires_grad_(False)
    training = ChannelTraining()
    with nullcontext() if options.channels is None else training.attached(model):
        run = _Run(model, token_ids, weights, options, training, torch.device(device))
        found = Reconstruction()
        bar = tqdm(total=len(run.layers), unit="block", desc="weights", disable=not progress, file=sys.stderr)
        with bar:
            for index in range(len(run.layers)):
                block = run.block(index, folder.read(index))
                folder.write(index, block)
                found.tensors |= {f"{run.prefix}.{index}.{name}": x for name, x in block.tensors.items()}
                found.log.append(block.log)
                if block.channels is not None:
                    found.channels[index] = block.channels
                bar.update()
                bar.set_postfix_str(_brief(block.log))
    model.train(was_training)
    return found


def _brief(log: dict[str, Any]) -> str:
    return f"{log['before']:.4g} → {log['after']:.4g}"


class _Run:
    """The two streams, and the block that is worked on."""

    def __init__(
        self,
        model: Any,
        token_ids: Tensor,
        weights: WeightOptions,
        options: ReconstructOptions,
        kv: ChannelTraining,
        device: torch.device,
    ) -> None:
        self.layers = decoder_layers(model)
        self.prefix = next(name for name, module in model.named_modules() if module is self.layers)
        self.weights, self.options, self.kv = weights, options, kv
        captured = capture(model, token_ids, options.batch, device)
        self.window = BlockWindow(self.layers, captured.calls, device)
        self.quantized = captured.stream  # enters the block, from quantized blocks
        self.front = captured.stream  # behind the last block of `targets`, in full precision
        self.targets: deque[Tensor] = deque()
        self.reached = 0  # blocks that the full-precision stream has passed
        self.packed = set(packed_layers(model.config)) if options.channels is not None else set()

    def block(self, index: int, done: BlockState | None) -> BlockState:
        """One block: from the state, or by training; afterwards its weights are the quantized ones."""
        self._look_ahead(index)
        if done is None:
            done = self._train(index)
        else:
            self._restore(index, done)
        linears = linear_layers(self.window.layer(index), self.options.ignore)
        for name, linear in linears.items():
            parts = [done.tensors[f"{name}.{x}"] for x in ("weight_packed", "weight_scale", "weight_zero_point")]
            shape = (linear.weight.shape[0], linear.weight.shape[1])
            made = unpacked_weight(parts[0], parts[1], parts[2], shape, self.weights.bits)
            linear.weight.data.copy_(made.dequantize())
        self.quantized = self.window.advance(index, self.quantized, self.options.batch)
        self.window.leave(index)
        self.targets.popleft()
        return done

    def _look_ahead(self, index: int) -> None:
        """Full-precision outputs of the block and the next `ahead`, before they are quantized."""
        while self.reached < min(len(self.layers), index + 1 + self.options.ahead):
            self.front = self.window.advance(self.reached, self.front, self.options.batch)
            self.targets.append(self.front)
            self.reached += 1

    def _restore(self, index: int, done: BlockState) -> None:
        if done.channels is not None and self.options.channels is not None:
            self.kv.active[index] = LayerChannels.fixed(*done.channels, self.options.channels, self.window.device)

    # ---- training ----------------------------------------------------------------------------------------------------

    def _train(self, index: int) -> BlockState:
        begin = time.perf_counter()
        linears = linear_layers(self.window.layer(index), self.options.ignore)
        clips = self._start(index, linears)
        channels = self.kv.active.get(index)
        for name, linear in linears.items():
            parametrize.register_parametrization(linear, "weight", clips[name], unsafe=True)
        groups = [{"params": [p for clip in clips.values() for p in (clip.low, clip.high)], "lr": self.options.rate}]
        offsets: list[Tensor] = [clip.offset for clip in clips.values() if clip.offset is not None]
        if channels is not None:
            groups.append({"params": channels.parameters(), "lr": self.options.channel_rate})
        try:
            before = after = self._loss(index)
            if self.options.epochs:
                held = _copies(groups)
                self._descend(index, groups, offsets)
                after = self._loss(index)
                if not after < before:
                    _put_back(groups, held)
                    for offset in offsets:
                        offset.data.zero_()
        finally:
            for linear in linears.values():
                parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)
                linear.weight.requires_grad_(False)
        tensors: dict[str, Tensor] = {}
        for name, linear in linears.items():
            clip = clips[name]
            low, high = (None, None) if self.options.start == "range" else (clip.low, clip.high)
            made = encode(linear.weight, self.weights, low, high, clip.offset, clip.ranges).to(torch.device("cpu"))
            tensors |= {f"{name}.{x}": value for x, value in packed_tensors(made, self.weights).items()}
        log = {
            "block": index,
            "before": before,
            "after": min(before, after),
            "kept_start": bool(self.options.epochs) and not after < before,
            "seconds": round(time.perf_counter() - begin, 2),
        }
        return BlockState(tensors, None if channels is None else channels.plans(), log)

    def _start(self, index: int, linears: dict[str, nn.Linear]) -> dict[str, _Clip]:
        """The clips to begin with; also the untrained scales of keys and values of the block."""
        batch = self.options.batch
        if index in self.packed:
            self.kv.collect = index
        moments: dict[str, InputMoments] = {}
        compensated = self.options.rounding == "compensated"
        if self.options.start == "search" or compensated or index in self.packed:
            moments = input_moments(self.window, index, self.quantized, batch, linears, compensated)
        if index in self.packed:
            assert self.options.channels is not None
            self.kv.active[index] = self.kv.start(self.options.channels)
        clips = {}
        for name, linear in linears.items():
            outputs, groups = linear.weight.shape[0], linear.weight.shape[1] // self.weights.group_size
            if self.options.start == "search":
                power, trainable = moments[name].power, bool(self.options.epochs)
                low, high = search_clips(linear.weight.detach(), self.weights, power, trainable)
            else:
                logit = OPEN_CLIP if self.options.start == "open" else math.inf
                low = high = torch.full((outputs, groups), logit, device=linear.weight.device)
            learnt = self.options.rounding == "learnt"
            clips[name] = _Clip(linear.weight.detach(), low.clone(), high.clone(), self.weights, learnt)
            products = moments[name].products if compensated else None
            if products is not None:
                scale, zero = grid(linear.weight.detach(), self.weights, low, high, clips[name].ranges)
                made = compensate(linear.weight.detach(), self.weights, scale, zero, products)
                linear.weight.data.copy_(made)
        return clips

    def _losses(self, index: int, samples: Tensor) -> Tensor:
        """Sum over the blocks of the window of the mean error of some samples."""
        device = self.window.device
        total = torch.zeros((), device=device)
        hidden = self.quantized[samples].to(device)
        for place, target in enumerate(self.targets):
            hidden = self.window(index + place, hidden)
            error = hidden - target[samples].to(device)
            total = total + (error.abs() if self.options.loss == "mae" else error.square()).mean()
        return total

    def _loss(self, index: int) -> float:
        """Over all samples."""
        with torch.no_grad(), parametrize.cached():
            parts = torch.arange(self.quantized.shape[0]).split(self.options.batch)
            return sum(float(self._losses(index, x)) * len(x) for x in parts) / self.quantized.shape[0]

    def _descend(self, index: int, groups: list[dict[str, Any]], offsets: list[Tensor]) -> None:
        generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + index)
        samples, options = self.quantized.shape[0], self.options
        steps = options.epochs * -(-samples // options.batch)
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step / steps))
        done = 0
        with torch.enable_grad():
            for _ in range(options.epochs):
                for chosen in batches(samples, options.batch, generator):
                    optimizer.zero_grad(set_to_none=True)
                    loss = self._losses(index, chosen)
                    if not bool(torch.isfinite(loss)):
                        raise SkvqError(f"block {index}: the loss is {float(loss)}, expected a smaller rate or batch")
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                    _follow_signs(offsets, (1.0 - done / steps) / steps)
                    done += 1


def _follow_signs(offsets: list[Tensor], rate: float) -> None:
    """One step of every offset against the sign of its gradient, which is dropped."""
    with torch.no_grad():
        for offset in offsets:
            if offset.grad is not None:
                offset.sub_(offset.grad.sign_(), alpha=rate).clamp_(-0.5, 0.5)
                offset.grad = None


def _cosine(share: float) -> float:
    return FINAL_RATE + (1.0 - FINAL_RATE) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, share)))


def _copies(groups: list[dict[str, Any]]) -> list[Tensor]:
    return [p.detach().clone() for group in groups for p in group["params"]]


def _put_back(groups: list[dict[str, Any]], held: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip((p for group in groups for p in group["params"]), held, strict=True):
            parameter.copy_(value)


def write_log(found: Reconstruction, path: Path, settings: dict[str, Any]) -> None:
    """The log of every block as JSON."""
    path.write_text(json.dumps({"settings": settings, "blocks": found.log}, indent=1) + "\n", encoding="utf-8")

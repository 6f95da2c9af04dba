"""WKVQuant's two-dimensional quantization of keys and values, in a form that can be trained.

Static: a shift and a scale for every channel of a kv head, learnt. Dynamic: groups of channels of one token between
their minimum and maximum, with fp16 scale and zero point. Past-only: a query sees tokens of its window and the sinks
exactly and older ones quantized. Keys are quantized after RoPE, as the packed cache has them, so the shift need not be
equal in RoPE pairs; both streams are folded at read time (DESIGN: "everything static folds out of the hot loop").

Is: the trainable twin of a plan with `rule="range"`, `symmetric=False`, a uniform codebook, a static shift and scale.
Is not: the codec; a test holds the two against each other.
Shapes: keys and values [B, Hkv, T, D], shift and scale float32 [Hkv, D].
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ..config import StreamOptions
from ..plan import StreamPlan
from ..sinks import sink_mask
from .grid import _RoundSTE

NAME = "skvq_weights"
SMALLEST_RANGE = 1e-4
GROUP = 128


@dataclass(frozen=True)
class ChannelOptions:
    """What of the cache is trained.

    Attributes:
        bits: of a code of keys and values.
        window: most recent tokens that a query sees exactly, its own included.
        sinks: tokens that are never quantized.
        sink_search: among how many first tokens they are chosen (skvq/sinks.py).
    """

    bits: int = 4
    window: int = 128
    sinks: int = 5
    sink_search: int = 64


class ChannelScales(nn.Module):
    """Shift and scale of one stream; they start in the middle of each channel's range and at half of its width."""

    def __init__(self, middle: Tensor, width: Tensor, bits: int) -> None:
        super().__init__()
        self.levels = 2**bits - 1
        self.bits = bits
        self.register_buffer("width", width)
        self.register_buffer("middle", middle)
        self.moved = nn.Parameter(torch.zeros_like(width))  # of the middle, in widths
        self.stretch = nn.Parameter(torch.zeros_like(width))  # logarithm

    @classmethod
    def from_rows(cls, rows: Tensor, bits: int) -> ChannelScales:
        """Untrained, for rows [N, Hkv, T, D] of calibration texts."""
        low, high = rows.float().amin((0, 2)), rows.float().amax((0, 2))
        return cls((high + low) / 2, ((high - low) / 2).clamp(min=SMALLEST_RANGE), bits)

    @classmethod
    def of(cls, plan: StreamPlan) -> ChannelScales:
        """As a plan says."""
        assert plan.shift is not None
        assert plan.scale is not None
        return cls(plan.shift, plan.scale, int(plan.options.bits))

    def static(self) -> tuple[Tensor, Tensor]:
        """Shift and scale [Hkv, D]."""
        width: Any = self.width
        return self.middle + self.moved * width, width * self.stretch.exp()

    def forward(self, rows: Tensor) -> Tensor:
        """Rows [B, Hkv, T, D] as they would be read back, differentiable."""
        shift, scale = (x[None, :, None] for x in self.static())
        size = GROUP if rows.shape[-1] % GROUP == 0 else rows.shape[-1]
        groups = ((rows.float() - shift) / scale).unflatten(-1, (-1, size))
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        step = _half(((high - low) / self.levels).clamp(min=2.0**-14))
        zero = _half((high + low) / 2)
        middle = self.levels / 2
        codes = _RoundSTE.apply((groups - zero) / step + middle, False).clamp(0, self.levels)
        read: Tensor = ((codes - middle) * step + zero).flatten(-2) * scale + shift
        return read.to(rows.dtype)

    def plan(self) -> StreamPlan:
        """The same as a plan of the packed cache."""
        shift, scale = (x.detach().float().cpu().clone() for x in self.static())
        return StreamPlan(stream_options(self.bits), shift=shift, scale=scale)


def stream_options(bits: int) -> StreamOptions:
    """Two-dimensional quantization in the words of `StreamOptions`."""
    return StreamOptions(
        bits=bits, rotation="identity", codebook="uniform", rule="range", symmetric=False, metadata="fp16", block=0
    )


def _half(x: Tensor) -> Tensor:
    """x rounded to fp16; the gradient passes."""
    return x + (x.half().float() - x).detach()


@dataclass(eq=False)
class LayerChannels:
    """Both streams of one layer, and the rule of what is past."""

    keys: ChannelScales
    values: ChannelScales
    options: ChannelOptions

    @classmethod
    def fixed(
        cls, keys: StreamPlan, values: StreamPlan, options: ChannelOptions, device: torch.device
    ) -> LayerChannels:
        """From plans that were found before, on a device."""
        return cls(ChannelScales.of(keys).to(device), ChannelScales.of(values).to(device), options)

    def plans(self) -> tuple[StreamPlan, StreamPlan]:
        """The key and the value plan."""
        return self.keys.plan(), self.values.plan()

    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        return [*self.keys.parameters(), *self.values.parameters()]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None) -> Tensor:
        """Causal attention [B, Hq, T, D] → [B, Hq, T, Dv]; older tokens are read as quantized."""
        group, length = query.shape[1] // key.shape[1], key.shape[2]
        read = (self.keys(key), self.values(value))
        exact = [x.repeat_interleave(group, 1) for x in (key, value)]
        past_rows = [x.repeat_interleave(group, 1) for x in read]
        now = torch.arange(length, device=key.device)
        past = now[None, :] <= now[:, None] - self.options.window
        past = past & ~_is_sink(self.options, key, value)[:, None, None, :]
        query = query * scaling
        scores = torch.where(past, query @ past_rows[0].mT, query @ exact[0].mT)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        weights = scores.masked_fill(now[None, :] > now[:, None], -torch.inf).softmax(-1)
        return weights.masked_fill(~past, 0.0) @ past_rows[1] + weights.masked_fill(past, 0.0) @ exact[1]


def _is_sink(options: ChannelOptions, keys: Tensor, values: Tensor) -> Tensor:
    """Bool [B, T]."""
    return sink_mask(keys.detach(), values.detach(), options.sinks, options.sink_search, options.window)


class ChannelTraining:
    """The model's attention while its cache is trained: layers in `active` quantize, the others are exact.

    With `collect` set, the rows of that layer are kept in `rows` instead.
    """

    def __init__(self) -> None:
        self.active: dict[int, LayerChannels] = {}
        self.collect: int | None = None
        self.rows: list[tuple[Tensor, Tensor]] = []

    def _forward(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        index = int(module.layer_idx)  # type: ignore[arg-type]
        if self.collect == index:
            self.rows.append((key.detach(), value.detach()))
        if index not in self.active:
            output, _ = sdpa_attention_forward(module, query, key, value, mask, **options)
            return output, None
        scaling = options.get("scaling")
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        made = self.active[index].attend(query, key, value, scale, options.get("softcap"))
        return made.transpose(1, 2).contiguous(), None

    @contextmanager
    def attached(self, model: Any) -> Iterator[ChannelTraining]:
        """Inside, the model's attention is this one."""
        config = model.config.get_text_config(decoder=True)
        before = config._attn_implementation
        AttentionInterface.register(NAME, self._forward)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)
        try:
            yield self
        finally:
            model.set_attn_implementation(before)

    def start(self, options: ChannelOptions) -> LayerChannels:
        """The untrained scales of one layer, from the collected rows."""
        keys, values = (torch.cat([pair[i] for pair in self.rows]) for i in (0, 1))
        self.rows, self.collect = [], None
        kept = (~_is_sink(options, keys, values)).nonzero()[:, 1].view(keys.shape[0], 1, -1, 1)
        keys, values = (x.gather(2, kept.expand(-1, x.shape[1], -1, x.shape[3])) for x in (keys, values))
        made = [ChannelScales.from_rows(rows, options.bits) for rows in (keys, values)]
        return LayerChannels(made[0], made[1], options)

"""Which training-free plan is best: exact simulation of the store's rule on a real model, one pass per chunk of text.

Is: a model run on chunks of text with an attention function that shows every query the keys and values a decoding
step would see (exact in the sinks and the window, decoded where packed, no block before its last row exists), and the
divergence of its predictions from those of the same pass with exact keys and values. Codecs are the reference's. Is
not: a test of the packed kernels. Keys are quantized as a transformers cache gets them, after RoPE. Layers that do
not attend to everything stay exact.

A plan is two streams, `K` and `V`, each a format and options of `ReferenceCodec`: "K2:block=256
V1.6:block=256,scale_exponent=0". Options known only here: `once=1` (every block uses the statistics of the first),
`pair=1` (the two channels that RoPE rotates into each other share a scale), and `kivi=1` (KIVI: keys in groups of 32
tokens per channel, values in groups of 32 channels, fp16 minimum and step).

    python tests/bench/default_plan.py --model PATH --texts a.txt b.txt --out result.jsonl \
        --plan "K2:kivi=1 V2:kivi=1" …
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.masking_utils import AttentionMaskInterface

from skvq.reference import ReferenceCodec

KIVI_GROUP = 32
QUERY_CHUNK = 256
VOCABULARY_ROWS = 128  # tokens whose logits are held in float32 at once

KEYS, VALUES = "block=256,scale_exponent=0.75,clip=1.1", "block=256,scale_exponent=0"
DEFAULT_PLANS = (
    "K2:kivi=1 V2:kivi=1",
    f"K2:{KEYS} V1.5:{VALUES}",
    f"K2:{KEYS} V1.6:{VALUES}",
    f"K2:{KEYS} V2:{VALUES}",
    f"K3:{KEYS} V1.6:{VALUES}",
    f"K3:{KEYS} V2:{VALUES}",
    f"K4:{KEYS} V4:{VALUES}",
    "K4:kivi=1 V4:kivi=1",
)


# ---- one stream ------------------------------------------------------------------------------------------------------


class Stream:
    """Decodes the rows of one stream as the store would; `unit` rows are packed at a time."""

    def __init__(self, code_format: str, options: dict[str, Any]) -> None:
        self.once, self.pair, self.kivi = (bool(options.pop(name, 0)) for name in ("once", "pair", "kivi"))
        self.code_format, self.options = code_format, options
        self.unit = KIVI_GROUP if self.kivi else max(1, options.get("block", 0))

    def codec(self, head_dim: int) -> ReferenceCodec:
        return ReferenceCodec(head_dim=head_dim, format=self.code_format, **self.options)

    def bits(self, head_dim: int) -> float:
        if self.kivi:
            return int(self.code_format) + 32 / KIVI_GROUP
        if self.code_format == "raw":
            return 16.0
        codec = self.codec(head_dim)
        bits = codec.bits_per_element
        if self.once:
            bits -= 8 * codec.statistics_bytes / codec.block / head_dim
        elif self.pair:
            bits -= 8 / codec.block
        return bits

    def decode(self, rows: Tensor, keys: bool) -> Tensor:
        """Rows float32 [H, n, D], n a multiple of the unit, to what is read back."""
        if self.code_format == "raw":
            return rows
        if self.kivi:
            levels = 2 ** int(self.code_format) - 1
            if keys:
                return kivi(rows.unflatten(1, (-1, KIVI_GROUP)), 2, levels).flatten(1, 2)
            return kivi(rows.unflatten(2, (-1, KIVI_GROUP)), 3, levels).flatten(2, 3)
        codec = self.codec(rows.shape[-1])
        if not codec.block:
            return codec.fake_quantize(rows)
        blocks = rows.unflatten(1, (-1, codec.block))
        shift, scale = codec.block_statistics(blocks)
        if self.once:
            shift, scale = (x[:, :1].expand_as(x) for x in (shift, scale))
        if self.pair:
            half = (scale.square() + scale.roll(scale.shape[-1] // 2, -1).square()) * 0.5
            scale = half.sqrt().to(torch.float16).to(torch.float32)
        statistics = (shift[..., None, :], scale[..., None, :])
        return codec.fake_quantize(blocks, statistics=statistics).flatten(1, 2)


def kivi(groups: Tensor, axis: int, levels: int) -> Tensor:
    """Asymmetric minimum/maximum quantization along `axis` with fp16 minimum and step."""
    low, high = groups.amin(axis, keepdim=True), groups.amax(axis, keepdim=True)
    low, step = low.half().float(), ((high - low) / levels).half().float()
    codes = ((groups - low) / step.clamp(min=1e-8)).round().clamp(0, levels)
    return codes * step + low


@dataclass(frozen=True)
class Plan:
    """A key stream and a value stream."""

    name: str
    keys: Stream
    values: Stream

    @property
    def unit(self) -> int:
        return math.lcm(self.keys.unit, self.values.unit)

    def packed(self, existing: Tensor, window: int) -> Tensor:
        """How many of `existing` rows behind the sinks are packed."""
        evicted = (existing - window).clamp(min=0)
        if self.keys.kivi or self.values.kivi:
            return evicted // self.unit * self.unit  # a group leaves as a whole
        return torch.minimum(evicted, existing.clamp(min=0) // self.unit * self.unit)


def parse_plan(text: str) -> Plan:
    streams = {}
    for part in text.split():
        code_format, _, options = part[1:].partition(":")
        pairs = (option.split("=") for option in options.split(",") if option)
        streams[part[0]] = Stream(code_format, {name: parse_value(value) for name, value in pairs})
    if set(streams) != {"K", "V"}:
        raise ValueError(f"plan {text!r}: expected 'K… V…'")
    return Plan(text, streams["K"], streams["V"])


def parse_value(text: str) -> Any:
    try:
        return json.loads(text.lower())
    except json.JSONDecodeError:
        return text


# ---- the rule of sinks, packed past and window in one pass -----------------------------------------------------------


@dataclass
class Simulation:
    """What the registered attention function does now; `plan` None is full precision."""

    sinks: int
    window: int
    plan: Plan | None = None

    def __call__(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        sliding_window: int | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Query [1, Hq, T, D], key and value [1, Hkv, T, D] to [1, T, Hq, D]."""
        if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
            raise ValueError(f"query {tuple(query.shape)}, key {tuple(key.shape)}: expected one whole sequence")
        heads, length = key.shape[1], key.shape[2]
        q = query[0].float().unflatten(0, (heads, -1)) * scaling
        k, v = key[0].float(), value[0].float()
        plan = self.plan if sliding_window is None else None
        packed_k, packed_v = k, v
        if plan is not None:
            stop = self.sinks + max(0, length - self.sinks) // plan.unit * plan.unit
            if stop > self.sinks:
                packed_k = with_decoded(k, self.sinks, stop, plan.keys, True)
                packed_v = with_decoded(v, self.sinks, stop, plan.values, False)
        output = torch.empty_like(q[..., : v.shape[-1]])
        for start in range(0, length, QUERY_CHUNK):
            end = min(length, start + QUERY_CHUNK)
            now = torch.arange(start, end)[:, None]
            packed_until = torch.full_like(now, self.sinks)
            if plan is not None:
                packed_until += plan.packed(now + 1 - self.sinks, self.window)
            first = 0 if sliding_window is None else max(0, start - sliding_window + 1)
            output[:, :, start:end] = attend_chunk(
                q[:, :, start:end], (k, v), (packed_k, packed_v), now, packed_until, first, sliding_window
            )
        return output.flatten(0, 1).transpose(0, 1)[None].to(query.dtype), None


def with_decoded(rows: Tensor, start: int, stop: int, stream: Stream, keys: bool) -> Tensor:
    return torch.cat([rows[:, :start], stream.decode(rows[:, start:stop], keys), rows[:, stop:]], dim=1)


def attend_chunk(
    q: Tensor,
    exact: tuple[Tensor, Tensor],
    packed: tuple[Tensor, Tensor],
    now: Tensor,
    packed_until: Tensor,
    first: int,
    sliding_window: int | None,
) -> Tensor:
    """Attention of queries [Hkv, group, L, D] at times `now` [L, 1] over tokens [first, now]."""
    end, middle = int(now[-1]) + 1, max(first, int(packed_until[0]))
    token = torch.arange(first, end)
    scores = q @ packed[0][:, None, first:end].transpose(-1, -2)
    is_packed = token[None, middle - first :] < packed_until
    recent = q @ exact[0][:, None, middle:end].transpose(-1, -2)
    scores[..., middle - first :] = torch.where(is_packed, scores[..., middle - first :], recent)
    hidden = token[None] > now
    if sliding_window is not None:
        hidden = hidden | (token[None] <= now - sliding_window)
    weights = scores.masked_fill_(hidden, -math.inf).softmax(-1)
    old, new = weights[..., : middle - first], weights[..., middle - first :]
    output = old @ packed[1][:, None, first:middle] + (new * ~is_packed) @ exact[1][:, None, middle:end]
    if bool(is_packed.any()):
        output += (new * is_packed) @ packed[1][:, None, middle:end]
    return output


# ---- measures --------------------------------------------------------------------------------------------------------


class Reference:
    """Full-precision predictions of one chunk, and the measures of another pass against them."""

    def __init__(self, model: Any, head: Tensor, simulation: Simulation, token_ids: Tensor, score_from: int) -> None:
        self.model, self.head, self.simulation = model, head, simulation
        self.token_ids, self.score_from = token_ids, score_from
        simulation.plan = None
        parts = [F.log_softmax(logits, -1).half() for logits in self._logits()]
        self.log_probabilities = torch.cat(parts)

    def _logits(self) -> Any:
        hidden = self.model.model(self.token_ids[None], use_cache=False).last_hidden_state[0, self.score_from : -1]
        for rows in hidden.float().split(VOCABULARY_ROWS):
            yield rows @ self.head.T

    def measure(self, plan: Plan | None) -> Tensor:
        """KL(full || plan), agreement of the likeliest token, and both losses of every scored token: [4, tokens]."""
        self.simulation.plan = plan
        targets = self.token_ids[self.score_from + 1 :].split(VOCABULARY_ROWS)
        columns = []
        references = self.log_probabilities.split(VOCABULARY_ROWS)
        for logits, reference, target in zip(self._logits(), references, targets, strict=True):
            full, this = F.log_softmax(reference.float(), -1), F.log_softmax(logits, -1)
            divergence = (full.exp() * (full - this)).sum(-1)
            agreement = (full.argmax(-1) == this.argmax(-1)).float()
            losses = (-x.gather(-1, target[:, None])[:, 0] for x in (full, this))
            columns.append(torch.stack([divergence, agreement, *losses]))
        return torch.cat(columns, dim=-1)


def standard_error(per_token: Tensor, run: int = 64) -> float:
    """Of the mean, from means of runs of neighbouring tokens."""
    runs = per_token[: per_token.numel() // run * run].reshape(-1, run).mean(-1)
    return float(runs.std() / math.sqrt(runs.numel()))


def summary(name: str, per_token: Tensor) -> dict[str, Any]:
    divergence, agreement, full_loss, loss = per_token
    rise = (loss - full_loss).mean()
    return {
        "plan": name,
        "kl": round(float(divergence.mean()), 5),
        "kl_error": round(standard_error(divergence), 5),
        "top1": round(100 * float(agreement.mean()), 2),
        "top1_error": round(100 * standard_error(agreement), 2),
        "perplexity_full": round(float(full_loss.mean().exp()), 3),
        "perplexity_rise": round(100 * (float(rise.exp()) - 1), 2),
        "perplexity_rise_error": round(100 * standard_error(loss - full_loss), 2),
        "tokens": per_token.shape[1],
    }


def chunks_of(tokenizer: Any, texts: list[Path], count: int, tokens: int) -> list[Tensor]:
    """`count` chunks, taken in turn from the texts, each from the text's second fifth on."""
    chunks = []
    for index in range(count):
        text = texts[index % len(texts)].read_text(encoding="utf-8", errors="ignore")
        text = text[len(text) // 5 + (index // len(texts)) * 8 * tokens :]
        ids = tokenizer(text[: 8 * tokens], add_special_tokens=False).input_ids
        start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        chunks.append(torch.tensor((start + ids)[:tokens]))
    return chunks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--texts", nargs="+", type=Path, required=True)
    parser.add_argument("--chunks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--score-from", type=int, default=512)
    parser.add_argument("--sinks", type=int, default=5)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--plan", nargs="+", default=list(DEFAULT_PLANS))
    parser.add_argument("--out", type=Path, help="JSON lines, appended")
    arguments = parser.parse_args()

    simulation = Simulation(arguments.sinks, arguments.window)
    AttentionInterface.register("skvq_simulation", simulation)
    AttentionMaskInterface.register("skvq_simulation", lambda *_, **__: None)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=getattr(torch, arguments.dtype), attn_implementation="skvq_simulation"
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    plans = [parse_plan(text) for text in arguments.plan]
    with torch.inference_mode():
        head = model.lm_head.weight.float()
        chunks = chunks_of(tokenizer, arguments.texts, arguments.chunks, arguments.tokens)
        references = [Reference(model, head, simulation, chunk, arguments.score_from) for chunk in chunks]
        for plan in plans:
            start = time.perf_counter()
            row = summary(plan.name, torch.cat([reference.measure(plan) for reference in references], dim=1))
            bits = (plan.keys.bits(head_dim), plan.values.bits(head_dim))
            row |= {"bits": round(sum(bits) / 2, 3), "key_bits": round(bits[0], 3), "value_bits": round(bits[1], 3)}
            row |= {"model": Path(arguments.model).name, "chunk_tokens": arguments.tokens, "chunks": arguments.chunks}
            row["seconds"] = round(time.perf_counter() - start, 1)
            print(json.dumps(row), flush=True)
            if arguments.out is not None:
                with arguments.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()

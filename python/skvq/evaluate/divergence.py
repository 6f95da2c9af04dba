"""How far a method's predictions are from full precision's on one chunk of text: KL divergence, agreement, loss.

Full-precision log-probabilities of a chunk are computed once, held in float16, and every method is measured against
them. Logits are made in float32 from the last hidden states, a few rows at a time.
Shapes: token_ids int64 [T]; per-token measures float32 [n], of the predictions of tokens score_from + 1 … T - 1.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .methods.base import Method
from .simulation import Simulator

VOCABULARY_ROWS = 128  # tokens whose logits are held in float32 at once
RUN = 64  # neighbouring tokens whose mean counts as one sample of the within-chunk error


class OutputHead:
    """The model's last step, from hidden states to float32 logits, made in float32 whatever the model's dtype."""

    def __init__(self, model: Any) -> None:
        head = model.get_output_embeddings()
        if head is None:
            raise ValueError(f"{type(model).__name__} has no output embeddings, expected a causal language model")
        config = model.config.get_text_config(decoder=True)
        self._weight = head.weight.detach().float()
        bias = getattr(head, "bias", None)
        self._bias = None if bias is None else bias.detach().float()
        self._softcap = getattr(config, "final_logit_softcapping", None)
        self._factor = float(getattr(config, "logit_scale", None) or 1.0)
        self._factor /= float(getattr(config, "logits_scaling", None) or 1.0)
        self._check(model)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits float32 [n, vocabulary] of hidden [n, width]."""
        logits = F.linear(hidden.float(), self._weight, self._bias)
        logits = logits if self._factor == 1.0 else logits * self._factor
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap

    def _check(self, model: Any) -> None:
        """A family whose logits are made in another way is refused, not measured wrongly."""
        token_ids = torch.arange(1, 9, device=self._weight.device)[None] % self._weight.shape[0]
        expected = model(token_ids, use_cache=False).logits[0].float()
        found = self(model.base_model(token_ids, use_cache=False).last_hidden_state[0])
        if (found - expected).abs().max() > 0.03 * expected.abs().max() + 1e-3:
            raise ValueError(f"{type(model).__name__}: its logits are not a linear map of its last hidden states")


@dataclass(frozen=True)
class TokenMeasures:
    """Per scored token, float32 [n]."""

    divergence: Tensor  # KL(full || method), nats
    agreement: Tensor  # 1 where the likeliest token is the same
    full_loss: Tensor  # negative log-likelihood of the text's token
    loss: Tensor

    def summary(self) -> dict[str, float]:
        """Means, and errors from runs of neighbouring tokens."""
        rise = self.loss - self.full_loss
        return {
            "kl": float(self.divergence.mean()),
            "kl_block_error": block_error(self.divergence),
            "top1": float(self.agreement.mean()),
            "top1_block_error": block_error(self.agreement),
            "full_loss": float(self.full_loss.mean()),
            "loss": float(self.loss.mean()),
            "rise": float(rise.mean()),
            "rise_block_error": block_error(rise),
            "scored": self.divergence.numel(),
        }


def block_error(per_token: Tensor, run: int = RUN) -> float:
    """Standard error of the mean, from means of runs of neighbouring tokens (neighbours are alike); NaN for one."""
    runs = per_token[: per_token.numel() // run * run].reshape(-1, run).mean(-1)
    return float(runs.std() / math.sqrt(runs.numel())) if runs.numel() > 1 else math.nan


@dataclass(frozen=True)
class _ReferenceRows:
    """Full-precision predictions of n tokens. The float16 log-probabilities are those of a distribution after division
    by their `mass`; its entropy is that of the rounded numbers, so that no divergence is negative.
    """

    log_probabilities: Tensor  # float16 [n, vocabulary]
    mass: Tensor  # float32 [n], as the others
    negative_entropy: Tensor
    likeliest: Tensor  # int64 [n]
    losses: Tensor


class ChunkReference:
    """Full-precision predictions of one chunk."""

    def __init__(
        self, simulator: Simulator, head: OutputHead, token_ids: Tensor, score_from: int, window: int, sinks: int
    ) -> None:
        if token_ids.ndim != 1 or not 0 <= score_from < token_ids.numel() - 1:
            raise ValueError(
                f"token_ids {tuple(token_ids.shape)}, score_from={score_from}: expected [T] and 0 to T - 2"
            )
        self._simulator, self._head, self._token_ids, self._from = simulator, head, token_ids, score_from
        self._regions = {"window": window, "sinks": sinks}
        self._parts = [
            self._part(logits, target) for logits, target in zip(self._logits(None), self._targets(), strict=True)
        ]

    def against(self, simulator: Simulator, head: OutputHead) -> ChunkReference:
        """The same full-precision predictions, to measure another model by: one with quantized weights."""
        other = copy.copy(self)
        other._simulator, other._head = simulator, head
        return other

    @staticmethod
    def _part(logits: Tensor, target: Tensor) -> _ReferenceRows:
        full = F.log_softmax(logits, -1)
        losses = -full.gather(-1, target[:, None])[:, 0]
        half, likeliest = full.half(), full.argmax(-1)
        rounded = half.float()
        weights = rounded.exp()
        mass = weights.sum(-1)
        return _ReferenceRows(half, mass, (weights * rounded).sum(-1) / mass - mass.log(), likeliest, losses)

    def _targets(self) -> tuple[Tensor, ...]:
        return self._token_ids[self._from + 1 :].split(VOCABULARY_ROWS)

    def _logits(self, method: Method | None) -> Iterator[Tensor]:
        attention = self._simulator.method_pass(method, **self._regions)
        hidden = self._simulator.run(self._token_ids, attention)[self._from : -1]
        for rows in hidden.split(VOCABULARY_ROWS):
            yield self._head(rows)

    def measure(self, method: Method) -> TokenMeasures:
        """One forward pass."""
        divergences, agreements, losses = [], [], []
        for logits, rows, target in zip(self._logits(method), self._parts, self._targets(), strict=True):
            total = logits.logsumexp(-1)
            expected = rows.log_probabilities.float().exp_().mul_(logits).sum(-1) / rows.mass
            divergences.append(rows.negative_entropy - expected + total)
            agreements.append((rows.likeliest == logits.argmax(-1)).float())
            losses.append(total - logits.gather(-1, target[:, None])[:, 0])
        full_losses = torch.cat([rows.losses for rows in self._parts])
        return TokenMeasures(torch.cat(divergences), torch.cat(agreements), full_losses, torch.cat(losses))

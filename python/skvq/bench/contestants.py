"""What takes turns in `skvq bench attend --device cuda`, and how right an output is.

Is: attention in float64 and the error against it; every way to attend of peers.py on given rows, compared before it is
timed, or the reason why it is left out. Is not: packed layers (attend_cuda.py), nor the clock (device.py).
Shapes: query [B, Hq, L, D], keys and values [B, Hkv, T, D], output as the query. The first and the last sequence of a
batch are compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .device import Clock, first_line, is_out_of_memory
from .peers import Peer, peers

ERROR = 2e-3  # of the largest output, where torch's own error is no larger than half of it
TIMES_SDPA = 2.0  # what an error is to stay within, of torch's in f16
EXACT_QUERIES = 128  # at a time in float64


# ---- correctness -----------------------------------------------------------------------------------------------------


def exact_output(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention [Hq, L, D] of one sequence's query [Hq, L, D] over rows [Hkv, T, D] in float64."""
    group, found = query.shape[0] // keys.shape[0], []
    for head, (k, v) in enumerate(zip(keys, values, strict=True)):
        rows = query[head * group : (head + 1) * group].double().flatten(0, 1)
        k, v, scale = k.double().T, v.double(), keys.shape[2] ** -0.5
        found += [(some @ k * scale).softmax(-1) @ v for some in rows.split(EXACT_QUERIES)]
    return torch.cat(found).view(query.shape)


def error_of(output: Tensor, exact: dict[int, Tensor]) -> float:
    """The largest difference in some sequences, of the largest output; infinite where a number is missing."""
    largest = max(float(one.abs().max()) for one in exact.values())
    errors = ((output[index].double() - one).abs().max().nan_to_num(math.inf) for index, one in exact.items())
    return max(float(error) for error in errors) / max(largest, 1e-30)


def compared_sequences(batch: int) -> list[int]:
    """The sequences whose outputs are compared: the first and the last one."""
    return sorted({0, batch - 1})


def exact_outputs(query: Tensor, keys: Tensor, values: Tensor) -> dict[int, Tensor]:
    """Of those sequences, from rows of all of them."""
    sequences = compared_sequences(query.shape[0])
    return {index: exact_output(query[index], keys[index], values[index]) for index in sequences}


# ---- contestants -----------------------------------------------------------------------------------------------------


@dataclass
class Contestant:
    """What takes turns: a call that writes or returns its output [B, Hq, L, D].

    Attributes:
        kind: "packed", "f16" or "low-bit".
        error: None: not compared.
        own_rows: whether it is compared with attention to the rows that it holds, decoded; else to those of a packed
            layer, which it was given.
    """

    name: str
    kind: str
    call: Callable[[], object]
    nbytes: int
    packed_bytes: int
    error: float | None
    own_rows: bool
    passed: bool
    graph: bool


@dataclass(frozen=True)
class LeftOut:
    """A contestant that does not run here, and why not."""

    name: str
    reason: str

    @classmethod
    def because(cls, name: str, error: Exception) -> LeftOut:
        """Of whatever a package raises that cannot serve what it is asked."""
        return cls(name, f"{type(error).__name__}: {first_line(error)}")


def others(clock: Clock, query: Tensor, keys: Tensor, values: Tensor) -> tuple[list[Contestant], list[LeftOut]]:
    """Those of peers.py that run on these rows, all of them at once, and the ones that do not."""
    exact = exact_outputs(query, keys, values)
    sdpa = error_of(F.scaled_dot_product_attention(query, keys, values, enable_gqa=True), exact)
    bound = max(ERROR, TIMES_SDPA * sdpa)
    running, left_out = list[Contestant](), list[LeftOut]()
    for peer in peers(query.shape[1] // keys.shape[1]):
        found = _contestant_or_reason(clock, peer, query, (keys, values), exact, bound)
        if isinstance(found, Contestant):
            running.append(found)
        else:
            left_out.append(found)
            clock.device.synchronize()
            clock.device.free_bytes()
    for one in tuple(running):  # some take memory at every call, and had more before the last ones came
        reason = _why_not_now(clock, one)
        if reason is not None:
            running.remove(one)
            left_out.append(reason)
    return running, left_out


def _contestant_or_reason(
    clock: Clock, peer: Peer, query: Tensor, given: tuple[Tensor, Tensor], exact: dict[int, Tensor], bound: float
) -> Contestant | LeftOut:
    """`exact` is attention to the given rows, `bound` the largest error of a right output."""
    try:
        prepared = peer.prepare(query, *given)
        own_rows = prepared.rows is not None
        error = error_of(prepared(), exact if prepared.rows is None else exact_outputs(query, *prepared.rows()))
        call, graph = clock.recorded(prepared.call) if prepared.captures else (prepared.call, False)
    except Exception as why:
        return LeftOut.because(peer.name, why)
    kind = "f16" if peer.bits == 16 else "low-bit"
    # What few bits of others do to random rows is theirs; where it is in the error, that only shows that they worked.
    passed = error <= bound if kind == "f16" or own_rows else math.isfinite(error)
    nbytes = sum(rows.nbytes for rows in given) if prepared.nbytes is None else prepared.nbytes
    size = nbytes if prepared.packed_bytes is None else prepared.packed_bytes
    return Contestant(peer.name, kind, call, nbytes, size, error, own_rows, passed, graph)


def _why_not_now(clock: Clock, contestant: Contestant) -> LeftOut | None:
    """Where a call runs out of memory."""
    try:
        contestant.call()
        clock.device.synchronize()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return LeftOut.because(contestant.name, error)
    return None

"""A decode step of one layer on a GPU, for `skvq bench attend --device cuda`: an append of one token and attention.

Is: its time as one graph that is replayed, what the host spends on putting its launches on the stream, and its kernels.
Is not: a step of a model. A token of a static layer may enter with the launch that attends to it: what an append adds
is then the difference to attention alone, and no kernel's. With statistics of blocks many appends pack nothing, and one
in 256 packs rows of a whole block: the kernels of a step are then the mean over a block, and the replayed steps, few of
which are of that kind, tell no share.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .._native import CudaLayer
from ..config import PAGE_ROWS
from .device import Clock
from .timing import time_in_turns

WARM_STEPS, HOST_STEPS = 3, 32


def measure_step(clock: Clock, layer: CudaLayer, static: bool, query: Tensor, rounds: int) -> dict[str, Any]:
    """An append of one token and attention of its query; the layer grows."""
    output = torch.empty_like(query)
    size = (query.shape[0], layer.num_key_value_heads, 1, query.shape[3])
    keys, values = (torch.randn(size, device=query.device).to(query.dtype) for _ in range(2))
    append = functools.partial(layer.append, keys, values)
    attend = functools.partial(layer.attend, query, output, scale=query.shape[3] ** -0.5)

    def step() -> None:
        append()
        attend()

    for _ in range(WARM_STEPS):
        step()
    # Where a page begins an append asks for memory; what is captured shall be the launches of any other one.
    while not 8 <= layer.packed_tokens % PAGE_ROWS < 64:
        append()
    host: dict[str, Callable[[], object]] = {"host_step_microseconds": step, "host_attend_microseconds": attend}
    found: dict[str, Any] = {name: clock.host(work, HOST_STEPS) * 1e6 for name, work in host.items()}
    if clock.device.is_cuda:
        layer.reserve(layer.length + rounds + 1)  # what is recorded now must find the tables where they are then
    attend_call, _ = clock.recorded(attend)
    with captured_step(clock, layer, step, rounds + 1) as (step_call, found["graph"]):
        times = time_in_turns({"attend": attend_call, "step": step_call}, rounds=rounds, once=clock.once)
    found |= {f"{name}_milliseconds": timing.median * 1e3 for name, timing in times.items()}
    share = 1.0 - times["attend"].median / times["step"].median
    found["append_share"] = share if static else None
    return found | _kernel_shares(clock, step, attend, HOST_STEPS if static else 256)


@contextmanager
def captured_step(
    clock: Clock, layer: CudaLayer, step: Callable[[], None], calls: int
) -> Iterator[tuple[Callable[[], object], str | None]]:
    """A step to be called so often at most, and as which graph: "replayed", of which each replay adds a token; None:
    launched by the host.
    """
    if not clock.device.is_cuda:
        yield step, None
        return
    replays = 0
    layer.reserve(layer.length + calls)
    layer.begin_capture()
    try:
        replay = clock.captured(step)
    finally:
        layer.end_capture()

    def call_once() -> None:
        nonlocal replays
        assert replay is not None
        replay()
        replays += 1

    try:
        if replay is None:
            layer.replayed(0)
        yield (step, None) if replay is None else (call_once, "replayed")
    finally:
        if replay is not None:
            layer.replayed(replays)
        layer.release_capture()


def _kernel_shares(
    clock: Clock, step: Callable[[], object], attend: Callable[[], object], count: int
) -> dict[str, Any]:
    """Microseconds of each kernel of a step, the mean over `count`, and of attention alone; the share of those that
    pack, None where attention's do.
    """
    parts = {"step": clock.kernels(step, count), "attend": clock.kernels(attend, HOST_STEPS)}
    reason = next((one for one in parts.values() if isinstance(one, str)), None)
    if reason is not None:
        return {"kernels": None, "encode_share": None, "no_kernels_because": reason}
    kernels = {name: {k: 1e6 * s for k, s in one.items()} for name, one in parts.items() if isinstance(one, dict)}
    of_step = kernels["step"]
    packing = sum(of_step.get(name, 0.0) for name in ("append_row", "encode", "block_statistics"))
    return {"kernels": kernels, "encode_share": packing / sum(of_step.values()) if packing else None}

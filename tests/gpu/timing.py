"""Time on a device, and torch's own attention to compare with.

Is: a clock of CUDA events and captured graphs, copy bandwidth, free memory, each way to ask torch for decode attention
in f16. Is not: about packed rows.
"""

from __future__ import annotations

import statistics as numbers
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from machine import Machine
from torch import Tensor

GIB = 1 << 30


class Clock:
    """Times work on a machine.

    Attributes:
        repeats: of a measurement, at most; fewer where they would take longer than a second.
    """

    def __init__(self, machine: Machine, repeats: int) -> None:
        self.machine, self.repeats = machine, repeats
        size = 4 * machine.status["devices"][machine.index]["l2_bytes"] if machine.is_cuda else 1024
        self.flush = torch.empty(size, dtype=torch.uint8, device=machine.device)

    def once(self, work: Callable[[], object]) -> float:
        """Seconds of one run after the caches were flushed."""
        self.flush.fill_(1)
        if not self.machine.is_cuda:
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3

    def median(self, work: Callable[[], object], repeats: int | None = None) -> dict[str, float]:
        """Median, least and largest seconds of work that has run before."""
        first = self.once(work)
        count = max(1, min(repeats or self.repeats, int(1.0 / max(first, 1e-9))))
        times = [self.once(work) for _ in range(count)]
        return {"median": numbers.median(times), "least": min(times), "largest": max(times), "repeats": count}

    def recorded(self, work: Callable[[], object]) -> Callable[[], object]:
        """The work as a captured graph, run once before; on the CPU the work itself."""
        work()
        self.machine.synchronize()
        if not self.machine.is_cuda:
            return work
        # Not torch.cuda.graph, which empties caches and collects garbage each time: there are hundreds of these.
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(self.machine.device)
        with torch.cuda.stream(stream):
            graph.capture_begin()
            try:
                work()
            finally:
                graph.capture_end()
        torch.cuda.current_stream(self.machine.device).wait_stream(stream)
        graph.replay()
        self.machine.synchronize()
        return graph.replay


def copy_bandwidth(machine: Machine, clock: Clock) -> float:
    """Bytes read and written a second by torch's copy of a large buffer."""
    size = min(4 * GIB, free_bytes(machine) // 4) if machine.is_cuda else 1 << 20
    source = torch.empty(size, dtype=torch.uint8, device=machine.device).random_(0, 256)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * size / clock.median(lambda: target.copy_(source))["median"]


def free_bytes(machine: Machine) -> int:
    """Of the device; torch's unused blocks are given back first."""
    if not machine.is_cuda:
        return 1 << 40
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(machine.device)[0]


def sdpa_variants(query: Tensor, keys: Tensor, values: Tensor) -> Iterator[tuple[str, Any, Callable[[], Tensor]]]:
    """Name, backend and call of each way to ask torch for grouped decode attention without copies of keys: by
    `enable_gqa`, and with a group's queries as positions of one head, which for a decode step is the same.
    """
    from torch.nn.attention import SDPBackend
    from torch.nn.functional import scaled_dot_product_attention as attention

    batch, heads, _, width = query.shape
    group = heads // keys.shape[1]
    folded = query.view(batch, keys.shape[1], group, width)
    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
        backend = getattr(SDPBackend, name, None)
        if backend is None:
            continue
        short = name.removesuffix("_ATTENTION").lower()
        yield f"{short}, positions", backend, lambda: attention(folded, keys, values)
        if group > 1 and name != "MATH":  # which would copy the keys for every query
            yield f"{short}, enable_gqa", backend, lambda: attention(query, keys, values, enable_gqa=True)


@contextmanager
def only(backend: Any) -> Iterator[None]:
    """torch's attention by one backend."""
    from torch.nn.attention import sdpa_kernel

    with sdpa_kernel(backend):
        yield

"""The GPU of a benchmark: what it is, how fast it copies, how much is free, and a clock of its own. A place that may
be the CPU instead.

Is: CUDA events around replays of captured graphs, with a second-level cache that holds nothing of the contestants, and
the times of single kernels by torch's profiler. Is not: contestants, nor tables. Where tests have put the emulated
driver in place of a GPU (`cuda_store.stand_in`), tensors are the CPU's, times are the host's and nothing is captured.
Times are seconds.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from .. import cuda_store
from .._native import SkvqError, cuda_nvrtc, cuda_status
from ..cuda_runtime import find_nvrtc
from .machine import describe_machine
from .timing import CacheFlush, Timing, host_seconds, time_in_turns

GIB = 1 << 30
_LARGEST_COPY = 4 * GIB
_READS = 4  # of the buffer that takes the second-level cache: half a millisecond
_LONGEST_HOST_RUN = 0.2  # seconds
_KERNEL = re.compile(r"skvq(?:::|\d+)(?P<name>[a-z_]+)")  # demangled, or as `_ZN4skvq6attendI…`


class BenchDevice:
    """A device that runs the CUDA kernels.

    Attributes:
        place: of tensors.
        access: how a native layer reaches it.
        status: of `cuda_status()`, this device's entry.

    Raises:
        SkvqError: CUDA cannot be used here, or the name is not that of a CUDA device.
    """

    def __init__(self, name: str) -> None:
        if not re.fullmatch(r"cuda(:\d+)?", name):
            raise SkvqError(f"device={name!r}: expected 'cuda' or 'cuda:N'")
        status = cuda_status()
        if not status["usable"]:
            raise SkvqError(f"device={name!r}: CUDA cannot be used here: {status['reason']}")
        if cuda_store.stand_in is not None:
            self.place, self.access = torch.device("cpu"), cuda_store.stand_in
        else:
            index = int(name.partition(":")[2] or 0)
            if not torch.cuda.is_available():
                raise SkvqError(f"device={name!r}: this torch ({torch.__version__}) sees no GPU, expected a CUDA build")
            if index >= torch.cuda.device_count():
                raise SkvqError(f"device={name!r}: expected a number below {torch.cuda.device_count()}")
            self.place = torch.device("cuda", index)
            torch.cuda.set_device(self.place)
            torch.zeros(1, device=self.place)  # torch makes its context before the kernels ask for it
            access = cuda_store.access(self.place)
            assert access is not None
            self.access = access
        self.driver = status["driver_version"]
        self.status: dict[str, Any] = status["devices"][self.access.index]

    @property
    def is_cuda(self) -> bool:
        """Whether tensors are on a GPU; otherwise the emulated driver stands in for it."""
        return self.place.type == "cuda"

    def describe(self) -> dict[str, Any]:
        """Card, driver, NVRTC, torch."""
        nvrtc = find_nvrtc()
        found = {"device": str(self.place), "card": self.status, "driver": self.driver, "memory_bytes": None}
        if self.is_cuda:
            found["memory_bytes"] = torch.cuda.get_device_properties(self.place).total_memory
        found |= {"nvrtc": nvrtc, "nvrtc_version": cuda_nvrtc(nvrtc)[0]}
        return found | {"torch": torch.__version__, "torch_cuda": torch.version.cuda}

    def title(self) -> str:
        """Of these the card, driver and torch, in a line."""
        return f"{self.status['name']}, driver for CUDA {'.'.join(map(str, self.driver))}, torch {torch.__version__}"

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.is_cuda:
            torch.cuda.synchronize(self.place)

    def free_bytes(self) -> int | None:
        """Memory that can be had, once torch has given back what it does not use; None without a GPU."""
        if not self.is_cuda:
            return None
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.place)[0]


class Clock:
    """Times work on a device, with cold caches."""

    def __init__(self, device: BenchDevice) -> None:
        self.device = device
        size = 6 * device.status["l2_bytes"] if device.is_cuda else 1 << 12
        self._flushing = torch.zeros(size // 8, dtype=torch.int64, device=device.place)

    def _flush(self) -> None:
        for _ in range(_READS):
            self._flushing.sum()

    @functools.cached_property
    def copy_bandwidth(self) -> float:
        """Bytes read and written a second by torch's copy of a large buffer; measured once."""
        free = self.device.free_bytes()
        size = 1 << 20 if free is None else min(_LARGEST_COPY, free // 4)
        source = torch.empty(size, dtype=torch.uint8, device=self.device.place).random_(0, 256)
        target = torch.empty_like(source)
        target.copy_(source)
        times = sorted(self.once(functools.partial(target.copy_, source)) for _ in range(9))
        return 2 * size / times[len(times) // 2]

    def once(self, work: Callable[[], object]) -> float:
        """Of one run, after a buffer larger than the second-level cache was read, as a model's weights are before a
        layer attends. (Had it been written, the work would pay for bringing that buffer back to memory.)

        The device is busy with that buffer, which it reads several times, while the host enqueues the work, so
        launching is not in the time.
        """
        self._flush()
        if not self.device.is_cuda:
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3

    def host(self, work: Callable[[], object], count: int) -> float:
        """Of the host for one of `count` runs in a row, fewer if they take long, which it puts on the stream without
        waiting for any.
        """
        self.device.synchronize()
        start, done, seconds = time.perf_counter(), 0, 0.0
        while done < count and seconds < _LONGEST_HOST_RUN:
            work()
            done, seconds = done + 1, time.perf_counter() - start
        self.device.synchronize()
        return seconds / done

    def recorded(self, work: Callable[[], object]) -> tuple[Callable[[], object], bool]:
        """The work as a captured graph, and True; the work itself, and False, where there is no GPU or where it
        cannot be captured.

        It has run once before and once after. What is captured must be the same at every replay.
        """
        work()
        replay = self.captured(work)
        if replay is None:
            return work, False
        replay()
        self.device.synchronize()
        return replay, True

    def captured(self, work: Callable[[], object]) -> Callable[[], object] | None:
        """The replay of a graph of the work, which does not run here; None where it cannot be captured."""
        self.device.synchronize()
        if not self.device.is_cuda:
            return None
        # Not torch.cuda.graph, which empties caches and collects garbage each time: there are hundreds of these.
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(self.device.place)
        stream.wait_stream(torch.cuda.current_stream(self.device.place))
        try:
            with torch.cuda.stream(stream):
                graph.capture_begin()
                try:
                    work()
                finally:
                    graph.capture_end()
        except (RuntimeError, SkvqError):  # some call in it waits for the device or allocates without torch
            self.device.synchronize()
            return None
        torch.cuda.current_stream(self.device.place).wait_stream(stream)
        replay: Callable[[], object] = graph.replay
        return replay

    def kernels(self, work: Callable[[], object], count: int) -> dict[str, float] | str:
        """Of each of skvq's kernels in one of `count` runs, by torch's profiler; why not, where it cannot tell."""
        if not self.device.is_cuda:
            return "times of kernels need a GPU"
        from torch.profiler import ProfilerActivity, profile

        work()
        self.device.synchronize()
        try:
            with profile(activities=[ProfilerActivity.CUDA]) as profiled:
                for _ in range(count):
                    self._flush()
                    work()
                self.device.synchronize()
            found = kernel_seconds((event.name, event.device_time_total) for event in profiled.events())
        except RuntimeError as error:
            return f"torch's profiler: {first_line(error)}"
        if not found:
            return "torch's profiler saw no kernels (it needs CUPTI and the right to use it)"
        return {name: seconds / count for name, seconds in found.items()}


class Place:
    """Where a benchmark runs that knows the CPU too, and how calls and steps are timed there."""

    def __init__(self, name: str) -> None:
        """Raises SkvqError if it is neither "cpu" nor a GPU that can be used."""
        self.device, self._clock = torch.device("cpu"), None
        if name != "cpu":
            found = BenchDevice(name)
            self.device, self._clock = found.place, Clock(found)

    @property
    def is_cpu(self) -> bool:
        """Whether it is the CPU; not so where tests have put the emulated driver in place of a GPU."""
        return self._clock is None

    def compare(self, contestants: dict[str, Callable[[], object]], cold: bool) -> dict[str, Timing]:
        """Times in turns; `cold`: nothing of the weights is in the processor's caches, which is always so on a GPU."""
        if self._clock is not None:
            return time_in_turns(contestants, rounds=25, seconds=6.0, once=self._clock.once)
        return time_in_turns(contestants, rounds=7, seconds=6.0, flush=CacheFlush() if cold else None)

    def synchronize(self) -> None:
        """Waits for what was started."""
        if self._clock is not None:
            self._clock.device.synchronize()

    def seconds(self, work: Callable[[], object]) -> float:
        """Of one run that is launched and waited for by the host."""

        def whole() -> None:
            work()
            self.synchronize()

        self.synchronize()
        return host_seconds(whole)

    def describe(self) -> dict[str, Any] | None:
        """Of the GPU."""
        return None if self._clock is None else self._clock.device.describe()

    def title(self) -> str:
        """What a table's reader needs of it, in a line."""
        if self._clock is not None:
            return self._clock.device.title()
        found = describe_machine()
        return f"{found['processor']}, torch {torch.__version__}, threads: {found['torch_threads']}"


def kernel_seconds(events: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Seconds of each of skvq's kernels by its name without template arguments; of (name, microseconds)."""
    found: dict[str, float] = {}
    for name, microseconds in events:
        match = _KERNEL.search(name)
        if match is not None:
            short = match["name"]
            found[short] = found.get(short, 0.0) + microseconds * 1e-6
    return found


def first_line(error: BaseException) -> str:
    """What an error says, in one short line."""
    return (str(error).strip() or type(error).__name__).split("\n")[0][:200]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was missing, be it torch that says so or a store that asked it."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "out of memory" in str(error).lower()

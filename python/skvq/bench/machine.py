"""The machine of a measurement: what it is, how fast it copies memory, how much this process holds. And the JSON
files of reports.

Process memory is read from /proc and so known on Linux only, but for its peak since the beginning; elsewhere it is
None, and reports say so.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any


def set_threads(threads: int | None) -> None:
    """Gives torch and skvq the same number of threads, so that they can be compared; None: as many as torch has now."""
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}, expected at least 1")
    import torch

    from .. import _native

    if threads is not None:
        torch.set_num_threads(threads)
    _native.set_num_threads(torch.get_num_threads())


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def describe_machine() -> dict[str, Any]:
    """What a reader needs to judge a figure: processor, cores, threads, instruction set, versions."""
    import torch

    from .. import _native

    versions: dict[str, str | None] = {}
    for name in ("skvq", "torch", "transformers", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch_threads": torch.get_num_threads(),
        "skvq_threads": _native.num_threads(),
        "isa": _native.available_isas()[0],
        "versions": versions,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def warn_if_busy() -> float | None:
    """The load average of the last minute; warns on stderr if it is above half the cores. None where it is unknown."""
    if not hasattr(os, "getloadavg"):
        return None
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > cores / 2:
        text = f"other work keeps this machine busy (load {load:.1f} on {cores} cores): speeds will mean little"
        print(f"skvq: {text}", file=sys.stderr, flush=True)
    return load


def measure_copy_bandwidth(mebibytes: int = 512, rounds: int = 7) -> float:
    """Bytes per second of a large copy by torch with all its threads; bytes read and bytes written both count. The
    median of `rounds`.
    """
    import torch

    source = torch.ones(mebibytes * 2**20 // 4)
    target = torch.empty_like(source)
    target.copy_(source)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 2 * source.numel() * 4 / statistics.median(times)


def available_bytes() -> int | None:
    """Memory that can be had without swapping (MemAvailable); None where /proc is missing."""
    return _proc_kibibytes("/proc/meminfo", "MemAvailable:")


def resident_bytes() -> int | None:
    """Resident set of this process; None where /proc is missing."""
    return _proc_kibibytes("/proc/self/status", "VmRSS:")


def peak_resident_bytes() -> int | None:
    """Largest resident set of this process since `reset_peak`; None where /proc is missing."""
    return _proc_kibibytes("/proc/self/status", "VmHWM:")


def peak_of_process() -> int:
    """Largest resident set of this process since it began, or since `reset_peak` where that can be done."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # counted in KiB, on macOS in bytes


def release_free_memory() -> None:
    """Collects garbage and gives the allocator's free memory back to the system (glibc), so that resident memory is
    memory in use.
    """
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def reset_peak() -> None:
    """Starts a new peak for `peak_resident_bytes` (does nothing where the kernel has no such switch)."""
    path = Path("/proc/self/clear_refs")
    if path.exists():
        path.write_text("5")


def _proc_kibibytes(path: str, field: str) -> int | None:
    if not Path(path).exists():
        return None
    for line in Path(path).read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return None


def write_json(report: dict[str, Any], path: Path) -> None:
    """Writes a report, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def make_report(benchmark: str, settings: dict[str, Any], rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """The JSON of every benchmark: {"benchmark", "machine", "settings", "rows", …}."""
    return {"benchmark": benchmark, "machine": describe_machine(), "settings": settings, "rows": rows, **more}

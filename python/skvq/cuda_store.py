"""The store of a layer on a GPU: `_native.CudaLayer` with torch's memory and torch's current stream.

Is: how the native store reaches a device. Is not: the store, nor a choice of devices: the first keys of a layer decide.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ._native import CudaLayer, SkvqError
from .cuda_runtime import find_nvrtc

DEVICE_TYPES = ("cpu", "cuda")


@dataclass(frozen=True)
class DeviceAccess:
    """What the native store asks torch for.

    Attributes:
        index: of the device.
        allocate: a uint8 tensor of so many bytes there.
        stream: the number of the stream that torch works on there now.
        host_memory: tensors are the CPU's, which an emulated driver takes for its own.
    """

    index: int
    allocate: Callable[[int], torch.Tensor]
    stream: Callable[[], int]
    host_memory: bool = False


# Set by tests only: CPU tensors then are kept in a CudaLayer under the emulated driver of kernels/emu.
stand_in: DeviceAccess | None = None


def access(device: torch.device) -> DeviceAccess | None:
    """How to reach a device; None for the CPU, whose tensors the native `Layer` reads in place."""
    if device.type == "cpu":
        return stand_in
    index = torch.cuda.current_device() if device.index is None else device.index
    place = torch.device("cuda", index)
    return DeviceAccess(
        index=index,
        allocate=functools.partial(torch.empty, dtype=torch.uint8, device=place),
        stream=lambda: torch.cuda.current_stream(place).cuda_stream,
    )


def new_cuda_layer(device: DeviceAccess, nonfinite: str, **spec: Any) -> CudaLayer:
    """An empty store; kernels that are not on disk are compiled now.

    To refuse a row that is not finite a store would have to wait for the device at every step: here `nonfinite` "raise"
    keeps such rows as "propagate" does, and `cache.stats()` counts them.
    """
    if nonfinite not in ("raise", "propagate"):
        raise SkvqError(f"nonfinite={nonfinite!r}: expected 'raise' or 'propagate'")
    return CudaLayer(
        allocate=device.allocate,
        nvrtc=find_nvrtc(),
        stream=device.stream,
        device=device.index,
        host_memory=device.host_memory,
        nonfinite="propagate",
        **spec,
    )

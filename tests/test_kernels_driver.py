"""The emulated libcuda.so.1: a kernel goes the way of a real one, from a module's function to results in device memory.

Calls are those that a backend makes, through ctypes.
"""

from __future__ import annotations

import ctypes
import math
import re
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from skvq.reference import ReferenceCodec

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels" / "emu"))
import harness

pytestmark = pytest.mark.skipif(harness.compiler() is None, reason="no C++ compiler")

NOT_FOUND, LAUNCH_FAILED, INVALID_IMAGE = 500, 719, 200
LAYOUT = "skvq::Layout<skvq::keys, 64, 2, 64, 1, 1>"
TABLE = f"""
#include "repack.cuh"
#include "registry.hpp"
namespace skvq {{
__global__ void loses_a_lane(const __grid_constant__ RepackParams) {{ if (threadIdx.x) __syncwarp(); }}
__global__ void half_waits(const __grid_constant__ RepackParams) {{ if (threadIdx.x % 2) wait_for_earlier_launches(); }}
}}
INSTANCE(skvq::rows_to_page<{LAYOUT}>)
INSTANCE(skvq::loses_a_lane)
INSTANCE(skvq::half_waits)
"""


@cache
def driver() -> ctypes.CDLL:
    """A driver with a small table of instances."""
    directory = harness._build_directory()
    (directory / "table.hpp").write_text(TABLE)
    units = {"fake_cuda.cpp": '#include "emu/fake_cuda.cpp"\n', "entry.cpp": '#include "emu/entry.cpp"\n'}
    flags = (f"-I{directory}", '-DEMULATED_INSTANCES="table.hpp"')
    return ctypes.CDLL(str(harness.build("libcuda.so.1", units, flags, ("-shared", "-Wl,-soname,libcuda.so.1"))))


def call(name: str, *arguments: object) -> int:
    return int(getattr(driver(), name)(*arguments))


def function(expression: str) -> tuple[int, ctypes.c_void_p]:
    """Status and handle of a kernel by the name that a compiler gives it."""
    driver().skvq_mangled.restype = ctypes.c_char_p
    name = driver().skvq_mangled(expression.encode()) or b"_Z4nonev"
    module, found = ctypes.c_void_p(), ctypes.c_void_p()
    assert call("cuModuleLoadData", ctypes.byref(module), b"\x7fELF") == 0
    return call("cuModuleGetFunction", ctypes.byref(found), module, name), found


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute of cuda.h."""

    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int * 16))


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("count", ctypes.c_uint),
    )


def launch(handle: ctypes.c_void_p, grid: int, block: int, parameters: ctypes.Structure, early: bool = False) -> int:
    """The status of a launch; `early`: it may begin before those in front of it are done."""
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(parameters))
    attribute = LaunchAttribute(6, 0, (ctypes.c_int * 16)(1))
    config = LaunchConfig((grid, 1, 1), (block, 1, 1), 0, None, ctypes.pointer(attribute), int(early))
    return call("cuLaunchKernelEx", ctypes.byref(config), handle, pointers, None)


def test_a_context_is_there() -> None:
    device, context, major = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_int()
    assert call("cuInit", 0) == 0
    assert call("cuDeviceGet", ctypes.byref(device), 0) == 0
    assert call("cuDeviceGet", ctypes.byref(device), 1) != 0
    assert call("cuDeviceGetAttribute", ctypes.byref(major), 75, 0) == 0
    assert major.value == 9
    assert call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0) == 0
    assert call("cuCtxSetCurrent", context) == 0
    assert call("cuCtxGetDevice", ctypes.byref(device)) == 0
    assert device.value == 0


def test_a_kernel_runs_on_memory_of_the_driver(capfd: pytest.CaptureFixture[str]) -> None:
    codec = ReferenceCodec(head_dim=64, format="2")
    page_format = harness.PageFormat.of("keys", codec)
    packed = codec.encode(torch.randn(20, 64, generator=torch.Generator().manual_seed(0)))
    page = ctypes.c_uint64()
    assert call("cuMemAlloc_v2", ctypes.byref(page), ctypes.c_size_t(page_format.page_bytes)) == 0
    codes, numbers = packed[:, : codec.code_bytes].contiguous(), packed[:, codec.code_bytes :].contiguous()
    table = torch.tensor([page.value], dtype=torch.int64)
    parameters = harness.params("RepackParams", code_rows=codes, number_rows=numbers, pages=table, rows=20)
    status, handle = function(f"skvq::rows_to_page<{LAYOUT}>")
    assert status == 0
    assert launch(handle, 2, 128, parameters) == 0
    found = torch.zeros(page_format.page_bytes, dtype=torch.uint8)
    call("cuMemcpyDtoH_v2", ctypes.c_void_p(found.data_ptr()), page, ctypes.c_size_t(found.numel()))
    assert call("cuMemFree_v2", page) == 0
    # A lane has 8 bytes, the first four of its upper row. Row 5, channel 17: octet 2, lane 20, its code 1: bits 12, 13.
    code = int(codec.coder.unpack(codes, 64)[5, 17])
    assert int(found[8 * 20 + 1]) >> 4 & 3 == code
    assert capfd.readouterr().err == ""
    assert math.isfinite(code)


def test_faults_are_cudas_statuses(capfd: pytest.CaptureFixture[str]) -> None:
    assert call("cuModuleLoadData", ctypes.byref(ctypes.c_void_p()), b"text") == INVALID_IMAGE
    assert function("skvq::unknown")[0] == NOT_FOUND
    assert "no instance" in capfd.readouterr().err
    _, handle = function("skvq::loses_a_lane")
    assert launch(handle, 1, 32, harness.params("RepackParams")) == LAUNCH_FAILED
    assert "deadlock" in capfd.readouterr().err


def test_threads_of_an_early_launch_must_wait(capfd: pytest.CaptureFixture[str]) -> None:
    _, handle = function("skvq::half_waits")
    parameters = harness.params("RepackParams")
    assert launch(handle, 1, 32, parameters) == 0
    assert launch(handle, 1, 32, parameters, early=True) == LAUNCH_FAILED
    # every second thread waits; which of the others comes to its end first is up to the schedule
    assert re.search(r"thread \d*[02468]: ends without waiting for earlier launches", capfd.readouterr().err)
    assert launch(handle, 1, 32, parameters) == 0


def test_the_written_table_compiles() -> None:
    """Every instance of instances.hpp is in a driver built from it, under one name each."""
    text = (harness.EMULATOR / "instances.hpp").read_text()
    units = {"fake_cuda.cpp": '#include "emu/fake_cuda.cpp"\n', "entry.cpp": '#include "emu/entry.cpp"\n'}
    library = ctypes.CDLL(str(harness.build("libcuda.so.1", units, ("-O0",), ("-shared",))))
    library.skvq_mangled.restype = ctypes.c_char_p
    lines = [line[len("INSTANCE(") : -1] for line in text.splitlines() if line.startswith("INSTANCE(")]
    names = [library.skvq_mangled(line.encode()) for line in lines]
    assert len(lines) == 25
    assert all(names)
    assert len(set(names)) == len(names)

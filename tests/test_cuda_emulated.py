"""Kernels on the way that they go on a GPU: compiled by a real NVRTC, found by their lowered name, launched with their
parameter struct through the driver's functions; the driver is the emulated one of kernels/emu.

Is: a proof that names, parameters and launches of the Rust side fit the kernels. Is not: about what kernels compute,
beyond a round trip.
"""

import sys
from pathlib import Path

import pytest

from cuda_stand_ins import real_nvrtc, run

KERNELS = Path(__file__).parents[1] / "kernels"
LAYOUTS = {
    "skvq::Layout<skvq::keys, 128, 2, 128, 1, 1>": (32, 1),
    "skvq::Layout<skvq::values, 64, 3, 32, 0, 2>": (24, 8),
}  # bytes of codes and of numbers of a row
ROUND_TRIP = """
    import struct, sys
    import numpy as np
    from skvq import _native

    nvrtc, cache, layout, code_bytes, number_bytes = sys.argv[1:4] + [int(x) for x in sys.argv[4:]]
    rows = 150
    random = np.random.default_rng(0)
    codes = random.integers(0, 256, (rows, code_bytes), dtype=np.uint8)
    numbers = random.integers(0, 256, (rows, number_bytes), dtype=np.uint8)
    pages = np.zeros((2, 1 << 16), dtype=np.uint8)
    table = np.array([page.ctypes.data for page in pages], dtype=np.uint64)

    def launch(kernel, codes, numbers):
        parameters = struct.pack("<QQQii", codes.ctypes.data, numbers.ctypes.data, table.ctypes.data, rows, 0)
        _native.testing.cuda_launch(
            nvrtc, ("repack.cuh", kernel, [layout]), parameters, device=0, grid=(10, 1, 1), block=(128, 1, 1),
            shared_bytes=0, stream=3, cache=cache,
        )

    launch("skvq::rows_to_page", codes, numbers)
    back = np.zeros_like(codes), np.zeros_like(numbers)
    launch("skvq::page_to_rows", *back)
    assert pages.any() and (back[1] == numbers).all()
    assert (back[0] == codes).all(), np.argwhere(back[0] != codes)
    print("equal")
"""


@pytest.fixture(scope="module")
def driver() -> Path:
    """The folder of a libcuda.so.1 that runs kernels in the emulator."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the stand-in of the driver is found through LD_LIBRARY_PATH, which is Linux's")
    sys.path.insert(0, str(KERNELS / "emu"))
    from harness import build, compiler, unit_of

    if compiler() is None:
        pytest.skip("needs a C++ compiler for the emulator")
    instances = [f"skvq::{kernel}<{layout}>" for layout in LAYOUTS for kernel in ("rows_to_page", "page_to_rows")]
    # The driver with these instances instead of its own table, whose attention takes long to compile.
    table = '#define EMULATED_INSTANCES "registry.hpp"\n#include "emu/fake_cuda.cpp"\n'
    units = {"driver.cpp": unit_of(instances, ["repack.cuh"]) + table, "entry.cpp": '#include "emu/entry.cpp"\n'}
    library: Path = build("libcuda.so.1", units, link=("-shared", "-Wl,-soname,libcuda.so.1"))
    return library.parent


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_come_back_from_pages(driver: Path, tmp_path: Path, layout: str) -> None:
    nvrtc = real_nvrtc() or pytest.skip("no NVRTC here")
    code_bytes, number_bytes = LAYOUTS[layout]
    arguments = [nvrtc, str(tmp_path), layout, str(code_bytes), str(number_bytes)]
    printed, seen = run(ROUND_TRIP, driver, arguments, FAKE_CUDA_LOG="1")
    assert printed == "equal\n"
    launches = [line for line in seen.splitlines() if line.startswith("launch")]
    assert len(launches) == 2
    assert launches[0].startswith("launch _ZN4skvq12rows_to_pageINS_6LayoutILi")
    assert launches[0].endswith(" grid 10,1,1 block 128 stream 0x3")
    assert len(list(tmp_path.rglob("*.cubin"))) == 2

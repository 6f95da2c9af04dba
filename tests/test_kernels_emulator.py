"""The emulator itself finds what it is there for, and the kernels run clean under the sanitizers.

A test of each tool has a kernel with the fault that the tool must report.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels" / "emu"))
import harness

pytestmark = pytest.mark.skipif(harness.compiler() is None, reason="no C++ compiler")

FAULTS = r"""
#include "portable.cuh"
#include <cstdio>
#include <vector>
namespace skvq {
struct Params { u64 to; i32 count; };
// Thread 0 adds up what the others write.
__global__ void sums(Params p) {
    __shared__ float values[64];
    const int thread = threadIdx.x;
    values[thread] = thread < p.count ? 1.0f : 0.0f;
#if !defined(NO_BARRIER)
    __syncthreads();
#endif
    float sum = 0.0f;
    for (int i = 0; i < 64; ++i) sum += values[i];
    if (thread == 0) *reinterpret_cast<float*>(p.to) = sum;
    __syncthreads();
    values[thread] = 0.0f;
}
__global__ void barriers_diverge(Params) {
    if (threadIdx.x < 32) __syncthreads();
    else __syncthreads();
}
__global__ void warps_diverge(Params) {
    if (threadIdx.x < 16) __shfl_xor_sync(whole_warp, 1, 1); else __any_sync(whole_warp, 1);
}
__global__ void never_meet(Params) { if (threadIdx.x % 32 < 16) __syncwarp(); }
__global__ void reads_beyond(Params p) { reinterpret_cast<float*>(p.to)[0] = reinterpret_cast<float*>(p.to)[p.count]; }
__global__ void conversions(Params p) {
    u16* to = reinterpret_cast<u16*>(p.to);
    for (int i = threadIdx.x; i < 65536; i += 32) {
        to[i] = half_of_float(float_of_half(i));
        to[65536 + i] = Narrow<BFloat>::from(float_of_half(i)).bits;
    }
}
}
#if defined(PROGRAM)
int main() {
    std::vector<float> memory(40);
    skvq::Params p{reinterpret_cast<skvq::u64>(memory.data()), 40};
    emulator::launch({1, 1, 1}, {64, 1, 1}, 0, [&] { skvq::PROGRAM(p); });
    std::printf("%g\n", memory[0]);
}
#endif
"""
NAMES = ["sums", "barriers_diverge", "warps_diverge", "never_meet", "conversions"]


@cache
def faults() -> harness.Kernels:
    directory = harness._build_directory()
    (directory / "faults.cuh").write_text(FAULTS)
    return harness.Kernels([f"skvq::{name}" for name in NAMES], ["faults.cuh"], (f"-I{directory}", "-DNO_BARRIER"), 1)


def launch(name: str, schedule: str = "forward", count: int = 40, to: torch.Tensor | None = None) -> torch.Tensor:
    class Params(harness.ctypes.Structure):
        _fields_ = (("to", harness.ctypes.c_uint64), ("count", harness.ctypes.c_int32))

    to = torch.zeros(1) if to is None else to
    faults().launch(f"skvq::{name}", (1,), 64, Params(to.data_ptr(), count), schedule=schedule)
    return to


def test_a_missing_barrier_shows_in_some_order() -> None:
    assert {float(launch("sums", schedule)) for schedule in ("forward", "reverse", "random:1")} != {40.0}


@pytest.mark.parametrize(
    ("kernel", "message"),
    [("barriers_diverge", "barrier divergence"), ("warps_diverge", "warp divergence"), ("never_meet", "deadlock")],
)
def test_threads_that_do_not_meet_are_reported(kernel: str, message: str) -> None:
    with pytest.raises(harness.KernelError, match=message):
        launch(kernel)


def test_conversions_round_as_torch_does() -> None:
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)
    found = launch("conversions", to=torch.zeros(2, 65536, dtype=torch.int16))
    numbers = ~halves.isnan()
    assert torch.equal(found[0][numbers], halves.view(torch.int16)[numbers])
    assert torch.equal(found[1][numbers], halves.float().bfloat16().view(torch.int16)[numbers])
    assert found[0].view(torch.float16)[~numbers].isnan().all()
    assert found[1].view(torch.bfloat16)[~numbers].isnan().all()


def run_program(
    units: dict[str, str], sanitizer: str, flags: tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    flags = (f"-fsanitize={sanitizer}", *flags)
    probe = {"probe.cpp": "int main() {}\n"}
    try:
        harness.build("probe", probe, (f"-fsanitize={sanitizer}",), ())
    except RuntimeError as error:
        if f"fsanitize={sanitizer}" in str(error) or "cannot find" in str(error):
            pytest.skip(f"the compiler has no {sanitizer} sanitizer")
        raise
    program = harness.build("program", units, flags, ())
    options = {"ASAN_OPTIONS": "detect_stack_use_after_return=0", "TSAN_OPTIONS": "halt_on_error=1"}
    # Randomized addresses of some kernels leave no room for ThreadSanitizer's shadow.
    command = ["setarch", "-R", str(program)] if sanitizer == "thread" else [str(program)]
    return subprocess.run(
        command, env={**os.environ, **options, **environment}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("sanitizer", "kernel", "message"),
    [("thread", "sums", "data race"), ("address", "reads_beyond", "heap-buffer-overflow")],
)
def test_sanitizers_find_faults(sanitizer: str, kernel: str, message: str) -> None:
    found = run_program({"faults.cpp": FAULTS}, sanitizer, ("-DNO_BARRIER", f"-DPROGRAM={kernel}"))
    assert found.returncode != 0
    assert message in found.stderr


def test_the_thread_sanitizer_accepts_barriers() -> None:
    found = run_program({"faults.cpp": FAULTS}, "thread", ("-DPROGRAM=sums",))
    assert (found.returncode, found.stdout) == (0, "40\n"), found.stderr[:2000]


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_a_caches_life_is_clean(sanitizer: str) -> None:
    flags = ("-DONE_LAYOUT",) if sanitizer == "thread" else ()
    found = run_program(
        {"selftest.cpp": '#include "emu/selftest.cpp"\n'}, sanitizer, flags, EMULATOR_SCHEDULE="random:5"
    )
    assert found.returncode == 0, found.stdout + found.stderr[:4000]

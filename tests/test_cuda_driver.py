"""The CUDA driver: every way in which it cannot be used is an answer that says what to do; launches reach it whole.

The driver is a stand-in (stand_ins/driver.c) that tells what it is asked. What runs in kernels is tested elsewhere.
"""

import json
import shutil
import textwrap
from pathlib import Path
from typing import Any

import pytest

from cuda_stand_ins import build_driver, build_nvrtc, run
from skvq import _native

STATUS = "import json; from skvq import _native; print(json.dumps(_native.cuda_status()))"
INSTALL = "install NVIDIA's driver for CUDA 12.0 or newer"
CALL = """
    import struct, threading
    from skvq import _native
    def launch(kernel="fill", device=0, grid=(3, 2, 1), shared=0, stream=77, parameters=struct.pack("<q", 42)):
        _native.testing.cuda_launch(
            NVRTC, ("portable.cuh", kernel, ["half", "2"]), parameters, device=device, grid=grid, block=(128, 1, 1),
            shared_bytes=shared, stream=stream, cache=CACHE,
        )
    def refused(**options):
        try:
            launch(**options)
        except _native.SkvqError as error:
            print(error)
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_driver(tmp_path_factory.mktemp("driver"))


def status(driver: Path | None = None, **environment: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(STATUS, driver, **environment)[0])
    return found


def calls(tmp_path: Path, driver: Path, code: str, **environment: str) -> tuple[list[str], str]:
    """What the driver was asked, and what the code printed."""
    names = f"NVRTC = {build_nvrtc(tmp_path)!r}; CACHE = {str(tmp_path / 'cache')!r}"
    printed, errors = run("\n".join([names, textwrap.dedent(CALL), code]), driver, **environment)
    return errors.splitlines(), printed


# ---- what a machine has ----------------------------------------------------------------------------------------------


def test_a_machine_without_a_driver_says_so() -> None:
    found = _native.cuda_status()
    if not found["usable"]:
        assert found["reason"].startswith("CUDA cannot be used: ")
        assert found["driver_version"] is None
        assert found["devices"] == []


def test_devices_are_described(driver: Path) -> None:
    found = status(driver)
    assert found["usable"]
    assert found["reason"] is None
    assert found["driver_version"] == [12, 4]
    assert [device["name"] for device in found["devices"]] == ["Fake 0", "Fake 1"]
    assert found["devices"][0] == {
        "name": "Fake 0",
        "arch": "sm_90a",
        "multiprocessors": 132,
        "shared_bytes_per_block": 232448,
        "l2_bytes": 1 << 20,
    }


@pytest.mark.parametrize(
    ("environment", "reason", "advice"),
    [
        ({"FAKE_INIT": "100"}, "cuInit: CUDA_ERROR (100)", "CUDA_VISIBLE_DEVICES must not hide them"),
        ({"FAKE_INIT": "34"}, "cuInit: CUDA_ERROR (34)", "take its folder (…/stubs) out of LD_LIBRARY_PATH"),
        ({"FAKE_INIT": "3"}, "cuInit: CUDA_ERROR (3)", "start processes by spawn"),
        ({"FAKE_INIT": "803"}, "cuInit: CUDA_ERROR (803)", "reboot after an update"),
        ({"FAKE_INIT": "98765"}, "cuInit: CUDA_ERROR (98765): unknown status", INSTALL),
        ({"FAKE_VERSION": "11040"}, "the driver is for CUDA 11.4", INSTALL),
        ({"FAKE_DEVICES": "0"}, "cuDeviceGetCount: CUDA_ERROR (100)", "CUDA_VISIBLE_DEVICES must not hide them"),
    ],
)
def test_a_driver_that_cannot_be_used(driver: Path, environment: dict[str, str], reason: str, advice: str) -> None:
    found = status(driver, **environment)
    assert not found["usable"]
    assert reason in found["reason"]
    assert advice in found["reason"]


def test_missing_functions_are_named_and_no_panic_is_seen(tmp_path: Path) -> None:
    driver = build_driver(tmp_path, "-DWITHOUT_COPY", "-DWITHOUT_SYNCHRONIZE")
    printed, errors = run(STATUS, driver)
    assert "libcuda lacks cuMemcpyAsync, cuStreamSynchronize; " + INSTALL in json.loads(printed)["reason"]
    assert errors == ""


def test_the_toolkits_stub_does_not_stand_in_the_drivers_way(tmp_path: Path, driver: Path) -> None:
    shutil.copy(driver / "libcuda.so.1", tmp_path)
    stub = build_driver(tmp_path / "stub", "-DWITHOUT_COPY")
    shutil.copy(stub / "libcuda.so.1", tmp_path / "libcuda.so")
    assert status(tmp_path)["usable"]


# ---- launches --------------------------------------------------------------------------------------------------------


def test_a_launch_arrives_whole(tmp_path: Path, driver: Path) -> None:
    seen, _ = calls(tmp_path, driver, "launch()")
    assert seen == [
        "retain 0",
        "context 100",
        "load fake",
        "context 0",
        "context 100",
        "launch lowered 3,2,1 128,1,1 shared 0 stream 77 context 100: 42",
        "context 0",
    ]


def test_a_kernel_is_loaded_once_a_device(tmp_path: Path, driver: Path) -> None:
    seen, _ = calls(tmp_path, driver, 'launch(); launch(); launch("other"); launch(device=1); launch(device=1)')
    assert [line for line in seen if line.startswith(("retain", "load"))] == [
        "retain 0",
        "load fake",
        "load fake",
        "retain 1",
        "load fake",
    ]
    assert [line.split()[9] for line in seen if line.startswith("launch")] == ["100:", "100:", "100:", "101:", "101:"]
    assert seen[-1] == "context 0"


def test_shared_memory_is_asked_for_where_it_is_needed(tmp_path: Path, driver: Path) -> None:
    code = "for kib in (48, 64, 50, 100, 227): launch(shared=kib << 10)\nrefused(shared=228 << 10)"
    seen, printed = calls(tmp_path, driver, code)
    assert [line for line in seen if line.startswith("attribute")] == [
        f"attribute 8 {kib << 10}" for kib in (64, 100, 227)
    ]
    assert printed == "a block with 233472 bytes of shared memory is not supported: Fake 0 has 232448\n"


def test_an_empty_grid_is_no_launch(tmp_path: Path, driver: Path) -> None:
    seen, _ = calls(tmp_path, driver, "launch(grid=(0, 1, 1))")
    assert not [line for line in seen if line.startswith("launch")]


def test_threads_share_devices_and_kernels(tmp_path: Path, driver: Path) -> None:
    code = """
threads = [threading.Thread(target=lambda i=i: [launch(device=i % 2) for _ in range(20)]) for i in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""
    seen, _ = calls(tmp_path, driver, code)
    assert sorted(line for line in seen if line.startswith("retain")) == ["retain 0", "retain 1"]
    launches = [line for line in seen if line.startswith("launch")]
    assert len(launches) == 160
    assert sum("context 101" in line for line in launches) == 80


@pytest.mark.parametrize(
    ("code", "environment", "message"),
    [
        ("refused(device=2)", {}, "device: expected an index below 2, found 2"),
        (
            "refused()",
            {"FAKE_CAPABILITY": "75"},
            "Fake 0 (compute capability 7.5) is not supported: the kernels need 8.0 or newer",
        ),
        (
            "refused()",
            {"FAKE_CAPABILITY": "120"},
            "sm_120a is not supported: NVRTC 12.4 (",
        ),
        (
            "refused()",
            {"FAKE_LOAD": "209"},
            "cuModuleLoadData: CUDA_ERROR_NO_BINARY_FOR_GPU (209): no kernel image; kernel fill<half, 2> for sm_90a by "
            "NVRTC 12.4, driver for CUDA 12.4\n",
        ),
        ("refused()", {"FAKE_LAUNCH": "719"}, "cuLaunchKernelEx: CUDA_ERROR (719): unknown status"),
        ("refused()", {"FAKE_INIT": "100"}, "CUDA cannot be used: cuInit: CUDA_ERROR (100)"),
    ],
)
def test_refused_launches(tmp_path: Path, driver: Path, code: str, environment: dict[str, str], message: str) -> None:
    _, printed = calls(tmp_path, driver, code, **environment)
    assert printed.startswith(message)


def test_code_of_a_newer_compiler_than_the_driver(tmp_path: Path, driver: Path) -> None:
    newer = build_nvrtc(tmp_path, 13, 0)
    _, printed = calls(tmp_path, driver, f"NVRTC = {newer!r}\nrefused()", FAKE_LOAD="209")
    assert "by NVRTC 13.0, driver for CUDA 12.4: update the driver, or set SKVQ_NVRTC to a libnvrtc.so.12" in printed


def test_copies_and_fills(tmp_path: Path, driver: Path) -> None:
    code = """
import numpy as np
source, target = np.arange(100, dtype=np.uint8), np.zeros(100, dtype=np.uint8)
_native.testing.cuda_copy(0, target.ctypes.data, source.ctypes.data, 90, 5)
_native.testing.cuda_fill(1, target.ctypes.data + 95, 7, 5, 0)
assert (target[:90] == source[:90]).all() and (target[90:95] == 0).all() and (target[95:] == 7).all()
"""
    seen, _ = calls(tmp_path, driver, code)
    assert seen[-1] == "context 0"

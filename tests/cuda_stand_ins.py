"""Small C libraries that stand for libcuda and libnvrtc, so that every answer of theirs can be had without a GPU.

Is: `build_driver` and `build_nvrtc`, from the sources in stand_ins/, and `run`, which runs Python with them in a
process of its own. Is not: anything that runs a kernel.
"""

import functools
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pytest

SOURCES = Path(__file__).with_name("stand_ins")


def _compile(source: str, target: Path, *flags: str) -> Path:
    if not sys.platform.startswith("linux"):
        pytest.skip("the stand-ins of NVIDIA's libraries are found through LD_LIBRARY_PATH, which is Linux's")
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler for the stand-ins of NVIDIA's libraries")
    target.parent.mkdir(parents=True, exist_ok=True)
    named = f"-Wl,-soname,{target.name}"
    command = [compiler, "-shared", "-fPIC", "-w", named, *flags, str(SOURCES / source), "-o", str(target)]
    subprocess.run(command, check=True)
    return target


def build_driver(folder: Path, *flags: str) -> Path:
    """The folder of a libcuda.so.1, for LD_LIBRARY_PATH."""
    return _compile("driver.c", folder / "libcuda.so.1", *flags).parent


def build_nvrtc(folder: Path, major: int = 12, minor: int = 4, *flags: str) -> str:
    """The path of an NVRTC of that version."""
    return str(_compile("nvrtc.c", folder / f"libnvrtc.so.{major}", f"-DMAJOR={major}", f"-DMINOR={minor}", *flags))


@functools.cache
def real_nvrtc() -> str:
    """The NVRTC of this machine, found by a process that has no stand-in loaded; "" if there is none."""
    code = """
        import torch
        from skvq import SkvqError
        from skvq.cuda_runtime import find_nvrtc
        try:
            print(find_nvrtc())
        except SkvqError:
            pass
    """
    return run(code)[0].strip()


def nvrtc_choices() -> list[str]:
    """For `nvrtc_path`: this machine's, and those whose paths `SKVQ_TEST_NVRTC` lists as PATH lists folders."""
    return ["found", *filter(None, os.environ.get("SKVQ_TEST_NVRTC", "").split(os.pathsep))]


def nvrtc_path(which: str) -> str:
    """Its path; the test is skipped where none is found."""
    return (real_nvrtc() or pytest.skip("no NVRTC here")) if which == "found" else which


def start(
    code: str, driver: Path | None = None, arguments: Sequence[str] = (), **environment: str
) -> "subprocess.Popen[str]":
    """Starts Python code in a process of its own."""
    every = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment
    if driver is not None:
        every["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, (str(driver), os.environ.get("LD_LIBRARY_PATH"))))
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    return subprocess.Popen(command, env=every, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: "subprocess.Popen[str]") -> tuple[str, str]:
    """What it printed and what it wrote to stderr; the test fails if the code did."""
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return printed, errors


def run(code: str, driver: Path | None = None, arguments: Sequence[str] = (), **environment: str) -> tuple[str, str]:
    """`start` and `finish`."""
    return finish(start(code, driver, arguments, **environment))

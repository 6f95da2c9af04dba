"""NVRTC, the CUDA compiler that makes the kernels when they are first needed: where it is on this machine.

Is: the search, best fit first. Is not: opening or using it, which `_native` does by the path found here. PyTorch's CUDA
builds bring NVRTC along, so that where torch runs on a GPU there is one.
"""

from __future__ import annotations

import functools
import glob
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ._native import SkvqError

OVERRIDE = "SKVQ_NVRTC"
OLDEST_MAJOR = 12
_LIBRARY = re.compile(r"libnvrtc(-[0-9a-f]{8})?\.so\.(\d+)(\.\d+)*$")  # with a hash in torch's older wheels
_WHEELS = ("nvidia/*/lib/libnvrtc.so.*", "torch/lib/libnvrtc*.so.*")


@dataclass(frozen=True)
class KernelInstance:
    """A kernel for exact template arguments.

    Attributes:
        file: of `kernels/`, the one that defines it.
        kernel: its name.
        arguments: of the template, as C++ text.
    """

    file: str
    kernel: str
    arguments: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.kernel}<{', '.join(self.arguments)}>" if self.arguments else self.kernel

    @property
    def parts(self) -> tuple[str, str, list[str]]:
        """As `_native` takes it."""
        return self.file, self.kernel, list(self.arguments)


def find_nvrtc() -> str:
    """Path of the NVRTC to use; `SKVQ_NVRTC` overrides the search.

    The one that this process has loaded already (torch's, once it compiled something) comes first, then those of wheels
    beside torch, of the environment, of `CUDA_HOME`, `CUDA_PATH` and /usr/local/cuda, and of the system's library
    cache; among them those of torch's own CUDA version before others, which a driver may be too old for.

    Raises:
        SkvqError: there is none, or `SKVQ_NVRTC` names no file.
    """
    if named := os.environ.get(OVERRIDE):
        if not os.path.isfile(named):
            raise SkvqError(
                f"{OVERRIDE}={named}: no such file, expected the path of libnvrtc.so.{OLDEST_MAJOR} or newer"
            )
        return named
    found = _search()
    if found is None:
        raise SkvqError(
            "no NVRTC found, NVIDIA's run-time compiler (libnvrtc.so): install torch built for CUDA, or "
            "`pip install nvidia-cuda-nvrtc-cu12` (for CUDA 12) or `pip install nvidia-cuda-nvrtc` (for CUDA 13), or "
            f"set {OVERRIDE} to the path of one"
        )
    return found


@functools.cache
def _search() -> str | None:
    places = (_loaded(), _in_wheels(sys.path), _in_folders(_folders()), _in_library_cache())
    return best_fit((path for place in places for path in place), torch_cuda_major())


def best_fit(paths: Iterable[str], major: int | None) -> str | None:
    """The first library of CUDA version `major`, else the first of any version that can be used."""
    usable = [(version, path) for path in paths if (version := major_version(path)) and version >= OLDEST_MAJOR]
    return next((path for version, path in usable if version == major), usable[0][1] if usable else None)


def major_version(path: str) -> int | None:
    """Of the library at a path, by its name; None for other libraries."""
    match = _LIBRARY.search(os.path.basename(path))
    return int(match.group(2)) if match else None


def torch_cuda_major() -> int | None:
    """Of the CUDA that torch was built for; None if it was built without, or is not imported."""
    torch = sys.modules.get("torch")
    version = getattr(getattr(torch, "version", None), "cuda", None)
    return int(version.split(".")[0]) if version else None


def _loaded() -> Iterator[str]:
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            # address, permissions, offset, device, inode, path
            paths = dict.fromkeys(fields[5].rstrip("\n") for line in maps if len(fields := line.split(maxsplit=5)) == 6)
    except OSError:  # not Linux
        return
    yield from filter(major_version, paths)


def _in_wheels(folders: Iterable[str]) -> Iterator[str]:
    for folder in folders:
        for pattern in _WHEELS:
            yield from _newest_first(glob.glob(os.path.join(glob.escape(folder or "."), pattern)))


def _folders() -> Iterator[str]:
    yield os.path.join(sys.prefix, "lib")  # conda
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home:
            yield os.path.join(home, "lib64")
            yield os.path.join(home, "lib")


def _in_folders(folders: Iterable[str]) -> Iterator[str]:
    for folder in folders:
        yield from _newest_first(glob.glob(os.path.join(glob.escape(folder), "libnvrtc.so.*")))


def _in_library_cache() -> Iterator[str]:
    for command in ("ldconfig", "/sbin/ldconfig"):
        try:
            listed = subprocess.run([command, "-p"], capture_output=True, text=True, timeout=10, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            continue
        yield from _newest_first(re.findall(r"=> (/\S*libnvrtc\.so\.\d\S*)", listed))
        return


def _newest_first(paths: Iterable[str]) -> list[str]:
    return sorted((path for path in paths if major_version(path)), key=lambda path: (-(major_version(path) or 0), path))

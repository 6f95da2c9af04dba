"""`skvq bench` on the emulated driver of kernels/emu, which stands in for a GPU.

Is: what test_cuda_bench.py runs in a process of its own. Is not: collected by pytest.
"""

from __future__ import annotations

import sys

import cuda_generate_cases
from cuda_store_cases import STREAM, Memory
from skvq import cli, cuda_store

MEMORY = Memory()


def main(*arguments: str) -> None:
    """The command line, whose device "cuda" is the host."""
    cuda_generate_cases.stay_on_the_cpu()
    cuda_store.stand_in = cuda_store.DeviceAccess(0, MEMORY.allocate, lambda: STREAM, host_memory=True)
    sys.exit(cli.main(["bench", *arguments]))

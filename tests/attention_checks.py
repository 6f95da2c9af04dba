"""What tests of attention kernels in the emulator ask of every call."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch

from kernel_examples import ERROR

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels" / "emu"))
import harness
import pipeline
from pipeline import Call


def check(call: Call, kernels: harness.Kernels) -> torch.Tensor:
    """Runs a call and compares it with float64."""
    rows = pipeline.make_rows(call)
    found, exact = pipeline.run(call, rows, kernels), pipeline.expected(call, rows)
    largest = max(1.0, float(exact.abs().max()))
    error = float((found.double() - exact).abs().max()) / largest
    assert error <= ERROR[call.dtype], f"error {error:.2e}"
    return found


def check_order(call: Call, schedule: str, kernels: harness.Kernels) -> None:
    """The order in which threads run changes no bit."""
    rows = pipeline.make_rows(call)
    first = pipeline.run(call, rows, kernels)
    assert torch.equal(first, pipeline.run(dataclasses.replace(call, schedule=schedule), rows, kernels))

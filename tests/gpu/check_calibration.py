"""Calibration on a GPU against the same on the CPU: statistics of keys and values, and weights block by block; and
torch's product of 4-bit weights, where a GPU runs it.

Is: tiny random models, one of them stored in bfloat16, whose blocks go to the device a window at a time. Is not: timed
on real models, nor how good a plan is. `--device cpu` checks the script itself.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from skvq.calibrate import collect
from skvq.calibrate.statistics import Statistics
from skvq.weights import ChannelOptions, Reconstruction, ReconstructOptions, WeightOptions, reconstruct
from skvq.weights.grid import encode
from skvq.weights.running import MANY_ROWS, Int4Linear, knows_layout
from tiny_models import build, prompts

FAMILIES = ("llama", "gemma3")
SHAPES = ("1024x896x128", "512x96x32", "48x4864x64")  # outputs, inputs, group
MOMENT_ERROR = 1e-3  # of the largest entry: sums in another order
LOSS_ERROR = 0.05  # a code on the edge of two levels may fall either way
SAME_CODES = 0.9


def statistics_of(family: str, device: str) -> Statistics:
    """Of two short chunks, with the model on a device."""
    chunks = list(prompts(2, 300))
    return collect(build(family).to(device), chunks, sinks=2, window=16, block=64, sample_tokens=0)


def moments(found: Statistics) -> dict[str, Tensor]:
    """All sums, by name, on the CPU."""
    tensors = {}
    for index, layer in found.layers.items():
        parts = {"keys": layer.keys, "values": layer.values, "queries": layer.queries, "attention": layer.attention}
        for name, part in (parts | {"keys_turned": layer.keys_turned}).items():
            values = {} if part is None else vars(part)
            tensors |= {
                f"{index}.{name}.{x}": value.cpu().double()
                for x, value in values.items()
                if isinstance(value, Tensor) and x not in ("histogram", "centre", "width")
            }
    return tensors


def check_statistics(family: str, device: str) -> dict[str, Any]:
    """Sums on the device are those on the CPU. Raises AssertionError if not."""
    expected, found = (moments(statistics_of(family, x)) for x in ("cpu", device))
    assert expected.keys() == found.keys()
    worst = 0.0
    for name, exact in expected.items():
        error = float((found[name] - exact).abs().max() / exact.abs().max().clamp(min=1e-9))
        assert error <= MOMENT_ERROR, f"{name}: off by {error:.2e} of the largest"
        worst = max(worst, error)
    return {"sums": len(expected), "largest_error": worst}


def weights_of(family: str, device: str) -> Reconstruction:
    """A model that is stored in bfloat16, with trained clips and a trained cache."""
    options = ReconstructOptions(ahead=1, epochs=2, batch=2, channels=ChannelOptions(bits=4, window=16, sinks=2))
    return reconstruct(build(family).bfloat16(), prompts(4, 48), WeightOptions(4, 32), options, device=device)


def check_weights(family: str, device: str) -> dict[str, Any]:
    """Losses and codes on the device are near those on the CPU. Raises AssertionError if not."""
    expected, found = weights_of(family, "cpu"), weights_of(family, device)
    assert expected.tensors.keys() == found.tensors.keys()
    worst, same, count = 0.0, 0, 0
    for ours, theirs in zip(found.log, expected.log, strict=True):
        error = abs(ours["after"] / theirs["after"] - 1.0)
        assert error <= LOSS_ERROR, f"block {ours['block']}: a loss of {ours['after']}, on the CPU {theirs['after']}"
        worst = max(worst, error)
    for name, exact in expected.tensors.items():
        assert found.tensors[name].device.type == "cpu"
        if name.endswith("weight_packed"):
            halves = [[x >> shift & 15 for shift in range(0, 32, 4)] for x in (exact, found.tensors[name])]
            same += sum(int((a == b).sum()) for a, b in zip(*halves, strict=True))
            count += 8 * exact.numel()
    assert same >= SAME_CODES * count, f"{same} of {count} codes are those of the CPU"
    return {"largest_loss_error": worst, "same_codes": same / count}


def check_product(shape: str, device: str) -> dict[str, Any]:
    """torch's int4 product is that of the unpacked weights, to three times what bfloat16 costs; so is that of many
    rows, for which a GPU unpacks them.
    """
    few, many = (_product_error(*map(int, shape.split("x")), count, device) for count in (7, MANY_ROWS))
    return few | {f"{name}_of_many": value for name, value in many.items()}


def _product_error(outputs: int, inputs: int, group: int, count: int, device: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(outputs)
    weight = encode(torch.randn(outputs, inputs, generator=generator), WeightOptions(4, group))
    rows = torch.randn(count, inputs, generator=generator)
    exact = rows.double() @ weight.dequantize().double().T
    half = (rows.bfloat16() @ weight.dequantize().bfloat16().T).double()
    place = torch.device(device)
    assert place.type == "cpu" or knows_layout(place, inputs), "torch has another layout of 4-bit weights"
    found = Int4Linear(weight, None, place)(rows.to(device)).cpu().double()
    error, allowed = float((found - exact).norm() / exact.norm()), 3.0 * float((half - exact).norm() / exact.norm())
    assert error <= allowed, f"off by {error:.2e}, expected at most {allowed:.2e}"
    return {"error": error, "of_bfloat16": allowed / 3.0}


def main() -> int:
    """Runs all checks. Returns the exit status: 1 if one failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    checks = []
    cases = [(check, family) for check in (check_statistics, check_weights) for family in FAMILIES]
    for check, name in [*cases, *[(check_product, shape) for shape in SHAPES]]:
        start, kind = time.perf_counter(), check.__name__.removeprefix("check_")
        entry: dict[str, Any] = {"kind": kind, "name": name, "passed": True}
        try:
            entry |= check(name, arguments.device)
        except AssertionError as error:
            entry |= {"passed": False, "reason": str(error)[:2000]}
        entry["seconds"] = time.perf_counter() - start
        checks.append(entry)
        print("ok  " if entry["passed"] else "FAIL", entry, flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"device": arguments.device, "checks": checks}, indent=1) + "\n")
    return 0 if all(entry["passed"] for entry in checks) else 1


if __name__ == "__main__":
    sys.exit(main())

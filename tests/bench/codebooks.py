"""What learnt codebooks and clips would gain in the parts of a calibrated plan: a table of errors against the codec's.

    python tests/bench/codebooks.py STATE PLAN      # of `skvq calibrate --state STATE ... -o PLAN`

Rows are the samples in the statistics, behind the plan's matrix and in units of their scale; fitted to one sample, for
every layer, and measured on another. Errors are mean squares relative to the codec's Lloyd-Max levels of a normal
distribution. Columns: what a factor on all levels gives, levels learnt for the layer, and as many codewords learnt for
pairs of channels (up to 3 bits). Needs scipy.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from skvq.calibrate.statistics import Statistics
from skvq.plan import StreamPlan
from skvq.plan_file import QuantizationPlan
from skvq.reference_parts import HeadMap, part_levels

SEARCHED = 64  # first tokens, of which some stay exact
MOST_PAIR_BITS = 3
TRAINED_PAIRS = 40_000


def scaled_parts(plan: StreamPlan, rows: Tensor) -> dict[int, list[Tensor]]:
    """Bits of a part → channels [n, width] of rows [H, T, D] as its levels see them."""
    assert plan.matrix is not None
    assert plan.options.parts is not None
    head = HeadMap(rows.shape[-1], plan.matrix, plan.inverse, plan.shift, plan.shift_sine, plan.frequencies, noise=None)
    coded = sum(width for bits, width in plan.options.parts if bits)
    found: dict[int, list[Tensor]] = defaultdict(list)
    for index, own in enumerate(rows.float()):
        y = head.forward(own, index, 0)[SEARCHED:]
        y = y / y[:, :coded].square().mean(-1, keepdim=True).sqrt()
        first = 0
        for bits, width in plan.options.parts:
            if bits:
                found[bits].append(y[:, first : first + width])
            first += width
    return found


def nearest(z: Tensor, levels: Tensor) -> Tensor:
    """The nearest level of every number."""
    return levels[torch.bucketize(z, (levels[1:] + levels[:-1]) / 2)]


def learnt_levels(z: Tensor, levels: Tensor) -> Tensor:
    """Lloyd's algorithm in one dimension."""
    return torch.from_numpy(kmeans2(z.double().numpy(), levels.double().numpy(), iter=40, minit="matrix")[0]).float()


def errors(train: Tensor, test: Tensor, bits: int) -> dict[str, float]:
    """Sums of squares over `test`, both [n, width]."""
    levels = part_levels(bits)
    factors = torch.linspace(0.8, 1.3, 26)
    tried = torch.stack([(nearest(train / x, levels) * x - train).square().mean() for x in factors])
    best = factors[int(tried.argmin())]
    learnt = learnt_levels(train.flatten()[: 8 * TRAINED_PAIRS], levels).sort().values
    found = {
        "codec": (nearest(test, levels) - test).square().sum(),
        "factor": (nearest(test / best, levels) * best - test).square().sum(),
        "learnt": (nearest(test, learnt) - test).square().sum(),
    }
    if bits <= MOST_PAIR_BITS:
        pairs = train.reshape(-1, 2)
        chosen = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))[:TRAINED_PAIRS]]
        start = torch.cartesian_prod(levels, levels)
        words = torch.from_numpy(kmeans2(chosen.numpy(), start.numpy(), iter=15, minit="matrix")[0])
        found["pairs"] = torch.cdist(test.reshape(-1, 2), words).amin(-1).square().sum()
    return {name: float(value) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("statistics", type=Path)
    parser.add_argument("plan", type=Path)
    arguments = parser.parse_args()
    statistics, plan = Statistics.load(arguments.statistics), QuantizationPlan.load(arguments.plan)
    print(f"{'':<16}{'layers':>8}{'variance':>10}{'kurtosis':>10}{'factor':>9}{'learnt':>9}{'pairs':>9}")
    for stream in ("keys", "values"):
        sums: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for index, layer in statistics.layers.items():
            slots = sorted(layer.samples)
            stream_plan = getattr(plan.layers[index], stream)
            train, test = (scaled_parts(stream_plan, getattr(layer.samples[x], stream)) for x in (slots[0], slots[-1]))
            for bits, rows in train.items():
                z = torch.cat(test[bits])
                own = errors(torch.cat(rows), z, bits)
                own |= {"layers": 1.0, "count": float(z.numel())}
                own |= {"square": float(z.square().sum()), "fourth": float(z.pow(4).sum())}
                for name, value in own.items():
                    sums[bits][name] += value
        for bits, own in sorted(sums.items()):
            variance = own["square"] / own["count"]
            kurtosis = own["fourth"] / own["count"] / variance**2
            line = f"{stream + f', {bits} bits':<16}{int(own['layers']):>8}{variance:>10.3f}{kurtosis:>10.2f}"
            print(line + "".join(f"{own[x] / own['codec']:>9.3f}" for x in ("factor", "learnt", "pairs") if x in own))


if __name__ == "__main__":
    main()

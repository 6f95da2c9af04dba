"""Sums of one prompt (skvq/calibrate/prompt_sums.py) against those of rows that come one after the other, and what is
made of them in threads (side_by_side.py, spectral.py).
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from skvq.calibrate import moments, prompt_sums
from skvq.calibrate.allocate import Parts
from skvq.calibrate.moments import AttentionMoments, StreamMoments
from skvq.calibrate.prompt_sums import PromptMoments, PromptSums, Scoring
from skvq.calibrate.side_by_side import one_core_each, side_by_side
from skvq.calibrate.spectral import Mean, Spectrum
from skvq.calibrate.spectral_plan import KeyMoments, fit_key_moments, key_plan
from skvq.calibrate.transform import damped, factor_and_inverse, power
from skvq.calibrate.turning import TurnedMoments, Turning
from skvq.plan import StreamPlan

HEADS, DIM, VALUE_DIM, WINDOW, SINKS, SCALING = 2, 32, 16, 24, 3, 0.2
CPU = torch.device("cpu")


def turning() -> Turning:
    """Half of the channels in pairs, as transformers' apply_rotary_pos_emb pairs them; the others are not rotated."""
    quarter = DIM // 4
    theta = 1e4 ** -(torch.arange(quarter) / quarter)
    partner = torch.cat([torch.arange(2 * quarter).roll(quarter), torch.arange(2 * quarter, DIM)])
    sign = torch.cat([-torch.ones(quarter), torch.ones(quarter), torch.zeros(2 * quarter)])
    return Turning(torch.cat([theta, theta, torch.zeros(2 * quarter)]), partner, sign)


class Sequence:
    """Keys with a large mean before the rotation, values, queries of the tokens from `first` on, and sinks."""

    def __init__(self, length: int, first: int, group: int, seed: int, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(seed)
        mean = 20.0 * torch.randn(HEADS, 1, DIM, generator=torch.Generator().manual_seed(8))
        cos, sin = (x.float() for x in turning().tables(torch.arange(length)))
        rows = mean + torch.randn(HEADS, length, DIM, generator=generator) * torch.logspace(0, -1, DIM)
        self.keys = (rows * cos + turning().quarter(rows) * sin).to(dtype)
        self.values = (1.0 + torch.randn(HEADS, length, VALUE_DIM, generator=generator)).to(dtype)
        self.queries = (0.3 * torch.randn(group * HEADS, length - first, DIM, generator=generator)).to(dtype)
        self.first = first
        self.sinks = torch.tensor([7, 0, 11])
        is_other = torch.ones(length, dtype=torch.bool)
        is_other[self.sinks] = False
        self.others = is_other.nonzero()[:, 0]
        self.is_sink = ~is_other


def found_of(sequences: list[Sequence], scoring: Scoring, window: int = WINDOW) -> PromptMoments | str:
    sums = PromptSums(len(sequences), window, turning(), scoring)
    for x in sequences:
        sums.add(x.keys, x.values, x.queries, x.first, x.sinks, x.others)
    return sums.read()


def assert_near(found: Tensor | None, wanted: Tensor, tolerance: float) -> None:
    assert found is not None
    error = (found.double() - wanted.double()).abs().max()
    assert error <= tolerance * wanted.double().abs().max(), float(error)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one query group": {"group": 1},
    "softcap": {"softcap": 5.0},
    "sink logits": {"sink_logits": torch.tensor([0.5, 1.0, -1.0, 2.0, 3.0, 0.0])},
    "a window as long as most of the text": {"window": 250},
    "no window": {"window": 0},
    "the last queries alone": {"first": 61},
    "two sequences": {"lengths": (301, 187)},
    "a length of whole chunks": {"lengths": (64 + SINKS,)},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("held", [1, 5, 1 << 20])
def test_sums_are_those_of_moments(case: str, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"group": 3, "window": WINDOW, "first": 0, "lengths": (301,)} | CASES[case]
    group, window, lengths = options["group"], options["window"], options["lengths"]
    monkeypatch.setattr(prompt_sums, "CHUNK", 32)
    monkeypatch.setattr(prompt_sums, "ROWS", 90)
    monkeypatch.setattr(prompt_sums, "QUERIES", 40)
    monkeypatch.setattr(prompt_sums, "PROBABILITIES_ON_CPU", held * group * HEADS * max(lengths))
    scoring = Scoring(SCALING, options.get("softcap"), options.get("sink_logits"))
    sequences = [Sequence(length, options["first"], group, seed) for seed, length in enumerate(lengths)]
    found = found_of(sequences, scoring, window)

    keys = StreamMoments.empty(HEADS, DIM, CPU)
    turned = TurnedMoments.empty(HEADS, turning())
    attention = AttentionMoments.empty(HEADS, DIM, VALUE_DIM, CPU)
    values = []
    for x in sequences:
        kept = x.others[:: max(1, len(x.others) * len(sequences) // 90)]
        keys.update(x.keys[:, kept], 0)
        turned.update(x.keys[:, kept], kept)
        values.append(x.values[:, kept])
        attention.update(
            x.queries * SCALING,
            x.keys,
            x.values,
            is_sink=x.is_sink,
            window=window,
            stride=max(1, x.queries.shape[1] * len(sequences) // 40),
            first=x.first,
            softcap=scoring.softcap,
            sink_logits=scoring.sink_logits,
        )
    assert isinstance(found, PromptMoments)
    assert_near(found.static.mean.shift, keys.mean, 1e-6)
    assert_near(found.static.covariance, keys.covariance, 1e-5)
    assert_near(found.turned.mean.shift, turned.mean, 1e-6)
    assert_near(found.turned.mean.shift_sine, turned.mean_sine, 1e-6)
    assert_near(found.turned.covariance, turned.covariance, 1e-5)
    assert_near(found.turned.mean.frequencies, turned.frequencies, 0.0)
    assert_near(found.value_mean, torch.cat(values, dim=1).double().mean(1), 1e-6)
    assert_near(found.query_weight, attention.query_weight, 1e-5)
    assert_near(found.query_moment, attention.weighted_query_moment, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_of_half_precision_are_what_they_are_in_float32(dtype: torch.dtype) -> None:
    narrow, wide = Sequence(333, 0, 2, 5, dtype), Sequence(333, 0, 2, 5)
    for name in ("keys", "values", "queries"):
        setattr(wide, name, getattr(narrow, name).float())
    found, wanted = (found_of([x], Scoring(SCALING)) for x in (narrow, wide))
    assert isinstance(found, PromptMoments)
    assert isinstance(wanted, PromptMoments)
    for name in ("query_weight", "query_moment", "value_mean"):
        assert_near(getattr(found, name), getattr(wanted, name), 1e-6)
    for mine, theirs in ((found.static, wanted.static), (found.turned, wanted.turned)):
        assert_near(mine.covariance, theirs.covariance, 1e-6)
        assert_near(mine.mean.shift, theirs.mean.shift, 1e-6)


def test_what_says_nothing_is_told() -> None:
    given = Sequence(100, 0, 2, 0)
    assert found_of([given], Scoring(SCALING), window=100) == "no query attends to a token that would be packed"
    for name in ("keys", "values", "queries"):
        bad = Sequence(100, 0, 2, 0)
        getattr(bad, name)[1, 7, 3] = torch.inf  # of a sink, and of a query that is perhaps not looked at
        assert found_of([given, bad], Scoring(SCALING)) == "keys, values or queries are not finite"
    alone = Sequence(100, 0, 2, 0)
    alone.queries = alone.queries[:, :0]
    assert found_of([alone], Scoring(SCALING)) == "no query attends to a token that would be packed"
    assert isinstance(found_of([alone, given], Scoring(SCALING)), PromptMoments)


@pytest.mark.parametrize("options", [{}, {"softcap": 20.0}, {"sink_logits": True}])
def test_nothing_waits_for_a_device_before_the_sums_are_read(options: dict[str, Any]) -> None:
    """Tensors without data stand for a GPU's: what needs to know a number, or mixes devices, is an error."""
    with FakeTensorMode(), torch.no_grad():
        try:
            torch.zeros(1).to("cuda")
        except RuntimeError as error:
            pytest.skip(f"this torch asks a driver even for tensors without memory ({error})"[:120])

        def rows(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="cuda")

        logits = rows(3 * HEADS) if options.get("sink_logits") else None
        scoring = Scoring(SCALING, options.get("softcap"), logits)
        rotation = Turning(*(rows(DIM, dtype=x) for x in (torch.float32, torch.int64, torch.float32)))
        sums = PromptSums(2, WINDOW, rotation, scoring)
        for length in (900, 777):
            order = torch.arange(length, device="cuda")
            given = rows(HEADS, length, DIM), rows(HEADS, length, VALUE_DIM), rows(3 * HEADS, length, DIM)
            sums.add(*given, 0, order[:SINKS], order[SINKS:])
        found = sums._key_sums() | sums._query_sums()
        assert {x.device.type for x in found.values()} == {"cuda"}


def test_probabilities_that_are_held_are_bounded_on_either_device() -> None:
    for device, limit in ((CPU, prompt_sums.PROBABILITIES_ON_CPU), (torch.device("cuda"), moments.PROBABILITIES)):
        assert PromptSums._at_once(limit, device) == 1
        assert PromptSums._at_once(limit // 5, device) == 5
        assert PromptSums._at_once(1, device) == moments.QUERY_ROWS


# ---- threads, and one eigendecomposition for three -------------------------------------------------------------------


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_tasks_run_at_the_same_time_in_threads_of_one_core_each() -> None:
    meeting = threading.Barrier(2, timeout=30.0)

    def task(number: int) -> tuple[int, int, bool]:
        meeting.wait()  # breaks if the other does not run meanwhile
        return number, torch.get_num_threads(), torch.is_grad_enabled()

    for _ in range(2):
        with torch.enable_grad():
            assert side_by_side(task, 4) == [(number, 1, False) for number in range(4)]
        assert torch.get_num_threads() == 2
    with one_core_each() as threads:
        assert (threads, torch.get_num_threads()) == (2, 1)
        assert len(side_by_side(task, 2)) == 2
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_an_error_of_a_task_is_raised_when_all_have_ended() -> None:
    ended = []

    def task(number: int) -> None:
        if number == 1:
            torch.linalg.cholesky(torch.zeros(2, 2))
        ended.append(number)

    with pytest.raises(RuntimeError, match="cholesky"):
        side_by_side(task, 6)
    assert sorted(ended) == [0, 2, 3, 4, 5]
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_an_interruption_of_the_caller_leaves_no_task_behind() -> None:
    caller, began = threading.current_thread(), threading.Event()
    running: list[int] = []

    def task(number: int) -> None:
        if threading.current_thread() is caller:
            assert began.wait(30.0)
            raise KeyboardInterrupt
        running.append(number)
        began.set()
        time.sleep(0.05)
        running.remove(number)

    with pytest.raises(KeyboardInterrupt):
        side_by_side(task, 100)
    assert running == []
    assert torch.get_num_threads() == 2


def test_on_one_core_tasks_come_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert side_by_side(lambda number: threading.current_thread(), 3) == [threading.current_thread()] * 3


def positive(seed: int, heads: int = 3, dim: int = 48, rank: int = 200) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(heads, dim, rank, dtype=torch.float64, generator=generator)
    rows *= torch.logspace(0, -2, dim, dtype=torch.float64)[:, None]
    return rows @ rows.mT / rank


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("rank", [200, 20])  # the second is singular without damping
@pytest.mark.parametrize("damping", [0.0, 1e-2])
def test_a_spectrum_is_that_of_the_square_root(rank: int, damping: float) -> None:
    """λ^¼ Vᵀ S^-½ with the eigenvectors V of S^½ W S^½, up to the signs of rows."""
    covariance, weight = damped(positive(1, rank=rank), damping), damped(positive(2), 1e-2)
    found = Spectrum.of(covariance, weight)
    root, inverse_root = power(covariance, 0.5), power(covariance, -0.5)
    values, vectors = (x.flip(-1) for x in torch.linalg.eigh(root @ weight @ root))
    few = 15  # the others are far below of a singular one
    quarter = values[:, :few].sqrt().sqrt()
    basis = quarter[..., None] * (vectors.mT @ inverse_root)[:, :few]
    assert_near(found.spread[:, :few], values[:, :few].sqrt(), 1e-9)
    signs = (found.basis[:, :few] * basis).sum(-1, keepdim=True).sign()
    assert_near(signs * found.basis[:, :few], basis, 1e-6)
    assert_near(signs.mT * found.inverse[..., :few], (root @ vectors)[..., :few] / quarter[:, None], 1e-6)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("parts", [((5, 16), (2, 16), (1, 16), (0, 16)), ((4, 32), (0, 32)), ((3, 64),)])
def test_a_plan_head_by_head_is_that_of_the_fit(parts: Parts, turns: bool, dtype: torch.dtype) -> None:
    """About the mean that is nearer to all heads together, though not to each; one has no rows."""
    weight, static, turned = (positive(seed, dim=64).to(dtype) for seed in (1, 2, 3))
    weight[2] = static[2] = turned[2] = 0.0
    turned *= 0.5 if turns else 2.0
    turned[0] *= 2.5 if turns else 0.4
    means = Mean(torch.ones(3, 64)), Mean(torch.zeros(3, 64), torch.ones(3, 64), torch.ones(64))
    moments = weight, KeyMoments(static, means[0]), KeyMoments(turned, means[1])
    fit = fit_key_moments(*moments, damping=1e-2)
    assert fit.mean is means[turns]
    assert_near(fit.variance, damped((static, turned)[turns], 1e-2).diagonal(dim1=1, dim2=2), 1e-12)
    assert_near(fit.static_variance, damped(static, 1e-2).diagonal(dim1=1, dim2=2), 1e-12)
    found, wanted = key_plan(*moments, parts, damping=1e-2), fit.plan(parts, noise=True)
    for field in dataclasses.fields(StreamPlan):
        mine, other = getattr(found, field.name), getattr(wanted, field.name)
        if isinstance(other, Tensor):
            assert mine.dtype == torch.float32
            assert_near(mine, other, 1e-6)
        else:
            assert mine == other, field.name


@pytest.mark.parametrize("rank", [200, 20])
def test_factors_have_the_smallest_eigenvalues_of_a_power(rank: int) -> None:
    matrix = positive(3, rank=rank)[0]
    factor, inverse = factor_and_inverse(matrix)
    assert_near(factor @ factor.mT, power(matrix, 1.0), 1e-9)
    assert_near(inverse.mT @ inverse, power(matrix, -1.0), 1e-6)
    assert_near(factor @ inverse, torch.eye(48), 1e-6)

"""How the budget of `skvq calibrate --bits` is shared out (python/skvq/calibrate/choose.py)."""

from __future__ import annotations

import pytest

from skvq.calibrate.choose import STEP, even_splits


@pytest.mark.parametrize("codes", [0.3, 0.5, 1.0, 1.675, 1.75, 2.0, 2.6, 4.9, 5.0])
def test_even_splits_spend_the_budget(codes: float) -> None:
    splits = even_splits(codes)
    assert splits or codes < 2 * STEP
    for keys, values in splits:
        assert 0 < values <= keys <= 5
        assert codes - STEP < (keys + values) / 2 <= codes + 1e-9
    assert len(set(splits)) == len(splits)


def test_even_splits_by_hand() -> None:
    assert even_splits(2.0) == [(2.0, 2.0), (2.25, 1.75), (2.5, 1.5)]
    assert even_splits(1.75) == [(1.75, 1.75), (2.0, 1.5), (2.25, 1.25)]
    assert even_splits(1.675) == [(1.75, 1.5), (2.0, 1.25), (2.25, 1.0)]

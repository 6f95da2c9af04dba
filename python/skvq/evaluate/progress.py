"""The progress bar of long evaluations, on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(total: int, unit: str, *, wanted: bool = True) -> Iterator[Callable[[int, str | None], None]]:
    """Inside, call what it gives with how much more is done and, if that changed, what runs now."""
    from tqdm import tqdm

    with tqdm(total=total, unit=f" {unit}", file=sys.stderr, dynamic_ncols=True, disable=not wanted) as bar:

        def advance(count: int, label: str | None) -> None:
            if label is not None:
                bar.set_description(label, refresh=count == 0)
            bar.update(count)

        yield advance

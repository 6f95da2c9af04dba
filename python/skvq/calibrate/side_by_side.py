"""`side_by_side`: one task for every head, in threads of one core each.

LAPACK decomposes one small matrix after the other, on one core. torch gives way to other threads meanwhile, so heads
can be decomposed at the same time. A thread that torch did not start would have LAPACK use all cores for itself, so
torch's number of threads of an operation is 1 until all tasks are done. It pays for what is done around such tasks too
(`one_core_each`): to wake threads for a matrix of a head takes as long as the work, and those that wait for more of it
take cores from tasks.

Is: threads. They are started when first needed and stay. Is not: what they do.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import lru_cache
from typing import TypeVar

import torch

Result = TypeVar("Result")

# Guards torch's number of threads, and what it was before `one_core_each`, outermost first.
_lock = threading.RLock()
_before: list[int] = []


@contextmanager
def one_core_each() -> Iterator[int]:
    """An operation of torch uses one core meanwhile. Gives the number of those that it used before."""
    with _lock:
        _before.append(torch.get_num_threads())
        torch.set_num_threads(1)
        try:
            yield _before[0]
        finally:
            torch.set_num_threads(_before.pop())


def side_by_side(task: Callable[[int], Result], count: int) -> list[Result]:
    """[task(0), …, task(count - 1)], at the same time on as many cores as torch may use, one of them the caller's.

    Tasks run without gradients, must not write into tensors that they share, and must not call this themselves. The
    first error of one is raised when all have ended.
    """
    left = deque(range(count))
    results: dict[int, Result] = {}
    errors: dict[int, Exception] = {}

    def work() -> None:
        torch.get_num_threads()  # a thread takes the number over when it is asked for, at the latest
        with torch.no_grad():
            while left:
                try:
                    number = left.popleft()
                except IndexError:  # another thread was faster
                    return
                try:
                    results[number] = task(number)
                except Exception as error:
                    errors[number] = error

    with one_core_each() as threads:
        helpers = min(threads, count) - 1
        running = [_pool(os.getpid(), threads).submit(work) for _ in range(helpers)]
        try:
            work()
        finally:
            left.clear()  # of a caller that is interrupted
            wait(running)
    if errors:
        raise errors[min(errors)]
    return [results[number] for number in range(count)]


@lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Of this process: a fork has none of its parent's threads."""
    return ThreadPoolExecutor(threads, thread_name_prefix=f"skvq-{process}")

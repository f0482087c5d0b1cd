"""Work in threads: ahead of who takes the results, in order, and never far ahead."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from threadpoolctl import threadpool_limits

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def in_threads(function: Callable[[T], R], items: Iterable[T], workers: int, ahead: int) -> Iterator[Iterator[R]]:
    """Results of ``function`` in the order of ``items``, worked out by threads, at most ``ahead`` of them in advance.

    On leaving the block, also by an exception, nothing more is begun.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="vilu-decode", initializer=_stay_on_one_core)

    def results() -> Iterator[R]:
        pending: deque[Future[R]] = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    try:
        yield results()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _stay_on_one_core() -> None:
    """Otherwise every decoding thread has a team of threads for its tensors, and they all fight with the model's.

    ``torch.set_num_threads`` would change the whole process, the limit of OpenMP is this thread's own.
    """
    torch.get_num_threads()  # at its first use in a thread torch sets the limit itself
    threadpool_limits(1, user_api="openmp")


def default_workers() -> int:
    """Decoding threads: one per core that this process may use, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 16)

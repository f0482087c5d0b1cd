"""Running cells one after the other, or in several processes; the files are the same."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path

from vilu.benchmark.cells import Cell, sharing_a_fit
from vilu.benchmark.config import Config
from vilu.benchmark.execute import run_group
from vilu.benchmark.stores import Part
from vilu.benchmark.workbench import Workbench
from vilu.progress import track

_bench: dict[str, Workbench] = {}
"""What a worker process has open."""


def run_cells(
    bench: Workbench, folders: Mapping[Part, Path], cells: Sequence[Cell], root: Path, jobs: int, n_done: int
) -> None:
    """Run cells and write their files, showing progress; those that are finished stay when it is interrupted.

    Args:
        bench: For this process.
        folders: For the workers to open.
        cells: What to run.
        root: Folder of the results.
        jobs: Worker processes; with 1 there is none.
        n_done: Cells that were finished before, for the progress.

    Raises:
        Exception: The first fault, with a note that names its cell.
    """
    groups = sharing_a_fit(bench.config, cells)
    started = time.monotonic()
    running = _in_workers(bench.config, folders, groups, root, jobs) if jobs > 1 else _here(bench, groups, root)
    with track("benchmark", n_done + len(cells), "cells") as task, closing(running):
        task.advance(n_done)
        for number, cell in enumerate(running, start=1):
            pace = (time.monotonic() - started) / number
            left = timedelta(seconds=round(pace * (len(cells) - number)))
            task.advance(1, f"{60 / pace:.0f} a minute, {left} left; {cell}")


def _here(bench: Workbench, groups: Sequence[Sequence[Cell]], root: Path) -> Generator[Cell]:
    for cells in groups:
        yield from run_group(bench, cells, root)


def _in_workers(
    config: Config, folders: Mapping[Part, Path], groups: Sequence[Sequence[Cell]], root: Path, jobs: int
) -> Generator[Cell]:
    with _workers(config, folders, jobs) as pool:
        running = [pool.submit(_run_in_worker, cells, root) for cells in groups]
        for future in concurrent.futures.as_completed(running):
            yield from future.result()


@contextmanager
def _workers(
    config: Config, folders: Mapping[Part, Path], jobs: int
) -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    """A pool whose processes are ended at once where the block is left by an exception."""
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of torch's threads
    pool = concurrent.futures.ProcessPoolExecutor(jobs, context, _start_worker, (config, dict(folders)))
    through = False
    try:
        yield pool
        through = True
    finally:
        pool.shutdown(wait=through, cancel_futures=True)
        for worker in () if through else set(multiprocessing.active_children()) - others:
            worker.terminate()
            worker.join()


def _start_worker(config: Config, folders: Mapping[Part, Path]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    threading.Thread(target=_follow_parent, daemon=True).start()
    _bench["mine"] = Workbench(config, folders)


def _follow_parent() -> None:
    """End with the parent, however it ends."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run_in_worker(cells: Sequence[Cell], root: Path) -> list[Cell]:
    return list(run_group(_bench["mine"], cells, root))

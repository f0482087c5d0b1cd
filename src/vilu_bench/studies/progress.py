"""Shows the work of a study's processes, also while no cell finishes for a long time."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Final, NamedTuple

from vilu.progress import Task
from vilu_bench.studies.cells import Cell

SECONDS_BETWEEN_NEWS: Final = 10.0
"""Shortest time between two pieces of news on the same cell."""


class Work(NamedTuple):
    """The work of a process: a running cell, and its progress."""

    cell: Cell
    progress: str = ""  # such as "train 1,200/5,000 steps", empty at the beginning

    def __str__(self) -> str:
        if not self.progress:
            return str(self.cell)
        return f"{self.cell}: {self.progress}"


Send = Callable[[Work], None]
"""Function that takes news on a process's work."""


class CellReporter:
    """Reporter for a running cell. The cell's progress is sent on.

    Args:
        cell: The running cell. Its beginning is sent at once.
        send: Gets the news.
    """

    def __init__(self, cell: Cell, send: Send) -> None:
        self._cell = cell
        self._send = send
        self._last_time = time.monotonic()
        send(Work(cell))

    def start(self, description: str, total: float | None, unit: str) -> Task:
        """Start a task in the cell, such as the training."""
        return _TaskOfCell(self, description, total, unit)

    def finish(self, task: Task) -> None:
        """Send nothing: the end of a task is no news."""

    def send_if_due(self, progress: str) -> None:
        """Send the cell's progress, at most once in ``SECONDS_BETWEEN_NEWS``."""
        now = time.monotonic()
        if now - self._last_time < SECONDS_BETWEEN_NEWS:
            return
        self._last_time = now
        self._send(Work(self._cell, progress))


class _TaskOfCell:
    """A task in a cell. It counts the steps, and sends the count on."""

    def __init__(
        self, reporter: CellReporter, description: str, total: float | None, unit: str
    ) -> None:
        self._reporter = reporter
        self._description = description
        self._unit = unit
        self._total_text = ""
        if total is not None:
            self._total_text = f"/{total:,.0f}"
        self._n_done = 0.0

    def advance(self, steps: float, note: str = "") -> None:  # noqa: ARG002
        """Count the steps. The note is not shown."""
        self._n_done += steps
        count = f"{self._n_done:,.0f}{self._total_text} {self._unit}"
        self._reporter.send_if_due(f"{self._description} {count}")


class StudyProgress:
    """A study's progress: finished cells, the time left, and every process's work.

    Args:
        task: Shows the progress.
        n_cells: Number of cells to run.
    """

    def __init__(self, task: Task, n_cells: int) -> None:
        self._task = task
        self._n_cells = n_cells
        self._n_finished = 0
        self._start_time = time.monotonic()
        self._running: dict[int, Work] = {}  # by process number

    def update(self, process_id: int, work: Work) -> None:
        """Store a process's work."""
        self._running[process_id] = work

    def finish(self, cell: Cell) -> None:
        """Count and show a finished cell."""
        self._n_finished += 1
        for process_id, work in list(self._running.items()):
            if work.cell == cell:
                del self._running[process_id]
        self._task.advance(1, self._note())

    def show(self) -> None:
        """Show the work of all processes."""
        self._task.advance(0, self._note())

    def _note(self) -> str:
        parts = []
        if self._n_finished:
            seconds = time.monotonic() - self._start_time
            seconds_left = seconds / self._n_finished * (self._n_cells - self._n_finished)
            time_left = timedelta(seconds=round(seconds_left))
            parts.append(f"{time_left} left")
        if self._running:
            running = "; ".join(map(str, self._running.values()))
            parts.append(f"running: {running}")
        return "; ".join(parts)

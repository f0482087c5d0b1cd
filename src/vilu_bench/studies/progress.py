"""Shows the work of a study's processes, also while no cell finishes for a long time."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Final

from vilu.progress import Task
from vilu_bench.studies.cells import Cell

REPORT_SECONDS: Final = 10.0
"""Shortest time between two reports on the same cell."""

WAITS: Final = ""
"""The report by a process without work."""

Report = Callable[[str], None]
"""Function with a single argument: a process's work, such as "vilu on cifar10, all, seed 0"."""


class CellReporter:
    """Reporter for a running cell. The cell's progress is passed on as text.

    Args:
        cell: The running cell. The beginning is reported at once.
        report: Gets the texts.
    """

    def __init__(self, cell: Cell, report: Report) -> None:
        self._cell = cell
        self._report = report
        self._report_time = time.monotonic()
        report(str(cell))

    def start(self, description: str, total: float | None, unit: str) -> Task:
        """Start a task in the cell, such as the training."""
        return _TaskOfCell(self, description, total, unit)

    def finish(self, task: Task) -> None:
        """Report nothing."""

    def report_if_due(self, progress: str) -> None:
        """Report the cell's progress, unless the last report is less than ten seconds old."""
        now = time.monotonic()
        if now - self._report_time < REPORT_SECONDS:
            return
        self._report_time = now
        self._report(f"{self._cell}: {progress}")


class _TaskOfCell:
    """A task in a cell. It counts the steps, and reports the count."""

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
        self._reporter.report_if_due(f"{self._description} {count}")


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
        self._pace = "no cell is finished"
        self._running: dict[int, str] = {}  # work, by process number

    def finish(self, cell: Cell) -> None:
        """Count a finished cell."""
        self._n_finished += 1
        seconds_per_cell = (time.monotonic() - self._start_time) / self._n_finished
        seconds_left = seconds_per_cell * (self._n_cells - self._n_finished)
        time_left = timedelta(seconds=round(seconds_left))
        self._pace = f"{60 / seconds_per_cell:.0f} a minute, {time_left} left"
        self._task.advance(1, f"{self._pace}; {cell}")

    def report(self, process_id: int, text: str) -> None:
        """Store a process's work. A process without work is not shown."""
        self._running.pop(process_id, None)
        if text != WAITS:
            self._running[process_id] = text

    def show(self) -> None:
        """Show the work of all processes."""
        running = "; ".join(self._running.values())
        self._task.advance(0, f"{self._pace}; running: {running}")

"""Progress reports for long work, independent of the display.

By default nothing is shown. The command line installs a reporter with a progress bar.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol


class Task(Protocol):
    """A piece of work in progress."""

    def advance(self, steps: float, note: str = "") -> None:
        """Report that ``steps`` more steps are done. ``note`` replaces the previous note."""


class Reporter(Protocol):
    """An object that shows the progress of tasks."""

    def start(self, description: str, total: float | None, unit: str) -> Task:
        """Start a task with ``total`` steps. None stands for an unknown number of steps."""

    def finish(self, task: Task) -> None:
        """Finish a task, also after an exception."""


class SilentProgress:
    """A reporter without any display. ``start`` returns the reporter itself as the task."""

    def start(self, description: str, total: float | None, unit: str) -> Task:  # noqa: ARG002
        """Show nothing."""
        return self

    def advance(self, steps: float, note: str = "") -> None:
        """Show nothing."""

    def finish(self, task: Task) -> None:
        """Show nothing."""


_reporter: ContextVar[Reporter | None] = ContextVar("reporter", default=None)


@contextmanager
def reporting(reporter: Reporter) -> Iterator[None]:
    """Show the tasks that start in the block with this reporter."""
    token = _reporter.set(reporter)
    try:
        yield
    finally:
        _reporter.reset(token)


@contextmanager
def track(description: str, total: float | None, unit: str) -> Iterator[Task]:
    """Start a task at the block's beginning, and finish the task at the block's end."""
    reporter = _reporter.get() or SilentProgress()
    task = reporter.start(description, total, unit)
    try:
        yield task
    finally:
        reporter.finish(task)

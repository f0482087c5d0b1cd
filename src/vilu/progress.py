"""Progress of long work, without the worker knowing who watches.

Silent by default; the command line installs a reporter that draws a bar with a rate.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol


class Task(Protocol):
    """One piece of work under way."""

    def advance(self, steps: float, note: str = "") -> None:
        """Some steps more are done; ``note`` replaces the last one."""


class Reporter(Protocol):
    """Somebody who shows tasks."""

    def start(self, description: str, total: float | None, unit: str) -> Task:
        """A task begins, of ``total`` steps (None when not known)."""

    def finish(self, task: Task) -> None:
        """A task ended, well or not."""


class Silence:
    """Shows nothing."""

    def start(self, description: str, total: float | None, unit: str) -> Task:  # noqa: ARG002
        """Nothing to show."""
        return self

    def advance(self, steps: float, note: str = "") -> None:
        """Nothing to show."""

    def finish(self, task: Task) -> None:
        """Nothing to show."""


_reporter: ContextVar[Reporter | None] = ContextVar("reporter", default=None)


@contextmanager
def reporting(reporter: Reporter) -> Iterator[None]:
    """Show tasks started in this context through ``reporter``."""
    token = _reporter.set(reporter)
    try:
        yield
    finally:
        _reporter.reset(token)


@contextmanager
def track(description: str, total: float | None, unit: str) -> Iterator[Task]:
    """A task for the length of a ``with`` block."""
    reporter = _reporter.get() or Silence()
    task = reporter.start(description, total, unit)
    try:
        yield task
    finally:
        reporter.finish(task)

"""``--plugin benchmarks.returning``: a process returns freed memory on SIGUSR1."""

from __future__ import annotations

import signal

from vilu.process import return_freed_memory


def _return(_signal: int, _frame: object) -> None:
    return_freed_memory()


signal.signal(signal.SIGUSR1, _return)

"""Ctrl-C for the processes that this process starts."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

import psutil


@contextlib.contextmanager
def interrupted_children() -> Iterator[set[int]]:
    """Send SIGINT to every child process every few milliseconds, from its first moment.

    Yields the ids of the processes that got a signal. Only processes of multiprocessing count.
    """
    is_done = threading.Event()
    interrupted = set()

    def interrupt() -> None:
        while not is_done.wait(0.005):
            for child in psutil.Process().children():
                with contextlib.suppress(psutil.Error):
                    if "spawn_main" in " ".join(child.cmdline()):
                        child.send_signal(signal.SIGINT)
                        interrupted.add(child.pid)

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    try:
        yield interrupted
    finally:
        is_done.set()
        interrupter.join()

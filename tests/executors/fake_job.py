"""A job without images that workers can import. It writes a file per part and has accidents on
request.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

from vilu.artifacts.disk import atomic_write
from vilu.errors import DataError
from vilu.store.manifest import Receipt

ATTEMPTS = 3


def receipt(part: int) -> Receipt:
    return Receipt(
        fingerprint="f",
        part=part,
        start=part,
        stop=part + 1,
        n_in=1,
        n_ok=1,
        n_error=0,
        errors={},
        files={},
        batch_size=1,
    )


@dataclass(frozen=True)
class FileJob:
    """A job that writes ``PART.txt`` and appends a line to ``PART.log`` for every call.

    Attributes:
        root: Folder for the files.
        kill: Parts that kill their process, with the number of attempts in which they do so.
        fail: Parts that raise.
        slow: Seconds per part.
        broken: Whether the job cannot be unpickled.
    """

    root: Path
    kill: dict[int, int] = field(default_factory=dict)
    fail: dict[int, object] = field(default_factory=dict)
    slow: float = 0.0
    broken: bool = False
    workers: int | None = None

    def process(self, part: int) -> Receipt:
        with (self.root / f"{part}.log").open("a") as log:
            print(os.getpid(), torch.get_num_threads(), self.workers, file=log)
        if len(calls(self.root, part)) <= self.kill.get(part, 0):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.slow)
        if part in self.fail:
            error = self.fail[part]
            raise Stubborn(1, 2) if error == "stubborn" else error
        with atomic_write(self.root / f"{part}.txt") as handle:
            handle.write(f"part {part}".encode())
        return receipt(part)

    def __reduce__(self) -> tuple[object, ...]:
        if self.broken:
            return refuse, ()
        return FileJob, tuple(getattr(self, field.name) for field in fields(self))


class Stubborn(Exception):
    """An error that cannot be pickled, because it takes other arguments than it passes on."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"needs two: {one}, {two}")


def refuse() -> None:
    raise DataError("this job cannot travel")


@dataclass(frozen=True)
class EmptyJob:
    """A job that does nothing, for runs with 10,000 parts."""

    workers: int | None = None

    def process(self, part: int) -> Receipt:
        return receipt(part)


def calls(root: Path, part: int) -> list[str]:
    path = root / f"{part}.log"
    return path.read_text().splitlines() if path.exists() else []

"""Break something in a process at a numbered step in its work.

A step is a call on a file or folder below the watched roots (Python's audit events: open, rename,
remove, mkdir, list, ...), a write to a temporary file, an fsync, or a step in a progress bar.
Imports open files outside these roots, so imports are no steps.
"""

# pathlib calls the functions that are watched here, and the faults take permissions away.
# ruff: noqa: PTH101, PTH109, PTH113, PTH118, S103

from __future__ import annotations

import builtins
import ctypes
import errno
import hashlib
import io
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from vilu.cli import console

SIGNALS = {"sigkill": signal.SIGKILL, "sigterm": signal.SIGTERM, "sigint": signal.SIGINT}
FAULTS = (*SIGNALS, "nospace", "readonly", "denied", "ioerror", "clock")
EVENTS = {
    "open",
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.listdir",
    "os.scandir",
    "shutil.rmtree",
}
MS_RDONLY, MS_REMOUNT, MS_BIND = 1, 32, 4096
FILLER = ".filler"
"""The file that fills a small disk."""


class Saboteur:
    """Count this process's steps, and break something before one step.

    Args:
        work: Folder that the process writes to.
        inputs: Folder that the process reads.
        fault: One of ``FAULTS``, or None for no fault.
        at: Number of the step, or None for never.
        seed: Seed for everything else.
        record: Whether to keep the hash for every file that is renamed into place.
    """

    def __init__(
        self,
        work: Path,
        inputs: Path,
        fault: str | None,
        at: int | None,
        seed: int,
        *,
        record: bool = False,
    ) -> None:
        self.roots = tuple(f"{root}{os.sep}" for root in (work, inputs))
        self.work, self.fault, self.at, self.record = work, fault, at, record
        self.random = random.Random(seed)
        self.n, self.struck, self.broken, self.busy = 0, "", False, False
        self.versions: set[tuple[str, str]] = set()

    def install(self) -> None:
        """Begin to count, which cannot be undone."""
        self.open, self.fsync, advance = io.open, os.fsync, console.LoggedTask.advance
        saboteur = self

        def counted(task: console.LoggedTask, steps: float, note: str = "") -> None:
            saboteur.step("progress")
            advance(task, steps, note)

        builtins.open = io.open = self._open  # type: ignore[assignment]
        os.fsync = self._fsync  # type: ignore[assignment]
        console.LoggedTask.advance = counted  # type: ignore[method-assign]
        if self.fault == "denied":
            obey_rights()
        sys.addaudithook(self._audit)

    def step(self, what: str) -> None:
        """Count a step, and let the fault strike before it."""
        if self.busy:
            return
        self.n += 1
        if self.n == self.at and self.fault is not None:
            self.busy, self.struck = True, what
            try:
                self._strike(self.fault)
            finally:
                self.busy = False

    def _strike(self, fault: str) -> None:
        if fault in SIGNALS:
            os.kill(os.getpid(), SIGNALS[fault])
        elif fault == "nospace":
            fill(self.work, leave=4096 * self.random.choice((0, 0, 1, 4)))
        elif fault == "readonly":
            # If a file is open for writing, the mount is refused. Then the next step is tried.
            if not mount_flags(self.work, MS_REMOUNT | MS_BIND | MS_RDONLY):
                self.at = self.n + 1
        elif fault == "denied":
            for folder, _, _ in os.walk(self.work, topdown=False):
                os.chmod(folder, 0o555)
        elif fault == "ioerror":
            self.broken = True
        elif fault == "clock":
            self._turn_back(self.random.choice((5.0, 3600.0, 40 * 86400.0, 30 * 365 * 86400.0)))

    @staticmethod
    def _turn_back(seconds: float) -> None:
        now, now_ns = time.time, time.time_ns
        time.time = lambda: now() - seconds
        time.time_ns = lambda: now_ns() - int(seconds * 1e9)

    def _is_ours(self, path: object) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        return os.path.join(os.getcwd(), os.fsdecode(path)).startswith(self.roots)

    def _fail(self, path: object) -> None:
        if self.broken and not self.busy:
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    def _audit(self, event: str, arguments: tuple[object, ...]) -> None:
        if event not in EVENTS or self.busy or not self._is_ours(arguments[0]):
            return
        self.step(event)
        self._fail(arguments[0])
        if self.record and event == "os.rename":
            self.busy = True
            try:
                source, target = (
                    os.path.join(os.getcwd(), os.fsdecode(str(path))) for path in arguments[:2]
                )
                if os.path.isfile(source):
                    content = hashlib.sha256(Path(source).read_bytes()).hexdigest()
                    self.versions.add((os.path.relpath(target, self.work), content))
            finally:
                self.busy = False

    def _fsync(self, descriptor: int) -> None:
        self.step("fsync")
        self._fail(None)
        self.fsync(descriptor)

    def _open(self, file, mode="r", buffering=-1, *more, **settings):
        if "b" in mode and set(mode) & set("wxa") and "+" not in mode and self._is_ours(file):
            raw = _Raw(self, file, mode.replace("b", ""))
            return raw if buffering == 0 else io.BufferedWriter(raw)
        return self.open(file, mode, buffering, *more, **settings)


class _Raw(io.FileIO):
    """A file whose writes are steps. A broken file takes half the content."""

    def __init__(self, saboteur: Saboteur, file, mode: str) -> None:
        super().__init__(file, mode)
        self.saboteur = saboteur

    def write(self, content) -> int:
        self.saboteur.step("write")
        if self.saboteur.broken:
            super().write(memoryview(content).cast("B")[: len(content) // 2])
            self.saboteur._fail(self.name)
        return super().write(content)


def fill(folder: Path, leave: int) -> None:
    """Fill the folder's disk and leave some bytes."""
    with io.FileIO(folder / FILLER, "w") as handle:
        free = shutil.disk_usage(folder).free
        os.posix_fallocate(handle.fileno(), 0, max(free - leave, 1))


def mount_flags(folder: Path, flags: int) -> bool:
    """Remount a folder with these flags, and return whether that succeeded."""
    libc = ctypes.CDLL(None, use_errno=True)
    return libc.mount(None, os.fsencode(folder), None, ctypes.c_ulong(flags), None) == 0


CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_SETPCAP_VERSION = 1, 2, 0x20080522


def obey_rights() -> None:
    """Give up root's right to ignore file permissions.

    If the user is not root, do nothing.
    """
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = (ctypes.c_uint32 * 2)(CAP_SETPCAP_VERSION, 0), (ctypes.c_uint32 * 6)()
    if libc.capget(header, data):
        raise OSError(ctypes.get_errno(), "cannot read the capabilities of this process")
    data[0] &= ~(1 << CAP_DAC_OVERRIDE | 1 << CAP_DAC_READ_SEARCH)
    if libc.capset(header, data):
        raise OSError(ctypes.get_errno(), "cannot give up capabilities")

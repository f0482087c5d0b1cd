"""Limits for a reader on any input: it must not run a program, use the network, write or read
elsewhere, or take much time or memory.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SECONDS = 30.0
"""Seconds for one input, which is a hundred times what the slowest input takes."""
MAX_GROWTH = 512 * 2**20
"""The number of bytes that the process may grow by on one input."""
FORBIDDEN = {
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "subprocess.Popen",
    "socket.connect",
    "socket.getaddrinfo",
}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.chown",
    "shutil.rmtree",
}
ROOT = Path(__file__).resolve().parents[2]
READABLE = tuple(
    {
        str(ROOT / "src"),
        str(ROOT / "tests"),
        "/proc",
        "/sys",
        "/usr",
        "/dev/null",
        "/dev/urandom",
        sys.prefix,
        sys.base_prefix,
    }
    | set(sysconfig.get_paths().values())
    | {os.path.realpath(path) for path in (sys.prefix, *sysconfig.get_paths().values())}
)


class Watch:
    """The folder where a case may work, and a list with forbidden actions.

    If ``folder`` is None, nothing is watched.
    """

    folder: str | None = None
    given: str
    found: list[str]


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if Watch.folder is None:
        return
    if event in FORBIDDEN:
        Watch.found.append(f"{event}{arguments!r:.200}")
    elif event == "open":
        path, _mode, flags = arguments
        writes = bool(isinstance(flags, int) and flags & WRITING)
        _judge("writes" if writes else "reads", path, () if writes else (Watch.given, *READABLE))
    elif event in CHANGES:
        _judge(event, arguments[0], ())


def _judge(what: str, path: object, also: tuple[str, ...]) -> None:
    if isinstance(path, int) or path is None:
        return
    folder = Watch.folder
    Watch.folder = None  # realpath opens nothing, but asks the disk
    try:
        full = os.path.realpath(os.fsdecode(path))  # type: ignore[arg-type]
        if not full.startswith((str(folder), *also)):
            Watch.found.append(f"{what} {full!r:.200}")
    except ValueError:  # a NUL: the system refuses it next
        pass
    finally:
        Watch.folder = folder


_hooked = False


@contextmanager
def guarded(folder: Path, given: Path) -> Iterator[None]:
    """Check that the block writes only in ``folder``, also reads ``given``, and keeps the limits
    for time and memory.
    """
    global _hooked  # noqa: PLW0603 - a hook cannot be removed
    if not _hooked:
        sys.addaudithook(_hook)
        _hooked = True

    def too_long(_signal: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"an input took more than {SECONDS:.0f} s")

    before, handler = _highest(), signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    Watch.folder, Watch.given, Watch.found = os.path.realpath(folder), os.path.realpath(given), []
    try:
        yield
    finally:
        Watch.folder = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert not Watch.found, f"an input made a reader do this: {Watch.found}"
    grown = _highest() - before
    assert grown < MAX_GROWTH, f"an input took {grown / 2**20:.0f} MiB"


def _highest() -> int:
    """Return the process's peak memory in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

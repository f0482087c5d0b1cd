"""Files on the disk: atomic writes, what crashes leave, locks."""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from vilu.artifacts.hashing import bytes_hash, stream_hash
from vilu.errors import BusyError, StorageError

logger = logging.getLogger(__name__)

LOCK = ".lock"  # name of the lock of a folder

RUN = "run.json"
"""First document of a folder that a run fills (``vilu.store.ledger``)."""

MANIFEST = "manifest.json"
"""Last document of such a folder."""

# how long what took, a line of JSON each. Two runs differ in it, and no result is read from it
LOG = "log.jsonl"

# what network file systems answer that cannot sync a folder
CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP}

TEMPORARY = re.compile(
    r"\.(?P<name>.+?)(?:\.(?P<host>[0-9a-f]{8}))?\.(?P<pid>\d+)\.[0-9a-f]{8}\.tmp", re.DOTALL
)
"""Names of files in the making: their later name, host (older ones: none), process, number."""

# seconds after which a file in the making is one that nobody makes any more, whoever began it
STALE = 24 * 3600.0

LONGEST_NAME = 220  # bytes of a name; with what comes after it, still no name too long


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Binary handle of a new file that takes the place of ``path`` when the block ends well.

    The bytes go to a temporary file in the same folder, are synced to the disk, and are then
    renamed. After an exception or a crash ``path`` is what it was before. What crashes left of
    earlier tries at ``path`` is removed.
    """
    target = Path(path)
    name = os.fsencode(target.name)[:LONGEST_NAME].decode("utf-8", "ignore")
    number = secrets.token_hex(4)
    temporary = target.with_name(f".{name}.{host_hash()}.{os.getpid()}.{number}.tmp")
    with or_refuse(f"write {target}", "Give a folder that exists, is writable and has room."):
        for leftover in unfinished(target.parent.absolute()).pop(name, ()):
            if is_leftover(leftover):
                leftover.unlink(missing_ok=True)
        try:
            with temporary.open("xb") as handle:
                yield handle
                handle.flush()
                # before the rename: after a power cut the name would else stand before no bytes
                os.fsync(handle.fileno())
            # in one step: a reader sees the old file or the new one, never a part of it
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(target.parent)


@lru_cache(maxsize=1024)
def unfinished(folder: Path) -> dict[str, list[Path]]:
    """Files and folders in the making when this process first wrote here, by their later name.

    Looked up once: a folder of a hundred thousand parts takes a while to list.
    """
    by_name: dict[str, list[Path]] = {}
    for path in folder.iterdir():
        match = TEMPORARY.fullmatch(path.name)
        if match is not None:
            by_name.setdefault(match["name"], []).append(path)
    return by_name


@contextmanager
def or_refuse(doing: str, hint: str = "") -> Iterator[None]:
    """A block in which the file system's refusal becomes "cannot ``doing``", a ``StorageError``."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        file = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
        which = f" ({file})" if file and file not in doing else ""
        reason = error.strerror or error
        advice = f" {hint}" if hint else ""
        raise StorageError(f"cannot {doing}: {reason}{which}.{advice}") from error


def host_hash() -> str:
    """Eight hex digits that tell this machine from others that write to the same file system."""
    name = socket.gethostname().encode("utf-8", "surrogateescape")
    return bytes_hash(name)[:8]


def is_leftover(path: Path) -> bool:
    """Whether a file in the making (a name as in ``TEMPORARY``) has lost its maker.

    That is so if a process of this machine made it that is no more, or if it has not been touched
    for a day: what another machine is writing now looks just like what it left behind.
    """
    match = TEMPORARY.fullmatch(path.name)
    if match is None:
        return False
    try:
        age = time.time() - path.stat().st_mtime
    except FileNotFoundError:  # its maker was quicker
        return False
    if age > STALE:
        return True
    # the number of a process says nothing on another machine
    return match["host"] == host_hash() and not _is_alive(int(match["pid"]))


def _is_alive(pid: int) -> bool:
    if os.name == "nt":  # there the question would end the process
        return True
    try:
        os.kill(pid, 0)
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # of another user, or no Linux
        return True
    # "PID (NAME) STATE ...", where NAME may hold anything
    state = stat.rpartition(b")")[2].split()[:1]
    # a zombie has ended, but nobody has asked how, which may never happen
    return state != [b"Z"]


def _sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` outlast a power cut."""
    if os.name == "nt":  # there a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in CANNOT_SYNC:
            raise
    finally:
        os.close(descriptor)


def make_folder(path: str | os.PathLike[str]) -> Path:
    """The folder, made with its parents where it is missing; StorageError if that is refused."""
    folder = Path(path)
    with or_refuse(f"make the folder {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


HOLDER = re.compile(r"process (?P<pid>\d+) of (?P<host>\S+)")
"""Content of the file beside a lock, which stays until the next holder if its process dies."""


@contextmanager
def locked(
    folder: Path, doing: str, patience: float = 0.0, name: str = LOCK, who: str = "process"
) -> Iterator[None]:
    """Hold the lock of a folder that is there; the system lets go of it when the process dies.

    Some network file systems give one lock to several machines at once. What is written part by
    part does not rely on it (every writer of a part writes the same bytes); a file beside it that
    names another machine is worth a line.

    For ``patience`` seconds another process is waited for; the message calls it ``who`` and says
    what it is ``doing`` ("embedding into"). ``name`` is of the lock, where a folder has several.
    """
    from filelock import FileLock, Timeout

    signed = folder / f"{name}-holder"
    host = re.sub(r"\s", "_", socket.gethostname())
    ours = f"process {os.getpid()} of {host}"
    lock = FileLock(folder / name)
    with or_refuse(f"write to {folder}"):
        try:
            lock.acquire(timeout=patience)
        except Timeout as error:
            holder = _holder(signed)
            named = f" ({holder[0]})" if holder else ""
            raise BusyError(
                f"another {who}{named} is {doing} {folder}. Wait for it, or give another folder."
            ) from error
    try:
        _sign(signed, ours, host, f"{doing} {folder}")
        yield
    finally:
        # the name goes before the lock: after it, it may be the next holder's
        holder = _holder(signed)
        if holder and holder[0] == ours:  # not that of another machine, which works here too
            with suppress(OSError):
                signed.unlink()
        lock.release()


def _sign(signed: Path, ours: str, host: str, work: str) -> None:
    """Leave our name beside a lock that we hold, and warn of the name of another machine."""
    holder = _holder(signed)
    if holder and holder["host"] != host:
        logger.warning(
            "%s names %s: it has died there, or is %s too, since this file system keeps machines "
            "apart by no lock. See that only one works there.",
            signed,
            holder[0],
            work,
        )
    # for people; no room for it, or a file of somebody else, is no reason to stop
    with suppress(OSError):
        if holder:
            signed.unlink()
        with signed.open("x") as handle:
            handle.write(ours)


def _holder(path: Path) -> re.Match[str] | None:
    """Who holds a lock, or did when it died; None where that is not said."""
    try:
        with path.open("rb") as handle:
            return HOLDER.fullmatch(handle.read(1024).decode(errors="replace"))
    except OSError:  # the message does without
        return None


def cache_folder() -> Path:
    """Where this user's programs keep files that they can make again.

    It need not be there, and may go at any time.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # relative ones are to be ignored, says the XDG specification
        base = Path(os.path.expanduser("~/.cache"))  # noqa: PTH111
    return base / "vilu"


def file_hash(path: Path) -> str:
    """SHA-256 of a file; StorageError if it cannot be read."""
    with or_refuse(f"read {path}"), path.open("rb") as handle:
        return stream_hash(handle)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file atomically."""
    with atomic_write(path) as handle:
        handle.write(content)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 atomically."""
    write_bytes(path, text.encode())

"""Files on the disk: atomic writes, removal of files that crashes left, and locks."""

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

LOCK_FILE = ".lock"  # name of the lock file in a folder

RUN_FILE = "run.json"
"""Name of the first document that a run writes into the folder (``vilu.store.ledger``)."""

MANIFEST_FILE = "manifest.json"
"""Name of the last document that a run writes into the folder."""

# Log of durations, a JSON object per line. The log differs between runs. No result depends on it.
LOG_FILE = "log.jsonl"

# error numbers from network file systems that cannot sync a folder
NO_SYNC_ERRORS = {errno.EINVAL, errno.ENOTSUP}

TEMPORARY_NAME = re.compile(
    r"\.(?P<name>.+?)(?:\.(?P<host>[0-9a-f]{8}))?\.(?P<pid>\d+)\.[0-9a-f]{8}\.tmp", re.DOTALL
)
"""Pattern of temporary names: final name, host hash, process number, random digits.

An example is ".scores.csv.0123abcd.4711.89abcdef.tmp". Older vilu versions wrote temporary names
without a host hash.
"""

# A temporary file counts as abandoned if it is older than this number of seconds: a day.
MAX_TEMPORARY_AGE = 24 * 3600.0

# A temporary name contains at most this number of bytes of the final name, because file systems
# allow 255 bytes for the whole temporary name.
MAX_NAME_BYTES = 220
MAX_HOLDER_BYTES = 1024  # number of bytes read from a holder file, which is far smaller


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a temporary binary file for the block. At the end of the block, rename it to ``path``.

    The temporary file is in the same folder as ``path``. Before the renaming, it is synced to the
    disk. After an exception or a crash, ``path`` is unchanged. Temporary files for ``path`` from
    earlier crashes are removed.
    """
    target = Path(path)
    # if the limit cuts the last character in two, "ignore" drops this character
    encoded_name = os.fsencode(target.name)
    final_name = encoded_name[:MAX_NAME_BYTES].decode("utf-8", "ignore")
    unique_part = f"{host_hash()}.{os.getpid()}.{secrets.token_hex(4)}"
    temporary_path = target.with_name(f".{final_name}.{unique_part}.tmp")
    hint = "Give a folder that exists, is writable and has room."
    with convert_os_errors(f"cannot write {target}", hint=hint):
        if target.is_dir():
            raise StorageError(f"cannot write {target}: a folder is there. Move it away.")
        _remove_leftovers(target.parent, final_name)
        try:
            with temporary_path.open("xb") as handle:
                yield handle
                handle.flush()
                # sync before the rename, or else a power cut could leave an empty file at ``path``
                os.fsync(handle.fileno())
            # the rename is atomic: a reader sees the old file or the new file, never a part
            temporary_path.replace(target)
        finally:
            temporary_path.unlink(missing_ok=True)
        _sync_folder(target.parent)


def _remove_leftovers(folder: Path, final_name: str) -> None:
    """Remove the temporary files for ``final_name`` that crashes left in a folder."""
    paths_of_name = temporary_paths(folder.absolute())
    # ``pop`` removes the entry from the cached dictionary, so this is done once per final name
    for earlier_file in paths_of_name.pop(final_name, ()):
        if is_leftover(earlier_file):
            earlier_file.unlink(missing_ok=True)


@lru_cache(maxsize=1024)
def temporary_paths(folder: Path) -> dict[str, list[Path]]:
    """Map each final name to the temporary files and folders for this name in a folder.

    The folder is listed only once per process, because listing 100,000 files is slow. If another
    process makes a temporary file after the first call, the file is not found.
    """
    paths_of_name: dict[str, list[Path]] = {}
    for path in folder.iterdir():
        match = TEMPORARY_NAME.fullmatch(path.name)
        if match is not None:
            paths = paths_of_name.setdefault(match["name"], [])
            paths.append(path)
    return paths_of_name


@contextmanager
def convert_os_errors(failure: str, hint: str = "") -> Iterator[None]:
    """Convert an OSError in the block into a ``StorageError``.

    The message is "FAILURE: REASON. HINT", where REASON is the OSError's message.

    Args:
        failure: The failed action, such as "cannot read scores.parquet".
        hint: Advice for the user, as a sentence.
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        file_in_brackets = ""
        if isinstance(error.filename, str | bytes):
            file = os.fsdecode(error.filename)
            if file not in failure:  # the message does not name the file yet
                file_in_brackets = f" ({file})"
        reason = error.strerror or error
        advice = advice_to_owner(error)  # "", or a sentence with a space at the beginning
        if hint:
            advice = f" {hint}{advice}"
        raise StorageError(f"{failure}: {reason}{file_in_brackets}.{advice}") from error


def advice_to_owner(error: OSError) -> str:
    """Return advice for a private file's owner: how to let other users read the file.

    Return "" unless ``error`` says that access to a private file was refused. A file is private if
    only the owner may read the file, or may open its folder. The advice begins with a space,
    because it follows the error message.
    """
    if not isinstance(error, PermissionError) or error.filename is None:
        return ""
    try:
        file_name = os.fsdecode(error.filename)
        path = Path(file_name)
        mode = path.stat().st_mode
        is_private = (mode & 0o077) == 0  # the group and other users have no rights
    except PermissionError:  # the user may not open the file's folder
        is_private = True
    except OSError:
        return ""
    if not is_private:
        return ""
    return (
        " vilu writes files with paths or labels for their owner alone. The owner lets others read "
        "them with chmod, or writes them with `vilu --umask 022 ...`."
    )


def host_hash() -> str:
    """Return eight hex digits that tell this machine from others on the same file system."""
    name = socket.gethostname()
    encoded_name = name.encode("utf-8", "surrogateescape")
    return bytes_hash(encoded_name)[:8]


def is_leftover(path: Path) -> bool:
    """Return whether a file has a temporary name and was abandoned by the process that made it.

    A file is abandoned if the process ran on this machine and has ended. Processes on other
    machines cannot be checked from here. Therefore, if a temporary file has not changed for more
    than a day, the file also counts as abandoned.
    """
    match = TEMPORARY_NAME.fullmatch(path.name)
    if match is None:
        return False
    try:
        age = time.time() - path.stat().st_mtime
    except FileNotFoundError:  # the process has just renamed or removed the file
        return False
    if age > MAX_TEMPORARY_AGE:
        return True
    # the process number in the name can be checked only on the machine where the process ran
    is_of_this_machine = match["host"] == host_hash()
    return is_of_this_machine and not _is_alive(int(match["pid"]))


def _is_alive(pid: int) -> bool:
    """Return whether a process still runs on this machine. Without a way to check, return True."""
    if os.name == "nt":  # on Windows, os.kill would end the process
        return True
    try:
        os.kill(pid, 0)  # the signal 0 does nothing, but raises an error if there is no process
        stat_file = Path(f"/proc/{pid}/stat")
        stat = stat_file.read_bytes()
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # the process belongs to another user, or this system has no /proc
        return True
    # "PID (NAME) STATE ...", where NAME may contain any character, also ")"
    _, _, after_name = stat.rpartition(b")")
    state_and_rest = after_name.lstrip()
    # in the state Z (zombie) a process has ended, but the parent has not read the exit status yet
    return not state_and_rest.startswith(b"Z")


def _sync_folder(folder: Path) -> None:
    """Sync a folder to the disk, so a rename in the folder survives a power cut."""
    if os.name == "nt":  # Windows cannot open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC_ERRORS:
            raise
    finally:
        os.close(descriptor)


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Make a folder and its parents if missing. Raise StorageError if this fails."""
    folder = Path(path)
    with convert_os_errors(f"cannot make the folder {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


HOLDER_PATTERN = re.compile(r"process (?P<pid>\d+) of (?P<host>\S+)")
"""Pattern of a holder file's content, such as "process 4711 of laptop".

A holder file names the process with the lock. If the process dies, the file stays until another
process takes the lock.
"""


@contextmanager
def locked(
    folder: Path,
    *,
    activity: str,
    wait_seconds: float = 0.0,
    lock_name: str = LOCK_FILE,
    holder_kind: str = "process",
) -> Iterator[None]:
    """Hold the lock of an existing folder during the block.

    The operating system releases the lock when the process dies. Some network file systems give the
    same lock to several machines at once. Folders written in parts stay correct even then, because
    all writers write the same bytes for a part.

    A holder file next to the lock file names the process with the lock. If it names a process on
    another machine when the lock is taken, a warning is logged.

    If another process holds the lock, the message is "another HOLDER_KIND is ACTIVITY FOLDER."

    Args:
        folder: The folder, which must exist.
        activity: What the lock holder does with the folder, such as "embedding into". Fills in
            ACTIVITY in the message.
        wait_seconds: Seconds to wait if another process holds the lock.
        lock_name: The lock file's name. A folder may have several locks.
        holder_kind: Noun for the lock holder. Fills in HOLDER_KIND in the message.

    Raises:
        BusyError: If another process still holds the lock after ``wait_seconds``.
        StorageError: If the lock cannot be written.
    """
    from filelock import FileLock, Timeout

    holder_file = folder / f"{lock_name}-holder"
    host = re.sub(r"\s", "_", socket.gethostname())  # as in ``HOLDER_PATTERN``, without spaces
    this_process = f"process {os.getpid()} of {host}"
    lock = FileLock(folder / lock_name)
    with convert_os_errors(f"cannot write to {folder}"):
        try:
            lock.acquire(timeout=wait_seconds)
        except Timeout as error:
            holder = _read_holder(holder_file)
            holder_in_brackets = f" ({holder.group()})" if holder else ""
            raise BusyError(
                f"another {holder_kind}{holder_in_brackets} is {activity} {folder}. Wait for it, "
                "or give another folder."
            ) from error
    try:
        _warn_of_other_machine(holder_file, host, f"{activity} {folder}")
        _write_holder(holder_file, this_process)
        yield
    finally:
        # The holder file is removed before the lock is released, because the next lock holder
        # writes a new holder file. On some file systems the lock does not exclude other machines.
        # So the file may now name another process, which may still be at work. Then the file stays.
        holder = _read_holder(holder_file)
        if holder and holder.group() == this_process:
            with suppress(OSError):
                holder_file.unlink()
        lock.release()


def _warn_of_other_machine(holder_file: Path, host: str, activity: str) -> None:
    """Warn if a holder file names a process on a machine other than ``host``, this machine."""
    holder = _read_holder(holder_file)
    if holder and holder["host"] != host:
        other_process = holder.group()
        logger.warning(
            "%s names %s. Either it died there, or it is %s too, because the locks of this file "
            "system do not exclude other machines. Make sure that only one machine works there.",
            holder_file,
            other_process,
            activity,
        )


def _write_holder(holder_file: Path, this_process: str) -> None:
    """Write a holder file for this process, in place of an earlier holder file."""
    holder = _read_holder(holder_file)
    # the file is read only for messages, so the work goes on if the file cannot be written
    with suppress(OSError):
        if holder:
            holder_file.unlink()
        with holder_file.open("x") as handle:  # a file that names no process is not overwritten
            handle.write(this_process)


def _read_holder(holder_file: Path) -> re.Match[str] | None:
    """Read which process holds the lock, or died while holding it.

    Returns the match of ``HOLDER_PATTERN`` in the holder file, or None without a file or a match.
    """
    try:
        with holder_file.open("rb") as handle:
            content = handle.read(MAX_HOLDER_BYTES)
            text = content.decode(errors="replace")
            return HOLDER_PATTERN.fullmatch(text)
    except OSError:  # without the file, messages name no process
        return None


def cache_folder() -> Path:
    """Return the path of vilu's folder in this user's cache, for files that vilu can make again.

    The folder may not exist yet, and users may delete it at any time.
    """
    folder_of_user = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(folder_of_user)
    if not base.is_absolute():  # the XDG specification says to ignore a relative path
        base = Path(os.path.expanduser("~/.cache"))  # noqa: PTH111
    return base / "vilu"


def file_hash(path: Path) -> str:
    """Compute the SHA-256 of a file. Raise StorageError if the file cannot be read."""
    with convert_os_errors(f"cannot read {path}"), path.open("rb") as handle:
        return stream_hash(handle)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file atomically."""
    with atomic_write(path) as handle:
        handle.write(content)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text atomically, as UTF-8."""
    write_bytes(path, text.encode())

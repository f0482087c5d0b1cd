"""Writing files so that a reader sees the old content or the new one, never half of it."""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from vilu.errors import DataError, StorageError

CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP}
"""What network file systems answer that cannot sync a folder."""


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Binary handle of a new file that takes the place of ``path`` when the block ends without an exception.

    The bytes go to a temporary file in the same folder, are synced to the disk, and are then renamed. After an
    exception or a crash ``path`` is what it was before.

    Raises:
        StorageError: If the file system refuses (no such folder, read-only, disk full).
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            with temporary.open("xb") as handle:
                yield handle
                handle.flush()
                os.fsync(handle.fileno())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(target.parent)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"cannot write {target}: {error.strerror or error}. Give a folder that exists, is writable and has room."
        ) from error


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """Write plain JSON (UTF-8, indented, keys in their order) atomically.

    Raises:
        DataError: If ``value`` is not plain JSON; NaN and infinity are not, write None for what is undefined.
        StorageError: If the file system refuses.
    """
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        content = text.encode()
    except (TypeError, ValueError) as error:
        raise DataError(f"cannot write {path}: its content must be plain JSON, but {error}.") from error
    with atomic_write(path) as handle:
        handle.write(content)


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
    """The folder, made with its parents where it is missing.

    Raises:
        StorageError: If the file system refuses.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make the folder {folder}: {error.strerror or error}.") from error
    return folder

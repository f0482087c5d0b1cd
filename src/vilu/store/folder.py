"""The folder of a store while it is being written: its lock, leftovers, room on the disk."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vilu.errors import StorageError, UsageError
from vilu.files import LOCK, TEMPORARY, is_leftover, locked
from vilu.store.manifest import CLASSES, MANIFEST, RUN

FOLDERS = ("img_emb", "text_emb", "metadata", "errors", "receipts", "attempts")
COLUMNS = ("features", "views", "columns")
"""Folders that a store has if it holds more than embeddings."""

OURS = re.compile(r"run\.json|classes\.json|manifest\.json|\w+\.npy|\w+\.parquet|\d+\.json")
"""Names of the files of a store."""

OVERHEAD = 1.05
"""Of metadata and receipts over the vectors."""


@contextmanager
def claim(root: Path, patience: float = 0.0) -> Iterator[None]:
    """Make the folder and hold its lock; the system lets go of it when the process dies.

    Args:
        root: The store.
        patience: Seconds to wait for another process.

    Raises:
        UsageError: If the folder holds something else than a store.
        BusyError: If another process embeds into it, and still does after the wait.
        StorageError: If it cannot be made or written to.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        foreign = [path.name for path in root.iterdir() if path.name != LOCK and not _in_the_making(path.name)]
        if foreign and not (root / RUN).is_file():
            raise UsageError(
                f"{root} is not empty ({min(foreign)!r}, ...) and holds no {RUN}, so it is no embedding store. "
                "Give a new or an empty folder."
            )
    except OSError as error:
        raise StorageError(f"cannot write to {root}: {error.strerror or error}.") from error
    with locked(root, "embedding into", patience):
        yield


def prepare(root: Path, arrays: Iterable[str]) -> None:
    """Make the sub-folders, and clean them.

    Args:
        root: The store.
        arrays: What is kept of each image, each in a folder of its name.

    Raises:
        StorageError: If the file system refuses.
    """
    try:
        for name in {*FOLDERS, *arrays}:
            (root / name).mkdir(exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot prepare {root}: {error.strerror or error}.") from error
    clean(root)


def clean(root: Path) -> None:
    """Remove what killed processes left half-written, and nothing that another process, here or elsewhere, is writing.

    Raises:
        StorageError: If the file system refuses.
    """
    try:
        for folder in (root, *(root / name for name in (*FOLDERS, *COLUMNS))):
            for path in folder.iterdir() if folder.is_dir() else ():
                if _in_the_making(path.name) and is_leftover(path):
                    path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot clean {root}: {error.strerror or error}.") from error


def _in_the_making(name: str) -> bool:
    match = TEMPORARY.fullmatch(name)
    return match is not None and OURS.fullmatch(match["name"]) is not None


def unseal(root: Path) -> None:
    """Mark a store as not complete.

    Raises:
        StorageError: If the file system refuses.
    """
    try:
        (root / MANIFEST).unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot change {root}: {error.strerror or error}.") from error


def clear(root: Path) -> None:
    """Remove a store, and nothing else that may lie in its folder; ``run.json`` last, so that a kill leaves a store.

    Raises:
        StorageError: If the file system refuses.
    """
    unseal(root)
    try:
        for name in ("receipts", *FOLDERS, *COLUMNS):
            if (root / name).is_dir():
                shutil.rmtree(root / name)
        for name in (CLASSES, RUN):
            (root / name).unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot remove the old store in {root}: {error.strerror or error}.") from error


def require_room(root: Path, n_rows: int, row_bytes: int) -> None:
    """Refuse to begin what cannot fit.

    Raises:
        StorageError: If the disk has less free space than the vectors need, with 5 % for the rest.
    """
    needed = int(n_rows * row_bytes * OVERHEAD)
    free = shutil.disk_usage(root).free
    if needed > free:
        raise StorageError(
            f"{n_rows} embeddings need {needed / 2**20:.1f} MiB in {root}, where {free / 2**20:.1f} MiB are free. "
            "Make room, or store float16."
        )

"""The folder of scores while it is being written: one process at a time, of one run, without leftovers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vilu.errors import StorageError, UsageError
from vilu.files import LOCK, TEMPORARY, locked, make_folder, write_json
from vilu.scores.documents import MANIFEST, RUN, Run, read

FOLDERS = ("receipts", "histograms", "scores")


@contextmanager
def claim(root: Path) -> Iterator[None]:
    """Make the folder and hold its lock; the system lets go of it when the process dies.

    Raises:
        UsageError: If the folder holds something else than scores.
        BusyError: If another process scores into it.
        StorageError: If it cannot be made or written to.
    """
    make_folder(root)
    try:
        foreign = [path.name for path in root.iterdir() if path.name != LOCK and not TEMPORARY.fullmatch(path.name)]
        if foreign and not (root / RUN).is_file():
            raise UsageError(
                f"{root} is not empty ({min(foreign)!r}, ...) and holds no {RUN}, so it is no folder of scores. "
                "Give a new or an empty folder."
            )
    except OSError as error:
        raise StorageError(f"cannot read {root}: {error.strerror or error}.") from error
    with locked(root, "scoring into"):
        yield


def begin(root: Path, run: Run, *, overwrite: bool) -> None:
    """See that the folder, whose lock we hold, is of this run, and remove what a killed one left half-written.

    Raises:
        DataError: If it is of something else than scores.
        ProvenanceError: If it is of another run and not to be overwritten.
        StorageError: If the file system refuses.
    """
    if (root / RUN).is_file():
        found = read(root / RUN, Run)
        if overwrite and found != run:
            _clear(root)
        else:
            found.require_same(run, root)
    try:
        for folder in (root, *(root / name for name in FOLDERS)):
            folder.mkdir(exist_ok=True)
            for path in folder.iterdir():
                if TEMPORARY.fullmatch(path.name):
                    path.unlink()
    except OSError as error:
        raise StorageError(f"cannot prepare {root}: {error.strerror or error}.") from error
    if not (root / RUN).is_file():
        write_json(root / RUN, run.model_dump(mode="json"))


def unseal(root: Path) -> None:
    """Mark the folder as not complete.

    Raises:
        StorageError: If the file system refuses.
    """
    try:
        (root / MANIFEST).unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot change {root}: {error.strerror or error}.") from error


def _clear(root: Path) -> None:
    """Remove scores, and nothing else that may lie in the folder; ``run.json`` last, so that a kill leaves a folder."""
    unseal(root)
    try:
        for name in FOLDERS:
            if (root / name).is_dir():
                shutil.rmtree(root / name)
        (root / RUN).unlink()
    except OSError as error:
        raise StorageError(f"cannot remove the old scores in {root}: {error.strerror or error}.") from error

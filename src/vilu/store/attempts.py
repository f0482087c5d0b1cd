"""Parts that kill the process that works on them: counted, tried again, and given up in the end.

A picture can crash a decoder, or a batch a driver of the accelerator. Nobody is left then to write an error row, so
each process leaves a mark before it begins a part and takes it away when it ends, well or by an exception. Marks that
are found are of processes that died.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vilu.datasets.base import ImageDataset
from vilu.errors import StorageError
from vilu.store.manifest import Run
from vilu.store.parts import SHARD, Part, positions
from vilu.store.pipeline import place_records
from vilu.store.writer import ErrorRow, PartRows

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""Processes that may die in a part before it is given up."""

MESSAGE = f"{MAX_ATTEMPTS} processes died while they worked on the part of this image, so the part was given up"


def attempts(root: Path, part: Part) -> int:
    """How many processes have begun a part and neither ended it nor failed at it: they died, or are at work.

    Raises:
        StorageError: If the file system refuses.
    """
    try:
        return (root / part.attempts).stat().st_size
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise StorageError(f"cannot read {root / part.attempts}: {error.strerror or error}.") from error


def forget_attempts(root: Path) -> None:
    """Take away all marks: whoever drives a store alone begins anew.

    Raises:
        StorageError: If the file system refuses.
    """
    folder = root / "attempts"
    try:
        for path in folder.iterdir() if folder.is_dir() else ():
            path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot clean {folder}: {error.strerror or error}.") from error


class Marks:
    """The marks of this process."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._set: set[Path] = set()

    def begin(self, part: Part) -> None:
        """Leave one."""
        path = self._root / part.attempts
        path.parent.mkdir(exist_ok=True)
        with path.open("ab") as handle:
            handle.write(b"x")
        self._set.add(path)

    def end(self, part: Part) -> None:
        """Take it away, and with it those of processes that died before this one came through."""
        self._remove(self._root / part.attempts)

    def end_all(self) -> None:
        """Take away what is left."""
        for path in tuple(self._set):
            self._remove(path)

    def _remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self._set.discard(path)


@contextmanager
def marking(root: Path) -> Iterator[Marks]:
    """Marks that are gone after the block, unless the process dies in it.

    Raises:
        StorageError: If the file system refuses.
    """
    marks = Marks(root)
    try:
        yield marks
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"cannot write to {root / 'attempts'}: {error.strerror or error}.") from error
    finally:
        with suppress(OSError):  # a mark too many costs a retry; the exception under way says more
            marks.end_all()


def give_up(run: Run, part: Part, dataset: ImageDataset, *, listing: bool) -> PartRows:
    """A part without rows: an error row of kind "crash" for every image, of which nothing but the listing is read.

    Where there is no listing, it is a row for every position of the part, or for every shard.

    Args:
        run: What the store is made from.
        part: The part.
        dataset: The images.
        listing: Whether to try the listing; false where it was tried already and killed the process.
    """
    places = positions(run, part)[:: SHARD if run.shards else 1]
    found = [(place, f"shard {place // SHARD}" if run.shards else f"image {place}") for place in places]
    if listing:
        try:
            found = [(position, record.key) for position, record in place_records(run, part, dataset)]
        # these images have killed workers, so their listing may raise anything of a foreign reader; it is logged, every
        # row is recorded as a crash, and the other parts go on
        except Exception as error:  # noqa: BLE001
            logger.warning("part %d cannot be listed either: %s: %s", part.number, type(error).__name__, error)
    return PartRows(errors=[ErrorRow(key, at, "process", "crash", None, MESSAGE, None) for at, key in found])

"""Data sets whose images are files, listed by the data set itself: one class table, and the files of each split."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from os import stat_result
from pathlib import Path
from stat import S_ISREG
from typing import Final

from vilu.datasets.base import Record
from vilu.datasets.classes import class_table
from vilu.datasets.files import ListingHash, portable_name, read_below, status_below
from vilu.datasets.known.entry import Place, Request
from vilu.datasets.known.survey import SHOWN, Count, Survey
from vilu.datasets.splits import parse_split
from vilu.errors import DataError
from vilu.progress import Task, track

Entry = tuple[str, int, stat_result | None]
"""Path below the data set's folder, label, and status; None where the file is missing."""

STEP: Final = 1000
"""Images between two signs of life."""


@dataclass(frozen=True)
class Listing:
    """What a data set says of itself.

    Attributes:
        classes: What its files or lists call the classes, in label order.
        splits: The images by split; iterating may list folders, and raises DataError where a split cannot be listed.
        origin: Where the splits come from, for people.
        names: Names for prompts, cleaned; None for ``classes`` with underscores turned into spaces.
        raw: Names as the data have them; None for ``classes``.
        binding: Whether the published sizes must be met.
    """

    classes: tuple[str, ...]
    splits: Mapping[str, Iterable[Entry]]
    origin: str
    names: tuple[str, ...] | None = None
    raw: tuple[str, ...] | None = None
    binding: bool = True


@dataclass(frozen=True)
class ListReader:
    """A reader that needs only to be told how a data set lists itself."""

    read: Callable[[Place], Listing]

    def open(self, place: Place, request: Request) -> ListedDataset:
        """The images of the splits asked for."""
        return ListedDataset(place, self.read(place), request)

    def survey(self, place: Place, *, deep: bool) -> Survey:  # noqa: ARG002 - deep is for archives and tars
        """Files listed and files found."""
        listing = self.read(place)
        with track(f"checking {place.entry.name}", sum(place.entry.sizes.values()), "images") as task:
            counts = {name: _count(entries, task) for name, entries in listing.splits.items()}
        return Survey(listing.origin, counts, listing.binding)


class PathList:
    """Images of a list, in the byte order of their paths, so that one list in any order is one data set.

    Iterating costs one stat per image.
    """

    def __init__(self, folder: Path, entries: Iterable[tuple[str, int]]) -> None:
        self._folder = folder
        self._entries = sorted(entries)

    def __iter__(self) -> Iterator[Entry]:
        for path, label in self._entries:
            yield path, label, status_below(self._folder, path)


class ListedDataset:
    """Images that a data set lists; a listed file that is missing is the read error of its row.

    Keys are paths below the data set's folder; labels follow its one class table, whatever the splits.

    Args:
        place: Where it lies.
        listing: What it says of itself.
        request: What is asked of it.

    Attributes:
        classes: What the data call the classes, and names for prompts.

    Raises:
        DataError: If a split cannot be listed or has no image, or the class table is not one.
        UsageError: If there is no such split, or the classes file cannot be read.
    """

    def __init__(self, place: Place, listing: Listing, request: Request) -> None:
        self.source = f"{place.folder} ({listing.origin})"
        self.captioned = False
        names = (listing.raw or listing.classes) if request.raw_names else listing.names
        self.classes = class_table(listing.classes, request.classes, by_position=True, names=names)
        self.class_names: tuple[str, ...] | None = self.classes.names
        self._folder = place.folder
        self._paths: list[str] = []
        self._labels = array("i")
        splits = tuple(listing.splits)
        splits = splits if request.split is None else parse_split(request.split, splits, self.source)
        hashed = ListingHash(*listing.classes, *splits)
        with track(f"listing {place.entry.name}", None, "images") as task:
            counts = {split: self._add(listing.splits[split], hashed, task) for split in splits}
        empty = [split for split, count in counts.items() if count == 0]
        if not self._paths or (request.split is not None and empty):
            raise DataError(f"split {empty[0]!r} of {self.source} has no image. Choose another, or mend its list.")
        self.fingerprint = hashed.hexdigest()

    def __len__(self) -> int:
        return len(self._paths)

    def records(self, start: int, stop: int) -> Iterator[Record]:
        """The images at positions start ... stop - 1."""
        for path, label in zip(self._paths[start:stop], self._labels[start:stop], strict=True):
            yield Record(portable_name(path), label, partial(read_below, self._folder, path))

    def _add(self, entries: Iterable[Entry], hashed: ListingHash, task: Task) -> int:
        before = len(self._paths)
        for path, label, status in _showing(entries, task):
            self._paths.append(path)
            self._labels.append(label)
            hashed.add(path, label, status)
        return len(self._paths) - before


def _count(entries: Iterable[Entry], task: Task) -> Count:
    found, listed = 0, 0
    missing: list[str] = []
    try:
        for path, _, status in _showing(entries, task):
            listed += 1
            if status is not None and S_ISREG(status.st_mode):
                found += 1
            elif len(missing) < SHOWN:
                missing.append(portable_name(path))
    except DataError as error:  # told with the split, so that the others are counted too
        return Count(found, None, (), str(error))
    return Count(found, listed, tuple(missing))


def _showing(entries: Iterable[Entry], task: Task) -> Iterator[Entry]:
    number = 0
    for number, entry in enumerate(entries, start=1):
        yield entry
        if number % STEP == 0:
            task.advance(STEP)
    task.advance(number % STEP)

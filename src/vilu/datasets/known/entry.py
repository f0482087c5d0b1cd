"""A known data set, its place on a disk, and counts of its files."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Final, Protocol, runtime_checkable

from pydantic import Field, InstanceOf, PositiveInt

from vilu.artifacts.disk import or_refuse
from vilu.datasets.base import ImageDataset
from vilu.errors import DataError, UsageError

SHOWN: Final = 5  # missing files that are named


@dataclass(frozen=True)
class Count:
    """Images of one split, or of several whose sum alone is published."""

    found: int | None  # files that are there; None where they were not counted
    listed: int | None  # files that should be, by the list in use; None where nothing lists them
    # files that should be, as published; None where that is not known of this list
    expected: int | None = None
    missing: tuple[str, ...] = ()  # the first of those that are not there
    problem: str | None = None  # why nothing can be said; None where something can

    @classmethod
    def sum(cls, counts: Iterable[Count], expected: int | None) -> Count:
        """Of several splits together."""
        n_there: int | None = 0
        n_listed: int | None = 0
        missing: list[str] = []
        problem = None
        for count in counts:
            n_there = _sum(n_there, count.found)
            n_listed = _sum(n_listed, count.listed)
            missing += count.missing
            if problem is None:
                problem = count.problem
        return cls(n_there, n_listed, expected, tuple(missing[:SHOWN]), problem)

    def is_complete(self, *, binding: bool) -> bool:
        """Whether all listed files are there.

        If the published size is ``binding``, so many must be listed.
        """
        if self.problem is not None or self.missing:
            return False
        if self.listed is not None and self.found != self.listed:
            return False
        if not binding or self.expected is None:
            return True
        n_listed = self.listed or 0
        return n_listed >= self.expected


@dataclass(frozen=True)
class Survey:
    """The files that a reader finds."""

    origin: str  # which list of splits is in use, for people
    counts: Mapping[str, Count]  # by split
    # whether the published sizes must be met; not where the list is the user's own, or links have
    # died
    binding: bool = True


def _sum(first: int | None, second: int | None) -> int | None:
    """The sum, None where one of the two is not known."""
    if first is None or second is None:
        return None
    return first + second


NAME: Final = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"


@dataclass(frozen=True)
class Request:
    """The options of opening a data set."""

    split: str | None = None  # names of splits joined by ``+``; None for all
    raw_names: bool = False  # whether class names stay as the data have them
    classes: Path | None = None  # a classes file; None where the data name their classes
    # names of classes that will be taken out: the file may leave them out
    outside: tuple[str, ...] = ()

    def unfit(self) -> list[str]:
        """Names of the options in use that only data with classes and splits have."""
        is_used = {
            "--split": self.split is not None,
            "--raw-names": self.raw_names,
            "--classes": self.classes is not None,
            "--outside": len(self.outside) > 0,
        }
        return [name for name, used in is_used.items() if used]


@runtime_checkable
class Reader(Protocol):
    """Reads one data set; most are a ``ListReader`` with a function of some lines."""

    def open(self, place: Place, request: Request) -> ImageDataset:
        """The images.

        DataError where what is there contradicts itself, UsageError where the request does not fit.
        """

    def survey(self, place: Place, *, deep: bool) -> Survey:
        """The files that are there, without decoding images; ``deep`` may read every byte.

        DataError where nothing can be said.
        """


@dataclass(frozen=True)
class KnownDataset:
    """One data set, as its authors published it.

    Attributes:
        name: Its key in the catalogue.
        title: Its name for people.
        sizes: Number of images by split (or by splits joined by ``+``, where only their sum is
            known).
        url: Where it comes from.
        how: How to get and unpack it.
        folders: Where it lies below a folder that holds all data sets, by torchvision's and CoOp's
            conventions.
        reader: What reads it; in TOML a ``layout``.
        n_classes: Number of classes; None where there are captions.
        marks: Patterns of which one must match in its folder.
        licence: In short; "see the site" where it is not simple.
        n_bytes: Size of the download, approximate; None where it is not known.
        reference: Its paper.
        archives: MD5 checksums of archives and files, as torchvision publishes them.
        coop_template: CoOp's prompt for it; None where CoOp has none.
        official_sizes: Sizes of the official split, where that is another one than ``sizes``'.
        template: The prompt of ViLU's protocol.
    """

    name: Annotated[str, Field(pattern=NAME)]
    title: str
    sizes: Annotated[Mapping[str, PositiveInt], Field(min_length=1)]
    url: str
    how: str
    folders: Annotated[tuple[str, ...], Field(min_length=1)]
    reader: InstanceOf[Reader]
    n_classes: PositiveInt | None = None
    marks: Annotated[tuple[str, ...], Field(min_length=1)] = ("*",)
    licence: str = "see the site"
    n_bytes: int | None = None
    reference: str = ""
    archives: Mapping[str, str] = field(default_factory=dict)
    coop_template: str | None = None
    official_sizes: Mapping[str, int] = field(default_factory=dict)
    template: str = "a photo of a {}."

    @property
    def captioned(self) -> bool:
        """Whether images have captions instead of labels."""
        return self.n_classes is None

    def expected(self, splits: Collection[str]) -> Mapping[str, int]:
        """Published sizes of these splits; empty where no such splits were published."""
        for sizes in (self.sizes, self.official_sizes):
            published = "+".join(sizes).split("+")  # a size may be that of several splits
            if set(published) == set(splits):
                return sizes
        return {}


@dataclass(frozen=True)
class Place:
    """Where a data set lies."""

    entry: KnownDataset  # which data set
    folder: Path  # its folder; keys are paths below it
    # where else lists of its splits may lie: the folders above it in its layout, and the one that
    # was given
    around: tuple[Path, ...]

    def find(self, *names: str) -> Path | None:
        """The first of these files that is there, in ``folder`` or ``around``.

        Links that lead nowhere count: they are an error of the file, not its absence.
        """
        for folder in (self.folder, *self.around):
            for name in names:
                path = folder / name
                if path.exists() or path.is_symlink():
                    return path
        return None

    def require(self, *names: str) -> Path:
        """The first of these files, without which nothing can be listed."""
        path = self.find(*names)
        if path is None:
            raise self.lacks(*names)
        return path

    def lacks(self, *names: str) -> DataError:
        """The error for a place where none of these files is there."""
        return DataError(
            f"{self.entry.title} in {self.folder} has no {' or '.join(names)}, "
            "so nothing says which image is in which split. "
            f"{self.entry.how} ({self.entry.url})"
        )


def find_place(entry: KnownDataset, root: Path, *, named: bool) -> Place | None:
    """Where a data set lies: below ``root``, or in ``root`` itself; None where it does not.

    ``named`` says that ``root`` can be its own folder because the user says so; else the folder's
    name must.
    """
    if not root.is_dir():
        raise UsageError(
            f"{root} is no folder. Give the folder that holds the data sets, or a data set's own."
        )
    with or_refuse(f"look into {root}", "Mend its permissions."):
        for parts in _candidates(entry, root, named):
            folder = root.joinpath(*parts)
            if folder.is_dir() and _has_mark(folder, entry.marks):
                depths = reversed(range(len(parts)))
                around = tuple(root.joinpath(*parts[:depth]) for depth in depths)
                return Place(entry, folder, around)
    return None


def _has_mark(folder: Path, marks: Iterable[str]) -> bool:
    """Whether one of the patterns matches in the folder."""
    for mark in marks:
        first_match = next(folder.glob(mark), None)
        if first_match is not None:
            return True
    return False


def require_place(entry: KnownDataset, root: Path) -> Place:
    """Where a data set lies that the user named.

    The error says where it was looked for and how to get it.
    """
    place = find_place(entry, root, named=True)
    if place is not None:
        return place
    raise DataError(
        f"{entry.title} is not in {root}: there is no {' or '.join(entry.folders)} "
        f"with {' or '.join(entry.marks)} in it, nor is it that folder itself. "
        f"{entry.how} ({entry.url})"
    )


def _candidates(entry: KnownDataset, root: Path, named: bool) -> Iterator[tuple[str, ...]]:
    """Paths below ``root`` to look at, as parts.

    First come the folders of the entry. Then ``root`` itself may be the first folder or more of
    such a path, so the rest of the path is looked at: where the user says so or the names agree.
    """
    paths = [PurePosixPath(folder).parts for folder in entry.folders]
    yield from paths
    end_of_root = root.absolute().parts
    for parts in paths:
        for depth in range(1, len(parts) + 1):
            has_names = end_of_root[-depth:] == parts[:depth]
            if named or has_names:
                yield parts[depth:]

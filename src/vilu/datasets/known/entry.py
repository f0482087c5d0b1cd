"""A known data set, where the data set is on a disk, and file counts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Final, Protocol, runtime_checkable

from pydantic import Field, InstanceOf, PositiveInt

from vilu.artifacts.disk import convert_os_errors
from vilu.datasets.base import ImageDataset
from vilu.errors import DataError, UsageError

MAX_MISSING_NAMES: Final = 5  # maximum number of missing files in a message


@dataclass(frozen=True)
class Count:
    """A split's image counts, or the counts for several splits if only the sum is published."""

    found: int | None  # number of existing files, or None if not counted
    listed: int | None  # number of files in the split's list, or None if there is no list
    expected: int | None = None  # published number of files in this list, or None if not published
    missing: tuple[str, ...] = ()  # the first missing files in the list
    problem: str | None = None  # error that prevented the counting, or None

    @classmethod
    def sum(cls, counts: Iterable[Count], expected: int | None) -> Count:
        """Return several splits' counts, added up."""
        n_existing: int | None = 0
        n_listed: int | None = 0
        missing: list[str] = []
        problem = None
        for count in counts:
            n_existing = _sum_if_known(n_existing, count.found)
            n_listed = _sum_if_known(n_listed, count.listed)
            missing += count.missing
            if problem is None:
                problem = count.problem
        return cls(n_existing, n_listed, expected, tuple(missing[:MAX_MISSING_NAMES]), problem)

    def is_complete(self, *, binding: bool) -> bool:
        """Return whether all listed files exist.

        If ``binding``, at least ``expected`` files must be listed, too.
        """
        if self.problem is not None or self.missing:
            return False
        is_listed = self.listed is not None
        if is_listed and self.found != self.listed:
            return False
        if not binding or self.expected is None:
            return True
        n_listed = self.listed or 0  # 0 if there is no list
        return n_listed >= self.expected


@dataclass(frozen=True)
class Survey:
    """A data set's file counts."""

    origin: str  # description of the split list in use, for messages
    counts: Mapping[str, Count]  # split -> counts
    # whether the published sizes must be reached: False if the user made the list, or if some
    # images are no longer on the web
    binding: bool = True


def _sum_if_known(first: int | None, second: int | None) -> int | None:
    """Return the sum of two numbers, or None if either number is None."""
    if first is None or second is None:
        return None
    return first + second


NAME_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"  # pattern for data set names


@dataclass(frozen=True)
class Request:
    """Options for opening a data set."""

    split: str | None = None  # split names joined by ``+``, or None for all
    raw_names: bool = False  # whether to use the data's class names unchanged
    classes: Path | None = None  # a classes file, or None if the data have the class names
    # names of classes to leave out. The file ``classes`` need not list these classes.
    outside: tuple[str, ...] = ()

    def unfit_options(self) -> list[str]:
        """Return the used options that do not fit a data set without classes and splits."""
        is_used = {
            "--split": self.split is not None,
            "raw_names": self.raw_names,
            "--classes": self.classes is not None,
            "--outside": len(self.outside) > 0,
        }
        return [name for name, used in is_used.items() if used]


@runtime_checkable
class Reader(Protocol):
    """A data set's reader. Most readers are a ``ListReader`` with a short function."""

    def open(self, place: Place, request: Request) -> ImageDataset:
        """Open the images.

        Raises:
            DataError: If the files are inconsistent.
            UsageError: If the request does not fit the data set.
        """

    def survey(self, place: Place, *, deep: bool) -> Survey:
        """Count the existing files without decoding images. If ``deep``, all bytes may be read.

        Raises:
            DataError: If the files cannot be counted.
        """


@dataclass(frozen=True)
class KnownDataset:
    """A data set, as published by its authors.

    Attributes:
        name: Key in the catalogue.
        title: The data set's name in messages.
        sizes: Number of images by split (or by splits joined by ``+`` if only the sum is known).
        url: The data set's web page.
        how: How to get and unpack the data set.
        folders: The data set's usual folders below the folder of all data sets, as in torchvision
            and CoOp.
        reader: The files' reader. A TOML file names the reader as ``layout``.
        n_classes: Number of classes. None if there are captions.
        marks: Glob patterns for recognising the data set's folder. At least one pattern matches a
            file or folder there.
        licence: The licence's short name, or "see the site" if the licence is not simple.
        n_bytes: The download's approximate size in bytes. None if unknown.
        reference: Paper on the data set.
        archives: MD5 checksums of archives and files, as published by torchvision.
        coop_template: CoOp's prompt for this data set. None if CoOp has no prompt.
        official_sizes: The official splits' sizes, if ``sizes`` are for other splits.
        template: The prompt in ViLU's protocol.
    """

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
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

    def published_sizes(self, splits: Collection[str]) -> Mapping[str, int]:
        """Return these splits' published sizes, empty if no such splits were published."""
        for sizes in (self.sizes, self.official_sizes):
            # joined and split again, because a key may name several splits, such as "train+val"
            joined_splits = "+".join(sizes)
            published_splits = joined_splits.split("+")
            if set(published_splits) == set(splits):
                return sizes
        return {}


@dataclass(frozen=True)
class Place:
    """Where a data set is on a disk."""

    entry: KnownDataset  # the data set
    folder: Path  # the data set's folder. Keys are paths below this folder.
    # further folders that may have split lists: all folders above ``folder``, up to and including
    # the folder given by the user
    outer_folders: tuple[Path, ...]

    def find(self, *names: str) -> Path | None:
        """Return the first existing file with a name in ``names``. Return None if there is none.

        The search is in ``folder``, and then in ``outer_folders``. A link to nowhere is returned,
        too. Reading the link then reports the error.
        """
        for folder in (self.folder, *self.outer_folders):
            for name in names:
                path = folder / name
                if path.exists() or path.is_symlink():
                    return path
        return None

    def require(self, *names: str) -> Path:
        """Return the first existing file in ``names``. Raise DataError if there is no such file."""
        path = self.find(*names)
        if path is None:
            raise self.missing_error(*names)
        return path

    def missing_error(self, *names: str) -> DataError:
        """Return the error for missing files ``names``."""
        listed_names = " or ".join(names)
        return DataError(
            f"{self.entry.title} in {self.folder} has no {listed_names}, "
            "so nothing says which image is in which split. "
            f"{self.entry.how} ({self.entry.url})"
        )


def find_place(entry: KnownDataset, root: Path, *, named: bool) -> Place | None:
    """Find a data set below ``root``, or in ``root`` itself. Return None if not found.

    ``named`` is true if the user has named the data set. Then ``root`` itself may be the data set's
    folder, with any name. If ``named`` is false, ``root`` is taken for the data set's folder only
    if it has a usual name.
    """
    if not root.is_dir():
        raise UsageError(
            f"{root} is no folder. Give the folder that holds the data sets, or a data set's own."
        )
    with convert_os_errors(f"cannot look into {root}", hint="Check its permissions."):
        for parts in _candidate_paths(entry, root, named):
            folder = root.joinpath(*parts)
            if folder.is_dir() and _has_mark(folder, entry.marks):
                # the folders above ``folder``, from the nearest up to ``root``
                depths = reversed(range(len(parts)))
                outer_folders = tuple(root.joinpath(*parts[:depth]) for depth in depths)
                return Place(entry, folder, outer_folders)
    return None


def _has_mark(folder: Path, marks: Iterable[str]) -> bool:
    """Return whether a pattern in ``marks`` matches in the folder."""
    for mark in marks:
        first_match = next(folder.glob(mark), None)
        if first_match is not None:
            return True
    return False


def require_place(entry: KnownDataset, root: Path) -> Place:
    """Find a data set named by the user. Raise DataError with advice if not found."""
    place = find_place(entry, root, named=True)
    if place is not None:
        return place
    listed_folders = " or ".join(entry.folders)
    listed_marks = " or ".join(entry.marks)
    raise DataError(
        f"{entry.title} is not in {root}: there is no {listed_folders} "
        f"with {listed_marks} in it, nor is it that folder itself. "
        f"{entry.how} ({entry.url})"
    )


def _candidate_paths(entry: KnownDataset, root: Path, named: bool) -> Iterator[tuple[str, ...]]:
    """Yield a data set's possible paths below ``root``. A path is a tuple of names.

    1. The entry's folders, such as ("coop", "dtd", "images").
    2. The rest of such a path, because ``root`` may be a folder on the path, such as "coop/dtd". If
       ``named`` is False, ``root`` must then end with the path's beginning.
    """
    paths = [PurePosixPath(folder).parts for folder in entry.folders]
    yield from paths
    root_parts = root.absolute().parts
    for parts in paths:
        for depth in range(1, len(parts) + 1):
            root_ends_with_path = root_parts[-depth:] == parts[:depth]
            if named or root_ends_with_path:
                yield parts[depth:]

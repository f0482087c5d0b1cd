"""Reads the lists of known data sets: every split's images, and the classes."""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from os import stat_result
from pathlib import Path, PurePosixPath
from stat import S_ISREG
from typing import Final, NoReturn, TypeVar

from vilu.artifacts.documents import object_of_distinct_keys
from vilu.datasets.base import parse_split
from vilu.datasets.classes import class_table, clean_name
from vilu.datasets.files import (
    ListingHash,
    is_relative_without_dotdot,
    portable_name,
    read_file,
    status_below,
)
from vilu.datasets.folder import ListedFiles
from vilu.datasets.known.entry import MAX_MISSING_NAMES, Count, Place, Request, Survey
from vilu.errors import DataError
from vilu.progress import Task, track

ListedImage = tuple[str, int, stat_result | OSError | None]
"""Path below the data set's folder, label, and file status.

The status is None if the file is missing, and the error if the file cannot be accessed.
"""

PROGRESS_STEP: Final = 1000  # number of images between two updates of the progress display


@dataclass(frozen=True)
class Listing:
    """The classes and images that a data set lists."""

    classes: tuple[str, ...]  # class names in files or lists, in label order
    # Images by split. An iteration may list folders, and raises a DataError on failure.
    splits: Mapping[str, Iterable[ListedImage]]
    origin: str  # text that says where the splits come from
    # cleaned class names for prompts, or None for ``classes`` with spaces in place of underscores
    names: tuple[str, ...] | None = None
    # uncleaned class names for prompts, or None for ``classes``
    uncleaned_names: tuple[str, ...] | None = None
    binding: bool = True  # whether the splits must have the published sizes


@dataclass(frozen=True)
class ListReader:
    """A reader that gets a data set's list of images from the function ``read``."""

    read: Callable[[Place], Listing]

    def open(self, place: Place, request: Request) -> ListedDataset:
        """Open the images in the requested splits."""
        listing = self.read(place)
        return ListedDataset(place, listing, request)

    def survey(self, place: Place, *, deep: bool) -> Survey:  # noqa: ARG002
        """Count listed files and existing files. ``deep`` changes nothing here."""
        listing = self.read(place)
        n_images = sum(place.entry.sizes.values())
        with track(f"checking {place.entry.name}", n_images, "images") as task:
            counts = {name: _count(entries, task) for name, entries in listing.splits.items()}
        return Survey(listing.origin, counts, listing.binding)


@dataclass(frozen=True)
class PathList:
    """A list's images, sorted by path. So the list's order does not matter.

    An iteration calls stat once per image.
    """

    folder: Path  # the data set's folder
    entries: Iterable[tuple[str, int]]  # paths below ``folder``, with labels

    def __iter__(self) -> Iterator[ListedImage]:
        for path, label in sorted(self.entries):
            yield path, label, status_below(self.folder, path)


class ListedDataset(ListedFiles):
    """A data set with listed images.

    If a listed file is missing, the row has a read error. Keys are paths below the data set's
    folder. All splits have the same class table.
    """

    def __init__(self, place: Place, listing: Listing, request: Request) -> None:
        super().__init__(place.folder)
        self.source = f"{place.folder} ({listing.origin})"
        self.captioned = False
        names = listing.names
        if request.raw_names:
            names = listing.uncleaned_names or listing.classes
        self.classes = class_table(
            listing.classes,
            request.classes,
            numeric_labels=True,
            names=names,
            outside=request.outside,
        )
        self.class_names: tuple[str, ...] | None = self.classes.names
        splits = tuple(listing.splits)
        if request.split is not None:
            splits = parse_split(request.split, splits, self.source)
        listing_hash = ListingHash(*listing.classes, *splits)
        with track(f"listing {place.entry.name}", total=None, unit="images") as task:
            counts = {
                split: self._add_split(listing.splits[split], listing_hash, task)
                for split in splits
            }
        empty_splits = [split for split, count in counts.items() if count == 0]
        # without a requested split, all splits are taken, and some may be empty
        is_requested_split_empty = request.split is not None and len(empty_splits) > 0
        if not self._paths or is_requested_split_empty:
            raise DataError(
                f"split {empty_splits[0]!r} of {self.source} has no image. "
                "Choose another, or mend its list."
            )
        self.fingerprint = listing_hash.hexdigest()

    def _add_split(
        self, entries: Iterable[ListedImage], listing_hash: ListingHash, task: Task
    ) -> int:
        """Add a split's images and return the image count."""
        n_before = len(self)
        for path, label, status in _with_progress(entries, task):
            self._add(path, label, status, listing_hash)
        return len(self) - n_before


def _count(entries: Iterable[ListedImage], task: Task) -> Count:
    """Count a split's files: all listed files, and all existing listed files."""
    n_existing = 0
    n_listed = 0
    missing: list[str] = []
    try:
        for path, _, status in _with_progress(entries, task):
            n_listed += 1
            is_file = isinstance(status, stat_result) and S_ISREG(status.st_mode)
            if is_file:
                n_existing += 1
            elif len(missing) < MAX_MISSING_NAMES:
                name = portable_name(path)
                missing.append(name)
    except DataError as error:  # not raised, because the next split is counted, too
        return Count(found=n_existing, listed=None, problem=str(error))
    return Count(found=n_existing, listed=n_listed, missing=tuple(missing))


def _with_progress(entries: Iterable[ListedImage], task: Task) -> Iterator[ListedImage]:
    """Yield the entries unchanged, and advance the task after every ``PROGRESS_STEP`` entries."""
    number = 0
    for number, entry in enumerate(entries, start=1):
        yield entry
        if number % PROGRESS_STEP == 0:
            task.advance(PROGRESS_STEP)
    task.advance(number % PROGRESS_STEP)  # the entries after the last full step


MAX_PATH: Final = 1024  # maximum number of characters in a listed path
T = TypeVar("T")
ParseEntry = Callable[[T], tuple[str, int]]
"""Function from a list's entry to the path and the label.

The function raises a ValueError for a wrong entry.
"""


@dataclass
class SplitLists:
    """Lists of paths and labels by split.

    No path occurs twice, and every label 0 ... K-1 has a name.
    """

    # maps a split to the images' paths and labels
    splits: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    _names: dict[int, str] = field(default_factory=dict)  # name by label
    _labels: dict[str, int] = field(default_factory=dict)  # label by name
    _added_paths: set[str] = field(default_factory=set)  # paths in all splits

    def add(self, split: str, path: str, label: int) -> None:
        """Add an image. Raise a ValueError for an unusable path, or for an already added path."""
        if not is_usable(path):
            raise ValueError(
                f"the path {path[:80]!r} must be relative, plain, and stay below its folder"
            )
        if path in self._added_paths:
            raise ValueError(f"{path!r} is listed more than once")
        self._added_paths.add(path)
        self.splits[split].append((path, label))

    def fill(self, split: str, file: Path, entries: Iterable[T], parse: ParseEntry[T]) -> None:
        """Add all entries in a file. A DataError names the number of an invalid entry."""
        for number, entry in enumerate(entries, start=1):
            try:
                path, label = parse(entry)
                self.add(split, path, label)
            except ValueError as error:
                refuse(f"{file}, {split} entry {number} (counting from 1)", error)

    @classmethod
    def of(cls, splits: Iterable[str], names: Iterable[str], file: Path) -> SplitLists:
        """Make lists with these splits and class names, but without images.

        ``file`` is the file with the class names. Errors name this file.
        """
        lists = cls({split: [] for split in splits})
        try:
            for label, name in enumerate(names):
                lists.add_name(label, name)
            lists.names_in_label_order()  # raises a ValueError if there is no name
        except ValueError as error:
            refuse(file, error)
        return lists

    def label_of(self, name: str) -> int:
        """Return a class's label. Raise a ValueError for an unknown name."""
        if name not in self._labels:
            raise ValueError(f"{name[:80]!r} is none of the {len(self._labels)} classes")
        return self._labels[name]

    def add_name(self, label: int, name: str) -> None:
        """Name the class with this label.

        Raises:
            ValueError: If the name is not printable, if the label has another name already, or if
                another label has this name.
        """
        if not name.strip() or not name.isprintable():
            raise ValueError(f"the class name {name[:80]!r} must be text")
        # ``setdefault`` returns an earlier value if there is one, else stores and returns the new
        # value
        if self._names.setdefault(label, name) != name:
            raise ValueError(f"label {label} is {name!r} here and {self._names[label]!r} before")
        if self._labels.setdefault(name, label) != label:
            raise ValueError(
                f"{name!r} is label {label} here and label {self._labels[name]} before"
            )

    def names_in_label_order(self) -> tuple[str, ...]:
        """Return the names in label order.

        Raise a ValueError if there is no name, or if the named labels are not 0 to K - 1.
        """
        if not self._names:
            raise ValueError("it names no class")
        names = []
        for label in range(len(self._names)):
            if label not in self._names:
                raise ValueError(
                    "labels must be 0 to K - 1, each with images; "
                    f"{label} has none. Number them again"
                )
            names.append(self._names[label])
        return tuple(names)

    def listing(self, folder: Path, images: str, origin: str, *, binding: bool) -> Listing:
        """Make a listing from these lists. The paths are relative to the subfolder ``images``."""
        names = self.names_in_label_order()
        prefix = f"{images}/" if images else ""
        splits = {}
        for split, entries in self.splits.items():
            paths = [(prefix + path, label) for path, label in entries]
            splits[split] = PathList(folder, paths)
        return Listing(names, splits, origin, binding=binding)


def is_usable(path: str) -> bool:
    """Return whether a path is short, printable, relative, normal, and below the base folder."""
    if len(path) > MAX_PATH or not path.isprintable() or "\\" in path:
        return False
    is_normal = str(PurePosixPath(path)) == path
    return is_normal and is_relative_without_dotdot(path)


def read_json_object(file: Path) -> dict[str, object]:
    """Read the object in a JSON file. A repeated key is an error."""
    try:
        content = json.loads(read_file(file), object_pairs_hook=object_of_distinct_keys)
    except (OSError, ValueError, RecursionError) as error:
        refuse(file, f"cannot be read as JSON: {error}")
    if not isinstance(content, dict):
        refuse(file, f"expected an object of lists; found {type(content).__name__}")
    return content


def read_lines(file: Path) -> Iterator[str]:
    """Read a text file's stripped lines, without blank lines."""
    try:
        content = read_file(file)
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        refuse(file, error)
    lines = [line.strip() for line in text.splitlines()]
    return (line for line in lines if line)


def refuse(where: object, reason: object) -> NoReturn:
    """Raise a DataError that says what is wrong with a list."""
    raise DataError(f"{where}: {reason}. Mend it or get it again.")


COOP_ASSET: Final = "coop_splits.txt.xz"
SPLITS: Final = ("train", "validation", "test")
SPLIT_OF_KEY: Final = {"train": "train", "val": "validation", "test": "test"}
"""Maps a key in a ``split_zhou_*.json`` to our name for the split."""

SPLIT_OF_LETTER: Final = {"t": "train", "v": "validation", "e": "test"}
"""Maps a letter in the shipped lists (``COOP_ASSET``) to our name for the split."""


def user_listing_of(place: Place, file: str, images: str) -> Listing | None:
    """Make the listing from the user's ``split_zhou_*.json``. Return None if there is none."""
    path = place.find(file)
    if path is None:
        return None
    lists = read_split_file(path)
    try:
        return lists.listing(place.folder, images, f"{file} of the user", binding=False)
    except ValueError as error:
        refuse(path, error)


def read_split_file(file: Path) -> SplitLists:
    """Read the lists in a ``split_zhou_*.json``.

    The file has ``{"train": [[path, label, class name], ...], "val": ..., "test": ...}``.
    """
    lists = SplitLists({split: [] for split in SPLITS})

    def parse(entry: object) -> tuple[str, int]:
        """Return the path and the label, and add the name to ``lists``."""
        match entry:
            case [str(path), int(label), str(name)] if not isinstance(label, bool) and label >= 0:
                lists.add_name(label, name)
                return path, label
        raise ValueError(f"expected [relative path, class index, class name]; found {entry!r:.80}")

    content = read_json_object(file)
    for key, entries in content.items():
        if key not in SPLIT_OF_KEY or not isinstance(entries, list):
            kind = type(entries).__name__
            refuse(file, f"expected lists named train, val and test; found {key[:20]!r}: {kind}")
        lists.fill(SPLIT_OF_KEY[key], file, entries, parse)
    return lists


@cache
def shipped_lists_of(dataset: str) -> SplitLists | None:
    """Read the shipped CoOp list for the data set with this name. Return None if there is none.

    ``tools/make_split_asset.py`` made the asset. Every data set has a line with the name and the
    number of classes, and then for every class:

    - a line with the class name,
    - a line with a letter for every image in the class (t, v, e: train, validation, test),
    - a line with the path for every image.
    """
    lines = _coop_lines()
    for head in lines:
        name, n_classes = head.split("\t")
        lists = SplitLists({split: [] for split in SPLITS})
        for label in range(int(n_classes)):
            class_name = next(lines)
            letters = next(lines)
            # Take one line for every letter. The zip must end with the letters: with strict=True,
            # it would take one more line, to see whether the lines end, too.
            images = list(zip(letters, lines, strict=False))
            if name == dataset:
                lists.add_name(label, class_name)
                for letter, path in images:
                    lists.add(SPLIT_OF_LETTER[letter], path, label)
        if name == dataset:
            return lists
    return None


def _coop_lines() -> Iterator[str]:
    """Read the lines in the shipped CoOp lists."""
    file = resources.files("vilu_bench").joinpath("assets", COOP_ASSET)
    compressed = file.read_bytes()
    content = lzma.decompress(compressed)
    return iter(content.decode().splitlines())


@dataclass(frozen=True)
class CoopListing:
    """Reads CoOp's list: the user's own list, or else the shipped list."""

    file: str  # file name of the user's list
    # subfolder that the list's paths are relative to, or "" for the data set's folder
    images: str = ""

    def __call__(self, place: Place) -> Listing:
        """Make the listing from the user's list or the shipped list."""
        user_listing = user_listing_of(place, self.file, self.images)
        if user_listing is not None:
            return user_listing
        lists = shipped_lists_of(place.entry.name)
        if lists is None:
            raise place.missing_error(self.file)
        return lists.listing(place.folder, self.images, "CoOp list shipped with vilu", binding=True)


def fgvc_aircraft(place: Place) -> Listing:
    """List FGVC Aircraft: 100 variants, with official training, validation and test images."""
    variants = place.require("variants.txt")
    keys = {"train": "train", "validation": "val", "test": "test"}
    files = {split: place.require(f"images_variant_{key}.txt") for split, key in keys.items()}
    names = read_lines(variants)
    lists = SplitLists.of(files, names, variants)

    def parse(line: str) -> tuple[str, int]:
        # a line is an image number, a space, and the variant
        number, _, variant = line.partition(" ")
        return f"{number}.jpg", lists.label_of(variant)

    entries = {file: (split, read_lines(file)) for split, file in files.items()}
    return _official_listing(place, lists, images="images", entries=entries, parse=parse)


def food101(place: Place) -> Listing:
    """List Food-101: 101 dishes, by the user's CoOp list, else by the official split.

    The official split has no validation images.
    """
    user_listing = user_listing_of(place, "split_zhou_Food101.json", images="images")
    if user_listing is not None:
        return user_listing
    files = {split: place.require(f"meta/{split}.json") for split in ("train", "test")}
    content = {split: read_json_object(file) for split, file in files.items()}
    dishes = sorted(set().union(*content.values()))  # both files have the dishes as keys
    lists = SplitLists.of(files, dishes, files["train"])

    def parse(entry: tuple[str, object]) -> tuple[str, int]:
        name, path = entry
        if not isinstance(path, str):
            # must be a ValueError, because ``SplitLists.fill`` reports the entry's number
            raise ValueError(f"expected a path below images/; found {path!r:.80}")  # noqa: TRY004
        return f"{path}.jpg", lists.label_of(name)

    entries = {
        file: (split, _class_and_path_pairs(content[split], file)) for split, file in files.items()
    }
    return _official_listing(place, lists, images="images", entries=entries, parse=parse)


def sun397(place: Place) -> Listing:
    """List SUN397: 397 scenes, by the user's CoOp list, else by the first official partition.

    The official partition has no validation images.
    """
    user_listing = user_listing_of(place, "split_zhou_SUN397.json", images="")
    if user_listing is not None:
        return user_listing
    file_names = {"train": "Training_01.txt", "test": "Testing_01.txt"}
    files = {split: place.require(name, f"Partitions/{name}") for split, name in file_names.items()}
    scenes = place.require("ClassName.txt", "Partitions/ClassName.txt")
    scene_names = read_lines(scenes)
    lists = SplitLists.of(files, scene_names, scenes)

    def parse(line: str) -> tuple[str, int]:
        class_name, _, _ = line.rpartition("/")  # a line is the class name, "/" and a file name
        return line.removeprefix("/"), lists.label_of(class_name)

    entries = {file: (split, read_lines(file)) for split, file in files.items()}
    listing = _official_listing(place, lists, images="", entries=entries, parse=parse)
    classes = []
    names = []
    for path in listing.classes:  # such as /a/apartment_building/outdoor
        below_letter = path.split("/")[2:]  # without the empty first part and the letter
        classes.append("/".join(below_letter))
        words = " ".join(reversed(below_letter))  # such as "outdoor apartment_building"
        names.append(clean_name(words))
    return replace(listing, classes=tuple(classes), names=tuple(names))


def _official_listing(
    place: Place,
    lists: SplitLists,
    images: str,
    entries: Mapping[Path, tuple[str, Iterable[T]]],
    parse: ParseEntry[T],
) -> Listing:
    """List a data set from the files that the authors published.

    Args:
        place: The data set on this disk.
        lists: The lists to fill, already with all splits and class names.
        images: Subfolder that the paths are relative to, or "" for the data set's folder.
        entries: Maps each file to a split, and to the file's entries.
        parse: Function from an entry to the path and the label.
    """
    for file, (split, lines) in entries.items():
        lists.fill(split, file, lines, parse)
    return lists.listing(place.folder, images, "official split", binding=True)


def _class_and_path_pairs(content: dict[str, object], file: Path) -> Iterator[tuple[str, object]]:
    """Yield pairs of class and path from ``content`` (paths by class)."""
    for name, paths in content.items():
        if not isinstance(paths, list):
            raise DataError(
                f"{file}: expected a list of paths per class; "
                f"{name[:80]!r} has {type(paths).__name__}."
            )
        for path in paths:
            yield name, path

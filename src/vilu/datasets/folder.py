"""Image folders: with one sub-folder per class, or flat and without labels."""

from __future__ import annotations

import errno
import logging
import os
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from vilu.datasets.base import Faults, ImageRecord, find_fault, parse_split
from vilu.datasets.classes import ClassTable, class_table
from vilu.datasets.files import (
    AllowedFolders,
    ForbiddenPathError,
    ListingHash,
    portable_name,
    read_below,
    read_file,
    subfolders,
    walk_images,
)
from vilu.errors import UNKNOWN, DataError, UsageError
from vilu.progress import Task, track
from vilu.text import plural

logger = logging.getLogger(__name__)

SPLIT_FOLDERS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})
LINK_RULE = (
    "A link may lead to a file below the folder of images, or below the folder of --root DIR. "
    "With --follow-links it may lead anywhere."
)


class ListedFiles:
    """Files below a folder with their labels, in insertion order.

    A file's key is the path below the folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._paths: list[str] = []
        self._labels = array("i")
        self._faults = array("B")  # fault for each file, from ``find_fault``

    @property
    def faults(self) -> Faults:
        """The faults known without reading the files."""
        faults = np.empty(0, np.uint8)
        if self._faults:  # NumPy refuses an empty buffer
            faults = np.frombuffer(self._faults, dtype=np.uint8)
        return Faults(
            kinds=faults,
            folder=self._folder,
            path_at=self._paths.__getitem__,
            location_rule=_location_rule,
        )

    def __len__(self) -> int:
        return len(self._paths)

    def records(self, start: int, stop: int) -> Iterator[ImageRecord]:
        """Yield the images at positions start ... stop - 1."""
        for path, number in zip(self._paths[start:stop], self._labels[start:stop], strict=True):
            label: int | None = number
            if number == UNKNOWN:
                label = None
            key = portable_name(path)
            read = self._make_reader(path)
            yield ImageRecord(key, label, read)

    def _make_reader(self, path: str) -> Callable[[], bytes]:
        """Return a function that reads the file ``path``."""
        return partial(read_below, self._folder, path)

    def _add(
        self,
        path: str,
        label: int,
        status: os.stat_result | OSError | None,
        listing_hash: ListingHash,
    ) -> None:
        """Add a file to the list and to the listing's hash."""
        self._paths.append(path)
        self._labels.append(label)
        get_full_path = partial(os.path.join, self._folder, path)
        fault = find_fault(status, get_full_path)
        self._faults.append(fault)
        listing_hash.add(path, label, status)


def _location_rule(_positions: NDArray[np.int64]) -> str:
    """Return a sentence on where files are allowed, independent of the positions."""
    return LINK_RULE


class FolderDataset(ListedFiles):
    """Images below a folder: ``class/**/image``, ``split/class/**/image``, or ``image``.

    A label is a class folder's index among all splits' class folders, sorted by bytes. If there are
    no class folders, images directly in the folder have no labels. Images are sorted by path bytes.
    The listing needs a call to ``stat`` and about a hundred bytes per image.

    Args:
        root: The folder.
        split: Split folder names, joined by ``+``. None if there are no split folders.
        classes: A classes file. The names in the file are matched with the class folders.
        link_folder: A second allowed folder for link targets, besides ``root``. Reading a link to a
            file outside both folders raises ForbiddenPathError.
        outside: Classes that may be missing in the classes file, because these classes will be left
            out.
        follow_links: Whether links may lead anywhere, also to folders.

    Attributes:
        listed_folders: The folder, or its split folders. In these folders, each new sub-folder
            would be a class in the next listing.
        ignored_counts: Maps a reason to the number of files and folders skipped for this reason.
            The reasons are those in ``files.walk_images``, and "outside_class" for images outside
            the class folders.
    """

    def __init__(
        self,
        root: Path,
        *,
        split: str | None = None,
        classes: Path | None = None,
        link_folder: Path | None = None,
        outside: Collection[str] = (),
        follow_links: bool = False,
    ) -> None:
        super().__init__(root)
        self._allowed_folders = AllowedFolders(
            root, link_folder=link_folder, follow_links=follow_links
        )
        self.source = str(root)
        self.captioned = False
        self.ignored_counts: Counter[str] = Counter()
        chosen_splits, all_splits = _split_folders(root, split)
        self.listed_folders: tuple[Path, ...] = (root,)
        if split is not None:
            # a usual split folder that is made later is listed, too
            self.listed_folders = tuple(root / name for name in SPLIT_FOLDERS.union(all_splits))
        folders = _class_folders(root, all_splits, follow_links=follow_links)
        self.classes: ClassTable | None = class_table(folders or None, classes, outside=outside)
        self.class_names: tuple[str, ...] | None = None
        if self.classes is not None:
            self.class_names = self.classes.names
        self.fingerprint = self._list_splits(chosen_splits, folders)
        n_beside_folders = self.ignored_counts["outside_class"]
        if not self._paths and n_beside_folders:
            raise DataError(
                f"{root} has {plural(n_beside_folders, 'image')} beside the sub-folder "
                f"{folders[0]!r}. So its sub-folders are classes, and no image was found in them. "
                "Move the sub-folders away, or the images into sub-folders. "
                f"Found: {_list_counts(self.ignored_counts)}."
            )
        if not self._paths:
            _refuse_empty(
                self.ignored_counts, root, expected="images, or one folder of images per class"
            )
        _warn_of_ignored(self.ignored_counts, root)

    def _make_reader(self, path: str) -> Callable[[], bytes]:
        return partial(self._read, path)

    def _read(self, path: str) -> bytes:
        """Return the bytes in the file ``path``. Raise ForbiddenPathError for a forbidden link."""
        # the path is joined as listed: Path could change a name that is special on Windows
        full_path = os.path.join(self._folder, path)  # noqa: PTH118
        if self._allowed_folders.is_forbidden_link(full_path):
            raise ForbiddenPathError(errno.EACCES, LINK_RULE, path)
        return read_file(full_path)

    def _list_splits(self, splits: Sequence[str], class_folders: Sequence[str]) -> str:
        """Add the images in some split folders, and return the listing's hash."""
        listing_hash = ListingHash(*class_folders)
        label_of = {name: label for label, name in enumerate(class_folders)}
        with track(f"listing {self._folder.name}", total=None, unit="images") as task:
            for split in splits:
                self._list_split(split, label_of, listing_hash, task)
        return listing_hash.hexdigest()

    def _list_split(
        self, name: str, label_of: dict[str, int], listing_hash: ListingHash, task: Task
    ) -> None:
        """Add the images in the split folder ``name``. "" is the data set's folder.

        ``label_of`` maps each class folder to a label.
        """
        folder = self._folder / name
        class_folders = subfolders(folder, follow_links=self._allowed_folders.follow_links)
        has_class_folders = len(class_folders) > 0
        for path_in_split, status in walk_images(
            folder, self.ignored_counts, self._allowed_folders
        ):
            class_folder, slash, _ = path_in_split.partition("/")
            is_in_class_folder = slash != ""
            if has_class_folders and not is_in_class_folder:
                self.ignored_counts["outside_class"] += 1
                continue
            path = f"{name}/{path_in_split}" if name else path_in_split
            label = label_of[class_folder] if is_in_class_folder else UNKNOWN
            self._add(path, label, status, listing_hash)
            task.advance(1)


ListedPhoto = tuple[str, os.stat_result | OSError]
"""An image's path below a folder, with the file's status or the system call's error."""


def list_photos(
    root: Path, *, min_photos: int = 1, follow_links: bool = False
) -> list[ListedPhoto]:
    """Return all images below a folder, at any depth, sorted by path bytes.

    Sub-folders are not read as classes or splits. With ``follow_links``, links may lead anywhere.

    Raises:
        UsageError: If ``root`` is not a folder.
        DataError: If there are fewer than ``min_photos`` images.
        StorageError: If a folder cannot be listed.
    """
    if not root.is_dir():
        raise UsageError(f"{root} is no folder. Give the folder that the photos are in.")
    ignored_counts: Counter[str] = Counter()
    allowed_folders = AllowedFolders(root, follow_links=follow_links)
    with track(f"listing {root.name}", total=None, unit="images") as task:
        photos: list[ListedPhoto] = []
        for path, status in walk_images(root, ignored_counts, allowed_folders):
            photos.append((path, status))
            task.advance(1)
    if len(photos) < min_photos:
        _refuse_empty(ignored_counts, root, expected="photos, in folders of any kind")
    _warn_of_ignored(ignored_counts, root)
    return photos


def _refuse_empty(ignored_counts: Counter[str], root: Path, *, expected: str) -> NoReturn:
    """Raise DataError for a folder without images. The message lists what the folder has."""
    contents = _list_counts(ignored_counts) or "nothing"
    raise DataError(f"no image in {root}. Found: {contents}. Expected {expected}.")


def _warn_of_ignored(ignored_counts: Counter[str], root: Path) -> None:
    """Warn if entries were skipped that the user may expect in the data set."""
    unexpected_reasons = ignored_counts.keys() - {"hidden", "not_image"}
    if not unexpected_reasons:
        return
    advice = ""
    if ignored_counts["linked_folder"]:
        advice = " Give --follow-links to read what links lead to."
    if ignored_counts["outside_class"]:
        advice = f"{advice} Put images into class folders."
    if ignored_counts["not_a_file"]:
        advice = f"{advice} not_a_file: a link to nothing, a pipe or a device."
    listed_counts = _list_counts(ignored_counts)
    logger.warning("%s: left out %s.%s", root, listed_counts, advice)


def _list_counts(ignored_counts: Counter[str]) -> str:
    """Return a text with the number of skipped entries for each reason."""
    return ", ".join(f"{count} {reason}" for reason, count in ignored_counts.items())


class PhotoFiles(ListedFiles):
    """Some photos from a folder, without labels.

    Args:
        root: The folder.
        photos: The photos' paths below the folder, each with the file's status.
        names: The data set's class names.
        moved_paths: New path of each photo moved since the listing. A photo's key is
            ``portable_name`` of the listed path.
        follow_links: Whether links may lead anywhere, also to folders.
    """

    def __init__(
        self,
        root: Path,
        photos: Sequence[ListedPhoto],
        names: Sequence[str],
        moved_paths: Mapping[str, Path] | None = None,
        *,
        follow_links: bool = False,
    ) -> None:
        super().__init__(root)
        self._moved_paths = moved_paths or {}
        self._allowed_folders = AllowedFolders(root, follow_links=follow_links)
        self.source = str(root)
        self.captioned = False
        self.class_names: tuple[str, ...] | None = tuple(names)
        listing_hash = ListingHash()
        for path, status in photos:
            self._add(path, UNKNOWN, status, listing_hash)
        self.fingerprint = listing_hash.hexdigest()

    def _make_reader(self, path: str) -> Callable[[], bytes]:
        key = portable_name(path)
        new_path = self._moved_paths.get(key)
        if new_path is None:
            return partial(self._allowed_folders.read, path)
        return partial(read_file, new_path)


def _class_folders(root: Path, splits: Sequence[str], *, follow_links: bool) -> list[str]:
    """Return the class folder names in all split folders, sorted by bytes."""
    names: set[str] = set()
    for split in splits:
        class_folders = subfolders(root / split, follow_links=follow_links)
        names.update(class_folders)
    return sorted(names, key=_as_bytes)


def _as_bytes(name: str) -> bytes:
    """Return a name as bytes, for sorting folders."""
    return name.encode("utf-8", "surrogateescape")


def _split_folders(root: Path, split: str | None) -> tuple[Sequence[str], Sequence[str]]:
    """Return the chosen split folders, and all split folders.

    Images are listed from the chosen split folders. All split folders are needed, because a class
    folder may be missing in some splits. If ``split`` is None, both results are [""]: ``root``
    itself.
    """
    folders = subfolders(root)
    if split is None:
        _require_no_splits(root, folders)
        return [""], [""]
    chosen_splits = parse_split(split, folders, str(root))
    usual_split_folders = SPLIT_FOLDERS.intersection(folders)
    return chosen_splits, sorted(usual_split_folders.union(chosen_splits))


def _require_no_splits(root: Path, folders: Sequence[str]) -> None:
    """Raise UsageError if all sub-folders in ``root`` have split names.

    This function is called if the user has chosen no split.
    """
    are_all_splits = SPLIT_FOLDERS.issuperset(folders)
    if not folders or not are_all_splits:
        return
    options = f"--split {folders[0]}"
    if len(folders) > 1:
        options = f"--split {folders[0]}, or --split {'+'.join(folders)}"
    listed_folders = ", ".join(folders)
    raise UsageError(f"{root} holds splits, not classes: {listed_folders}. Choose with {options}.")

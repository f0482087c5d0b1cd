"""Layouts of known data sets that need code of their own."""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from hashlib import blake2b
from importlib import resources
from itertools import islice
from os import stat_result
from pathlib import Path
from typing import Final

from vilu.artifacts.documents import fill
from vilu.datasets.files import portable_name, subfolders, walk_images
from vilu.datasets.known.entry import SHOWN, Count, Place, Reader, Request, Survey
from vilu.datasets.tar import CAPTION, MAX_SHARDS, TarShards, find_shards, list_samples
from vilu.errors import DataError, UsageError
from vilu.progress import track
from vilu_bench import asset
from vilu_bench.known_datasets.cifar import CIFAR10, CIFAR100, CifarDataset, Layout
from vilu_bench.known_datasets.read import (
    CoopListing,
    Entry,
    Listing,
    ListReader,
    fgvc_aircraft,
    food101,
    sun397,
)

Files = Sequence[tuple[str, stat_result | OSError]]
"""Paths of one class's images below the class's folder, and their status, or why there is none."""

RENAMED: Final = {744: "projectile", 836: "sunglass"}
"""CLIP names classes 657 and 744 "missile", 836 and 837 "sunglasses"; of equal prompts one can never be the answer.
These are the first words of WordNet's synsets n04008634 and n04355933.
"""

UNPACK: Final = "Unpack the archive of each class into a folder of its name."
SORT: Final = (
    "ImageNet's archive of validation images is flat, and only its devkit says what they show: "
    "torchvision.datasets.ImageNet(FOLDER, 'val') sorts them, given ILSVRC2012_img_val.tar and "
    "ILSVRC2012_devkit_t12.tar.gz in FOLDER."
)


@dataclass(frozen=True)
class ClassFolders:
    """Images in folders of classes; iterating lists them, class by class."""

    root: Path  # the data set's folder
    part: str  # the folder below it that holds the classes; "" for itself
    labels: Mapping[str, int]  # labels by name of class folder
    # which of a class's images are taken, given the class folder and its images
    choose: Callable[[str, Files], Files] = lambda _, files: files
    flat: str = UNPACK  # what to do where the images lie there without class folders

    def __iter__(self) -> Iterator[Entry]:
        folder = self.root / self.part
        prefix = f"{self.part}/" if self.part else ""
        for name in self._classes(folder):
            for path, status in self.choose(name, list(walk_images(folder / name, Counter()))):
                yield f"{prefix}{name}/{path}", self.labels[name], status

    def _classes(self, folder: Path) -> list[str]:
        """Class folders in label order."""
        if not folder.is_dir():
            raise DataError(f"{folder} is missing. Unpack it there, or choose another split.")
        names = subfolders(folder)
        unknown = next((name for name in names if name not in self.labels), None)
        if unknown is not None:
            raise DataError(
                f"{folder / portable_name(unknown)} is no class: expected the {len(self.labels)} folders "
                f"{next(iter(self.labels))}, ... Move it out."
            )
        if not names:
            flat = next(walk_images(folder, Counter()), None)
            found = (
                "nothing"
                if flat is None
                else f"images without class folders ({portable_name(flat[0])}, ...)"
            )
            raise DataError(f"{folder} holds {found}; expected a folder per class. {self.flat}")
        return sorted(names, key=self.labels.__getitem__)


@dataclass(frozen=True)
class SplitFolders:
    """A folder per split and in it one per class, whose labels follow their names, sorted by bytes, over all splits."""

    # folder by split, "" for the data set's own; empty where splits are called as their folders
    splits: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, place: Place) -> Listing:
        """The images of all splits."""
        parts = self.splits or {split: split for split in place.entry.sizes}
        folders = [place.folder / part for part in parts.values()]
        found = {name for folder in folders if folder.is_dir() for name in subfolders(folder)}
        names = tuple(sorted(found, key=os.fsencode))
        if not names:
            raise DataError(
                f"{place.folder} has no folder of a class in {' or '.join(map(str, folders))}. {UNPACK}"
            )
        labels = {name: label for label, name in enumerate(names)}
        splits = {split: ClassFolders(place.folder, part, labels) for split, part in parts.items()}
        return Listing(names, splits, "a folder per class")


def imagenet(place: Place) -> Listing:
    """Training and validation images by wnid; as in CoOp, the validation images are the test split."""
    labels = {wnid: label for label, wnid in enumerate(wnids())}
    splits = {
        "train": ClassFolders(place.folder, "train", labels),
        "test": ClassFolders(place.folder, "val", labels, flat=SORT),
    }
    return _listing(wnids(), splits, "official split, its validation images as test")


def imagenet_v2(place: Place) -> Listing:
    """Ten test images per class, in folders named by the class's number."""
    return _halves(place, tuple(map(str, range(len(wnids())))))


def imagenet_sketch(place: Place) -> Listing:
    """About fifty sketches per class, in folders named by wnid."""
    return _halves(place, wnids())


def half(name: str, files: Files, *, first: bool) -> Files:
    """The images of a class that come first, or last, by the hash of their path; of an odd number more are last.

    Which images the paper's few shots were is not known. The hash is BLAKE2b (8 bytes) of
    ``class/path``, so that no half depends on the order of files, on the machine, or on what other
    classes hold.
    """
    keys = [
        blake2b(f"{name}/{path}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
        for path, _ in files
    ]
    order = sorted(range(len(files)), key=keys.__getitem__)
    middle = len(files) // 2
    return [files[number] for number in sorted(order[:middle] if first else order[middle:])]


@cache
def wnids() -> tuple[str, ...]:
    """WordNet ids of the 1,000 classes in label order, which is their own."""
    return tuple(asset("imagenet_wnids.txt").split())


@cache
def clip_names() -> tuple[str, ...]:
    """CLIP's names of the 1,000 classes, in label order, but for the two of ``RENAMED``."""
    file = resources.files("vilu").joinpath("assets", "imagenet_class_names.json")
    names: list[str] = json.loads(file.read_text(encoding="utf-8"))
    return tuple(RENAMED.get(label, name) for label, name in enumerate(names))


def _halves(place: Place, folders: tuple[str, ...]) -> Listing:
    labels = {name: label for label, name in enumerate(folders)}
    splits = {
        split: ClassFolders(place.folder, "", labels, partial(half, first=first))
        for split, first in (("shots", True), ("test", False))
    }
    return _listing(folders, splits, "halves of each class by the hash of the path")


def _listing(folders: tuple[str, ...], splits: Mapping[str, ClassFolders], origin: str) -> Listing:
    return Listing(folders, splits, origin, names=clip_names(), raw=clip_names())


@dataclass(frozen=True)
class CifarReader:
    """CIFAR-10 or CIFAR-100, read without running its pickles."""

    layout: Layout

    def open(self, place: Place, request: Request) -> CifarDataset:
        """The pictures of the splits asked for."""
        dataset = CifarDataset(
            place.folder,
            self.layout,
            split=request.split,
            classes=request.classes,
            raw_names=request.raw_names,
            outside=request.outside,
        )
        dataset.source = f"{place.folder} (official split)"
        return dataset

    def survey(self, place: Place, *, deep: bool) -> Survey:  # noqa: ARG002 - its files are small: always read
        """Pictures in each file that is there."""
        return Survey(
            "official split", {split: self._count(place, split) for split in self.layout.splits}
        )

    def _count(self, place: Place, split: str) -> Count:
        expected = place.entry.sizes[split]
        names = (*self.layout.splits[split], self.layout.meta)
        if missing := tuple(name for name in names if not (place.folder / name).is_file()):
            return Count(0, expected, missing=missing)
        try:
            found = len(self.open(place, Request(split)))
        except DataError as error:  # told with the split, so that the other is counted too
            return Count(None, expected, problem=str(error))
        return Count(found, found)


class ShardReader:
    """Image-caption pairs in tars, in a data set's folder or one below it, as img2dataset writes them."""

    def open(self, place: Place, request: Request) -> TarShards:
        """All pairs; folds go by the hash of the caption, later."""
        unfit = request.unfit()
        if unfit:
            raise UsageError(
                f"{place.entry.title} has captions, no classes and no splits. Leave {unfit[0]} out."
            )
        return TarShards(f"{place.folder} (all pairs)", find_known_shards(place.folder))

    def survey(self, place: Place, *, deep: bool) -> Survey:
        """Tars and gaps in their numbers; ``deep`` lists their members, so that it counts pairs and finds damage."""
        shards = find_known_shards(place.folder)
        found, problem = _count_pairs(place, shards) if deep else (None, None)
        count = Count(found, None, missing=missing_numbers(place.folder, shards), problem=problem)
        return Survey(f"{len(shards)} tar files", {"all": count}, binding=False)


def find_known_shards(folder: Path) -> list[Path]:
    """The tars in a folder, else those in the folders below it (train, validation), in the order of their names."""
    shards = find_shards(folder) or [
        tar for name in subfolders(folder) for tar in find_shards(folder / name) or ()
    ]
    if not shards:
        raise DataError(
            f"{folder} holds no tar files. Expected 00000.tar, 00001.tar, ... as img2dataset writes them."
        )
    return shards


def missing_numbers(folder: Path, shards: list[Path]) -> tuple[str, ...]:
    """The first names that a sequence of numbered shards leaves out."""
    numbers: dict[tuple[Path, str, int], set[int]] = defaultdict(set)
    for shard in shards:
        match = re.fullmatch(r"(.*?)([0-9]{1,18})", shard.stem)
        if match is not None:
            numbers[shard.parent, match[1], len(match[2])].add(int(match[2]))
    gaps = (
        (parent / f"{prefix}{number:0{width}}.tar").relative_to(folder).as_posix()
        for (parent, prefix, width), present in numbers.items()
        for number in range(min(max(present), MAX_SHARDS))
        if number not in present
    )
    return tuple(islice(gaps, SHOWN))


def _count_pairs(place: Place, shards: list[Path]) -> tuple[int, str | None]:
    """Whole pairs in all shards, and what is wrong with the first damaged one."""
    found, problem = 0, None
    with track(f"checking {place.entry.name}", len(shards), "shards") as task:
        for shard in shards:
            samples, trouble = list_samples(shard, CAPTION)
            found += sum(sample.is_whole(CAPTION) for sample in samples)
            if trouble is not None and problem is None:
                problem = (
                    f"{shard.relative_to(place.folder)}: {trouble}. Download this shard again."
                )
            task.advance(1)
    return found, problem


LAYOUTS: Final[dict[str, Reader | type[CoopListing | SplitFolders]]] = {
    "folders": SplitFolders,
    "coop": CoopListing,
    "tars": ShardReader(),
    "cifar10": CifarReader(CIFAR10),
    "cifar100": CifarReader(CIFAR100),
    **{read.__name__: ListReader(read) for read in (imagenet, imagenet_v2, imagenet_sketch)},
    **{read.__name__: ListReader(read) for read in (fgvc_aircraft, food101, sun397)},
}
"""What ``layout = { kind = ... }`` of an entry can name; the options of a class are its attributes."""


def make_reader(layout: object, where: str) -> Reader:
    """The reader of a ``layout``; ``where`` is for messages."""
    options = dict(layout) if isinstance(layout, Mapping) else {}
    kind = options.pop("kind", None)
    found = LAYOUTS.get(kind) if isinstance(kind, str) else None
    if found is None:
        raise UsageError(
            f"{where} must say how it is laid out, as layout = {{ kind = ... }}; kinds are {', '.join(LAYOUTS)}. "
            f"Got {layout!r} instead."
        )
    if isinstance(found, type):
        return ListReader(fill(found, options, f"{where}, layout {kind}"))
    if options:
        raise UsageError(f"{where}, layout {kind} has no options. Leave out {', '.join(options)}.")
    return found

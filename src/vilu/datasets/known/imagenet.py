"""ImageNet-1k and the test sets made after it: folders of images, whose names stand for classes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from hashlib import blake2b
from importlib import resources
from os import stat_result
from pathlib import Path
from typing import Final

from vilu.datasets.files import portable_name, subfolders, walk_images
from vilu.datasets.known.entry import Place
from vilu.datasets.known.listing import Entry, Listing
from vilu.errors import DataError

Files = Sequence[tuple[str, stat_result]]
"""Paths of one class's images below the class's folder, and their status."""

RENAMED: Final = {744: "projectile", 836: "sunglass"}
"""CLIP names classes 657 and 744 "missile", 836 and 837 "sunglasses"; of equal prompts one can never be the answer.
These are the first words of WordNet's synsets n04008634 and n04355933."""

UNPACK: Final = "Unpack the archive of each class into a folder of its name."
SORT: Final = (
    "ImageNet's archive of validation images is flat, and only its devkit says what they show: "
    "torchvision.datasets.ImageNet(FOLDER, 'val') sorts them, given ILSVRC2012_img_val.tar and "
    "ILSVRC2012_devkit_t12.tar.gz in FOLDER."
)


@dataclass(frozen=True)
class ClassFolders:
    """Images in folders of classes; iterating lists them, class by class.

    Attributes:
        root: The data set's folder.
        part: The folder below it that holds the classes; "" for itself.
        labels: Labels by name of class folder.
        choose: Which of a class's images are taken, given the class folder and its images.
    """

    root: Path
    part: str
    labels: Mapping[str, int]
    choose: Callable[[str, Files], Files] = lambda _, files: files

    def __iter__(self) -> Iterator[Entry]:
        folder = self.root / self.part
        prefix = f"{self.part}/" if self.part else ""
        for name in self._classes(folder):
            files = list(walk_images(folder / name, Counter()))
            for path, status in self.choose(name, files):
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
            found = "nothing" if flat is None else f"images without class folders ({portable_name(flat[0])}, ...)"
            hint = SORT if self.part == "val" else UNPACK
            raise DataError(f"{folder} holds {found}; expected a folder per class. {hint}")
        return sorted(names, key=self.labels.__getitem__)


def imagenet(place: Place) -> Listing:
    """Training and validation images by wnid; as in CoOp, the validation images are the test split."""
    labels = {wnid: label for label, wnid in enumerate(wnids())}
    splits = {"train": ClassFolders(place.folder, "train", labels), "test": ClassFolders(place.folder, "val", labels)}
    return _listing(wnids(), splits, "official split, its validation images as test")


def imagenet_v2(place: Place) -> Listing:
    """Ten test images per class, in folders named by the class's number."""
    return _halves(place, tuple(map(str, range(len(wnids())))))


def imagenet_sketch(place: Place) -> Listing:
    """About fifty sketches per class, in folders named by wnid."""
    return _halves(place, wnids())


def half(name: str, files: Files, *, first: bool) -> Files:
    """The images of a class that come first, or last, by the hash of their path; of an odd number more are last.

    Which images the paper's few shots were is not known. The hash is BLAKE2b (8 bytes) of ``class/path``, so that no
    half depends on the order of files, on the machine, or on what other classes hold.
    """
    keys = [blake2b(f"{name}/{path}".encode("utf-8", "surrogateescape"), digest_size=8).digest() for path, _ in files]
    order = sorted(range(len(files)), key=keys.__getitem__)
    middle = len(files) // 2
    chosen = order[:middle] if first else order[middle:]
    return [files[number] for number in sorted(chosen)]


@cache
def wnids() -> tuple[str, ...]:
    """WordNet ids of the 1,000 classes in label order, which is their own."""
    return tuple(_asset("imagenet_wnids.txt").split())


@cache
def clip_names() -> tuple[str, ...]:
    """CLIP's names of the 1,000 classes, in label order, but for the two of ``RENAMED``."""
    names: list[str] = json.loads(_asset("imagenet_class_names.json"))
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


def _asset(name: str) -> str:
    return resources.files("vilu").joinpath("assets", name).read_text(encoding="utf-8")

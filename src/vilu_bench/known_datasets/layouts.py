"""Layouts for known data sets: class folders, ImageNet, CIFAR, and tar files."""

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

from vilu.artifacts.documents import fill_dataclass
from vilu.datasets.files import portable_name, subfolders, walk_images
from vilu.datasets.known.entry import MAX_MISSING_NAMES, Count, Place, Reader, Request, Survey
from vilu.datasets.tar import CAPTION_EXTENSION, MAX_SHARDS, TarShards, find_shards, list_samples
from vilu.errors import DataError, UsageError
from vilu.progress import track
from vilu_bench import read_asset
from vilu_bench.known_datasets.cifar import CIFAR10, CIFAR100, CifarDataset, Layout
from vilu_bench.known_datasets.read import (
    CoopListing,
    ListedImage,
    Listing,
    ListReader,
    fgvc_aircraft,
    food101,
    sun397,
)

ClassImages = Sequence[tuple[str, stat_result | OSError]]
"""A class's images.

Each image is a pair: the path below the class folder, and either the file's status or the error
from reading the status.
"""

RENAMED_CLASSES: Final = {744: "projectile", 836: "sunglass"}
"""Our names for two ImageNet classes, by label.

CLIP gives the classes 657 and 744 the same name "missile", and 836 and 837 the same name
"sunglasses". Two classes with equal names have equal scores, so the second class would never be the
answer. Our names are the first words in WordNet's synsets n04008634 and n04355933.
"""

UNPACK_ADVICE: Final = "Unpack the archive of each class into a folder of its name."
SORT_ADVICE: Final = (
    "ImageNet's archive of validation images is flat, and only its devkit says what they show: "
    "torchvision.datasets.ImageNet(FOLDER, 'val') sorts them, given ILSVRC2012_img_val.tar and "
    "ILSVRC2012_devkit_t12.tar.gz in FOLDER."
)


def every_image(_class_name: str, files: ClassImages) -> ClassImages:
    """Choose all images in a class."""
    return files


@dataclass(frozen=True)
class ClassFolders:
    """Images in a folder per class. An iteration lists the images, class by class."""

    root: Path  # the data set's folder
    part: str  # path below ``root`` to the folder with class folders, or "" for ``root`` itself
    labels: Mapping[str, int]  # maps a class folder's name to the label
    # function from a class folder's name and its images to the images to use
    choose: Callable[[str, ClassImages], ClassImages] = every_image
    advice: str = UNPACK_ADVICE  # last sentence in the error if there are no class folders

    def __iter__(self) -> Iterator[ListedImage]:
        folder = self.root / self.part
        prefix = f"{self.part}/" if self.part else ""
        for name in self._classes(folder):
            images = list(walk_images(folder / name, ignored_counts=Counter()))
            for path, status in self.choose(name, images):
                yield f"{prefix}{name}/{path}", self.labels[name], status

    def _classes(self, folder: Path) -> list[str]:
        """List the class folders in label order."""
        if not folder.is_dir():
            raise DataError(f"{folder} is missing. Unpack it there, or choose another split.")
        names = subfolders(folder)
        if not names:
            raise self._without_classes(folder)
        for name in names:
            if name not in self.labels:
                stray_folder = folder / portable_name(name)
                first_class = next(iter(self.labels))
                raise DataError(
                    f"{stray_folder} is no class: expected the "
                    f"{len(self.labels)} folders {first_class}, ... Move it out."
                )
        return sorted(names, key=self.labels.__getitem__)

    def _without_classes(self, folder: Path) -> DataError:
        """Make the error for a folder without class folders."""
        content = "nothing"
        first_image = next(walk_images(folder, ignored_counts=Counter()), None)
        if first_image is not None:
            content = f"images without class folders ({portable_name(first_image[0])}, ...)"
        return DataError(f"{folder} holds {content}; expected a folder per class. {self.advice}")


@dataclass(frozen=True)
class SplitFolders:
    """Lists a data set with a folder per split, each with a folder per class.

    A class is in the list if any split has the class. A label is a class name's position among
    all class names, sorted by bytes.
    """

    # Maps a split to the split's folder, where "" is the data set's folder. By default the folder
    # has the split's name.
    splits: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, place: Place) -> Listing:
        """List the images in all splits."""
        folder_of_split = self.splits or {split: split for split in place.entry.sizes}
        folders = [place.folder / subfolder for subfolder in folder_of_split.values()]
        classes: set[str] = set()
        for folder in folders:
            if folder.is_dir():
                names_in_split = subfolders(folder)
                classes.update(names_in_split)
        names = tuple(sorted(classes, key=os.fsencode))
        if not names:
            searched = " or ".join(map(str, folders))
            raise DataError(
                f"{place.folder} has no folder of a class in {searched}. {UNPACK_ADVICE}"
            )
        labels = {name: label for label, name in enumerate(names)}
        splits = {
            split: ClassFolders(place.folder, subfolder, labels)
            for split, subfolder in folder_of_split.items()
        }
        return Listing(names, splits, "a folder per class")


def imagenet(place: Place) -> Listing:
    """List ImageNet: training and validation images, in class folders named by wnid.

    As in CoOp, the validation images are the test split.
    """
    classes = wnids()
    labels = {wnid: label for label, wnid in enumerate(classes)}
    splits = {
        "train": ClassFolders(place.folder, "train", labels),
        "test": ClassFolders(place.folder, "val", labels, advice=SORT_ADVICE),
    }
    return _listing(classes, splits, "official split, its validation images as test")


def imagenet_v2(place: Place) -> Listing:
    """List ImageNetV2: ten test images per class, in class folders named by label."""
    labels = range(len(wnids()))
    return _halves(place, tuple(str(label) for label in labels))


def imagenet_sketch(place: Place) -> Listing:
    """List ImageNet-Sketch: about fifty sketches per class, in class folders named by wnid."""
    classes = wnids()
    return _halves(place, classes)


def half_by_hash(name: str, files: ClassImages, *, first: bool) -> ClassImages:
    """Choose half of a class's images: the lower hashes if ``first``, else the higher hashes.

    If the image count is odd, the half with the higher hashes has the additional image. The
    paper's few-shot images are not known, so a hash of ``class/path`` decides: BLAKE2b with 8
    bytes. With a hash, the halves do not depend on the file order, on the machine, or on the
    remaining classes.
    """
    hashes = []
    for path, _ in files:
        key = f"{name}/{path}".encode("utf-8", "surrogateescape")
        key_hash = blake2b(key, digest_size=8)
        hashes.append(key_hash.digest())
    indices_by_hash = sorted(range(len(files)), key=hashes.__getitem__)
    middle = len(files) // 2
    chosen = indices_by_hash[:middle] if first else indices_by_hash[middle:]
    return [files[index] for index in sorted(chosen)]  # in the order of ``files`` again


@cache
def wnids() -> tuple[str, ...]:
    """Return the WordNet ids of the 1,000 classes in label order. This order is ascending."""
    text = read_asset("imagenet_wnids.txt")
    return tuple(text.split())


@cache
def clip_names() -> tuple[str, ...]:
    """Return CLIP's 1,000 class names in label order, with ``RENAMED_CLASSES`` applied."""
    file = resources.files("vilu").joinpath("assets", "imagenet_class_names.json")
    text = file.read_text(encoding="utf-8")
    names: list[str] = json.loads(text)
    return tuple(RENAMED_CLASSES.get(label, name) for label, name in enumerate(names))


def _halves(place: Place, folders: tuple[str, ...]) -> Listing:
    """List images without splits: half of each class is "shots", and the rest is "test"."""
    labels = {name: label for label, name in enumerate(folders)}
    splits = {
        "shots": ClassFolders(place.folder, "", labels, partial(half_by_hash, first=True)),
        "test": ClassFolders(place.folder, "", labels, partial(half_by_hash, first=False)),
    }
    return _listing(folders, splits, "halves of each class by the hash of the path")


def _listing(folders: tuple[str, ...], splits: Mapping[str, ClassFolders], origin: str) -> Listing:
    """List a data set with ImageNet's classes. Prompts have CLIP's names unchanged."""
    names = clip_names()
    return Listing(folders, splits, origin, names=names, uncleaned_names=names)


@dataclass(frozen=True)
class CifarReader:
    """A reader for CIFAR-10 or CIFAR-100 that does not run the pickles."""

    layout: Layout

    def open(self, place: Place, request: Request) -> CifarDataset:
        """Open the pictures in the requested splits."""
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

    def survey(self, place: Place, *, deep: bool) -> Survey:  # noqa: ARG002
        """Count each split's pictures by reading the files. ``deep`` changes nothing."""
        counts = {split: self._count(place, split) for split in self.layout.splits}
        return Survey("official split", counts)

    def _count(self, place: Place, split: str) -> Count:
        """Count a split's pictures."""
        # CIFAR has no picture list. If the files cannot be read, the published picture count
        # stands in for the number of listed pictures.
        published = place.entry.sizes[split]
        names = (*self.layout.splits[split], self.layout.meta)
        missing = tuple(name for name in names if not (place.folder / name).is_file())
        if missing:
            return Count(found=0, listed=published, missing=missing)
        try:
            request = Request(split)
            n_pictures = len(self.open(place, request))
        except DataError as error:  # not raised, because the next split is counted, too
            return Count(found=None, listed=published, problem=str(error))
        return Count(found=n_pictures, listed=n_pictures)  # the files themselves are the list


class ShardReader:
    """A reader for image-caption pairs in img2dataset's tar files.

    The tar files lie in the data set's folder or in its subfolders.
    """

    def open(self, place: Place, request: Request) -> TarShards:
        """Open all pairs. There are no splits: later, a caption's hash decides the pair's fold."""
        unfit_options = request.unfit_options()
        if unfit_options:
            raise UsageError(
                f"{place.entry.title} has captions, no classes and no splits. Leave "
                f"{unfit_options[0]} out."
            )
        shards = find_known_shards(place.folder)
        return TarShards(f"{place.folder} (all pairs)", shards)

    def survey(self, place: Place, *, deep: bool) -> Survey:
        """Count the tar files and find gaps in the file numbers.

        With ``deep``, also read all tar files, to count the pairs and find damaged files.
        """
        shards = find_known_shards(place.folder)
        n_pairs = None
        problem = None
        if deep:
            n_pairs, problem = _count_pairs(place, shards)
        missing = missing_numbers(place.folder, shards)
        count = Count(found=n_pairs, listed=None, missing=missing, problem=problem)
        return Survey(f"{len(shards)} tar files", {"all": count}, binding=False)


def find_known_shards(folder: Path) -> list[Path]:
    """Find the tar files in a folder, sorted by name.

    If there are none, return the tar files in the subfolders (such as train and validation).
    """
    shards = find_shards(folder) or []  # ``find_shards`` returns None without tar files
    if not shards:
        for name in subfolders(folder):
            shards += find_shards(folder / name) or []
    if not shards:
        raise DataError(
            f"{folder} holds no tar files. "
            "Expected 00000.tar, 00001.tar, ... as img2dataset writes them."
        )
    return shards


def missing_numbers(folder: Path, shards: list[Path]) -> tuple[str, ...]:
    """Name at most ``MAX_MISSING_NAMES`` shards that are missing in the shards' numbering."""
    # maps a sequence (folder, text before the number, number of digits) to the present numbers
    numbers: dict[tuple[Path, str, int], set[int]] = defaultdict(set)
    for shard in shards:
        match = re.fullmatch(r"(.*?)([0-9]{1,18})", shard.stem)  # such as part-00012
        if match is not None:
            prefix, digits = match.groups()
            numbers[shard.parent, prefix, len(digits)].add(int(digits))
    missing = []
    for (parent, prefix, width), present_numbers in numbers.items():
        for number in islice(_gaps(present_numbers), MAX_MISSING_NAMES):
            path = parent / f"{prefix}{number:0{width}}.tar"
            relative_path = path.relative_to(folder)
            missing.append(relative_path.as_posix())
    return tuple(missing[:MAX_MISSING_NAMES])


def _gaps(numbers: set[int]) -> Iterator[int]:
    """Yield the missing numbers below the largest in ``numbers``, and below ``MAX_SHARDS``."""
    for number in range(min(max(numbers), MAX_SHARDS)):
        if number not in numbers:
            yield number


def _count_pairs(place: Place, shards: list[Path]) -> tuple[int, str | None]:
    """Count the whole pairs in all shards, and describe the damage in the first damaged shard."""
    n_pairs = 0
    problem = None
    with track(f"checking {place.entry.name}", len(shards), "shards") as task:
        for shard in shards:
            samples, damage = list_samples(shard, CAPTION_EXTENSION)
            n_pairs += sum(sample.is_complete(CAPTION_EXTENSION) for sample in samples)
            if damage is not None and problem is None:
                name = shard.relative_to(place.folder)
                problem = f"{name}: {damage}. Download this shard again."
            task.advance(1)
    return n_pairs, problem


LAYOUTS: Final[dict[str, Reader | type[CoopListing | SplitFolders]]] = {
    "folders": SplitFolders,
    "coop": CoopListing,
    "tars": ShardReader(),
    "cifar10": CifarReader(CIFAR10),
    "cifar100": CifarReader(CIFAR100),
    # for these functions, the kind is the function's name
    **{read.__name__: ListReader(read) for read in (imagenet, imagenet_v2, imagenet_sketch)},
    **{read.__name__: ListReader(read) for read in (fgvc_aircraft, food101, sun397)},
}
"""Maps the ``kind`` in a data set's ``layout = { kind = ... }`` to a reader.

A value may also be a class. Then the further keys in ``layout`` make an object of this class,
and this object is the function ``read`` in a ``ListReader``.
"""


def make_reader(layout: object, where: str) -> Reader:
    """Make the reader for a ``layout``. Error messages begin with ``where``."""
    options = dict(layout) if isinstance(layout, Mapping) else {}
    kind = options.pop("kind", None)
    if not isinstance(kind, str) or kind not in LAYOUTS:
        kinds = ", ".join(LAYOUTS)
        raise UsageError(
            f"{where} needs a layout, such as layout = {{ kind = ... }}. The kinds are {kinds}. "
            f"Got {layout!r} instead."
        )
    reader = LAYOUTS[kind]
    if isinstance(reader, type):
        read_listing = fill_dataclass(reader, options, f"{where}, layout {kind}")
        return ListReader(read_listing)
    if options:
        refused = ", ".join(options)
        raise UsageError(f"{where}, layout {kind} has no options. Leave out {refused}.")
    return reader

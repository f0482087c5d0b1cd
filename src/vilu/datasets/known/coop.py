"""CoOp's lists of training, validation and test images (``split_zhou_*.json``): the user's own, and those shipped."""

from __future__ import annotations

import lzma
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Final

from vilu.datasets.known.entry import Place
from vilu.datasets.known.listing import Listing
from vilu.datasets.known.splits import SplitLists, read_json_object, refuse

ASSET: Final = "coop_splits.txt.xz"
SPLITS: Final = ("train", "validation", "test")
KEYS: Final = {"train": "train", "val": "validation", "test": "test"}
"""Keys of a ``split_zhou_*.json``, and our names of splits."""

LETTERS: Final = {"t": "train", "v": "validation", "e": "test"}


def user_list(place: Place, file: str, images: str) -> Listing | None:
    """The listing by the user's own ``split_zhou_*.json``; None where there is none.

    Raises:
        DataError: If it is no such list; the message names file and entry.
    """
    path = place.find(file)
    if path is None:
        return None
    lists = read_split_file(path)
    try:
        return lists.listing(place.folder, images, f"{file} of the user", binding=False)
    except ValueError as error:
        refuse(path, error)


def read_split_file(file: Path) -> SplitLists:
    """A ``split_zhou_*.json``: ``{"train": [[path, label, class name], ...], "val": ..., "test": ...}``.

    Raises:
        DataError: If it is anything else.
    """
    lists = SplitLists({split: [] for split in SPLITS})

    def named(entry: object) -> tuple[str, int]:
        match entry:
            case [str(path), int(label), str(name)] if not isinstance(label, bool) and label >= 0:
                lists.name(label, name)
                return path, label
        raise ValueError(f"expected [relative path, class index, class name]; found {entry!r:.80}")

    for key, entries in read_json_object(file).items():
        if key not in KEYS or not isinstance(entries, list):
            refuse(file, f"expected lists named train, val and test; found {key[:20]!r}: {type(entries).__name__}")
        lists.fill(KEYS[key], file, entries, named)
    return lists


@cache
def shipped_list(dataset: str) -> SplitLists:
    """CoOp's list of a data set, by our name of it; made by ``tools/make_split_asset.py``.

    The asset has per data set a line with its name and its number of classes; per class a line with its name, a line
    with a letter (t, v, e: train, validation, test) for each of its images, and the images' paths, a line each.

    Raises:
        KeyError: If there is none.
    """
    data = resources.files("vilu").joinpath("assets", ASSET).read_bytes()
    lines = iter(lzma.decompress(data).decode().splitlines())
    for head in lines:
        name, n_classes = head.split("\t")
        lists = SplitLists({split: [] for split in SPLITS})
        for label in range(int(n_classes)):
            class_name, letters = next(lines), next(lines)
            images = list(zip(letters, lines, strict=False))  # strict would take a line more
            if name == dataset:
                lists.name(label, class_name)
                for letter, path in images:
                    lists.add(LETTERS[letter], path, label)
        if name == dataset:
            return lists
    raise KeyError(dataset)


@dataclass(frozen=True)
class CoopListing:
    """Listing of a data set by CoOp's list: the user's own where there is one, else the shipped one.

    Attributes:
        file: Name of the user's list.
        images: Folder of the images; "" where paths in the list begin at the data set's folder.
    """

    file: str
    images: str

    def __call__(self, place: Place) -> Listing:
        """What the list says.

        Raises:
            DataError: If the user's list is damaged.
        """
        own = user_list(place, self.file, self.images)
        if own is not None:
            return own
        lists = shipped_list(place.entry.name)
        return lists.listing(place.folder, self.images, "CoOp list shipped with vilu", binding=True)

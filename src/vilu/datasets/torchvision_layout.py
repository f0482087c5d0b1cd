"""CIFAR-10 and CIFAR-100 as torchvision unpacks them, read without running their pickles."""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vilu.datasets.base import Record
from vilu.datasets.classes import class_table
from vilu.datasets.files import ListingHash
from vilu.datasets.pickles import PickledArray, read_pickle
from vilu.datasets.splits import parse_split
from vilu.errors import DataError

PIXELS: Final = 3 * 32 * 32


@dataclass(frozen=True)
class Layout:
    """Files and keys of one data set (https://www.cs.toronto.edu/~kriz/cifar.html, python version)."""

    folder: str
    splits: dict[str, tuple[str, ...]]
    labels: str
    meta: str
    names: str

    def is_in(self, folder: Path) -> bool:
        """Whether the folder has all of the files."""
        return all((folder / name).is_file() for names in (*self.splits.values(), (self.meta,)) for name in names)


CIFAR10: Final = Layout(
    folder="cifar-10-batches-py",
    splits={"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)},
    labels="labels",
    meta="batches.meta",
    names="label_names",
)
CIFAR100: Final = Layout(
    folder="cifar-100-python",
    splits={"train": ("train",), "test": ("test",)},
    labels="fine_labels",
    meta="meta",
    names="fine_label_names",
)


def find_layout(source: Path) -> tuple[Layout, Path] | None:
    """The data set that a folder is, or holds under its usual name; None where it is or holds none.

    Raises:
        DataError: If it holds both.
    """
    found = [
        (layout, folder)
        for layout in (CIFAR10, CIFAR100)
        for folder in (source, source / layout.folder)
        if layout.is_in(folder)
    ]
    if len(found) > 1:
        raise DataError(f"{source} holds more than one data set. Name one: {', '.join(str(f) for _, f in found)}.")
    return found[0] if found else None


class CifarDataset:
    """32 x 32 pictures out of pickled arrays; keys are ``file/row``; each is handed over as a PNG, which loses nothing.

    Args:
        folder: The folder of the files.
        layout: Which data set it is.
        split: "train", "test", or "train+test"; None for both.
        classes: A classes file, in label order.
        raw_names: Whether names for prompts keep their underscores.

    Attributes:
        classes: Raw and prompt names.

    Raises:
        DataError: If a file is damaged, or its pickle names anything but the parts of an array.
    """

    def __init__(
        self,
        folder: Path,
        layout: Layout,
        *,
        split: str | None = None,
        classes: Path | None = None,
        raw_names: bool = False,
    ) -> None:
        splits = tuple(layout.splits) if split is None else parse_split(split, layout.splits, str(folder))
        raw = _class_names(folder / layout.meta, layout.names)
        self.source = str(folder)
        self.captioned = False
        self.classes = class_table(raw, classes, by_position=True, names=raw if raw_names else None)
        self.class_names: tuple[str, ...] | None = self.classes.names
        files = [folder / name for part in splits for name in layout.splits[part]]
        self._batches = [_Batch.read(file, layout.labels, len(raw)) for file in files]
        self._ends = list(accumulate(len(batch.labels) for batch in self._batches))
        listing = ListingHash(*raw, *splits)
        for file, batch in zip(files, self._batches, strict=True):
            status = file.stat()
            for row, label in enumerate(batch.labels):
                listing.add(f"{batch.name}/{row}", label, status)
        self.fingerprint = listing.hexdigest()

    def __len__(self) -> int:
        return self._ends[-1]

    def records(self, start: int, stop: int) -> Iterator[Record]:
        """The images at positions start ... stop - 1."""
        for position in range(len(self))[start:stop]:
            number = bisect_right(self._ends, position)
            batch = self._batches[number]
            row = position - (self._ends[number - 1] if number else 0)
            yield Record(f"{batch.name}/{row}", batch.labels[row], partial(_png, batch.pixels[row]))


@dataclass(frozen=True)
class _Batch:
    """One file: its name, (n, 3072) uint8 pixels (channels, rows, columns) and n labels."""

    name: str
    pixels: NDArray[np.uint8]
    labels: list[int]

    @classmethod
    def read(cls, file: Path, label_key: str, n_classes: int) -> _Batch:
        content = read_pickle(file)
        array, labels = content.get("data"), content.get(label_key)
        if not isinstance(array, PickledArray) or not isinstance(labels, list):
            raise DataError(f"{file} must hold 'data' and {label_key!r}. Found: {', '.join(content)}.")
        try:
            pixels = array.as_bytes(PIXELS)
        except ValueError as error:
            raise DataError(f"{file}: {error}. Unpack the archive again.") from error
        if len(labels) != len(pixels):
            raise DataError(f"{file} has {len(pixels)} images and {len(labels)} labels. Unpack the archive again.")
        for row, label in enumerate(labels):
            if not isinstance(label, int) or not 0 <= label < n_classes:
                raise DataError(f"{file} row {row} has label {label!r}; expected 0 to {n_classes - 1}.")
        return cls(file.name, pixels, labels)


def _class_names(file: Path, key: str) -> list[str]:
    names = read_pickle(file).get(key)
    if not isinstance(names, list) or not names:
        raise DataError(f"{file} must hold a list {key!r}. Unpack the archive again.")
    return [name.decode("latin-1") if isinstance(name, bytes) else str(name) for name in names]


def _png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    picture = np.ascontiguousarray(pixels.reshape(3, 32, 32).transpose(1, 2, 0))
    Image.fromarray(picture).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()

"""CIFAR in its own pickles, and data sets in the layouts of torchvision."""

from __future__ import annotations

import io
import itertools
import pickle
import pickletools
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vilu.datasets.base import ImageRecord, Selection, parse_split
from vilu.datasets.classes import class_table
from vilu.datasets.files import ListingHash
from vilu.datasets.images import CORRUPT
from vilu.datasets.layouts import FolderLayout
from vilu.errors import DataError

MAX_BYTES: Final = 256 * 2**20  # larger pickles are refused; the largest of CIFAR has 155 MB


MAX_TUPLES: Final = 64
"""More that are no arguments of a call are refused: hashing one in the other, Python would run out of stack."""

TUPLES: Final = frozenset({"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET"})
MEMO: Final = frozenset({"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"})


class PickledArray:
    """Stands for a numpy array: keeps the state that would have been restored."""

    state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state

    def as_bytes(self, width: int) -> NDArray[np.uint8]:
        """The array, (n, width) uint8 with n at least 1; ValueError where it is anything else."""
        state = self.state[-4:] if isinstance(self.state, tuple) else None
        match state:  # numpy's (version, shape, dtype, whether in Fortran order, raw bytes)
            case (
                (int(n), int(columns)),
                PickledType("u1" | "uint8" | "B"),
                bool(fortran),
                bytes() | str() as raw,
            ):
                content = (
                    raw.encode("latin-1") if isinstance(raw, str) else raw
                )  # str: written by Python 2
                if n > 0 and columns == width and len(content) == n * width:
                    return np.frombuffer(content, dtype=np.uint8).reshape(
                        (n, width), order="F" if fortran else "C"
                    )
        raise ValueError(f"an array of shape (n, {width}) and type uint8 was expected")


class PickledType:
    """Stands for a numpy dtype: keeps its code."""

    __match_args__ = ("code",)

    def __init__(self, code: object, *_flags: object) -> None:
        self.code = code

    def __setstate__(self, state: object) -> None:
        """Byte order and alignment, which bytes do not have."""


def _reconstruct(*_arguments: object) -> PickledArray:
    return PickledArray()


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding!r} is not allowed")
    return text.encode("latin-1")


_ALLOWED: Final[dict[tuple[str, str], Callable[..., Any]]] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): PickledArray,
    ("numpy", "dtype"): PickledType,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs")
        return _ALLOWED[module, name]


def _steps(content: bytes) -> Iterator[str]:
    """Names of the opcodes, without the memo's; a slot far beyond the objects made so far would cost gigabytes."""
    for made, (opcode, slot, _) in enumerate(pickletools.genops(content)):
        if opcode.name not in MEMO:
            yield opcode.name
        elif isinstance(slot, int) and slot > made:
            raise ValueError(f"it keeps an object in slot {slot}, and at most {made} were made")


def read_pickle(file: Path) -> dict[str, object]:
    """The dictionary in a pickle of built-in types and ``PickledArray``; keys of bytes become text."""
    try:
        if file.stat().st_size > MAX_BYTES:
            raise DataError(f"{file} is too large: at most {MAX_BYTES} bytes of pickle are read.")
        raw = file.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter(
                "error"
            )  # no array's pickle has escapes that Python has to guess at
            kept = sum(
                name in TUPLES and later != "REDUCE"
                for name, later in itertools.pairwise(_steps(raw))
            )
            if (
                kept > MAX_TUPLES
            ):  # they could be nested without end; an array and its labels have a handful
                raise ValueError(
                    f"it holds {kept} tuples, and an array needs no more than {MAX_TUPLES}"
                )
            content = _Unpickler(io.BytesIO(raw), encoding="latin1").load()
    except (
        pickle.UnpicklingError,
        *CORRUPT,
    ) as error:  # refused names and opcodes out of place; what damage brings
        raise DataError(
            f"{file} was refused: {error}. Only pickled arrays are read; unpack the archive again."
        ) from error
    if not isinstance(content, dict):
        raise DataError(
            f"{file} must hold a dictionary. Found {type(content).__name__}. Unpack the archive again."
        )
    return {
        key.decode("latin-1") if isinstance(key, bytes) else str(key): value
        for key, value in content.items()
    }


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
        return all(
            (folder / name).is_file()
            for names in (*self.splits.values(), (self.meta,))
            for name in names
        )


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


class CifarDataset:
    """32 x 32 pictures out of pickled arrays; keys are ``file/row``; each is handed over as a PNG, which loses nothing.

    ``split`` is "train", "test", or "train+test"; None for both. A classes file is in label order,
    and may leave out the classes of ``outside``. With ``raw_names`` names for prompts keep their
    underscores.
    """

    def __init__(
        self,
        folder: Path,
        layout: Layout,
        *,
        split: str | None = None,
        classes: Path | None = None,
        raw_names: bool = False,
        outside: Collection[str] = (),
    ) -> None:
        splits = (
            tuple(layout.splits)
            if split is None
            else parse_split(split, layout.splits, str(folder))
        )
        raw = _class_names(folder / layout.meta, layout.names)
        self.source = str(folder)
        self.captioned = False
        names = raw if raw_names else None
        self.classes = class_table(raw, classes, by_position=True, names=names, outside=outside)
        self.class_names: tuple[str, ...] | None = self.classes.names
        files = [folder / name for part in splits for name in layout.splits[part]]
        batches = [_Batch.read(file, layout.labels, len(raw)) for file in files]
        listing = ListingHash(*raw, *splits)
        for file, batch in zip(files, batches, strict=True):
            status = file.stat()
            for row, label in enumerate(batch.labels):
                listing.add(f"{batch.name}/{row}", label, status)
        self.fingerprint = listing.hexdigest()
        self._rows = [(batch, row) for batch in batches for row in range(len(batch.labels))]

    def __len__(self) -> int:
        return len(self._rows)

    def records(self, start: int, stop: int) -> Iterator[ImageRecord]:
        """The images at positions start ... stop - 1."""
        for batch, row in self._rows[start:stop]:
            pixels = batch.pixels[
                row
            ]  # which are the picture: the bytes of a PNG depend on the library that makes it
            name, label = f"{batch.name}/{row}", batch.labels[row]
            yield ImageRecord(name, label, partial(_png, pixels), content=pixels.tobytes)


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
            raise DataError(
                f"{file} must hold 'data' and {label_key!r}. Found: {', '.join(content)}."
            )
        try:
            pixels = array.as_bytes(PIXELS)
        except ValueError as error:
            raise DataError(f"{file}: {error}. Unpack the archive again.") from error
        if len(labels) != len(pixels):
            raise DataError(
                f"{file} has {len(pixels)} images and {len(labels)} labels. Unpack the archive again."
            )
        for row, label in enumerate(labels):
            if not isinstance(label, int) or not 0 <= label < n_classes:
                raise DataError(
                    f"{file} row {row} has label {label!r}; expected 0 to {n_classes - 1}."
                )
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


def find_folder(source: Path, layout: Layout) -> Path | None:
    """The folder of a data set: ``source``, or the one of its usual name there; None without."""
    for folder in (source, source / layout.folder):
        if layout.is_in(folder):
            return folder
    return None


def find_cifar(source: Path, layout: Layout) -> Callable[[Selection], CifarDataset] | None:
    """What opens a folder of CIFAR; None where it holds none."""
    folder = find_folder(source, layout)
    if folder is None:
        return None

    def open_folder(selection: Selection) -> CifarDataset:
        return CifarDataset(
            folder,
            layout,
            split=selection.split,
            classes=selection.classes,
            outside=selection.outside,
        )

    return open_folder


def _layout(name: str, layout: Layout) -> FolderLayout:
    description = (
        f"{layout.folder}, or the folder it is in, as torchvision unpacks it; --split train or test"
    )
    return FolderLayout(name, description, partial(find_cifar, layout=layout))


CIFAR10_LAYOUT = _layout("cifar10", CIFAR10)
CIFAR100_LAYOUT = _layout("cifar100", CIFAR100)

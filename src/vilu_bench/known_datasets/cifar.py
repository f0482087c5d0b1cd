"""CIFAR-10 and CIFAR-100, read from the pickle files without running the pickles."""

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
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vilu.datasets.base import ImageRecord, Selection, parse_split
from vilu.datasets.classes import class_table
from vilu.datasets.files import ListingHash
from vilu.datasets.images import DECODING_ERRORS
from vilu.datasets.layouts import FolderLayout
from vilu.errors import DataError

MAX_BYTES: Final = 256 * 2**20  # larger pickles are refused. CIFAR's largest pickle has 155 MB

MAX_TUPLES: Final = 64
"""Maximum number of tuples in a pickle, not counting call arguments.

An array and its labels need only a few tuples. Deeply nested tuples would overflow Python's stack
when they are hashed.
"""

TUPLE_OPCODES: Final = frozenset({"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET"})
"""Pickle opcodes that make a tuple or a frozen set."""
MEMO_OPCODES: Final = frozenset({"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"})
"""Pickle opcodes that put an object into the unpickler's memo, for later use."""


class PickledArray:
    """Stand-in for a numpy array in a pickle. Stores the array's state."""

    state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state

    def as_bytes(self, width: int) -> NDArray[np.uint8]:
        """Return the stored array, (n, width) uint8 with n >= 1.

        Raises:
            ValueError: If the state does not describe such an array.
        """
        error = ValueError(f"an array of shape (n, {width}) and type uint8 was expected")
        if not isinstance(self.state, tuple):
            raise error
        # numpy's state is (version, shape, dtype, whether in Fortran order, raw bytes). Very old
        # pickles leave out the version.
        match self.state[-4:]:
            case (
                (int(n), int(columns)),
                PickledType("u1" | "uint8" | "B"),
                bool(fortran),
                bytes() | str() as raw,
            ):
                # a pickle from Python 2 has bytes as text
                content = raw.encode("latin-1") if isinstance(raw, str) else raw
            case _:
                raise error
        has_whole_rows = columns == width and len(content) == n * width
        if n < 1 or not has_whole_rows:
            raise error
        order: Literal["C", "F"] = "F" if fortran else "C"
        return np.frombuffer(content, dtype=np.uint8).reshape((n, width), order=order)


class PickledType:
    """Stand-in for a numpy dtype in a pickle. Stores the dtype's code."""

    __match_args__ = ("code",)

    def __init__(self, code: object, *_flags: object) -> None:
        self.code = code

    def __setstate__(self, state: object) -> None:
        """Ignore byte order and alignment. They do not matter for single bytes."""


def _reconstruct(*_arguments: object) -> PickledArray:
    return PickledArray()


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding!r} is not allowed")
    return text.encode("latin-1")


# The only objects that a pickle can use. A key is the module and the name in the pickle.
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


def _opcode_names(content: bytes) -> Iterator[str]:
    """Yield the names of a pickle's opcodes, except opcodes that put an object into the memo.

    Raises a ValueError if a memo slot number exceeds the number of earlier opcodes. A huge
    number would make the unpickler allocate gigabytes.
    """
    for n_before, (opcode, slot, _) in enumerate(pickletools.genops(content)):
        if opcode.name not in MEMO_OPCODES:
            yield opcode.name
        elif isinstance(slot, int) and slot > n_before:
            raise ValueError(
                f"it stores an object in memo slot {slot} after {n_before} opcodes, "
                f"which can have made {n_before} objects at most"
            )


def read_pickle(file: Path) -> dict[str, object]:
    """Read the dictionary in a pickle. The values are built-in types and ``PickledArray``.

    Keys of type bytes are decoded to text.
    """
    try:
        content = _unpickle(file)
    # ``UnpicklingError`` means a refused name or a misplaced opcode. All other exceptions mean
    # that the file is damaged.
    except (pickle.UnpicklingError, *DECODING_ERRORS) as error:
        raise DataError(
            f"{file} was refused: {error}. Only pickled arrays are read; unpack the archive again."
        ) from error
    if not isinstance(content, dict):
        raise DataError(
            f"{file} must hold a dictionary. Found {type(content).__name__}. "
            "Unpack the archive again."
        )
    return {_as_text(key): value for key, value in content.items()}


def _unpickle(file: Path) -> object:
    """Read a pickle's content. First check the file size, the memo and the number of tuples."""
    if file.stat().st_size > MAX_BYTES:
        raise DataError(f"{file} is too large: at most {MAX_BYTES} bytes of pickle are read.")
    raw = file.read_bytes()
    with warnings.catch_warnings():
        # A warning means an invalid escape sequence. No pickled array has such a sequence, so a
        # warning becomes an error.
        warnings.simplefilter("error")
        n_tuples = 0
        for name, next_name in itertools.pairwise(_opcode_names(raw)):
            is_argument = next_name == "REDUCE"  # REDUCE calls a function with the tuple before it
            if name in TUPLE_OPCODES and not is_argument:
                n_tuples += 1
        if n_tuples > MAX_TUPLES:
            raise ValueError(
                f"it holds {n_tuples} tuples, and an array needs no more than {MAX_TUPLES}"
            )
        unpickler = _Unpickler(io.BytesIO(raw), encoding="latin1")
        return unpickler.load()


def _as_text(name: object) -> str:
    """Return a key or a class name as text. Python 2 wrote such names as bytes."""
    return name.decode("latin-1") if isinstance(name, bytes) else str(name)


PIXELS: Final = 3 * 32 * 32  # number of values in a picture: channels x rows x columns


@dataclass(frozen=True)
class Layout:
    """File names and dictionary keys of CIFAR-10 or CIFAR-100, in the version for Python.

    Source: https://www.cs.toronto.edu/~kriz/cifar.html.
    """

    folder: str  # the folder's name in the archive
    splits: dict[str, tuple[str, ...]]  # maps a split to the file names
    labels: str  # key for the labels in these files
    meta: str  # the file with the class names
    names: str  # key for the class names in the file ``meta``

    def is_in(self, folder: Path) -> bool:
        """Return whether the folder has all the layout's files."""
        names = [self.meta]
        for files in self.splits.values():
            names += files
        return all((folder / name).is_file() for name in names)


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
    """CIFAR's 32 x 32 pictures as a data set of lossless PNGs.

    A picture has the key ``file/row``.

    Args:
        folder: Folder with the pickle files.
        layout: Files and keys in the data set.
        split: "train", "test" or "train+test". None: both splits.
        classes: File with class names in label order. The classes in ``outside`` may be left out.
        raw_names: Whether class names keep the underscores in prompts.
        outside: Class names. Pictures in these classes are treated as outside all classes.
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
        splits = tuple(layout.splits)
        if split is not None:
            splits = parse_split(split, layout.splits, str(folder))
        raw_class_names = _class_names(folder / layout.meta, layout.names)
        self.source = str(folder)
        self.captioned = False
        self.classes = class_table(
            raw_class_names,
            classes,
            numeric_labels=True,
            names=raw_class_names if raw_names else None,
            outside=outside,
        )
        self.class_names: tuple[str, ...] | None = self.classes.names
        files: list[Path] = []
        for chosen_split in splits:
            files += [folder / name for name in layout.splits[chosen_split]]
        batches = [_Batch.read(file, layout.labels, len(raw_class_names)) for file in files]
        listing = ListingHash(*raw_class_names, *splits)
        self._rows: list[tuple[_Batch, int]] = []
        for file, batch in zip(files, batches, strict=True):
            status = file.stat()
            for row, label in enumerate(batch.labels):
                listing.add(batch.key(row), label, status)
                self._rows.append((batch, row))
        self.fingerprint = listing.hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def records(self, start: int, stop: int) -> Iterator[ImageRecord]:
        """Yield records for the images start ... stop - 1."""
        for batch, row in self._rows[start:stop]:
            pixels = batch.pixels[row]
            key = batch.key(row)
            encode = partial(_as_png, pixels)
            # the content that identifies a picture: not the PNG, whose bytes depend on the library
            content = pixels.tobytes
            yield ImageRecord(key, batch.labels[row], encode, content=content)


@dataclass(frozen=True)
class _Batch:
    """The pictures and labels in a file."""

    name: str  # name of the file
    pixels: NDArray[np.uint8]  # (n, 3072), flattened from (channels, rows, columns)
    labels: list[int]  # n labels

    @classmethod
    def read(cls, file: Path, label_key: str, n_classes: int) -> _Batch:
        """Read a file, and check sizes and labels."""
        content = read_pickle(file)
        array = content.get("data")
        labels = content.get(label_key)
        if not isinstance(array, PickledArray) or not isinstance(labels, list):
            keys = ", ".join(content)
            raise DataError(f"{file} must hold 'data' and {label_key!r}. Found: {keys}.")
        try:
            pixels = array.as_bytes(PIXELS)
        except ValueError as error:
            raise DataError(f"{file}: {error}. Unpack the archive again.") from error
        if len(labels) != len(pixels):
            raise DataError(
                f"{file} has {len(pixels)} images and {len(labels)} labels. "
                "Unpack the archive again."
            )
        for row, label in enumerate(labels):
            if not isinstance(label, int) or not 0 <= label < n_classes:
                raise DataError(
                    f"{file} row {row} has label {label!r}; expected 0 to {n_classes - 1}."
                )
        return cls(file.name, pixels, labels)

    def key(self, row: int) -> str:
        """Return the key for the picture in a row."""
        return f"{self.name}/{row}"


def _class_names(file: Path, key: str) -> list[str]:
    content = read_pickle(file)
    names = content.get(key)
    if not isinstance(names, list) or not names:
        raise DataError(f"{file} must hold a list {key!r}. Unpack the archive again.")
    return [_as_text(name) for name in names]


def _as_png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    channels_last = pixels.reshape(3, 32, 32).transpose(1, 2, 0)  # (rows, columns, channels)
    picture = np.ascontiguousarray(channels_last)
    image = Image.fromarray(picture)
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def find_folder(source: Path, layout: Layout) -> Path | None:
    """Find the folder with the files: ``source``, or the subfolder with the usual name, or None."""
    for folder in (source, source / layout.folder):
        if layout.is_in(folder):
            return folder
    return None


def opener_of_cifar(source: Path, layout: Layout) -> Callable[[Selection], CifarDataset] | None:
    """Return a function that opens CIFAR in ``source``, or None if the files are not there."""
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


def _folder_layout(name: str, layout: Layout) -> FolderLayout:
    """Make the folder layout that recognises and opens CIFAR."""
    description = (
        f"{layout.folder}, or the folder it is in, as torchvision unpacks it; --split train or test"
    )
    opener = partial(opener_of_cifar, layout=layout)
    return FolderLayout(name, description, opener)


CIFAR10_LAYOUT = _folder_layout("cifar10", CIFAR10)
CIFAR100_LAYOUT = _folder_layout("cifar100", CIFAR100)

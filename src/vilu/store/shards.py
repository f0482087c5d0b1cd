"""The shards of precomputed embeddings in a folder: which files there are, and that they belong together.

Only headers are read; files are hostile until checked.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vilu.errors import DataError, ProvenanceError, StorageError
from vilu.store.content import UNREADABLE_NPY, UNREADABLE_PARQUET

FOLDERS = (("img_emb", "text_emb"), ("images", "texts"))
"""Folders of image and caption embeddings, as clip-retrieval and LAION name them."""

FILES = (("img_emb.npy", "text_emb.npy"), ("images.npy", "texts.npy"))
"""The same in one file each."""

METADATA = "metadata"

LAYOUTS = (
    "img_emb/img_emb_0000.npy + text_emb/text_emb_0000.npy, images/*.npy + texts/*.npy, "
    "or one of " + " and ".join(f"{image} + {text}" for image, text in FILES)
)
"""What is looked for, for messages."""


@dataclass(frozen=True)
class Shard:
    """Files whose rows belong together.

    Attributes:
        image: (n, D) image embeddings.
        text: (n, D) caption embeddings.
        metadata: Parquet file with a row for each, if any.
    """

    image: Path
    text: Path
    metadata: Path | None

    @cached_property
    def shape(self) -> tuple[int, int]:
        """(n, D), from the headers of all files.

        Raises:
            StorageError: If a file is damaged.
            DataError: If one does not hold a matrix of floats.
            ProvenanceError: If the files have different numbers of rows, or widths.
        """
        shapes = {path: map_matrix(path).shape for path in (self.image, self.text)}
        counts = {path: shape[0] for path, shape in shapes.items()}
        if self.metadata is not None:
            counts[self.metadata] = _count_parquet(self.metadata)
        if len(set(counts.values())) > 1:
            found = ", ".join(f"{path} has {count}" for path, count in counts.items())
            raise ProvenanceError(f"partners must have the same number of rows. {found}. Embed or fetch them again.")
        if shapes[self.image][1] != shapes[self.text][1]:
            raise ProvenanceError(
                f"{self.image} has width {shapes[self.image][1]} and {self.text} {shapes[self.text][1]}: "
                "they are not of one model."
            )
        n_rows, width = shapes[self.image]
        return n_rows, width


def map_matrix(path: Path) -> NDArray[np.floating]:
    """The matrix in a ``.npy`` file, memory-mapped; float16 or float32 of any byte order.

    Raises:
        StorageError: If the file is damaged, or longer or shorter than its header says.
        DataError: If it is no C-order matrix of such numbers.
    """
    try:
        rows = np.lib.format.open_memmap(path, mode="r")
        n_bytes = path.stat().st_size - rows.offset
    except UNREADABLE_NPY as error:
        raise StorageError(f"{path} is damaged: {error}. Fetch or write it again.") from error
    if rows.dtype.kind != "f" or rows.dtype.itemsize not in (2, 4) or rows.ndim != 2 or not rows.shape[1]:
        raise DataError(
            f"{path} must be a matrix (rows, width) of float16 or float32. Got {rows.dtype} of shape {rows.shape}."
        )
    if not rows.flags.c_contiguous:
        raise DataError(f"{path} is in Fortran order, so its rows cannot be read one by one. Save it in C order.")
    if n_bytes != rows.nbytes:
        raise StorageError(f"{path} has {n_bytes} bytes of data, its header says {rows.nbytes}. Fetch it again.")
    return rows


def find_shards(root: Path) -> list[Shard]:
    """The shards of a folder, by number.

    Raises:
        DataError: If there are none, a file has no partner, or two have the same number.
    """
    for image, text in FILES:
        if (root / image).is_file() and (root / text).is_file():
            return [Shard(root / image, root / text, None)]
    home, (image, text) = _home(root)
    folders = {folder: _numbered(home / folder, ".npy") for folder in (image, text)}
    if (home / METADATA).is_dir() and (metadata := _numbered(home / METADATA, ".parquet")):
        folders[METADATA] = metadata
    every = sorted(set().union(*folders.values()))
    if not every:
        raise DataError(f"{home / image} and {home / text} hold no .npy file.")
    for folder, files in folders.items():
        missing = next((number for number in every if number not in files), None)
        if missing is not None:
            partner = next(files[missing] for files in folders.values() if missing in files)
            raise DataError(f"{home / folder} has no file with number {missing}, the partner of {partner}. Fetch it.")
    metadata = folders.get(METADATA, {})
    return [Shard(folders[image][i], folders[text][i], metadata.get(i)) for i in every]


def _home(root: Path) -> tuple[Path, tuple[str, str]]:
    """The folder that has one of the pairs of folders, and which: this one, or the only split in it."""
    found = _entries(root)
    homes = [(home, names) for home in (root, *found) for names in FOLDERS if all((home / x).is_dir() for x in names)]
    if homes and (homes[0][0] == root or len(homes) == 1):
        return homes[0]
    if homes:
        raise DataError(f"{root} has several splits. Give one of them: {', '.join(str(home) for home, _ in homes)}.")
    names = ", ".join(path.name for path in found[:8]) or "nothing"
    raise DataError(f"{root} holds no embeddings that vilu knows. Found {names}. Expected a store, or {LAYOUTS}.")


def _numbered(folder: Path, suffix: str) -> dict[int, Path]:
    """Files of a folder by the number at the end of their names, of any width."""
    found: dict[int, Path] = {}
    for path in _entries(folder):
        if path.suffix != suffix or path.name.startswith("."):
            continue
        digits = re.search(r"[0-9]+$", path.stem)
        if digits is None or not path.is_file():
            raise DataError(f"{path} must be a file with a number at the end of its name, which says its partner.")
        other = found.setdefault(int(digits[0]), path)
        if other != path:
            raise DataError(f"{other} and {path} have the same number, so their partners are not known. Remove one.")
    return found


def _entries(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder. Expected a store, or {LAYOUTS}.")
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise StorageError(f"cannot read {folder}: {error.strerror}.") from error


def _count_parquet(path: Path) -> int:
    try:
        with pq.ParquetFile(path) as file:
            return int(file.metadata.num_rows)
    except UNREADABLE_PARQUET as error:
        raise StorageError(f"{path} is damaged: {error}. Fetch it again.") from error

"""Shards of embeddings in the layout of LAION."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from vilu.artifacts.disk import or_refuse
from vilu.datasets.files import MISSING, ListingHash
from vilu.device import as_usual
from vilu.embeddings.checks import NORM_TOLERANCE, VALID, RowNumbers, normalised, row_status
from vilu.embeddings.pairs import Pools
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import DataError, ProvenanceError, StorageError, UsageError
from vilu.progress import track
from vilu.store.folds import Fold, rows_of_fold
from vilu.store.ledger import Reopened
from vilu.store.mapped import ChosenNumbers, MappedPairs, MappedParts, default_workers, in_threads
from vilu.store.parts import open_npy
from vilu.store.unreadable import or_damaged
from vilu.validation import checked

FOLDERS = (("img_emb", "text_emb"), ("images", "texts"))
"""Folders of image and caption embeddings, as clip-retrieval and LAION name them."""

FILES = (("img_emb.npy", "text_emb.npy"), ("images.npy", "texts.npy"))  # the same in one file each
METADATA = "metadata"

LAYOUTS = (
    "img_emb/img_emb_0000.npy + text_emb/text_emb_0000.npy, images/*.npy + texts/*.npy, "
    "or one of " + " and ".join(f"{image} + {text}" for image, text in FILES)
)
"""What is looked for, for messages."""


@dataclass(frozen=True)
class Shard:
    """Files whose rows belong together: (n, D) image and caption embeddings, and a row of metadata for each, if any."""

    image: Path
    text: Path
    metadata: Path | None

    @cached_property
    def shape(self) -> tuple[int, int]:
        """(n, D), from the headers of all files; ProvenanceError if they differ in their rows or widths."""
        shapes = {path: map_matrix(path).shape for path in (self.image, self.text)}
        counts = {path: shape[0] for path, shape in shapes.items()}
        if self.metadata is not None:
            with (
                or_damaged(self.metadata, "Fetch it again."),
                pq.ParquetFile(self.metadata) as file,
            ):
                counts[self.metadata] = file.metadata.num_rows
        if len(set(counts.values())) > 1:
            found = ", ".join(f"{path} has {count}" for path, count in counts.items())
            raise ProvenanceError(
                f"partners must have the same number of rows. {found}. Embed or fetch them again."
            )
        if shapes[self.image][1] != shapes[self.text][1]:
            raise ProvenanceError(
                f"{self.image} has width {shapes[self.image][1]} and {self.text} {shapes[self.text][1]}: "
                "they are not of one model."
            )
        return shapes[self.image][0], shapes[self.image][1]


def map_matrix(path: Path) -> NDArray[np.floating]:
    """The matrix in a ``.npy`` file, memory-mapped; float16 or float32 of any byte order."""
    rows, n_bytes = open_npy(path, "Fetch or write it again.")
    if (
        rows.dtype.kind != "f"
        or rows.dtype.itemsize not in (2, 4)
        or rows.ndim != 2
        or not rows.shape[1]
    ):
        raise DataError(
            f"{path} must be a matrix (rows, width) of float16 or float32. Got {rows.dtype} of shape {rows.shape}."
        )
    if not rows.flags.c_contiguous:
        raise DataError(
            f"{path} is in Fortran order, so its rows cannot be read one by one. Save it in C order."
        )
    if n_bytes != rows.nbytes:
        raise StorageError(
            f"{path} has {n_bytes} bytes of data, its header says {rows.nbytes}. Fetch it again."
        )
    return rows


def find_shards(root: Path) -> list[Shard]:
    """The shards of a folder, by number; DataError if there are none, or not every file has its partner."""
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
            raise DataError(
                f"{home / folder} has no file with number {missing}, the partner of {partner}. Fetch it."
            )
    metadata = folders.get(METADATA, {})
    return [Shard(folders[image][i], folders[text][i], metadata.get(i)) for i in every]


def _home(root: Path) -> tuple[Path, tuple[str, str]]:
    """The folder that has one of the pairs of folders, and which: this one, or the only split in it."""
    found = _entries(root)
    homes = [
        (home, names)
        for home in (root, *found)
        for names in FOLDERS
        if all((home / x).is_dir() for x in names)
    ]
    if homes and (homes[0][0] == root or len(homes) == 1):
        return homes[0]
    if homes:
        raise DataError(
            f"{root} has several splits. Give one of them: {', '.join(str(home) for home, _ in homes)}."
        )
    names = ", ".join(path.name for path in found[:8]) or "nothing"
    raise DataError(
        f"{root} holds no embeddings that vilu knows. Found {names}. Expected a store, or {LAYOUTS}."
    )


def _numbered(folder: Path, suffix: str) -> dict[int, Path]:
    """Files of a folder by the number at the end of their names, of any width."""
    found: dict[int, Path] = {}
    for path in _entries(folder):
        if path.suffix != suffix or path.name.startswith("."):
            continue
        digits = re.search(r"[0-9]+$", path.stem)
        if digits is None or not path.is_file():
            raise DataError(
                f"{path} must be a file with a number at the end of its name, which says its partner."
            )
        other = found.setdefault(int(digits[0]), path)
        if other != path:
            raise DataError(
                f"{other} and {path} have the same number, so their partners are not known. Remove one."
            )
    return found


def _entries(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder. Expected a store, or {LAYOUTS}.")
    with or_refuse(f"read {folder}"):
        return sorted(folder.iterdir())


CAPTIONS = (
    "caption",
    "TEXT",
)  # columns of the metadata that may hold the captions: clip-retrieval's name, and LAION's
SCAN_CELLS = (
    2**20
)  # numbers looked at together when rows are checked; 4 MiB in float32 stay in the cache


class LaionPairs(Reopened, MappedPairs):
    """Image-caption pairs from shards of embeddings; row i of an image file belongs to row i of its text file.

    Three layouts, with numbers of any width, and a fourth of one shard::

        img_emb/img_emb_0000.npy + text_emb/text_emb_0000.npy [+ metadata/metadata_0000.parquet]
        images/img_emb_0.npy + texts/text_emb_0.npy [+ metadata/metadata_0.parquet]
        train/images/0.npy + train/texts/0.npy
        images.npy + texts.npy, or img_emb.npy + text_emb.npy

    Opening reads headers only. Which rows are usable is known from one pass over all rows, made in
    blocks when it is first asked for (about as long as reading the files) and kept in memory, one
    byte a row: nothing is written into the folder. Rows that are not of unit norm are normalised
    whenever they are read, and that pass says how many.

    Rows are recognised by their embeddings: keys of published metadata repeat from one data set to
    the next. ``ids`` are their numbers over all shards.

    Nothing vouches for these files as receipts do for a store's: other numbers in them are not
    seen. Pickled, it is its path, as a store is; a shard of another size or time of modification is
    a change.

    Arguments are as of ``CaptionStore``; ``logit_scale`` multiplies the cosine (100 for OpenAI's
    CLIP), ``logit_bias`` is added to every logit, and a fold takes metadata with captions.

    Raises:
        DataError: If the folder has another layout, a file has no partner or does not hold a matrix
            of floats.
        StorageError: If a file is damaged.
        ProvenanceError: If partners differ in their number of rows or their width.
        UsageError: If there are no captions to make folds of.
    """

    @checked
    @as_usual()
    def __init__(
        self,
        path: str | os.PathLike[str],
        pools: Pools | None = None,
        *,
        logit_scale: float,
        logit_bias: float = 0.0,
        fold: Fold | None = None,
    ) -> None:
        root = Path(path)
        shards = find_shards(root)
        width = shards[0].shape[1]
        for shard in shards:
            if shard.shape[1] != width:
                raise ProvenanceError(
                    f"{shards[0].image} has width {width} and {shard.image} {shard.shape[1]}: "
                    "they are not of one model."
                )
        starts = np.cumsum([0, *(shard.shape[0] for shard in shards)], dtype=np.int64)
        space = EmbeddingSpace(width, float(logit_scale), float(logit_bias))
        self.seal = _listing(root, shards)
        self.options = {
            "pools": pools,
            "logit_scale": logit_scale,
            "logit_bias": logit_bias,
            "fold": fold,
        }
        chosen = None if fold is None else _rows_of_fold(root, shards, fold)
        rows = MappedParts(
            starts, {"image": (width,), "text": (width,)}, lambda name, i: _open(shards[i], name)
        )
        super().__init__(root, rows, ("image", "text"), space, pools or Pools(), chosen)
        self._all_unit = False  # until the pass over all rows says so
        self.ids = RowNumbers(len(rows)) if chosen is None else ChosenNumbers(chosen)

    def _take(self, name: str, index: Tensor) -> Tensor:
        rows = super()._take(name, index)
        return rows if self._all_unit else normalised(rows)[0]

    @cached_property
    def _row_status(self) -> NDArray[np.uint8]:
        status = np.full(len(self._rows), VALID, dtype=np.uint8)
        low, high, n_off = np.inf, 0.0, 0
        workers = default_workers()
        with (
            track("Checking embeddings", 2 * len(status), "rows") as task,
            in_threads(_check, self._blocks(), workers, 2 * workers) as checked,
        ):
            for start, found, norms in checked:
                mine = status[start : start + len(found)]
                np.copyto(mine, found, where=mine == VALID)
                good = norms[torch.from_numpy(found == VALID)]
                n_off += int(((good - 1).abs() > NORM_TOLERANCE).sum())
                if len(good):
                    low, high = min(low, float(good.min())), max(high, float(good.max()))
                task.advance(len(found))
        self._all_unit = not n_off
        if n_off:
            warnings.warn(
                f"{n_off} of {2 * len(status)} image and caption rows of {self.path} are not of unit norm "
                f"(norms {low:.3g} to {high:.3g}); they are normalised when they are read.",
                stacklevel=4,
            )
        return status if self._chosen is None else status[self._chosen.numpy()]

    def _blocks(self) -> Iterator[tuple[int, NDArray[np.floating]]]:
        """(number of the first row, (b, D) rows, not yet read) of every block of every file."""
        size = max(SCAN_CELLS // self.space.embed_dim, 1)
        for number, first in enumerate(self._rows.starts[:-1].tolist()):
            for name in self._arrays:
                part = self._rows.open_part(
                    name, number
                )  # a mapping of its own, whose pages go with it
                for start in range(0, len(part), size):
                    yield first + start, part[start : start + size]


def _check(block: tuple[int, NDArray[np.floating]]) -> tuple[int, NDArray[np.uint8], Tensor]:
    """(number of the first row, (b,) status, (b,) norms) of a block."""
    first, rows = block
    return first, *row_status(torch.from_numpy(rows.astype(rows.dtype.newbyteorder("="))).float())


def _listing(root: Path, shards: list[Shard]) -> str:
    """Hash of names, sizes and times of modification."""
    listing = ListingHash()
    for path in (
        path
        for shard in shards
        for path in (shard.image, shard.text, shard.metadata)
        if path is not None
    ):
        with or_refuse(f"read {path}"):
            listing.add(path.relative_to(root).as_posix(), MISSING, path.stat())
    return listing.hexdigest()


def _open(shard: Shard, name: str) -> NDArray[np.floating]:
    path = shard.image if name == "image" else shard.text
    rows = map_matrix(path)
    if rows.shape != shard.shape:
        raise StorageError(
            f"{path} changed while it was read: it had shape {shard.shape}, now it has {rows.shape}."
        )
    return rows


def _rows_of_fold(root: Path, shards: list[Shard], fold: Fold) -> NDArray[np.int64]:
    files = [(shard.metadata, shard.shape[0]) for shard in shards if shard.metadata is not None]
    if len(files) < len(shards):
        raise UsageError(
            f"folds are made by caption, and {root} has no metadata with captions. Leave fold out."
        )
    return rows_of_fold(files, CAPTIONS, fold, sum(n for _, n in files))

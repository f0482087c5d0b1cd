"""Image-caption embeddings in the layouts of LAION and clip-retrieval."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from vilu.artifacts.disk import convert_os_errors
from vilu.callers import warn_caller
from vilu.datasets.files import NO_VALUE, ListingHash
from vilu.device import torch_defaults
from vilu.embeddings.checks import NORM_TOLERANCE, VALID, RowNumbers, normalise_rows, row_status
from vilu.embeddings.pairs import Pools
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import DataError, ProvenanceError, StorageError, UsageError
from vilu.progress import track
from vilu.store.folds import Fold, rows_of_fold
from vilu.store.ledger import PickledByPath
from vilu.store.mapped import (
    ListedNumbers,
    MappedArrays,
    MappedPairs,
    default_workers,
    map_in_threads,
)
from vilu.store.parts import open_npy
from vilu.store.unreadable import convert_damage_errors
from vilu.validation import checked

FOLDER_NAMES = (("img_emb", "text_emb"), ("images", "texts"))
"""Folder names for image and caption embeddings: clip-retrieval's, and LAION's."""

# names of the image file and the caption file for a single shard
FILE_NAMES = (("img_emb.npy", "text_emb.npy"), ("images.npy", "texts.npy"))
METADATA_FOLDER = "metadata"  # name of the metadata folder
MAX_LISTED_ENTRIES = 8  # maximum number of file names in a message

LAYOUTS = (
    "img_emb/img_emb_0000.npy + text_emb/text_emb_0000.npy, images/*.npy + texts/*.npy, "
    "or one of " + " and ".join(f"{image} + {text}" for image, text in FILE_NAMES)
)
"""The accepted layouts, for messages."""


@dataclass(frozen=True)
class Shard:
    """Files with the same rows: row i of each file belongs to the same pair."""

    image_file: Path  # file with (n, D) image embeddings
    text_file: Path  # file with (n, D) caption embeddings
    metadata_file: Path | None  # file with n metadata rows, if any

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Shape (n, D) from all files' headers. Raises ProvenanceError if the files disagree."""
        n_images, image_width = map_matrix(self.image_file).shape
        n_texts, text_width = map_matrix(self.text_file).shape
        n_rows_of_file = {self.image_file: n_images, self.text_file: n_texts}
        if self.metadata_file is not None:
            with (
                convert_damage_errors(self.metadata_file, "Fetch it again."),
                pq.ParquetFile(self.metadata_file) as file,
            ):
                n_rows_of_file[self.metadata_file] = file.metadata.num_rows
        if len(set(n_rows_of_file.values())) > 1:
            row_counts = ", ".join(
                f"{path} has {n_rows}" for path, n_rows in n_rows_of_file.items()
            )
            raise ProvenanceError(
                f"partners must have the same number of rows. {row_counts}. Embed or fetch them "
                "again."
            )
        if image_width != text_width:
            raise ProvenanceError(
                f"{self.image_file} has width {image_width} and {self.text_file} {text_width}: "
                "they are not of one model."
            )
        return n_images, image_width

    @property
    def n_rows(self) -> int:
        """Number of rows n."""
        n_rows, _ = self.shape
        return n_rows

    @property
    def width(self) -> int:
        """Width D of the embeddings."""
        _, width = self.shape
        return width


def map_matrix(path: Path) -> NDArray[np.floating]:
    """Map the matrix in a ``.npy`` file into memory: float16 or float32, in any byte order.

    Raises:
        DataError: If the file holds no such matrix, or a matrix in Fortran order.
        StorageError: If the file is damaged.
    """
    rows, n_bytes = open_npy(path, "Fetch or write it again.")
    is_float = rows.dtype.kind == "f" and rows.dtype.itemsize in (2, 4)
    is_matrix = rows.ndim == 2 and rows.shape[1] > 0
    if not (is_float and is_matrix):
        raise DataError(
            f"{path} must be a matrix (rows, width) of float16 or float32. Got {rows.dtype} of "
            f"shape {rows.shape}."
        )
    if not rows.flags.c_contiguous:
        raise DataError(
            f"{path} is in Fortran order, so its rows cannot be read one by one. Save it in C "
            "order."
        )
    if n_bytes != rows.nbytes:
        raise StorageError(
            f"{path} has {n_bytes} bytes of data, its header says {rows.nbytes}. Fetch it again."
        )
    return rows


def find_shards(root: Path) -> list[Shard]:
    """Return the shards in a folder, in the order of the shard numbers.

    Raises:
        DataError: If there is no shard, or a shard's file is missing.
    """
    for image_name, text_name in FILE_NAMES:
        image_file = root / image_name
        text_file = root / text_name
        if image_file.is_file() and text_file.is_file():
            return [Shard(image_file, text_file, None)]
    base_folder, image_folder, text_folder = _find_base_folder(root)
    images = _numbered_files(base_folder / image_folder, ".npy")
    texts = _numbered_files(base_folder / text_folder, ".npy")
    metadata: dict[int, Path] = {}
    if (base_folder / METADATA_FOLDER).is_dir():
        metadata = _numbered_files(base_folder / METADATA_FOLDER, ".parquet")
    numbers = sorted({*images, *texts, *metadata})
    if not numbers:
        raise DataError(
            f"{base_folder / image_folder} and {base_folder / text_folder} hold no .npy file."
        )
    files_of_folder = {image_folder: images, text_folder: texts}
    if metadata:
        files_of_folder[METADATA_FOLDER] = metadata
    _require_partners(base_folder, files_of_folder, numbers)
    shards: list[Shard] = []
    for number in numbers:
        shards.append(Shard(images[number], texts[number], metadata.get(number)))
    return shards


def _require_partners(
    base_folder: Path, files_of_folder: Mapping[str, Mapping[int, Path]], numbers: Sequence[int]
) -> None:
    """Raise DataError if a folder has no file for one of the ``numbers``.

    Args:
        base_folder: The parent folder of the folders in ``files_of_folder``.
        files_of_folder: Maps each folder name to the files in the folder, by number.
        numbers: All numbers that occur in any of the folders.
    """
    for folder, files in files_of_folder.items():
        missing_numbers = [number for number in numbers if number not in files]
        if not missing_numbers:
            continue
        number = missing_numbers[0]
        # every number in ``numbers`` occurs in a folder, so another folder has this file
        partner = next(files[number] for files in files_of_folder.values() if number in files)
        raise DataError(
            f"{base_folder / folder} has no file with number {number}, the partner of {partner}. "
            "Fetch it."
        )


def _find_base_folder(root: Path) -> tuple[Path, str, str]:
    """Find the folder with the embeddings: ``root``, or else a sub-folder of ``root``.

    Returns the folder, and the names of two sub-folders: the first with image embeddings, the
    second with caption embeddings.

    Raises:
        DataError: If there is no such folder, or if several sub-folders of ``root`` have
            embeddings.
    """
    entries = _sorted_entries(root)
    base_folders: list[tuple[Path, str, str]] = []
    for folder in (root, *entries):
        for image_folder, text_folder in FOLDER_NAMES:
            if (folder / image_folder).is_dir() and (folder / text_folder).is_dir():
                base_folders.append((folder, image_folder, text_folder))
    if not base_folders:
        names = ", ".join(path.name for path in entries[:MAX_LISTED_ENTRIES]) or "nothing"
        raise DataError(
            f"{root} holds no embeddings that vilu knows. Found {names}. Expected a store, or "
            f"{LAYOUTS}."
        )
    # if ``root`` itself has embeddings, ``root`` comes first
    base_folder, image_folder, text_folder = base_folders[0]
    if base_folder != root and len(base_folders) > 1:
        splits = ", ".join(str(folder) for folder, _, _ in base_folders)
        raise DataError(f"{root} has several splits. Give one of them: {splits}.")
    return base_folder, image_folder, text_folder


def _numbered_files(folder: Path, suffix: str) -> dict[int, Path]:
    """Map the number at the end of each file name to the file, for all files in a folder."""
    file_of_number: dict[int, Path] = {}
    for path in _sorted_entries(folder):
        if path.suffix != suffix or path.name.startswith("."):
            continue
        match = re.search(r"[0-9]+$", path.stem)  # such as "0000" in "img_emb_0000"
        if match is None or not path.is_file():
            raise DataError(
                f"{path} must be a file with a number at the end of its name, by which it is "
                "matched with its partner."
            )
        number = int(match[0])
        if number in file_of_number:
            raise DataError(
                f"{file_of_number[number]} and {path} have the same number, so their partners are "
                "not known. Remove one."
            )
        file_of_number[number] = path
    return file_of_number


def _sorted_entries(folder: Path) -> list[Path]:
    """Return the sorted entries in a folder. Raise DataError if ``folder`` is no folder."""
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder. Expected a store, or {LAYOUTS}.")
    with convert_os_errors(f"cannot read {folder}"):
        return sorted(folder.iterdir())


CAPTION_COLUMNS = ("caption", "TEXT")
"""Names of the caption column in the metadata: clip-retrieval's name, and LAION's."""

# Maximum number of values in a block of rows. A thread checks one block at a time. Such a block
# takes 4 MiB in float32, which fits into a processor's cache.
MAX_BLOCK_VALUES = 2**20


class LaionPairs(PickledByPath, MappedPairs):
    """Image-caption pairs from embedding shards.

    Row i in a shard's image file and row i in the shard's text file are a pair. Messages call a
    shard's files partners.

    There are four layouts. In the first three, the numbers in file names may have any number of
    digits. The fourth layout has a single shard::

        img_emb/img_emb_0000.npy + text_emb/text_emb_0000.npy [+ metadata/metadata_0000.parquet]
        images/img_emb_0.npy + texts/text_emb_0.npy [+ metadata/metadata_0.parquet]
        train/images/0.npy + train/texts/0.npy
        images.npy + texts.npy, or img_emb.npy + text_emb.npy

    Opening reads headers only. When the usable rows are first needed, all rows are read once, in
    blocks. This takes about as long as reading the files. Each row's status is kept in memory (1
    byte per row), and nothing is written into the folder. Rows without unit norm are normalised
    each time they are read. A warning says how many such rows there are.

    Rows are identified by their embeddings, because different data sets use the same keys in the
    metadata. ``ids`` are the row numbers over all shards.

    These files have no receipts, so changed numbers in a file are not noticed. Like a store, the
    object is pickled as the folder's path. Unpickling treats a shard as changed if size or
    modification time differ.

    The arguments are those of ``CaptionStore`` and two more: ``logit_scale`` multiplies the cosine
    (100 for OpenAI's CLIP), and ``logit_bias`` is added to every logit. ``fold`` needs metadata
    with captions.

    Raises:
        DataError: If the folder has another layout, a shard lacks a file, or a file does not hold a
            float matrix.
        StorageError: If a file is damaged.
        ProvenanceError: If a shard's files differ in row count, or any two files in width.
        UsageError: If ``fold`` is given and there are no captions.
    """

    @checked
    @torch_defaults()
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
        width = _common_width(shards)
        space = EmbeddingSpace(width, float(logit_scale), float(logit_bias))
        self.folder_hash = _listing_hash(root, shards)
        self.options = {
            "pools": pools,
            "logit_scale": logit_scale,
            "logit_bias": logit_bias,
            "fold": fold,
        }
        chosen_rows = None if fold is None else _rows_of_fold(root, shards, fold)
        n_rows_of_shards = [shard.n_rows for shard in shards]
        shard_starts = np.cumsum([0, *n_rows_of_shards], dtype=np.int64)
        mapped_arrays = MappedArrays(
            shard_starts,
            {"image": (width,), "text": (width,)},
            lambda array_name, shard_number: _map_array(shards[shard_number], array_name),
        )
        super().__init__(
            root,
            mapped_arrays,
            array_names=("image", "text"),
            space=space,
            pools=pools or Pools(),
            chosen_rows=chosen_rows,
        )
        self._has_unit_norms = False  # _row_status changes this to True if all rows have unit norm
        self.ids = (
            RowNumbers(len(mapped_arrays)) if chosen_rows is None else ListedNumbers(chosen_rows)
        )

    def _take_rows(self, array_name: str, index: Tensor) -> Tensor:
        rows = super()._take_rows(array_name, index)
        if self._has_unit_norms:
            return rows
        unit_rows, _, _ = normalise_rows(rows)
        return unit_rows

    @cached_property
    def _row_status(self) -> NDArray[np.uint8]:
        """(N,) status of the rows, computed in one pass over all files.

        Warns if some rows do not have unit norm.
        """
        status = np.full(len(self._mapped_arrays), VALID, dtype=np.uint8)
        n_embeddings = 2 * len(status)  # an image and a caption per row
        statistics = _NormStatistics()
        n_threads = default_workers()
        with (
            track("Checking embeddings", n_embeddings, "rows") as task,
            map_in_threads(
                _check_block, self._blocks(), n_threads=n_threads, max_results_ahead=2 * n_threads
            ) as results,
        ):
            for start, block_status, norms in results:
                # A row has one status code for image and caption: the first code that is not VALID.
                status_so_far = status[start : start + len(block_status)]  # a view of ``status``
                np.copyto(status_so_far, block_status, where=status_so_far == VALID)
                is_valid = torch.from_numpy(block_status == VALID)
                statistics.add(norms[is_valid])
                task.advance(len(block_status))
        self._has_unit_norms = statistics.n_not_unit == 0
        if statistics.n_not_unit:
            warn_caller(
                f"{statistics.n_not_unit} of {n_embeddings} image and caption rows of "
                f"{self.path} are not of unit norm (norms {statistics.min_norm:.3g} to "
                f"{statistics.max_norm:.3g}); they are normalised when they are read."
            )
        return status if self._chosen_rows is None else status[self._chosen_rows.numpy()]

    def _blocks(self) -> Iterator[tuple[int, NDArray[np.floating]]]:
        """Yield all rows from all files in blocks: the first row number, and the rows (b, D).

        The rows are memory-mapped, so the disk is read only when the block is checked.
        """
        block_rows = max(MAX_BLOCK_VALUES // self.space.embed_dim, 1)
        for shard_number, shard_start in enumerate(self._mapped_arrays.part_starts[:-1].tolist()):
            for array_name in self._array_names:
                # Unlike ``MappedArrays.take``, this keeps no mapped part. So the memory for the
                # part is free again when the part's last block has been checked.
                part = self._mapped_arrays.open_part(array_name, shard_number)
                for start in range(0, len(part), block_rows):
                    yield shard_start + start, part[start : start + block_rows]


@dataclass
class _NormStatistics:
    """Statistics of row norms."""

    n_not_unit: int = 0  # number of norms that differ from 1 by more than the tolerance
    min_norm: float = np.inf  # smallest norm
    max_norm: float = 0.0  # largest norm

    def add(self, norms: Tensor) -> None:
        """Add the norms of more rows."""
        if not len(norms):
            return
        is_not_unit = (norms - 1).abs() > NORM_TOLERANCE
        self.n_not_unit += int(is_not_unit.sum())
        self.min_norm = min(self.min_norm, float(norms.min()))
        self.max_norm = max(self.max_norm, float(norms.max()))


def _common_width(shards: Sequence[Shard]) -> int:
    """Return the width of all shards. Raise ProvenanceError if there are different widths."""
    first_shard = shards[0]
    for shard in shards:
        if shard.width != first_shard.width:
            raise ProvenanceError(
                f"{first_shard.image_file} has width {first_shard.width} and {shard.image_file} "
                f"{shard.width}: they are not of one model."
            )
    return first_shard.width


def _check_block(block: tuple[int, NDArray[np.floating]]) -> tuple[int, NDArray[np.uint8], Tensor]:
    """Return a block's first row number, and the status codes (b,) and norms (b,).

    ``block`` has the first row number, and the rows (b, D).
    """
    first_row, rows = block
    # torch accepts only the processor's byte order
    native_dtype = rows.dtype.newbyteorder("=")
    native_rows = rows.astype(native_dtype)
    float32_rows = torch.from_numpy(native_rows).float()
    status, norms = row_status(float32_rows)
    return first_row, status, norms


def _listing_hash(root: Path, shards: list[Shard]) -> str:
    """Return a hash of all files' names, sizes and modification times."""
    listing = ListingHash()
    for shard in shards:
        for path in (shard.image_file, shard.text_file, shard.metadata_file):
            if path is None:
                continue
            with convert_os_errors(f"cannot read {path}"):
                name = path.relative_to(root).as_posix()
                file_status = path.stat()
                listing.add(name, NO_VALUE, file_status)
    return listing.hexdigest()


def _map_array(shard: Shard, array_name: str) -> NDArray[np.floating]:
    """Map the rows from a shard's array ``array_name`` ("image" or "text") into memory."""
    path = shard.image_file if array_name == "image" else shard.text_file
    rows = map_matrix(path)
    if rows.shape != shard.shape:
        raise StorageError(
            f"{path} changed while it was read: it had shape {shard.shape}, now it has "
            f"{rows.shape}."
        )
    return rows


def _rows_of_fold(root: Path, shards: list[Shard], fold: Fold) -> NDArray[np.int64]:
    """Return the ascending numbers (M,) of a fold's rows, counted over all shards."""
    metadata_files = [
        (shard.metadata_file, shard.n_rows) for shard in shards if shard.metadata_file is not None
    ]
    if len(metadata_files) < len(shards):
        raise UsageError(
            f"folds are made by caption, and {root} has no metadata with captions. Leave fold out."
        )
    return rows_of_fold(
        metadata_files, CAPTION_COLUMNS, fold, sum(shard.n_rows for shard in shards)
    )

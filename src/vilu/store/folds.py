"""Split rows into train, validation and test folds by caption.

A caption's fold depends only on the caption, not on the data set or the row order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vilu.errors import DataError, StorageError, UsageError
from vilu.progress import track
from vilu.store.unreadable import convert_damage_errors

Fold = Literal["train", "validation", "test"]

# Every caption has a fraction in [0, 1) (``fold_of``). A fraction below ``TRAIN_END`` means "train"
# (60 % of all captions). Any other means "validation" (10 %) below ``VALIDATION_END``, or else
# "test" (30 %).
TRAIN_END = 0.6
VALIDATION_END = 0.7
BLOCK_ROWS = 2**16  # number of captions read at a time


def fold_of(caption: str) -> Fold:
    """Return a caption's fold.

    The caption's BLAKE2b hash has 8 bytes. These are read as a whole number and divided by 2**64.
    The result is a fraction in [0, 1), which decides the fold. White space around the caption is
    ignored.

    Examples:
        >>> from vilu.store.folds import fold_of
        >>> fold_of("a photo of a cat") == fold_of("  a photo of a cat ")
        True
    """
    content = caption.strip().encode(errors="surrogatepass")
    hash_bytes = blake2b(content, digest_size=8).digest()
    whole_number = int.from_bytes(hash_bytes, "big")
    fraction = whole_number / 2**64
    if fraction < TRAIN_END:
        return "train"
    if fraction < VALIDATION_END:
        return "validation"
    return "test"


def rows_of_fold(
    metadata_files: Iterable[tuple[Path, int]],
    column_names: tuple[str, ...],
    fold: Fold,
    n_rows: int,
) -> NDArray[np.int64]:
    """Return the ascending numbers (M,) of the rows with a caption in a fold.

    A row without a caption is in the same fold as the caption "".

    Args:
        metadata_files: Metadata files, each with its row count.
        column_names: Possible names for the caption column. The first existing column is used.
        fold: The fold.
        n_rows: Number of rows in all files.
    """
    row_numbers = [np.empty(0, np.int64)]  # np.concatenate refuses an empty list
    first_row = 0  # first row number in the next block
    with track("Sorting captions into folds", n_rows, "rows") as task:
        for path, n_file_rows in metadata_files:
            for captions in read_captions(path, column_names, n_file_rows):
                is_in_fold = [fold_of(caption or "") == fold for caption in captions]
                indices_in_block = np.flatnonzero(is_in_fold)
                row_numbers.append(indices_in_block + first_row)
                first_row += len(captions)
                task.advance(len(captions))
    return np.concatenate(row_numbers)


def read_captions(
    path: Path, column_names: tuple[str, ...], n_rows: int
) -> Iterator[list[str | None]]:
    """Yield the captions in a metadata file, in blocks.

    Args:
        path: The file.
        column_names: Possible names for the caption column. The first existing column is used.
        n_rows: Expected number of rows in the file.

    Raises:
        StorageError: If the file is damaged, or does not have ``n_rows`` rows.
    """
    remedy = "Restore the file, or embed the images again."
    n_rows_read = 0
    with convert_damage_errors(path, remedy), pq.ParquetFile(path) as file:
        column_name = _caption_column(path, file.schema_arrow, column_names)
        for batch in file.iter_batches(BLOCK_ROWS, columns=[column_name]):
            batch.validate(full=True)  # checks that strings are UTF-8, and offsets within buffers
            n_rows_read += len(batch)
            yield batch.column(0).to_pylist()
    if n_rows_read != n_rows:
        raise StorageError(f"{path} has {n_rows_read} rows, expected {n_rows}. {remedy}")


def _caption_column(path: Path, schema: pa.Schema, column_names: tuple[str, ...]) -> str:
    """Return the first of ``column_names`` with a column in the file."""
    existing_names = [name for name in column_names if name in schema.names]
    if not existing_names:
        raise UsageError(
            f"folds are made by caption, and {path} has no column {' or '.join(column_names)}. "
            "Leave fold out."
        )
    name = existing_names[0]
    column_type = schema.field(name).type
    is_text = pa.types.is_string(column_type) or pa.types.is_large_string(column_type)
    if not is_text:
        raise DataError(f"column {name} of {path} must hold strings. Got {column_type} instead.")
    return name

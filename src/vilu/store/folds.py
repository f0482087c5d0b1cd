"""Train, validation and test rows by their captions: one caption is in one fold, whatever the data set or the order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vilu.errors import DataError, StorageError, UsageError
from vilu.progress import track
from vilu.store.unreadable import or_damaged

Fold = Literal["train", "validation", "test"]

TRAIN, VALIDATION = 0.6, 0.7  # ends of the folds in [0, 1): 60 % train, 10 % validation, 30 % test
READ_ROWS = 2**16  # captions read at a time


def fold_of(caption: str) -> Fold:
    """Fold of a caption: the first 8 bytes of its BLAKE2b hash, without white space at its ends, as u in [0, 1).

    Examples:
        >>> from vilu.store.folds import fold_of
        >>> fold_of("a photo of a cat") == fold_of("  a photo of a cat ")
        True
    """
    text = caption.strip().encode(errors="surrogatepass")
    u = int.from_bytes(blake2b(text, digest_size=8).digest(), "big") / 2**64
    return "train" if u < TRAIN else "validation" if u < VALIDATION else "test"


def rows_of_fold(
    files: Iterable[tuple[Path, int]], names: tuple[str, ...], fold: Fold, n_rows: int
) -> NDArray[np.int64]:
    """(M,) ascending numbers of the rows of a fold, in metadata files of so many rows each."""
    found, start = [np.empty(0, np.int64)], 0
    with track("Sorting captions into folds", n_rows, "rows") as task:
        for block in chain.from_iterable(read_captions(path, names, n) for path, n in files):
            mine = np.array([fold_of(caption or "") == fold for caption in block], dtype=bool)
            found.append(np.flatnonzero(mine) + start)
            start += len(block)
            task.advance(len(block))
    return np.concatenate(found)


def read_captions(path: Path, names: tuple[str, ...], n_rows: int) -> Iterator[list[str | None]]:
    """The captions of a metadata file of so many rows, in blocks, from the first of the columns that is there."""
    found, again = 0, "Restore the file, or embed the images again."
    with or_damaged(path, again), pq.ParquetFile(path) as file:
        for batch in file.iter_batches(
            READ_ROWS, columns=[_caption_column(path, file.schema_arrow, names)]
        ):
            batch.validate(full=True)  # strings are UTF-8, offsets are within their buffers
            found += len(batch)
            yield batch.column(0).to_pylist()
    if found != n_rows:
        raise StorageError(f"{path} has {found} rows, expected {n_rows}. {again}")


def _caption_column(path: Path, schema: pa.Schema, names: tuple[str, ...]) -> str:
    name = next((name for name in names if name in schema.names), None)
    if name is None:
        raise UsageError(
            f"folds are made by caption, and {path} has no column {' or '.join(names)}. Leave fold out."
        )
    kind = schema.field(name).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataError(f"column {name} of {path} must hold strings. Got {kind} instead.")
    return name

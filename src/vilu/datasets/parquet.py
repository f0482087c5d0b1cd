"""Parquet files that hold the encoded images themselves, streamed by row group."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vilu.datasets.base import Record
from vilu.datasets.captions import caption_readers
from vilu.datasets.columns import UNLABELLED, listing_columns, make_listing
from vilu.datasets.files import read_below
from vilu.datasets.selection import Selection
from vilu.errors import DataError, UsageError
from vilu.space import digest

IMAGE: Final = "image"
BATCH_ROWS: Final = 32
"""Rows in memory at a time."""

STREAMED: Final = {"pre_buffer": False, "buffer_size": 2**20}
"""Else a row group's column is read whole."""


def is_image_column(schema: pa.Schema) -> bool:
    """Whether there is a column ``image`` of bytes, or Hugging Face's struct of bytes and path."""
    if IMAGE not in schema.names:
        return False
    kind = schema.field(IMAGE).type
    if pa.types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


class ParquetDataset:
    """Images stored in a Parquet file.

    ``records`` streams: memory holds two pages of the file (writers put up to about a thousand images into one) and a
    batch of ``BATCH_ROWS`` images, whatever the size of file and row groups. A part that begins where the last one
    ended goes on reading there; another one first reads past the beginning of its row group.

    Args:
        source: The file.
        selection: Which rows, and what of them.

    Attributes:
        classes: Raw and prompt names; None when unlabelled or captioned.
    """

    def __init__(self, source: Path, selection: Selection) -> None:
        if IMAGE in selection.where:
            raise UsageError(f"{source}: rows cannot be chosen by their pictures. Give --where another column.")
        with pq.ParquetFile(source) as file:
            self._metadata = file.metadata
            schema = file.schema_arrow
            table = file.read(columns=listing_columns(schema, selection, str(source)))
        listing = make_listing(table, str(source), selection)
        status = source.stat()
        self.source = str(source)
        self.classes = listing.classes
        self.class_names = self.classes.names if self.classes else None
        self.captioned = listing.captions is not None
        self.fingerprint = digest(
            {
                "bytes": status.st_size,
                "mtime_ns": status.st_mtime_ns,
                "schema": schema.to_string(show_schema_metadata=True, truncate_metadata=False),
                "split": selection.split,
                "rows": len(listing.rows),
                **selection.fingerprint(),
                **({"captions": True} if self.captioned else {}),
            }
        )
        self._path = source
        self._rows = listing.rows
        self._labels = listing.labels
        self._keys = listing.keys
        self._captions = listing.captions
        sizes = [self._metadata.row_group(i).num_rows for i in range(self._metadata.num_row_groups)]
        self._resume: dict[int, Iterator[pa.Scalar]] = {}
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])

    def __len__(self) -> int:
        return len(self._rows)

    def records(self, start: int, stop: int) -> Iterator[Record]:
        """The images at positions start ... stop - 1.

        Raises:
            DataError: If the file turns out to be damaged.
        """
        keys, labels = self._keys[start:stop], self._labels[start:stop]
        images = self._resume.pop(start, None) or self._images(start)
        captions = caption_readers(self._captions, start, start + len(labels))
        for key, label, image, caption in zip(keys, labels, islice(images, len(labels)), captions, strict=True):
            known = None if label == UNLABELLED else int(label)
            yield Record(key.as_py(), known, partial(_read_cell, image, self._path.parent), caption)
        self._resume = {start + len(labels): images}

    def __getstate__(self) -> dict[str, object]:
        """For worker processes: all but the open file."""
        return {**self.__dict__, "_resume": {}}

    def _images(self, first: int) -> Iterator[pa.Scalar]:
        """The cells from position ``first`` to the end."""
        rows = self._rows[first:]
        bounds = np.searchsorted(rows, self._starts)
        try:
            with pq.ParquetFile(self._path, metadata=self._metadata, **STREAMED) as file:
                for group, (begin, end) in enumerate(pairwise(bounds)):
                    if begin < end:
                        yield from _cells(file, group, rows[begin:end] - self._starts[group])
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self._path} cannot be read on: {error}. Write it again.") from error


def _cells(file: pq.ParquetFile, group: int, wanted: NDArray[np.int64]) -> Iterator[pa.Scalar]:
    """The image cells of a row group at the positions ``wanted``, ascending."""
    first = 0
    for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=[IMAGE]):
        begin, end = np.searchsorted(wanted, [first, first + len(batch)])
        for position in wanted[begin:end]:
            yield batch.column(0)[int(position) - first]
        if end == len(wanted):
            return
        first += len(batch)


def _read_cell(cell: pa.Scalar, folder: Path) -> bytes:
    """The bytes in a cell, or those of the file that it names.

    Raises:
        OSError: If it has neither, or the file cannot be read.
    """
    value = cell.as_py()
    data: bytes | None = value["bytes"] if isinstance(value, dict) else value
    if data is not None:
        return data
    path = value.get("path") if isinstance(value, dict) else None
    if path is None:
        raise OSError(errno.ENODATA, "the row has no image")
    return read_below(folder, path)

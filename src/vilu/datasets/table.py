"""Tables of images, CSV or Parquet, that give the path of each image."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from vilu.datasets.base import ImageDataset, Record
from vilu.datasets.columns import LABEL, PATH, UNLABELLED, find_column, listing_columns, make_listing
from vilu.datasets.files import ListingHash, read_below, resolve_below
from vilu.datasets.parquet import ParquetDataset, is_image_column
from vilu.errors import DataError


def open_table(source: Path, *, split: str | None = None, classes: Path | None = None) -> ImageDataset:
    """A CSV (or TSV) or Parquet file with one image per row.

    Columns: ``path`` (or file, filename, image_path, filepath; relative to the table's folder), or in Parquet ``image``
    (encoded bytes, or Hugging Face's struct of bytes and path); optionally ``label`` (or class, target), ``split``,
    ``key``.

    Raises:
        DataError: If the file is unreadable, has no column of images, or its labels do not fit its classes.
        UsageError: If a split is asked for that is not there, or the classes file cannot be read.
    """
    try:
        if source.suffix.lower() in {".csv", ".tsv"}:
            return PathTable(source, _read_csv(source), split=split, classes=classes)
        schema = pq.read_schema(source)
        if is_image_column(schema):
            return ParquetDataset(source, split=split, classes=classes)
        columns = [_path_column(source, schema.names), *listing_columns(schema.names)]
        with pq.ParquetFile(source) as file:
            table = file.read(columns=columns)
        table.validate(full=True)
        return PathTable(source, table, split=split, classes=classes)
    except (pa.ArrowException, UnicodeDecodeError, csv.Error, OSError) as error:
        raise DataError(f"{source} cannot be read as a table: {error}. Write it again.") from error


class PathTable:
    """Images listed in a table by path.

    Paths are relative to the table's folder; one that is absolute or climbs out of it is a read error of its row.
    Keys are the ``key`` column, else the paths. The listing costs one stat per image.

    Args:
        source: The table's file.
        table: Its columns.
        split: Names of splits joined by ``+``; None for all rows.
        classes: A classes file.

    Attributes:
        classes: Raw and prompt names; None when unlabelled.
    """

    def __init__(self, source: Path, table: pa.Table, *, split: str | None, classes: Path | None) -> None:
        column = _path_column(source, table.column_names)
        listing = make_listing(table, str(source), split=split, classes=classes, default_key=column)
        self.source = str(source)
        self.classes = listing.classes
        self.class_names = self.classes.names if self.classes else None
        self._folder = source.parent
        self._labels = listing.labels
        self._keys = listing.keys
        paths = table[column].cast(pa.large_string()).combine_chunks()
        self._paths = pc.fill_null(paths, "").take(pa.array(listing.rows))
        hashed = ListingHash(*(self.classes.folders if self.classes else ()))
        for key, label, path in zip(self._keys, self._labels, self._paths, strict=True):
            hashed.add(key.as_py(), int(label), _status(self._folder, path.as_py()))
        self.fingerprint = hashed.hexdigest()

    def __len__(self) -> int:
        return len(self._labels)

    def records(self, start: int, stop: int) -> Iterator[Record]:
        """The images at positions start ... stop - 1."""
        part = slice(start, stop)
        for key, label, path in zip(self._keys[part], self._labels[part], self._paths[part], strict=True):
            known = None if label == UNLABELLED else int(label)
            yield Record(key.as_py(), known, partial(read_below, self._folder, path.as_py()))


def _status(folder: Path, path: str) -> os.stat_result | None:
    try:
        return os.stat(resolve_below(folder, path))  # noqa: PTH116  called once per row
    except OSError:  # missing or refused: recorded in the hash as such, and again as the row's error when it is read
        return None


def _path_column(source: Path, names: Sequence[str]) -> str:
    column = find_column(names, PATH)
    if column is None:
        raise DataError(
            f"{source} has no column of images: expected one of {', '.join(PATH)}, or in Parquet 'image' with encoded "
            f"bytes. Found: {', '.join(names) or 'no columns'}."
        )
    return column


def _read_csv(source: Path) -> pa.Table:
    """The columns in use, all as strings, except that labels which are all numbers are numbers."""
    delimiter = "\t" if source.suffix.lower() == ".tsv" else ","
    with source.open(encoding="utf-8-sig", newline="") as file:
        names = next(csv.reader(file, delimiter=delimiter), [])
    wanted = [_path_column(source, names), *listing_columns(names)]
    table = pyarrow.csv.read_csv(
        source,
        parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(wanted, pa.string()), include_columns=wanted
        ),
    )
    label = find_column(wanted, LABEL)
    if label is None:
        return table
    return table.set_column(wanted.index(label), label, _numbers_if_all(table[label]))


def _numbers_if_all(column: pa.ChunkedArray) -> pa.ChunkedArray:
    text = pc.utf8_trim_whitespace(column)
    filled = pc.if_else(pc.equal(text, ""), pa.scalar(None, text.type), text)
    for kind in (pa.int64(), pa.float64()):  # pandas writes whole numbers with gaps as 3.0
        try:
            return filled.cast(kind).cast(pa.int64())
        except pa.ArrowInvalid:
            continue
    return filled

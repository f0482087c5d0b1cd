"""Tables of images, CSV or Parquet, that give the path of each image."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from vilu.datasets.base import ImageDataset, Record
from vilu.datasets.captions import caption_readers
from vilu.datasets.columns import LABEL, PATH, UNLABELLED, caption_column, find_column, listing_columns, make_listing
from vilu.datasets.files import ListingHash, read_below, status_below
from vilu.datasets.parquet import ParquetDataset, is_image_column
from vilu.datasets.selection import Selection
from vilu.errors import DataError


def open_table(source: Path, selection: Selection) -> ImageDataset:
    """A CSV (or TSV) or Parquet file with one image per row.

    Columns: ``path`` (or file, filename, image_path, filepath; relative to the table's folder), or in Parquet ``image``
    (encoded bytes, or Hugging Face's struct of bytes and path); optionally ``label`` (or class, target) or ``caption``
    (or text), ``split``, ``key``, and any others to choose rows by.

    Raises:
        DataError: If the file is unreadable, has no column of images, or its labels do not fit its classes.
        UsageError: If rows or captions are asked for that are not there, or the classes file cannot be read.
    """
    try:
        if source.suffix.lower() in {".csv", ".tsv"}:
            return PathTable(source, _read_csv(source, selection), selection)
        schema = pq.read_schema(source)
        if is_image_column(schema):
            return ParquetDataset(source, selection)
        columns = [_path_column(source, schema.names), *listing_columns(schema, selection, str(source))]
        with pq.ParquetFile(source) as file:
            table = file.read(columns=columns)
        return PathTable(source, table, selection)
    except (pa.ArrowException, UnicodeError, csv.Error, OSError) as error:
        raise DataError(f"{source} cannot be read as a table: {error}. Write it again.") from error


class PathTable:
    """Images listed in a table by path.

    Paths are relative to the table's folder; one that is absolute or climbs out of it is a read error of its row.
    Keys are the ``key`` column, else the paths. The listing costs one stat per image.

    Args:
        source: The table's file.
        table: Its columns.
        selection: Which rows, and what of them.

    Attributes:
        classes: Raw and prompt names; None when unlabelled or captioned.
    """

    def __init__(self, source: Path, table: pa.Table, selection: Selection) -> None:
        column = _path_column(source, table.column_names)
        listing = make_listing(table, str(source), selection, default_key=column)
        self.source = str(source)
        self.classes = listing.classes
        self.class_names = self.classes.names if self.classes else None
        self.captioned = listing.captions is not None
        self._folder = source.parent
        self._labels = listing.labels
        self._keys = listing.keys
        self._captions = listing.captions
        paths = table[column].cast(pa.large_string()).combine_chunks()
        self._paths = pc.fill_null(paths, "").take(pa.array(listing.rows))
        hashed = ListingHash(*(self.classes.folders if self.classes else ()))
        for key, label, path in zip(self._keys, self._labels, self._paths, strict=True):
            hashed.add(key.as_py(), int(label), status_below(self._folder, path.as_py()))
        if self._captions is not None:
            hashed.add_texts(cell.as_py() for cell in self._captions)
        self.fingerprint = hashed.hexdigest()

    def __len__(self) -> int:
        return len(self._labels)

    def records(self, start: int, stop: int) -> Iterator[Record]:
        """The images at positions start ... stop - 1."""
        part = slice(start, stop)
        captions = caption_readers(self._captions, start, min(stop, len(self)))
        rows = zip(self._keys[part], self._labels[part], self._paths[part], captions, strict=True)
        for key, label, path, caption in rows:
            known = None if label == UNLABELLED else int(label)
            yield Record(key.as_py(), known, partial(read_below, self._folder, path.as_py()), caption)


def _path_column(source: Path, names: Sequence[str]) -> str:
    column = find_column(names, PATH)
    if column is None:
        raise DataError(
            f"{source} has no column of images: expected one of {', '.join(PATH)}, or in Parquet 'image' with encoded "
            f"bytes. Found: {', '.join(names) or 'no columns'}."
        )
    return column


def _read_csv(source: Path, selection: Selection) -> pa.Table:
    """The columns in use, all as strings, except that labels which are all numbers are numbers, and captions bytes."""
    delimiter = "\t" if source.suffix.lower() == ".tsv" else ","
    # not strict: a caption that is not UTF-8 is the error of its row, and the first block is decoded with the names
    with source.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        names = next(csv.reader(file, delimiter=delimiter), [])
    "".join(names).encode()
    schema = pa.schema([(name, pa.string()) for name in names])
    wanted = list(dict.fromkeys([_path_column(source, names), *listing_columns(schema, selection, str(source))]))
    types = dict.fromkeys(wanted, pa.string())
    caption = caption_column(names, {}, selection)
    if caption is not None:
        types[caption] = pa.binary()
    table = pyarrow.csv.read_csv(
        source,
        parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(column_types=types, include_columns=wanted),
    )
    label = find_column(wanted, LABEL)
    if label is None or caption is not None:
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

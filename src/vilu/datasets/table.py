"""Image tables (CSV, TSV, Parquet) with paths or bytes, and with labels or captions."""

from __future__ import annotations

import csv
import errno
import json
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vilu.artifacts.hashing import digest
from vilu.artifacts.tables import csv_names, read_columns, remove_apostrophes, require_width
from vilu.datasets.base import (
    CAPTIONS_OR_CLASSES,
    Faults,
    ImageDataset,
    ImageRecord,
    Selection,
    cells_as_bytes,
    find_fault,
    is_bytes_type,
)
from vilu.datasets.classes import ClassTable, class_table, refuse_numbers_as_names
from vilu.datasets.files import AllowedFolders, ListingHash, portable_name, size_and_time
from vilu.datasets.images import caption_readers
from vilu.errors import NO_NAME, OUTSIDE, UNKNOWN, DataError, StorageError, UsageError
from vilu.progress import track

# possible names for a column with paths, labels, splits, keys or captions
PATH_ALIASES: Final = ("path", "file", "filename", "image_path", "filepath")
LABEL_ALIASES: Final = ("label", "class", "target")
SPLIT_ALIASES: Final = ("split",)
KEY_ALIASES: Final = ("key",)
CAPTION_ALIASES: Final = ("caption", "text")

# key in a schema's metadata. The value is the class names, joined by commas.
CLASS_NAMES_KEY: Final = b"class_names"


@dataclass(frozen=True)
class TableRows:
    """A table's selected rows, in order.

    Attributes:
        positions: (N,) int64 row positions in the file.
        labels: (N,) int32 labels, -1 if unknown, -2 if the image is outside all classes.
        keys: (N,) keys. If there is no key column, the keys are paths or row numbers.
        classes: The whole file's class table. None without labels.
        captions: (N,) the captions' bytes, null in a row without caption. None if captions are not
            used.
        labels_without_class: Labels named by the user with ``--outside`` that have no class.
    """

    positions: NDArray[np.int64]
    labels: NDArray[np.int32]
    keys: pa.Array
    classes: ClassTable | None
    captions: pa.Array | None
    labels_without_class: frozenset[str] = frozenset()


def find_column(names: Sequence[str], aliases: Sequence[str]) -> str | None:
    """Return the column whose name is an alias, or None if there is no such column.

    If several columns have such names, the column with the first alias in ``aliases`` is returned.
    Case and outer blanks in column names are ignored. If two columns have the same alias, raise
    DataError.
    """
    for alias in aliases:
        columns = [name for name in names if name.strip().lower() == alias]
        if len(columns) > 1:
            raise DataError(f"column {alias!r} occurs {len(columns)} times. Rename all but one.")
        if columns:
            return columns[0]
    return None


def caption_column(
    names: Sequence[str], metadata: Mapping[bytes, bytes], selection: Selection
) -> str | None:
    """Return the caption column, or None if captions are not used.

    Captions are used if the user asks for captions, or if the table has captions and no classes.
    """
    column = find_column(names, CAPTION_ALIASES)
    if not selection.captions:
        has_labels = find_column(names, LABEL_ALIASES) is not None
        has_classes = selection.classes or has_labels or CLASS_NAMES_KEY in metadata
        return None if has_classes else column
    if selection.classes is not None:
        raise UsageError(CAPTIONS_OR_CLASSES)
    if column is None:
        expected_names = ", ".join(CAPTION_ALIASES)
        listed_names = ", ".join(names)
        raise UsageError(
            f"no column of captions: expected one of {expected_names}. Found: {listed_names}."
        )
    return column


def columns_to_read(schema: pa.Schema, selection: Selection, source: str) -> list[str]:
    """Return the column names for ``select_table_rows``."""
    names = schema.names
    columns_or_none = [
        find_column(names, KEY_ALIASES),
        find_column(names, LABEL_ALIASES),
        find_column(names, SPLIT_ALIASES),
        caption_column(names, schema.metadata or {}, selection),
    ]
    columns = [column for column in columns_or_none if column is not None]
    columns += selection.where_columns(names, source)
    return list(dict.fromkeys(columns))  # without repetitions, in order


def select_table_rows(
    table: pa.Table, source: str, selection: Selection, *, default_key: str | None = None
) -> TableRows:
    """Check a whole table's columns, and return the selected rows.

    The keys are in the key column. Without a key column, the keys are in the column
    ``default_key``. If ``default_key`` is None, the keys are row numbers.
    """
    caption_name = caption_column(table.column_names, table.schema.metadata or {}, selection)
    captions: pa.Array | None = None
    if caption_name is None:
        table.validate(full=True)
        table_labels = _read_labels(table, source, selection)
    else:
        captions = cells_as_bytes(table[caption_name], f"{source}, column {caption_name!r}")
        # Captions are not validated here. A bad caption shows when the row is read, and then only
        # this row is an error.
        other_columns = table.drop_columns([caption_name])
        other_columns.validate(full=True)
        table_labels = _unknown_labels(table)
    split_name = find_column(table.column_names, SPLIT_ALIASES)
    positions = selection.find_rows(table, source, split_name)
    arrow_positions = pa.array(positions)
    return TableRows(
        positions,
        labels=table_labels.labels[positions],
        keys=_select_keys(table, source, arrow_positions, default_key),
        classes=table_labels.classes,
        captions=None if captions is None else captions.take(arrow_positions),
        labels_without_class=table_labels.labels_without_class,
    )


def _select_keys(
    table: pa.Table, source: str, positions: pa.Array, default_key: str | None
) -> pa.Array:
    """Return the keys of the rows at ``positions``, by the rule in ``select_table_rows``."""
    key_name = find_column(table.column_names, KEY_ALIASES) or default_key
    if key_name is None:
        return positions.cast(pa.string())
    keys = _read_keys(table, key_name, source)
    return keys.take(positions)


class _TableLabels(NamedTuple):
    """The labels of all table rows, selected or not. ``TableRows`` describes the fields."""

    labels: NDArray[np.int32]
    classes: ClassTable | None
    labels_without_class: frozenset[str] = frozenset()


def _unknown_labels(table: pa.Table) -> _TableLabels:
    """Return the labels for a table without classes: all labels are unknown."""
    labels = np.full(len(table), UNKNOWN, dtype=np.int32)
    return _TableLabels(labels=labels, classes=None)


def _read_labels(table: pa.Table, source: str, selection: Selection) -> _TableLabels:
    """Return all rows' labels and the classes.

    The label column holds class names or numbers. For numbers, the names come from the schema's
    metadata or from the classes file.
    """
    label_name = find_column(table.column_names, LABEL_ALIASES)
    names_in_schema = _names_in_schema(table.schema, label_name, source)
    column = pa.nulls(len(table))  # without the column, all labels are missing
    if label_name is not None:
        column = table[label_name].combine_chunks()
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if _is_text_type(column.type):
        labels, names = _encode_labels(column)
        # if all labels are missing, ``names`` is empty: the data have no class names
        classes = class_table(names or None, selection.classes, outside=selection.outside)
        return _TableLabels(labels, classes)
    numbers = _to_whole_numbers(column, f"{source}, column {label_name!r}")
    has_labels = numbers.null_count < len(numbers)
    classes = class_table(
        names_in_schema, selection.classes, numeric_labels=True, outside=selection.outside
    )
    if classes is None:
        if not has_labels:
            return _unknown_labels(table)
        raise DataError(
            f"{source}: column {label_name!r} holds numbers, but the names of the classes are "
            "missing. Give the names in label order with --classes FILE, or store them in the "
            "schema metadata."
        )
    if names_in_schema is None and has_labels:
        refuse_numbers_as_names(classes, source)
    return _check_label_numbers(numbers, classes, source, selection.outside)


def _is_text_type(column_type: pa.DataType) -> bool:
    """Return whether cells are text, in any of Arrow's three text types."""
    checks = [pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view]
    return any(check(column_type) for check in checks)


def _check_label_numbers(
    numbers: pa.Array, classes: ClassTable, source: str, outside: Sequence[str]
) -> _TableLabels:
    """Check numeric labels, and return the labels with the classes.

    Raise DataError for a label that has no class, and is neither missing nor in ``outside``.
    """
    n_classes = len(classes.names)
    numbers, labels_without_class = _replace_labels_without_class(numbers, n_classes, outside)
    _require_valid_labels(numbers, n_classes, source)
    numbers = pc.fill_null(numbers, UNKNOWN)
    labels = numbers.to_numpy(zero_copy_only=False).astype(np.int32)
    return _TableLabels(labels, classes, labels_without_class)


def _replace_labels_without_class(
    numbers: pa.Array, n_classes: int, outside: Sequence[str]
) -> tuple[pa.Array, frozenset[str]]:
    """Put -2 in place of labels that are in ``outside`` and have no class.

    Returns all labels, and the replaced labels.
    """
    labels_without_class = []
    distinct_numbers = pc.unique(numbers)
    distinct_labels = pc.drop_null(distinct_numbers)
    for label in distinct_labels.to_pylist():
        is_class = 0 <= label < n_classes
        if not is_class and str(label) in outside:
            labels_without_class.append(label)
    numbers_without_class = pa.array(labels_without_class, numbers.type)
    is_without_class = pc.is_in(numbers, value_set=numbers_without_class)
    is_without_class = pc.fill_null(is_without_class, fill_value=False)
    outside_label = pa.scalar(OUTSIDE, numbers.type)
    labels = pc.if_else(is_without_class, outside_label, numbers)
    return labels, frozenset(map(str, labels_without_class))


def _encode_labels(column: pa.Array) -> tuple[NDArray[np.int32], list[str]]:
    """Return each text's label, and the different texts, sorted. Label i means text i."""
    # ``encoded`` has a dictionary with the different texts, and a dictionary index for each row
    encoded = _dictionary_encode(column)
    names: list[str] = encoded.dictionary.to_pylist()
    order = sorted(range(len(names)), key=names.__getitem__)  # indices that sort the names
    label_of_index = np.empty(len(names) + 1, dtype=np.int32)
    label_of_index[order] = np.arange(len(names))  # the first name in sorted order gets label 0
    label_of_index[-1] = UNKNOWN  # missing labels have the index -1 below, and read the last entry
    filled_indices = pc.fill_null(encoded.indices, -1)
    indices = filled_indices.to_numpy(zero_copy_only=False)
    return label_of_index[indices], [names[i] for i in order]


def _dictionary_encode(column: pa.Array) -> pa.DictionaryArray:
    """Encode texts by a dictionary, with null for an empty label or ``NO_NAME``."""
    texts = column.cast(pa.large_string())
    texts = _null_if_unknown(texts)
    return texts.dictionary_encode()


def _to_whole_numbers(column: pa.Array, location: str) -> pa.Array:
    """Convert labels to int64. Raise DataError if labels are not whole numbers.

    ``location`` names the file and the column, at the message's beginning.
    """
    column_type = column.type
    is_floating = pa.types.is_floating(column_type)
    is_integer = pa.types.is_integer(column_type)
    is_empty = pa.types.is_null(column_type)
    if not (is_floating or is_integer or is_empty):
        raise DataError(
            f"{location}: labels must be whole numbers or strings. Found {column_type}."
        )
    if is_floating:  # pandas writes whole numbers with missing values as floats with NaN
        is_missing = pc.is_nan(column)
        no_label = pa.scalar(None, column_type)
        column = pc.if_else(is_missing, no_label, column)
    try:
        return column.cast(pa.int64())
    except pa.ArrowException as error:
        raise DataError(
            f"{location}: labels must be whole numbers or strings. Found {column_type}: {error}."
        ) from error


def _require_valid_labels(numbers: pa.Array, n_classes: int, source: str) -> None:
    """Raise DataError for the first wrong label. Labels are 0 to ``n_classes`` - 1, -2 or null."""
    is_negative = pc.less(numbers, 0)
    is_too_large = pc.greater_equal(numbers, n_classes)
    is_no_class = pc.or_(is_negative, is_too_large)
    is_not_outside = pc.not_equal(numbers, OUTSIDE)
    is_wrong = pc.and_(is_no_class, is_not_outside)
    row = pc.index(is_wrong, value=True).as_py()  # -1 if no label is wrong
    if row >= 0:
        raise DataError(
            f"{source} row {row} (counting from 0) has label {numbers[row]}; the class table has "
            f"{n_classes} names, so labels are 0 to {n_classes - 1}, -2 for none of the classes, "
            "or null where unknown. If your table has another number for none of the classes, "
            "give the number with --outside."
        )


def _names_in_schema(schema: pa.Schema, label_name: str | None, source: str) -> list[str] | None:
    """Return the class names in a schema's metadata, or None if there are no class names.

    There are two forms. Under the key ``class_names``, the names are joined by commas. Hugging Face
    writes a list of names into the ClassLabel for the column ``label_name``.
    """
    metadata: Mapping[bytes, bytes] = schema.metadata or {}
    try:
        if CLASS_NAMES_KEY in metadata:
            joined_names = metadata[CLASS_NAMES_KEY].decode()
            return [name.strip() for name in joined_names.split(",")]
        description: Any = json.loads(metadata.get(b"huggingface", b"{}"))
        info: Any = description.get("info", {})
        features: Any = info.get("features", {})
        column_features: Any = features.get(label_name, {})
        names = column_features.get("names")
    except (ValueError, AttributeError) as error:
        raise DataError(
            f"{source}: damaged class names in the schema metadata: {error}."
        ) from error
    if names is None:
        return None
    is_list_of_texts = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not is_list_of_texts:
        raise DataError(
            f"{source}: the names of a ClassLabel must be a list of strings. "
            f"Got {names!r:.80} instead."
        )
    return list(names)


def _read_keys(table: pa.Table, name: str, source: str) -> pa.Array:
    """Return the keys in a column. Raise DataError if a key is missing or occurs twice."""
    text_type = pa.large_string()
    keys = table[name].cast(text_type)
    keys = keys.combine_chunks()
    has_no_key = pc.is_null(keys)
    row_without_key = pc.index(has_no_key, value=True).as_py()  # -1 if every row has a key
    if row_without_key >= 0:
        raise DataError(
            f"{source} row {row_without_key} (counting from 0) has no {name!r}. Every row needs "
            "one."
        )
    n_distinct = pc.count_distinct(keys)
    if n_distinct.as_py() < len(keys):
        counts = keys.value_counts()
        is_repeated = pc.greater(counts.field("counts"), 1)
        repeated_keys = counts.filter(is_repeated)
        first_repeated = repeated_keys[0]["values"].as_py()
        raise DataError(
            f"{source}: column {name!r} must be unique. {first_repeated!r} occurs more than once. "
            "Keep one of these rows, or give every row its own name in a column "
            f"{KEY_ALIASES[0]!r}."
        )
    return _escape_keys(keys)


def _escape_keys(keys: pa.Array) -> pa.Array:
    """Return the keys with escapes (``portable_name``), to be safe for terminals."""
    # true if a key has a character that is not printable ASCII, or the beginning of an escape
    needs_escape = pc.match_substring_regex(keys, r"[^ -~]|\\x")
    if not pc.any(needs_escape).as_py():
        return keys
    return pa.array([portable_name(key) for key in keys.to_pylist()], keys.type)


IMAGE_COLUMN: Final = "image"  # name of the column with encoded images
BATCH_ROWS: Final = 32  # number of images in memory at a time
# Options for ParquetFile. Without these options, a whole row group's column would be read at once.
STREAM_OPTIONS: Final = {"pre_buffer": False, "buffer_size": 2**20}


def is_image_column(schema: pa.Schema) -> bool:
    """Return whether the column ``image`` has bytes, or Hugging Face's structs with bytes."""
    if IMAGE_COLUMN not in schema.names:
        return False
    column_type = schema.field(IMAGE_COLUMN).type
    if pa.types.is_struct(column_type):
        return bool(column_type.get_field_index("bytes") >= 0)
    return is_bytes_type(column_type)


class _ImagesOfTable:
    """The base class for data sets with a table. Subclasses read the images."""

    def __init__(self, source: Path, table_rows: TableRows) -> None:
        self.source = str(source)
        self.classes = table_rows.classes
        self.class_names: tuple[str, ...] | None = None
        if table_rows.classes is not None:
            self.class_names = table_rows.classes.names
        self.captioned = table_rows.captions is not None
        self.labels_without_class = table_rows.labels_without_class
        self._labels = table_rows.labels
        self._keys = table_rows.keys
        self._captions = table_rows.captions

    def __len__(self) -> int:
        return len(self._labels)

    def _records(
        self, start: int, n_rows: int, readers: Iterable[Callable[[], bytes]]
    ) -> Iterator[ImageRecord]:
        """Yield the records for ``n_rows`` rows from ``start`` on.

        ``readers`` has a function for each row, to read the image.
        """
        stop = start + n_rows
        keys = self._keys[start:stop]
        labels = self._labels[start:stop].tolist()
        captions = caption_readers(self._captions, start, stop)
        for key, number, read, caption in zip(keys, labels, readers, captions, strict=True):
            label: int | None = None if number == UNKNOWN else number
            yield ImageRecord(key.as_py(), label, read, caption)


class ParquetDataset(_ImagesOfTable):
    """Images stored in a Parquet file.

    ``records`` streams the images. Memory holds two pages and a batch of ``BATCH_ROWS`` images,
    however large the file and the row groups are. A page has up to about a thousand images. If a
    call to ``records`` starts at the row where the last call ended, reading continues there.
    Otherwise, the row group with ``start`` is read from the beginning, and rows before ``start``
    are skipped.
    """

    def __init__(self, source: Path, selection: Selection) -> None:
        if IMAGE_COLUMN in selection.where:
            raise UsageError(
                f"{source}: rows cannot be chosen by their images. Give --where another column."
            )
        status = source.stat()
        with pq.ParquetFile(source) as file:
            self._metadata = file.metadata
            schema = file.schema_arrow
            table = file.read(columns=columns_to_read(schema, selection, str(source)))
        table_rows = select_table_rows(table, str(source), selection)
        super().__init__(source, table_rows)
        facts = {
            "bytes": status.st_size,
            "mtime_ns": status.st_mtime_ns,
            "schema": schema.to_string(show_schema_metadata=True, truncate_metadata=False),
            "split": selection.split,
            "rows": len(table_rows.positions),
            **selection.fingerprint_entries(),
        }
        if self.captioned:
            facts["captions"] = True
        self.fingerprint = digest(facts)
        self._path = source
        self._size_and_time = (status.st_size, status.st_mtime_ns)
        self._allowed_folders = selection.allowed_folders(source)
        self._row_positions = table_rows.positions
        n_groups = self._metadata.num_row_groups
        group_sizes = [self._metadata.row_group(group).num_rows for group in range(n_groups)]
        # The iterator over image cells that the last call to ``records`` left open, and as its key
        # the position of the next image. Empty before the first call.
        self._open_image_cells: dict[int, Iterator[pa.Scalar]] = {}
        # each row group's first row number. The last entry is the number of all rows.
        self._group_starts = np.concatenate([[0], np.cumsum(group_sizes, dtype=np.int64)])

    def records(self, start: int, stop: int) -> Iterator[ImageRecord]:
        """Yield the images at positions start ... stop - 1."""
        n_rows = len(self._labels[start:stop])
        # not None if the last call ended at ``start``
        image_cells = self._open_image_cells.pop(start, None)
        if image_cells is None:
            image_cells = self._image_cells(start)
        readers = (
            partial(_read_image_cell, cell, self._allowed_folders)
            for cell in islice(image_cells, n_rows)
        )
        yield from self._records(start, n_rows, readers)
        self._require_unchanged()
        self._open_image_cells = {start + n_rows: image_cells}

    def __getstate__(self) -> dict[str, object]:
        """Return the state to pickle for worker processes: everything except open iterators."""
        return {**self.__dict__, "_open_image_cells": {}}

    def _image_cells(self, first: int) -> Iterator[pa.Scalar]:
        """Yield all selected rows' image cells from the position ``first`` on."""
        rows = self._row_positions[first:]
        self._require_unchanged()
        # ``rows`` are ascending, so a row group's rows are consecutive: rows[begin:end]
        borders = np.searchsorted(rows, self._group_starts)
        group_borders = pairwise(borders)
        try:
            with pq.ParquetFile(self._path, metadata=self._metadata, **STREAM_OPTIONS) as file:
                for group, (begin, end) in enumerate(group_borders):
                    has_rows = begin < end
                    if has_rows:
                        rows_in_group = rows[begin:end] - self._group_starts[group]
                        yield from _image_cells_of_group(file, group, rows_in_group)
        except (pa.ArrowException, OSError) as error:
            self._require_unchanged()
            raise DataError(f"{self._path} cannot be read on: {error}. Write it again.") from error

    def _require_unchanged(self) -> None:
        """Raise DataError if the file has changed since the data set was opened."""
        # keys and labels were read at the opening, and do not belong to another file's images
        if size_and_time(self._path) != self._size_and_time:
            raise DataError(
                f"{self._path} changed while it was read. When nothing writes to it any more, give "
                "another output folder, or --overwrite to replace this one."
            )


def _image_cells_of_group(
    file: pq.ParquetFile, group: int, rows: NDArray[np.int64]
) -> Iterator[pa.Scalar]:
    """Yield a row group's image cells at the ascending positions ``rows``."""
    batch_start = 0  # position of the batch's first row in the row group
    for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=[IMAGE_COLUMN]):
        images = batch.column(IMAGE_COLUMN)
        # ``rows`` are ascending, so this batch's rows are consecutive: rows[begin:end]
        batch_stop = batch_start + len(batch)
        begin, end = np.searchsorted(rows, [batch_start, batch_stop])
        for row in rows[begin:end].tolist():
            yield images[row - batch_start]
        if end == len(rows):  # no row is in a later batch
            return
        batch_start = batch_stop


def _read_image_cell(cell: pa.Scalar, allowed_folders: AllowedFolders) -> bytes:
    """Return the bytes in a cell, or in the file at the cell's path."""
    value = cell.as_py()  # bytes, or a dictionary with bytes and path
    content: bytes | None = value
    path: str | None = None
    if isinstance(value, dict):
        content = value["bytes"]
        path = value.get("path")
    if content is not None:
        return content
    if path is None:
        raise OSError(errno.ENODATA, "the row has no image")
    return allowed_folders.read(path)


def open_table(source: Path, selection: Selection) -> ImageDataset:
    """Open a CSV, TSV or Parquet file with one image per row.

    The columns are:

    - ``path`` (or file, filename, image_path, filepath): paths relative to the table's folder, or
      to ``selection.root``.
    - In Parquet, the column ``image`` may replace ``path``. The cells have encoded bytes, or
      Hugging Face's structs with bytes and path.
    - Optional: ``label`` (or class, target), ``caption`` (or text), ``split``, ``key``, and further
      columns for selecting rows.
    """
    try:
        if source.suffix.lower() in {".csv", ".tsv"}:
            return PathTable(source, _read_csv(source, selection), selection)
        schema = pq.read_schema(source)
        require_width(source, len(schema))
        if is_image_column(schema):
            return ParquetDataset(source, selection)
        columns = [
            _path_column(source, schema.names),
            *columns_to_read(schema, selection, str(source)),
        ]
        with pq.ParquetFile(source) as file:
            table = file.read(columns=columns)
        return PathTable(source, table, selection)
    except PermissionError as error:
        raise StorageError(f"cannot read {source}: permission denied.") from error
    except (pa.ArrowException, UnicodeError, csv.Error, OSError) as error:
        raise DataError(f"{source} cannot be read as a table: {error}. Write it again.") from error


class PathTable(_ImagesOfTable):
    """Images with their paths listed in a table.

    Without ``selection.root``, paths are relative to the table's folder and must stay below this
    folder. With ``selection.root``, paths are relative to that root and must stay below that root.
    Absolute paths, and paths with ".." (from the table's folder), are then accepted if the file is
    below ``selection.root``. If a row's file is elsewhere, also through a link, reading the row
    raises an error. The column ``key`` has the keys. Without this column, the paths are the keys.
    The listing needs two system calls per image.
    """

    def __init__(self, source: Path, table: pa.Table, selection: Selection) -> None:
        path_name = _path_column(source, table.column_names)
        table_rows = select_table_rows(table, str(source), selection, default_key=path_name)
        super().__init__(source, table_rows)
        paths = table[path_name].cast(pa.large_string())
        paths = paths.combine_chunks()
        self._paths = pc.fill_null(paths, "").take(pa.array(table_rows.positions))
        self._allowed_folders = selection.allowed_folders(source)
        data_names = () if self.classes is None else self.classes.data_names
        listing_hash = ListingHash(*data_names)
        faults = np.zeros(len(self), dtype=np.uint8)
        with track(f"listing {source.name}", len(self), "images") as task:
            rows = zip(self._keys, self._labels, self._paths, strict=True)
            for position, (key, label, cell) in enumerate(rows):
                path = cell.as_py()
                status = self._allowed_folders.status(path)
                listing_hash.add(key.as_py(), int(label), status)
                get_full_path = partial(self._allowed_folders.resolve, path)
                faults[position] = find_fault(status, get_full_path)
                task.advance(1)
        self.faults = Faults(
            kinds=faults,
            folder=self._allowed_folders.folder,
            path_at=self._path_at,
            location_rule=self._location_rule,
        )
        if self._captions is not None:
            listing_hash.add_texts(cell.as_py() for cell in self._captions)
        self.fingerprint = listing_hash.hexdigest()

    def records(self, start: int, stop: int) -> Iterator[ImageRecord]:
        """Yield the images at positions start ... stop - 1."""
        paths = self._paths[start:stop]
        readers = (partial(self._allowed_folders.read, path.as_py()) for path in paths)
        return self._records(start, len(paths), readers)

    def _path_at(self, position: int) -> str:
        return str(self._paths[position].as_py())

    def _location_rule(self, forbidden_positions: NDArray[np.int64]) -> str:
        """Return a text that says where files are allowed, and proposes a ``--root``.

        ``forbidden_positions`` are the positions of the files outside the allowed places. The
        proposed ``--root`` holds all these files. "/" is not proposed.
        """
        folders: list[str] = []
        for position in forbidden_positions:
            path = self._path_at(position)
            file = self._allowed_folders.real_path(path)
            folders.append(os.path.dirname(file))  # noqa: PTH120
        common_folder = os.path.commonpath(folders)
        hint = ""
        is_top_folder = Path(common_folder).parent == Path(common_folder)  # "/" does not help
        if not is_top_folder:
            hint = f" --root {shlex.quote(common_folder)} holds these."
        return (
            "Paths are relative to the table's folder, or to --root DIR. Neither paths nor links "
            "may lead out of this folder. With --root, absolute paths below it are accepted, too."
            + hint
        )


def _path_column(source: Path, names: Sequence[str]) -> str:
    """Return the path column. Raise DataError if there is no such column."""
    column = find_column(names, PATH_ALIASES)
    if column is None:
        expected_names = ", ".join(PATH_ALIASES)
        listed_names = ", ".join(names) or "no columns"
        raise DataError(
            f"{source} has no column of images: expected one of {expected_names}, or in "
            f"Parquet 'image' with encoded bytes. Found: {listed_names}."
        )
    return column


def _read_csv(source: Path, selection: Selection) -> pa.Table:
    """Read a CSV file's used columns. Captions are bytes, all other columns are texts.

    Labels become numbers if all labels are numbers.
    """
    delimiter = ","
    if source.suffix.lower() == ".tsv":
        delimiter = "\t"
    names = csv_names(source, delimiter)
    text_type = pa.string()
    schema = pa.schema([(name, text_type) for name in names])
    columns = [_path_column(source, names), *columns_to_read(schema, selection, str(source))]
    columns = list(dict.fromkeys(columns))  # without repetitions, in order
    type_of_column = dict.fromkeys(columns, text_type)
    caption_name = caption_column(names, {}, selection)
    if caption_name is not None:
        type_of_column[caption_name] = pa.binary()
    table = read_columns(source, type_of_column, delimiter, include_columns=columns)
    text_columns = [column for column in columns if column != caption_name]
    table = remove_apostrophes(table, text_columns)
    label_name = find_column(columns, LABEL_ALIASES)
    if label_name is None or caption_name is not None:
        return table
    labels = _numbers_if_possible(table[label_name])
    position = columns.index(label_name)
    return table.set_column(position, label_name, labels)


def _numbers_if_possible(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return labels as int64 if all are whole numbers or missing, otherwise as text."""
    labels = _null_if_unknown(column)
    # float64 is tried, too, because pandas writes the label 3 as 3.0 if other labels are missing
    for number_type in (pa.int64(), pa.float64()):
        try:
            return labels.cast(number_type).cast(pa.int64())
        except pa.ArrowInvalid:
            continue
    return labels


def _null_if_unknown(
    column: pa.Array | pa.ChunkedArray,
) -> Any:  # noqa: ANN401 - the same kind of array
    """Return labels without outer blanks, with null for an empty label or ``NO_NAME``."""
    texts = pc.utf8_trim_whitespace(column)
    unknown_texts = pa.array(["", NO_NAME], texts.type)
    is_unknown = pc.is_in(texts, value_set=unknown_texts)
    no_label = pa.scalar(None, texts.type)
    return pc.if_else(is_unknown, no_label, texts)

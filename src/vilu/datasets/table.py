"""Tables of images (CSV, TSV, Parquet) with paths or bytes, and with labels or captions."""

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
from vilu.artifacts.tables import as_written, csv_names, read_columns, require_width
from vilu.datasets.base import (
    CAPTIONS_OR_CLASSES,
    Faults,
    ImageDataset,
    ImageRecord,
    Selection,
    bytes_of,
    fault_of,
    is_binary,
)
from vilu.datasets.classes import ClassTable, class_table, refuse_numbers
from vilu.datasets.files import Bounds, ListingHash, portable_name
from vilu.datasets.images import caption_readers
from vilu.errors import NO_NAME, OUTSIDE, UNKNOWN, DataError, StorageError, UsageError
from vilu.progress import track

# names that a column may have, by what it holds
PATH: Final = ("path", "file", "filename", "image_path", "filepath")
LABEL: Final = ("label", "class", "target")
SPLIT: Final = ("split",)
KEY: Final = ("key",)
CAPTION: Final = ("caption", "text")

CLASS_NAMES: Final = b"class_names"  # key in the metadata of a schema: names joined by commas


@dataclass(frozen=True)
class TableRows:
    """The selected rows of a table, in order.

    Attributes:
        rows: (N,) int64 positions in the file.
        labels: (N,) int32 labels, -1 if unknown, -2 if the image belongs to none of the classes.
        keys: (N,) keys; the paths or the numbers of the rows if there is no key column.
        classes: Class table of the whole file; None without labels.
        captions: (N,) bytes of the captions, null in a row without caption; None if captions are
            not used.
        strays: Labels that are no class, and that the user names as outside.
    """

    rows: NDArray[np.int64]
    labels: NDArray[np.int32]
    keys: pa.Array
    classes: ClassTable | None
    captions: pa.Array | None
    strays: frozenset[str] = frozenset()


def find_column(names: Sequence[str], aliases: Sequence[str]) -> str | None:
    """Return the column whose name is one of the aliases; None without such a column.

    If several columns have aliases as names, the column with the first of these aliases is
    returned. Case and outer blanks of column names are ignored. DataError if two columns have the
    same alias.
    """
    for alias in aliases:
        matching = [name for name in names if name.strip().lower() == alias]
        if len(matching) > 1:
            raise DataError(f"column {alias!r} occurs {len(matching)} times. Rename all but one.")
        if matching:
            return matching[0]
    return None


def caption_column(
    names: Sequence[str], metadata: Mapping[bytes, bytes], selection: Selection
) -> str | None:
    """Return the column of captions; None if captions are not used.

    They are used if the user asks for them, or if the table has captions and no classes.
    """
    name = find_column(names, CAPTION)
    if not selection.captions:
        has_labels = find_column(names, LABEL) is not None
        has_classes = selection.classes or has_labels or CLASS_NAMES in metadata
        return None if has_classes else name
    if selection.classes is not None:
        raise UsageError(CAPTIONS_OR_CLASSES)
    if name is None:
        raise UsageError(
            f"no column of captions: expected one of {', '.join(CAPTION)}. "
            f"Found: {', '.join(names)}."
        )
    return name


def listing_columns(schema: pa.Schema, selection: Selection, source: str) -> list[str]:
    """Return the columns that ``table_rows`` reads."""
    names = schema.names
    possible = [find_column(names, aliases) for aliases in (KEY, LABEL, SPLIT)]
    possible.append(caption_column(names, schema.metadata or {}, selection))
    columns = [name for name in possible if name is not None]
    columns += selection.columns(names, source)
    return list(dict.fromkeys(columns))  # without repetitions, in order


def table_rows(
    table: pa.Table, source: str, selection: Selection, *, default_key: str | None = None
) -> TableRows:
    """Check the columns of a whole table, and return the selected rows.

    If there is no key column, keys are in the column ``default_key``. If ``default_key`` is None,
    too, keys are row numbers.
    """
    caption = caption_column(table.column_names, table.schema.metadata or {}, selection)
    captions: pa.Array | None = None
    if caption is None:
        table.validate(full=True)
        labelling = _read_labels(table, source, selection)
    else:
        captions = bytes_of(table[caption], f"{source}, column {caption!r}")
        # A caption is checked when it is read. So a bad caption is an error of its row only.
        table.drop_columns([caption]).validate(full=True)
        labelling = _unlabelled(table)
    rows = selection.rows(table, source, find_column(table.column_names, SPLIT))
    row_numbers = pa.array(rows)
    if captions is not None:
        captions = captions.take(row_numbers)
    key = find_column(table.column_names, KEY) or default_key
    keys = row_numbers.cast(pa.string())
    if key is not None:
        keys = _read_keys(table, key, source).take(row_numbers)
    labels = labelling.labels[rows]
    return TableRows(rows, labels, keys, labelling.classes, captions, labelling.strays)


class _Labelling(NamedTuple):
    """Labels of all rows of a table, classes and strays. ``TableRows`` describes these fields."""

    labels: NDArray[np.int32]
    classes: ClassTable | None
    strays: frozenset[str] = frozenset()


def _unlabelled(table: pa.Table) -> _Labelling:
    return _Labelling(labels=np.full(len(table), UNKNOWN, dtype=np.int32), classes=None)


def _read_labels(table: pa.Table, source: str, selection: Selection) -> _Labelling:
    """Return the labels of all rows and the classes.

    The label column holds names of classes, or numbers. For numbers, the names come from the
    metadata of the schema or from the classes file.
    """
    name = find_column(table.column_names, LABEL)
    raw = _names_in_schema(table.schema, name, source)
    column = pa.nulls(len(table))  # without the column, all labels are missing
    if name is not None:
        column = table[name].combine_chunks()
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if _is_text(column.type):
        labels, raw = _encode(column)
        # ``raw`` is empty, and the data have no names, if all labels are missing
        classes = class_table(raw or None, selection.classes, outside=selection.outside)
        return _Labelling(labels, classes)
    numbers = _whole_numbers(column, f"{source}, column {name!r}")
    has_labels = numbers.null_count < len(numbers)
    classes = class_table(raw, selection.classes, by_position=True, outside=selection.outside)
    if classes is None:
        if not has_labels:
            return _unlabelled(table)
        raise DataError(
            f"{source}: column {name!r} holds numbers, but the names of the classes are missing. "
            "Give the names in label order with --classes FILE, or store them in the schema "
            "metadata."
        )
    if raw is None and has_labels:
        refuse_numbers(classes, source)
    return _check_numbers(numbers, classes, source, selection.outside)


def _is_text(kind: pa.DataType) -> bool:
    """Whether cells are text, in any of Arrow's three types of text."""
    checks = [pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view]
    return any(check(kind) for check in checks)


def _check_numbers(
    numbers: pa.Array, classes: ClassTable, source: str, outside: Sequence[str]
) -> _Labelling:
    """Check and return labels that are numbers.

    DataError if a label is neither missing, nor a class, nor outside.
    """
    n_classes = len(classes.names)
    numbers, strays = _replace_strays(numbers, n_classes, outside)
    _require_in_range(numbers, n_classes, source)
    labels = pc.fill_null(numbers, UNKNOWN).to_numpy(zero_copy_only=False).astype(np.int32)
    return _Labelling(labels, classes, strays)


def _replace_strays(
    numbers: pa.Array, n_classes: int, outside: Sequence[str]
) -> tuple[pa.Array, frozenset[str]]:
    """Replace strays by -2, and return the labels and the strays.

    Strays are labels that are no class and that ``outside`` names.
    """
    strays = []
    for label in pc.drop_null(pc.unique(numbers)).to_pylist():
        is_class = 0 <= label < n_classes
        if not is_class and str(label) in outside:
            strays.append(label)
    is_stray = pc.is_in(numbers, value_set=pa.array(strays, numbers.type))
    is_stray = pc.fill_null(is_stray, False)
    labels = pc.if_else(is_stray, pa.scalar(OUTSIDE, numbers.type), numbers)
    return labels, frozenset(map(str, strays))


def _encode(column: pa.Array) -> tuple[NDArray[np.int32], list[str]]:
    """Return the label of each text, and the sorted distinct texts. Label i stands for text i."""
    encoded = _null_if_unknown(column.cast(pa.large_string())).dictionary_encode()
    names: list[str] = encoded.dictionary.to_pylist()
    order = sorted(range(len(names)), key=names.__getitem__)  # indices that sort the names
    label_of = np.empty(len(names) + 1, dtype=np.int32)
    label_of[order] = np.arange(len(names))  # the first name in sorted order gets label 0
    label_of[-1] = UNKNOWN  # a missing label has index -1 below, so it gets this last entry
    indices = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False)
    return label_of[indices], [names[i] for i in order]


def _whole_numbers(column: pa.Array, where: str) -> pa.Array:
    """Convert labels to int64; DataError if they are not whole numbers."""
    kind = column.type
    is_floating = pa.types.is_floating(kind)
    if not (is_floating or pa.types.is_integer(kind) or pa.types.is_null(kind)):
        raise DataError(f"{where}: labels must be whole numbers or strings. Found {kind}.")
    if is_floating:  # pandas writes whole numbers with missing values as floats with NaN
        column = pc.if_else(pc.is_nan(column), pa.scalar(None, kind), column)
    try:
        return column.cast(pa.int64())
    except pa.ArrowException as error:
        raise DataError(
            f"{where}: labels must be whole numbers or strings. Found {kind}: {error}."
        ) from error


def _require_in_range(numbers: pa.Array, n_classes: int, source: str) -> None:
    """Raise DataError for the first label that is not 0 to ``n_classes`` - 1, -2 or null."""
    is_no_class = pc.or_(pc.less(numbers, 0), pc.greater_equal(numbers, n_classes))
    is_wrong = pc.and_(is_no_class, pc.not_equal(numbers, OUTSIDE))
    row = pc.index(is_wrong, True).as_py()  # -1 if no label is wrong
    if row >= 0:
        raise DataError(
            f"{source} row {row} (counting from 0) has label {numbers[row]}; the class table has "
            f"{n_classes} names, so labels are 0 to {n_classes - 1}, -2 for none of the classes, "
            "or null where unknown. If other numbers mean none of the classes, give them with "
            "--outside."
        )


def _names_in_schema(schema: pa.Schema, label: str | None, source: str) -> list[str] | None:
    """Return the class names in the metadata of a schema; None where there are none.

    They are either joined by commas under the key ``class_names``, or a list in the ClassLabel with
    which Hugging Face describes the column ``label``.
    """
    metadata: Mapping[bytes, bytes] = schema.metadata or {}
    try:
        if CLASS_NAMES in metadata:
            return [name.strip() for name in metadata[CLASS_NAMES].decode().split(",")]
        described: Any = json.loads(metadata.get(b"huggingface", b"{}"))
        features: Any = described.get("info", {}).get("features", {})
        names = features.get(label, {}).get("names")
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
    """Return the keys in a column; DataError if a key is missing or occurs twice."""
    keys = table[name].cast(pa.large_string()).combine_chunks()
    row_without_key = pc.index(pc.is_null(keys), True).as_py()  # -1 if every row has a key
    if row_without_key >= 0:
        raise DataError(
            f"{source} row {row_without_key} (counting from 0) has no {name!r}. Every row needs "
            "one."
        )
    if pc.count_distinct(keys).as_py() < len(keys):
        counts = keys.value_counts()
        repeated = counts.filter(pc.greater(counts.field("counts"), 1))
        first = repeated[0]["values"].as_py()
        raise DataError(
            f"{source}: column {name!r} must be unique. {first!r} occurs more than once."
        )
    return _escape_keys(keys)


def _escape_keys(keys: pa.Array) -> pa.Array:
    """Return the keys with escapes (``portable_name``) that make them safe for terminals."""
    # whether a key has other characters than printable ASCII, or the beginning of an escape
    needs_escape = pc.match_substring_regex(keys, r"[^ -~]|\\x")
    if not pc.any(needs_escape).as_py():
        return keys
    return pa.array([portable_name(key) for key in keys.to_pylist()], keys.type)


IMAGE: Final = "image"  # column of encoded images
BATCH_ROWS: Final = 32  # number of images in memory at a time
# Options of ParquetFile. Without these, a column of a whole row group would be read at once.
STREAMED: Final = {"pre_buffer": False, "buffer_size": 2**20}


def is_image_column(schema: pa.Schema) -> bool:
    """Whether the column ``image`` has bytes, or structs with bytes as Hugging Face writes them."""
    if IMAGE not in schema.names:
        return False
    kind = schema.field(IMAGE).type
    if pa.types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0)
    return is_binary(kind)


class _RowsOfTable:
    """The base of data sets whose rows are listed in a table. Subclasses read the images."""

    def __init__(self, source: Path, listing: TableRows) -> None:
        self.source = str(source)
        self.classes = listing.classes
        self.class_names: tuple[str, ...] | None = None
        if listing.classes is not None:
            self.class_names = listing.classes.names
        self.captioned = listing.captions is not None
        self.strays = listing.strays
        self._labels = listing.labels
        self._keys = listing.keys
        self._captions = listing.captions

    def __len__(self) -> int:
        return len(self._labels)

    def _records(
        self, start: int, n_rows: int, readers: Iterable[Callable[[], bytes]]
    ) -> Iterator[ImageRecord]:
        """Yield the records of ``n_rows`` rows from ``start`` on.

        ``readers`` has, for each row, the function that reads its image.
        """
        stop = start + n_rows
        keys = self._keys[start:stop]
        labels = self._labels[start:stop].tolist()
        captions = caption_readers(self._captions, start, stop)
        for key, number, read, caption in zip(keys, labels, readers, captions, strict=True):
            label: int | None = None if number == UNKNOWN else number
            yield ImageRecord(key.as_py(), label, read, caption)


class ParquetDataset(_RowsOfTable):
    """Images stored in a Parquet file.

    ``records`` streams the images. Memory holds two pages of the file and a batch of ``BATCH_ROWS``
    images, whatever the size of the file and of the row groups. A page has up to about a thousand
    images. If a call starts where the last call ended, the reading goes on there. Otherwise, the
    row group of ``start`` is read from its beginning, and rows before ``start`` are skipped.
    """

    def __init__(self, source: Path, selection: Selection) -> None:
        if IMAGE in selection.where:
            raise UsageError(
                f"{source}: rows cannot be chosen by their images. Give --where another column."
            )
        with pq.ParquetFile(source) as file:
            self._metadata = file.metadata
            schema = file.schema_arrow
            table = file.read(columns=listing_columns(schema, selection, str(source)))
        listing = table_rows(table, str(source), selection)
        status = source.stat()
        super().__init__(source, listing)
        facts = {
            "bytes": status.st_size,
            "mtime_ns": status.st_mtime_ns,
            "schema": schema.to_string(show_schema_metadata=True, truncate_metadata=False),
            "split": selection.split,
            "rows": len(listing.rows),
            **selection.fingerprint(),
        }
        if self.captioned:
            facts["captions"] = True
        self.fingerprint = digest(facts)
        self._path = source
        self._bounds = selection.bounds(source)
        self._rows = listing.rows
        sizes = [self._metadata.row_group(i).num_rows for i in range(self._metadata.num_row_groups)]
        # at most one entry: the open iterator of the last call of ``records``, by its next position
        self._resume: dict[int, Iterator[pa.Scalar]] = {}
        # number of the first row of each row group, and the number of rows at the end
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])

    def records(self, start: int, stop: int) -> Iterator[ImageRecord]:
        """Yield the images at positions start ... stop - 1."""
        n_rows = len(self._labels[start:stop])
        # the iterator of the last call if that call ended at ``start``, otherwise a new iterator
        images = self._resume.pop(start, None) or self._images(start)
        readers = (partial(_read_cell, image, self._bounds) for image in islice(images, n_rows))
        yield from self._records(start, n_rows, readers)
        self._resume = {start + n_rows: images}

    def __getstate__(self) -> dict[str, object]:
        """Return what is pickled for worker processes: everything except the open file."""
        return {**self.__dict__, "_resume": {}}

    def _images(self, first: int) -> Iterator[pa.Scalar]:
        """Yield the image cells of the rows from position ``first`` to the end."""
        rows = self._rows[first:]
        # for each row group, the positions in ``rows`` between which the rows of this group are
        bounds_of_groups = pairwise(np.searchsorted(rows, self._starts))
        try:
            with pq.ParquetFile(self._path, metadata=self._metadata, **STREAMED) as file:
                for group, (begin, end) in enumerate(bounds_of_groups):
                    has_rows = begin < end
                    if has_rows:
                        rows_in_group = rows[begin:end] - self._starts[group]
                        yield from _image_cells(file, group, rows_in_group)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self._path} cannot be read on: {error}. Write it again.") from error


def _image_cells(file: pq.ParquetFile, group: int, rows: NDArray[np.int64]) -> Iterator[pa.Scalar]:
    """Yield the image cells at the ascending positions ``rows`` of a row group."""
    first = 0  # position in the row group of the first row of the batch
    for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=[IMAGE]):
        images = batch.column(IMAGE)
        # the positions in ``rows`` between which the rows of this batch are
        begin, end = np.searchsorted(rows, [first, first + len(batch)])
        for row in rows[begin:end].tolist():
            yield images[row - first]
        if end == len(rows):  # no row is in a later batch
            return
        first += len(batch)


def _read_cell(cell: pa.Scalar, bounds: Bounds) -> bytes:
    """Return the bytes in a cell, or the bytes of the file whose path is in the cell."""
    value = cell.as_py()  # bytes, or a dictionary of bytes and path
    content: bytes | None = value
    path: str | None = None
    if isinstance(value, dict):
        content = value["bytes"]
        path = value.get("path")
    if content is not None:
        return content
    if path is None:
        raise OSError(errno.ENODATA, "the row has no image")
    return bounds.read(path)


def open_table(source: Path, selection: Selection) -> ImageDataset:
    """Open a CSV, TSV or Parquet file with one image per row.

    The columns are:

    - ``path`` (or file, filename, image_path, filepath): paths relative to the folder of the table,
      or to ``selection.root``.
    - In Parquet, ``image`` may take the place of ``path``: encoded bytes, or Hugging Face's struct
      of bytes and path.
    - Optional: ``label`` (or class, target), ``caption`` (or text), ``split``, ``key``, and any
      other columns, by which rows can be selected.
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
            *listing_columns(schema, selection, str(source)),
        ]
        with pq.ParquetFile(source) as file:
            table = file.read(columns=columns)
        return PathTable(source, table, selection)
    except PermissionError as error:
        raise StorageError(f"cannot read {source}: permission denied.") from error
    except (pa.ArrowException, UnicodeError, csv.Error, OSError) as error:
        raise DataError(f"{source} cannot be read as a table: {error}. Write it again.") from error


class PathTable(_RowsOfTable):
    """Images whose paths are listed in a table.

    Paths are relative to the folder of the table and must stay below it. If ``selection.root`` is
    given, paths are relative to the folder ``selection.root`` and must stay below that folder.
    Absolute paths, and paths with ".." (from the folder of the table), are then accepted if they
    end below ``selection.root``. If the file of a row is elsewhere, also through a link, reading
    the row raises an error. Keys are in the column ``key``; without this column, keys are the
    paths. The listing needs two system calls per image.
    """

    def __init__(self, source: Path, table: pa.Table, selection: Selection) -> None:
        column = _path_column(source, table.column_names)
        listing = table_rows(table, str(source), selection, default_key=column)
        super().__init__(source, listing)
        paths = table[column].cast(pa.large_string()).combine_chunks()
        self._paths = pc.fill_null(paths, "").take(pa.array(listing.rows))
        self._bounds = selection.bounds(source)
        folders = () if self.classes is None else self.classes.folders
        listing_hash = ListingHash(*folders)
        faults = np.zeros(len(self), dtype=np.uint8)
        with track(f"listing {source.name}", len(self), "images") as task:
            rows = zip(self._keys, self._labels, self._paths, strict=True)
            for position, (key, label, cell) in enumerate(rows):
                path = cell.as_py()
                status = self._bounds.status(path)
                listing_hash.add(key.as_py(), int(label), status)
                faults[position] = fault_of(status, partial(self._bounds.resolve, path))
                task.advance(1)
        self.faults = Faults(
            kinds=faults,
            folder=self._bounds.folder,
            path=self._path,
            rule=self._say_where_files_must_be,
        )
        if self._captions is not None:
            listing_hash.add_texts(cell.as_py() for cell in self._captions)
        self.fingerprint = listing_hash.hexdigest()

    def records(self, start: int, stop: int) -> Iterator[ImageRecord]:
        """Yield the images at positions start ... stop - 1."""
        paths = self._paths[start:stop]
        readers = (partial(self._bounds.read, path.as_py()) for path in paths)
        return self._records(start, len(paths), readers)

    def _path(self, row: int) -> str:
        return str(self._paths[row].as_py())

    def _say_where_files_must_be(self, out_of_bounds: NDArray[np.int64]) -> str:
        """Return a sentence on where files must be, with a ``--root`` that holds these files."""
        files = [self._bounds.real(self._path(row)) for row in out_of_bounds]
        common = os.path.commonpath([os.path.dirname(file) for file in files])  # noqa: PTH120
        hint = ""
        is_top_folder = Path(common).parent == Path(common)  # "/" is no advice
        if not is_top_folder:
            hint = f" --root {shlex.quote(common)} holds these."
        return (
            "Paths are relative to the table's folder, or to --root DIR. Neither paths nor links "
            "may lead out of this folder. With --root, absolute paths below it are accepted, too."
            + hint
        )


def _path_column(source: Path, names: Sequence[str]) -> str:
    """Return the column of paths; DataError if there is none."""
    column = find_column(names, PATH)
    if column is None:
        raise DataError(
            f"{source} has no column of images: expected one of {', '.join(PATH)}, or in Parquet "
            f"'image' with encoded bytes. Found: {', '.join(names) or 'no columns'}."
        )
    return column


def _read_csv(source: Path, selection: Selection) -> pa.Table:
    """Read the columns of a CSV file that are used: as text, but captions as bytes.

    Labels become numbers if all labels are numbers.
    """
    delimiter = ","
    if source.suffix.lower() == ".tsv":
        delimiter = "\t"
    names = csv_names(source, delimiter)
    schema = pa.schema([(name, pa.string()) for name in names])
    columns = [_path_column(source, names), *listing_columns(schema, selection, str(source))]
    wanted = list(dict.fromkeys(columns))  # without repetitions, in order
    types = dict.fromkeys(wanted, pa.string())
    caption = caption_column(names, {}, selection)
    if caption is not None:
        types[caption] = pa.binary()
    table = read_columns(source, types, delimiter, include_columns=wanted)
    table = as_written(table, [name for name in wanted if name != caption])
    label = find_column(wanted, LABEL)
    if label is None or caption is not None:
        return table
    return table.set_column(wanted.index(label), label, _numbers_if_all(table[label]))


def _numbers_if_all(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return labels as int64 if all are whole numbers or missing, else as text."""
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
    """Return labels without outer blanks; null if the label is empty or ``NO_NAME``."""
    text = pc.utf8_trim_whitespace(column)
    is_unknown = pc.is_in(text, value_set=pa.array(["", NO_NAME], text.type))
    return pc.if_else(is_unknown, pa.scalar(None, text.type), text)

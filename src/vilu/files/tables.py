"""Tables with metadata: Parquet, and CSV that a spreadsheet may open."""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from vilu.errors import DataError, ProvenanceError, StorageError, UsageError
from vilu.files.disk import atomic_write
from vilu.files.documents import SCHEMA_VERSION, plain_json

if TYPE_CHECKING:
    import pyarrow as pa

METADATA_KEY = b"vilu"

MAX_COLUMNS, MAX_HEADER = 10_000, 2**20
"""Columns of a table, and characters of the heading of a CSV file; with a million of them reading takes minutes."""

# A spreadsheet runs a cell that starts with one of these. An apostrophe before it makes it text; apostrophes that are
# already there get one more, so that reading can take exactly one away.
_FORMULA = r"^('*[=+\-@\t\r])"
_DEFUSED = r"^'('*[=+\-@\t\r])"


def write_table(path: str | Path, columns: Mapping[str, pa.Array], metadata: Mapping[str, object]) -> None:
    """Write columns of one length atomically, as Parquet (with the metadata in its schema) or CSV (without)."""
    import pyarrow as pa
    import pyarrow.csv

    if table_suffix(path) == ".parquet":
        content = parquet_bytes(columns, metadata)
        with atomic_write(path) as handle:
            handle.write(content)
        return
    table = _replaced(pa.table(dict(columns)), None, _FORMULA, r"'\1")
    with atomic_write(path) as handle:
        handle.write((",".join(table.column_names) + "\n").encode())
        options = pyarrow.csv.WriteOptions(include_header=False, quoting_style="needed")
        pyarrow.csv.write_csv(table, handle, options)


def parquet_bytes(columns: Mapping[str, pa.Array], metadata: Mapping[str, object]) -> memoryview:
    """Columns of one length, with the metadata (plain JSON) in their schema, as the content of a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet

    content = plain_json({"schema_version": SCHEMA_VERSION, **metadata})
    buffer = BytesIO()
    pyarrow.parquet.write_table(pa.table(dict(columns)).replace_schema_metadata({METADATA_KEY: content}), buffer)
    return buffer.getbuffer()


def _replaced(table: pa.Table, names: Collection[str] | None, pattern: str, replacement: str) -> pa.Table:
    """The table with a pattern replaced in its columns of text, by default all of them."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for index, column in enumerate(table.schema):
        if pa.types.is_string(column.type) if names is None else column.name in names:
            text = pc.replace_substring_regex(table.column(index), pattern=pattern, replacement=replacement)
            table = table.set_column(index, column.name, text)
    return table


def read_table(path: str | Path, text_columns: Collection[str]) -> tuple[pa.Table, dict[str, object]]:
    """A Parquet or CSV table and its metadata (empty for CSV and for tables of other programs).

    Args:
        path: The file.
        text_columns: Columns that hold text, whatever their content looks like.

    Raises:
        UsageError: If the suffix is neither ``.parquet`` nor ``.csv``.
        StorageError: If the file cannot be opened.
        DataError: If it is not such a table.
        ProvenanceError: If a newer version of vilu wrote it.
    """
    import pyarrow as pa
    import pyarrow.parquet

    suffix = table_suffix(path)
    try:
        source = pa.OSFile(str(path))
    except FileNotFoundError as error:
        raise StorageError(f"{path} does not exist.") from error
    except OSError as error:
        raise StorageError(f"cannot open {path}: {error}") from error
    with source:
        try:
            table = pyarrow.parquet.read_table(source) if suffix == ".parquet" else _parse_csv(source, text_columns)
            names = table.column_names
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} is not a readable {suffix[1:]} table: {error}") from error
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise DataError(f"{path} must have distinct columns. Repeated: {', '.join(sorted(repeated))}.")
    return table, _metadata(path, table)


def read_column(path: str | Path, table: pa.Table, name: str, kind: str) -> pa.ChunkedArray:
    """A column as Arrow type ``kind`` ("float64", "int64", "string", ...); all null if the table lacks it."""
    import pyarrow as pa

    if name not in table.column_names:
        return pa.chunked_array([pa.nulls(len(table), pa.type_for_alias(kind))])
    try:
        return table[name].cast(pa.type_for_alias(kind))
    except pa.ArrowException as error:
        raise DataError(f"column {name!r} of {path} must hold {kind} values: {error}") from error


def csv_names(path: str | Path, delimiter: str = ",") -> list[str]:
    """The names of the columns of a CSV file, of which no more than a bounded beginning is read.

    Raises:
        DataError: If there are too many.
    """
    with Path(path).open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        # not strict: a text that is not UTF-8 is the error of its row, and the first block is decoded with the names
        names = next(csv.reader(_short_lines(file, path), delimiter=delimiter), [])
    "".join(names).encode()
    require_width(path, len(names))
    return names


def _short_lines(file: TextIO, path: str | Path) -> Iterator[str]:
    while line := file.readline(MAX_HEADER):
        if len(line) == MAX_HEADER and line[-1] not in "\r\n":
            raise DataError(f"{path} has a line of more than {MAX_HEADER:,} characters where the names of columns are.")
        yield line


def require_width(path: str | Path, n_columns: int) -> None:
    """Refuse a table of too many columns."""
    if n_columns > MAX_COLUMNS:
        raise DataError(
            f"{path} has {n_columns:,} columns; at most {MAX_COLUMNS:,} are read. Keep those that are needed."
        )


def table_suffix(path: str | Path) -> str:
    """``.parquet`` or ``.csv``; UsageError if it is neither."""
    suffix = Path(path).suffix.lower()
    if suffix not in {".parquet", ".csv"}:
        raise UsageError(f"a table is a .parquet or a .csv file. Got {Path(path).name!r} instead.")
    return suffix


def _parse_csv(source: pa.NativeFile, text_columns: Collection[str]) -> pa.Table:
    import pyarrow as pa
    import pyarrow.csv

    table = pyarrow.csv.read_csv(
        source,
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(text_columns, pa.string()),
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        ),
    )
    return _replaced(table, text_columns, _DEFUSED, r"\1")


def _metadata(path: str | Path, table: pa.Table) -> dict[str, object]:
    content = (table.schema.metadata or {}).get(METADATA_KEY)
    if content is None:
        return {}
    try:
        metadata = json.loads(content)
    except ValueError as error:
        raise DataError(f"the metadata of {path} must be JSON: {error}") from error
    if not isinstance(metadata, dict):
        raise DataError(f"the metadata of {path} must be a JSON object. Got {type(metadata).__name__} instead.")
    require_schema(path, metadata.pop("schema_version", None))
    return metadata


def require_schema(path: str | Path, version: object) -> None:
    """Refuse what another version of vilu wrote."""
    if version != SCHEMA_VERSION:
        raise ProvenanceError(
            f"{path} has schema version {version!r}, this vilu reads version {SCHEMA_VERSION}. "
            "Install the vilu that wrote it."
        )

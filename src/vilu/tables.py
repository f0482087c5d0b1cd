"""Tables on disk: Parquet, or CSV that spreadsheets can open safely. What is read from outside is not trusted."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from vilu.errors import DataError, ProvenanceError, StorageError, UsageError
from vilu.files import atomic_write

if TYPE_CHECKING:
    import pyarrow as pa

METADATA_KEY = b"vilu"
SCHEMA_VERSION = 1

# A spreadsheet runs a cell that starts with one of these. An apostrophe before it makes it text; apostrophes that are
# already there get one more, so that reading can take exactly one away.
_FORMULA = r"^('*[=+\-@\t\r])"
_DEFUSED = r"^'('*[=+\-@\t\r])"


def write_table(path: str | Path, columns: Mapping[str, pa.Array], metadata: Mapping[str, object]) -> None:
    """Write columns of one length atomically, as Parquet (with the metadata in its schema) or CSV (without).

    Raises:
        UsageError: If the suffix is neither ``.parquet`` nor ``.csv``.
        DataError: If the metadata is not plain JSON.
        StorageError: If the file system refuses.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.csv

    suffix = table_suffix(path)
    table = pa.table(dict(columns))
    if suffix == ".parquet":
        content = parquet_bytes(columns, metadata)
        with atomic_write(path) as handle:
            handle.write(content)
        return
    for index, column in enumerate(table.schema):
        if pa.types.is_string(column.type):
            safe = pc.replace_substring_regex(table[column.name], pattern=_FORMULA, replacement=r"'\1")
            table = table.set_column(index, column.name, safe)
    with atomic_write(path) as handle:
        handle.write((",".join(table.column_names) + "\n").encode())
        options = pyarrow.csv.WriteOptions(include_header=False, quoting_style="needed")
        pyarrow.csv.write_csv(table, handle, options)


def parquet_bytes(columns: Mapping[str, pa.Array], metadata: Mapping[str, object]) -> memoryview:
    """Columns of one length, with the metadata in their schema, as the content of a Parquet file.

    Raises:
        DataError: If the metadata is not plain JSON.
    """
    import pyarrow as pa
    import pyarrow.parquet

    content = plain_json({"schema_version": SCHEMA_VERSION, **metadata})
    buffer = BytesIO()
    pyarrow.parquet.write_table(pa.table(dict(columns)).replace_schema_metadata({METADATA_KEY: content}), buffer)
    return buffer.getbuffer()


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

    suffix = table_suffix(path)
    try:
        source = pa.OSFile(str(path))
    except FileNotFoundError as error:
        raise StorageError(f"{path} does not exist.") from error
    except OSError as error:
        raise StorageError(f"cannot open {path}: {error}") from error
    with source:
        try:
            table = _parse_parquet(source) if suffix == ".parquet" else _parse_csv(source, text_columns)
            names = table.column_names
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} is not a readable {suffix[1:]} table: {error}") from error
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise DataError(f"{path} must have distinct columns. Repeated: {', '.join(sorted(repeated))}.")
    return table, _metadata(path, table)


def read_column(path: str | Path, table: pa.Table, name: str, kind: str) -> pa.ChunkedArray:
    """A column as Arrow type ``kind`` ("float64", "int64", "string", ...); all null if the table lacks it.

    Raises:
        DataError: If its values cannot be of that type.
    """
    import pyarrow as pa

    if name not in table.column_names:
        return pa.chunked_array([pa.nulls(len(table), pa.type_for_alias(kind))])
    try:
        return table[name].cast(pa.type_for_alias(kind))
    except pa.ArrowException as error:
        raise DataError(f"column {name!r} of {path} must hold {kind} values: {error}") from error


def plain_json(value: object) -> bytes:
    """UTF-8 JSON.

    Raises:
        DataError: If ``value`` is not plain JSON; NaN and infinity are not.
    """
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise DataError(f"metadata must be plain JSON, but {error}.") from error


def table_suffix(path: str | Path) -> str:
    """``.parquet`` or ``.csv``.

    Raises:
        UsageError: If it is neither.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in {".parquet", ".csv"}:
        raise UsageError(f"a table is a .parquet or a .csv file. Got {Path(path).name!r} instead.")
    return suffix


def _parse_parquet(source: pa.NativeFile) -> pa.Table:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(source)


def _parse_csv(source: pa.NativeFile, text_columns: Collection[str]) -> pa.Table:
    import pyarrow as pa
    import pyarrow.compute as pc
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
    for index, column in enumerate(table.schema):
        if column.name in text_columns:
            text = pc.replace_substring_regex(table.column(index), pattern=_DEFUSED, replacement=r"\1")
            table = table.set_column(index, column.name, text)
    return table


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
    version = metadata.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise ProvenanceError(
            f"{path} has schema version {version!r}, this vilu reads version {SCHEMA_VERSION}. "
            "Install the vilu that wrote it."
        )
    return metadata

"""Tables: Parquet with metadata and a digest, and CSV that spreadsheets can open safely."""

from __future__ import annotations

import csv
import hashlib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from io import BytesIO, StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, TextIO

from vilu.artifacts.disk import convert_os_errors, write_bytes
from vilu.artifacts.documents import (
    DIGEST_KEY,
    SCHEMA_KEY,
    SCHEMA_VERSION,
    parse_json,
    plain_json,
    require_schema,
)
from vilu.artifacts.hashing import digest
from vilu.errors import DataError, StorageError, UsageError

if TYPE_CHECKING:
    import pyarrow as pa

METADATA_KEY = b"vilu"
FOOTER_METADATA_PATTERN = re.compile(
    rb'\{"schema_version": .*"digest": "[0-9a-f]{32}"\}', re.DOTALL
)
"""Pattern of vilu's metadata in a Parquet file's footer.

If a bit in the metadata's key or length is flipped, pyarrow does not find the metadata, but this
pattern still does.
"""

REMEDY_OF_KIND: Final = {
    "outcomes": "Run `vilu score` again",
    "results": "Run `vilu evaluate` again",
    "monitor": "Begin a new monitor with `vilu monitor`",
    "label errors": "Run `vilu audit-labels` again",
}
"""Maps a table kind to the advice in messages: how to make the table again."""

OLDEST_VERSION_OF_KIND: Final = {"labels": 1}
"""Maps a table kind to the oldest schema version that vilu still reads.

Other kinds are read only in ``SCHEMA_VERSION``. Labels are people's work, so label tables of every
version are read.
"""

MAX_COLUMNS = 10_000
"""Maximum number of columns in a table. Reading a million columns would take minutes."""
MAX_HEADER_CHARACTERS = 2**20
"""Maximum number of characters per line in a CSV file's header."""

# A spreadsheet runs a cell as a formula if the cell begins with a character in these brackets, as
# in "=A1". ``_FORMULA_PATTERN`` matches such a beginning, also with apostrophes before the
# character. When a CSV file is written, a matching cell gets one more apostrophe at the beginning,
# as in "'=A1", so spreadsheets show the cell as text. When the file is read, this apostrophe is
# removed again from every cell matched by ``_QUOTED_FORMULA_PATTERN``.
_FORMULA_PATTERN = r"^('*[=+\-@\t\r])"
_QUOTED_FORMULA_PATTERN = r"^'('*[=+\-@\t\r])"


def write_table(
    path: str | Path, columns: Mapping[str, pa.Array], metadata: Mapping[str, object]
) -> None:
    """Write columns of equal length atomically, as Parquet or CSV by the path's suffix.

    The metadata are written into the Parquet file's schema. A CSV file has no metadata.
    """
    if table_suffix(path) == ".parquet":
        content = parquet_bytes(columns, metadata)
    else:
        content = csv_bytes(columns)
    write_bytes(path, content)


def csv_bytes(columns: Mapping[str, pa.Array]) -> bytes:
    """Encode columns of equal length as CSV, so that no spreadsheet runs a cell as a formula."""
    import pyarrow as pa
    import pyarrow.csv

    table = pa.table(dict(columns))
    text_columns = [column.name for column in table.schema if pa.types.is_string(column.type)]
    # group 1 in the pattern is the cell's beginning, and an apostrophe is put before this group
    table = _replace_in_texts(table, text_columns, pattern=_FORMULA_PATTERN, replacement=r"'\1")
    buffer = BytesIO()
    # the module csv writes the header, because pyarrow would put every name into quotes
    header = StringIO()
    writer = csv.writer(header, lineterminator="\n")
    writer.writerow(table.column_names)
    heading = header.getvalue()
    buffer.write(heading.encode())
    options = pyarrow.csv.WriteOptions(include_header=False, quoting_style="needed")
    pyarrow.csv.write_csv(table, buffer, options)
    return buffer.getvalue()


def parquet_bytes(
    columns: Mapping[str, pa.Array],
    metadata: Mapping[str, object],
    *,
    compression: Literal["snappy", "zstd"] = "snappy",
) -> bytes:
    """Encode columns of equal length as a Parquet file with plain JSON metadata in the schema.

    "snappy" is fast. "zstd" gives small files and is slow to write: it has level 19, and no column
    has a dictionary of the values.

    Every page has a checksum. The checksums do not cover the footer and the page headers. Therefore
    the metadata also have a digest, which covers all columns and all other metadata.
    """
    import pyarrow as pa
    import pyarrow.parquet

    table = pa.table(dict(columns))
    # encoded and parsed, because the digest is of the metadata as a reader will see them
    content = parse_json(plain_json({SCHEMA_KEY: SCHEMA_VERSION, **metadata}))
    content[DIGEST_KEY] = table_digest(table, content)
    buffer = BytesIO()
    schema_metadata = {METADATA_KEY: plain_json(content)}
    sealed_table = table.replace_schema_metadata(schema_metadata)
    columns_with_dictionary = []
    level = None
    if compression == "zstd":  # without dictionaries, zstd finds more repeated values
        level = 19  # higher levels need more memory to read
    else:
        columns_with_dictionary = [
            name for name in table.column_names if _is_repetitive(table[name])
        ]
    pyarrow.parquet.write_table(
        sealed_table,
        buffer,
        compression=compression,
        compression_level=level,
        write_page_checksum=True,
        use_dictionary=columns_with_dictionary,
    )
    return buffer.getvalue()


SAMPLE_SIZE = 1_024  # number of values at a column's beginning, for ``_is_repetitive``


def _is_repetitive(column: pa.ChunkedArray) -> bool:
    """Return whether at most half of a column's first values are distinct.

    Parquet can write a dictionary with a column's distinct values. The dictionary saves time and
    space only if the values repeat.
    """
    import pyarrow.compute as pc

    first_values = column[:SAMPLE_SIZE]
    n_distinct = pc.count_distinct(first_values)
    return bool(n_distinct.as_py() <= len(first_values) / 2)


def table_digest(table: pa.Table, metadata: Mapping[str, object]) -> str:
    """Compute a digest from the metadata and from all columns: names, types, nulls and values.

    The digest does not depend on how Arrow splits the columns into chunks.
    """
    columns = [
        [name, str(table[name].type), len(table), _column_hash(table[name])]
        for name in table.column_names
    ]
    return digest([dict(metadata), columns])


def _column_hash(column: pa.ChunkedArray) -> str:
    """Compute the SHA-256 of a column's null mask and values."""
    import pyarrow as pa
    import pyarrow.compute as pc

    sha256 = hashlib.sha256()
    is_text = pa.types.is_string(column.type)
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())  # Arrow stores booleans as bits, NumPy as bytes
    if column.null_count:
        for chunk in column.chunks:
            sha256.update(_null_mask(chunk).to_numpy())
        # Arrow stores undefined bytes for a null, so a fixed value replaces these bytes
        fixed_value = "" if is_text else pa.scalar(0).cast(column.type)
        column = pc.fill_null(column, fixed_value)
    if not is_text:
        for chunk in column.chunks:
            sha256.update(chunk.to_numpy())
        return sha256.hexdigest()
    # the lengths are hashed, too, because the texts ["ab", "c"] and ["a", "bc"] have equal bytes
    for chunk in column.chunks:
        sha256.update(pc.binary_length(chunk).to_numpy())
    for chunk in column.chunks:
        sha256.update(_text_bytes(chunk))
    return sha256.hexdigest()


def _null_mask(chunk: pa.Array) -> pa.Array:
    """Return a mask (N,) of int8: 1 for each null in ``chunk``, 0 for each value."""
    import pyarrow as pa

    is_null = chunk.is_null()
    return is_null.cast(pa.int8())


def _text_bytes(chunk: pa.Array) -> memoryview:
    """Return the concatenated UTF-8 bytes of all strings in an array."""
    import numpy as np

    _, offsets, content = chunk.buffers()
    if not len(chunk) or content is None:
        return memoryview(b"")
    # String i in the buffers has the bytes from all_offsets[i] to all_offsets[i + 1]. The array may
    # be a slice of the buffers, and begin with string number ``chunk.offset``.
    all_offsets = np.frombuffer(offsets, np.int32)
    start = all_offsets[chunk.offset]
    end = all_offsets[chunk.offset + len(chunk)]
    return memoryview(content)[start:end]


def _replace_in_texts(
    table: pa.Table, text_columns: Collection[str], *, pattern: str, replacement: str
) -> pa.Table:
    """Replace a regular expression in some text columns, and return the new table."""
    import pyarrow.compute as pc

    for index, column in enumerate(table.schema):
        if column.name in text_columns:
            texts = pc.replace_substring_regex(
                table.column(index), pattern=pattern, replacement=replacement
            )
            table = table.set_column(index, column.name, texts)
    return table


def remove_apostrophes(table: pa.Table, text_columns: Collection[str]) -> pa.Table:
    """Remove the apostrophes put by ``csv_bytes`` before cells that look like formulas."""
    return _replace_in_texts(
        table, text_columns, pattern=_QUOTED_FORMULA_PATTERN, replacement=r"\1"
    )


def read_table(
    path: str | Path, text_columns: Collection[str], delimiter: str = ","
) -> tuple[pa.Table, dict[str, object]]:
    """Read a Parquet or CSV table, and return the table and vilu's metadata.

    For CSV files, and for tables from other programs, the metadata are empty.

    Args:
        path: The file.
        text_columns: Columns to read as text, even if the texts look like numbers.
        delimiter: Character between the columns in a CSV file.

    Raises:
        DataError: If the file is damaged, or is no Parquet or CSV table.
        StorageError: If the file does not exist or cannot be opened.
        ProvenanceError: If this vilu does not read the table's schema version.
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
            has_our_metadata = False
            if suffix == ".parquet":
                table = _read_parquet(source)
                has_our_metadata = FOOTER_METADATA_PATTERN.search(_footer(source)) is not None
            else:
                # raises DataError if the heading would take minutes to read
                csv_names(path, delimiter)
                table = _parse_csv(source, text_columns, delimiter)
        except DataError:
            raise
        except (pa.ArrowException, csv.Error, OSError, ValueError) as error:
            raise DataError(f"{path} is not a readable {suffix[1:]} table: {error}") from error
    require_width(path, len(table.column_names))
    require_distinct_columns(str(path), table.column_names)
    return table, _checked_metadata(path, table, has_our_metadata=has_our_metadata)


def _read_parquet(source: pa.NativeFile) -> pa.Table:
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(source, page_checksum_verification=True)
    table = file.read()
    table.validate(full=True)  # checks that strings are UTF-8, and offsets within buffers
    return table


def _footer(source: pa.NativeFile) -> bytes:
    """Return the raw bytes of a Parquet file's footer, even if the footer is damaged."""
    # a file ends with the footer, the footer's length in four bytes, and the text "PAR1"
    end = source.size() - 8
    source.seek(end)
    length_bytes = source.read(4)
    length = int.from_bytes(length_bytes, "little")
    start = max(end - length, 0)  # 0 if the length is damaged, and larger than the file
    source.seek(start)
    return bytes(source.read(end - start))


def read_column(path: str | Path, table: pa.Table, name: str, type_name: str) -> pa.ChunkedArray:
    """Return a table's column ``name``, converted to the Arrow type ``type_name``.

    If the table has no such column, all values are null.

    Args:
        path: The table's file, for messages.
        table: The table.
        name: The column's name.
        type_name: The Arrow type's name, such as "float64", "int64" or "string".
    """
    import pyarrow as pa

    arrow_type = pa.type_for_alias(type_name)
    if name not in table.column_names:
        nulls = pa.nulls(len(table), arrow_type)
        return pa.chunked_array([nulls])
    try:
        return table[name].cast(arrow_type)
    except pa.ArrowException as error:
        raise DataError(
            f"column {name!r} of {path} must hold {type_name} values: {error}"
        ) from error


class CsvRow(dict[str, str]):
    """A row in a CSV file: maps each column name to the cell's text.

    If the row ends early, the missing cells are "".

    Attributes:
        line: Line in the file where the row begins, counted from 1.
        ends_early: Whether the row has fewer cells than there are columns.
    """

    def __init__(self, cells: Mapping[str, str], line: int, *, ends_early: bool) -> None:
        super().__init__(cells)
        self.line = line
        self.ends_early = ends_early


def csv_rows(path: Path, delimiter: str = ",") -> tuple[list[str], list[CsvRow]]:
    """Read column names and rows from a CSV file edited by people. All cells are text.

    Three things that spreadsheets add are ignored: a byte order mark, lines without cells, and
    empty cells to the right of the named columns.

    Raises:
        DataError: If the file is no CSV in UTF-8, if two columns have the same name, or if a row
            has a text to the right of the last named column.
        StorageError: If the file cannot be read.
    """
    with (
        convert_os_errors(f"cannot read {path}"),
        path.open(encoding="utf-8-sig", newline="") as file,
    ):
        return parse_csv(file, str(path), delimiter)


def parse_csv(
    lines: Iterable[str], source: str, delimiter: str = ","
) -> tuple[list[str], list[CsvRow]]:
    """Parse the lines of a CSV file like ``csv_rows``. Messages call the file ``source``."""
    # without ``strict``, an unclosed quote would turn the remaining file into a single cell
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    rows: list[CsvRow] = []
    try:
        names = next(reader, [])
        last_line = reader.line_num  # the number of the last line read so far
        for cells in reader:
            line = last_line + 1  # where this row begins
            last_line = reader.line_num  # more than ``line`` if a cell has line breaks
            if not rows:  # checked only now, because the message shows the cells of the first row
                require_distinct_columns(f"{source} line 1", names, cells)
            _require_named_columns(f"{source} line {line}", names, cells)
            if not cells:
                continue
            texts = [re.sub(_QUOTED_FORMULA_PATTERN, r"\1", cell) for cell in cells]
            missing_texts = [""] * (len(names) - len(cells))  # empty if no cells are missing
            # strict=False leaves out empty cells without a column (the check above refused texts)
            text_of_column = dict(zip(names, texts + missing_texts, strict=False))
            rows.append(CsvRow(text_of_column, line, ends_early=bool(missing_texts)))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{source} is no CSV file in UTF-8 whose quotes are all closed: {error}."
        ) from error
    if not rows:  # then the column names were not checked above
        require_distinct_columns(f"{source} line 1", names)
    return names, rows


def require_distinct_columns(
    location: str, names: Sequence[str], first_cells: Sequence[str] = ()
) -> None:
    """Raise DataError if two columns have the same name. Such a name would be ambiguous.

    Columns without a name are not checked: spreadsheets add empty columns, and pandas an index.

    Args:
        location: The message's beginning: the file, or a line in the file.
        names: The column names.
        first_cells: The first row's cells, for the message.
    """
    counts = Counter(name for name in names if name.strip())
    repeated_names = sorted(name for name, count in counts.items() if count > 1)
    if not repeated_names:
        return
    example_cells: list[str] = []
    for name, cell in zip(names, first_cells, strict=False):
        if name == repeated_names[0]:
            example_cells.append(repr(cell))
    example = ""
    if example_cells:
        example = f" The first row has {' and '.join(example_cells)} there."
    listed_names = ", ".join(repeated_names)
    raise DataError(
        f"{location}: distinct columns are needed. Repeated: {listed_names}.{example} "
        "Rename or remove all but one."
    )


def _require_named_columns(location: str, names: Sequence[str], cells: Sequence[str]) -> None:
    """Raise DataError if a row has a text to the right of the last named column.

    Args:
        location: The message's beginning: the line in the file.
        names: The column names.
        cells: The row's cells.
    """
    # the number of columns up to the last column with a name
    n_named_columns = len(names)
    while n_named_columns and not names[n_named_columns - 1].strip():
        n_named_columns -= 1
    for index in range(n_named_columns, len(cells)):
        if not cells[index].strip():
            continue
        cell_before = ""
        if index:
            cell_before = f" after {cells[index - 1]!r}"
        listed_names = ", ".join(names)
        raise DataError(
            f"{location}: {cells[index]!r}{cell_before} is in none of the columns "
            f"{listed_names}. Put a text that holds a comma into quotes, or name the column."
        )


def csv_names(path: str | Path, delimiter: str = ",") -> list[str]:
    """Read the column names of a CSV file, without reading more than the file's beginning."""
    # Python decodes a file in blocks, and the first block also contains rows. Invalid UTF-8 in a
    # row is escaped here, and refused when the rows are read.
    with Path(path).open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = _lines_of_limited_length(file, path)
        reader = csv.reader(lines, delimiter=delimiter)
        names = next(reader, [])
        require_width(path, len(names))
        if len(set(names)) < len(names):
            first_cells = next(reader, [])
            require_distinct_columns(f"{path} line 1", names, first_cells)
    try:
        "".join(names).encode()
    except UnicodeEncodeError as error:  # an escaped byte
        raise DataError(
            f"{path} must be UTF-8 text, and the names of its columns are not. Save it as UTF-8."
        ) from error
    return names


def read_columns(
    source: str | Path | pa.NativeFile,
    types: Mapping[str, pa.DataType],
    delimiter: str = ",",
    **convert_options: object,
) -> pa.Table:
    """Read a CSV file as an Arrow table.

    A row with more cells than there are columns raises ``pyarrow.ArrowInvalid``.

    Args:
        source: The file.
        types: Maps column names to types. For columns not named here, Arrow infers the type.
        delimiter: Character between the columns.
        convert_options: Further options for ``pyarrow.csv.ConvertOptions``.
    """
    import pyarrow.csv

    parsing = pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    conversion = pyarrow.csv.ConvertOptions(column_types=types, **convert_options)
    return pyarrow.csv.read_csv(source, parse_options=parsing, convert_options=conversion)


def _lines_of_limited_length(file: TextIO, path: str | Path) -> Iterator[str]:
    """Yield a file's lines. Raise DataError at a line over ``MAX_HEADER_CHARACTERS``."""
    line = file.readline(MAX_HEADER_CHARACTERS)
    while line:
        # ``readline`` stops at the limit, even if the line goes on
        is_cut = len(line) == MAX_HEADER_CHARACTERS and line[-1] not in "\r\n"
        if is_cut:
            raise DataError(
                f"{path} has a line of more than {MAX_HEADER_CHARACTERS:,} characters where the "
                "names of columns are."
            )
        yield line
        line = file.readline(MAX_HEADER_CHARACTERS)


def require_width(path: str | Path, n_columns: int) -> None:
    """Raise DataError if a table has more than ``MAX_COLUMNS`` columns."""
    if n_columns > MAX_COLUMNS:
        raise DataError(
            f"{path} has {n_columns:,} columns; at most {MAX_COLUMNS:,} columns are read. "
            "Keep only the columns that are needed."
        )


def table_suffix(path: str | Path) -> str:
    """Return a table's suffix, ``.parquet`` or ``.csv``. Raise UsageError for any other suffix."""
    file = Path(path)
    suffix = file.suffix.lower()
    if suffix not in {".parquet", ".csv"}:
        raise UsageError(f"a table is a .parquet or a .csv file. Got {file.name!r} instead.")
    return suffix


def _parse_csv(source: pa.NativeFile, text_columns: Collection[str], delimiter: str) -> pa.Table:
    import pyarrow as pa

    text_type = pa.string()
    types = dict.fromkeys(text_columns, text_type)
    table = read_columns(
        source,
        types,
        delimiter,
        null_values=[""],
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,
    )
    return remove_apostrophes(table, text_columns)


def _digest_of_read_table(path: str | Path, table: pa.Table, metadata: Mapping[str, object]) -> str:
    """Return the digest of a table that was read. Raise DataError if damage prevents a digest."""
    import pyarrow as pa

    try:
        return table_digest(table, metadata)
    # A flipped bit in the footer can change a column's type. Then pyarrow finds values with a wrong
    # type (ArrowInvalid, a ValueError), or cannot convert the type (ArrowNotImplementedError, not a
    # ValueError). A RecursionError is raised if the metadata are nested so deeply that they could
    # be parsed, but cannot be encoded for the digest.
    except (ValueError, RecursionError, pa.ArrowNotImplementedError) as error:
        raise DataError(
            f"{path} is damaged: its rows or metadata cannot be read ({error}). Make it again."
        ) from error


def _checked_metadata(
    path: str | Path, table: pa.Table, *, has_our_metadata: bool
) -> dict[str, object]:
    """Check a vilu table's digest, and return the metadata. For any other table, return {}.

    Args:
        path: The file, for messages.
        table: The table, as read by pyarrow.
        has_our_metadata: Whether the file's footer contains vilu's metadata. If pyarrow finds no
            metadata in such a table, the file is damaged.
    """
    all_metadata = table.schema.metadata or {}  # None in a table without metadata
    text = all_metadata.get(METADATA_KEY)
    if text is None and not has_our_metadata:
        return {}
    try:
        # if pyarrow does not find the metadata, parsing b"" raises a ValueError
        metadata = parse_json(text or b"")
    except (ValueError, RecursionError) as error:  # no JSON, or JSON with too deep nesting
        raise DataError(
            f"{path} is damaged: its metadata are not JSON of ours ({error}). Make it again."
        ) from error
    stated_digest = metadata.pop(DIGEST_KEY, None)
    actual_digest = _digest_of_read_table(path, table, metadata)
    if stated_digest is not None and stated_digest != actual_digest:
        raise DataError(
            f"{path} is damaged, or was changed by another program: its rows are not what its "
            "digest says. Make it again."
        )
    kind = str(metadata.get("kind"))
    remedy = REMEDY_OF_KIND.get(kind, "Make it again")
    oldest_version = OLDEST_VERSION_OF_KIND.get(kind, SCHEMA_VERSION)
    require_schema(path, metadata, remedy, oldest_version=oldest_version)
    if stated_digest is None:
        raise DataError(f"{path} is damaged: its metadata have no digest. {remedy}.")
    del metadata[SCHEMA_KEY]
    return metadata

"""What a table of images says in its columns: labels or captions, splits and keys. Shared by CSV and Parquet."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from vilu.datasets.classes import ClassTable, class_table
from vilu.datasets.selection import CAPTIONS_OR_CLASSES, Selection, bytes_of
from vilu.errors import DataError, UsageError

PATH: Final = ("path", "file", "filename", "image_path", "filepath")
LABEL: Final = ("label", "class", "target")
SPLIT: Final = ("split",)
KEY: Final = ("key",)
CAPTION: Final = ("caption", "text")

UNLABELLED: Final = -1
CLASS_NAMES: Final = b"class_names"
"""Entry of a schema's metadata: names, comma-joined."""


@dataclass(frozen=True)
class Listing:
    """The rows of a table that were asked for, in order.

    Attributes:
        rows: (N,) int64 positions in the file.
        labels: (N,) int32 labels, -1 where unknown.
        keys: (N,) keys; the numbers of the rows where there is no key column.
        classes: Class table of the whole file; None when unlabelled or captioned.
        captions: (N,) bytes of the captions, null where there is none; None where captions are not asked for.
    """

    rows: NDArray[np.int64]
    labels: NDArray[np.int32]
    keys: pa.Array
    classes: ClassTable | None
    captions: pa.Array | None


def find_column(names: Sequence[str], aliases: Sequence[str]) -> str | None:
    """The column under the first alias that is there (case and outer blanks do not count).

    Raises:
        DataError: If that name occurs twice.
    """
    for alias in aliases:
        found = [name for name in names if name.strip().lower() == alias]
        if len(found) > 1:
            raise DataError(f"column {alias!r} occurs {len(found)} times. Rename all but one.")
        if found:
            return found[0]
    return None


def caption_column(names: Sequence[str], metadata: Mapping[bytes, bytes], selection: Selection) -> str | None:
    """The column of captions: where they are asked for, or where there is nothing else (no label, no class names).

    Raises:
        UsageError: If captions are asked for and there are none, or with a classes file.
    """
    name = find_column(names, CAPTION)
    if not selection.captions:
        labelled = selection.classes or find_column(names, LABEL) or CLASS_NAMES in metadata
        return None if labelled else name
    if selection.classes is not None:
        raise UsageError(CAPTIONS_OR_CLASSES)
    if name is None:
        raise UsageError(f"no column of captions: expected one of {', '.join(CAPTION)}. Found: {', '.join(names)}.")
    return name


def listing_columns(schema: pa.Schema, selection: Selection, source: str) -> list[str]:
    """The columns that ``make_listing`` reads, as far as they are there.

    Raises:
        UsageError: If a column is asked for that is not there.
    """
    names, metadata = schema.names, schema.metadata or {}
    known = [find_column(names, aliases) for aliases in (KEY, LABEL, SPLIT)]
    found = [*known, caption_column(names, metadata, selection), *selection.columns(names, source)]
    return list(dict.fromkeys(name for name in found if name is not None))


def make_listing(table: pa.Table, source: str, selection: Selection, *, default_key: str | None = None) -> Listing:
    """Check the columns of a whole table, then choose the rows.

    Args:
        table: Its columns without the images.
        source: Its name, for messages.
        selection: Which rows, and what of them.
        default_key: The column that is the key where there is no key column.

    Raises:
        DataError: If a string is not UTF-8 (captions are checked one by one, later), a label is no row of the class
            table, classes have no names, or a key is missing or repeated.
        UsageError: If rows are asked for that are not there, or the classes file cannot be read.
    """
    caption = caption_column(table.column_names, table.schema.metadata or {}, selection)
    if caption is None:
        captions = None
        table.validate(full=True)
        labels, table_of_classes = _labels(table, source, selection.classes)
    else:
        captions = bytes_of(table[caption], f"{source}, column {caption!r}")
        table.drop_columns([caption]).validate(full=True)
        labels, table_of_classes = np.full(len(table), UNLABELLED, dtype=np.int32), None
    rows = selection.rows(table, source, find_column(table.column_names, SPLIT))
    chosen = pa.array(rows)
    name = find_column(table.column_names, KEY) or default_key
    keys = chosen.cast(pa.string()) if name is None else _keys(table, name, source).take(chosen)
    return Listing(rows, labels[rows], keys, table_of_classes, None if captions is None else captions.take(chosen))


def _labels(table: pa.Table, source: str, classes: Path | None) -> tuple[NDArray[np.int32], ClassTable | None]:
    name = find_column(table.column_names, LABEL)
    raw = _names_in_schema(table.schema, name, source)
    if name is None:
        return np.full(len(table), UNLABELLED, dtype=np.int32), class_table(raw, classes, by_position=True)
    column = table[name].combine_chunks()
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if _is_string(column.type):
        labels, raw = _encode(column)
        return labels, class_table(raw or None, classes)
    numbers = _whole_numbers(column, f"{source}, column {name!r}")
    table_of_classes = class_table(raw, classes, by_position=True)
    if table_of_classes is None and numbers.null_count == len(numbers):
        return np.full(len(table), UNLABELLED, dtype=np.int32), None
    if table_of_classes is None:
        raise DataError(
            f"{source}: column {name!r} holds numbers, and nothing says which classes they mean. "
            "Give the names in label order with --classes FILE, or store them in the schema metadata."
        )
    _require_in_range(numbers, len(table_of_classes.names), source)
    return pc.fill_null(numbers, UNLABELLED).to_numpy(zero_copy_only=False).astype(np.int32), table_of_classes


def _encode(column: pa.Array) -> tuple[NDArray[np.int32], list[str]]:
    """Labels of strings: positions among the distinct ones, sorted; blank is unknown."""
    text = pc.utf8_trim_whitespace(column.cast(pa.large_string()))
    encoded = pc.if_else(pc.equal(text, ""), pa.scalar(None, text.type), text).dictionary_encode()
    names: list[str] = encoded.dictionary.to_pylist()
    order = sorted(range(len(names)), key=names.__getitem__)
    rank = np.empty(len(names) + 1, dtype=np.int32)
    rank[order] = np.arange(len(names))
    rank[-1] = UNLABELLED
    codes = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False)
    return rank[codes], [names[i] for i in order]


def _whole_numbers(column: pa.Array, where: str) -> pa.Array:
    kind = column.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)):
        raise DataError(f"{where}: labels must be whole numbers or strings. Found {kind}.")
    if pa.types.is_floating(kind):  # whole numbers with gaps, as pandas writes them
        column = pc.if_else(pc.is_nan(column), pa.scalar(None, kind), column)
    try:
        return column.cast(pa.int64())
    except pa.ArrowException as error:
        raise DataError(f"{where}: labels must be whole numbers or strings. Found {kind}: {error}.") from error


def _require_in_range(numbers: pa.Array, n_classes: int, source: str) -> None:
    bad = pc.or_(pc.less(numbers, 0), pc.greater_equal(numbers, n_classes))
    row = pc.index(bad, True).as_py()
    if row >= 0:
        raise DataError(
            f"{source} row {row} (counting from 0) has label {numbers[row]}; the class table has {n_classes} names, so "
            f"labels are 0 to {n_classes - 1}, or null where unknown."
        )


def _names_in_schema(schema: pa.Schema, label: str | None, source: str) -> list[str] | None:
    """Class names in the metadata: ``class_names``, comma-joined, or Hugging Face's ClassLabel."""
    metadata: Mapping[bytes, bytes] = schema.metadata or {}
    try:
        if CLASS_NAMES in metadata:
            return [name.strip() for name in metadata[CLASS_NAMES].decode().split(",")]
        features: Any = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        names = features.get(label, {}).get("names")
    except (ValueError, AttributeError) as error:
        raise DataError(f"{source}: damaged class names in the schema metadata: {error}.") from error
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise DataError(f"{source}: the names of a ClassLabel must be a list of strings. Got {names!r:.80} instead.")
    return names


def _keys(table: pa.Table, name: str, source: str) -> pa.Array:
    keys = table[name].cast(pa.large_string()).combine_chunks()
    missing = pc.index(pc.is_null(keys), True).as_py()
    if missing >= 0:
        raise DataError(f"{source} row {missing} (counting from 0) has no {name!r}. Every row needs one.")
    if pc.count_distinct(keys).as_py() < len(keys):
        counts = keys.value_counts()
        first = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"].as_py()
        raise DataError(f"{source}: column {name!r} must tell rows apart. {first!r} occurs more than once.")
    return keys


def _is_string(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))

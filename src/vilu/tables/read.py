"""Reads answer tables. The message of every error names the column and the row."""

from __future__ import annotations

import csv
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast, get_args

import numpy as np

from vilu.artifacts.tables import csv_names, read_table, require_distinct_columns, table_suffix
from vilu.errors import UNKNOWN, DataError, StorageError, UsageError, did_you_mean
from vilu.metrics.counts import Floats, Ints
from vilu.tables.files import FEATURES_SUFFIX
from vilu.tables.table import SCORE, UNCERTAINTY, AnswerTable, Features, LabelPurpose, sign_of
from vilu.text import plural
from vilu.validation import checked, describe_value

if TYPE_CHECKING:
    import pyarrow as pa

ROLE_COLUMNS: Final = (
    "id",
    "answer",
    "correct",
    "truth",
    "group",
    "cluster",
    "features",
    "asked_for",
)
"""Names of the columns with a fixed role."""

MAY_BE_EMPTY: Final = ("answer", "truth")
"""Text columns that may have empty cells."""

CORRECT_VALUES: Final = {
    "": UNKNOWN,
    "1": 1,
    "0": 0,
    "1.0": 1,
    "0.0": 0,
    "true": 1,
    "false": 0,
}
"""Cell text in small letters -> value in the column ``correct``."""


@checked
def open_table(
    source: object, *, name: str | None = None, clusters: str | None = None
) -> AnswerTable:
    """Read an answer table, one row per answer, and check every used cell.

    ``AnswerTable`` describes the columns.

    Args:
        source: A ``.csv`` or ``.parquet`` file, a data frame of pandas or polars, a table of
            pyarrow, or a dictionary with arrays and lists.
        name: The data set's name. By default the file name without its suffix, or None without
            a file.
        clusters: Name of the column for the role ``cluster``, such as "page". This column replaces
            a column ``cluster``. By default "cluster".

    Raises:
        DataError: If a column is missing or occurs twice, or if its name is similar to a known
            name, such as ``Correct``. Also if an identifier occurs twice, or if a cell has the
            wrong content for its column. The message names the row, counted from 1.
        UsageError: If the source has another type.
        StorageError: If a file cannot be read.

    Examples:
        >>> import vilu
        >>> table = vilu.open_table({"id": [1, 2], "score_p": [0.9, 0.2], "correct": [True, False]})
        >>> table.ids, table.correct.tolist()
        (('1', '2'), [1, 0])
    """
    if isinstance(source, AnswerTable):
        if clusters is not None:
            raise UsageError(
                "clusters names a column of a file or of a data frame, but this table was read "
                "already. Name the column when you read it."
            )
        return source
    if isinstance(source, str | Path):
        path = Path(source)
        dataset_name = path.stem if name is None else name
        return _read_file(path, dataset_name, clusters)
    if isinstance(source, Mapping):
        arrays = {str(key): values for key, values in source.items()}
        unchecked_features = arrays.pop("features", None)
        columns = _columns_of_arrays(arrays)
    else:
        columns = _columns_of_frame(source)
        unchecked_features = columns.pop("features", None)
    columns = _with_cluster_column(columns, clusters)
    return _checked_table(columns, unchecked_features, "the table", name)


def _read_file(path: Path, name: str, cluster_column: str | None) -> AnswerTable:
    """Read the table in a CSV or Parquet file."""
    if not path.is_file():
        raise StorageError(f"{path} is no file. Give a .csv or a .parquet file of answers.")
    if table_suffix(path) == ".csv":
        columns = _read_csv_file(path)
    else:
        table, _ = read_table(path, text_columns=())
        columns = _columns_by_name(table)
    columns = _with_cluster_column(columns, cluster_column)
    unchecked_features = columns.pop("features", None)
    features_file = path.with_suffix(FEATURES_SUFFIX)
    if not features_file.is_file():
        return _checked_table(columns, unchecked_features, str(path), name)
    if unchecked_features is not None:
        raise DataError(
            f"{path} has a column features, and {features_file} has features, too. Remove one of "
            "them."
        )
    try:
        unchecked_features = np.load(features_file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{features_file} is no readable .npy file of numbers: {error}.") from error
    return _checked_table(columns, unchecked_features, str(path), name)


def _read_csv_file(path: Path) -> dict[str, pa.ChunkedArray]:
    """Read the columns in a CSV file. Raises DataError if the file is not CSV, or not in UTF-8."""
    try:
        return _csv_columns(path)
    except DataError:
        _require_utf8(path)
        raise
    except (csv.Error, ValueError) as error:
        _require_utf8(path)
        raise DataError(f"{path} is not a readable csv table: {error}") from error


def _require_utf8(path: Path) -> None:
    """Refuse a file with text in another encoding than UTF-8."""
    try:
        with path.open(encoding="utf-8") as file:
            for _ in file:  # decodes every line
                pass
    except UnicodeDecodeError:
        raise DataError(
            f"{path} is not in UTF-8. Save it as CSV UTF-8, as spreadsheets call it."
        ) from None


def _csv_columns(path: Path) -> dict[str, pa.ChunkedArray]:
    """Read the columns in a CSV file as texts, so an error can name the row with a wrong cell.

    In many countries spreadsheets write semicolons between columns, and commas in numbers.
    """
    names = csv_names(path)
    is_unsplit = len(names) == 1  # no comma in the first line
    for separator in (";", "\t"):
        if is_unsplit and separator in names[0]:
            separated_names = csv_names(path, separator)
            table, _ = read_table(path, text_columns=separated_names, delimiter=separator)
            columns = _columns_by_name(table)
            for name in columns.keys() - set(ROLE_COLUMNS):
                columns[name] = _with_decimal_points(columns[name])
            return columns
    table, _ = read_table(path, text_columns=names)
    return _columns_by_name(table)


THOUSANDS_PATTERN: Final = re.compile(r"-?[1-9]\d{0,2}(,\d{3})+")
"""A number such as 1,234. The comma may separate thousands."""


def _with_decimal_points(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Replace decimal commas in a text column by decimal points.

    The column is returned unchanged if a cell is no number, or if commas may separate thousands.
    Commas may separate thousands if a cell has a point, or if all cells with commas look like
    12,345. If the column's name has a sign, ``_CellReader.read_numbers`` then refuses cells with
    commas.
    """
    import pyarrow as pa

    cells_with_commas = [cell for cell in column.to_pylist() if cell and "," in cell]
    may_be_thousands = all(THOUSANDS_PATTERN.fullmatch(cell.strip()) for cell in cells_with_commas)
    if cells_with_commas and may_be_thousands:
        return column
    converted_cells = []
    for cell in column.to_pylist():
        if not cell or not cell.strip():
            converted_cells.append(cell)
            continue
        number = cell.replace(",", ".")
        if "." in cell or _parse_number(number) is None:
            return column
        converted_cells.append(number)
    converted_column = pa.array(converted_cells, pa.string())
    return pa.chunked_array([converted_column])


def _columns_of_arrays(arrays: Mapping[str, Any]) -> dict[str, pa.ChunkedArray]:
    """Convert a dictionary with arrays and lists to columns."""
    import pyarrow as pa

    columns: dict[str, pa.ChunkedArray] = {}
    for name, values in arrays.items():
        try:
            column = pa.array(values, from_pandas=True)
        except (pa.ArrowException, TypeError, ValueError) as error:
            raise DataError(
                f"column {name!r} must be a list of numbers or of texts: {error}"
            ) from error
        columns[name] = pa.chunked_array([column])
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"all columns must have one length. Got {lengths} instead.")
    return columns


def _columns_of_frame(source: Any) -> dict[str, pa.ChunkedArray]:  # noqa: ANN401 - of any library
    """Convert a data frame of pandas or polars, or a table of pyarrow, to columns."""
    import pyarrow as pa

    is_frame = hasattr(source, "__arrow_c_stream__") and hasattr(source, "columns")
    if not is_frame:
        raise UsageError(
            "a table of answers is a .csv or .parquet file, a data frame of pandas or polars, a "
            f"table of pyarrow, or a dictionary of columns. Got {describe_value(source)} instead."
        )
    names = getattr(source, "column_names", source.columns)
    require_distinct_columns("the table", [str(name) for name in names])
    try:
        table = pa.table(source)
        return _columns_by_name(table)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise DataError(f"the table must have columns of one type each: {error}") from error


def _columns_by_name(table: pa.Table) -> dict[str, pa.ChunkedArray]:
    """Return name -> column. Columns without a name, added by some spreadsheets, are left out."""
    columns = {}
    for index, name in enumerate(table.column_names):
        if name.strip():
            columns[name] = table.column(index)
    return columns


def _with_cluster_column(
    columns: dict[str, pa.ChunkedArray], cluster_column: str | None
) -> dict[str, pa.ChunkedArray]:
    """Rename the column ``cluster_column`` to its role ``cluster``.

    Without ``cluster_column``, the columns are returned unchanged.
    """
    if cluster_column is None:
        return columns
    if cluster_column not in columns:
        raise DataError(
            f"the table has no column {cluster_column!r} with the clusters of its rows. It has "
            f"{', '.join(columns)}."
        )
    renamed = {**columns, "cluster": columns[cluster_column]}
    has_role = cluster_column in ROLE_COLUMNS  # such a column also keeps its name
    if not has_role:
        del renamed[cluster_column]
    return renamed


def _checked_table(
    columns: Mapping[str, pa.ChunkedArray],
    unchecked_features: Any,  # noqa: ANN401 - of any type of array
    source_name: str,
    name: str | None,
) -> AnswerTable:
    """Check all cells, and make a table from the columns.

    Args:
        columns: Name -> column, for all columns except the features.
        unchecked_features: An array or a column of lists, or None without features.
        source_name: Beginning of the messages: the file's path, or "the table".
        name: The data set's name.
    """
    _require_known_names(source_name, columns)
    ids = _text_column(source_name, columns, "id") or ()
    _require_distinct_ids(source_name, ids)
    cell_reader = _CellReader(source_name, ids)
    number_columns = [column for column in columns if _is_number_column(column, columns[column])]
    numbers = {
        column: cell_reader.read_numbers(column, columns[column]) for column in number_columns
    }
    features = None
    if unchecked_features is not None:
        features = cell_reader.read_features(unchecked_features)
    if not numbers and features is None:
        raise DataError(
            f"{source_name} has no number that says how sure an answer is. Add a column such as "
            "score_confidence (a higher number: more likely right)."
        )
    used_columns = {*ROLE_COLUMNS, *number_columns}
    return AnswerTable(
        ids,
        cell_reader.read_correct(columns.get("correct")),
        numbers,
        answer=_text_column(source_name, columns, "answer", ids),
        truth=_text_column(source_name, columns, "truth", ids),
        group=_text_column(source_name, columns, "group", ids),
        cluster=_text_column(source_name, columns, "cluster", ids),
        asked_for=_purpose_column(source_name, columns, ids),
        features=features,
        unused=tuple(column for column in columns if column not in used_columns),
        name=name,
    )


def _is_number_column(name: str, column: pa.ChunkedArray) -> bool:
    """Return whether a column has numbers that say how sure an answer is.

    True if the name has a sign, or if the cells are numbers and the name has no other role.
    """
    if name in ROLE_COLUMNS:
        return False
    return sign_of(name) != 0 or _has_numbers(column)


def _require_known_names(source_name: str, columns: Mapping[str, pa.ChunkedArray]) -> None:
    """Refuse a table without identifiers, and column names similar to a role's name.

    Without this check, a column ``Correct`` would have no role, and the user would not notice.
    """
    missing_roles = [role for role in ROLE_COLUMNS if role not in columns]
    for name in columns:
        normalised = name.strip().lower().replace(" ", "_").replace("-", "_")
        stem, _, _ = normalised.partition("_")
        has_role = normalised in ROLE_COLUMNS or stem in {SCORE, UNCERTAINTY}
        if has_role and normalised != name:  # such as "Correct" or "Score max"
            raise DataError(
                f"{source_name} has a column {name!r}. Write {normalised!r} if it is meant, or "
                "another name."
            )
        suggestion = did_you_mean(name, missing_roles, cutoff=0.8)  # "Did you mean ...?" or ""
        if suggestion and name not in ROLE_COLUMNS:
            raise DataError(f"{source_name} has a column {name!r}.{suggestion} Rename it.")
    if "id" not in columns:
        raise DataError(
            f"{source_name} must have a column id, by which rows are recognised. It has "
            f"{', '.join(columns) or 'no column'}."
        )
    if not len(columns["id"]):
        raise DataError(f"{source_name} has no row.")


def _text_column(
    source_name: str, columns: Mapping[str, pa.ChunkedArray], name: str, ids: Sequence[str] = ()
) -> tuple[str, ...] | None:
    """Return the texts in a column, or None if there is no such column.

    An empty cell is refused, except in the columns ``MAY_BE_EMPTY``. ``ids`` are the row
    identifiers for the message. ``ids`` is empty if the identifiers are not known yet.
    """
    import pyarrow as pa

    if name not in columns:
        return None
    column = _without_categories(columns[name])
    try:
        text_column = column.cast(pa.string())
        cells = text_column.to_pylist()
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{source_name}: column {name} must hold texts: {error}") from error
    texts = []
    for row, cell in enumerate(cells):
        text = "" if cell is None else cell
        if name not in MAY_BE_EMPTY and not text.strip():
            row_in_words = _row_in_words(row, ids)
            raise DataError(
                f"{source_name}, {row_in_words}: {name} is empty. Fill it, or remove the row."
            )
        texts.append(text)
    return tuple(texts)


def _without_categories(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the column, with the texts of its rows if it has categories."""
    import pyarrow as pa

    if not pa.types.is_dictionary(column.type):
        return column
    # pyarrow cannot cast the categories of polars, but can list the categories.
    cells = column.to_pylist()
    texts = pa.array(cells)
    return pa.chunked_array([texts])


def _purpose_column(
    source_name: str, columns: Mapping[str, pa.ChunkedArray], ids: Sequence[str]
) -> tuple[LabelPurpose, ...] | None:
    """Return each label's purpose, from the column ``asked_for``, or None without this column.

    Every cell must be "fit" or "calibration".
    """
    texts = _text_column(source_name, columns, "asked_for", ids)
    if texts is None:
        return None
    purposes = []
    for row, text in enumerate(texts):
        if text not in get_args(LabelPurpose):
            row_in_words = _row_in_words(row, ids)
            raise DataError(
                f"{source_name}, {row_in_words}: asked_for must be fit or calibration, "
                f"as `vilu next` writes it. Got {text!r:.60} instead."
            )
        purpose = cast("LabelPurpose", text)
        purposes.append(purpose)
    return tuple(purposes)


def _row_in_words(row: int, ids: Sequence[str]) -> str:
    """Describe a row: the number, counted from 1, and the identifier if ``ids`` is not empty."""
    if not ids:
        return f"row {row + 1}"
    return f"row {row + 1} (id {ids[row]!r:.60})"


def _require_distinct_ids(source_name: str, ids: Sequence[str]) -> None:
    """Refuse a table with the same identifier in several rows."""
    if len(set(ids)) == len(ids):
        return
    counts = Counter(ids)
    repeated_id = next(row_id for row_id in ids if counts[row_id] > 1)
    first_row = ids.index(repeated_id)
    second_row = ids.index(repeated_id, first_row + 1)
    n_repeated_ids = sum(count > 1 for count in counts.values())
    raise DataError(
        f"{source_name}: every row needs an id of its own. {repeated_id!r:.60} is the id of the "
        f"rows {first_row + 1} and {second_row + 1}. Number of ids that repeat: {n_repeated_ids}. "
        "Number the rows, or remove the copies."
    )


def _has_numbers(column: pa.ChunkedArray) -> bool:
    """Return whether a column has numbers: the type is numeric, or all texts are numbers."""
    import pyarrow as pa

    data_type = column.type
    checks = [pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_boolean]
    is_numeric = any(check(data_type) for check in checks)
    if is_numeric:
        return True
    is_empty = column.null_count == len(column)
    if is_empty or not _is_text(data_type):
        return False
    return all(_parse_number(cell) is not None for cell in column.to_pylist() if cell)


def _is_text(data_type: pa.DataType) -> bool:
    """Return whether cells are text, in any of Arrow's three text types."""
    import pyarrow as pa

    checks = [pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view]
    return any(check(data_type) for check in checks)


def _parse_number(cell: str) -> float | None:
    """Return the number in a cell, or None if the cell is no number."""
    if "_" in cell:  # a text such as 2024_01, which Python would read as the number 202401
        return None
    try:
        return float(cell)
    except ValueError:
        return None


class _CellReader:
    """Reads a table's number columns. Errors name the column and the row.

    ``source_name`` is the beginning of the messages, and ``ids`` are the row identifiers.
    """

    def __init__(self, source_name: str, ids: Sequence[str]) -> None:
        self.source_name = source_name
        self.ids = ids

    def cell_error(self, row: int, problem: str) -> DataError:
        """Make the error for a cell of a row. ``problem`` is a clause for the message."""
        row_in_words = _row_in_words(row, self.ids)
        return DataError(f"{self.source_name}, {row_in_words}: {problem}")

    def read_numbers(self, name: str, column: pa.ChunkedArray) -> Floats:
        """Return a column as finite numbers (N,)."""
        import pyarrow as pa

        if _is_text(column.type):
            numbers = self._numbers_of_texts(name, column)
        else:
            try:
                float_column = column.cast(pa.float64(), safe=False)
                numbers = float_column.to_numpy()
            except pa.ArrowException as error:
                raise DataError(
                    f"{self.source_name}: column {name} must hold numbers: {error}"
                ) from None
        is_finite = np.isfinite(numbers)
        bad_rows = np.flatnonzero(~is_finite)
        if len(bad_rows):
            row = int(bad_rows[0])
            is_missing = math.isnan(numbers[row])
            problem = "is missing" if is_missing else f"is {numbers[row]}"
            raise self.cell_error(
                row,
                f"the number in {name} {problem} (in {plural(len(bad_rows), 'row')}). Every row "
                "needs a finite number: fill it, or leave the row out.",
            )
        return np.ascontiguousarray(numbers, dtype=np.float64)

    def _numbers_of_texts(self, name: str, column: pa.ChunkedArray) -> Floats:
        """Return numbers (N,) from a text column, NaN where a cell is empty."""
        numbers = np.full(len(column), np.nan)
        for row, cell in enumerate(column.to_pylist()):
            if cell is None or not cell.strip():
                continue
            number = _parse_number(cell)
            if number is None:
                raise self.cell_error(
                    row, f"{name} must hold numbers, such as 0.95. Got {cell!r:.60} instead."
                )
            numbers[row] = number
        return numbers

    def read_correct(self, column: pa.ChunkedArray | None) -> Ints:
        """Return the column ``correct`` as (N,) int64: 1, 0, or -1 where not known."""
        correct = np.full(len(self.ids), UNKNOWN, dtype=np.int64)
        if column is None:
            return correct
        for row, cell in enumerate(column.to_pylist()):
            is_missing = cell is None or cell != cell  # noqa: PLR0124 - NaN differs from itself
            text = "" if is_missing else str(cell).strip().lower()
            if text not in CORRECT_VALUES:
                raise self.cell_error(
                    row,
                    "correct must be 1 (right), 0 (wrong), or empty if it is not known. Got "
                    f"{cell!r:.60} instead.",
                )
            correct[row] = CORRECT_VALUES[text]
        return correct

    def read_features(
        self,
        unchecked_features: Any,  # noqa: ANN401 - an array, or a column of lists
    ) -> Features:
        """Check the features, and return (N, F) float32."""
        try:
            cells = unchecked_features
            if hasattr(unchecked_features, "to_pylist"):
                cells = unchecked_features.to_pylist()
            features = np.ascontiguousarray(cells, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{self.source_name}: features must be one vector per row, all of one length, of "
                f"numbers only: {error}"
            ) from error
        n_rows = len(self.ids)
        if features.ndim != 2 or len(features) != n_rows or not features.shape[1]:
            raise DataError(
                f"{self.source_name}: features must have the shape ({n_rows}, F). Got "
                f"{features.shape} instead."
            )
        is_finite = np.isfinite(features).all(axis=1)
        bad_rows = np.flatnonzero(~is_finite)
        if len(bad_rows):
            raise self.cell_error(
                int(bad_rows[0]),
                "a number in features is missing or infinite (in "
                f"{plural(len(bad_rows), 'row')}). Fill it, or leave the row out.",
            )
        return features

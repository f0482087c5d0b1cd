"""The result of a converter: an answer table, and the number of missing words or objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vilu.artifacts.paths import inputs_entry
from vilu.artifacts.tables import write_table
from vilu.errors import DataError
from vilu.text import plural

Columns = dict[str, list[Any]]
"""Column name -> cells. All columns have the same length. None is an empty cell."""

TABLE_KIND: Final = "answers"
"""The kind in the metadata of a Parquet file with answers."""


@dataclass(frozen=True)
class Converted:
    """A table of answers, made from another program's files.

    Attributes:
        columns: Column name -> cells. ``vilu.open_table`` accepts these columns.
        n_wanted: Number of words or objects known to exist, or 0 if nothing is known.
        n_missed: How many known words or objects have no row. A guarantee is about rows, so
            it does not cover these words or objects.

    Examples:
        >>> from vilu.tables.sources import Converted
        >>> words = Converted({"id": ["1"], "answer": ["cat"]}, n_wanted=4, n_missed=3)
        >>> len(words), words.missed_share
        (1, 0.75)
    """

    columns: Columns
    n_wanted: int = 0
    n_missed: int = 0

    def __len__(self) -> int:
        return len(self.columns["id"])

    @property
    def missed_share(self) -> float | None:
        """Share ``n_missed`` / ``n_wanted``, or None if ``n_wanted`` is 0."""
        if self.n_wanted == 0:
            return None
        return self.n_missed / self.n_wanted

    @property
    def n_known(self) -> int:
        """Number of rows of which it is known whether the answer is right."""
        return len(self) - self.columns["correct"].count(None)

    def write(self, path: Path, inputs: str | None = None) -> None:
        """Write the columns as .csv or .parquet. The path's suffix decides.

        ``inputs`` is a digest of the table's source files. The digest is written into the metadata
        of a Parquet file.
        """
        import pyarrow as pa

        arrays = {name: pa.array(values) for name, values in self.columns.items()}
        # without any known right or wrong answer, Arrow cannot infer the column's type
        arrays["correct"] = pa.array(self.columns["correct"], pa.int64())
        metadata = {"kind": TABLE_KIND, **inputs_entry(inputs)}
        write_table(path, arrays, metadata)


def comparable_text(text: str) -> str:
    """Normalise a text for comparisons between answers: no case, no extra white space."""
    words = text.split()
    return " ".join(words).casefold()


def correct_cells(
    ids: Sequence[str], answers: Sequence[str], truth: Mapping[str, str] | None
) -> list[int | None]:
    """Return the cells for the column ``correct``: 1 (right), 0 (wrong), or None without a truth.

    Raises:
        DataError: If there are rows and a ``truth``, but no common id.
    """
    if truth is None:
        return [None] * len(ids)
    has_common_id = not truth.keys().isdisjoint(ids)
    if ids and not has_common_id:
        raise DataError(
            f"none of the {plural(len(truth), 'truth')} has the id of a row. The first row has id "
            f"{ids[0]!r}, and the first truth has id {next(iter(truth), '')!r}."
        )
    correct: list[int | None] = []
    for row_id, answer in zip(ids, answers, strict=True):
        true_text = truth.get(row_id)
        if true_text is None:
            correct.append(None)
        else:
            is_right = comparable_text(answer) == comparable_text(true_text)
            correct.append(int(is_right))
    return correct

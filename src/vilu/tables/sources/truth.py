"""Reads files with the right answers, written by people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vilu.artifacts.disk import convert_os_errors
from vilu.artifacts.tables import CsvRow, csv_rows
from vilu.errors import DataError
from vilu.tables.sources.boxes import require_box
from vilu.tables.sources.words import BOX_COLUMNS, Word, parse_number


def read_truth(path: Path) -> dict[str, str]:
    """Read each row's right answer from a CSV file with the columns ``id`` and ``truth``.

    A row with an empty ``truth`` is left out, because the answer is not known.
    """
    truth: dict[str, str] = {}
    for row in _read_rows(path, ("id", "truth")):
        if row["id"] in truth:
            raise DataError(
                f"{path} line {row.line}: every id must occur once. Got {row['id']!r} again."
            )
        if row["truth"].strip():
            truth[row["id"]] = row["truth"]
    return truth


def read_words(path: Path) -> dict[str, list[Word]]:
    """Read a CSV file with the columns page, text, left, top, width, height: one word per row.

    Returns page name -> words.
    """
    pages: dict[str, list[Word]] = {}
    for row in _read_rows(path, ("page", "text", *BOX_COLUMNS)):
        location = f"{path} line {row.line}"
        left, top, width, height = (parse_number(row[edge], edge, location) for edge in BOX_COLUMNS)
        require_box([left, top, width, height], location)
        word = Word(row["text"], (left, top, width, height))
        pages.setdefault(row["page"], []).append(word)
    return pages


def read_dictionary(path: Path) -> frozenset[str]:
    """Read a text file with a word per line. The words are returned in small letters."""
    try:
        with convert_os_errors(f"cannot read {path}"):
            lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} must be text in UTF-8, with one word per line: {error}."
        ) from error
    return frozenset(line.strip().casefold() for line in lines if line.strip())


def _read_rows(path: Path, columns: Sequence[str]) -> list[CsvRow]:
    """Read the rows in a CSV file. Raises DataError if a column is missing or there are no rows."""
    names, rows = csv_rows(path)
    missing_columns = [column for column in columns if column not in names]
    if missing_columns:
        raise DataError(
            f"{path} must have the columns {', '.join(columns)}. "
            f"It lacks {', '.join(missing_columns)}."
        )
    if not rows:
        raise DataError(f"{path} must have at least one row. It has none.")
    return rows

"""Which files are answer tables. This module reads no rows, and does not import torch."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from vilu.artifacts.tables import csv_names, table_suffix

FEATURES_SUFFIX: Final = ".features.npy"
"""Suffix of the file with a table's features: ``answers.features.npy`` for ``answers.csv``."""


def may_be_table(path: Path) -> bool:
    """Return whether a path can be an answer table: an existing .csv or .parquet file."""
    return path.is_file() and path.suffix.lower() in {".csv", ".parquet"}


def is_answer_table(path: Path) -> bool:
    """Return whether a file is an answer table.

    A CSV file without the column ``id`` counts as a table, too, unless it has columns of ``vilu
    score``. ``open_table`` then reports the mistake in the file.
    """
    import pyarrow as pa
    import pyarrow.parquet

    if not may_be_table(path):
        return False
    try:
        if table_suffix(path) == ".csv":
            names = csv_names(path)
        else:
            names = pyarrow.parquet.read_schema(path).names
    except (pa.ArrowException, ValueError, OSError):
        return False  # another reader will read the file and report the error
    has_uncertainty = "uncertainty" in names
    has_failure = "failure" in names
    if "id" in names:
        is_score_file = has_uncertainty and has_failure  # files of `vilu score` have both columns
        return not is_score_file
    if has_uncertainty or has_failure:
        return False  # scores without ids
    return table_suffix(path) == ".csv"


def with_features_files(*paths: Path) -> list[Path]:
    """Return the paths. If a table has a file with features, this file follows the table."""
    files = []
    for path in paths:
        files.append(path)
        if not may_be_table(path):
            continue
        features_file = path.with_suffix(FEATURES_SUFFIX)
        if features_file.is_file():
            files.append(features_file)
    return files

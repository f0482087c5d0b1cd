"""The checks by ``vilu inspect`` on a benchmark's output folder."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from vilu.artifacts.documents import first_error, read_json
from vilu.cli.inspecting import Artefact, check_file
from vilu.errors import DataError
from vilu_bench.studies.result import RUN_AGAIN, CellResult, load_result
from vilu_bench.studies.study import STUDIES, load_studies

CELLS = "cells"
"""Folder in the output with a document per cell."""


def check(path: Path) -> Artefact | None:
    """Check and describe a benchmark's output folder. Return None for any other folder."""
    has_studies = (path / STUDIES).is_dir()
    has_cells = (path / CELLS).is_dir()
    if not has_studies and not has_cells:
        return None
    n_studies = 0
    if has_studies:
        n_studies = len(load_studies(path))
    cells = sorted((path / CELLS).rglob("*.json"))
    for file in cells:
        _check_cell(file, path)
    documents = sorted(path.glob(f"{STUDIES}/*/*.json"))
    tables = sorted(path.glob(f"{STUDIES}/*/*.parquet"))
    for file in (*documents, *tables):
        check_file(file)
    return Artefact(path, f"benchmark, {n_studies} studies, {len(cells)} cells")


def _check_cell(file: Path, run: Path) -> None:
    """Raise DataError if a cell's document is damaged or misplaced, or if scores are missing."""
    try:
        document = read_json(file, RUN_AGAIN)
        result = CellResult.model_validate(document)
    except ValidationError as error:
        damage = first_error(error)
        raise DataError(f"{file} is damaged: {damage}. {RUN_AGAIN}.") from error
    is_in_place = run / result.cell.path == file
    is_complete = is_in_place and load_result(run, result.cell, result.fingerprint) is not None
    if not is_complete:
        raise DataError(
            f"{file} is not the document of its cell, or its scores are missing or of another "
            f"cell. {RUN_AGAIN}."
        )

"""What ``vilu inspect`` checks of the run of a benchmark."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from vilu.artifacts.documents import explain, read_json
from vilu.cli.artefacts import Artefact, check_file
from vilu.errors import DataError
from vilu_bench.studies.result import AGAIN, CellResult, load_result
from vilu_bench.studies.study import STUDIES, load_studies

CELLS = "cells"


def check(path: Path) -> Artefact | None:
    """The run of a benchmark at a path, every document checked; None where there is none."""
    if not ((path / CELLS).is_dir() or (path / STUDIES).is_dir()):
        return None
    boards = load_studies(path) if (path / STUDIES).is_dir() else []
    cells = sorted((path / CELLS).rglob("*.json"))
    for file in cells:
        try:
            said = CellResult.model_validate(read_json(file, AGAIN))
        except ValidationError as error:
            raise DataError(f"{file} is damaged: {explain(error)}. {AGAIN}.") from error
        if path / said.cell.path != file or load_result(path, said.cell, said.fingerprint) is None:
            raise DataError(
                f"{file} is not the document of its cell, or the files beside it are not its. {AGAIN}."
            )
    for pattern in ("*.json", "*.parquet"):
        for file in sorted(path.glob(f"{STUDIES}/*/{pattern}")):
            check_file(file)
    return Artefact(path, f"benchmark, {len(boards)} studies, {len(cells)} cells")

"""What a run folder keeps of a study, so that it can be shown again without data, embeddings or any computation.

``studies/NAME/study.json`` holds the whole configuration and which cells belong to it; these are in ``cells``. Both
can be moved and archived together; ``stores`` is not needed.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vilu.benchmark.board import Board
from vilu.benchmark.cells import plan
from vilu.benchmark.config import Config
from vilu.benchmark.loading import parse_config
from vilu.benchmark.parts import Model
from vilu.benchmark.result import load_bootstrap, load_result
from vilu.errors import DataError, StorageError
from vilu.files import make_folder, write_json

DOCUMENT = "study.json"
STUDIES = "studies"


class Archive(Model):
    """The document.

    Attributes:
        vilu: Version that wrote it.
        config: The benchmark, with every method named.
        fingerprints: Of every cell that is run, by its path.
    """

    schema_version: int = 1
    kind: str = "study"
    vilu: str
    config: dict[str, Any]
    fingerprints: dict[str, str]


def save_study(board: Board, output: Path) -> Path:
    """Write ``study.json``; returns its folder.

    Raises:
        StorageError: If the file system refuses.
    """
    import vilu

    config = board.config
    archive = Archive(
        vilu=vilu.__version__,
        config=config.complete().model_dump(mode="json"),
        fingerprints={cell.path.as_posix(): result.fingerprint for cell, result in board.results.items()},
    )
    folder = make_folder(output / STUDIES / config.name)
    write_json(folder / DOCUMENT, archive.model_dump(mode="json"))
    return folder


def load_studies(output: Path) -> list[Board]:
    """The studies of a run folder, by name.

    Raises:
        DataError: If there is none, or a cell is missing or was made anew since.
        StorageError: If a file cannot be read.
    """
    found = sorted((output / STUDIES).glob(f"*/{DOCUMENT}"))
    if not found:
        raise DataError(
            f"{output} holds no study (no {STUDIES}/NAME/{DOCUMENT}). Make one: vilu benchmark CONFIG.toml."
        )
    return [_load(path, output) for path in found]


def _load(path: Path, output: Path) -> Board:
    try:
        archive = Archive.model_validate(json.loads(path.read_bytes()))
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}.") from error
    except (ValueError, ValidationError) as error:
        raise DataError(f"{path} is not the document of a study: {error}") from error
    config: Config = parse_config(archive.config, str(path))
    cells = plan(config)
    results = {}
    for cell in cells:
        if cell.same_as is None:
            fingerprint = archive.fingerprints.get(cell.path.as_posix())
            result = None if fingerprint is None else load_result(output, cell, fingerprint)
            if result is None:
                raise DataError(
                    f"{output / cell.path} is missing, damaged, or newer than the study {path.parent.name}. Run its "
                    "`vilu benchmark` again."
                )
            results[cell] = result
    return Board(config, cells, results, cache(lambda cell: load_bootstrap(output, cell)))

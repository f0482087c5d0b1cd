"""The checks for ``vilu inspect``. The code that reads an artefact also checks the artefact."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from pydantic import ValidationError

from vilu.artifacts.disk import RUN_FILE, convert_os_errors
from vilu.artifacts.documents import first_error, read_json
from vilu.artifacts.tables import csv_names, read_table
from vilu.calibration.calibration import Calibration
from vilu.calibration.monitor.watch import State
from vilu.errors import DataError, StorageError
from vilu.outcomes.outcomes import Outcomes
from vilu.outcomes.results import ResultTable
from vilu.predictors.persistence.files import PREDICTOR
from vilu.predictors.persistence.storage import load_predictor
from vilu.registry import entry_points, load_entry, refuse_name_of_bench
from vilu.scoring.score_folder import ScoreFolder
from vilu.store.inspect import StoreReport
from vilu.store.inspect import inspect as inspect_store
from vilu.store.parts import StoreLedger
from vilu.text import plural
from vilu.triage.review import DECISION_COLUMNS, NEXT_COLUMNS
from vilu.triage.state import DECISIONS_PARQUET

ARTEFACT_GROUP: Final = "vilu.artefacts"
"""Entry-point group for recognising artefacts from other packages."""

BENCHMARK_FOLDERS: Final = ("cells", "studies")
"""Folders in the output of a benchmark. vilu-bench checks such an output."""


class Artefact(NamedTuple):
    """An artefact that passed the check."""

    path: Path
    description: str


def check_artefacts(path: Path) -> Iterator[Artefact]:
    """Check the artefacts at a path. Yield each artefact.

    For stores and score folders, all bytes of all files are read and checked.
    """
    if not path.exists():
        raise StorageError(f"{path} does not exist.")
    if path.is_file():
        yield check_file(path)
        return
    if (path / PREDICTOR).is_file():
        yield _check_predictor(path)
        return
    if (path / RUN_FILE).is_file():
        if is_store(path):
            yield _check_store(path)
        else:
            yield _check_scores(path)
        return
    artefact = _find_by_plugin(path)
    if artefact is not None:
        yield artefact
        return
    if any((path / name).is_dir() for name in BENCHMARK_FOLDERS):
        refuse_name_of_bench(ARTEFACT_GROUP, "benchmark")
    files = sorted(file for file in path.iterdir() if file.suffix in {".json", ".parquet"})
    if not files:
        raise DataError(
            f"{path} is no output of vilu: it has no store, predictor, scores, results, or run of "
            "a benchmark."
        )
    for file in files:
        yield check_file(file)


def _find_by_plugin(path: Path) -> Artefact | None:
    """Return the artefact at a path if another package recognises it, else None."""
    for entry in entry_points(ARTEFACT_GROUP):
        recognise = load_entry(entry, "artefact")
        artefact: Artefact | None = recognise(path)
        if artefact is not None:
            return artefact
    return None


def is_store(path: Path) -> bool:
    """Return whether a folder is a store, complete or not, according to ``run.json``."""
    return StoreLedger.has_begun(path)


def check_file(path: Path) -> Artefact:
    """Check a vilu file, with the code that reads such a file."""
    if path.suffix == ".json":
        return _check_document(path)
    if path.suffix == ".parquet":
        return _check_table(path)
    if path.suffix == ".csv":
        outcomes = Outcomes.load(path)
        return _describe(path, "outcomes", len(outcomes))
    raise DataError(
        f"{path} cannot be checked by itself: only .json, .parquet and .csv files can. Give its "
        "folder."
    )


def refuse_list_for_people(path: Path) -> None:
    """Raise DataError for a CSV file that a triage or `vilu next` wrote for people.

    Such a file has no digest.
    """
    if path.suffix.lower() != ".csv":
        return
    names = set(csv_names(path))
    if "id" in names:
        return  # a table of answers, perhaps with the columns below, too
    if names.issuperset(DECISION_COLUMNS):
        raise DataError(
            f"{path} is a list for people: the decisions of `vilu triage`. It has no digest, so it "
            f"cannot be checked. {DECISIONS_PARQUET} of the triage has the same decisions and a "
            "digest. Inspect that file, or the folder of the triage."
        )
    if names.issuperset({*NEXT_COLUMNS, "label"}):
        raise DataError(
            f"{path} is a list for people: photos to label, of `vilu triage` or `vilu next`. It "
            "has no digest, so it cannot be checked. Fill in the column label, and give the file "
            "to the next command with --labels."
        )


def _refuse_json_list(path: Path) -> None:
    """Raise DataError for a file that begins like a JSON list. No document of vilu is a list."""
    if not path.is_file():  # a pipe, for example, which would wait for a writer
        return
    with convert_os_errors(f"cannot read {path}"), path.open("rb") as file:
        beginning = file.read(64)
    if beginning.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        raise DataError(
            f"{path} begins like a JSON list, such as the tasks for Label Studio that `vilu "
            "review` writes. Such lists are for other programs and have no digest, so they cannot "
            "be checked. Give tasks with answers to `vilu labels`."
        )


def _check_document(path: Path) -> Artefact:
    """Check a JSON file."""
    _refuse_json_list(path)
    kind = read_json(path, "Make it again").get("kind", "document")
    if not isinstance(kind, str):
        raise DataError(f"{path} is damaged: its kind is no text. Make it again.")
    n_rows = len(ResultTable.load(path)) if kind == "results" else 0
    return _describe(path, kind, n_rows)


def _check_table(path: Path) -> Artefact:
    """Check a Parquet file."""
    table, metadata = read_table(path, text_columns=())
    kind = str(metadata.get("kind", "table of another program"))
    n_rows = len(table)
    if kind == "monitor":
        _check_monitor_state(path, metadata)
    elif kind == "outcomes":
        n_rows = len(Outcomes.load(path))
    elif kind == "results":
        n_rows = len(ResultTable.load(path))
    return _describe(path, kind, n_rows)


def _check_monitor_state(path: Path, metadata: dict[str, object]) -> None:
    """Raise DataError if a monitor's state is not valid."""
    try:
        State.model_validate(metadata)
    except ValidationError as error:
        reason = first_error(error)
        raise DataError(f"{path} is damaged: {reason}. Begin a new monitor.") from error


def _describe(path: Path, kind: str, n_rows: int) -> Artefact:
    """Return an artefact, described by the kind and, if there are rows, by the row count."""
    description = f"{kind}, {plural(n_rows, 'row')}" if n_rows else kind
    return Artefact(path, description)


def _check_predictor(path: Path) -> Artefact:
    """Check a predictor, and its calibration if there is one, by loading both."""
    predictor = load_predictor(path)
    calibration = Calibration.find(path)
    calibration_text = "not calibrated"
    if calibration is not None:
        calibration_text = f"calibrated: {calibration.guarantee_text}"
    return Artefact(path, f"predictor {predictor.label}, {calibration_text}")


def _check_store(path: Path) -> Artefact:
    """Check a store by reading every byte."""
    report = inspect_store(path, deep=True)
    require_sound(report, path)
    return Artefact(path, str(report))


def require_sound(report: StoreReport, path: Path) -> None:
    """Raise StorageError if a store has problems."""
    if report.problems:
        raise StorageError(
            f"{plural(len(report.problems), 'problem')} in {path}; the first: {report.problems[0]}"
        )


def _check_scores(path: Path) -> Artefact:
    """Check a score folder by reading every byte."""
    scores = ScoreFolder(path)
    scores.verify()
    scores.tally()  # raises an error if `vilu evaluate` could not read the scores
    return Artefact(path, f"scores, {plural(len(scores), 'row')}")

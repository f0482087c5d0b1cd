"""What ``vilu inspect`` checks: every artefact of ours, of which each file that vouches for itself can be sealed."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from vilu.artifacts.disk import MANIFEST, RUN, locked
from vilu.artifacts.documents import explain, read_json, seal_document
from vilu.artifacts.tables import read_table, seal_table
from vilu.calibration.calibration import Calibration
from vilu.calibration.monitor.watch import State
from vilu.errors import DataError, StorageError
from vilu.outcomes.outcomes import Outcomes
from vilu.outcomes.results import ResultTable
from vilu.predictors.persistence.files import PREDICTOR, RISK
from vilu.predictors.persistence.storage import load
from vilu.registry import entry_points, load_entry
from vilu.scoring.score_folder import ScoreFolder
from vilu.store.inspect import inspect as inspect_store


class Artefact(NamedTuple):
    """What was found whole: where, in words, and its files that carry a digest of their own."""

    path: Path
    what: str
    files: list[Path]

    def seal(self) -> list[Path]:
        """Give a digest to those that have none; returns them.

        Each takes the place of the old one at once.
        """
        with ExitStack() as stack:
            if (self.path / RUN).is_file():
                stack.enter_context(locked(self.path, "writing to"))
            added = {
                path: (seal_table if path.suffix == ".parquet" else seal_document)(path)
                for path in self.files
            }
        return [path for path, new in added.items() if new]


def check(path: Path) -> Iterator[Artefact]:
    """The artefacts at a path, each checked as by those who read it, and of every file of a run its bytes."""
    if not path.exists():
        raise StorageError(f"{path} does not exist.")
    if path.is_file():
        yield check_file(path)
    elif (path / PREDICTOR).is_file():
        yield _predictor(path)
    elif (path / RUN).is_file():
        yield _store(path) if is_store(path) else _scores(path)
    elif (of_others := _of_others(path)) is not None:
        yield of_others
    else:
        files = sorted(file for file in path.iterdir() if file.suffix in {".json", ".parquet"})
        if not files:
            raise DataError(
                f"{path} is none of ours: no store, predictor, scores, results, or run of a benchmark."
            )
        yield from map(check_file, files)


def _of_others(path: Path) -> Artefact | None:
    """What another package takes for an artefact of its own; None where none does."""
    for entry in entry_points("vilu.artefacts"):
        artefact: Artefact | None = load_entry(entry, "artefact")(path)
        if artefact is not None:
            return artefact
    return None


def is_store(path: Path) -> bool:
    """Whether a folder is a store, by its ``run.json``."""
    return (path / RUN).is_file() and read_json(
        path / RUN, "Make it again", StorageError, of=path
    ).get("kind") != "scores"


def check_file(path: Path) -> Artefact:
    """A file of ours, checked as by those who read it."""
    if path.suffix == ".json":
        kind = read_json(path, "Make it again").get("kind", "document")
        found: Sized = ResultTable.load(path) if kind == "results" else ()
    elif path.suffix == ".parquet":
        table, metadata = read_table(path, ())
        kind, found = str(metadata.get("kind", "table of another program")), table
        if kind == "monitor":
            try:
                State.model_validate(metadata)
            except ValidationError as error:
                raise DataError(
                    f"{path} is damaged: {explain(error)}. Begin a new monitor."
                ) from error
        elif kind in {"outcomes", "results"}:
            found = (Outcomes if kind == "outcomes" else ResultTable).load(path)
    else:
        raise DataError(
            f"{path} is no file that vouches for itself: those are .json and .parquet. Give its folder."
        )
    return Artefact(path, f"{kind}, {len(found)} rows" if len(found) else str(kind), [path])


def _predictor(path: Path) -> Artefact:
    predictor = load(path)
    calibration = Calibration.find(path)
    if calibration is None:
        return Artefact(path, f"predictor {predictor.label}, not calibrated", [])
    what = f"predictor {predictor.label}, calibrated: {calibration.promise}"
    return Artefact(path, what, [path / RISK])


def _store(path: Path) -> Artefact:
    report = inspect_store(path, deep=True)
    if report.problems:
        raise StorageError(
            f"{len(report.problems)} problems in {path}; the first: {report.problems[0]}"
        )
    return Artefact(path, str(report), _of_run(path, "classes.json"))


def _scores(path: Path) -> Artefact:
    folder = ScoreFolder(path)
    folder.verify()
    folder.tally()
    return Artefact(path, f"scores, {len(folder)} rows", _of_run(path))


def _of_run(path: Path, *others: str) -> list[Path]:
    """The documents of a folder that a run fills; the files of its parts are vouched for by their receipts."""
    named = [path / name for name in (RUN, MANIFEST, *others)]
    return [
        *(file for file in named if file.is_file()),
        *sorted((path / "receipts").glob("*.json")),
    ]

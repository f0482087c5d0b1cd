"""Photos for people to look at: which ones, in which order, and with which names to choose from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

import numpy as np

from vilu.artifacts.documents import read_document
from vilu.artifacts.tables import CsvRow, csv_rows
from vilu.calibration.shares import OUTSIDE_NAME
from vilu.errors import UNKNOWN, DataError
from vilu.outcomes.decisions import ACCEPT, REVIEW
from vilu.outcomes.outcomes import Outcomes
from vilu.triage.answers import failure_probabilities
from vilu.triage.state import DECISIONS_CSV, NEXT, STATE, TriageState

CHOSEN: Final = "fit"
"""Stream of a photo that no draw has asked for: no guarantee may rest on its label."""

DECISION_COLUMNS: Final = ("path", "decision", "answer", "failure_probability", "runner_up")
NEXT_COLUMNS: Final = ("path", "stream")
"""Columns of a triage's tables that are looked at."""

Which = Literal["asked", "review", "all"]


@dataclass(frozen=True)
class ReviewTask:
    """One photo to look at.

    Attributes:
        path: Of the photo, as tables have it.
        answer: The model's.
        failure_probability: How likely that is wrong.
        runner_up: The next answer.
        stream: Why it was asked for. A photo that people look at for any other reason was chosen,
            so its label may be used in a fit alone.
    """

    path: str
    answer: str | None
    failure_probability: float | None
    runner_up: str | None = None
    stream: str = CHOSEN


@dataclass(frozen=True)
class Review:
    """Photos to look at, the names to choose from, and where the photos are.

    Attributes:
        tasks: In the order in which to look at them.
        names: Classes, and after them what else a label may be.
        photos: Folder that the paths are relative to; None where it is not known.
        model: What gave the answers.
    """

    tasks: list[ReviewTask]
    names: tuple[str, ...]
    photos: Path | None
    model: str


def open_review(source: Path, which: Which = "asked", n: int | None = None) -> Review:
    """The photos of a triage that are asked for, or to be reviewed; or rows of scores.

    Rows of scores come with the most doubtful first.

    Raises:
        DataError: If the source is neither, or its scores do not say which images they are of.
    """
    if (source / STATE).is_file():
        review = _of_triage(source, which)
    else:
        review = _of_scores(source, which)
    return replace(review, tasks=review.tasks[:n])


def _of_triage(folder: Path, which: Which) -> Review:
    state = read_document(folder / STATE, TriageState)
    streams = {}
    for row in _read_written(folder / NEXT, NEXT_COLUMNS):
        streams[row["path"]] = row["stream"]
    tasks = []
    for row in _read_written(folder / DECISIONS_CSV, DECISION_COLUMNS):
        if _is_wanted(row, streams, which):
            tasks.append(_task(row, streams.get(row["path"], CHOSEN)))
    position = {path: index for index, path in enumerate(streams)}
    # those that are asked for in their order, then the most doubtful
    tasks.sort(
        key=lambda task: (
            position.get(task.path, len(position)),
            -(task.failure_probability or 0.0),
        )
    )
    return Review(tasks, _names(state.settings), Path(state.photos), "vilu triage")


def _names(settings: Mapping[str, object]) -> tuple[str, ...]:
    """The classes of a triage, and its labels for none of them."""
    outside = [name for name in _texts(settings, "outside") if name != OUTSIDE_NAME]
    return (*_texts(settings, "classes"), *outside, OUTSIDE_NAME)


def _texts(settings: Mapping[str, object], name: str) -> list[str]:
    values = settings.get(name)
    return [str(value) for value in values] if isinstance(values, list) else []


def _read_written(path: Path, wanted: Sequence[str]) -> list[CsvRow]:
    """The rows of a table that a triage has written; DataError where it is damaged."""
    columns, rows = csv_rows(path)
    again = "Run `vilu triage` again, which writes it."
    missing = [name for name in wanted if name not in columns]
    if missing:
        raise DataError(f"{path} has no column {missing[0]!r}. {again}")
    for number, row in enumerate(rows, start=2):
        if row.ends_early:
            raise DataError(f"{path}: row {number} is not complete. {again}")
        probability = row.get("failure_probability", "")
        if "failure_probability" in wanted and not _is_probability(probability):
            raise DataError(
                f"{path}: row {number} has no failure_probability, but {probability!r:.40}. {again}"
            )
    return rows


def _is_probability(cell: str) -> bool:
    """Whether a cell is empty, or a number from 0 to 1."""
    if not cell:
        return True
    try:
        return 0 <= float(cell) <= 1
    except ValueError:
        return False


def _is_wanted(row: Mapping[str, str], streams: Mapping[str, str], which: Which) -> bool:
    if which == "asked":
        return row["path"] in streams
    if which == "review":
        return row["decision"] == REVIEW
    return True


def _task(row: Mapping[str, str], stream: str) -> ReviewTask:
    cell = row["failure_probability"]
    return ReviewTask(
        path=row["path"],
        answer=row["answer"] or None,
        failure_probability=float(cell) if cell else None,
        runner_up=row["runner_up"] or None,
        stream=stream,
    )


def _of_scores(path: Path, which: Which) -> Review:
    outcomes = Outcomes.load(path)
    names = outcomes.class_names
    if names is None or outcomes.prediction is None or outcomes.ids is None:
        raise DataError(
            f"{path} does not say which images and classes it is of. Give scores that `vilu score` "
            "wrote."
        )
    known = np.where(np.isnan(outcomes.uncertainty), np.inf, outcomes.uncertainty)
    tasks = []
    for row in np.argsort(-known, kind="stable").tolist():
        is_accepted = outcomes.decision is not None and outcomes.decision[row] == ACCEPT
        if which == "all" or not is_accepted:
            index = int(outcomes.prediction[row])
            answer = None if index == UNKNOWN else str(names[index])
            tasks.append(ReviewTask(outcomes.ids[row], answer, _probability(outcomes, row)))
    all_names = (*(str(name) for name in names), OUTSIDE_NAME)
    return Review(tasks, all_names, None, outcomes.method or "vilu")


def _probability(outcomes: Outcomes, row: int) -> float | None:
    """How likely an answer is wrong, where the scores are probabilities or calibrated."""
    is_known = outcomes.is_probability or outcomes.failure_probability is not None
    probability = float(failure_probabilities(outcomes)[row])
    return probability if is_known and math.isfinite(probability) else None

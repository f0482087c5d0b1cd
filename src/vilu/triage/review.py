"""Photos for people to look at: the selection, the order, and the names to choose from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

import numpy as np

from vilu.artifacts.documents import read_document
from vilu.artifacts.tables import CsvRow, csv_rows
from vilu.datasets.files import portable_name
from vilu.errors import OUTSIDE_NAME, UNKNOWN, DataError
from vilu.outcomes.decisions import ACCEPT, REVIEW
from vilu.outcomes.outcomes import Outcomes
from vilu.triage.answers import failure_probability
from vilu.triage.carrying import all_labels
from vilu.triage.labels import sides_and_positions
from vilu.triage.photos import EMBEDDINGS_FOLDER, PhotoStores
from vilu.triage.state import (
    DECISIONS_CSV,
    NEXT_LABELS_CSV,
    SORTED_FOLDER,
    STATE_FILE,
    TriageState,
    moved_photos,
)

DEFAULT_STREAM: Final = "fit"
"""Stream for a photo whose label nobody asked for. Its label counts for no guarantee."""

DECISION_COLUMNS: Final = ("path", "decision", "answer", "failure_probability", "runner_up")
"""Columns that ``decisions.csv`` must have."""

NEXT_COLUMNS: Final = ("path", "stream")
"""Columns that ``next_labels.csv`` must have."""

PhotoSelection = Literal["asked", "review", "all"]
"""Which photos to look at (``open_review``)."""


@dataclass(frozen=True)
class ReviewTask:
    """One photo to look at.

    A label for a calibration-side photo may count for a guarantee later. People who see the model's
    answer tend to agree with it. So such a photo is blind: the task does not contain the model's
    answer.

    Attributes:
        path: The photo's path, as tables write it.
        answer: The model's answer, as tables write it, or None without an answer.
        failure_probability: Probability that the answer is wrong, or None if not known.
        quantile: Share of photos that are at most as doubtful as this photo. None if not known.
        runner_up: The second most likely answer, or None if not known.
        zero_shot: The zero-shot answer, or None if equal to ``answer``.
        stream: Why the label was asked for. If nobody asked for the label, the stream is "fit"
            (``DEFAULT_STREAM``). Then only fits may use the label.
        decision: "accept" or "review". If the photo has a label in the triage, "labelled".
        is_blind: Whether the model's answer is not shown.
    """

    path: str
    answer: str | None
    failure_probability: float | None
    quantile: float | None = None
    runner_up: str | None = None
    zero_shot: str | None = None
    stream: str = DEFAULT_STREAM
    decision: str = REVIEW
    is_blind: bool = False

    def without_answer(self) -> ReviewTask:
        """Return the task without the model's answer."""
        return ReviewTask(
            path=self.path,
            answer=None,
            failure_probability=None,
            stream=self.stream,
            is_blind=True,
        )


@dataclass(frozen=True)
class Review:
    """Photos to look at, the names to choose from, and where the photos are.

    Attributes:
        tasks: The photos, in review order.
        names: Class names as tables write them, then the labels for "none of the classes".
        photos: The photo folder. The task paths are relative to this folder. None if the folder is
            not known.
        model: Name of the model or method that gave the answers.
        answer: Kind of the answers, for example "zero_shot".
        follow_links: Whether links in the photo folder may lead anywhere.
        moved_photos: Maps the path of each photo moved by ``vilu triage --move`` to the present
            location.
        sorted_folder: The folder that contains the moved photos.
        labels: Maps photo paths to the labels so far, as tables write them.
        scores: Score file, for a review of rows. None for a triage.
    """

    tasks: list[ReviewTask]
    names: tuple[str, ...]
    photos: Path | None
    model: str
    answer: str = "zero_shot"
    follow_links: bool = False
    moved_photos: Mapping[str, Path] = field(default_factory=dict)
    sorted_folder: Path = Path(SORTED_FOLDER)
    labels: Mapping[str, str] = field(default_factory=dict)
    scores: Path | None = None


def open_review(source: Path, selection: PhotoSelection = "asked", n: int | None = None) -> Review:
    """Open the photos of a triage, or the rows in a score file, for people to look at.

    Photos with an open request come first, in request order. Then come the other selected photos,
    the most doubtful photo first. Score rows are ordered by falling uncertainty.

    Args:
        source: A triage folder, or a score file.
        selection: "asked": photos with an open request. "review": photos with the decision
            "review". "all": all photos. For scores, "asked" and "review" both mean all rows that
            are not accepted.
        n: Maximum number of photos, or None for all.

    Raises:
        DataError: If the source is no triage and no scores, or if the scores do not name images and
            classes.
    """
    if (source / STATE_FILE).is_file():
        review = _review_of_triage(source, selection)
    else:
        review = _review_of_scores(source, selection)
    return replace(review, tasks=review.tasks[:n])  # all tasks if ``n`` is None


def _review_of_triage(folder: Path, selection: PhotoSelection) -> Review:
    """Open a triage for review, from the tables in the folder."""
    state = read_document(folder / STATE_FILE, TriageState)
    calibration_paths = _calibration_side(folder, state)
    tasks = []
    for task in _tasks_in_order(folder, selection):
        is_blind = task.stream == "calibration" or task.path in calibration_paths
        tasks.append(task.without_answer() if is_blind else task)
    labels = {}
    label_of_path = all_labels(folder).labels
    for path, label in label_of_path.items():
        labels[portable_name(path)] = portable_name(label)
    return Review(
        tasks,
        names=_names_to_choose_from(state.settings),
        photos=Path(state.photos),
        follow_links=state.follow_links,
        moved_photos=moved_photos(folder),
        sorted_folder=folder / SORTED_FOLDER,
        model="vilu triage",
        answer=state.answer.answer,
        labels=labels,
    )


def _tasks_in_order(folder: Path, selection: PhotoSelection) -> list[ReviewTask]:
    """Put the tasks in order: first photos with an open request, then the other photos.

    The first group has request order. In the second group the most doubtful photo is first.
    """
    streams = {}  # maps the requested photos' paths to streams
    for row in _read_table_of_triage(folder / NEXT_LABELS_CSV, NEXT_COLUMNS):
        streams[row["path"]] = row["stream"]
    tasks = []
    for row in _read_table_of_triage(folder / DECISIONS_CSV, DECISION_COLUMNS):
        if _is_selected(row, streams, selection):
            stream = streams.get(row["path"], DEFAULT_STREAM)
            tasks.append(_task_of_row(row, stream))
    number_of_request = {path: number for number, path in enumerate(streams)}
    n_requests = len(number_of_request)

    def sort_key(task: ReviewTask) -> tuple[int, float]:
        # All photos without a request have the same number, after the last request.
        number = number_of_request.get(task.path, n_requests)
        doubt = task.failure_probability if task.quantile is None else task.quantile
        return number, -(doubt or 0.0)  # the minus sign puts the most doubtful photo first

    return sorted(tasks, key=sort_key)


def _calibration_side(folder: Path, state: TriageState) -> set[str]:
    """Return the paths of all calibration-side photos."""
    stores = PhotoStores(folder / EMBEDDINGS_FOLDER)
    # If an older store contains the same photo, the newer store replaces it.
    picture_of_path = dict(stores.seen_pictures())
    seed = int(str(state.settings.get("seed", 0)))  # the type of a setting's value is object
    is_calibration, _ = sides_and_positions(picture_of_path.values(), seed)
    paths_and_sides = zip(picture_of_path, is_calibration.tolist(), strict=True)
    return {path for path, is_on_side in paths_and_sides if is_on_side}


def _names_to_choose_from(settings: Mapping[str, object]) -> tuple[str, ...]:
    """Return the triage's classes, then the labels for "none of the classes"."""
    outside = [name for name in _list_setting(settings, "outside") if name != OUTSIDE_NAME]
    names = (*_list_setting(settings, "classes"), *outside, OUTSIDE_NAME)
    return tuple(portable_name(name) for name in names)


def _list_setting(settings: Mapping[str, object], name: str) -> list[str]:
    """Return the values in a list setting, or [] if the setting is missing or is no list."""
    values = settings.get(name)
    return [str(value) for value in values] if isinstance(values, list) else []


def _read_table_of_triage(path: Path, required_columns: Sequence[str]) -> list[CsvRow]:
    """Read the rows of a table written by a triage.

    Raises:
        DataError: If a required column is missing, or if the table is damaged.
    """
    columns, rows = csv_rows(path)
    remedy = "Run `vilu triage` again, which writes it."
    missing = [name for name in required_columns if name not in columns]
    if missing:
        raise DataError(f"{path} has no column {missing[0]!r}. {remedy}")
    for number, row in enumerate(rows, start=2):  # row 1 is the heading
        if row.ends_early:
            raise DataError(f"{path}: row {number} is not complete. {remedy}")
        for name in ("failure_probability", "quantile"):
            cell = row.get(name, "")
            if not _is_probability(cell):
                raise DataError(
                    f"{path}: row {number} has no number from 0 to 1 in the column {name}, but "
                    f"{cell!r:.40}. {remedy}"
                )
    return rows


def _is_probability(cell: str) -> bool:
    """Return whether a cell is empty or a number from 0 to 1."""
    if not cell:
        return True
    try:
        return 0 <= float(cell) <= 1
    except ValueError:
        return False


def _number(cell: str) -> float | None:
    """Return the number in a cell, or None if the cell is empty."""
    return float(cell) if cell else None


def _is_selected(
    row: Mapping[str, str], streams: Mapping[str, str], selection: PhotoSelection
) -> bool:
    """Return whether ``selection`` includes this row of ``decisions.csv``.

    The keys of ``streams`` are the photo paths with an open request.
    """
    if selection == "asked":
        return row["path"] in streams
    if selection == "review":
        return row["decision"] == REVIEW
    return True


def _task_of_row(row: Mapping[str, str], stream: str) -> ReviewTask:
    """Make the task for a row of ``decisions.csv``. Empty cells become None."""
    zero_shot = row.get("zero_shot")
    if zero_shot in {"", row["answer"]}:
        zero_shot = None
    quantile_cell = row.get("quantile", "")  # earlier versions did not write this column
    return ReviewTask(
        path=row["path"],
        answer=row["answer"] or None,
        failure_probability=_number(row["failure_probability"]),
        quantile=_number(quantile_cell),
        runner_up=row["runner_up"] or None,
        zero_shot=zero_shot,
        stream=stream,
        decision=row["decision"],
    )


def _review_of_scores(path: Path, selection: PhotoSelection) -> Review:
    """Open a score file for review."""
    outcomes = Outcomes.load(path)
    if outcomes.class_names is None or outcomes.prediction is None or outcomes.ids is None:
        raise DataError(
            f"{path} does not name its images and classes. Give scores that `vilu score` wrote."
        )
    names = [portable_name(str(name)) for name in outcomes.class_names]
    # People have to look at the rows without a score. So these rows count as most doubtful.
    doubt = np.where(np.isnan(outcomes.uncertainty), np.inf, outcomes.uncertainty)
    tasks = []
    for row in np.argsort(-doubt, kind="stable").tolist():
        is_accepted = outcomes.decision is not None and outcomes.decision[row] == ACCEPT
        if selection == "all" or not is_accepted:
            index = int(outcomes.prediction[row])
            answer = None if index == UNKNOWN else names[index]
            zero_shot = outcomes.zero_shot_beside(row)
            if zero_shot is not None:
                zero_shot = portable_name(zero_shot)
            task = ReviewTask(
                path=outcomes.ids[row],
                answer=answer,
                failure_probability=failure_probability(outcomes, row),
                zero_shot=zero_shot,
                decision=ACCEPT if is_accepted else REVIEW,
            )
            tasks.append(task)
    return Review(
        tasks,
        names=(*names, OUTSIDE_NAME),
        photos=None,
        model=outcomes.method or "vilu",
        answer=outcomes.answer,
        scores=path,
    )

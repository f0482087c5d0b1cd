"""The answers about all photos, and the tables for people to read and fill in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa

from vilu.artifacts.tables import write_table
from vilu.calibration.likely import LikelyFlags, LikelyRight
from vilu.datasets.files import portable_name
from vilu.embeddings.rows import SCORING_BATCH
from vilu.embeddings.source import EmbeddingSource
from vilu.guard.guard import Answer, RunnersUp, runners_up_of
from vilu.metrics.counts import Floats
from vilu.outcomes.decisions import ACCEPT, OUTSIDE_REASON, REVIEW
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.triage.labels import Entry, columns_of
from vilu.triage.photos import Photos
from vilu.triage.state import DECISIONS_CSV, DECISIONS_PARQUET

LABELLED: Final = "labelled"
"""Decision about a photo with a known label."""

NO_GUARANTEE: Final = "no_guarantee"
"""The reason for every decision if the predictor has no rule. Then no answer is accepted."""


def answers_of(
    photos: Photos,
    predictor: FailurePredictor,
    outcomes: Outcomes,
    labels: Mapping[str, str],
    likely_right: LikelyRight | None = None,
) -> list[Answer]:
    """Return the answers about all photos, also about unreadable photos, in path order.

    Args:
        photos: The embedded photos.
        predictor: Judges the answers.
        outcomes: The predictor's scores for the photos.
        labels: Maps paths to labels. For a labelled photo, the label is the answer.
        likely_right: Estimate of the likely right answers, or None without an estimate.
    """
    runners_up = all_runners_up(photos, predictor)
    flags: LikelyFlags = [None] * len(photos)
    if likely_right is not None:
        scores = unlabelled_scores(photos, outcomes, labels)
        flags = likely_right.flags_by_own_threshold(scores)
    quantiles = quantiles_of(outcomes.uncertainty)
    answers = []
    for row, path in enumerate(photos.ids):
        if path in labels:
            answer = _answer_by_label(path, labels[path])
        else:
            answer = answer_of(
                outcomes,
                row,
                runners_up=runners_up[row],
                likely=flags[row],
                quantiles=quantiles,
            )
        answers.append(answer)
    for path, fault in photos.fault_of_path.items():
        answers.append(_no_answer(path, reason=fault))
    return sorted(answers, key=lambda answer: answer.key)


def unlabelled_scores(photos: Photos, outcomes: Outcomes, labels: Mapping[str, str]) -> Floats:
    """Return every photo's uncertainty (N,), NaN for photos with a label."""
    has_label = np.array([path in labels for path in photos.ids], dtype=np.bool_)
    return np.where(has_label, np.nan, outcomes.uncertainty)


def quantiles_of(uncertainty: Floats) -> Floats:
    """Return for every photo the share (N,) of photos with at most the uncertainty of this photo.

    The share is NaN if the photo's uncertainty is NaN. Such photos do not count in any share.
    """
    is_scored = np.isfinite(uncertainty)
    ascending = np.sort(uncertainty[is_scored])
    n_up_to = np.searchsorted(ascending, uncertainty, side="right")
    n_scored = max(len(ascending), 1)  # not 0, because it is a divisor
    return np.where(is_scored, n_up_to / n_scored, np.nan)


def answer_of(
    outcomes: Outcomes,
    row: int,
    runners_up: RunnersUp = (),
    likely: bool | None = None,
    quantiles: Floats | None = None,
) -> Answer:
    """Make the model's answer about a row. ``quantiles`` (N,) are the quantiles of all rows."""
    path = "" if outcomes.ids is None else outcomes.ids[row]
    if np.isnan(outcomes.uncertainty[row]) or outcomes.prediction is None:
        fault = None if outcomes.reason is None else outcomes.reason[row]
        return _no_answer(path, reason=fault)
    is_accepted = outcomes.decision is not None and outcomes.decision[row] == ACCEPT
    reason: str | None = NO_GUARANTEE
    if outcomes.decision_reason is not None:
        reason = outcomes.decision_reason[row]
    names = outcomes.class_names or ()
    return Answer(
        key=path,
        label=names[int(outcomes.prediction[row])],
        failure_probability=failure_probability(outcomes, row),
        uncertainty=float(outcomes.uncertainty[row]),
        decision=ACCEPT if is_accepted else REVIEW,
        reason=reason,
        runners_up=runners_up,
        zero_shot=outcomes.zero_shot_beside(row),
        likely=likely,
        quantile=None if quantiles is None else float(quantiles[row]),
    )


def failure_probability(outcomes: Outcomes, row: int) -> float | None:
    """Return the probability that a row's answer is wrong, or None without probabilities."""
    probability = math.nan
    if outcomes.failure_probability is not None:
        probability = float(outcomes.failure_probability[row])
    elif outcomes.is_probability:
        probability = float(outcomes.uncertainty[row])
    return None if math.isnan(probability) else probability


def _answer_by_label(path: str, label: str) -> Answer:
    """Make the answer about a labelled photo: the label."""
    return Answer(
        key=path,
        label=label,
        failure_probability=None,
        uncertainty=None,
        decision=LABELLED,
        reason=None,
    )


def _no_answer(path: str, reason: str | None) -> Answer:
    """Make the answer about a photo without a score."""
    return Answer(
        key=path,
        label=None,
        failure_probability=None,
        uncertainty=None,
        decision=REVIEW,
        reason=reason,
    )


def all_runners_up(photos: EmbeddingSource, predictor: FailurePredictor) -> list[RunnersUp]:
    """Return every row's runners-up, empty for rows without a score."""
    runners_up: list[RunnersUp] = [()] * len(photos)  # in row order
    names = photos.class_names or ()
    columns = (*predictor.columns_to_score, *predictor.answer_columns)
    for batch in photos.batches(SCORING_BATCH, columns=columns):
        batch_runners_up = runners_up_of(predictor, batch.to(predictor.device_), names)
        for row, row_runners_up in zip(batch.index.tolist(), batch_runners_up, strict=True):
            runners_up[row] = row_runners_up
    return runners_up


def count_answers(answers: Sequence[Answer]) -> dict[str, int]:
    """Count the photos by label, decision and estimate.

    "photos" counts all photos, and "labelled" counts the photos that people have labelled. All
    further counts are about photos without a label. Such a photo counts as "accepted", "review" or
    "unreadable". In addition, such a photo may count as "outside" or as "likely".
    """
    n_labelled = sum(answer.decision == LABELLED for answer in answers)
    counts = {
        "photos": len(answers),
        "labelled": n_labelled,
        "unlabelled": len(answers) - n_labelled,
        **dict.fromkeys(("accepted", "review", "unreadable", "outside", "likely"), 0),
    }
    for answer in answers:
        counts["accepted"] += answer.decision == ACCEPT
        counts["review"] += answer.decision == REVIEW and answer.label is not None
        counts["unreadable"] += answer.label is None
        counts["outside"] += answer.reason == OUTSIDE_REASON
        counts["likely"] += answer.likely is True
    return counts


def write_decisions(root: Path, outcomes: Outcomes, answers: Sequence[Answer]) -> None:
    """Write ``decisions.csv`` for people, and ``decisions.parquet`` like ``vilu score``.

    The column "likely" is empty for photos with a label, and without an estimate. If adapted
    answers are judged, the CSV also has a column with zero-shot answers.
    """
    first_runners_up: list[str | None] = []
    for answer in answers:
        first_name = None
        if answer.runners_up:
            first_name, _ = answer.runners_up[0]
        first_runners_up.append(first_name)
    columns = {
        "path": pa.array([answer.key for answer in answers], pa.string()),
        **_answer_columns(answers),
        **columns_of(answers, ("decision", "reason")),
        "likely": pa.array([answer.likely for answer in answers], pa.bool_()),
        "runner_up": _class_texts(first_runners_up),
        **columns_of(answers, ("quantile",)),
        **_zero_shot_column(outcomes.answer, answers),
    }
    write_table(root / DECISIONS_CSV, columns, {})
    outcomes.save(root / DECISIONS_PARQUET)


def write_next(
    path: Path, entries: Sequence[Entry], answers: Mapping[str, Answer], kind: str
) -> None:
    """Write the table with the photos to label. People fill in the column "label".

    Args:
        path: The file.
        entries: Entries of the photos to label.
        answers: Maps photo paths to answers.
        kind: The answers' kind, such as "zero_shot".
    """
    answers_of_entries = []
    for entry in entries:
        no_answer = _no_answer(entry.path, reason=None)
        answer = answers.get(entry.path, no_answer)
        answers_of_entries.append(answer)
    columns = {
        **columns_of(entries, ("path", "label")),  # the cell is empty if there is no label yet
        **_answer_columns(answers_of_entries),
        **columns_of(entries, ("stream", "probability", "predictor", "asked")),
        **_zero_shot_column(kind, answers_of_entries),
    }
    write_table(path, columns, {})


def _answer_columns(answers: Sequence[Answer]) -> dict[str, pa.Array]:
    """Make the columns "answer" and "failure_probability"."""
    labels = _class_texts([answer.label for answer in answers])
    probabilities = columns_of(answers, ("failure_probability",))
    return {"answer": labels, **probabilities}


def _zero_shot_column(kind: str, answers: Sequence[Answer]) -> dict[str, pa.Array]:
    """Make the column with zero-shot answers, or no column if the judged answers are zero-shot.

    The cell is empty if a photo has a label, or has no answer.
    """
    if kind == "zero_shot":
        return {}
    names: list[str | None] = []
    for answer in answers:
        if answer.decision == LABELLED:
            names.append(None)
        else:
            names.append(answer.zero_shot or answer.label)
    return {"zero_shot": _class_texts(names)}


def _class_texts(names: Sequence[str | None]) -> pa.Array:
    """Make a column of class names as tables write them. ``meant_name`` restores the names."""
    texts = [None if name is None else portable_name(name) for name in names]
    return pa.array(texts, pa.string())

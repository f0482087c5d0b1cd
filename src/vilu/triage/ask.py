"""What is asked for next: the table that people fill in, and the choice for a store and a predictor alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa

from vilu.decision.score import ABSTAIN, ACCEPT, Decider, score_rows
from vilu.errors import UNKNOWN, DataError
from vilu.files.documents import digest
from vilu.files.tables import csv_rows, write_table
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.base import FailurePredictor
from vilu.store.reader import EmbeddingStore
from vilu.triage.choose import to_teach
from vilu.triage.guard import RunnersUp
from vilu.triage.labels import COLUMNS, Entry, LabelBook, Stream
from vilu.triage.photos import Photos
from vilu.triage.promise import ORDER, PLANNED, Sides, Trial

LABELLED, REVIEW = "labelled", "review"
"""Decisions beside "accept": the label is known; a person has to look."""

CONFIDENCE: Final = 0.95


@dataclass(frozen=True)
class Decision:
    """One photo, as the table and the page tell of it."""

    path: str
    answer: str | None  # the label, where it is known
    failure_probability: float | None
    decision: str  # "accept", "review" or "labelled"
    reason: str | None
    runner_up: str | None = None
    runner_up_probability: float | None = None


def decision_of(outcomes: Outcomes, row: int, label: str | None, near: RunnersUp) -> Decision:
    """What is said of a row, whose label is known or not."""
    path = "" if outcomes.ids is None else outcomes.ids[row]
    names, said = outcomes.class_names or (), UNKNOWN if outcomes.prediction is None else int(outcomes.prediction[row])
    probability = outcomes.uncertainty if outcomes.failure_probability is None else outcomes.failure_probability
    p = None if np.isnan(probability[row]) else float(probability[row])
    second = near[0] if near else (None, None)
    if label is not None:
        return Decision(path, label, p, LABELLED, None)  # whatever the model thinks of other classes
    if p is None:
        return Decision(path, None, None, REVIEW, None if outcomes.reason is None else outcomes.reason[row])
    decided = ABSTAIN if outcomes.decision is None else outcomes.decision[row]
    reason = "no_promise" if outcomes.decision_reason is None else outcomes.decision_reason[row]
    return Decision(path, names[said], p, ACCEPT if decided == ACCEPT else REVIEW, reason, *second)


def write_next(path: Path, asked: Sequence[Entry], rows: Sequence[Decision]) -> None:
    """Photos that are asked for, with an empty column to fill in."""
    said = {one.path: one for one in rows}
    columns = {
        "path": pa.array([one.path for one in asked], pa.string()),
        "label": pa.nulls(len(asked), pa.string()),
        "answer": pa.array([said[one.path].answer if one.path in said else None for one in asked], pa.string()),
        "failure_probability": pa.array(
            [said[one.path].failure_probability if one.path in said else None for one in asked], pa.float64()
        ),
        "stream": pa.array([one.stream for one in asked], pa.string()),
        **{
            name: pa.array([getattr(one, name) for one in asked], COLUMNS[name], from_pandas=True)
            for name in ("probability", "predictor", "asked")
        },
    }
    write_table(path, columns, {})


def asked_before(path: Path, keys: Sequence[str]) -> dict[str, Entry]:
    """What such a table asked for, of these photos, with the labels that it got.

    Raises:
        DataError: If it is another kind of table.
    """
    columns, rows = csv_rows(path)
    if not {"path", "label", "stream", "predictor"} <= set(columns):
        raise DataError(f"{path} is no table of `vilu next`: it has {', '.join(columns) or 'nothing'}.")
    known = set(keys)
    return {row["path"]: _entry(row) for row in rows if row["path"] in known}


def _entry(row: Mapping[str, str]) -> Entry:
    stream: Stream = "promise" if row["stream"] == "promise" else "fit"
    return Entry(row["path"], row["label"] or None, stream, predictor=row["predictor"])


def next_of_store(
    store: EmbeddingStore, predictor: FailurePredictor, files: Sequence[Path], n: int, max_risk: float, seed: int
) -> tuple[list[Entry], list[Decision]]:
    """What to label next of a store: photos that teach, then as many that vouch; and what is said of each.

    ``files`` are what was asked for before. Rows that the predictor was fitted on vouch for nothing.
    """
    photos, book = Photos([(store, np.arange(len(store)))], {}), LabelBook()
    names = store.class_names or tuple(map(str, range(store.n_candidates)))
    known = {path: names[place] for path, place in zip(photos.ids, store.target.tolist(), strict=True) if place >= 0}
    book.answer(known)
    for file in files:
        book.entries |= asked_before(file, photos.ids)
    photos.label(book.labels, ())
    name = digest({key: str(values.sum().item()) for key, values in predictor.state().items()})[:16]
    sides, u = Sides.of(photos, book, seed), predictor.predict_uncertainty(photos)
    asked = np.array([path in book.entries for path in photos.ids], dtype=np.bool_)
    voucher = sides.voucher & ~predictor.seen(photos).shared
    outcomes = score_rows(Decider(predictor), photos, {"is_probability": predictor.is_probability})
    vouchers: list[int] = []
    if voucher.any() and predictor.is_probability:
        trial = Trial.plan(0, u[voucher], PLANNED, (max_risk, 1 - CONFIDENCE))
        region = np.flatnonzero(voucher & (u <= trial.limit) & ~asked)
        vouchers = region[np.argsort(sides.place[region])][: n // 2].tolist()
        drawn = float((sides.place[vouchers].max() + 1) / ORDER) if vouchers else 0.0
        book.ask([photos.ids[row] for row in vouchers], "promise", predictor=name, probability=drawn)
    free = np.flatnonzero(sides.teacher & ~asked)
    teachers = to_teach(photos, free, u, n - len(vouchers), seed)
    book.ask([photos.ids[row] for row in teachers], "fit", predictor=name)
    rows = [decision_of(outcomes, row, None, ()) for row in (*teachers.tolist(), *vouchers)]
    return [book.entries[one.path] for one in rows], rows

"""What is asked for next: the table that people fill in, and the choice for a store and a predictor alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa

from vilu.decision import record
from vilu.decision.calibrate import ALL, Selector
from vilu.decision.record import Record
from vilu.decision.score import ABSTAIN, ACCEPT, Decider, score_rows
from vilu.decision.shares import OUTSIDE_NAME
from vilu.device import as_usual
from vilu.embeddings.source import EmbeddingSource
from vilu.errors import UNKNOWN, DataError, InfeasibleError, UsageError, checked
from vilu.files.disk import locked
from vilu.files.documents import digest
from vilu.files.tables import csv_rows, write_table
from vilu.metrics.counts import Floats
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.base import FailurePredictor
from vilu.predictors.storage import load
from vilu.predictors.vocabulary import Vocabulary
from vilu.store.reader import EmbeddingStore
from vilu.triage.choose import to_teach
from vilu.triage.guard import RunnersUp
from vilu.triage.labels import COLUMNS, SKIPPED, Entry, LabelBook, Stream, check_names, match_photos, read_labels
from vilu.triage.photos import Photos
from vilu.triage.promise import ORDER, PLANNED, Sides, Trial, keep_promise, stand

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
    """What such a table asked for, of these photos, with the labels that it got; of another kind of table nothing."""
    columns, rows = csv_rows(path)
    if not {"path", "label", "stream", "predictor"} <= set(columns):
        return {}
    known = set(keys)
    return {row["path"]: _entry(row) for row in rows if row["path"] in known}


def _entry(row: Mapping[str, str]) -> Entry:
    stream: Stream = "promise" if row["stream"] == "promise" else "fit"
    return Entry(row["path"], row["label"] or None, stream, predictor=row["predictor"])


def labelled(store: EmbeddingStore, files: Sequence[Path]) -> tuple[Photos, LabelBook]:
    """A store with the labels of tables: what `vilu next` asked for, filled in or not, and plain ones, path and label.

    Raises:
        DataError: If a table names no row, or a label is no class.
    """
    photos, book = Photos([(store, np.arange(len(store)))], {}), LabelBook()
    names = store.class_names or tuple(map(str, range(store.n_candidates)))
    known = {path: names[place] for path, place in zip(photos.ids, store.target.tolist(), strict=True) if place >= 0}
    book.answer(known)
    for file in files:
        if asked := asked_before(file, photos.ids):
            book.entries |= asked
            continue
        labels, streams = read_labels(file)
        place = match_photos(labels, photos.ids, store.path, file)
        book.answer(
            {path: labels[name] for name, path in place.items()},
            {path: streams[name] for name, path in place.items() if name in streams},
        )
    check_names(book.labels, tuple(photos.class_places()), (OUTSIDE_NAME,), files[0] if files else store.path)
    photos.label(book.labels, (OUTSIDE_NAME,))
    return photos, book


def picked(store: EmbeddingStore, files: Sequence[Path]) -> EmbeddingSource:
    """The rows of a store that labels of random picks are of; those that were chosen to teach are left out.

    Raises:
        UsageError: If labels were drawn to vouch, which are of what could be accepted alone.
        DataError: As ``labelled``, or if no row is left.
    """
    photos, book = labelled(store, files)
    if any(one.stream == "promise" for one in book):
        raise UsageError(
            "these labels hold some that `vilu next` drew from what could be accepted, of which `--method anytime` "
            "makes a promise. The other methods take rows that were picked at random from all."
        )
    chosen = {one.path for one in book if one.stream == "fit"}
    rows = [row for row, path in enumerate(photos.ids) if path in book.labels and path not in chosen]
    if not rows:
        raise DataError(f"no label is of a row that was picked at random: all {len(chosen)} were asked for to teach.")
    return photos.take(rows)


def name_of(predictor: FailurePredictor) -> str:
    """What a predictor is called in such tables."""
    return digest({key: str(values.sum().item()) for key, values in predictor.state().items()})[:16]


def next_of_store(
    store: EmbeddingStore, predictor: FailurePredictor, files: Sequence[Path], n: int, max_risk: float, seed: int
) -> tuple[list[Entry], list[Decision]]:
    """What to label next of a store: photos that teach, then as many that vouch; and what is said of each.

    ``files`` are what was asked for before. Rows that the predictor was fitted on vouch for nothing.
    """
    photos, book = labelled(store, files)
    name, sides, u = name_of(predictor), _sides(photos, book, predictor, seed), predictor.predict_uncertainty(photos)
    asked = np.array([path in book.entries for path in photos.ids], dtype=np.bool_)
    outcomes = score_rows(Decider(predictor), photos, {"is_probability": predictor.is_probability})
    vouchers: list[int] = []
    if sides.voucher.any() and predictor.is_probability:
        region = np.flatnonzero(sides.voucher & (u <= _trial(u, sides, max_risk).limit) & ~asked)
        vouchers = region[np.argsort(sides.place[region])][: n // 2].tolist()
        drawn = float((sides.place[vouchers].max() + 1) / ORDER) if vouchers else 0.0
        book.ask([photos.ids[row] for row in vouchers], "promise", predictor=name, probability=drawn)
    free = np.flatnonzero(sides.teacher & ~asked)
    teachers = to_teach(photos, free, u, n - len(vouchers), seed)
    book.ask([photos.ids[row] for row in teachers], "fit", predictor=name)
    rows = [decision_of(outcomes, row, None, ()) for row in (*teachers.tolist(), *vouchers)]
    return [book.entries[one.path] for one in rows], rows


def _sides(photos: Photos, book: LabelBook, predictor: FailurePredictor, seed: int) -> Sides:
    """Those of a store's rows; what the predictor was fitted on vouches for nothing."""
    sides = Sides.of(photos, book, seed)
    return dataclasses.replace(sides, vouches=sides.vouches & ~predictor.seen(photos).shared)


def _trial(u: Floats, sides: Sides, max_risk: float) -> Trial:
    """From scores alone, so that it is the same whenever it is made."""
    return Trial.plan(0, u[sides.voucher], PLANNED, (max_risk, 1 - CONFIDENCE))


@checked
@as_usual()
def calibrate_by_labels(
    folder: Path,
    store: EmbeddingStore,
    files: Sequence[Path],
    *,
    max_risk: float,
    confidence: float = CONFIDENCE,
    seed: int = 0,
    overwrite: bool = False,
) -> Record:
    """A promise from the labels that `vilu next` asked for, which may be looked at as often as one likes.

    Counted are labels of the draw up to the last place that was asked for with this predictor, all of them, and those
    of rows picked at random ("given"). Of predictors for which labels were asked before, each has its share of the
    level (``level_of``), so all such tables are to be given.

    Raises:
        UsageError: If the predictor gives no probability, or was calibrated for another goal.
        DataError: If labels that were asked for are missing.
        InfeasibleError: If nothing is certified yet; nothing is written then.
    """
    with locked(folder, "calibrating", who="calibration"):  # what is there is looked at by one at a time
        return _calibrate_by_labels(folder, store, files, (max_risk, confidence), seed, overwrite=overwrite)


def _calibrate_by_labels(
    folder: Path, store: EmbeddingStore, files: Sequence[Path], goal: tuple[float, float], seed: int, *, overwrite: bool
) -> Record:
    max_risk, confidence = goal
    predictor = load(folder)
    predictor.calibrator_ = None
    if not predictor.is_probability:
        raise UsageError(f"labels that vouch are asked for by a probability of failure, and {predictor.name} has none.")
    before = record.load(folder).rule if record.has_record(folder) and not overwrite else None
    asked = "anytime", max_risk, confidence
    if before is not None and (
        not isinstance(before, Selector) or (before.method, before.max_risk, before.confidence) != asked
    ):
        raise UsageError(f"{folder} is calibrated already ({before}). --overwrite replaces that calibration.")
    photos, book = labelled(store, files)
    sides = _sides(photos, book, predictor, seed)
    if not sides.voucher.any():
        raise DataError(f"the predictor in {folder} has seen all rows of {store.path} that could vouch for it.")
    outcomes = score_rows(Decider(predictor), photos, {"is_probability": True})
    place = dict(zip(photos.ids, sides.place.tolist(), strict=True))
    drawn = [one for one in book if one.stream == "promise"]
    up_to = max((place[one.path] + 1 for one in drawn if one.predictor == name_of(predictor)), default=0)
    others = {one.predictor for one in drawn} - {name_of(predictor)}
    risk = max_risk, 1 - confidence
    found = stand(_trial(outcomes.uncertainty, sides, max_risk), outcomes, sides, risk, up_to, len(others))
    if len(found.missing):
        raise DataError(
            f"{len(found.missing)} of the labels that were asked for are missing, the first that of "
            f"{photos.ids[found.missing[0]]}. The promise rests on all of them: fill them in, or write {SKIPPED} where "
            "nobody can say."
        )
    rule = found.rule(max_risk, confidence)
    if not rule.feasible:
        raise InfeasibleError(f"a risk of at most {max_risk:.2%} is not shown: {rule.certificates[ALL].why}.")
    if before is not None and (before.threshold or 0.0) >= (rule.threshold or 0.0):
        return record.load(folder)  # certified once is certified for ever
    made = keep_promise(folder, predictor, photos, found, rule, store.path.name)
    Vocabulary.of(photos, store.manifest.dtype).save(folder)
    return made

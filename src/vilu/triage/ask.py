"""What is asked for next: the table that people fill in, and the choice for a store and a predictor alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from vilu.artifacts.disk import locked
from vilu.artifacts.documents import digest
from vilu.artifacts.tables import csv_rows, write_table
from vilu.calibration.anytime import flawless_labels
from vilu.calibration.calibration import Calibration
from vilu.calibration.procedure import take_back
from vilu.calibration.rules import group_names, members_of
from vilu.calibration.shares import OUTSIDE_NAME
from vilu.device import as_usual
from vilu.embeddings.source import EmbeddingSource, say_once
from vilu.errors import UNKNOWN, DataError, InfeasibleError, UsageError
from vilu.guard.guard import RunnersUp
from vilu.metrics.counts import Ints
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.predictors.persistence.storage import load
from vilu.scoring.score import ABSTAIN, ACCEPT, score_rows
from vilu.store.reader import EmbeddingStore
from vilu.triage.choose import to_teach
from vilu.triage.labels import (
    SKIPPED,
    Entry,
    LabelBook,
    Stream,
    check_names,
    columns_of,
    match_photos,
    read_labels,
)
from vilu.triage.photos import Photos
from vilu.triage.promise import (
    ORDER,
    PLANNED,
    Mask,
    PromiseProgress,
    Sides,
    Trial,
    keep_promise,
    rule_of_draws,
    stand,
)
from vilu.validation import checked

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
    names, said = (
        outcomes.class_names or (),
        UNKNOWN if outcomes.prediction is None else int(outcomes.prediction[row]),
    )
    probability = (
        outcomes.uncertainty
        if outcomes.failure_probability is None
        else outcomes.failure_probability
    )
    p = None if np.isnan(probability[row]) else float(probability[row])
    second = near[0] if near else (None, None)
    if label is not None:
        return Decision(
            path, label, None, LABELLED, None
        )  # whatever the model answers, and how likely that is wrong
    if p is None:
        return Decision(
            path, None, None, REVIEW, None if outcomes.reason is None else outcomes.reason[row]
        )
    decided = ABSTAIN if outcomes.decision is None else outcomes.decision[row]
    reason = "no_promise" if outcomes.decision_reason is None else outcomes.decision_reason[row]
    return Decision(path, names[said], p, ACCEPT if decided == ACCEPT else REVIEW, reason, *second)


def write_next(path: Path, asked: Sequence[Entry], rows: Sequence[Decision]) -> None:
    """Photos that are asked for, with an empty column to fill in."""
    decided = {one.path: one for one in rows}
    said = [decided.get(one.path, Decision(one.path, None, None, REVIEW, None)) for one in asked]
    columns = {
        **columns_of(asked, ("path", "label")),  # none of which has a label
        **columns_of(said, ("answer", "failure_probability")),
        **columns_of(asked, ("stream", "probability", "predictor", "asked")),
    }
    write_table(path, columns, {})


def asked_before(path: Path, keys: Sequence[str]) -> dict[str, Entry]:
    """What such a table asked for, of these photos, with the labels that it got; of another kind of table nothing."""
    columns, rows = csv_rows(path)
    if not {"path", "label", "stream", "predictor"} <= set(columns):
        return {}
    known, asked = set(keys), dict[str, Entry]()
    for row in (row for row in rows if row["path"] in known):
        stream: Stream = "promise" if row["stream"] == "promise" else "fit"
        asked[row["path"]] = Entry(
            row["path"], row["label"] or None, stream, predictor=row["predictor"]
        )
    return asked


def labelled(store: EmbeddingStore, files: Sequence[Path]) -> tuple[Photos, LabelBook]:
    """A store with the labels of tables: what `vilu next` asked for, filled in or not, and plain ones, path and label.

    Raises:
        DataError: If a table names no row, or a label is no class.
    """
    photos, book = Photos([(store, np.arange(len(store)))], {}), LabelBook()
    names = store.class_names or tuple(map(str, range(store.n_candidates)))
    known = {
        path: names[place]
        for path, place in zip(photos.ids, store.target.tolist(), strict=True)
        if place >= 0
    }
    book.answer(known)
    for file in files:
        if asked := asked_before(file, photos.ids):
            before = {one.path: one.label for one in book}  # which no empty cell takes back
            book.entries |= {
                path: dataclasses.replace(one, label=one.label or before.get(path))
                for path, one in asked.items()
            }
            continue
        labels, streams = read_labels(file)
        place = match_photos(labels, photos.ids, store.path, file)
        book.answer(
            {path: labels[name] for name, path in place.items()},
            {path: streams[name] for name, path in place.items() if name in streams},
        )
    check_names(
        book.labels,
        tuple(photos.class_places()),
        (OUTSIDE_NAME,),
        files[0] if files else store.path,
    )
    photos.label(book.labels, (OUTSIDE_NAME,))
    return photos, book


def picked(store: EmbeddingStore, files: Sequence[Path]) -> EmbeddingSource:
    """The rows of a store that labels of random picks are of, without those that were chosen to teach or skipped.

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
    wanted = book.labels.keys() - chosen
    rows = [row for row, path in enumerate(photos.ids) if path in wanted]
    if not rows:
        raise DataError(
            f"no label is of a row that was picked at random: all {len(chosen)} were asked for to teach."
        )
    if skipped := sum(one.label == SKIPPED and one.stream == "given" for one in book):
        say_once(
            f"{skipped} of {skipped + len(rows)} picked rows have the label {SKIPPED} and are left out: what is "
            f"promised is of pictures that somebody can name. With {OUTSIDE_NAME} they count as answered wrong."
        )
    return photos.take(rows)


def name_of(predictor: FailurePredictor) -> str:
    """What a predictor is called in such tables."""
    return digest({key: str(values.sum().item()) for key, values in predictor.state().items()})[:16]


@dataclass(frozen=True)
class Standpoint:
    """What is known of a store's rows where a predictor of failure is to be promised something of.

    ``draws`` are rows that vouch, of all or by class of the answer (small ones together), from
    scores alone.
    """

    name: str  # of the predictor
    photos: Photos
    book: LabelBook
    outcomes: Outcomes
    sides: Sides
    draws: dict[str, tuple[Ints, Trial]]

    @classmethod
    def of(
        cls,
        store: EmbeddingStore,
        predictor: FailurePredictor,
        files: Sequence[Path],
        seed: int,
        max_risk: float,
        *,
        per_class: bool,
    ) -> Standpoint:
        """Of a store and tables that were asked for.

        What the fit has seen vouches for nothing, or is refused.
        """
        photos, book = labelled(store, files)
        outcomes = score_rows(predictor, photos, {"is_probability": predictor.is_probability})
        sides = Sides.of(photos, book, seed)
        fresh = (
            ~seen.shared
            if (seen := predictor.seen(photos)).whole
            else predictor.unseen(photos, "vouching")
        )
        sides = dataclasses.replace(sides, vouches=sides.vouches & fresh)
        rows, delta = (
            np.flatnonzero(sides.voucher if predictor.is_probability else []),
            1 - CONFIDENCE,
        )
        names = np.array(group_names(outcomes), dtype=object)[rows].tolist() if per_class else None
        groups, draws = members_of(names, len(rows), delta, partial(flawless_labels, max_risk)), {}
        for group, places in groups.items() if len(rows) else ():
            mine, risk = rows[places], (max_risk, delta / len(groups))
            draws[group] = mine, Trial.plan(0, outcomes.uncertainty[mine], PLANNED, risk)
        return cls(name_of(predictor), photos, book, outcomes, sides, draws)

    def lacking_first(self, n: int, asked: Mask, max_risk: float) -> list[Ints]:
        """``n`` rows, of each draw in its order: of those with the fewest first, the hopeless and the promised last."""
        queue, found = [], self.standings(max_risk, 1 - CONFIDENCE)
        for group, (rows, trial) in self.draws.items():
            region = rows[self.outcomes.uncertainty[rows] <= trial.limit]
            waiting = region[~asked[region]]
            ordered = waiting[np.argsort(self.sides.place[waiting])][:n].tolist()
            later, before = (
                (found[group].certified is not None, not trial.likely),
                len(region) - len(waiting),
            )
            queue += [(*later, before + more, group, row) for more, row in enumerate(ordered)]
        chosen = sorted(queue)[:n]
        return [
            np.array([row for *_, of, row in chosen if of == group], np.int64)
            for group in self.draws
        ]

    def standings(self, max_risk: float, delta: float) -> dict[str, PromiseProgress]:
        """How far the promise of each draw is; they share the level."""
        drawn = {one.path: one.predictor for one in self.book if one.stream == "promise"}
        mine, found = (
            np.array([drawn.get(path) == self.name for path in self.photos.ids], np.bool_),
            {},
        )
        for group, (rows, trial) in self.draws.items():
            sides = dataclasses.replace(
                self.sides, usable=np.bincount(rows, minlength=len(mine)) > 0
            )
            up_to = int(sides.place[rows[mine[rows]]].max(initial=-1)) + 1
            risk, others = (max_risk, delta / len(self.draws)), {*drawn.values()} - {self.name}
            found[group] = stand(trial, self.outcomes, sides, risk, up_to, len(others))
        return found


def next_of_store(
    store: EmbeddingStore,
    predictor: FailurePredictor,
    files: Sequence[Path],
    n: int,
    max_risk: float,
    seed: int,
    *,
    per_class: bool = False,
) -> tuple[list[Entry], list[Decision]]:
    """What to label next of a store: photos that teach, then as many that vouch; and what is said of each.

    ``files`` are what was asked for before. Rows that the predictor was fitted on vouch for
    nothing. ``per_class``: for a promise about every class of answers, first of those that lack
    labels.
    """
    at = Standpoint.of(store, predictor, files, seed, max_risk, per_class=per_class)
    keys, vouchers = at.photos.ids, list[int]()
    asked = np.array([path in at.book.entries for path in keys], dtype=np.bool_)
    free = np.flatnonzero(at.sides.teacher & ~asked)
    for drawn in at.lacking_first(n // 2, asked, max_risk):
        share = (at.sides.place[drawn].max(initial=-1) + 1) / ORDER
        at.book.ask(
            [keys[row] for row in drawn], "promise", predictor=at.name, probability=float(share)
        )
        vouchers += drawn.tolist()
    teachers = to_teach(at.photos, free, at.outcomes.uncertainty, n - len(vouchers), seed)
    at.book.ask([keys[row] for row in teachers], "fit", predictor=at.name)
    rows = [decision_of(at.outcomes, row, None, ()) for row in (*teachers.tolist(), *vouchers)]
    return [at.book.entries[one.path] for one in rows], rows


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
    per_class: bool = False,
    overwrite: bool = False,
) -> Calibration:
    """A promise from the labels that `vilu next` asked for, which may be looked at as often as one likes.

    Counted are labels of the draw up to the last place that was asked for with this predictor, all
    of them, and those of rows picked at random ("given"). Of predictors for which labels were asked
    before, each has its share of the level (``level_of``), so all such tables are to be given.

    Raises:
        UsageError: If the predictor gives no probability, or was calibrated for another goal.
        DataError: If labels that were asked for are missing, or a fit on these rows was too large
            to know them all.
        InfeasibleError: If nothing is certified yet; nothing is written then. But a promise that is
            there, and rests on labels which are others now, is gone.
    """
    with locked(
        folder, "calibrating", who="calibration"
    ):  # what is there is looked at by one at a time
        predictor = load(folder)
        predictor.calibrator_ = None
        if not predictor.is_probability:
            raise UsageError(
                f"labels that vouch are asked for by a probability of failure; {predictor.name} has none."
            )
        at = Standpoint.of(store, predictor, files, seed, max_risk, per_class=per_class)
        if not at.draws:
            raise DataError(
                f"the predictor in {folder} has seen all rows of {store.path} that could vouch for it."
            )
        kept = None if overwrite else Calibration.find(folder)
        before = None if kept is None else kept.rule
        goal = "anytime", max_risk, confidence, set(at.draws)
        if before is not None and not (
            (before.method, before.max_risk, before.confidence, set(before.thresholds)) == goal
        ):
            raise UsageError(
                f"{folder} is calibrated already ({before}). --overwrite replaces that calibration."
            )
        found = at.standings(max_risk, 1 - confidence)
        if missing := [
            at.photos.ids[row] for one in found.values() for row in one.missing.tolist()
        ]:
            raise DataError(
                f"{len(missing)} of the labels that were asked for are missing, the first that of {missing[0]}. The "
                f"promise rests on all of them: fill them in, or write {SKIPPED} where nobody can say."
            )
        rule, u, names = (
            rule_of_draws(found, max_risk, confidence),
            at.outcomes.uncertainty,
            group_names(at.outcomes),
        )
        for one in found.values():
            at.outcomes.failure[one.rows] = (
                one.outcomes.failure
            )  # of one that nobody could name, too
        holds = before is not None and not _outlived(folder, at.outcomes)
        if (
            before is not None
            and holds
            and before.accept(u, names).sum() >= rule.accept(u, names).sum()
        ):
            return Calibration.load(folder)  # certified once is certified for ever
        if not rule.feasible:
            _outlived(folder, at.outcomes)  # with overwrite; else it was asked before
            why = "; ".join(
                f"{group}: {one.why}".removeprefix(": ") for group, one in rule.thresholds.items()
            )
            raise InfeasibleError(f"a risk of at most {max_risk:.2%} is not shown: {why}.")
        rows = at.outcomes.take(np.sort(np.concatenate([one.rows for one in found.values()])))
        return keep_promise(folder, predictor, at.photos, found, rows, rule, store.path.name)


def _outlived(folder: Path, outcomes: Outcomes) -> bool:
    """Whether a promise from such labels rests on rows that are other failures now; it is gone then."""
    found = Calibration.find(folder)
    if found is None or found.target.method != "anytime":
        return False  # another one may be of the rows of another store
    was, now = (
        dict(zip(one.ids or (), one.failure.tolist(), strict=True))
        for one in (found.rows, outcomes)
    )
    return take_back(
        folder,
        {key for key, failure in was.items() if now.get(key, UNKNOWN) not in {UNKNOWN, failure}},
    )

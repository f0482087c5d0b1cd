"""Asks for labels of the rows of a store, and gives a guarantee by them, without a triage."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from vilu.artifacts.disk import locked
from vilu.artifacts.hashing import digest
from vilu.calibration.anytime import flawless_labels, level_of
from vilu.calibration.calibration import Calibration
from vilu.calibration.procedure import remove_outdated_calibration, require_probability
from vilu.calibration.rules import Rule, group_names, members_of
from vilu.device import torch_defaults
from vilu.errors import UNKNOWN, DataError, InfeasibleError, UsageError
from vilu.guard.guard import Answer
from vilu.metrics.counts import Ints
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.predictors.persistence.storage import load_predictor
from vilu.scoring.score import score_rows
from vilu.store.reader import EmbeddingStore
from vilu.triage.answers import answer_of
from vilu.triage.choose import choose_to_fit
from vilu.triage.guarantee import (
    POSITIONS,
    GuaranteeProgress,
    Mask,
    PhotoSplit,
    keep_guarantee,
    progress_of,
    rule_of,
)
from vilu.triage.labels import SKIPPED, Entry, LabelBook
from vilu.triage.photos import Photos
from vilu.triage.store_labels import label_store
from vilu.triage.trial import Trial, require_scores
from vilu.validation import checked

CONFIDENCE: Final = 0.95
"""Confidence of the guarantee for which draws are planned."""

Draws = dict[str, tuple[Ints, Trial]]
"""Calibration rows and trial, by group of answers. The trial of a group is tested on its rows."""


def fingerprint_of(predictor: FailurePredictor) -> str:
    """Name of a predictor in the tables of labels that were asked for to test this predictor.

    The name depends on the method, its parameters, the weights and the judged answers. So
    predictors that differ in one of them are two predictors, each with a share of the level.
    """
    sums = {name: str(values.sum().item()) for name, values in predictor.state().items()}
    sums["method"] = f"{predictor.name} {predictor.get_params()!r}"
    if predictor.answer != "zero_shot":
        sums["answer"] = predictor.answer
    return digest(sums)[:16]


@dataclass(frozen=True)
class StoreDraws:
    """A labelled store that a predictor has scored, with the calibration rows of every group.

    Attributes:
        predictor: Fingerprint of the predictor.
        photos: The rows of the store.
        book: The labels of the rows.
        outcomes: The scores of all rows.
        split: Which rows are for fits, and which for the guarantee.
        draws: One draw for all answers, or one for each large class of answers and one for all
            small classes together. Draws are planned from the scores alone, without labels.
    """

    predictor: str
    photos: Photos
    book: LabelBook
    outcomes: Outcomes
    split: PhotoSplit
    draws: Draws

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
    ) -> StoreDraws:
        """Label and score a store, and plan its draws.

        Rows that the predictor was fitted on are left out of the calibration rows (``unseen``).

        Args:
            store: The rows.
            predictor: Scores the rows.
            files: Tables of labels, such as ``vilu next`` wrote.
            seed: Seed of the split into rows for fits and calibration rows.
            max_risk: Error rate that the guarantee is to stay below.
            per_class: Whether every class of answers gets a draw.
        """
        photos, book = label_store(store, files)
        facts = {"is_probability": predictor.is_probability}
        outcomes = score_rows(predictor, photos, facts)
        split = PhotoSplit.of(photos, book, seed)
        is_calibration = split.is_calibration & unseen(predictor, photos)
        split = dataclasses.replace(split, is_calibration=is_calibration)
        draws: Draws = {}
        if predictor.is_probability:  # otherwise no limit can be chosen, and there is no draw
            rows = np.flatnonzero(split.for_calibration)
            require_scores(outcomes.uncertainty, rows, photos.ids)
            draws = plan_draws(outcomes, rows, max_risk, per_class=per_class)
        return cls(fingerprint_of(predictor), photos, book, outcomes, split, draws)

    def next_calibration_rows(self, n: int, was_asked: Mask, max_risk: float) -> list[Ints]:
        """At most ``n`` calibration rows to ask for: an array for every draw, in random order.

        Draws without a guarantee come first: those that are likely to get one, then the others.
        Draws that have a guarantee come last. Among equals, the draw with the fewest rows that were
        asked for comes first.

        Args:
            n: Number of rows, of all draws together.
            was_asked: (N,) which rows were asked for before.
            max_risk: Error rate that the guarantee is to stay below.
        """
        all_progress = self.progress(max_risk, 1 - CONFIDENCE)
        queue = []
        for group, (rows, trial) in self.draws.items():
            below_limit = rows[self.outcomes.uncertainty[rows] <= trial.limit]
            not_asked = below_limit[~was_asked[below_limit]]
            not_asked = self.split.in_order(not_asked)
            n_asked = len(below_limit) - len(not_asked)
            is_certified = all_progress[group].certified is not None
            is_unlikely = not trial.likely
            for n_earlier, row in enumerate(not_asked[:n].tolist()):
                n_asked_before = n_asked + n_earlier
                # The queue is sorted in ascending order, and False comes before True.
                priority = (is_certified, is_unlikely, n_asked_before)
                queue.append((priority, group, row))
        rows_of_draw: dict[str, list[int]] = {group: [] for group in self.draws}
        for _, group, row in sorted(queue)[:n]:
            rows_of_draw[group].append(row)
        return [np.array(rows, np.int64) for rows in rows_of_draw.values()]

    def progress(self, max_risk: float, delta: float) -> dict[str, GuaranteeProgress]:
        """How far the guarantee of each draw is; all draws have equal shares of ``delta``."""
        if not self.draws:
            return {}
        # Every calibration label was asked for in order to test one predictor.
        predictor_of = {entry.path: entry.predictor for entry in self.book if _is_of_draw(entry)}
        is_for_this_predictor = np.array(
            [predictor_of.get(path) == self.predictor for path in self.photos.ids], np.bool_
        )
        other_predictors = set(predictor_of.values()) - {self.predictor}
        level = level_of(len(other_predictors) + 1, delta / len(self.draws))
        awaited = self.split.awaited & is_for_this_predictor
        all_progress = {}
        for group, (rows, trial) in self.draws.items():
            in_group = np.zeros(len(self.photos.ids), np.bool_)
            in_group[rows] = True
            all_progress[group] = progress_of(
                trial,
                self.outcomes,
                dataclasses.replace(self.split, usable=in_group, awaited=awaited),
                max_risk=max_risk,
                level=level,
            )
        return all_progress

    def require_labels(self, all_progress: Mapping[str, GuaranteeProgress]) -> None:
        """Raise DataError if labels that were asked for are missing."""
        missing = []
        for progress in all_progress.values():
            missing += [self.photos.ids[row] for row in progress.missing.tolist()]
        if missing:
            raise DataError(
                f"{len(missing)} of the labels that were asked for are missing, first the label of "
                f"{missing[0]}. Labels count up to the first picture without a label. Fill them "
                f"in, or write {SKIPPED} where nobody can name the picture."
            )


def unseen(predictor: FailurePredictor, photos: Photos) -> Mask:
    """(N,) bool, which rows the predictor was not fitted on.

    A predictor records only a sample of the rows of a large fit.

    Raises:
        DataError: If only a sample was recorded and more than 1 % of the rows are in it.
    """
    overlap = predictor.seen(photos)
    has_recorded_all_rows = overlap.is_complete
    if has_recorded_all_rows:
        is_unseen: Mask = ~overlap.shared
        return is_unseen
    return predictor.unseen(photos, "calibration")


def _is_of_draw(entry: Entry) -> bool:
    """Whether a label was asked for by a draw, for a guarantee."""
    return entry.stream == "calibration"


def plan_draws(outcomes: Outcomes, rows: Ints, max_risk: float, *, per_class: bool) -> Draws:
    """Plan the draws among the calibration rows (M,); all draws have equal shares of the level."""
    if not len(rows):
        return {}
    delta = 1 - CONFIDENCE
    names = None
    if per_class:
        all_names = group_names(outcomes)
        names = [all_names[row] for row in rows.tolist()]
    groups = members_of(names, len(rows), delta, partial(flawless_labels, max_risk))
    draws = {}
    for group, members in groups.items():
        rows_of_group = rows[members]
        scores = outcomes.uncertainty[rows_of_group]
        trial = Trial.plan(
            n_fit=0,
            scores=scores,
            n_answered=0,
            max_risk=max_risk,
            delta=delta / len(groups),
        )
        draws[group] = (rows_of_group, trial)
    return draws


def next_of_store(
    store: EmbeddingStore,
    predictor: FailurePredictor,
    files: Sequence[Path],
    n: int,
    max_risk: float,
    seed: int,
    *,
    per_class: bool = False,
) -> tuple[list[Entry], dict[str, Answer]]:
    """Choose ``n`` rows of a store to label next: half to fit on, half for the guarantee.

    If there are fewer rows for the guarantee, more rows to fit on are chosen. Rows that the
    predictor was fitted on are not chosen for the guarantee.

    Args:
        store: The rows.
        predictor: Scores the rows.
        files: Tables of labels that were asked for before.
        n: Number of rows.
        max_risk: Error rate that the guarantee is to stay below.
        seed: Seed of the split, and of the choice of rows to fit on.
        per_class: Whether each class of answers gets a guarantee of its own. Then classes that
            lack labels come first.

    Returns:
        Entries of the chosen rows, first those to fit on, and the answers by path.
    """
    store_draws = StoreDraws.of(store, predictor, files, seed, max_risk, per_class=per_class)
    paths = store_draws.photos.ids
    book = store_draws.book
    split = store_draws.split
    fingerprint = store_draws.predictor
    was_asked = np.array([path in book.entries for path in paths], dtype=np.bool_)
    free_fit_rows = np.flatnonzero(split.for_fit & ~was_asked)
    calibration_rows: list[int] = []
    for drawn in store_draws.next_calibration_rows(n // 2, was_asked, max_risk):
        last_position = int(split.position[drawn].max(initial=-1))  # -1 if no row is drawn
        probability = (last_position + 1) / POSITIONS
        drawn_paths = [paths[row] for row in drawn]
        book.ask(drawn_paths, "calibration", predictor=fingerprint, probability=probability)
        calibration_rows += drawn.tolist()
    n_to_fit = n - len(calibration_rows)
    uncertainty = store_draws.outcomes.uncertainty
    fit_rows = choose_to_fit(store_draws.photos, free_fit_rows, uncertainty, n_to_fit, seed)
    book.ask([paths[row] for row in fit_rows], "fit", predictor=fingerprint)
    rows = [*fit_rows.tolist(), *calibration_rows]
    answers = {paths[row]: answer_of(store_draws.outcomes, row) for row in rows}
    return [book.entries[paths[row]] for row in rows], answers


@checked
@torch_defaults()
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
    """Calibrate a predictor by the labels that `vilu next` asked for.

    The guarantee is valid even if the calibration is repeated after every label.

    Two kinds of labels count: labels of rows that were picked at random ("given"), and all labels
    of a draw up to the last position that was asked for with this predictor.

    Every predictor for which labels were asked has a share of the level (``level_of``). So
    ``files`` must hold the tables of all these predictors.

    Raises:
        UsageError: If the predictor gives no probability, or was calibrated for another target.
        DataError: If labels that were asked for are missing, if the predictor was fitted on all
            calibration rows, or if it has recorded only a sample of its fit and more than 1 % of
            the rows are in the sample.
        InfeasibleError: If nothing is certified yet. Then no calibration is written. An earlier
            calibration is removed if its labels have changed.
    """
    # The lock lets only one process at a time compare the folder's calibration with a new one.
    with locked(folder, activity="calibrating", holder_kind="calibration"):
        predictor = load_predictor(folder)
        predictor.calibrator_ = None
        require_probability(predictor)
        store_draws = StoreDraws.of(store, predictor, files, seed, max_risk, per_class=per_class)
        if not store_draws.draws:
            raise DataError(
                f"the predictor in {folder} has seen all rows of {store.path} that could count for "
                "its guarantee."
            )
        groups = set(store_draws.draws)
        earlier_rule = None
        calibration = Calibration.find(folder)
        if calibration is not None and not overwrite:
            earlier_rule = _earlier_rule(folder, calibration, max_risk, confidence, groups)
        all_progress = store_draws.progress(max_risk, 1 - confidence)
        store_draws.require_labels(all_progress)
        rule = rule_of(all_progress, max_risk, confidence)
        return _keep_better(
            folder, predictor, store_draws, all_progress, rule, earlier_rule, max_risk=max_risk
        )


def _earlier_rule(
    folder: Path, calibration: Calibration, max_risk: float, confidence: float, groups: set[str]
) -> Rule | None:
    """The rule of a calibration; UsageError if it is for another target or other groups."""
    rule = calibration.rule
    if rule is None:
        return None
    if rule.method == "anytime":
        is_same_target = (rule.max_risk, rule.confidence) == (max_risk, confidence)
        if is_same_target and rule.thresholds.keys() == groups:
            return rule
    raise UsageError(
        f"{folder} is calibrated already ({rule}). --overwrite replaces that calibration."
    )


def _keep_better(
    folder: Path,
    predictor: FailurePredictor,
    store_draws: StoreDraws,
    all_progress: Mapping[str, GuaranteeProgress],
    rule: Rule,
    earlier_rule: Rule | None,
    *,
    max_risk: float,
) -> Calibration:
    """Keep the earlier rule if it accepts at least as many rows, or write the new rule.

    The earlier rule may be kept, because a rule that was certified once stays certified.
    """
    outcomes = store_draws.outcomes
    for progress in all_progress.values():
        # In the outcomes of the progress, a picture that nobody could name is a failure.
        outcomes.failure[progress.rows] = progress.outcomes.failure
    if earlier_rule is not None and not _remove_if_changed(folder, outcomes):
        names = group_names(outcomes)
        n_earlier = earlier_rule.accept(outcomes.uncertainty, names).sum()
        if n_earlier >= rule.accept(outcomes.uncertainty, names).sum():
            return Calibration.load(folder)
    if not rule.feasible:
        _remove_if_changed(folder, outcomes)  # the first call if there is no earlier rule
        reasons = []
        for group, threshold in rule.thresholds.items():
            # The group of all answers has the name "", which needs no colon.
            reasons.append(f"{group}: {threshold.why}".removeprefix(": "))
        raise InfeasibleError(
            f"a risk of at most {max_risk:.2%} is not shown: {'; '.join(reasons)}."
        )
    rows = np.sort(np.concatenate([progress.rows for progress in all_progress.values()]))
    dataset = store_draws.photos.first.path.name
    photos = store_draws.photos
    counted_rows = outcomes.take(rows)
    return keep_guarantee(folder, predictor, photos, all_progress, counted_rows, rule, dataset)


def _remove_if_changed(folder: Path, outcomes: Outcomes) -> bool:
    """Remove a calibration by labels if an answer among its rows is judged differently now.

    Returns whether the calibration was removed.
    """
    calibration = Calibration.find(folder)
    if calibration is None or calibration.target.method != "anytime":
        return False  # another method may have calibrated on rows of another store
    rows = calibration.rows
    failure_of = dict(zip(outcomes.ids or (), outcomes.failure.tolist(), strict=True))
    changed_keys = set()
    for key, failure in zip(rows.ids or (), rows.failure.tolist(), strict=True):
        # An answer that has no label now (UNKNOWN) is not judged differently.
        if failure_of.get(key, UNKNOWN) not in {UNKNOWN, failure}:
            changed_keys.add(key)
    return remove_outdated_calibration(folder, changed_keys)

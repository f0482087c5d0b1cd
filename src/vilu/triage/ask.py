"""Asks for labels of store rows, and makes a guarantee from these labels, without a triage."""

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
from vilu.calibration.anytime import level_of, n_right_labels_needed
from vilu.calibration.calibration import Calibration
from vilu.calibration.procedure import remove_outdated_calibration, require_probability
from vilu.calibration.rules import Rule, group_names, rows_of_groups
from vilu.device import torch_defaults
from vilu.errors import UNKNOWN, DataError, InfeasibleError, UsageError
from vilu.guard.guard import Answer
from vilu.metrics.counts import Ints
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.predictors.persistence.storage import load_uncalibrated
from vilu.scoring.score import score_rows
from vilu.store.reader import EmbeddingStore
from vilu.triage.answers import answer_of
from vilu.triage.choose import choose_rows_to_fit
from vilu.triage.guarantee import (
    GuaranteeProgress,
    Mask,
    PhotoSplit,
    draw_probability,
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
"""Confidence of the guarantee. Draws are planned for this confidence."""

DrawOfGroup = dict[str, tuple[Ints, Trial]]
"""Maps an answer group to the group's calibration rows (M,) and trial."""


def fingerprint_of(predictor: FailurePredictor) -> str:
    """Compute a predictor's fingerprint. A label table contains it with each request.

    The fingerprint depends on the method, the method's parameters, the weights and the judged
    answers. So predictors that differ in any of these facts count as two predictors, and each has a
    share of the level.
    """
    facts = {name: str(values.sum().item()) for name, values in predictor.state().items()}
    facts["method"] = f"{predictor.name} {predictor.get_params()!r}"
    if predictor.answer != "zero_shot":
        facts["answer"] = predictor.answer
    return digest(facts)[:16]


@dataclass(frozen=True)
class StoreDraws:
    """A labelled store with a predictor's scores, and the calibration rows of every group.

    Attributes:
        predictor_fingerprint: The predictor's fingerprint (``fingerprint_of``).
        photos: The store rows.
        book: The labels of the rows.
        outcomes: The scores of all rows.
        split: The rows for fits, and the rows for the guarantee.
        draws: Either one draw for all answers, or a draw for each large answer class and one for
            all small classes together. Draws are planned from the scores alone, without labels.
            Empty if the predictor gives no probability, or if there is no calibration row.
    """

    predictor_fingerprint: str
    photos: Photos
    book: LabelBook
    outcomes: Outcomes
    split: PhotoSplit
    draws: DrawOfGroup

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
        """Label and score a store, and plan the draws.

        Rows that the predictor was fitted on are not calibration rows (``unseen_rows``).

        Args:
            store: The rows.
            predictor: Scores the rows.
            files: Label tables, for example from ``vilu next``.
            seed: Seed for the split into fit rows and calibration rows.
            max_risk: Largest error rate allowed by the guarantee.
            per_class: Whether every large answer class gets a separate draw.
        """
        photos, book = label_store(store, files)
        facts = {"is_probability": predictor.is_probability}
        outcomes = score_rows(predictor, photos, facts)
        split = PhotoSplit.of(photos, book, seed)
        is_calibration = split.is_calibration & unseen_rows(predictor, photos)
        split = dataclasses.replace(split, is_calibration=is_calibration)
        draws: DrawOfGroup = {}
        if predictor.is_probability:  # without probabilities, no limit can be chosen
            rows = np.flatnonzero(split.usable_calibration_mask)
            require_scores(outcomes.uncertainty, rows, photos.ids)
            draws = plan_draws(outcomes, rows, max_risk, per_class=per_class)
        return cls(
            predictor_fingerprint=fingerprint_of(predictor),
            photos=photos,
            book=book,
            outcomes=outcomes,
            split=split,
            draws=draws,
        )

    def next_calibration_rows(self, n: int, was_asked: Mask, max_risk: float) -> list[Ints]:
        """Choose at most ``n`` calibration rows to ask for: an array per draw, in random order.

        The draws are served in this order:

        1. Draws without a guarantee, if a guarantee is likely.
        2. Draws without a guarantee, if a guarantee is not likely.
        3. Draws with a guarantee.

        Among draws with equal places in this order, the draw with fewer requested rows comes first.

        Args:
            n: Number of rows, for all draws together.
            was_asked: (N,) bool, True for rows with an earlier request.
            max_risk: Largest error rate allowed by the guarantee.
        """
        all_progress = self.progress(max_risk, 1 - CONFIDENCE)
        queue = []
        for group, (rows, trial) in self.draws.items():
            unrequested_rows, n_asked = self._unrequested_rows(rows, trial.limit, was_asked)
            is_certified = all_progress[group].certified_index is not None
            for n_earlier, row in enumerate(unrequested_rows[:n].tolist()):
                # The queue is sorted in ascending order, and False comes before True. The last
                # number counts the rows of this draw that are requested before this row.
                priority = (is_certified, not trial.likely, n_asked + n_earlier)
                queue.append((priority, group, row))
        rows_of_draw: dict[str, list[int]] = {group: [] for group in self.draws}
        for _, group, row in sorted(queue)[:n]:
            rows_of_draw[group].append(row)
        return [np.array(rows, np.int64) for rows in rows_of_draw.values()]

    def _unrequested_rows(self, rows: Ints, limit: float, was_asked: Mask) -> tuple[Ints, int]:
        """Split the ``rows`` up to an uncertainty limit by whether their labels were requested.

        Returns the rows without a request, in random order, and the number of rows with a request.
        """
        rows_up_to_limit = rows[self.outcomes.uncertainty[rows] <= limit]
        unrequested_rows = rows_up_to_limit[~was_asked[rows_up_to_limit]]
        n_asked = len(rows_up_to_limit) - len(unrequested_rows)
        return self.split.in_random_order(unrequested_rows), n_asked

    def progress(self, max_risk: float, delta: float) -> dict[str, GuaranteeProgress]:
        """Map every draw's group to the progress of the guarantee.

        All draws have equal shares of the level ``delta``.
        """
        if not self.draws:
            return {}
        fingerprint = self.predictor_fingerprint
        # Each calibration label was requested for one predictor's test, named by the entry.
        fingerprint_of_path = {
            entry.path: entry.predictor for entry in self.book if _was_drawn(entry)
        }
        is_for_this_predictor = np.array(
            [fingerprint_of_path.get(path) == fingerprint for path in self.photos.ids], np.bool_
        )
        other_fingerprints = set(fingerprint_of_path.values()) - {fingerprint}
        attempt = len(other_fingerprints) + 1  # this predictor counts as the last one
        level = level_of(attempt, delta / len(self.draws))
        has_open_request = self.split.has_open_request & is_for_this_predictor
        all_progress = {}
        for group, (rows, trial) in self.draws.items():
            is_in_group = np.zeros(len(self.photos.ids), np.bool_)
            is_in_group[rows] = True
            split_of_group = dataclasses.replace(
                self.split, is_usable=is_in_group, has_open_request=has_open_request
            )
            all_progress[group] = progress_of(
                trial, self.outcomes, split_of_group, max_risk=max_risk, level=level
            )
        return all_progress

    def require_labels(self, all_progress: Mapping[str, GuaranteeProgress]) -> None:
        """Raise DataError if requested labels are missing."""
        missing_paths = []
        for progress in all_progress.values():
            missing_paths += [self.photos.ids[row] for row in progress.missing_rows.tolist()]
        if missing_paths:
            raise DataError(
                f"{len(missing_paths)} of the labels that were asked for are missing, first the "
                f"label of {missing_paths[0]}. Labels count up to the first picture without a "
                f"label. Fill them in, or write {SKIPPED} where nobody can name the picture."
            )


def unseen_rows(predictor: FailurePredictor, photos: Photos) -> Mask:
    """Return a mask (N,) of rows that the predictor was not fitted on, as far as this is known.

    After a fit on many rows, the predictor has recorded only a sample of the rows.

    Raises:
        DataError: If only a sample was recorded and more than 1 % of the rows are in the sample.
    """
    overlap = predictor.seen(photos)
    has_recorded_all_rows = overlap.is_complete
    if has_recorded_all_rows:
        is_unseen: Mask = ~overlap.shared
        return is_unseen
    return predictor.unseen(photos, "calibration")


def _was_drawn(entry: Entry) -> bool:
    """Return whether a draw has asked for this label, for a guarantee."""
    return entry.stream == "calibration"


def plan_draws(outcomes: Outcomes, rows: Ints, max_risk: float, *, per_class: bool) -> DrawOfGroup:
    """Plan the draws among the calibration ``rows`` (M,).

    All draws have equal shares of the level.
    """
    if not len(rows):
        return {}
    delta = 1 - CONFIDENCE
    group_of_row = None
    if per_class:
        all_names = group_names(outcomes)
        group_of_row = [all_names[row] for row in rows.tolist()]
    # maps a group's level to the smallest sufficient number of rows
    rows_needed = partial(n_right_labels_needed, max_risk)
    groups = rows_of_groups(group_of_row, len(rows), delta, rows_needed)
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


def choose_rows_to_label(
    store: EmbeddingStore,
    predictor: FailurePredictor,
    files: Sequence[Path],
    n: int,
    max_risk: float,
    seed: int,
    *,
    per_class: bool = False,
) -> tuple[list[Entry], dict[str, Answer]]:
    """Choose ``n`` store rows to label next: half to fit on, half for the guarantee.

    If there are fewer rows for the guarantee, more rows to fit on are chosen. Rows that the
    predictor was fitted on are not chosen for the guarantee.

    Args:
        store: The rows.
        predictor: Scores the rows.
        files: Label tables with earlier requests.
        n: Number of rows.
        max_risk: Largest error rate allowed by the guarantee.
        seed: Seed for the split, and for the choice of rows to fit on.
        per_class: Whether each answer class gets a separate guarantee. Then classes with too
            few labels come first.

    Returns:
        The entries for the chosen rows, rows to fit on first, and the answers by path.

    Raises:
        UsageError: If the rows have no embedding, because varied rows cannot be chosen then.
    """
    _require_embeddings(store)
    store_draws = StoreDraws.of(store, predictor, files, seed, max_risk, per_class=per_class)
    paths = store_draws.photos.ids
    book = store_draws.book
    split = store_draws.split
    fingerprint = store_draws.predictor_fingerprint
    was_asked = np.array([path in book.entries for path in paths], dtype=np.bool_)
    free_fit_rows = np.flatnonzero(split.usable_fit_mask & ~was_asked)
    calibration_rows: list[int] = []
    # one row array for each draw: for the store, or for every class
    for drawn_rows in store_draws.next_calibration_rows(n // 2, was_asked, max_risk):
        # -1 if no row is drawn
        last_position = int(split.random_position[drawn_rows].max(initial=-1))
        probability = draw_probability(last_position)
        drawn_paths = [paths[row] for row in drawn_rows]
        book.request_labels(
            drawn_paths, "calibration", predictor=fingerprint, probability=probability
        )
        calibration_rows += drawn_rows.tolist()
    n_to_fit = n - len(calibration_rows)
    uncertainty = store_draws.outcomes.uncertainty
    fit_rows = choose_rows_to_fit(store_draws.photos, free_fit_rows, uncertainty, n_to_fit, seed)
    book.request_labels([paths[row] for row in fit_rows], "fit", predictor=fingerprint)
    rows = [*fit_rows.tolist(), *calibration_rows]
    answers = {paths[row]: answer_of(store_draws.outcomes, row) for row in rows}
    return [book.entries[paths[row]] for row in rows], answers


def _require_embeddings(store: EmbeddingStore) -> None:
    """Raise UsageError if the store has logits alone."""
    if not store.has_vectors:
        raise UsageError(
            f"{store.path} has logits alone. Rows to fit on are chosen by their embeddings. To "
            "draw rows for a guarantee, which needs no embedding, give --for-guarantee."
        )


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
    """Calibrate a predictor by the labels requested by `vilu next`.

    The guarantee is valid even if the calibration is repeated after every label.

    Two kinds of labels count:

    - labels on rows that were picked at random ("given")
    - labels of the calibration rows up to the uncertainty limit: in the random order, all labels
      before the first row without a label

    If labels were requested for several predictors' tests, each predictor has a share of the
    level (``level_of``). So ``files`` must contain the tables of all these predictors.

    Raises:
        UsageError: If the predictor gives no probability, or was calibrated for another target.
        DataError: If requested labels are missing, if the predictor was fitted on all calibration
            rows, or if the predictor has recorded only a sample of its fit and more than 1 % of the
            rows are in the sample.
        InfeasibleError: If nothing is certified yet. Then no calibration is written. An earlier
            calibration is removed if its labels have changed.
    """
    # The earlier calibration is compared with the new calibration. The lock keeps other processes
    # from changing the earlier calibration meanwhile.
    with locked(folder, activity="calibrating", holder_kind="calibration"):
        predictor = load_uncalibrated(folder)
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
        return _keep_better_rule(
            folder, predictor, store_draws, all_progress, rule, earlier_rule, max_risk=max_risk
        )


def _earlier_rule(
    folder: Path, calibration: Calibration, max_risk: float, confidence: float, groups: set[str]
) -> Rule | None:
    """Return a calibration's rule. Raises UsageError if the rule's target or groups differ."""
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


def _keep_better_rule(
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

    The earlier rule may be kept, because a certified rule stays certified.
    """
    outcomes = store_draws.outcomes
    for progress in all_progress.values():
        # In ``progress.counted_outcomes``, a picture without a name (skipped) counts as a failure.
        outcomes.failure[progress.counted_rows] = progress.counted_outcomes.failure
    if earlier_rule is not None and not _remove_if_changed(folder, outcomes):
        names = group_names(outcomes)
        n_accepted_earlier = earlier_rule.accept(outcomes.uncertainty, names).sum()
        n_accepted_now = rule.accept(outcomes.uncertainty, names).sum()
        if n_accepted_earlier >= n_accepted_now:
            return Calibration.load(folder)
    if not rule.feasible:
        _remove_if_changed(folder, outcomes)  # also if ``overwrite`` has ignored the earlier rule
        reasons = _reasons_in_words(rule)
        raise InfeasibleError(f"a risk of at most {max_risk:.2%} is not shown: {reasons}.")
    counted_rows = [progress.counted_rows for progress in all_progress.values()]
    rows = np.sort(np.concatenate(counted_rows))
    photos = store_draws.photos
    counted_outcomes = outcomes.take(rows)
    return keep_guarantee(
        folder,
        predictor,
        photos,
        all_progress,
        counted_outcomes=counted_outcomes,
        rule=rule,
        dataset=photos.first_store.path.name,
    )


def _reasons_in_words(rule: Rule) -> str:
    """Say why a rule accepts no answers, with a reason for each group."""
    reasons = []
    for group, threshold in rule.thresholds.items():
        # The group with all answers has the name "". An empty name needs no colon.
        reason = f"{group}: {threshold.why}".removeprefix(": ")
        reasons.append(reason)
    return "; ".join(reasons)


def _remove_if_changed(folder: Path, outcomes: Outcomes) -> bool:
    """Remove a calibration by labels if new labels contradict the calibration's labels.

    Returns whether the calibration was removed.
    """
    calibration = Calibration.find(folder)
    if calibration is None or calibration.target.method != "anytime":
        return False  # a different method may have calibrated on rows of a different store
    rows = calibration.rows
    failure_of = dict(zip(outcomes.ids or (), outcomes.failure.tolist(), strict=True))
    changed_keys = set()
    for key, failure in zip(rows.ids or (), rows.failure.tolist(), strict=True):
        # An answer without a label now (UNKNOWN) contradicts nothing.
        if failure_of.get(key, UNKNOWN) not in {UNKNOWN, failure}:
            changed_keys.add(key)
    return remove_outdated_calibration(folder, changed_keys)

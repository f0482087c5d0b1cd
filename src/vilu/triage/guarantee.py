"""Counts the labels for a predictor's guarantee, and finds the certified threshold."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from vilu.calibration.anytime import ThresholdTests
from vilu.calibration.calibration import Calibration
from vilu.calibration.closed_set import AnyThresholdTests, ClosedPhotos, settings_of_tests
from vilu.calibration.procedure import save_calibrated_predictor
from vilu.calibration.rules import ALL_ROWS_GROUP, Rule, make_anytime_rule
from vilu.calibration.target import Target
from vilu.embeddings.copies import near_copy_groups
from vilu.embeddings.source import EmbeddingSource
from vilu.metrics.counts import Floats, Ints
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.predictors.contract.probability import identity_calibrator
from vilu.predictors.persistence.storage import write_card
from vilu.triage.labels import SKIPPED, LabelBook, sides_and_positions
from vilu.triage.photos import Photos
from vilu.triage.trial import Trial

N_POSITIONS: Final = 2**63
"""Number of possible positions in the photos' random order."""

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class PhotoSplit:
    """For every photo: the side, the position in the random order, and the label's state.

    Attributes:
        is_usable: (N,) bool, True for photos that may be used in fits or for a guarantee. If
            several photos have equal pictures, only one of these photos is usable: the first photo
            that was labelled or skipped with this picture, or else the first photo.
        is_calibration: (N,) bool, True on the calibration side, False on the fit side.
        random_position: (N,) int64 position in the random order.
        is_labelled: (N,) bool, True for photos with a label: a class, or "none of the classes".
        is_answered: (N,) bool, True for photos with a label and for skipped photos.
        is_skipped: (N,) bool, True for skipped photos. Nobody could name these photos.
        has_given_label: (N,) bool, True for photos picked at random and labelled without a request
            (stream "given").
        has_open_request: (N,) bool, True for photos with an open request for a calibration label.
    """

    is_usable: Mask
    is_calibration: Mask
    random_position: Ints
    is_labelled: Mask
    is_answered: Mask
    is_skipped: Mask
    has_given_label: Mask
    has_open_request: Mask

    @classmethod
    def of(cls, photos: Photos, book: LabelBook, seed: int) -> Self:
        """Split photos by their label book.

        The picture decides the side. If a photo's picture has changed since the photo was labelled,
        the photo may have been on the fit side before. So this photo is not used for calibration.
        """
        pictures = photos.pictures
        is_calibration, unsigned_position = sides_and_positions(pictures, seed)
        n = len(photos)
        is_readable = np.zeros(n, np.bool_)
        is_readable[photos.usable_rows.numpy()] = True
        is_answered = np.zeros(n, np.bool_)
        is_skipped = np.zeros(n, np.bool_)
        is_given = np.zeros(n, np.bool_)
        has_open_request = np.zeros(n, np.bool_)
        has_changed = np.zeros(n, np.bool_)
        for row, path in enumerate(photos.ids):
            entry = book.entries.get(path)
            if entry is not None:
                is_answered[row] = entry.label is not None
                is_skipped[row] = entry.label == SKIPPED
                is_given[row] = entry.stream == "given"
                has_open_request[row] = entry.stream == "calibration" and entry.label is None
                has_changed[row] = entry.was_another_picture(pictures[row])
        # The unsigned positions are below 2^64. Half of such a position is below
        # ``N_POSITIONS``, and fits into int64.
        random_position = (unsigned_position >> np.uint64(1)).astype(np.int64)
        is_first = one_row_per_picture(random_position, is_answered & ~has_changed)
        may_be_from_fit_side = is_calibration & has_changed
        return cls(
            is_usable=is_readable & is_first & ~may_be_from_fit_side,
            is_calibration=is_calibration,
            random_position=random_position,
            is_labelled=is_answered & ~is_skipped,
            is_answered=is_answered,
            is_skipped=is_skipped,
            has_given_label=is_given & is_answered,
            has_open_request=has_open_request,
        )

    @property
    def usable_calibration_mask(self) -> Mask:
        """(N,) bool, True for usable photos on the calibration side. Their labels may count."""
        return self.is_usable & self.is_calibration

    @property
    def usable_fit_mask(self) -> Mask:
        """(N,) bool, True for usable photos on the fit side. Predictors may be fitted on them."""
        return self.is_usable & ~self.is_calibration

    @property
    def fit_rows(self) -> Ints:
        """(M,) labelled rows that a predictor may be fitted on."""
        return np.flatnonzero(self.usable_fit_mask & self.is_labelled)

    def in_random_order(self, rows: Ints) -> Ints:
        """Sort these rows (M,) by position in the random order."""
        return rows[np.argsort(self.random_position[rows])]

    def unanswered_rows(self, uncertainty: Floats, limit: float) -> Ints:
        """Return the unanswered calibration rows (M,) up to a limit, in the random order.

        A photo is unanswered if it is neither labelled nor skipped.
        """
        can_count = self.usable_calibration_mask & (uncertainty <= limit)
        rows = np.flatnonzero(can_count & ~self.is_answered)
        return self.in_random_order(rows)

    def counted_rows(self, uncertainty: Floats, limit: float) -> Ints:
        """Return the calibration rows (M,) up to an uncertainty limit that count for a guarantee.

        In the random order, all rows before the first unanswered row count. Rows picked at
        random and labelled without a request count, too.
        """
        # The evidence may stop at any row, so it is valid even if people leave a photo unlabelled.
        unanswered_rows = self.unanswered_rows(uncertainty, limit)
        # position of the first row without a label, or beyond all positions if there is no such row
        end_position = N_POSITIONS
        if len(unanswered_rows):
            end_position = int(self.random_position[unanswered_rows[0]])
        can_count = self.usable_calibration_mask & (uncertainty <= limit)
        is_before_end = self.random_position < end_position
        return np.flatnonzero(can_count & (is_before_end | self.has_given_label))

    # ``FolderSplit`` replaces the methods below for a guarantee about the photos in the folder.

    @staticmethod
    def streams_of_unasked_labels(
        labels: Mapping[str, str],  # noqa: ARG004
        streams: Mapping[str, str],
        *,
        has_drawn: bool,  # noqa: ARG004
    ) -> Mapping[str, str]:
        """Return ``streams`` unchanged: the streams of labels without a request, by path."""
        return streams

    def pictures_digest(self, photos: Photos) -> str | None:  # noqa: ARG002
        """Return a digest of the guaranteed pictures, or None for a guarantee about new photos."""
        return None

    def for_predictor(self, predictor: FailurePredictor, photos: Photos) -> Self:  # noqa: ARG002
        """Return the split for a predictor's test. Here all predictors have the same split."""
        return self

    def rows_to_pick(self, photos: Photos, book: LabelBook) -> Ints:
        """Return rows (M,) that may be picked to fit on."""
        is_in_book = np.array([path in book.entries for path in photos.ids], dtype=np.bool_)
        return np.flatnonzero(self.usable_fit_mask & ~self.is_answered & ~is_in_book)

    def threshold_tests(
        self,
        trial: Trial,
        outcomes: Outcomes,
        rows: Ints,  # noqa: ARG002
        max_risk: float,
        level: float,
    ) -> AnyThresholdTests:
        """Make a trial's tests, with the labels of ``rows`` (M,) as the random sample."""
        scores = outcomes.uncertainty[self.usable_calibration_mask]
        return self.tests_before_labels(trial, scores, max_risk, level)

    @staticmethod
    def tests_before_labels(
        trial: Trial,
        scores: Floats,  # noqa: ARG004
        max_risk: float,
        level: float,
    ) -> AnyThresholdTests:
        """Make a trial's tests while no photo has a label.

        ``scores`` (M,) are the calibration photos' uncertainties.
        """
        grid = np.array(trial.grid)
        return ThresholdTests(grid, max_risk, level, trial.limit)

    def closed_photos(
        self,
        photos: Photos,  # noqa: ARG002
        uncertainty: Floats,  # noqa: ARG002
        threshold: float,  # noqa: ARG002
    ) -> ClosedPhotos | None:
        """Return the photos covered up to a threshold. None for a guarantee about new photos."""
        return None


def one_row_per_picture(random_position: Ints, is_preferred: Mask) -> Mask:
    """Return a mask (N,) with one row of every picture: the first preferred row, or the first row.

    Args:
        random_position: (N,) positions in the random order. Equal pictures have equal positions.
        is_preferred: (N,) bool, True for preferred rows.
    """
    rows_preferred_first = np.argsort(~is_preferred, kind="stable")  # False sorts before True
    # ``np.unique`` finds the first row at every position.
    _, first_indices = np.unique(random_position[rows_preferred_first], return_index=True)
    is_chosen = np.zeros(len(random_position), np.bool_)
    is_chosen[rows_preferred_first[first_indices]] = True
    return is_chosen


def draw_probability(last_position: int) -> float:
    """Compute the probability that a photo is drawn.

    This is the share of positions up to the last drawn position. The first position is 0, and
    ``last_position`` is -1 if no photo is drawn.
    """
    return (last_position + 1) / N_POSITIONS


def new_scene_mask(photos: EmbeddingSource, known: Ints, rows: Ints) -> Mask:
    """Return a mask (M,) that is False for near copies of ``known`` rows or earlier ``rows``.

    ``known`` (K,) are the known rows. ``rows`` has the shape (M,).
    """
    known_and_rows = np.concatenate([known, rows])
    # for every row, the position of the first row in the same near-copy group
    first_copy = near_copy_groups(photos, known_and_rows)
    is_first: Mask = first_copy == np.arange(len(known_and_rows))
    return is_first[len(known) :]  # without the known rows


@dataclass(frozen=True)
class GuaranteeProgress:
    """The certified threshold so far, and how many labels are still needed.

    Attributes:
        tests: The test: thresholds, risk and level.
        counted_rows: (M,) rows of the photos that count.
        counted_outcomes: Outcomes for ``counted_rows``. A photo that nobody could name counts as a
            failure.
        missing_rows: (K,) rows of the photos with an open request for a label, in the random order.
        certified_index: Index of the laxest certified threshold, or None if nothing is certified.
        n_more_labels: Estimate: how many labels are still needed. None if no number is enough.
        n_photos_left: How many photos are left to draw for the test.
    """

    tests: AnyThresholdTests
    counted_rows: Ints
    counted_outcomes: Outcomes
    missing_rows: Ints
    certified_index: int | None
    n_more_labels: int | None
    n_photos_left: int

    @property
    def threshold(self) -> float:
        """The certified threshold, or -inf if no threshold is certified."""
        if self.certified_index is None:
            return -math.inf
        return float(self.tests.grid[self.certified_index])


def rule_of(
    all_progress: Mapping[str, GuaranteeProgress],
    max_risk: float,
    confidence: float,
    closed_photos: ClosedPhotos | None = None,
) -> Rule:
    """Make the rule for all answer groups. The rule is infeasible if no threshold is certified.

    Args:
        all_progress: Maps the answer groups to the progress of the guarantees.
        max_risk: Largest allowed error rate among the accepted answers.
        confidence: Confidence of the guarantee.
        closed_photos: The photos that the rule is about. None for a rule about new photos.
    """
    groups = {}
    for group, progress in all_progress.items():
        groups[group] = (progress.tests, progress.counted_outcomes)
    return make_anytime_rule(groups, max_risk, confidence, closed_photos)


def progress_of(
    trial: Trial,
    outcomes: Outcomes,
    split: PhotoSplit,
    *,
    max_risk: float,
    level: float,
) -> GuaranteeProgress:
    """Return the progress of a predictor's guarantee, from the counted labels (``counted_rows``).

    Args:
        trial: Plan for the predictor's test.
        outcomes: Outcomes for all photos, by the tested predictor.
        split: Every photo's side, position and label state.
        max_risk: Largest allowed error rate among the accepted answers.
        level: Level for the test.
    """
    rows = split.counted_rows(outcomes.uncertainty, trial.limit)
    tests = split.threshold_tests(trial, outcomes, rows, max_risk, level)
    counted_outcomes = outcomes.take(rows)
    # A photo that nobody could name counts as a failure.
    failure = np.where(split.is_skipped[rows], 1, counted_outcomes.failure)
    counted_outcomes = dataclasses.replace(counted_outcomes, failure=failure)
    uncertainty = counted_outcomes.uncertainty
    is_below_limit = outcomes.uncertainty <= trial.limit
    is_missing = split.usable_calibration_mask & split.has_open_request & is_below_limit
    return GuaranteeProgress(
        tests=tests,
        counted_rows=rows,
        counted_outcomes=counted_outcomes,
        missing_rows=split.in_random_order(np.flatnonzero(is_missing)),
        certified_index=tests.index_of_laxest_certified_threshold(uncertainty, failure),
        n_more_labels=tests.n_more_labels_needed(uncertainty, failure),
        n_photos_left=len(split.unanswered_rows(outcomes.uncertainty, trial.limit)),
    )


def keep_guarantee(
    folder: Path,
    predictor: FailurePredictor,
    photos: Photos,
    all_progress: Mapping[str, GuaranteeProgress],
    counted_outcomes: Outcomes,
    rule: Rule,
    dataset: str,
) -> Calibration:
    """Write a rule to the predictor's folder, like ``vilu calibrate``. Return the calibration.

    ``counted_outcomes`` are the outcomes of the photos that count for the rule.
    """
    # The score is a probability already. The score is not calibrated on these labels, because only
    # photos with scores up to the limit have labels.
    predictor.calibrator_ = identity_calibrator(counted_outcomes.failure)
    target = Target(
        max_risk=rule.max_risk,
        confidence=rule.confidence,
        method="anytime",
        per_class=ALL_ROWS_GROUP not in all_progress,  # with this group there are no others
    )
    draws = {group: settings_of_tests(progress.tests) for group, progress in all_progress.items()}
    dataset_and_split = (dataset, None)  # photos have no split
    calibration = save_calibrated_predictor(
        folder,
        predictor,
        counted_outcomes,
        photos,
        target,
        rule,
        dataset_and_split,
        dtype=photos.first_store.manifest.dtype,
        draws=draws,
    )
    write_card(folder)
    return calibration

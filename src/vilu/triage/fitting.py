"""Which predictor labels are asked for: the present one, or one that is fitted anew."""

from __future__ import annotations

import logging
from enum import Enum
from typing import Final

import numpy as np

from vilu.metrics.counts import Ints
from vilu.predictors.contract.catalogue import find_method
from vilu.predictors.contract.parameters import build
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.triage.photos import Photos
from vilu.triage.state import TriageState
from vilu.triage.trial import Trial

ZERO_SHOT: Final = "vilu_zero"
FROM_LABELS: Final = "vilu_plus"

LEAST_TO_FIT: Final = 10
"""Labels of classes that a predictor is fitted on at least."""

GROWN_AFTER_A_LOOK: Final = 1.5
"""A predictor of which labels were looked at is fitted anew with so many times as many labels."""

GROWN_FOR_A_CANDIDATE: Final = 1.25
"""A candidate is looked for with so many times as many labels as the last time."""

GROWN_ANYHOW: Final = 3
"""So many times as many labels are worth a candidate, whatever it thinks of itself."""

logger = logging.getLogger(__name__)


class FitCase(Enum):
    """Whether a predictor is fitted anew, and why.

    One with a guarantee goes on deciding: a candidate is tested beside it, and takes its place as
    soon as it is certified to accept more.
    """

    UP_TO_DATE = "go on: the method is the same, and there is little more to learn from"
    NOTHING_TO_COMPARE = "go on: no photo can show which predictor accepts more"
    NO_GUARANTEE = "fit anew and replace: nothing is guaranteed of the present predictor"
    CANDIDATE = "fit anew and test beside the present predictor, which has a guarantee"

    @property
    def goes_on(self) -> bool:
        """Whether nothing is fitted."""
        return self in {FitCase.UP_TO_DATE, FitCase.NOTHING_TO_COMPARE}


def fit_case(
    state: TriageState,
    *,
    method: str,
    n_labels: int,
    is_saved: bool,
    is_guaranteed: bool,
    has_calibration_photos: bool,
) -> FitCase:
    """The case that a triage is in.

    Args:
        state: Of the last run.
        method: That ``n_labels`` are enough for (``method_for``).
        n_labels: Labels that a predictor may be fitted on.
        is_saved: Whether the predictor that labels are asked for is there.
        is_guaranteed: Whether a guarantee of the present predictor is in force.
        has_calibration_photos: Whether there are photos of the calibration side.
    """
    is_same_method = state.method == method and is_saved
    needs_no_labels = method == ZERO_SHOT
    if is_same_method and (needs_no_labels or not _has_grown(state, n_labels, is_guaranteed)):
        return FitCase.UP_TO_DATE
    if is_guaranteed and not has_calibration_photos:
        return FitCase.NOTHING_TO_COMPARE
    if is_guaranteed:
        return FitCase.CANDIDATE
    return FitCase.NO_GUARANTEE


def _has_grown(state: TriageState, n_labels: int, is_guaranteed: bool) -> bool:
    """Whether there are so many more labels that a fit may be worth it."""
    n_fit = _n_fit(state.tested_trial)
    looks_for_a_candidate = is_guaranteed and state.candidate is None
    if looks_for_a_candidate:
        n_before = max(n_fit, state.n_fit_of_last_candidate, 1)
        return n_labels >= GROWN_FOR_A_CANDIDATE * n_before
    return n_labels >= GROWN_AFTER_A_LOOK * max(n_fit, 1)


def is_worth_testing(candidate: Trial, state: TriageState, n_labels: int) -> bool:
    """Whether a candidate is tested: it is likely to accept more, or fitted on far more labels.

    Likely by its own probabilities: no label was looked at, so a candidate that is not tested costs
    nothing of the level.
    """
    has_far_more_labels = n_labels >= GROWN_ANYHOW * max(_n_fit(state.tested_trial), 1)
    return candidate.likely or has_far_more_labels


def _n_fit(trial: Trial | None) -> int:
    return 0 if trial is None else trial.n_fit


def method_for(photos: Photos, fit_rows: Ints) -> str:
    """The method that the labels of these rows are enough for."""
    n_of_classes = np.count_nonzero(photos.target.numpy()[fit_rows] >= 0)
    return FROM_LABELS if n_of_classes >= LEAST_TO_FIT else ZERO_SHOT


def fit(method: str, photos: Photos, fit_rows: Ints, seed: int) -> FailurePredictor:
    """A new predictor: on the labels of these rows, or without labels on all photos."""
    predictor: FailurePredictor
    if method == FROM_LABELS:
        predictor = build(find_method(method), {"seed": seed})
        predictor.fit(photos.take(fit_rows))
        logger.info("%s is fitted on %s labels", method, f"{len(fit_rows):,}")
        return predictor
    predictor = find_method(method)()
    predictor.fit(photos)
    logger.info("%s is fitted on %s photos, without labels", method, f"{len(photos):,}")
    return predictor

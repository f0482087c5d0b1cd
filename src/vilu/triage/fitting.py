"""Decides whether a triage tests its present predictor or fits a new one."""

from __future__ import annotations

import logging
from enum import Enum
from typing import Final

import numpy as np

from vilu.calibration.answer_choice import AnswerChoice, choose_answer
from vilu.calibration.likely import LikelyRight
from vilu.embeddings.columns import AnswerKind
from vilu.embeddings.source import EmbeddingSource
from vilu.errors import UsageError
from vilu.metrics.counts import Floats, Ints
from vilu.predictors.contract.catalogue import find_method
from vilu.predictors.contract.cross_fit import cross_fitted, labelled_folds
from vilu.predictors.contract.parameters import build
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.predictors.contract.spread import note_spread
from vilu.triage.photos import Photos
from vilu.triage.state import TriageState
from vilu.triage.trial import Trial

ZERO_SHOT: Final = "vilu_zero"
"""Method of a triage with few labels; it needs none."""

FROM_LABELS: Final = "vilu_plus"
"""Method of a triage with at least ``LEAST_TO_FIT`` labels."""

LEAST_TO_FIT: Final = 10
"""Smallest number of labels for a fit; labels "none of the classes" do not count."""

GROWN_AFTER_A_LOOK: Final = 1.5
"""Factor by which the number of labels must grow before a tested predictor is fitted anew."""

GROWN_BEFORE_A_LOOK: Final = 1.25
"""The same factor for a predictor that was not tested yet. It is smaller, as no test is lost."""

GROWN_FOR_A_CANDIDATE: Final = 1.25
"""Factor by which the number of labels must grow from one candidate to the next."""

GROWN_ANYHOW: Final = 3
"""Growth factor at which a candidate is tested even if its guarantee is not likely."""

logger = logging.getLogger(__name__)


class FitCase(Enum):
    """Whether a new predictor is fitted, and why.

    A present predictor with a guarantee goes on deciding while a candidate is tested. Once the
    candidate is certified to accept more photos, it replaces the present predictor.
    """

    UP_TO_DATE = "go on: the method is the same, and there are few new labels"
    NOTHING_TO_COMPARE = "go on: no photo can show which predictor accepts more"
    NO_GUARANTEE = "fit anew and replace: nothing is guaranteed of the present predictor"
    CANDIDATE = "fit anew and test beside the present predictor, which has a guarantee"

    @property
    def goes_on(self) -> bool:
        """Whether nothing is fitted, so that the tested predictor stays."""
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
    """Decide whether a triage fits a new predictor.

    Args:
        state: State after the last run.
        method: The method for this number of labels (``method_for``).
        n_labels: Number of labels that a predictor may be fitted on.
        is_saved: Whether the file of the tested predictor exists.
        is_guaranteed: Whether the present predictor has a guarantee in force.
        has_calibration_photos: Whether any photo is of the calibration side.
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
    """Whether there are enough new labels for a new fit."""
    n_fit = _n_fit(state.tested_trial)
    # A candidate needs more labels than the last candidate, even if that one was not tested.
    looks_for_a_candidate = is_guaranteed and state.candidate is None
    if looks_for_a_candidate:
        n_before = max(n_fit, state.n_fit_of_last_candidate, 1)
        return n_labels >= GROWN_FOR_A_CANDIDATE * n_before
    trial = state.tested_trial
    is_tested = trial is not None and trial.level > 0
    factor = GROWN_AFTER_A_LOOK if is_tested else GROWN_BEFORE_A_LOOK
    return n_labels >= factor * max(n_fit, 1)


def is_worth_testing(candidate: Trial, state: TriageState, n_labels: int) -> bool:
    """Whether to test a candidate: it is likely to accept more, or is fitted on far more labels.

    Whether it is likely to accept more is estimated from its probabilities, without calibration
    labels. So a candidate that is not tested uses none of the level.
    """
    has_far_more_labels = n_labels >= GROWN_ANYHOW * max(_n_fit(state.tested_trial), 1)
    return candidate.likely or has_far_more_labels


def _n_fit(trial: Trial | None) -> int:
    return 0 if trial is None else trial.n_fit


def method_for(photos: Photos, fit_rows: Ints) -> str:
    """The method to fit: ``FROM_LABELS`` if enough rows have a class, otherwise ``ZERO_SHOT``."""
    n_with_class = np.count_nonzero(photos.target.numpy()[fit_rows] >= 0)
    return FROM_LABELS if n_with_class >= LEAST_TO_FIT else ZERO_SHOT


def fit(method: str, photos: Photos, fit_rows: Ints, seed: int) -> FailurePredictor:
    """Fit ``FROM_LABELS`` on the labels of ``fit_rows``, or ``ZERO_SHOT`` on all photos."""
    predictor: FailurePredictor
    if method == FROM_LABELS:
        predictor = build(find_method(method), {"seed": seed})
        labelled = photos.take(fit_rows)
        predictor.fit(labelled)
        _hold_out(predictor, labelled)
        logger.info("%s is fitted on %s labels", method, f"{len(fit_rows):,}")
        return predictor
    predictor = find_method(method)()
    predictor.fit(photos)
    note_spread(predictor, predictor.predict_uncertainty(photos))
    logger.info("%s is fitted on %s photos, without labels", method, f"{len(photos):,}")
    return predictor


def _hold_out(predictor: FailurePredictor, labelled: EmbeddingSource) -> None:
    """Give a predictor cross-fitted answers to the labels of its fit, unless it has held-out ones.

    The choice of answers and the estimate of likely answers use them. A fit that pools experts
    holds out rows itself. Five more such fits would take most of the time of a run. But such a fit
    holds out no row of none of the classes, whose answer is always wrong. So if there are such
    rows, answers are cross-fitted.
    """
    has_outside = bool(labelled.outside.any())
    if predictor.held_out_ is None or has_outside:
        predictor.held_out_ = cross_fitted(predictor, labelled, labelled_folds(labelled))


def likely_right(predictor: FailurePredictor, uncertainty: Floats, max_risk: float) -> LikelyRight:
    """The estimate of which answers of a new predictor are likely right.

    Args:
        predictor: The new predictor, which judges its kind of answers.
        uncertainty: (N,) its uncertainties of all photos.
        max_risk: Largest expected error rate of the answers that are likely right.
    """
    if predictor.held_out_ is None:
        return LikelyRight.without_labels(max_risk)
    held_out = predictor.held_out_.judged(predictor.answer)
    zero_shot_failure = predictor.held_out_.zero_shot.failure
    n_wrong_zero_shot = int((zero_shot_failure[held_out.is_known] == 1).sum())
    likely = LikelyRight.estimate(held_out, uncertainty, max_risk)
    return likely.model_copy(update={"n_wrong_zero_shot": n_wrong_zero_shot})


def require_possible(answer: AnswerKind | None) -> None:
    """Raise UsageError for given answers, because photos of a folder have none."""
    if answer == "given":
        raise UsageError(
            "photos in a folder have no given answers. Choose --answer zero_shot or adapted. For "
            "given answers use `vilu fit` and `vilu calibrate` with a store that has them."
        )


def answer_to_judge(
    requested: AnswerKind | None,
    predictor: FailurePredictor,
    labelled: EmbeddingSource,
    max_risk: float,
) -> AnswerChoice:
    """The answers that a new predictor judges.

    The choice depends on labels of the fit side alone. Calibration labels must not decide which
    answers are judged, because the guarantee of these answers depends on the same labels.

    Args:
        requested: Kind of answers that the user asked for; None if vilu chooses.
        predictor: The new predictor.
        labelled: Rows that the predictor was fitted on, with their labels.
        max_risk: Largest error rate that the guarantee allows.
    """
    if requested is not None:
        return AnswerChoice(answer=requested, reason=f"--answer {requested} asks for them")
    if not predictor.needs_labels:
        return AnswerChoice(answer="zero_shot", reason="there are too few labels to fit on")
    return choose_answer(predictor, labelled, max_risk)

"""Decides whether a triage tests the present predictor or fits a new predictor."""

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
from vilu.predictors.contract.parameters import build_predictor
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.predictors.contract.spread import note_spread
from vilu.triage.photos import Photos
from vilu.triage.state import TriageState
from vilu.triage.trial import Trial

METHOD_WITHOUT_LABELS: Final = "vilu_zero"
"""Method of a triage with few labels. The method needs no labels."""

METHOD_WITH_LABELS: Final = "vilu_plus"
"""Method of a triage with at least ``MIN_LABELS_TO_FIT`` labels."""

MIN_LABELS_TO_FIT: Final = 10
"""Smallest number of labels for a fit. Labels "none of the classes" do not count."""

GROWTH_AFTER_TEST: Final = 1.5
"""The number of labels must grow by this factor before a tested predictor is fitted anew."""

GROWTH_BEFORE_TEST: Final = 1.25
"""As ``GROWTH_AFTER_TEST``, for an untested predictor. Smaller, because no test is wasted."""

GROWTH_FOR_CANDIDATE: Final = 1.25
"""From one candidate to the next, the number of labels must grow by this factor."""

GROWTH_FOR_UNLIKELY_CANDIDATE: Final = 3
"""With this many times the tested predictor's labels, even an unlikely candidate is tested."""

logger = logging.getLogger(__name__)


class FitCase(Enum):
    """Whether a new predictor is fitted, with the reason.

    If the present predictor has a guarantee, a new predictor is only a candidate. The present
    predictor decides while the candidate is tested. Once the candidate is certified to accept more
    photos, the candidate replaces the present predictor.
    """

    UP_TO_DATE = "go on: the method is the same, and there are few new labels"
    NOTHING_TO_COMPARE = "go on: no photo can show which predictor accepts more"
    NO_GUARANTEE = "fit anew and replace: nothing is guaranteed of the present predictor"
    CANDIDATE = "fit anew and test beside the present predictor, which has a guarantee"

    @property
    def keeps_predictor(self) -> bool:
        """Whether the tested predictor stays, without a new fit."""
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
        method: The method for this number of labels (``choose_method``).
        n_labels: How many labels a predictor may be fitted on.
        is_saved: Whether the file of the tested predictor exists.
        is_guaranteed: Whether the present predictor has a guarantee in force.
        has_calibration_photos: Whether any photo is on the calibration side.
    """
    has_predictor_of_method = is_saved and state.method == method
    uses_labels = method != METHOD_WITHOUT_LABELS
    new_fit_helps = uses_labels and _has_enough_new_labels(state, n_labels, is_guaranteed)
    if has_predictor_of_method and not new_fit_helps:
        return FitCase.UP_TO_DATE
    if is_guaranteed and not has_calibration_photos:
        return FitCase.NOTHING_TO_COMPARE
    if is_guaranteed:
        return FitCase.CANDIDATE
    return FitCase.NO_GUARANTEE


def _has_enough_new_labels(state: TriageState, n_labels: int, is_guaranteed: bool) -> bool:
    """Return whether there are enough new labels for a new fit."""
    n_fit = _n_fit(state.tested_trial)
    # A candidate needs more labels than the last candidate, even if that candidate was not tested.
    needs_candidate = is_guaranteed and state.candidate is None
    if needs_candidate:
        n_before = max(n_fit, state.n_fit_of_last_candidate, 1)
        return n_labels >= GROWTH_FOR_CANDIDATE * n_before
    trial = state.tested_trial
    is_tested = trial is not None and trial.level > 0  # 0 until the test has enough labels
    factor = GROWTH_AFTER_TEST if is_tested else GROWTH_BEFORE_TEST
    return n_labels >= factor * max(n_fit, 1)


def is_worth_testing(candidate: Trial, state: TriageState, n_labels: int) -> bool:
    """Return whether to test a candidate: if a guarantee is likely, or if it has far more labels.

    ``candidate.likely`` is estimated from the candidate's probabilities, without calibration
    labels. So if a candidate is not tested, no share of the level is used.
    """
    n_before = max(_n_fit(state.tested_trial), 1)
    has_far_more_labels = n_labels >= GROWTH_FOR_UNLIKELY_CANDIDATE * n_before
    return candidate.likely or has_far_more_labels


def _n_fit(trial: Trial | None) -> int:
    """Return how many labels a trial's predictor was fitted on, or 0 without a trial."""
    return 0 if trial is None else trial.n_fit


def choose_method(photos: Photos, fit_rows: Ints) -> str:
    """Choose the method: with labels if enough rows are labelled with a class, else without."""
    target = photos.target.numpy()[fit_rows]
    n_with_class = np.count_nonzero(target >= 0)
    return METHOD_WITH_LABELS if n_with_class >= MIN_LABELS_TO_FIT else METHOD_WITHOUT_LABELS


def fit_predictor(method: str, photos: Photos, fit_rows: Ints, seed: int) -> FailurePredictor:
    """Fit a method on the labels of ``fit_rows``, or ``METHOD_WITHOUT_LABELS`` on all photos."""
    predictor: FailurePredictor
    predictor_class = find_method(method)
    if method == METHOD_WITH_LABELS:
        predictor = build_predictor(predictor_class, {"seed": seed})
        labelled_photos = photos.take(fit_rows)
        predictor.fit(labelled_photos)
        _add_held_out_answers(predictor, labelled_photos)
        logger.info("%s is fitted on %s labels", method, f"{len(fit_rows):,}")
        return predictor
    predictor = predictor_class()
    predictor.fit(photos)
    uncertainty = predictor.predict_uncertainty(photos)
    note_spread(predictor, uncertainty)
    logger.info("%s is fitted on %s photos, without labels", method, f"{len(photos):,}")
    return predictor


def _add_held_out_answers(predictor: FailurePredictor, labelled_photos: EmbeddingSource) -> None:
    """Give a predictor cross-fitted answers about the rows of its fit, if these are needed.

    The answers are used to choose the answer kind, and to estimate which answers are likely right.
    A fit that pools experts has held-out answers already. These answers are kept, because five more
    such fits would take most of a run's time. But they lack the "none of the classes" rows, where
    every answer is wrong. If there are such rows, all answers are cross-fitted.
    """
    has_outside = bool(labelled_photos.outside.any())
    if predictor.held_out_ is None or has_outside:
        folds = labelled_folds(labelled_photos)
        predictor.held_out_ = cross_fitted(predictor, labelled_photos, folds)


def estimate_likely_right(
    predictor: FailurePredictor, uncertainty: Floats, max_risk: float
) -> LikelyRight:
    """Estimate which answers are likely right according to a new predictor.

    Args:
        predictor: The new predictor, after the choice of the answer kind.
        uncertainty: (N,) uncertainties of all photos by the new predictor.
        max_risk: Largest expected error rate among the likely right answers.
    """
    if predictor.held_out_ is None:
        return LikelyRight.without_labels(max_risk)
    held_out = predictor.held_out_.of_kind(predictor.answer)
    zero_shot_failure = predictor.held_out_.zero_shot.failure
    n_wrong_zero_shot = int((zero_shot_failure[held_out.is_known] == 1).sum())
    likely_right = LikelyRight.estimate(held_out, uncertainty, max_risk)
    return likely_right.model_copy(update={"n_wrong_zero_shot": n_wrong_zero_shot})


def refuse_given_answers(answer: AnswerKind | None) -> None:
    """Raise UsageError for given answers, because photos in a folder have no given answers."""
    if answer == "given":
        raise UsageError(
            "photos in a folder have no given answers. Choose --answer zero_shot or adapted. For "
            "given answers use `vilu fit` and `vilu calibrate` with a store that has them."
        )


def answer_to_judge(
    requested: AnswerKind | None,
    predictor: FailurePredictor,
    labelled_photos: EmbeddingSource,
    max_risk: float,
) -> AnswerChoice:
    """Choose the kind of answers that a new predictor judges.

    The choice depends on fit-side labels alone. The guarantee depends on calibration labels,
    so these labels must not decide about the answer kind.

    Args:
        requested: Answer kind requested by the user, or None to let vilu choose.
        predictor: The new predictor.
        labelled_photos: Rows that the predictor was fitted on, with labels.
        max_risk: Largest error rate allowed by the guarantee.
    """
    if requested is not None:
        return AnswerChoice(answer=requested, reason=f"--answer {requested} asks for them")
    if not predictor.needs_labels:
        return AnswerChoice(answer="zero_shot", reason="there are too few labels to fit on")
    return choose_answer(predictor, labelled_photos, max_risk)

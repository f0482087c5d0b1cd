"""Choice between a predictor's own answers and the zero-shot answers, by held-out rows."""

from __future__ import annotations

from functools import partial

from vilu.artifacts.documents import FrozenModel
from vilu.embeddings.columns import AnswerKind
from vilu.embeddings.source import EmbeddingSource
from vilu.metrics.bootstrap import paired_across_answers
from vilu.metrics.selective import coverage_at_risk, coverage_at_risk_kernel
from vilu.predictors.contract.cross_fit import cross_fitted, labelled_folds
from vilu.predictors.contract.held_out import HeldOutAnswers, folds_have_every_class
from vilu.predictors.contract.predictor import FailurePredictor

GAIN_CONFIDENCE = 0.8
"""Confidence for the interval around the gain in coverage (adapted minus zero-shot answers).

The confidence is lower than the usual 95 %, because two errors are equally bad here: to choose
adapted answers with less coverage, and to reject adapted answers with more coverage.
"""


class AnswerChoice(FrozenModel):
    """Kind of the judged answers, with the reason.

    Attributes:
        answer: Kind of the judged answers.
        reason: The reason, as a part of a sentence.
    """

    answer: AnswerKind
    reason: str

    def __str__(self) -> str:
        if self.answer == "adapted":
            choice = (
                "Adapted answers are judged, the likeliest by the posterior of the fitted predictor"
            )
        else:
            choice = "The zero-shot answers of the model are judged"
        return f"{choice}: {self.reason}."


def choose_answer(
    predictor: FailurePredictor,
    train: EmbeddingSource,
    max_risk: float,
    *,
    unlabelled: EmbeddingSource | None = None,
) -> AnswerChoice:
    """Choose between the zero-shot answers and the own answers of a fitted predictor.

    The own answers are called adapted. Both kinds of answers are compared on held-out labelled
    rows. The measure is coverage at a risk: the largest share of rows that a threshold can accept
    with at most the share ``max_risk`` of wrong answers among the accepted rows. The adapted
    answers are chosen unless the coverage clearly drops. A drop is clear if the 80 % interval for
    the gain in coverage lies below zero (paired bootstrap over rows).

    If the fit held out rows, the answers are compared on these rows. Otherwise the training rows
    are divided into folds. For each fold, a copy of the predictor is fitted to the rows outside the
    fold. This is not possible if some class has no label outside some fold. Then nothing is
    compared, and the adapted answers are chosen.

    Args:
        predictor: A predictor, fitted on ``train``.
        train: The rows that the fit used.
        max_risk: The largest share of wrong answers among the accepted answers.
        unlabelled: The rows without labels in the fit.

    Examples:
        >>> import numpy as np, vilu
        >>> from vilu.calibration.answer_choice import choose_answer
        >>> angle = np.linspace(0, np.pi / 2, 100)
        >>> image, text = np.c_[np.cos(angle), np.sin(angle)], np.eye(2)
        >>> target = np.repeat([0, 1], [70, 30])  # zero-shot: 50 and 50, so 20 are wrong
        >>> train = vilu.Embeddings(image, text, target=target)
        >>> probe = vilu.PREDICTORS["linear_probe"]().fit(train)
        >>> choice = choose_answer(probe, train, max_risk=0.05)
        >>> choice.answer
        'adapted'
        >>> "100% of the adapted and 84% of the zero-shot" in choice.reason  # at a risk of 5 %
        True
    """
    if not predictor.has_posterior:
        return AnswerChoice(answer="zero_shot", reason=f"{predictor.name} knows no others")
    if not predictor.needs_labels:
        return AnswerChoice(answer="zero_shot", reason="the fit used no labels")
    held_out = _held_out_answers(predictor, train, unlabelled)
    if held_out is None or not held_out.has_every_class:
        return AnswerChoice(
            answer="adapted",
            reason="nothing was compared, because a comparison needs labels of every class in at "
            "least two folds",
        )
    return _choose_by_coverage(held_out, max_risk)


def _choose_by_coverage(held_out: HeldOutAnswers, max_risk: float) -> AnswerChoice:
    """Choose the adapted answers, unless they clearly lose coverage on the held-out rows."""
    coverage_kernel = partial(coverage_at_risk_kernel, risk=max_risk)
    gain = paired_across_answers(
        coverage_kernel, held_out.adapted, held_out.zero_shot, confidence=GAIN_CONFIDENCE
    )
    adapted_coverage = coverage_at_risk(*held_out.adapted, risk=max_risk)
    zero_shot_coverage = coverage_at_risk(*held_out.zero_shot, risk=max_risk)
    n_rows = len(held_out.adapted.failure)
    reason = (
        f"of {n_rows} held-out rows, {adapted_coverage:.0%} of the adapted and "
        f"{zero_shot_coverage:.0%} of the zero-shot answers could be accepted at {max_risk:.3g} "
        "risk"
    )
    if gain.ci_high < 0:
        return AnswerChoice(answer="zero_shot", reason=reason)
    return AnswerChoice(answer="adapted", reason=reason)


def _held_out_answers(
    predictor: FailurePredictor, train: EmbeddingSource, unlabelled: EmbeddingSource | None
) -> HeldOutAnswers | None:
    """Return both kinds of answers to the rows that the fit held out.

    If the fit held out no rows, the predictor is fitted again for each fold, without the fold's
    rows. None if some class has no label outside some fold, because then no such fit is possible.
    """
    if predictor.held_out_ is not None:
        return predictor.held_out_
    folds = labelled_folds(train)
    if not folds_have_every_class(folds):
        return None
    return cross_fitted(predictor, train, folds, unlabelled=unlabelled)

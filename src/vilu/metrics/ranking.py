"""Ranking metrics: AUROC, false positive rate at a true positive rate, and average precision.

The metrics measure how well the uncertainty separates wrong answers from correct answers. Every
metric has two forms: a function of ``(uncertainty, failure)``, and a kernel over ``TieCounts`` with
one value per resample.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vilu.errors import UsageError
from vilu.metrics.counts import Floats, Ints, PositiveClass, TieCounts, ratio, tie_counts
from vilu.validation import checked, require_one_of

Rule = Literal["interpolate", "first", "nearest"]


def auroc(uncertainty: ArrayLike, failure: ArrayLike) -> float:
    """Compute the probability that a wrong answer is more uncertain than a correct answer.

    With the uncertainty u⁻ of a wrong answer, and the uncertainty u⁺ of a correct answer,

        AUROC = P(u⁻ > u⁺) + P(u⁻ = u⁺) / 2

    AUROC does not depend on the choice of the positive class. If all answers are right, or all are
    wrong, AUROC is NaN.

    Args:
        uncertainty: (N,) scores, higher = more likely wrong.
        failure: (N,) 1 where the answer is wrong, else 0.

    Raises:
        DataError: If the vectors are empty, differ in length, or hold invalid values.

    Examples:
        >>> import vilu
        >>> uncertainty = [0.1, 0.2, 0.2, 0.9]
        >>> failure = [0, 0, 1, 1]
        >>> vilu.metrics.auroc(uncertainty, failure)  # 3 of 4 pairs are in order, 1 is tied
        0.875
    """
    counts = tie_counts(uncertainty, failure)
    return float(auroc_kernel(counts))


@checked
def fpr_at_tpr(
    uncertainty: ArrayLike,
    failure: ArrayLike,
    level: float = 0.95,
    positive: PositiveClass = "correct",
    rule: Rule = "interpolate",
) -> float:
    """Compute the false positive rate where the true positive rate reaches ``level`` (FPR95).

    If all answers are right, or all are wrong, the rate is NaN.

    With ``positive="correct"``, accept answers until the share ``level`` of the correct answers is
    accepted. The rate is the accepted share of wrong answers. With ``positive="failure"``, reject
    answers until the share ``level`` of the wrong answers is rejected. The rate is the rejected
    share of correct answers. The two numbers differ.

    Args:
        uncertainty: (N,) scores, higher = more likely wrong.
        failure: (N,) 1 where the answer is wrong, else 0.
        level: True positive rate, in (0, 1].
        positive: The positive class.
        rule: How to read the ROC curve at ``level``. The curve has an operating point for each
            distinct uncertainty.
            "interpolate": straight lines between operating points, as in the ViLU paper. If several
            points have exactly the true positive rate ``level``, the largest false positive rate is
            taken, as ``numpy.interp`` in the paper's code does.
            "first": the first operating point with a true positive rate of at least ``level``
            (fd-shifts, Rel-U, ICPE).
            "nearest": the operating point with a true positive rate nearest to ``level``
            (TrustVLM).

    All operating points are used. scikit-learn by default drops operating points on straight parts
    of the curve. Dropping does not change "interpolate", but can change "first" and "nearest".

    Raises:
        UsageError: If ``level``, ``positive`` or ``rule`` is invalid.

    Examples:
        >>> import vilu
        >>> uncertainty = [0.1, 0.2, 0.3, 0.4, 0.5]
        >>> failure = [0, 0, 1, 0, 1]
        >>> # accepting all correct answers (up to 0.4) accepts one of the two wrong answers
        >>> vilu.metrics.fpr_at_tpr(uncertainty, failure)
        0.5
        >>> # rejecting both wrong answers (from 0.3 on) rejects one of the three correct answers
        >>> round(vilu.metrics.fpr_at_tpr(uncertainty, failure, positive="failure"), 4)
        0.3333
    """
    counts = tie_counts(uncertainty, failure)
    return float(fpr_at_tpr_kernel(counts, level, positive, rule))


def aupr_failure(uncertainty: ArrayLike, failure: ArrayLike) -> float:
    """Compute the average precision of finding wrong answers, the most uncertain answers first.

    Let recall_g and precision_g be the recall and the precision for the answers with at least the
    g-th largest of the distinct uncertainties. With recall_0 = 0,

        average precision = Σ_g (recall_g - recall_{g-1}) precision_g

    If no answer is wrong, the result is NaN. The chance level is the failure rate.

    Examples:
        >>> import vilu
        >>> uncertainty = [0.1, 0.2, 0.3, 0.4]
        >>> failure = [0, 1, 0, 1]  # the most uncertain first: wrong, right, wrong, right
        >>> round(vilu.metrics.aupr_failure(uncertainty, failure), 4)  # 1/2 * 1/1 + 1/2 * 2/3
        0.8333
    """
    counts = tie_counts(uncertainty, failure)
    return float(aupr_kernel(counts, "failure"))


def aupr_success(uncertainty: ArrayLike, failure: ArrayLike) -> float:
    """Compute the average precision of finding correct answers, the least uncertain first.

    If no answer is correct, the result is NaN. The chance level is the accuracy. TrustVLM's
    code integrates by trapezoids instead, and that result is optimistic.

    Examples:
        >>> import vilu
        >>> uncertainty = [0.1, 0.2, 0.3, 0.4]
        >>> failure = [0, 0, 1, 0]  # the least uncertain first: right, right, wrong, right
        >>> round(vilu.metrics.aupr_success(uncertainty, failure), 4)  # (1/1 + 2/2 + 3/4) / 3
        0.9167
    """
    counts = tie_counts(uncertainty, failure)
    return float(aupr_kernel(counts, "correct"))


@checked
def roc_curve_points(
    uncertainty: ArrayLike, failure: ArrayLike, positive: PositiveClass = "correct"
) -> tuple[Floats, Floats]:
    """Return false positive rates (G+1,) and true positive rates (G+1,), from (0, 0) to (1, 1).

    After the point (0, 0), each distinct uncertainty gives one point. If all answers are right, or
    all are wrong, all rates are NaN.

    Raises:
        UsageError: If ``positive`` is neither "correct" nor "failure".

    Examples:
        >>> import vilu
        >>> uncertainty = [0.1, 0.2, 0.3, 0.4]
        >>> failure = [0, 1, 0, 1]
        >>> false_positive_rate, true_positive_rate = vilu.metrics.roc_curve_points(
        ...     uncertainty, failure
        ... )
        >>> false_positive_rate  # wrong answers accepted; each adds 1/2
        array([0. , 0. , 0.5, 0.5, 1. ])
        >>> true_positive_rate  # correct answers accepted
        array([0. , 0.5, 0.5, 1. , 1. ])
    """
    require_one_of("positive", positive, get_args(PositiveClass))
    counts = tie_counts(uncertainty, failure)
    positive_counts = counts.with_positive(positive)
    return _roc_points(positive_counts)


def auroc_kernel(counts: TieCounts) -> Floats:
    """Compute AUROC (...), in integers up to the last division.

    A pair of a wrong and a correct answer counts 2 if the scores are in the right order, and 1 if
    the scores are tied.
    """
    # for each score: 2 per correct answer below the score, and 1 per correct answer at the score
    points_per_wrong_answer = 2 * counts.accepted_correct - counts.correct
    points = (counts.wrong * points_per_wrong_answer).sum(-1)
    return ratio(points, 2 * counts.n_correct * counts.n_wrong)


def fpr_at_tpr_kernel(
    counts: TieCounts,
    level: float = 0.95,
    positive: PositiveClass = "correct",
    rule: Rule = "interpolate",
) -> Floats:
    """Compute the false positive rate (...), as in ``fpr_at_tpr``."""
    if not 0 < level <= 1:
        raise UsageError(f"level must be a true positive rate in (0, 1]. Got {level} instead.")
    require_one_of("positive", positive, get_args(PositiveClass))
    require_one_of("rule", rule, get_args(Rule))
    positive_counts = counts.with_positive(positive)
    fpr, tpr = _roc_points(positive_counts)
    if rule == "first":
        # The rates are ascending. So the number of rates below ``level`` is the index of the first
        # rate of at least ``level``.
        first_index = (tpr < level).sum(-1)
        return _entries_at(first_index, fpr)
    if rule == "nearest":
        distance = np.abs(tpr - level)
        nearest_index = distance.argmin(-1)
        return _entries_at(nearest_index, fpr)
    return _interpolated_fpr(fpr, tpr, level)


def _interpolated_fpr(fpr: Floats, tpr: Floats, level: float) -> Floats:
    """Compute the false positive rate (...) at the true positive rate ``level``.

    ``fpr`` and ``tpr`` hold the curve's points (..., G+1). Let P be the last point with a true
    positive rate of at most ``level``. The curve is a straight line from P to the next point.
    """
    # The rates are ascending from 0, so the points up to P are those with a rate up to ``level``.
    index_before = (tpr <= level).sum(-1) - 1
    last_index = tpr.shape[-1] - 1  # if P is the last point, P is its own next point
    index_after = np.minimum(index_before + 1, last_index)
    tpr_before = _entries_at(index_before, tpr)
    fpr_before = _entries_at(index_before, fpr)
    tpr_step = _entries_at(index_after, tpr) - tpr_before
    fpr_step = _entries_at(index_after, fpr) - fpr_before
    share_of_step = ratio(level - tpr_before, tpr_step, if_undefined=0.0)
    return fpr_before + share_of_step * fpr_step


def aupr_kernel(counts: TieCounts, positive: PositiveClass) -> Floats:
    """Compute the average precision (...) for the class ``positive``."""
    # In these counts, "correct" means "in the positive class".
    positive_counts = counts.with_positive(positive)
    precision = ratio(positive_counts.accepted_correct, positive_counts.accepted, if_undefined=0.0)
    total_precision = (positive_counts.correct * precision).sum(-1)
    return ratio(total_precision, positive_counts.n_correct)


def _roc_points(counts: TieCounts) -> tuple[Floats, Floats]:
    """Return false positive rates (..., G+1) and true positive rates (..., G+1).

    ``counts.correct`` counts the positive class. If a class has no answers, all rates are NaN.
    """
    none_accepted = np.zeros_like(counts.accepted[..., :1])  # numerator at the point (0, 0)
    has_one_class = counts.n_correct * counts.n_wrong == 0

    def rate(accepted: Ints, total: Ints) -> Floats:
        numerator = np.concatenate([none_accepted, accepted], axis=-1)
        denominator = np.where(has_one_class, 0, total)  # 0 makes the rates NaN
        return ratio(numerator, denominator[..., None])

    false_positive_rate = rate(counts.accepted_wrong, counts.n_wrong)
    true_positive_rate = rate(counts.accepted_correct, counts.n_correct)
    return false_positive_rate, true_positive_rate


def _entries_at(index: NDArray[np.intp], values: Floats) -> Floats:
    """Return the entries (...) of ``values`` (..., M) at the last-axis indices ``index`` (...)."""
    index_of_entry = np.asarray(index)[..., None]
    entries = np.take_along_axis(values, index_of_entry, axis=-1)  # (..., 1)
    return entries[..., 0]

"""Ranking metrics: AUROC, false positive rate at a true positive rate, and average precision.

The metrics measure how well the uncertainty separates wrong answers from correct answers. Every
metric has two forms: a function of ``(uncertainty, failure)``, and a kernel over ``TieCounts``,
which returns one value per resample.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vilu.errors import UsageError
from vilu.metrics.counts import Floats, Ints, Positive, TieCounts, ratio, tie_counts
from vilu.validation import checked, require_one_of

Rule = Literal["interpolate", "first", "nearest"]


def auroc(uncertainty: ArrayLike, failure: ArrayLike) -> float:
    """Probability that a wrong answer is more uncertain than a correct answer.

        AUROC = P(u⁻ > u⁺) + P(u⁻ = u⁺) / 2

    u⁻ is the uncertainty of a wrong answer, u⁺ that of a correct answer. AUROC does not depend on
    which class is called positive. It is NaN if there is only one class.

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
    return float(auroc_kernel(tie_counts(uncertainty, failure)))


@checked
def fpr_at_tpr(
    uncertainty: ArrayLike,
    failure: ArrayLike,
    level: float = 0.95,
    positive: Positive = "correct",
    rule: Rule = "interpolate",
) -> float:
    """False positive rate where the true positive rate reaches ``level`` (FPR95).

    NaN if there is only one class.

    With ``positive="correct"``: the share of wrong answers that are accepted if the share ``level``
    of the correct answers is accepted. With ``positive="failure"``: the share of correct answers
    that are rejected if the share ``level`` of the wrong answers is rejected. The two numbers
    differ.

    Args:
        uncertainty: (N,) scores, higher = more likely wrong.
        failure: (N,) 1 where the answer is wrong, else 0.
        level: True positive rate, in (0, 1].
        positive: The positive class.
        rule: How to read the ROC curve at ``level``.
            "interpolate": straight lines between operating points, as in the ViLU paper. If several
            points have exactly the true positive rate ``level``, the largest false positive rate is
            taken, as ``numpy.interp`` in the paper's code does.
            "first": the first operating point whose true positive rate is at least ``level``
            (fd-shifts, Rel-U, ICPE).
            "nearest": the operating point whose true positive rate is nearest to ``level``
            (TrustVLM).

    All operating points are used. scikit-learn by default drops operating points on straight parts
    of the curve. This does not change "interpolate", but it can change "first" and "nearest".

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
    return float(fpr_at_tpr_kernel(tie_counts(uncertainty, failure), level, positive, rule))


def aupr_failure(uncertainty: ArrayLike, failure: ArrayLike) -> float:
    """Average precision of finding wrong answers, the most uncertain answers first.

        average precision = Σ_g (recall_g - recall_{g-1}) precision_g

    The sum is over the distinct uncertainties. The result is NaN if no answer is wrong. The chance
    level is the failure rate.

    Examples:
        >>> import vilu
        >>> uncertainty = [0.1, 0.2, 0.3, 0.4]
        >>> failure = [0, 1, 0, 1]  # the most uncertain first: wrong, right, wrong, right
        >>> round(vilu.metrics.aupr_failure(uncertainty, failure), 4)  # 1/2 * 1/1 + 1/2 * 2/3
        0.8333
    """
    return float(aupr_kernel(tie_counts(uncertainty, failure), "failure"))


def aupr_success(uncertainty: ArrayLike, failure: ArrayLike) -> float:
    """Average precision of finding correct answers, the least uncertain answers first.

    The result is NaN if no answer is correct. The chance level is the accuracy. The code of
    TrustVLM integrates by trapezoids instead, which is optimistic.

    Examples:
        >>> import vilu
        >>> uncertainty = [0.1, 0.2, 0.3, 0.4]
        >>> failure = [0, 0, 1, 0]  # the least uncertain first: right, right, wrong, right
        >>> round(vilu.metrics.aupr_success(uncertainty, failure), 4)  # (1/1 + 2/2 + 3/4) / 3
        0.9167
    """
    return float(aupr_kernel(tie_counts(uncertainty, failure), "correct"))


@checked
def roc_curve_points(
    uncertainty: ArrayLike, failure: ArrayLike, positive: Positive = "correct"
) -> tuple[Floats, Floats]:
    """False positive rates (G+1,) and true positive rates (G+1,), from (0, 0) to (1, 1).

    After the point (0, 0) there is one point per distinct uncertainty. All rates are NaN if there
    is only one class.

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
    require_one_of("positive", positive, get_args(Positive))
    return _roc(tie_counts(uncertainty, failure).towards(positive))


def auroc_kernel(counts: TieCounts) -> Floats:
    """AUROC (...), computed in integers up to the last division.

    Each pair of a wrong and a correct answer counts 2 if it is in the right order, and 1 if tied.
    """
    # twice the number of correct answers below each score, plus the number at this score
    twice_correct_below = 2 * counts.accepted_correct - counts.correct
    twice_pairs = (counts.wrong * twice_correct_below).sum(-1)
    return ratio(twice_pairs, 2 * counts.n_correct * counts.n_wrong)


def fpr_at_tpr_kernel(
    counts: TieCounts,
    level: float = 0.95,
    positive: Positive = "correct",
    rule: Rule = "interpolate",
) -> Floats:
    """False positive rate (...); see ``fpr_at_tpr``."""
    if not 0 < level <= 1:
        raise UsageError(f"level must be a true positive rate in (0, 1]. Got {level} instead.")
    require_one_of("positive", positive, get_args(Positive))
    require_one_of("rule", rule, get_args(Rule))
    fpr, tpr = _roc(counts.towards(positive))
    if rule == "first":
        # The rates are ascending. So the number of rates below ``level`` is the index of the first
        # rate that is not below it.
        first_at_level = (tpr < level).sum(-1)
        return _pick(fpr, first_at_level)
    if rule == "nearest":
        nearest = np.abs(tpr - level).argmin(-1)
        return _pick(fpr, nearest)
    below = (tpr <= level).sum(-1) - 1  # index of the last point whose rate is at most ``level``
    last = tpr.shape[-1] - 1
    above = np.minimum(below + 1, last)
    tpr_below = _pick(tpr, below)
    fpr_below = _pick(fpr, below)
    tpr_gap = _pick(tpr, above) - tpr_below
    fpr_gap = _pick(fpr, above) - fpr_below
    share = ratio(level - tpr_below, tpr_gap, empty=0.0)
    return fpr_below + share * fpr_gap


def aupr_kernel(counts: TieCounts, positive: Positive) -> Floats:
    """Average precision (...) of the class ``positive``."""
    # from here on, "correct" means "of the positive class"
    positives_first = counts.towards(positive)
    precision = ratio(positives_first.accepted_correct, positives_first.accepted, empty=0.0)
    total_precision = (positives_first.correct * precision).sum(-1)
    return ratio(total_precision, positives_first.n_correct)


def _roc(counts: TieCounts) -> tuple[Floats, Floats]:
    """False and true positive rates (..., G+1); ``counts.correct`` is the positive class.

    All rates are NaN if a class is empty.
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


def _pick(values: Floats, index: NDArray[np.intp]) -> Floats:
    """Entries (...) of ``values`` (..., M) at the indices ``index`` (...) of the last axis."""
    picked = np.take_along_axis(values, np.asarray(index)[..., None], axis=-1)  # (..., 1)
    return picked[..., 0]

"""How well the uncertainty separates wrong answers from correct ones.

AUROC, FPR at a TPR, and average precision.

Every metric is a kernel over ``TieCounts`` (one value per resample) and a function of
``(uncertainty, failure)``.
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
    """Probability that a wrong answer is more uncertain than a correct one.

    It is P(u⁻ > u⁺) + P(u⁻ = u⁺) / 2.

    The same whichever class is called positive. NaN if there is only one class.

    Args:
        uncertainty: (N,) scores, higher = more likely wrong.
        failure: (N,) 1 where the answer is wrong, else 0.

    Raises:
        DataError: If the vectors are empty, differ in length, or hold anything else.

    Examples:
        >>> import vilu
        >>> vilu.metrics.auroc(
        ...     [0.1, 0.2, 0.2, 0.9], [0, 0, 1, 1]
        ... )  # of four pairs three are in order, one is tied
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

    With ``positive="correct"`` it is the share of wrong answers still accepted when ``level`` of
    the correct ones are; with ``"failure"`` the share of correct answers rejected when ``level`` of
    the wrong ones are. These differ.

    Args:
        uncertainty: (N,) scores, higher = more likely wrong.
        failure: (N,) 1 where the answer is wrong, else 0.
        level: True positive rate, in (0, 1].
        positive: The positive class.
        rule: "interpolate": the ROC curve as straight lines between operating points, as in the
            ViLU paper; where it runs level at exactly ``level``, its far end (what ``numpy.interp``
            and so the paper's code returns). "first": the first operating point whose rate is at
            least ``level`` (fd-shifts, Rel-U, ICPE). "nearest": the operating point nearest to
            ``level`` (TrustVLM). scikit-learn's default drops operating points on straight
            stretches of the curve; that changes nothing for "interpolate", while "first" and
            "nearest" are exact only on all points, which are used here.

    Raises:
        UsageError: If ``level``, ``positive`` or ``rule`` is none of the above.

    Examples:
        >>> import vilu
        >>> uncertainty, failure = [0.1, 0.2, 0.3, 0.4, 0.5], [0, 0, 1, 0, 1]
        >>> vilu.metrics.fpr_at_tpr(
        ...     uncertainty, failure
        ... )  # to accept all correct answers is to accept one of two wrong ones
        0.5
        >>> round(
        ...     vilu.metrics.fpr_at_tpr(uncertainty, failure, positive="failure"), 4
        ... )  # to reject both: one of three
        0.3333
    """
    return float(fpr_at_tpr_kernel(tie_counts(uncertainty, failure), level, positive, rule))


def aupr_failure(uncertainty: ArrayLike, failure: ArrayLike) -> float:
    """Average precision of finding wrong answers, the most uncertain first.

    It is Σ_g (recall_g - recall_{g-1}) precision_g.

    NaN if no answer is wrong. Its chance level is the failure rate.

    Examples:
        >>> import vilu
        >>> round(
        ...     vilu.metrics.aupr_failure([0.1, 0.2, 0.3, 0.4], [0, 1, 0, 1]), 4
        ... )  # 1/2 * 1 + 1/2 * 2/3
        0.8333
    """
    return float(aupr_kernel(tie_counts(uncertainty, failure), "failure"))


def aupr_success(uncertainty: ArrayLike, failure: ArrayLike) -> float:
    """Average precision of finding correct answers, the least uncertain first.

    NaN if no answer is correct. Its chance level is the accuracy. TrustVLM's
    code integrates by trapezoids instead, which is optimistic.

    Examples:
        >>> import vilu
        >>> round(
        ...     vilu.metrics.aupr_success([0.1, 0.2, 0.3, 0.4], [0, 0, 1, 0]), 4
        ... )  # (1 + 1 + 3/4) / 3
        0.9167
    """
    return float(aupr_kernel(tie_counts(uncertainty, failure), "correct"))


@checked
def roc_curve_points(
    uncertainty: ArrayLike, failure: ArrayLike, positive: Positive = "correct"
) -> tuple[Floats, Floats]:
    """False and true positive rates (G+1,) from (0, 0) to (1, 1).

    There is one point per distinct uncertainty.

    NaN throughout if there is only one class.

    Raises:
        UsageError: If ``positive`` is neither "correct" nor "failure".

    Examples:
        >>> import vilu
        >>> fpr, tpr = vilu.metrics.roc_curve_points([0.1, 0.2, 0.3, 0.4], [0, 1, 0, 1])
        >>> list(zip(fpr.tolist(), tpr.tolist()))
        [(0.0, 0.0), (0.0, 0.5), (0.5, 0.5), (0.5, 1.0), (1.0, 1.0)]
    """
    require_one_of("positive", positive, get_args(Positive))
    return _roc(tie_counts(uncertainty, failure).towards(positive))


def auroc_kernel(counts: TieCounts) -> Floats:
    """AUROC (...) in integers up to the last division: each pair counts 2, a tied pair 1."""
    twice_pairs = (counts.wrong * (2 * counts.accepted_correct - counts.correct)).sum(-1)
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
        return _pick(fpr, (tpr < level).sum(-1))
    if rule == "nearest":
        return _pick(fpr, np.abs(tpr - level).argmin(-1))
    below = (tpr <= level).sum(-1) - 1
    above = np.minimum(below + 1, tpr.shape[-1] - 1)
    (tpr_below, tpr_above), (fpr_below, fpr_above) = (
        [_pick(x, below), _pick(x, above)] for x in (tpr, fpr)
    )
    share = ratio(level - tpr_below, tpr_above - tpr_below, empty=0.0)
    return fpr_below + share * (fpr_above - fpr_below)


def aupr_kernel(counts: TieCounts, positive: Positive) -> Floats:
    """Average precision (...) of the class ``positive``."""
    side = counts.towards(positive)
    precision = ratio(side.accepted_correct, side.accepted, empty=0.0)
    return ratio((side.correct * precision).sum(-1), side.n_correct)


def _roc(counts: TieCounts) -> tuple[Floats, Floats]:
    """False and true positive rates (..., G+1), ``counts.correct`` being the positive class.

    NaN if a class is empty.
    """
    origin = np.zeros_like(counts.accepted[..., :1])
    one_class = (counts.n_correct * counts.n_wrong == 0)[..., None]

    def rate(accepted: Ints, total: Ints) -> Floats:
        return ratio(
            np.concatenate([origin, accepted], axis=-1), np.where(one_class, 0, total[..., None])
        )

    return rate(counts.accepted_wrong, counts.n_wrong), rate(
        counts.accepted_correct, counts.n_correct
    )


def _pick(values: Floats, index: NDArray[np.intp]) -> Floats:
    """Entry (...) of ``values`` (..., M) at ``index`` (...)."""
    return np.take_along_axis(values, np.asarray(index)[..., None], axis=-1)[..., 0]

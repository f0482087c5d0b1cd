"""A metric: how well does the best threshold separate right answers from wrong ones?"""

from __future__ import annotations

from vilu.metrics import Metric
from vilu.metrics.counts import Floats, TieCounts, ratio


def youden_kernel(counts: TieCounts) -> Floats:
    """Compute Youden's J = max over thresholds of TPR - FPR.

    TPR is the share of right answers that a threshold accepts. FPR is the share of wrong answers
    that it accepts. The counts are (..., G) for G distinct scores, from the most to the least
    trusted. The result is (...). It is undefined if no answer is wrong, or if none is right.

    Source: Youden, "Index for rating diagnostic tests", Cancer, 1950.

    Examples:
        The best threshold lies between 0.2 and 0.6. It accepts two of three right answers, and no
        wrong answer.

        >>> import numpy as np
        >>> value = np.array([0.1, 0.2, 0.6, 0.9])
        >>> correct = np.array([[1, 1, 0, 1]])
        >>> wrong = np.array([[0, 0, 1, 0]])
        >>> counts = TieCounts(value=value, correct=correct, wrong=wrong)
        >>> youden_kernel(counts).round(3)
        array([0.667])
    """
    true_positive_rate = ratio(counts.accepted_correct, counts.n_correct[..., None])
    false_positive_rate = ratio(counts.accepted_wrong, counts.n_wrong[..., None])
    difference: Floats = true_positive_rate - false_positive_rate
    # A threshold that accepts nothing has a difference of 0.
    best: Floats = difference.max(axis=-1).clip(min=0)
    return best


YOUDEN = Metric(
    "Youden's J",
    youden_kernel,
    "best threshold of TPR - FPR, no guarantee",
    higher_is_better=True,
    name="youden",
)

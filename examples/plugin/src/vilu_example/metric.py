"""A metric: how well does the best threshold part right answers from wrong ones?"""

from __future__ import annotations

from vilu.metrics import Metric
from vilu.metrics.counts import Floats, TieCounts, ratio


def youden_kernel(counts: TieCounts) -> Floats:
    """Youden's J = max over thresholds of TPR - FPR.

    The rates are those of accepted right and of accepted wrong answers. Counts are (..., G) for G
    distinct scores, from the most to the least trusted; the value is (...), undefined where no
    answer is wrong, or none right.

    Source: Youden, "Index for rating diagnostic tests", Cancer, 1950.

    Examples:
        Below 0.5 two of three right answers are accepted, and no wrong one.

        >>> import numpy as np
        >>> correct, wrong = np.array([[1, 1, 0, 1]]), np.array([[0, 0, 1, 0]])
        >>> youden_kernel(TieCounts(np.array([0.1, 0.2, 0.6, 0.9]), correct, wrong)).round(3)
        array([0.667])
    """
    accepted = ratio(counts.accepted_correct, counts.n_correct[..., None])
    gap: Floats = accepted - ratio(counts.accepted_wrong, counts.n_wrong[..., None])
    best: Floats = gap.max(axis=-1).clip(min=0)
    return best


YOUDEN = Metric(
    "Youden's J",
    youden_kernel,
    "best threshold of TPR - FPR, no guarantee",
    higher_is_better=True,
    name="youden",
)

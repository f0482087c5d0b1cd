"""Conformal selection: accept answers in a batch such that few accepted answers are wrong.

The p-value of an answer with uncertainty u, from n calibration answers with uncertainties u_i, is

    p = (1 + #{wrong calibration answers with u_i <= u}) / (1 + n).

p is small if only few of the calibration answers with an uncertainty of at most u are wrong.
The Benjamini-Hochberg procedure is applied to the p-values of a batch. The level is the maximal
risk. This bounds the mean share of wrong answers among the accepted answers (0 if no answer is
accepted). The mean is over draws of calibration rows and batch. The decision about a row depends on
all rows in the batch, so a batch must be judged as a whole.

Source: Jin & Candès, Selection by Prediction with Conformal p-values (2023), with the null
hypothesis "the answer is wrong" and the paper's clipped score. Bates et al. (2023) have the
denominator 1 + #wrong instead of 1 + n. With 1 + #wrong, fewer answers would be accepted, and
the bound would be the level times the share of wrong answers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vilu.metrics.counts import Floats, Ints

MAX_RULE_ROWS = 10**6
"""Largest number of calibration rows in a rule.

The scores of the wrong answers are saved in ``risk.json``. More rows would hardly change a p-value.
"""


def p_values(uncertainty: Floats, wrong_scores: Sequence[float], n: int) -> Floats:
    """Return the conformal p-values (N,), NaN where there is no uncertainty.

    ``n`` is the number of calibration rows. ``wrong_scores`` holds the uncertainties of the wrong
    calibration answers, ascending.

    Examples:
        >>> import numpy as np
        >>> from vilu.calibration.selection import p_values
        >>> uncertainty = np.array([0.2, 0.3])
        >>> p_values(uncertainty, wrong_scores=[0.3, 0.9], n=4).tolist()  # (1 + 0) / 5, (1 + 1) / 5
        [0.2, 0.4]
    """
    # The new answer is counted as wrong: this is the 1 in the numerator. Without this 1, an answer
    # with less uncertainty than all wrong answers would have the p-value 0, and would be accepted
    # at every level.
    n_wrong_up_to_answer = np.searchsorted(wrong_scores, uncertainty, side="right")
    p: Floats = (1 + n_wrong_up_to_answer) / (1 + n)
    return np.where(np.isnan(uncertainty), np.nan, p)


def select_answers(p: Floats, level: float) -> NDArray[np.bool_]:
    """Return the mask (N,) of the answers that the Benjamini-Hochberg procedure accepts.

    ``p`` (N,) are the p-values, and ``level`` is the maximal risk. An answer without a p-value
    (NaN) is not accepted and not counted.

    Examples:
        >>> import numpy as np
        >>> from vilu.calibration.selection import select_answers
        >>> # The i-th smallest of 4 p-values is compared with the step i / 4 of the level. The
        >>> # steps are 0.02, 0.04, 0.06 and 0.08. The third p-value is below the third step. So
        >>> # the second answer is accepted, too, although 0.05 is above the second step.
        >>> select_answers(np.array([0.01, 0.05, 0.055, 0.5]), level=0.08).tolist()
        [True, True, True, False]
    """
    has_p_value = np.isfinite(p)
    ascending_p = np.sort(p[has_p_value])
    if not len(ascending_p):
        return has_p_value
    # If every p-value were compared with the level, a fixed share of all wrong answers would be
    # accepted, and these could be most of the accepted answers. So the i-th smallest of m p-values
    # is compared with i / m of the level (Benjamini and Hochberg 1995). This is valid although all
    # p-values depend on the same calibration rows (Jin & Candès).
    step_levels = level * np.arange(1, len(ascending_p) + 1) / len(ascending_p)
    # This is a step-up procedure: the largest p-value that is not above its step sets the limit. A
    # smaller p-value is accepted even if it is above its step.
    p_up_to_step = ascending_p[ascending_p <= step_levels]
    if not len(p_up_to_step):
        return np.zeros_like(has_p_value)
    limit = p_up_to_step.max()
    is_selected: NDArray[np.bool_] = has_p_value & (p <= limit)
    return is_selected


def choose_sample_rows(n: int) -> Ints:
    """Choose at most ``MAX_RULE_ROWS`` of n calibration rows for the rule, and return the indices.

    The rows are a random sample. The sample is the same in every call.
    """
    # The sample is random, because rows may be sorted by class. The first million would then hold
    # only some classes. Raw PCG64 numbers are the same in every NumPy version, while a Generator's
    # methods may change.
    generator = np.random.PCG64([MAX_RULE_ROWS, n])
    random_numbers = generator.random_raw(n)
    random_order = np.argsort(random_numbers)
    return random_order[:MAX_RULE_ROWS]

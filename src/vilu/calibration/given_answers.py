"""Warning if given answers are right for more of the fit rows than of the calibration rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import numpy as np

from vilu.callers import warn_caller
from vilu.errors import UNKNOWN
from vilu.outcomes.outcomes import Outcomes

MOST_STANDARD_ERRORS: Final = 3.0
"""Largest difference between the two accuracies, in standard errors, without a warning.

If both accuracies are equal apart from chance, about 1 calibration in 700 leads to a warning.
"""


def warn_of_in_sample_answers(fit_counts: Mapping[str, int] | None, rows: Outcomes) -> None:
    """Warn if given answers are right for clearly more of the fit rows than of these rows.

    A model is better on the rows that it was trained on. A predictor fitted on answers to such rows
    has seen too few failures, or failures unlike the failures on new rows. Let a be the accuracy on
    n fit rows, b the accuracy on m calibration rows, and p the accuracy on all n + m rows. There is
    a warning if

        a - b > 3 sqrt(p (1 - p) (1 / n + 1 / m)).

    Rows outside all classes are left out.

    Args:
        fit_counts: Number of fit rows (``n``), and number of right answers to fit rows
            (``n_right``). None if the fit used no given answers.
        rows: Calibration rows.

    Warns:
        UserWarning: If the fit accuracy is too high.
    """
    if fit_counts is None:
        return
    is_known = rows.failure != UNKNOWN
    if rows.outside is not None:
        is_known &= ~rows.outside
    failure = rows.failure[is_known]
    n = fit_counts["n"]
    m = len(failure)
    if n == 0 or m == 0:
        return
    n_right_of_fit = fit_counts["n_right"]
    n_right_of_rows = int(np.count_nonzero(failure == 0))
    fit_accuracy = n_right_of_fit / n
    accuracy = n_right_of_rows / m
    difference = fit_accuracy - accuracy
    total_accuracy = (n_right_of_fit + n_right_of_rows) / (n + m)
    variance_of_answer = total_accuracy * (1 - total_accuracy)
    standard_error = math.sqrt(variance_of_answer * (1 / n + 1 / m))
    if difference <= MOST_STANDARD_ERRORS * standard_error:
        return
    warn_caller(
        f"the given answers are right for {fit_accuracy:.1%} of {n:,} fit rows and for "
        f"{accuracy:.1%} of {m:,} calibration rows: a difference of {difference:.1%}, whose "
        f"standard error is {standard_error:.1%}. Was the answering model trained on the fit rows? "
        "Then the predictor has learned from answers that are too good. Fit it on answers that are "
        "out-of-fold, such as those of sklearn.model_selection.cross_val_predict."
    )

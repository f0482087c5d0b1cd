"""Conformal selection: which answers of a batch to accept, so that few of them are wrong.

The p-value of an answer is p = (1 + #{wrong calibration answers with u_i <= u}) / (1 + n), over all
n calibration answers: how rarely an answer is wrong and trusted as much. Benjamini-Hochberg at the
level of the risk over the batch then bounds the mean share of wrong answers among the accepted (0
where none is), over draws of calibration rows and batch. The batch decides the threshold, so a
row's decision depends on its neighbours, and rows must be judged together.

Source: Jin & Candès, Selection by Prediction with Conformal p-values (2023), with "the answer is
wrong" for null and their clipped score. With 1 + #wrong for 1 + n (Bates et al. 2023) the bound is
the level times the share of wrong answers, and less is accepted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vilu.metrics.counts import Floats, Ints

MAX_ROWS = 10**6
"""Rows of a calibration, whose scores stand in ``risk.json``; more would hardly move a p-value."""


def p_values(uncertainty: Floats, wrong: Sequence[float], n: int) -> Floats:
    """(N,) conformal p-values, NaN where there is no uncertainty.

    ``wrong`` are the uncertainties of the wrong answers, ascending, among ``n`` calibration rows.

    Examples:
        >>> import numpy as np
        >>> from vilu.calibration.selection import p_values
        >>> p_values(np.array([0.2, 0.3]), [0.3, 0.9], 4).tolist()
        [0.2, 0.4]
    """
    # The new answer counts as one of the wrong ones: without the 1 the smallest p-value would be 0,
    # and answers more trusted than all wrong ones would pass at every level.
    p: Floats = (1 + np.searchsorted(wrong, uncertainty, side="right")) / (1 + n)
    return np.where(np.isnan(uncertainty), np.nan, p)


def selected(p: Floats, level: float) -> NDArray[np.bool_]:
    """(N,) which answers Benjamini-Hochberg accepts.

    One without a p-value is none, and does not count.
    """
    scored = np.isfinite(p)
    ordered = np.sort(p[scored])
    if not len(ordered):
        return scored
    # Each p-value against the level itself would let a share of all wrong answers pass, which may
    # be most of the few that are accepted: hence the steps of Benjamini and Hochberg (1995). They
    # hold although all p-values share one calibration and so depend on one another (Jin & Candès).
    steps = level * np.arange(1, len(ordered) + 1) / len(ordered)
    # the last one that passes, even where a smaller one does not: the procedure steps up
    passed = np.flatnonzero(ordered <= steps)
    if not len(passed):
        return np.zeros_like(scored)
    accepted: NDArray[np.bool_] = scored & (p <= ordered[passed[-1]])
    return accepted


def drawn(n: int) -> Ints:
    """Places of the rows of n that a rule is made from, the same every time."""
    # At random: of rows that lie sorted by class the first million would know some classes alone.
    # Raw numbers of PCG64 stay the same in every version of NumPy, those of a Generator may not.
    stream = np.random.PCG64([MAX_ROWS, n]).random_raw(n)
    return np.argsort(stream)[:MAX_ROWS]

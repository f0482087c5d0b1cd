"""Rates that must not be exceeded while a promise for stated shares holds.

Each is watched by an ``Audit``, as the error rate of accepted answers is.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from vilu.calibration.monitor.audit import Audit, TestName
from vilu.calibration.rules import Rule
from vilu.calibration.shares import Strata
from vilu.calibration.thresholds import percent, upper_bound
from vilu.outcomes.outcomes import Outcomes

LEAST: Final = 1e-3
"""A smaller share of strangers than this is not told from it; a stated share of 0 is watched as this."""


def rates_of(rule: Rule | None, calibration: Outcomes, level: float) -> dict[TestName, Audit]:
    """Rates that must not be exceeded while a promise for stated shares holds; none for other rules.

    "outside": share of strangers among labelled rows, at most the stated one. "review": share of
    rows that the rule leaves for review. With d_s the rate in stratum s, strangers at a share p' give
    (1 - p') d_in + p' d_out, which over all p' up to the stated p is largest at an end; for every
    d_s stands its Clopper-Pearson bound from above, of which all together take half of the level,
    and the bets the other half.
    """
    if rule is None or not rule.reweighted or not rule.feasible:
        return {}
    found: dict[TestName, Audit] = {}
    if rule.outside_share is not None:
        found["outside"] = Audit(max(rule.outside_share, LEAST), level)
    most = _reviewed_at_most(rule, calibration.take(calibration.evaluable), level / 2)
    if most < 1:
        found["review"] = Audit(most, level / 2)
    return found


def _reviewed_at_most(rule: Rule, rows: Outcomes, delta: float) -> float:
    strata = Strata(rows, rule.outside_share, rule.class_shares)
    to_review = np.bincount(
        strata.stratum[~rule.accept(rows.uncertainty)], minlength=len(strata.names)
    )
    each = delta / int(np.count_nonzero(strata.share))
    bounds = np.array(
        [upper_bound(int(k), int(n), each) for k, n in zip(to_review, strata.n, strict=True)]
    )
    strangers = float(strata.share[-1])
    within = float(strata.share[:-1] @ bounds[:-1]) / (1 - strangers)
    return max(within, (1 - strangers) * within + strangers * float(bounds[-1]))


def strangers_in_words(audit: Audit, stated: float) -> str:
    """The share of strangers among the labelled rows, with bounds that hold at all times together."""
    return (
        f"{audit.wrong} of {audit.n} labelled rows are of none of the classes (share "
        f"{percent(audit.lower, 2, math.floor)} to {percent(audit.upper)}, each bound with confidence "
        f"{percent(1 - audit.delta, 2, math.floor)}; stated: at most {percent(stated, 2, math.floor)})"
    )

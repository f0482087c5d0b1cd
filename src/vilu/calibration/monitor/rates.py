"""Rates that must not be exceeded while a guarantee for stated shares holds.

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
"""Least share of out-of-distribution images that is watched for, where a smaller one was stated."""


def rates_of(rule: Rule | None, calibration: Outcomes, level: float) -> dict[TestName, Audit]:
    """Rates that must not be exceeded while a guarantee for stated shares holds.

    There are none for other rules.

    - "outside": share of out-of-distribution images among labelled rows, at most the stated one.
    - "review": share of rows that the rule leaves for review. With d_s the rate in stratum s,
      out-of-distribution images at a share p' give (1 - p') d_in + p' d_out, which over all p' up
      to the stated p is largest at an end. For every d_s stands its Clopper-Pearson bound from
      above, of which all together take half of the level, and the bets the other half.
    """
    if rule is None or not rule.reweighted or not rule.feasible:
        return {}
    rates: dict[TestName, Audit] = {}
    if rule.outside_share is not None:
        rates["outside"] = Audit(max(rule.outside_share, LEAST), level)
    most = _reviewed_at_most(rule, calibration.take(calibration.evaluable), level / 2)
    if most < 1:
        rates["review"] = Audit(most, level / 2)
    return rates


def _reviewed_at_most(rule: Rule, rows: Outcomes, delta: float) -> float:
    """Bound from above of the share of rows that is left for review, at the stated shares."""
    strata = Strata(rows, rule.outside_share, rule.class_shares)
    is_reviewed = ~rule.accept(rows.uncertainty)
    n_reviewed = np.bincount(strata.stratum[is_reviewed], minlength=len(strata.names))
    # all bounds must hold at once, so they share delta (union bound)
    delta_of_stratum = delta / int(np.count_nonzero(strata.share))
    bounds = []
    for k, n in zip(n_reviewed.tolist(), strata.n.tolist(), strict=True):
        bounds.append(upper_bound(k, n, delta_of_stratum))
    ood_share = float(strata.share[-1])
    within = float(strata.share[:-1] @ np.array(bounds[:-1])) / (1 - ood_share)
    # The true share may be any up to the stated one. The rate is linear in it, so one of the ends
    # is the worst; with the stated share alone fewer of such images could raise an alarm.
    return max(within, (1 - ood_share) * within + ood_share * bounds[-1])


def ood_in_words(audit: Audit, stated: float) -> str:
    """The share of out-of-distribution rows among labelled ones, with bounds valid at any time."""
    lower = percent(audit.lower, 2, math.floor)
    upper = percent(audit.upper)
    confidence = percent(1 - audit.delta, 2, math.floor)
    most = percent(stated, 2, math.floor)
    return (
        f"{audit.wrong} of {audit.n} labelled rows are of none of the classes (share {lower} to "
        f"{upper}, each bound with confidence {confidence}; stated: at most {most})"
    )

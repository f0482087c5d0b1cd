"""Rates that stay below an upper limit as long as a guarantee for stated shares holds.

Each rate is monitored by an ``Audit``, like the error rate among accepted answers.
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

MIN_OOD_LIMIT: Final = 1e-3
"""Limit for the out-of-distribution share, if a smaller share was stated."""


def make_rate_audits(
    rule: Rule | None, calibration: Outcomes, level: float
) -> dict[TestName, Audit]:
    """Return audits for the rates that a guarantee for stated shares keeps below a limit.

    Rules without stated shares have no such rates. ``level`` is the probability that a rate's audit
    ever raises a false alarm.

    - "outside": the share of out-of-distribution images among labelled rows. The limit is the
      stated share, but at least ``MIN_OOD_LIMIT``.
    - "review": the share of rows left for review. Let d_in be this share among images within the
      classes, and d_out this share among out-of-distribution images. If the share of
      out-of-distribution images is p', the rate is

          (1 - p') d_in + p' d_out.

      The limit is the maximum over all p' from 0 to the stated share, computed with upper
      Clopper-Pearson bounds on the rates in all strata. These bounds together take one half of the
      level, and the audit takes the other half.
    """
    if rule is None or not rule.reweighted or not rule.feasible:
        return {}
    rate_audits: dict[TestName, Audit] = {}
    if rule.outside_share is not None:
        rate_audits["outside"] = Audit(limit=max(rule.outside_share, MIN_OOD_LIMIT), delta=level)
    labelled_rows = calibration.take(calibration.evaluable)
    review_limit = _largest_review_share(rule, labelled_rows, level / 2)
    if review_limit < 1:
        rate_audits["review"] = Audit(limit=review_limit, delta=level / 2)
    return rate_audits


def _largest_review_share(rule: Rule, rows: Outcomes, delta: float) -> float:
    """Return an upper bound on the share of rows left for review, at the stated shares.

    ``rows`` are the calibration rows with a label. The bound holds with confidence 1 - delta.
    """
    strata = Strata(rows, rule.outside_share, rule.class_shares)
    is_reviewed = ~rule.accept(rows.uncertainty)
    n_reviewed = np.bincount(strata.stratum[is_reviewed], minlength=len(strata.names))
    # All bounds must hold together, so delta is divided among the strata (union bound).
    delta_of_stratum = delta / int(np.count_nonzero(strata.share))
    bounds = []
    for n_reviewed_here, n_here in zip(n_reviewed.tolist(), strata.n_rows.tolist(), strict=True):
        bound = upper_bound(n_reviewed_here, n_here, delta_of_stratum)
        bounds.append(bound)
    *class_bounds, ood_bound = bounds  # out-of-distribution rows are the last stratum
    ood_share = float(strata.share[-1])
    class_shares = strata.share[:-1]  # these shares add up to 1 - ood_share
    inside_bound = float(class_shares @ np.array(class_bounds)) / (1 - ood_share)
    # The true out-of-distribution share may be any number from 0 to the stated share. The
    # rate is linear in this share, so the maximum is at 0 or at the stated share. If only the rate
    # at the stated share were the limit, fewer such images than stated could raise a false alarm.
    bound_at_stated_share = (1 - ood_share) * inside_bound + ood_share * ood_bound
    return max(inside_bound, bound_at_stated_share)


def ood_in_words(audit: Audit, stated_share: float) -> str:
    """Say which share of labelled rows is out of distribution, with bounds.

    The bounds hold after every label. ``audit`` is the audit on this share, and ``stated_share`` is
    the stated share.
    """
    lower = percent(audit.lower, rounding=math.floor)
    upper = percent(audit.upper)
    confidence = percent(1 - audit.delta, rounding=math.floor)
    largest_share = percent(stated_share, rounding=math.floor)
    return (
        f"{audit.n_wrong} of {audit.n_audited} labelled rows are of none of the classes (share "
        f"{lower} to {upper}, each bound with confidence {confidence}; stated: at most "
        f"{largest_share})"
    )

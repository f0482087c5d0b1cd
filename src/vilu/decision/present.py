"""Whether the present shares are those that a promise was stated for: more strangers, or more to abstain from?"""

from __future__ import annotations

from typing import Final

import numpy as np

from vilu.decision.audit import Audit
from vilu.decision.calibrate import Selector
from vilu.decision.shares import Strata
from vilu.decision.status import TestName
from vilu.decision.thresholds import upper_bound
from vilu.outcomes.outcomes import Outcomes

LEAST: Final = 1e-3
"""A smaller share of strangers than this is not told from it; a stated share of 0 is watched as this."""


def rates_of(rule: Selector | None, calibration: Outcomes, level: float) -> dict[TestName, Audit]:
    """Rates that must not be exceeded while a promise for stated shares holds; none for other rules.

    "outside": share of strangers among labelled rows, at most the stated one. "abstained": share of rows that the rule
    abstains from. With d_s the rate in stratum s, strangers at a share p' give (1 - p') d_in + p' d_out, which over all
    p' up to the stated p is largest at an end; for every d_s stands its Clopper-Pearson bound from above, of which all
    together take half of the level, and the bets the other half.
    """
    if rule is None or not rule.reweighted or not rule.feasible:
        return {}
    found: dict[TestName, Audit] = {}
    if rule.outside_share is not None:
        found["outside"] = Audit(max(rule.outside_share, LEAST), level)
    most = _abstained_at_most(rule, calibration.take(calibration.evaluable), level / 2)
    if most < 1:
        found["abstained"] = Audit(most, level / 2)
    return found


def _abstained_at_most(rule: Selector, rows: Outcomes, delta: float) -> float:
    strata = Strata(rows, rule.outside_share, rule.class_shares)
    abstained = np.bincount(strata.stratum[~rule.accept(rows.uncertainty)], minlength=len(strata.names))
    n, share = strata.n.tolist(), strata.share
    counted = int(np.count_nonzero(share))
    bounds = np.array(
        [upper_bound(int(k), m, delta / counted) if m else 1.0 for k, m in zip(abstained, n, strict=True)]
    )
    strangers = float(share[-1])
    within = float(share[:-1] @ bounds[:-1]) / (1 - strangers)
    return max(within, (1 - strangers) * within + strangers * float(bounds[-1]))


def in_words(audit: Audit, stated: float) -> str:
    """The share of strangers among the labelled rows, with bounds that hold at all times together."""
    return (
        f"{audit.wrong} of {audit.n} labelled rows are of none of the classes (share {audit.lower:.2%} to "
        f"{audit.upper:.2%}, each bound with confidence {1 - audit.delta:.2%}; stated: at most {stated:.2%})"
    )

"""Thresholds that bound wrong rows per accepted row, however the rows of a cluster correlate.

**One threshold.** A cluster c has at most M rows. Let

    Z_c(t) = sum over its rows of 1{u <= t} (wrong - r),    r = max_risk.

The clusters are independent draws, whatever happens within them. The error rate R(t) of the
accepted rows is r or more where E[Z_c(t)] >= 0. Z_c(t) is at most (1 - r) M. So for a fixed bet b
in (0, 1) every factor of

    E(t) = prod_c (1 - b Z_c(t) / ((1 - r) M))

is positive, and E[E(t)] <= 1 where R(t) >= r. The same holds for the mean of E(t) over several
bets, which is used here. H_t, "R(t) is r or more", is rejected at level a where E(t) >= 1 / a
(Markov's inequality). With M = 1 these are the bets of ``vilu.calibration.anytime``.

**Starts.** A random tenth of the clusters is set aside. The scores of its rows, not their labels,
fix the thresholds at which sequences start: 25, 50, 70 and 90 % of these rows lie below them. The
tenth itself is not tested. So for the clusters that are tested, the starts are fixed thresholds.

**Fixed sequences.** From a start on, thresholds are tested from strict to lax until one H_t is not
rejected. A sequence that reaches the start of the next one adds its level to that of the next one
(Wiens 2003).

**Proof.** Condition on the tenth that is set aside.

1. Let t* be the first threshold from a start on at which H_t is true. R(t) is continuous from the
   right, so there is a first one. It does not depend on the tested rows. So E[E(t*)] <= 1.
2. The sequence certifies a wrong threshold only if it has rejected H_t*. At level a this has a
   probability of at most a.
3. A level is passed on only if all H_t before the next start were rejected. So before a true H_t
   is rejected, the levels at which different t* are tested add up to at most delta.

R(t) may cross r as often as it likes, and scores may be equal. ``benchmarks/clusters.py`` simulates
the procedure.

Source: Angelopoulos et al., Learn then Test (2021), for the frame; Waudby-Smith and Ramdas,
Estimating means of bounded random variables by betting (2023), for the product.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np

from vilu.calibration.anytime import BETS, flawless_labels
from vilu.calibration.thresholds import Threshold
from vilu.metrics.counts import Floats, Ints, tie_counts

SHARE_ASIDE: Final = 0.1
"""Share of the clusters that is set aside for the starts."""

STARTS: Final = ((0.25, 0.2), (0.5, 0.3), (0.7, 0.3), (0.9, 0.2), (1.0, 0.0))
"""A pair for every sequence: share of the rows of the tenth, and share of the level.

A sequence starts at the score up to which this share of the rows lies. The last sequence has no
level of its own. It gets the levels that no earlier sequence can use.
"""


class LabelledRows(NamedTuple):
    """Rows with a label, their clusters, and the bound M of the size of a cluster."""

    uncertainty: Floats  # (N,)
    failure: Ints  # (N,) 1 where the answer is wrong, 0 where it is right
    cluster: Ints  # (N,) index of the cluster
    largest: int  # M, which must not be chosen by the labels

    @property
    def n_clusters(self) -> int:
        """Number of clusters with a row."""
        return len(np.unique(self.cluster))


def ratio_threshold(
    rows: LabelledRows, start_rows: LabelledRows, max_risk: float, delta: float
) -> Threshold:
    """The laxest threshold at which at most ``max_risk`` of the accepted rows are wrong.

    The probability that more are wrong is at most ``delta``. If nothing is certified, the threshold
    accepts nothing and says why. ``start_rows`` are the rows of the tenth that fixes the starts.
    """
    counts = tie_counts(rows.uncertainty, rows.failure)
    # No threshold separates rows with equal scores. So the evidence for a score is taken at the
    # last row with this score.
    last_of_score = counts.accepted - 1
    evidence = _evidence(rows, max_risk)[last_of_score]
    levels = _level_at_start(rows, start_rows, max_risk, delta)
    index = _laxest(counts.value, evidence, levels)
    if index is None:
        return Threshold.nothing(len(rows.failure), _why_nothing(rows, start_rows, max_risk, delta))
    return Threshold.at(counts, index, max_risk)


def _laxest(scores: Floats, log_e: Floats, levels: dict[float, float]) -> int | None:
    """Index of the laxest of the scores (G,) that the sequences certify, from log evidence (G,)."""
    carried_level = 0.0
    laxest = None
    for start, end in pairwise([*sorted(levels), math.inf]):
        level = carried_level + levels[start]
        carried_level = 0.0  # unless this sequence reaches the start of the next one
        # The start need not be one of the scores. A threshold between two scores accepts the same
        # rows as the lower one, so its evidence is that of the last score up to the start.
        first = int(np.searchsorted(scores, start, side="right")) - 1
        last = int(np.searchsorted(scores, end, side="right")) - 1
        if first < 0:
            continue
        not_rejected = first + np.flatnonzero(log_e[first : last + 1] < -math.log(level))
        first_not_rejected = int(min(not_rejected, default=last + 1))
        # A score below the start was not tested, so it is not certified.
        is_certified = first_not_rejected > first and scores[first_not_rejected - 1] >= start
        if is_certified:
            laxest = first_not_rejected - 1
        if first_not_rejected > last:
            carried_level = level
    return laxest


def _evidence(rows: LabelledRows, max_risk: float) -> Floats:
    """Log evidence (N,) after every row, in ascending order of scores.

    It is log E(t) of a threshold t that accepts this row and all rows before it.
    """
    by_score = np.argsort(rows.uncertainty, kind="stable")
    cluster = rows.cluster[by_score]
    by_cluster = np.argsort(cluster, kind="stable")  # keeps the order of scores within a cluster
    ordered = cluster[by_cluster]
    gain = (rows.failure[by_score][by_cluster] == 1) - max_risk
    is_first = np.ones(len(ordered), dtype=np.bool_)  # first row of its cluster
    is_first[1:] = ordered[1:] != ordered[:-1]
    # Z_c after a row: the running total over all clusters, minus the total before its cluster began
    total = np.cumsum(gain)
    total_before = total - gain
    # for each row, the index of the first row of its cluster
    first_of_row = np.maximum.accumulate(np.where(is_first, np.arange(len(ordered)), 0))
    z_with_row = total - total_before[first_of_row]
    z_before_row = np.where(is_first, 0.0, z_with_row - gain)
    bet, share = np.array(BETS).T
    scaled_bet = bet[:, None] / ((1 - max_risk) * rows.largest)
    # One more accepted row replaces the factor of its cluster and leaves all others as they are.
    log_with_row = np.log1p(-scaled_bet * z_with_row)
    log_before_row = np.log1p(-scaled_bet * z_before_row)
    change = np.empty((len(bet), len(ordered)))
    change[:, by_cluster] = log_with_row - log_before_row  # in ascending order of scores again
    log_wealth = np.log(share)[:, None] + change.cumsum(axis=1)
    log_evidence: Floats = np.logaddexp.reduce(log_wealth, axis=0)
    return log_evidence


def _level_at_start(
    rows: LabelledRows, start_rows: LabelledRows, max_risk: float, delta: float
) -> dict[float, float]:
    """Level of each sequence, by the threshold at which it starts.

    A sequence that could reject nothing, even if all answers were right, gives its level to the
    next one.
    """
    ordered = np.sort(start_rows.uncertainty)
    # The tested rows must not move a start, so their number is expected from the tenth.
    rows_expected = len(ordered) * rows.n_clusters / start_rows.n_clusters
    levels: dict[float, float] = {}
    level = 0.0
    for row_share, level_share in STARTS:
        level += delta * level_share
        if level == 0:
            continue
        # With ``anytime``, one right answer wins as much as a full cluster here, which has
        # M = rows.largest rows, all of them right. So n rows count as n / M full clusters.
        full_clusters = row_share * rows_expected / rows.largest
        could_reject = full_clusters >= flawless_labels(max_risk, level)
        if could_reject or row_share == 1:
            start = float(ordered[math.ceil(row_share * len(ordered)) - 1])
            levels[start] = levels.get(start, 0.0) + level
            level = 0.0
    return levels


def _why_nothing(
    rows: LabelledRows, start_rows: LabelledRows, max_risk: float, delta: float
) -> str:
    """Why no threshold is certified."""
    n_clusters = rows.n_clusters + start_rows.n_clusters
    mean_size = (len(rows.cluster) + len(start_rows.cluster)) / n_clusters
    # Even if every tested cluster had M rows, all right, so many would be needed.
    n_tested_needed = flawless_labels(max_risk, delta)
    n_needed = math.ceil(n_tested_needed / (1 - SHARE_ASIDE))
    sizes = f"{n_clusters:,} clusters of {mean_size:.1f} labelled rows on average"
    if n_clusters < n_needed:
        return f"{sizes} are too few: a risk of {max_risk:.2%} needs {n_needed:,} at least"
    return (
        f"{sizes} do not show a risk of {max_risk:.2%}, as all {rows.largest:,} rows of a cluster "
        "might be wrong at once. More clusters, scores that rank better, or a smaller "
        "bound on the size of a cluster help: larger clusters are then left for review"
    )

"""Thresholds that bound wrong rows per accepted row, however the rows of a cluster correlate.

**One threshold.** A cluster c has at most M rows. Let

    Z_c(t) = sum over its rows of 1{u <= t} (wrong - r),    r = max_risk.

The clusters are independent draws, whatever happens within them. The error rate R(t) of the
accepted rows is above r where E[Z_c(t)] > 0. Z_c(t) is at most (1 - r) M. So for a fixed bet b in
(0, 1) every factor of

    E(t) = prod_c (1 - b Z_c(t) / ((1 - r) M))

is positive, and E[E(t)] <= 1 where R(t) >= r. The same holds for the mean of E(t) over several
bets, which is used here. H_t, "R(t) is above r", is rejected at level a where E(t) >= 1 / a
(Markov's inequality). With M = 1 these are the bets of ``vilu.calibration.anytime``.

**Fixed sequences.** Thresholds are tested from strict to lax until one H_t is not rejected. Three
sequences start where 1/4, 1/2 and 4/5 of the clusters have an accepted row. A sequence that reaches
the start of the next one adds its level to that of the next one (Wiens 2003).

**Proof, for scores without ties, if R(t) crosses r once.** Let t* be the crossing, T the start of a
sequence, at which k clusters have an accepted row, and a its level.

1. T < t*. The sequence errs only if E(t*) >= 1 / a. Condition on the number K >= k of clusters with
   a row up to t*. They are independent draws, the others have the factor 1, and R(t*) = r. So
   E[E(t*) | K] <= 1, and the sequence errs with probability at most a P[T < t*].
2. T >= t*. One cluster has its first accepted row at T. Given T, the k - 1 clusters with a row
   before T are independent draws with E[Z(T)] >= 0, and the others but this one have the factor 1.
   So the first test leaves this cluster out, and it rejects with probability at most a P[T >= t*].
3. A level is passed on only if all H_t before the next start were rejected. So the levels at which
   the first true H_t is met add up to at most delta.

If R(t) crosses r several times, the proof is about the first crossing after every start only.
``benchmarks/clusters.py`` simulates the procedure, that case too.

Source: Angelopoulos et al., Learn then Test (2021), for the frame; Waudby-Smith and Ramdas,
Estimating means of bounded random variables by betting (2023), for the product.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vilu.calibration.anytime import BETS, flawless_labels
from vilu.calibration.thresholds import Threshold
from vilu.metrics.counts import Floats, Ints, tie_counts

STARTS: Final = ((1 / 4, 0.2), (1 / 2, 0.4), (4 / 5, 0.4))
"""A pair for every sequence of thresholds: share of the clusters, and share of the level.

A sequence starts at the score at which this share of the clusters has an accepted row.
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


def ratio_threshold(rows: LabelledRows, max_risk: float, delta: float) -> Threshold:
    """The laxest threshold at which at most ``max_risk`` of the accepted rows are wrong.

    The probability that more are wrong is at most ``delta``. If nothing is certified, the threshold
    accepts nothing and says why.
    """
    counts = tie_counts(rows.uncertainty, rows.failure)
    # No threshold separates rows with equal scores. So evidence is taken at the last row of each.
    last_of_score = counts.accepted - 1
    is_first, evidence = _evidence(rows, max_risk)
    n_clusters = np.cumsum(is_first, dtype=np.int64)[last_of_score]
    levels = _level_at_start(n_clusters, max_risk, delta)
    index = _laxest(evidence[last_of_score], levels)
    if index is None:
        return Threshold.nothing(len(rows.failure), _why_nothing(rows, max_risk, delta))
    return Threshold.at(counts, index, max_risk)


def _laxest(log_e: Floats, levels: dict[int, float]) -> int | None:
    """Index of the laxest threshold that the sequences certify, from log evidence (G,)."""
    carried = 0.0
    laxest = None
    for start, end in pairwise([*sorted(levels), len(log_e)]):
        level = carried + levels[start]
        needed = -math.log(level)
        # The cluster whose row is the start is no random draw, so the first test is without it.
        without_it = log_e[start - 1] if start else 0.0
        not_rejected = start + np.flatnonzero(log_e[start:end] < needed)
        first_not_rejected = int(min(not_rejected, default=end))
        if without_it < needed:
            first_not_rejected = start
        if first_not_rejected > start:
            laxest = first_not_rejected - 1
        carried = level if first_not_rejected == end else 0.0
    return laxest


def _evidence(rows: LabelledRows, max_risk: float) -> tuple[NDArray[np.bool_], Floats]:
    """For the N rows in ascending order of scores: whether one is the first of its cluster; log E.

    log E (N,) is the log evidence if this row and all rows before it are accepted.
    """
    by_score = np.argsort(rows.uncertainty, kind="stable")
    cluster = rows.cluster[by_score]
    by_cluster = np.argsort(cluster, kind="stable")  # keeps the order of scores within a cluster
    ordered = cluster[by_cluster]
    gain = (rows.failure[by_score][by_cluster] == 1) - max_risk
    is_first = np.ones(len(ordered), dtype=np.bool_)
    is_first[1:] = ordered[1:] != ordered[:-1]
    total = np.cumsum(gain)
    first_of_row = np.maximum.accumulate(np.where(is_first, np.arange(len(ordered)), 0))
    z_with_row = total - (total - gain)[first_of_row]
    z_before_row = np.where(is_first, 0.0, z_with_row - gain)
    bet, share = np.array(BETS).T
    scaled_bet = bet[:, None] / ((1 - max_risk) * rows.largest)
    # One more accepted row replaces the factor of its cluster and leaves all others as they are.
    log_with_row = np.log1p(-scaled_bet * z_with_row)
    log_before_row = np.log1p(-scaled_bet * z_before_row)
    change = np.empty((len(bet), len(ordered)))
    change[:, by_cluster] = log_with_row - log_before_row
    first_in_order = np.empty(len(ordered), dtype=np.bool_)
    first_in_order[by_cluster] = is_first
    log_wealth = np.log(share)[:, None] + change.cumsum(axis=1)
    return first_in_order, np.logaddexp.reduce(log_wealth, axis=0)


def _level_at_start(n_clusters: Ints, max_risk: float, delta: float) -> dict[int, float]:
    """Level of each sequence, by the index of the score at which it starts.

    ``n_clusters`` (G,) is the number of clusters with a row up to every score. A sequence that
    could reject nothing, even if all answers were right, gives its level to the next one.
    """
    total = int(n_clusters[-1])
    last_share, _ = STARTS[-1]
    levels: dict[int, float] = {}
    level = 0.0
    for clusters_share, level_share in STARTS:
        level += delta * level_share
        first_clusters = math.ceil(total * clusters_share)
        # A cluster of M right rows wins as much as one right answer wins with ``anytime``, and
        # smaller clusters win less. One cluster more is needed, as the first test leaves one out.
        fewest = flawless_labels(max_risk, level) + 1
        if clusters_share == last_share:
            first_clusters = max(first_clusters, fewest)
        # Starts depend on numbers of clusters only. Starts that depend on labels would be a choice
        # among many tests.
        if fewest <= first_clusters <= total:
            index = int(np.searchsorted(n_clusters, first_clusters))
            levels[index] = levels.get(index, 0.0) + level
            level = 0.0
    return levels


def _why_nothing(rows: LabelledRows, max_risk: float, delta: float) -> str:
    """Why no threshold is certified."""
    n_clusters = rows.n_clusters
    mean_size = len(rows.cluster) / n_clusters
    # Even if every cluster had M rows, all right, so many would be needed.
    fewest = flawless_labels(max_risk, delta) + 1
    sizes = f"{n_clusters:,} clusters of {mean_size:.1f} labelled rows on average"
    if n_clusters < fewest:
        return f"{sizes} are too few: a risk of {max_risk:.2%} needs {fewest:,} at least"
    return (
        f"{sizes} do not show a risk of {max_risk:.2%}, as all {rows.largest:,} rows of a cluster "
        "might be wrong at once. More clusters, scores that rank better, or a smaller largest "
        "size help: larger clusters are then left for review"
    )

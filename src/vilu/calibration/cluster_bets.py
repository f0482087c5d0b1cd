"""Thresholds with a bound on wrong rows per accepted row, for any correlation in clusters.

**Single threshold.** A cluster c has at most M rows. Let

    Z_c(t) = sum over the rows in c of 1{u <= t} (wrong - r),    r = max_risk.

The clusters are independent draws, for any dependence within clusters. The error rate R(t) among
accepted rows is r or more where E[Z_c(t)] >= 0. Z_c(t) is at most (1 - r) M. So for a fixed bet b
in (0, 1) every factor of

    E(t) = prod_c (1 - b Z_c(t) / ((1 - r) M))

is positive, and E[E(t)] <= 1 where R(t) >= r. The evidence used here is the mean E(t) over several
bets. The inequality holds for this mean, too. H_t, "R(t) is r or more", is rejected at level a
where E(t) >= 1 / a (Markov's inequality). With M = 1 these are the bets in
``vilu.calibration.anytime``.

**Starts.** A random tenth of the clusters is set aside. The scores in this tenth fix the thresholds
at which sequences of tests start: the quantiles 25, 50, 70, 90 and 100 % of these scores. Labels
have no effect. The clusters set aside are not tested. So for the tested clusters, the starts are
fixed thresholds.

**Fixed sequences.** From a start on, thresholds are tested from strict to lax until an H_t is not
rejected. If a sequence reaches the start of the next sequence, the next sequence's level grows by
the earlier sequence's level (Wiens 2003).

**Proof.** Condition on the tenth of the clusters set aside.

1. Let t* be the first threshold from a start on with a true H_t. R(t) is continuous from the right,
   so t* exists if any such H_t is true. t* does not depend on the tested rows. So E[E(t*)] <= 1.
2. The sequence certifies a wrong threshold only after rejecting H_t*. At level a this has a
   probability of at most a.
3. A level is passed on only if all H_t before the next start were rejected. So before a true H_t
   is rejected, the levels at which different t* are tested add up to at most delta.

**No largest size given.** Then M is the size of the largest calibration cluster. This cluster, the
sizing cluster, is no random draw. If several clusters have M rows, the one with the smallest name
hash is the sizing cluster. It is tested with max(Z_c, 0) in place of Z_c, so it can lower the
evidence, and cannot raise it. It must not be left out: of k + 1 clusters with M rows, the test
would then see only k.

Proof. A cluster of up to M rows has M rows with the probability q. Let f be the mean of the factor
1 - b Z_c(t) / ((1 - r) M) for the clusters with M rows, and f' this mean with max(Z_c, 0) in place
of Z_c. At least one of n clusters has M rows.
Under this condition, the mean of E(t) is at most

    f' / f (1 - (1 - q f)^n) / (1 - (1 - q)^n) <= 1    where R(t) >= r,

because f' <= f and f' <= 1, and (1 - (1 - q f)^n) / f falls as f rises. The mean stays at most 1
if clusters are set aside, given how many of these have M rows.

R(t) may cross r any number of times, and scores may be equal. ``benchmarks/clusters.py`` simulates
the procedure.

Sources: Angelopoulos et al., Learn then Test (2021), for the frame. Waudby-Smith and Ramdas,
Estimating means of bounded random variables by betting (2023), for the product.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np

from vilu.calibration.anytime import BETS_WITH_SHARES, n_right_labels_needed
from vilu.calibration.thresholds import Threshold
from vilu.metrics.counts import Floats, Ints, tie_counts

SHARE_ASIDE: Final = 0.1
"""Share of the clusters set aside for the starts."""

SEQUENCE_STARTS: Final = ((0.25, 0.2), (0.5, 0.3), (0.7, 0.3), (0.9, 0.2), (1.0, 0.0))
"""For every sequence: quantile of the scores at the start, and the share of the level.

The quantile is taken over the rows set aside. The last sequence has the share 0, and gets
the levels that no earlier sequence can use.
"""


class LabelledRows(NamedTuple):
    """Rows with a label, the rows' clusters, and M, the largest allowed cluster size."""

    uncertainty: Floats  # (N,)
    failure: Ints  # (N,) 1 for a wrong answer, 0 for a right answer
    cluster: Ints  # (N,) index of the cluster
    largest_cluster: int  # M, which must not depend on the labels
    # index of the cluster that gave M, or None if M was given
    sizing_cluster: int | None = None

    @property
    def n_clusters(self) -> int:
        """Number of clusters with these rows."""
        return len(np.unique(self.cluster))


def ratio_threshold(
    rows: LabelledRows, start_rows: LabelledRows, max_risk: float, delta: float
) -> Threshold:
    """Return the laxest certified threshold: at most ``max_risk`` of the accepted rows are wrong.

    The probability of a larger error rate is at most ``delta``. If nothing is certified, the
    threshold accepts nothing and says why. ``start_rows`` are the rows in the clusters set aside.
    The scores of ``start_rows`` fix the starts.
    """
    counts = tie_counts(rows.uncertainty, rows.failure)
    # No threshold separates rows with equal scores. So the evidence for a score is taken at the
    # last row with this score.
    last_row_of_score = counts.accepted - 1
    evidence = _evidence_after_rows(rows, max_risk)[last_row_of_score]
    levels = _level_at_start(rows, start_rows, max_risk, delta)
    index = _index_of_laxest_certified_threshold(counts.value, evidence, levels)
    if index is None:
        reason = _reason_for_nothing(rows, start_rows, max_risk, delta)
        return Threshold.accepting_nothing(len(rows.failure), reason)
    return Threshold.at(counts, index, max_risk)


def _index_of_laxest_certified_threshold(
    scores: Floats, log_e: Floats, levels: dict[float, float]
) -> int | None:
    """Return the index of the largest score that is a certified threshold, or None.

    Args:
        scores: Distinct scores (G,), ascending.
        log_e: Log evidence (G,) against H_t at each score t.
        levels: Maps each sequence's start to the sequence's level.
    """
    carried_level = 0.0
    laxest_index = None
    for start_score, end_score in pairwise([*sorted(levels), math.inf]):
        level = carried_level + levels[start_score]
        carried_level = 0.0  # unless this sequence reaches the start of the next sequence
        # The start may lie between two scores. A threshold between two scores accepts the same rows
        # as the lower score. So the evidence at the last score up to the start is used.
        first_index = int(np.searchsorted(scores, start_score, side="right")) - 1
        last_index = int(np.searchsorted(scores, end_score, side="right")) - 1
        if first_index < 0:  # all scores are above the start
            continue
        tested_log_e = log_e[first_index : last_index + 1]
        indices_not_rejected = first_index + np.flatnonzero(tested_log_e < -math.log(level))
        # ``last_index + 1`` if every threshold is rejected
        first_not_rejected = int(min(indices_not_rejected, default=last_index + 1))
        # The first score may lie below the start. Such a score was not tested as a threshold, and
        # so is not certified.
        was_any_rejected = first_not_rejected > first_index
        if was_any_rejected and scores[first_not_rejected - 1] >= start_score:
            laxest_index = first_not_rejected - 1
        if first_not_rejected > last_index:
            carried_level = level
    return laxest_index


def _evidence_after_rows(rows: LabelledRows, max_risk: float) -> Floats:
    """Return the log evidence (N,) after each row, in ascending score order.

    A row's entry is log E(t) for a threshold t that accepts this row and all earlier rows.

    Examples:
        >>> import numpy as np
        >>> from vilu.calibration.cluster_bets import LabelledRows, _evidence_after_rows
        >>> # Two right rows in cluster 0, and between their scores a wrong row in cluster 1. With
        >>> # r = 1/2 and M = 2, (1 - r) M is 1. Z of cluster 0 is -1/2 and then -1, and Z of
        >>> # cluster 1 is 1/2. So a bet b has the wealth 1 + b/2, then (1 + b/2) (1 - b/2), and
        >>> # then (1 + b) (1 - b/2). The mean of b is 0.7525, and the mean of b^2 is 0.611375.
        >>> uncertainty, failure, cluster = np.array([[0.1, 0.2, 0.3], [0, 1, 0], [0, 1, 0]])
        >>> rows = LabelledRows(uncertainty, failure, cluster.astype(int), largest_cluster=2)
        >>> np.exp(_evidence_after_rows(rows, max_risk=0.5)).round(3).tolist()
        [1.376, 0.847, 1.071]
    """
    ascending_rows = np.argsort(rows.uncertainty, kind="stable")
    is_wrong = rows.failure[ascending_rows] == 1
    cluster = rows.cluster[ascending_rows]
    sum_before_row, sum_with_row = _cluster_sums(is_wrong - max_risk, cluster)
    # The sizing cluster is no random draw. So it may lower the evidence, and never raises it.
    is_sizing = cluster == rows.sizing_cluster  # False for all rows if M was given
    sum_before_row = np.where(is_sizing, np.maximum(sum_before_row, 0), sum_before_row)
    sum_with_row = np.where(is_sizing, np.maximum(sum_with_row, 0), sum_with_row)
    bets, wealth_shares = np.array(BETS_WITH_SHARES).T
    scaled_bets = bets[:, None] / ((1 - max_risk) * rows.largest_cluster)  # (B, 1)
    # E(t) is a product with a factor for every cluster. An additional accepted row changes only the
    # factor for the row's cluster.
    log_factor_with_row = np.log1p(-scaled_bets * sum_with_row)  # (B, N)
    log_factor_before_row = np.log1p(-scaled_bets * sum_before_row)
    log_change = log_factor_with_row - log_factor_before_row
    log_wealth = np.log(wealth_shares)[:, None] + log_change.cumsum(axis=1)
    log_evidence: Floats = np.logaddexp.reduce(log_wealth, axis=0)
    return log_evidence


def _cluster_sums(values: Floats, cluster: Ints) -> tuple[Floats, Floats]:
    """Return Z_c for each row's cluster: sums before the row (N,), and sums with the row (N,).

    ``values`` (N,) are the terms of Z_c, and ``cluster`` (N,) is each row's cluster. Both are in
    ascending score order.
    """
    # A stable sort keeps the score order within a cluster.
    rows_by_cluster = np.argsort(cluster, kind="stable")
    sorted_cluster = cluster[rows_by_cluster]
    sorted_values = values[rows_by_cluster]
    is_first_of_cluster = np.ones(len(cluster), dtype=np.bool_)
    is_first_of_cluster[1:] = sorted_cluster[1:] != sorted_cluster[:-1]
    row = np.arange(len(cluster))
    # For each row, the index of the first row in the same cluster. With the clusters 4, 4, 7, 7,
    # ``index_if_first`` is 0, 0, 2, 0, and the running maximum is 0, 0, 2, 2.
    index_if_first = np.where(is_first_of_cluster, row, 0)
    first_row_of_cluster = np.maximum.accumulate(index_if_first)
    # Z_c with a row is the running total over all clusters, minus the total before cluster c.
    running_total = np.cumsum(sorted_values)
    running_total_before = running_total - sorted_values
    sorted_sum_with_row = running_total - running_total_before[first_row_of_cluster]
    sorted_sum_before_row = np.where(is_first_of_cluster, 0.0, sorted_sum_with_row - sorted_values)
    sum_before_row = np.empty(len(cluster))
    sum_with_row = np.empty(len(cluster))
    sum_before_row[rows_by_cluster] = sorted_sum_before_row  # back in ascending score order
    sum_with_row[rows_by_cluster] = sorted_sum_with_row
    return sum_before_row, sum_with_row


def _level_at_start(
    rows: LabelledRows, start_rows: LabelledRows, max_risk: float, delta: float
) -> dict[float, float]:
    """Map each sequence's start, a threshold, to the sequence's level.

    A sequence gives its level to the next sequence if it could reject nothing, even if all answers
    were right.
    """
    start_scores = np.sort(start_rows.uncertainty)
    # The tested rows must not move a start. So the number of tested rows is estimated from the
    # number of rows in the clusters set aside.
    n_rows_expected = len(start_scores) * rows.n_clusters / start_rows.n_clusters
    levels: dict[float, float] = {}
    level = 0.0
    for row_share, level_share in SEQUENCE_STARTS:
        level += delta * level_share
        if level == 0:
            continue
        # A full cluster has M = rows.largest_cluster rows. If all M rows are right, the evidence
        # here grows as much as the evidence in ``anytime`` grows by a single right answer. So n
        # rows count as n / M right answers.
        n_full_clusters = row_share * n_rows_expected / rows.largest_cluster
        can_reject = n_full_clusters >= n_right_labels_needed(max_risk, level)
        is_last_sequence = row_share == 1
        if can_reject or is_last_sequence:
            start_rank = math.ceil(row_share * len(start_scores))
            start = float(start_scores[start_rank - 1])
            levels[start] = levels.get(start, 0.0) + level
            level = 0.0
    return levels


def _reason_for_nothing(
    rows: LabelledRows, start_rows: LabelledRows, max_risk: float, delta: float
) -> str:
    """Explain why no threshold is certified."""
    n_clusters = rows.n_clusters + start_rows.n_clusters
    mean_size = (len(rows.cluster) + len(start_rows.cluster)) / n_clusters
    # smallest number of tested clusters in the best case: every cluster has M right rows
    n_tested_needed = n_right_labels_needed(max_risk, delta)
    n_needed = math.ceil(n_tested_needed / (1 - SHARE_ASIDE))
    if rows.sizing_cluster is not None:
        n_needed += 1  # the sizing cluster never raises the evidence
    clusters_in_words = f"{n_clusters:,} clusters of {mean_size:.1f} labelled rows on average"
    if n_clusters < n_needed:
        return (
            f"{clusters_in_words} are too few: a risk of {max_risk:.2%} needs {n_needed:,} at least"
        )
    return (
        f"{clusters_in_words} do not show a risk of {max_risk:.2%}, as all "
        f"{rows.largest_cluster:,} rows of a cluster might be wrong at once. More clusters, scores "
        "that rank better, or a smaller bound on the size of a cluster help: larger clusters are "
        "then left for review"
    )

"""Guarantees for rows in clusters: bursts, tracks, pages, documents, conversations.

Rows in one cluster tend to be wrong together, so rows are no independent draws. But clusters are
independent draws. There are two risks, and a rule's guarantee is about one of them:

1. "majority": the share of accepted clusters with a wrong majority answer. A cluster is a single
   draw, with a score and an answer. The exact binomial test of ``learn_then_test`` applies.
2. "ratio": the share of wrong rows among the accepted rows. Rows are accepted one by one. A cluster
   is one draw of a bounded number, and bets test the mean of this number
   (``vilu.calibration.cluster_bets``).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from vilu.artifacts.documents import FrozenModel
from vilu.calibration.cluster_bets import SHARE_ASIDE, LabelledRows
from vilu.calibration.methods import ClusterRisk
from vilu.errors import UNKNOWN, DataError
from vilu.metrics.counts import Floats, Ints
from vilu.outcomes.outcomes import Outcomes, check_texts

SCORE_IF_TOO_LARGE: Final = math.inf
"""Score for a row in a cluster that is too large. No threshold accepts this score."""

NEGLIGIBLE_DESIGN_EFFECT: Final = 1.1
"""Up to this design effect, a message says that the correlation matters little."""


class Clusters(FrozenModel):
    """Guarantee for a rule about clusters of rows.

    Attributes:
        risk: "majority": at most ``max_risk`` of the accepted clusters have a wrong majority
            answer. "ratio": at most ``max_risk`` of the accepted rows are wrong.
        n: Number of tested calibration clusters. For "ratio", a tenth of the clusters is set aside
            and not tested.
        largest: Largest number of rows in a cluster under the guarantee. Rows in larger clusters
            are left for review. None for "majority", because clusters may then have any size.
    """

    risk: ClusterRisk
    n: int = Field(ge=0)
    largest: int | None = Field(default=None, ge=1)

    @property
    def units_in_words(self) -> str:
        """Words after a number of units, such as "calibration clusters"."""
        if self.risk == "majority":
            return "calibration clusters"
        return f"calibration rows in {self.n:,} clusters"

    @property
    def errors_in_words(self) -> str:
        """Words after "at most 5%", such as "of the accepted clusters have a wrong answer"."""
        if self.risk == "majority":
            return "of the accepted clusters have a wrong majority answer"
        return f"of the accepted answers are wrong, of clusters of up to {self.largest:,} rows"

    def compared_scores(self, uncertainty: Floats, clusters: Sequence[str | None]) -> Floats:
        """Return scores (N,) to compare with the threshold, from the rows' uncertainties (N,).

        For "majority", a row's score is the mean uncertainty in the cluster. For "ratio", a row's
        score is the row's uncertainty. Without an uncertainty the score is NaN. But for "ratio",
        all rows in a cluster that is too large have the score ``SCORE_IF_TOO_LARGE``.
        """
        _, cluster = cluster_indices(clusters, len(uncertainty))
        if self.risk == "majority":
            is_scored = np.isfinite(uncertainty)
            # The clusters with a scored row are numbered from 0 on. So no cluster is empty.
            _, scored_cluster = np.unique(cluster[is_scored], return_inverse=True)
            mean_of_cluster = _mean_per_group(uncertainty[is_scored], scored_cluster)
            scores = np.full(len(uncertainty), np.nan)
            scores[is_scored] = mean_of_cluster[scored_cluster]
            return scores
        cluster_size = np.bincount(cluster)
        largest_size = self.largest or 0  # ``largest`` is None only for "majority"
        is_too_large = cluster_size[cluster] > largest_size  # (N,)
        return np.where(is_too_large, SCORE_IF_TOO_LARGE, uncertainty)


def cluster_indices(clusters: Sequence[str | None], n: int) -> tuple[list[str], Ints]:
    """Return the names of C clusters in order of appearance, and the rows' clusters (N,).

    Raises:
        DataError: If ``clusters`` does not name a cluster for every row.
    """
    names = check_texts(clusters, "clusters", optional=True) or ()
    if len(names) != n:
        raise DataError(f"clusters must name one cluster per row ({n}). Got {len(names)} instead.")
    index_by_name: dict[str, int] = {}
    for row, name in enumerate(names):
        if not name:
            raise DataError(
                f"row {row} has no cluster. Give a row that is alone a cluster of its own."
            )
        index_by_name.setdefault(name, len(index_by_name))
    return list(index_by_name), np.array([index_by_name[name] for name in names], dtype=np.int64)


def majority_outcomes(outcomes: Outcomes, clusters: Sequence[str | None]) -> Outcomes:
    """Make an outcome for each cluster, from the mean score and the majority answer.

    A cluster's score is the mean uncertainty over the rows. A cluster's answer is the answer of
    most rows. If several answers have equally many rows, the answer with the smallest mean
    uncertainty is taken. The majority answer is wrong if at least half of the labelled rows with
    this answer are wrong. If no row with this answer has a label, the cluster's failure is unknown.
    Rows without an uncertainty are left out.

    Args:
        outcomes: N rows. Without ``prediction`` all rows in a cluster count as the same answer.
        clusters: Cluster names for the N rows.

    Returns:
        Outcomes for the C clusters with a scored row. ``ids`` are the cluster names.

    Examples:
        >>> import vilu
        >>> from vilu.calibration.clusters import majority_outcomes
        >>> rows = vilu.Outcomes([0.1, 0.3, 0.5, 0.9], [0, 0, 1, 1], prediction=[4, 4, 7, 7])
        >>> bursts = majority_outcomes(rows, ["a", "a", "a", "b"])
        >>> bursts.ids, bursts.uncertainty.round(2).tolist(), bursts.failure.tolist()
        (('a', 'b'), [0.3, 0.9], [0, 1])
        >>> bursts.prediction.tolist()
        [4, 7]
    """
    cluster_names, cluster_of_row = cluster_indices(clusters, len(outcomes))
    scored_rows = np.flatnonzero(np.isfinite(outcomes.uncertainty))
    # ``cluster`` numbers the clusters with a scored row from 0 on.
    scored_clusters, cluster = np.unique(cluster_of_row[scored_rows], return_inverse=True)
    uncertainty = outcomes.uncertainty[scored_rows]
    failure = outcomes.failure[scored_rows]
    answer = np.zeros(len(scored_rows), dtype=np.int64)
    if outcomes.prediction is not None:
        answer = outcomes.prediction[scored_rows]
    majority_answer = _majority_answer(cluster, answer, uncertainty)
    gives_majority_answer = answer == majority_answer[cluster]
    n_clusters = len(scored_clusters)
    n_wrong = np.bincount(cluster[gives_majority_answer & (failure == 1)], minlength=n_clusters)
    is_labelled = failure != UNKNOWN
    n_labelled = np.bincount(cluster[gives_majority_answer & is_labelled], minlength=n_clusters)
    # If exactly half of the rows are wrong, the answer counts as wrong. Otherwise such a tie would
    # make the bound on the error rate smaller.
    is_wrong = 2 * n_wrong >= n_labelled
    cluster_failure = np.where(n_labelled > 0, is_wrong, UNKNOWN)
    return Outcomes(
        uncertainty=_mean_per_group(uncertainty, cluster),
        failure=cluster_failure,
        prediction=None if outcomes.prediction is None else majority_answer,
        ids=[cluster_names[index] for index in scored_clusters],
        class_names=outcomes.class_names,
        method=outcomes.method,
        dataset=outcomes.dataset,
        split=outcomes.split,
        provenance=outcomes.provenance,
        answer=outcomes.answer,
    )


def _mean_per_group(values: Floats, group: Ints) -> Floats:
    """Return each group's mean value (G,). No group may be empty.

    ``group`` (N,) is each row's group.
    """
    means: Floats = np.bincount(group, weights=values) / np.bincount(group)
    return means


def _majority_answer(cluster: Ints, answer: Ints, uncertainty: Floats) -> Ints:
    """Return the answer of most rows, for each cluster (C,).

    ``cluster`` (N,), ``answer`` (N,) and ``uncertainty`` (N,) have an entry for every row.
    """
    cluster_and_answer = np.stack([cluster, answer])  # (2, N)
    # all P different (cluster, answer) pairs, as an array (2, P)
    pairs, pair_of_row = np.unique(cluster_and_answer, axis=1, return_inverse=True)
    pair_of_row = pair_of_row.reshape(-1)  # some versions of NumPy return two dimensions
    cluster_of_pair, answer_of_pair = pairs
    n_rows_of_pair = np.bincount(pair_of_row)
    mean_uncertainty = _mean_per_group(uncertainty, pair_of_row)
    # Pairs are sorted by cluster, then from most to fewest rows, then by uncertainty. So a
    # cluster's first pair has the majority answer. (``lexsort`` sorts by the last key first.)
    pair_order = np.lexsort((mean_uncertainty, -n_rows_of_pair, cluster_of_pair))
    sorted_clusters = cluster_of_pair[pair_order]
    sorted_answers: Ints = answer_of_pair[pair_order]
    _, first_position_of_cluster = np.unique(sorted_clusters, return_index=True)
    return sorted_answers[first_position_of_cluster]


class Correlation(NamedTuple):
    """Correlation between the failures of rows in the same cluster.

    Attributes:
        n_rows: Number of rows.
        n_clusters: Number of clusters with these rows.
        value: Intra-cluster correlation. NaN if the correlation is not defined: with fewer than two
            clusters, if no cluster has two rows, or if all rows are right, or all rows are wrong.
        n_effective: Number of independent rows with as much information as these rows. Equal to
            ``n_rows`` if the correlation is not defined or not positive.
    """

    n_rows: int
    n_clusters: int
    value: float
    n_effective: float

    @property
    def design_effect(self) -> float:
        """Variance of the error rate, divided by the variance for independent rows."""
        return self.n_rows / self.n_effective

    def __str__(self) -> str:
        rows_in_words = f"{self.n_rows:,} rows of {self.n_clusters:,} clusters"
        if math.isnan(self.value):
            return f"{rows_in_words} (whether they are wrong together cannot be estimated)"
        return (
            f"{rows_in_words}, which are wrong together with a correlation of {self.value:.2f} and "
            f"say as much as {self.n_effective:,.0f} independent rows"
        )


def correlation(failure: Ints, cluster: Ints) -> Correlation:
    """Estimate how failures (N,) correlate in clusters (N,), by analysis of variance.

    There are k clusters. Cluster c has n_c rows, and all clusters together have N rows. B is the
    mean square between clusters, and W the mean square within clusters. With

        n_0 = (N - sum n_c^2 / N) / (k - 1),

    the estimate is rho = (B - W) / (B + (n_0 - 1) W). The N rows give as much information as
    N / (1 + (m - 1) rho) independent rows. m = sum n_c^2 / N is the mean cluster size, where every
    row contributes the size of the row's cluster (Kish 1965).

    Source: Donner, A review of inference procedures for the intraclass correlation coefficient in
    the one-way random effects model (1986).

    Examples:
        >>> import numpy as np
        >>> from vilu.calibration.clusters import correlation
        >>> failure = np.array([1, 1, 1, 0, 0, 0, 0, 0])
        >>> estimated = correlation(failure, np.array([0, 0, 1, 1, 2, 2, 3, 3]))
        >>> round(estimated.value, 3), round(estimated.n_effective, 1)  # B = 11/24, W = 1/8
        (0.571, 5.1)
    """
    n = len(failure)
    _, cluster_index, cluster_size = np.unique(cluster, return_inverse=True, return_counts=True)
    k = len(cluster_size)
    has_one_row_per_cluster = k == n
    has_equal_failures = len(np.unique(failure)) < 2
    if k < 2 or has_one_row_per_cluster or has_equal_failures:
        return Correlation(n_rows=n, n_clusters=k, value=math.nan, n_effective=n)
    square_between, square_within = _mean_squares(failure, cluster_index, cluster_size)  # B and W
    mean_size = float((cluster_size**2).sum()) / n
    n_0 = (n - mean_size) / (k - 1)
    value = (square_between - square_within) / (square_between + (n_0 - 1) * square_within)
    design_effect = 1 + (mean_size - 1) * max(value, 0.0)
    return Correlation(n_rows=n, n_clusters=k, value=value, n_effective=n / design_effect)


def _mean_squares(failure: Ints, cluster: Ints, cluster_size: Ints) -> tuple[float, float]:
    """Return the mean squares of failures (N,) between k clusters, and within clusters.

    ``cluster`` (N,) is each row's cluster, and ``cluster_size`` (k,) the row count per cluster.
    """
    n_wrong = np.bincount(cluster, weights=failure)
    cluster_error_rate = n_wrong / cluster_size
    squares_between = cluster_size * (cluster_error_rate - failure.mean()) ** 2
    squares_within = (failure - cluster_error_rate[cluster]) ** 2
    n = len(failure)
    k = len(cluster_size)
    return float(squares_between.sum()) / (k - 1), float(squares_within.sum()) / (n - k)


def correlation_warning(
    outcomes: Outcomes, clusters: Sequence[str | None], is_accepted: NDArray[np.bool_]
) -> str | None:
    """Return a warning about a rule that counts rows in clusters as independent, or None.

    The correlation is estimated from the accepted rows with a label, because the rule's bound
    depends on these rows only. If no cluster has two such rows, there is no warning (None). Among
    all rows the correlation is often larger.

    Args:
        outcomes: N calibration rows.
        clusters: Cluster names for the N rows.
        is_accepted: Mask (N,) of the rows accepted by the rule.
    """
    _, cluster = cluster_indices(clusters, len(outcomes))
    is_counted = is_accepted & (outcomes.failure != UNKNOWN)
    estimated_correlation = correlation(outcomes.failure[is_counted], cluster[is_counted])
    if estimated_correlation.n_clusters == estimated_correlation.n_rows:
        return None
    consequence = "so it is more optimistic than the rows allow"
    if estimated_correlation.design_effect <= NEGLIGIBLE_DESIGN_EFFECT:
        consequence = "which matters little here"
    # In words, the estimate begins like "120 rows of 40 clusters".
    return (
        f"the rule accepts {estimated_correlation}. The guarantee counts them as independent, "
        f"{consequence}. "
        "Clusters count with --cluster-risk, or in Python with vilu.certify_clusters"
    )


def ratio_rows(
    outcomes: Outcomes,
    is_usable: NDArray[np.bool_],
    clusters: Sequence[str | None],
    largest_cluster: int | None,
) -> tuple[LabelledRows, LabelledRows]:
    """Return the rows to test for the risk "ratio", and the rows in the clusters set aside.

    Clusters with more than M rows are left out. M is ``largest_cluster``, or else the size of the
    largest cluster.

    Args:
        outcomes: N calibration rows.
        is_usable: Mask (N,) of the rows with an uncertainty and a label.
        clusters: Cluster names for the N rows.
        largest_cluster: Largest cluster size. All rows in a cluster count, usable or not.
    """
    names, cluster = cluster_indices(clusters, len(outcomes))
    cluster_size = np.bincount(cluster)
    sizing_cluster = None
    if largest_cluster is None:
        largest_cluster = int(cluster_size.max())
        clusters_of_this_size = np.flatnonzero(cluster_size == largest_cluster)
        sizing_cluster = _sort_by_hash(clusters_of_this_size, names)[0]
    is_counted = is_usable & (cluster_size[cluster] <= largest_cluster)
    # The sizing cluster gave the largest size, so it is no random draw. It is always tested,
    # because it must lower the evidence if it is wrong.
    is_random_draw = is_counted & (cluster != sizing_cluster)
    clusters_aside = _clusters_set_aside(np.unique(cluster[is_random_draw]), names)
    is_aside = np.isin(cluster, clusters_aside)
    is_tested = is_counted & ~is_aside
    if not (is_tested & is_random_draw).any():
        raise DataError(
            f"no cluster of up to {largest_cluster:,} rows is left to calibrate on. Give more "
            "clusters, or a larger bound (largest)."
        )

    def make_labelled_rows(is_chosen: NDArray[np.bool_]) -> LabelledRows:
        rows = outcomes.take(is_chosen)
        return LabelledRows(
            rows.uncertainty, rows.failure, cluster[is_chosen], largest_cluster, sizing_cluster
        )

    return make_labelled_rows(is_tested), make_labelled_rows(is_counted & is_aside)


def _clusters_set_aside(cluster: Ints, names: list[str]) -> list[int]:
    """Choose a random tenth of the clusters (C,), rounded up, and return the indices.

    Args:
        cluster: Cluster indices (C,) to choose from.
        names: Names for all clusters, by index.
    """
    n_aside = math.ceil(SHARE_ASIDE * len(cluster))
    return _sort_by_hash(cluster, names)[:n_aside]


def _sort_by_hash(cluster: Ints, names: list[str]) -> list[int]:
    """Sort cluster indices (C,) by the hashes of the names.

    Hashes do not depend on scores or labels, so the order is random, and the same at every run.
    """

    def hash_of_name(cluster_index: int) -> bytes:
        name = names[cluster_index].encode()
        return hashlib.blake2b(name, digest_size=8).digest()

    return sorted(cluster.tolist(), key=hash_of_name)

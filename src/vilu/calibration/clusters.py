"""Guarantees for rows that come in clusters: bursts, tracks, pages, documents, conversations.

Rows of one cluster tend to be wrong together, so they are no independent draws. The clusters are.
There are two risks, and a rule says which one its guarantee is about.

1. "majority": the answer that most rows of an accepted cluster give is wrong. A cluster is one
   draw, with one score and one answer, and the exact binomial test of ``learn_then_test`` applies.
2. "ratio": wrong rows per accepted row. Rows are accepted one by one. A cluster is one draw of a
   bounded number, and bets test its mean (``vilu.calibration.cluster_bets``).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from vilu.artifacts.documents import Model
from vilu.calibration.cluster_bets import SHARE_ASIDE, LabelledRows
from vilu.calibration.methods import ClusterRisk
from vilu.errors import UNKNOWN, DataError
from vilu.metrics.counts import Floats, Ints
from vilu.outcomes.outcomes import Outcomes, check_texts

TOO_LARGE: Final = math.inf
"""Score of a row whose cluster is too large: no threshold accepts it."""

NEGLIGIBLE_EFFECT: Final = 1.1
"""Design effect up to which a message says that correlated rows matter little."""


class Clusters(Model):
    """What the guarantee of a rule says about clusters of rows.

    Attributes:
        risk: "majority": at most ``max_risk`` of the accepted clusters have a wrong majority
            answer. "ratio": at most ``max_risk`` of the accepted rows are wrong.
        n: Number of calibration clusters that count. For "ratio", a tenth of the clusters is set
            aside and does not count.
        largest: Largest number of rows of a cluster that the guarantee covers. Rows of larger
            clusters are left for review. None for "majority", which takes clusters of any size.
    """

    risk: ClusterRisk
    n: int = Field(ge=0)
    largest: int | None = Field(default=None, ge=1)

    @property
    def units_in_words(self) -> str:
        """What the rule counts, such as "calibration rows", in words."""
        if self.risk == "majority":
            return "calibration clusters"
        return f"calibration rows in {self.n:,} clusters"

    @property
    def errors_in_words(self) -> str:
        """What is guaranteed to be rare, in words that follow "at most 5%"."""
        if self.risk == "majority":
            return "of the accepted clusters have a wrong majority answer"
        return f"of the accepted answers are wrong, of clusters of up to {self.largest:,} rows"

    def compared_scores(self, uncertainty: Floats, clusters: Sequence[str | None]) -> Floats:
        """Scores (N,) that are compared with the threshold, from uncertainties (N,) of rows.

        For "majority" this is the mean uncertainty of the cluster. A row without an uncertainty
        (NaN) keeps it.
        """
        _, cluster = cluster_indices(clusters, len(uncertainty))
        if self.risk == "majority":
            is_scored = np.isfinite(uncertainty)
            _, index = np.unique(cluster[is_scored], return_inverse=True)
            mean_of_cluster = _mean_per_cluster(uncertainty[is_scored], index)
            scores = np.full(len(uncertainty), np.nan)
            scores[is_scored] = mean_of_cluster[index]
            return scores
        size_of_row = np.bincount(cluster)[cluster]  # size of the cluster of every row
        return np.where(size_of_row > (self.largest or 0), TOO_LARGE, uncertainty)


def cluster_indices(clusters: Sequence[str | None], n: int) -> tuple[list[str], Ints]:
    """Names of the C clusters in order of appearance, and index (N,) of the cluster of every row.

    Raises:
        DataError: If ``clusters`` does not name one cluster per row.
    """
    names = check_texts(clusters, "clusters", optional=True) or ()
    if len(names) != n:
        raise DataError(f"clusters must name one cluster per row ({n}). Got {len(names)} instead.")
    index_of: dict[str, int] = {}
    for row, name in enumerate(names):
        if not name:
            raise DataError(
                f"row {row} has no cluster. Give a row that is alone a cluster of its own."
            )
        index_of.setdefault(name, len(index_of))
    return list(index_of), np.array([index_of[name] for name in names], dtype=np.int64)


def majority_outcomes(outcomes: Outcomes, clusters: Sequence[str | None]) -> Outcomes:
    """One outcome per cluster: its score, and whether its majority answer is wrong.

    The score of a cluster is the mean uncertainty of its rows. Its answer is the one that most of
    its rows give. Of answers with equally many rows, the one with the least mean uncertainty is
    taken. The answer is wrong if at least half of the labelled rows that give it are wrong. A
    cluster without such a label is not labelled. Rows without an uncertainty are left out.

    Args:
        outcomes: N rows. Without ``prediction`` all rows of a cluster count as one answer.
        clusters: Names of the clusters of the N rows.

    Returns:
        Outcomes of the C clusters with a scored row. Their ``ids`` are the names of the clusters.

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
    all_names, all_indices = cluster_indices(clusters, len(outcomes))
    scored = np.flatnonzero(np.isfinite(outcomes.uncertainty))
    present, cluster = np.unique(all_indices[scored], return_inverse=True)
    uncertainty = outcomes.uncertainty[scored]
    failure = outcomes.failure[scored]
    answer = np.zeros(len(scored), dtype=np.int64)
    if outcomes.prediction is not None:
        answer = outcomes.prediction[scored]
    majority = _majority_answer(cluster, answer, uncertainty)
    gives_majority = answer == majority[cluster]
    n_clusters = len(present)
    n_wrong = np.bincount(cluster[gives_majority & (failure == 1)], minlength=n_clusters)
    n_labelled = np.bincount(cluster[gives_majority & (failure != UNKNOWN)], minlength=n_clusters)
    # Half of the rows wrong counts as wrong: a tie must not make the bound smaller.
    is_wrong = 2 * n_wrong >= n_labelled
    cluster_failure = np.where(n_labelled > 0, is_wrong, UNKNOWN)
    return Outcomes(
        uncertainty=_mean_per_cluster(uncertainty, cluster),
        failure=cluster_failure,
        prediction=None if outcomes.prediction is None else majority,
        ids=[all_names[index] for index in present],
        class_names=outcomes.class_names,
        method=outcomes.method,
        dataset=outcomes.dataset,
        split=outcomes.split,
        provenance=outcomes.provenance,
        answer=outcomes.answer,
    )


def _mean_per_cluster(values: Floats, cluster: Ints) -> Floats:
    """Mean value (C,) of the rows of every cluster; no cluster is empty."""
    means: Floats = np.bincount(cluster, weights=values) / np.bincount(cluster)
    return means


def _majority_answer(cluster: Ints, answer: Ints, uncertainty: Floats) -> Ints:
    """The answer (C,) that most rows of every cluster give."""
    pairs, pair_of_row = np.unique(np.stack([cluster, answer]), axis=1, return_inverse=True)
    pair_of_row = pair_of_row.reshape(-1)
    n_rows = np.bincount(pair_of_row)
    mean = _mean_per_cluster(uncertainty, pair_of_row)
    # sorted by cluster, then from most to fewest rows, then from trusted to doubtful
    order = np.lexsort((mean, -n_rows, pairs[0]))
    _, first = np.unique(pairs[0][order], return_index=True)
    majority: Ints = pairs[1][order[first]]
    return majority


class Correlation(NamedTuple):
    """How strongly the failures of rows of one cluster correlate.

    Attributes:
        n_rows: Number of rows.
        n_clusters: Number of clusters with such a row.
        value: Intra-cluster correlation. NaN where it is not defined: if no cluster has two rows,
            or if all rows are right, or all wrong.
        n_effective: Number of independent rows that say as much. It is ``n_rows`` where the
            correlation is not defined or not positive.
    """

    n_rows: int
    n_clusters: int
    value: float
    n_effective: float

    @property
    def design_effect(self) -> float:
        """Factor by which the variance of an error rate is larger than that of single rows."""
        return self.n_rows / self.n_effective

    def __str__(self) -> str:
        rows = f"{self.n_rows:,} rows of {self.n_clusters:,} clusters"
        if math.isnan(self.value):
            return f"{rows} (whether they are wrong together cannot be estimated)"
        return (
            f"{rows}, which are wrong together with a correlation of {self.value:.2f} and say as "
            f"much as {self.n_effective:,.0f} independent rows"
        )


def correlation(failure: Ints, cluster: Ints) -> Correlation:
    """Intra-cluster correlation of failures (N,) in clusters (N,), by the analysis of variance.

    With k clusters of n_c rows, N rows, mean squares B between and W within clusters, and

        n_0 = (N - sum n_c^2 / N) / (k - 1),

    the estimate is (B - W) / (B + (n_0 - 1) W). N rows say as much as N / (1 + (m - 1) rho)
    independent rows, with m = sum n_c^2 / N, the mean size of the cluster of a row (Kish 1965).

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
    _, index, size = np.unique(cluster, return_inverse=True, return_counts=True)
    k = len(size)
    is_undefined = k < 2 or k == n or len(np.unique(failure)) < 2
    if is_undefined:
        return Correlation(n_rows=n, n_clusters=k, value=math.nan, n_effective=n)
    wrong = np.bincount(index, weights=failure)
    mean_of_cluster = wrong / size
    squares_between = size * (mean_of_cluster - failure.mean()) ** 2
    squares_within = (failure - mean_of_cluster[index]) ** 2
    between = float(squares_between.sum()) / (k - 1)  # B
    within = float(squares_within.sum()) / (n - k)  # W
    mean_size = float((size**2).sum()) / n
    n_0 = (n - mean_size) / (k - 1)
    value = (between - within) / (between + (n_0 - 1) * within)
    design_effect = 1 + (mean_size - 1) * max(value, 0.0)
    return Correlation(n_rows=n, n_clusters=k, value=value, n_effective=n / design_effect)


def correlation_warning(
    outcomes: Outcomes, clusters: Sequence[str | None], accepted: NDArray[np.bool_]
) -> str | None:
    """Warning about a rule that counts rows as independent, although they come in clusters.

    The correlation is that of the accepted rows with a label, because only they count for a bound.
    It is often smaller than that of all rows. If no cluster has two such rows, there is no warning
    (None).
    """
    _, cluster = cluster_indices(clusters, len(outcomes))
    is_counted = accepted & (outcomes.failure != UNKNOWN)
    estimated = correlation(outcomes.failure[is_counted], cluster[is_counted])
    if estimated.n_clusters == estimated.n_rows:
        return None
    consequence = "so it says more than they show"
    if estimated.design_effect <= NEGLIGIBLE_EFFECT:
        consequence = "which matters little here"
    return (
        f"the rule accepts {estimated}. The guarantee counts them as independent, {consequence}. "
        "Clusters count with --cluster-risk, or in Python with vilu.certify_clusters"
    )


def ratio_rows(
    outcomes: Outcomes,
    is_usable: NDArray[np.bool_],
    clusters: Sequence[str | None],
    largest: int | None,
) -> tuple[LabelledRows, LabelledRows]:
    """The rows that count for the risk "ratio", and those of the clusters that are set aside.

    ``is_usable`` (N,) marks the rows with an uncertainty and a label. Sizes of clusters count all
    rows. Clusters of more than M rows are left out. M is ``largest``, or else the largest size.
    """
    names, cluster = cluster_indices(clusters, len(outcomes))
    size = np.bincount(cluster)
    is_counted = is_usable.copy()
    if largest is None:
        largest = int(size.max())
        # The largest cluster sets the bound, so it is no random draw. Given its size, all other
        # clusters are draws of clusters of at most this size.
        is_counted &= cluster != int(size.argmax())
    else:
        is_counted &= size[cluster] <= largest
    clusters_aside = _clusters_set_aside(np.unique(cluster[is_counted]), names)
    is_aside = np.isin(cluster, clusters_aside)
    if not (is_counted & ~is_aside).any():
        raise DataError(
            f"no cluster of up to {largest:,} rows is left to calibrate on. Give more clusters, or "
            "a larger bound (largest)."
        )

    def labelled_rows(is_wanted: NDArray[np.bool_]) -> LabelledRows:
        rows = outcomes.take(is_wanted)
        return LabelledRows(rows.uncertainty, rows.failure, cluster[is_wanted], largest)

    return labelled_rows(is_counted & ~is_aside), labelled_rows(is_counted & is_aside)


def _clusters_set_aside(cluster: Ints, names: list[str]) -> list[int]:
    """Indices of a tenth of the clusters (C,), rounded up: those with the smallest name hashes.

    Hashes do not depend on scores or labels. So the tenth is a random one, and the same at every
    run.

    Args:
        cluster: Indices (C,) of the clusters to choose from.
        names: Names of all clusters, by index.
    """

    def hash_of_name(index: int) -> bytes:
        return hashlib.blake2b(names[index].encode(), digest_size=8).digest()

    n_aside = math.ceil(SHARE_ASIDE * len(cluster))
    return sorted(cluster.tolist(), key=hash_of_name)[:n_aside]

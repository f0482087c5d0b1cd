"""Which photos to label next: photos to fit on and, apart from them, photos for the guarantee.

*Photos to fit on* are uncertain and differ from one another. k-means clusters the embeddings, each
photo weighted by its uncertainty. The photo nearest to the centre of each cluster is chosen.
Source: Prabhu et al., Active Domain Adaptation via Clustering Uncertainty-weighted Embeddings, ICCV
2021; we use the probability of failure in place of their entropy.

*Photos for the guarantee* are drawn at random from the photos with an uncertainty of at most a
limit. Because they are drawn at random, every threshold up to the limit can be tested on their
labels. Photos above the limit would be reviewed anyway and need no label. The limit is chosen from
scores alone: it is the largest limit at which n labels are expected to show that few answers are
wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from vilu.calibration.anytime import flawless_labels, log_evidence
from vilu.calibration.thresholds import binomial_tail
from vilu.embeddings.source import EmbeddingSource
from vilu.metrics.counts import Floats, Ints

Mask = NDArray[np.bool_]

POOL_SIZE: Final = 20_000
"""Maximum number of photos that are clustered.

If there are more photos, half of this number are the most uncertain photos, and the other half are
random photos of the rest.
"""

ITERATIONS: Final = 20
"""Maximum number of iterations of k-means."""

LEAST_SHARE: Final = 1 / 8
"""Smallest share of the photos that a limit includes."""

WIDENING: Final = 1.25
"""Factor by which the limit of a single draw includes more photos than are expected to pass.

Probabilities may be too pessimistic, and nothing beyond the limit can be accepted. The price is a
fifth of the labels.
"""

LEAST_PHOTOS: Final = 100
"""Smallest number of photos that the limit of a single draw includes, or all if there are fewer."""


def choose_to_fit(
    source: EmbeddingSource, rows: Ints, uncertainty: Floats, n: int, seed: int
) -> Ints:
    """Choose at most ``n`` of the ``rows`` (M,) to fit on, and put the most uncertain first.

    ``uncertainty`` (N,) holds the uncertainties of all rows of the source.
    """
    from sklearn.cluster import KMeans

    rows = _rows_to_cluster(rows[np.isfinite(uncertainty[rows])], uncertainty, seed)
    if len(rows) <= n:
        return _doubtful_first(rows, uncertainty)
    image = source.image_rows(torch.from_numpy(rows)).numpy()
    excess = uncertainty[rows] - np.nanmin(uncertainty)  # at least 0
    largest_excess = max(float(excess.max()), 1e-12)  # above 0, because it is a divisor
    weight = excess / largest_excess + 1e-3  # above 0, so that no photo is left out
    clusters = KMeans(n, n_init=1, max_iter=ITERATIONS, random_state=seed)
    clusters.fit(image, sample_weight=weight)
    distance = clusters.transform(image)  # of each row to each centre
    index_of_cluster = np.empty(n, dtype=np.int64)  # index in ``rows`` of the row that is chosen
    is_free = np.ones(len(rows), dtype=np.bool_)
    for cluster in range(n):
        nearest_free = int(np.where(is_free, distance[:, cluster], np.inf).argmin())
        index_of_cluster[cluster] = nearest_free
        is_free[nearest_free] = False
    return _doubtful_first(rows[index_of_cluster], uncertainty)


def _rows_to_cluster(rows: Ints, uncertainty: Floats, seed: int) -> Ints:
    """The rows that are clustered: all, or the pool (``POOL_SIZE``) if there are too many."""
    if len(rows) <= POOL_SIZE:
        return rows
    ordered = _doubtful_first(rows, uncertainty)
    half = POOL_SIZE // 2
    shuffled_rest = np.random.default_rng(seed).permutation(ordered[half:])
    return np.sort(np.concatenate([ordered[:half], shuffled_rest[:half]]))


def _doubtful_first(rows: Ints, uncertainty: Floats) -> Ints:
    """The rows, ordered by falling uncertainty."""
    return rows[np.argsort(-uncertainty[rows], kind="stable")]


def choose_limit(uncertainty: Floats, n: int, max_risk: float, delta: float) -> tuple[float, bool]:
    """Choose the limit of a draw from the probabilities of failure alone.

    The limit is the largest up to which ``n`` labels are expected to show that the error rate is at
    most ``max_risk``. It always includes at least an eighth of the photos, and as many photos as
    certify it for new photos if every answer is right. Up to a lower limit nothing can be
    certified.

    Args:
        uncertainty: (N,) probabilities of failure; rows with NaN are left out.
        n: Number of labels.
        max_risk: Largest error rate that is allowed.
        delta: Level of the test.

    Returns:
        The limit, and whether ``n`` labels are expected to be enough at this limit.
    """

    def is_shown(wrong: Floats) -> Mask:
        evidence = log_evidence(wrong=wrong, accepted=np.full(len(wrong), n), max_risk=max_risk)
        return evidence >= -math.log(delta)

    return _largest_limit(uncertainty, n, flawless_labels(max_risk, delta), is_shown)


def choose_limit_of_draw(
    uncertainty: Floats, n: int, max_risk: float, delta: float
) -> tuple[float, bool]:
    """As ``choose_limit``, for a single test of ``n`` labels, after all of them have come.

    The limit includes ``WIDENING`` times as many photos. It is 1, the largest probability, if these
    are all photos.
    """

    def is_shown(wrong: Floats) -> Mask:
        return binomial_tail(wrong.astype(np.int64), np.full(len(wrong), n), max_risk) <= delta

    limit, is_expected = _largest_limit(uncertainty, n, LEAST_PHOTOS, is_shown)
    ordered = np.sort(uncertainty[np.isfinite(uncertainty)])
    n_included = math.ceil(WIDENING * np.searchsorted(ordered, limit, side="right"))
    if n_included >= len(ordered):
        return 1.0, is_expected
    return float(ordered[n_included - 1]), is_expected


def _largest_limit(
    uncertainty: Floats, n: int, least_photos: int, is_shown: Callable[[Floats], Mask]
) -> tuple[float, bool]:
    """The largest limit up to which the expected number of wrong answers among n is low enough.

    Args:
        uncertainty: (N,) probabilities of failure.
        n: Number of labels.
        least_photos: Smallest number of photos that the limit includes, besides ``LEAST_SHARE``.
        is_shown: Tells for every expected number (M,) whether it would show the risk.
    """
    ordered = np.sort(uncertainty[np.isfinite(uncertainty)])
    if not len(ordered):
        return -math.inf, False
    # Every photo is tried as the limit: the error rate up to it is the mean of the probabilities.
    risk = np.cumsum(ordered) / np.arange(1, len(ordered) + 1)
    expected_wrong = np.round(risk * n)
    possible = np.flatnonzero(is_shown(expected_wrong))  # indices of photos
    n_least = max(math.ceil(LEAST_SHARE * len(ordered)), least_photos)
    least_index = min(n_least, len(ordered)) - 1
    last_index = int(possible[-1]) if len(possible) else -1
    limit = float(ordered[max(last_index, least_index)])
    is_expected = last_index >= least_index
    return limit, is_expected

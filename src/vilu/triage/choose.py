"""Chooses photos to label next: photos to fit on and, separately, photos for the guarantee.

*Photos to fit on* are uncertain and differ from one another. k-means clusters the embeddings, with
each photo weighted by its uncertainty. The photo nearest to each cluster centre is chosen.
Source: Prabhu et al., Active Domain Adaptation via Clustering Uncertainty-weighted Embeddings, ICCV
2021. We use the failure probability in place of entropy.

*Photos for the guarantee* are drawn at random from the photos with an uncertainty up to a limit.
Because of the random draw, the labels can test every threshold up to the limit. Photos above the
limit would be reviewed anyway and need no label. The limit is chosen from scores alone: the largest
limit at which n labels are expected to show that few answers are wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from vilu.calibration.anytime import log_evidence, n_right_labels_needed
from vilu.calibration.thresholds import binomial_tail
from vilu.embeddings.source import EmbeddingSource
from vilu.metrics.counts import Floats, Ints

Mask = NDArray[np.bool_]

CLUSTERING_POOL_SIZE: Final = 20_000
"""Maximum number of photos in the clustering.

If there are more photos, the most uncertain photos make up half of this number. The second half is
drawn at random from the remaining photos.
"""

MAX_ITERATIONS: Final = 20
"""Maximum iteration count for k-means."""

LEAST_SHARE: Final = 1 / 8
"""A limit includes at least this share of the photos."""

DRAW_WIDENING_FACTOR: Final = 1.25
"""The limit for a single draw includes this many times as many photos as are expected to pass.

Probabilities may be too pessimistic, and no photo beyond the limit can be accepted. The price is a
fifth of the labels, spent on photos that are not expected to pass.
"""

MIN_PHOTOS_OF_DRAW: Final = 100
"""The limit for a single draw includes at least this number of photos, or all photos."""


def choose_rows_to_fit(
    source: EmbeddingSource, rows: Ints, uncertainty: Floats, n: int, seed: int
) -> Ints:
    """Choose at most ``n`` of the ``rows`` (M,) to fit on. The most uncertain row comes first.

    ``uncertainty`` (N,) has the uncertainty of every source row.
    """
    from sklearn.cluster import KMeans

    scored_rows = rows[np.isfinite(uncertainty[rows])]
    rows = _clustering_pool(scored_rows, uncertainty, seed)
    if len(rows) <= n:
        return _sort_by_doubt(rows, uncertainty)
    row_index = torch.from_numpy(rows)
    image = source.image_rows(row_index).numpy()
    excess = uncertainty[rows] - np.nanmin(uncertainty)  # at least 0
    largest_excess = max(float(excess.max()), 1e-12)  # above 0, because it is a divisor
    weight = excess / largest_excess + 1e-3  # above 0, to leave no photo out
    clusters = KMeans(n, n_init=1, max_iter=MAX_ITERATIONS, random_state=seed)
    clusters.fit(image, sample_weight=weight)
    distance = clusters.transform(image)  # (M, n) distance between every row and every centre
    chosen_index = np.empty(n, dtype=np.int64)  # for every cluster, a row index in ``rows``
    is_free = np.ones(len(rows), dtype=np.bool_)  # True for rows not chosen yet
    for cluster in range(n):
        nearest_free = int(np.where(is_free, distance[:, cluster], np.inf).argmin())
        chosen_index[cluster] = nearest_free
        is_free[nearest_free] = False
    return _sort_by_doubt(rows[chosen_index], uncertainty)


def _clustering_pool(rows: Ints, uncertainty: Floats, seed: int) -> Ints:
    """Return the rows to cluster: all rows, or at most ``CLUSTERING_POOL_SIZE`` rows."""
    if len(rows) <= CLUSTERING_POOL_SIZE:
        return rows
    rows_by_doubt = _sort_by_doubt(rows, uncertainty)
    half = CLUSTERING_POOL_SIZE // 2
    shuffled_others = np.random.default_rng(seed).permutation(rows_by_doubt[half:])
    pool = np.concatenate([rows_by_doubt[:half], shuffled_others[:half]])
    return np.sort(pool)


def _sort_by_doubt(rows: Ints, uncertainty: Floats) -> Ints:
    """Sort the rows by falling uncertainty."""
    return rows[np.argsort(-uncertainty[rows], kind="stable")]


def choose_limit(uncertainty: Floats, n: int, max_risk: float, delta: float) -> tuple[float, bool]:
    """Choose a draw's limit from the failure probabilities alone.

    The limit is the largest uncertainty up to which ``n`` labels are expected to show an error rate
    of at most ``max_risk``. It includes at least an eighth of the photos. It also includes enough
    photos to certify the limit if every answer is right: with fewer photos nothing could be
    certified.

    Args:
        uncertainty: (N,) failure probabilities. Rows with NaN are ignored.
        n: Number of labels.
        max_risk: Largest allowed error rate.
        delta: Level for the test.

    Returns:
        The limit, and whether ``n`` labels are expected to be enough for it.
    """

    def is_risk_shown(wrong: Floats) -> Mask:
        n_accepted = np.full(len(wrong), n)
        evidence = log_evidence(n_wrong=wrong, n_accepted=n_accepted, max_risk=max_risk)
        return evidence >= -math.log(delta)

    least_photos = n_right_labels_needed(max_risk, delta)
    return _largest_limit(uncertainty, n, least_photos, is_risk_shown)


def choose_limit_of_draw(
    uncertainty: Floats, n: int, max_risk: float, delta: float
) -> tuple[float, bool]:
    """Choose the limit like ``choose_limit``, but for a single test after all ``n`` labels.

    The limit is raised to include ``DRAW_WIDENING_FACTOR`` times as many photos. If the raised
    limit includes all photos, the limit is 1, the largest probability.
    """

    def is_risk_shown(wrong: Floats) -> Mask:
        n_wrong = wrong.astype(np.int64)
        n_accepted = np.full(len(wrong), n)
        return binomial_tail(n_wrong, n_accepted, max_risk) <= delta

    limit, is_expected = _largest_limit(uncertainty, n, MIN_PHOTOS_OF_DRAW, is_risk_shown)
    ascending = np.sort(uncertainty[np.isfinite(uncertainty)])
    n_up_to_limit = np.searchsorted(ascending, limit, side="right")
    n_included = math.ceil(DRAW_WIDENING_FACTOR * n_up_to_limit)
    if n_included >= len(ascending):
        return 1.0, is_expected
    return float(ascending[n_included - 1]), is_expected


def _largest_limit(
    uncertainty: Floats, n: int, least_photos: int, is_risk_shown: Callable[[Floats], Mask]
) -> tuple[float, bool]:
    """Return the largest limit with few enough expected wrong answers to show the risk.

    Args:
        uncertainty: (N,) failure probabilities.
        n: Number of labels.
        least_photos: The limit includes at least this number of photos, and at least the share
            ``LEAST_SHARE`` of the photos.
        is_risk_shown: Takes counts (M,) of wrong answers. Returns for each count whether ``n``
            labels with so many wrong answers would still show the risk.
    """
    ascending = np.sort(uncertainty[np.isfinite(uncertainty)])
    if not len(ascending):
        return -math.inf, False
    # Every photo's uncertainty is tried as the limit. The expected error rate up to the limit is
    # the mean of the probabilities up to the limit.
    n_up_to_limit = np.arange(1, len(ascending) + 1)
    expected_risk = np.cumsum(ascending) / n_up_to_limit
    expected_wrong = np.round(expected_risk * n)
    is_shown = is_risk_shown(expected_wrong)
    shown_indices = np.flatnonzero(is_shown)
    last_shown_index = int(shown_indices[-1]) if len(shown_indices) else -1
    n_least = max(math.ceil(LEAST_SHARE * len(ascending)), least_photos)
    least_index = min(n_least, len(ascending)) - 1
    limit = float(ascending[max(last_shown_index, least_index)])
    is_expected = last_shown_index >= least_index
    return limit, is_expected

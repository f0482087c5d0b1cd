"""Chooses photos to label next: photos to fit on and, separately, photos for the guarantee.

*Photos to fit on* are uncertain and differ from one another. k-means clusters the embeddings, with
each photo weighted by its uncertainty. The photo nearest to each cluster centre is chosen.
Source: Prabhu et al., Active Domain Adaptation via Clustering Uncertainty-weighted Embeddings, ICCV
2021. We use the failure probability in place of entropy.

*Photos for the guarantee* are drawn at random from the photos up to an uncertainty limit. Because
of the random draw, the labels can test every threshold up to the limit. Photos above the limit
would be reviewed anyway and need no label. The limit is chosen from the scores alone. It is the
largest limit at which n labels are expected to show that few answers are wrong.
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

If there are more photos, half of the clustered photos are the most uncertain ones. The other half
is drawn at random from the remaining photos.
"""

MAX_ITERATIONS: Final = 20
"""Maximum iteration count for k-means."""

LEAST_SHARE: Final = 1 / 8
"""At least this share of the photos is up to a chosen uncertainty limit."""

DRAW_WIDENING_FACTOR: Final = 1.25
"""For a single draw, the number of photos up to the uncertainty limit is multiplied by this factor.

The failure probabilities may be too high, and no photo above the limit can be accepted. The price:
a fifth of the labels goes to photos that are not expected to be accepted.
"""

MIN_PHOTOS_OF_DRAW: Final = 100
"""For a single draw, at least this number of photos is up to the limit, or all if fewer."""


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
    excess = uncertainty[rows] - np.nanmin(uncertainty)  # never negative
    largest_excess = max(float(excess.max()), 1e-12)  # above 0, because it is a divisor
    weight = excess / largest_excess + 1e-3  # above 0, to leave no photo out
    clusters = KMeans(n, n_init=1, max_iter=MAX_ITERATIONS, random_state=seed)
    clusters.fit(image, sample_weight=weight)
    distance = clusters.transform(image)  # (len(rows), n) from every row to every centre
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
    """Choose the uncertainty limit for a draw from the failure probabilities alone.

    The limit is the largest uncertainty up to which ``n`` labels are expected to show an error rate
    of at most ``max_risk``. But at least an eighth of the photos are up to the limit. They are also
    enough photos to show this error rate if every answer is right. With fewer photos, no labels
    could show it.

    Args:
        uncertainty: (N,) failure probabilities. Rows with NaN are ignored.
        n: Number of labels.
        max_risk: Largest allowed error rate.
        delta: Level for the test.

    Returns:
        The limit, and whether ``n`` labels are expected to be enough for it.
    """

    def is_risk_shown(n_wrong: Floats) -> Mask:
        n_accepted = np.full(len(n_wrong), n)
        evidence = log_evidence(n_wrong=n_wrong, n_accepted=n_accepted, max_risk=max_risk)
        return evidence >= -math.log(delta)  # -log(delta) is log(1 / delta)

    least_photos = n_right_labels_needed(max_risk, delta)
    return _largest_limit(uncertainty, n, least_photos, is_risk_shown)


def choose_limit_of_draw(
    uncertainty: Floats, n: int, max_risk: float, delta: float
) -> tuple[float, bool]:
    """Choose the limit like ``choose_limit``, but for a single test after all ``n`` labels.

    The limit is raised to include ``DRAW_WIDENING_FACTOR`` times as many photos. If the raised
    limit includes all photos, the limit is 1, the largest probability.
    """

    def is_risk_shown(n_wrong: Floats) -> Mask:
        n_wrong_as_int = n_wrong.astype(np.int64)
        n_accepted = np.full(len(n_wrong), n)
        return binomial_tail(n_wrong_as_int, n_accepted, max_risk) <= delta

    limit, is_enough = _largest_limit(uncertainty, n, MIN_PHOTOS_OF_DRAW, is_risk_shown)
    ascending = np.sort(uncertainty[np.isfinite(uncertainty)])
    n_up_to_limit = np.searchsorted(ascending, limit, side="right")
    n_included = math.ceil(DRAW_WIDENING_FACTOR * n_up_to_limit)
    if n_included >= len(ascending):
        return 1.0, is_enough
    raised_limit = float(ascending[n_included - 1])  # the ``n_included``-th lowest uncertainty
    return raised_limit, is_enough


def _largest_limit(
    uncertainty: Floats, n: int, least_photos: int, is_risk_shown: Callable[[Floats], Mask]
) -> tuple[float, bool]:
    """Return the largest limit at which ``n`` labels are expected to be enough, and True.

    If it has too few photos, or there is none, return the smallest allowed limit, and False.

    Args:
        uncertainty: (N,) failure probabilities.
        n: Number of labels.
        least_photos: At least so many photos, and the share ``LEAST_SHARE``, are up to the limit.
        is_risk_shown: Takes counts (M,) of wrong answers. Returns for each count whether ``n``
            labels with so many wrong answers would show that the risk is small enough.
    """
    ascending = np.sort(uncertainty[np.isfinite(uncertainty)])
    if not len(ascending):
        return -math.inf, False  # no photo has a score
    # Every photo's uncertainty is tried as the limit. The expected error rate up to the limit is
    # the mean of the probabilities up to the limit.
    n_up_to_limit = np.arange(1, len(ascending) + 1)
    expected_risk = np.cumsum(ascending) / n_up_to_limit
    expected_wrong = np.round(expected_risk * n)
    is_shown = is_risk_shown(expected_wrong)
    shown_indices = np.flatnonzero(is_shown)
    last_shown_index = int(shown_indices[-1]) if len(shown_indices) else -1
    n_least = max(math.ceil(LEAST_SHARE * len(ascending)), least_photos)
    least_index = min(n_least, len(ascending)) - 1  # index of the last of these photos
    limit = float(ascending[max(last_shown_index, least_index)])
    is_enough = last_shown_index >= least_index
    return limit, is_enough

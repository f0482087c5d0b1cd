"""What to label next: photos to fit on and, apart from them, photos for the guarantee.

*To fit on*: doubtful and different from one another. k-means on the embeddings, every photo
weighted by its uncertainty, and of each of k clusters the photo next to its centre (Prabhu et al.,
Active Domain Adaptation via Clustering Uncertainty-weighted Embeddings, ICCV 2021, with our
probability of failure for the entropy).

*For the guarantee*: a draw from what may be accepted, u <= limit. Given acceptance the labels are
independent, so every threshold up to the limit can be tested on them, and none is spent on photos
that would be left for review anyway. The limit is chosen from scores alone: the laxest one at which
so many labels are expected to show the risk.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import torch

from vilu.calibration.anytime import log_evidence
from vilu.embeddings.source import EmbeddingSource
from vilu.metrics.counts import Floats, Ints

POOL: Final = 20_000
"""Photos that are looked at: of more, half of so many are the most doubtful, half a random part."""

ITERATIONS: Final = 20

LEAST_SHARE: Final = 1 / 8
LEAST_PHOTOS: Final = 100
"""So large a share of the photos, and at least so many, lie below any limit: the most trusted."""


def choose_to_fit(
    source: EmbeddingSource, rows: Ints, uncertainty: Floats, n: int, seed: int
) -> Ints:
    """At most ``n`` of the ``rows`` (M,), by the uncertainties (N,) of all; most doubtful first."""
    from sklearn.cluster import KMeans

    rows = _pool(rows[np.isfinite(uncertainty[rows])], uncertainty, seed)
    if len(rows) <= n:
        return _doubtful_first(rows, uncertainty)
    image = source.image_rows(torch.from_numpy(rows)).numpy()
    weight = uncertainty[rows] - np.nanmin(uncertainty)
    weight = weight / max(float(weight.max()), 1e-12) + 1e-3
    centres = KMeans(n, n_init=1, max_iter=ITERATIONS, random_state=seed).fit(
        image, sample_weight=weight
    )
    distance = centres.transform(image)
    chosen = np.empty(n, dtype=np.int64)
    is_free = np.ones(len(rows), dtype=np.bool_)
    for cluster in range(n):
        nearest = int(np.where(is_free, distance[:, cluster], np.inf).argmin())
        chosen[cluster] = nearest
        is_free[nearest] = False
    return _doubtful_first(rows[chosen], uncertainty)


def _pool(rows: Ints, uncertainty: Floats, seed: int) -> Ints:
    if len(rows) <= POOL:
        return rows
    order = rows[np.argsort(-uncertainty[rows], kind="stable")]
    rest = np.random.default_rng(seed).permutation(order[POOL // 2 :])[: POOL // 2]
    return np.sort(np.concatenate([order[: POOL // 2], rest]))


def _doubtful_first(rows: Ints, uncertainty: Floats) -> Ints:
    return rows[np.argsort(-uncertainty[rows], kind="stable")]


def choose_limit(uncertainty: Floats, n: int, max_risk: float, delta: float) -> tuple[float, bool]:
    """The laxest u up to which ``n`` labels are expected to show the risk.

    By the probabilities of failure (N,) alone. And whether there is one; if not, an eighth of the
    photos (at least 100) lies below the limit.
    """
    ordered = np.sort(uncertainty[np.isfinite(uncertainty)])
    if not len(ordered):
        return -math.inf, False
    risk = np.cumsum(ordered) / np.arange(1, len(ordered) + 1)
    evidence = log_evidence(np.round(risk * n), np.full(len(risk), n), max_risk)
    expected_to_show = np.flatnonzero(evidence >= -math.log(delta))
    least = max(math.ceil(LEAST_SHARE * len(ordered)), LEAST_PHOTOS)
    least = min(least, len(ordered)) - 1
    last = int(expected_to_show[-1]) if len(expected_to_show) else -1
    return float(ordered[max(last, least)]), last >= least

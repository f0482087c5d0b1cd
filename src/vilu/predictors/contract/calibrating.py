"""Data to calibrate a predictor: uncertainties and failures of labelled rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from vilu.embeddings.source import Batch, EmbeddingSource
from vilu.errors import UNKNOWN, DataError
from vilu.metrics.counts import Floats, Ints, check_codes, real_vector, require_same_length
from vilu.predictors.contract.seen import one_row_per_picture, rows_to_score

MIN_DISTANCE = 1e-15
"""Probabilities are clipped to this distance from 0 and from 1, so that log-odds are finite."""


class Scorer(Protocol):
    """An object that scores rows, such as a predictor."""

    def scored(
        self, data: EmbeddingSource, rows: Tensor | None = None
    ) -> Iterator[tuple[Batch, Floats]]:
        """Yield batches of the rows, each batch with the uncertainties (B,)."""


def log_odds(probability: Floats) -> Floats:
    """Compute ln p - ln(1 - p) (N,) from probabilities (N,). NaN stays NaN."""
    p = np.clip(probability, MIN_DISTANCE, 1 - MIN_DISTANCE)
    log_ratio: Floats = np.log(p) - np.log1p(-p)
    return log_ratio


def scores_and_failures(
    predictor: Scorer, calibration: EmbeddingSource, is_unseen: NDArray[np.bool_]
) -> tuple[Floats, Ints]:
    """Compute the uncertainties (N,) and failures (N,) of the rows.

    An unknown uncertainty is NaN, and an unknown failure is -1. Both are computed for the rows in
    the mask ``is_unseen`` (N,). For image-caption pairs both are computed for all rows, since a
    pool is only scored as a whole.
    """
    uncertainty = np.full(len(calibration), np.nan)
    failure = np.full(len(calibration), UNKNOWN)
    scored_rows = rows_to_score(calibration, is_unseen)
    for batch, scores in predictor.scored(calibration, scored_rows):
        rows = batch.index.numpy(force=True)
        uncertainty[rows] = scores
        failure[rows] = batch.failure.numpy(force=True)
    return uncertainty, failure


def failure_of_pictures(
    calibration: EmbeddingSource, is_unseen: NDArray[np.bool_], uncertainty: Floats, failure: Ints
) -> Ints:
    """Return the failures (N,) of one chosen row per picture. All other rows get -1 (unknown).

    So every picture counts once. The chosen row is the picture's first failure, or the first row if
    the picture has no failure. In pools a failure depends on all captions in the pool, so the first
    row is always chosen. The choice is among the rows in the mask ``is_unseen`` (N,) with a known
    uncertainty (N,) and a known ``failure`` (N,).
    """
    is_known = is_unseen & np.isfinite(uncertainty) & (failure != UNKNOWN)
    known_rows = np.flatnonzero(is_known)
    picture = calibration.picture_identities(known_rows)
    priority = failure[known_rows]  # a row with priority 1 is chosen
    has_pools = calibration.pool_size is not None
    if has_pools:
        priority = np.zeros_like(known_rows)  # without priorities, the first row is chosen
    chosen_rows = known_rows[one_row_per_picture(picture, priority)]
    failure_of_row = np.full(len(calibration), UNKNOWN)
    failure_of_row[chosen_rows] = failure[chosen_rows]
    return failure_of_row


def known_pairs(uncertainty: ArrayLike, failure: ArrayLike) -> tuple[Floats, Ints]:
    """Select the uncertainties (M,) and failures (M,) of the rows with both values known.

    Raises:
        DataError: If no row has both values.
    """
    scores = real_vector(uncertainty, "uncertainty")
    failures = check_codes(failure, "failure", 1)
    require_same_length(scores, failures)
    is_known = np.isfinite(scores) & (failures != UNKNOWN)
    if not is_known.any():
        raise DataError(
            f"none of the {len(scores)} calibration rows has an uncertainty and a known failure."
        )
    return scores[is_known], failures[is_known]

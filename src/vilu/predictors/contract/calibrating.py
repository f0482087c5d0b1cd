"""Data to calibrate a predictor on: its uncertainties on labelled rows, and their failures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from vilu.embeddings.source import Batch, EmbeddingSource
from vilu.errors import UNKNOWN, DataError
from vilu.metrics.counts import Floats, Ints, check_codes, real_vector, require_same_length
from vilu.predictors.contract.seen import one_per_picture, rows_to_score

MIN_DISTANCE = 1e-15
"""Probabilities are clipped to this distance from 0 and from 1, so that log-odds are finite."""


class Scorer(Protocol):
    """An object that scores rows, such as a predictor."""

    def scored(
        self, data: EmbeddingSource, rows: Tensor | None = None
    ) -> Iterator[tuple[Batch, Floats]]:
        """Yield batches of the rows, each with its uncertainties (B,)."""


def log_odds(probability: Floats) -> Floats:
    """(N,) ln p - ln(1 - p) of probabilities (N,); NaN stays NaN."""
    p = np.clip(probability, MIN_DISTANCE, 1 - MIN_DISTANCE)
    logarithms: Floats = np.log(p) - np.log1p(-p)
    return logarithms


def scores_and_failures(
    predictor: Scorer, calibration: EmbeddingSource, is_unseen: NDArray[np.bool_]
) -> tuple[Floats, Ints]:
    """(N,) uncertainties and (N,) failures of the rows.

    An unknown uncertainty is NaN, and an unknown failure is -1. Both are computed for the rows in
    the mask ``is_unseen`` (N,). For image-caption pairs both are computed for all rows, since every
    pool needs all its rows.
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
    """(N,) failure of one row of every picture, and -1 (unknown) for all other rows.

    So every picture counts once, by one of its rows. If one of its rows is a failure, such a row is
    taken, and otherwise its first row. In pools a failure depends on the other captions of the
    pool, so the first row is always taken. Only rows in the mask ``is_unseen`` (N,) with a known
    uncertainty (N,) and a known ``failure`` (N,) are considered.
    """
    is_known = is_unseen & np.isfinite(uncertainty) & (failure != UNKNOWN)
    known_rows = np.flatnonzero(is_known)
    picture = calibration.picture_identities(known_rows)
    priority = failure[known_rows]  # of the rows of a picture, one with a 1 is taken
    has_pools = calibration.pool_size is not None
    if has_pools:
        priority = np.zeros_like(known_rows)  # without a 1, the first row is taken
    rows = known_rows[one_per_picture(picture, priority)]
    failure_of_row = np.full(len(calibration), UNKNOWN)
    failure_of_row[rows] = failure[rows]
    return failure_of_row


def known_pairs(uncertainty: ArrayLike, failure: ArrayLike) -> tuple[Floats, Ints]:
    """(M,) uncertainties and (M,) failures of those rows for which both are known.

    Raises:
        DataError: If there are no such rows.
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

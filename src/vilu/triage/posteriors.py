"""Held-out posteriors for labelled rows: the predictor of a row was not fitted on the row."""

from __future__ import annotations

import logging
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from vilu.embeddings.copies import NEAR_COPY_COSINE, near_copy_groups
from vilu.embeddings.rows import SCORING_BATCH
from vilu.embeddings.source import EmbeddingSource, log_posterior
from vilu.errors import DataError
from vilu.metrics.counts import Floats
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.predictors.plus.vilu_plus import ViLUPlus
from vilu.progress import track

FOLDS: Final = 5
"""Number of folds for the cross-fitting."""

logger = logging.getLogger(__name__)


def cross_fitted_posterior(source: EmbeddingSource, rows: NDArray[np.int64], seed: int) -> Floats:
    """Compute the posterior (M, K) for ``rows`` (M,) and K classes by cross-fitting.

    A row's predictor was not fitted on the row, and not on near copies of the row.
    """
    fold_of_row = _folds(source, rows, seed)
    posterior = np.empty((len(rows), source.n_candidates))
    with track("fit without a fifth of the labels", FOLDS, "fits") as task:
        for fold in range(FOLDS):
            is_held_out = fold_of_row == fold
            if not is_held_out.any():
                continue
            predictor = ViLUPlus(seed=seed).fit(source.take(rows[~is_held_out]))
            posterior[is_held_out] = posterior_of(predictor, source, rows[is_held_out])
            task.advance(1)
    return posterior


def _folds(source: EmbeddingSource, rows: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Return each row's fold (M,). Near copies share a fold, because a copy reveals the label."""
    # ``first_copy`` is equal for near copies of one picture, and differs between pictures.
    first_copy = near_copy_groups(source, rows)
    _, picture = np.unique(first_copy, return_inverse=True)  # every row's picture, from 0
    n_pictures = int(picture.max()) + 1
    if n_pictures < 2:
        raise DataError(
            f"all {len(rows)} labelled rows are near copies of one picture (cosine of at least "
            f"{NEAR_COPY_COSINE}), so no label can be compared with others. Give labels of other "
            "pictures."
        )
    if n_pictures < len(rows):
        logger.info(
            "%d labelled rows are %d pictures and their near copies; near copies share a fold",
            len(rows),
            n_pictures,
        )
    folds_in_turn = np.arange(n_pictures) % FOLDS  # 0, 1, 2, 3, 4, 0, 1, ...: nearly equal folds
    fold_of_picture = np.random.default_rng(seed).permutation(folds_in_turn)
    return fold_of_picture[picture]


def posterior_of(
    predictor: FailurePredictor, source: EmbeddingSource, rows: NDArray[np.int64]
) -> Floats:
    """Compute the predictor's posterior (M, K), or the zero-shot posterior if it has none."""
    row_index = torch.from_numpy(rows)
    batches = source.batches(SCORING_BATCH, rows=row_index, columns=predictor.columns_to_score)
    log_posterior_of = predictor.log_posterior if predictor.has_posterior else log_posterior
    parts = [np.empty((0, source.n_candidates))]  # the result if there are no rows
    with torch.no_grad():
        for batch in batches:
            log_p = log_posterior_of(batch.to(predictor.device_))
            posterior = log_p.exp().numpy(force=True)
            parts.append(posterior)
    return np.concatenate(parts)

"""Answers for labelled rows, judged by predictors that were fitted without these rows."""

from __future__ import annotations

import copy
from typing import Final

import numpy as np

from vilu.embeddings.rows import SCORING_BATCH, Rows
from vilu.embeddings.source import EmbeddingSource
from vilu.errors import UNKNOWN
from vilu.predictors.contract.calibrating import scores_and_failures
from vilu.predictors.contract.held_out import HeldOutAnswers, JudgedAnswers, folds_have_every_class
from vilu.predictors.contract.labelled import cross_fitting, rows_and_failures
from vilu.predictors.contract.predictor import FailurePredictor

ENOUGH_HELD_OUT: Final = 250
"""With so many held-out rows no further fold is fitted."""


def labelled_folds(train: EmbeddingSource) -> list[tuple[Rows, Rows]]:
    """Divide the usable labelled rows into folds: pairs of rows to fit on and held-out rows."""
    is_labelled = (train.target != UNKNOWN) | train.outside
    usable = train.usable_rows
    rows = Rows(train, usable[is_labelled[usable]])
    _, failure = rows_and_failures(rows.batches(SCORING_BATCH))
    return cross_fitting(rows, failure, validation=None, seed=0)


def cross_fitted(
    predictor: FailurePredictor,
    train: EmbeddingSource,
    folds: list[tuple[Rows, Rows]],
    *,
    unlabelled: EmbeddingSource | None = None,
) -> HeldOutAnswers:
    """Both kinds of answers for held-out rows, judged by copies that were fitted without them.

    No further fold is fitted once there are ``ENOUGH_HELD_OUT`` held-out rows.

    Args:
        predictor: The predictor; it is not changed.
        train: Labelled rows.
        folds: Pairs of rows of ``train`` to fit on and held-out rows (``labelled_folds``).
        unlabelled: Rows without labels that every fit uses too.
    """
    zero_shot = []
    adapted = []
    n_held_out = 0
    for fitted_on, held_out in folds:
        fold_predictor = copy.copy(predictor)
        fold_predictor.fit(train.take(fitted_on.index), unlabelled=unlabelled)
        zero_shot.append(_judge(fold_predictor.judging("zero_shot"), train, held_out))
        adapted.append(_judge(fold_predictor.judging("adapted"), train, held_out))
        n_held_out += len(held_out.index)
        if n_held_out >= ENOUGH_HELD_OUT:
            break
    return HeldOutAnswers(
        _join(zero_shot), _join(adapted), has_every_class=folds_have_every_class(folds)
    )


def _judge(predictor: FailurePredictor, train: EmbeddingSource, held_out: Rows) -> JudgedAnswers:
    """Judge the answers for held-out rows of ``train`` by a predictor."""
    is_held_out = np.zeros(len(train), np.bool_)
    is_held_out[held_out.index.numpy()] = True
    uncertainty, failure = scores_and_failures(predictor, train, is_held_out)
    return JudgedAnswers(uncertainty[is_held_out], failure[is_held_out])


def _join(parts: list[JudgedAnswers]) -> JudgedAnswers:
    """Concatenate the answers of all parts."""
    uncertainty = np.concatenate([part.uncertainty for part in parts])
    failure = np.concatenate([part.failure for part in parts])
    return JudgedAnswers(uncertainty, failure)

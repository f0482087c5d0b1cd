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
from vilu.predictors.contract.labelled import cross_fit_splits, rows_and_failures
from vilu.predictors.contract.predictor import FailurePredictor

ENOUGH_HELD_OUT_ROWS: Final = 250
"""With so many held-out rows no further fold is fitted."""


def labelled_folds(train: EmbeddingSource) -> list[tuple[Rows, Rows]]:
    """Divide the usable labelled rows into folds: pairs of rows to fit on and held-out rows."""
    is_labelled = (train.target != UNKNOWN) | train.outside
    usable_rows = train.usable_rows
    labelled_rows = usable_rows[is_labelled[usable_rows]]
    rows = Rows(train, labelled_rows)
    batches = rows.batches(SCORING_BATCH)
    _, failure = rows_and_failures(batches)
    return cross_fit_splits(rows, failure, validation=None, seed=0)


def cross_fitted(
    predictor: FailurePredictor,
    train: EmbeddingSource,
    folds: list[tuple[Rows, Rows]],
    *,
    unlabelled: EmbeddingSource | None = None,
) -> HeldOutAnswers:
    """Judge zero-shot and adapted answers for held-out rows by copies of the predictor.

    Each copy judges only rows held out from the copy's fit. No further fold is fitted once there
    are ``ENOUGH_HELD_OUT_ROWS`` held-out rows.

    Args:
        predictor: The predictor, which is not changed.
        train: Labelled rows.
        folds: Pairs (rows of ``train`` to fit on, held-out rows), as from ``labelled_folds``.
        unlabelled: Rows without labels, for use in every fit.
    """
    zero_shot_of_folds = []
    adapted_of_folds = []
    n_held_out = 0
    for rows_to_fit, held_out_rows in folds:
        zero_shot_of_fold, adapted_of_fold = _answers_of_fold(
            predictor, train, rows_to_fit, held_out_rows, unlabelled
        )
        zero_shot_of_folds.append(zero_shot_of_fold)
        adapted_of_folds.append(adapted_of_fold)
        n_held_out += len(held_out_rows.index)
        if n_held_out >= ENOUGH_HELD_OUT_ROWS:
            break
    zero_shot = _join_answers(zero_shot_of_folds)
    adapted = _join_answers(adapted_of_folds)
    has_every_class = folds_have_every_class(folds)
    return HeldOutAnswers(zero_shot, adapted, has_every_class)


def _answers_of_fold(
    predictor: FailurePredictor,
    train: EmbeddingSource,
    rows_to_fit: Rows,
    held_out_rows: Rows,
    unlabelled: EmbeddingSource | None,
) -> tuple[JudgedAnswers, JudgedAnswers]:
    """Judge zero-shot and adapted answers for the held-out rows, by a copy fitted to the rest."""
    fold_predictor = copy.copy(predictor)
    fold_predictor.fit(train.take(rows_to_fit.index), unlabelled=unlabelled)
    zero_shot_judge = fold_predictor.judging("zero_shot")
    adapted_judge = fold_predictor.judging("adapted")
    zero_shot = _judge_answers(zero_shot_judge, train, held_out_rows)
    adapted = _judge_answers(adapted_judge, train, held_out_rows)
    return zero_shot, adapted


def _judge_answers(
    predictor: FailurePredictor, train: EmbeddingSource, held_out_rows: Rows
) -> JudgedAnswers:
    """Judge the answers for held-out rows of ``train`` by a predictor."""
    is_held_out = np.zeros(len(train), np.bool_)
    is_held_out[held_out_rows.index.numpy()] = True
    uncertainty, failure = scores_and_failures(predictor, train, is_held_out)
    return JudgedAnswers(uncertainty[is_held_out], failure[is_held_out])


def _join_answers(answers_of_folds: list[JudgedAnswers]) -> JudgedAnswers:
    """Concatenate the answers of all folds."""
    uncertainty = np.concatenate([answers.uncertainty for answers in answers_of_folds])
    failure = np.concatenate([answers.failure for answers in answers_of_folds])
    return JudgedAnswers(uncertainty, failure)

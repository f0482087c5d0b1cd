"""Which rows to fit on and which to hold out, where scores of rows not fitted on are needed."""

from __future__ import annotations

import torch
from torch import Tensor

from vilu.nn.train import Rows
from vilu.predictors.labelled import trainable_rows
from vilu.types import EmbeddingSource

FOLDED_ROWS = 5_000
"""Up to so many rows are cross-fitted; of more, one fifth is held out, and so many rows at most."""

FOLDS = 5


def cross_fitting(
    train: Rows, failure: Tensor, validation: EmbeddingSource | None, seed: int
) -> list[tuple[Rows, Rows]]:
    """Pairs of rows to fit on and rows held out from that fit: the validation set, or folds stratified by failure.

    Args:
        train: Usable labelled rows with shared candidates.
        failure: (M,) their failures in {0, 1}.
        validation: Rows to hold out instead of a part of ``train``.
        seed: Of the folds.
    """
    if validation is not None:
        rows, _ = trainable_rows(validation, "validation")
        return [(train, Rows(validation, rows, train.columns))]
    n = len(failure)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=generator)
    order = order[failure[order].argsort(stable=True)]  # neighbours in this order go to different folds
    fold = torch.empty(n, dtype=torch.long)
    fold[order] = torch.arange(n) % FOLDS
    parts = [train.index[fold == k] for k in range(FOLDS if n <= FOLDED_ROWS else 1)]
    pairs = []
    for k, part in enumerate(parts):
        few = torch.randperm(len(part), generator=generator)[:FOLDED_ROWS].sort().values  # rows may come class by class
        if len(few):
            rest, held_out = train.index[fold != k], part[few]
            pairs.append((Rows(train.source, rest, train.columns), Rows(train.source, held_out, train.columns)))
    return pairs

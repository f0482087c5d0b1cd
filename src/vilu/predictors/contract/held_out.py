"""Zero-shot and adapted answers for labelled rows that were held out of a fit."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from vilu.embeddings.columns import AnswerKind
from vilu.embeddings.rows import Rows
from vilu.errors import UNKNOWN


class JudgedAnswers(NamedTuple):
    """Uncertainties and failures of N answers, all zero-shot or all adapted."""

    uncertainty: NDArray[np.float64]  # (N,)
    failure: NDArray[np.int64]  # (N,) 1 if the answer is wrong, 0 if the answer is right

    @property
    def is_known(self) -> NDArray[np.bool_]:
        """(N,) mask: true if the answer has an uncertainty and a known failure."""
        known: NDArray[np.bool_] = np.isfinite(self.uncertainty) & (self.failure != UNKNOWN)
        return known


class HeldOutAnswers(NamedTuple):
    """Zero-shot and adapted answers for the same N held-out rows.

    Attributes:
        zero_shot: The zero-shot answers.
        adapted: The adapted answers.
        has_every_class: Whether every candidate had a label in every fit. Otherwise the adapted
            answers are wrong for rows of the missing classes, so adapted and zero-shot answers
            cannot be compared.
    """

    zero_shot: JudgedAnswers
    adapted: JudgedAnswers
    has_every_class: bool = True

    def of_kind(self, answer: AnswerKind) -> JudgedAnswers:
        """Return the answers named by ``answer``, "zero_shot" or "adapted"."""
        if answer == "adapted":
            return self.adapted
        return self.zero_shot

    @classmethod
    def of_posterior(
        cls,
        log_q: NDArray[np.float64],
        zero_shot: NDArray[np.int64],
        target: NDArray[np.int64],
    ) -> HeldOutAnswers:
        """Judge zero-shot and adapted answers by a posterior q: u = 1 - q_a for an answer a.

        Args:
            log_q: (N, K) log probabilities of the candidates.
            zero_shot: (N,) zero-shot answers.
            target: (N,) true candidates.
        """

        def judge(answer: NDArray[np.int64]) -> JudgedAnswers:
            log_q_column = np.take_along_axis(log_q, answer[:, None], axis=1)
            log_q_of_answer = log_q_column.squeeze(1)
            uncertainty = -np.expm1(log_q_of_answer)  # 1 - q, without cancellation
            failure = (answer != target).astype(np.int64)
            return JudgedAnswers(uncertainty, failure)

        adapted = log_q.argmax(axis=1)
        zero_shot_answers = judge(zero_shot)
        adapted_answers = judge(adapted)
        return cls(zero_shot=zero_shot_answers, adapted=adapted_answers)


def folds_have_every_class(folds: list[tuple[Rows, Rows]]) -> bool:
    """Return whether, in every fold, each candidate has a labelled row among the rows to fit on."""
    for rows_to_fit, _ in folds:
        source = rows_to_fit.source
        labels = source.target[rows_to_fit.index]
        known_labels = labels[labels >= 0]
        if len(torch.unique(known_labels)) < source.n_candidates:
            return False
    return True

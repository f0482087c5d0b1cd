"""Which answers a triage judges: the zero-shot ones, or those of the predictor's own posterior."""

from __future__ import annotations

import torch

from vilu.artifacts.documents import Model
from vilu.embeddings.columns import AnswerKind
from vilu.embeddings.source import EmbeddingSource
from vilu.errors import UsageError
from vilu.predictors.contract.catalogue import find_method

LEAST_IN_A_CLASS = 2
"""Fewest labels of one class with which adapted answers are judged."""


class AnswerChoice(Model):
    """The kind of the judged answers, and the reason.

    Attributes:
        kind: Kind of the judged answers.
        why: The reason, as a part of a sentence.
    """

    kind: AnswerKind
    why: str

    def __str__(self) -> str:
        if self.kind == "adapted":
            answers = (
                "Adapted answers are judged, the likeliest by the posterior of the fitted predictor"
            )
        else:
            answers = "The zero-shot answers of the model are judged"
        return f"{answers}: {self.why}."


NOTHING_CHOSEN = AnswerChoice(kind="zero_shot", why="no other answers were chosen")
"""The choice before the first fit."""


def require_possible(kind: AnswerKind | None) -> None:
    """Raise UsageError for answers that no photo of a folder has."""
    if kind == "given":
        raise UsageError(
            "photos in a folder have no given answers. Choose --answer zero_shot or adapted. For "
            "given answers use `vilu fit` and `vilu calibrate` with a store that has them."
        )


def answer_to_judge(
    asked: AnswerKind | None, method: str, labelled: EmbeddingSource
) -> AnswerChoice:
    """The answers that a new predictor judges.

    The choice sees labels of the fit side alone. Calibration labels must not decide which answers
    are judged, since the guarantee of these answers rests on them.

    Args:
        asked: Kind that the user asked for; None if vilu chooses.
        method: The method of the new predictor.
        labelled: Rows that the predictor is fitted on, with their labels.
    """
    if asked is not None:
        return AnswerChoice(kind=asked, why=f"--answer {asked} asks for them")
    if not find_method(method).needs_labels:
        return AnswerChoice(kind="zero_shot", why="there are too few labels to fit on")
    return choose_answer(labelled)


def choose_answer(labelled: EmbeddingSource) -> AnswerChoice:
    """Choose by the labels of the rows that a predictor is fitted on."""
    target = labelled.target[labelled.target >= 0]
    counts = torch.bincount(target, minlength=labelled.n_candidates)
    if counts.max() < LEAST_IN_A_CLASS:
        return AnswerChoice(kind="zero_shot", why="no class has two labels to fit on")
    return AnswerChoice(
        kind="adapted", why=f"there are {len(target):,} labels of classes to fit on"
    )

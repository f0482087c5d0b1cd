"""Which answers a triage judges: those that the user asked for, or those that pay."""

from __future__ import annotations

from vilu.calibration.answer_choice import AnswerChoice, choose_answer
from vilu.embeddings.columns import AnswerKind
from vilu.embeddings.source import EmbeddingSource
from vilu.errors import UsageError
from vilu.predictors.contract.predictor import FailurePredictor

NOTHING_CHOSEN = AnswerChoice(answer="zero_shot", reason="no other answers were chosen")
"""The choice before the first fit."""


def require_possible(answer: AnswerKind | None) -> None:
    """Raise UsageError for answers that no photo of a folder has."""
    if answer == "given":
        raise UsageError(
            "photos in a folder have no given answers. Choose --answer zero_shot or adapted. For "
            "given answers use `vilu fit` and `vilu calibrate` with a store that has them."
        )


def answer_to_judge(
    asked: AnswerKind | None,
    predictor: FailurePredictor,
    labelled: EmbeddingSource,
    max_risk: float,
) -> AnswerChoice:
    """The answers that a new predictor judges.

    The choice depends on labels of the fit side alone. Calibration labels must not decide which
    answers are judged, because the guarantee of these answers depends on the same labels.

    Args:
        asked: Kind that the user asked for; None if vilu chooses.
        predictor: The new predictor.
        labelled: Rows that it was fitted on, with their labels.
        max_risk: The error rate that is to be guaranteed.
    """
    if asked is not None:
        return AnswerChoice(answer=asked, reason=f"--answer {asked} asks for them")
    return choose_answer(predictor, labelled, max_risk)

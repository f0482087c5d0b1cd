"""What methods share that know their classes from labelled images."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor

from vilu.embeddings.similarity import nearest
from vilu.embeddings.source import SAME_TEXT, Batch
from vilu.errors import ProvenanceError
from vilu.predictors.contract.predictor import CLASSES, FailurePredictor


@dataclasses.dataclass
class ClosedSet(FailurePredictor):
    """A method that learns what it knows class by class, and scores those classes only."""

    closed_set: ClassVar[bool] = True
    no_captions: ClassVar[str | None] = (
        "it compares images of one class, and captions have no classes"
    )

    seed: int = 0
    device: str = "auto"

    def classes_of(self, text: Tensor) -> Tensor:
        """(K,) position of every candidate (K, D) among the learned ``classes``, found by the text's embedding."""
        cosine, match = nearest(text, self.tensor(CLASSES, text.device))
        unknown, twice = int((cosine < SAME_TEXT).sum()), len(match) - len(match.unique())
        if unknown or twice:
            why = (
                f"{unknown} are others"
                if unknown
                else f"{twice} are nearest to one that is there already"
            )
            raise ProvenanceError(
                f"{self.name} scores the {len(self.learned_[CLASSES])} classes that it was fitted on. Of the "
                f"{len(text)} candidates here {why}. Fit it on these classes, or take a method that works on any (see "
                "`vilu list predictors`)."
            )
        return match

    def answer_of(self, batch: Batch) -> Tensor:
        """(B,) zero-shot answers among the learned classes."""
        return self.classes_of(batch.text)[batch.prediction]

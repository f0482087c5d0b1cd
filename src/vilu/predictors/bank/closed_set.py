"""The base class for methods that learn classes from labelled images."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor

from vilu.embeddings.similarity import nearest_rows
from vilu.embeddings.source import SAME_TEXT_COSINE, Batch
from vilu.errors import ProvenanceError
from vilu.predictors.contract.predictor import CLASSES, FailurePredictor


@dataclasses.dataclass
class ClosedSet(FailurePredictor):
    """A method that learns classes from labelled images, and scores only these classes."""

    closed_set: ClassVar[bool] = True
    no_captions: ClassVar[str | None] = (
        "it compares images of one class, and captions have no classes"
    )

    seed: int = 0
    device: str = "auto"

    def classes_of(self, text: Tensor) -> Tensor:
        """Find every candidate (K, D) among the learned ``classes``. Return indices (K,).

        A class is recognised by the text embedding.

        Raises:
            ProvenanceError: If a candidate is not a learned class, or two candidates are the same
                class.
        """
        learned_text = self.tensor(CLASSES, text.device)
        cosine, class_index = nearest_rows(text, learned_text)
        n_unknown = int((cosine < SAME_TEXT_COSINE).sum())
        if n_unknown:
            raise self._other_classes_error(len(text), f"{n_unknown} are not among them")
        sorted_index, _ = class_index.sort()
        index_steps = sorted_index.diff()
        n_repeated = int((index_steps == 0).sum())
        if n_repeated:
            raise self._other_classes_error(
                len(text), f"{n_repeated} are the same class as another candidate"
            )
        return class_index

    def _other_classes_error(self, n_candidates: int, fault: str) -> ProvenanceError:
        """Return the error for candidates that are not the learned classes."""
        return ProvenanceError(
            f"{self.name} scores the {len(self.learned_[CLASSES])} classes that it was fitted on. "
            f"Of the {n_candidates} candidates of these data, {fault}. Fit it on the classes of "
            "these data, or choose a method that works on any classes (see `vilu list predictors`)."
        )

    def answer_of(self, batch: Batch) -> Tensor:
        """Find every row's judged answer among the learned ``classes``. Return indices (B,)."""
        return self.classes_of(batch.text)[batch.prediction]

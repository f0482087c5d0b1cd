"""What every predictor that needs labels shares: honest rows, and a memory of which they were."""

from __future__ import annotations

import dataclasses
import warnings
from abc import abstractmethod
from collections.abc import Iterable
from itertools import chain
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from vilu.errors import DataError, ProvenanceError
from vilu.nn.train import SCORING_BATCH, Rows
from vilu.nn.world import current_world
from vilu.predictors.base import FailurePredictor, similarity_range
from vilu.predictors.parameters import check_parameters
from vilu.predictors.sketch import RowSketch
from vilu.types import SAME_TEXT, UNKNOWN, Batch, EmbeddingSource
from vilu.validate import SHORT_POOL, RowNumbers

MAX_UNUSABLE = 0.01


@dataclasses.dataclass
class LabelledPredictor(FailurePredictor):
    """A predictor that is fitted on labelled rows.

    Args:
        seed: Of everything random in ``fit``.
    """

    needs_fit: ClassVar[bool] = True

    seed: int = 0

    def fit(self, train: EmbeddingSource, validation: EmbeddingSource | None = None) -> Self:
        """Learn from labelled embeddings.

        Args:
            train: Rows to learn from. Rows without label are left out with a warning.
            validation: Rows to select on, none of them among the training rows; where the method selects something and
                gets none, it holds out a part of ``train``.

        Raises:
            UsageError: If a hyper-parameter is out of range, or the method does not work on image-caption pairs.
            DataError: If nothing can be learned from the rows: empty, one candidate, over 1 % unusable rows, no labels;
                or if the two sets overlap, or lack a column that the method needs.
            ProvenanceError: If the two sets come from different embedding spaces.
        """
        check_parameters(self)
        columns = self.columns_to_fit(train)
        self._check_source(train, columns)
        refuse_overlap(train, validation)
        rows, failure = trainable_rows(train, "training")
        self._learn(Rows(train, rows, columns), failure, validation)
        self.space_, self.calibrator_ = train.space, None
        seen = [
            source.ids
            for source in (train, validation)
            if source is not None and not isinstance(source.ids, RowNumbers)
        ]
        self.seen_ = RowSketch.of(chain(*seen)) if seen else None
        self.similarity_ = similarity_range(train)
        self.notes_ = {"n_train": len(failure), "n_failures": int(failure.sum()), **self._notes()}
        return self

    def _notes(self) -> dict[str, object]:
        """What to remember of the fit, for people."""
        return {}

    @abstractmethod
    def _learn(self, train: Rows, failure: Tensor, validation: EmbeddingSource | None) -> None:
        """Learn from usable labelled rows and their failures (M,) in {0, 1}."""


@dataclasses.dataclass
class TensorPredictor(LabelledPredictor):
    """A labelled predictor whose ``fit`` results in named tensors and nothing else.

    Args:
        device: "auto", "cpu", "cuda", "cuda:N" or "mps"; not part of what is saved.
    """

    tensors: ClassVar[tuple[str, ...]]

    device: str = "auto"

    learned_: dict[str, Tensor] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    def _learn(self, train: Rows, failure: Tensor, validation: EmbeddingSource | None) -> None:  # noqa: ARG002
        self.learned_ = self._fit_tensors(train, failure)

    @abstractmethod
    def _fit_tensors(self, train: Rows, failure: Tensor) -> dict[str, Tensor]:
        """Learn ``tensors``, on the CPU, from usable labelled rows and their failures (M,) in {0, 1}."""

    def _tensor(self, name: str, device: torch.device) -> Tensor:
        """A learned tensor where the batch is."""
        return self.learned_[name].to(device)

    def state(self) -> dict[str, Tensor]:
        """The learned tensors."""
        return dict(self.learned_)

    def restore(self, state: dict[str, Tensor]) -> None:
        """The inverse of ``state``."""
        expected = self._tensor_names()
        if set(state) != set(expected):
            raise DataError(f"a {self.name} holds {', '.join(expected)}. The file has {', '.join(sorted(state)[:8])}.")
        self.learned_ = state

    def _tensor_names(self) -> tuple[str, ...]:
        return self.tensors


@dataclasses.dataclass
class ClosedSetPredictor(TensorPredictor):
    """A labelled predictor that knows its classes, and recognises them by their text embeddings, whatever the order."""

    closed_set: ClassVar[bool] = True
    no_captions: ClassVar[str | None] = "it compares images of one class, and captions have no classes"

    def _learn(self, train: Rows, failure: Tensor, validation: EmbeddingSource | None) -> None:
        super()._learn(train, failure, validation)
        self.learned_["classes"] = train.source.candidates(train.index[:0]).text.clone()

    def _tensor_names(self) -> tuple[str, ...]:
        return (*self.tensors, "classes")

    def classes_of(self, text: Tensor) -> Tensor:
        """(K,) fitted class of every candidate (K, D).

        Raises:
            ProvenanceError: If a candidate is none of the fitted classes, or two are the same one.
        """
        cosine, match = (text @ self._tensor("classes", text.device).T).max(dim=1)
        unknown = int((cosine < SAME_TEXT).sum())
        if unknown or len(match.unique()) < len(match):
            raise ProvenanceError(
                f"{self.name} scores the {len(self.learned_['classes'])} classes that it was fitted on. Of the "
                f"{len(text)} candidates here {unknown} are others. Fit it on these classes, or take a method that "
                "works on any (see `vilu list predictors`)."
            )
        return match

    def _uncertainty(self, batch: Batch) -> Tensor:
        return self._class_uncertainty(batch, self.classes_of(batch.text))

    @abstractmethod
    def _class_uncertainty(self, batch: Batch, classes: Tensor) -> Tensor:
        """(B,) uncertainty of a batch whose K candidates are the fitted ``classes`` (K,)."""


def refuse_overlap(train: EmbeddingSource, validation: EmbeddingSource | None) -> None:
    """Refuse a validation set from another space, or with rows of the training set."""
    if validation is None:
        return
    train.space.require_match(validation.space, mine="the training set", theirs="the validation set")
    if isinstance(train.ids, RowNumbers) or isinstance(validation.ids, RowNumbers):
        return
    common = set(train.ids) & set(validation.ids)
    if common:
        raise DataError(
            f"{len(common)} rows are in both the training and the validation set, for example {min(common)!r}. "
            "Selection on training rows is blind; make the sets disjoint."
        )


def trainable_rows(source: EmbeddingSource, role: str) -> tuple[Tensor, Tensor]:
    """Positions (M,) of usable labelled rows, and their failures (M,) in {0, 1}."""
    if not len(source):
        raise DataError(f"the {role} set is empty.")
    if source.n_candidates < 2:
        raise DataError(f"the {role} set has one candidate text: it is always the answer, so no failure is defined.")
    short = int(np.count_nonzero(source.status == SHORT_POOL))
    unusable = int(np.count_nonzero(source.status)) - short
    if unusable > MAX_UNUSABLE * len(source):
        raise DataError(
            f"{unusable} of {len(source)} {role} rows are not finite or of zero norm, more than {MAX_UNUSABLE:.0%}. "
            "Embed them again."
        )
    rows, failure = with_failures(source.batches(SCORING_BATCH))
    known = failure != UNKNOWN
    if not known.any():
        raise DataError(f"none of the {len(source)} {role} rows has a label.")
    left_out = len(source) - short - int(known.sum())
    if left_out:
        warnings.warn(
            f"{left_out} of {len(source)} {role} rows are left out ({unusable} unusable, the rest without label).",
            stacklevel=4,
        )
    return rows[known], failure[known]


def with_failures(batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """Positions (M,) of the rows of some batches, and their failures (M,); of several processes each does its share."""
    world = current_world()
    parts = [(b.index, world.gather(b.rows(world.mine(len(b.index))).failure)) for b in batches]
    nothing = torch.empty(0, dtype=torch.int64)
    return torch.cat([nothing, *(rows for rows, _ in parts)]), torch.cat([nothing, *(failed for _, failed in parts)])

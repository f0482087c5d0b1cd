"""What every predictor that learns from failures shares: honest rows, roles, degenerate sets."""

from __future__ import annotations

import dataclasses
import warnings
from abc import abstractmethod
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from vilu.errors import DataError
from vilu.nn.train import SCORING_BATCH, Rows
from vilu.predictors.base import FailurePredictor, similarity_range
from vilu.predictors.parameters import check_parameters
from vilu.predictors.sketch import RowSketch
from vilu.types import UNKNOWN, Batch, EmbeddingSource
from vilu.validate import RowNumbers

MAX_UNUSABLE = 0.01
FEW = 20


@dataclasses.dataclass
class LearnedPredictor(FailurePredictor):
    """A predictor that needs labelled rows with failures and successes among them.

    Args:
        seed: Of everything random in ``fit``.
        validation_fraction: Share of the training rows held out for selection when ``fit`` gets no validation set.
        allow_degenerate: Fit a constant when the training rows hold no failure, or nothing else.
    """

    needs_fit: ClassVar[bool] = True

    seed: int = 0
    validation_fraction: float = 0.1
    allow_degenerate: bool = False

    constant_: float | None = dataclasses.field(default=None, init=False, repr=False, compare=False)

    def fit(self, train: EmbeddingSource, validation: EmbeddingSource | None = None) -> Self:
        """Learn from labelled embeddings.

        Args:
            train: Rows to learn from. Rows without label are left out with a warning.
            validation: Rows to select on, none of them among the training rows. Without it a stratified part of
                ``train`` is held out.

        Raises:
            UsageError: If a hyper-parameter is out of range.
            DataError: If no failure can be learned from: empty, one candidate, over 1 % unusable rows, no labels, only
                failures or no failure (unless ``allow_degenerate``); or if the two sets overlap.
            ProvenanceError: If the two sets come from different embedding spaces.
        """
        check_parameters(self)
        refuse_overlap(train, validation)
        rows, failure = trainable_rows(train, "training")
        n_failures = int(failure.sum())
        self.constant_ = self._degenerate(n_failures, len(failure))
        if self.constant_ is None:
            fit_rows, held_out = self._roles(train, rows, failure, validation)
            self._fit(fit_rows, held_out, error_rate=n_failures / len(failure))
        self.space_ = train.space
        self.seen_ = None if isinstance(train.ids, RowNumbers) else RowSketch.of(train.ids)
        self.similarity_ = similarity_range(train)
        self.notes_ = {"n_train": len(failure), "n_failures": n_failures, **self._notes()}
        return self

    def _degenerate(self, n_failures: int, n: int) -> float | None:
        """The constant to predict where there is nothing to learn; refused unless allowed."""
        rare, name = min((n_failures, "failures"), (n - n_failures, "successes"))
        if rare == 0 and not self.allow_degenerate:
            raise DataError(
                f"{self.name} learns to tell failures from successes. Found {rare} {name} among {n} training rows; at "
                f"least {FEW} are needed for a useful fit. Add harder (or easier) images, or set allow_degenerate=true "
                "for a constant predictor."
            )
        if rare < FEW:
            warnings.warn(f"only {rare} {name} among {n} training rows: expect an unreliable fit.", stacklevel=3)
        return n_failures / n if rare == 0 else None

    def _roles(
        self, train: EmbeddingSource, rows: Tensor, failure: Tensor, validation: EmbeddingSource | None
    ) -> tuple[Rows, Rows | None]:
        """Rows to fit on and rows to select on; None when a selection would be blind."""
        if validation is not None:
            held_out, held_failure = trainable_rows(validation, "validation")
            chosen: Rows | None = Rows(validation, held_out)
        else:
            generator = torch.Generator().manual_seed(self.seed)
            part = hold_out(failure, self.validation_fraction, train.pool_size, generator)
            held_failure, chosen = failure[part], Rows(train, rows[part])
            keep = torch.ones(len(rows), dtype=torch.bool)
            keep[part] = False
            rows = rows[keep]
        if len(held_failure.unique()) < 2:
            chosen = None
        return Rows(train, rows), chosen

    def _uncertainty(self, batch: Batch) -> Tensor:
        if self.constant_ is not None:
            return torch.full((len(batch.index),), self.constant_, dtype=torch.float64)
        return self._learned_uncertainty(batch)

    def state(self) -> dict[str, Tensor]:
        """The constant of a degenerate fit, or what ``_learned_state`` gives."""
        if self.constant_ is not None:
            return {"constant": torch.tensor(self.constant_, dtype=torch.float64)}
        return self._learned_state()

    def restore(self, state: dict[str, Tensor]) -> None:
        """The inverse of ``state``."""
        if state.keys() == {"constant"}:
            self.constant_ = float(state["constant"])
        else:
            self._restore_learned(state)

    def _notes(self) -> dict[str, object]:
        """What to remember of the fit, for people."""
        return {}

    @abstractmethod
    def _fit(self, train: Rows, validation: Rows | None, error_rate: float) -> None:
        """Learn; the rows are usable, labelled, and hold failures and successes."""

    @abstractmethod
    def _learned_state(self) -> dict[str, Tensor]:
        """Everything learned, as tensors."""

    @abstractmethod
    def _restore_learned(self, state: dict[str, Tensor]) -> None:
        """The inverse; must refuse tensors of the wrong names or shapes."""

    @abstractmethod
    def _learned_uncertainty(self, batch: Batch) -> Tensor:
        """(B,) uncertainty of a batch."""


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
    unusable = int(np.count_nonzero(source.status))
    if unusable > MAX_UNUSABLE * len(source):
        raise DataError(
            f"{unusable} of {len(source)} {role} rows are not finite or of zero norm, more than {MAX_UNUSABLE:.0%}. "
            "Embed them again."
        )
    parts = [(batch.index, batch.failure) for batch in source.batches(SCORING_BATCH)]
    rows, failure = (torch.cat(part) for part in zip(*parts, strict=True))
    known = failure != UNKNOWN
    if not known.any():
        raise DataError(f"none of the {len(source)} {role} rows has a label.")
    left_out = len(source) - int(known.sum())
    if left_out:
        warnings.warn(
            f"{left_out} of {len(source)} {role} rows are left out ({unusable} unusable, the rest without label).",
            stacklevel=4,
        )
    return rows[known], failure[known]


def hold_out(failure: Tensor, fraction: float, pool_size: int | None, generator: torch.Generator) -> Tensor:
    """Sorted positions (H,) of a random part of the rows: stratified by failure, or whole pools.

    With in-batch candidates the part is rounded to whole pools, and empty when there are fewer than two.
    """
    n = len(failure)
    if pool_size is not None:
        pools = n // pool_size
        count = max(round(pools * fraction), 1) if pools > 1 and fraction > 0 else 0
        return torch.randperm(n, generator=generator)[: count * pool_size].sort().values
    parts = []
    for value in (0, 1):
        members = (failure == value).nonzero().squeeze(1)
        order = torch.randperm(len(members), generator=generator)
        parts.append(members[order[: round(len(members) * fraction)]])
    return torch.cat(parts).sort().values

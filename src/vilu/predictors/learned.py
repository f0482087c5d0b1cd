"""What every predictor that learns from failures shares: honest rows, roles, degenerate sets."""

from __future__ import annotations

import dataclasses
import warnings
from abc import abstractmethod

import numpy as np
import torch
from torch import Tensor

from vilu.errors import DataError
from vilu.nn.train import SCORING_BATCH, Rows
from vilu.pairs import PairSource
from vilu.predictors.labelled import LabelledPredictor, trainable_rows, with_failures
from vilu.types import Batch, EmbeddingSource

FEW = 20
GROUP_BLOCK = 16_384


@dataclasses.dataclass
class LearnedPredictor(LabelledPredictor):
    """A predictor that needs labelled rows with failures and successes among them.

    Args:
        seed: Of everything random in ``fit``.
        allow_degenerate: Fit a constant when the training rows hold no failure, or nothing else. Otherwise ``fit``
            refuses them with a ``DataError``.
    """

    allow_degenerate: bool = False

    constant_: float | None = dataclasses.field(default=None, init=False, repr=False, compare=False)

    def _learn(self, train: Rows, failure: Tensor, validation: EmbeddingSource | None) -> None:
        n_failures = int(failure.sum())
        self.constant_ = self._degenerate(n_failures, len(failure))
        if self.constant_ is None:
            self._learn_difference(train, failure, validation)

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

    @abstractmethod
    def _learn_difference(self, train: Rows, failure: Tensor, validation: EmbeddingSource | None) -> None:
        """Learn from usable labelled rows; their failures (M,) in {0, 1} are of both kinds."""

    @abstractmethod
    def _learned_state(self) -> dict[str, Tensor]:
        """Everything learned, as tensors."""

    @abstractmethod
    def _restore_learned(self, state: dict[str, Tensor]) -> None:
        """The inverse; must refuse tensors of the wrong names or shapes."""

    @abstractmethod
    def _learned_uncertainty(self, batch: Batch) -> Tensor:
        """(B,) uncertainty of a batch."""


@dataclasses.dataclass
class SelectingPredictor(LearnedPredictor):
    """A learned predictor that selects something on rows that it does not learn from.

    Args:
        validation_fraction: Share of the training rows held out for selection when ``fit`` gets no validation set.
    """

    validation_fraction: float = 0.1

    def _learn_difference(self, train: Rows, failure: Tensor, validation: EmbeddingSource | None) -> None:
        fit_rows, held_out = self._roles(train, failure, validation)
        self._fit(fit_rows, held_out, error_rate=float(failure.double().mean()))

    def _roles(self, train: Rows, failure: Tensor, validation: EmbeddingSource | None) -> tuple[Rows, Rows | None]:
        """Rows to fit on and rows to select on; None when a selection would be blind."""
        rows, columns = train.index, train.columns
        if validation is not None:
            held_out, held_failure = trainable_rows(validation, "validation")
            chosen = Rows(validation, held_out, columns)
        else:
            generator = torch.Generator().manual_seed(self.seed)
            groups = caption_groups(train.source, rows) if isinstance(train.source, PairSource) else None
            part = hold_out(failure, self.validation_fraction, train.source.pool_size, generator, groups)
            chosen = Rows(train.source, rows[part], columns)
            _, held_failure = with_failures(chosen.batches(SCORING_BATCH))  # with captions, in pools of their own
            keep = torch.ones(len(rows), dtype=torch.bool)
            keep[part] = False
            rows = rows[keep]
        is_blind = len(held_failure.unique()) < 2
        return Rows(train.source, rows, columns), None if is_blind else chosen

    @abstractmethod
    def _fit(self, train: Rows, validation: Rows | None, error_rate: float) -> None:
        """Learn; the rows are usable, labelled, and hold failures and successes."""


def hold_out(
    failure: Tensor,
    fraction: float,
    pool_size: int | None,
    generator: torch.Generator,
    groups: Tensor | None = None,
) -> Tensor:
    """Sorted positions (H,) of a random part of the rows: stratified by failure, or whole pools.

    With in-batch candidates the part is rounded to whole pools, and empty when there are fewer than two.

    Args:
        failure: (M,) in {0, 1}.
        fraction: Share to hold out.
        pool_size: Rows of a pool, or None.
        generator: Chooses.
        groups: (M,) int64: with pools, rows of one number stay together; None: every row by itself. Where there are
            fewer groups than a pool has rows, they recur in every pool, as classes do, and rows go by themselves.
    """
    n = len(failure)
    if pool_size is not None:
        pools = n // pool_size
        count = max(round(pools * fraction), 1) if pools > 1 and fraction > 0 else 0
        order = torch.randperm(n, generator=generator)
        room = count * pool_size
        by_themselves = groups is None or len(groups.unique()) < pool_size
        chosen = order[:room] if groups is None or by_themselves else order[whole_groups(groups[order], room)]
        return chosen[: len(chosen) if len(chosen) >= pool_size else 0].sort().values
    parts = []
    for value in (0, 1):
        members = (failure == value).nonzero().squeeze(1)
        order = torch.randperm(len(members), generator=generator)
        parts.append(members[order[: round(len(members) * fraction)]])
    return torch.cat(parts).sort().values


def whole_groups(groups: Tensor, room: int) -> Tensor:
    """Sorted positions of whole groups that fit into ``room`` rows, taken in the order in which they first occur.

    Args:
        groups: (M,) int64 number of each row's group.
        room: How many rows at most; groups that are too large for what is left of it are passed over.
    """
    _, group = torch.unique(groups, return_inverse=True)
    positions = torch.arange(len(groups))
    first = torch.full((int(group.max()) + 1,), len(groups)).scatter_reduce(0, group, positions, "amin")
    waiting, sizes = first.argsort(), group.bincount()
    taken = torch.zeros(len(sizes), dtype=torch.bool)
    while len(waiting := waiting[sizes[waiting] <= room]):
        fits = waiting[sizes[waiting].cumsum(0) <= room]  # the first one does
        taken[fits] = True
        room -= int(sizes[fits].sum())
        waiting = waiting[len(fits) :]
    return taken[group].nonzero().squeeze(1)


def caption_groups(source: PairSource, rows: Tensor) -> Tensor:
    """(M,) int64: equal for rows of equal captions (in float16, as they are stored); read in blocks.

    Rows whose caption is the text of a class are each by themselves: held out together, the class would go unlearnt.

    sum_i a_i x_i mod 2^64 of the D 16-bit numbers x of a caption with fixed random odd a: two captions meet by chance
    with a probability below 2^-48, which does no more harm than that they stay together.
    """
    factors = np.random.default_rng(0).integers(2**63, size=source.space.embed_dim, dtype=np.uint64) * 2 + 1
    parts = []
    for block in rows.split(GROUP_BLOCK):
        bits = (source.caption_rows(block).half() + 0).numpy().view(np.uint16)  # + 0 makes -0 a 0
        parts.append(bits.astype(np.uint64) @ factors)
    return torch.where(source.of_classes(rows), rows, torch.from_numpy(np.concatenate(parts).view(np.int64)))

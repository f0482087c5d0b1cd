"""The one training loop for heads: SGD, warm-up and cosine, a true freeze, selection by early stopping."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from vilu.errors import DataError
from vilu.metrics import auroc
from vilu.nn.heads import FailureHead
from vilu.progress import Task, track
from vilu.types import Batch, EmbeddingSource

Loss = Callable[[Batch, Tensor], Tensor]
"""(batch, failure logits (B,)) -> scalar."""

DEFAULT_STEPS = 6_000
FREEZE_STEPS = 1_000
SCORING_BATCH = 4_096


@dataclass(frozen=True)
class Rows:
    """Some rows of a source, and the columns that their batches bring along."""

    source: EmbeddingSource
    index: Tensor
    columns: tuple[str, ...] = ()

    def batches(self, size: int) -> Iterator[Batch]:
        """The rows in order, in batches whose logits fit into memory (``EmbeddingSource.batches``)."""
        return self.source.batches(size, rows=self.index, columns=self.columns)

    def steps(self, size: int, generator: torch.Generator | None = None) -> Iterator[Batch]:
        """Batches of one training step each, in order or, with a generator, shuffled."""
        order = self.index if generator is None else self.source.shuffled(self.index, generator)
        return self.source.steps(size, rows=order, columns=self.columns)


@dataclass(frozen=True)
class TrainConfig:
    """How a head is trained.

    Attributes:
        epochs: Passes over the training rows; None: as many as make about 6,000 steps, between 10 and 300.
        batch_size: Rows per step (with in-batch candidates, the pool size instead).
        learning_rate: Peak of the schedule.
        momentum: Of SGD.
        weight_decay: Of SGD.
        warmup_epochs: Length of the linear warm-up, at most a tenth of the run; then a cosine to zero.
        freeze_epochs: Epochs during which the attention gets no gradient, no decay and no momentum; None: one epoch
            (the paper), or as many as make 1,000 steps where that is longer (the released code).
        patience: Stop after so many epochs that were not kept; None: never.
        precision: "fp32", or "bf16" for the MLP's products (similarities, softmax and losses stay in float32).
        seed: Of the shuffling.
        device: Where to train.
    """

    epochs: int | None
    batch_size: int
    learning_rate: float
    momentum: float
    weight_decay: float
    warmup_epochs: float
    freeze_epochs: int | None
    patience: int | None
    precision: str
    seed: int
    device: torch.device


@dataclass
class History:
    """What happened, one entry an epoch; ``kept_epoch`` is the one whose weights were kept (0-based)."""

    loss: list[float] = field(default_factory=list)
    validation_auroc: list[float] = field(default_factory=list)
    kept_epoch: int = -1


def schedule(step: int, total: int, warmup: float) -> float:
    """Multiplier of the learning rate: linear from 0.1 to 1 over ``warmup`` steps, then a cosine to 0."""
    if step < warmup:
        return 0.1 + 0.9 * step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def steps_per_epoch(rows: Rows, batch_size: int) -> int:
    """How many batches the rows make.

    Raises:
        DataError: If they do not fill one batch of in-batch candidates.
    """
    size = rows.source.pool_size or batch_size
    steps = len(rows.index) // size if rows.source.pool_size else math.ceil(len(rows.index) / size)
    if not steps:
        raise DataError(f"training needs at least one pool of {size} rows. Got {len(rows.index)} rows.")
    return steps


def default_epochs(steps: int) -> int:
    """As many epochs of ``steps`` steps as make about 6,000 steps, between 10 and 300."""
    return min(max(math.ceil(DEFAULT_STEPS / steps), 10), 300)


def finite_mean(mean: float, learning_rate: float) -> float:
    """The mean loss of an epoch.

    Raises:
        DataError: If it is not finite.
    """
    if not math.isfinite(mean):
        raise DataError(
            f"training diverged: the mean loss of an epoch is {mean}. "
            f"Lower learning_rate (now {learning_rate}) or check the embeddings."
        )
    return mean


def auroc_standard_error(value: float, n_failures: int, n_successes: int) -> float:
    """Standard error of an AUROC.

    Source: Hanley and McNeil, Radiology 1982.
    """
    q1, q2 = value / (2 - value), 2 * value**2 / (1 + value)
    spread = (n_failures - 1) * (q1 - value**2) + (n_successes - 1) * (q2 - value**2)
    return math.sqrt(max(value * (1 - value) + spread, 0.0) / (n_failures * n_successes))


class HeadTrainer:
    """Trains one head in place."""

    def __init__(self, head: FailureHead, loss: Loss, config: TrainConfig) -> None:
        self.head, self.loss, self.config = head.to(config.device), loss, config
        self.attention = [] if head.attention is None else list(head.attention.parameters())
        self.optimizer = torch.optim.SGD(
            [*head.first.values(), head.first_bias, *head.rest.parameters()],
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def run(self, train: Rows, validation: Rows | None) -> History:
        """Train, and leave the head with the weights of the epoch that validation chooses (the last, without one).

        Kept is the latest epoch whose validation AUROC is within one standard error of the best so far: a few hundred
        validation rows cannot tell such epochs apart, and the cosine schedule makes later ones better.

        Raises:
            DataError: If the training rows do not fill one batch of in-batch candidates, or the loss is not finite.
        """
        config, history = self.config, History()
        steps = steps_per_epoch(train, config.batch_size)
        epochs = config.epochs or default_epochs(steps)
        warmup = min(config.warmup_epochs, epochs / 10) * steps
        frozen_epochs = math.ceil(FREEZE_STEPS / steps) if config.freeze_epochs is None else config.freeze_epochs
        generator = torch.Generator().manual_seed(config.seed)
        kept: dict[str, Tensor] = {}
        for parameter in self.attention:
            parameter.requires_grad_(False)
        with track("train", epochs * steps, "steps") as task:
            for epoch in range(epochs):
                if epoch == frozen_epochs:
                    self.thaw()
                rates = [schedule(epoch * steps + i, epochs * steps, warmup) for i in range(steps)]
                history.loss.append(self._epoch(train.steps(config.batch_size, generator), rates, task))
                if self._is_kept(validation, history):
                    history.kept_epoch, kept = epoch, copy.deepcopy(self.head.state_dict())
                if config.patience is not None and epoch - history.kept_epoch >= config.patience:
                    break
        self.head.load_state_dict(kept)
        return history

    def thaw(self) -> None:
        """Let the attention learn; until then the optimiser does not know it: no gradient, no decay, no momentum."""
        for parameter in self.attention:
            parameter.requires_grad_(True)
        if self.attention:
            self.optimizer.add_param_group({"params": self.attention})

    def _epoch(self, batches: Iterator[Batch], rates: list[float], task: Task) -> float:
        """One pass; returns the mean loss over its steps."""
        self.head.train()
        total = torch.zeros((), device=self.config.device)
        for batch, rate in zip(batches, rates, strict=True):
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.learning_rate * rate
            moved = batch.to(self.config.device)
            with torch.autocast(self.config.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
                logit = self.head(moved)
            loss = self.loss(moved, logit)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            total += loss.detach()
            task.advance(1)
        return finite_mean(float(total) / len(rates), self.config.learning_rate)

    def _is_kept(self, validation: Rows | None, history: History) -> bool:
        """Whether this epoch takes the place of the one kept so far; its validation AUROC goes into the history."""
        if validation is None:
            return True
        scored = [(logit, batch.failure) for batch, logit in failure_logits(self.head, validation, self.config.device)]
        logit, failure = (np.concatenate([part.cpu().numpy() for part in parts]) for parts in zip(*scored, strict=True))
        history.validation_auroc.append(float(auroc(logit.astype(np.float64), failure)))
        best, n_failures = max(history.validation_auroc), int(failure.sum())
        return history.validation_auroc[-1] >= best - auroc_standard_error(best, n_failures, len(failure) - n_failures)


@torch.no_grad()
def failure_logits(head: FailureHead, rows: Rows, device: torch.device) -> Iterator[tuple[Batch, Tensor]]:
    """(batch, failure logits (B,)) of every batch, in float32."""
    head.eval()
    for batch in rows.batches(SCORING_BATCH):
        moved = batch.to(device)
        yield moved, head(moved)

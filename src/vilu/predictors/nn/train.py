"""The training loop: plan, optimiser, selection."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vilu.embeddings.rows import SCORING_BATCH, Rows
from vilu.embeddings.similarity import ZeroShot
from vilu.embeddings.source import Batch
from vilu.errors import DataError, UsageError
from vilu.metrics import auroc
from vilu.predictors.nn.checkpoint import (
    Checkpoint,
    History,
    Keeper,
    Position,
    Stateful,
    pack,
    unpack,
)
from vilu.predictors.nn.head import FailureHead
from vilu.predictors.nn.processes import World, current_world
from vilu.progress import Task, track

logger = logging.getLogger(__name__)

FEWEST_STEPS = 1_400
MOST_STEPS = 6_000
EPOCHS = 35
FREEZE_STEPS = 1_000


def schedule(step: int, total: int, warmup: float) -> float:
    """Multiplier of the learning rate: linear from 0.1 to 1 in the warm-up, then a cosine to 0."""
    if step < warmup:
        return 0.1 + 0.9 * step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def default_epochs(steps: int) -> int:
    """Thirty-five epochs of ``steps`` steps, or as many as make 1,400 to 6,000 steps in all.

    The number is between 10 and 300.
    """
    fewest = math.ceil(FEWEST_STEPS / steps)
    most = math.ceil(MOST_STEPS / steps)
    wanted = min(max(EPOCHS, fewest), most)
    return min(max(wanted, 10), 300)


def few_epochs(steps: int) -> int:
    """Twenty epochs of ``steps`` steps, or as many as make 300 to 2,000 steps in all, but ten."""
    wanted = max(20, math.ceil(300 / steps))
    most = max(math.ceil(2_000 / steps), 10)
    return min(wanted, most)


def default_batch(n_rows: int) -> int:
    """A fortieth of the rows, between 32 and 128.

    With few rows the steps are small: their noise finds as good weights sooner.
    """
    return min(max(n_rows // 40, 32), 128)


@dataclass(frozen=True)
class Plan:
    """Lengths of a training run."""

    steps: int  # of an epoch
    epochs: int
    warmup: float  # steps
    frozen: int  # epochs before the attention learns

    @classmethod
    def of(
        cls, steps: int, epochs: int | None, warmup_epochs: float, freeze_epochs: int | None
    ) -> Plan:
        """The plan of ``TrainConfig``'s settings, with epochs of so many steps."""
        epochs = epochs or default_epochs(steps)
        frozen = freeze_epochs
        if frozen is None:
            most = max(epochs // 2, 1)  # else a short run never trains the attention
            frozen = min(math.ceil(FREEZE_STEPS / steps), most)
        warmup = min(warmup_epochs, epochs / 10) * steps
        return cls(steps, epochs, warmup, frozen)

    def rates(self, epoch: int) -> list[float]:
        """Multipliers of the learning rate in an epoch."""
        n_done = epoch * self.steps
        total = self.epochs * self.steps
        return [schedule(n_done + i, total, self.warmup) for i in range(self.steps)]


Loss = Callable[[Batch, Tensor], Tensor]
"""(batch, failure logits (B,)) -> scalar, a mean over the batch."""


def with_answers(rows: Rows, device: torch.device, world: World) -> Rows:
    """The rows with the answers of shared candidates, which are computed once a fit.

    Rows of pools stay as they are: their candidates change with every pass.
    """
    if rows.source.pool_size is not None or rows.answers is not None:
        return rows
    parts = []
    for batch in rows.batches(SCORING_BATCH):
        share = batch.rows(world.mine(len(batch.index)))
        zero_shot = share.to(device).zero_shot
        parts.append([world.gather(values).cpu() for values in zero_shot])
    fields = []
    for blocks in zip(*parts, strict=True):
        values = torch.cat(blocks)
        of_all = values.new_zeros(len(rows.source))
        fields.append(of_all.index_put((rows.index,), values))
    return replace(rows, answers=ZeroShot(*fields))


@dataclass(frozen=True)
class TrainConfig:
    """How a head is trained: parameters of ``HeadPredictor``, and the device."""

    epochs: int | None
    batch_size: int | None
    learning_rate: float
    momentum: float
    weight_decay: float
    warmup_epochs: float
    freeze_epochs: int | None
    patience: int | None
    precision: str
    seed: int
    device: torch.device


def steps_per_epoch(rows: Rows, batch_size: int) -> int:
    """How many batches the rows make."""
    n_rows = len(rows.index)
    pool_size = rows.source.pool_size
    size = pool_size or batch_size
    # a pool is never cut: rows that are left over wait for the next epoch
    steps = n_rows // size if pool_size else math.ceil(n_rows / size)
    if not steps:
        raise DataError(f"training needs at least one pool of {size} rows. Got {n_rows} rows.")
    return steps


def finite_mean(mean: float, learning_rate: float) -> float:
    """The mean loss of an epoch, which must be finite."""
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
    # by the paper's formulas for scores of exponential distributions: the probabilities that two
    # failures score above one success, and that one failure scores above two successes
    q1 = value / (2 - value)
    q2 = 2 * value**2 / (1 + value)
    spread = (n_failures - 1) * (q1 - value**2) + (n_successes - 1) * (q2 - value**2)
    return math.sqrt(max(value * (1 - value) + spread, 0.0) / (n_failures * n_successes))


class HeadTrainer:
    """Trains one head in place, alone or as one of several processes, which all do the same steps.

    Each process computes its share of the rows of a step.
    """

    def __init__(
        self,
        head: FailureHead,
        loss: Loss,
        config: TrainConfig,
        keeper: Keeper | None = None,
        stateful: Sequence[Stateful] = (),
    ) -> None:
        self.head = head.to(config.device)
        self.network: nn.Module = self.head
        self.loss = loss
        self.config = config
        self.keeper = keeper or Keeper()
        self.stateful = stateful
        self.world = current_world()
        warn_of_slow_bfloat16(config)
        self.attention = [] if head.attention is None else list(head.attention.parameters())
        for parameter in self.attention:
            parameter.requires_grad_(False)
        self.generator = torch.Generator().manual_seed(config.seed)
        perceptron = [*head.first.values(), head.first_bias, *head.rest.parameters()]
        # A frozen attention has no gradient, so SGD leaves it alone: no decay either. It is a group
        # of its own, since the fused kernel begins the momenta of a group together.
        self.optimizer = torch.optim.SGD(
            [{"params": perceptron}, {"params": self.attention}],
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def run(self, train: Rows, validation: Rows | None) -> History:
        """Train, and leave the head with the weights of the epoch that validation chooses.

        It is the latest epoch whose validation AUROC is within one standard error of the best so
        far: a few hundred validation rows cannot tell such epochs apart, and the cosine schedule
        makes later ones better. Without validation it is the last epoch.
        """
        config = self.config
        size = config.batch_size or default_batch(len(train.index))
        require_shares(train.source.pool_size or size, self.world)
        train = with_answers(train, config.device, self.world)
        if validation is not None:
            validation = with_answers(validation, config.device, self.world)
        steps = steps_per_epoch(train, size)
        plan = Plan.of(steps, config.epochs, config.warmup_epochs, config.freeze_epochs)
        at = self._begin(plan)
        with track("train", plan.epochs * plan.steps, "steps") as task:
            task.advance(at.epoch * plan.steps)
            while not self._is_over(plan, at):
                if at.epoch >= plan.frozen:
                    self.thaw()
                loss = self._epoch(train, size, plan.rates(at.epoch), task)
                self._end_epoch(validation, loss, at)
                self._save(at)
        self.head.load_state_dict(at.chosen_weights)
        return at.history

    def thaw(self) -> None:
        """Let the attention learn."""
        for parameter in self.attention:
            parameter.requires_grad_(True)

    def _is_over(self, plan: Plan, at: Position) -> bool:
        """Whether all epochs are done, or too many since the one whose weights were kept."""
        if at.epoch >= plan.epochs:
            return True
        if self.config.patience is None:
            return False
        epochs_since = at.epoch - 1 - at.history.kept_epoch
        return epochs_since >= self.config.patience

    def _begin(self, plan: Plan) -> Position:
        """The start, or the position of the newest checkpoint."""
        checkpoint = self.keeper.latest()
        if checkpoint is None:
            return Position()
        if checkpoint.n_epochs() > plan.frozen:  # then the attention has momenta, too
            self.thaw()
        return unpack(checkpoint, self.head, self.optimizer, self.generator, self.stateful)

    def _save(self, at: Position) -> None:
        def make() -> Checkpoint:
            return pack(at, self.head, self.optimizer, self.generator, self.stateful)

        self.keeper.save(make)

    def _epoch(self, train: Rows, size: int, rates: Sequence[float], task: Task) -> float:
        """One pass; returns its mean loss."""
        # Of several processes shared anew in every epoch: the attention thaws between two of them,
        # and torch adds gradients in an order that it settles in the first step. So a resumed run
        # adds in the same order.
        self.network = self.world.shared(self.head)
        self.network.train()
        total = torch.zeros((), device=self.config.device, dtype=torch.float32)
        batches = train.steps(size, self.generator)
        for batch, rate in zip(batches, rates, strict=True):
            total += self.step(batch, self.config.learning_rate * rate)
            task.advance(1)
        return float(total) / len(rates)

    def step(self, batch: Batch, rate: float) -> Tensor:
        """One step on the rows of all processes; returns their mean loss."""
        config = self.config
        part = batch.rows(self.world.mine(len(batch.index)))
        rows = part.to(config.device)
        is_bf16 = config.precision == "bf16"
        with torch.autocast(config.device.type, torch.bfloat16, enabled=is_bf16):
            logit = self.network(rows)
        mean = self.loss(rows, logit)  # also without rows: it may count over all processes
        share = len(part.index) / len(batch.index)
        if share:
            loss = mean * share  # the sum over the processes is the mean over all rows
        else:
            loss = logit.sum()  # a sum of nothing, so that gradients are there, and zero
        self.optimizer.zero_grad(set_to_none=True)
        (loss * self.world.size).backward()  # gradients are averaged over the processes
        value = loss.detach()
        self.world.sum_(value)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return value

    def _end_epoch(self, validation: Rows | None, loss: float, at: Position) -> None:
        """Note the epoch's figures, and keep its weights if validation chooses them."""
        history = at.history
        history.loss.append(finite_mean(loss, self.config.learning_rate))
        if self._is_chosen(validation, history):
            history.kept_epoch = at.epoch
            at.chosen_weights = copy.deepcopy(self.head.state_dict())
        at.epoch += 1

    def _is_chosen(self, validation: Rows | None, history: History) -> bool:
        """Whether validation chooses this epoch; its AUROC goes into the history."""
        if validation is None:
            return True
        logit, failure = self._validate(validation)
        latest = float(auroc(logit.astype(np.float64), failure))
        history.validation_auroc.append(latest)
        best = max(history.validation_auroc)
        n_failures = int(failure.sum())
        error = auroc_standard_error(best, n_failures, len(failure) - n_failures)
        return latest >= best - error

    @torch.no_grad()
    def _validate(self, validation: Rows) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """(N,) failure logits and failures of all processes' shares of the rows."""
        self.head.eval()
        logits = []
        failures = []
        for batch in validation.batches(SCORING_BATCH):
            part = batch.rows(self.world.mine(len(batch.index))).to(self.config.device)
            logits.append(self.head(part))
            failures.append(part.failure)
        logit = self.world.gather(torch.cat(logits))
        failure = self.world.gather(torch.cat(failures))
        return logit.cpu().numpy(), failure.cpu().numpy()


def warn_of_slow_bfloat16(config: TrainConfig) -> None:
    """Warn where the processor would imitate bfloat16."""
    if config.precision != "bf16" or config.device.type != "cpu":
        return
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        logger.warning(
            "this processor has no products of bfloat16: "
            "training takes many times as long as with fp32"
        )


def require_shares(n_rows: int, world: World) -> None:
    """Refuse processes that would have nothing to do."""
    if n_rows < world.size:
        raise UsageError(
            f"a step of {n_rows} rows cannot be shared by {world.size} processes. "
            "Start fewer, or take larger batches."
        )


BETAS = (0.8, 0.95)
"""As in Pretrained Visual Uncertainties."""


@dataclass(frozen=True)
class AdamWConfig:
    """How a network is trained: parameters of ``NetworkPredictor``, and the device."""

    epochs: int | None
    batch_size: int | None
    learning_rate: float
    weight_decay: float
    seed: int
    device: torch.device


def train_adamw(
    network: nn.Module,
    loss: Loss,
    rows: Rows,
    config: AdamWConfig,
    length: Callable[[int], int] = default_epochs,
) -> list[float]:
    """Train a network of a batch to (B,) in place; returns the mean losses of all epochs.

    Their number is that of the config, or ``length`` of the steps of one.
    """
    size = config.batch_size or default_batch(len(rows.index))
    steps = steps_per_epoch(rows, size)
    epochs = config.epochs or length(steps)
    total_steps = epochs * steps
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.AdamW(
        network.to(config.device).parameters(),
        lr=config.learning_rate,
        betas=BETAS,
        weight_decay=config.weight_decay,
        fused=True,
    )

    def rate(step: int) -> float:
        return schedule(step, total_steps, 0)

    cosine = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    history = []
    with track("train", total_steps, "steps") as task:
        for _ in range(epochs):
            total = torch.zeros((), device=config.device, dtype=torch.float32)
            for batch in rows.steps(size, generator):
                total += _adamw_step(network, loss, batch.to(config.device), optimizer)
                cosine.step()
                task.advance(1)
            history.append(finite_mean(float(total) / steps, config.learning_rate))
    return history


def _adamw_step(
    network: nn.Module, loss: Loss, batch: Batch, optimizer: torch.optim.AdamW
) -> Tensor:
    """One step; returns the loss before it."""
    value = loss(batch, network(batch))
    optimizer.zero_grad(set_to_none=True)
    value.backward()
    optimizer.step()
    return value.detach()

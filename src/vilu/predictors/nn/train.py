"""Training loops for networks: epoch count, optimiser, and selection of the best epoch."""

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
    CheckpointSaver,
    History,
    Position,
    Stateful,
    pack_checkpoint,
    unpack_checkpoint,
)
from vilu.predictors.nn.head import FailureHead
from vilu.predictors.nn.processes import World, current_world
from vilu.progress import Task, track

logger = logging.getLogger(__name__)

DEFAULT_EPOCHS = 35
"""Default epoch count, if so many epochs have ``MIN_STEPS`` to ``MAX_STEPS`` steps in all."""
MIN_STEPS = 1_400
"""Minimum number of steps in a training run with the default epoch count."""
MAX_STEPS = 6_000
"""Maximum number of steps in a training run with the default epoch count."""
FREEZE_STEPS = 1_000
"""By default, a head's attention is trained after about this many steps, or half of all epochs."""


def learning_rate_factor(step: int, total_steps: int, warmup_steps: float) -> float:
    """Compute the factor on the learning rate in a training step.

    The factor rises linearly from 0.1 to 1 in the warm-up, and then falls to 0 as half a cosine.
    """
    if step < warmup_steps:
        return 0.1 + 0.9 * step / warmup_steps
    angle = math.pi * (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return 0.5 * (1 + math.cos(angle))  # 1 at the angle 0, and 0 at the angle pi


def default_epochs(epoch_steps: int) -> int:
    """Compute the default epoch count, given ``epoch_steps`` steps per epoch.

    The count is 35, or more epochs to reach 1,400 steps in all, or fewer epochs to stay near 6,000
    steps in all. Then the count is clipped to 10 ... 300.
    """
    min_epochs = math.ceil(MIN_STEPS / epoch_steps)
    max_epochs = math.ceil(MAX_STEPS / epoch_steps)
    epochs = min(max(DEFAULT_EPOCHS, min_epochs), max_epochs)
    return min(max(epochs, 10), 300)


def small_network_epochs(epoch_steps: int) -> int:
    """Compute a small network's default epoch count, given ``epoch_steps`` steps per epoch.

    The count is 20, or more if 20 epochs have fewer than 300 steps in all. If 20 epochs have more
    than 2,000 steps in all, the count is reduced, but not below 10.
    """
    min_epochs = max(20, math.ceil(300 / epoch_steps))
    max_epochs = max(math.ceil(2_000 / epoch_steps), 10)
    return min(min_epochs, max_epochs)


def default_batch_size(n_rows: int) -> int:
    """Compute the default batch size: a fortieth of the row count, clipped to 32 ... 128.

    With few rows the batches are small, because noisy steps find equally good weights sooner.
    """
    return min(max(n_rows // 40, 32), 128)


@dataclass(frozen=True)
class Plan:
    """Step counts and epoch counts for a training run."""

    epoch_steps: int  # steps per epoch
    epochs: int
    warmup_steps: float
    frozen_epochs: int  # how many epochs end before the attention is trained

    @classmethod
    def of(
        cls, epoch_steps: int, epochs: int | None, warmup_epochs: float, freeze_epochs: int | None
    ) -> Plan:
        """Make the plan, given the steps per epoch and three parameters of ``HeadPredictor``."""
        epochs = epochs or default_epochs(epoch_steps)
        frozen_epochs = freeze_epochs
        if frozen_epochs is None:
            # without this maximum, a short run would never train the attention
            max_frozen = max(epochs // 2, 1)
            frozen_epochs = min(math.ceil(FREEZE_STEPS / epoch_steps), max_frozen)
        warmup_steps = min(warmup_epochs, epochs / 10) * epoch_steps  # at most a tenth of all steps
        return cls(
            epoch_steps=epoch_steps,
            epochs=epochs,
            warmup_steps=warmup_steps,
            frozen_epochs=frozen_epochs,
        )

    def rate_factors(self, epoch: int) -> list[float]:
        """Compute the factor on the learning rate for each step in an epoch."""
        first_step = epoch * self.epoch_steps
        total_steps = self.epochs * self.epoch_steps
        rate_factors = []
        for step in range(first_step, first_step + self.epoch_steps):
            rate_factor = learning_rate_factor(step, total_steps, self.warmup_steps)
            rate_factors.append(rate_factor)
        return rate_factors


Loss = Callable[[Batch, Tensor], Tensor]
"""Function from a batch and the failure logits (B,) to the batch's mean loss."""


def with_zero_shot_answers(rows: Rows, device: torch.device, world: World) -> Rows:
    """Return the rows with zero-shot answers, so that a fit computes every answer only once.

    The processes in ``world`` share the computation. Rows with caption pools are returned
    unchanged, because every epoch draws new pools, with new answers.
    """
    if rows.source.pool_size is not None or rows.answers is not None:
        return rows
    answers_of_batches = []
    for batch in rows.batches(SCORING_BATCH):
        rows_of_process = world.process_slice(len(batch.index))
        process_batch = batch.rows(rows_of_process)
        zero_shot = process_batch.to(device).zero_shot  # a tuple of tensors
        answers_of_batch = [world.gather(tensor).cpu() for tensor in zero_shot]
        answers_of_batches.append(answers_of_batch)
    fields = []
    # ``zip`` turns each batch's fields into blocks for each field of ``ZeroShot``
    for blocks_of_field in zip(*answers_of_batches, strict=True):
        field_of_rows = torch.cat(blocks_of_field)
        # Every row of the source gets an entry. Entries of rows outside ``rows`` are not used.
        field_of_source = field_of_rows.new_zeros(len(rows.source))
        filled_field = field_of_source.index_put((rows.index,), field_of_rows)
        fields.append(filled_field)
    answers = ZeroShot(*fields)
    return replace(rows, answers=answers)


@dataclass(frozen=True)
class TrainConfig:
    """Settings for training a head: parameters of ``HeadPredictor``, and the device."""

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
    """Count the training steps in a pass over the rows, with one batch per step."""
    n_rows = len(rows.index)
    pool_size = rows.source.pool_size
    if not pool_size:
        return math.ceil(n_rows / batch_size)
    # A step trains on a full pool. Rows left over are too few for a pool: this epoch omits them.
    n_pools = n_rows // pool_size
    if not n_pools:
        raise DataError(f"training needs at least one pool of {pool_size} rows. Got {n_rows} rows.")
    return n_pools


def require_finite_loss(mean_loss: float, learning_rate: float) -> float:
    """Return an epoch's mean loss, or raise an error if the mean loss is not finite."""
    if not math.isfinite(mean_loss):
        raise DataError(
            f"training diverged: the mean loss of an epoch is {mean_loss}. "
            f"Lower learning_rate (now {learning_rate}) or check the embeddings."
        )
    return mean_loss


def auroc_standard_error(value: float, n_failures: int, n_successes: int) -> float:
    """Compute the standard error of an AUROC ``value``.

    Source: Hanley and McNeil, Radiology 1982. Their formulas for q1 and q2 assume exponentially
    distributed scores.
    """
    q1 = value / (2 - value)  # probability that two failures score above a success
    q2 = 2 * value**2 / (1 + value)  # probability that a failure scores above two successes
    variance_of_pair = value * (1 - value)
    covariances = (n_failures - 1) * (q1 - value**2) + (n_successes - 1) * (q2 - value**2)
    total = max(variance_of_pair + covariances, 0.0)
    return math.sqrt(total / (n_failures * n_successes))


class HeadTrainer:
    """Trains a head, by this process alone or by several processes together.

    The head is changed in place. With several processes, each process computes a part of the rows
    in every step, and all processes get the same weights.
    """

    def __init__(
        self,
        head: FailureHead,
        loss: Loss,
        config: TrainConfig,
        saver: CheckpointSaver | None = None,
        stateful_parts: Sequence[Stateful] = (),
    ) -> None:
        self.head = head.to(config.device)
        self.network: nn.Module = self.head
        self.loss = loss
        self.config = config
        self.saver = saver or CheckpointSaver()
        self.stateful_parts = stateful_parts
        self.world = current_world()
        warn_of_slow_bfloat16(config)
        self.attention_parameters: list[nn.Parameter] = []
        if head.attention is not None:
            self.attention_parameters = list(head.attention.parameters())
        for parameter in self.attention_parameters:  # frozen until ``unfreeze_attention``
            parameter.requires_grad_(False)
        self.order_generator = torch.Generator().manual_seed(config.seed)  # shuffles the rows
        perceptron_parameters = [*head.first.values(), head.first_bias, *head.rest.parameters()]
        # A frozen attention has no gradients, so SGD does not change the attention, not even by
        # weight decay. The attention has a separate group, because the fused SGD kernel starts
        # the momenta of all parameters in a group in the same step.
        self.optimizer = torch.optim.SGD(
            [{"params": perceptron_parameters}, {"params": self.attention_parameters}],
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def run(self, train: Rows, validation: Rows | None) -> History:
        """Train the head, and load the weights from the epoch chosen by validation.

        After every epoch, the validation AUROC is compared with the best AUROC so far. If it is at
        most one standard error lower, the epoch is chosen in place of earlier epochs. A few hundred
        validation rows cannot distinguish such epochs, and with the cosine schedule later epochs
        are usually better. Without validation rows, the last epoch is chosen.
        """
        config = self.config
        batch_size = config.batch_size or default_batch_size(len(train.index))
        require_rows_for_processes(train.source.pool_size or batch_size, self.world)
        train = with_zero_shot_answers(train, config.device, self.world)
        if validation is not None:
            validation = with_zero_shot_answers(validation, config.device, self.world)
        epoch_steps = steps_per_epoch(train, batch_size)
        plan = Plan.of(epoch_steps, config.epochs, config.warmup_epochs, config.freeze_epochs)
        position = self._resume_or_begin(plan)
        with track("train", plan.epochs * plan.epoch_steps, "steps") as task:
            task.advance(position.epoch * plan.epoch_steps)
            while not self._is_over(plan, position):
                if position.epoch >= plan.frozen_epochs:
                    self.unfreeze_attention()
                rate_factors = plan.rate_factors(position.epoch)
                loss = self._train_epoch(train, batch_size, rate_factors, task)
                self._end_epoch(validation, loss, position)
                self._save(position)
        self.head.load_state_dict(position.chosen_weights)
        return position.history

    def unfreeze_attention(self) -> None:
        """Train the attention from now on."""
        for parameter in self.attention_parameters:
            parameter.requires_grad_(True)

    def _is_over(self, plan: Plan, position: Position) -> bool:
        """Return whether all epochs, or ``patience`` epochs since the chosen epoch, are done."""
        if position.epoch >= plan.epochs:
            return True
        if self.config.patience is None:
            return False
        latest_epoch = position.epoch - 1
        epochs_since_chosen = latest_epoch - position.history.kept_epoch
        return epochs_since_chosen >= self.config.patience

    def _resume_or_begin(self, plan: Plan) -> Position:
        """Load the latest checkpoint and return its position, or return the beginning."""
        checkpoint = self.saver.latest_checkpoint()
        if checkpoint is None:
            return Position()
        attention_was_trained = checkpoint.n_epochs() > plan.frozen_epochs
        if attention_was_trained:  # the checkpoint then has momenta for the attention
            self.unfreeze_attention()
        return unpack_checkpoint(
            checkpoint, self.head, self.optimizer, self.order_generator, self.stateful_parts
        )

    def _save(self, position: Position) -> None:
        """Save a checkpoint, if checkpoints are wanted."""

        def make_checkpoint() -> Checkpoint:
            return pack_checkpoint(
                position, self.head, self.optimizer, self.order_generator, self.stateful_parts
            )

        self.saver.save(make_checkpoint)

    def _train_epoch(
        self, train: Rows, batch_size: int, rate_factors: Sequence[float], task: Task
    ) -> float:
        """Train for an epoch, with these factors on the learning rate. Return the mean loss.

        For several processes, every epoch wraps the network anew, for two reasons. First, the
        wrapper must know the trained parameters, and the attention is unfrozen between two epochs.
        Second, in its first step a wrapper chooses the order in which gradients are added. A
        resumed run begins with a new wrapper. An uninterrupted run must therefore have a new
        wrapper in every epoch, too. Otherwise the two runs could round differently.
        """
        self.network = self.world.wrap_for_averaging(self.head)
        self.network.train()
        loss_sum = torch.zeros((), device=self.config.device, dtype=torch.float32)
        batches = train.steps(batch_size, self.order_generator)
        for batch, rate_factor in zip(batches, rate_factors, strict=True):
            loss_sum += self.step(batch, self.config.learning_rate * rate_factor)
            task.advance(1)
        return float(loss_sum) / len(rate_factors)

    def step(self, batch: Batch, learning_rate: float) -> Tensor:
        """Train on a batch, at this learning rate. Return the batch's mean loss before the step."""
        config = self.config
        rows_of_process = self.world.process_slice(len(batch.index))
        process_batch = batch.rows(rows_of_process).to(config.device)
        is_bf16 = config.precision == "bf16"
        with torch.autocast(config.device.type, torch.bfloat16, enabled=is_bf16):
            logit = self.network(process_batch)
        # The loss is called even if this process has no rows, because the loss may wait for a call
        # from every process.
        mean_loss = self.loss(process_batch, logit)
        share_of_batch = len(process_batch.index) / len(batch.index)
        if share_of_batch:
            # the sum over the processes is the mean over the batch
            loss = mean_loss * share_of_batch
        else:
            # a sum over no rows: unlike a constant 0, it has gradients, and they are zero
            loss = logit.sum()
        self.optimizer.zero_grad(set_to_none=True)
        # The backward pass averages gradients over the processes. The factor makes this a sum.
        (loss * self.world.size).backward()
        mean_of_batch = loss.detach()
        self.world.sum_(mean_of_batch)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        return mean_of_batch

    def _end_epoch(self, validation: Rows | None, loss: float, position: Position) -> None:
        """Record an epoch's loss and AUROC, and store a chosen epoch's weights."""
        history = position.history
        finite_loss = require_finite_loss(loss, self.config.learning_rate)
        history.loss.append(finite_loss)
        if self._is_chosen(validation, history):
            history.kept_epoch = position.epoch
            weights = self.head.state_dict()
            position.chosen_weights = copy.deepcopy(weights)
        position.epoch += 1

    def _is_chosen(self, validation: Rows | None, history: History) -> bool:
        """Return whether this epoch is chosen, and add the validation AUROC to the history."""
        if validation is None:
            return True
        logit, failure = self._validate(validation)
        latest_auroc = float(auroc(logit.astype(np.float64), failure))
        history.validation_auroc.append(latest_auroc)
        best_auroc = max(history.validation_auroc)
        n_failures = int(failure.sum())
        n_successes = len(failure) - n_failures
        standard_error = auroc_standard_error(best_auroc, n_failures, n_successes)
        return latest_auroc >= best_auroc - standard_error

    @torch.no_grad()
    def _validate(self, validation: Rows) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Compute failure logits (N,) and failures (N,) for the validation rows.

        Each process scores a part of the rows, and gets the results from all processes. The order
        of the rows is not kept.
        """
        self.head.eval()
        logits = []
        failures = []
        for batch in validation.batches(SCORING_BATCH):
            rows_of_process = self.world.process_slice(len(batch.index))
            process_batch = batch.rows(rows_of_process).to(self.config.device)
            logit_of_batch = self.head(process_batch)
            logits.append(logit_of_batch)
            failures.append(process_batch.failure)
        logit_of_process = torch.cat(logits)
        logit = self.world.gather(logit_of_process)
        failure_of_process = torch.cat(failures)
        failure = self.world.gather(failure_of_process)
        return logit.cpu().numpy(), failure.cpu().numpy()


def warn_of_slow_bfloat16(config: TrainConfig) -> None:
    """Warn if training uses bfloat16, and the processor emulates it for lack of instructions."""
    if config.precision != "bf16" or config.device.type != "cpu":
        return
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        logger.warning(
            "this processor has no bfloat16 instructions: "
            "training takes many times as long as with fp32"
        )


def require_rows_for_processes(n_rows: int, world: World) -> None:
    """Refuse steps with fewer rows than processes: some processes would have no work."""
    if n_rows < world.size:
        raise UsageError(
            f"a step of {n_rows} rows cannot be shared by {world.size} processes. "
            "Start fewer, or take larger batches."
        )


ADAMW_BETAS = (0.8, 0.95)
"""AdamW's betas, as in Pretrained Visual Uncertainties."""


@dataclass(frozen=True)
class AdamWConfig:
    """Settings for training a network by ``train_adamw``."""

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
    epochs_of_steps: Callable[[int], int] = default_epochs,
) -> list[float]:
    """Train a network in place by AdamW. Return every epoch's mean loss.

    The loss is a function of a batch and the network's output for this batch. If ``config``
    has no epoch count, ``epochs_of_steps`` computes the epoch count from the number of steps per
    epoch.
    """
    batch_size = config.batch_size or default_batch_size(len(rows.index))
    epoch_steps = steps_per_epoch(rows, batch_size)
    epochs = config.epochs or epochs_of_steps(epoch_steps)
    total_steps = epochs * epoch_steps
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = _adamw_optimizer(network, config)

    def rate_factor(step: int) -> float:
        return learning_rate_factor(step, total_steps, warmup_steps=0)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_factor)
    history = []
    with track("train", total_steps, "steps") as task:
        for _ in range(epochs):
            loss_sum = torch.zeros((), device=config.device, dtype=torch.float32)
            for batch in rows.steps(batch_size, generator):
                loss_sum += _adamw_step(network, loss, batch.to(config.device), optimizer)
                scheduler.step()
                task.advance(1)
            mean_loss = require_finite_loss(float(loss_sum) / epoch_steps, config.learning_rate)
            history.append(mean_loss)
    return history


def _adamw_optimizer(network: nn.Module, config: AdamWConfig) -> torch.optim.AdamW:
    """Move a network to ``config.device``, and make AdamW for all its parameters."""
    network.to(config.device)
    parameters = network.parameters()
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=ADAMW_BETAS,
        weight_decay=config.weight_decay,
        fused=True,
    )


def _adamw_step(
    network: nn.Module, loss: Loss, batch: Batch, optimizer: torch.optim.AdamW
) -> Tensor:
    """Train on a batch. Return the batch's mean loss before the step."""
    mean_loss = loss(batch, network(batch))
    optimizer.zero_grad(set_to_none=True)
    mean_loss.backward()
    optimizer.step()
    return mean_loss.detach()

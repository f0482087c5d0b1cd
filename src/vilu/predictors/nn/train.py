"""The training loop: plan, optimiser, selection."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from vilu.embeddings.rows import SCORING_BATCH, Rows
from vilu.embeddings.similarity import TILE_CELLS, ZeroShot
from vilu.embeddings.source import Batch
from vilu.errors import DataError, UsageError
from vilu.metrics import auroc
from vilu.predictors.nn.checkpoint import History, Keeper, Position, Stateful, load, pack, unpack
from vilu.predictors.nn.head import FailureHead, texts_first
from vilu.predictors.nn.processes import World, current_world
from vilu.progress import Task, track

logger = logging.getLogger(__name__)

FEWEST_STEPS, MOST_STEPS = 1_400, 6_000
EPOCHS = 35
FREEZE_STEPS = 1_000


def schedule(step: int, total: int, warmup: float) -> float:
    """Multiplier of the learning rate: linear from 0.1 to 1 over ``warmup`` steps, then a cosine to 0."""
    if step < warmup:
        return 0.1 + 0.9 * step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def default_epochs(steps: int) -> int:
    """Thirty-five, or as many epochs of ``steps`` steps as make 1,400 steps, or 6,000, but between 10 and 300."""
    fewest, most = (math.ceil(n / steps) for n in (FEWEST_STEPS, MOST_STEPS))
    return min(max(min(max(EPOCHS, fewest), most), 10), 300)


def few_epochs(steps: int) -> int:
    """Twenty epochs of ``steps`` steps, or as many as make 300 steps, or no more than make 2,000, but ten."""
    return min(max(20, math.ceil(300 / steps)), max(math.ceil(2_000 / steps), 10))


def default_batch(n_rows: int) -> int:
    """A fortieth of the rows, between 32 and 128: of few rows small steps, whose noise finds as good weights sooner."""
    return min(max(n_rows // 40, 32), 128)


@dataclass(frozen=True)
class Plan:
    """Lengths of a training run: steps of an epoch, passes, steps of the warm-up, and epochs without the attention."""

    steps: int
    epochs: int
    warmup: float
    frozen: int

    @classmethod
    def of(
        cls, steps: int, epochs: int | None, warmup_epochs: float, freeze_epochs: int | None
    ) -> Plan:
        """What the settings of ``TrainConfig`` mean for epochs of so many steps."""
        epochs = epochs or default_epochs(steps)
        by_default = min(
            math.ceil(FREEZE_STEPS / steps), max(epochs // 2, 1)
        )  # else a short run never trains it
        frozen = by_default if freeze_epochs is None else freeze_epochs
        return cls(steps, epochs, min(warmup_epochs, epochs / 10) * steps, frozen)

    def rates(self, epoch: int, first: int) -> list[float]:
        """Multipliers of the learning rate in an epoch, from step ``first`` on."""
        done = epoch * self.steps
        return [
            schedule(done + i, self.epochs * self.steps, self.warmup)
            for i in range(first, self.steps)
        ]


Loss = Callable[[Batch, Tensor], Tensor]
"""(batch, failure logits (B,)) -> scalar, a mean over the batch."""


def with_answers(rows: Rows, device: torch.device, world: World) -> Rows:
    """The rows with the answers of shared candidates, computed once a fit; pools have others in every pass."""
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
    size = rows.source.pool_size or batch_size
    steps = len(rows.index) // size if rows.source.pool_size else math.ceil(len(rows.index) / size)
    if not steps:
        raise DataError(
            f"training needs at least one pool of {size} rows. Got {len(rows.index)} rows."
        )
    return steps


def finite_mean(mean: float, learning_rate: float) -> float:
    """The mean loss of an epoch."""
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


class Descent:
    """Stochastic gradient descent with momentum, m <- mu m + dW + lambda W, W <- W - rate m.

    In an epoch whose K texts T stay, a matrix W that multiplies nothing else is not moved itself:
    of it R = T W' is looked at, (K, D), and with dR the derivatives of the loss in R, those in W
    are dR' T. All steps are linear, so that (W, m) are A (W, m), as they were when the epoch began,
    and (C, n)' T: A is a 2 x 2 matrix, and steps on C are such as if dR were its gradient, with n
    for its momentum. W and m are written when the epoch ends.

    Attributes:
        momenta: m of each parameter that learns.
        made: R of each matrix of texts that stay.
        moving: What has a gradient (W or R), what steps move by it (W or C), and its momentum.
    """

    def __init__(self, momentum: float, weight_decay: float) -> None:
        self.momentum, self.weight_decay = momentum, weight_decay
        self.momenta, self.products, self.found = (
            dict[Tensor, Tensor](),
            dict[Tensor, Tensor](),
            dict[str, Tensor](),
        )

    def learn(self, parameters: Iterable[Tensor]) -> None:
        """Move these, too, from the next epoch on."""
        self.momenta |= {
            new: torch.zeros_like(new) for new in parameters if new not in self.momenta
        }

    @torch.no_grad()
    def begin(self, text: Tensor, matrices: Sequence[Tensor]) -> None:
        """An epoch, or the rest of one that was restored; ``matrices`` are those of the texts."""
        self.text, self.gram, self.decay = text, text @ text.T, torch.eye(2, dtype=torch.float64)
        self.products = {
            matrix: (text @ matrix.T).requires_grad_(matrix in self.momenta) for matrix in matrices
        }
        learned = [matrix for matrix in matrices if matrix in self.momenta]
        self.start = {
            matrix: torch.stack([self.products[matrix], text @ self.momenta[matrix].T])
            for matrix in learned
        }
        self.gained = {matrix: torch.zeros_like(start) for matrix, start in self.start.items()}
        if self.found:
            load("steps of an epoch", self.found, self.state())
            self._make()
        self.found = {}
        self.moving = [(p, p, m) for p, m in self.momenta.items() if p not in self.products]
        self.moving += [(self.products[matrix], *gained) for matrix, gained in self.gained.items()]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Along the gradients, which are taken."""
        sgd(
            [moved for _, moved, _ in self.moving],
            [cast("Tensor", leaf.grad) for leaf, _, _ in self.moving],
            [momentum for _, _, momentum in self.moving],
            fused=True,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            lr=rate,
            dampening=0,
            nesterov=False,
            maximize=False,
        )
        for leaf, _, _ in self.moving:
            leaf.grad = None
        without = [
            [1 - rate * self.weight_decay, -rate * self.momentum],
            [self.weight_decay, self.momentum],
        ]
        self.decay.copy_(torch.tensor(without, dtype=torch.float64) @ self.decay)
        self._make()

    def _make(self) -> None:
        """R, by what the steps have gained."""
        kept, moved = self.decay[0].tolist()
        for matrix, (start, momentum) in self.start.items():
            decayed = torch.add(kept * start, momentum, alpha=moved)
            torch.addmm(decayed, self.gram, self.gained[matrix][0], out=self.products[matrix])

    @torch.no_grad()
    def end(self) -> None:
        """Write what the epoch gained into the matrices and their momenta."""
        for matrix, gained in self.gained.items():
            both = matrix, self.momenta[matrix]
            decayed = torch.tensordot(self.decay.to(matrix), torch.stack(both), 1)
            for into, new in zip(both, decayed + gained.mT @ self.text, strict=True):
                into.copy_(new)
        self.products, self.start, self.gained = {}, {}, {}

    def state(self) -> dict[str, Tensor]:
        """In the middle of an epoch: what its steps have gained."""
        gained = {str(i): each for i, each in enumerate(self.gained.values())}
        return {**gained, "decay": self.decay} if gained else {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """The inverse of ``state``, for the next epoch that begins."""
        self.found = state


class HeadTrainer:
    """Trains one head in place, alone or as one of several processes, which all do the same steps.

    Each process computes its share of the rows of a step; the gradients are summed. Not by
    ``DistributedDataParallel``: that fixes at its start which parameters have gradients, and the
    attention has none before it thaws; and it averages over processes, where shares of rows are
    unequal.
    """

    def __init__(
        self,
        head: FailureHead,
        loss: Loss,
        config: TrainConfig,
        keeper: Keeper | None = None,
        stateful: Sequence[Stateful] = (),
    ) -> None:
        self.head, self.loss, self.config = head.to(config.device), loss, config
        self.keeper, self.stateful, self.world = keeper or Keeper(), stateful, current_world()
        if (config.precision, config.device.type, torch.backends.cpu.get_cpu_capability()) == (
            "bf16",
            "cpu",
            "AVX2",
        ):
            logger.warning(
                "this processor has no products of bfloat16: training takes many times as long as with fp32"
            )
        self.attention = [] if head.attention is None else list(head.attention.parameters())
        for parameter in self.attention:
            parameter.requires_grad_(False)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.descent = Descent(config.momentum, config.weight_decay)
        self.descent.learn([*head.first.values(), head.first_bias, *head.rest.parameters()])

    def run(self, train: Rows, validation: Rows | None) -> History:
        """Train, and leave the head with the weights of the epoch that validation chooses (the last, without one).

        Kept is the latest epoch whose validation AUROC is within one standard error of the best so
        far: a few hundred validation rows cannot tell such epochs apart, and the cosine schedule
        makes later ones better.
        """
        config, size = self.config, self.config.batch_size or default_batch(len(train.index))
        require_shares(train.source.pool_size or size, self.world)
        train, validation = (
            with_answers(train, config.device, self.world),
            validation and with_answers(validation, config.device, self.world),
        )
        steps = steps_per_epoch(train, size)
        plan = Plan.of(steps, config.epochs, config.warmup_epochs, config.freeze_epochs)
        at, patience = self._begin(plan), math.inf if config.patience is None else config.patience
        with track("train", plan.epochs * plan.steps, "steps") as task:
            task.advance(at.epoch * plan.steps + at.step)
            while at.epoch < plan.epochs and at.epoch - 1 - at.history.kept_epoch < patience:
                if at.epoch >= plan.frozen:
                    self.thaw()
                self.generator.set_state(at.order)
                self._epoch(train, size, plan, at, task)
                self._end_epoch(validation, plan, at)
                self._save(at)
        self.head.load_state_dict(at.chosen_weights)
        return at.history

    def thaw(self) -> None:
        """Let the attention learn; until then the descent does not know it: no gradient, no decay, no momentum."""
        for parameter in self.attention:
            parameter.requires_grad_(True)
        self.descent.learn(self.attention)

    def _begin(self, plan: Plan) -> Position:
        """At the start, or where the newest checkpoint says."""
        found = self.keeper.latest()
        if found is None:
            return Position(self.generator.get_state(), torch.zeros((), device=self.config.device))
        epoch, step = found.numbers()
        if epoch > plan.frozen or (epoch == plan.frozen and step):
            self.thaw()
        return unpack(found, self.head, self.descent.momenta, [*self.stateful, self.descent])

    def _save(self, at: Position) -> None:
        self.keeper.save(
            lambda: pack(at, self.head, self.descent.momenta, [*self.stateful, self.descent])
        )

    def _epoch(self, train: Rows, size: int, plan: Plan, at: Position, task: Task) -> None:
        """The rest of one pass."""
        self.head.train()
        self.begin_steps(train, size)
        batches, rates = train.steps(size, self.generator, at.step), plan.rates(at.epoch, at.step)
        for batch, rate in zip(batches, rates, strict=True):
            at.total += self._step(batch, self.config.learning_rate * rate)
            at.step += 1
            task.advance(1)
            if self.keeper.due():
                self._save(at)
        self.descent.end()
        self.head.products = {}

    def begin_steps(self, train: Rows, size: int) -> None:
        """Those of an epoch; where all see a few texts, what matrices make of them is trained."""
        source = train.source
        few = (
            source.pool_size is None and size * len(source.text) <= TILE_CELLS
        )  # of more the attention takes tiles
        stay = few and texts_first(size, *source.text.shape)
        text = source.text.to(self.config.device) if stay else torch.empty(0, 0)
        self.descent.begin(text, self.head.text_matrices() if stay else [])
        self.head.products = self.descent.products

    def _step(self, batch: Batch, rate: float) -> Tensor:
        """One step on all rows of a batch, this process's and the others'; returns their mean loss."""
        part = batch.rows(self.world.mine(len(batch.index)))
        moved, share = part.to(self.config.device), len(part.index) / len(batch.index)
        with torch.autocast(
            self.config.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"
        ):
            logit = self.head(moved)
        mean = self.loss(moved, logit)  # also without rows: it may count over all processes
        loss = (
            mean * share if share else logit.sum()
        )  # a sum of nothing, so that gradients are there, and zero
        loss.backward()
        value = loss.detach()
        self.world.sum_([*(cast("Tensor", leaf.grad) for leaf, _, _ in self.descent.moving), value])
        self.descent.step(rate)
        return value

    def _end_epoch(self, validation: Rows | None, plan: Plan, at: Position) -> None:
        """Write down what the epoch gave, and keep its weights if validation says so."""
        at.history.loss.append(finite_mean(float(at.total) / plan.steps, self.config.learning_rate))
        if self._is_kept(validation, at.history):
            at.history.kept_epoch, at.chosen_weights = (
                at.epoch,
                copy.deepcopy(self.head.state_dict()),
            )
        at.epoch, at.step = at.epoch + 1, 0
        at.total, at.order = torch.zeros_like(at.total), self.generator.get_state()

    def _is_kept(self, validation: Rows | None, history: History) -> bool:
        """Whether this epoch takes the place of the one kept so far; its validation AUROC goes into the history."""
        if validation is None:
            return True
        self.head.eval()
        scored = []
        with torch.no_grad():
            for batch in validation.batches(SCORING_BATCH):
                part = batch.rows(self.world.mine(len(batch.index))).to(self.config.device)
                scored.append((self.head(part), part.failure))
        logit, failure = (
            self.world.gather(torch.cat(part)).cpu().numpy() for part in zip(*scored, strict=True)
        )
        history.validation_auroc.append(float(auroc(logit.astype(np.float64), failure)))
        best, n_failures = max(history.validation_auroc), int(failure.sum())
        return history.validation_auroc[-1] >= best - auroc_standard_error(
            best, n_failures, len(failure) - n_failures
        )


def require_shares(n_rows: int, world: World) -> None:
    """Refuse processes that would have nothing to do."""
    if n_rows < world.size:
        raise UsageError(
            f"a step of {n_rows} rows cannot be shared by {world.size} processes. Start fewer, or take larger batches."
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
    """Train a network of a batch to (B,) in place; mean losses of all epochs, by default ``length`` of their steps."""
    size = config.batch_size or default_batch(len(rows.index))
    steps = steps_per_epoch(rows, size)
    epochs = config.epochs or length(steps)
    generator = torch.Generator().manual_seed(config.seed)
    parameters = network.to(config.device).parameters()
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=BETAS,
        weight_decay=config.weight_decay,
        fused=True,
    )
    cosine = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: schedule(step, epochs * steps, 0)
    )
    history = []
    with track("train", epochs * steps, "steps") as task:
        for _ in range(epochs):
            total = torch.zeros((), device=config.device)
            for batch in rows.steps(size, generator):
                moved = batch.to(config.device)
                value = loss(moved, network(moved))
                optimizer.zero_grad(set_to_none=True)
                value.backward()
                optimizer.step()
                cosine.step()
                total += value.detach()
                task.advance(1)
            history.append(finite_mean(float(total) / steps, config.learning_rate))
    return history

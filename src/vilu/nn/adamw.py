"""The training loop of small networks that are neither failure heads nor selected: AdamW under a cosine."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from vilu.nn.plan import default_epochs, schedule
from vilu.nn.train import Loss, Rows, finite_mean, steps_per_epoch
from vilu.progress import track

BETAS = (0.8, 0.95)
"""As in Pretrained Visual Uncertainties."""


@dataclass(frozen=True)
class AdamWConfig:
    """How a network is trained.

    Attributes:
        epochs: Passes over the training rows; None: as many as make about 6,000 steps, between 10 and 300.
        batch_size: Rows per step (with in-batch candidates, the pool size instead).
        learning_rate: At the start; a cosine takes it to zero.
        weight_decay: Decoupled.
        seed: Of the shuffling.
        device: Where to train.
    """

    epochs: int | None
    batch_size: int
    learning_rate: float
    weight_decay: float
    seed: int
    device: torch.device


def train_adamw(network: nn.Module, loss: Loss, rows: Rows, config: AdamWConfig) -> list[float]:
    """Train a network in place, and return the mean loss of every epoch.

    Args:
        network: Maps a batch to one number per row (B,).
        loss: Of a batch and those numbers.
        rows: What to train on.
        config: How.

    Raises:
        DataError: If the rows do not fill one batch of in-batch candidates, or the loss is not finite.
    """
    steps = steps_per_epoch(rows, config.batch_size)
    epochs = config.epochs or default_epochs(steps)
    generator = torch.Generator().manual_seed(config.seed)
    parameters = network.to(config.device).parameters()
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=BETAS, weight_decay=config.weight_decay, fused=True
    )
    cosine = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, epochs * steps, 0))
    history = []
    with track("train", epochs * steps, "steps") as task:
        for _ in range(epochs):
            total = torch.zeros((), device=config.device)
            for batch in rows.steps(config.batch_size, generator):
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

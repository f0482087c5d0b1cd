"""How long a training run is, and its learning rate along the way."""

from __future__ import annotations

import math
from dataclasses import dataclass

DEFAULT_STEPS = 6_000
FREEZE_STEPS = 1_000


def schedule(step: int, total: int, warmup: float) -> float:
    """Multiplier of the learning rate: linear from 0.1 to 1 over ``warmup`` steps, then a cosine to 0."""
    if step < warmup:
        return 0.1 + 0.9 * step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def default_epochs(steps: int) -> int:
    """As many epochs of ``steps`` steps as make about 6,000 steps, between 10 and 300."""
    return min(max(math.ceil(DEFAULT_STEPS / steps), 10), 300)


@dataclass(frozen=True)
class Plan:
    """Lengths of a training run.

    Attributes:
        steps: Steps of an epoch.
        epochs: Passes over the rows.
        warmup: Steps of the warm-up.
        frozen: Epochs without the attention.
    """

    steps: int
    epochs: int
    warmup: float
    frozen: int

    @classmethod
    def of(cls, steps: int, epochs: int | None, warmup_epochs: float, freeze_epochs: int | None) -> Plan:
        """What the settings of ``TrainConfig`` mean for epochs of so many steps."""
        epochs = epochs or default_epochs(steps)
        by_default = min(math.ceil(FREEZE_STEPS / steps), max(epochs // 2, 1))  # else a short run never trains it
        frozen = by_default if freeze_epochs is None else freeze_epochs
        return cls(steps, epochs, min(warmup_epochs, epochs / 10) * steps, frozen)

    def rates(self, epoch: int, first: int) -> list[float]:
        """Multipliers of the learning rate in an epoch, from step ``first`` on."""
        done = epoch * self.steps
        return [schedule(done + i, self.epochs * self.steps, self.warmup) for i in range(first, self.steps)]

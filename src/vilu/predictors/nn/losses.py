"""Weighted losses for failure prediction.

All are computed in float32, and finite for every error rate from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from vilu.embeddings.source import Batch
from vilu.errors import DataError, UsageError
from vilu.predictors.nn.processes import current_world
from vilu.predictors.nn.train import Loss

EPSILON = 1e-6
"""Error rates e are kept this far from 0, and in (1 - e) / e also from 1."""

MIN_WEIGHT = 0.05
"""-log(e) tends to 0 as e tends to 1, but a batch of failures only must still teach something."""

EMA_MOMENTUM = 0.99


def adaptive_weight(error_rate: Tensor) -> Tensor:
    """ViLU's weight of the failure term: w = log(1 + N_s / N_f) = -log(e), e in [0, 1].

    It is bounded to [0.05, -log(1e-6)]: the published formula is infinite in a batch without
    failures and zero in a batch of failures only.

    Source: ViLU, Eq. 9.
    """
    return torch.clamp(-torch.log(error_rate.clamp(EPSILON, 1)), min=MIN_WEIGHT)


class FailureWeight:
    """Weight w of the failure term, from the failures of a batch and of the training set.

    A batch is the whole step: where several processes train together, e is counted over all of
    them.

    Modes:
        batch: -log(e) of the mini-batch, as published.
        dataset: -log(e) of the whole training set.
        ema: -log(e) of an exponential moving average of the batch error rates that starts at the
        training set's.
        static: a constant.
        balanced: (1 - e) / e of the training set, which gives failures and successes the same total
        weight.

    Args:
        mode: One of the above.
        error_rate: e of the training set, in [0, 1].
        static: The constant of mode "static".
    """

    MODES = ("batch", "dataset", "ema", "static", "balanced")

    def __init__(self, mode: str, error_rate: float, static: float = 1.0) -> None:
        if mode not in self.MODES:
            raise UsageError(
                f"weighting must be one of {', '.join(self.MODES)}. Got {mode!r} instead."
            )
        if not static > 0:
            raise UsageError(f"static_weight must be positive. Got {static} instead.")
        self.mode = mode
        self.rate = torch.tensor(float(error_rate), dtype=torch.float32)
        self.constant = self._constant(static)

    def __call__(self, failure: Tensor) -> Tensor:
        """Scalar w for a batch of failures (B,), each 0 or 1."""
        if self.constant is not None:
            return self.constant.to(failure.device)
        # every process calls this at every step: the mean is a collective operation
        batch_rate = current_world().mean(failure.float())
        if self.mode == "batch":
            return adaptive_weight(batch_rate)
        if self.mode == "ema":
            self.rate = EMA_MOMENTUM * self.rate + (1 - EMA_MOMENTUM) * batch_rate.cpu()
        return adaptive_weight(self.rate.to(failure.device))

    def _constant(self, static: float) -> Tensor | None:
        """The weight in a mode that never looks at a batch."""
        if self.mode == "static":
            return torch.tensor(float(static), dtype=torch.float32)
        if self.mode == "balanced":
            e = self.rate.clamp(EPSILON, 1 - EPSILON)
            return (1 - e) / e
        return None

    def state(self) -> dict[str, Tensor]:
        """The moving average, on which a call depends beside its batch."""
        return {"rate": self.rate}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take over a ``state``."""
        is_one_rate = state.keys() == {"rate"} and state["rate"].shape == self.rate.shape
        if not is_one_rate:
            names = ", ".join(sorted(state)) or "nothing"
            raise DataError(f"a failure weight holds one rate. Found {names} instead.")
        self.rate = state["rate"]


def weighted_bce(logit: Tensor, failure: Tensor, weight: Tensor) -> Tensor:
    """Mean of -[w y log sigmoid(g) + (1 - y) log(1 - sigmoid(g))].

    The mean is over the batch, of logits g (B,) and failures y (B,).
    """
    return functional.binary_cross_entropy_with_logits(
        logit.float(), failure.float(), pos_weight=weight
    )


def weighted_mse(
    logit: Tensor,
    target: Tensor,
    failure: Tensor,
    weight: Tensor,
    link: Callable[[Tensor], Tensor] = torch.sigmoid,
) -> Tensor:
    """Mean over the batch of w_i (link(g_i) - target_i)^2; w_i = w on failures, else 1.

    The increasing ``link`` takes failure logits (B,) to the range of the targets (B,).
    """
    squared_error = (link(logit.float()) - target).square()
    row_weight = torch.where(failure == 1, weight, 1.0)
    return (row_weight * squared_error).mean()


def bce_loss(weight: FailureWeight) -> Loss:
    """Weighted BCE on the failure of the zero-shot answer."""

    def loss(batch: Batch, logit: Tensor) -> Tensor:
        return weighted_bce(logit, batch.failure, weight(batch.failure))

    return loss


def regression(
    target: Callable[[Batch], Tensor], link: Callable[[Tensor], Tensor]
) -> Callable[[FailureWeight], Loss]:
    """Weighted squared error of ``link(g)`` to a target.

    It is divided by the mean squared target where that exceeds one.
    """

    def weighted(weight: FailureWeight) -> Loss:
        def loss(batch: Batch, logit: Tensor) -> Tensor:
            goal = target(batch)
            # a step must not grow with the logit scale of the VLM, on which -log p depends
            size = current_world().mean(goal.square()).clamp(min=1)
            failure_weight = weight(batch.failure)
            return weighted_mse(logit, goal, batch.failure, failure_weight, link) / size

        return loss

    return weighted


def withheld_probability(batch: Batch) -> Tensor:
    """(B,) 1 - p, p the zero-shot probability of the true class."""
    return -torch.expm1(batch.target_log_probability)  # no digit of a small 1 - p is lost


def zero_shot_loss(batch: Batch) -> Tensor:
    """(B,) -log p, p the zero-shot probability of the true class."""
    return -batch.target_log_probability


LOSSES: dict[str, Callable[[FailureWeight], Loss]] = {
    "mse": regression(withheld_probability, torch.sigmoid),
    "loss": regression(zero_shot_loss, functional.softplus),
    "bce": bce_loss,
}
"""How a head is trained, by name."""

"""Weighted losses for failure prediction.

The losses are computed in float32, and are finite for every error rate from 0 to 1.
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

MIN_ERROR_RATE = 1e-6
"""Error rates e are clipped to at least this value.

For the weight (1 - e) / e, error rates are also clipped to at most 1 minus this value.
"""

MIN_WEIGHT = 0.05
"""-log(e) is clipped to at least this value.

Otherwise a batch of failures only (e = 1) would have no gradient.
"""

EMA_MOMENTUM = 0.99
"""Weight on the previous value in the moving average of batch error rates."""


def adaptive_weight(error_rate: Tensor) -> Tensor:
    """Compute ViLU's failure weight w for error rates e in [0, 1].

    With N_s successes and N_f failures, e = N_f / (N_s + N_f) and

        w = log(1 + N_s / N_f) = -log(e)

    w is clipped to [0.05, -log(1e-6)], because the formula is infinite without failures and zero
    without successes.

    Source: ViLU, Eq. 9.
    """
    clipped_rate = error_rate.clamp(MIN_ERROR_RATE, 1)
    weight = -torch.log(clipped_rate)
    return torch.clamp(weight, min=MIN_WEIGHT)


class FailureWeight:
    """Weight w on failures in a loss, as a function of an error rate e.

    The modes are:

    - "batch": -log(e) with the batch's e, as published.
    - "dataset": -log(e) with e from the whole training set.
    - "ema": -log(e) with an exponential moving average of the batches' e. The average starts at
      the training set's e.
    - "static": a constant.
    - "balanced": (1 - e) / e with the training set's e. Failures and successes then have the
      same total weight.

    If several processes train together, a batch's e is counted over the rows in all processes.

    Args:
        mode: A mode from the list above.
        error_rate: The training set's e, in [0, 1].
        static_weight: The constant in mode "static".
    """

    MODES = ("batch", "dataset", "ema", "static", "balanced")

    def __init__(self, mode: str, error_rate: float, static_weight: float = 1.0) -> None:
        if mode not in self.MODES:
            modes = ", ".join(self.MODES)
            raise UsageError(f"weighting must be one of {modes}. Got {mode!r} instead.")
        if not static_weight > 0:  # unlike ``static_weight <= 0``, this refuses NaN, too
            raise UsageError(f"static_weight must be positive. Got {static_weight} instead.")
        self.mode = mode
        self.error_rate = torch.tensor(float(error_rate), dtype=torch.float32)
        self.constant_weight = self._constant_weight(static_weight)

    def __call__(self, failure: Tensor) -> Tensor:
        """Compute the scalar w for a batch of failures (B,), each 0 or 1."""
        if self.constant_weight is not None:
            return self.constant_weight.to(failure.device)
        # The mean is over all processes. The call waits until every process has called ``mean``. In
        # mode "dataset" it keeps the processes in step, although the result is not used.
        batch_rate = current_world().mean(failure.float())
        if self.mode == "batch":
            return adaptive_weight(batch_rate)
        if self.mode == "ema":
            self.error_rate = EMA_MOMENTUM * self.error_rate + (1 - EMA_MOMENTUM) * batch_rate.cpu()
        # in mode "dataset" ``error_rate`` is the training set's error rate, and never changes
        error_rate = self.error_rate.to(failure.device)
        return adaptive_weight(error_rate)

    def _constant_weight(self, static_weight: float) -> Tensor | None:
        """Return the weight, if the mode has the same weight for all batches. Else return None."""
        if self.mode == "static":
            return torch.tensor(float(static_weight), dtype=torch.float32)
        if self.mode == "balanced":
            error_rate = self.error_rate.clamp(MIN_ERROR_RATE, 1 - MIN_ERROR_RATE)
            return (1 - error_rate) / error_rate
        return None

    def state(self) -> dict[str, Tensor]:
        """Return the error rate for later calls, for example the moving average."""
        return {"rate": self.error_rate}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take the error rate from a ``state``. Refuse a state with anything else."""
        is_one_rate = state.keys() == {"rate"} and state["rate"].shape == self.error_rate.shape
        if not is_one_rate:
            names = ", ".join(sorted(state)) or "nothing"
            raise DataError(f"a failure weight holds one rate. Found {names} instead.")
        self.error_rate = state["rate"]


def weighted_bce(logit: Tensor, failure: Tensor, weight: Tensor) -> Tensor:
    """Compute the weighted binary cross-entropy, averaged over the batch.

    A row has the failure logit g (``logit``) and the failure y, which is 0 or 1 (``failure``). With
    the weight w, its cross-entropy is -[w y log sigmoid(g) + (1 - y) log(1 - sigmoid(g))].
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
    """Compute the weighted squared error, averaged over the batch.

    ``link`` is an increasing function from failure logits (B,) to the range of the targets (B,).
    The error of a row with the logit g is link(g) minus its target. Failures have the ``weight``,
    and successes have the weight 1.
    """
    estimate = link(logit.float())
    squared_error = (estimate - target).square()
    row_weight = torch.where(failure == 1, weight, 1.0)
    return (row_weight * squared_error).mean()


def bce_loss(failure_weight: FailureWeight) -> Loss:
    """Return the weighted BCE between failure logits and actual failures, as a loss."""

    def loss(batch: Batch, logit: Tensor) -> Tensor:
        weight = failure_weight(batch.failure)
        return weighted_bce(logit, batch.failure, weight)

    return loss


def weighted_mse_loss(
    target: Callable[[Batch], Tensor], link: Callable[[Tensor], Tensor]
) -> Callable[[FailureWeight], Loss]:
    """Return a function from a failure weight to a loss.

    The loss is the weighted squared error between link(g), with the failure logit g, and a batch's
    ``target``. If the mean square of the batch's targets exceeds 1, the loss is divided by it.
    """

    def make_loss(failure_weight: FailureWeight) -> Loss:
        def loss(batch: Batch, logit: Tensor) -> Tensor:
            targets = target(batch)
            # The target -log p grows with the VLM's logit scale. Without the division, training
            # steps would grow, too.
            mean_square = current_world().mean(targets.square())
            divisor = mean_square.clamp(min=1)
            weight = failure_weight(batch.failure)
            return weighted_mse(logit, targets, batch.failure, weight, link) / divisor

        return loss

    return make_loss


def wrong_class_probability(batch: Batch) -> Tensor:
    """Compute 1 - p_y (B,), where p_y is the true class's zero-shot probability."""
    return -torch.expm1(batch.target_log_probability)  # accurate even if p_y is near 1


def zero_shot_loss(batch: Batch) -> Tensor:
    """Compute -log p_y (B,), where p_y is the true class's zero-shot probability."""
    return -batch.target_log_probability


LOSSES: dict[str, Callable[[FailureWeight], Loss]] = {
    "mse": weighted_mse_loss(wrong_class_probability, torch.sigmoid),
    "loss": weighted_mse_loss(zero_shot_loss, functional.softplus),
    "bce": bce_loss,
}
"""Functions from a failure weight to a head's loss, by loss name."""

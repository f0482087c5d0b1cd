"""Maximum concept matching after temperature scaling."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vilu.nn.train import SCORING_BATCH, Rows
from vilu.predictors.free.posterior import log_posterior
from vilu.predictors.labelled import TensorPredictor
from vilu.similarity import float64
from vilu.types import Batch

LIMIT = math.log(100.0)
"""Largest |log m|; an optimum outside is one that any data set would doubt."""

BINS = 15
GRID = 41
TOLERANCE = 1e-3
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass
class MCMTS(TensorPredictor):
    """MCM with one fitted temperature: u = 1 - max_j softmax_j(m l), m = exp(v) > 0 a number learned from labels.

    m multiplies the VLM's own logit scale (1 / m is the temperature of Guo et al.), within a factor of 100 either way.
    With K > 2 it changes the order of the rows, not only their calibration. Every pass streams over the rows, so memory
    does not grow with them; captions are scored within their pools.

    Where no answer is wrong, the likelihood grows with m for ever and nothing is identified: m stays 1, with a warning.

    Args:
        objective: "nll", the mean negative log-likelihood of the labels, by bounded LBFGS; or "ece", the expected
            calibration error of max_j p_j in 15 bins of equal width. That one jumps whenever a row changes its bin, so
            it is searched without gradients: a grid of 41 log m, then a golden section around its best point.

    Source: Guo et al., ICML 2017; ViLU, supplement A.3, names the calibration error and LBFGS together, which cannot
    be, since that error has no useful gradient.
    """

    name: ClassVar[str] = "mcm_ts"
    summary: ClassVar[str] = "MCM at a temperature fitted to labels (Guo et al. 2017)"
    reference: ClassVar[str] = "Guo et al., ICML 2017"
    cost: ClassVar[str] = "fit: about 10 passes over the logits (nll); score: as mcm"
    is_probability: ClassVar[bool] = True
    tensors: ClassVar[tuple[str, ...]] = ("log_multiplier",)

    objective: Literal["nll", "ece"] = "nll"

    def _fit_tensors(self, train: Rows, failure: Tensor) -> dict[str, Tensor]:
        log_multiplier = 0.0
        if failure.any():
            log_multiplier = OBJECTIVES[self.objective](train, len(failure), self.device_)
        else:
            warnings.warn(
                f"only 0 failures among {len(failure)} training rows: they identify no temperature, so {self.name} "
                "scores as mcm.",
                stacklevel=4,
            )
        return {"log_multiplier": torch.tensor(log_multiplier, dtype=torch.float64)}

    def _notes(self) -> dict[str, object]:
        return {"multiplier": math.exp(float(self.learned_["log_multiplier"]))}

    def _uncertainty(self, batch: Batch) -> Tensor:
        return uncertainty(batch, float(self.learned_["log_multiplier"]))


def uncertainty(batch: Batch, log_multiplier: float) -> Tensor:
    """(B,) float64 one minus the largest probability at the multiplier exp(``log_multiplier``)."""
    return -torch.expm1(log_posterior(batch, math.exp(-log_multiplier)).amax(dim=-1))


def likelihood_optimum(train: Rows, n: int, device: torch.device) -> float:
    """The log m of the least mean negative log-likelihood of ``n`` labelled rows, by bounded LBFGS."""
    from scipy.optimize import minimize

    def objective(point: list[float]) -> tuple[float, list[float]]:
        terms = [likelihood_terms(batch.to(device), float(point[0])) for batch in train.batches(SCORING_BATCH)]
        value, slope = (torch.stack(terms).sum(dim=0) / n).tolist()
        return value, [slope]

    limits, precision = [(-LIMIT, LIMIT)], {"ftol": 1e-15, "gtol": 1e-8}
    found = minimize(objective, [0.0], jac=True, method="L-BFGS-B", bounds=limits, options=precision)
    return float(found.x[0])


def likelihood_terms(batch: Batch, log_multiplier: float) -> Tensor:
    """(2,) sums over a batch of -log p_target and of its derivative in log m, on the CPU.

    With z = m l, p_target is the mass of the candidates that are right (one, as a rule), and the derivative of
    log sum_j exp(z_j) over any of them in log m is their mean z_j under p.
    """
    logits = float64(batch.logits)
    z = (logits - logits.amax(dim=-1, keepdim=True)) * math.exp(log_multiplier)
    right = z.masked_fill(~batch.alike(batch.target).to(z.device), -torch.inf)
    value = torch.logsumexp(z, dim=-1) - torch.logsumexp(right, dim=-1)
    slope = mean_logit(z, z) - mean_logit(right, z)
    return torch.stack([value.sum(), slope.sum()]).cpu()


def mean_logit(chosen: Tensor, z: Tensor) -> Tensor:
    """(B,) mean of z (B, K) under softmax(chosen), where ``chosen`` is z or minus infinity."""
    return (torch.softmax(chosen, dim=-1) * z).sum(dim=-1)


def calibration_optimum(train: Rows, n: int, device: torch.device) -> float:
    """The log m of the least calibration error of ``n`` labelled rows."""
    grid = torch.linspace(-LIMIT, LIMIT, GRID, dtype=torch.float64).tolist()
    errors = calibration_errors(train, n, device, grid)
    best = min(range(GRID), key=errors.__getitem__)
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, GRID - 1)]
    found, error = golden_section(lambda point: calibration_errors(train, n, device, [point])[0], low, high)
    return found if error < errors[best] else grid[best]


def calibration_errors(train: Rows, n: int, device: torch.device, log_multipliers: list[float]) -> list[float]:
    """Expected calibration error at each multiplier, in one pass: sum over the bins of |failures - sum of u| / n.

    A bin of max_j p_j is one of u = 1 - max_j p_j, closed on the right as in ``vilu.metrics.ece``.
    """
    edges = torch.arange(1, BINS, dtype=torch.float64) / BINS
    gaps = torch.zeros(len(log_multipliers), BINS, dtype=torch.float64)
    for batch in train.batches(SCORING_BATCH):
        moved = batch.to(device)
        failure = moved.failure.cpu()
        for gap, log_multiplier in zip(gaps, log_multipliers, strict=True):
            u = uncertainty(moved, log_multiplier).cpu()
            gap.index_add_(0, torch.bucketize(u, edges), failure - u)
    errors: list[float] = (gaps.abs().sum(dim=1) / n).tolist()
    return errors


def golden_section(function: Callable[[float], float], low: float, high: float) -> tuple[float, float]:
    """The best point that a golden-section search of [low, high] meets, and its value."""
    seen: dict[float, float] = {}
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    seen |= {left: function(left), right: function(right)}
    while high - low > TOLERANCE:
        if seen[left] <= seen[right]:
            high, right, left = right, left, right - GOLDEN * (right - low)
            seen[left] = function(left)
        else:
            low, left, right = left, right, left + GOLDEN * (high - left)
            seen[right] = function(right)
    best = min(seen, key=seen.__getitem__)
    return best, seen[best]


OBJECTIVES: dict[str, Callable[[Rows, int, torch.device], float]] = {
    "nll": likelihood_optimum,
    "ece": calibration_optimum,
}
"""How log m is found, by the name of the objective."""

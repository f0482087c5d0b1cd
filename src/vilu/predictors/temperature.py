"""Methods that multiply zero-shot logits by fitted factors: ``mcm_ts`` and ``duo``.

``mcm_ts`` has a single factor, and ``duo`` has a factor for each of two models. A factor m is the
same as a temperature 1 / m.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vilu.callers import warn_caller
from vilu.embeddings.columns import SECOND_MODEL_COLUMNS
from vilu.embeddings.rows import SCORING_BATCH, Rows
from vilu.embeddings.similarity import RivalWeights, float64
from vilu.embeddings.source import Batch, EmbeddingSource
from vilu.embeddings.space import EmbeddingSpace
from vilu.predictors.contract.labelled import Needs, failure_log_odds
from vilu.predictors.contract.predictor import FailurePredictor, Learnt, own_graph

# Constants for the search for log m.

MAX_LOG_FACTOR = math.log(100.0)
"""Maximum |log m|. A fitted factor above 100 or below 1/100 would not be credible."""
N_BINS = 15
"""Number of bins in the calibration error."""
N_GRID_VALUES = 41
"""Number of log m values in the grid search."""
MIN_INTERVAL = 1e-3
"""The golden-section search ends when the interval for log m is at most this long."""
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
"""Each golden-section step multiplies the interval length by this factor."""


@dataclass
class MCMTS(FailurePredictor):
    """MCM with logits multiplied by a fitted factor m: u = 1 - p_a with p = softmax(m l).

    l are the zero-shot logits, and a is the judged answer. m is learned from labels and is between
    1/100 and 100. 1 / m is the temperature in Guo et al. With more than two candidates, m changes
    both the calibration and the row order. Rows are read in batches, so memory does not grow with
    the row count. For image-caption pairs, the candidates are the captions in the row's pool.

    If no answer is wrong, the likelihood grows with m without bound, and m cannot be estimated. m
    then stays 1, with a warning.

    Args:
        objective: The loss to minimise.

            - "nll": the mean negative log-likelihood of the labels, minimised by bounded L-BFGS.
              Images outside all classes are left out.
            - "ece": the expected calibration error of p_a in 15 bins with equal width. For images
              outside all classes the answers count as wrong. If a row moves to a different bin, the
              error jumps. So the search uses no gradients: a grid with 41 values of log m, and then
              a golden-section search around the best value.

    Source: Guo et al., ICML 2017. ViLU, supplement A.3, minimises the calibration error by L-BFGS,
    but this error has no useful gradient.

    Examples:
        >>> import numpy as np, vilu
        >>> image = np.tile([1.0, 0.0], (40, 1))  # 40 equal images, whose answer is class 0
        >>> target = [0, 0, 0, 1] * 10  # one of four answers is wrong
        >>> data = vilu.Embeddings(image, np.eye(2), target=target)
        >>> vilu.PREDICTORS["mcm_ts"]().fit(data).predict_uncertainty(data)[:2].round(2)
        array([0.25, 0.25])
    """

    name: ClassVar[str] = "mcm_ts"
    summary: ClassVar[str] = "MCM at a temperature fitted to labels (Guo et al. 2017)"
    reference: ClassVar[str] = "Guo et al., ICML 2017"
    cost: ClassVar[str] = "fit: about 10 passes over the logits (nll); score: as mcm"
    is_probability: ClassVar[bool] = True
    looks_at: ClassVar[frozenset[str]] = frozenset({"logits"})
    _forms: ClassVar[str] = "log_multiplier:d"  # a float64 number, log m

    seed: int = 0
    device: str = "auto"
    objective: Literal["nll", "ece"] = "nll"

    @property
    def needs(self) -> Needs:
        """The label that a training row needs: the class for "nll", the failure for "ece"."""
        return "class" if self.objective == "nll" else "failure"

    def _learn(
        self,
        train: Rows,
        failure: Tensor,
        validation: EmbeddingSource | None,  # noqa: ARG002
    ) -> Learnt:
        log_multiplier = 0.0
        if failure.any():
            find_log_multiplier = OBJECTIVES[self.objective]
            log_multiplier = find_log_multiplier(train, len(failure), self.device_)
        else:
            warn_caller(
                f"only 0 failures among {len(failure)} training rows: they identify no "
                f"temperature, so {self.name} scores as mcm."
            )
        tensors = {"log_multiplier": torch.tensor(log_multiplier, dtype=torch.float64)}
        multiplier = math.exp(log_multiplier)
        return Learnt(tensors, {"multiplier": multiplier})

    graph = own_graph

    def _score(self, batch: Batch) -> Tensor:
        return tempered_uncertainty(batch, float(self.learned_["log_multiplier"]))


def tempered_uncertainty(batch: Batch, log_multiplier: float) -> Tensor:
    """Compute 1 minus the answer's probability (B,) float64, for logits times a multiplier."""
    answer_column = batch.prediction[:, None].to(batch.logits.device)
    temperature = math.exp(-log_multiplier)
    rivals = RivalWeights.from_logits(batch.logits, answer_column, temperature)
    return rivals.total_probability


def most_likely_log_multiplier(train: Rows, n_rows: int, device: torch.device) -> float:
    """Find the log m with the least mean negative log-likelihood over ``n_rows`` labelled rows."""

    def objective(batch: Batch, point: list[float]) -> Tensor:
        (log_multiplier,) = point
        device_batch = batch.to(device)
        return loss_and_derivative(device_batch, log_multiplier)

    limits = (-MAX_LOG_FACTOR, MAX_LOG_FACTOR)
    (best_log_multiplier,) = minimise_mean_loss(
        objective, train, n_rows, start=[0.0], limits=limits
    )
    return best_log_multiplier


def minimise_mean_loss(
    loss_and_derivatives: Callable[[Batch, list[float]], Tensor],
    train: Rows,
    n_rows: int,
    start: list[float],
    limits: tuple[float, float],
) -> list[float]:
    """Find the point with the least mean loss over ``n_rows`` labelled rows, by bounded L-BFGS.

    Args:
        loss_and_derivatives: Function of a batch and a point. It returns the sum of the losses in
            the batch, followed by the sum's derivatives in the point's coordinates.
        train: The labelled rows.
        n_rows: Number of labelled rows.
        start: The point where the search begins.
        limits: Lower and upper bound for every coordinate.
    """
    from scipy.optimize import minimize

    def objective(point: NDArray[np.float64]) -> tuple[float, list[float]]:
        coordinates = point.tolist()
        mean_loss, *derivatives = _mean_over_rows(loss_and_derivatives, train, n_rows, coordinates)
        return mean_loss, derivatives

    bounds = [limits] * len(start)
    options = {"ftol": 1e-15, "gtol": 1e-8}
    best = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    return list(map(float, best.x))


def _mean_over_rows(
    loss_and_derivatives: Callable[[Batch, list[float]], Tensor],
    train: Rows,
    n_rows: int,
    point: list[float],
) -> list[float]:
    """Average loss and derivatives over ``n_rows`` labelled rows at a point."""
    sums = []
    for batch in train.batches(SCORING_BATCH):
        sums_of_batch = loss_and_derivatives(batch, point)
        sums.append(sums_of_batch)
    total = torch.stack(sums).sum(dim=0)
    means: list[float] = (total / n_rows).tolist()
    return means


def loss_and_derivative(batch: Batch, log_multiplier: float) -> Tensor:
    """Sum -log p_target over a batch. Return the sum and the derivative in log m: (2,) on the CPU.

    p is the softmax of m l, for the zero-shot logits l. The derivative in log m is computed as the
    derivative in f at f = 1 for the logits f m l. Both derivatives are equal.
    """
    logits = float64(batch.logits)
    # subtracting the largest logit does not change p, and avoids large numbers
    largest_logit = logits.amax(dim=-1, keepdim=True)
    z = (logits - largest_logit) * math.exp(log_multiplier)
    logits_of_one_model = z.unsqueeze(-1)  # (B, K, 1)
    return pooled_loss_and_derivatives(batch, logits_of_one_model, factors=[1.0])


def pooled_loss_and_derivatives(batch: Batch, logits: Tensor, factors: Sequence[float]) -> Tensor:
    """Sum -log p_target over a batch. Return the sum and its derivatives in M factors: (1 + M,).

    ``logits`` (B, K, M) are from M models, and p is the softmax of z = sum_m factor_m logits_m.
    p_target is the total probability of the right candidates. Usually a row has a single right
    candidate. For a row, the derivative in factor m is the mean of logits_m under p, minus the mean
    under p restricted to the right candidates. The result is on the CPU.
    """
    z = logits @ torch.tensor(factors, dtype=logits.dtype, device=logits.device)
    is_right = batch.right.to(z.device)
    z_right = z.masked_fill(~is_right, -torch.inf)
    loss = torch.logsumexp(z, dim=-1) - torch.logsumexp(z_right, dim=-1)
    derivative_in_z = torch.softmax(z, dim=-1) - torch.softmax(z_right, dim=-1)
    derivatives = torch.einsum("bk,bkm->m", derivative_in_z, logits)
    total_loss = loss.sum().unsqueeze(0)
    loss_and_derivatives = torch.cat([total_loss, derivatives])
    return loss_and_derivatives.cpu()


def best_calibrated_log_multiplier(train: Rows, n_rows: int, device: torch.device) -> float:
    """Find the log m with the least expected calibration error on ``n_rows`` labelled rows."""

    def error_at(log_multiplier: float) -> float:
        (error,) = calibration_errors(train, n_rows, device, [log_multiplier])
        return error

    points = torch.linspace(-MAX_LOG_FACTOR, MAX_LOG_FACTOR, N_GRID_VALUES, dtype=torch.float64)
    grid = points.tolist()
    errors = calibration_errors(train, n_rows, device, grid)
    best_index = errors.index(min(errors))
    # search between the two grid neighbours of the best value
    low = grid[max(best_index - 1, 0)]
    high = grid[min(best_index + 1, N_GRID_VALUES - 1)]
    refined_point, refined_error = golden_section_search(error_at, low, high)
    if refined_error < errors[best_index]:
        return refined_point
    return float(grid[best_index])


def calibration_errors(
    train: Rows, n_rows: int, device: torch.device, log_multipliers: list[float]
) -> list[float]:
    """Compute the expected calibration error for every log m, in a single pass over the rows.

    The error sums |failure count - sum of u| / n over the bins. The bins are intervals of the
    uncertainty u, closed on the right, as in ``vilu.metrics.ece``.
    """
    inner_edges = torch.arange(1, N_BINS, dtype=torch.float64) / N_BINS
    # for every log m (row) and every bin (column): failure count - sum of u
    gaps = torch.zeros(len(log_multipliers), N_BINS, dtype=torch.float64)
    for batch in train.batches(SCORING_BATCH):
        device_batch = batch.to(device)
        failure = device_batch.failure.cpu()
        for gaps_of_bins, log_multiplier in zip(gaps, log_multipliers, strict=True):
            u = tempered_uncertainty(device_batch, log_multiplier).cpu()
            bin_of_row = torch.bucketize(u, inner_edges)
            gaps_of_bins.index_add_(0, bin_of_row, failure - u)  # a view: this changes ``gaps``
    total_gaps = gaps.abs().sum(dim=1)
    errors: list[float] = (total_gaps / n_rows).tolist()
    return errors


def golden_section_search(
    function: Callable[[float], float], low: float, high: float
) -> tuple[float, float]:
    """Search [low, high] for a minimum. Return the best evaluated point and the value there."""
    left = high - GOLDEN_RATIO * (high - low)
    right = low + GOLDEN_RATIO * (high - low)
    value_at = {left: function(left), right: function(right)}
    while high - low > MIN_INTERVAL:
        if value_at[left] <= value_at[right]:  # the minimum is in [low, right]
            high = right
            right = left
            left = high - GOLDEN_RATIO * (high - low)
            value_at[left] = function(left)
        else:  # the minimum is in [left, high]
            low = left
            left = right
            right = low + GOLDEN_RATIO * (high - low)
            value_at[right] = function(right)
    best_point = min(value_at, key=value_at.__getitem__)
    return best_point, value_at[best_point]


OBJECTIVES: dict[str, Callable[[Rows, int, torch.device], float]] = {
    "nll": most_likely_log_multiplier,
    "ece": best_calibrated_log_multiplier,
}
"""Maps the name of an objective to the function that finds the best log m."""


class WithSecondModel(FailurePredictor):
    """A method that may use embeddings from a second model, in addition to the VLM's embeddings.

    The second model's embedding space is saved with the fit. In scoring, a second model with a
    different space is refused.
    """

    def second_notes(self, source: EmbeddingSource, columns: Sequence[str]) -> dict[str, Any]:
        """Return the second model's embedding space as notes, or no notes if it is not used.

        The model is used if ``columns``, the columns used by the scores, have its embeddings.
        """
        if source.second is None or SECOND_MODEL_COLUMNS.isdisjoint(columns):
            return {}
        return {"second": dataclasses.asdict(source.second.space)}

    @property
    def second_space_(self) -> EmbeddingSpace | None:
        """Embedding space of the second model in the fit. None if the notes have no such space."""
        if "second" not in self.notes_:
            return None
        return EmbeddingSpace(**self.notes_["second"])

    def restore(self, state: dict[str, Tensor]) -> None:
        """Store the tensors as in the base class, and refuse notes with an invalid second space."""
        super().restore(state)
        _ = self.second_space_  # raises an error if the notes describe no valid space

    def _check_ready(self, data: EmbeddingSource) -> None:
        super()._check_ready(data)
        space = self.second_space_
        if space is not None and data.second is not None:
            space.require_match(
                data.second.space,
                name=f"the second model of the fitted {self.name}",
                other_name="the second model of the data",
            )


@dataclass
class Duo(WithSecondModel):
    """Asymmetric duo of two models: u = 1 - softmax(T_L l + T_S s)_a.

    l are the VLM's logits, and the VLM is usually the larger model. s are the second model's
    logits. T_L and T_S are factors in [0, 100]. a is the judged answer. The VLM alone gives this
    answer, so the second model does not change which answers are wrong.

    T_L and T_S minimise the mean negative log-likelihood of the labels under
    softmax(T_L l + T_S s), by bounded L-BFGS from 1/2 and 1/2. If all candidates are different
    answers, the loss is convex in T_L and T_S. With T_S = 0 the duo is ``mcm_ts``, so the labels
    decide how much the second model counts. Rows are read in batches, so memory does not grow with
    the row count.

    The second model's embeddings are in two columns, ``second_image`` (N, E) and ``second_text``
    (K, E). Their products are s. The columns come from a second store with the same images, both in
    the fit and in scoring (``vilu fit STORE --method duo --second OTHER``, or ``vilu.TwoModels``).

    Rows outside all classes have no likelihood and are left out. If no VLM answer is wrong, the
    likelihood grows with T_L without bound. Both factors then stay 1/2, with a warning.

    Source: the formula by Zhou, Shelhamer and Pleiss, NeurIPS 2025 (arXiv 2505.18636). There are
    two differences:

    - In the paper both models are fine-tuned, so T_L and T_S are fitted on held-out rows. Zero-shot
      models have not seen the labels, so here T_L and T_S are fitted on the training rows.
    - Here T_L and T_S are bounded, and not negative.

    Examples:
        >>> import numpy as np, vilu
        >>> image = np.tile([1.0, 0.0], (40, 1))  # 40 equal images, whose answer is class 0
        >>> text = np.eye(2)
        >>> target = np.array([0, 0, 0, 1] * 10)  # every fourth answer is wrong
        >>> # the second model is right for every image
        >>> second = {"second_image": text[target], "second_text": text}
        >>> data = vilu.Embeddings(image, text, target=target, columns=second)
        >>> vilu.PREDICTORS["duo"]().fit(data).predict_uncertainty(data)[:4].round(2)
        array([0., 0., 0., 1.])
    """

    name: ClassVar[str] = "duo"
    summary: ClassVar[str] = (
        "posterior of two models together, each at a fitted temperature (Asymmetric Duos, 2025)"
    )
    reference: ClassVar[str] = "Zhou et al., NeurIPS 2025"
    cost: ClassVar[str] = (
        "fit: about 20 passes over the logits of both; score: as mcm, twice, and a second model"
    )
    columns: ClassVar[tuple[str, ...]] = ("second_image", "second_text")
    is_probability: ClassVar[bool] = True
    _forms: ClassVar[str] = "multipliers:d2"  # two float64 numbers, T_L and T_S

    device: str = "auto"

    def _learn(
        self,
        train: Rows,
        failure: Tensor,
        validation: EmbeddingSource | None,  # noqa: ARG002
    ) -> Learnt:
        multipliers = [0.5, 0.5]
        if failure.any():
            multipliers = best_multipliers(train, len(failure), self.device_)
        else:
            warn_caller(
                f"only 0 failures among {len(failure)} training rows: they identify no "
                f"temperatures, so {self.name} takes the mean of the two models' logits."
            )
        large_multiplier, small_multiplier = multipliers  # the VLM is the large model
        tensors = {"multipliers": torch.tensor(multipliers, dtype=torch.float64)}
        notes = {
            "large": large_multiplier,
            "small": small_multiplier,
            **self.second_notes(train.source, self.columns_to_score),
        }
        return Learnt(tensors, notes)

    def _score(self, batch: Batch) -> Tensor:
        multipliers = self.tensor("multipliers", batch.image.device)
        pooled_logits = torch.einsum("bkm,m->bk", two_logits(batch), multipliers)
        log_odds = failure_log_odds(pooled_logits, batch)
        return log_odds.sigmoid()


def two_logits(batch: Batch) -> Tensor:
    """Compute the logits (B, K, 2) float64 of the VLM and the second model."""
    with torch.autocast(batch.image.device.type, enabled=False):
        second_logits = batch.columns["second_image"] @ batch.columns["second_text"].T
    vlm_logits = float64(batch.logits)
    return torch.stack([vlm_logits, float64(second_logits)], dim=-1)


def best_multipliers(train: Rows, n_rows: int, device: torch.device) -> list[float]:
    """Find the factors [T_L, T_S] with the least mean negative log-likelihood over ``train``."""

    def objective(batch: Batch, multipliers: list[float]) -> Tensor:
        device_batch = batch.to(device)
        return duo_loss_and_derivatives(device_batch, multipliers)

    limits = (0.0, math.exp(MAX_LOG_FACTOR))
    return minimise_mean_loss(objective, train, n_rows, start=[0.5, 0.5], limits=limits)


def duo_loss_and_derivatives(batch: Batch, multipliers: Sequence[float]) -> Tensor:
    """Compute ``pooled_loss_and_derivatives`` (3,) for two models.

    ``multipliers`` are the factors T_L and T_S.
    """
    logits = two_logits(batch)
    return pooled_loss_and_derivatives(batch, logits, multipliers)

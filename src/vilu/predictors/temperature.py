"""Temperature scaling of zero-shot scores: of one model (``mcm_ts``), or of two (``duo``)."""

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
from vilu.embeddings.columns import SECOND
from vilu.embeddings.rows import SCORING_BATCH, Rows
from vilu.embeddings.similarity import Others, float64
from vilu.embeddings.source import Batch, EmbeddingSource
from vilu.embeddings.space import EmbeddingSpace
from vilu.predictors.contract.labelled import Needs, failure_log_odds
from vilu.predictors.contract.predictor import FailurePredictor, Learnt, own_graph

LIMIT = math.log(100.0)  # largest |log m|; no data set can support an optimum beyond it
BINS = 15  # number of bins of the calibration error
GRID = 41  # number of log m of the grid search
TOLERANCE = 1e-3  # length of the interval of log m at which the golden-section search ends
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass
class MCMTS(FailurePredictor):
    """MCM with one fitted temperature: u = 1 - p_a with p = softmax(m l).

    a is the answer that is judged, and m > 0 is learned from labels. m multiplies the VLM's own
    logit scale (1 / m is the temperature of Guo et al.) and is between 1/100 and 100. With K > 2 it
    changes the order of the rows, not only their calibration. Rows are read in batches, so memory
    does not grow with their number. Captions are scored within their pools.

    If no answer is wrong, the likelihood grows with m without bound, and m cannot be estimated. m
    then stays 1, with a warning.

    Args:
        objective: The loss that m minimises. "nll" is the mean negative log-likelihood of the
            labels, minimised by bounded LBFGS. It leaves out images of none of the classes. "ece"
            is the expected calibration error of p_a in 15 bins of equal width, in which these
            images count as wrong. It is discontinuous where a row changes its bin, so it is
            minimised without gradients: on a grid of 41 values of log m, then by a golden-section
            search around the best one.

    Source: Guo et al., ICML 2017. ViLU, supplement A.3, names the calibration error together with
    LBFGS, which cannot minimise it, since that error has no useful gradient.

    Examples:
        >>> import numpy as np, vilu
        >>> # three of four answers are right
        >>> data = vilu.Embeddings(np.eye(2)[[0] * 40], np.eye(2), target=[0, 0, 0, 1] * 10)
        >>> vilu.PREDICTORS["mcm_ts"]().fit(data).predict_uncertainty(data)[:2].round(2)
        array([0.25, 0.25])
    """

    name: ClassVar[str] = "mcm_ts"
    summary: ClassVar[str] = "MCM at a temperature fitted to labels (Guo et al. 2017)"
    reference: ClassVar[str] = "Guo et al., ICML 2017"
    cost: ClassVar[str] = "fit: about 10 passes over the logits (nll); score: as mcm"
    is_probability: ClassVar[bool] = True
    looks_at: ClassVar[frozenset[str]] = frozenset({"logits"})
    _forms: ClassVar[str] = "log_multiplier:d"

    seed: int = 0
    device: str = "auto"
    objective: Literal["nll", "ece"] = "nll"

    @property
    def needs(self) -> Needs:
        """What must be known of a row: its class for "nll", its failure for "ece"."""
        return "class" if self.objective == "nll" else "failure"

    def _learn(
        self,
        train: Rows,
        failure: Tensor,
        validation: EmbeddingSource | None,  # noqa: ARG002
    ) -> Learnt:
        log_multiplier = 0.0
        if identify(failure, f"temperature, so {self.name} scores as mcm"):
            best = OBJECTIVES[self.objective]
            log_multiplier = best(train, len(failure), self.device_)
        tensors = {"log_multiplier": torch.tensor(log_multiplier, dtype=torch.float64)}
        return Learnt(tensors, {"multiplier": math.exp(log_multiplier)})

    graph = own_graph

    def _score(self, batch: Batch) -> Tensor:
        return uncertainty(batch, float(self.learned_["log_multiplier"]))


def identify(failure: Tensor, what: str) -> bool:
    """Whether there are failures to fit a temperature to; warns if there are none."""
    has_failures = bool(failure.any())
    if not has_failures:
        warn_caller(f"only 0 failures among {len(failure)} training rows: they identify no {what}.")
    return has_failures


def uncertainty(batch: Batch, log_multiplier: float) -> Tensor:
    """(B,) float64: one minus the probability of the answer, with m = exp(``log_multiplier``)."""
    answer = batch.prediction[:, None].to(batch.logits.device)
    return Others.of(batch.logits, answer, math.exp(-log_multiplier)).doubt


def best_likelihood(train: Rows, n: int, device: torch.device) -> float:
    """The log m of the least mean negative log-likelihood of ``n`` labelled rows."""

    def terms(batch: Batch, point: list[float]) -> Tensor:
        return likelihood_terms(batch.to(device), point[0])

    (log_multiplier,) = most_likely(terms, train, n, [0.0], (-LIMIT, LIMIT))
    return log_multiplier


def most_likely(
    terms: Callable[[Batch, list[float]], Tensor],
    train: Rows,
    n: int,
    start: list[float],
    limits: tuple[float, float],
) -> list[float]:
    """The point of least mean negative log-likelihood of ``n`` labelled rows, by bounded LBFGS.

    ``terms`` returns, for a batch and a point, the sum of the losses and the sums of their
    derivatives. ``limits`` are the bounds of every coordinate.
    """
    from scipy.optimize import minimize

    def objective(point: NDArray[np.float64]) -> tuple[float, list[float]]:
        sums = [terms(batch, point.tolist()) for batch in train.batches(SCORING_BATCH)]
        value, *slopes = (torch.stack(sums).sum(dim=0) / n).tolist()
        return value, slopes

    bounds = [limits] * len(start)
    precision = {"ftol": 1e-15, "gtol": 1e-8}
    best = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options=precision)
    return list(map(float, best.x))


def likelihood_terms(batch: Batch, log_multiplier: float) -> Tensor:
    """(2,) sums over a batch of -log p_target and of its derivative in log m, on the CPU.

    The derivative in log m equals the derivative in a factor f of z = m l, at f = 1.
    """
    logits = float64(batch.logits)
    z = (logits - logits.amax(dim=-1, keepdim=True)) * math.exp(log_multiplier)
    return pooled_terms(batch, z[..., None], [1.0])


def pooled_terms(batch: Batch, logits: Tensor, factors: Sequence[float]) -> Tensor:
    """(1 + M,) sums over a batch of -log p_target and of its derivatives in M factors, on the CPU.

    p is the softmax of the sum of ``logits`` (B, K, M) over M, weighted by the ``factors``.
    p_target is the probability of the right candidates, usually one per row. The derivative in a
    factor is the mean of its logits under p, minus their mean under p restricted to the right
    candidates.
    """
    z = logits @ torch.tensor(factors, dtype=logits.dtype, device=logits.device)
    right = z.masked_fill(~batch.alike(batch.target).to(z.device), -torch.inf)
    value = torch.logsumexp(z, dim=-1) - torch.logsumexp(right, dim=-1)
    weight = torch.softmax(z, dim=-1) - torch.softmax(right, dim=-1)
    return torch.cat([value.sum()[None], torch.einsum("bk,bkm->m", weight, logits)]).cpu()


def best_calibration(train: Rows, n: int, device: torch.device) -> float:
    """The log m of the least expected calibration error of ``n`` labelled rows."""

    def error_at(log_multiplier: float) -> float:
        (error,) = calibration_errors(train, n, device, [log_multiplier])
        return error

    grid = torch.linspace(-LIMIT, LIMIT, GRID, dtype=torch.float64).tolist()
    errors = calibration_errors(train, n, device, grid)
    best = min(range(GRID), key=errors.__getitem__)
    low = grid[max(best - 1, 0)]
    high = grid[min(best + 1, GRID - 1)]
    refined, refined_error = golden_section(error_at, low, high)
    if refined_error < errors[best]:
        return refined
    return float(grid[best])


def calibration_errors(
    train: Rows, n: int, device: torch.device, log_multipliers: list[float]
) -> list[float]:
    """Expected calibration error at every multiplier, computed in one pass over the rows.

    It is the sum over the bins of |number of failures - sum of u| / n. The bins are of the
    uncertainty u and closed on the right, as in ``vilu.metrics.ece``.
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


def golden_section(
    function: Callable[[float], float], low: float, high: float
) -> tuple[float, float]:
    """The best point that a golden-section search in [low, high] evaluates, and its value."""
    left = high - GOLDEN * (high - low)
    right = low + GOLDEN * (high - low)
    values = {left: function(left), right: function(right)}
    while high - low > TOLERANCE:
        if values[left] <= values[right]:  # the minimum is in [low, right]
            high = right
            right = left
            left = high - GOLDEN * (high - low)
            values[left] = function(left)
        else:  # it is in [left, high]
            low = left
            left = right
            right = low + GOLDEN * (high - low)
            values[right] = function(right)
    best = min(values, key=values.__getitem__)
    return best, values[best]


OBJECTIVES: dict[str, Callable[[Rows, int, torch.device], float]] = {
    "nll": best_likelihood,
    "ece": best_calibration,
}
"""Functions that find log m, by the name of the objective."""


class WithSecondModel(FailurePredictor):
    """A method that may use a second model. It saves its space, and refuses any other model."""

    def second_notes(self, source: EmbeddingSource) -> dict[str, Any]:
        """Notes with the space of the second model of the training rows, if scores use it."""
        if source.second is None or SECOND.isdisjoint(self.columns_to_score):
            return {}
        return {"second": dataclasses.asdict(source.second.space)}

    @property
    def second_space_(self) -> EmbeddingSpace | None:
        """Embedding space of the second model of the fit; None where it is not known."""
        return EmbeddingSpace(**self.notes_["second"]) if "second" in self.notes_ else None

    def restore(self, state: dict[str, Tensor]) -> None:
        """As in the base class; also refuses notes that describe no valid second space."""
        super().restore(state)
        _ = self.second_space_  # raises if the notes are not those of a space

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

    l are the logits of the VLM, which is usually the larger model, and s those of a second model. a
    is the judged answer; it does not depend on the second model, so the failures to predict stay
    the same. T_L and T_S, in [0, 100], multiply the models' own logit scales.

    T_L and T_S minimise the mean negative log-likelihood of the labels under
    softmax(T_L l + T_S s), by bounded LBFGS from 1/2 and 1/2. The loss is convex in T_L and T_S
    where every candidate is another answer. With T_S = 0 the duo is ``mcm_ts``, so labels decide
    how much the second model counts. Rows are read in batches, so memory does not grow with their
    number.

    The data have the second model in two columns, ``second_image`` (N, E) and ``second_text``
    (K, E), whose products are s. These columns come from a second store of the same images, both in
    the fit and in scoring (``vilu fit STORE --method duo --second OTHER``; ``vilu.TwoModels``).

    Rows of none of the classes have no likelihood and are left out. If no answer of the VLM is
    wrong, the likelihood grows with T_L without bound. Both factors then stay 1/2, with a warning.

    Source: the formula of Zhou, Shelhamer and Pleiss, NeurIPS 2025 (arXiv 2505.18636). There are
    two differences. In the paper both models are fine-tuned, so the temperatures are fitted on
    held-out rows; zero-shot models have not seen the labels, so here they are fitted on the
    training rows. Here T_L and T_S are also bounded and not negative.

    Examples:
        >>> import numpy as np, vilu
        >>> label = np.array([0, 0, 0, 1] * 10)
        >>> # the second model is always right
        >>> second = {"second_image": np.eye(2)[label], "second_text": np.eye(2)}
        >>> data = vilu.Embeddings(np.eye(2)[[0] * 40], np.eye(2), target=label, columns=second)
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
    _forms: ClassVar[str] = "multipliers:d2"

    device: str = "auto"

    def _learn(
        self,
        train: Rows,
        failure: Tensor,
        validation: EmbeddingSource | None,  # noqa: ARG002
    ) -> Learnt:
        without_fit = f"temperatures, so {self.name} takes the mean of the two models' logits"
        multipliers = [0.5, 0.5]
        if identify(failure, without_fit):
            multipliers = best_multipliers(train, len(failure), self.device_)
        large, small = multipliers
        tensors = {"multipliers": torch.tensor(multipliers, dtype=torch.float64)}
        notes = {"large": large, "small": small, **self.second_notes(train.source)}
        return Learnt(tensors, notes)

    def _score(self, batch: Batch) -> Tensor:
        multipliers = self.tensor("multipliers", batch.image.device)
        both = torch.einsum("bkm,m->bk", two_logits(batch), multipliers)
        return failure_log_odds(both, batch).sigmoid()


def two_logits(batch: Batch) -> Tensor:
    """(B, K, 2) float64 logits of the VLM and of the second model."""
    with torch.autocast(batch.image.device.type, enabled=False):
        second = batch.columns["second_image"] @ batch.columns["second_text"].T
    return torch.stack([float64(batch.logits), float64(second)], dim=-1)


def best_multipliers(train: Rows, n: int, device: torch.device) -> list[float]:
    """[T_L, T_S] of the least mean negative log-likelihood of ``n`` labelled rows."""

    def terms(batch: Batch, point: list[float]) -> Tensor:
        return duo_terms(batch.to(device), point)

    return most_likely(terms, train, n, [0.5, 0.5], (0.0, math.exp(LIMIT)))


def duo_terms(batch: Batch, multipliers: Sequence[float]) -> Tensor:
    """(3,) ``pooled_terms`` of the two models with the factors T_L and T_S."""
    return pooled_terms(batch, two_logits(batch), multipliers)

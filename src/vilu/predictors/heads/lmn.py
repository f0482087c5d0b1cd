"""Temperatures of a lightweight meta-network."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from vilu.nn.train import Rows
from vilu.predictors.free.posterior import log_posterior
from vilu.predictors.heads.head import Count, Positive
from vilu.predictors.heads.network import NetworkPredictor, perceptron
from vilu.similarity import float64
from vilu.types import Batch, EmbeddingSource

LIMIT = math.log(10.0)
"""Largest |log T|: a hundredfold between two rows, and no posterior that rounds to one."""

FAR = 20.0
"""Gap to the largest logit, in nats, from which on a candidate is as good as absent."""


@dataclasses.dataclass
class LMN(NetworkPredictor):
    """Lightweight meta-network: u = 1 - max_j softmax_j(l / T(x)), T(x) > 0 learned per row; the answer never changes.

    log T is an MLP with 16 hidden units (about 17,000 parameters at D = 512) on (gaps of the next logits to the
    largest, z_v, z_t̂). With s = max_j p_j after scaling, and psi the sigmoid (s - 1/2) / steepness brought to
    psi(0) = 0 and psi(1) = 1, its loss is
    balance * [1 - psi(s) - log s] where the answer is right, (1 - balance) * [psi(s) + KL(uniform || p)] where it is
    wrong, averaged over the batch: right but unsure is sharpened, wrong but sure is flattened.

    A training set without failures, or without successes, has one of the two forces only; that is said as a warning.

    Args:
        hidden: Hidden widths of the MLP.
        n_logits: How many of the largest logits are inputs.
        balance: Weight beta of the right answers.
        steepness: lambda of psi; a large one gives the diagonal of ordinary calibration.

    Source: Huang et al., "Revisiting Confidence Calibration for Misclassification Detection in VLMs", ICLR 2026. There
    all K logits are inputs in the order of the classes, which fixes K and that order; here the sorted gaps of the
    ``n_logits`` largest, cut at 20 nats, where an absent candidate counts as that far away. The last layer starts at
    zero, so that the scores start as MCM's, and |log T| is bounded by log 10.
    """

    name: ClassVar[str] = "lmn"
    summary: ClassVar[str] = "MCM at a temperature that a small network gives each image (LMN, ICLR 2026)"
    reference: ClassVar[str] = "Huang et al., ICLR 2026"
    cost: ClassVar[str] = "fit: 6,000 steps of a small MLP; score: 40 kFLOP a row"

    hidden: tuple[Count, ...] = (16,)
    n_logits: Annotated[int, Field(ge=2)] = 16
    balance: Annotated[float, Field(ge=0, le=1)] = 0.6
    steepness: Positive = 0.05

    def _learn(self, train: Rows, failure: Tensor, validation: EmbeddingSource | None) -> None:
        for count, what in ((int(failure.sum()), "failures"), (int((1 - failure).sum()), "successes")):
            if not count:
                warnings.warn(
                    f"only 0 {what} among {len(failure)} training rows: one-sided temperatures.", stacklevel=4
                )
        super()._learn(train, failure, validation)

    def _build(self, dim: int) -> nn.Module:
        return MetaNetwork(dim, self.hidden, self.n_logits)

    def _loss(self, batch: Batch, output: Tensor) -> Tensor:
        log_p = torch.log_softmax(batch.logits * torch.exp(-output)[:, None], dim=-1)
        log_s = log_p.amax(dim=-1)
        psi = target_curve(log_s.exp(), self.steepness)
        flatness = -log_p.mean(dim=-1) - math.log(log_p.shape[-1])
        right, wrong = self.balance * (1 - psi - log_s), (1 - self.balance) * (psi + flatness)
        return torch.where(batch.failure == 1, wrong, right).mean()

    def _score(self, batch: Batch, output: Tensor) -> Tensor:
        log_p = log_posterior(batch, float64(output).exp()[:, None])
        return -torch.expm1(log_p.amax(dim=-1))


class MetaNetwork(nn.Module):
    """log T of every row, from its largest logits, the image, and the zero-shot answer's text."""

    def __init__(self, dim: int, hidden: tuple[int, ...], n_logits: int) -> None:
        super().__init__()
        self.n_logits, self.scale = n_logits, math.sqrt(dim)
        self.layers = perceptron([2 * dim + n_logits - 1, *hidden, 1])
        for parameter in self.layers[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, batch: Batch) -> Tensor:
        """(B,) float32."""
        answer = batch.text[batch.prediction]
        inputs = [logit_gaps(batch.logits, self.n_logits), batch.image * self.scale, answer * self.scale]
        output: Tensor = self.layers(torch.cat(inputs, dim=1)).squeeze(-1)
        return LIMIT * torch.tanh(output / LIMIT)


def logit_gaps(logits: Tensor, n: int) -> Tensor:
    """(B, n - 1) sorted gaps of the n largest logits to the very largest, in units of 20 nats, at most one.

    Absent candidates of (B, K) logits with K < n are one unit away.
    """
    largest = logits.topk(min(n, logits.shape[1]), dim=-1).values
    gaps = ((largest[:, :1] - largest[:, 1:]) / FAR).clamp(max=1)
    return functional.pad(gaps, (0, n - 1 - gaps.shape[1]), value=1.0)


def target_curve(confidence: Tensor, steepness: float) -> Tensor:
    """psi: the sigmoid of (confidence - 1/2) / steepness, brought to 0 at 0 and 1 at 1.

    It is formed as (1 + tanh((s - 1/2) / (2 lambda)) / tanh(1 / (4 lambda))) / 2, which no lambda makes overflow.
    """
    return (1 + torch.tanh((confidence - 0.5) / (2 * steepness)) / math.tanh(1 / (4 * steepness))) / 2

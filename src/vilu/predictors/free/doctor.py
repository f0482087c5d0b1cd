"""DOCTOR."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vilu.predictors.base import FailurePredictor
from vilu.predictors.free.posterior import log_posterior
from vilu.types import Batch


@dataclass
class Doctor(FailurePredictor):
    """DOCTOR, alpha form: u = (1 - g) / g with g = sum_j p_j^2.

    1 - g is summed as p_j (1 - p_j), without cancellation. No input perturbation, since embeddings are frozen.

    Source: Granese et al., NeurIPS 2021, D_alpha.
    """

    name: ClassVar[str] = "doctor"
    summary: ClassVar[str] = "DOCTOR alpha: odds of the Gini impurity (Granese et al. 2021)"
    reference: ClassVar[str] = "Granese et al., NeurIPS 2021"

    def _uncertainty(self, batch: Batch) -> Tensor:
        log_p = log_posterior(batch)
        p = log_p.exp()
        return -(p * torch.expm1(log_p)).sum(dim=-1) / p.square().sum(dim=-1)

"""Generalised entropy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from vilu.predictors.base import FailurePredictor
from vilu.predictors.free.posterior import log_posterior
from vilu.types import Batch


@dataclass
class GEN(FailurePredictor):
    """Generalised entropy: u = sum over the M largest p_j of p_j^gamma (1 - p_j)^gamma.

    A small gamma makes the tail count: 1e-20 to the power 0.1 is 0.01. Powers are taken of logarithms, so that no tail
    underflows. All K candidates are summed where they are fewer than M.

    Args:
        gamma: Exponent.
        largest: M, how many of the largest probabilities are summed.

    Source: Liu et al., CVPR 2023.
    """

    name: ClassVar[str] = "gen"
    summary: ClassVar[str] = "generalised entropy of the largest zero-shot probabilities (Liu et al. 2023)"
    reference: ClassVar[str] = "Liu et al., CVPR 2023"

    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.1
    largest: Annotated[int, Field(ge=1)] = 100

    def _uncertainty(self, batch: Batch) -> Tensor:
        log_p = log_posterior(batch)
        log_p = log_p.topk(min(self.largest, log_p.shape[-1]), dim=-1).values
        return (self.gamma * (log_p + torch.log(-torch.expm1(log_p)))).exp().sum(dim=-1)

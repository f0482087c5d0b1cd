"""Divergence of the uniform distribution from the zero-shot posterior."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vilu.predictors.base import FailurePredictor
from vilu.predictors.free.posterior import log_posterior
from vilu.types import Batch


@dataclass
class KLUniform(FailurePredictor):
    """Negative divergence from the uniform distribution: u = -KL(uniform || p) = log K + mean_j log p_j, at most 0.

    This is the direction that is news: KL(p || uniform) = log K - H(p) orders rows as ``entropy`` does. Every candidate
    counts alike here, so what decides is how far the unlikely ones lie below the answer.

    Source: the confidence loss of Lee et al., ICLR 2018, as a score.
    """

    name: ClassVar[str] = "kl_uniform"
    summary: ClassVar[str] = "negative KL divergence of the uniform distribution from the zero-shot posterior"
    reference: ClassVar[str] = "Lee et al., ICLR 2018"

    def _uncertainty(self, batch: Batch) -> Tensor:
        log_p = log_posterior(batch)
        return log_p.mean(dim=-1) + math.log(log_p.shape[-1])

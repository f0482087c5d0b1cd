"""Shannon entropy of the zero-shot posterior."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vilu.predictors.base import FailurePredictor
from vilu.predictors.free.posterior import log_posterior
from vilu.types import Batch


@dataclass
class Entropy(FailurePredictor):
    """Normalised Shannon entropy: u = -sum_j p_j log p_j / log K, in [0, 1].

    Exact x log x; the released ViLU code adds 1e-6 inside the logarithm, which biases the score with K.

    Source: ViLU, supplement A.3.
    """

    name: ClassVar[str] = "entropy"
    summary: ClassVar[str] = "Shannon entropy of the zero-shot posterior over log K"
    reference: ClassVar[str] = "Shannon, 1948"

    def _uncertainty(self, batch: Batch) -> Tensor:
        log_p = log_posterior(batch)
        return -(log_p.exp() * log_p).sum(dim=-1) / math.log(log_p.shape[-1])

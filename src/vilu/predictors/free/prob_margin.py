"""Probability margin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vilu.predictors.base import FailurePredictor
from vilu.predictors.free.posterior import log_posterior
from vilu.types import Batch


@dataclass
class ProbMargin(FailurePredictor):
    """One minus the gap between the two largest probabilities: u = 1 - (p_(1) - p_(2)), in [0, 1].

    It is summed as (1 - p_(1)) + p_(2), which keeps confident rows apart where the gap itself rounds to one; the
    constant changes no order.

    Source: best-versus-second-best, Joshi et al., CVPR 2009.
    """

    name: ClassVar[str] = "prob_margin"
    summary: ClassVar[str] = "one minus the gap between the two largest zero-shot probabilities"
    reference: ClassVar[str] = "Joshi et al., CVPR 2009"

    def _uncertainty(self, batch: Batch) -> Tensor:
        first, second = log_posterior(batch).topk(2, dim=-1).values.unbind(dim=-1)
        return second.exp() - torch.expm1(first)

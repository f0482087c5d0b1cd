"""Largest logit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vilu.predictors.base import FailurePredictor
from vilu.types import Batch


@dataclass
class MaxLogit(FailurePredictor):
    """Negative largest logit: u = -max_j l_j.

    Source: Hendrycks et al., ICML 2022 (MaxLogit).
    """

    name: ClassVar[str] = "max_logit"
    summary: ClassVar[str] = "negative largest zero-shot logit (Hendrycks et al. 2022)"
    reference: ClassVar[str] = "Hendrycks et al., ICML 2022"

    def _uncertainty(self, batch: Batch) -> Tensor:
        return -batch.logits.amax(dim=-1)

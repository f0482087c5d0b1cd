"""Energy score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from vilu.predictors.base import FailurePredictor
from vilu.similarity import float64
from vilu.types import Batch


@dataclass
class Energy(FailurePredictor):
    """Free energy of the logits: u = -T log sum_j exp(l_j / T), between -max_j l_j - T log K and -max_j l_j.

    Args:
        temperature: T, beside the VLM's own logit scale; towards zero the score becomes ``max_logit``.

    Source: Liu et al., NeurIPS 2020.
    """

    name: ClassVar[str] = "energy"
    summary: ClassVar[str] = "negative log-sum-exp of the zero-shot logits (Liu et al. 2020)"
    reference: ClassVar[str] = "Liu et al., NeurIPS 2020"

    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0

    def _uncertainty(self, batch: Batch) -> Tensor:
        return -self.temperature * torch.logsumexp(float64(batch.logits) / self.temperature, dim=-1)

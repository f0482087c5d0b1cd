"""Maximum concept matching."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vilu.predictors.base import FailurePredictor
from vilu.predictors.free.posterior import log_posterior
from vilu.types import Batch


@dataclass
class MCM(FailurePredictor):
    """Maximum concept matching: u = 1 - max_j p_j, p the softmax at the VLM's own logit scale.

    Source: Ming et al., NeurIPS 2022 (there with temperature 1 on the cosines; ViLU uses the model's scale, as here).
    """

    name: ClassVar[str] = "mcm"
    summary: ClassVar[str] = "one minus the largest zero-shot probability (Ming et al. 2022)"
    reference: ClassVar[str] = "Ming et al., NeurIPS 2022"
    is_probability: ClassVar[bool] = True

    def _uncertainty(self, batch: Batch) -> Tensor:
        return -torch.expm1(log_posterior(batch).amax(dim=-1))

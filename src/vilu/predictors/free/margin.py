"""Logit margin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vilu.predictors.base import FailurePredictor
from vilu.types import Batch


@dataclass
class Margin(FailurePredictor):
    """Negative gap between the two largest logits: u = -(l_(1) - l_(2)).

    The logit bias cancels, and the logit scale only stretches it.

    Source: the score called RLog in "Know When to Abstain" (ICLR 2026).
    """

    name: ClassVar[str] = "margin"
    summary: ClassVar[str] = "negative gap between the two largest zero-shot logits"
    reference: ClassVar[str] = '"Know When to Abstain", ICLR 2026'

    def _uncertainty(self, batch: Batch) -> Tensor:
        first, second = batch.logits.topk(2, dim=-1).values.unbind(dim=-1)
        return second - first

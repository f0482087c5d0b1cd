"""What scores of the logits with hyper-parameters share."""

from __future__ import annotations

from dataclasses import dataclass

from vilu.predictors.base import FailurePredictor
from vilu.predictors.parameters import check_parameters
from vilu.types import EmbeddingSource


@dataclass
class TunableScore(FailurePredictor):
    """A score that needs no fit but has hyper-parameters: they are checked before it scores."""

    def _check_ready(self, data: EmbeddingSource) -> None:
        check_parameters(self)
        super()._check_ready(data)

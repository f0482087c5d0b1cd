"""What the two Delta scores share."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from vilu.similarity import float64
from vilu.types import Batch

MarginWeight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
NO_CAPTIONS = "it compares images answered rightly and wrongly, and other captions would make other ones wrong"


def cosine_margin(batch: Batch) -> Tensor:
    """(B,) float64 gap between the two largest cosines."""
    first, second = float64(batch.logits.topk(2, dim=1).values).unbind(dim=1)
    return (first - second) / batch.logit_scale

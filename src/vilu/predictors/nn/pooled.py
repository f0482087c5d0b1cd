"""The pooled logits from several experts, split into parts for an explanation."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PooledLogits(NamedTuple):
    """Three float64 parts of the pooled logits sum_m w_m l_m from experts m with weights w_m.

    The sum of the parts may differ from the pooled logits by a constant per row.
    """

    zero_shot: Tensor  # (B, K) tempered zero-shot logits, times sum_m w_m
    # (1, K) terms added by the experts to the zero-shot logits, for the mean training image
    class_offset: Tensor
    # (B, K) terms added because the image differs from the mean training image
    image_effect: Tensor

    @property
    def logits(self) -> Tensor:
        """Sum (B, K) of the three parts."""
        return self.zero_shot + self.class_offset + self.image_effect

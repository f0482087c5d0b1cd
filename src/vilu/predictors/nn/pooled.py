"""The pooled logits of several experts, split into parts that an explanation can show."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PooledLogits(NamedTuple):
    """Three float64 parts of the pooled logits sum_m w_m l_m of experts m with weights w_m.

    The sum of the parts may differ from the pooled logits by a constant per row.
    """

    zero_shot: Tensor  # (B, K) tempered zero-shot logits, times sum_m w_m
    texts: Tensor  # (1, K) what the experts add to them for the mean training image
    image: Tensor  # (B, K) what the experts add because the image differs from that mean

    @property
    def logits(self) -> Tensor:
        """(B, K) sum of the three parts."""
        return self.zero_shot + self.texts + self.image

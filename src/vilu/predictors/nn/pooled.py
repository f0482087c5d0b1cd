"""The pooled logits of several opinions, in the parts that a reason is given of."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Pooled(NamedTuple):
    """Three float64 parts whose sum is sum_m w_m l_m, the pooled logits.

    That holds up to a constant of every row.

    ``zero_shot`` (B, K) are tempered zero-shot logits, times sum_m w_m; ``texts`` (1, K) the
    residual of the experts at the mean training image; ``image`` (B, K) what the image adds to that
    residual.
    """

    zero_shot: Tensor
    texts: Tensor
    image: Tensor

    @property
    def logits(self) -> Tensor:
        """(B, K) their sum."""
        return self.zero_shot + self.texts + self.image

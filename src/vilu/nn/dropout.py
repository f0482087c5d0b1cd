"""Dropout with masks that are its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vilu.nn.world import current_world


class Dropout(nn.Module):
    """In training, a unit is zero with probability ``rate``, else multiplied by 1 / (1 - rate); otherwise nothing.

    Masks are drawn on the CPU from a generator of its own: a seed gives the same ones on every device, and the global
    generators are left alone. One instance may serve several layers. Where several processes train together, each draws
    the masks of all their rows and takes its own, so that their number does not matter.

    Args:
        rate: In [0, 1).
        seed: Of the masks in training.

    Source: Srivastava et al., JMLR 2014.
    """

    def __init__(self, rate: float, seed: int) -> None:
        super().__init__()
        self.rate = rate
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, hidden: Tensor) -> Tensor:
        """A mask per row in training, else the input."""
        if not self.training:
            return hidden
        world = current_world()
        n_rows = world.total(len(hidden))
        mask = self.mask((n_rows, *hidden.shape[1:]), self.generator)[world.mine(n_rows)]
        return hidden * mask.to(hidden.device)

    def mask(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """A mask on the CPU, zeros and 1 / (1 - rate)."""
        keep = torch.empty(*shape).bernoulli_(1 - self.rate, generator=generator)
        return keep / (1 - self.rate)

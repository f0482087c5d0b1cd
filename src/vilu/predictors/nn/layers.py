"""Layers and masks with random numbers from the caller's generator."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def linear(n_inputs: int, n_outputs: int, generator: torch.Generator | None) -> nn.Linear:
    """Make a linear layer in float32, with torch's default initialisation from ``generator``.

    Without a generator, the numbers are drawn from torch's global generator.
    """
    weight = torch.empty(n_outputs, n_inputs, dtype=torch.float32)
    bias = torch.empty(n_outputs, dtype=torch.float32)
    if not weight.is_meta:  # on the meta device there is nothing to initialise
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)  # as nn.Linear does
        bound = 1 / math.sqrt(n_inputs)
        nn.init.uniform_(bias, -bound, bound, generator=generator)
    # nn.Linear initialises its own weights, from the global generator. On the meta device it has no
    # memory for weights, and so draws no numbers.
    layer = nn.Linear(n_inputs, n_outputs, device="meta", dtype=weight.dtype)
    layer.weight = nn.Parameter(weight)
    layer.bias = nn.Parameter(bias)
    return layer


def dropout_mask(shape: Sequence[int], rate: float, generator: torch.Generator | None) -> Tensor:
    """Draw a float32 mask on the CPU: 0 with probability ``rate``, otherwise 1 / (1 - rate)."""
    is_kept = torch.empty(*shape, dtype=torch.float32)
    is_kept.bernoulli_(1 - rate, generator=generator)
    return is_kept / (1 - rate)

"""Layers and masks whose numbers come from a generator of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def linear(n_inputs: int, n_outputs: int, generator: torch.Generator | None) -> nn.Linear:
    """A linear layer in float32, with the numbers that torch gives it at this state of a generator.

    Without a generator they come from torch's own, which is of the whole process.
    """
    weight = torch.empty(n_outputs, n_inputs, dtype=torch.float32)
    bias = torch.empty(n_outputs, dtype=torch.float32)
    if not weight.is_meta:  # a network that is about to be loaded has no numbers yet
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
        bound = 1 / math.sqrt(n_inputs)
        nn.init.uniform_(bias, -bound, bound, generator=generator)
    layer = nn.Linear(n_inputs, n_outputs, device="meta", dtype=weight.dtype)  # which draws nothing
    layer.weight = nn.Parameter(weight)
    layer.bias = nn.Parameter(bias)
    return layer


def dropout_mask(shape: Sequence[int], rate: float, generator: torch.Generator | None) -> Tensor:
    """A mask on the CPU, float32: zero with probability ``rate``, else 1 / (1 - rate)."""
    keep = torch.empty(*shape, dtype=torch.float32).bernoulli_(1 - rate, generator=generator)
    return keep / (1 - rate)

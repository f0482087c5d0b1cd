"""The adapter that turns an embedding into a distribution over embeddings."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from vilu.nn.generalised_gaussian import GeneralisedGaussian

FLATTEST, SHARPEST = 1e-3, 1e3
"""Range of 1 / alpha, in units in which a coordinate is of order one."""

LOWEST_SHAPE, HIGHEST_SHAPE = 0.1, 5.0


class ProbabilisticAdapter(nn.Module):
    """ProbVLM's adapter of one modality: x = z sqrt(D), y = x + MLP(x), and heads on y for mean, 1 / alpha and beta.

    A coordinate of a unit vector is of the order of 1 / sqrt(D); x and the distribution are in units in which it is of
    order one, so that the start does not depend on D. The MLP has three layers, each head two.

    Args:
        dim: Embedding width D.
        width: Width of the two hidden layers.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.hidden = nn.ModuleList([nn.Linear(dim, width), nn.Linear(width, width)])
        self.out = nn.Linear(width, dim)
        self.mean, self.inverse_scale, self.shape = (
            nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim)) for _ in range(3)
        )

    def forward(self, embedding: Tensor, masks: Sequence[Tensor] = ()) -> GeneralisedGaussian:
        """Distribution over the embeddings (..., D), times sqrt(D), that mean the same as ``embedding`` (..., D).

        Args:
            embedding: Unit-norm rows.
            masks: Dropout masks of the two hidden layers, each (..., width); none: no dropout.
        """
        x = in_units(embedding)
        y = x
        for number, layer in enumerate(self.hidden):
            y = torch.relu(layer(y))
            y = y * masks[number] if masks else y
        y = x + self.out(y)
        inverse_scale = functional.softplus(self.inverse_scale(y)).clamp(FLATTEST, SHARPEST)
        shape = LOWEST_SHAPE + (HIGHEST_SHAPE - LOWEST_SHAPE) * torch.sigmoid(self.shape(y))
        return GeneralisedGaussian(self.mean(y), inverse_scale, shape)


def in_units(embedding: Tensor) -> Tensor:
    """Embeddings (..., D) in the units of the distributions: times sqrt(D)."""
    return embedding * math.sqrt(embedding.shape[-1])


def dropout_masks(size: tuple[int, int], rate: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Masks of two layers, each of this size: zero with probability ``rate``, else 1 / (1 - rate)."""
    draws = torch.rand((2, *size), generator=generator)
    first, second = (draws >= rate).float() / (1 - rate)
    return first, second

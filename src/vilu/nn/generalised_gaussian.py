"""The generalised Gaussian, a density whose tails run from heavier than Laplace's to almost none."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST = 1e-6  # for a shape below one the density has a cusp, and its slope no bound, where the deviation is zero


class GeneralisedGaussian(NamedTuple):
    """Independent generalised Gaussians, density beta / (2 alpha Gamma(1/beta)) exp(-(|x - mean| / alpha)^beta).

    beta = 1 is the Laplace distribution of scale alpha, beta = 2 the Gaussian of variance alpha² / 2.

    Attributes:
        mean: Any shape.
        inverse_scale: 1 / alpha > 0, of a shape that broadcasts with ``mean``.
        shape: beta > 0, likewise.
    """

    mean: Tensor
    inverse_scale: Tensor
    shape: Tensor

    def nll(self, x: Tensor) -> Tensor:
        """Negative log-density of every entry: (|x - mean| / alpha)^beta - log(beta / (2 alpha)) + log Gamma(1/beta).

        Deviations below 1e-6 alpha count as 1e-6 alpha, which keeps the gradient finite.
        """
        deviation = ((x - self.mean).abs() * self.inverse_scale).clamp_min(SMALLEST)
        normaliser = torch.lgamma(1 / self.shape) - torch.log(self.shape * self.inverse_scale) + math.log(2)
        return deviation**self.shape + normaliser

    def log_variance(self) -> Tensor:
        """log(alpha² Gamma(3/beta) / Gamma(1/beta)) of every entry."""
        return torch.lgamma(3 / self.shape) - torch.lgamma(1 / self.shape) - 2 * torch.log(self.inverse_scale)

    def at(self, where: slice | tuple[slice | None, ...]) -> GeneralisedGaussian:
        """Some of the entries, or the same ones with more dimensions, by an index into all three parts."""
        return GeneralisedGaussian(self.mean[where], self.inverse_scale[where], self.shape[where])

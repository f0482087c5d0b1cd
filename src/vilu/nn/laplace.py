"""Last-layer Laplace approximation, with Kronecker factors, of encoders that are compared by their cosine.

The last layer of an encoder is g = P phi, P of shape (D, F). Around the trained P its posterior is taken to be a matrix
Gaussian of precision A ⊗ B: A (F, F) from the layer's inputs phi, B (D, D) from the curvature of the loss in its
outputs g. Everything is float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

ROWS = 1_024
"""Rows against all candidates at a time."""


def softmax_weights(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Curvature of InfoNCE in the logits (M, K), diag(p) - p p^T for each row, as p twice."""
    p = logits.softmax(dim=-1)
    return p, p


def sigmoid_weights(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Curvature of SigLIP's loss in the logits (M, K), diag(sigma (1 - sigma)) for each row: no outer product."""
    p = logits.sigmoid()
    return p * (1 - p), torch.zeros_like(p)


LOSSES: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {"infonce": softmax_weights, "siglip": sigmoid_weights}
"""Curvature diag(first) - second second^T of a contrastive loss in its logits, by the name of the loss."""


@dataclass(frozen=True)
class Layer:
    """The last layer of an encoder at some rows.

    Attributes:
        inputs: (M, F) phi.
        outputs: (M, D) g = P phi, before they are brought to unit norm.
        count: (M,) how often each row occurs.
    """

    inputs: Tensor
    outputs: Tensor
    count: Tensor

    @property
    def directions(self) -> Tensor:
        """(M, D) g / ‖g‖."""
        return functional.normalize(self.outputs, dim=-1)


@dataclass(frozen=True)
class Factors:
    """Kronecker factors of the curvature of a last layer over n pairs, before the root of n divides them.

    Attributes:
        inputs: (F, F) sum of phi phi^T.
        outputs: (D, D) sum of the Gauss-Newton curvatures of the loss in g.
        n: Number of pairs.
    """

    inputs: Tensor
    outputs: Tensor
    n: int

    def __add__(self, other: Factors) -> Factors:
        return Factors(self.inputs + other.inputs, self.outputs + other.outputs, self.n + other.n)

    def scaled(self, pseudo_count: float) -> tuple[Tensor, Tensor]:
        """A and B times sqrt(pseudo_count): the pair of them weighs ``pseudo_count`` times the data."""
        scale = math.sqrt(pseudo_count / self.n)
        return scale * self.inputs, scale * self.outputs


def factors(layer: Layer, candidates: Tensor, scale: float, bias: float, loss: str) -> Factors:
    """What some rows, each against all of ``candidates`` (K, D), add to the factors of their layer.

    The logits are scale * cosine + bias. With unit vectors u = g / ‖g‖ and c_j, the curvature in g of one row is
    scale² J (sum_j a_j c_j c_j^T - m m^T) J, where J = (I - u u^T) / ‖g‖ and m = sum_j b_j c_j; a and b come from the
    loss: a = b = p for InfoNCE, a = sigma (1 - sigma) and b = 0 for SigLIP.
    """
    outputs = torch.zeros(candidates.shape[1], candidates.shape[1], dtype=candidates.dtype, device=candidates.device)
    weights = layer.count * (scale / layer.outputs.norm(dim=-1)).square()
    for unit, weight in zip(layer.directions.split(ROWS), weights.split(ROWS), strict=True):
        outputs += curvature_sum(unit, weight, candidates, *LOSSES[loss](scale * unit @ candidates.T + bias))
    inputs = (layer.inputs * layer.count[:, None]).T @ layer.inputs
    return Factors(inputs, outputs, int(layer.count.sum()))


def curvature_sum(unit: Tensor, weight: Tensor, candidates: Tensor, diagonal: Tensor, outer: Tensor) -> Tensor:
    """(D, D) sum over rows of w (I - u u^T) M (I - u u^T), M = sum_j a_j c_j c_j^T - m m^T, m = sum_j b_j c_j.

    The projections are multiplied out, so that nothing is larger than (M, K), (M, D) or (D, D).

    Args:
        unit: (M, D) u.
        weight: (M,) w.
        candidates: (K, D) c.
        diagonal: (M, K) a.
        outer: (M, K) b.
    """
    mean = outer @ candidates
    along = (diagonal * (unit @ candidates.T)) @ candidates - mean * (mean * unit).sum(dim=-1, keepdim=True)  # M u
    middle = candidates.T @ ((weight @ diagonal)[:, None] * candidates) - mean.T @ (weight[:, None] * mean)
    cross = unit.T @ (weight[:, None] * along)
    twice = unit.T @ ((weight * (along * unit).sum(dim=-1))[:, None] * unit)
    return middle - cross - cross.T + twice


@dataclass(frozen=True)
class Posterior:
    """Diagonal of the Gaussian posterior of a last layer's output: variance (phi^T inputs phi) * outputs.

    Attributes:
        inputs: (F, F) inverse of sqrt(tau) A + sqrt(lambda) I.
        outputs: (D,) diagonal of the inverse of sqrt(tau) B + sqrt(lambda) I.
    """

    inputs: Tensor
    outputs: Tensor

    def variance(self, phi: Tensor) -> Tensor:
        """(M, D) variances of the outputs at inputs (M, F)."""
        return (phi @ self.inputs * phi).sum(dim=-1, keepdim=True) * self.outputs


def posterior(found: Factors, squared_norm: float, pseudo_count: float) -> tuple[Posterior, float]:
    """Posterior of a last layer of squared norm ‖P‖², and the prior precision lambda that the evidence chose."""
    spectra = [torch.linalg.eigh(factor) for factor in found.scaled(pseudo_count)]
    (a, a_vectors), (b, b_vectors) = ((values.clamp_min(0), vectors) for values, vectors in spectra)
    prior = best_prior_precision(a, b, squared_norm)
    inputs = (a_vectors / (a + math.sqrt(prior))) @ a_vectors.T
    outputs = b_vectors.square() @ (1 / (b + math.sqrt(prior)))
    return Posterior(inputs, outputs), prior


def log_evidence(log_prior: float, a: Tensor, b: Tensor, squared_norm: float) -> float:
    """Log marginal likelihood of a Laplace approximation, but for what does not depend on the prior precision lambda.

    (F D log lambda - lambda ‖P‖² - log det(Ã ⊗ B̃)) / 2, with Ã = diag(a) + sqrt(lambda) I in the eigenbasis, B̃
    likewise, and log det(Ã ⊗ B̃) = D log det Ã + F log det B̃.

    Args:
        log_prior: log lambda.
        a: (F,) eigenvalues of sqrt(tau) A.
        b: (D,) eigenvalues of sqrt(tau) B.
        squared_norm: ‖P‖².
    """
    root = math.exp(log_prior / 2)
    log_det = float(len(b) * (a + root).log().sum() + len(a) * (b + root).log().sum())
    return (len(a) * len(b) * log_prior - math.exp(log_prior) * squared_norm - log_det) / 2


def best_prior_precision(a: Tensor, b: Tensor, squared_norm: float) -> float:
    """The lambda of the largest ``log_evidence``.

    Its derivative in log lambda falls everywhere, so there is one maximum, and none above F D / ‖P‖², where the
    derivative of the first two terms is zero.
    """
    from scipy.optimize import minimize_scalar

    highest = math.log(len(a) * len(b) / squared_norm)
    found = minimize_scalar(
        lambda log_prior: -log_evidence(log_prior, a, b, squared_norm),
        bounds=(highest - 60, highest),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return math.exp(found.x)


def cosine_moments(g: Tensor, g_variance: Tensor, h: Tensor, h_variance: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (B, K) of the cosine of independent Gaussian vectors of diagonal covariance.

    The moments of g · h are exact; the product of the norms counts as the root of its expected square.

    Args:
        g: (B, D) means.
        g_variance: (B, D) variances.
        h: (K, D) means.
        h_variance: (K, D) variances.
    """
    g_second, h_second = g.square() + g_variance, h.square() + h_variance
    squared_norms = g_second.sum(dim=-1)[:, None] * h_second.sum(dim=-1)
    mean = g @ h.T / squared_norms.sqrt()
    variance = (g_second @ h_variance.T + g_variance @ h.square().T) / squared_norms
    return mean, variance

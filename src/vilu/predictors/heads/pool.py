"""A log-linear pool of experts, weighted by likelihood."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

POOL_SD = 0.2
"""Prior standard deviation of the weights, around the first expert alone."""


def fit_pool(log_p: NDArray[np.float64], target: NDArray[np.int64]) -> NDArray[np.float64]:
    """Weights w >= 0 of a log-linear pool, of largest posterior for the targets under the prior N((1, 0, ...), 0.2^2).

    Args:
        log_p: (N, M, K) log probabilities of M experts.
        target: (N,) true classes.
    """
    from scipy.optimize import minimize

    rows = np.arange(len(target))
    prior = np.eye(log_p.shape[1])[0]

    def objective(weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        mixed = np.einsum("m,nmk->nk", weights, log_p)
        log_q = mixed - np.logaddexp.reduce(mixed, axis=1, keepdims=True)
        slope = np.einsum("nk,nmk->m", np.exp(log_q), log_p) - log_p[rows, :, target].sum(axis=0)
        distance = weights - prior
        value = -log_q[rows, target].sum() + (distance**2).sum() / (2 * POOL_SD**2)
        return float(value), slope + distance / POOL_SD**2

    found = minimize(objective, prior, jac=True, method="L-BFGS-B", bounds=[(0, None)] * len(prior))
    weights: NDArray[np.float64] = found.x
    return weights

"""Shapley values of a few players, from the values of all coalitions."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def shapley(values: Tensor) -> Tensor:
    """(G, B) Shapley values phi_g = sum_S |S|! (G - |S| - 1)! / G! [v(S + g) - v(S)], over the coalitions S without g.

    They add up to v(all) - v(nobody); a player that changes no value gets zero, and two that are interchangeable get
    the same (Shapley 1953).

    Args:
        values: (2^G, B) float64: v(S) at the row whose bits are the members of S, player g being bit g.

    Raises:
        ValueError: If the number of rows is no power of two.

    Example:
        >>> shapley(torch.tensor([[0.0], [1.0], [3.0], [6.0]]).double()).squeeze(1).tolist()
        [2.0, 4.0]
    """
    n = len(values).bit_length() - 1
    if len(values) != 1 << n:
        raise ValueError(f"{len(values)} values are not those of all coalitions")
    parts = torch.zeros(n, *values.shape[1:], dtype=values.dtype)
    for player in range(n):
        for coalition in range(1 << n):
            if not coalition >> player & 1:
                size = coalition.bit_count()
                weight = 1 / (n * math.comb(n - 1, size))
                parts[player] += weight * (values[coalition | 1 << player] - values[coalition])
    return parts

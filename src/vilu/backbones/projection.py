"""Taking the last linear map of a tower apart from the tower."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

ROUNDING = 1e-4
"""Largest difference, of the largest entry, by which two orders of the same float32 sums may differ."""


def detach_projection(network: nn.Module, paths: Sequence[str], run: Callable[[], Tensor]) -> Tensor | None:
    """Take the last map out of a tower, which from then on gives what went into it.

    A map counts only if it is linear without bias and what the tower gives on a probe is its image: nothing in a
    library says that a member called ``proj`` is applied last.

    Args:
        network: The model; changed in place where a map is found.
        paths: Where the map may be, as dotted names: a matrix (F, D) applied from the right, or an ``nn.Linear``.
        run: The tower on a probe, (1, D).

    Returns:
        The map (D, F); None where there is no such map, and the network is as it was.
    """
    modules = dict(network.named_modules())
    for path in paths:
        parent, _, name = path.rpartition(".")
        owner = modules.get(parent)
        found = getattr(owner, name, None)
        weight = _matrix(found)
        if owner is None or weight is None:
            continue
        expected = run()
        setattr(owner, name, nn.Identity() if isinstance(found, nn.Linear) else None)
        if _maps(weight, run(), expected):
            return weight
        setattr(owner, name, found)
    return None


def _matrix(found: object) -> Tensor | None:
    """(D, F) of a member that may be a linear map without bias."""
    if isinstance(found, nn.Linear):
        return found.weight.detach() if [name for name, _ in found.named_parameters()] == ["weight"] else None
    return found.detach().T if isinstance(found, nn.Parameter) and found.ndim == 2 else None


def _maps(weight: Tensor, features: Tensor, expected: Tensor) -> bool:
    """Whether the probe's embedding is the image of its features."""
    if features.shape[-1] != weight.shape[1] or expected.shape[-1] != weight.shape[0]:
        return False
    difference = (features @ weight.T - expected).abs().max()
    return bool(difference < ROUNDING * expected.abs().max())

"""Plain matrix products, as a standard of comparison for times."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

Shape = tuple[int, int, int]
"""A product as (rows, inner, columns)."""


def products(
    shapes: list[Shape], times: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Callable[[], None]:
    """Return a function that computes all products ``times`` times, into preallocated memory."""
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    operands = [
        (torch.randn(m, k, **options), torch.randn(k, n, **options), torch.empty(m, n, **options))
        for m, k, n in shapes
    ]

    def run() -> None:
        for _ in range(times):
            for a, b, out in operands:
                torch.mm(a, b, out=out)

    return run


def per_step(run: Callable[[], None], steps: int) -> float:
    """Time a call, and return the seconds per step."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) / steps

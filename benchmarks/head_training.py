"""Training of the ViLU head on cached embeddings, against plain matrix products of the same shapes.

D = 512, K = 10, the published MLP. "Textbook" are the products of the head as the paper writes it, forward and
backward; "executed" those that are left when the first layer is multiplied part by part in the cheapest order. A rate
of 1 means that training takes as long as the products alone.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from vilu.embeddings.memory import Embeddings
from vilu.predictors.nn.head import HIDDEN, FailureHead
from vilu.predictors.nn.losses import FailureWeight, bce_loss
from vilu.predictors.nn.train import HeadTrainer, Rows, TrainConfig

D, K, REPEATS = 512, 10, 7
Shape = tuple[int, int, int]


def mlp_tail(b: int) -> list[Shape]:
    """Products behind the first layer: forward, gradient of the input, gradient of the weight."""
    widths = [*HIDDEN, 1]
    pairs = list(itertools.pairwise(widths))
    return [shape for i, o in pairs for shape in ((b, i, o), (b, o, i), (o, b, i))]


def textbook(b: int) -> list[Shape]:
    """(rows, inner, columns) of every product of a training step as the paper writes the head."""
    h = HIDDEN[0]
    attention = [(b, D, D), (D, b, D), (K, D, D), (D, K, D)]
    attention += [(b, D, K), (b, K, D), (K, b, D), (b, K, D), (b, D, K), (K, b, D)]
    return [*attention, (b, 3 * D, h), (h, b, 3 * D), (b, h, D), *mlp_tail(b)]


def executed(b: int) -> list[Shape]:
    """The same step as the head multiplies it, texts first."""
    h = HIDDEN[0]
    attention = [(D, D, K), (D, D, K), (b, D, K), (D, K, D), (D, K, D), (K, D, D), (K, b, D)]
    values = [(K, D, D), (K, D, h), (b, K, h), (K, b, h), (b, h, K), (h, K, D), (K, h, D), (D, K, D)]
    caption = [(K, D, h), (h, K, D)]
    return [*attention, *values, *caption, (b, D, h), (h, b, D), *mlp_tail(b)]


def products(
    shapes: list[Shape], times: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Callable[[], None]:
    """Runs all products so many times, into memory that is already there."""
    where: dict[str, Any] = {"device": device, "dtype": dtype}
    made = [(torch.randn(m, k, **where), torch.randn(k, n, **where), torch.empty(m, n, **where)) for m, k, n in shapes]

    def run() -> None:
        for _ in range(times):
            for a, b, out in made:
                torch.mm(a, b, out=out)

    return run


def training(b: int, precision: str, device: str = "cpu") -> Callable[[], None]:
    """Runs one epoch of 8,192 rows through the real training loop."""
    rng = np.random.default_rng(0)
    unit = [
        rows / np.linalg.norm(rows, axis=1, keepdims=True)
        for rows in (rng.normal(size=(8192, D)), rng.normal(size=(K, D)))
    ]
    data = Embeddings(unit[0], unit[1], rng.integers(K, size=8192))
    config = TrainConfig(1, b, 1e-3, 0.9, 5e-4, 1, 0, None, precision, 0, torch.device(device))
    torch.manual_seed(0)
    trainer = HeadTrainer(FailureHead(D), bce_loss(FailureWeight("batch", 0.9)), config)
    trainer.thaw()
    rows, generator = Rows(data, torch.arange(8192)), torch.Generator().manual_seed(0)

    def run() -> None:
        for batch in rows.steps(b, generator):
            trainer._step(batch)

    return run


def per_step(run: Callable[[], None], steps: int) -> float:
    """Seconds per step of one call."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) / steps


def measure(b: int) -> dict[str, float]:
    """Medians over interleaved repeats, in seconds per step."""
    steps = 8192 // b
    runs: dict[str, tuple[Callable[[], None], int]] = {
        "fp32": (training(b, "fp32"), steps),
        "bf16": (training(b, "bf16"), steps),
    }
    for name, shapes in (("textbook", textbook(b)), ("executed", executed(b))):
        runs[name] = (products(shapes, steps), steps)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(REPEATS + 1):
        for name, (run, n) in runs.items():
            seconds = per_step(run, n)
            if repeat:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> dict[str, float]:
    """Print a table, return the ratios."""
    ratios: dict[str, float] = {}
    print(f"head training, D={D}, K={K}, {torch.get_num_threads()} threads, medians of {REPEATS}")
    for b in (128, 1024):
        t = measure(b)
        ratios[f"head_{b}_textbook"] = t["textbook"] / t["fp32"]
        ratios[f"head_{b}_executed"] = t["executed"] / t["fp32"]
        ratios[f"head_{b}_bf16_speedup"] = t["fp32"] / t["bf16"]
        print(
            f"  batch {b}: fp32 {b / t['fp32']:,.0f} rows/s = {ratios[f'head_{b}_textbook']:.2f} of textbook products, "
            f"{ratios[f'head_{b}_executed']:.2f} of executed ones; bf16 {b / t['bf16']:,.0f} rows/s = "
            f"{ratios[f'head_{b}_bf16_speedup']:.2f} x fp32"
        )
    return ratios


if __name__ == "__main__":
    main()

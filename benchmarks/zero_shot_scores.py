"""Scores of the logits against the product and softmax alone, on one thread.

Embeddings are normalised and in memory. Both take the same rows in one run, in turn, and the least
time of each counts. The floor is the product in blocks whose logits stay in the cache, and a
softmax over them. Beside it, the largest relative error against float64 of the same float32 logits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

import vilu
from benchmarks.plus_speed import least
from vilu.embeddings.memory import Embeddings

D = 512
SHAPES = {1_000: 20_000, 10: 400_000}
EXACT = ("mcm", "entropy", "doctor")
METHODS = (*EXACT, "max_logit", "margin", "prob_margin", "energy", "gen", "kl_uniform")


def data(k: int, n: int) -> Embeddings:
    """Images around their class's text."""
    generator = torch.Generator().manual_seed(0)
    text = torch.nn.functional.normalize(torch.randn(k, D, generator=generator), dim=1)
    noise = torch.randn(n, D, generator=generator)
    image = torch.nn.functional.normalize(
        text[torch.randint(k, (n,), generator=generator)] + 0.2 * noise, dim=1
    )
    return Embeddings(image, text)


def floor(image: Tensor, text: Tensor, rows: int) -> Callable[[], None]:
    """The product and softmax, ``rows`` at a time."""

    def run() -> None:
        for block in image.split(rows):
            (block @ text.T).mul_(100.0).softmax(dim=1)

    return run


def exact(name: str, logits: Tensor) -> Tensor:
    """A score in float64 of float32 logits (B, K); the largest apart, so that nothing cancels."""
    rows = logits.double().sort(dim=1, descending=True).values
    below = (rows - rows[:, :1])[:, 1:]
    e = below.exp()
    s, t, q = e.sum(dim=1), -(e * below).sum(dim=1), e.square().sum(dim=1)
    scores: dict[str, Tensor] = {
        "mcm": s / (1 + s),
        "entropy": (torch.log1p(s) + t / (1 + s)) / np.log(rows.shape[1]),
        "doctor": (s * (2 + s) - q) / (1 + q),
    }
    return scores[name]


def measure(k: int, n: int) -> dict[str, float]:
    """Shares of the floor's rate for K candidates."""
    source = data(k, n)
    work: dict[str, Callable[[], object]] = {
        f"floor of {rows}": floor(source.image, source.text, rows) for rows in (256, 1_024, 4_096)
    }
    predictors = {name: vilu.PREDICTORS[name]() for name in METHODS}
    work |= {
        name: partial(predictor.predict_uncertainty, source)
        for name, predictor in predictors.items()
    }
    seconds = least(work)
    floor_seconds = min(value for name, value in seconds.items() if name.startswith("floor"))
    print(
        f"K = {k:,}, D = {D}, {n:,} rows, one thread; product and softmax: "
        f"{n / floor_seconds:,.0f} rows/s"
    )
    few = source.image[:2_000]
    logits = (few @ source.text.T).mul_(100.0)
    for name, value in seconds.items():
        line = f"  {name:14} {n / value:12,.0f} rows/s, {floor_seconds / value:.2f} of it"
        if name in EXACT:
            found = predictors[name].predict_uncertainty(Embeddings(few, source.text))
            line += f", relative error {np.abs(found / exact(name, logits).numpy() - 1).max():.1e}"
        print(line)
    return {
        f"score_{name}_k{k}": floor_seconds / value
        for name, value in seconds.items()
        if name in predictors
    }


def main() -> dict[str, float]:
    """Print a table; return shares of the floor's rate."""
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    for k, n in SHAPES.items():
        figures |= measure(k, n)
    return figures


if __name__ == "__main__":
    main()

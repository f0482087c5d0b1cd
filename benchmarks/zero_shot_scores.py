"""Compares scores from the logits with product and softmax alone, on one thread.

Embeddings are normalised and in memory. Both sides get the same rows in the same run, in turn, and
the result is the median ratio over the turns. "Floor" is the product in blocks of 4,096 rows, and a
softmax over each block. In confident rows all logits but the largest are far lower. The output also
has the scores' largest relative error, compared with float64 on the same float32 logits.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

import vilu
from vilu.embeddings.memory import Embeddings

D = 512
SHAPES = {1_000: 20_000, 10: 400_000}
NOISE = {"": 0.2, "_confident": 0.05}
FLOOR = "floor of 4096"
TURNS = 9
EXACT = ("mcm", "entropy", "doctor")
METHODS = (*EXACT, "max_logit", "margin", "prob_margin", "energy", "gen", "kl_uniform")


def random_data(k: int, n: int, noise: float) -> Embeddings:
    """Make images near the class texts."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(k, D, generator=generator)
    text = torch.nn.functional.normalize(directions, dim=1)
    beside = noise * torch.randn(n, D, generator=generator)
    label = torch.randint(k, (n,), generator=generator)
    image = torch.nn.functional.normalize(text[label] + beside, dim=1)
    return Embeddings(image, text)


def floor(image: Tensor, text: Tensor, rows: int) -> Callable[[], None]:
    """Return a function that computes product and softmax, ``rows`` rows at a time."""

    def run() -> None:
        for block in image.split(rows):
            (block @ text.T).mul_(100.0).softmax(dim=1)

    return run


def exact_scores(name: str, logits: Tensor) -> Tensor:
    """Compute a score in float64 from float32 logits (B, K), without cancellation."""
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


def rates_of_floor(work: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return, for each function, the median rate divided by the floor's rate, in turns."""
    ratios: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(TURNS):
        seconds = {}
        for name, run in work.items():
            start = time.perf_counter()
            run()
            seconds[name] = time.perf_counter() - start
        for name, value in seconds.items():
            ratios[name].append(seconds[FLOOR] / value)
    return {name: statistics.median(values) for name, values in ratios.items()}


def measure(k: int, n: int, kind: str) -> dict[str, float]:
    """Measure rates divided by the floor's rate, for K candidates."""
    source = random_data(k, n, NOISE[kind])
    work: dict[str, Callable[[], object]] = {
        f"floor of {rows}": floor(source.image, source.text, rows) for rows in (4_096, 256)
    }
    predictors = {name: vilu.PREDICTORS[name]() for name in METHODS}
    for name, predictor in predictors.items():
        work[name] = partial(predictor.predict_uncertainty, source)
    print(f"K = {k:,}, D = {D}, {n:,} rows{kind.replace('_', ', ')}, one thread")
    found = rates_of_floor(work)
    few = source.image[:2_000]
    logits = (few @ source.text.T).mul_(100.0)
    for name, share in found.items():
        line = f"  {name:14} {share:.2f} of the rate of product and softmax"
        if name in EXACT:
            data = Embeddings(few, source.text)
            scores = predictors[name].predict_uncertainty(data)
            exact = exact_scores(name, logits)
            relative_error = np.abs(scores / exact.numpy() - 1)
            error = relative_error.max()
            line += f", relative error {error:.1e}"
        print(line)
    return {f"score_{name}_k{k}{kind}": found[name] for name in predictors}


def main() -> dict[str, float]:
    """Print the tables. Return the rates divided by the floor's rate."""
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    for k, n in SHAPES.items():
        for kind in NOISE:
            figures |= measure(k, n, kind)
    return figures


if __name__ == "__main__":
    main()

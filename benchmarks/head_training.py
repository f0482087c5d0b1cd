"""Compares training the ViLU head on cached embeddings with plain matrix products.

D = 512, the published MLP, K = 10 and 1,000. "Executed" are a step's products, forward and
backward, into memory allocated before. A rate of 1 means that training takes as long as these
products. "Plain" is the paper's head, written in torch, on embeddings in memory, with the same
optimiser as our training. All are timed in turn, in the same run.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.contrast import Dense
from benchmarks.floor import Shape, per_step, products
from vilu.embeddings.memory import Embeddings
from vilu.embeddings.rows import Rows
from vilu.predictors.nn.head import HIDDEN_WIDTHS, FailureHead
from vilu.predictors.nn.losses import FailureWeight, bce_loss, weighted_bce
from vilu.predictors.nn.processes import World
from vilu.predictors.nn.train import HeadTrainer, TrainConfig, with_zero_shot_answers

D, N, REPEATS = 512, 8_192, 5


def mlp_tail(b: int) -> list[Shape]:
    """List products after the first layer: forward, input gradient, and weight gradient."""
    widths = [*HIDDEN_WIDTHS, 1]
    pairs = list(itertools.pairwise(widths))
    return [shape for i, o in pairs for shape in ((b, i, o), (b, o, i), (o, b, i))]


def executed_products(b: int, k: int) -> list[Shape]:
    """List every product in a training step as (rows, inner, columns), gradients included."""
    h = HIDDEN_WIDTHS[0]
    row_projection, weight_gradient = (b, D, D), (D, b, D)
    attention = [(b, D, k), (b, k, D)]
    attention_gradient = [(b, D, k), (b, D, k), (b, k, D), (k, b, D), (k, b, D)]
    if k > b:  # the query times two matrices, the average times a matrix, then three gradients
        projections = [row_projection] * 3
        changes = [row_projection] * 2 + [weight_gradient] * 3
    else:
        projections = [row_projection, (k, D, D)]
        changes = [weight_gradient, (D, k, D)]
    first_layer = [(b, D, h)] * 3 + [(h, b, D)] * 3 + [(b, h, D)]
    return [
        *projections,
        *attention,
        *attention_gradient,
        *changes,
        *first_layer,
        *mlp_tail(b),
    ]


def embeddings(k: int) -> Embeddings:
    """Make embeddings from random unit rows."""
    rng = np.random.default_rng(0)
    image, text = (
        rows / np.linalg.norm(rows, axis=1, keepdims=True)
        for rows in (rng.normal(size=(N, D)), rng.normal(size=(k, D)))
    )
    target = rng.integers(k, size=N)
    return Embeddings(image, text, target=target)


def vilu_epoch(data: Embeddings, b: int, precision: str, device: str = "cpu") -> Callable[[], None]:
    """Return a function that runs an epoch of the library's training loop."""
    config = TrainConfig(1, b, 1e-3, 0.9, 5e-4, 1, 0, None, precision, 0, torch.device(device))
    torch.manual_seed(0)
    head = FailureHead(D)
    weight = FailureWeight("batch", 0.9)
    loss = bce_loss(weight)
    trainer = HeadTrainer(head, loss, config)
    trainer.unfreeze_attention()
    index = torch.arange(N)
    rows_without_answers = Rows(data, index)
    world = World()
    rows = with_zero_shot_answers(rows_without_answers, config.device, world)
    generator = torch.Generator().manual_seed(0)

    def run() -> None:
        for batch in rows.steps(b, generator):
            trainer.step(batch, 1e-3)

    return run


def plain_epoch(data: Embeddings, b: int) -> Callable[[], None]:
    """Return a function that runs an epoch of the head as in the paper."""
    head, weight = Dense(data.space.logit_scale), FailureWeight("batch", 0.9)
    parameters = head.parameters()
    optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, weight_decay=5e-4, fused=True)

    def run() -> None:
        order = torch.randperm(N)
        for rows in order.split(b):
            logit, answer = head(data.image_rows(rows), data.text)
            failure = (answer != data.target[rows]).long()
            optimizer.zero_grad(set_to_none=True)
            weights = weight(failure)
            weighted_bce(logit, failure, weights).backward()
            optimizer.step()

    return run


def measure(b: int, k: int) -> dict[str, float]:
    """Return medians over interleaved repeats, in seconds per step."""
    steps, data = N // b, embeddings(k)
    executed = executed_products(b, k)
    runs: dict[str, Callable[[], None]] = {
        "fp32": vilu_epoch(data, b, "fp32"),
        "bf16": vilu_epoch(data, b, "bf16"),
        "plain": plain_epoch(data, b),
        "executed": products(executed, steps),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(REPEATS + 1):
        for name, run in runs.items():
            seconds = per_step(run, steps)
            if repeat:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> dict[str, float]:
    """Print a table, and return the ratios."""
    ratios: dict[str, float] = {}
    print(f"head training, D={D}, {torch.get_num_threads()} threads, medians of {REPEATS}")
    for k, b in itertools.product((10, 1_000), (128, 1_024)):
        t, name = measure(b, k), f"head_{k}_{b}"
        floor = sum(2 * math.prod(shape) for shape in executed_products(b, k))
        found = {
            f"{name}_executed": t["executed"] / t["fp32"],
            f"{name}_plain": t["plain"] / t["fp32"],
            f"{name}_bf16_speedup": t["fp32"] / t["bf16"],
            f"{name}_bf16_plain": t["plain"] / t["bf16"],
        }
        ratios |= found
        print(
            f"  K {k:,}, batch {b:,}: {t['fp32'] * 1e3:.2f} ms a step; "
            f"its products ({floor / 1e9:.2f} GFLOP) "
            f"{t['executed'] * 1e3:.2f}, so {found[f'{name}_executed']:.2f} of them; plain "
            f"{t['plain'] * 1e3:.2f}, {found[f'{name}_plain']:.2f} times as long; "
            f"bf16 {t['bf16'] * 1e3:.2f}, "
            f"{found[f'{name}_bf16_speedup']:.2f} times as fast ({found[f'{name}_bf16_plain']:.2f} "
            "of plain)",
            flush=True,
        )
    return ratios


if __name__ == "__main__":
    main()

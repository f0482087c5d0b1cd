"""Compares ``vilu_plus`` scores and fits (50,000 rows) with the matrix products needed.

Scores are computed with one thread, fits with all threads. Every figure is a ratio between times
taken in turn in the same run. For scores, a time is the shortest among several. A score needs these
products: the zero-shot product (D x K), a product for all terms linear in the image ((D + 1) x K),
and two products for the network (D x H, H x K). With a memory of M rows, a score needs two more
products in float64 (D x M, M x K).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

import vilu
from vilu.embeddings.memory import Embeddings
from vilu.predictors.contract.parameters import build_predictor

D, HIDDEN, MEMORY, REPEATS = 512, 512, 4_000, 5
FITS = (12_500, 25_000, 50_000)
CLASSES = 1_000


def data(k: int, n: int, seed: int, spread: float = 0.4) -> Embeddings:
    """Make images as class text plus the class's offset plus the image's noise."""
    shared, rng = np.random.default_rng(0), np.random.default_rng(seed)
    text, common = shared.normal(size=(2, k, D)) / np.sqrt(D)
    target = rng.integers(k, size=n)
    noise = (
        spread
        * np.sqrt(D)
        * rng.uniform(0.3, 1.2, size=(n, 1))
        * rng.normal(size=(n, D))
        / np.sqrt(D)
    )
    image = text[target] + 0.6 * common[target] + noise
    return Embeddings(
        image.astype(np.float32), text.astype(np.float32), target=target, logit_scale=60.0
    )


def least(work: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the shortest time for each function in seconds. The functions take turns."""
    seconds = dict.fromkeys(work, np.inf)
    for _ in range(REPEATS):
        for name, run in work.items():
            start = time.perf_counter()
            run()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def products(test: Embeddings) -> None:
    """Compute the products for a score without a memory."""
    keys, first, last = (
        torch.randn(len(test.text), D),
        torch.randn(HIDDEN, D),
        torch.randn(len(test.text), HIDDEN),
    )
    for block in test.image.split(1_024):
        _ = block @ test.text.T, block @ keys.T, (block @ first.T) @ last.T


def memory(test: Embeddings) -> None:
    """Compute the float64 arithmetic for a score with a memory."""
    bank, values = torch.randn(MEMORY, D).double(), torch.randn(MEMORY, len(test.text)).double()
    for block in test.image.double().split(256):
        _ = (block @ bank.T).exp_() @ values


def softmax(test: Embeddings) -> None:
    """Compute product and softmax, as for MCM."""
    for block in test.image.split(1_024):
        (block @ test.text.T).softmax(dim=1)


def scores() -> dict[str, float]:
    """Return score rates divided by the rates of the products alone.

    K = 10 has a memory, K = 1,000 has none.
    """
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    for k, n, floor in ((10, MEMORY, memory), (CLASSES, 12_000, products)):
        predictor = build_predictor(vilu.PREDICTORS["vilu_plus"], {"device": "cpu", "epochs": 2})
        train = data(k, n, 1)
        predictor.fit(train)
        test = data(k, 8_192, 2)
        work: dict[str, Callable[..., object]]
        work = {"ours": predictor.predict_uncertainty, "floor": floor, "softmax": softmax}
        seconds = least({name: partial(run, test) for name, run in work.items()})
        share = figures[f"score_vilu_plus_k{k}"] = seconds["floor"] / seconds["ours"]
        print(
            f"  scores, K = {k:,}: {8_192 / seconds['ours']:,.0f} rows/s, "
            f"{share:.2f} of its {floor.__name__}, "
            f"{seconds['softmax'] / seconds['ours']:.3f} of product and softmax"
        )
    return figures


def fits() -> dict[str, float]:
    """Return the times of ``vilu_plus`` and linear probe fits, in N x D x K products."""
    threads = torch.get_num_threads()
    image, text = torch.randn(8_192, D), torch.randn(CLASSES, D)
    product = least({"one": lambda: image @ text.T})["one"] / len(image)
    test, figures = data(CLASSES, 20_000, 3), {}
    failures = [batch.failure for batch in test.batches(4_096)]
    failure = torch.cat(failures).numpy()
    for method, sizes in {"vilu_plus": FITS, "linear_probe": FITS[-1:]}.items():
        for n in sizes:
            train = data(CLASSES, n, 1)
            start = time.perf_counter()
            predictor = build_predictor(vilu.PREDICTORS[method], {"device": "cpu"})
            predictor.fit(train)
            seconds = time.perf_counter() - start
            uncertainty = predictor.predict_uncertainty(test)
            auroc = 100 * vilu.metrics.auroc(uncertainty, failure)
            figures[f"fit_{method}_{n}_products"] = seconds / (n * product)
            print(
                f"  {method}, {n:,} x {D}, K = {CLASSES:,}, {threads} threads: {seconds:.0f} s, "
                f"{seconds / (n * product):,.0f} products of its rows with its texts; "
                f"AUROC {auroc:.2f}",
                flush=True,
            )
    return figures


def main() -> dict[str, float]:
    """Print the tables, and return the ratios."""
    warnings.simplefilter("ignore")
    threads = torch.get_num_threads()
    print("vilu_plus")
    figures = scores()
    torch.set_num_threads(threads)
    return figures | fits()


if __name__ == "__main__":
    main()

"""I have images with captions, and some captions belong to other images: which ones?

The data are pairs, not classes. Every image is matched against the captions of its pool. If the
model takes another caption than the image's own and is sure of it, the image's own caption is
probably a swapped one. The script also shows why results at different pool sizes must not be
compared. The embeddings are simulated, and one caption in ten was swapped with another one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

import vilu
from example_data import simulated

POOL_SIZE = 16
LOGIT_SCALE = 20.0


def simulated_pairs(n: int, *, seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Simulate images (N, D) and captions (N, D). Every caption is a text of its own."""
    image, text, label = simulated(n, seed=seed, classes=n, width=48, blurred=0.3)
    return image, text[label]


def compare_pool_sizes(image: NDArray[np.float64], caption: NDArray[np.float64]) -> None:
    """Show that the accuracy falls as the pools grow, although the pairs are the same."""
    accuracy = {}
    for pool_size in (16, 64, 256):
        data = vilu.PairEmbeddings(image, caption, pool_size=pool_size, logit_scale=LOGIT_SCALE)
        outcomes = vilu.score(vilu.MCM(), data)
        accuracy[pool_size] = 1 - float(outcomes.failure.mean())
        print(
            f"with {pool_size:>3} captions in a pool, {accuracy[pool_size]:.0%} of the answers are "
            "right"
        )
    assert accuracy[16] > accuracy[64] > accuracy[256]


def swapped_order(n: int) -> NDArray[np.int64]:
    """Return the order of the captions after one caption in ten was swapped with its neighbour."""
    random = np.random.default_rng(0)
    n_swaps = n // 20
    # A swap exchanges the captions 2k and 2k + 1. Both are in one pool.
    first = random.permutation(n // 2)[:n_swaps] * 2
    second = first + 1
    order = np.arange(n)
    order[first] = second
    order[second] = first
    return order


def main() -> None:
    """Find swapped captions."""
    image, caption = simulated_pairs(POOL_SIZE * 80, seed=3)
    compare_pool_sizes(image, caption)

    n_pairs = len(image)
    order = swapped_order(n_pairs)
    swapped = order != np.arange(n_pairs)

    pools = vilu.Pools(size=POOL_SIZE, seed=None)  # Without a seed, pools keep the order of rows.
    data = vilu.PairEmbeddings(image, caption[order], pool_size=pools, logit_scale=LOGIT_SCALE)
    outcomes = vilu.score(vilu.MCM(), data)
    contradicted = outcomes.failure == 1  # The answer is not the image's own caption.
    suspicious = contradicted & (outcomes.uncertainty < 0.05)
    print(
        f"the model contradicts {contradicted.sum()} of {n_pairs} captions: "
        f"{swapped[contradicted].mean():.0%} of these are swapped"
    )
    print(
        f"the model contradicts {suspicious.sum()} of {n_pairs} captions and is sure: "
        f"{swapped[suspicious].mean():.0%} of these are swapped"
    )
    n_found = swapped[suspicious].sum()
    print(f"so {n_found} of {swapped.sum()} swapped captions are found")
    assert swapped[suspicious].mean() > 0.7 > swapped[contradicted].mean()
    assert n_found > 0.3 * swapped.sum()


if __name__ == "__main__":
    main()

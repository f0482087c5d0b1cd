"""I have images with captions, and some captions belong to other images: which ones?

Shows pairs instead of classes: every image is matched against the captions of its pool. Where the
model takes another caption than the image's own, and is sure of it, the caption is probably not its
own. Also shows why numbers of different pool sizes must not be compared. The embeddings are
simulated, and one caption in ten was swapped with another's.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

import vilu
from example_data import simulated

POOL, SCALE = 16, 20.0


def pairs(n: int, seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(N, D) images and (N, D) captions, every caption a text of its own."""
    image, text, label = simulated(n, seed=seed, classes=n, width=48, blurred=0.3)
    return image, text[label]


def main() -> None:
    """Find swapped captions."""
    image, caption = pairs(POOL * 80, seed=3)
    honest = {
        size: vilu.score(vilu.MCM(), vilu.PairEmbeddings(image, caption, size, SCALE))
        for size in (16, 64, 256)
    }
    accuracy = {size: 1 - float(outcomes.failure.mean()) for size, outcomes in honest.items()}
    for size, share in accuracy.items():
        print(
            f"in a pool of {size:>3} captions the model finds the right one in {share:.0%} of the "
            "cases"
        )
    assert accuracy[16] > accuracy[64] > accuracy[256]

    # Somebody has mixed up one caption in ten: pairs of neighbours, which are in one pool.
    random = np.random.default_rng(0)
    first = random.permutation(len(image) // 2)[: len(image) // 20] * 2
    order = np.arange(len(image))
    order[first], order[first + 1] = first + 1, first
    swapped = order != np.arange(len(image))

    outcomes = vilu.score(
        vilu.MCM(), vilu.PairEmbeddings(image, caption[order], vilu.Pools(POOL, seed=None), SCALE)
    )
    contradicted = outcomes.failure == 1  # the model takes another caption than the image's own
    suspicious = contradicted & (outcomes.uncertainty < 0.05)  # and is sure of it
    for what, which in (
        ("contradicted", contradicted),
        ("contradicted by a model that is sure", suspicious),
    ):
        print(
            f"{which.sum()} of {len(image)} captions are {what}; "
            f"of these {swapped[which].mean():.0%} are swapped"
        )
    print(f"so {swapped[suspicious].sum()} of {swapped.sum()} swapped captions are found")
    assert swapped[suspicious].mean() > 0.7 > swapped[contradicted].mean()
    assert swapped[suspicious].sum() > 0.3 * swapped.sum()


if __name__ == "__main__":
    main()

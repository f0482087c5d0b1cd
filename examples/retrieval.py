"""My images have several captions each, and people search them by text: which results are right?

Shows both directions of search. An image with three captions has three rows, one for each caption.
For a text, all rows of its image are right. For an image, all of its captions are right. Users see
the most certain results first, so the share of wrong results among these matters most. The
embeddings are simulated.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

import vilu
from example_data import simulated

N_CAPTIONS = 3
POOL_SIZE = 64
LOGIT_SCALE = 20.0


def search_outcomes(direction: Literal["image_to_text", "text_to_image"]) -> vilu.Outcomes:
    """Score all rows. The candidates of a row are those in its pool."""
    image, text, label = simulated(600, seed=5, classes=600, width=48, blurred=0.3)
    _, one_image_per_class = np.unique(label, return_index=True)
    row = np.repeat(one_image_per_class, N_CAPTIONS)
    noise = np.random.default_rng(6).normal(size=(len(row), text.shape[1]))
    caption = text[label[row]] + 0.05 * noise
    caption /= np.linalg.norm(caption, axis=1, keepdims=True)

    # The last rows do not fill a pool, so they have no score.
    pairs = vilu.PairEmbeddings(
        image=image[row],
        text=caption,
        pool_size=vilu.Pools(size=POOL_SIZE, direction=direction),
        logit_scale=LOGIT_SCALE,
    )
    return vilu.score(vilu.Margin(), pairs)


def main() -> None:
    """Compare the most certain results with all results."""
    for direction in ("image_to_text", "text_to_image"):
        outcomes = search_outcomes(direction)
        scored = outcomes.take(outcomes.evaluable)
        most_certain_first = np.argsort(scored.uncertainty)
        certain_half = scored.take(most_certain_first[: len(scored) // 2])
        wrong = scored.failure.mean()
        wrong_certain = certain_half.failure.mean()
        print(
            f"{direction}: {len(scored)} of {len(outcomes)} rows have a score. {wrong:.1%} of the "
            f"results are wrong, but only {wrong_certain:.1%} of the more certain half."
        )
        assert wrong_certain < 0.7 * wrong


if __name__ == "__main__":
    main()

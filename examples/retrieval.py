"""My images have several captions each, and people search them by text: which results are right?

Shows both directions. An image with three captions stands in three rows, one for each caption. For
a text all rows of its image are right, and for an image all of its captions. The results that the
model is surest of are shown first, and the share of wrong ones among them is what counts. The
embeddings are simulated.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

import vilu
from example_data import simulated

N_CAPTIONS, POOL, SCALE = 3, 64, 20.0


def searched(direction: Literal["image_to_text", "text_to_image"]) -> vilu.Outcomes:
    """Scores of all rows, each among the candidates of its pool."""
    image, text, label = simulated(600, seed=5, classes=600, width=48, blurred=0.3)
    _, first = np.unique(label, return_index=True)  # one image of every subject
    row = np.repeat(first, N_CAPTIONS)
    noise = np.random.default_rng(6).normal(size=(len(row), text.shape[1]))
    caption = text[label][row] + 0.05 * noise
    caption /= np.linalg.norm(caption, axis=1, keepdims=True)
    # the last rows, which do not fill a pool of 64, have no score
    pairs = vilu.PairEmbeddings(image[row], caption, vilu.Pools(POOL, direction), SCALE)
    return vilu.score(vilu.Margin(), pairs)


def main() -> None:
    """Compare the surest results with all results."""
    for direction in ("image_to_text", "text_to_image"):
        outcomes = searched(direction)
        scored = outcomes.take(outcomes.evaluable)
        surest = scored.take(np.argsort(scored.uncertainty)[: len(scored) // 2])
        wrong, wrong_of_surest = scored.failure.mean(), surest.failure.mean()
        print(
            f"{direction}: {len(scored)} of {len(outcomes)} rows have a score; {wrong:.1%} of the "
            f"results are wrong, {wrong_of_surest:.1%} of the surer half"
        )
        assert wrong_of_surest < 0.7 * wrong


if __name__ == "__main__":
    main()

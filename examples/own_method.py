"""I have an idea for a score of my own: what does it take to try it?

Shows a method of a few lines from outside: registered, it is listed, scored, evaluated, compared,
calibrated and saved as those of vilu are. The idea: how near does the runner-up come to the answer?
The embeddings are simulated.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field
from torch import Tensor

import vilu
from example_data import simulated


@vilu.register
@dataclass
class RunnersUp(vilu.FailurePredictor):
    """u = the mean probability of the next ``count`` classes over that of the answer."""

    name: ClassVar[str] = "runners_up"
    summary: ClassVar[str] = "mean probability of the next classes over that of the answer"
    reference: ClassVar[str] = "an example"
    looks_at: ClassVar[frozenset[str]] = frozenset({"logits"})

    count: Annotated[int, Field(ge=1)] = 1  # `--set count=2`, and its check, follow from this line

    def _score(self, batch: vilu.Batch) -> Tensor:
        largest = (
            batch.logits.softmax(dim=-1)
            .topk(min(self.count + 1, batch.logits.shape[-1]), dim=-1)
            .values
        )
        return largest[:, 1:].mean(dim=-1) / largest[:, 0]


def main() -> None:
    """Score, evaluate, compare, calibrate, save."""
    image, text, label = simulated(2_000, seed=20)
    held_out, test = (
        vilu.Embeddings(image[rows], text, target=label[rows], logit_scale=20.0)
        for rows in (slice(0, 800), slice(800, None))
    )
    assert "runners_up" in vilu.PREDICTORS

    mine = RunnersUp(count=1)
    scored = vilu.score(mine, test)
    print(vilu.evaluate(scored, metrics=["auroc", "fpr95"]))
    print(vilu.compare(scored, vilu.score(vilu.MaxLogit(), test)))
    print(vilu.compare(scored, vilu.score(vilu.Margin(), test)))

    mine.calibrate_probability(held_out)
    stated = float(mine.predict_failure_probability(test).mean())
    print(f"wrong are {scored.failure.mean():.0%}, calibrated it says {stated:.0%}")
    with tempfile.TemporaryDirectory() as folder:
        mine.save(Path(folder) / "mine")
        loaded = vilu.load(Path(folder) / "mine")
    same = np.array_equal(loaded.predict_uncertainty(test), scored.uncertainty)
    print(f"saved and loaded, it gives the same numbers: {'yes' if same else 'no'}")

    assert same
    assert abs(stated - scored.failure.mean()) < 0.05
    assert vilu.metrics.auroc(scored.uncertainty, scored.failure) > 0.8
    # softmax(l)₂ / softmax(l)₁ is exp(l₂ − l₁): with one runner-up the order is that of the margin
    # of the logits
    assert abs(vilu.compare(scored, vilu.score(vilu.Margin(), test)).difference) < 1e-6


if __name__ == "__main__":
    main()

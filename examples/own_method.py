"""I have an idea for a score of my own: what does it take to try it?

Shows a method of a few lines. Once it is registered, vilu lists, scores, evaluates, compares,
calibrates and saves it like its own methods. The idea is to ask how close the runner-up comes to
the answer. The embeddings are simulated.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field
from torch import Tensor

import vilu
from example_data import simulated


@vilu.register
@dataclass
class RunnersUp(vilu.FailurePredictor):
    """u = mean probability of the next ``count`` classes / probability of the answer."""

    name: ClassVar[str] = "runners_up"
    summary: ClassVar[str] = "mean probability of the next classes over that of the answer"
    reference: ClassVar[str] = "an example"
    looks_at: ClassVar[frozenset[str]] = frozenset({"logits"})

    # This line also makes the option `--set count=2` and its check.
    count: Annotated[int, Field(ge=1)] = 1

    def _score(self, batch: vilu.Batch) -> Tensor:
        """Compute the uncertainty of each row in a batch."""
        probability = batch.logits.softmax(dim=-1)
        n_largest = min(self.count + 1, probability.shape[-1])
        largest = probability.topk(n_largest, dim=-1).values  # The first one is the answer's.
        return largest[:, 1:].mean(dim=-1) / largest[:, 0]


def main() -> None:
    """Score, evaluate, compare, calibrate, and save."""
    image, text, label = simulated(2_000, seed=20)
    calibration_data = vilu.Embeddings(
        image=image[:800], text=text, target=label[:800], logit_scale=20.0
    )
    test_data = vilu.Embeddings(image=image[800:], text=text, target=label[800:], logit_scale=20.0)
    assert "runners_up" in vilu.PREDICTORS

    predictor = RunnersUp(count=1)
    runners_up = vilu.score(predictor, test_data)
    max_logit = vilu.score(vilu.MaxLogit(), test_data)
    margin = vilu.score(vilu.Margin(), test_data)
    print(vilu.evaluate(runners_up, metrics=["auroc", "fpr95"]))
    print(vilu.compare(runners_up, max_logit, metric="auroc"))
    against_margin = vilu.compare(runners_up, margin, metric="auroc")
    print(against_margin)

    predictor.calibrate_probability(calibration_data)
    probability = predictor.predict_failure_probability(test_data).mean()
    wrong = runners_up.failure.mean()
    print(f"{wrong:.0%} of the answers are wrong (predicted after calibration: {probability:.0%})")

    with tempfile.TemporaryDirectory() as folder:
        predictor.save(folder)
        loaded = vilu.load(folder)
    assert np.array_equal(loaded.predict_uncertainty(test_data), runners_up.uncertainty)
    print("the saved and loaded predictor gives the same scores")

    assert abs(probability - wrong) < 0.05
    assert vilu.metrics.auroc(runners_up.uncertainty, runners_up.failure) > 0.8
    # softmax(l)₂ / softmax(l)₁ is exp(l₂ − l₁). So with one runner-up the order of the answers is
    # that of the margin between the logits.
    assert abs(against_margin.difference) < 1e-6


if __name__ == "__main__":
    main()

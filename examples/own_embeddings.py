"""I have embeddings in numpy, from any model: which of its answers are wrong?

Shows the whole way with arrays alone: fit on some labelled rows, set a threshold on others, decide
about new rows without labels. The embeddings are simulated; put your own in place of them.
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

import vilu
from example_data import simulated


def main() -> Figure:
    """Fit, calibrate, score."""
    image, text, label = simulated(2400, seed=1)
    train, held_out, new = slice(0, 600), slice(600, 1400), slice(1400, None)
    scale = 20.0  # what your model multiplies cosines with: 100 for CLIP

    # Three parts, for each label can serve only once: to learn from, to guarantee with, to check.
    predictor = vilu.ViLUPlus(seed=0).fit(
        vilu.Embeddings(image[train], text, target=label[train], logit_scale=scale)
    )
    calibration = vilu.Embeddings(image[held_out], text, target=label[held_out], logit_scale=scale)
    predictor.calibrate_probability(calibration)
    rule = vilu.certify(vilu.score(predictor, calibration), max_risk=0.05, confidence=0.95)
    print(rule)

    arriving = vilu.Embeddings(image[new], text, logit_scale=scale)  # nobody knows what they show
    uncertainty = predictor.predict_uncertainty(arriving)
    probability = predictor.predict_failure_probability(arriving)
    accepted = rule.accept(uncertainty)

    wrong = (image[new] @ text.T).argmax(axis=1) != label[new]  # here we do know
    print(
        f"of {len(wrong)} new answers {wrong.mean():.0%} are wrong; "
        f"predicted were {probability.mean():.0%}"
    )
    print(
        f"accepted are {accepted.mean():.0%}, and of these {wrong[accepted].mean():.1%} are wrong"
    )

    assert abs(probability.mean() - wrong.mean()) < 0.05
    assert accepted.mean() > 0.4
    assert wrong[accepted].mean() < 0.06 < wrong.mean()
    assert np.isfinite(uncertainty).all()

    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.hist(
        [uncertainty[~wrong], uncertainty[wrong]], bins=25, stacked=True, label=["right", "wrong"]
    )
    axes.axvline(float(rule.threshold or 0), color="black", linestyle="--", label="threshold")
    axes.set(xlabel="uncertainty", ylabel="answers", yscale="log")
    axes.legend()
    return figure


if __name__ == "__main__":
    main()

"""I have embeddings in numpy, from any model: which of its answers are wrong?

Shows the whole way with arrays alone. A predictor is fitted on labelled rows. Other labelled rows
serve to set a threshold. Then the predictor decides about new rows without labels. The embeddings
are simulated. Put your own embeddings in their place.
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

import vilu
from example_data import simulated

SCALE = 20.0
"""The factor of your model from cosines to logits. CLIP has 100."""


def main() -> Figure:
    """Fit, calibrate, and decide about new rows."""
    image, text, label = simulated(2400, seed=1)

    # A label that was used for the fit must not be used for the calibration.
    fit_data = vilu.Embeddings(image=image[:600], text=text, target=label[:600], logit_scale=SCALE)
    calibration_data = vilu.Embeddings(
        image=image[600:1400], text=text, target=label[600:1400], logit_scale=SCALE
    )
    new_image = image[1400:]
    new_data = vilu.Embeddings(image=new_image, text=text, logit_scale=SCALE)

    predictor = vilu.ViLUPlus(seed=0)
    predictor.fit(fit_data)
    predictor.calibrate_probability(calibration_data)
    calibration_outcomes = vilu.score(predictor, calibration_data)
    rule = vilu.certify(calibration_outcomes, max_risk=0.05, confidence=0.95)
    print(rule)

    uncertainty = predictor.predict_uncertainty(new_data)
    predicted = predictor.predict_failure_probability(new_data).mean()
    accepted = rule.accept(uncertainty)

    # The simulation knows the labels of the new rows, so the decisions can be checked.
    answer = (new_image @ text.T).argmax(axis=1)
    wrong = answer != label[1400:]
    print(f"of {len(wrong)} new answers, {wrong.mean():.0%} are wrong (predicted: {predicted:.0%})")
    print(
        f"{accepted.mean():.0%} of the new answers are accepted, "
        f"and {wrong[accepted].mean():.1%} of the accepted answers are wrong"
    )

    assert abs(predicted - wrong.mean()) < 0.05
    assert accepted.mean() > 0.4
    assert wrong[accepted].mean() < 0.06 < wrong.mean()
    assert np.isfinite(uncertainty).all()
    assert rule.threshold is not None
    return histogram(uncertainty, wrong, threshold=rule.threshold)


def histogram(
    uncertainty: NDArray[np.float64], wrong: NDArray[np.bool_], *, threshold: float
) -> Figure:
    """Draw the uncertainty of right and of wrong answers."""
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.hist(
        [uncertainty[~wrong], uncertainty[wrong]],
        bins=25,
        stacked=True,
        label=["right answers", "wrong answers"],
    )
    axes.axvline(threshold, color="black", linestyle="--", label="threshold")
    axes.set(xlabel="uncertainty", ylabel="number of answers", yscale="log")
    axes.legend()
    return figure


if __name__ == "__main__":
    main()

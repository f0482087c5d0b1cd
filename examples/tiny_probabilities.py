"""My model is SigLIP, and all of its probabilities are tiny: how do I get ones that mean something?

SigLIP was trained with a sigmoid. For each class alone, its probability answers "is it this text,
of all texts there are?". So even most right answers get a probability below 1 %. Shows that a
threshold on this probability makes no sense, and that a comparison of the classes does. From 600
labels to fit and 600 to calibrate, ViLU+ learns a probability of failure that is true on average.
The embeddings are simulated, with a scale, a bias and cosines like those of SigLIP.
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

import vilu
from example_data import Arrays, simulated, unit

SCALE = 117.3  # This scale and this bias are roughly SigLIP's. A backbone of vilu brings its own.
BIAS = -16.5


def siglip_arrays() -> Arrays:
    """Simulate images and texts with small cosines."""
    image, text, label = simulated(2400, seed=2)
    # All images share a large coordinate that no text has. This gap between images and texts makes
    # all cosines small.
    image = unit(np.hstack([image, np.full((len(image), 1), 7.0)]))
    text = np.hstack([text, np.zeros((len(text), 1))])
    return Arrays(image, text, label)


def some_rows(arrays: Arrays, rows: slice, *, bias: float = BIAS) -> vilu.Embeddings:
    """Take some rows of the arrays as embeddings of a model with a scale and a bias."""
    return vilu.Embeddings(
        image=arrays.image[rows],
        text=arrays.text,
        target=arrays.label[rows],
        logit_scale=SCALE,
        logit_bias=bias,
    )


def main() -> Figure:
    """Compare the sigmoid, the softmax and ViLU+ on the same answers."""
    arrays = siglip_arrays()
    test_rows = slice(1200, None)
    test_data = some_rows(arrays, test_rows)

    mcm = vilu.score(vilu.MCM(), test_data)
    right = mcm.failure == 0
    cosine = arrays.image[test_rows] @ arrays.text.T
    largest_logit = SCALE * cosine.max(axis=1) + BIAS
    sigmoid = 1 / (1 + np.exp(-largest_logit))
    softmax = 1 - mcm.uncertainty
    print(f"{right.mean():.0%} of the answers are right")
    sigmoid_median = np.median(sigmoid[right])
    print(f"sigmoid: right answers have a median probability of {sigmoid_median:.2%}", end=" ")
    print(f"(largest: {sigmoid[right].max():.1%})")
    softmax_median = np.median(softmax[right])
    print(f"softmax: right answers have a median probability of {softmax_median:.0%}")
    assert right.mean() > 0.6
    assert sigmoid.max() < 0.05  # The rule "accept above 50 %" would accept nothing.

    # The softmax compares the classes. A bias that all classes share makes no difference to it.
    unbiased = vilu.score(vilu.MCM(), some_rows(arrays, test_rows, bias=0.0))
    assert np.abs(unbiased.uncertainty - mcm.uncertainty).max() < 1e-3

    plus = vilu.ViLUPlus(seed=0)
    plus.fit(some_rows(arrays, slice(0, 600)))
    plus.calibrate_probability(some_rows(arrays, slice(600, 1200)))
    learned = vilu.score(plus, test_data)
    predicted = plus.predict_failure_probability(test_data).mean()
    auroc_sigmoid = vilu.metrics.auroc(-sigmoid, mcm.failure)
    auroc_mcm = vilu.metrics.auroc(mcm.uncertainty, mcm.failure)
    auroc_plus = vilu.metrics.auroc(learned.uncertainty, learned.failure)
    print(f"AUROC: sigmoid {auroc_sigmoid:.3f}, mcm {auroc_mcm:.3f}, vilu_plus {auroc_plus:.3f}")
    wrong = learned.failure.mean()
    print(f"{wrong:.0%} of the answers are wrong (predicted by vilu_plus: {predicted:.0%})")
    assert auroc_plus > auroc_mcm
    assert auroc_plus > auroc_sigmoid
    assert abs(predicted - wrong) < 0.05
    return histograms({"sigmoid": sigmoid, "softmax over the classes": softmax}, right)


def histograms(probability: dict[str, NDArray[np.float64]], right: NDArray[np.bool_]) -> Figure:
    """Draw the probabilities of right and of wrong answers."""
    figure = Figure(figsize=(6, 2.6), layout="constrained")
    all_axes = figure.subplots(1, 2)
    for axes, (title, values) in zip(all_axes, probability.items(), strict=True):
        parts = [values[right], values[~right]]
        axes.hist(parts, bins=25, stacked=True, label=["right answers", "wrong answers"])
        axes.set(title=title, xlabel="probability of the answer", ylabel="number of answers")
    all_axes[1].legend()
    return figure


if __name__ == "__main__":
    main()

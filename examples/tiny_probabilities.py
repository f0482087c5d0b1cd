"""My model is SigLIP, and all of its probabilities are tiny: how do I get ones that mean something?

A model that was trained with a sigmoid asks of every class by itself "is it this text, of all texts
there are?", so that even right answers get a probability below 1 %. Shows that a threshold on it
makes no sense, that the classes compared with one another do, and that a few hundred labels give a
probability that is true. The embeddings are simulated with SigLIP's scale and bias, and with
cosines as small as its own.
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

import vilu
from example_data import simulated, unit

SCALE, BIAS = 117.3, -16.5
"""About what SigLIP has learned; a backbone of vilu brings its own."""


def main() -> Figure:
    """The same answers, by four scores."""
    image, text, label = simulated(2400, seed=2)
    # A coordinate that all images share and no text has: the gap between the two, which makes all
    # cosines small.
    image = unit(np.hstack([image, np.full((len(image), 1), 7.0)]))
    text = np.hstack([text, np.zeros((len(text), 1))])
    train, held_out, test = (
        vilu.Embeddings(image[rows], text, target=label[rows], logit_scale=SCALE, logit_bias=BIAS)
        for rows in (slice(0, 600), slice(600, 1200), slice(1200, None))
    )

    largest = SCALE * (image[1200:] @ text.T).max(axis=1) + BIAS
    sigmoid = 1 / (1 + np.exp(-largest))
    mcm = vilu.score(vilu.MCM(), test)
    right = mcm.failure == 0
    print(
        f"{right.mean():.0%} of the answers are right; the sigmoid's probability of a right one: ",
        end="",
    )
    print(f"{np.median(sigmoid[right]):.2%} in the middle, {sigmoid[right].max():.1%} at most")
    assert right.mean() > 0.6
    assert sigmoid.max() < 0.05  # "accept above 50 %" would accept nothing

    # The softmax compares the classes, and a bias that all of them have makes no difference to it.
    unbiased = vilu.score(
        vilu.MCM(), vilu.Embeddings(image[1200:], text, target=label[1200:], logit_scale=SCALE)
    )
    assert np.abs(unbiased.uncertainty - mcm.uncertainty).max() < 1e-3
    print(
        f"the softmax's probability of a right one: {1 - np.median(mcm.uncertainty[right]):.0%} in "
        "the middle"
    )

    plus = vilu.ViLUPlus(seed=0).fit(train)
    plus.calibrate_probability(held_out)
    learned = vilu.score(plus, test)
    auroc = {
        "sigmoid": vilu.metrics.auroc(-sigmoid, mcm.failure),
        "mcm": vilu.metrics.auroc(mcm.uncertainty, mcm.failure),
        "vilu_plus": vilu.metrics.auroc(learned.uncertainty, learned.failure),
    }
    print("AUROC: " + ", ".join(f"{name} {value:.3f}" for name, value in auroc.items()))
    stated = plus.predict_failure_probability(test)
    print(f"wrong are {learned.failure.mean():.0%}, calibrated vilu_plus says {stated.mean():.0%}")
    assert auroc["vilu_plus"] > auroc["mcm"]
    assert auroc["vilu_plus"] > auroc["sigmoid"]
    assert abs(stated.mean() - learned.failure.mean()) < 0.05

    figure = Figure(figsize=(6, 2.6), layout="constrained")
    shown = {"sigmoid": sigmoid, "softmax over the classes": 1 - mcm.uncertainty}
    for axes, (title, of_answer) in zip(figure.subplots(1, 2), shown.items(), strict=True):
        axes.hist(
            [of_answer[right], of_answer[~right]], bins=25, stacked=True, label=["right", "wrong"]
        )
        axes.set(title=title, xlabel="probability of the answer", ylabel="answers")
    figure.axes[1].legend()
    return figure


if __name__ == "__main__":
    main()

"""My classifier is no CLIP, or a SigLIP whose logits I have: which of its answers are wrong?

Shows what to do with logits and without texts: a classifier of scikit-learn with features of its
own, and then SigLIP, whose logits have a bias. The data are simulated; put your own in their place.
"""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import LogisticRegression

import vilu
from example_data import simulated


def main() -> None:
    """Judge a classifier of scikit-learn, then SigLIP."""
    features, text, label = simulated(2400, seed=1)

    # A classifier that was trained on a few rows; the logits of all others are those of new rows.
    classifier = LogisticRegression(C=10).fit(features[:200], label[:200])
    logits = classifier.decision_function(features[200:])
    data = vilu.Embeddings.from_logits(logits, features[200:], label[200:])
    parts = data.split(fit=0.3, calibration=0.4, test=0.3)
    judge = vilu.ViLUPlus(seed=0)  # of the answers of the classifier, the largest logits
    model = vilu.Selective(judge, answer="zero_shot").fit(parts.fit)
    model.calibrate(parts.calibration, max_risk=0.1)
    outcomes = model.predict(parts.test)
    accepted = np.array(outcomes.decision) == "accept"
    print(
        f"scikit-learn: {outcomes.failure.mean():.0%} of the answers are wrong; accepted are "
        f"{accepted.mean():.0%}, and of these {outcomes.failure[accepted].mean():.0%} are wrong"
    )
    plain = vilu.score(vilu.MCM(), parts.test)
    gains = []
    for uncertainty in (plain.uncertainty, outcomes.uncertainty):
        gains.append(vilu.metrics.auroc(uncertainty, plain.failure))
    print(
        f"AUROC of the softmax: {gains[0]:.2f}; with ViLU+ on logits and features: {gains[1]:.2f}"
    )
    assert outcomes.failure[accepted].mean() < 0.13 < outcomes.failure.mean()
    assert gains[1] > gains[0]

    # SigLIP: logits of the model, with its scale and bias. Here cosines stand in their place.
    siglip = 20.0 * features @ text.T - 16.5
    given = vilu.Embeddings.from_logits(siglip, target=label)
    same = vilu.Embeddings(features, text, target=label, logit_scale=20.0, logit_bias=-16.5)
    largest = -vilu.MaxLogit().predict_uncertainty(given)
    print(f"SigLIP: the largest logits are {largest.min():.1f} to {largest.max():.1f}")
    assert np.allclose(largest, siglip.max(axis=1), atol=1e-4)
    for method in (vilu.MCM(), vilu.MaxLogit(), vilu.Entropy()):
        difference = method.predict_uncertainty(given) - method.predict_uncertainty(same)
        assert np.abs(difference).max() < 1e-4


if __name__ == "__main__":
    main()

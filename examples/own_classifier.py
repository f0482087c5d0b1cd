"""My classifier is no CLIP, or a SigLIP whose logits I have: which of its answers are wrong?

Shows what to do if there are logits, but no texts. The first part judges a classifier of
scikit-learn by its logits and features. The second part takes logits of SigLIP, which contain a
bias. The data are simulated. Put your own data in their place.
"""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import LogisticRegression

import vilu
from example_data import Arrays, simulated


def judge_scikit_learn(arrays: Arrays) -> None:
    """Decide which answers of a scikit-learn classifier to accept."""
    features = arrays.image
    label = arrays.label

    # The classifier is trained on 200 rows. vilu needs logits of other rows.
    classifier = LogisticRegression(C=10)
    classifier.fit(features[:200], label[:200])
    logits = classifier.decision_function(features[200:])
    data = vilu.Embeddings.from_logits(logits=logits, features=features[200:], target=label[200:])
    parts = data.split(fit=0.3, calibration=0.4, test=0.3)

    # "zero_shot" means that vilu judges the answers of the classifier, the largest logits.
    model = vilu.Selective(vilu.ViLUPlus(seed=0), answer="zero_shot")
    model.fit(parts.fit)
    model.calibrate(parts.calibration, max_risk=0.1)
    outcomes = model.predict(parts.test)

    accepted = np.array(outcomes.decision) == "accept"
    wrong = outcomes.failure.mean()
    wrong_accepted = outcomes.failure[accepted].mean()
    print(f"scikit-learn: {wrong:.0%} of the answers are wrong")
    print(
        f"{accepted.mean():.0%} of the answers are accepted, "
        f"and {wrong_accepted:.0%} of the accepted answers are wrong"
    )
    mcm = vilu.score(vilu.MCM(), parts.test)
    auroc_softmax = vilu.metrics.auroc(mcm.uncertainty, mcm.failure)
    auroc_plus = vilu.metrics.auroc(outcomes.uncertainty, mcm.failure)
    print(
        f"the AUROC is {auroc_softmax:.2f} with the softmax, "
        f"and {auroc_plus:.2f} with ViLU+ on logits and features"
    )
    assert wrong_accepted < 0.13 < wrong
    assert auroc_plus > auroc_softmax


def judge_siglip(arrays: Arrays) -> None:
    """Show that logits of SigLIP give the same scores as its embeddings."""
    # The logits of a real SigLIP come from the model. Here they are made from cosines.
    cosine = arrays.image @ arrays.text.T
    logits = 20.0 * cosine - 16.5
    from_logits = vilu.Embeddings.from_logits(logits=logits, target=arrays.label)
    from_embeddings = vilu.Embeddings(
        image=arrays.image,
        text=arrays.text,
        target=arrays.label,
        logit_scale=20.0,
        logit_bias=-16.5,
    )

    largest = -vilu.MaxLogit().predict_uncertainty(from_logits)
    print(f"SigLIP: the largest logits lie between {largest.min():.1f} and {largest.max():.1f}")
    assert np.allclose(largest, logits.max(axis=1), atol=1e-4)
    for predictor in (vilu.MCM(), vilu.MaxLogit(), vilu.Entropy()):
        uncertainty = predictor.predict_uncertainty(from_logits)
        difference = uncertainty - predictor.predict_uncertainty(from_embeddings)
        assert np.abs(difference).max() < 1e-4


def main() -> None:
    """Judge a classifier of scikit-learn, and then SigLIP."""
    arrays = simulated(2400, seed=1)
    judge_scikit_learn(arrays)
    judge_siglip(arrays)


if __name__ == "__main__":
    main()

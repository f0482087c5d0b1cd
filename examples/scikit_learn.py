"""I have a classifier of scikit-learn: which of its answers can I accept?

Wraps the classifier. The wrapper sets a part of the training rows aside. On this part it certifies
that at most 5 % of the accepted answers are wrong. The rows are simulated. Put your own rows in
their place.
"""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from example_data import simulated
from vilu.sklearn import REVIEW, SelectiveClassifier


def main() -> None:
    """Fit, accept answers, and leave the others for review."""
    features, _, label = simulated(6000, seed=1)
    new_features = features[3000:]
    new_label = label[3000:]

    # The wrapper splits the rows into a part to fit on, and a part for the guarantee.
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    model = SelectiveClassifier(classifier, max_risk=0.05, random_state=0)
    model.fit(features[:3000], label[:3000])
    print(model.rule_)

    wrong = model.predict(new_features) != new_label
    accepted = model.accept(new_features)
    accuracy = model.score(new_features, new_label)
    print(f"{wrong.mean():.1%} of all answers are wrong")
    print(
        f"{accepted.mean():.0%} of the answers are accepted, "
        f"and {wrong[accepted].mean():.1%} of the accepted answers are wrong"
    )
    print(f"model.score gives the accuracy of all answers: {accuracy:.3f}")

    answers = model.predict_or_review(new_features)
    n_review = 0
    for answer in answers:
        if answer is REVIEW:
            n_review += 1
    print(f"{n_review} of {len(answers)} answers are left for review")

    assert wrong.mean() > 0.05
    assert accepted.mean() > 0.4
    assert wrong[accepted].mean() < 0.06
    assert n_review == np.count_nonzero(~accepted)


if __name__ == "__main__":
    main()

"""I have a classifier of scikit-learn: which of its answers can I accept?

Wraps it, and certifies on a part of the training rows that at most 5 % of the accepted answers are
wrong. The rows are simulated; put your own in place of them.
"""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from example_data import simulated
from vilu.sklearn import REVIEW, SelectiveClassifier


def main() -> None:
    """Fit, accept, leave for review."""
    image, _, label = simulated(6000, seed=1)
    train, new = slice(0, 3000), slice(3000, None)

    # The classifier splits the rows inside: one part to fit on, the other for the guarantee.
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    model = SelectiveClassifier(classifier, max_risk=0.05, random_state=0)
    model.fit(image[train], label[train])
    print(model.rule_)

    wrong = model.predict(image[new]) != label[new]
    accepted = model.accept(image[new])
    print(f"of all answers {wrong.mean():.1%} are wrong")
    print(f"accepted are {accepted.mean():.0%}, of which {wrong[accepted].mean():.1%} are wrong")
    print(f"score, the accuracy of all rows: {model.score(image[new], label[new]):.3f}")

    answers = model.predict_or_review(image[new])
    n_review = sum(answer is REVIEW for answer in answers)
    print(f"for review: {n_review} of {len(answers)}")

    assert wrong.mean() > 0.05
    assert accepted.mean() > 0.4
    assert wrong[accepted].mean() < 0.06
    assert n_review == np.count_nonzero(~accepted)


if __name__ == "__main__":
    main()

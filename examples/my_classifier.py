"""My model writes a table of its answers with scores: which of them can I accept?

A forest reads the digits of scikit-learn. It is fitted on 200 of them, so it errs often. Its
answers are a table with three columns: two say how sure it is, and one is the brightness of the
image. Any other model can write such a table, too: OCR, a language model, a detector.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier

import vilu
from vilu.methods import AnswerScore, AnswerScores

MAX_RISK = 0.05


def table_of_answers(
    model: RandomForestClassifier, images: NDArray[Any], labels: NDArray[Any], rows: NDArray[Any]
) -> vilu.AnswerTable:
    """One row per image: the answer, whether it is right, and what the model says of it."""
    probabilities = model.predict_proba(images[rows])
    first, second = np.sort(probabilities, axis=1)[:, [-1, -2]].T
    answers = model.classes_[probabilities.argmax(axis=1)]
    return vilu.open_table(
        {
            "id": [f"digit {row}" for row in rows],
            "answer": answers,
            "score_probability": first,
            "score_margin": first - second,
            "brightness": images[rows].mean(axis=1),  # its sign is learned
            "correct": answers == labels[rows],
        }
    )


def main() -> None:
    """Fit the model, write tables of its answers, and accept what can be accepted."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    of_model, to_fit, to_calibrate, new = np.split(order, [200, 700, 1200])
    model = RandomForestClassifier(random_state=0).fit(images[of_model], labels[of_model])
    tables = [table_of_answers(model, images, labels, rows) for rows in (to_fit, to_calibrate, new)]
    fitted_on, calibrated_on, test = tables
    print(f"the model is wrong in {test.failure.mean():.1%} of {len(test)} new answers")

    combined = AnswerScores().fit(fitted_on)
    print("share of each column:", combined.notes_["shares"])
    for predictor in (AnswerScore(column="score_probability"), combined):
        guarded = vilu.Selective(predictor).calibrate(calibrated_on, max_risk=MAX_RISK)
        outcomes = guarded.predict(test)
        accepted = np.array([decision == "accept" for decision in outcomes.decision or ()])
        risk = outcomes.failure[accepted].mean()
        print(f"{predictor.name}: {accepted.mean():.1%} accepted, of which {risk:.1%} are wrong")
        assert accepted.mean() > 0.5
        assert risk <= MAX_RISK  # with confidence 95 % of the draw of the calibration rows


if __name__ == "__main__":
    main()

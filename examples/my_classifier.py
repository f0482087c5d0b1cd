"""My model writes a table of its answers with scores: which of them can I accept?

A random forest reads the digits of scikit-learn. It is fitted on 200 digits only, so many answers
are wrong. Its table has three columns of numbers. Two columns say how sure the forest is. The third
column is the brightness of the image. Any other model can write such a table: OCR, a language
model, a detector.
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


def answer_table(
    forest: RandomForestClassifier, images: NDArray[Any], labels: NDArray[Any], rows: NDArray[Any]
) -> vilu.AnswerTable:
    """Make a table with the answer for every image, its scores, and whether it is right."""
    probabilities = forest.predict_proba(images[rows])
    sorted_probabilities = np.sort(probabilities, axis=1)
    largest = sorted_probabilities[:, -1]
    second_largest = sorted_probabilities[:, -2]
    answers = forest.classes_[probabilities.argmax(axis=1)]
    return vilu.open_table(
        {
            "id": [f"digit {row}" for row in rows],
            "answer": answers,
            "score_probability": largest,
            "score_margin": largest - second_largest,
            # The fit learns whether a larger number means more or less trust.
            "brightness": images[rows].mean(axis=1),
            "correct": answers == labels[rows],
        }
    )


def main() -> None:
    """Fit the forest, write tables of its answers, and accept with a guarantee."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    forest_rows, fit_rows, calibration_rows, new_rows = np.split(order, [200, 700, 1200])
    forest = RandomForestClassifier(random_state=0)
    forest.fit(images[forest_rows], labels[forest_rows])
    fit_table = answer_table(forest, images, labels, fit_rows)
    calibration_table = answer_table(forest, images, labels, calibration_rows)
    new_table = answer_table(forest, images, labels, new_rows)
    print(f"{new_table.failure.mean():.1%} of the {len(new_table)} new answers are wrong")

    all_columns = AnswerScores().fit(fit_table)
    print("share of each column in the score:", all_columns.notes_["shares"])
    one_column = AnswerScore(column="score_probability")
    for predictor in (one_column, all_columns):
        model = vilu.Selective(predictor)
        model.calibrate(calibration_table, max_risk=MAX_RISK)
        outcomes = model.predict(new_table)
        accepted = np.array(outcomes.decision) == "accept"
        risk = outcomes.failure[accepted].mean()
        print(
            f"{predictor.name}: {accepted.mean():.1%} of the answers are accepted, "
            f"and {risk:.1%} of the accepted answers are wrong"
        )
        assert accepted.mean() > 0.5
        assert risk <= MAX_RISK  # One calibration in twenty may exceed it.


if __name__ == "__main__":
    main()

"""Test that a classifier's logits become a table of answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import entropy

import vilu
from vilu.errors import DataError
from vilu.tables.sources import logit_answers


def test_scores_are_those_of_the_softmax() -> None:
    p = np.array([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4]])
    columns = logit_answers(np.log(p) + 5, target=[0, 1], class_names=["cat", "dog", "owl"]).columns
    assert columns["answer"] == ["cat", "owl"]
    assert columns["correct"] == [1, 0]
    assert columns["score_softmax"] == pytest.approx([0.7, 0.4])
    assert columns["score_margin"] == pytest.approx([0.5, 0.1])
    assert columns["uncertainty_entropy"] == pytest.approx(entropy(p, axis=1))
    assert columns["score_logit"] == pytest.approx(5 + np.log([0.7, 0.4]))


def test_many_rows_have_the_scores_of_few() -> None:
    logits = np.random.default_rng(0).normal(size=(5_000, 4))
    many = logit_answers(logits).columns
    few = logit_answers(logits[4_990:]).columns
    for name in ("answer", "score_softmax", "score_margin", "uncertainty_entropy"):
        assert many[name][4_990:] == few[name]


def test_names_of_classes_that_are_numbers_are_names() -> None:
    digits = ["1", "2", "3"]
    made = logit_answers(np.eye(3), target=["1", "2", "1"], class_names=digits)
    assert made.columns["answer"] == digits
    assert made.columns["correct"] == [1, 1, 0]
    numbers = logit_answers(np.eye(3), target=["0", "1", "0"], class_names=digits)
    assert numbers.columns["correct"] == [1, 1, 0]


def test_large_logits_do_not_overflow() -> None:
    columns = logit_answers([[1e300, 0.0], [-1e300, -1e300]]).columns
    assert columns["score_softmax"] == [1.0, 0.5]
    assert columns["uncertainty_entropy"] == pytest.approx([0.0, np.log(2)])


def test_unknown_and_outside_targets() -> None:
    columns = logit_answers(np.eye(3), target=[0, -1, vilu.OUTSIDE]).columns
    assert columns["correct"] == [1, None, 0]


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "vector": ([1.0, 2.0], {}, "at least two classes"),
    "one class": ([[1.0]], {}, "at least two classes"),
    "texts": ([["a", "b"]], {}, "at least two classes"),
    "no rows": (np.zeros((0, 3)), {}, "at least one row"),
    "NaN": ([[0.0, 1.0], [np.nan, 0.0]], {}, r"Row 1 \(counted from 0\) has NaN"),
    "infinity": ([[0.0, -np.inf]], {}, "Row 0"),
    "other target": ([[0.0, 1.0]], {"target": [2]}, "Row 0 .* has 2"),
    "target of texts": ([[0.0, 1.0]], {"target": ["a"]}, "names of classes"),
    "short target": ([[0.0, 1.0]], {"target": [0, 1]}, "one whole number per row"),
    "short names": ([[0.0, 1.0]], {"class_names": ["a"]}, "class_names must have 2 entries"),
    "short ids": ([[0.0, 1.0]], {"ids": []}, "ids must have 1 entries"),
}


@pytest.mark.parametrize(("logits", "options", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_arrays_are_refused(logits: Any, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        logit_answers(logits, **options)

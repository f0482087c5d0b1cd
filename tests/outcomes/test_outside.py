"""Test the three questions about failures if some pictures are out of distribution.

The questions are: out of distribution, wrong within the classes, and either.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score, roc_curve

from vilu.errors import OUTSIDE, ProvenanceError
from vilu.outcomes.evaluate import compare, evaluate
from vilu.outcomes.outcomes import Outcomes
from vilu.outcomes.results import ResultTable

QUESTIONS = ("auroc", "fpr95", "auroc_within", "fpr95_within", "auroc_outside", "fpr95_outside")


def by_hand() -> Outcomes:
    """Return seven rows: three right, one wrong, two out of distribution, and one unknown."""
    return Outcomes(
        [0.1, 0.2, 0.3, 0.25, 0.4, 0.15, 0.2],
        [0, 0, 0, 1, 1, 1, -1],
        target=[0, 1, 0, 1, OUTSIDE, OUTSIDE, -1],
    )


def many(seed: int = 0, n: int = 900, digits: int = 1) -> Outcomes:
    """Return rows with tied scores. A fifth are outside, and a quarter of the others are wrong."""
    rng = np.random.default_rng(seed)
    outside = rng.random(n) < 0.2
    failure = (outside | (rng.random(n) < 0.25)).astype(int)
    uncertainty = np.round(rng.normal(size=n) + failure + 0.5 * outside, digits)
    return Outcomes(uncertainty, failure, outside=outside, method="mcm", dataset="pets")


def test_three_questions_by_hand() -> None:
    """Pairs in the right order: both (2 + 3 + 1) / 9, within 2 / 3, outside (4 + 1) / 8."""
    with pytest.warns(UserWarning, match="only 1 wrong answers within the classes; and 1 more"):
        table = evaluate(by_hand(), n_resamples=0)
    assert table.value("auroc") == pytest.approx(6 / 9)
    assert table.value("auroc_within") == pytest.approx(2 / 3)
    assert table.value("auroc_outside") == pytest.approx(5 / 8)
    row = table.rows[0]
    assert (row.n, row.n_failures, row.n_outside, row.n_unlabelled) == (6, 3, 2, 1)
    assert row.accuracy == 0.5
    assert str(table).startswith(
        "results: 6 answers, 3 wrong (16.7 % within the classes, 33.3 % of none of the classes), "
        "accuracy 50.0 %, "
        "1 unlabelled left out"
    )


def reference(uncertainty: NDArray[np.float64], positive: NDArray[np.int64]) -> tuple[float, float]:
    """Return scikit-learn's AUROC and FPR95.

    FPR95 counts accepted positive rows if 95 % of the others are accepted.
    """
    fpr, tpr, _ = roc_curve(1 - positive, -uncertainty, drop_intermediate=False)
    return roc_auc_score(positive, uncertainty), float(np.interp(0.95, tpr, fpr))


@pytest.mark.parametrize("digits", [1, 12])
def test_three_questions_against_scikit_learn(digits: int) -> None:
    outcomes = many(digits=digits)
    table = evaluate(outcomes, metrics=QUESTIONS, n_resamples=200)
    u, failure, outside = outcomes.uncertainty, outcomes.failure, outcomes.outside
    expected = {
        "": reference(u, failure),
        "_within": reference(u[~outside], failure[~outside]),
        "_outside": reference(u, outside.astype(int)),
    }
    for name, (area, rate) in expected.items():
        assert table.value(f"auroc{name}") == pytest.approx(area, abs=1e-12)
        assert table.value(f"fpr95{name}") == pytest.approx(rate, abs=1e-12)
    for row in table:
        assert row.ci_low < row.value < row.ci_high
        assert (
            row.ci_high - row.ci_low < 0.35
        )  # 180 pictures outside and 180 wrong answers: a standard error below 0.05
    assert (table.rows[0].n, table.rows[0].n_outside) == (900, outside.sum())


def test_intervals_are_those_of_the_rows_that_are_asked_about() -> None:
    outcomes = many()
    inside = outcomes.take(~outcomes.outside)
    within = evaluate(outcomes, metrics=["auroc_within"], n_resamples=100).rows[0]
    alone = evaluate(inside, metrics=["auroc"], n_resamples=100).rows[0]
    assert (within.value, within.ci_low, within.ci_high) == (
        alone.value,
        alone.ci_low,
        alone.ci_high,
    )


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([0, 1, 2, 4, 5], {"within": "none of 3 answers is wrong within the classes"}),
        (
            [3, 4, 5],
            {
                "within": "all of 1 answers are wrong within the classes",
                "": "all of 3 answers are wrong",
            },
        ),
        (
            [4, 5],
            {
                "within": "none of 0 answers is wrong within the classes",
                "": "all of 2 answers are wrong",
            },
        ),
        ([0, 1, 3], {"outside": "none of 3 answers is of none of the classes"}),
        ([4], {"outside": "all of 1 answers are of none of the classes"}),
    ],
)
def test_what_is_undefined_says_why(rows: list[int], why: dict[str, str]) -> None:
    with pytest.warns(UserWarning, match="intervals are wide"):
        table = evaluate(by_hand().take(rows), metrics=QUESTIONS, n_resamples=20)
    for question, reason in why.items():
        for metric in ("auroc", "fpr95"):
            (row,) = table.filter(metric="_".join(filter(None, (metric, question))))
            assert (row.value, row.ci_low, row.why) == (None, None, reason)


def test_nothing_changes_where_no_row_is_outside(tmp_path: Path) -> None:
    outcomes = many()
    plain = replace(outcomes, outside=np.zeros(900, dtype=bool))
    table = evaluate(plain, n_resamples=10)
    assert not {row.metric for row in table} & {name for name in QUESTIONS if "_" in name}
    for name in ("a.json", "a.csv", "a.parquet"):
        table.save(tmp_path / name)
        assert ResultTable.load(tmp_path / name) == table
    assert "n_outside" not in json.loads((tmp_path / "a.json").read_text())["rows"][0]
    assert "n_outside" not in (tmp_path / "a.csv").read_text()
    assert str(table).startswith(f"pets: 900 answers, {plain.failure.sum()} wrong, accuracy ")


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.parquet"])
def test_files_keep_how_many_are_outside(tmp_path: Path, name: str) -> None:
    table = evaluate(many(), n_resamples=10)
    table.save(tmp_path / name)
    assert ResultTable.load(tmp_path / name) == table
    assert table.rows[0].n_outside == many().outside.sum()


def test_two_methods_are_compared_on_each_question() -> None:
    a = many()
    b = replace(
        a, uncertainty=np.where(a.outside, a.uncertainty + 1, a.uncertainty), method="other"
    )
    within, outside = (
        compare(a, b, metric=name, n_resamples=100) for name in ("auroc_within", "auroc_outside")
    )
    n_outside = int(a.outside.sum())
    assert (within.difference, within.n, within.n_failures) == (
        0,
        900 - n_outside,
        a.failure.sum() - n_outside,
    )
    assert outside.value_a == pytest.approx(roc_auc_score(a.outside, a.uncertainty), abs=1e-12)
    assert outside.ci_high < 0
    assert f"(900 answers, {n_outside} of none of the classes)" in str(outside)
    with pytest.raises(ProvenanceError, match=f"{n_outside} marks of none of the classes differ"):
        compare(a, replace(b, outside=np.zeros(900, dtype=bool)))

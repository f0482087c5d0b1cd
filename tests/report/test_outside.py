"""Test out-of-distribution pictures in explanations, on the page and in label sets."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

import vilu
from tests.builders.page_data import outcomes_of
from tests.conftest import variant
from tests.contract.test_outside_rows import N_OUTSIDE, ood_rows
from vilu.calibration.label_sets import fit_label_sets
from vilu.embeddings.memory import Embeddings
from vilu.errors import OUTSIDE, DataError
from vilu.outcomes.outcomes import Outcomes
from vilu.report.page.charts import histogram


def risky() -> Outcomes:
    """Return ten answers, five of them wrong.

    Two wrong answers are for out-of-distribution pictures. Eight answers are accepted.
    """
    return Outcomes(
        [0.1, 0.2, 0.3, 0.3, 0.4, 0.5, 0.6, 0.7, 0.7, 0.9],
        [0, 1, 0, 1, 0, 0, 0, 1, 1, 1],
        prediction=[0, 0, 1, 0, 1, 2, 2, 0, 1, 2],
        target=[0, OUTSIDE, 1, 1, 1, 2, 2, 2, OUTSIDE, -1],
        class_names=("cat", "dog", "car"),
    )


def test_confusions_with_no_class_by_hand() -> None:
    """Seven rows are below 0.7 and eight are kept, so each of the two tied ones counts half."""
    found = vilu.risk_map(risky())
    rows = {(row.answer, row.instead): (row.failures, row.accepted, row.risk) for row in found.rows}
    assert rows == {
        ("cat", "none of the classes"): (1, 1, pytest.approx(1 / 8)),
        ("cat", "dog"): (1, 1, pytest.approx(1 / 8)),
        ("cat", "car"): (1, 0.5, pytest.approx(1 / 16)),
        ("dog", "none of the classes"): (1, 0.5, pytest.approx(1 / 16)),
        ("car", "not known"): (1, 0, 0),
    }
    assert re.search(r"^cat +none of the classes", str(found), re.MULTILINE)


def test_an_explanation_says_that_there_is_no_right_answer(
    train: Embeddings, test: Embeddings
) -> None:
    data, known = ood_rows(test, 3), ood_rows(train, 1)
    found = vilu.explain(vilu.MCM(), data, known, rows=[len(test), 0])
    ood_row, other = found.rows
    assert (ood_row.truth, ood_row.wrong) == ("none of the classes", True)
    assert "truth none of the classes  WRONG" in str(found)
    assert (other.truth, other.wrong) == (
        f"class {int(test.target[0])}",
        bool(vilu.score(vilu.MCM(), test).failure[0]),
    )
    assert {row.truth for row in ood_row.failures} == {"none of the classes"}
    assert all(row.key.startswith("ood-1-") for row in ood_row.failures)
    assert "none of the classes" not in {row.truth for row in ood_row.successes}


def test_better_texts_are_of_the_classes_alone(test: Embeddings) -> None:
    assert vilu.prompt_gains(ood_rows(test, 3)) == vilu.prompt_gains(test)


def with_ood(**fields: object) -> Outcomes:
    """Return outcomes where some wrong answers are for out-of-distribution pictures.

    These are the wrong answers in every fourth row. Their uncertainty is 0.1 higher.
    """
    plain = outcomes_of(**fields)
    outside = (plain.failure == 1) & (np.arange(len(plain)) % 4 == 0)
    uncertainty = np.where(outside, np.clip(plain.uncertainty + 0.1, 0, 1), plain.uncertainty)
    return replace(plain, uncertainty=uncertainty, target=np.where(outside, OUTSIDE, plain.target))


def test_the_page_says_both_shares_and_answers_three_questions() -> None:
    one = with_ood()
    page = vilu.report_page([one])
    n, n_outside, n_wrong = len(one), int(one.outside.sum()), int(one.failure.sum())
    within, outside = (f"{100 * k / n:.1f}" for k in (n_wrong - n_outside, n_outside))
    sentence = (
        f"are wrong: {within}&nbsp;% within the classes, "
        f"{outside}&nbsp;% because the picture is of none"
    )
    assert sentence in page
    assert "Wrong within the classes, and pictures of none of the classes" in page
    shown = f"{100 * roc_auc_score(one.outside, one.uncertainty):.1f}"
    assert re.search(rf"<td>\s*{shown}<span", page)
    assert "it is <bdi>none of the classes</bdi>" in re.sub(r"\s+", " ", page).replace(
        "is <bdi>", "is <bdi>"
    )
    assert "<bdi>dog</bdi>" in page


def test_the_page_of_pictures_of_the_classes_says_nothing_of_others() -> None:
    page = vilu.report_page([outcomes_of()])
    body = page[page.index("<body>") :]
    assert "none of the classes" not in body
    assert "outside" not in body


def test_three_kinds_of_uncertainty_each_in_shares_of_their_kind() -> None:
    one = with_ood()
    lines = {line.label: line for line in histogram(one, None, 0).lines}
    assert list(lines) == ["right answers", "wrong within the classes", "of none of the classes"]
    kinds = one.failure == 0, (one.failure == 1) & ~one.outside, one.outside
    for line, kind in zip(lines.values(), kinds, strict=True):
        expected = np.histogram(one.uncertainty[kind], np.linspace(0, 1, 31))[0] / kind.sum()
        np.testing.assert_allclose(line.y[::2], expected, atol=1e-15)


@pytest.mark.parametrize("method", ["lac", "aps"])
def test_label_sets_guarantee_something_of_the_classes_only(method: str, test: Embeddings) -> None:
    with pytest.warns(
        UserWarning, match=f"leave out {N_OUTSIDE} of 660 calibration rows, which are of none"
    ):
        found = fit_label_sets(vilu.MCM(), ood_rows(test, 3), max_miss=0.1, method=method)
    assert found == fit_label_sets(vilu.MCM(), test, max_miss=0.1, method=method)


def test_there_are_no_sets_of_nothing_but_ood(test: Embeddings) -> None:
    nothing = variant(test, target=np.full(len(test), OUTSIDE))
    with (
        pytest.warns(UserWarning, match="leave out 600 of 600"),
        pytest.raises(DataError, match="none of the 600"),
    ):
        fit_label_sets(vilu.MCM(), nothing, max_miss=0.1, method="lac")

"""Test the forecast for a folder against hand-worked numbers and simulated labels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from vilu.triage.closed_folder import FolderSplit
from vilu.triage.forecast import LABEL_BUDGETS, Forecast, is_enough_to_fit
from vilu.triage.guarantee import PhotoSplit
from vilu.triage.outputs import why_nothing_is_asked
from vilu.triage.run import TriageResult
from vilu.triage.state import TriageSettings
from vilu.triage.trial import Trial


def forecast(
    uncertainty: np.ndarray,
    *,
    split: type[PhotoSplit] = PhotoSplit,
    share_accepted: float = 0.0,
    **changes: int,
) -> Forecast:
    facts = {"n_photos": 2 * len(uncertainty), "n_classes": 10, "n_fit_labels": 50, "n_labels": 50}
    facts["most_fit_labels"] = len(uncertainty)
    facts |= changes
    return Forecast.of(
        uncertainty,
        max_risk=0.05,
        level=0.025,
        make_tests=split.tests_before_labels,
        share_accepted=share_accepted,
        **facts,
    )


def test_sure_answers_can_be_accepted_and_doubtful_ones_cannot() -> None:
    sure = forecast(np.full(1_000, 1e-4))
    doubtful = forecast(np.full(1_000, 0.4))
    assert sure.expected[-1].lowest == pytest.approx(1.0)
    assert sure.least_risk is not None
    assert sure.least_risk <= 0.05
    assert not doubtful.can_accept_photos
    assert doubtful.least_risk is None
    assert "probably nothing can be accepted" in str(doubtful)


def test_what_is_accepted_already_can_be_accepted() -> None:
    doubtful = forecast(np.full(1_000, 0.4), share_accepted=0.25)
    ranges = [(one.lowest, one.highest) for one in doubtful.expected]
    assert ranges == [(0.25, 0.25)] * len(LABEL_BUDGETS)
    assert "about 25 / 25 / 25 % of the photos could be accepted" in str(doubtful)
    assert "--max-risk" not in str(doubtful)


def test_as_many_labels_as_fit_first_show_nothing() -> None:
    expected = {one.n_labels: one for one in forecast(np.full(1_000, 1e-4)).expected}
    assert list(expected) == list(LABEL_BUDGETS)
    # If 50 labels are used to fit, 50 remain. These are fewer than the 80 that certify 5 % without
    # an error.
    assert expected[100].highest == 0
    assert expected[200].lowest == pytest.approx(1.0)


def test_a_guarantee_about_the_folder_is_forecast_by_its_own_test() -> None:
    # 200 labels are enough to label all 150 photos that may be drawn. These labels show 5 % for
    # new photos. A guarantee about the folder would then have no photo left.
    sure = np.full(150, 1e-6)
    for_new = forecast(sure, n_labels=0)
    for_folder = forecast(sure, split=FolderSplit, n_labels=0)
    assert for_new.expected[-1].lowest == pytest.approx(1.0)
    assert not for_folder.can_accept_photos
    assert for_folder.least_risk is not None
    assert for_folder.least_risk > 0.05
    many = forecast(np.full(1_000, 1e-6), split=FolderSplit, n_labels=0)
    assert many.expected[-1].lowest == pytest.approx(1.0)


def test_a_folder_shows_its_least_risk_before_all_photos_are_labelled() -> None:
    # 400 labels are more than the 240 photos that may be drawn. The first 150 of them show 5 % for
    # the other 90. Once all photos have a label, no photo is left to guarantee.
    small = forecast(np.full(240, 1e-6), split=FolderSplit, n_labels=0)
    assert small.can_accept_photos
    assert small.least_risk is not None
    assert small.least_risk <= 0.05


def test_no_more_labels_are_named_than_there_are_photos() -> None:
    assert [one.n_labels for one in forecast(np.full(130, 1e-4)).expected] == [100, 200]


def test_labels_beyond_all_budgets_are_named_on_top() -> None:
    further = forecast(np.full(1_000, 1e-4), n_labels=500).expected
    assert [one.n_labels for one in further] == [600, 700, 900]


def test_a_forecast_is_at_least_one_round_ahead() -> None:
    further = forecast(np.full(1_000, 1e-4), n_labels=193).expected
    assert [one.n_labels for one in further] == [400]


@pytest.mark.parametrize(
    ("n_labels", "budgets"), [(150, [200]), (160, [260]), (210, [260]), (255, [])]
)
def test_a_small_folder_has_a_forecast_until_a_round_labels_it_all(
    n_labels: int, budgets: list[int]
) -> None:
    made = forecast(np.full(150, 1e-4), n_labels=n_labels)
    assert [expected.n_labels for expected in made.expected] == budgets


def test_another_risk_is_named_if_it_can_be_shown() -> None:
    text = str(forecast(np.full(1_000, 0.06)))
    assert "give --max-risk 0." in text


def test_a_run_that_asks_for_nothing_names_the_next_command() -> None:
    doubtful = forecast(np.full(1_000, 0.06))
    assert doubtful.least_risk is not None
    settings = cast("TriageSettings", SimpleNamespace(n_next=50))
    fitted = SimpleNamespace(needs_labels=True)

    def result(made: Forecast) -> TriageResult:
        facts = SimpleNamespace(rule=None, predictor=fitted, forecast=made)
        return cast("TriageResult", facts)

    text = why_nothing_is_asked(result(doubtful), settings)
    assert f"Run the same command with --max-risk {doubtful.least_risk}" in text
    hopeless = forecast(np.full(1_000, 0.4))
    text = why_nothing_is_asked(result(hopeless), settings)
    assert "with a larger --max-risk, or add photos" in text


@pytest.mark.parametrize(
    ("share", "n_labels", "n_classes", "expected"),
    [
        (0.5, 49, 2, False),
        (0.5, 50, 2, True),
        (0.5, 70, 80, False),
        (0.5, 100, 500, True),
        (0.1, 199, 2, False),
        (0.1, 200, 2, True),
    ],
)
def test_when_there_are_enough_labels_to_fit_on(
    share: float, n_labels: int, n_classes: int, expected: bool
) -> None:
    trial = Trial(n_fit=n_labels, grid=(0.1,), limit=0.1, likely=True, share=share)
    assert is_enough_to_fit(trial, n_labels, n_classes) is expected

"""Test when a predictor is fitted again, and which labels are then requested."""

from __future__ import annotations

import pytest

from vilu.triage.fitting import (
    METHOD_WITH_LABELS,
    METHOD_WITHOUT_LABELS,
    FitCase,
    fit_case,
    is_worth_testing,
)
from vilu.triage.run import n_to_draw
from vilu.triage.state import TriageState
from vilu.triage.trial import Trial


def trial(n_fit: int, *, likely: bool = True, level: float = 0.02) -> Trial:
    return Trial(n_fit=n_fit, grid=(0.1, 0.2), limit=0.2, likely=likely, share=0.5, level=level)


NEW = TriageState(settings={})
WITHOUT_LABELS = TriageState(settings={}, method=METHOD_WITHOUT_LABELS)
FITTED = TriageState(settings={}, method=METHOD_WITH_LABELS, trial=trial(40))
"""A predictor that was fitted on 40 labels."""

TRIED = FITTED.model_copy(update={"n_fit_of_last_candidate": 80})
"""Since then, a candidate was fitted on 80 labels and was not tested."""

TESTED = FITTED.model_copy(update={"candidate": trial(80)})
"""A candidate that was fitted on 80 labels is being tested."""

GO_ON = FitCase.UP_TO_DATE
REPLACE = FitCase.NO_GUARANTEE
COMPARE = FitCase.CANDIDATE


@pytest.mark.parametrize(
    ("state", "n_labels", "is_guaranteed", "expected"),
    [
        (NEW, 40, False, REPLACE),
        (WITHOUT_LABELS, 10, False, REPLACE),
        # without a guarantee, a predictor is fitted again once it has half as many labels again
        (FITTED, 40, False, GO_ON),
        (FITTED, 59, False, GO_ON),
        (FITTED, 60, False, REPLACE),
        # with a guarantee, a candidate is fitted once there are a quarter more labels
        (FITTED, 49, True, GO_ON),
        (FITTED, 50, True, COMPARE),
        # the next candidate needs a quarter more labels than the last candidate had
        (TRIED, 99, True, GO_ON),
        (TRIED, 100, True, COMPARE),
        # the labels for a tested candidate are in use, so the next one needs half as many again
        (TESTED, 119, True, GO_ON),
        (TESTED, 120, True, COMPARE),
        # the guarantee was withdrawn meanwhile
        (TESTED, 119, False, GO_ON),
        (TESTED, 120, False, REPLACE),
        (TRIED, 60, False, REPLACE),
    ],
)
def test_cases_of_a_predictor_that_learns_from_labels(
    state: TriageState, n_labels: int, is_guaranteed: bool, expected: FitCase
) -> None:
    case = fit_case(
        state,
        method=METHOD_WITH_LABELS,
        n_labels=n_labels,
        is_saved=True,
        is_guaranteed=is_guaranteed,
        has_calibration_photos=True,
    )
    assert case is expected


@pytest.mark.parametrize("n_labels", [0, 9])
@pytest.mark.parametrize(
    ("state", "is_saved", "expected"),
    [(NEW, False, REPLACE), (WITHOUT_LABELS, True, GO_ON), (WITHOUT_LABELS, False, REPLACE)],
)
def test_cases_of_a_predictor_without_labels(
    state: TriageState, is_saved: bool, expected: FitCase, n_labels: int
) -> None:
    case = fit_case(
        state,
        method=METHOD_WITHOUT_LABELS,
        n_labels=n_labels,
        is_saved=is_saved,
        is_guaranteed=False,
        has_calibration_photos=True,
    )
    assert case is expected


@pytest.mark.parametrize(
    ("n_labels", "is_guaranteed", "expected"),
    [
        (40, True, GO_ON),
        (90, True, FitCase.NOTHING_TO_COMPARE),
        (90, False, REPLACE),
    ],
)
def test_a_guaranteed_predictor_stays_without_calibration_photos(
    n_labels: int, is_guaranteed: bool, expected: FitCase
) -> None:
    case = fit_case(
        FITTED,
        method=METHOD_WITH_LABELS,
        n_labels=n_labels,
        is_saved=True,
        is_guaranteed=is_guaranteed,
        has_calibration_photos=False,
    )
    assert case is expected
    assert case.keeps_predictor is (expected is not REPLACE)


def test_a_predictor_that_is_gone_is_fitted_anew() -> None:
    case = fit_case(
        FITTED,
        method=METHOD_WITH_LABELS,
        n_labels=40,
        is_saved=False,
        is_guaranteed=False,
        has_calibration_photos=True,
    )
    assert case is REPLACE


@pytest.mark.parametrize(
    ("likely", "n_labels", "expected"),
    [(True, 50, True), (False, 50, False), (False, 119, False), (False, 120, True)],
)
def test_a_candidate_without_hope_is_tested_with_far_more_labels_only(
    likely: bool, n_labels: int, expected: bool
) -> None:
    assert is_worth_testing(trial(n_labels, likely=likely), FITTED, n_labels) is expected


def test_a_predictor_that_was_not_tested_is_fitted_anew_earlier() -> None:
    untested = FITTED.model_copy(update={"trial": trial(40, level=0.0)})
    cases = {}
    for n_labels in (49, 50):
        cases[n_labels] = fit_case(
            untested,
            method=METHOD_WITH_LABELS,
            n_labels=n_labels,
            is_saved=True,
            is_guaranteed=False,
            has_calibration_photos=True,
        )
    assert cases == {49: GO_ON, 50: REPLACE}


@pytest.mark.parametrize(
    ("state", "is_guaranteed", "is_ready_to_draw", "can_be_certified", "expected"),
    [
        (FITTED, False, True, True, 30),
        (FITTED, False, False, True, 0),
        (FITTED, False, True, False, 0),
        (FITTED, True, False, True, 10),
        (TESTED, True, False, True, 30),
        (TESTED, True, True, False, 0),
    ],
)
def test_how_many_of_the_next_labels_are_for_the_guarantee(
    state: TriageState,
    is_guaranteed: bool,
    is_ready_to_draw: bool,
    can_be_certified: bool,
    expected: int,
) -> None:
    n = n_to_draw(
        state,
        30,
        is_guaranteed=is_guaranteed,
        is_ready_to_draw=is_ready_to_draw,
        can_be_certified=can_be_certified,
    )
    assert n == expected

"""Test the plan for testing a predictor: the photos in it, and photos without a score."""

from __future__ import annotations

import numpy as np
import pytest

from vilu.calibration.anytime import N_THRESHOLDS_UP_TO_LIMIT
from vilu.errors import DataError
from vilu.triage.trial import Trial, require_scores

SCORES = np.linspace(0.001, 0.4, 1_000)


def planned() -> Trial:
    return Trial.plan(n_fit=50, scores=SCORES, n_answered=0, max_risk=0.05, delta=0.025)


def test_a_limit_that_moves_up_includes_a_larger_share() -> None:
    trial = planned()
    further = trial.with_raised_limit(8, SCORES)
    assert further.limit == trial.grid[N_THRESHOLDS_UP_TO_LIMIT - 1 + 8]
    assert further.share == (further.limit >= SCORES).mean()
    assert further.share > trial.share
    assert further.model_copy(update={"limit": trial.limit, "share": trial.share}) == trial


@pytest.mark.parametrize(("max_risk", "least"), [(0.05, 95), (0.1, 46), (0.2, 22)])
def test_a_small_folder_may_leave_its_doubtful_photos_out(max_risk: float, least: int) -> None:
    # ``least`` right answers certify the risk at the level for a limit, 0.7 x 0.025.
    doubtful = np.linspace(0.6, 0.9, 40)

    def planned_for(n_sure: int) -> tuple[bool, int]:
        scores = np.concatenate([np.full(n_sure, 1e-4), doubtful])
        trial = Trial.plan(n_fit=50, scores=scores, n_answered=0, max_risk=max_risk, delta=0.025)
        return trial.likely, int((scores <= trial.limit).sum())

    is_likely, n_included = planned_for(least + 4)
    assert is_likely
    assert least + 4 <= n_included <= least + 6  # one or two may be wrong
    # Fewer photos could certify nothing, so doubtful ones are included.
    assert planned_for(least - 10) == (False, least)


def test_no_limit_lies_beyond_the_last_threshold() -> None:
    trial = planned().with_raised_limit(10_000, SCORES)
    assert trial.limit == trial.grid[-1]
    assert trial.share == 1


def test_photos_without_a_score_are_refused_by_name() -> None:
    scores = np.array([0.1, np.nan, 0.3, np.nan])
    names = ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
    require_scores(scores, np.array([0, 2]), names)
    with pytest.raises(DataError, match=r"1 photo of 2 .*'b\.jpg'") as refused:
        require_scores(scores, np.array([0, 1]), names)
    assert "d.jpg" not in str(refused.value)

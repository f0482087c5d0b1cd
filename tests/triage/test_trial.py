"""The plan of a predictor's test: the photos it includes, and photos without a score."""

from __future__ import annotations

import numpy as np
import pytest

from vilu.calibration.anytime import STEPS
from vilu.errors import DataError
from vilu.triage.trial import Trial, require_scores

SCORES = np.linspace(0.001, 0.4, 1_000)


def planned() -> Trial:
    return Trial.plan(n_fit=50, scores=SCORES, n_answered=0, max_risk=0.05, delta=0.025)


def test_a_limit_that_moves_up_includes_a_larger_share() -> None:
    trial = planned()
    further = trial.further(8, SCORES)
    assert further.limit == trial.grid[STEPS - 1 + 8]
    assert further.share == (further.limit >= SCORES).mean()
    assert further.share > trial.share
    assert further.model_copy(update={"limit": trial.limit, "share": trial.share}) == trial


def test_no_limit_lies_beyond_the_last_threshold() -> None:
    trial = planned().further(10_000, SCORES)
    assert trial.limit == trial.grid[-1]
    assert trial.share == 1


def test_photos_without_a_score_are_refused_by_name() -> None:
    scores = np.array([0.1, np.nan, 0.3, np.nan])
    names = ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
    require_scores(scores, np.array([0, 2]), names)
    with pytest.raises(DataError, match=r"1 photo of 2 .*'b\.jpg'") as refused:
        require_scores(scores, np.array([0, 1]), names)
    assert "d.jpg" not in str(refused.value)

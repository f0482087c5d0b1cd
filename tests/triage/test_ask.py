"""Test by simulation that a guarantee of every class holds.

Labels are requested for classes that lack labels, and the guarantees are tested in every round.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from vilu.calibration.rules import group_names, rows_of_groups
from vilu.outcomes.outcomes import Outcomes
from vilu.triage.ask import StoreDraws
from vilu.triage.guarantee import N_POSITIONS, PhotoSplit
from vilu.triage.labels import LabelBook
from vilu.triage.trial import Trial

RISK, DELTA, ROWS, RATE = 0.1, 0.05, 900, {"kept": 0.02, "broken": 0.11}


def store_draws(rng: np.random.Generator) -> StoreDraws:
    """Return draws for two classes, where one class has too many errors at any uncertainty."""
    said = rng.integers(2, size=ROWS)
    wrong = (rng.random(ROWS) < np.array([*RATE.values()])[said]).astype(np.int64)
    outcomes = Outcomes(
        0.05 * rng.random(ROWS),
        wrong,
        prediction=said,
        class_names=tuple(RATE),
        is_probability=True,
    )
    none, every = np.zeros(ROWS, np.bool_), np.ones(ROWS, np.bool_)
    position = rng.permutation(ROWS) * (N_POSITIONS // ROWS)
    labels = {
        name: none.copy()
        for name in (
            "is_labelled",
            "is_answered",
            "is_skipped",
            "has_given_label",
            "has_open_request",
        )
    }
    split = PhotoSplit(is_usable=every, is_calibration=every, random_position=position, **labels)
    groups = rows_of_groups(group_names(outcomes), ROWS, DELTA, lambda _: 1)
    draws = {}
    for name, rows in groups.items():
        draws[name] = (
            rows,
            Trial.plan(0, outcomes.uncertainty[rows], 0, RISK, DELTA / len(groups)),
        )
    photos = cast("Any", SimpleNamespace(ids=[str(row) for row in range(ROWS)]))
    return StoreDraws("p", photos, LabelBook(), outcomes, split, draws)


@pytest.mark.slow
def test_no_class_gets_a_guarantee_that_does_not_hold() -> None:
    rng, broken, kept, calibrations = np.random.default_rng(11), 0, 0, 2_000
    for _ in range(calibrations):
        at, found = store_draws(rng), set[str]()
        for _ in range(6):
            for rows in at.next_calibration_rows(40, at.split.is_answered, RISK):
                keys = [str(row) for row in rows]
                at.book.request_labels(keys, "calibration", predictor="p")
                at.book.note_labels(dict.fromkeys(keys, "any"))
                at.split.is_labelled[rows] = at.split.is_answered[rows] = (
                    True  # the draws share these arrays
                )
            standings = at.progress(RISK, DELTA)
            assert not any(len(one.missing_rows) for one in standings.values())
            found |= {name for name, one in standings.items() if one.certified_index is not None}
        broken, kept = broken + ("broken" in found), kept + ("kept" in found)
    level = DELTA / 2
    assert broken / calibrations <= level + 3 * math.sqrt(level * (1 - level) / calibrations)
    assert kept > calibrations / 2

"""Test guarantees on real scores.

Each of 200 random splits has calibration rows and other rows, as in ``benchmarks.guarantees``.

``tests/data/clothing_scores.npz`` holds scores from three methods for the demo's 1,135 test photos.
``cifar_shift_scores.npz`` holds ViLU's scores for CIFAR-10's test images (see
``tests/calibration/test_monitor_replay.py``). All rows in a file stand for the population that the
guarantee is about.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from benchmarks.guarantees import SPLITS, replay

DATA = Path(__file__).resolve().parents[1] / "data"
CLOTHING = [("clothing_scores", name, "failure") for name in ("vilu_plus", "vilu", "mcm")]
CIFAR = ("cifar_shift_scores", "clean_uncertainty", "clean_failure")


@pytest.mark.parametrize(
    ("scores", "n"), [*((one, 567) for one in CLOTHING), (CIFAR, 1000), (CIFAR, 5000)]
)
def test_the_risk_holds_in_at_least_95_of_100_splits(scores: tuple[str, str, str], n: int) -> None:
    file, uncertainty, failure = scores
    with np.load(DATA / f"{file}.npz") as data:
        u, f = data[uncertainty].astype(np.float64), data[failure].astype(np.int64)
    found = replay(u, f, "ltt", 0.05, n)
    assert SPLITS == 200
    assert found["broken"] <= 0.05
    if uncertainty == "vilu_plus":
        # The rule must accept something. In hindsight the best threshold accepts 47 %.
        assert found["coverage"] > 0.35
    if uncertainty == "mcm":
        # MCM's most trusted answers are too often wrong to show anything.
        assert found["nothing"] == 1

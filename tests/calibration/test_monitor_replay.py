"""Test the monitor in replays of real scores.

The scores are from ViLU on CIFAR-10's test images. A fifth of the images is also there corrupted
(severity 3). ``tests/data/cifar_shift_scores.npz`` holds uncertainty, failure and answer, and the
clean row for each corrupted row. ViLU was fitted on the training images, with a small offline
backbone. ``python -m benchmarks.monitor_replay`` made the measurement in docs/monitor.md from such
scores.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from benchmarks.monitor_replay import LIMIT, replay, report

import vilu

DATA = Path(__file__).resolve().parents[1] / "data" / "cifar_shift_scores.npz"
REPLAYS = 25


@pytest.fixture(scope="module")
def scores() -> tuple[vilu.Outcomes, vilu.Outcomes]:
    """Return clean and shifted rows, under the same keys."""
    with np.load(DATA) as data:
        keys = {"clean": range(len(data["clean_failure"])), "shifted": data["shifted_row"].tolist()}
        clean, shifted = (
            vilu.Outcomes(
                data[f"{name}_uncertainty"],
                data[f"{name}_failure"],
                prediction=data[f"{name}_prediction"],
                class_names=[str(i) for i in range(10)],
                ids=[str(key) for key in rows],
            )
            for name, rows in keys.items()
        )
    return clean, shifted


def test_a_corruption_that_sets_in_is_seen_within_500_images(
    scores: tuple[vilu.Outcomes, vilu.Outcomes], capsys: pytest.CaptureFixture[str]
) -> None:
    """In all 25 replays, the corruption must raise an alarm within 500 images.

    Among 25 replays without corruption, at most 5 % plus three standard deviations may raise an
    alarm.
    """
    clean, shifted = scores
    alarms = [replay(clean, [shifted], seed) for seed in range(REPLAYS)]
    undisturbed, disturbed = (
        report(str(which), [both[which] for both in alarms]) for which in (0, 1)
    )
    assert undisturbed["ever"] <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / REPLAYS)
    assert disturbed["within"] == 1
    delays = [both[1]["scores"] for both in alarms]
    assert all(delay is not None and delay < LIMIT for delay in delays)
    assert f"within {LIMIT} rows 100.0%" in capsys.readouterr().out


def test_the_guarantee_is_broken_by_the_corruption(
    scores: tuple[vilu.Outcomes, vilu.Outcomes],
) -> None:
    """Clean rows must keep a guarantee at 20 %, corrupted rows must break it, and labels must show
    this.

    So the alarm on corrupted rows is justified.
    """
    clean, shifted = scores
    rng = np.random.default_rng(0)
    order = np.setdiff1d(
        rng.permutation(len(clean)), [int(key) for key in shifted.ids or ()], assume_unique=True
    )

    def rows(outcomes: vilu.Outcomes, chosen: np.ndarray) -> vilu.Outcomes:
        return vilu.Outcomes(outcomes.uncertainty[chosen], outcomes.failure[chosen])

    calibration = rows(clean, order[:4000])
    rule = vilu.certify(calibration, max_risk=0.2)
    calm, hard = vilu.Monitor(calibration, rule), vilu.Monitor(calibration, rule)
    kept = calm.update(rows(clean, order[4000:]))
    assert kept.audit is not None
    assert kept.audit.verdict != "broken"
    broken = hard.update(rows(shifted, rng.permutation(len(shifted))))
    assert broken.verdict == "broken"
    assert broken.audit is not None
    assert broken.audit.lower > 0.2

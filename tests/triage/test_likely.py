"""Test which answers a triage calls likely right among photos without a label."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.builders.photo_folders import write_photos
from tests.builders.store_fakes import FakeBackbone
from tests.triage.conftest import Folder, fill_in, job_on, rows
from vilu.artifacts.documents import read_document
from vilu.calibration.calibration import Calibration
from vilu.calibration.likely import LikelyRight
from vilu.guard.guard import Guard
from vilu.triage.outputs import TriageSummary, likely_in_words, triage_photos
from vilu.triage.state import STATE_FILE, TriageState


@pytest.fixture(scope="module")
def zero_shot(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TriageSummary]:
    """Run a triage with 200 photos and 60 labels. A third of the zero-shot answers are wrong.

    Return its home and its summary.
    """
    home = tmp_path_factory.mktemp("likely")
    truth = write_photos(home / "photos", 200)
    job = replace(job_on(home / "photos"), answer="zero_shot")
    triage_photos(job, home / "out")
    labels = fill_in(home / "out", truth, home / "labels.csv")
    return home, triage_photos(job, home / "out", [labels])


def test_counts_are_of_photos_without_a_label(zero_shot: tuple[Path, TriageSummary]) -> None:
    home, summary = zero_shot
    decided = rows(home / "out" / "decisions.csv")
    n_labelled = sum(row["decision"] == "labelled" for row in decided)
    assert n_labelled == 60
    assert summary.counts == (
        "200 photos: accepted 0 of 140 without a label, 140 to review; 60 have a label"
    )
    page = (home / "out" / "report.html").read_text(encoding="utf-8")
    assert "of 140 photos without a label" in page
    assert "of 200 photos; " in page


def test_likely_is_a_field_of_its_own(zero_shot: tuple[Path, TriageSummary]) -> None:
    home, summary = zero_shot
    decided = rows(home / "out" / "decisions.csv")
    assert {row["likely"] for row in decided if row["decision"] == "labelled"} == {""}
    unlabelled = [row for row in decided if row["decision"] != "labelled"]
    assert {row["likely"] for row in unlabelled} == {"true", "false"}
    assert {row["decision"] for row in unlabelled} == {"review"}
    n_likely = sum(row["likely"] == "true" for row in unlabelled)
    assert summary.likely.startswith(f"{n_likely} of 140 photos without a label are likely right.")
    assert "This is an estimate, not a guarantee" in summary.likely
    page = (home / "out" / "report.html").read_text(encoding="utf-8")
    assert summary.likely in page
    assert "likely right, an estimate" in page
    # the most trusted ones are likely right, up to one threshold
    by_trust = sorted(unlabelled, key=lambda row: float(row["failure_probability"]))
    assert [row["likely"] for row in by_trust] == ["true"] * n_likely + ["false"] * (140 - n_likely)


def test_a_guard_marks_new_photos(
    zero_shot: tuple[Path, TriageSummary], fake_model: FakeBackbone
) -> None:
    home, _ = zero_shot
    folder = home / "out" / "predictor"
    saved = LikelyRight.find(folder)
    assert saved is not None
    assert saved.threshold is not None
    guard = Guard(folder, backbone=fake_model, workers=1)
    answers = guard([*sorted((home / "photos").rglob("*.png"))[:40], b"no image"])
    expected = [answer.uncertainty <= saved.threshold for answer in answers[:-1]]
    assert [answer.likely for answer in answers] == [*expected, None]
    assert any(expected)


def test_without_labels_it_says_why(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", 30)
    summary = triage_photos(job_on(tmp_path / "photos"), tmp_path / "out")
    assert summary.likely == (
        "Which answers are likely right cannot be estimated yet: the predictor was not fitted on "
        "labels."
    )
    assert {row["likely"] for row in rows(tmp_path / "out" / "decisions.csv")} == {""}


def test_with_few_wrong_answers_it_says_why() -> None:
    few = LikelyRight(max_risk=0.05, widening=1.0, n=60, n_wrong=3)
    assert likely_in_words(few, {}) == (
        "Which answers are likely right cannot be estimated yet: 3 of 60 cross-fitted labels show "
        "a wrong answer, and 5 wrong ones are needed."
    )


def test_labels_of_the_draw_count_for_the_estimate(begun: Folder) -> None:
    home, _ = begun
    before_the_draw = LikelyRight.find(home / "half" / "predictor")
    after_it = LikelyRight.find(home / "out" / "predictor")
    assert before_the_draw is not None
    assert after_it is not None
    assert before_the_draw.n_drawn == 0
    assert after_it.n_drawn > 0
    assert after_it.failure == before_the_draw.failure  # no drawn label was fitted on
    page = (home / "out" / "report.html").read_text(encoding="utf-8")
    assert f"and {after_it.n_drawn_wrong} of {after_it.n_drawn} drawn ones" in page


@pytest.mark.slow
def test_labels_of_the_guarantee_count_after_the_limit_was_raised(tmp_path: Path) -> None:
    """In the third run a guarantee is shown, and the limit of the draw is raised."""
    job = replace(job_on(tmp_path / "photos"), answer="zero_shot", max_risk=0.2)
    truth, output = write_photos(job.photos, 250), tmp_path / "out"
    triage_photos(job, output)
    for _ in range(2):
        triage_photos(job, output, [fill_in(output, truth, tmp_path / "labels.csv")])
    rule = Calibration.load(output / "predictor").rule
    state = read_document(output / STATE_FILE, TriageState)
    likely_right = LikelyRight.find(output / "predictor")
    assert rule is not None
    assert state.trial is not None
    assert likely_right is not None
    assert rule.threshold is not None
    assert state.trial.limit > rule.threshold
    assert likely_right.n_drawn >= rule.n_accepted

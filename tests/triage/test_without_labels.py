"""Test that a triage without labels ranks the answers and states no unchecked probability."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.builders.photo_folders import photo
from tests.triage.conftest import Folder, fill_in, rows
from vilu.guard.guard import Guard
from vilu.outcomes.outcomes import Outcomes
from vilu.triage.outputs import triage_photos
from vilu.triage.review import open_review
from vilu.triage.serve import ReviewSession
from vilu.triage.state import TriageSettings


@pytest.fixture
def output(job: TriageSettings, tmp_path: Path) -> Path:
    triage_photos(job, tmp_path / "out")
    return tmp_path / "out"


def test_tables_and_page_rank_and_state_no_probability(output: Path) -> None:
    decided = rows(output / "decisions.csv")
    scores = Outcomes.load(output / "decisions.parquet")
    assert {row["failure_probability"] for row in decided} == {""}
    assert {row["failure_probability"] for row in rows(output / "next_labels.csv")} == {""}
    quantiles = np.array([float(row["quantile"]) for row in decided])
    assert quantiles.max() == 1
    uncertainty = dict(zip(scores.ids or (), scores.uncertainty.tolist(), strict=True))
    expected = [uncertainty[row["path"]] for row in decided]
    assert np.array_equal(np.argsort(quantiles, kind="stable"), np.argsort(expected, kind="stable"))
    assert not scores.is_probability
    page = (output / "report.html").read_text()
    assert "likely wrong" not in page
    assert "expected errors" not in page
    assert "of the photos that are at most as doubtful" in page
    assert "at least as doubtful as 100.0&nbsp;% of the photos" in page


def test_a_guard_places_a_new_photo_among_those_of_the_fit(
    output: Path, job: TriageSettings, tmp_path: Path
) -> None:
    guard = Guard(output / "predictor")
    decided = rows(output / "decisions.csv")
    files = [job.photos / row["path"] for row in decided]
    answers = guard([str(file) for file in files])
    assert {answer.failure_probability for answer in answers} == {None}
    found = np.array([answer.quantile for answer in answers])
    stated = np.array([float(row["quantile"]) for row in decided])
    assert np.abs(found - stated).max() <= 2 / 200  # 200 photos, 200 steps


def test_the_review_is_ordered_by_doubt(output: Path, tmp_path: Path) -> None:
    review = open_review(output, "review")
    asked = {row["path"] for row in rows(output / "next_labels.csv")}
    shown = [task for task in review.tasks if task.path not in asked and not task.is_blind]
    quantiles = [task.quantile or 0 for task in shown]
    assert quantiles == sorted(quantiles, reverse=True)
    assert quantiles[0] > 0
    sent = ReviewSession(review, tmp_path / "labels.csv").page_data()["tasks"]
    assert {task["p"] for task in sent} == {None}


def test_with_labels_there_is_a_probability(
    folder: Folder, job: TriageSettings, output: Path, tmp_path: Path
) -> None:
    triage_photos(job, output, [fill_in(output, folder[1], tmp_path / "filled.csv")])
    open_rows = [row for row in rows(output / "decisions.csv") if row["decision"] != "labelled"]
    assert all(row["failure_probability"] for row in open_rows)
    (answer,) = Guard(output / "predictor")([photo(0, 5000)])
    assert answer.failure_probability is not None
    assert answer.quantile is None
    assert "expected errors" in (output / "report.html").read_text()

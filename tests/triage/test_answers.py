"""Test that a triage counts, guarantees and shows the answers that its predictor gives."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.builders.photo_folders import write_photos
from tests.builders.store_fakes import NAMES
from tests.command import run
from tests.triage.conftest import Folder, fill_in, job_on, rows
from vilu.artifacts.documents import read_document
from vilu.calibration.calibration import Calibration
from vilu.errors import UsageError
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.persistence.storage import load_predictor
from vilu.triage.ask import fingerprint_of
from vilu.triage.labels import LabelBook, sides_and_positions
from vilu.triage.outputs import triage_photos
from vilu.triage.review import open_review
from vilu.triage.serve import ReviewSession
from vilu.triage.sorting import flat_name
from vilu.triage.state import STATE_FILE, TriageState


def test_labels_bring_adapted_answers_and_are_counted_against_them(begun: Folder) -> None:
    """After labels, the adapted answers are judged. A third of the zero-shot answers are wrong."""
    home, truth = begun
    output = home / "out"
    state = read_document(output / STATE_FILE, TriageState)
    assert state.answer.answer == "adapted"
    scores = Outcomes.load(output / "decisions.parquet")
    assert scores.answer == "adapted"
    names = scores.class_names or ()
    zero_shot = [names[code] for code in scores.zero_shot]
    wrong_zero_shot = [
        name != truth[path] for path, name in zip(scores.ids, zero_shot, strict=True)
    ]
    assert np.mean(wrong_zero_shot) == pytest.approx(1 / 3, abs=0.01)
    decided = {row["path"]: row for row in rows(output / "decisions.csv")}
    for path, name in zip(scores.ids, zero_shot, strict=True):
        expected = "" if decided[path]["decision"] == "labelled" else name
        assert decided[path]["zero_shot"] == expected
    # counted by hand: the labelled photos on the calibration side, up to the threshold
    calibration = Calibration.load(output / "predictor")
    counted = calibration.rows
    assert counted.answer == "adapted"
    given = [names[code] for code in counted.prediction]
    failures = [truth[path] != name for path, name in zip(counted.ids, given, strict=True)]
    assert counted.failure.tolist() == failures
    threshold = calibration.rule.threshold
    assert calibration.rule.n_wrong == sum(
        failed for failed, u in zip(failures, counted.uncertainty, strict=True) if u <= threshold
    )
    book = {entry.path: entry for entry in LabelBook.load(output / "labels.parquet")}
    pictures = [bytes.fromhex(book[path].picture) for path in counted.ids]
    assert sides_and_positions(pictures, 0)[0].all()  # no counted label was fitted on
    page = (output / "report.html").read_text(encoding="utf-8")
    assert str(state.answer) in page
    is_other = [
        row["decision"] != "labelled" and row["zero_shot"] != row["answer"]
        for row in decided.values()
    ]
    assert any(is_other)
    assert "zero-shot: " in page
    assert "adapted: " in page


def test_a_first_run_without_labels_judges_what_the_model_says(tmp_path: Path) -> None:
    """The first labels change the kind of answer. The new answers are then judged by the labels."""
    truth = write_photos(tmp_path / "photos", 200)
    job = job_on(tmp_path / "photos")
    summary = triage_photos(job, tmp_path / "out")
    assert summary.answer == (
        "The zero-shot answers of the model are judged: there are too few labels to fit on."
    )
    assert "zero_shot" not in rows(tmp_path / "out" / "decisions.csv")[0]
    assert Outcomes.load(tmp_path / "out" / "decisions.parquet").answer == "zero_shot"
    filled = fill_in(tmp_path / "out", truth, tmp_path / "filled.csv")
    summary = triage_photos(job, tmp_path / "out", [filled])
    assert summary.answer.startswith("Adapted answers are judged")
    again = triage_photos(job, tmp_path / "out", [filled])
    assert again.answer == summary.answer
    scores = Outcomes.load(tmp_path / "out" / "decisions.parquet")
    names = scores.class_names or ()
    book = LabelBook.load(tmp_path / "out" / "labels.parquet").labels
    for row, path in enumerate(scores.ids):
        if path in book:
            assert scores.failure[row] == (names[scores.prediction[row]] != truth[path])


def test_zero_shot_answers_can_be_kept_and_given_ones_are_refused(tmp_path: Path) -> None:
    truth = write_photos(tmp_path / "photos", 60)
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    lines = [f"{path},{label}" for path, label in truth.items()]
    (tmp_path / "known.csv").write_text("\n".join(["path,label", *lines[:40]]))
    arguments = ("triage", "photos", "--classes", "names.txt", "-o", "out")
    done = run(*arguments, "--answer", "given", code=2, cwd=tmp_path)
    assert "'given' is not one of 'zero_shot', 'adapted'" in done.stderr
    labelled = (*arguments, "--labels", "known.csv")
    done = run(*labelled, "--answer", "zero_shot", cwd=tmp_path)
    assert "zero-shot answers of the model are judged: --answer zero_shot asks" in done.stderr
    assert load_predictor(tmp_path / "out" / "predictor").answer == "zero_shot"
    done = run(*arguments, "--answer", "adapted", cwd=tmp_path)
    assert "answer 'zero_shot', now 'adapted'" in done.stderr
    assert load_predictor(tmp_path / "out" / "predictor").answer == "adapted"


def test_accepted_photos_are_sorted_by_the_guarded_answer(guaranteed: Folder) -> None:
    home, _ = guaranteed
    triage_photos(job_on(home / "photos"), home / "out", sort="link")
    n_other = 0
    for row in rows(home / "out" / "decisions.csv"):
        if row["decision"] == "accept":
            link = home / "out" / "sorted" / "accepted" / row["answer"] / flat_name(row["path"])
            assert link.is_symlink()
            n_other += row["answer"] != row["zero_shot"]
    assert n_other > 0


def test_the_review_shows_both_answers_where_they_differ(begun: Folder, tmp_path: Path) -> None:
    output = begun[0] / "out"
    decided = {row["path"]: row for row in rows(output / "decisions.csv")}
    review = open_review(output, "all")
    assert review.answer == "adapted"
    shown = {task.path: task.zero_shot for task in review.tasks}
    blind = {task.path for task in review.tasks if task.is_blind}
    assert all(shown[path] is None for path in blind)
    for path, row in decided.items():
        if path in blind:
            continue
        is_other = row["zero_shot"] not in {"", row["answer"]}
        assert shown[path] == (row["zero_shot"] if is_other else None)
    page = ReviewSession(review, tmp_path / "labels.csv").page_data()
    assert page["kind"] == "adapted"
    assert {task["path"]: task["zero_shot"] for task in page["tasks"]} == shown
    tasks = run("review", output, "-o", tmp_path / "tasks.csv", "--which", "all")
    assert "afterwards: vilu labels DONE -o reviewed.csv" in tasks.stderr
    assert {row["path"]: row["zero_shot"] or None for row in rows(tmp_path / "tasks.csv")} == shown
    run("review", output, "-o", tmp_path / "t.json", "--to", "label-studio", "--which", "all")
    tasks = [task["data"] for task in json.loads((tmp_path / "t.json").read_text())]
    assert {task["path"]: task.get("vilu_zero_shot") for task in tasks} == shown
    scores = open_review(output / "decisions.parquet", "all")
    assert scores.answer == "adapted"
    assert any(task.zero_shot for task in scores.tasks)


def test_equal_weights_that_judge_other_answers_are_another_predictor(begun: Folder) -> None:
    """If the two had one fingerprint, a second guarantee would take no share of the level."""
    adapted = load_predictor(begun[0] / "out" / "predictor")
    other = type(adapted)(**{**adapted.get_params(), "answer": "zero_shot"})
    other.space_ = adapted.space_
    other.restore(adapted.state())
    assert fingerprint_of(other) != fingerprint_of(adapted)


def test_given_answers_are_refused_before_a_photo_is_read(tmp_path: Path) -> None:
    job = replace(job_on(tmp_path), answer="given")
    with pytest.raises(UsageError, match="have no given answers"):
        triage_photos(job, tmp_path / "out")

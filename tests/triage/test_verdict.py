"""Test the verdict that begins a run: the share of right answers by the labels."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.builders.photo_folders import photo
from tests.triage.conftest import Folder, fill_in, job_on, rows
from vilu.errors import OUTSIDE, UNKNOWN
from vilu.outcomes.outcomes import Outcomes
from vilu.triage.outputs import triage_photos
from vilu.triage.state import TriageSettings
from vilu.triage.verdict import LabelledAnswers, verdict_in_words


def test_shares_and_confusions_by_hand() -> None:
    label = np.array([0, 0, 0, 1, 1, OUTSIDE, 2, 2])
    zero_shot = np.array([0, 1, 1, 1, 0, 2, UNKNOWN, 2])
    labelled = LabelledAnswers(label, {"zero_shot": zero_shot})
    assert labelled.share_right("zero_shot") == 3 / 7  # one photo has no answer
    assert labelled.most_frequent_label() == (0, 3 / 8)
    assert labelled.confusions("zero_shot") == [(0, 1, 2), (1, 0, 1), (OUTSIDE, 2, 1)]


def test_both_kinds_of_answers_are_judged_by_the_same_labels() -> None:
    label = np.array([0, 0, 1, 1])
    zero_shot = np.array([0, 1, 1, 0])  # the first and the third are right
    adapted = np.array([UNKNOWN, UNKNOWN, 1, 1])  # two photos on the calibration side
    labelled = LabelledAnswers(
        label,
        {"zero_shot": zero_shot, "adapted": adapted},
        n_cross_fitted=2,
        cross_fitted_wrong={"zero_shot": 1, "adapted": 0},
    )
    assert labelled.n_labels_for_verdict == 4
    assert labelled.share_right("zero_shot") == 2 / 4  # 1 in 2, and 1 in 2 cross-fitted ones
    assert labelled.share_right("adapted") == 4 / 4


def test_confusions_say_by_which_labels_they_are_counted() -> None:
    """Two of three wrong adapted answers are cross-fitted, and only their number is known."""
    label = np.array([0, 0, 0, 1, 1])
    labelled = LabelledAnswers(
        label,
        {"zero_shot": label, "adapted": np.array([UNKNOWN, UNKNOWN, UNKNOWN, 1, 0])},
        n_cross_fitted=3,
        cross_fitted_wrong={"zero_shot": 0, "adapted": 2},
    )
    outcomes = Outcomes(np.zeros(5), np.zeros(5, int), class_names=("cat", "dog"), answer="adapted")
    verdict = verdict_in_words(labelled, outcomes, has_doubtful=False)
    assert "are right, by 5 labels" in verdict
    assert "confusions by the 2 labels of the calibration side: 'cat' for 'dog' (1)." in verdict


def test_none_of_the_classes_can_be_the_commonest_label() -> None:
    labelled = LabelledAnswers(np.array([OUTSIDE]), {"zero_shot": np.array([1])})
    assert labelled.most_frequent_label() == (OUTSIDE, 1.0)


def test_labels_of_photos_without_an_answer_give_no_shares() -> None:
    """The only labelled photo cannot be read, so no label judges an answer."""
    labelled = LabelledAnswers(np.array([0]), {"zero_shot": np.array([UNKNOWN])})
    outcomes = Outcomes(np.array([0.5]), np.array([0]), prediction=np.array([0]))
    assert verdict_in_words(labelled, outcomes, has_doubtful=False) == ""


def test_a_run_begins_with_the_verdict(folder: Folder, job: TriageSettings, tmp_path: Path) -> None:
    """Only zero-shot answers to labelled photos are counted."""
    truth, output = folder[1], tmp_path / "out"
    assert triage_photos(job, output).verdict == ""
    assert "answers are right, by" not in (output / "report.html").read_text()
    answer_of = {row["path"]: row["answer"] for row in rows(output / "decisions.csv")}
    summary = triage_photos(job, output, [fill_in(output, truth, tmp_path / "filled.csv")])
    labelled = [
        row["path"] for row in rows(output / "decisions.csv") if row["decision"] == "labelled"
    ]
    share = np.mean([answer_of[path] == truth[path] for path in labelled])
    names = [truth[path] for path in labelled]
    commonest = max(names.count(name) for name in names) / len(names)
    assert summary.verdict.startswith(f"{share:.0%} of the zero-shot answers and ")
    assert f"are right, by {len(labelled)} labels." in summary.verdict
    assert f"is right in {commonest:.0%} of all {len(labelled)} labels." in summary.verdict
    adapted = re.search(r"(\d+)% of the adapted answers", summary.verdict)
    assert adapted is not None
    # the kinds of photos are far apart, so a few labels suffice
    assert int(adapted[1]) > 100 * share
    assert "all photos may do better" in summary.verdict
    page = (output / "report.html").read_text()
    assert page.index("answers are right, by") < page.index("Not guaranteed yet")


def test_the_confusions_of_zero_shot_answers_are_named(
    folder: Folder, changed: Callable[..., TriageSettings], tmp_path: Path
) -> None:
    job, output = changed(answer="zero_shot"), tmp_path / "out"
    triage_photos(job, output)
    verdict = triage_photos(
        job, output, [fill_in(output, folder[1], tmp_path / "filled.csv")]
    ).verdict
    assert re.search(r"most frequent confusions: '\w+' for '\w+' \(\d+\)", verdict)


def test_answers_of_one_class_are_warned_of_with_and_without_labels(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number:02}.png").write_bytes(photo(0, number))
    job = job_on(folder)
    verdict = triage_photos(job, tmp_path / "out").verdict
    found = re.fullmatch(
        r"Warning: 100% of the answers are '(\w+)'\. Either nearly all .*", verdict
    )
    assert found is not None
    other = next(name for name in ("cat", "dog") if name != found[1])
    labels = tmp_path / "l.csv"
    labels.write_text(
        "path,label\n" + "".join(f"{n:02}.png,{found[1] if n else other}\n" for n in range(10))
    )
    verdict = triage_photos(job, tmp_path / "out", [labels]).verdict
    assert f"answers are '{found[1]}', and 90% of the labels." in verdict
    assert verdict in (tmp_path / "out" / "report.html").read_text().replace("&#39;", "'")

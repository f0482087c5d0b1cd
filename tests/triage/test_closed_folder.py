"""Test a triage with a guarantee about the photos in its folder only (`about="folder"`)."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vilu
from tests.builders.photo_folders import write_photos
from tests.builders.store_fakes import FakeBackbone
from tests.triage.conftest import Folder, fill_in, job_on, rows
from vilu.errors import ProvenanceError, UsageError
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.persistence.storage import load_predictor
from vilu.store.reader import EmbeddingStore
from vilu.triage.labels import LabelBook
from vilu.triage.outputs import TriageSummary, triage_photos
from vilu.triage.photos import EMBEDDINGS_FOLDER
from vilu.triage.state import STATE_FILE, TriageSettings

COPIED = 5


def job_about_folder(photos: Path) -> TriageSettings:
    return replace(job_on(photos), about="folder")


@pytest.fixture(scope="module")
def closed(
    tmp_path_factory: pytest.TempPathFactory, fake_model: FakeBackbone
) -> tuple[Path, dict[str, str], TriageSummary]:
    """Answer a triage about a folder until it has a guarantee.

    Return its home, the right names and the last summary.
    """
    home = tmp_path_factory.mktemp("closed")
    truth = write_photos(home / "photos", 400)
    for path in sorted(truth)[:COPIED]:
        copy = f"copy of {path}".replace("/", " ")
        shutil.copy2(home / "photos" / path, home / "photos" / copy)
        truth[copy] = truth[path]
    labels: list[Path] = []
    for _ in range(8):
        summary = triage_photos(job_about_folder(home / "photos"), home / "out", labels)
        if any(row["decision"] == "accept" for row in rows(home / "out" / "decisions.csv")):
            return home, truth, summary
        labels = [fill_in(home / "out", truth, home / "filled.csv")]
    pytest.fail("nothing was guaranteed")


@pytest.fixture
def copied(closed: tuple[Path, dict[str, str], TriageSummary], tmp_path: Path) -> Folder:
    """Return a copy with the photos and the triage from `closed`, and the right names."""
    home, truth, _ = closed
    shutil.copytree(home / "photos", tmp_path / "photos", copy_function=shutil.copy2)
    shutil.copytree(home / "out", tmp_path / "out")
    return tmp_path, truth


def test_what_is_accepted_has_no_label_and_keeps_the_risk(
    closed: tuple[Path, dict[str, str], TriageSummary],
) -> None:
    home, truth, summary = closed
    accepted = [row for row in rows(home / "out" / "decisions.csv") if row["decision"] == "accept"]
    labels = LabelBook.load(home / "out" / "labels.parquet").labels
    assert not {row["path"] for row in accepted} & labels.keys()
    n_wrong = sum(truth[row["path"]] != row["answer"] for row in accepted)
    assert n_wrong <= 0.1 * len(accepted)
    rule = vilu.Calibration.load(home / "out" / "predictor").rule
    assert rule is not None
    assert rule.closed is not None
    assert rule.about == "folder"
    assert rule.closed.files == len(accepted)
    assert len(rule.closed.pictures) <= rule.closed.files
    # the terminal and the page show the same sentence, and the state holds the rule
    assert f"of the {rule.closed} that are accepted and that nobody had" in summary.guarantee
    assert str(rule.closed) in (home / "out" / "report.html").read_text()
    assert str(rule) in (home / "out" / STATE_FILE).read_text()


def test_photos_of_both_sides_of_the_hash_are_accepted(
    closed: tuple[Path, dict[str, str], TriageSummary],
) -> None:
    home, truth, _ = closed
    n_accepted = sum(row["decision"] == "accept" for row in rows(home / "out" / "decisions.csv"))
    # for a guarantee about new photos, only half of the photos are on the calibration side
    n_labels = len(LabelBook.load(home / "out" / "labels.parquet").labels)
    assert n_accepted + n_labels > len(truth) / 2


def test_other_photos_are_refused_with_the_command_for_them(
    copied: Folder, fake_model: FakeBackbone
) -> None:
    home, _ = copied
    predictor = home / "out" / "predictor"
    with pytest.raises(ProvenanceError, match=r"about no new image.*--about new"):
        vilu.Guard(predictor, backbone=fake_model)
    with pytest.raises(ProvenanceError, match=r"--about new"):
        vilu.Monitor.of_folder(predictor)
    calibration = vilu.Calibration.load(predictor)
    rng = np.random.default_rng(0)
    new = Outcomes(rng.random(50), np.full(50, -1), picture=np.arange(50))
    assert calibration.rule is not None
    with pytest.raises(ProvenanceError, match=r"--about new"):
        vilu.Monitor(calibration.rows, calibration.rule)
    decided = calibration.decide(replace(new, uncertainty=np.zeros(50)))
    assert set(decided.decision or ()) == {"review"}
    assert set(decided.decision_reason or ()) == {"not_covered"}


def test_only_scores_of_the_covered_photos_are_decided_on(copied: Folder) -> None:
    home, _ = copied
    predictor = load_predictor(home / "out" / "predictor")
    calibration = vilu.Calibration.load(home / "out" / "predictor")
    assert calibration.rule is not None
    assert calibration.rule.closed is not None
    store = EmbeddingStore(home / "out" / EMBEDDINGS_FOLDER / "001")
    with pytest.raises(ProvenanceError, match=r"rows show other pictures.*--about new"):
        vilu.score(predictor, store, calibration=calibration)
    is_covered = calibration.rule.closed.covers(store.picture_identities())
    covered = store.take(np.flatnonzero(is_covered))
    outcomes = vilu.score(predictor, covered, calibration=calibration)
    decisions = outcomes.decision or ()
    # The threshold is the score of a photo, and another batch may round this score up.
    assert decisions.count("review") <= 1
    assert "not_covered" not in (outcomes.decision_reason or ())


def test_a_folder_that_changes_after_the_first_draw_is_refused(copied: Folder) -> None:
    home, _ = copied
    Image.new("RGB", (32, 32), "purple").save(home / "photos" / "new.png")
    with pytest.raises(UsageError, match=r"added, removed or changed.*labels\.parquet"):
        triage_photos(job_about_folder(home / "photos"), home / "out")


def test_what_a_guarantee_is_about_is_stated_before_looking(copied: Folder) -> None:
    home, _ = copied
    with pytest.raises(UsageError, match=r"a guarantee about 'folder', now 'new'"):
        triage_photos(job_on(home / "photos"), home / "out")


def test_labels_without_a_request_are_fitted_on_before_a_draw_only(copied: Folder) -> None:
    home, truth = copied
    book = LabelBook.load(home / "out" / "labels.parquet")
    path = next(path for path in sorted(truth) if path not in book.entries)
    (home / "late.csv").write_text(f"path,label\n{path},{truth[path]}\n")
    late = home / "late.csv"
    filled = fill_in(home / "out", truth, home / "filled.csv")
    triage_photos(job_about_folder(home / "photos"), home / "out", [late, filled])
    assert LabelBook.load(home / "out" / "labels.parquet").entries[path].stream == "given"
    triage_photos(job_about_folder(home / "photos"), home / "new", [late])
    assert LabelBook.load(home / "new" / "labels.parquet").entries[path].stream == "fit"

"""Test that a triage continues under other settings.

The labels stay, and earlier tests of a guarantee stay counted.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.builders.store_fakes import NAMES, FakeBackbone
from tests.triage.conftest import Folder, fill_in, job_on, rows
from vilu.artifacts.documents import read_document
from vilu.calibration.calibration import Calibration
from vilu.errors import UsageError
from vilu.store.job import BackboneSpec
from vilu.triage.carrying import all_labels, move_former_labels
from vilu.triage.labels import SKIPPED, LabelBook
from vilu.triage.outputs import triage_photos
from vilu.triage.photos import EmbeddingSettings
from vilu.triage.state import TriageSettings, TriageState


def with_embedding(job: TriageSettings, **changes: object) -> TriageSettings:
    embedding: EmbeddingSettings = dataclasses.replace(job.embedding, **changes)  # type: ignore[arg-type]
    return dataclasses.replace(job, embedding=embedding)


def state_of(output: Path) -> TriageState:
    return read_document(output / "triage.json", TriageState)


@pytest.mark.slow
def test_a_book_is_carried_over_classes_risk_and_backbone(
    guaranteed: Folder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If a class is removed, its labels are set aside. If the class returns, its labels return."""
    (home, truth), job = guaranteed, job_on(guaranteed[0] / "photos")
    output = home / "out"
    before = LabelBook.load(output / "labels.parquet").labels
    n_tested = state_of(output).n_tested
    assert n_tested > 0
    lax = dataclasses.replace(job, max_risk=0.2, confidence=0.9)
    triage_photos(lax, output)
    assert "settings have changed: max_risk 0.1, now 0.2; confidence 0.95, now 0.9" in caplog.text
    assert f"{n_tested} earlier test of a guarantee used a part of the level" in caplog.text
    assert LabelBook.load(output / "labels.parquet").labels == before
    assert state_of(output).n_tested > n_tested
    rule = Calibration.load(output / "predictor").rule
    assert rule is not None
    assert (rule.max_risk, rule.confidence) == (0.2, 0.9)

    n_tested = state_of(output).n_tested
    without_cars = with_embedding(lax, names=("cat", "dog", "boat"))
    caplog.clear()
    triage_photos(without_cars, output)
    cars = [path for path, label in before.items() if label == "car"]
    assert "classes without 'car' and with 'boat'" in caplog.text
    assert f"{len(cars)} labels left out, because the class no longer exists: 'car'" in caplog.text
    book = LabelBook.load(output / "labels.parquet").labels
    assert book == {path: label for path, label in before.items() if label != "car"}
    assert all_labels(output).labels == before
    assert {row["answer"] for row in rows(output / "decisions.csv")} <= {"cat", "dog", "boat"}
    assert state_of(output).n_tested >= n_tested

    other = FakeBackbone(weights="w1")
    monkeypatch.setattr(BackboneSpec, "load", lambda self: other)
    caplog.clear()
    triage_photos(with_embedding(lax, backbone=BackboneSpec("other")), output)
    assert "classes without 'boat' and with 'car'; backbone 'fake', now 'other'" in caplog.text
    assert "All photos are embedded again" in caplog.text
    assert f"{len(cars)} labels of classes that are back count again" in caplog.text
    assert other.n_images == len(truth)
    assert LabelBook.load(output / "labels.parquet").labels == before
    assert state_of(output).n_tested >= n_tested


def test_a_model_that_cannot_be_loaded_removes_nothing(
    guaranteed: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, job = guaranteed[0], job_on(guaranteed[0] / "photos")

    def fails(_: object) -> None:
        raise UsageError("no such model")

    with monkeypatch.context() as patch:
        patch.setattr(BackboneSpec, "load", fails)
        with pytest.raises(UsageError, match="no such model"):
            triage_photos(with_embedding(job, backbone=BackboneSpec("none")), home / "out")
    assert "400 photos: " in triage_photos(job, home / "out").counts
    assert Calibration.find(home / "out" / "predictor") is not None


def test_another_seed_is_refused(
    folder: Folder, changed: Callable[..., TriageSettings], tmp_path: Path
) -> None:
    triage_photos(changed(), tmp_path / "out")
    with pytest.raises(UsageError, match="begun with the seed 0, now 1"):
        triage_photos(changed(seed=1), tmp_path / "out")
    triage_photos(changed(seed=1), tmp_path / "out", overwrite=True)


@pytest.mark.slow
def test_a_photo_that_is_labelled_again_keeps_its_new_label(
    folder: Folder,
    changed: Callable[..., TriageSettings],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    output = tmp_path / "out"
    triage_photos(changed(), output)
    triage_photos(changed(), output, [fill_in(output, folder[1], tmp_path / "filled.csv")])
    cars = [path for path, label in all_labels(output).labels.items() if label == "car"]
    fewer = with_embedding(changed(), names=("cat", "dog"))
    triage_photos(fewer, output)
    again = tmp_path / "again.csv"
    again.write_text(f"path,label\n{cars[0]},{SKIPPED}\n")
    triage_photos(fewer, output, [again])
    assert all_labels(output).entries[cars[0]].label == SKIPPED
    triage_photos(changed(), output)
    labels = LabelBook.load(output / "labels.parquet")
    assert labels.entries[cars[0]].label == SKIPPED
    assert [labels.labels[path] for path in cars[1:]] == ["car"] * (len(cars) - 1)


def test_a_random_pick_that_lost_a_class_is_none_any_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The remaining labels become fit labels.

    The remaining labels belong only to photos that show a remaining class. The error rate on such
    photos is no estimate for all photos.
    """
    book = LabelBook()
    book.note_labels({"a.jpg": "cat", "b.jpg": "dog", "c.jpg": "car"})
    book.save(tmp_path / "labels.parquet")
    caplog.set_level(logging.WARNING)
    move_former_labels(tmp_path, {"cat", "dog"}, "new")
    assert {e.stream for e in LabelBook.load(tmp_path / "labels.parquet")} == {"fit"}
    move_former_labels(tmp_path, set(NAMES), "new")
    book = LabelBook.load(tmp_path / "labels.parquet")
    assert book.labels == {"a.jpg": "cat", "b.jpg": "dog", "c.jpg": "car"}
    assert {entry.stream for entry in book} == {"fit"}
    assert caplog.text.count("left out") == 1

"""Test whole triage runs on small folders.

A run continues where it stopped, keeps its guarantee, and counts only labels that may count.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tests.builders.photo_folders import KINDS, photo, truth_of, write_photos
from tests.builders.store_fakes import FakeBackbone
from tests.conftest import few
from tests.triage.conftest import Folder, fill_in, job_on, label_file, rows
from vilu.artifacts.documents import read_document, write_document, write_json
from vilu.artifacts.tables import csv_bytes, write_table
from vilu.calibration.anytime import ThresholdTests
from vilu.calibration.calibration import Calibration
from vilu.calibration.rules import certify
from vilu.datasets.files import AllowedFolders
from vilu.embeddings.memory import Embeddings
from vilu.errors import OUTSIDE_NAME, DataError, MissingModelError, ProvenanceError, UsageError
from vilu.outcomes.evaluate import evaluate
from vilu.outcomes.outcomes import Outcomes
from vilu.report.page.build import find_template
from vilu.store.job import BackboneSpec
from vilu.text import plural
from vilu.triage import outputs, run
from vilu.triage.guarantee import GuaranteeProgress, new_scene_mask
from vilu.triage.label_files import label_columns
from vilu.triage.labels import SKIPPED, LabelBook, sides_and_positions
from vilu.triage.outputs import threshold_rows, triage_photos
from vilu.triage.photos import PhotoStores
from vilu.triage.state import TriageSettings, TriageState


def test_from_photos_to_a_guarantee_that_holds(begun: Folder) -> None:
    (home, truth), job = begun, job_on(begun[0] / "photos")
    output = home / "out"
    decided = rows(output / "decisions.csv")
    assert [row["path"] for row in decided] == sorted(truth)
    accepted = [row for row in decided if row["decision"] == "accept"]
    assert len(accepted) > 50
    wrong = [row["answer"] != truth[row["path"]] for row in accepted]
    assert np.mean(wrong) <= job.max_risk
    labelled = [row for row in decided if row["decision"] == "labelled"]
    assert {
        (row["answer"] == truth[row["path"]], row["failure_probability"]) for row in labelled
    } == {(True, "")}
    scores = Outcomes.load(output / "decisions.parquet")
    assert scores.decision is not None
    with (
        pytest.warns(UserWarning, match="numbers rest on few answers"),
        pytest.warns(UserWarning, match="the predictor was fitted on some of the rows"),
    ):
        evaluate(scores, n_resamples=0)
    with pytest.raises(DataError, match="of these rows were used to fit the predictor"):
        certify(scores, max_risk=0.1)
    guarantee = Calibration.load(output / "predictor")
    assert guarantee.rule is not None
    assert guarantee.rule.method == "anytime"
    assert "at whatever moment one looks" in (guarantee.guarantee_text or "")
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "Guaranteed: at most 10.0% wrong" in page
    assert "<script" not in page


def test_before_the_draw_it_says_how_many_right_answers_are_needed(begun: Folder) -> None:
    page = (begun[0] / "half" / "report.html").read_text(encoding="utf-8")
    needed = "no label counts for it yet. About 46 labels are needed if every answer is right."
    assert needed in page


def test_the_most_trusted_are_guaranteed_only_where_labels_show_it() -> None:
    """Wrong are rows 1, 3, 5, 7 and 9, and every 16th row from 0 to 64. All others are right.

    So the laxest threshold is certified, although the smallest threshold is not.
    """
    u = (np.arange(640) + 0.5) / 640
    wrong = ((u < 1 / 8) & (np.arange(640) % 16 == 0)).astype(int) + (
        (u < 1 / 64) & (np.arange(640) % 2 == 1)
    )
    looks = ThresholdTests(np.arange(1, 65) / 64, 0.05, 0.05)
    assert looks.index_of_laxest_certified_threshold(u, wrong) == 63
    rows = np.arange(640)
    progress = GuaranteeProgress(looks, rows, Outcomes(u, wrong), rows[:0], 63, 0, 0)
    levels = threshold_rows(u, progress, threshold_in_force=1.0)
    is_shown = [level.risk_bound is not None and level.risk_bound <= 0.05 for level in levels]
    assert [level.is_certified for level in levels] == is_shown
    assert [levels[0].is_certified, levels[-1].is_certified] == [False, True]


def test_labels_show_no_bound_for_photos_that_are_not_drawn() -> None:
    """All labels are of photos up to the limit, so they say nothing about photos beyond it."""
    grid = np.arange(1, 81) / 80
    uncertainty = (np.arange(640) + 0.5) / 640
    is_drawn = uncertainty <= 0.5
    outcomes = Outcomes(uncertainty[is_drawn], np.zeros(int(is_drawn.sum()), int))
    rows = np.flatnonzero(is_drawn)
    tests = ThresholdTests(grid, 0.05, 0.05, limit=0.5)
    progress = GuaranteeProgress(tests, rows, outcomes, rows[:0], 39, 0, 0)
    levels = threshold_rows(uncertainty, progress, threshold_in_force=0.5)
    has_bound = [level.risk_bound is not None for level in levels]
    assert has_bound == [level.threshold <= 0.5 for level in levels]
    assert not all(has_bound)


def test_of_a_scene_one_label_counts() -> None:
    """By hand: the angles are 0, 5, 20, 40, 45 and 90 degrees. cos 5 is 0.996, cos 20 is 0.940."""
    angles = torch.deg2rad(torch.tensor([0.0, 5, 20, 40, 45, 90]))
    photos = Embeddings(torch.stack([angles.cos(), angles.sin()], dim=1), torch.eye(2))
    alone = lambda known, rows: new_scene_mask(  # noqa: E731
        photos, np.array(known, np.int64), np.array(rows, np.int64)
    ).tolist()
    assert alone([], [0, 1, 2, 3, 4, 5]) == [True, False, True, True, False, True]
    assert alone([1, 5], [0, 2, 4, 5]) == [False, True, True, False]
    assert alone([0], []) == []


def test_the_page_says_how_many_labels_are_of_one_scene(tmp_path: Path) -> None:
    """Every scene has photos in three sizes, and every photo has a label.

    A scene with a label on the fit side is not new. So at most one label counts for each scene
    without a label on the fit side.
    """
    folder = tmp_path / "photos"
    folder.mkdir()
    truth = {}
    for scene in range(90):
        kind = scene % KINDS
        for size in (24, 32, 40):
            name = f"{scene:02}-{size}.png"
            (folder / name).write_bytes(photo(kind, scene, size))
            truth[name] = truth_of(kind)
    labels = tmp_path / "labels.csv"
    labels.write_bytes(csv_bytes(label_columns(truth, {})))
    job = dataclasses.replace(job_on(folder), max_risk=0.2)
    said = triage_photos(job, tmp_path / "out", [labels]).guarantee
    counts = re.search(r"But (\d+) of the (\d+) labels that count belong to photos", said)
    assert counts is not None
    n_repeated, n_counted = map(int, counts.groups())
    book = list(LabelBook.load(tmp_path / "out" / "labels.parquet"))
    is_calibration, _ = sides_and_positions([bytes.fromhex(entry.picture) for entry in book], 0)
    scenes = np.array([entry.path[:2] for entry in book])
    new_scenes = set(scenes[is_calibration]) - set(scenes[~is_calibration])
    assert n_counted - n_repeated <= len(new_scenes)
    assert n_counted <= is_calibration.sum()
    assert "If every scene has only one label, nothing is guaranteed. Rely on this for" in said
    assert said in (tmp_path / "out" / "report.html").read_text()


def test_a_page_without_bursts_says_nothing_of_scenes(begun: Folder) -> None:
    assert "nearly like" not in (begun[0] / "out" / "report.html").read_text()


def test_no_calibration_label_is_ever_fitted_on_whoever_asked_for_it(
    folder: Folder, job: TriageSettings, tmp_path: Path
) -> None:
    """Every photo has a label with the stream "fit". The predictor has seen one side only."""
    truth, output = folder[1], tmp_path / "out"
    labels = tmp_path / "all.csv"
    labels.write_text(
        "path,label,stream\n" + "".join(f"{path},{name},fit\n" for path, name in truth.items())
    )
    triage_photos(job, output, [labels])
    from vilu.predictors.persistence.storage import load_predictor

    stores = PhotoStores(output / "embeddings")
    photos = stores.open_photos([(path, (folder[0] / path).stat()) for path in sorted(truth)])
    vouches, _ = sides_and_positions(photos.pictures, job.seed)
    seen = load_predictor(output / "predictor").seen(photos).shared
    assert seen.sum() == (~vouches).sum()
    assert not (seen & vouches).any()
    # Labels that were chosen count for a guarantee only where no photo up to them lacks one.
    kept = Calibration.find(output / "predictor")
    counted = set() if kept is None else set(kept.rows.ids or ())
    assert counted <= set(truth)


def test_labels_of_a_draw_count_if_labels_to_fit_on_come_with_them(
    begun: Folder, tmp_path: Path
) -> None:
    """The drawn labels are counted first. Then the other labels may lead to a new predictor."""
    home, truth = begun
    job = job_on(home / "photos")
    output = tmp_path / "out"
    shutil.copytree(home / "half", output)
    before = read_document(output / "triage.json", TriageState)
    assert before.trial is not None
    stores = PhotoStores(output / "embeddings")
    photos = stores.open_photos([(path, (job.photos / path).stat()) for path in sorted(truth)])
    is_calibration, _ = sides_and_positions(photos.pictures, job.seed)
    to_fit = [photos.ids[row] for row in np.flatnonzero(~is_calibration)]
    assert len(to_fit) >= 1.5 * before.trial.n_fit  # so a new predictor would be fitted
    fit_labels = tmp_path / "fit.csv"
    lines = [f"{path},{truth[path]},fit\n" for path in to_fit]
    fit_labels.write_text("path,label,stream\n" + "".join(lines))
    drawn = fill_in(output, truth, tmp_path / "drawn.csv")
    triage_photos(job, output, [drawn, fit_labels])
    after = read_document(output / "triage.json", TriageState)
    assert after.guarantee
    assert after.trial is not None
    # If the first predictor accepts all photos, no other one is tested. On some processors its fit
    # accepts a few less. Then another one is also tested, and may replace the first.
    is_replaced = after.trial.n_fit != before.trial.n_fit
    assert 1 + is_replaced <= after.n_tested <= 2


def test_the_page_shows_the_labels_of_the_guarantee_beside_new_photos(guaranteed: Folder) -> None:
    """Some new photos come before labelled ones in the random order. The guarantee stays."""
    home, output = guaranteed[0], guaranteed[0] / "out"
    job = job_on(home / "photos")
    triage_photos(job, output)  # tests the limit, if it was raised
    rule = Calibration.load(output / "predictor").rule
    assert rule is not None
    assert f"{rule.n} for the guarantee" in (output / "report.html").read_text()
    for number in range(9000, 9030):
        (home / "photos" / f"{number}.png").write_bytes(photo(number % KINDS, number))
    triage_photos(job, output)
    page = (output / "report.html").read_text()
    assert Calibration.load(output / "predictor").rule == rule
    assert f"{rule.n_wrong} of {rule.n_accepted} labelled answers up to the threshold" in page
    assert f"{rule.n} for the guarantee" in page
    assert "<td>yes</td>" in page


def test_the_page_counts_the_labels_of_the_rule_beside_a_candidate(guaranteed: Folder) -> None:
    """Fewer labels count for the candidate than for the guarantee of the present predictor."""
    home, output = guaranteed[0], guaranteed[0] / "out"
    rule = Calibration.load(output / "predictor").rule
    state = read_document(output / "triage.json", TriageState)
    assert rule is not None
    assert state.trial is not None
    shutil.copytree(output / "predictor", output / "candidate")
    strict = state.trial.model_copy(update={"limit": state.trial.grid[0]})
    write_document(output / "triage.json", state.model_copy(update={"candidate": strict}))
    triage_photos(job_on(home / "photos"), output)
    page = (output / "report.html").read_text()
    assert "These lines are of a new predictor" in page
    assert f"{rule.n} for the guarantee" in page


def test_labels_of_doubtful_photos_that_lie_further_on_do_not_count(
    guaranteed: Folder, tmp_path: Path
) -> None:
    (home, truth), output = guaranteed, guaranteed[0] / "out"
    triage_photos(job_on(home / "photos"), output, [])  # tests the limit, if it was raised
    before = Calibration.load(output / "predictor")
    book = LabelBook.load(output / "labels.parquet")
    chosen = tmp_path / "chosen.csv"
    photos = PhotoStores(output / "embeddings").open_photos(
        [(path, (home / "photos" / path).stat()) for path in sorted(truth)]
    )
    is_calibration, _ = sides_and_positions(photos.pictures, 0)
    # only on the calibration side, so that no label leads to another fit
    wrong_on_purpose = {}
    for row in np.flatnonzero(is_calibration):
        path = photos.ids[row]
        if path not in book.entries:
            wrong_on_purpose[path] = "cat" if truth[path] != "cat" else "dog"
    assert wrong_on_purpose
    chosen.write_text(
        "path,label,stream\n" + "".join(f"{p},{n},fit\n" for p, n in wrong_on_purpose.items())
    )
    triage_photos(job_on(home / "photos"), output, [chosen])
    counted = pq.read_table(output / "predictor" / "calibration.parquet")["key"].to_pylist()
    assert set(counted) <= set(book.entries), "a label that no draw has met would count"
    assert Calibration.load(output / "predictor").rule == before.rule


def test_what_is_missing_holds_it_up_and_what_is_skipped_counts_as_wrong(
    begun: Folder, tmp_path: Path
) -> None:
    (home, truth), job = begun, job_on(begun[0] / "photos")
    output = Path(shutil.copytree(home / "half", tmp_path / "out"))
    asked = rows(output / "next_labels.csv")
    assert {row["stream"] for row in asked} == {"calibration"}
    lines = (
        fill_in(output, truth, tmp_path / "filled.csv")
        .read_text(encoding="utf-8")
        .splitlines(keepends=True)
    )
    part = tmp_path / "part.csv"
    header, *filled = lines
    part.write_text("".join([header, *filled[3:]]), encoding="utf-8")
    summary = triage_photos(job, output, [part])
    assert "3 of the labels that were asked for are missing" in summary.guarantee
    awaited = [row["path"] for row in asked[:3]]
    assert [row["path"] for row in rows(output / "next_labels.csv")] == awaited
    rest = tmp_path / "rest.csv"
    rest.write_text(
        "path,label\n" + "".join(f"{path},{SKIPPED}\n" for path in awaited),
        encoding="utf-8",
    )
    triage_photos(job, output, [rest])
    kept = Outcomes.load(output / "predictor" / "calibration.parquet")
    assert kept.ids is not None
    failures = dict(zip(kept.ids, kept.failure.tolist(), strict=True))
    assert [failures[path] for path in awaited] == [1, 1, 1]


def test_the_same_run_again_asks_for_the_same_photos(tmp_path: Path) -> None:
    """Here fewer photos are left to fit on than are asked for at a time."""
    truth = write_photos(tmp_path / "photos", 100)
    job, output = job_on(tmp_path / "photos"), tmp_path / "out"
    triage_photos(job, output)
    asked = rows(output / "next_labels.csv")
    first_labels = {row["path"]: truth[row["path"]] for row in asked[:30]}
    label_file(tmp_path / "l.csv", first_labels)
    triage_photos(job, output, [tmp_path / "l.csv"])
    asked = rows(output / "next_labels.csv")
    assert {row["stream"] for row in asked} == {"fit"}
    triage_photos(job, output)
    assert rows(output / "next_labels.csv") == asked


def test_answers_that_were_filled_in_and_not_given_are_not_lost(tmp_path: Path) -> None:
    truth, job, output = (
        write_photos(tmp_path / "photos", 60),
        job_on(tmp_path / "photos"),
        tmp_path / "out",
    )
    triage_photos(job, output)
    asked = fill_in(output, truth, tmp_path / "filled.csv").rename(output / "next_labels.csv")
    filled = asked.read_bytes()
    with pytest.raises(UsageError, match=r"next_labels.csv holds \d+ answers that no run has read"):
        triage_photos(job, output)
    assert asked.read_bytes() == filled
    head, _, *others = filled.splitlines(keepends=True)
    (job.photos / rows(asked)[0]["path"]).unlink()  # its answer must not be lost
    asked.write_bytes(filled.replace(b"\nday", b"\n./day"))  # another spelling for the same photos
    triage_photos(job, output, [asked])
    asked.write_bytes(
        head + b"".join(others)
    )  # as after a kill before the end: the labels are in the book
    triage_photos(job, output)
    asked.write_bytes(filled)
    triage_photos(job, output, overwrite=True)
    assert not LabelBook.load(output / "labels.parquet").labels


def test_answers_that_are_filled_in_during_a_run_are_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth, job, output = (
        write_photos(tmp_path / "photos", 60),
        job_on(tmp_path / "photos"),
        tmp_path / "out",
    )
    triage_photos(job, output)
    asked = output / "next_labels.csv"
    embed_new_photos = PhotoStores.embed_new_photos

    def fill_in_meanwhile(*arguments: Any) -> int:
        fill_in(output, truth, tmp_path / "filled.csv").rename(asked)
        return embed_new_photos(*arguments)

    monkeypatch.setattr(PhotoStores, "embed_new_photos", fill_in_meanwhile)
    with pytest.raises(UsageError, match=r"next_labels.csv holds \d+ answers that no run has read"):
        triage_photos(job, output)
    monkeypatch.undo()
    n_answers = len(rows(asked))
    assert all(row["label"] for row in rows(asked))
    triage_photos(job, output, [asked])
    assert len(LabelBook.load(output / "labels.parquet").labels) == n_answers


@pytest.mark.slow
def test_answers_of_a_former_class_are_kept_by_the_former_classes(
    tmp_path: Path, changed: Callable[..., TriageSettings]
) -> None:
    job = changed()
    truth, output = write_photos(job.photos, 200), tmp_path / "out"
    fewer = changed(embedding=dataclasses.replace(job.embedding, names=job.embedding.names[:2]))
    triage_photos(job, output)
    triage_photos(job, output, [fill_in(output, truth, tmp_path / "filled.csv")])
    asked = fill_in(output, truth, tmp_path / "filled.csv").rename(output / "next_labels.csv")
    assert "car" in {row["label"] for row in rows(asked)}
    with pytest.raises(UsageError, match=r"'car' no longer exists.*with the former --classes"):
        triage_photos(fewer, output, [asked])
    triage_photos(job, output, [asked])
    triage_photos(fewer, output)
    former = LabelBook.load(output / "former_labels.parquet")
    assert set(former.labels.values()) == {"car"}


def test_photos_that_are_gone_are_asked_for_no_more(tmp_path: Path) -> None:
    truth, job, output = (
        write_photos(tmp_path / "photos", 120),
        job_on(tmp_path / "photos"),
        tmp_path / "out",
    )
    triage_photos(job, output)
    gone = [row["path"] for row in rows(output / "next_labels.csv")][:-2]
    for path in gone:
        (job.photos / path).unlink()
    triage_photos(job, output)
    asked = [row["path"] for row in rows(output / "next_labels.csv")]
    assert asked
    assert not set(asked) & set(gone)
    labels = [fill_in(output, truth, tmp_path / "filled.csv")]
    summary = triage_photos(job, output, labels)
    for path in asked:
        (job.photos / path).unlink()
    summary = triage_photos(job, output)
    assert "; 0 have a label" in summary.counts
    assert "with 0 labels" in summary.guarantee


def test_a_label_of_one_copy_is_the_label_of_the_picture(tmp_path: Path) -> None:
    """Labels are given of the copies that come later in the folder."""
    truth, job = write_photos(tmp_path / "photos", 60), job_on(tmp_path / "photos")
    (tmp_path / "labels.csv").write_text(
        "path,label\n" + "".join(f"z {path},{label}\n" for path, label in truth.items())
    )
    for path in truth:
        copy = job.photos / f"z {path}"
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(job.photos / path, copy)
    summary = triage_photos(job, tmp_path / "out", [tmp_path / "labels.csv"])
    state = read_document(tmp_path / "out" / "triage.json", TriageState)
    assert state.trial is not None
    assert 0 < state.trial.n_fit < 60
    n_for_guarantee = 60 - state.trial.n_fit
    assert f"of {n_for_guarantee} labelled answers that count are wrong" in summary.guarantee
    assert not rows(tmp_path / "out" / "next_labels.csv")


def test_the_reason_why_nothing_is_asked_is_true(tmp_path: Path) -> None:
    truth = write_photos(tmp_path / "photos", 24)
    job, output = job_on(tmp_path / "photos"), tmp_path / "out"
    none_wanted = triage_photos(dataclasses.replace(job, n_next=0), output)
    assert none_wanted.no_request_reason == "No label is asked for: -n is 0."
    triage_photos(job, output)
    no_class = dict.fromkeys(truth, OUTSIDE_NAME)
    too_few = triage_photos(job, output, [fill_in(output, no_class, tmp_path / "filled.csv")])
    assert "at least 10 labels that name a class. Add photos." in too_few.no_request_reason


def test_no_other_predictor_is_tested_while_every_photo_is_accepted(guaranteed: Folder) -> None:
    """A candidate takes over only if it accepts more, so its labels would be asked for in vain.

    The predictor accepts all photos of the calibration side.
    """
    (home, truth), output = guaranteed, guaranteed[0] / "out"
    job = job_on(home / "photos")
    triage_photos(job, output, [fill_in(output, truth, home / "filled.csv")])
    state = read_document(output / "triage.json", TriageState)
    assert state.n_fit_of_last_candidate > 0
    assert state.candidate is None
    assert state.n_tested == 1


def test_run_again_does_only_what_is_new(
    folder: Folder,
    job: TriageSettings,
    tmp_path: Path,
    fake_model: FakeBackbone,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output, gathered, labels_of = tmp_path / "out", list[LabelBook](), LabelBook.labels.fget
    monkeypatch.setattr(
        LabelBook, "labels", property(lambda book: gathered.append(book) or labels_of(book))
    )
    summary = triage_photos(job, output)
    assert len(gathered) < 20  # not once per photo
    assert summary.counts.startswith("200 photos (200 of them new)")
    n = fake_model.n_images
    files = {
        path: path.read_bytes()
        for path in output.rglob("*")
        if path.suffix in {".csv", ".npy", ".safetensors"}
    }
    assert triage_photos(job, output).counts.startswith("200 photos: ")
    assert fake_model.n_images == n
    assert {path: path.read_bytes() for path in files} == files

    write_photos(folder[0], 9, first=1000)
    (folder[0] / "day 0" / "0000.png").unlink()
    changed = folder[0] / "day 1" / "0001.png"
    changed.write_bytes(photo(0, 7777))
    os.utime(changed, ns=(time.time_ns(), time.time_ns() + 10**9))
    (folder[0] / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    summary = triage_photos(job, output)
    assert summary.counts.startswith("209 photos (11 of them new): ")
    assert fake_model.n_images == n + 10
    decided = {row["path"]: row for row in rows(output / "decisions.csv")}
    assert "day 0/0000.png" not in decided
    assert decided["broken.jpg"]["reason"] == "decode_error"
    assert decided["broken.jpg"]["decision"] == "review"
    assert "broken.jpg" in (output / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("is_killed", [False, True])
def test_a_photo_that_could_not_be_read_is_tried_again_once_it_can(
    is_killed: bool,
    folder: Folder,
    job: TriageSettings,
    tmp_path: Path,
    fake_model: FakeBackbone,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A network drive was away for a moment. The file itself is unchanged."""
    read = AllowedFolders.read

    def fails(allowed_folders: AllowedFolders, path: str) -> bytes:
        if path == "day 0/0000.png":
            raise OSError(errno.EIO, "Input/output error", path)
        return read(allowed_folders, path)

    def stops(_: object) -> torch.Tensor:
        raise KeyboardInterrupt

    def found(counts: str) -> tuple[str, str]:
        assert triage_photos(job, tmp_path / "out").counts.startswith(counts)
        row = {row["path"]: row for row in rows(tmp_path / "out" / "decisions.csv")}[
            "day 0/0000.png"
        ]
        return row["reason"], row["decision"]

    with monkeypatch.context() as away:
        away.setattr(AllowedFolders, "read", fails)
        assert found("200 photos (200 of them new)") == ("read_error", "review")
        n = fake_model.n_images
        assert found("200 photos: ") == ("read_error", "review")
    assert fake_model.n_images == n
    if is_killed:
        with monkeypatch.context() as away:
            away.setattr(fake_model, "encode_images", stops)
            with pytest.raises(KeyboardInterrupt):
                triage_photos(job, tmp_path / "out")
    assert found(f"200 photos{': ' if is_killed else ' (1 of them new)'}")[0] != "read_error"
    assert found("200 photos: ")[0] != "read_error"
    assert fake_model.n_images == n + 1


def test_a_heic_photo_is_tried_again_once_its_decoder_is_installed(
    job: TriageSettings, folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = pytest.importorskip("pillow_heif")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8))
    plugin.from_pillow(image).save(folder[0] / "new.heic")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pillow_heif", None)
        patch.setattr("vilu.triage.photos.find_spec", lambda name: None)
        triage_photos(job, tmp_path / "out")
    reasons = {row["path"]: row["reason"] for row in rows(tmp_path / "out" / "decisions.csv")}
    assert reasons["new.heic"] == "needs_pillow_heif"
    triage_photos(job, tmp_path / "out")
    reasons = {row["path"]: row["reason"] for row in rows(tmp_path / "out" / "decisions.csv")}
    assert reasons["new.heic"] != "needs_pillow_heif"


def test_an_interrupted_run_goes_on(
    folder: Folder,
    job: TriageSettings,
    tmp_path: Path,
    fake_model: FakeBackbone,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output, encode, calls = tmp_path / "out", fake_model.encode_images, []

    def stop_later(pixels: object) -> object:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return encode(pixels)

    monkeypatch.setattr(fake_model, "encode_images", stop_later)
    with pytest.raises(KeyboardInterrupt):
        triage_photos(job, output)
    assert triage_photos(job, output).counts.startswith("200 photos")
    assert PhotoStores(output / "embeddings").store_numbers() == [1]
    # a photo may be deleted between a kill and the next run
    (folder[0] / "day 0" / "0000.png").unlink()
    other = tmp_path / "other"
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        triage_photos(job, other)
    (folder[0] / "day 0" / "0002.png").unlink()
    assert triage_photos(job, other).counts.startswith("198 photos")


@pytest.mark.parametrize(
    "when", ["before the state is written", "before it is removed", "after it is removed"]
)
def test_a_triage_that_is_killed_while_a_candidate_takes_over_goes_on(
    guaranteed: Folder, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    (home, truth), output = guaranteed, guaranteed[0] / "out"
    job, asked = job_on(home / "photos"), rows(output / "next_labels.csv")
    vouching = [
        row["path"] for row in asked if row["stream"] == "calibration"
    ]  # fit labels would cause another fit
    (home / "l.csv").write_text(
        "path,label\n" + "".join(f"{path},{truth[path]}\n" for path in vouching)
    )
    labels, state = [home / "l.csv"], read_document(output / "triage.json", TriageState)
    for name in (
        "risk.json",
        "calibration.parquet",
    ):  # these files are deleted when another predictor is saved there
        (output / "predictor" / name).unlink()
    shutil.copytree(output / "predictor", output / "candidate")
    write_document(output / "triage.json", state.model_copy(update={"candidate": state.trial}))
    write, remove = run.write_document, shutil.rmtree

    def write_or_stop(path: Path, state: TriageState) -> None:
        if when == "before the state is written" and state.candidate is None:
            raise KeyboardInterrupt
        write(path, state)

    def remove_or_stop(path: Path) -> None:
        if when == "after it is removed":
            remove(path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "write_document", write_or_stop)
        patch.setattr(shutil, "rmtree", remove_or_stop)
        with pytest.raises(KeyboardInterrupt):
            triage_photos(job, output, labels)
    assert "Guaranteed: at most 10.0% wrong" in triage_photos(job, output, labels).guarantee
    assert read_document(output / "triage.json", TriageState).candidate is None


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Return the files that an interrupted and an undisturbed triage must have in common."""
    names = ("triage.json", "decisions.csv", "predictor/risk.json")
    return {name: (folder / name).read_bytes() for name in names}


@pytest.mark.parametrize(
    ("step", "is_written"),
    few([(1, True), (3, False), (1, False), (2, False), (2, True), (3, True)], 2),
)
def test_a_triage_that_is_killed_between_two_steps_ends_the_same(
    begun: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, is_written: bool
) -> None:
    """The kill comes before or after the state is written, at one of its first three writes."""
    (home, truth), job = begun, job_on(begun[0] / "photos")
    output = Path(shutil.copytree(home / "half", tmp_path / "out"))
    labels = [fill_in(output, truth, tmp_path / "filled.csv")]
    write = run.write_document
    n_writes = 0

    def write_and_stop(path: Path, state: TriageState) -> None:
        nonlocal n_writes
        n_writes += 1
        if n_writes != step or is_written:
            write(path, state)
        if n_writes == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "write_document", write_and_stop)
        with pytest.raises(KeyboardInterrupt):
            triage_photos(job, output, labels)
    assert "Guaranteed: at most 10.0% wrong" in triage_photos(job, output, labels).guarantee
    resumed = bytes_of(output)
    undisturbed = Path(shutil.copytree(home / "out", tmp_path / "undisturbed"))
    first = bytes_of(undisturbed)
    triage_photos(job, undisturbed, labels)
    if bytes_of(undisturbed) == first:  # the run raised no limit, so the next run has none to test
        assert resumed == first
    # On some processors it raises one. So both are run until nothing changes.
    for folder in (undisturbed, output):
        for _ in range(3):
            triage_photos(job, folder, labels)
    assert bytes_of(output) == bytes_of(undisturbed)
    paths = [row["path"] for row in rows(output / "next_labels.csv")]
    assert paths == [row["path"] for row in rows(undisturbed / "next_labels.csv")]


@pytest.mark.parametrize("is_counted", [True, False])
def test_a_guarantee_does_not_outlive_the_labels_that_it_rests_on(
    guaranteed: Folder, caplog: pytest.LogCaptureFixture, is_counted: bool
) -> None:
    (home, truth), output = guaranteed, guaranteed[0] / "out"
    ids = set(pq.read_table(output / "predictor" / "calibration.parquet")["key"].to_pylist())
    some = [
        path
        for path in LabelBook.load(output / "labels.parquet").labels
        if (path in ids) is is_counted
    ][:45]
    wrong = {path: "cat" if truth[path] != "cat" else "dog" for path in some}
    (home / "l.csv").write_text(
        "path,label\n" + "".join(f"{path},{name}\n" for path, name in wrong.items())
    )
    summary = triage_photos(job_on(home / "photos"), output, [home / "l.csv"])
    assert summary.guarantee.startswith("Not guaranteed yet" if is_counted else "Guaranteed")
    assert (": accepted 0 of" in summary.counts) is is_counted
    assert ("45 labels behind the guarantee have changed" in caplog.text) is is_counted
    assert (
        "at whatever moment one looks" in (output / "predictor" / "README.md").read_text("utf-8")
    ) is not is_counted


@pytest.mark.parametrize("n", [1, None])
def test_a_guarantee_holds_without_photos_of_the_calibration_side(
    guaranteed: Folder, n: int | None
) -> None:
    """A guarantee still decides about one new photo, or about all photos on the fit side."""
    (home, _), output = guaranteed, guaranteed[0] / "out"
    if n is not None:
        shutil.rmtree(home / "photos")
        write_photos(home / "photos", 20, first=1000)
    files = sorted((home / "photos").rglob("*.png"))
    vouches, _ = sides_and_positions(
        [hashlib.sha256(path.read_bytes()).digest()[:8] for path in files], 0
    )
    kept = [path for path, may in zip(files, vouches, strict=True) if not may][:n]
    for path in set(files) - set(kept):
        path.unlink()
    summary = triage_photos(job_on(home / "photos"), output)
    assert summary.counts.startswith(plural(len(kept), "photo"))
    assert summary.guarantee.startswith("Guaranteed: at most 10.0% wrong")
    assert n or sum(row["decision"] == "accept" for row in rows(output / "decisions.csv")) > 20
    assert n or "<td>yes</td></tr>" in (output / "report.html").read_text(encoding="utf-8")


def test_the_label_of_a_photo_that_has_changed_never_counts(
    folder: Folder, job: TriageSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A tag that is written into a photo changes its bytes, which may move it to the other side.

    If the label still counted, a row that was fitted on would count for the guarantee.
    """
    (tmp_path / "l.csv").write_text(
        "path,label\n" + "".join(f"{path},{name}\n" for path, name in folder[1].items())
    )
    output = tmp_path / "out"
    triage_photos(job, output, [tmp_path / "l.csv"])
    files = sorted(folder[0].rglob("*.png"))
    pictures = [hashlib.sha256(path.read_bytes()).digest()[:8] for path in files]
    taught = [
        path
        for path, may in zip(files, sides_and_positions(pictures, 0)[0], strict=True)
        if not may
    ]
    for path in taught:
        path.write_bytes(path.read_bytes() + b"tag")
    triage_photos(job, output, [tmp_path / "l.csv"])
    counted = pq.read_table(output / "predictor" / "calibration.parquet")["key"].to_pylist()
    assert counted
    assert not set(counted) & {path.relative_to(folder[0]).as_posix() for path in taught}
    assert f"{len(taught)} photos have changed since their labels were given" in caplog.text
    other = "cat" if folder[1]["day 0/0000.png"] != "cat" else "dog"
    book = LabelBook.load(output / "labels.parquet")
    book.note_labels({"day 0/0000.png": other})  # a new label belongs to the new picture
    assert book.note_pictures({"day 0/0000.png": b"now"}) == 0


def test_another_model_is_refused_before_embedding_the_first_goes_on(
    job: TriageSettings, folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    triage_photos(job, tmp_path / "out")
    write_photos(folder[0], 3, 200)
    other = FakeBackbone(preprocess="9x9")
    with monkeypatch.context() as patch:
        patch.setattr(BackboneSpec, "load", lambda self: other)
        with pytest.raises(ProvenanceError, match="the model of this run"):
            triage_photos(job, tmp_path / "out")
    assert not other.batches
    assert triage_photos(job, tmp_path / "out").counts.startswith("203 photos")


def test_photos_that_are_decoded_otherwise_are_embedded_once_more(
    guaranteed: Folder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The labels stay, and they give the guarantee again."""
    home, truth = guaranteed
    job = job_on(home / "photos")
    labels = LabelBook.load(home / "out" / "labels.parquet").labels
    in_full = dataclasses.replace(job.embedding.backbone, full_decode=True)
    job = dataclasses.replace(job, embedding=dataclasses.replace(job.embedding, backbone=in_full))
    model = FakeBackbone()
    monkeypatch.setattr(BackboneSpec, "load", lambda self: model)
    triage_photos(job, home / "out")
    assert model.n_images == len(truth)
    assert "full_decode False, now True" in caplog.text
    assert "All photos are embedded again" in caplog.text
    assert labels.items() <= LabelBook.load(home / "out" / "labels.parquet").labels.items()
    for _ in range(3):
        if any(row["decision"] == "accept" for row in rows(home / "out" / "decisions.csv")):
            break
        triage_photos(job, home / "out", [fill_in(home / "out", truth, home / "again.csv")])
    assert any(row["decision"] == "accept" for row in rows(home / "out" / "decisions.csv"))
    assert model.n_images == len(truth)


def test_a_store_that_was_begun_with_full_decoding_is_embedded_once_more(
    job: TriageSettings, folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(FakeBackbone):
        def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
            raise KeyboardInterrupt

    monkeypatch.setattr(BackboneSpec, "load", lambda self: Stopped())
    in_full = dataclasses.replace(job.embedding.backbone, full_decode=True)
    embedding = dataclasses.replace(job.embedding, backbone=in_full)
    with pytest.raises(KeyboardInterrupt):
        triage_photos(dataclasses.replace(job, embedding=embedding), tmp_path / "out")
    model = FakeBackbone()
    model.space = model.space.with_reduced_jpegs
    monkeypatch.setattr(BackboneSpec, "load", lambda self: model)
    assert triage_photos(job, tmp_path / "out").counts.startswith("200 photos")


def test_a_run_that_ends_while_another_lists_its_photos_is_not_forgotten(
    job: TriageSettings,
    changed: Callable[..., TriageSettings],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output, locked = tmp_path / "out", outputs.locked

    @contextlib.contextmanager
    def late(*args: Any, **settings: Any) -> Iterator[None]:
        monkeypatch.setattr(outputs, "locked", locked)
        triage_photos(job, output)
        with locked(*args, **settings):
            yield

    monkeypatch.setattr(outputs, "locked", late)
    with pytest.raises(UsageError, match=r"begun with the seed 0, now 1"):
        triage_photos(changed(seed=1), output)
    assert read_document(output / "triage.json", TriageState).settings == job.recorded_settings


def test_a_state_of_another_schema_is_refused_and_its_book_goes_on(tmp_path: Path) -> None:
    truth = write_photos(tmp_path / "photos", 60)
    job, output = job_on(tmp_path / "photos"), tmp_path / "out"
    triage_photos(job, output)
    triage_photos(job, output, [fill_in(output, truth, tmp_path / "filled.csv")])
    state = json.loads((output / "triage.json").read_text())
    write_json(output / "triage.json", {**state, "schema_version": 0})
    with pytest.raises(ProvenanceError, match=r"triage.json .*schema 0.* --labels"):
        triage_photos(job, output)
    book = LabelBook.load(output / "labels.parquet")
    triage_photos(job, tmp_path / "new", [output / "labels.parquet"])
    new_book = LabelBook.load(tmp_path / "new" / "labels.parquet")
    assert new_book.labels == book.labels
    # another folder's draw met these labels, and no draw in this folder has met them
    assert {entry.stream for entry in new_book if entry.label is not None} == {"fit"}


def test_what_is_not_ours_is_never_touched(
    folder: Folder, job: TriageSettings, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.docx").write_text("two years of work")
    for overwrite in (False, True):
        for place, name in ((output, "thesis.docx"), (folder[0], "day 0")):
            with pytest.raises(UsageError, match=f"'{name}', which is no part of vilu's triage"):
                triage_photos(job, place, overwrite=overwrite)


def test_an_output_among_the_photos_is_no_photo(folder: Folder, job: TriageSettings) -> None:
    output = folder[0] / "result"
    triage_photos(job, output, sort="link")
    assert triage_photos(job, output, sort="link").counts.startswith("200 photos: ")


def test_pictures_of_no_class_are_wrong_answers(
    folder: Folder, changed: Callable[..., TriageSettings], tmp_path: Path
) -> None:
    labels = tmp_path / "l.csv"
    names = list(folder[1])
    labels.write_text(
        "path,label\n" + "".join(f"{path},other\n" for path in names[:40]), encoding="utf-8"
    )
    with pytest.raises(DataError, match=r"'other' .* is none of the 3 classes"):
        triage_photos(changed(), tmp_path / "out", [labels])
    triage_photos(changed(outside=("other",)), tmp_path / "out", [labels])
    decided = {row["path"]: row for row in rows(tmp_path / "out" / "decisions.csv")}
    assert {decided[path]["answer"] for path in names[:40]} == {"other"}
    labels.write_text(f"path,label\n{names[50]},(outside)\n", encoding="utf-8")
    triage_photos(changed(outside=("other",)), tmp_path / "out", [labels], sort="link")
    decided = {row["path"]: row for row in rows(tmp_path / "out" / "decisions.csv")}
    assert decided[names[50]]["answer"] == "(outside)"
    placed = {path.name for path in (tmp_path / "out" / "sorted" / "outside").iterdir()}
    assert {path.replace("/", "__") for path in (*names[:40], names[50])} <= placed


@pytest.mark.parametrize("word", [OUTSIDE_NAME, SKIPPED])
def test_a_class_that_is_called_as_a_word_of_the_labels_is_refused(
    word: str, tmp_path: Path
) -> None:
    """Otherwise labels with this class name would mean "no class" or "skipped"."""
    job = job_on(tmp_path)
    embedding = dataclasses.replace(job.embedding, names=("cat", word))
    job = dataclasses.replace(job, embedding=embedding)
    with pytest.raises(
        UsageError,
        match="is the name of a class, and also the label of photos that are of no class",
    ):
        triage_photos(job, tmp_path / "out")


def test_two_photos_that_older_code_took_for_one_part_again(tmp_path: Path) -> None:
    """Older code moved only the first photo, but recorded its new path for both."""
    write_photos(tmp_path / "photos", 30)
    other = tmp_path / "photos" / "day 0__0000.png"
    job, output = job_on(tmp_path / "photos"), tmp_path / "out"
    triage_photos(job, output, sort="move")
    note = pq.read_table(output / "moved.parquet").to_pydict()
    columns = {
        "path": [*note["path"], other.name],
        "place": [*note["place"], "sorted/review/day 0__0000.png"],
    }
    write_table(
        output / "moved.parquet",
        {name: pa.array(found) for name, found in columns.items()},
        {"kind": "moved"},
    )
    other.write_bytes(photo(1, 5000))
    with pytest.raises(DataError, match="Rename the new photo"):
        triage_photos(job, output)
    other.rename(other.with_name("new.png"))
    for _ in range(2):
        triage_photos(job, output, sort="move")
    assert triage_photos(job, output).counts.startswith("31 photos: ")
    assert len({path.read_bytes() for path in (output / "sorted").rglob("*.png")}) == 31


def test_what_the_page_needs_is_missed_before_anything_slow(
    tmp_path: Path, fake_model: FakeBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_template.cache_clear()
    write_photos(tmp_path / "photos", 5)
    n = fake_model.n_images
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingModelError, match=r"vilu\[report\]"):
        triage_photos(job_on(tmp_path / "photos"), tmp_path / "out")
    assert fake_model.n_images == n

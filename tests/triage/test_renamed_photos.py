"""Test that labels go with their pictures when photos are renamed, swapped or copied."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.builders.photo_folders import photo, write_photos
from tests.triage.conftest import Folder, fill_in, job_on, label_file, rows
from vilu.calibration.calibration import Calibration
from vilu.errors import DataError
from vilu.triage.labels import LabelBook, read_labels
from vilu.triage.outputs import triage_photos
from vilu.triage.photos import PhotoStores
from vilu.triage.run import run_triage
from vilu.triage.sorting import list_folder
from vilu.triage.state import GuaranteePopulation, TriageSettings


def stop(*_: object) -> None:
    raise KeyboardInterrupt


def answered_table(
    truth: dict[str, str], job: TriageSettings, output: Path
) -> tuple[Path, dict[str, str]]:
    """Run a triage, fill in its table, and return the table and its answers by path."""
    triage_photos(job, output)
    table = output / "next_labels.csv"
    answers, _ = read_labels(fill_in(output, truth, table))
    return table, dict(answers)


def test_labels_go_with_their_pictures_to_new_paths(
    folder: Folder, job: TriageSettings, tmp_path: Path
) -> None:
    photos, truth = folder
    label_file(tmp_path / "l.csv", truth)
    output = tmp_path / "out"
    before = triage_photos(job, output, [tmp_path / "l.csv"])
    (photos / "day 0").rename(photos / "sunday")
    first, second = photos / "day 1" / "0001.png", photos / "day 1" / "0005.png"
    first.rename(photos / "third.png")
    second.rename(first)
    (photos / "third.png").rename(second)
    after = triage_photos(job, output)
    now = {path.replace("day 0", "sunday"): label for path, label in truth.items()}
    one, other = "day 1/0001.png", "day 1/0005.png"
    assert truth[one] != truth[other]
    now[one], now[other] = truth[other], truth[one]
    assert LabelBook.load(output / "labels.parquet").labels == now
    assert "; 200 have a label" in after.counts
    assert after.guarantee == before.guarantee
    triage_photos(job, tmp_path / "new", [output / "labels.parquet"])
    assert LabelBook.load(tmp_path / "new" / "labels.parquet").labels == now


@pytest.mark.slow
def test_a_book_gives_labels_to_its_pictures_alone(
    folder: Folder, job: TriageSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    photos, truth = folder
    label_file(tmp_path / "l.csv", truth)
    triage_photos(job, tmp_path / "old", [tmp_path / "l.csv"])
    book = tmp_path / "old" / "labels.parquet"
    (photos / "day 0").rename(photos / "sunday")
    shutil.copy(photos / "sunday" / "0000.png", photos / "copy.png")
    (photos / "day 1" / "0001.png").write_bytes(photo(4, 7000))
    (photos / "day 1" / "0003.png").unlink()
    triage_photos(job, tmp_path / "new", [book])
    expected = {path.replace("day 0", "sunday"): label for path, label in truth.items()}
    expected["copy.png"] = expected.pop("sunday/0000.png")  # the first of the two copies
    del expected["day 1/0001.png"]
    del expected["day 1/0003.png"]
    assert LabelBook.load(tmp_path / "new" / "labels.parquet").labels == expected
    assert "2 labels left out, since no readable photo in" in caplog.text
    write_photos(tmp_path / "others", 20, first=500)
    with pytest.raises(DataError, match=r"200 labels left out, .* has the picture"):
        triage_photos(job_on(tmp_path / "others"), tmp_path / "other", [book])


def test_answers_in_the_book_are_not_lost_by_a_rename(
    folder: Folder, job: TriageSettings, tmp_path: Path
) -> None:
    (photos, truth), output = folder, tmp_path / "out"
    _, answers = answered_table(truth, job, output)
    # A run that was killed has saved the answers, but has not written the table again.
    book = LabelBook.load(output / "labels.parquet")
    book.note_labels(answers)
    book.note_pictures(dict(PhotoStores(output / "embeddings").seen_pictures()))
    book.save(output / "labels.parquet")
    (photos / "day 0").rename(photos / "sunday")
    triage_photos(job, output)
    expected = {path.replace("day 0", "sunday"): label for path, label in answers.items()}
    assert LabelBook.load(output / "labels.parquet").labels == expected


def test_answers_count_though_some_photos_were_renamed(
    folder: Folder, job: TriageSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (photos, truth), output = folder, tmp_path / "out"
    table, answers = answered_table(truth, job, output)
    (photos / "day 0").rename(photos / "sunday")
    triage_photos(job, output, [table])
    expected = {path.replace("day 0", "sunday"): label for path, label in answers.items()}
    assert LabelBook.load(output / "labels.parquet").labels == expected
    assert "left out" not in caplog.text


def test_answers_about_renamed_photos_are_read_after_a_killed_run(
    folder: Folder, job: TriageSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (photos, truth), output = folder, tmp_path / "out"
    table, answers = answered_table(truth, job, output)
    expected = {}
    for path, label in truth.items():
        (photos / path).rename(photos / path.replace("/", " "))
        if path in answers:
            expected[path.replace("/", " ")] = label
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vilu.triage.run.advance", stop)
        with pytest.raises(KeyboardInterrupt):
            triage_photos(job, output, [table])
    shutil.copytree(output, tmp_path / "without")
    triage_photos(job, tmp_path / "without")
    triage_photos(job, output, [table])
    for folder_of_triage in (output, tmp_path / "without"):
        assert LabelBook.load(folder_of_triage / "labels.parquet").labels == expected
    assert "left out" not in caplog.text


def test_answers_to_renamed_photos_are_named_if_the_book_is_removed(
    folder: Folder, job: TriageSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    photos, truth = folder
    output = tmp_path / "out"
    triage_photos(job, output)
    filled_in = fill_in(output, truth, tmp_path / "filled_in.csv")
    answers, _ = read_labels(filled_in)
    (photos / "day 0").rename(photos / "sunday")
    triage_photos(job, output, [filled_in], overwrite=True)
    expected = {path: label for path, label in answers.items() if path.startswith("day 1/")}
    assert 0 < len(expected) < len(answers)
    assert LabelBook.load(output / "labels.parquet").labels == expected
    assert f"{len(answers) - len(expected)} labels left out, since no photo in" in caplog.text


def test_a_guarantee_does_not_outlive_labels_of_renamed_photos(guaranteed: Folder) -> None:
    (home, truth), output = guaranteed, guaranteed[0] / "out"
    counted = pq.read_table(output / "predictor" / "calibration.parquet")["key"].to_pylist()
    (home / "photos" / "day 0").rename(home / "photos" / "sunday")
    assert triage_photos(job_on(home / "photos"), output).guarantee.startswith("Guaranteed")
    wrong = {}
    for path in counted:
        if path.startswith("day 0"):
            wrong[path.replace("day 0", "sunday")] = "cat" if truth[path] != "cat" else "dog"
    assert len(wrong) > 20
    label_file(home / "l.csv", wrong)
    summary = triage_photos(job_on(home / "photos"), output, [home / "l.csv"])
    assert summary.guarantee.startswith("Not guaranteed yet")


@pytest.mark.parametrize("about", ["new", "folder"])
def test_a_label_of_a_copy_is_none_of_the_photo_that_replaced_it(
    folder: Folder, job: TriageSettings, tmp_path: Path, about: GuaranteePopulation
) -> None:
    photos, truth = folder
    first, other, output = "day 0/0000.png", "day 1/0001.png", tmp_path / "out"
    shutil.copy(photos / first, photos / "copy.png")
    label_file(tmp_path / "l.csv", dict.fromkeys([first, "copy.png"], truth[first]))
    job = replace(job, about=about)
    triage_photos(job, output, [tmp_path / "l.csv"])
    shutil.copy(photos / other, photos / "copy.png")
    assert "; 1 has a label" in triage_photos(job, output).counts
    decisions = {row["path"]: row["decision"] for row in rows(output / "decisions.csv")}
    assert [path for path in decisions if decisions[path] == "labelled"] == [first]


def test_a_guarantee_goes_if_the_label_of_another_copy_counts(
    guaranteed: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    (home, truth), output = guaranteed, guaranteed[0] / "out"
    job = job_on(home / "photos")
    counted = pq.read_table(output / "predictor" / "calibration.parquet")["key"].to_pylist()
    path = counted[0]
    shutil.copy(home / "photos" / path, home / "photos" / "copy.png")
    label_file(home / "l.csv", {"copy.png": "cat" if truth[path] != "cat" else "dog"})
    assert triage_photos(job, output, [home / "l.csv"]).guarantee.startswith("Guaranteed")
    (home / "photos" / path).rename(home / "photos" / "renamed.png")
    (home / "photos" / "copy.png").rename(home / "photos" / "another.png")
    triage_photos(job, output)
    assert "1 labels behind the guarantee have changed" in caplog.text


def test_what_a_guarantee_rests_on_is_shown_though_photos_were_renamed(
    guaranteed: Folder,
) -> None:
    home, output = guaranteed[0], guaranteed[0] / "out"
    job = job_on(home / "photos")
    (job.photos / "day 0").rename(job.photos / "third day")
    (job.photos / "day 1").rename(job.photos / "sunday")
    (job.photos / "day 0").mkdir()
    for path in (job.photos / "third day").iterdir():
        number = int(path.stem) + 2  # so most of the paths had another picture before
        path.rename(job.photos / "day 0" / f"{number:04}.png")
    write_photos(job.photos, 300, 1000)
    photo_folder = list_folder(job.photos, output, follow_links=False)
    result = run_triage(output, job, photo_folder, [])
    calibration = Calibration.find(output / "predictor")
    assert result.progress is not None
    assert calibration is not None
    assert calibration.rows.picture is not None
    pictures = result.photos.picture_identities(result.progress.counted_rows)
    assert pictures.tolist() == calibration.rows.picture.tolist()

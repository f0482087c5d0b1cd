"""Test the demo's folder: the written files, and the count of accepted answers."""

from __future__ import annotations

import csv
from importlib import resources
from pathlib import Path

import pytest

from vilu.cli.demo import N_PHOTOS_TO_SORT, SORTED_CLASSES, write_folder_to_sort
from vilu.cli.demo_command import accepted_in_words, write_asked_labels
from vilu.triage.labels import SKIPPED


def labels_of(path: Path) -> dict[str, str]:
    with path.open(encoding="utf-8", newline="") as file:
        return {row["path"]: row["label"] for row in csv.DictReader(file)}


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    """Return a demo whose triage asks for a demo photo and for a photo that somebody has added."""
    (tmp_path / "triage").mkdir()
    (tmp_path / "labels.csv").write_text("path,label\na.jpg,shoe\nb.jpg,dress\nc.jpg,shoe\n")
    (tmp_path / "triage/next_labels.csv").write_text("path,label\nb.jpg,\nmine.jpg,\n")
    return tmp_path


def test_the_labels_that_are_asked_for_are_given(asked: Path) -> None:
    given = write_asked_labels(asked, "given.csv")
    assert labels_of(given) == {"b.jpg": "dress", "mine.jpg": SKIPPED}


def test_accepted_answers_are_judged_by_the_labels_of_the_data(asked: Path) -> None:
    (asked / "triage/decisions.csv").write_text(
        "path,answer,decision\na.jpg,shoe,accept\nb.jpg,dress,labelled\n"
        "c.jpg,dress,accept\nmine.jpg,dress,accept\n"
    )
    assert "Of the 2 accepted answers 1 are wrong" in accepted_in_words(asked)


def test_another_seed_leaves_no_photo_of_the_one_before(tmp_path: Path) -> None:
    table = resources.files("vilu").joinpath("assets", "clothing.parquet")
    with resources.as_file(table) as photos:
        write_folder_to_sort(photos, tmp_path, seed=0)
        first = labels_of(tmp_path / "labels.csv")
        (tmp_path / "photos/mine.jpg").write_bytes(b"a photo of the user")
        write_folder_to_sort(photos, tmp_path, seed=1)
    second = labels_of(tmp_path / "labels.csv")
    assert len(second) == N_PHOTOS_TO_SORT
    assert set(second.values()) == set(SORTED_CLASSES)
    assert first != second
    names = {path.name for path in (tmp_path / "photos").iterdir()}
    assert names == {*second, "mine.jpg"}

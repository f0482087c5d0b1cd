r"""Test photos with any file name.

Two names stay two photos in every table, and no name sends control codes to a terminal. Tables
hold ``portable_name`` of the path. A byte that is not UTF-8 becomes ``\xff``, and a name with
these four characters becomes ``\x5cxff``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from tests.builders.photo_folders import photo, write_photos
from tests.builders.store_fakes import NAMES
from tests.command import run
from tests.triage.conftest import rows
from vilu.artifacts.tables import csv_bytes
from vilu.datasets.catalog import open_dataset
from vilu.datasets.files import original_path, portable_name, text_of_version_0_1
from vilu.errors import DataError
from vilu.outcomes.outcomes import Outcomes
from vilu.triage.label_files import label_columns, write_labels
from vilu.triage.labels import Entry, LabelBook
from vilu.triage.review import open_review
from vilu.triage.review_files import read_finished_tasks, write_review
from vilu.triage.serve import ReviewSession

BYTE = os.fsdecode(b"byte\xff.png")
LITERAL = r"byte\xff.png"
ESCAPE = "red\x1b[31m\n.png"
BIDI = "\u202egnp.exe.png"
TEXTS = {
    BYTE: r"byte\xff.png",
    LITERAL: r"byte\x5cxff.png",
    ESCAPE: r"red\x1b[31m\x0a.png",
    BIDI: r"\xe2\x80\xaegnp.exe.png",
    r"day\1.png": r"day\1.png",
    r"a\x41.png": r"a\x5cx41.png",
    "caf\u00e9 \U0001f408.png": "caf\u00e9 \U0001f408.png",
}
"""File names and their texts in tables."""

OBEYED = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""Characters that a terminal obeys, without the line ends that every table has."""

TRIAGE = ("triage", "photos", "--classes", "names.txt", "-o", "out", "-n", 30)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Write twenty photos, and one photo under every odd name."""
    write_photos(tmp_path / "photos", 20)
    for number, name in enumerate(TEXTS):
        (tmp_path / "photos" / name).write_bytes(photo(number, 1000))
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    return tmp_path


def labels_of(names: Mapping[str, str], to: Path) -> Path:
    to.write_bytes(csv_bytes(label_columns(names, {})))
    return to


def decided(work: Path) -> dict[str, tuple[str, str]]:
    return {
        row["path"]: (row["decision"], row["answer"])
        for row in rows(work / "out" / "decisions.csv")
    }


def test_a_text_for_every_name_and_the_name_again() -> None:
    assert {name: portable_name(name) for name in TEXTS} == TEXTS
    assert {original_path(text): text for text in TEXTS.values()} == TEXTS
    assert original_path(r"a\x41.png") == r"a\x41.png"  # no escape of ours: "A" needs none
    assert portable_name("half \ud83d.png") == r"half \xed\xa0\xbd.png"


def test_every_photo_has_its_own_label_and_is_moved(work: Path) -> None:
    names = {text: NAMES[number % 3] for number, text in enumerate(TEXTS.values())}
    labels = labels_of(names, work / "l.csv")
    done = run(*TRIAGE, "--labels", labels, cwd=work)
    assert "is taken for the photo with this text in decisions.csv" in done.stderr
    assert {path: decided(work)[path] for path in names} == {
        path: ("labelled", label) for path, label in names.items()
    }
    assert not OBEYED.search((work / "out" / "decisions.csv").read_text())
    assert not OBEYED.search((work / "out" / "next_labels.csv").read_text())
    done = run(*TRIAGE, "--move", cwd=work)
    assert "27 photos: " in done.stderr
    for number, name in enumerate(TEXTS):
        assert not (work / "photos" / name).exists()
        (place,) = (work / "out" / "sorted" / "accepted" / NAMES[number % 3]).glob(
            f"*{TEXTS[name].replace('[', '[[]')}"
        )
        assert place.read_bytes() == photo(number, 1000)
    done = run(*TRIAGE, "--move", cwd=work)
    assert "27 photos: " in done.stderr
    assert decided(work)[TEXTS[LITERAL]] == ("labelled", NAMES[1])


@pytest.mark.parametrize("name", [ESCAPE, BIDI, r"day\1.png", r"a\x41.png"])
@pytest.mark.parametrize("below", [True, False])
def test_a_label_by_the_name_of_the_file_is_of_that_photo(
    work: Path, name: str, below: bool
) -> None:
    path = name if below else str(work / "photos" / name)
    labels_of({path: "dog"}, work / "l.csv")
    run(*TRIAGE, "--labels", "l.csv", cwd=work)
    assert decided(work)[TEXTS[name]] == ("labelled", "dog")


def test_a_name_with_a_backslash_is_matched_where_no_other_photo_is_meant(work: Path) -> None:
    (work / "photos" / BYTE).unlink()
    labels_of({LITERAL: "dog"}, work / "l.csv")
    run(*TRIAGE, "--labels", "l.csv", cwd=work)
    assert decided(work)[TEXTS[LITERAL]] == ("labelled", "dog")


def test_labels_that_older_code_kept_under_raw_names_are_read(work: Path) -> None:
    run(*TRIAGE, cwd=work)
    (work / "photos" / BYTE).unlink()
    book = LabelBook()
    for name in (LITERAL, ESCAPE, BIDI, r"a\x41.png"):
        path = text_of_version_0_1(TEXTS[name])
        assert path == name
        book.entries[path] = replace(Entry(path, None, "given"), label="car")
    book.save(work / "out" / "labels.parquet")
    run(*TRIAGE, cwd=work)
    for name in (LITERAL, ESCAPE, BIDI, r"a\x41.png"):
        assert decided(work)[TEXTS[name]] == ("labelled", "car")


def test_the_page_and_the_tools_find_the_photo_of_every_name(work: Path) -> None:
    run(*TRIAGE, cwd=work)
    review = open_review(work / "out", "all")
    session = ReviewSession(review, work / "l.csv")
    places = {task.path: place for place, task in enumerate(review.tasks)}
    for text in TEXTS.values():
        assert session.webp_photo(places[text])
    files = write_review(review, "label-studio", work / "tasks.json", prefix="/?d=")
    tasks = json.loads(files[0].read_text())
    for task in tasks:
        del task["data"]["path"]  # so that only the address says which photo it is
        choice = {"type": "choices", "value": {"choices": ["cat"]}}
        task["annotations"] = [{"result": [choice]}]
    (work / "done.json").write_text(json.dumps(tasks))
    assert set(read_finished_tasks(work / "done.json")[0]) == set(places)
    _, samples = write_review(review, "fiftyone", work / "samples")
    paths = {one["path"]: one["filepath"] for one in json.loads(samples.read_text())["samples"]}
    for name, text in TEXTS.items():
        assert paths[text] == (text if name == BYTE else name)


def test_labels_for_scores_are_matched_by_text_or_name(work: Path) -> None:
    run(*TRIAGE, cwd=work)
    scores = work / "out" / "decisions.parquet"
    labels = {BIDI: "cat", TEXTS[LITERAL]: "dog", TEXTS[BYTE]: "car"}
    assert write_labels(labels, work / "late.parquet", scores) == 3
    late = Outcomes.load(work / "late.parquet")
    assert late.ids is not None
    assert late.target is not None
    assert dict(zip(late.ids, late.target.tolist(), strict=True)) == {
        TEXTS[BIDI]: NAMES.index("cat"),
        TEXTS[LITERAL]: NAMES.index("dog"),
        TEXTS[BYTE]: NAMES.index("car"),
    }
    labels = {BIDI: "cat", TEXTS[BIDI]: "dog"}
    with pytest.raises(DataError, match="has the labels 'cat' and 'dog'"):
        write_labels(labels, work / "both.parquet", scores)


def test_class_names_reach_tables_and_tools_as_text_and_come_back(work: Path) -> None:
    red = "red\x1b[31m cat"
    classes = (red, r"b\x41d dog", "car")
    texts = (r"red\x1b[31m cat", r"b\x5cx41d dog", "car")
    (work / "names.txt").write_text("\n".join(classes))
    run(*TRIAGE, cwd=work)
    for name in ("decisions.csv", "next_labels.csv"):
        assert not OBEYED.search((work / "out" / name).read_text())
    assert {answer for _, answer in decided(work).values()} <= {*texts, ""}
    review = open_review(work / "out", "all")
    assert review.names[:3] == texts
    _, page = write_review(review, "label-studio", work / "tasks.json")
    for text in texts:
        assert f'<Choice value="{text}"' in page.read_text()
    answers = {task.path: texts[number % 3] for number, task in enumerate(review.tasks)}
    labels_of(answers, work / "l.csv")
    run(*TRIAGE, "--labels", "l.csv", cwd=work)
    assert decided(work) == {path: ("labelled", text) for path, text in answers.items()}
    scores = work / "out" / "decisions.parquet"
    assert write_labels(answers, work / "late.parquet", scores) == len(answers)
    late = Outcomes.load(work / "late.parquet")
    assert sorted(set(late.target.tolist())) == [0, 1, 2]


def test_keys_of_a_table_are_texts_of_its_paths(work: Path) -> None:
    names = [ESCAPE, r"day\1.png", r"a\x41.png"]
    (work / "photos" / "t.csv").write_bytes(csv_bytes(label_columns(dict.fromkeys(names, "x"), {})))
    dataset = open_dataset(work / "photos" / "t.csv")
    records = list(dataset.records(0, len(dataset)))
    assert {record.key for record in records} == {TEXTS[name] for name in names}
    for record in records:
        assert record.read() == (work / "photos" / original_path(record.key)).read_bytes()


@pytest.mark.parametrize("how", ["--link", "--move"])
def test_a_name_whose_text_is_too_long_for_a_file_is_sorted(work: Path, how: str) -> None:
    name = "\x1b" * 200 + ".png"
    (work / "photos" / name).write_bytes(photo(1, 2000))
    for _ in range(2):
        done = run(*TRIAGE, how, cwd=work)
        assert "28 photos" in done.stderr
    contents = [path.read_bytes() for path in (work / "out" / "sorted").rglob("*.png")]
    assert len(contents) == 28
    assert photo(1, 2000) in contents


@pytest.mark.parametrize("how", ["--link", "--move"])
def test_links_in_a_circle_are_bad_photos_and_the_run_goes_on(work: Path, how: str) -> None:
    photos = work / "photos"
    (photos / "loop.png").symlink_to("loop.png")
    (photos / "there.png").symlink_to("back.png")
    (photos / "back.png").symlink_to("there.png")
    (photos / "circle").symlink_to("circle")
    (photos / "around").symlink_to(".")
    for _ in range(2):
        done = run(*TRIAGE, how, cwd=work)
        assert "30 photos" in done.stderr
        assert "3 unreadable" in done.stderr
    bad = [row for row in rows(work / "out" / "decisions.csv") if row["reason"] == "read_error"]
    assert {row["path"] for row in bad} == {"back.png", "loop.png", "there.png"}
    assert {row["decision"] for row in bad} == {"review"}
    assert (photos / "loop.png").readlink() == Path("loop.png")

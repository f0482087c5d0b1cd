"""Test the book of labels, the files that labels come in, and the fit and calibration sides."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vilu.artifacts.tables import csv_bytes, write_table
from vilu.errors import DataError, UsageError
from vilu.triage.label_files import label_columns
from vilu.triage.labels import (
    SKIPPED,
    Entry,
    LabelBook,
    match_photos,
    names_of_labels,
    read_labels,
    sides_and_positions,
)


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_book_keeps_what_was_asked_and_why(tmp_path: Path) -> None:
    book = LabelBook()
    book.request_labels(["a", "b"], "calibration", predictor="p1", probability=0.25)
    book.request_labels(["c"], "fit", predictor="p1")
    assert book.note_labels({"a": "cat", "c": "dog", "d": "cat", "e": "cat"}, {"e": "fit"}) == 4
    assert book.note_labels({"a": "cat"}) == 0
    assert book.note_labels({"a": "dog"}) == 1
    book.save(tmp_path / "book.parquet")
    found = LabelBook.load(tmp_path / "book.parquet")
    assert {one.path: (one.label, one.stream) for one in found} == {
        "a": ("dog", "calibration"),
        "b": (None, "calibration"),
        "c": ("dog", "fit"),
        "d": ("cat", "given"),
        "e": ("cat", "fit"),
    }
    assert found.entries["b"].probability == 0.25
    assert math.isnan(found.entries["c"].probability)
    assert found.entries["d"].asked == 0 < found.entries["d"].answered
    assert [one.path for one in found.waiting_entries()] == ["b"]
    found.withdraw_requests(lambda one: one.predictor == "p1")
    assert "b" not in found.entries
    assert "a" in found.entries  # "a" has a label
    assert len(LabelBook.load(tmp_path / "none.parquet")) == 0


def test_a_book_of_older_code_says_nothing_of_pictures(tmp_path: Path) -> None:
    book = LabelBook()
    book.note_labels({"a": "cat"})
    book.save(tmp_path / "book.parquet")
    table = pq.read_table(tmp_path / "book.parquet").drop_columns("picture")
    write_table(
        tmp_path / "old.parquet",
        dict(zip(table.column_names, table.columns, strict=True)),
        {"kind": "labels"},
    )
    found = LabelBook.load(tmp_path / "old.parquet")
    assert [found.note_pictures({"a": picture}) for picture in (b"x", b"x", b"y")] == [0, 0, 1]


def test_a_skip_is_of_its_picture_alone() -> None:
    book = LabelBook()
    book.note_labels({"a": SKIPPED})
    assert [book.note_pictures({"a": picture}) for picture in (b"x", b"y")] == [0, 1]


def test_a_damaged_book_is_refused(tmp_path: Path) -> None:
    book = LabelBook()
    book.note_labels({"a": "cat"})
    path = tmp_path / "book.parquet"
    book.save(path)
    table = pq.read_table(path)
    label = table.column_names.index("label")
    pq.write_table(
        table.set_column(label, "label", pa.array(["dog"])), path
    )  # as a table editor would
    with pytest.raises(DataError, match="its rows are not what its digest says"):
        LabelBook.load(path)


@pytest.mark.parametrize("key", ["path", "file", "image"])
def test_files_of_labels(tmp_path: Path, key: str) -> None:
    path = write(
        tmp_path / "l.csv",
        f"note,{key},label,stream",
        "x,a.jpg, cat ,fit",
        "y,b.jpg,,calibration",
        "z,c.jpg,dog,",
    )
    assert read_labels(path) == ({"a.jpg": "cat", "c.jpg": "dog"}, {"a.jpg": "fit"})


@pytest.mark.parametrize(
    "name", ["-1.jpg", "+x.png", "@eaDir/a.jpg", "'=1.jpg", " day/a.jpg", "\n1.jpg", "plain.jpg"]
)
def test_names_that_a_spreadsheet_would_compute_with_come_back(tmp_path: Path, name: str) -> None:
    path = tmp_path / "l.csv"
    path.write_bytes(csv_bytes(label_columns({name: "cat"}, {name: "fit"})))
    assert read_labels(path) == ({name: "cat"}, {name: "fit"})


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["name,label", "a,b"], "must have the columns path"),
        (["path,label", "a,cat", "a,dog"], "line 3: 'a' has the labels 'cat' and 'dog'"),
        (["path,label", ",cat"], "line 2: it names no photo"),
        (["path,label", "a,cat", '"b,dog', "c,cat"], "whose quotes are all closed"),
        (
            ["path,label,label", "a,cat,dog", "b,cat,dog"],
            "line 1: distinct columns .* Repeated: label. The first row has 'cat' and 'dog'",
        ),
        (
            ["path,path,label", "a,b,cat"],
            "line 1: distinct columns .* Repeated: path. The first row has 'a' and 'b'",
        ),
        (["path,label,label"], "line 1: distinct columns are needed. Repeated: label"),
        (
            ["path,label", '"a', 'b",cat', "", "c,cat,dog"],
            "line 5: 'dog' after 'cat' is in none of the columns path, label",
        ),
        (["path,label,", "a,cat,", "b,cat,dog"], "line 3: 'dog' after 'cat' is in none of"),
        (["path;label", "a;cat"], "must have the columns path .* It has path;label"),
    ],
)
def test_files_that_cannot_be(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_labels(write(tmp_path / "l.csv", *lines))


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_what_a_spreadsheet_adds_to_a_table_is_passed_over(tmp_path: Path, end: str) -> None:
    """Spreadsheets add a byte order mark, lines without a cell, and columns without a name.

    Rows may also be shorter than the header.
    """
    lines = [
        "\ufeffpath,label,,",
        "a.jpg,cat,,",
        "",
        '"b, c.jpg","big',
        'dog",,,,',
        "d.jpg",
        "",
        "",
    ]
    (tmp_path / "l.csv").write_bytes(end.join(lines).encode())
    assert read_labels(tmp_path / "l.csv")[0] == {"a.jpg": "cat", "b, c.jpg": f"big{end}dog"}
    indexed = write(tmp_path / "pandas.csv", ",path,label", "0,a.jpg,cat")
    assert read_labels(indexed)[0] == {"a.jpg": "cat"}
    assert read_labels(write(tmp_path / "l.tsv", "path\tlabel", "a, b.jpg\tcat"))[0] == {
        "a, b.jpg": "cat"
    }


def test_photos_are_found_by_path_full_path_and_unique_name(tmp_path: Path) -> None:
    photos = ["x/1.jpg", "y/1.jpg", "y/2.jpg"]
    names = ["x/1.jpg", "./y/1.jpg", str(tmp_path / "y" / "2.jpg"), "2.jpg"]
    assert list(match_photos(dict.fromkeys(names, "cat"), photos, tmp_path, tmp_path).values()) == [
        "x/1.jpg",
        "y/1.jpg",
        "y/2.jpg",
        "y/2.jpg",
    ]
    with pytest.raises(UsageError, match="the name of 2 photos"):
        match_photos({"1.jpg": "cat"}, photos, tmp_path, tmp_path)
    with pytest.raises(DataError, match=r"names no photo .* Did you mean 'y/2.jpg'"):
        match_photos({"y/3.jpg": "cat"}, photos, tmp_path, tmp_path)


def test_a_photo_under_two_names_has_one_label(tmp_path: Path) -> None:
    names = {"x/1.jpg": "cat", "./x/1.jpg": "cat", "1.jpg": "dog"}
    message = r"photo 'x/1.jpg': 'cat' \(as 'x/1.jpg'\) and 'dog' \(as '1.jpg'\)"
    with pytest.raises(DataError, match=message):
        match_photos(names, ["x/1.jpg"], tmp_path, tmp_path)


def test_full_paths_through_a_link_are_found(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (link := tmp_path / "link").symlink_to(tmp_path / "photos")
    names = {str(root / "1.jpg"): "cat" for root in (link, tmp_path / "photos")}
    assert match_photos(names, ["1.jpg"], link, tmp_path) == dict.fromkeys(names, "1.jpg")


def test_a_label_that_is_no_class_is_refused_with_the_nearest(tmp_path: Path) -> None:
    labels = {"a": "cat", "b": "other", "c": SKIPPED}
    assert names_of_labels(labels, ["cat", "dog"], ["other"], tmp_path) == labels
    with pytest.raises(
        DataError, match=r"'dgo' \(of a\) is none of the 2 classes. Did you mean 'dog'"
    ):
        names_of_labels({"a": "dgo"}, ["cat", "dog"], [], tmp_path)


def test_sides_are_of_the_picture_and_of_even_size() -> None:
    pictures = [bytes([i % 251, i // 251, 7]) for i in range(4_000)]
    vouches, order = sides_and_positions(pictures, 0)
    assert abs(vouches.mean() - 0.5) < 4 * 0.5 / np.sqrt(4_000)
    again, same = sides_and_positions([pictures[5], pictures[5]], 0)
    assert again.tolist() == [vouches[5]] * 2
    assert same.tolist() == [order[5]] * 2
    assert (sides_and_positions(pictures, 1)[0] != vouches).any()
    assert abs(np.corrcoef(vouches, order.astype(float))[0, 1]) < 4 / np.sqrt(4_000)


def test_no_label_is_lost_when_labels_go_with_pictures() -> None:
    book = LabelBook()
    book.note_labels({"a": "cat", "b": "dog", "c": "dog", "new": "cow"})
    book.note_pictures({"a": b"cat", "b": b"dog", "c": b"dog"})
    # The photo "a" has the name "b" now. A copy of the old "b" is still there, as "c".
    assert book.follow_pictures({"b": b"cat", "c": b"dog"}) == 2
    assert book.labels == {"b": "cat", "b (646f67)": "dog", "c": "dog", "new": "cow"}
    assert book.follow_pictures({"b": b"cat", "c": b"dog"}) == 0
    # It has the name "c" now, and no photo has the picture of a dog.
    assert book.follow_pictures({"c": b"cat"}) == 2
    assert book.labels == {"b (646f67)": "dog", "c": "cat", "c (646f67)": "dog", "new": "cow"}
    # Both copies are back. The path "new" has a label for a picture that is not known.
    assert book.follow_pictures({"new": b"dog", "x": b"dog", "y": b"dog", "c": b"cat"}) == 2
    assert book.labels == {"c": "cat", "new": "cow", "x": "dog", "y": "dog"}


def test_a_label_of_a_copy_leaves_the_photo_that_replaced_the_copy() -> None:
    book = LabelBook()
    book.note_labels({"a": "cat", "copy": "cat", "edited": "cow"})
    book.request_labels(["second copy"], "fit", predictor="p")
    book.note_pictures({"a": b"cat", "copy": b"cat", "second copy": b"cat", "edited": b"cow"})
    pictures = {"a": b"cat", "copy": b"dog", "second copy": b"dog", "edited": b"new"}
    assert book.follow_pictures(pictures) == 2
    assert book.labels == {"a": "cat", "edited": "cow", "copy (636174)": "cat"}
    assert not book.waiting_entries()


def test_copies_with_different_labels_keep_them_when_renamed() -> None:
    book = LabelBook()
    book.note_labels({"a/1": "cat", "a/2": "dog", "a/3": "cow"})
    book.note_pictures({"a/1": b"same", "a/2": b"same", "a/3": b"same"})
    assert book.follow_pictures({"a/3": b"same", "b/1": b"same", "b/2": b"same"}) == 2
    assert book.labels == {"a/3": "cow", "b/1": "cat", "b/2": "dog"}


def test_the_latest_label_of_a_picture_goes_to_the_new_path() -> None:
    book = LabelBook()
    book.add_label(Entry("copy", "dog", "given", answered=1, picture=b"same".hex()))
    book.add_label(Entry("b", "cat", "fit", answered=2, picture=b"same".hex()))
    assert book.follow_pictures({"c": b"same"}) == 1
    assert book.labels == {"copy": "dog", "c": "cat"}
    assert book.entries["c"].stream == "fit"


def test_requests_go_with_pictures_but_not_to_labelled_photos() -> None:
    book = LabelBook()
    book.request_labels(["a", "b"], "calibration", predictor="p", probability=0.5)
    book.note_labels({"x": "cat"})
    assert book.note_pictures({"a": b"cow", "b": b"dog", "x": b"cat"}) == 0
    assert book.follow_pictures({"c": b"cow", "b": b"cat"}) == 3
    assert book.labels == {"b": "cat"}
    assert [(entry.path, entry.probability) for entry in book.waiting_entries()] == [("c", 0.5)]


def test_a_label_for_another_picture_stays_beside_a_new_one() -> None:
    book = LabelBook()
    for picture, label in (("0a0a", "dog"), ("0b0b", "cat"), ("0b0b", "cow"), ("0a0a", "pig")):
        book.add_label(Entry("a", label, "fit", picture=picture * 4))
    assert book.labels == {"a": "pig", "a (0a0a0a0a)": "dog", "a (0b0b0b0b)": "cow"}
    book.set_aside_other_pictures({"a": "pig", "unknown": "cow"}, {"a": b"new"})
    assert book.labels["a"] == "pig"
    book.set_aside_other_pictures({"a": "cow"}, {"a": b"new"})
    assert book.labels == {"a (0a0a0a0a)": "dog", "a (0b0b0b0b)": "cow", "a (0a0a0a0a)'": "pig"}

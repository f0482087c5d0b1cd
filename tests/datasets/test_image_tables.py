from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.builders.image_files import (
    encode,
    listed,
    picture,
)
from vilu.artifacts.tables import csv_bytes
from vilu.datasets.base import MISSING_FILE, READABLE, require_files
from vilu.datasets.catalog import open_dataset
from vilu.datasets.folder import PhotoFiles, list_photos
from vilu.datasets.images import BadImage, read_image
from vilu.errors import DataError, UsageError


def png(i: int) -> bytes:
    return encode(picture(size=(8, 8), seed=i), "PNG")


def write_csv(folder: Path, text: str, name: str = "list.csv") -> Path:
    (folder / name).write_bytes(text.encode())
    return folder / name


# CSV


def test_csv_with_string_labels_split_and_key(tmp_path):
    (tmp_path / "img").mkdir()
    for i in range(3):
        (tmp_path / f"img/{i}.png").write_bytes(png(i))
    source = write_csv(
        tmp_path,
        "\ufeffimage_path,Class,split,key,more\r\nimg/0.png, red_fox ,train,k0,x\r\n"
        "img/1.png,ant,test,k1,\r\n"
        'img/2.png,,test,"k,2","two\r\nlines"\r\n',
    )
    whole = open_dataset(source)
    assert whole.class_names == ("ant", "red fox")
    assert whole.classes.data_names == ("ant", "red_fox")
    assert listed(whole) == [("k0", 1), ("k1", 0), ("k,2", None)]
    test = open_dataset(source, split="test")
    assert (listed(test), test.class_names) == ([("k1", 0), ("k,2", None)], whole.class_names)
    assert [record.read() for record in test.records(0, 2)] == [png(1), png(2)]
    assert listed(open_dataset(source, split="test+train")) == listed(whole)
    assert [record.key for record in whole.records(1, 2)] == ["k1"]


@pytest.mark.parametrize("alias", ["path", "file", "filename", "image_path", "filepath"])
def test_csv_of_paths_alone_is_unlabelled(tmp_path, alias):
    dataset = open_dataset(write_csv(tmp_path, f"{alias}\tx\na.png\t1\nb.png\t2\n", "list.tsv"))
    assert (listed(dataset), dataset.class_names) == ([("a.png", None), ("b.png", None)], None)


@pytest.mark.parametrize("names", ["zebra\nant\n", "1\tant\n0\tzebra\n"])
@pytest.mark.parametrize("labels", [["1", "0", ""], ["1.0", "0.0", ""], [" 1", "00", " "]])
def test_csv_numbers_are_labels_named_by_the_classes_file(tmp_path, labels, names):
    source = write_csv(
        tmp_path, "path,label\n" + "".join(f"{i}.png,{label}\n" for i, label in enumerate(labels))
    )
    classes = tmp_path / "classes.txt"
    classes.write_text(names)
    dataset = open_dataset(source, classes=classes)
    assert dataset.class_names == ("zebra", "ant")
    assert [label for _, label in listed(dataset)] == [1, 0, None]
    with pytest.raises(DataError, match="--classes FILE"):
        open_dataset(source)


@pytest.mark.parametrize("names", ["1\n2\n3\n", "02\n00\n01\n"])
def test_a_number_that_could_be_a_name_or_a_place_is_refused(tmp_path, names):
    """A label that could be a name or a line number must be refused.

    With the names 1, 2 and 3, the labels 1 and 2 were taken for the classes "2" and "3".
    """
    (tmp_path / "t.csv").write_text("path,label\na.png,1\nb.png,2\n")
    (tmp_path / "c.txt").write_text(names)
    with pytest.raises(DataError, match="Is a label a name, or a line of the classes file"):
        open_dataset(tmp_path / "t.csv", classes=tmp_path / "c.txt")
    (tmp_path / "c.txt").write_text(
        "".join(f"{i}\t{name}\n" for i, name in enumerate(names.split()))
    )
    assert open_dataset(tmp_path / "t.csv", classes=tmp_path / "c.txt").class_names == tuple(
        names.split()
    )
    (tmp_path / "t.csv").write_text("path,label\na.png,\nb.png,\n")  # no label, no ambiguity
    (tmp_path / "c.txt").write_text(names)
    assert open_dataset(tmp_path / "t.csv", classes=tmp_path / "c.txt").class_names == tuple(
        names.split()
    )


def test_csv_with_one_label_that_is_no_number_has_string_labels(tmp_path):
    dataset = open_dataset(write_csv(tmp_path, "path,label\na.png,10\nb.png,9\nc.png,NA\n"))
    assert dataset.class_names == ("10", "9", "NA")


def test_apostrophes_against_formulas_are_taken_away(tmp_path):
    """The apostrophes that ``vilu labels`` and ``vilu review`` write must be removed.

    The apostrophes stop a spreadsheet from running a name as a formula.
    """
    (tmp_path / "-1.png").write_bytes(png(1))
    columns = {"path": ["-1.png", "'b.png"], "label": ["=cat", "@dog"], "day": ["+1", "+1"]}
    source = tmp_path / "labels.csv"
    source.write_bytes(csv_bytes({name: pa.array(cells) for name, cells in columns.items()}))
    dataset = open_dataset(source, where={"day": "+1"})
    assert (listed(dataset), dataset.class_names) == (
        [("-1.png", 0), ("'b.png", 1)],
        ("=cat", "@dog"),
    )
    assert dataset.faults.kinds.tolist() == [READABLE, MISSING_FILE]


@pytest.mark.parametrize("name", ["names.csv", "names.parquet", "numbers.csv"])
def test_a_picture_that_nobody_can_name_has_an_unknown_label(tmp_path, name):
    """If a picture has the label (skip), its label must be unknown.

    ``vilu labels`` writes (skip) for a picture that nobody can name.
    """
    labels = ["1", "0", " (skip)"] if name == "numbers.csv" else ["dog", "cat", " (skip)"]
    lines = [f"{i}.png,{label}\n" for i, label in enumerate(labels)]
    source, classes = (
        write_csv(tmp_path, "path,label\n" + "".join(lines), name),
        tmp_path / "classes.txt",
    )
    classes.write_text("cat\ndog\n")
    if source.suffix == ".parquet":
        pq.write_table(pa.table({"path": ["0.png", "1.png", "2.png"], "label": labels}), source)
    dataset = open_dataset(source, classes=classes)
    assert (dataset.class_names, [label for _, label in listed(dataset)]) == (
        ("cat", "dog"),
        [1, 0, None],
    )


@pytest.mark.parametrize("bad", ["-1", "2"])
def test_labels_out_of_range_name_their_row(tmp_path, bad):
    classes = tmp_path / "classes.txt"
    classes.write_text("a\nb\n")
    source = write_csv(tmp_path, f"path,label,split\na.png,0,x\nb.png,{bad},y\n")
    with pytest.raises(DataError, match=rf"row 1 .*label {bad}; the class table has 2 names"):
        open_dataset(source, classes=classes, split="x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("picture,label\nx,y\n", r"no column of images.*Found: picture, label"),
        ("", "no columns"),
        ("path,label\na.png,b,c\n", "cannot be read as a table"),
        ("path,path\na,b\n", "Repeated: path. The first row has 'a' and 'b' there"),
        ("path,label,label\na,x,y\n", "Repeated: label. The first row has 'x' and 'y' there"),
        ("path,Path\na,b\n", "'path' occurs 2 times"),
        ("path,label\na,x\nb,x,y\n", "Expected 2 columns, got 3: b,x,y"),
        ("path\na.png\na.png\n", "'a.png' occurs more than once. .* in a column 'key'"),
        ("path,key\na.png,1\nb.png,1\n", "'1' occurs more than once"),
    ],
)
def test_malformed_csv(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        open_dataset(write_csv(tmp_path, text))


def test_csv_that_is_not_utf8(tmp_path):
    for text, message in (
        (b"path,label\na.png,caf\xe9\n", "cannot be read as a table"),
        (b"path,caf\xe9\na.png,1\n", "Save it as UTF-8"),
        ("path\na.png\n".encode("utf-16"), "Save it as UTF-8"),
    ):
        (tmp_path / "list.csv").write_bytes(text)
        with pytest.raises(DataError, match=message):
            open_dataset(tmp_path / "list.csv")


def test_csv_without_rows_is_an_empty_data_set(tmp_path):
    dataset = open_dataset(write_csv(tmp_path, "path,label\n"))
    assert (len(dataset), listed(dataset), dataset.class_names) == (0, [], None)


def test_splits_that_are_not_there(tmp_path):
    source = write_csv(tmp_path, "path,split\na.png,train\nb.png,\n")
    with pytest.raises(UsageError, match=r"no split 'tran'; it has train\. Did you mean 'train'"):
        open_dataset(source, split="tran")
    with pytest.raises(UsageError, match="has no splits"):
        open_dataset(write_csv(tmp_path, "path\na.png\n"), split="train")


@pytest.mark.parametrize(
    "path",
    [
        "../secret.png",
        "a/../../secret.png",
        "/etc/passwd",
        "C:\\x.png",
        "..\\secret.png",
        "missing.png",
        "a",
        "",
        "x\0y",
    ],
)
def test_paths_that_leave_the_folder_or_lead_nowhere_are_read_errors(tmp_path, path):
    (tmp_path / "secret.png").write_bytes(png(0))
    (tmp_path / "set/a").mkdir(parents=True)
    (tmp_path / "set/good.png").write_bytes(png(1))
    pq.write_table(
        pa.table({"path": [path, "good.png"], "key": ["0", "1"]}), tmp_path / "set/list.parquet"
    )
    bad, good = open_dataset(tmp_path / "set/list.parquet").records(0, 2)
    with pytest.raises(OSError, match=r"."):
        bad.read()
    with pytest.raises(BadImage) as caught:
        read_image(bad)
    assert (caught.value.stage, caught.value.kind) == ("open", "read_error")
    assert good.read() == png(1)


@pytest.mark.parametrize("path", ["", "x\0y"])
def test_a_path_that_no_file_can_have_is_missing_and_leads_nowhere(tmp_path, path):
    """An empty cell must not be called a path out of the folder, with a folder for ``--root``."""
    (tmp_path / "a.png").write_bytes(png(0))
    pq.write_table(pa.table({"path": [path, "a.png"], "key": ["0", "1"]}), tmp_path / "l.parquet")
    with pytest.raises(DataError, match="1 files are missing") as caught:
        require_files(open_dataset(tmp_path / "l.parquet"), 0.0)
    assert "--root" not in str(caught.value)


@pytest.mark.skipif(os.name == "nt", reason="on Windows, these are paths out of the folder")
@pytest.mark.parametrize("name", ["c:d.png", "\\a.png", "a\\..\\b.png"])
def test_a_name_that_is_a_path_only_on_windows_is_a_name(tmp_path, name):
    (tmp_path / name).write_bytes(png(3))
    (record,) = open_dataset(write_csv(tmp_path, f"path\n{name}\n")).records(0, 1)
    assert record.read() == png(3)
    photos = PhotoFiles(tmp_path, list_photos(tmp_path), ["cat"])
    assert [record.read() for record in photos.records(0, len(photos))] == [png(3)]


def test_fingerprint_of_a_table_of_paths_follows_the_files(tmp_path):
    (tmp_path / "a.png").write_bytes(png(0))
    seen = set()
    for text in (
        "path,label\na.png,x\nb.png,y\n",
        "path,label\na.png,y\nb.png,x\n",
        "path,label\na.png,x\nb.png,z\n",
    ):
        seen.add(open_dataset(write_csv(tmp_path, text)).fingerprint)
    same = open_dataset(write_csv(tmp_path, "label,path,other\nx,a.png,1\nz,b.png,2\n")).fingerprint
    assert (len(seen), same in seen) == (3, True)
    (tmp_path / "b.png").write_bytes(png(1))
    assert (
        open_dataset(write_csv(tmp_path, "path,label\na.png,x\nb.png,z\n")).fingerprint not in seen
    )

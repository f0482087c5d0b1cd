from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders.image_files import (
    encode,
    listed,
    picture,
)
from vilu.datasets import files
from vilu.datasets.catalog import SOURCE_KINDS, open_dataset
from vilu.datasets.folder import FolderDataset, list_photos
from vilu.datasets.layouts import LAYOUTS
from vilu.errors import DataError, StorageError, UsageError

PNG = encode(picture(size=(8, 8)), "PNG")


def tree(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(PNG)
    return root


# Folders


def test_class_folders_sorted_by_bytes_with_nested_images(tmp_path, caplog):
    tree(
        tmp_path,
        "b/2.png",
        "b/deep/er/1.JPG",
        "a_b/x.webp",
        "Z/é.tif",
        "a-b/1.png",
        "empty_one/readme.txt",
    )
    dataset = open_dataset(tmp_path)
    assert dataset.class_names == ("Z", "a-b", "a b", "b", "empty one")
    assert dataset.classes.data_names == ("Z", "a-b", "a_b", "b", "empty_one")
    assert dataset.classes.has_cleaned_names
    expected = [
        ("Z/é.tif", 0),
        ("a-b/1.png", 1),
        ("a_b/x.webp", 2),
        ("b/2.png", 3),
        ("b/deep/er/1.JPG", 3),
    ]
    assert listed(dataset) == expected
    assert all(record.read() == PNG for record in dataset.records(0, 5))
    assert (dataset.ignored_counts, caplog.text) == ({"not_image": 1}, "")
    assert dataset.source == str(tmp_path)


def test_flat_folder_is_unlabelled_and_can_be_given_classes(tmp_path):
    tree(tmp_path / "flat", "2.png", "1.png", "10.png")
    dataset = open_dataset(tmp_path / "flat")
    assert dataset.class_names is None
    assert listed(dataset) == [("1.png", None), ("10.png", None), ("2.png", None)]
    classes = tmp_path / "classes.txt"
    classes.write_text("a cat\na dog\n")
    assert open_dataset(tmp_path / "flat", classes=classes).class_names == ("a cat", "a dog")


def test_what_is_passed_over_is_counted_and_what_may_be_missed_is_told(tmp_path, caplog):
    root = tree(
        tmp_path,
        "a/1.png",
        ".git/x.png",
        "a/.hidden.png",
        "a/notes.txt",
        "b/._1.png",
        "beside.png",
        "list.csv",
    )
    (root / "a/loop").symlink_to(root)
    (root / "c").symlink_to(root / "a")
    (root / "a/broken.png").symlink_to(root / "nowhere.png")
    (root / "a/linked.png").symlink_to(root / "beside.png")
    os.mkfifo(root / "a/pipe.png")
    dataset = FolderDataset(root)
    assert listed(dataset) == [("a/1.png", 0), ("a/linked.png", 0)]
    assert dataset.ignored_counts == {
        "hidden": 3,
        "not_image": 2,
        "linked_folder": 2,
        "not_a_file": 2,
        "outside_class": 1,
    }
    found = ", ".join(f"{n} {reason}" for reason, n in dataset.ignored_counts.items())
    no_files = "not_a_file: a link to nothing, a pipe or a device."
    advice = (
        "Give --follow-links to read what links lead to. Put images into class folders. " + no_files
    )
    assert f"{root}: left out {found}. {advice}" in caplog.text
    assert dataset.class_names == ("a", "b")
    caplog.clear()
    assert [path for path, _ in list_photos(root)] == ["a/1.png", "a/linked.png", "beside.png"]
    with pytest.raises(UsageError, match=r"beside\.png is no folder"):
        list_photos(root / "beside.png")
    assert "2 linked_folder" in caplog.text
    assert caplog.text.endswith(f"Give --follow-links to read what links lead to. {no_files}\n")


def test_links_are_followed_where_that_is_asked_for(tmp_path):
    """With ``follow_links``, links must be followed, and a link that leads back is one bad row.

    Some photo libraries consist only of links.
    """
    root = tree(tmp_path / "photos", "a/1.png")
    beside = tree(tmp_path / "beside", "2.png", "deep/3.png")
    (root / "b").symlink_to(beside)
    (root / "a/4.png").symlink_to(beside / "2.png")
    (root / "a/up").symlink_to(root)
    (root / "a/itself").symlink_to(root / "a")
    (beside / "deep/round").symlink_to(root)
    photos = dict(list_photos(root, follow_links=True))
    found = [path for path, status in photos.items() if not isinstance(status, OSError)]
    assert found == ["a/1.png", "a/4.png", "b/2.png", "b/deep/3.png"]
    assert photos.keys() - set(found) == {"a/itself", "a/up", "b/deep/round"}
    assert {status.errno for status in photos.values() if isinstance(status, OSError)} == {
        errno.ELOOP
    }
    dataset = open_dataset(root, follow_links=True)
    assert dataset.class_names == ("a", "b")
    records = {record.key: record for record in dataset.records(0, len(dataset))}
    assert records["b/2.png"].read() == (beside / "2.png").read_bytes()
    assert records["a/4.png"].read() == (beside / "2.png").read_bytes()
    with pytest.raises(OSError, match=r"directory|symbolic|regular"):
        records["b/deep/round"].read()


def test_links_in_a_circle_are_listed_and_cannot_be_read(tmp_path, caplog):
    root = tree(tmp_path, "a/1.png", "b/2.png")
    (root / "a/loop.png").symlink_to("loop.png")
    (root / "a/there.png").symlink_to("back.png")
    (root / "a/back.png").symlink_to("there.png")
    (root / "a/circle").symlink_to("circle")
    dataset = FolderDataset(root)
    records = list(dataset.records(0, len(dataset)))
    assert [record.key for record in records] == [
        "a/1.png",
        "a/back.png",
        "a/loop.png",
        "a/there.png",
        "b/2.png",
    ]
    for record in records[1:4]:
        with pytest.raises(OSError, match="symbolic links") as caught:
            record.read()
        assert caught.value.errno == errno.ELOOP
    assert dataset.ignored_counts == {"not_image": 1}
    assert dataset.faults.kinds.astype(bool).tolist() == [False, True, True, True, False]


def test_formats_that_are_not_decoded_are_listed_as_errors(tmp_path):
    dataset = open_dataset(tree(tmp_path, "a/1.heic", "a/2.AVIF"))
    assert [key for key, _ in listed(dataset)] == ["a/1.heic", "a/2.AVIF"]


names = st.text("ab-._/é ", min_size=1, max_size=8).filter(
    lambda path: all(part.strip(".") and not part.startswith(".") for part in path.split("/"))
)


@given(st.sets(names, min_size=1, max_size=12))
@settings(max_examples=50, deadline=None)
def test_a_walk_finds_every_image_in_the_byte_order_of_its_path(tmp_path_factory, paths):
    root = tmp_path_factory.mktemp("walk")
    wanted = {f"{path}.png" for path in paths}
    tree(root, *wanted)
    walked = [path for path, _ in files.walk_images(root, files.Counter())]
    assert walked == sorted(wanted, key=str.encode)


def test_a_walk_survives_folders_deeper_than_the_stack(tmp_path, monkeypatch):
    depth = sys.getrecursionlimit() + 50
    monkeypatch.chdir(tmp_path)
    for _ in range(depth):  # one by one, since the whole path is too long
        os.mkdir("d")  # noqa: PTH102
        os.chdir("d")
    Path("x.png").write_bytes(PNG)
    walked = [path for path, _ in files.walk_images(tmp_path, files.Counter())]
    Path("x.png").unlink()
    for _ in range(depth):  # pytest recurs, so it cannot remove the folders
        os.chdir("..")
        os.rmdir("d")  # noqa: PTH106
    assert walked == ["d/" * depth + "x.png"]


def test_names_that_are_not_utf8(tmp_path):
    raw = os.fsencode(tmp_path) + b"/a/caf\xe9.png"
    tree(tmp_path, "a/1.png")
    Path(os.fsdecode(raw)).write_bytes(PNG)
    records = list(open_dataset(tmp_path).records(0, 2))
    assert [record.key for record in records] == ["a/1.png", "a/caf\\xe9.png"]
    assert records[1].read() == PNG
    os.mkdir(os.fsencode(tmp_path) + b"/caf\xe9")  # noqa: PTH102  a path of bytes
    with pytest.raises(DataError, match=r"UTF-8.*caf\\\\xe9"):
        open_dataset(tmp_path)


def test_splits_share_one_class_table(tmp_path):
    root = tree(tmp_path, "train/cat/1.png", "train/dog/2.png", "test/ant/3.png", "test/dog/4.png")
    assert listed(open_dataset(root, split="test")) == [
        ("test/ant/3.png", 0),
        ("test/dog/4.png", 2),
    ]
    train = open_dataset(root, split="train")
    assert listed(train) == [("train/cat/1.png", 1), ("train/dog/2.png", 2)]
    assert (
        train.class_names == open_dataset(root, split="test").class_names == ("ant", "cat", "dog")
    )
    assert len(open_dataset(root, split="train+test")) == 4
    with pytest.raises(
        UsageError, match=r"holds splits, not classes: test, train\. Choose with --split test"
    ):
        open_dataset(root)
    with pytest.raises(
        UsageError, match=r"no split 'trian'; it has test, train\. Did you mean 'train'"
    ):
        open_dataset(root, split="trian")
    for split in ("train+train", "", "train+"):
        with pytest.raises(UsageError, match="once"):
            open_dataset(root, split=split)


def test_a_flat_split_beside_class_folders_is_unlabelled(tmp_path):
    root = tree(tmp_path, "train/cat/1.png", "test/2.png")
    test = open_dataset(root, split="test")
    assert (listed(test), test.class_names) == ([("test/2.png", None)], ("cat",))


def test_folders_that_hold_no_images(tmp_path):
    with pytest.raises(DataError, match="Found: nothing"):
        open_dataset(tmp_path)
    tree(tmp_path, "a/x.txt", "y.parquet")
    with pytest.raises(DataError, match="Found: 2 not_image"):
        open_dataset(tmp_path)


def test_a_folder_that_cannot_be_listed_is_not_skipped(tmp_path, monkeypatch):
    tree(tmp_path, "a/1.png", "b/1.png")
    scandir = os.scandir

    def refuse(folder):
        if str(folder).endswith("b"):
            raise PermissionError(errno.EACCES, "no", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(StorageError, match="cannot list the folder"):
        open_dataset(tmp_path)


def test_any_part_of_a_folder_can_be_redone(tmp_path):
    dataset = open_dataset(tree(tmp_path, *(f"{c}/{i}.png" for c in "ab" for i in range(5))))
    keys = [key for key, _ in listed(dataset)]
    for start, stop in [(0, 3), (3, 7), (9, 10), (10, 12), (4, 4)]:
        assert [record.key for record in dataset.records(start, stop)] == keys[start:stop]


def test_fingerprint_of_a_folder_follows_the_files(tmp_path):
    root = tree(tmp_path / "one", "a/1.png", "b/2.png")
    for path in root.rglob("*.png"):
        os.utime(path, ns=(0, 10**18))
    first = open_dataset(root).fingerprint
    assert open_dataset(root).fingerprint == first
    (root / "a/note.txt").write_text("not an image")
    root.rename(tmp_path / "two")
    root = tmp_path / "two"
    assert open_dataset(root).fingerprint == first
    seen = {first}
    for change in (
        lambda: os.utime(root / "a/1.png", ns=(0, 10**18 + 1)),
        lambda: (root / "a/1.png").write_bytes(PNG + b"x"),
        lambda: (root / "b/2.png").rename(root / "b/3.png"),
        lambda: (root / "b/3.png").rename(root / "a/3.png"),
        (root / "c").mkdir,
    ):
        change()
        seen.add(open_dataset(root).fingerprint)
    assert len(seen) == 6


def test_reading_is_capped_and_only_of_files(tmp_path):
    big = tmp_path / "big.png"
    big.write_bytes(PNG)
    os.truncate(big, files.MAX_FILE_BYTES)
    assert len(files.read_file(big)) == files.MAX_FILE_BYTES
    os.truncate(big, files.MAX_FILE_BYTES + 1)
    with pytest.raises(OSError, match="at most") as caught:
        files.read_file(big)
    assert caught.value.errno == errno.EFBIG
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):  # it waits for no writer
        files.read_file(tmp_path / "pipe")


# The catalogue


def test_what_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        open_dataset(tmp_path / "nowhere")
    (tmp_path / "set.zip").write_bytes(b"")
    with pytest.raises(DataError, match=r"ending in '\.zip'.*\.csv, \.parquet, \.pq, \.tar, \.tsv"):
        open_dataset(tmp_path / "set.zip")
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(DataError, match=r"no regular file"):
        open_dataset(tmp_path / "pipe.csv")


def test_limit_keeps_the_first_images(tmp_path):
    tree(tmp_path, *(f"{c}/{i}.png" for c in "ab" for i in range(3)))
    whole, first = open_dataset(tmp_path), open_dataset(str(tmp_path), limit=4)
    assert listed(first) == listed(whole)[:4]
    assert [record.key for record in first.records(3, 6)] == ["b/0.png"]
    assert (first.class_names, first.source, first.captioned) == (
        whole.class_names,
        whole.source,
        False,
    )
    assert (
        len({whole.fingerprint, first.fingerprint, open_dataset(tmp_path, limit=5).fingerprint})
        == 3
    )
    assert (
        open_dataset(tmp_path, limit=6).fingerprint == open_dataset(tmp_path, limit=99).fingerprint
    )
    assert open_dataset(tmp_path, limit=6).fingerprint == whole.fingerprint
    for limit in (0, -1):
        with pytest.raises(UsageError, match="limit"):
            open_dataset(tmp_path, limit=limit)


def test_the_catalogue_is_light_and_complete():
    assert set(SOURCE_KINDS) == {"folder", "csv", "parquet", "tar"}
    assert {"cifar10", "cifar100"} <= set(LAYOUTS.names())
    code = "import sys, vilu.datasets.catalog; print('torch' in sys.modules)"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "False\n"
    )


def test_images_beside_empty_sub_folders_are_not_called_missing(tmp_path):
    tree(tmp_path, "1.png", "2.png", "thumbs/notes.txt")
    with pytest.raises(DataError, match=r"2 images beside the sub-folder 'thumbs'.*Move"):
        open_dataset(tmp_path)
    (tmp_path / "2.png").unlink()
    (tmp_path / "thumbs/linked").symlink_to(tmp_path)
    with pytest.raises(DataError, match=r"1 image beside.*Found: .*1 linked_folder"):
        open_dataset(tmp_path)


def test_a_link_to_nothing_is_not_read_by_following_links(tmp_path, caplog):
    tree(tmp_path, "a/1.png")
    (tmp_path / "a/gone.png").symlink_to("nowhere.png")
    open_dataset(tmp_path)
    assert "left out 1 not_a_file." in caplog.text
    assert "--follow-links" not in caplog.text

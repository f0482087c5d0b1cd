"""Paths that a data set may use, checks before anything is read, and the largest width that a
table may have.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from tempfile import gettempdir

import pytest

from tests.builders.image_files import encode, picture
from tests.command import run
from vilu.artifacts.tables import MAX_COLUMNS, read_table
from vilu.datasets.base import ImageDataset, require_files
from vilu.datasets.catalog import open_dataset
from vilu.datasets.files import AllowedFolders, ForbiddenPathError
from vilu.datasets.images import BadImage, decode_image
from vilu.errors import DataError, StorageError, UsageError

PNG = encode(picture(), "PNG")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Write twelve photos, a folder for lists and a secret outside both. Return the photos'
    folder.
    """
    (tmp_path / "photos").mkdir()
    (tmp_path / "lists").mkdir()
    (tmp_path / "secret.txt").write_text("password: swordfish")
    for i in range(12):
        (tmp_path / "photos" / f"{i}.png").write_bytes(PNG)
    return tmp_path / "photos"


def table(photos: Path, pattern: str, *more: str) -> Path:
    """Write a list with the photos' paths by a pattern, and with other paths."""
    file = photos.parent / "lists" / "list.csv"
    lines = [pattern.format(i=i, photos=photos) for i in range(12)] + list(more)
    file.write_text("path,label\n" + "".join(f"{path},a\n" for path in lines))
    return file


def read_all(images: ImageDataset) -> list[bytes]:
    return [record.read() for record in images.records(0, len(images))]


@pytest.mark.parametrize("pattern", ["{photos}/{i}.png", "../photos/{i}.png", "{i}.png"])
def test_the_folder_of_images_is_named_by_root(photos: Path, pattern: str) -> None:
    """A path out of the list's folder must be refused with the rule, and read with --root.

    The paths are absolute, climb to the parent, or are relative to another folder.
    """
    source = table(photos, pattern)
    kind = "are missing below" if pattern == "{i}.png" else "paths lead out of"
    with pytest.raises(
        DataError, match=rf"of 12 images, 12 .*{kind} .*lists \(the first: "
    ) as refused:
        require_files(open_dataset(source), 0.5)
    if pattern != "{i}.png":
        assert f"--root {photos} holds these" in str(refused.value)
    images = open_dataset(source, root=photos)
    require_files(images, 0.0)
    assert read_all(images) == [PNG] * 12


def test_nothing_outside_of_root_is_read(photos: Path) -> None:
    secret = photos.parent / "secret.txt"
    (photos / "link.png").symlink_to(secret)
    (photos / "door").symlink_to(photos.parent)
    (photos / "own.png").symlink_to(photos / "0.png")
    outside = [
        str(secret),
        "../secret.txt",
        "../photos/../secret.txt",
        "link.png",
        "door/secret.txt",
        "/etc/passwd",
    ]
    images = open_dataset(table(photos, "{i}.png", "own.png", *outside), root=photos)
    records = list(images.records(0, len(images)))
    assert [record.read() for record in records[:13]] == [PNG] * 13
    for record, path in zip(records[13:], outside, strict=True):
        assert record.key == path
        with pytest.raises(ForbiddenPathError):
            record.read()
    with pytest.raises(DataError, match="6 paths lead out of"):
        require_files(images, 0.3)


def test_a_link_out_of_a_folder_of_images(photos: Path) -> None:
    """If a link leads out of the image folder, the check must fail before anything is read.

    With --root, the link may lead there.
    """
    farm = photos.parent / "farm"
    (farm / "a").mkdir(parents=True)
    (farm / "a" / "0.png").symlink_to(photos / "0.png")
    (farm / "a" / "1.png").write_bytes(PNG)
    (farm / "a" / "2.png").symlink_to(farm / "a" / "1.png")
    images = open_dataset(farm)
    with pytest.raises(
        DataError, match=r"of 3 images, 1 paths lead out of .*'a/0.png'.*--root DIR"
    ):
        require_files(images, 0.2)
    with pytest.raises(ForbiddenPathError):
        read_all(images)
    rooted = open_dataset(farm, root=photos)
    require_files(rooted, 0.0)
    assert read_all(rooted) == [PNG] * 3


def test_no_byte_of_a_file_stands_in_its_error() -> None:
    with pytest.raises(BadImage) as found:
        decode_image(b"password: swordfish")
    assert "password" not in str(found.value)
    assert "19 bytes" in str(found.value)


def test_faults_are_those_of_the_rows_that_are_taken(
    photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (photos / "11.png").unlink()
    source = table(photos, "{i}.png")
    require_files(open_dataset(source, root=photos, limit=11), 0.0)
    require_files(open_dataset(source, root=photos), 0.1)
    assert "1 files are missing below" in caplog.text
    assert "(the first: '11.png')" in caplog.text
    with pytest.raises(DataError, match=r"At most 1\.00% may be unreadable"):
        require_files(open_dataset(source, root=photos), 0.01)


def test_root_is_a_folder_and_for_files(photos: Path) -> None:
    source = table(photos, "{i}.png")
    with pytest.raises(UsageError, match="--root must be a folder"):
        open_dataset(source, root=photos / "none")
    with pytest.raises(UsageError, match="--root"):
        open_dataset(photos, dataset="dtd", root=photos)


def test_the_check_comes_before_the_model(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "vilu.store.job.load_backbone", lambda *_, **__: pytest.fail("the model was loaded")
    )
    done = run("embed", table(photos, "{photos}/{i}.png"), "-o", photos.parent / "e", code=3)
    assert "12 paths lead out of" in done.stderr
    assert "--root" in done.stderr
    assert not (photos.parent / "e").exists()


@contextmanager
def as_nobody() -> Iterator[None]:
    """Run the block without root's rights."""
    if os.getuid() != 0:
        yield
        return
    os.setresgid(65534, 65534, 0)
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)


@pytest.mark.skipif(not hasattr(os, "setresuid"), reason="users are not told apart here")
def test_no_permission_is_called_that(photos: Path) -> None:
    source = table(photos, "{i}.png")
    names = photos.parent / "names.txt"
    names.write_text("a\n")
    shard = photos.parent / "a.tar"
    shard.write_bytes(b"")
    for folder in takewhile(lambda folder: folder != Path(gettempdir()), [photos, *photos.parents]):
        folder.chmod(0o755)  # pytest closes its own to others
    (photos / "0.png").chmod(0)
    with (
        as_nobody(),
        pytest.raises(StorageError, match="1 files may not be read: permission denied"),
    ):
        require_files(open_dataset(source, root=photos), 0.0)
    for path, opened in ((source, [source]), (names, [photos, names]), (shard, [shard])):
        path.chmod(0)
        with as_nobody(), pytest.raises(StorageError, match=r"cannot read .*[pP]ermission denied"):
            open_dataset(opened[0], classes=opened[1] if len(opened) > 1 else None)
    with as_nobody(), pytest.raises(StorageError, match=r"[pP]ermission denied"):
        read_table(source, ())


def test_a_table_of_a_million_columns(tmp_path: Path) -> None:
    wide, long = tmp_path / "wide.csv", tmp_path / "long.csv"
    wide.write_text("," * 10**6 + "path\n")
    long.write_text("x" * 2**22)
    for read in (open_dataset, lambda path: read_table(path, ())):
        with pytest.raises(DataError, match=rf"1,000,001 columns; at most {MAX_COLUMNS:,}"):
            read(wide)
        with pytest.raises(DataError, match="has a line of more than 1,048,576 characters"):
            read(long)


def test_both_folders_of_bounds_are_named(photos: Path) -> None:
    root = photos.parent
    (photos / "link.png").symlink_to(root / "secret.txt")
    with pytest.raises(ForbiddenPathError) as refused:
        AllowedFolders(photos, link_folder=root / "lists").resolve("link.png")
    real = os.path.realpath(root)
    expected = f"must lie below {real}/photos/ or {real}/lists/, links included"
    assert expected in str(refused.value)

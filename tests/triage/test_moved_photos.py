"""Test the sorted folders of a triage: links, moved photos, and moves that are stopped."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest

from tests.builders.photo_folders import photo, write_photos
from tests.builders.store_fakes import FakeBackbone
from tests.triage.conftest import Folder, job_on, rows
from vilu.errors import DataError
from vilu.triage.outputs import triage_photos
from vilu.triage.sorting import class_folders
from vilu.triage.state import TriageSettings, moved_photos


def open_requests(output: Path) -> list[dict[str, str]]:
    """Return the rows of the table to fill in, with probabilities to six digits.

    Moved photos have other places in a batch. On some processors this changes float32's last digit.
    """
    requests = rows(output / "next_labels.csv")
    for request in requests:
        request["failure_probability"] = f"{float(request['failure_probability']):.6f}"
    return requests


def test_links_and_moved_photos(guaranteed: Folder, fake_model: FakeBackbone) -> None:
    (home, truth), output = guaranteed, guaranteed[0] / "out"
    job, asked = job_on(home / "photos"), open_requests(output)
    assert {row["stream"] for row in asked} == {"fit", "calibration"}
    triage_photos(job, output, sort="link")
    placed = list((output / "sorted").rglob("*.png"))
    assert len(placed) == 400
    assert all(path.is_symlink() and path.exists() for path in placed)
    decided = {row["path"]: row for row in rows(output / "decisions.csv")}
    accepted = next(path for path, row in decided.items() if row["decision"] == "accept")
    place = (
        output / "sorted" / "accepted" / decided[accepted]["answer"] / accepted.replace("/", "__")
    )
    assert place.resolve() == (job.photos / accepted).resolve()

    content = {path: (job.photos / path).read_bytes() for path in truth}
    n = fake_model.n_images
    triage_photos(job, output, sort="move")
    assert place.read_bytes() == content[accepted]
    assert not place.is_symlink()
    assert not (job.photos / accepted).exists()
    for sort in ("move", None):  # moved photos still belong to this triage, and no photo is lost
        assert triage_photos(job, output, sort=sort).counts.startswith("400 photos: ")
    assert fake_model.n_images == n
    assert open_requests(output) == asked  # none of these photos has a label yet
    assert sorted(path.read_bytes() for path in (output / "sorted").rglob("*.png")) == sorted(
        content.values()
    )
    triage_photos(job, output, overwrite=True)
    assert sorted(path.read_bytes() for path in (output / "sorted").rglob("*.png")) == sorted(
        content.values()
    )


def test_a_library_of_links_is_triaged_and_never_moved(
    tmp_path: Path, fake_model: FakeBackbone
) -> None:
    truth = write_photos(tmp_path / "library", 60)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "album").symlink_to(tmp_path / "library")
    write_photos(tmp_path / "photos", 40, 60)
    job = job_on(tmp_path / "photos")
    assert triage_photos(job, tmp_path / "in").counts.startswith("40 photos")
    job = dataclasses.replace(job, follow_links=True)
    assert triage_photos(job, tmp_path / "out", sort="move").counts.startswith("100 photos")
    assert all((tmp_path / "library" / name).is_file() for name in truth)
    assert len(moved_photos(tmp_path / "out")) == 40


def sixty_moved(home: Path) -> tuple[TriageSettings, Path, dict[str, str]]:
    """Move 60 photos by a triage, and return its job, its output and the right names."""
    truth, job = write_photos(home / "photos", 60), job_on(home / "photos")
    triage_photos(job, home / "out", sort="move")
    return job, home / "out", truth


def test_no_moved_photo_is_lost_where_the_next_move_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, output, truth = sixty_moved(tmp_path)
    labels = tmp_path / "l.csv"
    labels.write_text(
        "path,label\n" + "".join(f"{path},{name}\n" for path, name in truth.items()),
        encoding="utf-8",
    )
    move, moves = shutil.move, list[Path]()

    def stop_later(source: Path, target: Path, copy: Callable[..., None]) -> None:
        moves.append(target)
        if len(moves) == 3:
            raise KeyboardInterrupt
        move(source, target, copy)

    monkeypatch.setattr(shutil, "move", stop_later)
    with pytest.raises(KeyboardInterrupt):
        triage_photos(job, output, [labels], sort="move")
    for sort in (
        None,
        "link",
        None,
    ):  # a link to a photo that was not moved yet is not a moved photo
        assert triage_photos(job, output, sort=sort).counts.startswith("60 photos: ")
    triage_photos(job, output, sort="move")
    assert len(list((output / "sorted" / "accepted").rglob("*.png"))) == 60


def test_a_move_to_another_disk_that_is_stopped_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped move once left half a photo at the target, and the same command then failed."""
    write_photos(tmp_path / "photos", 24)
    job, output, copystat, copied = (
        job_on(tmp_path / "photos"),
        tmp_path / "out",
        shutil.copystat,
        list[str](),
    )
    sizes = {
        path: (path.stat().st_size, path.stat().st_mtime_ns) for path in job.photos.rglob("*.png")
    }

    def other_disk(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    def stop_later(source: str, target: str, **more: bool) -> None:
        copied.append(source)
        if len(copied) == 3:
            raise KeyboardInterrupt
        copystat(source, target, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", other_disk)
        patch.setattr(shutil, "copystat", stop_later)
        with pytest.raises(KeyboardInterrupt):
            triage_photos(job, output, sort="move")
        assert len([path for path in (output / "sorted").rglob("*") if path.is_file()]) == 2
        assert triage_photos(job, output, sort="move").counts.startswith("24 photos: ")
    moved = [
        (path.stat().st_size, path.stat().st_mtime_ns)
        for path in (output / "sorted").rglob("*.png")
    ]
    assert sorted(moved) == sorted(sizes.values())


def test_a_new_photo_with_the_name_of_a_moved_one_is_not_passed_over(tmp_path: Path) -> None:
    job, output, _ = sixty_moved(tmp_path)
    again = job.photos / "day 0" / "0000.png"
    again.write_bytes(photo(5, 999))
    with pytest.raises(DataError, match=r"'day 0/0000.png' was moved to .* Rename the new photo"):
        triage_photos(job, output)
    again.rename(again.with_name("new.png"))
    assert triage_photos(job, output).counts.startswith("61 photos (1 of them new): ")


def test_a_moved_photo_is_not_lost_where_another_file_has_its_next_place(tmp_path: Path) -> None:
    job, output, truth = sixty_moved(tmp_path)
    path = "day 0/0000.png"
    before = moved_photos(output)[path]
    other = output / "sorted" / "accepted" / truth[path] / before.name
    other.parent.mkdir(parents=True, exist_ok=True)
    other.write_bytes(photo(1, 777))
    (tmp_path / "l.csv").write_text(f"path,label\n{path},{truth[path]}\n")
    for labels in ([tmp_path / "l.csv"], []):
        assert triage_photos(job, output, labels, sort="move").counts.startswith("60 photos: ")
        assert moved_photos(output)[path] == before
    assert other.read_bytes() == photo(1, 777)


@pytest.mark.parametrize("sort", ["link", "move"])
def test_photos_whose_names_are_no_utf8_are_sorted_as_all_others(
    tmp_path: Path, sort: Literal["link", "move"]
) -> None:
    write_photos(tmp_path / "photos", 20)
    (tmp_path / "photos" / os.fsdecode(b"\xff.png")).write_bytes(photo(1, 5000))
    job, output, link = (
        job_on(tmp_path / "photos"),
        tmp_path / "out",
        tmp_path / "photos" / "link.png",
    )
    link.symlink_to(tmp_path / "elsewhere.png")
    (tmp_path / "elsewhere.png").write_bytes(photo(1, 5001))
    triage_photos(job, output, sort=sort)
    assert [path.read_bytes() for path in (output / "sorted").rglob(r"\xff.png")] == [
        photo(1, 5000)
    ]
    for _ in range(2):
        assert triage_photos(job, output, sort=sort).counts.startswith("22 photos: ")
    assert link.is_symlink(), "a link among the photos is none that may go"


@pytest.mark.parametrize("sort", ["link", "move"])
def test_photos_whose_flat_names_are_one_are_all_sorted(
    tmp_path: Path, sort: Literal["link", "move"]
) -> None:
    write_photos(tmp_path / "photos", 30)
    (tmp_path / "photos" / "day 0__0000.png").write_bytes(photo(1, 5000))
    content = sorted(path.read_bytes() for path in (tmp_path / "photos").rglob("*.png"))
    for _ in range(2):
        triage_photos(job_on(tmp_path / "photos"), tmp_path / "out", sort=sort)
        assert (
            sorted(path.read_bytes() for path in (tmp_path / "out" / "sorted").rglob("*.png"))
            == content
        )
    assert triage_photos(job_on(tmp_path / "photos"), tmp_path / "out").counts.startswith(
        "31 photos: "
    )


def test_every_class_has_its_own_folder() -> None:
    folders = class_folders(("C++", "C#", "C&", "C_", "sea", "\u00e9" * 200, "..", "sea"))
    assert folders["C++"] == "C++"
    assert folders["sea"] == "sea"
    assert folders[".."] == "_"
    assert len(set(folders.values())) == len(folders)
    assert max(len(folder.encode()) for folder in folders.values()) <= 255


def test_photos_of_classes_with_like_names_are_sorted_apart(
    tmp_path: Path, changed: Callable[..., TriageSettings]
) -> None:
    job = changed()
    truth = write_photos(job.photos, 60)
    name_of = {"cat": "c/t", "dog": "c&t", "car": "car"}
    names = tuple(name_of[name] for name in job.embedding.names)
    job = changed(embedding=dataclasses.replace(job.embedding, names=names))
    few = {path: name_of[truth[path]] for path in truth}
    (tmp_path / "labels.csv").write_text(
        "path,label\n" + "".join(f"{path},{label}\n" for path, label in few.items())
    )
    triage_photos(job, tmp_path / "out", [tmp_path / "labels.csv"], sort="link")
    for folder in (tmp_path / "out" / "sorted" / "accepted").iterdir():
        labels = {few[link.name.replace("__", "/")] for link in folder.iterdir()}
        assert len(labels) == 1

"""Accepted labels in XMP sidecars, read back by exiftool."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.builders.photo_folders import photo
from tests.triage.conftest import job_on
from vilu.guard.guard import Answer
from vilu.triage.sidecars import write_sidecars
from vilu.triage.sorting import accepted_labels, list_folder


def answer(key: str, decision: str, label: str = "cat & <dog>") -> Answer:
    return Answer(key, label, 0.1, 0.1, decision, None)


def write(folder: Path, *answers: Answer) -> int:
    listing = list_folder(folder, folder / "out")
    return write_sidecars(accepted_labels(folder / "out", listing, answers, job_on(folder)))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(photo(0, 1))
    return tmp_path


def test_exiftool_reads_the_labels(photos: Path) -> None:
    exiftool = shutil.which("exiftool")
    if exiftool is None:
        pytest.skip("exiftool is not installed")
    before = (photos / "a.png").read_bytes()
    assert write(photos, answer("a.png", "accept"), answer("b.png", "review")) == 1
    command = [exiftool, "-json", "-XMP-dc:Subject", photos / "a.png.xmp"]
    done = subprocess.run(command, capture_output=True, check=True)
    assert json.loads(done.stdout)[0]["Subject"] == "cat & <dog>"
    assert (photos / "a.png").read_bytes() == before
    assert not (photos / "b.png.xmp").exists()


def test_a_label_that_is_no_longer_accepted_is_taken_back(photos: Path) -> None:
    write(photos, answer("a.png", "accept"))
    write(photos, answer("a.png", "accept", "car"))
    assert "<rdf:li>car</rdf:li>" in (photos / "a.png.xmp").read_text()
    assert write(photos, answer("a.png", "review")) == 0
    assert not (photos / "a.png.xmp").exists()


def test_a_sidecar_of_another_program_stays(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    (photos / "a.png.xmp").write_text('<x:xmpmeta x:xmptk="other"/>')
    assert write(photos, answer("a.png", "accept")) == 0
    assert write(photos, answer("a.png", "review")) == 0
    assert (photos / "a.png.xmp").read_text() == '<x:xmpmeta x:xmptk="other"/>'
    assert "another program wrote such a file" in caplog.text

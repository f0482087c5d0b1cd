"""The commands in README, run as they stand there with a local random-weight CLIP."""

from __future__ import annotations

import csv
import re
import shlex
from pathlib import Path

import pytest

from tests.builders.store_fakes import picture
from tests.command import ROOT, run

pytest.importorskip("open_clip")

from tests.builders.tiny_models import write_tiny

README = (ROOT / "README.md").read_text(encoding="utf-8")
TRIAGES = re.findall(r"^vilu (triage [^#\n]*)", README, re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write the files that a reader has: photos, names, and the model in a models folder."""
    write_tiny(tmp_path / "models" / "clip-vit-b32", "clip", "open_clip")
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(12):
        (photos / f"{number}.png").write_bytes(picture(number))
    (tmp_path / "names.txt").write_text("cat\ndog\n", encoding="utf-8")
    return tmp_path


def test_triage_of_the_readme_runs_from_photos_to_decisions(folder: Path) -> None:
    first, second = TRIAGES
    local = ["--models", folder / "models"]
    run(*shlex.split(first), *local, cwd=folder)
    asked = (folder / "out" / "next_labels.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(asked.splitlines()))
    assert rows
    lines = [f"{row['path']},cat" for row in rows]
    labels = "\n".join(["path,label", *lines]) + "\n"
    (folder / "labels.csv").write_text(labels, encoding="utf-8")
    run(*shlex.split(second), *local, cwd=folder)
    decisions = (folder / "out" / "decisions.csv").read_text(encoding="utf-8")
    assert len(list(csv.DictReader(decisions.splitlines()))) == 12
    assert (folder / "out" / "report.html").is_file()
    assert (folder / "out" / "predictor" / "predictor.json").is_file()

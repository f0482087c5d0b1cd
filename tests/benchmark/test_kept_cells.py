"""Test that the kept cells make the tables in the docs again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.command import ROOT
from vilu_bench.studies.keep import render_kept_file

CELLS = Path("benchmarks") / "cells"
TABLES = {
    "docs/methods/vilu_zero.md": [
        "benchmarks.never_below_tables",
        CELLS / "never_below.jsonl.xz",
        "--before",
        CELLS / "never_below_before.jsonl.xz",
    ],
    "docs/clip.md": [
        "benchmarks.baseline_tables",
        CELLS / "baselines.jsonl.xz",
        "--divisions",
        "5",
        "--without",
        "imagenet",
    ],
}

PAGES = {
    "learning-curve.md": (
        CELLS / "learning_curve.parquet",
        CELLS / "learning_curve.md",
        "From how many labels ViLU pays",
    ),
    "clip.md": (CELLS / "clip.parquet", Path("docs") / "clip" / "answers.txt", "Real CLIP"),
}
"""Maps a page of the docs to its file of kept studies, its preface, and its title."""


@pytest.mark.parametrize("page", TABLES)
def test_a_table_of_the_docs_is_that_of_its_cells(page: str) -> None:
    command = [sys.executable, "-m", *map(str, TABLES[page])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) > 10
    written = (ROOT / page).read_text(encoding="utf-8").splitlines()
    assert [row for row in rows if row not in written] == []


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_that_of_its_kept_studies(tmp_path: Path, page: str) -> None:
    kept, preface, title = PAGES[page]
    made = tmp_path / page
    render_kept_file(ROOT / kept, made, title, preface_file=ROOT / preface)
    written = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert made.read_text(encoding="utf-8") == written

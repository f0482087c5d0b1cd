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
        CELLS / "never_below.jsonl",
        "--before",
        CELLS / "never_below_before.jsonl",
    ],
    "docs/clip.md": [
        "benchmarks.baseline_tables",
        CELLS / "baselines.jsonl",
        "--divisions",
        "5",
        "--without",
        "imagenet",
    ],
}


@pytest.mark.parametrize("page", TABLES)
def test_a_table_of_the_docs_is_that_of_its_cells(page: str) -> None:
    command = [sys.executable, "-m", *map(str, TABLES[page])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) > 10
    written = (ROOT / page).read_text(encoding="utf-8").splitlines()
    assert [row for row in rows if row not in written] == []


def test_the_page_of_the_learning_curve_is_that_of_its_kept_study(tmp_path: Path) -> None:
    page = tmp_path / "learning-curve.md"
    kept = ROOT / CELLS / "learning_curve.parquet"
    intro = ROOT / CELLS / "learning_curve.md"
    render_kept_file(kept, page, "From how many labels ViLU pays", preface_file=intro)
    written = (ROOT / "docs" / "learning-curve.md").read_text(encoding="utf-8")
    assert page.read_text(encoding="utf-8") == written

"""Test that the kept cells make the tables in the docs again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.command import ROOT
from vilu_bench.studies.keep import render_kept_file

CELLS = Path("benchmarks") / "cells"
TABLES = {
    "never below": (
        ["docs/methods/vilu_zero.md"],
        [
            "benchmarks.never_below_tables",
            CELLS / "never_below.jsonl.xz",
            "--before",
            CELLS / "never_below_before.jsonl.xz",
        ],
    ),
    "baselines": (
        ["docs/clip.md"],
        [
            "benchmarks.baseline_tables",
            CELLS / "baselines.jsonl.xz",
            "--divisions",
            "5",
            "--without",
            "imagenet",
        ],
    ),
    "answers": (
        ["docs/clip.md", "docs/answers.md"],
        ["benchmarks.answer_tables", CELLS / "answers.json.xz"],
    ),
}
"""Maps tables to the pages that have their rows, and to the module that makes them."""

PAGES = {
    "learning-curve.md": (
        CELLS / "learning_curve.parquet",
        CELLS / "learning_curve.md",
        "From how many labels ViLU pays",
    ),
    "clip.md": (CELLS / "clip.parquet", Path("docs") / "clip" / "answers.txt", "Real CLIP"),
    "clip-networks.md": (
        CELLS / "clip_networks.parquet",
        CELLS / "clip_networks.md",
        "Networks on real CLIP",
    ),
}
"""Maps a page of the docs to its file of kept studies, its preface, and its title."""


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_the_docs_are_those_of_their_cells(name: str) -> None:
    pages, module = TABLES[name]
    command = [sys.executable, "-m", *map(str, module)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) > 10
    written: list[str] = []
    for page in pages:
        written += (ROOT / page).read_text(encoding="utf-8").splitlines()
    assert [row for row in rows if row not in written] == []


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_that_of_its_kept_studies(tmp_path: Path, page: str) -> None:
    kept, preface, title = PAGES[page]
    made = tmp_path / page
    render_kept_file(ROOT / kept, made, title, preface_file=ROOT / preface)
    written = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert made.read_text(encoding="utf-8") == written


def values_in(file: Path) -> dict[tuple[str, ...], float]:
    """Read every value in a file of kept studies, by cell, answer and metric."""
    values = {}
    for document in pq.read_table(file, columns=["document"]).column("document").to_pylist():
        cell = json.loads(document)
        names = (cell["data"], cell["setting"], cell["method"], cell["variant"], str(cell["seed"]))
        for result in cell["results"]:
            values[(*names, result["answer"], result["metric"])] = result["value"]
    return values


def test_two_runs_agree_on_the_values_that_both_have() -> None:
    first = values_in(ROOT / CELLS / "clip.parquet")
    second = values_in(ROOT / CELLS / "clip_networks.parquet")
    shared = set(first) & set(second)
    assert len(shared) > 900
    assert {name: first[name] for name in shared} == {name: second[name] for name in shared}

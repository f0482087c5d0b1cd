"""Test that the kept cells make the tables in the docs again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from benchmarks import answer_summary, answer_tables, baseline_tables
from benchmarks.answers import LABELS

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
    "images beside labels": (
        ["docs/methods/vilu_plus.md"],
        ["benchmarks.never_below_tables", CELLS / "never_below_plus.jsonl.xz"],
    ),
    "baselines": (
        ["docs/clip.md"],
        ["benchmarks.baseline_tables", CELLS / "baselines.jsonl.xz"],
    ),
    "answers": (
        ["docs/clip.md", "docs/answers.md"],
        ["benchmarks.answer_tables", CELLS / "answers.json.xz"],
    ),
}
"""Maps tables to the pages that have them, and to the module and arguments that make them."""

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


def tables_in(text: str) -> list[str]:
    """Return the tables in a Markdown text, each as one string."""
    tables: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            tables[-1].append(line)
        elif tables[-1]:
            tables.append([])
    return ["\n".join(lines) for lines in tables if lines]


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_the_docs_are_those_of_their_cells(name: str) -> None:
    pages, arguments = TABLES[name]
    command = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    made = tables_in(done.stdout)
    assert made
    written: list[str] = []
    for page in pages:
        written += tables_in((ROOT / page).read_text(encoding="utf-8"))
    assert [table for table in made if table not in written] == []


def test_the_readme_has_the_best_baselines_and_the_lead() -> None:
    summary = answer_summary.load(ROOT / CELLS / "answers.json.xz")
    best_of_means = []
    leads = []
    for n_labels in LABELS:
        means = []
        for method in answer_tables.BASELINES:
            readings = [summary.readings[name, n_labels, method] for name in summary.names]
            coverages = [reading.values["0.05"].value for reading in readings]
            means.append(100 * sum(coverages) / len(coverages))
        best_of_means.append(f"{max(means):.1f}")
        pair = ("adapted", answer_tables.BEST_BASELINE)
        lead = answer_tables.difference(summary.readings, summary.names, n_labels, pair)
        mark = " (beyond chance)" if lead.interval(0.95).ci_low > 0 else ""
        leads.append(f"{100 * lead.value:+.1f}{mark}")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for title, numbers in (
        ("best of GDA, Tip-Adapter, probe mixes", best_of_means),
        ("vilu_plus less each set's best baseline", leads),
    ):
        assert f"| {title} | {' | '.join(numbers)} |" in readme


def test_the_readme_has_the_leads_in_auroc_and_which_are_within_chance() -> None:
    cells = baseline_tables.Cells.read(ROOT / CELLS / "baselines.jsonl.xz")
    names = cells.names()
    keys = cells.common(names)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    words = " ".join(readme.split())  # the lines of the page end anywhere
    groups = baseline_tables.groups_of(names)
    for title in (
        "all 9 sets",
        "8 sets, without imagenet",
        "3 not in view, without imagenet and cars",
        "4 with real texts, without imagenet and cars",
    ):
        of_group = [key for key in keys if key[0] in groups[title]]
        numbers = []
        for n_labels in LABELS:
            lead = baseline_tables.Lead.over_best(cells, n_labels, of_group)
            mark = "" if lead.is_beyond_chance else "≈"
            numbers.append(f"{mark}{lead.mean:.1f}".replace("-", "−"))
        assert ", ".join(numbers) in words


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


SETS_LEFT_OUT = (
    (),
    ("imagenet1k",),
    ("imagenet1k", "proto_ucf101", "proto_dtd", "proto_oxfordpets"),
)
"""Sets that a lead on the page of real CLIP leaves out: none, ImageNet, all but real texts."""


def test_the_page_has_the_leads_of_its_studies_too() -> None:
    areas: dict[tuple[str, str, str], list[float]] = {}  # by set, setting and method
    values = values_in(ROOT / CELLS / "clip.parquet")
    for (data, setting, method, *_, metric), value in values.items():
        if metric == "auroc":
            areas.setdefault((data, setting, method), []).append(100 * value)
    all_names = sorted({name for name, _, _ in areas})
    page = (ROOT / "docs" / "clip.md").read_text(encoding="utf-8")
    words = " ".join(page.split())
    for left_out in SETS_LEFT_OUT:
        names = [name for name in all_names if name not in left_out]
        leads = []
        for setting in ("few_1", "few_5", "few_16", "all"):
            means = {}
            for method in ("vilu_plus", *baseline_tables.BASELINES):
                of_sets = [np.mean(areas[name, setting, method]) for name in names]
                means[method] = np.mean(of_sets)
            best = max(means[method] for method in baseline_tables.BASELINES)
            leads.append(f"{means['vilu_plus'] - best:.1f}".replace("-", "−"))
        *first, last = leads
        assert f"{', '.join(first)} and {last}" in words


def test_two_runs_agree_on_the_values_that_both_have() -> None:
    first = values_in(ROOT / CELLS / "clip.parquet")
    second = values_in(ROOT / CELLS / "clip_networks.parquet")
    shared = set(first) & set(second)
    assert len(shared) == 936  # as docs/clip-networks.md says
    assert {name: first[name] for name in shared} == {name: second[name] for name in shared}

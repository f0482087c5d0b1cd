"""Test that a study shows what runs, also while no cell finishes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.builders.bench_fakes import benchmark, config, make_stores
from vilu.progress import Task, reporting
from vilu_bench.studies import progress, run
from vilu_bench.studies.cells import Cell
from vilu_bench.studies.progress import REPORT_SECONDS, WAITS, CellReporter, StudyProgress

CELL = Cell("vilu", "cifar10", "all", 0)


class Notes:
    """A reporter, and its own only task, that keeps the notes."""

    def __init__(self) -> None:
        self.n_done = 0.0
        self.notes: list[str] = []

    def start(self, description: str, total: float | None, unit: str) -> Task:
        return self

    def advance(self, steps: float, note: str = "") -> None:
        self.n_done += steps
        self.notes.append(note)

    def finish(self, task: Task) -> None:
        assert task is self


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let the module's time be the only number in a list."""
    now = [100.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_a_cell_reports_its_beginning_and_then_every_ten_seconds(clock: list[float]) -> None:
    texts: list[str] = []
    reporter = CellReporter(CELL, texts.append)
    assert texts == [str(CELL)]
    training = reporter.start("train", 5_000, "steps")
    training.advance(1_000)
    assert len(texts) == 1
    clock[0] += REPORT_SECONDS
    training.advance(200)
    training.advance(200)
    assert texts[1:] == [f"{CELL}: train 1,200/5,000 steps"]
    clock[0] += REPORT_SECONDS
    reporter.start("read", None, "rows").advance(7)
    assert texts[2:] == [f"{CELL}: read 7 rows"]


def test_a_study_shows_what_each_process_does(clock: list[float]) -> None:
    task = Notes()
    shown = StudyProgress(task, n_cells=3)
    shown.report(11, "a")
    shown.report(12, "b")
    shown.report(11, "a: train 5/10 steps")
    shown.show()
    assert task.notes == ["no cell is finished; running: b; a: train 5/10 steps"]
    clock[0] += 30
    shown.finish(CELL)
    shown.report(11, WAITS)
    shown.show()
    assert task.notes[1:] == [
        f"2 a minute, 0:01:00 left; {CELL}",
        "2 a minute, 0:01:00 left; running: b",
    ]
    assert task.n_done == 1


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_running_cells_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    monkeypatch.setattr(run, "REPORT_SECONDS", 0.01)
    task = Notes()
    with reporting(task):
        benchmark(config(seeds=1), make_stores(tmp_path / "stores"), tmp_path / "run", jobs=jobs)
    assert any("running: " in note and "lvu on one, all, seed 0" in note for note in task.notes)

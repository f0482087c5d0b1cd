"""Test that a study shows what runs, also while no cell finishes."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.builders.bench_fakes import benchmark, config, make_stores
from vilu.errors import StorageError
from vilu.progress import Task, reporting
from vilu_bench.studies import progress, run
from vilu_bench.studies.cells import Cell
from vilu_bench.studies.progress import SECONDS_BETWEEN_NEWS, CellReporter, StudyProgress, Work

CELL = Cell("vilu", "cifar10", "all", 0)
OTHER = Cell("lvu", "cifar10", "all", 0)


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


def test_a_cell_sends_its_beginning_and_then_news_every_ten_seconds(clock: list[float]) -> None:
    news: list[Work] = []
    reporter = CellReporter(CELL, news.append)
    assert news == [Work(CELL)]
    training = reporter.start("train", 5_000, "steps")
    training.advance(1_000)
    assert len(news) == 1
    clock[0] += SECONDS_BETWEEN_NEWS
    training.advance(200)
    training.advance(200)
    assert news[1:] == [Work(CELL, "train 1,200/5,000 steps")]
    clock[0] += SECONDS_BETWEEN_NEWS
    reporter.start("read", None, "rows").advance(7)
    assert news[2:] == [Work(CELL, "read 7 rows")]


def test_a_study_shows_the_work_of_each_process_and_the_time_left(clock: list[float]) -> None:
    task = Notes()
    shown = StudyProgress(task, n_cells=3)
    shown.show()
    shown.update(11, Work(CELL))
    shown.update(12, Work(OTHER))
    shown.update(11, Work(CELL, "train 5/10 steps"))
    shown.show()
    assert task.notes == ["", f"running: {CELL}: train 5/10 steps; {OTHER}"]
    clock[0] += 30
    shown.finish(CELL)  # a long fit goes on, and is named
    clock[0] += 30
    shown.show()
    assert task.notes[2:] == [f"0:01:00 left; running: {OTHER}", f"0:02:00 left; running: {OTHER}"]
    assert task.n_done == 1


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_running_cells_and_their_training_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    monkeypatch.setattr(run, "SECONDS_BETWEEN_NEWS", 0.001)  # the driver's wait
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_NEWS", 0.0)  # of cells in this process
    task = Notes()
    with reporting(task):
        benchmark(config(seeds=1), make_stores(tmp_path / "stores"), tmp_path / "run", jobs=jobs)
    notes = "\n".join(task.notes)
    assert "running: " in notes
    assert "lvu on one, all, seed 0" in notes
    if jobs == 1:
        assert "lvu on one, all, seed 0: train 1/" in notes


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_and_finished_cells_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = make_stores(tmp_path / "stores")
    output = tmp_path / "run"

    def kill_the_workers(progress_of_study: StudyProgress, cell: Cell) -> None:
        for worker in multiprocessing.active_children():
            worker.kill()

    with monkeypatch.context() as patch:
        patch.setattr(StudyProgress, "finish", kill_the_workers)
        with pytest.raises(StorageError, match="fewer --jobs"):
            benchmark(config(), stores, output, jobs=2)
    assert multiprocessing.active_children() == []
    finished = {path: path.stat().st_mtime_ns for path in output.rglob("seed-*.json")}
    assert finished
    benchmark(config(), stores, output)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished

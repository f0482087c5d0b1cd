"""The benchmark as one function: embed what is missing, run what is missing, summarise everything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from vilu.benchmark.cells import Cell, plan
from vilu.benchmark.config import Config
from vilu.benchmark.execute import fingerprint_of
from vilu.benchmark.layout import layout
from vilu.benchmark.pool import run_cells
from vilu.benchmark.result import CellResult, load_bootstrap, load_result
from vilu.benchmark.stores import find_stores, make_stores
from vilu.benchmark.summary import Summary, summarise
from vilu.benchmark.workbench import Workbench
from vilu.errors import BusyError, ProvenanceError, StorageError, UsageError
from vilu.files import atomic_write, make_folder, write_json

LOCK = ".lock"


@dataclass(frozen=True)
class Report:
    """What a benchmark found: a text for people, and the numbers behind it."""

    text: str
    summary: Summary


def benchmark(config: Config, data: Path, output: Path, *, jobs: int = 1) -> Report:
    """Run every cell that has no result yet, and write ``table.txt``, ``results.json`` and ``results.parquet``.

    Interrupt it at any moment: finished cells stay, and the next run does the others. A cell whose method, data,
    parameters or code have changed is run again. Progress is shown through ``vilu.progress``.

    Args:
        config: The benchmark.
        data: Folder that the paths in it are relative to.
        output: Folder for stores, cells and tables.
        jobs: Processes; the number changes no result.

    Raises:
        UsageError: If a setting or a path cannot be.
        DataError: If data cannot be used.
        ProvenanceError: If the two parts of a data set do not belong together, or code or data change meanwhile.
        MissingModelError: If a backbone is not on this machine.
        StorageError: If the file system refuses.
        BusyError: If another process works in ``output``.
    """
    if jobs < 1:
        raise UsageError(f"jobs must be at least 1. Got {jobs} instead.")
    with claim(make_folder(output)):
        remove_leftovers(output)
        folders = make_stores(config, data, output)
        bench = Workbench(config, folders)
        bench.check()
        cells = plan(config)
        found = finished(bench, cells, output)
        missing = [cell for cell in cells if cell.same_as is None and cell not in found]
        n_runs = sum(cell.same_as is None for cell in cells)
        run_cells(bench, folders, missing, output, jobs, n_runs - len(missing))
        results = finished(bench, cells, output)
        if len(results) < n_runs:
            raise ProvenanceError(
                f"{n_runs - len(results)} cells were made from other code or data than this process has read: "
                "something changed meanwhile. Start it again: they are run again, and nothing else."
            )
        summary = summarise(config, cells, results, lambda cell: load_bootstrap(output, cell))
        text = layout(config, summary)
        write_report(config, summary, text, output)
    return Report(text, summary)


def remove_leftovers(root: Path) -> None:
    """Remove what a killed process left half-written (we hold the lock: nobody else writes).

    Raises:
        StorageError: If the file system refuses.
    """
    try:
        for path in (root / "cells").rglob(".*.tmp"):
            path.unlink()
    except OSError as error:
        raise StorageError(f"cannot remove {error.filename}: {error.strerror}.") from error


def finished(bench: Workbench, cells: tuple[Cell, ...], root: Path) -> dict[Cell, CellResult]:
    """Results that are there and hold, of the cells that have one of their own."""
    runs = [cell for cell in cells if cell.same_as is None]
    results = {cell: load_result(root, cell, fingerprint_of(bench, cell)) for cell in runs}
    return {cell: result for cell, result in results.items() if result is not None}


def write_report(config: Config, summary: Summary, text: str, output: Path) -> None:
    """Write the tables.

    Raises:
        StorageError: If the file system refuses.
    """
    content = {"schema_version": 1, "kind": "benchmark", "config": config.model_dump(mode="json"), **summary.to_dict()}
    write_json(output / "results.json", content)
    summary.results.save(output / "results.parquet")
    with atomic_write(output / "table.txt") as handle:
        handle.write((text + "\n").encode())


def list_cells(config: Config, data: Path, output: Path) -> list[dict[str, str]]:
    """Every cell and where it stands, running and embedding nothing.

    Raises:
        UsageError: If images are not where the file says.
    """
    cells, folders = plan(config), find_stores(config, data, output)
    embedded = all(each.complete for each in folders.values())
    found = finished(Workbench(config, folders), cells, output) if embedded else {}
    return [
        {
            "data": cell.data,
            "setting": cell.setting,
            "method": cell.method,
            "seed": str(cell.seed),
            "state": _state(cell, found),
        }
        for cell in cells
    ]


def _state(cell: Cell, found: dict[Cell, CellResult]) -> str:
    if cell.same_as is not None:
        return f"as {cell.same_as.data}, {cell.same_as.setting}, seed {cell.same_as.seed}"
    if cell not in found:
        return "to do"
    refused = found[cell].refused
    return "done" if refused is None else f"refused ({refused.error})"


@contextmanager
def claim(output: Path) -> Iterator[None]:
    """Hold the lock of a folder; the system lets go of it when the process dies.

    Raises:
        BusyError: If another process holds it.
    """
    try:
        lock = FileLock(output / LOCK)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise BusyError(f"another benchmark is at work in {output}. Wait for it, or give another folder.") from error
    try:
        yield
    finally:
        lock.release()

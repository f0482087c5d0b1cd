"""Benchmarks as one function: embed what is missing, run what is missing, show everything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout

from vilu.benchmark.board import Board
from vilu.benchmark.cells import Cell, needed_parts, plan, sharing_a_fit
from vilu.benchmark.config import Config
from vilu.benchmark.facts import decided_by, fingerprint_of
from vilu.benchmark.pool import run_cells
from vilu.benchmark.result import CellResult, load_bootstrap, load_result
from vilu.benchmark.stores import Part, find_stores, make_stores, require_complete
from vilu.benchmark.workbench import Workbench
from vilu.errors import BusyError, ProvenanceError, StorageError, UsageError
from vilu.files import is_leftover, make_folder

LOCK = ".lock"


@dataclass(frozen=True)
class Share:
    """One of several shares of the work, for one of several machines.

    Attributes:
        number: Which, from 0.
        of: How many there are.
    """

    number: int = 0
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Share:
        """``I/N`` with I from 1 to N.

        Raises:
            UsageError: If it is something else.
        """
        number, slash, of = text.partition("/")
        if not (slash and number.isascii() and number.isdigit() and of.isascii() and of.isdigit()):
            raise UsageError(f"--shard takes I/N, such as 1/4. Got {text!r} instead.")
        if not 1 <= int(number) <= int(of):
            raise UsageError(f"--shard takes I/N with I from 1 to N. Got {text!r} instead.")
        return cls(int(number) - 1, int(of))

    @property
    def lock(self) -> str:
        """Name of the lock: shares of one number of shares go on beside each other."""
        return LOCK if self.of == 1 else f"{LOCK}-{self.number + 1}-of-{self.of}"


def run_all(
    configs: Sequence[Config],
    data: Path,
    output: Path,
    *,
    jobs: int = 1,
    models: Path | None = None,
    share: Share | None = None,
    embed_only: bool = False,
) -> list[Board]:
    """Run every cell of some benchmarks that has no result yet; those that several have are run once.

    Interrupt it at any moment: finished cells stay, and the next run does the others. A cell whose method, data,
    parameters or code have changed is run again. Progress is shown through ``vilu.progress``.

    Args:
        configs: The benchmarks.
        data: Folder that the paths in them are relative to.
        output: Folder for stores and cells.
        jobs: Processes; the number changes no result.
        models: Folder with the named backbones, where they are not to come from the model hub's cache.
        share: Only this share of the cells, for one of several machines; the embeddings must be there.
        embed_only: Make the embeddings and stop.

    Returns:
        The results of each benchmark; none where a share or only the embeddings were made.

    Raises:
        UsageError: If a setting or a path cannot be, or two benchmarks mean different things by one name.
        DataError: If data cannot be used.
        ProvenanceError: If the parts of a data set do not belong together, or code or data change meanwhile.
        MissingModelError: If a backbone is not on this machine.
        StorageError: If the file system refuses.
        BusyError: If another process works in ``output``.
    """
    if jobs < 1:
        raise UsageError(f"jobs must be at least 1. Got {jobs} instead.")
    share = share or Share()
    with claim(make_folder(output), share.lock):
        remove_leftovers(output)
        works = [_Work.begin(config, data, output, models, make=share.of == 1) for config in configs]
        if embed_only:
            return []
        for work in works:
            work.bench.check()
        refuse_contradictions(works)
        for work in works:
            work.run(output, share, jobs)
        return [] if share.of > 1 else [work.board(output) for work in works]


@dataclass(frozen=True)
class _Work:
    """A benchmark under way."""

    config: Config
    cells: tuple[Cell, ...]
    folders: dict[Part, Path]
    bench: Workbench

    @classmethod
    def begin(cls, config: Config, data: Path, output: Path, models: Path | None, *, make: bool) -> _Work:
        cells = plan(config)
        parts = needed_parts(config, cells)
        if make:
            folders = make_stores(config, parts, data, output, models=models)
        else:
            folders = find_stores(config, parts, data, output)
            require_complete(folders)
        return cls(config, cells, folders, Workbench(config, folders))

    def run(self, output: Path, share: Share, jobs: int) -> None:
        """Run the cells that are missing of a share."""
        groups = sharing_a_fit(self.config, [cell for cell in self.cells if cell.same_as is None])
        mine = [cell for group in groups[share.number :: share.of] for cell in group]
        found = finished(self.bench, mine, output)
        missing = [cell for cell in mine if cell not in found]
        run_cells(self.bench, self.folders, missing, output, jobs, len(found))

    def board(self, output: Path) -> Board:
        """All results.

        Raises:
            ProvenanceError: If some do not hold any more.
        """
        runs = [cell for cell in self.cells if cell.same_as is None]
        results = finished(self.bench, runs, output)
        if len(results) < len(runs):
            raise ProvenanceError(
                f"{len(runs) - len(results)} cells were made from other code or data than this process has read: "
                "something changed meanwhile. Start it again: they are run again, and nothing else."
            )
        return Board(self.config, self.cells, results, cache(lambda cell: load_bootstrap(output, cell)))


def refuse_contradictions(works: Sequence[_Work]) -> None:
    """Refuse benchmarks that share an output and would undo each other's cells.

    Raises:
        UsageError: Naming the cell and what differs.
    """
    known: dict[Cell, tuple[str, dict[str, object]]] = {}
    for work in works:
        for cell in work.cells:
            if cell.same_as is not None:
                continue
            facts = decided_by(work.bench, cell)
            other, before = known.setdefault(cell, (work.config.name, facts))
            differing = [key for key, value in facts.items() if before[key] != value]
            if differing:
                raise UsageError(
                    f"{other} and {work.config.name} both have {cell}, and mean different things by it: they differ in "
                    f"{', '.join(differing)}. Give one of them another name, or each an output of its own."
                )


def remove_leftovers(root: Path) -> None:
    """Remove what a killed process left half-written; other machines may be writing.

    Raises:
        StorageError: If the file system refuses.
    """
    try:
        for path in (root / "cells").rglob(".*.tmp"):
            if is_leftover(path):
                path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot remove {error.filename}: {error.strerror}.") from error


def finished(bench: Workbench, runs: Sequence[Cell], root: Path) -> dict[Cell, CellResult]:
    """Results that are there and hold, of cells that have one of their own."""
    results = {cell: load_result(root, cell, fingerprint_of(bench, cell)) for cell in runs}
    return {cell: result for cell, result in results.items() if result is not None}


@contextmanager
def claim(output: Path, name: str) -> Iterator[None]:
    """Hold a lock of a folder; the system lets go of it when the process dies.

    Raises:
        BusyError: If another process holds it.
    """
    try:
        lock = FileLock(output / name)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise BusyError(f"another benchmark is at work in {output}. Wait for it, or give another folder.") from error
    try:
        yield
    finally:
        lock.release()

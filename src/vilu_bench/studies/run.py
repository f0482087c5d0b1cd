"""Runs a study's cells, in this process or in several."""

from __future__ import annotations

import concurrent.futures
import itertools
import logging
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Literal, NamedTuple, Self, cast

import torch

from vilu.artifacts.disk import LOCK_FILE, convert_os_errors, is_leftover, locked, make_folder
from vilu.artifacts.documents import append_to_log
from vilu.artifacts.hashing import digest
from vilu.embeddings.similarity import nearest_rows
from vilu.embeddings.source import SAME_TEXT_COSINE
from vilu.errors import ProvenanceError, StorageError, UsageError
from vilu.metrics.counts import Floats
from vilu.outcomes.evaluate import evaluate
from vilu.outcomes.outcomes import Outcomes
from vilu.process import keep_freed_memory
from vilu.progress import reporting, track
from vilu.registry import load_plugin, plugins
from vilu.scoring.score import score
from vilu.store.executors.local import ctrl_c_blocked, end_with_driver
from vilu.validation import require_at_least
from vilu_bench.studies.board import Board
from vilu_bench.studies.cells import (
    Cell,
    FitInputs,
    cells_to_run,
    fit_inputs_of,
    group_by_fit,
    needed_parts,
    plan_cells,
)
from vilu_bench.studies.config import Config
from vilu_bench.studies.data import StudyData, Truth
from vilu_bench.studies.facts import deciding_facts
from vilu_bench.studies.fit import (
    REFUSALS,
    FitResult,
    collected_warnings,
    fit_cell,
    predictor_of,
    refusal_from,
)
from vilu_bench.studies.progress import (
    SECONDS_BETWEEN_NEWS,
    CellReporter,
    Send,
    StudyProgress,
    Work,
)
from vilu_bench.studies.result import (
    CellResult,
    Refusal,
    Timing,
    bootstrap_across_answers,
    bootstrap_metrics,
    load_bootstrap,
    load_result,
)
from vilu_bench.studies.stores import Part, find_second_stores, make_stores, require_stores

logger = logging.getLogger("vilu.bench")


def run_group(
    study_data: StudyData, cells: Sequence[Cell], root: Path, send: Send
) -> Iterator[Cell]:
    """Fit, score and evaluate cells with a common fit, and write the results.

    If a method refuses a cell, the refusal is written as the result. Every cell is yielded after
    the result is written. ``send`` gets the running cell and its progress.
    """
    fit_results: dict[FitInputs, FitResult] = {}
    for cell in cells:
        reporter = CellReporter(cell, send)
        with cell_named_in_errors(cell), limit_to_one_thread(), reporting(reporter):
            refusal = refuse_other_classes(study_data, cell)
            if refusal is not None:
                predictor = predictor_of(study_data.config, cell)
                fit_result = FitResult(predictor, refusal)
            else:
                fit_inputs = fit_inputs_of(study_data.config, cell)
                fit_result = fit_cell(study_data, cell, fit_inputs, fit_results)
            write_result(study_data, cell, fit_result, root)
        yield cell


def refuse_other_classes(study_data: StudyData, cell: Cell) -> Refusal | None:
    """Return a refusal if a closed-set method meets candidates that its fit lacks, or else None.

    Without this check, the method would refuse the candidates only after an expensive fit.
    """
    if not study_data.config.class_of(cell.method).closed_set:
        return None
    candidates = study_data.candidates(cell)
    if candidates is None:
        return None
    train_texts, test_texts = candidates
    train_width = train_texts.shape[1]
    test_width = test_texts.shape[1]
    if train_width != test_width:
        error = ProvenanceError(
            f"it is fitted on embeddings of width {train_width}, and these have {test_width}."
        )
        return refusal_from(error)
    similarity, _ = nearest_rows(test_texts, train_texts)
    n_unknown = int((similarity < SAME_TEXT_COSINE).sum())
    if n_unknown == 0:
        return None
    error = ProvenanceError(
        f"it scores the {len(train_texts)} classes that it is fitted on, and {n_unknown} of "
        f"the {len(test_texts)} candidates here are others."
    )
    return refusal_from(error)


def write_result(study_data: StudyData, cell: Cell, fit_result: FitResult, root: Path) -> None:
    """Score and evaluate a cell's test rows, and write the result."""
    result = _without_metrics(study_data, cell, fit_result)
    if result.refused is not None:
        result.save(root)
        return
    truth = study_data.truth(cell)
    with collected_warnings() as score_warnings:
        try:
            outcomes, timing = score_test_rows(study_data, cell, fit_result, truth)
            # no resamples here, because ``_bootstrap_values`` draws the resamples
            rows = evaluate(outcomes, metrics=study_data.config.metrics, n_resamples=0).rows
        except REFUSALS as error:
            refused_result = result.model_copy(update={"refused": refusal_from(error)})
            refused_result.save(root)
            return
    bootstrap = _bootstrap_values(study_data, outcomes, truth)
    measured_fields = {
        "results": rows,
        "variant": fit_result.predictor.label.removeprefix(fit_result.predictor.name),
        "warnings": (*fit_result.warnings, *score_warnings),
    }
    append_to_log(root, cell=cell.path.as_posix(), **timing.model_dump())
    complete_result = result.model_copy(update=measured_fields)
    complete_result.save(root, outcomes, bootstrap)


def _without_metrics(study_data: StudyData, cell: Cell, fit_result: FitResult) -> CellResult:
    """Make a cell's result, with the fields that are known before the test rows are scored."""
    facts = deciding_facts(study_data, cell)
    fingerprint = digest(facts)
    truth = study_data.truth(cell)
    return CellResult(
        fingerprint=fingerprint,
        decided_by=facts,
        method=cell.method,
        data=cell.data,
        setting=cell.setting,
        seed=cell.seed,
        test_rows=truth.rows_hash,
        n_train=fit_result.n_train,
        refused=fit_result.refusal,
        warnings=fit_result.warnings,
    )


def _bootstrap_values(study_data: StudyData, outcomes: Outcomes, truth: Truth) -> Floats:
    """Compute bootstrap values (M, B) over the rows with a known truth and a score."""
    config = study_data.config
    rows = outcomes.evaluable
    uncertainty = outcomes.uncertainty[rows]
    failure = outcomes.failure[rows]
    if config.judges_adapted_answers:
        return bootstrap_across_answers(
            uncertainty, failure, config.resamples, truth.rows_hash, config.ranking_metrics
        )
    return bootstrap_metrics(uncertainty, failure, config.resamples, truth.rows_hash)


def score_test_rows(
    study_data: StudyData, cell: Cell, fit_result: FitResult, truth: Truth
) -> tuple[Outcomes, Timing]:
    """Score a cell's test rows, and return the outcomes and the wall times."""
    predictor = fit_result.predictor
    test = study_data.test_set(cell, (*predictor.columns, *predictor.optional_columns))
    start_time = time.perf_counter()
    uncertainty = predictor.predict_uncertainty(test)
    seconds = time.perf_counter() - start_time
    failure = truth.failure  # of zero-shot answers
    if predictor.answer != "zero_shot":
        failure = score(predictor, test).failure
    outcomes = Outcomes(
        uncertainty=uncertainty,
        failure=failure,
        answer=predictor.answer,
        outside=truth.outside,
        method=cell.method,
        dataset=cell.data,
        split=cell.setting,
        seed=cell.seed,
        reason=truth.reason,
        is_probability=predictor.is_probability,
    )
    return outcomes, Timing(
        fit_seconds=fit_result.seconds,
        score_seconds=seconds,
        rows_per_second=len(test) / max(seconds, 1e-9),  # no division by zero
    )


@contextmanager
def cell_named_in_errors(cell: Cell) -> Iterator[None]:
    """Name the cell in any error within a block: in the exception's note and in the log."""
    try:
        yield
    except Exception as error:  # every exception is raised again
        error.add_note(f"in the cell: {cell}")
        # without traceback, because the caller shows the traceback
        logger.error("the benchmark stops at %s", cell)  # noqa: TRY400
        raise


def limit_to_one_thread(
    user_api: Literal["openmp", "blas"] = "openmp",
) -> AbstractContextManager[object]:
    """Limit torch ("openmp") or BLAS ("blas") to one thread within a block.

    With this limit, results do not depend on the number of cores or jobs. Torch follows the OpenMP
    limit, and this limit applies to the calling thread only. The BLAS limit applies to the whole
    process, so it is set only in vilu's own processes (the command line and the workers).
    """
    # threadpoolctl limits only loaded libraries, and this import loads OpenMP and BLAS
    import sklearn.linear_model  # noqa: F401
    from threadpoolctl import threadpool_limits

    # When torch is first used in a thread, it sets the number of threads itself, and so would undo
    # an earlier limit. This call is the first use, so the limit comes after it.
    torch.get_num_threads()
    limit = threadpool_limits(1, user_api=user_api)
    return cast("AbstractContextManager[object]", limit)


StudyDataArguments = tuple[Config, Mapping[Part, Path], Mapping[Part, Path]]
"""Arguments for a ``StudyData``: the benchmark, the first model's stores, and the second's."""

News = SimpleQueue[tuple[int, Work]]
"""Queue from the workers to the driver: process numbers, and each process's work.

If the queue is full (64 KiB), a worker waits until the driver has read from it. The driver reads
every ten seconds at least, and a worker sends a few times a minute.
"""

WORKER_ENDED = (
    "a worker process was ended from outside, perhaps because memory ran out. Finished cells are "
    "kept. Run the same command again, with fewer --jobs if memory ran out."
)


class Workers(NamedTuple):
    """Worker processes, and the queue with their news."""

    pool: concurrent.futures.ProcessPoolExecutor
    news: News

    @classmethod
    def start(cls, data_of_studies: Sequence[StudyData], jobs: int) -> Workers:
        """Make a pool of ``jobs`` processes. The processes start with the first cell."""
        # a fork would copy the locks of torch's threads
        context = multiprocessing.get_context("spawn")
        data_arguments: list[StudyDataArguments] = []
        for study_data in data_of_studies:
            # copies as dicts, because a MappingProxyType cannot be sent to a process
            folders = dict(study_data.folders)
            second_folders = dict(study_data.second_folders)
            data_arguments.append((study_data.config, folders, second_folders))
        news = context.SimpleQueue()
        pool = concurrent.futures.ProcessPoolExecutor(
            jobs, context, _start_worker, (plugins(), data_arguments, news)
        )
        return cls(pool, news)

    def run(
        self,
        study_index: int,
        groups: Sequence[Sequence[Cell]],
        root: Path,
        progress: StudyProgress,
    ) -> Iterator[Cell]:
        """Run groups of cells, as ``CellRunner.run`` does.

        Raises:
            StorageError: If a worker process was killed.
        """
        with ctrl_c_blocked():  # the workers start here, and must not get Ctrl-C
            waiting = {
                self.pool.submit(_run_in_worker, study_index, cells, root) for cells in groups
            }
        while waiting:
            finished, waiting = concurrent.futures.wait(
                waiting, SECONDS_BETWEEN_NEWS, concurrent.futures.FIRST_COMPLETED
            )
            self.pass_on_news(progress)
            for future in finished:
                try:
                    finished_cells = future.result()
                except BrokenProcessPool as error:
                    raise StorageError(WORKER_ENDED) from error
                yield from finished_cells
            if not finished:
                progress.show()

    def pass_on_news(self, progress: StudyProgress) -> None:
        """Give the workers' news in the queue to ``progress``."""
        while not self.news.empty():
            process_id, work = self.news.get()
            progress.update(process_id, work)


class CellRunner:
    """Runs the cells of several benchmarks, benchmark by benchmark, in ``jobs`` processes.

    With a single job, the cells run in this process. With more jobs, worker processes start with
    the first cell and run all benchmarks' cells. If an exception leaves the block, the
    workers are terminated at once.
    """

    def __init__(self, data_of_studies: Sequence[StudyData], jobs: int) -> None:
        self._data_of_studies = data_of_studies
        self._workers: Workers | None = None
        self._children_before = set(multiprocessing.active_children())
        if jobs > 1:
            self._workers = Workers.start(data_of_studies, jobs)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if self._workers is None:
            return
        has_failed = error_type is not None
        self._workers.pool.shutdown(wait=not has_failed, cancel_futures=True)
        if has_failed:
            for worker in set(multiprocessing.active_children()) - self._children_before:
                worker.terminate()
                worker.join()
        self._workers.news.close()

    def run(
        self,
        study_index: int,
        groups: Sequence[Sequence[Cell]],
        root: Path,
        progress: StudyProgress,
    ) -> Iterator[Cell]:
        """Run groups of cells with a common fit. Yield every cell after writing its files.

        ``study_index`` is the index of the cells' benchmark in ``data_of_studies``. ``progress``
        shows the running cells.
        """
        if self._workers is None:
            return self._run_here(study_index, groups, root, progress)
        return self._workers.run(study_index, groups, root, progress)

    def _run_here(
        self,
        study_index: int,
        groups: Sequence[Sequence[Cell]],
        root: Path,
        progress: StudyProgress,
    ) -> Iterator[Cell]:
        def show_at_once(work: Work) -> None:
            progress.update(os.getpid(), work)
            progress.show()

        for cells in groups:
            study_data = self._data_of_studies[study_index]
            yield from run_group(study_data, cells, root, show_at_once)


def run_cells(
    runner: CellRunner, study_index: int, groups: Sequence[Sequence[Cell]], root: Path, n_done: int
) -> None:
    """Run cells, write the files and show progress. An interruption loses no finished cell.

    Args:
        runner: Runs the cells.
        study_index: Index of the benchmark among the runner's studies.
        groups: Groups of cells with a common fit.
        root: The run folder.
        n_done: Number of cells finished before.
    """
    n_cells = sum(map(len, groups))
    with track("benchmark", n_done + n_cells, "cells") as task:
        task.advance(n_done)
        progress = StudyProgress(task, n_cells)
        for cell in runner.run(study_index, groups, root, progress):
            progress.finish(cell)


# globals in a worker process
_data_arguments: list[StudyDataArguments] = []  # for each benchmark in the runner
_open_study_data: dict[int, StudyData] = {}  # at most one open study, by the benchmark's index
_news: list[News] = []  # the queue to the driver


def _start_worker(
    modules: Sequence[str], data_arguments: list[StudyDataArguments], news: News
) -> None:
    """Set up a worker process: load the plugins ``modules``, and store the other arguments."""
    for module in modules:
        load_plugin(module)
    limit_to_one_thread("blas")  # without a block, to keep the limit until the process ends
    keep_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the parent process ends the workers
    # this process ends as soon as the parent process has ended
    threading.Thread(target=end_with_driver, daemon=True).start()
    _data_arguments[:] = data_arguments
    _news[:] = [news]


def _run_in_worker(study_index: int, cells: Sequence[Cell], root: Path) -> list[Cell]:
    """Run cells from the benchmark with this index, and return the cells."""
    if study_index not in _open_study_data:
        _open_study_data.clear()  # benchmarks run in sequence, so a single open study is enough
        _open_study_data[study_index] = StudyData(*_data_arguments[study_index])

    def send(work: Work) -> None:
        _news[0].put((os.getpid(), work))

    return list(run_group(_open_study_data[study_index], cells, root, send))


@dataclass(frozen=True)
class CellShare:
    """A share of the cells, to run on one of several machines."""

    index: int = 0  # index of the share, from 0
    n_shares: int = 1  # number of all shares

    @classmethod
    def parse(cls, text: str) -> CellShare:
        """Parse a share's text ``I/N``, with I from 1 to N."""
        if re.fullmatch("[0-9]+/[0-9]+", text) is None:
            raise UsageError(f"--shard takes I/N, such as 1/4. Got {text!r} instead.")
        before_slash, _, after_slash = text.partition("/")
        number = int(before_slash)
        n_shares = int(after_slash)
        if not 1 <= number <= n_shares:
            raise UsageError(f"--shard takes I/N with I from 1 to N. Got {text!r} instead.")
        return cls(number - 1, n_shares)

    @property
    def lock(self) -> str:
        """Lock file name. Shares have different lock files and can run in parallel."""
        if self.n_shares == 1:
            return LOCK_FILE
        return f"{LOCK_FILE}-{self.index + 1}-of-{self.n_shares}"


def run_all(
    configs: Sequence[Config],
    data: Path,
    output: Path,
    *,
    jobs: int = 1,
    models: Path | None = None,
    share: CellShare | None = None,
    embed_only: bool = False,
) -> list[Board]:
    """Run every cell in ``configs`` that has no result yet.

    A cell that occurs in several benchmarks is run once.

    The run can be interrupted at any moment: finished cells stay, and the next run does the rest. A
    cell is run again if the method, data, parameters or code have changed. Progress is shown
    through ``vilu.progress``.

    Returns:
        One board for each benchmark. The list is empty with ``embed_only``, and if ``share`` is
        only a part of the cells.
    """
    require_at_least("jobs", jobs, 1)
    if share is None:
        share = CellShare()
    is_whole = share.n_shares == 1
    folder = make_folder(output)
    with locked(folder, activity="at work in", lock_name=share.lock, holder_kind="benchmark"):
        remove_leftovers(output)
        benchmarks = [
            _OpenBenchmark.begin(config, data, output, models, make_missing=is_whole)
            for config in configs
        ]
        if embed_only:
            return []
        for benchmark in benchmarks:
            benchmark.study_data.check()
        refuse_contradictions(benchmarks)
        with CellRunner([benchmark.study_data for benchmark in benchmarks], jobs) as runner:
            for study_index, benchmark in enumerate(benchmarks):
                benchmark.run(runner, study_index, output, share)
        if not is_whole:
            return []
        return [benchmark.board(output) for benchmark in benchmarks]


@dataclass(frozen=True)
class _OpenBenchmark:
    """A benchmark with planned cells and open stores."""

    cells: tuple[Cell, ...]
    study_data: StudyData

    @classmethod
    def begin(
        cls, config: Config, data: Path, output: Path, models: Path | None, *, make_missing: bool
    ) -> _OpenBenchmark:
        """Plan the cells and open the stores.

        With ``make_missing``, missing stores are made. Otherwise a missing store is an error.
        """
        cells = plan_cells(config)
        parts = needed_parts(config, cells)
        if make_missing:
            folders = make_stores(config, parts, data, output, models=models)
        else:
            folders = require_stores(config, parts, data, output)
        second_folders = find_second_stores(config, folders, data)
        study_data = StudyData(config, folders, second_folders)
        return cls(cells, study_data)

    def run(self, runner: CellRunner, study_index: int, output: Path, share: CellShare) -> None:
        """Run a share's missing cells.

        ``study_index`` is this benchmark's index in the runner.
        """
        config = self.study_data.config
        cells = cells_to_run(self.cells)
        groups = group_by_fit(config, cells)
        # of N shares, share i has the groups i, i + N, i + 2 N, ...
        groups_of_share = groups[share.index :: share.n_shares]
        cells_of_share = list(itertools.chain.from_iterable(groups_of_share))
        finished_cells = finished_results(self.study_data, cells_of_share, output)
        missing_cells = [cell for cell in cells_of_share if cell not in finished_cells]
        if not missing_cells:
            logger.info("%s: all cells are there: there is nothing to do", config.name)
        # missing cells whose document is there, but is not valid
        n_stale = sum((output / cell.path).is_file() for cell in missing_cells)
        if n_stale:
            logger.info(
                "%s: %d cells are of older code, other data or other parameters, or damaged, and "
                "are run again",
                config.name,
                n_stale,
            )
        missing_groups = group_by_fit(config, missing_cells)
        run_cells(runner, study_index, missing_groups, output, n_done=len(finished_cells))

    def board(self, output: Path) -> Board:
        """Make the board with all cells' results."""
        cells = cells_to_run(self.cells)
        results = finished_results(self.study_data, cells, output)
        n_missing = len(cells) - len(results)
        if n_missing:
            raise ProvenanceError(
                f"{n_missing} cells do not fit the code or the data that this process has read, "
                "because something changed meanwhile. Start it again: only these cells are run."
            )
        bootstrap = cache(partial(load_bootstrap, output))
        return Board(self.study_data.config, self.cells, results, bootstrap)


def refuse_contradictions(benchmarks: Sequence[_OpenBenchmark]) -> None:
    """Refuse benchmarks that share an output folder and would give a cell different results."""
    # maps each cell to the name of the first benchmark with this cell, and to the facts that
    # decide the result there
    first_use: dict[Cell, tuple[str, dict[str, object]]] = {}
    for benchmark in benchmarks:
        name = benchmark.study_data.config.name
        for cell in cells_to_run(benchmark.cells):
            facts = deciding_facts(benchmark.study_data, cell)
            # for a new cell, ``first_facts`` are ``facts``, so nothing differs
            first_name, first_facts = first_use.setdefault(cell, (name, facts))
            differing = [
                key for key in first_facts | facts if first_facts.get(key) != facts.get(key)
            ]
            if differing:
                fact_names = ", ".join(differing)
                raise UsageError(
                    f"{first_name} and {name} both have {cell}, and mean different things by it: "
                    f"they differ in {fact_names}. "
                    "Give one of them another name, or each an output of its own."
                )


def remove_leftovers(root: Path) -> None:
    """Remove half-written files from killed processes, but keep the files of running processes."""
    with convert_os_errors(f"cannot clean {root / 'cells'}"):
        for path in (root / "cells").rglob(".*.tmp"):
            if is_leftover(path):
                path.unlink(missing_ok=True)


def finished_results(
    study_data: StudyData, cells: Sequence[Cell], root: Path
) -> dict[Cell, CellResult]:
    """Load the results of ``cells``, by cell. A cell without a valid result is left out."""
    results = {}
    for cell in cells:
        try:
            facts = deciding_facts(study_data, cell)
            fingerprint = digest(facts)
            result = load_result(root, cell, fingerprint)
        except ProvenanceError as error:
            logger.warning("%s %s is run again.", error, cell)
            continue
        if result is not None:
            results[cell] = result
    return results

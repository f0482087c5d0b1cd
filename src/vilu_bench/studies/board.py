"""Benchmark results by method, data set and setting, and differences between results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import numpy as np

from vilu.metrics.bootstrap import Quantity
from vilu.metrics.counts import Floats
from vilu.text import join_distinct
from vilu_bench.studies.cells import Cell
from vilu_bench.studies.config import Config
from vilu_bench.studies.parts import Names
from vilu_bench.studies.result import CellResult

LoadBootstrap = Callable[[Cell], Floats]
"""Returns the bootstrap values (M ranking metrics, B resamples) of a cell that was run."""

MethodCase = tuple[str, str, str]  # method, data set, setting


@dataclass(frozen=True)
class Entrant:
    """A method's results on a data set in a setting, by seed."""

    method_case: MethodCase
    results: Mapping[int, CellResult]  # by seed, only results with a value to rank by
    run_cells: Mapping[int, Cell]  # for each seed in ``results``, the cell that was run
    refused_seeds: tuple[int, ...]  # planned seeds that are missing in ``results``
    reason: str | None  # why the first refused seed has no result, or None if none is refused
    load_bootstrap: LoadBootstrap
    ranking_metrics: Names  # metrics with bootstrap values. Methods are ranked by the first metric.

    @property
    def method(self) -> str:
        """The method's label."""
        return self.method_case[0]

    @property
    def data(self) -> str:
        """The data set that the method is tested on."""
        return self.method_case[1]

    @property
    def ranking_value(self) -> float:
        """Mean of the ranking metric, or 0 if the metric is undefined."""
        return self.mean(self.ranking_metrics[0]) or 0.0

    @property
    def n_runs(self) -> int:
        """Number of different cells that were run. If the seed changes nothing, the number is 1."""
        return len(set(self.run_cells.values()))

    def mean(self, metric: str) -> float | None:
        """Average a metric over seeds, or return None if the metric is undefined for any seed."""
        values = [result.value(metric) for result in self.results.values()]
        return _mean_if_known(values)

    def quantity(self, metric: str, seeds: Sequence[int] | None = None) -> Quantity:
        """Average one of ``ranking_metrics`` over seeds, by default all seeds with a result."""
        if seeds is None:
            seeds = list(self.results)
        row_of_metric = self.ranking_metrics.index(metric)
        values = []
        bootstrap_values = []
        for seed in seeds:
            values.append(self.results[seed].value(metric))
            bootstrap = self.load_bootstrap(self.run_cells[seed])
            bootstrap_values.append(bootstrap[row_of_metric])
        value_per_seed = np.array(values, dtype=np.float64)
        bootstrap_per_seed = np.stack(bootstrap_values)
        return Quantity.over_seeds(value_per_seed, bootstrap_per_seed)

    def difference_from(self, rival: Entrant, metric: str) -> Quantity | None:
        """Subtract the rival's mean from this mean, over common seeds.

        Return None if the two have no common seed.
        """
        seeds = sorted(self.results.keys() & rival.results.keys())
        if not seeds:
            return None
        return self.quantity(metric, seeds) - rival.quantity(metric, seeds)

    @property
    def accuracy(self) -> float:
        """Share of right answers, as a mean over seeds."""
        # ``results`` has a row per metric, and all these rows have the same accuracy
        return fmean(result.results[0].accuracy for result in self.results.values())


def _mean_if_known(values: Sequence[float | None]) -> float | None:
    """Return the mean of ``values``, or None if a value is None or there are no values."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    if not known:
        return None
    return fmean(known)


def distinct_row_counts(
    field: Literal["n", "n_failures", "n_outside"], entrants: Iterable[Entrant]
) -> tuple[int, ...]:
    """Return all different row counts in the results of entrants, in ascending order.

    ``field`` is the count: "n" (test rows), "n_failures" (wrong answers) or "n_outside" (pictures
    outside all classes).
    """
    numbers: set[int] = set()
    for entrant in entrants:
        for result in entrant.results.values():
            first_row = result.results[0]  # a row per metric, all with the same counts
            numbers.add(getattr(first_row, field))
    return tuple(sorted(numbers))


def row_counts_in_words(
    n: Sequence[int], n_failures: Sequence[int], n_outside: Sequence[int]
) -> str:
    """Write how many answers, wrong answers and pictures outside all classes there are."""
    text = f"{join_distinct(n)} answers, {join_distinct(n_failures)} wrong"
    if any(n_outside):
        text += f", {join_distinct(n_outside)} of them for pictures of none of the classes"
    return text


@dataclass(frozen=True)
class MethodMean:
    """A method in a setting, averaged over one or several data sets."""

    parts: tuple[Entrant, ...]  # the method's results on each data set

    def mean(self, metric: str) -> float | None:
        """Average a metric over data sets, or return None if a data set has no value."""
        means = [part.mean(metric) for part in self.parts]
        return _mean_if_known(means)

    def quantity(self, metric: str) -> Quantity:
        """Average a metric in ``ranking_metrics`` over data sets."""
        quantities = [part.quantity(metric) for part in self.parts]
        return Quantity.mean(quantities)

    def difference_from(self, rival: MethodMean, metric: str) -> Quantity | None:
        """Subtract the rival's mean from this mean, on the same data sets.

        Return None if there is a data set on which the two have no common seed.
        """
        differences = []
        for part, rival_part in zip(self.parts, rival.parts, strict=True):
            difference = part.difference_from(rival_part, metric)
            if difference is None:
                return None
            differences.append(difference)
        return Quantity.mean(differences)


class Board:
    """All results of a finished benchmark, with bootstrap values."""

    def __init__(
        self,
        config: Config,
        cells: Sequence[Cell],
        results: Mapping[Cell, CellResult],
        load_bootstrap: LoadBootstrap,
    ) -> None:
        self.config = config
        self.cells = tuple(cells)
        self.results = results
        self.seeds: dict[MethodCase, frozenset[int]] = {}  # all planned seeds
        self.entrants: dict[MethodCase, Entrant] = {}
        cells_by_case = _cells_by_method_case(cells)
        for method_case, cells_of_case in cells_by_case.items():
            self.seeds[method_case] = frozenset(cell.seed for cell in cells_of_case)
            self.entrants[method_case] = _entrant(
                method_case, cells_of_case, results, load_bootstrap, config.ranking_metrics
            )

    def find(self, method: str, data: str, setting: str) -> Entrant | None:
        """Return a method's results on a data set in a setting, or None if there is no result."""
        entrant = self.entrants.get((method, data, setting))
        if entrant is None:
            return None
        if not entrant.results:
            return None
        return entrant

    def blocks(self) -> dict[tuple[str, str], list[Entrant]]:
        """Group entrants by data set and setting, including entrants without a result."""
        groups: dict[tuple[str, str], list[Entrant]] = {}
        for (_, data, setting), entrant in self.entrants.items():
            groups.setdefault((data, setting), []).append(entrant)
        return groups


def _cells_by_method_case(cells: Sequence[Cell]) -> dict[MethodCase, list[Cell]]:
    """Group cells by method, data set and setting. Cells in a group differ only in the seed."""
    groups: dict[MethodCase, list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.method, cell.data, cell.setting), []).append(cell)
    return groups


def _entrant(
    method_case: MethodCase,
    cells: Sequence[Cell],
    results: Mapping[Cell, CellResult],
    load_bootstrap: LoadBootstrap,
    ranking_metrics: Names,
) -> Entrant:
    """Collect a method's results on a data set in a setting, from the cells."""
    result_of_seed = {}
    run_cells = {}
    refused_seeds = []
    reason = None
    for cell in cells:
        result = results[cell.result_cell]
        if result.value(ranking_metrics[0]) is not None:
            result_of_seed[cell.seed] = result
            run_cells[cell.seed] = cell.result_cell
            continue
        refused_seeds.append(cell.seed)
        if reason is None:
            reason = _why_no_value(result, ranking_metrics[0])
    return Entrant(
        method_case=method_case,
        results=result_of_seed,
        run_cells=run_cells,
        refused_seeds=tuple(refused_seeds),
        reason=reason,
        load_bootstrap=load_bootstrap,
        ranking_metrics=ranking_metrics,
    )


def _why_no_value(result: CellResult, metric: str) -> str:
    """Say why a result has no value for ``metric``."""
    if result.refused is not None:
        return result.refused.reason
    for row in result.results:
        if row.metric == metric:
            return str(row.why)
    return f"its document has no {metric}"

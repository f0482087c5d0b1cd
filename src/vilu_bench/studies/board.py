"""The results of a benchmark by method, data set and setting, ready to be compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import numpy as np

from vilu.metrics.bootstrap import Quantity
from vilu.metrics.counts import Floats
from vilu.text import span
from vilu_bench.studies.cells import Cell
from vilu_bench.studies.config import Config
from vilu_bench.studies.parts import RANKED_BY
from vilu_bench.studies.result import CellResult

Bootstrap = Callable[[Cell], Floats]  # (M, B) bootstrap values of a cell that was run

BEST = RANKED_BY[0]
Place = tuple[str, str, str]  # method, data set, setting


@dataclass(frozen=True)
class Entrant:
    """A method's results on one data set in one setting, by seed."""

    place: Place
    found: Mapping[int, CellResult]  # results that have a metric, by seed
    runs: Mapping[int, Cell]
    refused_seeds: tuple[int, ...]
    reason: str | None  # why; None where all have one
    bootstrap: Bootstrap

    @property
    def method(self) -> str:
        """Its label."""
        return self.place[0]

    @property
    def n_runs(self) -> int:
        """Number of different results; 1 where seeds make no difference."""
        return len(set(self.runs.values()))

    def mean(self, metric: str) -> float | None:
        """Over seeds; None where a metric is undefined."""
        values = [result.value(metric) for result in self.found.values()]
        known = [value for value in values if value is not None]
        return fmean(known) if known and len(known) == len(values) else None

    def quantity(self, metric: str, seeds: Sequence[int] | None = None) -> Quantity:
        """The mean of one of ``RANKED_BY`` over seeds, by default all that there are."""
        row, chosen = RANKED_BY.index(metric), list(self.found if seeds is None else seeds)
        values = np.array([self.found[seed].value(metric) for seed in chosen], dtype=np.float64)
        return Quantity.over_seeds(
            values, np.stack([self.bootstrap(self.runs[seed])[row] for seed in chosen])
        )

    def less(self, other: Entrant, metric: str) -> Quantity | None:
        """This one's less the other's on the seeds that both have; None where there is none."""
        seeds = sorted(self.found.keys() & other.found.keys())
        return self.quantity(metric, seeds) - other.quantity(metric, seeds) if seeds else None

    @property
    def accuracy(self) -> float:
        """Share of right zero-shot answers, as a mean over seeds."""
        return fmean(result.results[0].accuracy for result in self.found.values())


def occurring(
    field: Literal["n", "n_failures", "n_outside"], entrants: Iterable[Entrant]
) -> tuple[int, ...]:
    """Numbers of test rows, of wrong answers, or of those for pictures of none of the classes, that occur."""
    results = (result for entrant in entrants for result in entrant.found.values())
    return tuple(sorted({getattr(result.results[0], field) for result in results}))


def counted_rows(n: Sequence[int], n_failures: Sequence[int], n_outside: Sequence[int]) -> str:
    """Numbers that occur, in words."""
    strangers = (
        f", {span(n_outside)} of them for pictures of none of the classes" if any(n_outside) else ""
    )
    return f"{span(n)} answers, {span(n_failures)} wrong{strangers}"


@dataclass(frozen=True)
class Mean:
    """A method in one setting, averaged over data sets: over several, or one."""

    parts: tuple[Entrant, ...]

    def mean(self, metric: str) -> float | None:
        """Over data sets; None where a metric is undefined on one."""
        known = [value for value in (part.mean(metric) for part in self.parts) if value is not None]
        return fmean(known) if len(known) == len(self.parts) else None

    def quantity(self, metric: str) -> Quantity:
        """The mean over data sets of one of ``RANKED_BY``."""
        return Quantity.mean([part.quantity(metric) for part in self.parts])

    def less(self, other: Mean, metric: str) -> Quantity | None:
        """This one's less the other's, both on the same data sets; None where they have no seed in common."""
        differences = [
            mine.less(theirs, metric) for mine, theirs in zip(self.parts, other.parts, strict=True)
        ]
        known = [difference for difference in differences if difference is not None]
        return Quantity.mean(known) if len(known) == len(differences) else None


class Board:
    """All results of a benchmark whose every cell has one, and how their bootstrap values are read."""

    def __init__(
        self,
        config: Config,
        cells: Sequence[Cell],
        results: Mapping[Cell, CellResult],
        bootstrap: Bootstrap,
    ) -> None:
        self.config, self.cells, self.results = config, tuple(cells), results
        places: dict[Place, list[Cell]] = {}
        for cell in cells:
            places.setdefault((cell.method, cell.data, cell.setting), []).append(cell)
        self.seeds = {
            place: frozenset(cell.seed for cell in found) for place, found in places.items()
        }
        self.entrants = {
            place: _entrant(place, found, results, bootstrap) for place, found in places.items()
        }

    def find(self, method: str, data: str, setting: str) -> Entrant | None:
        """A method that has a result there."""
        entrant = self.entrants.get((method, data, setting))
        return entrant if entrant is not None and entrant.found else None

    def blocks(self) -> dict[tuple[str, str], list[Entrant]]:
        """All methods by data set and setting, with a result or without."""
        groups: dict[tuple[str, str], list[Entrant]] = {}
        for (_, data, setting), entrant in self.entrants.items():
            groups.setdefault((data, setting), []).append(entrant)
        return groups


def _entrant(
    place: Place, cells: Sequence[Cell], results: Mapping[Cell, CellResult], bootstrap: Bootstrap
) -> Entrant:
    found = {
        cell.seed: results[cell.run] for cell in cells if results[cell.run].value(BEST) is not None
    }
    missing = [cell for cell in cells if cell.seed not in found]
    runs = {cell.seed: cell.run for cell in cells if cell.seed in found}
    reason = _reason(results[missing[0].run]) if missing else None
    return Entrant(place, found, runs, tuple(cell.seed for cell in missing), reason, bootstrap)


def _reason(result: CellResult) -> str:
    if result.refused is not None:
        return result.refused.reason
    return next(
        (str(row.why) for row in result.results if row.metric == BEST),
        f"its document has no {BEST}",
    )

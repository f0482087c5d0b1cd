"""From cells to the table: means over seeds, intervals, differences, wins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean

import numpy as np

from vilu.benchmark.cells import Cell
from vilu.benchmark.config import Config
from vilu.benchmark.resampling import RANKED_BY, Floats, Gap, Interval, gap, interval
from vilu.benchmark.result import CellResult
from vilu.results import ResultRow, ResultTable

Bootstrap = Callable[[Cell], Floats]
"""(M, B) bootstrap values of a cell that was run."""

BEST = RANKED_BY[0]


@dataclass(frozen=True)
class Line:
    """A method in a block.

    Attributes:
        method: Its label.
        variant: What the method adds to its name after the fit, where it has several kinds.
        rank: 1 + the number of methods with a higher mean AUROC.
        n_runs: Number of different results behind the means; 1 where seeds make no difference.
        values: Mean over seeds of every metric, None where it is undefined.
        intervals: Of the metrics ``RANKED_BY``: bootstrap over test rows and seeds.
        against: The best other method.
        gap: AUROC less that of ``against``, paired, on the seeds that both have; None where there is none.
        fit_seconds: Mean; None where nothing is fitted.
        rows_per_second: Mean speed of scoring.
        refused_seeds: Seeds on which the method gave no result.
    """

    method: str
    variant: str
    rank: int
    n_runs: int
    values: dict[str, float | None]
    intervals: dict[str, Interval]
    against: str | None
    gap: Gap | None
    fit_seconds: float | None
    rows_per_second: float
    refused_seeds: tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """All methods on one data set in one setting, best first.

    Attributes:
        data: The data set.
        setting: Name of the setting.
        description: The setting in words.
        n: Numbers of test rows that occur.
        n_failures: Numbers of wrong answers that occur.
        lines: Methods with a result.
        refused: Reasons of the others, by method.
        contests: AUROC by method, for every seed that all methods of ``lines`` were to run.
    """

    data: str
    setting: str
    description: str
    n: tuple[int, ...]
    n_failures: tuple[int, ...]
    lines: tuple[Line, ...]
    refused: dict[str, str]
    contests: dict[int, dict[str, float]]


@dataclass(frozen=True)
class Standing:
    """A method over all blocks and seeds.

    Attributes:
        method: Its label.
        wins: Contests in which it has the highest AUROC; shared by those that tie.
        mean_rank: Over the contests it took part in; those that tie share the mean of their ranks.
        contests: How many those are.
    """

    method: str
    wins: float
    mean_rank: float
    contests: int


@dataclass(frozen=True)
class Summary:
    """What a benchmark found."""

    blocks: tuple[Block, ...]
    standings: tuple[Standing, ...]
    n_contests: int
    results: ResultTable

    def to_dict(self) -> dict[str, object]:
        """Plain JSON, without the single results."""
        blocks = [asdict(block) for block in self.blocks]
        return {"blocks": blocks, "standings": [asdict(s) for s in self.standings], "n_contests": self.n_contests}


def summarise(
    config: Config, cells: Sequence[Cell], results: Mapping[Cell, CellResult], bootstrap: Bootstrap
) -> Summary:
    """The summary of a benchmark whose every cell has a result (that of ``cell.run``)."""
    groups: dict[tuple[str, str], dict[str, list[Cell]]] = {}
    for cell in cells:
        groups.setdefault((cell.data, cell.setting), {}).setdefault(cell.method, []).append(cell)
    blocks = tuple(
        _block(config, data, setting, methods, results, bootstrap) for (data, setting), methods in groups.items()
    )
    contests = [contest for block in blocks for contest in block.contests.values()]
    table = ResultTable(tuple(_rows(cells, results)))
    return Summary(blocks, standings(contests), len(contests), table)


def _rows(cells: Sequence[Cell], results: Mapping[Cell, CellResult]) -> list[ResultRow]:
    """The rows of every block, those that several seeds share once."""
    runs = dict.fromkeys((cell.run, cell.data, cell.setting) for cell in cells)
    return [replace(row, split=setting) for run, _, setting in runs for row in results[run].results]


def standings(contests: Sequence[Mapping[str, float]]) -> tuple[Standing, ...]:
    """Wins and mean ranks, the most wins first."""
    ranks: dict[str, list[float]] = {}
    wins: dict[str, float] = {}
    for contest in contests:
        values = list(contest.values())
        for method, value in contest.items():
            better, equal = sum(v > value for v in values), values.count(value)
            ranks.setdefault(method, []).append(1 + better + (equal - 1) / 2)
            wins[method] = wins.get(method, 0.0) + (0.0 if better else 1 / equal)
    made = [Standing(method, wins[method], fmean(places), len(places)) for method, places in ranks.items()]
    return tuple(sorted(made, key=lambda s: (-s.wins, s.mean_rank, s.method)))


@dataclass(frozen=True)
class _Entrant:
    """A method's results in a block, by seed."""

    method: str
    found: dict[int, CellResult]
    runs: dict[int, Cell]
    refused_seeds: tuple[int, ...]

    def mean(self, metric: str) -> float | None:
        values = [result.value(metric) for result in self.found.values()]
        known = [value for value in values if value is not None]
        return fmean(known) if len(known) == len(values) else None

    def per_seed(self, seeds: Sequence[int]) -> Floats:
        return np.array([self.found[seed].value(BEST) for seed in seeds], dtype=np.float64)


def _entrant(method: str, cells: Sequence[Cell], results: Mapping[Cell, CellResult]) -> _Entrant:
    found = {cell.seed: results[cell.run] for cell in cells if results[cell.run].value(BEST) is not None}
    missing = tuple(cell.seed for cell in cells if cell.seed not in found)
    return _Entrant(method, found, {cell.seed: cell.run for cell in cells if cell.seed in found}, missing)


def _reason(cells: Sequence[Cell], results: Mapping[Cell, CellResult]) -> str:
    first = results[cells[0].run]
    if first.refused is not None:
        return first.refused.reason
    return next(str(row.why) for row in first.results if row.metric == BEST)


def _block(
    config: Config,
    data: str,
    setting: str,
    methods: Mapping[str, Sequence[Cell]],
    results: Mapping[Cell, CellResult],
    bootstrap: Bootstrap,
) -> Block:
    entrants = [_entrant(method, cells, results) for method, cells in methods.items()]
    able = sorted((e for e in entrants if e.found), key=_order)
    seeds = set.intersection(*({cell.seed for cell in methods[e.method]} for e in able)) if able else set()
    rows = [result.results[0] for e in able for result in e.found.values()]
    return Block(
        data=data,
        setting=setting,
        description=str(config.settings[setting]),
        n=tuple(sorted({row.n for row in rows})),
        n_failures=tuple(sorted({row.n_failures for row in rows})),
        lines=_lines(config, able, bootstrap),
        refused={e.method: _reason(methods[e.method], results) for e in entrants if not e.found},
        contests={
            seed: {e.method: float(e.per_seed([seed])[0]) for e in able if seed in e.found} for seed in sorted(seeds)
        },
    )


def _order(entrant: _Entrant) -> tuple[float, float, str]:
    best, second = (entrant.mean(metric) or 0.0 for metric in RANKED_BY)
    return -best, second, entrant.method


def _lines(config: Config, able: Sequence[_Entrant], bootstrap: Bootstrap) -> tuple[Line, ...]:
    loaded = {run: bootstrap(run) for entrant in able for run in entrant.runs.values()}
    means = [entrant.mean(BEST) or 0.0 for entrant in able]
    lines = []
    for entrant, mean in zip(able, means, strict=True):
        values = np.stack([loaded[run] for run in entrant.runs.values()], axis=1)  # (M, S, B)
        other = next((e for e in able if e is not entrant), None)
        timings = [result.timing for result in entrant.found.values() if result.timing is not None]
        fits = [timing.fit_seconds for timing in timings if timing.fit_seconds is not None]
        lines.append(
            Line(
                method=entrant.method,
                variant=next(iter(entrant.found.values())).variant,
                rank=1 + sum(value > mean for value in means),
                n_runs=len(set(entrant.runs.values())),
                values={metric: entrant.mean(metric) for metric in config.metrics},
                intervals={name: interval(values[i], config.confidence) for i, name in enumerate(RANKED_BY)},
                against=None if other is None else other.method,
                gap=None if other is None else _gap(entrant, other, loaded, config.confidence),
                fit_seconds=fmean(fits) if fits else None,
                rows_per_second=fmean(timing.rows_per_second for timing in timings),
                refused_seeds=entrant.refused_seeds,
            )
        )
    return tuple(lines)


def _gap(a: _Entrant, b: _Entrant, loaded: Mapping[Cell, Floats], confidence: float) -> Gap | None:
    seeds = sorted(a.found.keys() & b.found.keys())
    if not seeds:
        return None
    values_a, values_b = (np.stack([loaded[e.runs[seed]][0] for seed in seeds]) for e in (a, b))
    return gap(a.per_seed(seeds), b.per_seed(seeds), values_a, values_b, confidence)

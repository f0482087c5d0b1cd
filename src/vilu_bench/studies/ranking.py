"""Methods ranked over data sets, and the table of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean

from vilu.metrics.bootstrap import Difference, Interval
from vilu.metrics.catalog import METRICS, but_for
from vilu.outcomes.results import ResultRow, ResultTable
from vilu.text import NOTHING, aligned, short, span
from vilu_bench.studies.board import BEST, Board, Entrant, counted_rows, occurring
from vilu_bench.studies.cells import Cell
from vilu_bench.studies.config import Config
from vilu_bench.studies.parts import RANKED_BY
from vilu_bench.studies.result import Timing

REASON_LENGTH = 200


@dataclass(frozen=True)
class Ranked:
    """A method on one data set in one setting."""

    method: str
    variant: str  # what the method adds to its name after the fit, where it has several kinds
    rank: int  # 1 + the number of methods with a higher mean AUROC
    n_runs: int  # Number of different results behind the means; 1 where seeds make no difference
    values: dict[str, float | None]  # mean over seeds of every metric, None where it is undefined
    intervals: dict[
        str, Interval
    ]  # of the metrics ``RANKED_BY``: bootstrap over test rows and seeds
    against: str | None  # the best other method
    # AUROC less that of ``against``, paired, on the seeds that both have; None where there is none
    gap: Difference | None
    refused_seeds: tuple[int, ...]  # seeds on which the method gave no result

    def to_dict(self) -> dict[str, object]:
        """Plain JSON."""
        ends = {
            name: {"low": found.ci_low, "high": found.ci_high}
            for name, found in self.intervals.items()
        }
        gap = self.gap and dict(
            zip(("difference", "low", "high", "p_value"), self.gap, strict=True)
        )
        return {**asdict(self), "intervals": ends, "gap": gap}


@dataclass(frozen=True)
class Ranking:
    """All methods on one data set in one setting, best first."""

    data: str
    setting: str
    description: str
    n: tuple[int, ...]  # Numbers of test rows that occur
    n_failures: tuple[int, ...]  # Numbers of wrong answers that occur
    lines: tuple[Ranked, ...]  # methods with a result
    refused: dict[str, str]  # reasons of the others, by method
    contests: dict[
        int, dict[str, float]
    ]  # AUROC by method, for every seed that all methods of ``lines`` were to run
    n_outside: tuple[
        int, ...
    ] = ()  # Numbers of wrong answers for pictures of none of the classes that occur

    def to_dict(self) -> dict[str, object]:
        """Plain JSON."""
        said = {
            name: value
            for name, value in vars(self).items()
            if name != "n_outside" or any(self.n_outside)
        }
        return {**said, "lines": [line.to_dict() for line in self.lines]}


@dataclass(frozen=True)
class Standing:
    """A method over all data sets, settings and seeds."""

    method: str
    wins: float  # contests in which it has the highest AUROC; shared by those that tie
    mean_rank: (
        float  # over the contests it took part in; those that tie share the mean of their ranks
    )
    contests: int  # how many those are


@dataclass(frozen=True)
class Summary:
    """What a benchmark found."""

    blocks: tuple[Ranking, ...]
    standings: tuple[Standing, ...]
    n_contests: int
    results: ResultTable

    def to_dict(self) -> dict[str, object]:
        """Plain JSON, without the single results."""
        blocks = [block.to_dict() for block in self.blocks]
        return {
            "blocks": blocks,
            "standings": [asdict(s) for s in self.standings],
            "n_contests": self.n_contests,
        }


def summarise(board: Board) -> Summary:
    """The summary of a benchmark."""
    blocks = tuple(_ranking(board, *where, entrants) for where, entrants in board.blocks().items())
    contests = [contest for block in blocks for contest in block.contests.values()]
    return Summary(blocks, standings(contests), len(contests), ResultTable(tuple(_rows(board))))


def _rows(board: Board) -> list[ResultRow]:
    """The rows of every data set and setting, those that several seeds share once."""
    runs = dict.fromkeys((cell.run, cell.data, cell.setting) for cell in board.cells)
    return [
        replace(row, split=setting)
        for run, _, setting in runs
        for row in board.results[run].results
    ]


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
    made = [
        Standing(method, wins[method], fmean(places), len(places))
        for method, places in ranks.items()
    ]
    return tuple(sorted(made, key=lambda s: (-s.wins, s.mean_rank, s.method)))


def _ranking(board: Board, data: str, setting: str, entrants: Sequence[Entrant]) -> Ranking:
    able = sorted((entrant for entrant in entrants if entrant.found), key=_order)
    seeds = (
        set.intersection(*(set(board.seeds[entrant.place]) for entrant in able)) if able else set()
    )
    return Ranking(
        data=data,
        setting=setting,
        description=str(board.config.settings[setting]),
        n=occurring("n", able),
        n_failures=occurring("n_failures", able),
        lines=tuple(_ranked(board.config, entrant, able) for entrant in able),
        refused={entrant.method: str(entrant.reason) for entrant in entrants if not entrant.found},
        contests={
            seed: {
                e.method: float(e.found[seed].value(BEST) or 0.0) for e in able if seed in e.found
            }
            for seed in sorted(seeds)
        },
        n_outside=occurring("n_outside", able),
    )


def _order(entrant: Entrant) -> tuple[float, float, str]:
    best, second = (entrant.mean(metric) or 0.0 for metric in RANKED_BY)
    return -best, second, entrant.method


def _ranked(config: Config, entrant: Entrant, able: Sequence[Entrant]) -> Ranked:
    """A method among those with a result, the best first."""
    mean = entrant.mean(BEST) or 0.0
    other = next((e for e in able if e is not entrant), None)
    difference = None if other is None else entrant.less(other, BEST)
    return Ranked(
        method=entrant.method,
        variant=next(iter(entrant.found.values())).variant,
        rank=1 + sum((e.mean(BEST) or 0.0) > mean for e in able),
        n_runs=entrant.n_runs,
        values={metric: entrant.mean(metric) for metric in config.metrics},
        intervals={name: entrant.quantity(name).interval(config.confidence) for name in RANKED_BY},
        against=None if other is None else other.method,
        gap=None if difference is None else difference.difference(config.confidence),
        refused_seeds=entrant.refused_seeds,
    )


def times_table(board: Board, times: Mapping[Cell, Timing]) -> str:
    """Mean wall times of fits and speeds of scoring; empty where none is known."""
    if not times:
        return ""
    rows = []
    for (data, setting), entrants in board.blocks().items():
        for entrant in entrants:
            known = [times[cell] for cell in entrant.runs.values() if cell in times]
            fits = [one.fit_seconds for one in known if one.fit_seconds is not None]
            speed = NOTHING if not known else f"{fmean(one.rows_per_second for one in known):,.0f}"
            rows.append(
                [data, setting, entrant.method, f"{fmean(fits):.2f}" if fits else NOTHING, speed]
            )
    return "\n".join(
        [
            "wall time with one thread:",
            *aligned([["data", "setting", "method", "fit s", "rows/s"], *rows]),
        ]
    )


def layout(config: Config, summary: Summary) -> str:
    """Everything, for reading."""
    parts = [_block_text(config, block) for block in summary.blocks]
    return "\n\n".join([*parts, _standings(summary), "\n".join(_notes(config))])


def _block_text(config: Config, block: Ranking) -> str:
    lines = [f"{block.data}, {block.setting} ({block.description})"]
    if block.lines:
        lines[0] += f": {counted_rows(block.n, block.n_failures, block.n_outside)}"
        percent = f"[{100 * config.confidence:g} %]"
        metrics = [
            METRICS[name].title + (f" {percent}" if name in RANKED_BY else "")
            for name in config.metrics
        ]
        heading = ["#", "method", "runs", *metrics, "best other", f"difference {percent}", "p"]
        lines += aligned([heading, *(_line(config, line) for line in block.lines)])
    reasons: dict[str, list[str]] = {}
    for method, reason in block.refused.items():
        reasons.setdefault(short(reason, REASON_LENGTH), []).append(method)
    return "\n".join(
        [*lines, *(f"no result: {', '.join(of)}: {reason}" for reason, of in reasons.items())]
    )


def _line(config: Config, line: Ranked) -> list[str]:
    gap = line.gap
    return [
        str(line.rank),
        line.method + line.variant,
        str(line.n_runs) + (f" (not {span(line.refused_seeds)})" if line.refused_seeds else ""),
        *(_value(name, line.values[name], line.intervals.get(name)) for name in config.metrics),
        line.against or NOTHING,
        NOTHING
        if gap is None
        else f"{100 * gap.difference:+.2f} [{100 * gap.ci_low:+.2f}, {100 * gap.ci_high:+.2f}]",
        NOTHING if gap is None else f"{gap.p_value:.3g}",
    ]


def _value(metric: str, value: float | None, ends: Interval | None = None) -> str:
    if value is None:
        return NOTHING
    show = METRICS[metric]
    return show.show(value) + (
        "" if ends is None else f" {show.brackets(ends.ci_low, ends.ci_high)}"
    )


def _standings(summary: Summary) -> str:
    """Wins and mean ranks, with the mean AUROC of every data set and setting beside them."""
    blocks = [{line.method: line.values[BEST] for line in block.lines} for block in summary.blocks]
    heading = [
        "method",
        "wins",
        "mean rank",
        "contests",
        *(f"{one.data}/{one.setting}" for one in summary.blocks),
    ]
    rows = [
        [
            standing.method,
            f"{standing.wins:g}",
            f"{standing.mean_rank:.1f}",
            f"{standing.contests} of {summary.n_contests}",
            *(_value(BEST, block.get(standing.method)) for block in blocks),
        ]
        for standing in summary.standings
    ]
    return "\n".join(
        ["all contests (data set × setting × seed), and mean AUROC:", *aligned([heading, *rows])]
    )


def _notes(config: Config) -> list[str]:
    unit = f"in percent{but_for(METRICS[name] for name in config.metrics)}"
    return [
        f"{unit}; brackets: {100 * config.confidence:g} % bootstrap over test rows (stratified by failure) and "
        f"seeds, {config.resamples} resamples",
        "runs: different results behind a mean; a method that no seed can change is run once. best other, difference, "
        "p: mean AUROC less that of the best other method, paired by rows and seeds",
        "wins: highest AUROC of a contest, shared by ties; a contest is a seed that every method of a table was to run",
        *(f"{METRICS[name].title}: {METRICS[name].convention}" for name in config.metrics),
        f"{NOTHING}: undefined, or the method was refused",
    ]

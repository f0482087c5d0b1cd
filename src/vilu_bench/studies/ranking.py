"""Ranks methods on each data set and over all data sets, and writes the result as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean

from vilu.metrics.bootstrap import Difference, Interval, Quantity
from vilu.metrics.catalog import METRICS, not_in_percent
from vilu.outcomes.results import ResultRow, ResultTable
from vilu.text import EMPTY_CELL, align_columns, join_distinct, shorten_line
from vilu_bench.studies.board import Board, Entrant, distinct_row_counts, row_counts_in_words
from vilu_bench.studies.cells import Cell
from vilu_bench.studies.config import Config
from vilu_bench.studies.result import Timing

REASON_LENGTH = 200  # maximum number of characters for a reason in the text


@dataclass(frozen=True)
class RankedMethod:
    """A method's rank and numbers on a data set in a setting."""

    method: str
    variant: str  # suffix on the method's label, such as " (model)", empty for most methods
    rank: int  # 1 + the number of methods with a higher mean of the ranking metric
    n_runs: int  # number of different results in the mean, which is 1 if the seed changes nothing
    values: dict[str, float | None]  # each metric's mean over seeds, or None if undefined
    # bootstrap intervals over test rows and seeds, by metric in ``Config.ranking_metrics``
    intervals: dict[str, Interval]
    against: str | None  # the best other method, or None if there is none
    # Mean ranking metric minus that of ``against``, over the seeds that both have. None: there is
    # no other method or no common seed.
    gap: Difference | None
    refused_seeds: tuple[int, ...]  # seeds without a result for the method

    def to_dict(self) -> dict[str, object]:
        """Return the fields as plain JSON."""
        content = asdict(self)
        content["intervals"] = {
            name: {"low": interval.ci_low, "high": interval.ci_high}
            for name, interval in self.intervals.items()
        }
        if self.gap is not None:
            content["gap"] = {
                "difference": self.gap.difference,
                "low": self.gap.ci_low,
                "high": self.gap.ci_high,
                "p_value": self.gap.p_value,
            }
        return content


Contest = Mapping[str, float]
"""Maps each method to its ranking metric, on one data set, in one setting, with one seed."""


@dataclass(frozen=True)
class Ranking:
    """All methods on a data set in a setting, best first."""

    data: str
    setting: str
    description: str  # description of the setting
    n: tuple[int, ...]  # the different numbers of test rows
    n_failures: tuple[int, ...]  # the different numbers of wrong answers
    lines: tuple[RankedMethod, ...]  # methods with a result
    refused: dict[str, str]  # maps methods without a result to the reason
    # Contests (``Contest``) by seed, for the seeds that were planned for all methods in ``lines``.
    contests: dict[int, dict[str, float]]
    # the different numbers of test rows with pictures outside all classes
    n_outside: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """Return the fields as plain JSON."""
        content = dict(vars(self))
        content["lines"] = [line.to_dict() for line in self.lines]
        if not any(self.n_outside):
            del content["n_outside"]
        return content


@dataclass(frozen=True)
class Standing:
    """A method's wins and mean rank over all contests (``Contest``)."""

    method: str
    # Number of contests that the method wins. If k methods win together, each gets 1/k.
    wins: float
    # Mean rank over the method's contests. Tied methods share the mean of the ranks they occupy.
    mean_rank: float
    contests: int  # number of contests with the method


@dataclass(frozen=True)
class Summary:
    """All rankings and results of a benchmark."""

    blocks: tuple[Ranking, ...]
    standings: tuple[Standing, ...]
    n_contests: int
    results: ResultTable

    def to_dict(self) -> dict[str, object]:
        """Return rankings and standings as plain JSON, without the result table."""
        return {
            "blocks": [block.to_dict() for block in self.blocks],
            "standings": [asdict(standing) for standing in self.standings],
            "n_contests": self.n_contests,
        }


def summarise(board: Board) -> Summary:
    """Summarise a benchmark's results."""
    blocks = []
    contests: list[Contest] = []
    for (data, setting), entrants in board.blocks().items():
        block = _rank_methods(board, data, setting, entrants)
        blocks.append(block)
        contests += block.contests.values()
    all_standings = standings(contests)
    result_rows = _result_rows(board)
    table = ResultTable(tuple(result_rows))
    return Summary(
        blocks=tuple(blocks),
        standings=all_standings,
        n_contests=len(contests),
        results=table,
    )


def _result_rows(board: Board) -> list[ResultRow]:
    """List the result rows for every data set and setting.

    If several seeds share a result, the result's rows are listed once.
    """
    rows = []
    distinct_results = dict.fromkeys(
        (cell.result_cell, cell.data, cell.setting) for cell in board.cells
    )
    for result_cell, _, setting in distinct_results:
        for row in board.results[result_cell].results:
            # the result may be that of a cell in another setting
            row_of_setting = replace(row, split=setting)
            rows.append(row_of_setting)
    return rows


def standings(contests: Sequence[Contest]) -> tuple[Standing, ...]:
    """Compute all methods' wins and mean ranks, sorted by descending wins."""
    ranks: dict[str, list[float]] = {}
    wins: dict[str, float] = {}
    for contest in contests:
        values = list(contest.values())
        for method, value in contest.items():
            n_better = sum(rival > value for rival in values)
            n_equal = values.count(value)  # including the method
            # tied methods share the mean of the ranks n_better + 1 to n_better + n_equal
            rank = 1 + n_better + (n_equal - 1) / 2
            ranks.setdefault(method, []).append(rank)
            wins.setdefault(method, 0.0)  # before its first contest, a method has no wins
            if n_better == 0:
                wins[method] += 1 / n_equal
    all_standings = [
        Standing(method, wins[method], fmean(method_ranks), len(method_ranks))
        for method, method_ranks in ranks.items()
    ]
    all_standings.sort(key=_most_wins_first)
    return tuple(all_standings)


def _most_wins_first(standing: Standing) -> tuple[float, float, str]:
    """Return a sort key: descending wins, then ascending mean rank, then name."""
    return -standing.wins, standing.mean_rank, standing.method


def _rank_methods(board: Board, data: str, setting: str, entrants: Sequence[Entrant]) -> Ranking:
    """Rank the methods on a data set in a setting."""
    entrants_with_result = []
    refused = {}
    for entrant in entrants:
        if entrant.results:
            entrants_with_result.append(entrant)
        else:
            refused[entrant.method] = str(entrant.reason)
    entrants_with_result.sort(key=_best_first)
    n_rows = distinct_row_counts("n", entrants_with_result)
    n_failures = distinct_row_counts("n_failures", entrants_with_result)
    n_outside = distinct_row_counts("n_outside", entrants_with_result)
    lines = [
        _ranked_method(board.config, entrant, entrants_with_result)
        for entrant in entrants_with_result
    ]
    contests = _contests(board, entrants_with_result)
    return Ranking(
        data=data,
        setting=setting,
        description=str(board.config.settings[setting]),
        n=n_rows,
        n_failures=n_failures,
        lines=tuple(lines),
        refused=refused,
        contests=contests,
        n_outside=n_outside,
    )


def _best_first(entrant: Entrant) -> tuple[float, float, str]:
    """Return a sort key: first metric descending, then second metric ascending, then name."""
    _, second_metric = entrant.ranking_metrics
    return -entrant.ranking_value, entrant.mean(second_metric) or 0.0, entrant.method


def _contests(board: Board, entrants_with_result: Sequence[Entrant]) -> dict[int, dict[str, float]]:
    """Collect the ranking metric by seed and method, for the seeds planned for all entrants."""
    if not entrants_with_result:
        return {}
    seeds = frozenset.intersection(
        *(board.seeds[entrant.method_case] for entrant in entrants_with_result)
    )
    contests: dict[int, dict[str, float]] = {}
    for seed in sorted(seeds):
        contests[seed] = {}
        for entrant in entrants_with_result:
            if seed in entrant.results:
                ranking_value = entrant.results[seed].value(entrant.ranking_metrics[0]) or 0.0
                contests[seed][entrant.method] = float(ranking_value)
    return contests


def _ranked_method(
    config: Config, entrant: Entrant, entrants_with_result: Sequence[Entrant]
) -> RankedMethod:
    """Compute a method's rank and numbers.

    ``entrants_with_result`` are all methods in the ranking, best first.
    """
    rivals = [rival for rival in entrants_with_result if rival is not entrant]
    against = None
    gap = None
    if rivals:
        best_rival = rivals[0]
        against = best_rival.method
        difference = entrant.difference_from(best_rival, entrant.ranking_metrics[0])
        gap = _difference_or_none(difference, config.confidence)
    first_result = next(iter(entrant.results.values()))
    intervals = {
        name: entrant.quantity(name).interval(config.confidence) for name in config.ranking_metrics
    }
    return RankedMethod(
        method=entrant.method,
        variant=first_result.variant,
        rank=1 + _n_better(entrant, rivals),
        n_runs=entrant.n_runs,
        values={metric: entrant.mean(metric) for metric in config.metrics},
        intervals=intervals,
        against=against,
        gap=gap,
        refused_seeds=entrant.refused_seeds,
    )


def _difference_or_none(quantity: Quantity | None, confidence: float) -> Difference | None:
    """Turn a quantity into a difference with an interval. None stays None."""
    if quantity is None:
        return None
    return quantity.difference(confidence)


def _n_better(entrant: Entrant, rivals: Iterable[Entrant]) -> int:
    """Count the rivals with a higher mean of the ranking metric."""
    return sum(rival.ranking_value > entrant.ranking_value for rival in rivals)


def _mean_times(timings: Iterable[Timing]) -> tuple[float | None, float | None]:
    """Average the fit seconds, and the rows scored per second. None if nothing was timed."""
    fit_times = []
    speeds = []
    for timing in timings:
        speeds.append(timing.rows_per_second)
        if timing.fit_seconds is not None:
            fit_times.append(timing.fit_seconds)
    fit_seconds = fmean(fit_times) if fit_times else None
    rows_per_second = fmean(speeds) if speeds else None
    return fit_seconds, rows_per_second


def times_table(board: Board, times: Mapping[Cell, Timing]) -> str:
    """Make a table with mean fit times and mean scoring speeds, or "" without ``times``."""
    if not times:
        return ""
    lines = [["data", "setting", "method", "fit s", "rows/s"]]
    for (data, setting), entrants in board.blocks().items():
        for entrant in entrants:
            fit_seconds, rows_per_second = _mean_times(
                times[cell] for cell in entrant.run_cells.values() if cell in times
            )
            times_shown = _time_texts(fit_seconds, rows_per_second)
            lines.append([data, setting, entrant.method, *times_shown])
    table = align_columns(lines)
    return "\n".join(["wall time with one thread:", *table])


def _time_texts(fit_seconds: float | None, rows_per_second: float | None) -> list[str]:
    """Write a time and a speed as texts."""
    return [
        EMPTY_CELL if fit_seconds is None else f"{fit_seconds:.2f}",
        EMPTY_CELL if rows_per_second is None else f"{rows_per_second:,.0f}",
    ]


def ranking_text(config: Config, summary: Summary) -> str:
    """Write a summary as text: tables by data set and setting, the standings, and notes."""
    parts = [_block_text(config, block) for block in summary.blocks]
    standings_table = _standings_table(summary, config.ranking_metrics[0])
    notes = "\n".join(_notes(config))
    return "\n\n".join([*parts, standings_table, notes])


def _block_text(config: Config, block: Ranking) -> str:
    """Write a ranking as text: a title, a table, and the methods without a result."""
    title = f"{block.data}, {block.setting} ({block.description})"
    lines = [title]
    if block.lines:
        numbers = row_counts_in_words(block.n, block.n_failures, block.n_outside)
        lines = [f"{title}: {numbers}", *_block_table(config, block)]
    methods_of_reason: dict[str, list[str]] = {}  # methods without a result, by reason
    for method, reason in block.refused.items():
        short_reason = shorten_line(reason, REASON_LENGTH)
        methods_of_reason.setdefault(short_reason, []).append(method)
    for reason, methods in methods_of_reason.items():
        refused_methods = ", ".join(methods)
        lines.append(f"no result: {refused_methods}: {reason}")
    return "\n".join(lines)


def _block_table(config: Config, block: Ranking) -> list[str]:
    """Make aligned table lines for the methods with a result, best first."""
    percent = f"[{100 * config.confidence:g} %]"
    heading = ["#", "method", "runs"]
    for name in config.metrics:
        title = METRICS[name].title
        heading.append(f"{title} {percent}" if name in config.ranking_metrics else title)
    heading += ["best other", f"difference {percent}", "p"]
    rows = [_table_row(config, line) for line in block.lines]
    return align_columns([heading, *rows])


def _table_row(config: Config, line: RankedMethod) -> list[str]:
    """Write the cells for a method in a ranking's table."""
    runs = str(line.n_runs)
    if line.refused_seeds:
        runs += f" (not {join_distinct(line.refused_seeds)})"
    cells = [str(line.rank), line.method + line.variant, runs]
    for name in config.metrics:
        interval = line.intervals.get(name)
        cells.append(_value_text(name, line.values[name], interval))
    cells.append(line.against or EMPTY_CELL)
    cells += _gap_texts(line.gap)
    return cells


def _gap_texts(gap: Difference | None) -> list[str]:
    """Write the difference from the best other method, in percent, and the p-value."""
    if gap is None:
        return [EMPTY_CELL, EMPTY_CELL]
    interval = f"[{100 * gap.ci_low:+.2f}, {100 * gap.ci_high:+.2f}]"
    return [f"{100 * gap.difference:+.2f} {interval}", f"{gap.p_value:.3g}"]


def _value_text(name: str, value: float | None, interval: Interval | None = None) -> str:
    """Write a value as text, with the interval if there is an interval."""
    if value is None:
        return EMPTY_CELL
    metric = METRICS[name]
    number = metric.show(value)
    if interval is None:
        return number
    return f"{number} {metric.brackets(interval.ci_low, interval.ci_high)}"


def _standings_table(summary: Summary, metric: str) -> str:
    """Make a table with wins, mean ranks, and ``metric``'s mean on every data set and setting."""
    heading = ["method", "wins", "mean rank", "contests"]
    value_of_method_by_block = []  # for every block, a dict from each method to the metric's value
    for block in summary.blocks:
        heading.append(f"{block.data}/{block.setting}")
        value_of_method_by_block.append({line.method: line.values[metric] for line in block.lines})
    rows = [heading]
    for standing in summary.standings:
        row = [
            standing.method,
            f"{standing.wins:g}",
            f"{standing.mean_rank:.1f}",
            f"{standing.contests} of {summary.n_contests}",
        ]
        for value_of_method in value_of_method_by_block:
            value = value_of_method.get(standing.method)
            row.append(_value_text(metric, value))
        rows.append(row)
    title = f"all contests (data set × setting × seed), and mean {METRICS[metric].title}:"
    table = align_columns(rows)
    return "\n".join([title, *table])


def _notes(config: Config) -> list[str]:
    """Write the notes below all tables."""
    metrics = [METRICS[name] for name in config.metrics]
    unit = f"in percent{not_in_percent(metrics)}"
    ranking_metric = METRICS[config.ranking_metrics[0]].title
    return [
        f"{unit}; brackets: {100 * config.confidence:g} % bootstrap over test rows "
        f"({config.strata}) and seeds, {config.resamples} resamples",
        "runs: different results behind a mean; a method that no seed can change is run once. "
        f"best other, difference, p: mean {ranking_metric} less that of the best other method, "
        "paired by rows and seeds",
        f"wins: highest {ranking_metric} of a contest, shared by ties; "
        "a contest is a seed that every method of a table was to run",
        *(f"{metric.title}: {metric.convention}" for metric in metrics),
        f"{EMPTY_CELL}: undefined, or the method was refused",
    ]

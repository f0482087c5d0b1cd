"""The summary as text: a table per data set and setting, the standings, and what the numbers mean."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vilu.benchmark.board import BEST
from vilu.benchmark.config import Config
from vilu.benchmark.resampling import RANKED_BY, Interval
from vilu.benchmark.summary import Block, Line, Summary
from vilu.metrics.catalog import METRICS

NONE = "-"
REASON_LENGTH = 200


def layout(config: Config, summary: Summary) -> str:
    """Everything, for reading."""
    parts = [_block(config, block) for block in summary.blocks]
    return "\n\n".join([*parts, _standings(summary), "\n".join(_notes(config))])


def _block(config: Config, block: Block) -> str:
    title = f"{block.data}, {block.setting} ({block.description})"
    if block.lines:
        title += f": {_span(block.n)} answers, {_span(block.n_failures)} wrong"
    lines = [title]
    if block.lines:
        percent = f"[{100 * config.confidence:g} %]"
        metrics = [METRICS[name].title + (f" {percent}" if name in RANKED_BY else "") for name in config.metrics]
        heading = ["#", "method", "runs", *metrics, "best other", f"difference {percent}", "p", "fit s", "rows/s"]
        lines += aligned([heading, *(_line(config, line) for line in block.lines)])
    reasons: dict[str, list[str]] = {}
    for method, reason in block.refused.items():
        reasons.setdefault(_short(reason), []).append(method)
    lines += [f"no result: {', '.join(methods)}: {reason}" for reason, methods in reasons.items()]
    return "\n".join(lines)


def _line(config: Config, line: Line) -> list[str]:
    gap, fit = line.gap, line.fit_seconds
    return [
        str(line.rank),
        line.method + line.variant,
        str(line.n_runs) + (f" (not {_span(line.refused_seeds)})" if line.refused_seeds else ""),
        *(_value(line.values[name], line.intervals.get(name)) for name in config.metrics),
        line.against or NONE,
        NONE if gap is None else f"{100 * gap.difference:+.2f} [{100 * gap.low:+.2f}, {100 * gap.high:+.2f}]",
        NONE if gap is None else f"{gap.p_value:.3g}",
        NONE if fit is None else f"{fit:.2f}",
        f"{line.rows_per_second:,.0f}",
    ]


def _value(value: float | None, interval: Interval | None) -> str:
    if value is None:
        return NONE
    ends = "" if interval is None else f" [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
    return f"{100 * value:.1f}{ends}"


def _standings(summary: Summary) -> str:
    """Wins and mean ranks, with the mean AUROC of every block beside them."""
    blocks = [{line.method: line.values[BEST] for line in block.lines} for block in summary.blocks]
    names = [f"{block.data}/{block.setting}" for block in summary.blocks]
    heading = ["method", "wins", "mean rank", "contests", *names]
    rows = [
        [
            standing.method,
            f"{standing.wins:g}",
            f"{standing.mean_rank:.1f}",
            f"{standing.contests} of {summary.n_contests}",
            *(_value(block.get(standing.method), None) for block in blocks),
        ]
        for standing in summary.standings
    ]
    return "\n".join(["all contests (data set × setting × seed), and mean AUROC:", *aligned([heading, *rows])])


def _notes(config: Config) -> list[str]:
    return [
        f"in percent; brackets: {100 * config.confidence:g} % bootstrap over test rows (stratified by failure) and "
        f"seeds, {config.resamples} resamples",
        "runs: different results behind a mean; a method that no seed can change is run once. best other, difference, "
        "p: mean AUROC less that of the best other method, paired by rows and seeds",
        "wins: highest AUROC of a contest, shared by ties; a contest is a seed that every method of a table was to run",
        *(f"{METRICS[name].title}: {METRICS[name].convention}" for name in config.metrics),
        f"{NONE}: undefined, or the method was refused",
    ]


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Columns padded to one width, numbers not told from words."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]


def _span(values: Iterable[object]) -> str:
    return "/".join(map(str, values))


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= REASON_LENGTH else line[: REASON_LENGTH - 1] + "…"

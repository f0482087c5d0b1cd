"""Results laid out for reading: one block per data set, methods as rows, metrics as columns, in percent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vilu.metrics.catalog import METRICS, get_metric

if TYPE_CHECKING:
    from vilu.results import ResultRow

MAIN_METRICS = ("auroc", "fpr95", "aupr_failure", "augrc", "coverage_at_risk_0.05", "ece")
UNDEFINED = "undefined"


@dataclass(frozen=True)
class Block:
    """The results on one data set: a title, a heading, and a line of cells per method."""

    title: str
    heading: list[str]
    lines: list[list[str]]


def text_table(rows: Sequence[ResultRow], metrics: Sequence[str] | None = None) -> str:
    """Aligned plain text, one block per data set, the notes last."""
    shown = _shown(rows, metrics)
    parts = [_text(block) for block in _blocks(rows, shown)]
    return "\n\n".join([*parts, "\n".join(_notes(rows, shown))])


def markdown_table(rows: Sequence[ResultRow], metrics: Sequence[str] | None = None) -> str:
    """Markdown, one table per data set, the notes last."""
    shown = _shown(rows, metrics)
    parts = [_markdown(block) for block in _blocks(rows, shown)]
    return "\n\n".join([*parts, "\n".join(f"- {_escape(note)}" for note in _notes(rows, shown))])


def _text(block: Block) -> str:
    lines = [block.heading, *block.lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = ("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
    return "\n".join([block.title, *aligned])


def _printable(text: str) -> str:
    """On one line and without terminal control: names come from files."""
    return "".join(character if character.isprintable() else " " for character in text)


def _markdown(block: Block) -> str:
    head, *body = ("| " + " | ".join(map(_escape, line)) + " |" for line in (block.heading, *block.lines))
    return "\n".join([f"**{_escape(block.title)}**", "", head, "|---" * len(block.heading) + "|", *body])


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|")


def _shown(rows: Sequence[ResultRow], metrics: Sequence[str] | None) -> Sequence[str]:
    """The metrics asked for, or the main ones, or else whatever there is."""
    if metrics is not None:
        for name in metrics:
            get_metric(name)
        return metrics
    present = list(dict.fromkeys(row.metric for row in rows))
    return [name for name in MAIN_METRICS if name in present] or present


def _blocks(rows: Sequence[ResultRow], shown: Sequence[str]) -> list[Block]:
    groups: dict[str, list[ResultRow]] = {}
    for row in rows:
        groups.setdefault(_where(row), []).append(row)
    return [_block(group, shown) for group in groups.values()]


def _block(rows: Sequence[ResultRow], metrics: Sequence[str]) -> Block:
    lines: dict[tuple[str | None, int | None, int], dict[str, ResultRow]] = {}
    repeats: Counter[tuple[str | None, int | None, str]] = Counter()
    for row in rows:
        key = (row.method, row.seed, row.metric)
        lines.setdefault((row.method, row.seed, repeats[key]), {})[row.metric] = row
        repeats[key] += 1  # a second row of the same name gets a line of its own
    several_seeds = len({row.seed for row in rows}) > 1
    return Block(
        title=_title(rows),
        heading=["method", *map(_heading, metrics)],
        lines=[
            [_label(method, seed if several_seeds else None), *(_cell(found.get(name)) for name in metrics)]
            for (method, seed, _), found in lines.items()
        ],
    )


def _heading(name: str) -> str:
    """Title of a metric; of one that this version does not know, its name."""
    return METRICS[name].title if name in METRICS else _printable(name)


def _label(method: str | None, seed: int | None) -> str:
    return _printable(method or "unnamed") + ("" if seed is None else f" (seed {seed})")


def _cell(row: ResultRow | None) -> str:
    if row is None:
        return ""
    if row.value is None:
        return UNDEFINED
    if row.ci_low is None or row.ci_high is None:
        return f"{100 * row.value:.1f}"
    return f"{100 * row.value:.1f} [{100 * row.ci_low:.1f}, {100 * row.ci_high:.1f}]"


def _title(rows: Sequence[ResultRow]) -> str:
    counts = [
        f"{_span(row.n for row in rows)} answers",
        f"{_span(row.n_failures for row in rows)} wrong",
        f"accuracy {_span(f'{100 * row.accuracy:.1f}' for row in rows)} %",
    ]
    if any(row.n_unlabelled for row in rows):
        counts.append(f"{_span(row.n_unlabelled for row in rows)} unlabelled left out")
    if any(row.n_unusable for row in rows):
        counts.append(f"{_span(row.n_unusable for row in rows)} without a score left out")
    return f"{_where(rows[0])}: {', '.join(counts)}"


def _where(row: ResultRow) -> str:
    return _printable(" ".join(text for text in (row.dataset, row.split) if text)) or "results"


def _span(values: Iterable[object]) -> str:
    return "/".join(dict.fromkeys(map(str, values)))


def _notes(rows: Sequence[ResultRow], shown: Sequence[str]) -> list[str]:
    """Unit, intervals, conventions, and the reasons for what is undefined, each said once."""
    if not rows:
        return ["no results"]
    rows = [row for row in rows if row.metric in shown]
    methods: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.interval:
            methods.setdefault(row.interval, {})[_label(row.method, None)] = None
    several = len(methods) > 1
    intervals = [how + (f" ({', '.join(of)})" if several else "") for how, of in methods.items()]
    notes = ["in percent" + (f"; in brackets: {'; '.join(intervals)}" if intervals else "")]
    notes += [f"{_heading(row.metric)}: {row.convention}" for row in rows]
    notes += [f"undefined on {_where(row)}: {row.why}" for row in rows if row.why]
    return list(dict.fromkeys(map(_printable, notes)))

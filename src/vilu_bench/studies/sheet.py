"""A table of a study, and how it is written: text, Markdown, LaTeX, CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from vilu.metrics.bootstrap import Interval
from vilu.metrics.catalog import METRICS
from vilu.text import (
    NOTHING,
    aligned,
    harmless,
    in_latex,
    in_markdown,
    latex_rows,
    markdown_rows,
    span,
)
from vilu_bench.studies.views import Published

Labels = tuple[str, ...]


@dataclass(frozen=True)
class Shown:
    """A number as a table shows it."""

    metric: str
    value: float | None  # as a fraction; None where it is undefined
    interval: Interval | None = (
        None  # bootstrap over test rows and seeds; None where the metric has none
    )
    n: tuple[int, ...] = ()  # Numbers of test rows that occur
    n_failures: tuple[int, ...] = ()  # Numbers of wrong answers that occur
    n_runs: int = 0  # different results behind it
    # "best" or "second" among those that compete; None for others, or where nothing competes
    rank: Literal["best", "second"] | None = None
    tied: bool = (
        False  # whether the paired bootstrap cannot tell it from the best (p of at least 0.05)
    )
    published: Published | None = None  # what a publication has
    why: str | None = None  # why there is no value

    @property
    def difference(self) -> float | None:
        """Ours less the published one."""
        return (
            None
            if self.published is None or self.value is None
            else self.value - self.published.value
        )


@dataclass(frozen=True)
class Sheet:
    """A table."""

    name: str
    title: str
    row_fields: Labels  # what the labels of a row are
    column_fields: Labels  # what the labels of a column are
    rows: tuple[Labels, ...]  # labels of every row
    columns: tuple[Labels, ...]  # labels of every column
    # what is shown, by number of row and column; nothing where there is no such result
    cells: Mapping[tuple[int, int], Shown]
    notes: tuple[str, ...]  # to be read with it

    @property
    def doubts(self) -> tuple[str, ...]:
        """Why published numbers of the table are doubtful, each once, in the order of their marks."""
        found = (
            shown.published.doubt
            for _, shown in sorted(self.cells.items())
            if shown.published is not None
        )
        return tuple(dict.fromkeys(doubt for doubt in found if doubt))


CSV_FIELDS = (
    *(
        "metric",
        "value",
        "ci_low",
        "ci_high",
        "n",
        "n_failures",
        "runs",
        "rank",
        "tied_with_best",
        "published",
    ),
    *("difference", "published_source", "published_doubt", "convention", "why"),
)


TIED = "≈: the paired bootstrap does not tell it from the best (p ≥ 0.05, not corrected for picking the best of many)."


def to_text(sheet: Sheet) -> str:
    """Aligned plain text, the notes last."""
    heading = [" / ".join(sheet.row_fields), *(" / ".join(labels) for labels in sheet.columns)]
    rows = _lines(sheet, str, _plain)
    n = len(sheet.row_fields)
    lines = [heading, *([" / ".join(row[:n]), *row[n:]] for row in rows)]
    return "\n".join([sheet.title, *aligned(lines), *_all_notes(sheet, "*: best; +: second best")])


def to_markdown(sheet: Sheet) -> str:
    """A table of Markdown, the notes below."""
    heading = [
        *sheet.row_fields,
        *("<br>".join(map(in_markdown, labels)) for labels in sheet.columns),
    ]
    lines = markdown_rows(heading, _lines(sheet, in_markdown, _markdown))
    notes = [
        f"<sub>{in_markdown(note)}</sub>"
        for note in _all_notes(sheet, "Bold: best; underlined: second best")
    ]
    return "\n".join([f"**{in_markdown(sheet.title)}**", "", *lines, "", "<br>\n".join(notes), ""])


def to_latex(sheet: Sheet) -> str:
    """A ``table`` that needs the package booktabs; a column field that spans several columns is written once."""
    n_labels, n_columns = len(sheet.row_fields), len(sheet.columns)
    depth, heading = len(sheet.column_fields), []
    for level in range(1, depth + 1):  # the last level stands above the rows, too
        fields = (in_latex(field) if level == depth else "" for field in sheet.row_fields)
        heading.append([*fields, *_spans([labels[:level] for labels in sheet.columns])])
    notes = [
        f"  {in_latex(note)}" for note in _all_notes(sheet, "Bold: best; underlined: second best")
    ]
    return "\n".join(
        [
            r"\begin{table}",
            rf"\caption{{{in_latex(sheet.title)}}}",
            rf"\begin{{tabular}}{{{'l' * n_labels}{'c' * n_columns}}}",
            r"\toprule",
            *latex_rows(heading),
            r"\midrule",
            *latex_rows(_lines(sheet, in_latex, _latex)),
            r"\bottomrule",
            r"\end{tabular}",
            r"\par\footnotesize",
            *notes,
            r"\end{table}",
            "",
        ]
    )


def to_csv(sheet: Sheet) -> str:
    """One line per number, with everything that belongs to it; numbers are fractions."""
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    others = [field for field in (*sheet.row_fields, *sheet.column_fields) if field != "metric"]
    writer.writerow([*others, *CSV_FIELDS])
    for (row, column), shown in sorted(sheet.cells.items()):
        labels = dict(zip(sheet.row_fields, sheet.rows[row], strict=True))
        labels |= dict(zip(sheet.column_fields, sheet.columns[column], strict=True))
        writer.writerow([*(harmless(labels[field]) for field in others), *_csv_values(shown)])
    return buffer.getvalue()


def _lines(
    sheet: Sheet, label: Callable[[str], str], written: Callable[[Shown, str, str], str]
) -> list[list[str]]:
    """The labels and the cells of every row, ``written`` with the number and what stands beside it."""
    lines, doubts = [], sheet.doubts
    for row, labels in enumerate(sheet.rows):
        cells = (sheet.cells.get((row, column)) for column in range(len(sheet.columns)))
        texts = ("" if one is None else written(one, *_number(one, doubts)) for one in cells)
        lines.append([*map(label, labels), *texts])
    return lines


def _number(shown: Shown, doubts: Sequence[str]) -> tuple[str, str]:
    """The number; its interval and the published number."""
    metric, ends = METRICS[shown.metric], shown.interval
    brackets = "" if ends is None else metric.brackets(ends.ci_low, ends.ci_high)
    number = NOTHING if shown.value is None else metric.show(shown.value)
    return number, " ".join(filter(None, [brackets, _theirs(shown, doubts)]))


def _theirs(shown: Shown, doubts: Sequence[str]) -> str:
    """The published number and the difference from it."""
    if shown.published is None:
        return ""
    show = METRICS[shown.metric].show
    mark = f"?{doubts.index(shown.published.doubt) + 1}" if shown.published.doubt else ""
    difference = "" if shown.difference is None else f"; {show(shown.difference, '+')}"
    return f"({show(shown.published.value)}{mark}{difference})"


def _plain(shown: Shown, number: str, more: str) -> str:
    marks = {"best": "*", "second": "+", None: ""}[shown.rank] + ("≈" if shown.tied else "")
    return f"{number}{marks} {more}".rstrip()


def _markdown(shown: Shown, number: str, more: str) -> str:
    marked = {"best": "**{}**", "second": "<u>{}</u>", None: "{}"}[shown.rank].format(number)
    return f"{marked}{'≈' if shown.tied else ''}" + (f" <sub>{more}</sub>" if more else "")


def _latex(shown: Shown, number: str, more: str) -> str:
    marked = {"best": r"\textbf{%s}", "second": r"\underline{%s}", None: "%s"}[shown.rank] % number
    return (
        marked
        + (r"$\approx$" if shown.tied else "")
        + (rf" {{\scriptsize {more}}}" if more else "")
    )


def _spans(labels: Sequence[tuple[str, ...]]) -> list[str]:
    """Heads of one level, one over neighbours that agree down to it."""
    runs = [(in_latex(label[-1]), len(list(run))) for label, run in groupby(labels)]
    return [head if n == 1 else rf"\multicolumn{{{n}}}{{c}}{{{head}}}" for head, n in runs]


def _csv_values(shown: Shown) -> list[object]:
    low, high = (None, None) if shown.interval is None else shown.interval[1:]
    theirs = shown.published
    value, source, doubt = (
        (None, None, None)
        if theirs is None
        else (theirs.value, theirs.source, theirs.doubt or None)
    )
    ours = shown.metric, shown.value, low, high, span(shown.n), span(shown.n_failures), shown.n_runs
    why = None if shown.why is None else harmless(shown.why)
    convention = METRICS[shown.metric].convention
    return [*ours, shown.rank, shown.tied, value, shown.difference, source, doubt, convention, why]


def _all_notes(sheet: Sheet, marks: str) -> list[str]:
    """The notes, what the marks mean where there are some, and why published numbers are doubtful."""
    ranked = any(shown.rank for shown in sheet.cells.values())
    doubts = (f"?{number}: {doubt}." for number, doubt in enumerate(sheet.doubts, start=1))
    return [*sheet.notes, *([f"{marks}; {TIED}"] if ranked else []), *doubts]

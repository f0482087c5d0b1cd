"""A study's table, and the table's formats: text, Markdown, LaTeX and CSV."""

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
    EMPTY_CELL,
    align_columns,
    escape_formula,
    escape_latex,
    escape_markdown,
    join_distinct,
    latex_rows,
    markdown_rows,
)
from vilu_bench.studies.views import PublishedNumber

LabelTexts = tuple[str, ...]  # the label texts for a row or a column


@dataclass(frozen=True)
class TableNumber:
    """A number in a table, with the interval, the rank and the published number."""

    metric: str
    value: float | None  # as a fraction, or None if undefined
    # bootstrap interval over test rows and seeds, or None for metrics without intervals
    interval: Interval | None = None
    n: tuple[int, ...] = ()  # the different numbers of test rows in the averaged results
    n_failures: tuple[int, ...] = ()  # the different numbers of wrong answers in these results
    n_runs: int = 0  # number of different results in the mean
    # rank among the competing numbers, or None for lower ranks and for a number without competitors
    rank: Literal["best", "second"] | None = None
    # whether the paired bootstrap finds no difference from the best (p of at least 0.05)
    is_tied: bool = False
    published: PublishedNumber | None = None  # the published number
    why: str | None = None  # why there is no value

    @property
    def difference(self) -> float | None:
        """Our value less the published value."""
        if self.published is None:
            return None
        if self.value is None:
            return None
        return self.value - self.published.value


@dataclass(frozen=True)
class Sheet:
    """A table."""

    name: str
    title: str
    row_fields: LabelTexts  # names of the fields that label a row
    column_fields: LabelTexts  # names of the fields that label a column
    rows: tuple[LabelTexts, ...]  # labels for every row
    columns: tuple[LabelTexts, ...]  # labels for every column
    # Maps (row index, column index) to the number. A cell without a result has no entry.
    cells: Mapping[tuple[int, int], TableNumber]
    notes: tuple[str, ...]  # notes below the table

    @property
    def doubts(self) -> tuple[str, ...]:
        """The different doubts about published numbers, in the order of the marks ?1, ?2, ..."""
        doubts: dict[str, None] = {}
        for _, table_number in sorted(self.cells.items()):
            if table_number.published is not None and table_number.published.doubt:
                doubts[table_number.published.doubt] = None
        return tuple(doubts)


# columns in the CSV, after the label columns
CSV_FIELDS = (
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
    "difference",
    "published_source",
    "published_doubt",
    "convention",
    "why",
)


TIED_LEGEND = (
    "≈: the paired bootstrap does not tell it from the best "
    "(p ≥ 0.05, not corrected for picking the best of many)."
)
BOLD_LEGEND = "Bold: best; underlined: second best"  # for Markdown and LaTeX


def to_text(sheet: Sheet) -> str:
    """Write the table as aligned plain text, with the notes last."""
    n_labels = len(sheet.row_fields)
    column_headings = [" / ".join(labels) for labels in sheet.columns]
    lines = [[" / ".join(sheet.row_fields), *column_headings]]
    for line in _body_lines(sheet, str, _plain_cell):
        # a row's labels share a column, and every cell has a separate column
        lines.append([" / ".join(line[:n_labels]), *line[n_labels:]])
    table = align_columns(lines)
    notes = _all_notes(sheet, "*: best; +: second best")
    return "\n".join([sheet.title, *table, *notes])


def to_markdown(sheet: Sheet) -> str:
    """Write the table as Markdown, with the notes below."""
    heading = [*sheet.row_fields]
    for labels in sheet.columns:
        heading.append("<br>".join(map(escape_markdown, labels)))
    body = _body_lines(sheet, escape_markdown, _markdown_cell)
    lines = markdown_rows(heading, body)
    notes = [f"<sub>{escape_markdown(note)}</sub>" for note in _all_notes(sheet, BOLD_LEGEND)]
    title = escape_markdown(sheet.title)
    note_lines = "<br>\n".join(notes)
    return "\n".join([f"**{title}**", "", *lines, "", note_lines, ""])


def to_latex(sheet: Sheet) -> str:
    """Write the table as a LaTeX ``table`` with booktabs. Equal neighbour headings are merged."""
    columns = "l" * len(sheet.row_fields) + "c" * len(sheet.columns)
    notes = [f"  {escape_latex(note)}" for note in _all_notes(sheet, BOLD_LEGEND)]
    heading = _latex_heading(sheet)
    body = _body_lines(sheet, escape_latex, _latex_cell)
    lines = [
        r"\begin{table}",
        rf"\caption{{{escape_latex(sheet.title)}}}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        *latex_rows(heading),
        r"\midrule",
        *latex_rows(body),
        r"\bottomrule",
        r"\end{tabular}",
        r"\par\footnotesize",
        *notes,
        r"\end{table}",
        "",
    ]
    return "\n".join(lines)


def _latex_heading(sheet: Sheet) -> list[list[str]]:
    """Make the heading, with a line per column field. The last line also names the row fields."""
    depth = len(sheet.column_fields)
    lines = []
    for level in range(1, depth + 1):
        fields = [""] * len(sheet.row_fields)
        if level == depth:
            fields = [escape_latex(field) for field in sheet.row_fields]
        # Columns are merged only if the labels in all lines down to this line are equal.
        labels_down_to_line = [labels[:level] for labels in sheet.columns]
        headings = _merged_headings(labels_down_to_line)
        lines.append(fields + headings)
    return lines


def to_csv(sheet: Sheet) -> str:
    """Write the table as CSV, with a line per number. Values are fractions."""
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    # the metric is left out here, because ``CSV_FIELDS`` has the metric
    fields = [field for field in (*sheet.row_fields, *sheet.column_fields) if field != "metric"]
    writer.writerow([*fields, *CSV_FIELDS])
    for (row, column), table_number in sorted(sheet.cells.items()):
        # labels by field: first the row's labels, then the column's labels
        label_of = dict(zip(sheet.row_fields, sheet.rows[row], strict=True))
        label_of |= zip(sheet.column_fields, sheet.columns[column], strict=True)
        line: list[object] = [escape_formula(label_of[field]) for field in fields]
        writer.writerow(line + _csv_values(table_number))
    return buffer.getvalue()


def _body_lines(
    sheet: Sheet,
    write_label: Callable[[str], str],
    write_cell: Callable[[TableNumber, str, str], str],
) -> list[list[str]]:
    """Write every row's labels and cells as texts.

    Args:
        sheet: The table.
        write_label: Function that writes a label.
        write_cell: Function that writes a cell. The arguments are the number, the number as text,
            and the text beside the number.
    """
    doubts = sheet.doubts
    lines = []
    for row, labels in enumerate(sheet.rows):
        line = [write_label(text) for text in labels]
        for column in range(len(sheet.columns)):
            table_number = sheet.cells.get((row, column))
            if table_number is None:
                line.append("")
            else:
                number_text = _number_text(table_number)
                text_beside = _text_beside(table_number, doubts)
                line.append(write_cell(table_number, number_text, text_beside))
        lines.append(line)
    return lines


def _number_text(table_number: TableNumber) -> str:
    if table_number.value is None:
        return EMPTY_CELL
    return METRICS[table_number.metric].show(table_number.value)


def _text_beside(table_number: TableNumber, doubts: Sequence[str]) -> str:
    """Write the text beside a number: the interval and the published number."""
    parts = []
    if table_number.interval is not None:
        _, low, high = table_number.interval
        parts.append(METRICS[table_number.metric].brackets(low, high))
    if table_number.published is not None:
        published_text = _published_text(table_number, table_number.published, doubts)
        parts.append(published_text)
    return " ".join(parts)


def _published_text(
    table_number: TableNumber, published: PublishedNumber, doubts: Sequence[str]
) -> str:
    """Write the published number, the mark for its doubt, and our difference from this number."""
    show = METRICS[table_number.metric].show
    text = show(published.value)
    if published.doubt:
        text += f"?{doubts.index(published.doubt) + 1}"
    if table_number.difference is not None:
        text += f"; {show(table_number.difference, '+')}"
    return f"({text})"


def _plain_cell(table_number: TableNumber, number_text: str, side_text: str) -> str:
    """Write a number in plain text, with the mark for the rank."""
    rank_mark = {"best": "*", "second": "+", None: ""}[table_number.rank]
    text = number_text + rank_mark
    if table_number.is_tied:
        text += "≈"
    return f"{text} {side_text}".rstrip()


def _markdown_cell(table_number: TableNumber, number_text: str, side_text: str) -> str:
    """Write a number in Markdown: bold for the best, underlined for the second best."""
    template = {"best": "**{}**", "second": "<u>{}</u>", None: "{}"}[table_number.rank]
    text = template.format(number_text)
    if table_number.is_tied:
        text += "≈"
    if side_text:
        text += f" <sub>{side_text}</sub>"
    return text


def _latex_cell(table_number: TableNumber, number_text: str, side_text: str) -> str:
    """Write a number in LaTeX: bold for the best, underlined for the second best."""
    template = {"best": r"\textbf{%s}", "second": r"\underline{%s}", None: "%s"}[table_number.rank]
    text = template % number_text
    if table_number.is_tied:
        text += r"$\approx$"
    if side_text:
        text += rf" {{\scriptsize {side_text}}}"
    return text


def _merged_headings(labels: Sequence[tuple[str, ...]]) -> list[str]:
    """Merge neighbouring cells with equal labels in a heading line.

    ``labels`` has, for every column, the labels from the first heading line down to this line.
    """
    heads = []
    for labels_of_column, neighbours in groupby(labels):
        head = escape_latex(labels_of_column[-1])  # the label in this line
        width = len(list(neighbours))
        if width > 1:
            head = rf"\multicolumn{{{width}}}{{c}}{{{head}}}"
        heads.append(head)
    return heads


def _csv_values(table_number: TableNumber) -> list[object]:
    """Return the values for ``CSV_FIELDS``. None is written as an empty field."""
    interval = table_number.interval
    published = table_number.published
    return [
        table_number.metric,
        table_number.value,
        None if interval is None else interval.ci_low,
        None if interval is None else interval.ci_high,
        join_distinct(table_number.n),
        join_distinct(table_number.n_failures),
        table_number.n_runs,
        table_number.rank,
        table_number.is_tied,
        None if published is None else published.value,
        table_number.difference,
        None if published is None else published.source,
        None if published is None else published.doubt,
        METRICS[table_number.metric].convention,
        None if table_number.why is None else escape_formula(table_number.why),
    ]


def _all_notes(sheet: Sheet, rank_legend: str) -> list[str]:
    """List the sheet's own notes, the rank legend, and the doubts about published numbers."""
    notes = [*sheet.notes]
    if any(table_number.rank for table_number in sheet.cells.values()):
        notes.append(f"{rank_legend}; {TIED_LEGEND}")
    for number, doubt in enumerate(sheet.doubts, start=1):
        notes.append(f"?{number}: {doubt}.")
    return notes

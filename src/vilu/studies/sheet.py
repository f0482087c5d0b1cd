"""A table of results before it has a format: labels of rows and columns, and in each cell a number and its like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from vilu.benchmark.published import Published
from vilu.benchmark.resampling import Interval

Labels = tuple[str, ...]


@dataclass(frozen=True)
class Shown:
    """A number as a table shows it.

    Attributes:
        metric: Which.
        value: As a fraction; None where it is undefined.
        interval: Bootstrap over test rows and seeds; None where the metric has none.
        n: Numbers of test rows that occur.
        n_failures: Numbers of wrong answers that occur.
        n_runs: Different results behind it.
        rank: "best" or "second" among those that compete; None for others, or where nothing competes.
        tied: Whether the paired bootstrap cannot tell it from the best (p of at least 0.05).
        published: What a publication has.
        why: Why there is no value.
    """

    metric: str
    value: float | None
    interval: Interval | None = None
    n: tuple[int, ...] = ()
    n_failures: tuple[int, ...] = ()
    n_runs: int = 0
    rank: Literal["best", "second"] | None = None
    tied: bool = False
    published: Published | None = None
    why: str | None = None

    @property
    def difference(self) -> float | None:
        """Ours less the published one."""
        return None if self.published is None or self.value is None else self.value - self.published.value


@dataclass(frozen=True)
class Sheet:
    """A table.

    Attributes:
        name: Of its files.
        title: Its caption.
        row_fields: What the labels of a row are.
        column_fields: What the labels of a column are.
        rows: Labels of every row.
        columns: Labels of every column.
        cells: What is shown, by number of row and column; nothing where there is no such result.
        notes: To be read with it.
    """

    name: str
    title: str
    row_fields: Labels
    column_fields: Labels
    rows: tuple[Labels, ...]
    columns: tuple[Labels, ...]
    cells: Mapping[tuple[int, int], Shown]
    notes: tuple[str, ...]

    @property
    def doubts(self) -> tuple[str, ...]:
        """Why published numbers of the table are doubtful, each once, in the order of their marks."""
        found = (shown.published.doubt for _, shown in sorted(self.cells.items()) if shown.published is not None)
        return tuple(dict.fromkeys(doubt for doubt in found if doubt))

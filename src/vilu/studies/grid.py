"""Two hyper-parameters against each other, one setting choosing what is reported of another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vilu.benchmark.board import Board, Mean
from vilu.benchmark.presentation import GridView
from vilu.errors import DataError
from vilu.metrics.catalog import METRICS
from vilu.studies.notes import notes_of
from vilu.studies.pivot import Key, chosen, show, title_of
from vilu.studies.sheet import Sheet

if TYPE_CHECKING:
    from vilu.report.style import Figure


@dataclass(frozen=True)
class _Field:
    """The methods of a data set by their two values, and the one that was chosen."""

    methods: dict[tuple[str, str], str]
    chosen: tuple[str, str]


def grid_exhibit(board: Board, view: GridView) -> tuple[Sheet, Callable[[], Figure]]:
    """The sheet and the figure of a grid.

    Data sets without a result are left out; the notes tell why.

    Raises:
        DataError: If there is none with one.
    """
    config, found = board.config, chosen(board, view)
    best = view.metrics[0]
    tried = {data: _field(board, view, data, best) for data in dict.fromkeys(key.data for key in found)}
    fields = {data: field for data, field in tried.items() if field is not None}
    if not fields:
        raise DataError(f"the view {view.name} has nothing to show: no result with {' and '.join(view.parameters)}.")
    columns = [(setting, metric) for setting in (view.select_on, view.report_on) for metric in view.metrics]
    rows, cells = [], {}
    for data, field in fields.items():
        for values, method in field.methods.items():
            rows.append((title_of(config, "data", data), *values, "chosen" if values == field.chosen else ""))
            for number, (setting, metric) in enumerate(columns):
                entrant = board.find(method, data, setting)
                if entrant is not None:
                    key = Key(method, data, setting, metric)
                    cells[len(rows) - 1, number] = show(config, key, Mean((entrant,)))
    selected = title_of(config, "setting", view.select_on)
    note = f"Chosen: the best {METRICS[best].title} in {selected!r}; the other columns had no say."
    sheet = Sheet(
        name=view.name,
        title=view.title,
        row_fields=("data", *view.parameters, "choice"),
        column_fields=("setting", "metric"),
        rows=tuple(rows),
        columns=tuple((title_of(config, "setting", s), METRICS[m].title) for s, m in columns),
        cells=cells,
        notes=(note, *notes_of(board, view, cells.values(), found.values())),
    )
    return sheet, lambda: _draw(board, view, fields, best)


def _field(board: Board, view: GridView, data: str, best: str) -> _Field | None:
    """What there is of a data set; None where there is no result."""
    methods = {}
    for label in view.methods or board.config.entries:
        values = [board.config.entries[label].params.get(name) for name in view.parameters]
        if None not in values and board.find(label, data, view.select_on) is not None:
            methods[str(values[0]), str(values[1])] = label
    scores = {values: _mean(board, label, data, view.select_on, best) for values, label in methods.items()}
    sign = 1 if METRICS[best].higher_is_better else -1
    return _Field(methods, max(scores, key=lambda values: sign * scores[values])) if scores else None


def _mean(board: Board, method: str, data: str, setting: str, metric: str) -> float:
    entrant = board.entrants[method, data, setting]
    return entrant.quantity(metric).value


def _draw(board: Board, view: GridView, fields: dict[str, _Field], best: str) -> Figure:
    from vilu.report.grids import Grid, grids

    panels = []
    for data, field in fields.items():
        rows, columns = ([*dict.fromkeys(values[axis] for values in field.methods)] for axis in (0, 1))
        for setting in (view.select_on, view.report_on):
            values = {
                (rows.index(a), columns.index(b)): _mean(board, method, data, setting, best)
                for (a, b), method in field.methods.items()
                if board.find(method, data, setting) is not None
            }
            names = title_of(board.config, "data", data), title_of(board.config, "setting", setting)
            place = rows.index(field.chosen[0]), columns.index(field.chosen[1])
            panels.append(Grid(f"{names[0]}, {names[1]}: {METRICS[best].title}", rows, columns, values, place))
    return grids(panels, *view.parameters)

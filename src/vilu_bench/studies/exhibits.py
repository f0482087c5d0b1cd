"""From views to exhibits: a table or a figure each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vilu.errors import DataError
from vilu.metrics.catalog import METRICS
from vilu.outcomes.outcomes import Outcomes
from vilu_bench.studies.board import Board, Mean
from vilu_bench.studies.pivot import (
    Key,
    chosen,
    measured_of,
    notes_of,
    published_of,
    show,
    table_sheet,
    title_of,
)
from vilu_bench.studies.ranking import layout, summarise
from vilu_bench.studies.sheet import Sheet
from vilu_bench.studies.views import (
    AnyView,
    CurveView,
    GridView,
    HistogramView,
    RankingView,
    ScatterView,
    TableView,
)

if TYPE_CHECKING:
    from vilu.report.figures import Panel, Series
    from vilu.report.style import Figure


Draw = Callable[[], "Figure"]  # makes a figure


@dataclass(frozen=True)
class Exhibit:
    """What a view shows."""

    name: str
    title: str
    body: Sheet | str  # the table, or the numbers behind the figure; or a text
    draw: Draw | None = None  # None where there is no figure


def exhibit(board: Board, view: AnyView, root: Path) -> Exhibit:
    """What a view shows of a board."""
    match view:
        case TableView():
            return Exhibit(view.name, view.title, table_sheet(board, view))
        case RankingView():
            return Exhibit(view.name, view.title, layout(board.config, summarise(board)))
        case GridView():
            shown = _grid(board, view)
        case HistogramView():
            shown = _histograms(board, view, root)
        case CurveView():
            shown = _curves(board, view)
        case ScatterView():
            shown = _scatter(board, view)
    return Exhibit(view.name, view.title, *shown)


def _curves(board: Board, view: CurveView) -> tuple[Sheet, Draw]:
    from vilu.report.figures import curves

    places = view.places(board.config, view.x)
    panels = _panels(board, view, lambda key: places[key.of([view.x])[0]].x, view.panel, view.line)
    sheet = table_sheet(board, view.as_table((view.panel, view.line), (view.x, "metric")))
    return sheet, (lambda: curves(panels, view.x_label, log=view.log, names=view.ticks))


def _scatter(board: Board, view: ScatterView) -> tuple[Sheet, Draw]:
    from vilu.report.figures import scatter

    def accuracy(key: Key) -> float | None:
        entrant = board.find(key.method, key.data, key.setting)
        return None if entrant is None else entrant.accuracy

    panels = _panels(board, view, accuracy, "metric", "method")
    sheet = table_sheet(board, view.as_table(("data", "setting"), ("method", "metric")))
    return sheet, (lambda: scatter(panels, "zero-shot accuracy (%)"))


def _panels(
    board: Board,
    view: CurveView | ScatterView,
    place: Callable[[Key], float | None],
    panel: str,
    line: str,
) -> list[Panel]:
    """Panels of a metric each, and of what ``panel`` names; lines of what ``line`` names, at ``place``."""
    from vilu.report.figures import Panel

    groups: dict[tuple[str, str], dict[str, list[tuple[Key, float, Mean]]]] = {}
    for key, found in measured_of(board, view).items():
        if all(part.found for part in found.parts) and (at := place(key)) is not None:
            series = groups.setdefault((key.of([panel])[0], key.metric), {})
            series.setdefault(key.of([line])[0], []).append((key, at, found))
    if not groups:
        raise DataError(
            f"the view {view.name} has nothing to show: no result with a place on its axis."
        )
    made = []
    for (name, metric), series in groups.items():
        lines = [
            _line(board, title_of(board.config, line, label), points)
            for label, points in series.items()
        ]
        made.append(Panel(title_of(board.config, panel, name), METRICS[metric].title, lines))
    return made


def _line(board: Board, label: str, points: list[tuple[Key, float, Mean]]) -> Series:
    from vilu.report.figures import Series

    numbers = [found.quantity(key.metric) for key, _, found in points]
    intervals = [number.interval(board.config.confidence) for number in numbers]
    published = [(at, published_of(board.config, key, found.parts)) for key, at, found in points]
    return Series(
        label=label,
        x=[at for _, at, _ in points],
        y=[number.value for number in numbers],
        low=[ends.ci_low for ends in intervals],
        high=[ends.ci_high for ends in intervals],
        published=[(at, number.value) for at, number in published if number is not None],
    )


def _histograms(board: Board, view: HistogramView, root: Path) -> tuple[Sheet, Draw]:
    from vilu.report.figures import score_histograms

    keys = [
        key
        for key, entrant in chosen(board, view).items()
        if entrant.found and key.metric == view.metrics[0]
    ]
    fields = ["data", "method", *(["setting"] if len({key.setting for key in keys}) > 1 else [])]
    panels: dict[str, Path] = {}
    for key in keys:
        runs = board.entrants[key.method, key.data, key.setting].runs
        title = ", ".join(title_of(board.config, field, key.of([field])[0]) for field in fields)
        panels[title] = (root / runs[min(runs)].path).with_suffix(".parquet")
    if not panels:
        raise DataError(f"the view {view.name} has nothing to show: no method has a result.")
    sheet = table_sheet(board, view.as_table(("data", "method"), ("setting", "metric")))

    def draw() -> Figure:
        return score_histograms({title: Outcomes.load(path) for title, path in panels.items()})

    return sheet, draw


@dataclass(frozen=True)
class _Field:
    """The methods of a data set by their values of two parameters, the mean of each by setting, and the chosen one."""

    data: str
    methods: dict[tuple[str, str], str]
    chosen: tuple[str, str]


def _grid(board: Board, view: GridView) -> tuple[Sheet, Draw]:
    """Data sets without a result are left out; the notes tell why."""
    config, found = board.config, chosen(board, view)
    fields = [
        field
        for data in dict.fromkeys(key.data for key in found)
        for field in _fields(board, view, data)
    ]
    if not fields:
        raise DataError(
            f"the view {view.name} has nothing to show: no result with {' and '.join(view.parameters)}."
        )
    lines = [
        (field, values, method) for field in fields for values, method in field.methods.items()
    ]
    columns = [
        (setting, metric) for setting in (view.select_on, view.report_on) for metric in view.metrics
    ]
    cells = {
        (row, column): show(config, Key(method, field.data, *place), Mean((entrant,)))
        for row, (field, _, method) in enumerate(lines)
        for column, place in enumerate(columns)
        if (entrant := board.find(method, field.data, place[0])) is not None
    }
    selected, best = title_of(config, "setting", view.select_on), METRICS[view.metrics[0]].title
    sheet = Sheet(
        name=view.name,
        title=view.title,
        row_fields=("data", *view.parameters, "choice"),
        column_fields=("setting", "metric"),
        rows=tuple(
            (
                title_of(config, "data", field.data),
                *values,
                "chosen" if values == field.chosen else "",
            )
            for field, values, _ in lines
        ),
        columns=tuple(
            (title_of(config, "setting", setting), METRICS[metric].title)
            for setting, metric in columns
        ),
        cells=cells,
        notes=(
            f"Chosen: the best {best} in {selected!r}; the other columns had no say.",
            *notes_of(board, view, cells.values(), found.values()),
        ),
    )
    return sheet, (lambda: _draw(board, view, fields))


def _fields(board: Board, view: GridView, data: str) -> list[_Field]:
    """What there is of a data set: one field, or none where there is no result."""
    best = view.metrics[0]
    sign, methods, found = 1 if METRICS[best].higher_is_better else -1, {}, {}
    for label in view.places(board.config, "method"):
        values = [board.config.entries[label].params.get(name) for name in view.parameters]
        entrant = board.find(label, data, view.select_on)
        if None not in values and entrant is not None:
            pair = str(values[0]), str(values[1])
            methods[pair], found[pair] = label, sign * entrant.quantity(best).value
    return [_Field(data, methods, max(found, key=found.__getitem__))] if found else []


def _draw(board: Board, view: GridView, fields: list[_Field]) -> Figure:
    from vilu.report.figures import Grid, grids

    panels, best = [], view.metrics[0]
    for field in fields:
        rows, columns = (
            [*dict.fromkeys(values[axis] for values in field.methods)] for axis in (0, 1)
        )
        for setting in (view.select_on, view.report_on):
            means = {
                (rows.index(a), columns.index(b)): entrant.quantity(best).value
                for (a, b), method in field.methods.items()
                if (entrant := board.find(method, field.data, setting)) is not None
            }
            names = (
                title_of(board.config, "data", field.data),
                title_of(board.config, "setting", setting),
            )
            place = rows.index(field.chosen[0]), columns.index(field.chosen[1])
            panels.append(
                Grid(f"{names[0]}, {names[1]}: {METRICS[best].title}", rows, columns, means, place)
            )
    return grids(panels, *view.parameters)

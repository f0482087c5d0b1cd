"""Makes the exhibits for a study's views: tables, figures and rankings."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vilu.errors import DataError
from vilu.metrics.catalog import METRICS
from vilu.outcomes.outcomes import Outcomes
from vilu_bench.studies.board import Board, Entrant, MethodMean
from vilu_bench.studies.pivot import (
    DATA_OF_MEAN,
    NumberKey,
    entrants_by_key,
    make_table_number,
    means_by_key,
    notes_of,
    published_number,
    table_sheet,
    title_of,
)
from vilu_bench.studies.ranking import ranking_text, summarise
from vilu_bench.studies.sheet import Sheet, TableNumber
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
    from vilu.report.figures import Grid, Panel, Series
    from vilu.report.style import Figure


Draw = Callable[[], "Figure"]  # draws and returns a figure


@dataclass(frozen=True)
class Exhibit:
    """A view's table and figure."""

    name: str
    title: str
    body: Sheet | str  # the table, or the numbers behind the figure, or a ranking's text
    draw: Draw | None = None  # draws the figure, or None if the view has no figure


def make_exhibit(board: Board, view: AnyView, root: Path) -> Exhibit:
    """Make the exhibit for a view. ``root`` is the run folder with the cells' files."""
    match view:
        case TableView():
            sheet = table_sheet(board, view)
            return Exhibit(view.name, view.title, sheet)
        case RankingView():
            summary = summarise(board)
            text = ranking_text(board.config, summary)
            return Exhibit(view.name, view.title, text)
        case GridView():
            body, draw = _grid(board, view)
        case HistogramView():
            body, draw = _histograms(board, view, root)
        case CurveView():
            body, draw = _curves(board, view)
        case ScatterView():
            body, draw = _scatter(board, view)
    return Exhibit(view.name, view.title, body, draw)


def _curves(board: Board, view: CurveView) -> tuple[Sheet, Draw]:
    """Make the table and the figure for a curve view."""
    from vilu.report.figures import draw_curves

    entries_on_axis = view.entries_of(board.config, view.x)

    def x_of(key: NumberKey) -> float | None:
        name = getattr(key, view.x)  # name of a method, a data set or a setting
        return entries_on_axis[name].x

    panels = _panels(board, view, x_of, panel_field=view.panel, line_field=view.line)
    table_view = view.as_table(rows=(view.panel, view.line), columns=(view.x, "metric"))
    sheet = table_sheet(board, table_view)
    draw = partial(
        draw_curves, panels, view.x_label, title=view.title, log=view.log, names=view.ticks
    )
    return sheet, draw


def _scatter(board: Board, view: ScatterView) -> tuple[Sheet, Draw]:
    """Make the table and the figure for a scatter view."""
    from vilu.report.figures import draw_scatter

    def accuracy(key: NumberKey) -> float | None:
        entrant = board.find(key.method, key.data, key.setting)
        if entrant is None:
            return None
        return entrant.accuracy

    panels = _panels(board, view, accuracy, panel_field="metric", line_field="method")
    table_view = view.as_table(rows=("data", "setting"), columns=("method", "metric"))
    sheet = table_sheet(board, table_view)
    return sheet, partial(draw_scatter, panels, "zero-shot accuracy (%)", title=view.title)


@dataclass(frozen=True)
class _Point:
    """A result in a figure, with an x coordinate."""

    key: NumberKey
    x: float
    mean: MethodMean


def _panels(
    board: Board,
    view: CurveView | ScatterView,
    x_of: Callable[[NumberKey], float | None],
    panel_field: str,
    line_field: str,
) -> list[Panel]:
    """Make a figure's panels, with lines.

    Args:
        board: The results.
        view: The view.
        x_of: Function that returns a key's x coordinate, or None to leave the number out.
        panel_field: Field of a key. There is a panel for each value of this field and each metric.
        line_field: Field of a key. A panel has a line for each value of this field.
    """
    from vilu.report.figures import Panel

    # points by panel (value of ``panel_field``, metric), then by line (value of ``line_field``)
    groups: dict[tuple[str, str], dict[str, list[_Point]]] = {}
    for key, mean in means_by_key(board, view).items():
        x = x_of(key)
        has_results = all(part.results for part in mean.parts)
        if x is None or not has_results:
            continue
        panel_key = (getattr(key, panel_field), key.metric)
        line_label = getattr(key, line_field)
        lines = groups.setdefault(panel_key, {})
        lines.setdefault(line_label, []).append(_Point(key, x, mean))
    if not groups:
        raise DataError(
            f"the view {view.name} has nothing to show: no result with a place on its axis."
        )
    panels = []
    for (panel_label, metric), lines in groups.items():
        series = []
        for line_label, points in lines.items():
            line_title = title_of(board.config, line_field, line_label)
            series.append(_series(board, line_title, points))
        panel_title = _panel_title(board, view, panel_field, panel_label, metric)
        panels.append(Panel(panel_title, _axis_label(metric), series))
    return panels


def _panel_title(
    board: Board, view: CurveView | ScatterView, field: str, label: str, metric_name: str
) -> str:
    """Return a panel's title: the metric, and for example the data set.

    The title for a mean says how many data sets are averaged.
    """
    metric_title = METRICS[metric_name].title
    if field == "metric":
        return metric_title
    subject = title_of(board.config, field, label)
    if field == "data" and label == DATA_OF_MEAN:
        subject = f"mean of {len(view.mean)} sets"
    return f"{metric_title}, {subject}"


def _axis_label(metric_name: str) -> str:
    """Label the vertical axis with the metric, the unit and the better direction."""
    metric = METRICS[metric_name]
    better = "higher" if metric.higher_is_better else "lower"
    return f"{metric.title} (%), {better} is better"


def _series(board: Board, label: str, points: list[_Point]) -> Series:
    """Make a line for a figure, with intervals and published numbers."""
    from vilu.report.figures import Series

    intervals = []
    published = []
    for point in points:
        our_number = point.mean.quantity(point.key.metric)
        intervals.append(our_number.interval(board.config.confidence))
        their_number = published_number(board.config, point.key, point.mean.parts)
        if their_number is not None:
            published.append((point.x, their_number.value))
    return Series(
        label=label,
        x=[point.x for point in points],
        y=[interval.value for interval in intervals],
        low=[interval.ci_low for interval in intervals],
        high=[interval.ci_high for interval in intervals],
        published=published,
    )


def _histograms(board: Board, view: HistogramView, root: Path) -> tuple[Sheet, Draw]:
    """Make the table and the figure for a histogram view."""
    from vilu.report.figures import score_histograms

    score_files = _score_files(board, view, root)
    if not score_files:
        raise DataError(f"the view {view.name} has nothing to show: no method has a result.")
    table_view = view.as_table(rows=("data", "method"), columns=("setting", "metric"))
    sheet = table_sheet(board, table_view)

    def draw() -> Figure:
        outcomes = {title: Outcomes.load(path) for title, path in score_files.items()}
        return score_histograms(outcomes)

    return sheet, draw


def _score_files(board: Board, view: HistogramView, root: Path) -> dict[str, Path]:
    """Map each panel's title to the file with the scores to show there.

    The scores are from the method's first seed. The setting is in a title only if there are several
    settings.
    """
    entrants = {}
    all_entrants = entrants_by_key(board, view)
    for key, entrant in all_entrants.items():
        is_first_key = key.metric == view.metrics[0]  # an entrant has a key for every metric
        if entrant.results and is_first_key:
            entrants[key] = entrant
    fields = ["data", "method"]
    if len({key.setting for key in entrants}) > 1:
        fields.append("setting")
    files = {}
    for key, entrant in entrants.items():
        titles = [title_of(board.config, field, getattr(key, field)) for field in fields]
        title = ", ".join(titles)
        first_cell = entrant.run_cells[min(entrant.run_cells)]
        files[title] = (root / first_cell.path).with_suffix(".parquet")
    return files


ValuePair = tuple[str, str]  # values of a grid's two hyper-parameters


@dataclass(frozen=True)
class _DataGrid:
    """The methods on a data set, by the values of two hyper-parameters."""

    data: str
    methods: dict[ValuePair, str]  # label of the method with these two values
    best_pair: ValuePair  # the values of the best method


def _grid(board: Board, view: GridView) -> tuple[Sheet, Draw]:
    """Make the table and the figure for a grid view.

    Data sets without a result are left out, and a note says why.
    """
    entrants = entrants_by_key(board, view)
    data_grids = []
    for data in dict.fromkeys(key.data for key in entrants):
        data_grid = _data_grid(board, view, data)
        if data_grid is not None:
            data_grids.append(data_grid)
    if not data_grids:
        parameters = " and ".join(view.parameters)
        raise DataError(f"the view {view.name} has nothing to show: no result with {parameters}.")
    sheet = _grid_sheet(board, view, data_grids, entrants.values())
    return sheet, partial(_draw_grids, board, view, data_grids)


def _data_grid(board: Board, view: GridView, data: str) -> _DataGrid | None:
    """Find the methods that set both parameters and have a result on a data set.

    Return None if there is no such method.
    """
    first_metric = view.metrics[0]
    sign = 1 if METRICS[first_metric].higher_is_better else -1
    methods: dict[ValuePair, str] = {}
    merits: dict[ValuePair, float] = {}  # mean of the metric, negated if lower is better
    for label in view.entries_of(board.config, "method"):
        entrant = board.find(label, data, view.select_on)
        pair = _pair_of(board, view, label)
        if entrant is not None and pair is not None:
            methods[pair] = label
            merits[pair] = sign * entrant.quantity(first_metric).value
    if not merits:
        return None
    best_pair = max(merits, key=merits.__getitem__)
    return _DataGrid(data, methods, best_pair)


def _pair_of(board: Board, view: GridView, label: str) -> ValuePair | None:
    """Return a method's values for the two parameters, or None if the method does not set both."""
    params = board.config.method_entries[label].params
    row_parameter, column_parameter = view.parameters
    row_value = params.get(row_parameter)
    column_value = params.get(column_parameter)
    if row_value is None or column_value is None:
        return None
    return str(row_value), str(column_value)


def _grid_sheet(
    board: Board, view: GridView, data_grids: list[_DataGrid], entrants: Iterable[Entrant]
) -> Sheet:
    """Make a sheet with a row for every pair of values, and with columns for both settings.

    The best pair on every data set is marked.
    """
    config = board.config
    settings = (view.select_on, view.report_on)
    columns = list(itertools.product(settings, view.metrics))
    rows: list[tuple[str, ...]] = []
    cells = {}
    for data_grid in data_grids:
        for pair, method in data_grid.methods.items():
            row = len(rows)  # index of the row added below
            for column, (setting, metric) in enumerate(columns):
                table_number = _grid_cell(board, NumberKey(method, data_grid.data, setting, metric))
                if table_number is not None:
                    cells[row, column] = table_number
            choice = "chosen" if pair == data_grid.best_pair else ""
            rows.append((title_of(config, "data", data_grid.data), *pair, choice))
    column_titles = []
    for setting, metric in columns:
        column_titles.append((title_of(config, "setting", setting), METRICS[metric].title))
    deciding_title = METRICS[view.metrics[0]].title
    selection_title = title_of(config, "setting", view.select_on)
    note_on_choice = (
        f"Chosen: the best {deciding_title} in {selection_title!r}; the other columns had no say."
    )
    return Sheet(
        name=view.name,
        title=view.title,
        row_fields=("data", *view.parameters, "choice"),
        column_fields=("setting", "metric"),
        rows=tuple(rows),
        columns=tuple(column_titles),
        cells=cells,
        notes=(note_on_choice, *notes_of(board, view, cells.values(), entrants)),
    )


def _grid_cell(board: Board, key: NumberKey) -> TableNumber | None:
    """Make a key's number, or return None if the method has no result there."""
    entrant = board.find(key.method, key.data, key.setting)
    if entrant is None:
        return None
    mean = MethodMean((entrant,))
    return make_table_number(board.config, key, mean)


def _draw_grids(board: Board, view: GridView, data_grids: list[_DataGrid]) -> Figure:
    """Draw two panels for every data set, a panel for each of the view's two settings."""
    from vilu.report.figures import draw_grids

    panels = []
    for data_grid in data_grids:
        for setting in (view.select_on, view.report_on):
            panels.append(_grid_panel(board, view, data_grid, setting))
    return draw_grids(panels, *view.parameters)


def _grid_panel(board: Board, view: GridView, data_grid: _DataGrid, setting: str) -> Grid:
    """Make the panel for a data set in a setting: means by the values of the two parameters."""
    from vilu.report.figures import Grid

    first_metric = view.metrics[0]
    # every value once, in the order of the methods
    rows = list(dict.fromkeys(row_value for row_value, _ in data_grid.methods))
    columns = list(dict.fromkeys(column_value for _, column_value in data_grid.methods))
    means = {}
    for (row_value, column_value), method in data_grid.methods.items():
        entrant = board.find(method, data_grid.data, setting)
        if entrant is not None:
            row_and_column = rows.index(row_value), columns.index(column_value)
            means[row_and_column] = entrant.quantity(first_metric).value
    chosen_row, chosen_column = data_grid.best_pair
    chosen_cell = rows.index(chosen_row), columns.index(chosen_column)
    data_title = title_of(board.config, "data", data_grid.data)
    setting_title = title_of(board.config, "setting", setting)
    title = f"{data_title}, {setting_title}: {METRICS[first_metric].title}"
    return Grid(title, rows, columns, means, chosen_cell)

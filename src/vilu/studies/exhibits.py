"""A view of a board as what is written: a table, with a figure where it is one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vilu.benchmark.board import Board, Entrant
from vilu.benchmark.layout import layout
from vilu.benchmark.presentation import (
    AnyView,
    CurveView,
    GridView,
    HistogramView,
    RankingView,
    ScatterView,
    TableView,
)
from vilu.benchmark.summary import summarise
from vilu.errors import DataError
from vilu.metrics.catalog import METRICS
from vilu.outcomes import Outcomes
from vilu.studies.grid import grid_exhibit
from vilu.studies.pivot import Key, chosen, published_of, table_sheet, title_of
from vilu.studies.sheet import Sheet

if TYPE_CHECKING:
    from vilu.report.curves import Line, Panel
    from vilu.report.style import Figure


@dataclass(frozen=True)
class Exhibit:
    """What a view shows.

    Attributes:
        name: Of its files.
        title: Its caption.
        body: The table, or the numbers behind the figure; or a text.
        draw: Makes the figure; None where there is none.
    """

    name: str
    title: str
    body: Sheet | str
    draw: Callable[[], Figure] | None = None


def exhibit(board: Board, view: AnyView, root: Path) -> Exhibit:
    """What a view shows of a board.

    Args:
        board: The results.
        view: What to show.
        root: Folder of the cells, for the scores behind histograms.

    Raises:
        UsageError: If something varies that a table does not name.
        DataError: If there is nothing to show.
    """
    match view:
        case TableView():
            return Exhibit(view.name, view.title, table_sheet(board, view))
        case RankingView():
            return Exhibit(view.name, view.title, layout(board.config, summarise(board)))
        case GridView():
            sheet, draw = grid_exhibit(board, view)
            return Exhibit(view.name, view.title, sheet, draw)
        case HistogramView():
            return _histograms(board, view, root)
        case CurveView():
            return _curves(board, view)
        case ScatterView():
            return _scatter(board, view)


def _curves(board: Board, view: CurveView) -> Exhibit:
    from vilu.report.curves import curves

    config = board.config
    places = {
        "method": {label: entry.x for label, entry in config.entries.items()},
        "data": {label: entry.x for label, entry in config.data.items()},
        "setting": {label: entry.x for label, entry in config.settings.items()},
    }[view.x]
    panels = _panels(board, view, lambda key: places[key.of([view.x])[0]], view.panel, view.line)
    sheet = table_sheet(board, view.as_table((view.panel, view.line), (view.x, "metric")))
    return Exhibit(view.name, view.title, sheet, lambda: curves(panels, view.x_label, log=view.log))


def _scatter(board: Board, view: ScatterView) -> Exhibit:
    from vilu.report.curves import scatter

    def accuracy(key: Key) -> float | None:
        entrant = board.find(key.method, key.data, key.setting)
        return None if entrant is None else entrant.accuracy

    panels = _panels(board, view, accuracy, "metric", "method")
    sheet = table_sheet(board, view.as_table(("data", "setting"), ("method", "metric")))
    return Exhibit(view.name, view.title, sheet, lambda: scatter(panels, "zero-shot accuracy (%)"))


def _panels(
    board: Board, view: CurveView | ScatterView, place: Callable[[Key], float | None], panel: str, line: str
) -> list[Panel]:
    """Panels of a metric each, and of what ``panel`` names; lines of what ``line`` names, at ``place``."""
    from vilu.report.curves import Panel

    groups: dict[tuple[str, str], dict[str, list[tuple[Key, float, Entrant]]]] = {}
    for key, entrant in chosen(board, view).items():
        at = place(key)
        if entrant.found and at is not None:
            series = groups.setdefault((key.of([panel])[0], key.metric), {})
            series.setdefault(key.of([line])[0], []).append((key, at, entrant))
    if not groups:
        raise DataError(f"the view {view.name} has nothing to show: no result with a place on its axis.")
    made = []
    for (name, metric), series in groups.items():
        lines = [_line(board, title_of(board.config, line, label), points) for label, points in series.items()]
        made.append(Panel(title_of(board.config, panel, name), METRICS[metric].title, lines))
    return made


def _line(board: Board, label: str, points: list[tuple[Key, float, Entrant]]) -> Line:
    from vilu.report.curves import Line

    numbers = [entrant.quantity(key.metric) for key, _, entrant in points]
    intervals = [number.interval(board.config.confidence) for number in numbers]
    published = [(at, published_of(board.config, key)) for key, at, _ in points]
    return Line(
        label=label,
        x=[at for _, at, _ in points],
        y=[number.value for number in numbers],
        low=[ends.low for ends in intervals],
        high=[ends.high for ends in intervals],
        published=[(at, number.value) for at, number in published if number is not None],
    )


def _histograms(board: Board, view: HistogramView, root: Path) -> Exhibit:
    from vilu.report.figures import score_histograms

    keys = [key for key, entrant in chosen(board, view).items() if entrant.found and key.metric == view.metrics[0]]
    fields = ["data", "method", *(["setting"] if len({key.setting for key in keys}) > 1 else [])]
    panels: dict[str, Path] = {}
    for key in keys:
        runs = board.entrants[key.method, key.data, key.setting].runs
        title = ", ".join(title_of(board.config, field, key.of([field])[0]) for field in fields)
        panels[title] = (root / runs[min(runs)].path).with_suffix(".parquet")
    if not panels:
        raise DataError(f"the view {view.name} has nothing to show: no method has a result.")
    sheet = table_sheet(board, view.as_table(("data", "method"), ("setting", "metric")))
    return Exhibit(
        view.name,
        view.title,
        sheet,
        lambda: score_histograms({title: Outcomes.load(path) for title, path in panels.items()}),
    )

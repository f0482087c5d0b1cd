"""A number for every pair of two choices, as a map of greys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vilu.report.style import WRONG, house_style, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 2
WIDTH, HEIGHT = 4.2, 2.6


@dataclass(frozen=True)
class Grid:
    """One panel.

    Attributes:
        title: Above it.
        rows: Labels from top to bottom.
        columns: Labels from left to right.
        values: Fractions by number of row and column; what is missing is left white.
        chosen: The pair that was selected.
    """

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Mapping[tuple[int, int], float]
    chosen: tuple[int, int] | None


def grids(panels: Sequence[Grid], row_label: str, column_label: str) -> Figure:
    """Darker is higher; the number stands in every field, the chosen one is framed."""
    with house_style():
        columns = min(COLUMNS, len(panels))
        rows = -(-len(panels) // columns)
        figure = new_figure(WIDTH * columns, HEIGHT * rows)
        for number, panel in enumerate(panels):
            axis = figure.add_subplot(rows, columns, number + 1)
            field = np.full((len(panel.rows), len(panel.columns)), np.nan)
            for place, value in panel.values.items():
                field[place] = value
            low, high = float(np.nanmin(field)), float(np.nanmax(field))
            axis.imshow(field, cmap="Greys", vmin=low - (high - low) / 4, vmax=high + (high - low), aspect="auto")
            for (row, column), value in panel.values.items():
                axis.text(column, row, f"{100 * value:.1f}", ha="center", va="center", fontsize=8)
            if panel.chosen is not None:
                row, column = panel.chosen
                axis.plot(*_frame(row, column), color=WRONG, linewidth=2)
            axis.set_xticks(range(len(panel.columns)), panel.columns)
            axis.set_yticks(range(len(panel.rows)), panel.rows)
            axis.set_title(panel.title)
            axis.set_xlabel(column_label)
            axis.set_ylabel(row_label)
    return figure


def _frame(row: int, column: int) -> tuple[list[float], list[float]]:
    left, right, top, bottom = column - 0.48, column + 0.48, row - 0.48, row + 0.48
    return [left, right, right, left, left], [top, top, bottom, bottom, top]

"""One look for all figures: readable in print, without colour, and by colour-blind people.

Colours are from the Okabe-Ito palette; lines also differ in dashes and markers.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vilu.artifacts.disk import write_bytes
from vilu.extras import import_extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Figure  # noqa: PLC0414 - others take it from here

CORRECT = "#0072B2"
"""The colour of correct answers beside wrong ones."""
WRONG = "#D55E00"
"""The colour of wrong answers beside correct ones."""

COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#D55E00", "#999999")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (5, 5)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DPI = 150
DARK = (
    "@media (prefers-color-scheme: dark) "
    "{ svg { filter: invert(.9) hue-rotate(180deg) brightness(1.2) } }"
)
"""The rule by which an SVG is dark where the page around it is.

Light and dark are swapped, hues stay.
"""
METADATA: dict[str, Any] = {".svg": {"Date": None}, ".png": {"Software": None}}
"""Facts that matplotlib leaves out of a file, by its suffix, so that the bytes do not vary."""
SETTINGS: Any = {
    "svg.hashsalt": "vilu",  # else identifiers in the file are random
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def require_matplotlib() -> None:
    """Refuse to go on without matplotlib."""
    import_extra("matplotlib.figure", "report")


def new_figure(width: float, height: float) -> Figure:
    """An empty figure that needs no screen."""
    figure: Figure = import_extra("matplotlib.figure", "report").Figure(
        figsize=(width, height), layout="constrained"
    )
    return figure


def house_style() -> AbstractContextManager[None]:
    """The settings under which every figure is drawn and saved."""
    style: AbstractContextManager[None] = import_extra("matplotlib", "report").rc_context(SETTINGS)
    return style


def looks() -> Iterator[dict[str, Any]]:
    """Colour, dashes and marker of one line after the other.

    They repeat after eight, the markers out of step.
    """
    for number in itertools.count():
        shift = number // len(COLOURS)
        yield {
            "color": COLOURS[number % len(COLOURS)],
            "linestyle": DASHES[(number + shift) % len(DASHES)],
            "marker": MARKERS[(number + 3 * shift) % len(MARKERS)],
        }


def save(figure: Figure, path: Path) -> None:
    """Write a figure atomically, as PNG, WebP or SVG by its suffix.

    The same figure gives the same bytes.
    """
    file = io.BytesIO()
    kind = path.suffix.removeprefix(".")
    with house_style():
        figure.savefig(file, format=kind, dpi=DPI, metadata=METADATA.get(path.suffix))
    content = file.getvalue()
    if path.suffix == ".svg":
        content = adapting(content)
    write_bytes(path, content)


def adapting(svg: bytes) -> bytes:
    """A drawing of matplotlib's that has a dark form, too."""
    end = b"</style>"
    return svg.replace(end, DARK.encode() + end, 1)

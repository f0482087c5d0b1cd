"""The common style of all figures, readable in print and without seeing colours.

The colours are from the Okabe-Ito palette for colour-blind people. Lines also have different dashes
and markers.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vilu.artifacts.disk import write_bytes
from vilu.extras import import_extra
from vilu.predictors import METHODS, PREDICTORS
from vilu.registry import names_of_bench

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Figure  # noqa: PLC0414 - other modules import it here

CORRECT_COLOUR = "#0072B2"
"""Colour for correct answers, in figures that also show wrong answers."""
WRONG_COLOUR = "#D55E00"
"""Colour for wrong answers, in figures that also show correct answers."""

# colours, dashes and markers for the lines in a figure. ``line_styles_of`` combines the three.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#D55E00", "#999999")
SOLID, DASH_DOTTED = "-", "-."  # only for ``STYLED_METHODS``
FREE_DASHES = ("--", ":", (0, (5, 1)), (0, (9, 3)), (0, (1, 4)), (0, (5, 5)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

STYLED_METHODS = (
    ("vilu_plus", "vilu_plus_unlabelled"),
    ("mcm", "gda_and_zero_shot"),
    ("vilu_zero", "otter"),
    ("linear_probe", "linear_probe_cv"),
    ("lvu", "tip_adapter"),
    ("vilu", "vilu_paper"),
    ("class_gaussians", "probe_and_zero_shot"),
    ("margin", "stata"),
)
"""Methods with a fixed style: for every colour in ``COLOURS``, a solid line and a dash-dotted line.

No other line is solid or dash-dotted.
"""
MAIN_METHODS = tuple(solid for solid, _ in STYLED_METHODS)
"""Methods with a solid line. A variant of such a method has the method's colour."""

DPI = 150
"""Pixels per inch of a figure in PNG or WebP."""
DARK_RULE = (
    "@media (prefers-color-scheme: dark) "
    "{ svg { filter: invert(.9) hue-rotate(180deg) brightness(1.2) } }"
)
"""CSS rule that shows an SVG in dark colours if the reader's browser prefers a dark page.

Light and dark colours are swapped. Hues do not change.
"""
LEFT_OUT_METADATA: dict[str, Any] = {".svg": {"Date": None}, ".png": {"Software": None}}
"""Metadata that a file does not get, by the suffix of the file.

With a date or a version, equal figures would not have equal bytes.
"""
MATPLOTLIB_SETTINGS: Any = {  # settings of matplotlib for every figure
    "svg.hashsalt": "vilu",  # without a fixed salt, identifiers in an SVG are random
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def require_matplotlib() -> None:
    """Raise MissingModelError if matplotlib is not installed."""
    import_extra("matplotlib.figure", extra="report")


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure, without a screen. Width and height are in inches."""
    figure_module = import_extra("matplotlib.figure", extra="report")
    figure: Figure = figure_module.Figure(figsize=(width, height), layout="constrained")
    return figure


def house_style() -> AbstractContextManager[None]:
    """Return a context manager with the ``MATPLOTLIB_SETTINGS`` for all figures."""
    matplotlib = import_extra("matplotlib", extra="report")
    style: AbstractContextManager[None] = matplotlib.rc_context(MATPLOTLIB_SETTINGS)
    return style


@dataclass(frozen=True)
class LineStyle:
    """Colour, dashes and marker of a line."""

    colour: str
    dash: Any  # line style of matplotlib: a name, or (offset, lengths)
    marker: str

    @property
    def plot_arguments(self) -> dict[str, Any]:
        """Arguments for matplotlib's ``plot``."""
        return {"color": self.colour, "linestyle": self.dash, "marker": self.marker}


def line_styles_of(labels: Iterable[str]) -> dict[str, LineStyle]:
    """Map the label of every line in a figure to a line style.

    A predictor of vilu or vilu-bench looks the same in every figure, and no other one of these has
    the same colour and dash.
    The methods in ``STYLED_METHODS`` have fixed styles. If a label only begins with the name of one
    of the ``MAIN_METHODS``, for example "vilu + MCM input", it has the method's colour and another
    dash. Two lines in a figure differ in colour or dash, or in the marker if there are too many
    lines for that. They have the same style only if no possible style is free.
    """
    # the names from vilu-bench count in any case, so an installation changes no figure
    names = [*METHODS, *names_of_bench()[PREDICTORS.group]]
    styles_of_methods = _add_styles({}, names)
    line_styles = {}
    other_labels = []
    for label in set(labels):
        if label in styles_of_methods:
            line_styles[label] = styles_of_methods[label]
        else:
            other_labels.append(label)
    return _add_styles(line_styles, other_labels)


def _add_styles(
    line_styles: Mapping[str, LineStyle], labels: Iterable[str]
) -> dict[str, LineStyle]:
    """Give every label a style that no other line has, and return all styles."""
    all_styles = dict(line_styles)
    for label in sorted(labels):
        all_styles[label] = _free_style(_possible_styles(label), set(all_styles.values()))
    return all_styles


def _free_style(candidates: Sequence[LineStyle], taken_styles: Set[LineStyle]) -> LineStyle:
    """Choose the first style with a free pair of colour and dash, else the first free style.

    If no style is free, the first style is chosen.
    """
    taken_pairs = {(line_style.colour, line_style.dash) for line_style in taken_styles}
    for line_style in candidates:
        if (line_style.colour, line_style.dash) not in taken_pairs:
            return line_style
    for line_style in candidates:
        if line_style not in taken_styles:
            return line_style
    return candidates[0]


def _possible_styles(label: str) -> list[LineStyle]:
    """Return the possible styles for a line, the preferred style first."""
    fixed_style = _fixed_style(label)
    if fixed_style is not None:
        return [fixed_style]
    method = _main_method(label)
    if method is None:
        colours = list(COLOURS[1:])  # the first colour is for ``STYLED_METHODS`` and their variants
    else:
        colours = [COLOURS[MAIN_METHODS.index(method)]]
    # Styles are numbered. The label's hash is the number of its first style, and the next numbers
    # are its further styles. From number to number, colours, dashes and markers change at different
    # rates.
    label_bytes = label.encode("utf-8", "backslashreplace")
    first_number = zlib.crc32(label_bytes)
    n_numbers = 3 * len(colours) * len(FREE_DASHES) * len(MARKERS)  # after these, styles repeat
    line_styles = []
    for number in range(first_number, first_number + n_numbers):
        colour = colours[number % len(colours)]
        dash = FREE_DASHES[number // len(colours) % len(FREE_DASHES)]
        marker = MARKERS[number // 3 % len(MARKERS)]
        line_style = LineStyle(colour, dash, marker)
        line_styles.append(line_style)
    return line_styles


def _fixed_style(label: str) -> LineStyle | None:
    """Return the style of one of the ``STYLED_METHODS``. None if the label is no such method."""
    for colour, marker, (solid, dash_dotted) in zip(COLOURS, MARKERS, STYLED_METHODS, strict=True):
        if label == solid:
            return LineStyle(colour, SOLID, marker)
        if label == dash_dotted:
            return LineStyle(colour, DASH_DOTTED, marker)
    return None


def _main_method(label: str) -> str | None:
    """Return the main method that a label names at its beginning. None if there is none."""
    # "vilu_plus + MCM" begins with "vilu" and "vilu_plus", and the longer name counts. A letter
    # after the name makes another word: "marginal" does not begin with "margin".
    methods_at_start = [method for method in MAIN_METHODS if re.match(rf"{method}(?![a-z])", label)]
    return max(methods_at_start, key=len, default=None)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure atomically, as PNG, WebP or SVG. The path's suffix decides the format.

    Equal figures give equal bytes.
    """
    buffer = io.BytesIO()
    file_format = path.suffix.removeprefix(".")
    with house_style():
        metadata = LEFT_OUT_METADATA.get(path.suffix)  # the value None leaves an entry out
        figure.savefig(buffer, format=file_format, dpi=DPI, metadata=metadata)
    content = buffer.getvalue()
    if path.suffix == ".svg":
        content = with_dark_colours(content)
    write_bytes(path, content)


def with_dark_colours(svg: bytes) -> bytes:
    """Add the dark colours of ``DARK_RULE`` to an SVG from matplotlib."""
    end_of_style = b"</style>"
    rule_and_end = DARK_RULE.encode() + end_of_style
    return svg.replace(end_of_style, rule_and_end, 1)  # only in the first style element

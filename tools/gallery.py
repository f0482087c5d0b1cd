"""Record the output and the pictures of the examples for the site's gallery.

    python tools/gallery.py [NAME ...]

Every script in examples/, or every named script, runs in this process. The printed text goes to
examples/output/NAME.txt. If ``main`` returns a figure, the figure goes to examples/pictures/.
``tests/test_examples.py`` runs the same scripts, and fails where the recorded output is out of
date. Prints the seconds of processor time, including the commands started by the scripts.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from vilu.report.style import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER = Path(__file__).resolve().parents[1] / "examples"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "example_data")


def run_example(name: str) -> tuple[str, Figure | None]:
    """Run an example, and return printed text and figure. examples/ has to be on the path."""
    printed_text = io.StringIO()
    with contextlib.redirect_stdout(printed_text):
        example = importlib.import_module(name)
        figure: Figure | None = example.main()
    return printed_text.getvalue(), figure


def picture_path(name: str, figure: Figure) -> Path:
    """Return the path of a figure's file: drawings as SVG, photos as WebP."""
    photos = any(axes.images for axes in figure.axes)
    return FOLDER / "pictures" / f"{name}.{'webp' if photos else 'svg'}"


def record(names: Iterable[str]) -> None:
    """Run the examples, and write the output and the figures."""
    for name in names:
        seconds_before = sum(os.times()[:4])
        output, figure = run_example(name)
        (FOLDER / "output" / f"{name}.txt").write_text(output, encoding="utf-8")
        if figure is not None:
            path = picture_path(name, figure)
            save_figure(figure, path)
        print(f"{name}: {sum(os.times()[:4]) - seconds_before:.1f} s")


if __name__ == "__main__":
    sys.path.insert(0, str(FOLDER))
    record(sys.argv[1:] or NAMES)

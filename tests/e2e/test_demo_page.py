"""docs/demo.md shows what `vilu demo` prints, except for differences that another processor
causes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest

from tests.command import ROOT, run

pytest.importorskip("transformers")

pytestmark = pytest.mark.slow
PAGE: Final = (ROOT / "docs" / "demo.md").read_text(encoding="utf-8")
METHOD: Final = re.compile(r"^\|? ?(?P<name>[a-z_-]+(?: \(seed 0\))?) +\|? ?(?P<auroc>\d+\.\d) \[")
"""The start of a table row. The page has bars, and the terminal has none."""
COUNT: Final = re.compile(r"accepted (\d+) of (\d+) without a label")
FEW_TENTHS: Final = 0.5
"""The largest change in a trained head's AUROC on another processor, in points."""
FEW_PHOTOS: Final = 15
"""The largest change in the number of accepted photos. The seeds on the page differ by 15, too."""


def auroc_of(text: str) -> dict[str, float]:
    """Return the AUROC by method."""
    rows = {}
    for line in text.splitlines():
        if row := METHOD.match(line):
            rows[row["name"]] = float(row["auroc"])
    return rows


def accepted(text: str) -> tuple[int, ...]:
    """Return two numbers: the accepted photos, and the photos without a label."""
    match = COUNT.search(text)
    assert match
    return tuple(int(number) for number in match.groups())


def require_same(printed: str) -> None:
    """Compare a run's output with the page."""
    shown = auroc_of(PAGE)
    assert len(shown) == 10
    assert auroc_of(printed) == pytest.approx(shown, abs=FEW_TENTHS)
    assert re.findall(r"\d+ answers, \d+ wrong", PAGE)[0] in printed
    shown_accepted, shown_all = accepted(PAGE)
    n_accepted, n_all = accepted(printed)
    assert n_all == shown_all
    assert abs(n_accepted - shown_accepted) <= FEW_PHOTOS


def test_the_page_shows_what_the_demo_prints(tmp_path: Path) -> None:
    require_same(run("demo", "-o", tmp_path / "demo").stdout)

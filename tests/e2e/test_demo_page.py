"""docs/demo.md shows what `vilu demo` prints, up to what another processor changes."""

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
"""The beginning of a row of the table: in the page with bars, in the terminal without."""
COUNT: Final = re.compile(r"accepted (\d+) of (\d+) without a label")
FEW_TENTHS: Final = 0.5
"""How far another processor moves the AUROC of trained heads, in points."""
FEW_PHOTOS: Final = 15
"""How far it moves the number of accepted photos: the spread of the page's seeds is 15."""


def auroc_of(text: str) -> dict[str, float]:
    """AUROC by method."""
    rows = {}
    for line in text.splitlines():
        if row := METHOD.match(line):
            rows[row["name"]] = float(row["auroc"])
    return rows


def accepted(text: str) -> tuple[int, ...]:
    """Accepted photos of the folder, and photos without a label."""
    match = COUNT.search(text)
    assert match
    return tuple(int(number) for number in match.groups())


def require_same(printed: str) -> None:
    """Compare what a run printed with the page."""
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

"""Figures hold every method, and the same outcomes draw the same bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vilu.outcomes.outcomes import Outcomes
from vilu.report import figures, style


@pytest.fixture(scope="module")
def outcomes() -> list[Outcomes]:
    """Ten methods: more than there are colours."""
    rng = np.random.default_rng(0)
    failure = rng.integers(2, size=80)
    return [Outcomes(rng.random(80) + failure, failure, method=f"method {i}") for i in range(10)]


@pytest.mark.parametrize("draw", [figures.roc_curves, figures.risk_coverage_curves])
def test_no_method_is_left_out(draw, outcomes: list[Outcomes]) -> None:
    labels = [text.get_text() for text in draw(outcomes).axes[0].get_legend().get_texts()]
    assert [label.split("  ")[0] for label in labels] == [f"method {i}" for i in range(10)]


def test_histograms_count_every_answer(outcomes: list[Outcomes]) -> None:
    figure = figures.score_histograms({str(one.method): one for one in outcomes})
    assert len(figure.axes) == 10
    for axes in figure.axes:  # all of the correct ones, and all of the wrong ones
        assert sum(bar.get_height() for bar in axes.patches) == pytest.approx(200)


def test_saved_figures_are_reproducible(outcomes: list[Outcomes], tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        style.save(figures.roc_curves(outcomes[:2]), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_drawings_have_a_dark_form(outcomes: list[Outcomes], tmp_path: Path) -> None:
    style.save(figures.roc_curves(outcomes[:2]), tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().count(style.DARK) == 1

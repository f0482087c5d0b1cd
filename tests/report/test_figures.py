"""Test that figures show every method, and that equal outcomes draw equal bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vilu.outcomes.outcomes import Outcomes
from vilu.predictors import PREDICTORS
from vilu.report import figures, style
from vilu.report.figures import LABEL_HEIGHT, Panel, Series, draw_curves, draw_scatter
from vilu.report.style import line_styles_of


@pytest.fixture(scope="module")
def outcomes() -> list[Outcomes]:
    """Return ten methods, which are more than there are colours."""
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
    for axes in figure.axes:  # all right answers add up to 100 %, and so do all wrong ones
        assert sum(bar.get_height() for bar in axes.patches) == pytest.approx(200)


def test_saved_figures_are_reproducible(outcomes: list[Outcomes], tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        style.save_figure(figures.roc_curves(outcomes[:2]), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_drawings_have_a_dark_form(outcomes: list[Outcomes], tmp_path: Path) -> None:
    style.save_figure(figures.roc_curves(outcomes[:2]), tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().count(style.DARK_RULE) == 1


def test_a_method_looks_the_same_in_every_figure() -> None:
    alone = line_styles_of(["vilu_plus"])
    beside = line_styles_of(
        ["knn_vote", "mcm", "vilu", "vilu_plus", "vilu_plus_unlabelled", "vilu_zero"]
    )
    assert beside["vilu_plus"] == alone["vilu_plus"]
    assert line_styles_of(["energy", "knn_vote"])["knn_vote"] == beside["knn_vote"]


def test_no_two_predictors_share_colour_and_dash() -> None:
    pairs = set()
    for name in PREDICTORS:
        (look,) = line_styles_of([name]).values()
        pairs.add((look.colour, repr(look.dash)))
    assert len(pairs) == len(PREDICTORS)


def test_few_lines_of_settings_differ_without_their_markers() -> None:
    styles = line_styles_of(["vilu", "mcm", *(f"setting {number}" for number in range(30))])
    assert len({(look.colour, repr(look.dash)) for look in styles.values()}) == len(styles)


def test_a_variant_has_the_colour_of_its_method_with_another_dash() -> None:
    styles = line_styles_of(["vilu", "vilu + MCM input", "vilu_plus", "vilu_plus_unlabelled"])
    assert styles["vilu + MCM input"].colour == styles["vilu"].colour
    assert styles["vilu_plus_unlabelled"].colour == styles["vilu_plus"].colour
    assert styles["vilu + MCM input"].dash != styles["vilu"].dash
    assert styles["vilu"].colour != styles["vilu_plus"].colour


def test_no_two_lines_of_a_figure_look_alike() -> None:
    names = [*PREDICTORS, *(f"setting {number}" for number in range(60))]
    styles = line_styles_of(names)
    assert len({repr(look) for look in styles.values()}) == len(set(names))


def test_a_figure_of_very_many_lines_is_drawn() -> None:
    names = [f"vilu seed {number}" for number in range(100)]  # more than there are line styles
    assert set(line_styles_of(names)) == set(names)


def test_every_line_of_a_curve_has_its_label_at_its_end() -> None:
    x = [1.0, 5.0, 16.0]
    lines = [
        Series(name, x, [0.8, 0.85, end], [0.7, 0.8, end - 0.01], [0.9, 0.9, end + 0.01])
        for name, end in [("mcm", 0.9), ("vilu", 0.901), ("vilu_plus", 0.95)]
    ]
    figure = draw_curves([Panel("set", "AUROC", lines)], "labels a class", log=True)
    (axes,) = figure.axes
    assert axes.get_legend() is None
    heights = {text.get_text(): text.xyann[1] for text in axes.texts}
    assert sorted(heights, key=lambda name: heights[name]) == ["mcm", "vilu", "vilu_plus"]
    gaps = np.diff(sorted(heights.values()))
    assert (gaps > LABEL_HEIGHT - 1e-9).all()
    # a dotted line leads to a label from the line's last point
    assert all(text.arrow_patch is not None for text in axes.texts)
    ends = {text.get_text(): text.xy for text in axes.texts}
    assert {x for x, _ in ends.values()} == {16}
    last_values = {name: y for name, (_, y) in ends.items()}
    assert last_values == pytest.approx({"mcm": 90, "vilu": 90.1, "vilu_plus": 95})
    assert len(axes.collections) == 3  # a band for every line


def test_a_line_that_ends_early_leads_to_its_label_from_there() -> None:
    whole = Series("mcm", [1.0, 5.0, 16.0], [0.8, 0.8, 0.9], [0.7, 0.7, 0.8], [0.9, 0.9, 1.0])
    short = Series("vilu", [5.0, 1.0], [0.6, 0.5], [0.5, 0.4], [0.7, 0.6])  # x in any order
    (axes,) = draw_curves([Panel("set", "AUROC", [whole, short])], "labels", log=True).axes
    assert {text.get_text(): text.xy for text in axes.texts} == {"mcm": (16, 90), "vilu": (5, 60)}


def test_labels_of_lines_stay_beside_their_plot() -> None:
    x = [1.0, 5.0]
    lines = [Series(f"method {i}", x, [0.5, 0.98], [0.5, 0.98], [0.5, 0.98]) for i in range(8)]
    (axes,) = draw_curves([Panel("set", "AUROC", lines)], "labels", title="Many", log=False).axes
    heights = [text.xyann[1] for text in axes.texts]
    assert max(heights) <= 1 + 1e-9
    assert np.diff(sorted(heights)) == pytest.approx(LABEL_HEIGHT)


def test_a_scatter_has_labels_where_its_lines_end_and_a_title() -> None:
    x = [0.6, 0.8, 0.9]
    rising = Series("vilu", x, [0.7, 0.8, 0.9], [0.6, 0.7, 0.8], [0.8, 0.9, 1.0])
    single = Series("mcm", [0.6], [0.75], [0.7], [0.8])  # a point without a line
    figure = draw_scatter([Panel("AUROC", "AUROC", [rising, single])], "accuracy", title="Points")
    assert figure.get_suptitle() == "Points"
    (axes,) = figure.axes
    assert axes.get_legend() is None
    bottom, top = axes.get_ylim()
    heights = {text.get_text(): text.xyann[1] for text in axes.texts}
    # the least-squares line through (60, 70), (80, 80) and (90, 90) ends at 88.57
    assert bottom + heights["vilu"] * (top - bottom) == pytest.approx(88.57, abs=0.01)
    assert bottom + heights["mcm"] * (top - bottom) == pytest.approx(75)
    ends = {text.get_text(): text.xy for text in axes.texts}
    assert ends["vilu"] == pytest.approx((90, 88.57), abs=0.01)
    assert ends["mcm"] == pytest.approx((60, 75))

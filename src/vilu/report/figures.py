"""Figures of outcomes, as matplotlib figures that the caller saves.

Colours and saving are in ``style``.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vilu.metrics import aurc, auroc, fpr_at_tpr, risk_coverage_curve, roc_curve_points
from vilu.outcomes import Outcomes
from vilu.report.style import COLOURS, CORRECT, WRONG, house_style, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image

COLUMNS = 3


@dataclass(frozen=True)
class Photo:
    """A picture of the contact sheet: what the model said, what is true (None if unknown), and its uncertainty."""

    image: Image.Image
    prediction: str
    truth: str | None
    uncertainty: float


def score_histograms(outcomes: Mapping[str, Outcomes]) -> Figure:
    """Uncertainty of correct and of wrong answers, a panel each (as Fig. 9 and 10 of the ViLU supplement).

    Shares of the correct and of the wrong ones, so that the rarer kind is seen.
    """
    with house_style():
        rows = -(-len(outcomes) // COLUMNS)
        figure = new_figure(4 * COLUMNS, 2.6 * rows)
        for number, (title, one) in enumerate(outcomes.items()):
            axes = figure.add_subplot(rows, COLUMNS, number + 1)
            keep = one.evaluable
            uncertainty, failure = one.uncertainty[keep], one.failure[keep]
            edges = np.histogram_bin_edges(uncertainty, bins=30).tolist()
            for kind, label, colour, hatch in ((0, "correct", CORRECT, None), (1, "wrong", WRONG, "///")):
                shown = uncertainty[failure == kind]
                share = np.full(len(shown), 100 / max(len(shown), 1))
                axes.hist(shown, edges, weights=share, alpha=0.65, label=f"answer {label}", color=colour, hatch=hatch)
            axes.set_title(f"{title}: AUROC {auroc(uncertainty, failure):.1%}")
            axes.set_xlabel("uncertainty")
            axes.set_ylabel("% of its kind")
            if number == 0:
                axes.legend(fontsize=8)
    return figure


def roc_curves(outcomes: Sequence[Outcomes]) -> Figure:
    """Share of correct answers kept against share of wrong ones kept, at every threshold (positive = correct)."""
    figure = new_figure(5.5, 5)
    axes = figure.add_subplot()
    for one, colour in zip(outcomes, itertools.cycle(COLOURS), strict=False):
        keep = one.evaluable
        uncertainty, failure = one.uncertainty[keep], one.failure[keep]
        fpr, tpr = roc_curve_points(uncertainty, failure)
        label = f"{one.method}  (FPR95 {fpr_at_tpr(uncertainty, failure):.1%})"
        axes.plot(fpr, tpr, color=colour, linestyle=line_style(one), label=label)
    axes.axhline(0.95, color="#bbbbbb", linewidth=0.8)
    axes.set_xlabel("wrong answers accepted (false positive rate)")
    axes.set_ylabel("correct answers accepted (true positive rate)")
    axes.legend(fontsize=8, loc="lower right")
    return figure


def risk_coverage_curves(outcomes: Sequence[Outcomes]) -> Figure:
    """Error rate among the most trusted answers against the share that is trusted."""
    figure = new_figure(5.5, 5)
    axes = figure.add_subplot()
    for one, colour in zip(outcomes, itertools.cycle(COLOURS), strict=False):
        keep = one.evaluable
        coverage, risk = risk_coverage_curve(one.uncertainty[keep], one.failure[keep])
        label = f"{one.method}  (AURC {aurc(one.uncertainty[keep], one.failure[keep]):.3f})"
        axes.plot(coverage, risk, color=colour, linestyle=line_style(one), label=label)
    axes.set_xlabel("coverage: share of the answers accepted")
    axes.set_ylabel("selective risk: error rate among them")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, loc="upper left")
    return figure


def line_style(outcomes: Outcomes) -> str:
    """Solid for the method this library is named after, dashed for others: readable without colour."""
    return "-" if (outcomes.method or "").startswith("vilu") else "--"


def contact_sheet(trusted: Sequence[Photo], doubted: Sequence[Photo]) -> Figure:
    """The most and the least trusted photos, with the model's words and whether they are right."""
    columns = max(len(trusted), len(doubted))
    figure = new_figure(1.7 * columns, 5.2)
    panels = figure.subfigures(2, 1, squeeze=False)[:, 0]
    for panel, title, photos in zip(panels, ("Most trusted", "Least trusted"), (trusted, doubted), strict=True):
        panel.suptitle(title, fontsize=11, x=0.01, ha="left")
        for number, photo in enumerate(photos):
            draw_photo(panel.add_subplot(1, columns, number + 1), photo)
    return figure


def draw_photo(axes: Axes, photo: Photo) -> None:
    """One picture with its caption, framed by whether the answer is right."""
    wrong = photo.truth is not None and photo.truth != photo.prediction
    verdict = "" if photo.truth is None else f"\nwrong: {photo.truth}" if wrong else "\ncorrect"
    words = textwrap.shorten(photo.prediction, 24, placeholder="…")
    axes.imshow(photo.image)
    axes.set_title(f"“{words}”{verdict}\nu = {photo.uncertainty:.3f}", fontsize=8, color=WRONG if wrong else CORRECT)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_edgecolor(WRONG if wrong else CORRECT)
        spine.set_linewidth(3 if wrong else 1)

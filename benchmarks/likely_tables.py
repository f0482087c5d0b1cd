"""Tables of ``benchmarks.likely``: ``python -m benchmarks.likely_tables CELLS``.

The first table is about the sets used to choose the widening. Every widening has the mean share of
wrong answers among the likely answers, in the set where this share is largest. The second table has
a row for every set and label count, with the widening in use. Shares are means over seeds with a
95 % interval (t). A seed without an estimate has neither a coverage nor a wrong share. A seed
without a likely answer has no wrong share.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from benchmarks.likely import CHOOSING_SETS, MAX_RISK, TEST_SETS, JudgedCell
from vilu.calibration.likely import WIDENING, LikelyRight
from vilu.metrics.selective import coverage_at_risk

WIDENINGS = (1.0, 1.1, 1.25, 1.5, 2.0)

Group = tuple[str, int]
"""A set, and a label count."""


class MarkedAnswers(NamedTuple):
    """A cell's answers that an estimate marks as likely right."""

    coverage: float  # share of likely right answers among the rows without a label
    wrong: float  # wrong share among the likely right answers. NaN if there are none.
    hindsight: float  # largest possible coverage at the risk, known from all labels


def mark_likely(cell: JudgedCell, widening: float) -> MarkedAnswers | None:
    """Mark the answers that are likely right by the estimate. Without an estimate, return None."""
    uncertainty, failure = cell.unlabelled
    likely_right = LikelyRight.estimate(cell.held_out, uncertainty, MAX_RISK)
    if likely_right.probability is None:
        return None
    widened = likely_right.model_copy(update={"widening": widening})
    flags = widened.flags_by_own_threshold(uncertainty)
    is_likely = np.array(flags, dtype=np.bool_)
    wrong = float(failure[is_likely].mean()) if is_likely.any() else np.nan
    hindsight = coverage_at_risk(uncertainty, failure, risk=MAX_RISK)
    share = float(is_likely.mean())
    return MarkedAnswers(share, wrong, hindsight)


def read_cells(folder: Path) -> dict[Group, list[JudgedCell]]:
    """Read the cells for every set and label count."""
    cells = defaultdict(list)
    for path in sorted(folder.glob("*.npz")):
        name, n_labels, _ = path.stem.rsplit("-", 2)
        cell = JudgedCell.load(path)
        cells[name, int(n_labels)].append(cell)
    return cells


def interval(values: list[float]) -> tuple[float, float]:
    """Return the mean of the values except NaN, and half the width of the 95 % interval (t)."""
    known_values = [value for value in values if not np.isnan(value)]
    known = np.array(known_values)
    if not len(known):
        return np.nan, np.nan
    if len(known) == 1:
        return float(known[0]), np.nan
    half = stats.t.ppf(0.975, len(known) - 1) * known.std(ddof=1) / np.sqrt(len(known))
    return float(known.mean()), float(half)


def choice_rows(cells: dict[Group, list[JudgedCell]]) -> Iterator[str]:
    """Yield a row per widening: the largest mean share of wrong answers on the choosing sets."""
    for widening in WIDENINGS:
        means = {}
        for group, of_group in cells.items():
            name, _ = group
            if name in CHOOSING_SETS:
                marked_cells = [mark_likely(cell, widening) for cell in of_group]
                mean, _ = interval([marked.wrong for marked in marked_cells if marked is not None])
                means[group] = mean
        worst = max(means, key=lambda group: np.nan_to_num(means[group]))
        name, n_labels = worst
        yield f"| {widening:g} | {means[worst]:.1%} | {name}, {n_labels} labels |"


def result_rows(cells: dict[Group, list[JudgedCell]]) -> Iterator[str]:
    """Yield a row for every set and label count, at the widening in use."""
    order = (*CHOOSING_SETS, *TEST_SETS)
    for group in sorted(cells, key=lambda group: (order.index(group[0]), group[1])):
        name, n_labels = group
        marked_cells = [mark_likely(cell, WIDENING) for cell in cells[group]]
        estimated_cells = [marked for marked in marked_cells if marked is not None]
        n_rows = len(cells[group][0].unlabelled.failure)
        role = "chose" if name in CHOOSING_SETS else "read"
        wrong, wrong_half = interval([marked.wrong for marked in estimated_cells])
        coverage, coverage_half = interval([marked.coverage for marked in estimated_cells])
        hindsight, _ = interval([marked.hindsight for marked in estimated_cells])
        yield (
            f"| {name} ({role}) | {n_labels} | {n_rows:,} "
            f"| {len(estimated_cells)} of {len(marked_cells)} | "
            f"{100 * wrong:.1f} ± {100 * wrong_half:.1f} | "
            f"{100 * coverage:.1f} ± {100 * coverage_half:.1f} | {100 * hindsight:.1f} | "
            f"{coverage / hindsight:.2f} |"
        )


def main() -> None:
    """Print both tables."""
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("cells", type=Path)
    options = parser.parse_args()
    cells = read_cells(options.cells)
    print("| widening | largest mean share wrong | where |\n|---|---|---|")
    rows_of_choices = choice_rows(cells)
    print("\n".join(rows_of_choices))
    print(
        "| set | labels | rows without a label | seeds with an estimate | wrong among likely, % | "
        "likely, % | hindsight, % | likely / hindsight |\n|---|---|---|---|---|---|---|---|"
    )
    rows_of_results = result_rows(cells)
    print("\n".join(rows_of_results))


if __name__ == "__main__":
    main()

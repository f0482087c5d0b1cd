"""The tables of ``benchmarks.baselines``, as Markdown.

    python -m benchmarks.baseline_tables CELLS.jsonl

CELLS.jsonl may be compressed (CELLS.jsonl.xz).

The first table has AUROC for failures and FPR95 in percent, averaged over divisions and then over
sets. A column is a label count. A method has an entry in a column if every set in the table has a
cell of the method there. Brackets are 95 % bootstrap intervals over the test rows: resample number
i of a mean is the mean of resample number i over all cells.

The second table has the difference between ViLU+ and every other method, paired on the same rows.
The third table has the difference from the best baseline in every column, for groups of sets. The
best baseline has the highest mean AUROC over the group. The interval there is over sets, divisions
and rows: a resample draws sets with replacement, for each set divisions with replacement, and one
row resample.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.baselines import FREE, LABELLED, LABELS, NAMES
from benchmarks.never_below import WITHOUT_LABELS
from benchmarks.never_below_tables import read_lines
from vilu.metrics.counts import Floats

Line = dict[str, Any]
OURS = "vilu_plus"
BASELINES = (
    "linear_probe",
    "linear_probe_cv",
    "probe_and_zero_shot",
    "gda_and_zero_shot",
    "tip_adapter",
)
DEVELOPMENT_SETS = ("pets among 123", "caltech66", "food9", "dtd")
"""Sets used while ``vilu_plus`` was developed."""
PROTOTYPES = ("ucf101", "dtd", "oxford pets")
"""Sets whose texts are mean images."""
LEFT_OUT_IN_TURN = ("imagenet", "cars")
"""Sets that the third table leaves out: the first, then both.

ImageNet has fewer than two labels per class. Cars was measured last, and adds most to the lead.
"""
N_RESAMPLES = 2_000
TITLES_OF_SEEING = {
    "otter_sees": "otter, seeing the rows that are read",
    "stata_sees": "stata, seeing the rows that are read",
}


class Column(NamedTuple):
    """The cells of a method at a label count."""

    method: str
    n_labels: int


class Cells(NamedTuple):
    """The lines of a file by column, and within a column by set and division."""

    lines: dict[Column, dict[tuple[str, int], Line]]

    @classmethod
    def read(cls, file: Path) -> Cells:
        """Read the cells of a file."""
        lines: dict[Column, dict[tuple[str, int], Line]] = {}
        for text in read_lines(file):
            line = json.loads(text)
            name, n_labels, division, method = line["cell"]
            column = Column(method, n_labels)
            lines.setdefault(column, {})[name, division] = line
        return cls(lines)

    def names(self) -> list[str]:
        """Return the sets with a cell, in the order of the tables."""
        measured = {name for lines in self.lines.values() for name, _ in lines}
        return [name for name in NAMES if name in measured]

    def common(self, names: Sequence[str]) -> list[tuple[str, int]]:
        """Return the sets and divisions with a cell in every column of ``columns``."""
        keys = set(next(iter(self.lines.values())))
        for column in self.columns(names):
            keys &= set(self.lines[column])
        return sorted(key for key in keys if key[0] in names)

    def columns(self, names: Sequence[str]) -> list[Column]:
        """Return the columns with a cell for every set."""
        complete = []
        for column, lines in self.lines.items():
            measured_sets = {name for name, _ in lines}
            if measured_sets >= set(names):
                complete.append(column)
        return complete


def mean_over_sets(values: dict[tuple[str, int], Floats], names: Sequence[str]) -> Floats:
    """Average over each set's divisions, then over sets."""
    means_of_sets = []
    for name in names:
        values_of_divisions = [value for (of_set, _), value in values.items() if of_set == name]
        mean_of_set = np.mean(values_of_divisions, axis=0)
        means_of_sets.append(mean_of_set)
    mean: Floats = np.mean(means_of_sets, axis=0)
    return mean


def interval_text(resamples: Floats) -> str:
    """Format the 95 % interval of resampled means, in percent."""
    ends = 100 * np.nanpercentile(resamples, [2.5, 97.5])
    low, high = np.round(ends, 1) + 0.0  # no -0.0
    return f"[{low:.1f}, {high:.1f}]"


def entry_text(cells: Cells, column: Column, keys: Sequence[tuple[str, int]]) -> str:
    """Format AUROC with an interval, and FPR95."""
    names = sorted({name for name, _ in keys})
    lines = {key: cells.lines[column][key] for key in keys}
    areas = {key: np.array(line["auroc"]) for key, line in lines.items()}
    area = mean_over_sets(areas, names)
    resampled = {key: np.array(line["resampled"]) for key, line in lines.items()}
    resamples = mean_over_sets(resampled, names)
    fpr_of_key = {key: np.array(line["fpr95"]) for key, line in lines.items()}
    fpr = mean_over_sets(fpr_of_key, names)
    return f"{100 * area:.1f} <sub>{interval_text(resamples)}</sub> / {100 * fpr:.0f}"


class Gains(NamedTuple):
    """How far ViLU+ is above a method, by set and division."""

    measured: dict[tuple[str, int], Floats]  # () difference on the test rows
    resampled: dict[tuple[str, int], Floats]  # (B,) differences on resamples of the test rows

    @classmethod
    def over(cls, cells: Cells, column: Column, keys: Sequence[tuple[str, int]]) -> Gains:
        """Compute the gains over a column's method, on the same rows."""
        ours = cells.lines[Column(OURS, column.n_labels)]
        others = cells.lines[column]
        measured = {}
        resampled = {}
        for key in keys:
            measured[key] = np.array(ours[key]["auroc"]) - np.array(others[key]["auroc"])
            resampled[key] = np.array(ours[key]["resampled"]) - np.array(others[key]["resampled"])
        return cls(measured, resampled)

    @property
    def names(self) -> list[str]:
        """The sets."""
        return sorted({name for name, _ in self.measured})

    @property
    def mean(self) -> float:
        """The mean over sets, in points."""
        return 100 * float(mean_over_sets(self.measured, self.names))

    def over_sets(self) -> Floats:
        """Compute means on resamples of sets, divisions and rows."""
        rng = np.random.default_rng(0)
        names = self.names
        gains_of_set = {
            name: [values for (of, _), values in self.resampled.items() if of == name]
            for name in names
        }
        means = np.empty(N_RESAMPLES)
        for resample in range(N_RESAMPLES):
            drawn = []
            for name in rng.choice(names, size=len(names)):
                divisions = gains_of_set[name]
                chosen = rng.integers(len(divisions), size=len(divisions))
                row_resample = rng.integers(len(divisions[0]))
                gain = np.mean([divisions[number][row_resample] for number in chosen])
                drawn.append(gain)
            means[resample] = np.mean(drawn)
        return means


def gain_text(cells: Cells, column: Column, keys: Sequence[tuple[str, int]]) -> str:
    """Format how far ViLU+ is above a method on the same rows, with the interval over rows."""
    gains = Gains.over(cells, column, keys)
    resamples = mean_over_sets(gains.resampled, gains.names)
    interval = interval_text(resamples)
    return f"{gains.mean:+.1f} <sub>{interval}</sub>"


class Lead(NamedTuple):
    """How far ViLU+ is above the best baseline, in points."""

    best: str
    mean: float
    resamples: Floats  # over sets, divisions and rows, as fractions

    @classmethod
    def over_best(cls, cells: Cells, n_labels: int, keys: Sequence[tuple[str, int]]) -> Lead:
        """Compute the lead over the baseline with the highest mean AUROC."""
        gains_over = {}
        for method in BASELINES:
            column = Column(method, n_labels)
            gains_over[method] = Gains.over(cells, column, keys)
        best = min(gains_over, key=lambda method: gains_over[method].mean)
        gains = gains_over[best]
        return cls(best, gains.mean, gains.over_sets())

    @property
    def is_beyond_chance(self) -> bool:
        """Whether zero is outside the 95 % interval."""
        low, high = np.nanpercentile(self.resamples, [2.5, 97.5])
        return bool(low > 0 or high < 0)

    def text(self) -> str:
        """Format the lead, the interval and the baseline."""
        return f"{self.mean:+.1f} <sub>{interval_text(self.resamples)}</sub> ({self.best})"


def heading_text(n_labels: int) -> str:
    """Return the text for a label count."""
    return {WITHOUT_LABELS: "no label", 0: "all labels"}.get(n_labels, f"{n_labels} a class")


def groups_of(names: Sequence[str]) -> dict[str, list[str]]:
    """Return the groups of sets in the third table, by title."""
    groups = {f"all {len(names)} sets": list(names)}
    for n_left_out in range(1, len(LEFT_OUT_IN_TURN) + 1):
        left_out = LEFT_OUT_IN_TURN[:n_left_out]
        rest = [name for name in names if name not in left_out]
        without = f"without {' and '.join(left_out)}"
        groups[f"{len(rest)} sets, {without}"] = rest
        not_in_view = [name for name in rest if name not in DEVELOPMENT_SETS]
        groups[f"{len(not_in_view)} not in view, {without}"] = not_in_view
        real_texts = [name for name in rest if name not in PROTOTYPES]
        groups[f"{len(real_texts)} with real texts, {without}"] = real_texts
    return groups


def print_tables(cells: Cells, names: Sequence[str]) -> None:
    """Print all tables for some sets."""
    complete = set(cells.columns(names))
    budgets = [
        n_labels for n_labels in LABELS if any(column.n_labels == n_labels for column in complete)
    ]
    keys = cells.common(names)
    n_divisions = len(keys) / len(names)
    read = sum(cells.lines[next(iter(complete))][key]["n_wrong"] for key in keys)
    print(f"\n{len(names)} sets, {n_divisions:g} divisions, {read:,} wrong answers read\n")
    header = " | ".join(heading_text(n_labels) for n_labels in budgets)
    rule = "|---" * (len(budgets) + 1) + "|"
    print(f"| AUROC / FPR95 | {header} |\n{rule}")
    for method in [*FREE, *LABELLED]:
        entries = []
        for n_labels in budgets:
            column = Column(method, n_labels)
            entries.append(entry_text(cells, column, keys) if column in complete else "")
        if any(entries):
            print(f"| {TITLES_OF_SEEING.get(method, method)} | {' | '.join(entries)} |")
    labelled = [n for n in budgets if Column(OURS, n) in complete]
    if not labelled:
        return
    header = " | ".join(heading_text(n_labels) for n_labels in labelled)
    print(f"\n| {OURS} above | {header} |\n{'|---' * (len(labelled) + 1)}|")
    for method in LABELLED:
        entries = []
        for n_labels in labelled:
            column = Column(method, n_labels)
            entries.append(gain_text(cells, column, keys) if column in complete else "")
        if method != OURS and any(entries):
            print(f"| {method} | {' | '.join(entries)} |")
    print(f"\n| above the best baseline | {header} |\n{'|---' * (len(labelled) + 1)}|")
    for title, group in groups_of(names).items():
        of_group = [key for key in keys if key[0] in group]
        entries = [Lead.over_best(cells, n_labels, of_group).text() for n_labels in labelled]
        print(f"| {title} | {' | '.join(entries)} |")


def main() -> None:
    """Print the tables for the sets in the file."""
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("cells", type=Path)
    options = parser.parse_args()
    cells = Cells.read(options.cells)
    print_tables(cells, cells.names())


if __name__ == "__main__":
    main()

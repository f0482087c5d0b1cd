"""Tables that compare a method's own answers with zero-shot answers and with plain baselines.

    python -m benchmarks.answer_tables SUMMARY.json.xz

``benchmarks.answer_summary`` writes SUMMARY.json.xz. Values are means over divisions, then over
sets. Intervals are 95 % percentile intervals from the summary's resamples.

The *best baseline* for a set and a label count is the one in ``BASELINES`` with the most coverage
at a 5 % risk on the test rows. So hindsight favours the baselines. Every resample has a best
baseline of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.answer_summary import CHOICES, MEASURES, Notes, Reading, Summary, load
from benchmarks.answers import ANSWERS, BENCH_PREDICTORS, LABELS, RISKS
from vilu.metrics.bootstrap import Quantity

TITLES = {
    "imagenet1k": "ImageNet ‡ (training images)",
    "pets_in123": "pets among 123 †",
    "caltech66": "Caltech, 66 †",
    "food9": "Food, 9 †",
    "cifar10": "CIFAR-10",
    "cars_text": "cars ‡",
    "proto_ucf101": "UCF-101 (prototypes)",
    "proto_dtd": "DTD (prototypes) †",
    "proto_oxfordpets": "Oxford pets (prototypes)",
}
"""Titles of the sets.

† marks sets used while the predictors were developed. ‡ marks sets used only in the end, with one
choice afterwards (docs/readings.md).
"""

MARK = "†"

APART = "imagenet1k"
"""A set with training images. The tables have means with and without this set."""

CARS = "cars_text"
"""The set where adapted answers gain most over baselines."""

PROTOTYPES = ("proto_ucf101", "proto_dtd", "proto_oxfordpets")
"""Sets whose texts are mean images."""

COVERAGE = str(RISKS[0])  # the coverage at the smallest risk

BASELINES = ("probe", *BENCH_PREDICTORS, "mix", "pool")
"""Methods with which the adapted answers are compared."""

BEST_BASELINE = "best_baseline"
PAIRS = (("adapted", "zero_shot"), ("adapted", BEST_BASELINE), ("chosen", "zero_shot"))
"""The tables of differences: a method, and the method that is subtracted."""

Readings = dict[tuple[str, int, str], Reading]
"""Maps a set, a label count and a method to the results."""


def coverage_of(readings: Readings, name: str, n_labels: int, method: str) -> Quantity:
    """Return the coverage at 5 % of a method, or of the best baseline."""
    if method != BEST_BASELINE:
        return readings[name, n_labels, method].values[COVERAGE]
    of_baselines = [coverage_of(readings, name, n_labels, baseline) for baseline in BASELINES]
    value = max(coverage.value for coverage in of_baselines)
    draws = np.max([coverage.draws for coverage in of_baselines], axis=0)
    return Quantity(value, draws)


def difference(
    readings: Readings, names: Sequence[str], n_labels: int, pair: tuple[str, str]
) -> Quantity:
    """Average over sets how far the first method's coverage at 5 % exceeds the second's."""
    differences = []
    for name in names:
        first, second = (coverage_of(readings, name, n_labels, method) for method in pair)
        differences.append(first - second)
    return Quantity.mean(differences)


def in_points(quantity: Quantity, sign: str = "") -> str:
    """Format a quantity and the interval, in percent."""
    ends = quantity.interval(0.95)
    shown = [format(100 * number, f"{sign}.1f") for number in ends]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]"


def means_table(readings: Readings, names: Sequence[str]) -> list[str]:
    """Return table lines with every method's means over sets, by label count."""
    lines = [
        "| labels a class | answers | accuracy | coverage at 5 % | at 10 % | at 20 % "
        "| certified at 5 % | at 10 % | at 20 % | seen above | fit, s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for n_labels in LABELS:
        for method, title in ANSWERS.items():
            of_sets = [readings[name, n_labels, method] for name in names]
            row = [str(n_labels or "all"), title]
            for measure in MEASURES:
                mean = Quantity.mean([of_set.values[measure] for of_set in of_sets])
                text = in_points(mean)
                row.append(text)
            above = []
            for index in range(len(RISKS)):
                rules = [of_set.certified[index] for of_set in of_sets]
                coverages = [np.mean(rule.coverage) for rule in rules]
                coverage = np.mean(coverages)
                row.append(f"{100 * coverage:.1f}")
                n_above = sum(sum(rule.above) for rule in rules)
                above.append(str(n_above))
            n_rules = sum(len(of_set.certified[0].above) for of_set in of_sets)
            above_in_words = ", ".join(above)
            row.append(f"{above_in_words} of {n_rules}")
            seconds = np.mean([of_set.seconds for of_set in of_sets])
            row.append(f"{seconds:.1f}")
            lines.append(f"| {' | '.join(row)} |")
    return lines


def short_table(readings: Readings, names: Sequence[str]) -> list[str]:
    """Return table lines with every method's accuracy and coverage at 5 %, by label count."""
    columns = []
    for n_labels in LABELS:
        label = title_of(n_labels)
        columns.append(f"{label}<br>accuracy | {label}<br>coverage")
    lines = [f"| answers | {' | '.join(columns)} |", f"|---|{'---|' * 2 * len(LABELS)}"]
    for method, title in ANSWERS.items():
        row = [title]
        for n_labels in LABELS:
            of_sets = [readings[name, n_labels, method].values for name in names]
            accuracy = Quantity.mean([values["accuracy"] for values in of_sets])
            coverage = Quantity.mean([values[COVERAGE] for values in of_sets])
            ends = coverage.interval(0.95)
            interval = f"<sub>[{100 * ends.ci_low:.1f}, {100 * ends.ci_high:.1f}]</sub>"
            row.append(f"{100 * accuracy.value:.1f}")
            row.append(f"{100 * coverage.value:.1f} {interval}")
        cells = " | ".join(row)
        lines.append(f"| {cells} |")
    return lines


def differences_table(readings: Readings, names: Sequence[str], pair: tuple[str, str]) -> list[str]:
    """Return table lines with coverage differences at 5 %: every set, then means."""
    without = [name for name in names if name != APART]
    not_in_view = [name for name in names if MARK not in TITLES[name]]
    real_texts = [name for name in without if name not in PROTOTYPES]
    real_texts_without_cars = [name for name in real_texts if name != CARS]
    groups = [([name], TITLES[name]) for name in names]
    groups += [
        (list(names), "**mean**"),
        (without, "**mean without ImageNet**"),
        (not_in_view, f"**mean without sets with {MARK}**"),
        (real_texts, "**mean with real texts, without ImageNet**"),
        (real_texts_without_cars, "**the same without cars**"),
    ]
    titles = [title_of(n_labels) for n_labels in LABELS]
    heads = " | ".join(titles)
    lines = [f"| set | {heads} |", f"|---|{'---|' * len(LABELS)}"]
    for members, title in groups:
        row = [title]
        for n_labels in LABELS:
            mean = difference(readings, members, n_labels, pair)
            text = in_points(mean, "+")
            row.append(text)
        cells = " | ".join(row)
        lines.append(f"| {cells} |")
    return lines


def title_of(n_labels: int) -> str:
    """Return the column heading for a label count."""
    if n_labels == 0:
        return "all labels"
    return f"{n_labels} a class"


def notes_table(summary: Summary, names: Sequence[str]) -> list[str]:
    """Return table lines that count cells: compared, zero-shot chosen, and mixes cross-fitted."""
    lines = [
        "| labels | cells | compared | zero-shot chosen | with images | mixes cross-fitted |",
        "|---|---|---|---|---|---|",
    ]
    for n_labels in LABELS:
        of_sets: list[Notes] = [summary.notes[name, n_labels] for name in names]
        row = [str(n_labels or "all")]
        row.append(str(sum(notes.n_cells for notes in of_sets)))
        row.append(str(sum(notes.n_compared for notes in of_sets)))
        for number in range(len(CHOICES)):
            row.append(str(sum(notes.n_zero_shot[number] for notes in of_sets)))
        row.append(str(sum(notes.n_cross_fitted for notes in of_sets)))
        cells_of_row = " | ".join(row)
        lines.append(f"| {cells_of_row} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Print all tables as Markdown."""
    parser = argparse.ArgumentParser(description="What adapted answers gain: tables.")
    parser.add_argument("file", type=Path, help="file that benchmarks.answer_summary wrote")
    options = parser.parse_args(arguments)
    summary = load(options.file)
    unknown_names = set(summary.names) - set(TITLES)
    if unknown_names:
        parser.error(f"these sets have no title in TITLES: {', '.join(sorted(unknown_names))}")
    names = [name for name in TITLES if name in summary.names]
    without = [name for name in names if name != APART]
    print(f"Divisions: {summary.divisions}; sets: {len(names)}.\n")
    readings = summary.readings
    sections = {
        "Short, all sets": short_table(readings, names),
        "Short, without ImageNet": short_table(readings, without),
        "Means over all sets": means_table(readings, names),
    }
    for pair in PAIRS:
        sections[f"{pair[0]} − {pair[1]}"] = differences_table(readings, names, pair)
    sections["Cells"] = notes_table(summary, names)
    for title, lines in sections.items():
        print(f"## {title}\n")
        print("\n".join(lines), end="\n\n")


if __name__ == "__main__":
    main()

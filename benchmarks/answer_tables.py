"""Tables that compare a method's own answers with zero-shot answers and with simple mixes.

    python -m benchmarks.answer_tables CELLS.jsonl [--resamples 1000]

``benchmarks.answers`` writes CELLS.jsonl. Divisions with a missing cell are left out. Values are
means over divisions, then over sets. Intervals are 95 % percentile intervals from 1,000 resamples.
A resample draws from all rows of a set. The set's divisions, methods and label counts share the
resample, so differences are paired. Methods are not fitted again.

The *best mix* for a set and a label count is ``mix`` or ``pool``: the mix with more coverage at a
5 % risk on the test rows. So hindsight favours the mixes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.answers import LABELS, RISKS
from vilu.metrics.bootstrap import Quantity
from vilu.metrics.counts import Floats, Ints, TieCounts
from vilu.metrics.selective import coverage_at_risk_kernel

ANSWERS = {
    "mcm": "zero-shot, MCM",
    "zero_shot": "zero-shot, ViLU+",
    "adapted": "adapted, ViLU+",
    "chosen": "chosen, ViLU+",
    "zero_shot_images": "zero-shot, ViLU+ with images",
    "adapted_images": "adapted, ViLU+ with images",
    "chosen_images": "chosen, ViLU+ with images",
    "probe": "linear probe's own",
    "mix": "mix of probabilities",
    "pool": "pool of log probabilities",
}
"""Maps a method to the name in the tables."""

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
MODEL = "_b32"  # suffix in the file names
NOT_COMPARED = "nothing was compared"  # text in a choice's reason

APART = "imagenet1k"
"""A set with training images. The tables have means with and without this set."""

Measure = float | str
"""A risk, for the coverage at this risk, or "accuracy"."""

MEASURES: tuple[Measure, ...] = ("accuracy", *RISKS)
PAIRS = (("adapted", "zero_shot"), ("adapted", "best_mix"), ("chosen", "zero_shot"))


class Certified(NamedTuple):
    """Rules at a given risk: coverages, and whether the risks on test rows are larger."""

    coverage: Floats
    above: Ints


class Reading(NamedTuple):
    """A method's results on a set with a label count, over the divisions."""

    values: dict[Measure, Quantity]
    certified: tuple[Certified, ...]  # an entry for each risk
    seconds: float  # median time for a fit


def measured(cell: dict[str, Any], method: str, weights: Ints) -> dict[Measure, Quantity]:
    """Return a method's accuracy and coverages in a cell, resampled by row ``weights`` (R, N)."""
    rank = np.array(cell["methods"][method]["rank"])
    failure = np.array(list(cell["methods"][method]["failure"]), dtype=np.int64)
    order = rank.argsort(kind="stable")
    steps = np.diff(rank[order], prepend=-1)
    starts = np.flatnonzero(steps)
    own = np.ones((1, len(rank)), dtype=np.int64)  # the original sample is the first resample
    weights = np.concatenate([own, weights[:, cell["rows"]]])[:, order]
    wrong = np.add.reduceat(weights * failure[order], starts, axis=1)
    size = np.add.reduceat(weights, starts, axis=1)
    positions = np.arange(len(starts), dtype=np.float64)
    counts = TieCounts(positions, size - wrong, wrong)
    values: dict[Measure, Floats] = {"accuracy": counts.n_correct / counts.n}
    for risk in RISKS:
        values[risk] = coverage_at_risk_kernel(counts, risk)
    return {name: Quantity(float(drawn[0]), drawn[1:]) for name, drawn in values.items()}


def reading(cells: Sequence[dict[str, Any]], method: str, weights: Ints) -> Reading:
    """Return a method's results, as means over the divisions of a set."""
    of_division = [measured(cell, method, weights) for cell in cells]
    values = {}
    for measure in MEASURES:
        values[measure] = Quantity.mean([quantities[measure] for quantities in of_division])
    certified = []
    for index, risk in enumerate(RISKS):
        rules = [cell["methods"][method]["certified"][index] for cell in cells]
        coverage = np.array([rule["coverage"] for rule in rules])
        above = np.array([(rule["risk"] or 0.0) > risk for rule in rules], dtype=np.int64)
        certified_at_risk = Certified(coverage, above)
        certified.append(certified_at_risk)
    seconds = float(np.median([cell["methods"][method]["seconds"] for cell in cells]))
    return Reading(values, tuple(certified), seconds)


Readings = dict[tuple[str, int, str], Reading]
"""Maps a set, a label count and a method to the results."""


class Cells(NamedTuple):
    """The cells of a file."""

    by_key: dict[tuple[str, int, int], dict[str, Any]]  # set, label count, division
    names: list[str]  # set names
    divisions: list[int]  # the divisions without a missing cell

    @classmethod
    def load(cls, path: Path) -> Cells:
        """Read a file written by ``benchmarks.answers``."""
        by_key = {}
        text = path.read_text()
        for line in text.splitlines():
            cell = json.loads(line)
            name = cell["name"].removesuffix(MODEL)
            by_key[name, cell["n_labels"], cell["division"]] = cell
        present = {key[0] for key in by_key}
        names = [name for name in TITLES if name in present]
        divisions = []
        for division in sorted({key[2] for key in by_key}):
            if all((name, n, division) in by_key for name in names for n in LABELS):
                divisions.append(division)
        return cls(by_key, names, divisions)

    def of(self, name: str, n_labels: int) -> list[dict[str, Any]]:
        """Return the cells for a set and a label count."""
        return [self.by_key[name, n_labels, division] for division in self.divisions]


def read(cells: Cells, resamples: int) -> Readings:
    """Compute the results for all methods on all sets."""
    readings: Readings = {}
    for number, name in enumerate(cells.names):
        n = cells.of(name, LABELS[0])[0]["n"]
        rng = np.random.default_rng(number)
        equal_shares = np.full(n, 1 / n)
        weights = rng.multinomial(n, equal_shares, size=resamples)
        for n_labels in LABELS:
            of_set = cells.of(name, n_labels)
            for method in ANSWERS:
                readings[name, n_labels, method] = reading(of_set, method, weights)
            mixes = [readings[name, n_labels, method] for method in ("mix", "pool")]
            best = max(mixes, key=lambda mix: mix.values[RISKS[0]].value)
            readings[name, n_labels, "best_mix"] = best
    return readings


def difference(
    readings: Readings, names: Sequence[str], n_labels: int, pair: tuple[str, str]
) -> Quantity:
    """Average over sets how far the first method's coverage at 5 % exceeds the second's."""
    differences = []
    for name in names:
        first, second = (readings[name, n_labels, method].values[RISKS[0]] for method in pair)
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
                coverages = [rule.coverage.mean() for rule in rules]
                coverage = np.mean(coverages)
                row.append(f"{100 * coverage:.1f}")
                n_above = sum(int(rule.above.sum()) for rule in rules)
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
            coverage = Quantity.mean([values[RISKS[0]] for values in of_sets])
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
    groups = [([name], TITLES[name]) for name in names]
    groups += [
        (list(names), "**mean**"),
        (without, "**mean without ImageNet**"),
        (not_in_view, f"**mean without sets with {MARK}**"),
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


def kept_table(readings: Readings, names: Sequence[str]) -> list[str]:
    """Return table lines with the share of the mean adapted gain that chosen answers keep."""
    lines = ["| labels a class | chosen keeps of the gain | with images |", "|---|---|---|"]
    for n_labels in LABELS:
        row = [str(n_labels or "all")]
        for suffix in ("", "_images"):
            zero_shot = f"zero_shot{suffix}"
            gains = []
            for kind in ("chosen", "adapted"):
                pair = (f"{kind}{suffix}", zero_shot)
                gain = difference(readings, names, n_labels, pair)
                gains.append(gain.value)
            if gains[1] > 0:
                row.append(f"{100 * gains[0] / gains[1]:.0f} %")
            else:
                row.append("no gain")
        cells = " | ".join(row)
        lines.append(f"| {cells} |")
    return lines


def notes_table(cells: Cells) -> list[str]:
    """Return table lines that count cells: compared, zero-shot chosen, and mixes cross-fitted."""
    lines = [
        "| labels | cells | compared | zero-shot chosen | with images | mixes cross-fitted |",
        "|---|---|---|---|---|---|",
    ]
    for n_labels in LABELS:
        notes = []
        for name in cells.names:
            notes += [cell["notes"] for cell in cells.of(name, n_labels)]
        compared = [note for note in notes if NOT_COMPARED not in note["choice"][1]]
        row = [str(n_labels or "all"), str(len(notes)), str(len(compared))]
        for key in ("choice", "choice_images"):
            row.append(str(sum(note[key][0] == "zero_shot" for note in notes)))
        row.append(str(sum(note["cross_fitted"] for note in notes)))
        cells_of_row = " | ".join(row)
        lines.append(f"| {cells_of_row} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Print all tables as Markdown."""
    parser = argparse.ArgumentParser(description="What adapted answers gain: tables.")
    parser.add_argument("cells", type=Path, help="file that benchmarks.answers wrote")
    parser.add_argument("--resamples", type=int, default=1_000)
    options = parser.parse_args(arguments)
    cells = Cells.load(options.cells)
    names = cells.names
    without = [name for name in names if name != APART]
    print(f"Divisions: {cells.divisions}; sets: {len(names)}.\n")
    readings = read(cells, options.resamples)
    sections = {
        "Short, all sets": short_table(readings, names),
        "Short, without ImageNet": short_table(readings, without),
        "Means over all sets": means_table(readings, names),
        "Means without ImageNet": means_table(readings, without),
    }
    for pair in PAIRS:
        sections[f"{pair[0]} − {pair[1]}"] = differences_table(readings, names, pair)
    sections["What chosen answers keep"] = kept_table(readings, names)
    sections["Cells"] = notes_table(cells)
    for title, lines in sections.items():
        print(f"## {title}\n")
        print("\n".join(lines), end="\n\n")


if __name__ == "__main__":
    main()

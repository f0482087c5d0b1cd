"""The tables of ``benchmarks.never_below``, as Markdown.

    python -m benchmarks.never_below_tables CELLS.jsonl [--before OLD.jsonl]

Numbers are means over divisions, in percent. Brackets are 95 % bootstrap intervals for a paired
difference over the test rows: resample number i of a mean is the mean of resample number i over all
divisions. OLD.jsonl has cells of ViLU-zero from an earlier version on the same rows. Both files may
be compressed (CELLS.jsonl.xz).
"""

from __future__ import annotations

import argparse
import json
import lzma
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.never_below import LABELS, SETS, SIZES, WITHOUT_LABELS
from vilu.metrics.counts import Floats

Line = dict[str, Any]


class Group(NamedTuple):
    """Cells that only differ in the division: a set, images per class and labels per class."""

    name: str
    size: int
    n_labels: int


def read_groups(file: Path) -> dict[Group, list[Line]]:
    """Read a file's cells by group, in the order of the sets."""
    groups: dict[Group, list[Line]] = {}
    for text in read_lines(file):
        line = json.loads(text)
        group = Group(*line["cell"][:3])
        groups.setdefault(group, []).append(line)
    return {group: groups[group] for group in sorted(groups, key=sort_key)}


def read_lines(file: Path) -> list[str]:
    """Read a text file's lines. A file whose name ends in ``.xz`` is decompressed."""
    opener = lzma.open if file.suffix == ".xz" else open
    with opener(file, "rt", encoding="utf-8") as handle:
        return handle.read().splitlines()


def sort_key(group: Group) -> tuple[int, int, int]:
    """Return a group's sort key: set, then images, then labels, where "all" comes last."""
    set_order = list(SETS)
    label_order = [WITHOUT_LABELS, *LABELS]
    return (
        set_order.index(group.name),
        SIZES.index(group.size),
        label_order.index(group.n_labels),
    )


def mean(lines: Sequence[Line], metric: str, method: str) -> float:
    """Average a metric over divisions, in percent."""
    return 100 * float(np.mean([line[metric][method] for line in lines]))


def interval(lines: Sequence[Line], method: str, baseline: str) -> str:
    """Format the 95 % interval for the difference between two methods' AUROC, in points."""
    differences: list[Floats] = []
    for line in lines:
        resampled = line["resampled"]
        areas = np.asarray(resampled[method])
        baseline_areas = np.asarray(resampled[baseline])
        differences.append(areas - baseline_areas)
    mean_difference = np.mean(differences, axis=0)
    low, high = np.nanpercentile(mean_difference, [2.5, 97.5]) * 100
    return f"[{low:+.1f}, {high:+.1f}]"


def count_text(size: int) -> str:
    """Return the text for a count per class."""
    return str(size) if size else "all"


def labels_text(n_labels: int) -> str:
    """Return the text for a label count per class."""
    return "1 label" if n_labels == 1 else f"{count_text(n_labels)} labels"


def fitted_text(lines: Sequence[Line]) -> str:
    """Format the counts of images to fit on, and of candidates."""
    first = lines[0]
    return f"{first['n_fitted']:,} / {first['n_candidates']}"


def read_text(lines: Sequence[Line]) -> str:
    """Format the counts of test rows, and of wrong answers."""
    n_wrong = np.mean([line["n_wrong"] for line in lines])
    return f"{lines[0]['n_read']:,} / {n_wrong:.0f}"


def table_without_labels(cells: dict[Group, list[Line]], before: dict[Group, list[Line]]) -> None:
    """Print MCM, ViLU-zero, and the earlier version of ViLU-zero, for cells without labels."""
    print(
        "| set | images a class | fitted / classes | read / wrong | MCM | before | ViLU-zero "
        "| gain [95 %] | FPR95 MCM | before | ViLU-zero | accuracy zero-shot | own |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for group, lines in cells.items():
        if group.n_labels != WITHOUT_LABELS:
            continue
        mcm = mean(lines, "auroc", "mcm")
        zero = mean(lines, "auroc", "vilu_zero")
        old_auroc = "–"
        old_fpr = "–"
        if group in before:
            old_auroc = f"{mean(before[group], 'auroc', 'vilu_zero'):.1f}"
            old_fpr = f"{mean(before[group], 'fpr95', 'vilu_zero'):.0f}"
        print(
            f"| {group.name} | {count_text(group.size)} | {fitted_text(lines)} "
            f"| {read_text(lines)} | {mcm:.1f} | {old_auroc} "
            f"| {zero:.1f} | {zero - mcm:+.1f} {interval(lines, 'vilu_zero', 'mcm')} "
            f"| {mean(lines, 'fpr95', 'mcm'):.0f} | {old_fpr} "
            f"| {mean(lines, 'fpr95', 'vilu_zero'):.0f} "
            f"| {mean(lines, 'accuracy', 'mcm'):.1f} | {mean(lines, 'accuracy', 'vilu_zero'):.1f} |"
        )


def gain_text(lines: Sequence[Line], baseline: str) -> str:
    """Format how far ViLU+ with images is above a method in AUROC, in points."""
    gain = mean(lines, "auroc", "vilu_plus_images") - mean(lines, "auroc", baseline)
    return f"{gain:+.1f} {interval(lines, 'vilu_plus_images', baseline)}"


def table_of_gains(cells: dict[Group, list[Line]]) -> None:
    """Print how far images lift ViLU+, for every image count and label count."""
    columns = []
    for size in SIZES:
        for n_labels in LABELS:
            if any((group.size, group.n_labels) == (size, n_labels) for group in cells):
                columns.append((size, n_labels))
    titles = [f"{count_text(size)} images,<br>{labels_text(n)}" for size, n in columns]
    print(f"| set | {' | '.join(titles)} |")
    print("|---" * (len(titles) + 1) + "|")
    for name in SETS:
        entries = []
        for column in columns:
            lines = cells.get(Group(name, *column))
            entries.append(gain_text(lines, "vilu_plus") if lines else "")
        if any(entries):
            print(f"| {name} | {' | '.join(entries)} |")


def table_of_one_label(cells: dict[Group, list[Line]]) -> None:
    """Print the methods' AUROC with all images, and one label per class."""
    print(
        "| set | read / wrong | MCM | ViLU-zero | ViLU+ alone | with images "
        "| over alone [95 %] | over ViLU-zero [95 %] |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for group, lines in cells.items():
        if (group.size, group.n_labels) != (0, 1):
            continue
        print(
            f"| {group.name} | {read_text(lines)} "
            f"| {mean(lines, 'auroc', 'mcm'):.1f} | {mean(lines, 'auroc', 'vilu_zero'):.1f} "
            f"| {mean(lines, 'auroc', 'vilu_plus'):.1f} "
            f"| {mean(lines, 'auroc', 'vilu_plus_images'):.1f} "
            f"| {gain_text(lines, 'vilu_plus')} | {gain_text(lines, 'vilu_zero')} |"
        )


def main() -> None:
    """Print the tables that have cells, and how many divisions there are."""
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("cells", type=Path)
    parser.add_argument("--before", type=Path, help="cells of an earlier version")
    options = parser.parse_args()
    cells = read_groups(options.cells)
    before: dict[Group, list[Line]] = {}
    if options.before:
        before = read_groups(options.before)
    divisions = sorted({len(lines) for lines in cells.values()})
    print(f"divisions: {', '.join(map(str, divisions))}\n")
    labelled = {group.n_labels != WITHOUT_LABELS for group in cells}
    if False in labelled:
        table_without_labels(cells, before)
    if True in labelled:
        table_of_gains(cells)
        print()
        table_of_one_label(cells)


if __name__ == "__main__":
    main()

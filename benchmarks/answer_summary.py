"""Summarises the cells of ``benchmarks.answers`` in a small file, which can be kept.

    python -m benchmarks.answer_summary CELLS.jsonl SUMMARY.json.xz [--resamples 200]
    python -m benchmarks.answer_tables SUMMARY.json.xz

A cell has the rank of every row by every method, so a file of cells has millions of numbers. The
summary has a *reading* for each set, label count and method: accuracy and coverages, as means over
the divisions, with the values on bootstrap resamples. Divisions with a missing cell are left out.

A resample draws from all rows of a set. The set's divisions, methods and label counts share the
resample, so differences are paired. Methods are not fitted again. Values on resamples are rounded
to a hundredth of a percentage point.
"""

from __future__ import annotations

import argparse
import json
import lzma
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.answers import ANSWERS, LABELS, RISKS
from vilu.metrics.bootstrap import Quantity
from vilu.metrics.counts import Floats, Ints, TieCounts
from vilu.metrics.selective import coverage_at_risk_kernel

MODEL = "_b32"  # suffix in the file names
NOT_COMPARED = "nothing was compared"  # text in a choice's reason
ROUNDING_STEP = 1e-4
"""Values on resamples are stored as multiples of this step."""

MEASURES = ("accuracy", *map(str, RISKS))
"""The accuracy, and for every risk the coverage at this risk."""

CHOICES = ("choice", "choice_images")
"""The notes with a chosen kind of answers, and the reason."""

Cell = dict[str, Any]


class Certified(NamedTuple):
    """A method's rules at a given risk, in every division."""

    coverage: list[float]
    above: list[bool]  # whether the risk on test rows is above the given risk


class Reading(NamedTuple):
    """A method's results on a set with a label count, over the divisions."""

    values: dict[str, Quantity]  # for each of ``MEASURES``
    certified: list[Certified]  # an entry for each risk
    seconds: float  # median time for a fit


class Notes(NamedTuple):
    """Counts of the cells of a set with a label count."""

    n_cells: int
    n_compared: int  # both kinds of answers were compared before one was chosen
    n_zero_shot: list[int]  # zero-shot answers were chosen, for each of ``CHOICES``
    n_cross_fitted: int  # the mixes' weights were fitted on held-out rows


class Summary(NamedTuple):
    """All results of a study of answers."""

    names: list[str]  # sets
    divisions: list[int]  # the divisions without a missing cell
    readings: dict[tuple[str, int, str], Reading]  # by set, label count and method
    notes: dict[tuple[str, int], Notes]  # by set and label count


def quantities_of(cell: Cell, method: str, weights: Ints) -> dict[str, Quantity]:
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
    values: dict[str, Floats] = {"accuracy": counts.n_correct / counts.n}
    for risk in RISKS:
        values[str(risk)] = coverage_at_risk_kernel(counts, risk)
    return {name: Quantity(float(drawn[0]), drawn[1:]) for name, drawn in values.items()}


def reading_of(cells: Sequence[Cell], method: str, weights: Ints) -> Reading:
    """Return a method's results, as means over the divisions of a set."""
    of_division = [quantities_of(cell, method, weights) for cell in cells]
    values = {}
    for measure in MEASURES:
        values[measure] = Quantity.mean([quantities[measure] for quantities in of_division])
    certified = []
    for index, risk in enumerate(RISKS):
        rules = [cell["methods"][method]["certified"][index] for cell in cells]
        coverage = [rule["coverage"] for rule in rules]
        above = [(rule["risk"] or 0.0) > risk for rule in rules]
        certified.append(Certified(coverage, above))
    seconds = float(np.median([cell["methods"][method]["seconds"] for cell in cells]))
    return Reading(values, certified, seconds)


def notes_of(cells: Sequence[Cell]) -> Notes:
    """Count what was compared, chosen and cross-fitted in the cells."""
    notes = [cell["notes"] for cell in cells]
    n_zero_shot = [sum(note[key][0] == "zero_shot" for note in notes) for key in CHOICES]
    n_compared = sum(NOT_COMPARED not in note["choice"][1] for note in notes)
    n_cross_fitted = sum(note["cross_fitted"] for note in notes)
    return Notes(len(notes), n_compared, n_zero_shot, n_cross_fitted)


def cells_by_key(lines: Sequence[str]) -> dict[tuple[str, int, int], Cell]:
    """Read the lines of a file by ``benchmarks.answers``: by set, label count and division."""
    by_key = {}
    for line in lines:
        cell = json.loads(line)
        if set(cell["methods"]) != set(ANSWERS):
            raise ValueError(
                f"the cell {cell['name']}, {cell['n_labels']}, {cell['division']} has other "
                "methods: measure into a new file"
            )
        name = cell["name"].removesuffix(MODEL)
        by_key[name, cell["n_labels"], cell["division"]] = cell
    return by_key


def summarise(lines: Sequence[str], resamples: int) -> Summary:
    """Compute all results from the lines of a file by ``benchmarks.answers``."""
    by_key = cells_by_key(lines)
    names = sorted({key[0] for key in by_key})
    divisions = []
    for division in sorted({key[2] for key in by_key}):
        if all((name, n, division) in by_key for name in names for n in LABELS):
            divisions.append(division)
    if not divisions:
        raise ValueError("no division has a cell for every set and label count")
    summary = Summary(names, divisions, {}, {})
    for name in names:
        n_rows = by_key[name, LABELS[0], divisions[0]]["n"]
        # the seed depends on the set alone, so another set changes nothing
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        equal_shares = np.full(n_rows, 1 / n_rows)
        weights = rng.multinomial(n_rows, equal_shares, size=resamples)
        for n_labels in LABELS:
            cells = [by_key[name, n_labels, division] for division in divisions]
            summary.notes[name, n_labels] = notes_of(cells)
            for method in ANSWERS:
                summary.readings[name, n_labels, method] = reading_of(cells, method, weights)
    return summary


def save(summary: Summary, file: Path) -> None:
    """Write a summary as compressed JSON."""
    readings = []
    for key, reading in summary.readings.items():
        values = {}
        for measure, quantity in reading.values.items():
            multiples = np.rint(quantity.draws / ROUNDING_STEP).astype(int)
            values[measure] = [quantity.value, multiples.tolist()]
        readings.append([*key, values, reading.certified, reading.seconds])
    notes = [[*key, *notes] for key, notes in summary.notes.items()]
    document = {
        "names": summary.names,
        "divisions": summary.divisions,
        "readings": readings,
        "notes": notes,
    }
    text = json.dumps(document, separators=(",", ":"))
    file.write_bytes(lzma.compress(text.encode(), preset=9))


def load(file: Path) -> Summary:
    """Read a summary that ``save`` wrote."""
    document = json.loads(lzma.decompress(file.read_bytes()))
    summary = Summary(document["names"], document["divisions"], {}, {})
    for name, n_labels, method, stored_values, stored_rules, seconds in document["readings"]:
        values = {}
        for measure, (value, multiples) in stored_values.items():
            draws = np.array(multiples) * ROUNDING_STEP
            values[measure] = Quantity(value, draws)
        certified = [Certified(*rules) for rules in stored_rules]
        summary.readings[name, n_labels, method] = Reading(values, certified, seconds)
    for name, n_labels, *counts in document["notes"]:
        summary.notes[name, n_labels] = Notes(*counts)
    return summary


def main(arguments: Sequence[str] | None = None) -> None:
    """Summarise a file of cells."""
    first_line = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=first_line)
    parser.add_argument("cells", type=Path, help="file that benchmarks.answers wrote")
    parser.add_argument("file", type=Path, help="file to write, such as SUMMARY.json.xz")
    parser.add_argument("--resamples", type=int, default=200)
    options = parser.parse_args(arguments)
    lines = options.cells.read_text().splitlines()
    summary = summarise(lines, options.resamples)
    save(summary, options.file)
    print(f"{len(summary.names)} sets, divisions {summary.divisions}")


if __name__ == "__main__":
    main()

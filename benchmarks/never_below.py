"""Measures whether images without labels ever make a method worse.

    python -m benchmarks.never_below ARRAYS CELLS.jsonl [--sets cars "cars 25 %" ...] [--plus]
    python -m benchmarks.never_below_tables CELLS.jsonl [--before OLD.jsonl]

ARRAYS is a folder of ``.npz`` files with ``image``, ``text`` and ``target`` (CLIP's logit scale is
100). A seed divides each set into two parts. Methods are fitted on images from the first part,
without labels, and tested on the second part. A *cell* is a set, an image count to fit on, a label
count per class and a division. The images to fit on are drawn at random, as many for each occurring
class (0: all images of the part).

Without labels, a cell's methods are ``mcm`` and ``vilu_zero``. With ``--plus`` the methods are
``vilu_zero``, ``vilu_plus`` fitted on the labels (0 per class: all) alone, and ``vilu_plus`` fitted
on the labels and all images in the cell.

Every cell is a line of CELLS.jsonl. For each method, the line has AUROC and FPR95 for failures of
zero-shot answers, the accuracy of the method's own answers, and AUROCs on bootstrap resamples of
the test rows. All methods have the same resamples. Cells already in the file are left out. All sets
are measured for a division before the next division begins.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import vilu
from benchmarks.answers import Arrays, draw_per_class
from vilu.metrics import auroc, fpr_at_tpr
from vilu.metrics.counts import Floats, Ints
from vilu.predictors.contract.predictor import FailurePredictor

N_RESAMPLES = 200
SIZES = (3, 5, 8, 0)
"""Images to fit on for each occurring class (0: all images of the part)."""
LABELS = (1, 5, 16, 0)
WITHOUT_LABELS = -1
BATCH = 4_096


@dataclass(frozen=True)
class SetPart:
    """A set: some rows and candidates from a file."""

    file: str
    share_to_fit: float = 0.5  # share of rows for fits
    share_of_classes: float = 1.0  # share of classes with used rows, drawn by the division
    has_only_occurring_classes: bool = (
        False  # whether only the classes with rows in the file are candidates
    )


CHOOSING_SETS = {
    "cars": SetPart("cars_text"),
    "cars 80/20": SetPart("cars_text", share_to_fit=0.8),
    "cars 25 %": SetPart("cars_text", share_of_classes=0.25),
    "cars 50 %": SetPart("cars_text", share_of_classes=0.5),
    "cars 75 %": SetPart("cars_text", share_of_classes=0.75),
    "pets among 123": SetPart("pets_in123"),
    "pets among 24": SetPart("pets_in123", has_only_occurring_classes=True),
    "caltech66": SetPart("caltech66"),
    "food9": SetPart("food9"),
    "dtd": SetPart("proto_dtd"),
}
"""Sets used to choose the method's settings."""
CONFIRMING_SETS = {
    "ucf101": SetPart("proto_ucf101"),
    "oxford pets": SetPart("proto_oxfordpets"),
    "cifar10": SetPart("cifar10"),
    "imagenet": SetPart("imagenet1k"),
}
"""Sets tested once, after the choice."""
SETS = CHOOSING_SETS | CONFIRMING_SETS


class Cell(NamedTuple):
    """A set, images per class (0: all), labels per class (-1: none, 0: all), and a division."""

    name: str
    size: int
    n_labels: int
    division: int


class Rows(NamedTuple):
    """The rows of a cell."""

    arrays: Arrays
    fit_rows: Ints
    test_rows: Ints


def rows_of(folder: Path, cell: Cell) -> Rows | None:
    """Return a cell's rows, or None if the set has fewer images than the cell needs."""
    source = SETS[cell.name]
    arrays = Arrays.load(folder / f"{source.file}_b32.npz")
    occurring_classes = np.unique(arrays.target)
    if source.has_only_occurring_classes:
        target = np.searchsorted(occurring_classes, arrays.target)
        arrays = Arrays(arrays.image, arrays.text[occurring_classes], target)
        occurring_classes = np.arange(len(occurring_classes))
    rows = np.arange(len(arrays.target))
    if source.share_of_classes < 1:
        rng = np.random.default_rng([cell.division, 1])
        n_kept = round(source.share_of_classes * len(occurring_classes))
        occurring_classes = rng.permutation(occurring_classes)[:n_kept]
        is_kept = np.isin(arrays.target, occurring_classes)
        rows = np.flatnonzero(is_kept)
    rng_of_rows = np.random.default_rng(cell.division)
    shuffled = rng_of_rows.permutation(rows)
    n_part = round(source.share_to_fit * len(rows))
    n_fitted = n_part
    if cell.size:
        n_fitted = cell.size * len(occurring_classes)
    if n_fitted > n_part:
        return None
    return Rows(arrays, shuffled[:n_fitted], shuffled[n_part:])


def measure(rows: Rows, cell: Cell) -> dict[str, Any]:
    """Fit a cell's methods, and measure the methods on the test rows."""
    data = rows.arrays.labelled(rows.test_rows)
    mcm = vilu.MCM()
    failure = vilu.score(mcm, data).failure
    methods: dict[str, FailurePredictor] = {"mcm": mcm}
    images = rows.arrays.images(rows.fit_rows)
    zero = vilu.PREDICTORS["vilu_zero"]()
    zero.fit(images)
    methods["vilu_zero"] = zero
    if cell.n_labels != WITHOUT_LABELS:
        rng = np.random.default_rng([cell.division, cell.n_labels])
        labelled_rows = draw_per_class(rows.arrays.target, rows.fit_rows, cell.n_labels, rng)
        train = rows.arrays.labelled(labelled_rows)
        plus = vilu.ViLUPlus()
        plus.fit(train)
        methods["vilu_plus"] = plus
        plus_images = vilu.ViLUPlus()
        plus_images.fit(train, unlabelled=images)
        methods["vilu_plus_images"] = plus_images
    uncertainties = {name: method.predict_uncertainty(data) for name, method in methods.items()}
    target = rows.arrays.target[rows.test_rows]
    return {
        "n_fitted": len(rows.fit_rows),
        "n_read": len(rows.test_rows),
        "n_wrong": int(failure.sum()),
        "n_candidates": len(rows.arrays.text),
        "auroc": {name: auroc(u, failure) for name, u in uncertainties.items()},
        "fpr95": {name: fpr_at_tpr(u, failure) for name, u in uncertainties.items()},
        "accuracy": {name: accuracy(method, data, target) for name, method in methods.items()},
        "resampled": resampled_aurocs(uncertainties, failure, cell.division),
        "notes": methods["vilu_zero"].notes_,
    }


def accuracy(method: FailurePredictor, data: vilu.Embeddings, target: Ints) -> float:
    """Return the accuracy of the method's own answers, or for MCM, of the zero-shot answers."""
    n_right = 0
    for batch in data.batches(BATCH):
        log_scores = batch.logits
        if method.name != "mcm":
            log_scores = method.log_posterior(batch)
        answer = log_scores.argmax(dim=1)
        is_right = answer.numpy() == target[batch.index.numpy()]
        n_right += int(is_right.sum())
    return n_right / len(target)


def resampled_aurocs(
    uncertainties: dict[str, Floats], failure: Ints, division: int
) -> dict[str, list[float]]:
    """Compute AUROCs on bootstrap resamples, with the same rows for all methods."""
    rng = np.random.default_rng([division, 2])
    values: dict[str, list[float]] = {name: [] for name in uncertainties}
    for _ in range(N_RESAMPLES):
        drawn_rows = rng.integers(len(failure), size=len(failure))
        for name, uncertainty in uncertainties.items():
            area = float(auroc(uncertainty[drawn_rows], failure[drawn_rows]))
            values[name].append(round(area, 5))
    return values


def cells_in_order(names: Sequence[str], divisions: int, *, has_labels: bool) -> Iterator[Cell]:
    """Yield the cells in the order in which they are measured.

    With ``has_labels``, cells have every label count that is possible with their images.
    """
    for division in range(divisions):
        for name in names:
            for size in SIZES:
                if not has_labels:
                    yield Cell(name, size, WITHOUT_LABELS, division)
                    continue
                for n_labels in LABELS:
                    is_possible = size == 0 or n_labels < size
                    if is_possible:
                        yield Cell(name, size, n_labels, division)


def known_cells(file: Path) -> set[Cell]:
    """Read a file's cells. If the file does not exist, there are none."""
    if not file.is_file():
        return set()
    text = file.read_text()
    cells = [json.loads(line)["cell"] for line in text.splitlines()]
    return {Cell(*cell) for cell in cells}


def main() -> None:
    """Measure the cells missing in the file."""
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("arrays", type=Path)
    parser.add_argument("cells", type=Path)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--divisions", type=int, default=5)
    parser.add_argument("--plus", action="store_true", help="vilu_plus, alone and with images")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # fits to few rows warn, and few rows are intended here
    known = known_cells(options.cells)
    for cell in cells_in_order(options.sets, options.divisions, has_labels=options.plus):
        if cell in known:
            continue
        rows = rows_of(options.arrays, cell)
        if rows is None:
            continue
        begin = time.perf_counter()
        result = measure(rows, cell)
        seconds = time.perf_counter() - begin
        with options.cells.open("a") as file:
            line = json.dumps({"cell": cell, **result, "seconds": round(seconds, 2)})
            file.write(line + "\n")
        values = {name: round(100 * value, 2) for name, value in result["auroc"].items()}
        print(*cell, values, f"{seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()

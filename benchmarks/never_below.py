"""Measures whether images without labels ever make a method worse.

    python -m benchmarks.never_below ARRAYS CELLS.jsonl [--sets cars "cars 25 %" ...] [--plus]
    python -m benchmarks.never_below_tables CELLS.jsonl [--before OLD.jsonl]

ARRAYS is a folder of ``.npz`` files with ``image``, ``text`` and ``target`` (CLIP's logit scale of
100). A seed divides each set into two parts. Methods are fitted on images of the first part,
without labels, and tested on the second part. A *cell* is a set, a number of images to fit on, a
number of labels per class and a division. The images to fit on are drawn at random, the same number
for each occurring class (0: all images of the part).

Without labels, the methods of a cell are ``mcm`` and ``vilu_zero``. With ``--plus`` they are
``vilu_zero``, ``vilu_plus`` fitted on the labels (0 per class: all) alone, and ``vilu_plus`` fitted
on the labels and all images of the cell.

Every cell is a line of CELLS.jsonl. For each method, the line has the AUROC and FPR95 of failures
of zero-shot answers, the accuracy of the method's own answers, and AUROCs of bootstrap resamples of
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
from benchmarks.answers import Arrays, few_per_class
from vilu.metrics import auroc, fpr_at_tpr
from vilu.metrics.counts import Floats, Ints
from vilu.predictors.contract.predictor import FailurePredictor

N_RESAMPLES = 200
SIZES = (3, 5, 8, 0)
"""Numbers of images to fit on for each occurring class; 0: all images of the part."""
LABELS = (1, 5, 16, 0)
WITHOUT_LABELS = -1
BATCH = 4_096


@dataclass(frozen=True)
class Source:
    """A set: some rows and candidates of a file."""

    file: str
    fitted: float = 0.5  # share of the rows for fits
    occurring: float = 1.0  # share of the classes with used rows, drawn by the division
    only_occurring: bool = False  # whether only the classes with rows in the file are candidates


CHOOSING = {
    "cars": Source("cars_text"),
    "cars 80/20": Source("cars_text", fitted=0.8),
    "cars 25 %": Source("cars_text", occurring=0.25),
    "cars 50 %": Source("cars_text", occurring=0.5),
    "cars 75 %": Source("cars_text", occurring=0.75),
    "pets among 123": Source("pets_in123"),
    "pets among 24": Source("pets_in123", only_occurring=True),
    "caltech66": Source("caltech66"),
    "food9": Source("food9"),
    "dtd": Source("proto_dtd"),
}
"""Sets used to choose settings of the method."""
CONFIRMING = {
    "ucf101": Source("proto_ucf101"),
    "oxford pets": Source("proto_oxfordpets"),
    "cifar10": Source("cifar10"),
    "imagenet": Source("imagenet1k"),
}
"""Sets tested once, after the choice."""
SETS = CHOOSING | CONFIRMING


class Cell(NamedTuple):
    """A set, images per class (0: all), labels per class (-1: none, 0: all), and a division."""

    name: str
    size: int
    n_labels: int
    division: int


class Rows(NamedTuple):
    """The rows of a cell."""

    arrays: Arrays
    fitted_on: Ints
    read: Ints


def rows_of(folder: Path, cell: Cell) -> Rows | None:
    """The rows of a cell; None if the set has fewer images than the cell needs."""
    source = SETS[cell.name]
    arrays = Arrays.load(folder / f"{source.file}_b32.npz")
    occurring = np.unique(arrays.target)
    if source.only_occurring:
        target = np.searchsorted(occurring, arrays.target)
        arrays = Arrays(arrays.image, arrays.text[occurring], target)
        occurring = np.arange(len(occurring))
    rows = np.arange(len(arrays.target))
    if source.occurring < 1:
        rng = np.random.default_rng([cell.division, 1])
        n_kept = round(source.occurring * len(occurring))
        occurring = rng.permutation(occurring)[:n_kept]
        rows = np.flatnonzero(np.isin(arrays.target, occurring))
    shuffled = np.random.default_rng(cell.division).permutation(rows)
    n_part = round(source.fitted * len(rows))
    n_fitted = n_part
    if cell.size:
        n_fitted = cell.size * len(occurring)
    if n_fitted > n_part:
        return None
    return Rows(arrays, shuffled[:n_fitted], shuffled[n_part:])


def measure(rows: Rows, cell: Cell) -> dict[str, Any]:
    """Fit the methods of a cell, and measure them on the test rows."""
    data = rows.arrays.labelled(rows.read)
    mcm = vilu.MCM()
    failure = vilu.score(mcm, data).failure
    methods: dict[str, FailurePredictor] = {"mcm": mcm}
    images = rows.arrays.images(rows.fitted_on)
    methods["vilu_zero"] = vilu.PREDICTORS["vilu_zero"]().fit(images)
    if cell.n_labels != WITHOUT_LABELS:
        rng = np.random.default_rng([cell.division, cell.n_labels])
        chosen = few_per_class(rows.arrays.target, rows.fitted_on, cell.n_labels, rng)
        train = rows.arrays.labelled(chosen)
        methods["vilu_plus"] = vilu.ViLUPlus().fit(train)
        methods["vilu_plus_images"] = vilu.ViLUPlus().fit(train, unlabelled=images)
    uncertainties = {name: method.predict_uncertainty(data) for name, method in methods.items()}
    target = rows.arrays.target[rows.read]
    return {
        "n_fitted": len(rows.fitted_on),
        "n_read": len(rows.read),
        "n_wrong": int(failure.sum()),
        "n_candidates": len(rows.arrays.text),
        "auroc": {name: auroc(u, failure) for name, u in uncertainties.items()},
        "fpr95": {name: fpr_at_tpr(u, failure) for name, u in uncertainties.items()},
        "accuracy": {name: accuracy(method, data, target) for name, method in methods.items()},
        "resampled": resampled(uncertainties, failure, cell.division),
        "notes": methods["vilu_zero"].notes_,
    }


def accuracy(method: FailurePredictor, data: vilu.Embeddings, target: Ints) -> float:
    """Accuracy of the answers of the method's own posterior; for MCM, of the zero-shot answers."""
    n_right = 0
    for batch in data.batches(BATCH):
        of_candidates = batch.logits
        if method.name != "mcm":
            of_candidates = method.log_posterior(batch)
        answer = of_candidates.argmax(dim=1).numpy()
        n_right += int((answer == target[batch.index.numpy()]).sum())
    return n_right / len(target)


def resampled(
    uncertainties: dict[str, Floats], failure: Ints, division: int
) -> dict[str, list[float]]:
    """AUROCs of bootstrap resamples of the rows, the same rows for all methods."""
    rng = np.random.default_rng([division, 2])
    values: dict[str, list[float]] = {name: [] for name in uncertainties}
    for _ in range(N_RESAMPLES):
        drawn = rng.integers(len(failure), size=len(failure))
        for name, uncertainty in uncertainties.items():
            values[name].append(round(float(auroc(uncertainty[drawn], failure[drawn])), 5))
    return values


def cells(names: Sequence[str], divisions: int, *, plus: bool) -> Iterator[Cell]:
    """Yield the cells in the order of measurement.

    With ``plus``, cells have labels and all images. With one label per class there are also cells
    with fewer images.
    """
    for division in range(divisions):
        for name in names:
            for size in SIZES:
                if not plus:
                    yield Cell(name, size, WITHOUT_LABELS, division)
                    continue
                budgets: tuple[int, ...] = LABELS
                if size:
                    budgets = LABELS[:1]
                for n_labels in budgets:
                    yield Cell(name, size, n_labels, division)


def known_cells(file: Path) -> set[Cell]:
    """The cells of a file; none if the file does not exist."""
    if not file.is_file():
        return set()
    lines = file.read_text().splitlines()
    return {Cell(*json.loads(line)["cell"]) for line in lines}


def main() -> None:
    """Measure the cells missing in the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("arrays", type=Path)
    parser.add_argument("cells", type=Path)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--divisions", type=int, default=5)
    parser.add_argument("--plus", action="store_true", help="vilu_plus, alone and with images")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # fits to few rows warn, and few rows are intended here
    known = known_cells(options.cells)
    for cell in cells(options.sets, options.divisions, plus=options.plus):
        if cell in known:
            continue
        rows = rows_of(options.arrays, cell)
        if rows is None:
            continue
        begin = time.perf_counter()
        result = measure(rows, cell)
        seconds = time.perf_counter() - begin
        with options.cells.open("a") as file:
            file.write(json.dumps({"cell": cell, **result, "seconds": round(seconds, 2)}) + "\n")
        values = {name: round(100 * value, 2) for name, value in result["auroc"].items()}
        print(*cell, values, f"{seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()

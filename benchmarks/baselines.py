"""Measures simple baselines beside our methods, on embeddings of CLIP.

    python -m benchmarks.baselines ARRAYS CELLS.jsonl [--sets cars ...] [--methods tip_adapter ...]
    python -m benchmarks.baseline_tables CELLS.jsonl

ARRAYS is a folder of ``.npz`` files with ``image``, ``text`` and ``target`` (CLIP's logit scale is
100). A seed divides each set into halves. Methods are fitted on the first half, with a given number
of labels per class (0: all, -1: none), and tested on the second half. A *cell* is a set, a label
count, a division and a method. Every cell is a line of CELLS.jsonl, with AUROC and FPR95 for
failures of zero-shot answers, and AUROCs on bootstrap resamples. All methods have the same row
resamples.

``otter_sees`` and ``stata_sees`` also get the test images, without labels. All other methods get
images from the first half alone. ``vilu_plus_images`` gets all images of the first half.

Cells already in the file are left out. All sets are measured for a division before the next
division begins.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import vilu
from benchmarks.answers import Arrays, draw_per_class
from benchmarks.never_below import SETS, WITHOUT_LABELS, resampled_aurocs, rows_of
from benchmarks.never_below import Cell as Division
from vilu.metrics import auroc, fpr_at_tpr
from vilu.metrics.counts import Floats, Ints
from vilu_bench.methods.transductive import StatA, fit_gaussians

NAMES = (
    "imagenet",
    "pets among 123",
    "caltech66",
    "food9",
    "cifar10",
    "cars",
    "ucf101",
    "dtd",
    "oxford pets",
)
LABELS = (WITHOUT_LABELS, 1, 5, 16, 0)


class Cell(NamedTuple):
    """A set, the labels per class (-1: none, 0: all), a division and a method."""

    name: str
    n_labels: int
    division: int
    method: str


class Halves(NamedTuple):
    """A set's rows, divided for fits and tests."""

    arrays: Arrays
    labelled: Ints  # rows with a label
    fit_rows: Ints  # all rows of the first half
    test_rows: Ints

    def without_fit(self) -> Floats:
        """Compute uncertainties by MCM."""
        predictor = vilu.MCM()
        test = self.arrays.labelled(self.test_rows)
        return predictor.predict_uncertainty(test)

    def with_labels(self, name: str) -> Floats:
        """Compute uncertainties by a method fitted on the labelled rows."""
        train = self.arrays.labelled(self.labelled)
        predictor = vilu.PREDICTORS[name]()
        predictor.fit(train)
        test = self.arrays.labelled(self.test_rows)
        return predictor.predict_uncertainty(test)

    def with_images(self) -> Floats:
        """Compute uncertainties by ViLU+, fitted on labelled rows and all first-half images."""
        images = self.arrays.images(self.fit_rows)
        train = self.arrays.labelled(self.labelled)
        predictor = vilu.ViLUPlus()
        predictor.fit(train, unlabelled=images)
        test = self.arrays.labelled(self.test_rows)
        return predictor.predict_uncertainty(test)

    def without_labels(self, name: str) -> Floats:
        """Compute uncertainties by a method fitted on the images of the first half."""
        images = self.arrays.images(self.fit_rows)
        predictor = vilu.PREDICTORS[name]()
        predictor.fit(images)
        test = self.arrays.labelled(self.test_rows)
        return predictor.predict_uncertainty(test)

    def otter_sees(self) -> Floats:
        """Compute uncertainties by OTTER, fitted on the test images."""
        data = self.arrays.images(self.test_rows)
        predictor = vilu.PREDICTORS["otter"]()
        predictor.fit(data)
        return predictor.predict_uncertainty(data)

    def stata_sees(self) -> Floats:
        """Compute uncertainties by StatA's own posterior on test images, with neighbour terms."""
        data = self.arrays.images(self.test_rows)
        rows = torch.arange(len(data))
        (batch,) = data.batches(len(data))
        settings = StatA()
        images = data.image_rows(rows).double()
        learned = fit_gaussians(
            images,
            batch.logits.double(),
            data.text.double(),
            settings.anchor,
            settings.neighbours,
            settings.passes,
        )
        others = learned.posterior.clone()
        others[rows, batch.prediction] = 0.0  # 1 - q_t̂ would be 0 for many confident rows
        uncertainty = others.sum(dim=1)
        return uncertainty.numpy()


FREE: dict[str, Callable[[Halves], Floats]] = {
    "mcm": Halves.without_fit,
    "vilu_zero": partial(Halves.without_labels, name="vilu_zero"),
    "otter": partial(Halves.without_labels, name="otter"),
    "stata": partial(Halves.without_labels, name="stata"),
    "otter_sees": Halves.otter_sees,
    "stata_sees": Halves.stata_sees,
}
LABELLED: dict[str, Callable[[Halves], Floats]] = {
    "linear_probe": partial(Halves.with_labels, name="linear_probe"),
    "linear_probe_cv": partial(Halves.with_labels, name="linear_probe_cv"),
    "probe_and_zero_shot": partial(Halves.with_labels, name="probe_and_zero_shot"),
    "gda_and_zero_shot": partial(Halves.with_labels, name="gda_and_zero_shot"),
    "tip_adapter": partial(Halves.with_labels, name="tip_adapter"),
    "vilu_plus": partial(Halves.with_labels, name="vilu_plus"),
    "vilu_plus_images": Halves.with_images,
}


def cells_in_order(names: Sequence[str], methods: Sequence[str], divisions: int) -> Iterator[Cell]:
    """Yield the cells in the order in which they are measured."""
    for division in range(divisions):
        for name in names:
            for n_labels in LABELS:
                available = LABELLED
                if n_labels == WITHOUT_LABELS:
                    available = FREE
                for method in available:
                    if method in methods:
                        yield Cell(name, n_labels, division, method)


def measure(folder: Path, cell: Cell) -> dict[str, Any]:
    """Fit the method of a cell, and measure the method on the test rows."""
    division = Division(cell.name, 0, cell.n_labels, cell.division)
    rows = rows_of(folder, division)
    if rows is None:
        raise ValueError(f"{cell.name} has no rows for {cell}")
    rng = np.random.default_rng([cell.division, max(cell.n_labels, 0)])
    labelled = draw_per_class(rows.arrays.target, rows.fit_rows, max(cell.n_labels, 0), rng)
    halves = Halves(rows.arrays, labelled, rows.fit_rows, rows.test_rows)
    score = (FREE | LABELLED)[cell.method]
    begin = time.perf_counter()
    uncertainty = score(halves)
    seconds = time.perf_counter() - begin
    zero_shot = vilu.MCM()
    test = rows.arrays.labelled(rows.test_rows)
    failure = vilu.score(zero_shot, test).failure
    return {
        "n_labelled": len(labelled) if cell.n_labels != WITHOUT_LABELS else 0,
        "n_read": len(rows.test_rows),
        "n_wrong": int(failure.sum()),
        "auroc": auroc(uncertainty, failure),
        "fpr95": fpr_at_tpr(uncertainty, failure),
        "resampled": resampled_aurocs({cell.method: uncertainty}, failure, cell.division)[
            cell.method
        ],
        "seconds": round(seconds, 2),
    }


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
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(NAMES))
    every_method = [*FREE, *LABELLED]
    parser.add_argument("--methods", nargs="+", choices=every_method, default=every_method)
    parser.add_argument("--divisions", type=int, default=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # fits to few rows warn, and few rows are intended here
    known = known_cells(options.cells)
    for cell in cells_in_order(options.sets, options.methods, options.divisions):
        if cell in known:
            continue
        result = measure(options.arrays, cell)
        with options.cells.open("a") as file:
            line = json.dumps({"cell": cell, **result})
            file.write(line + "\n")
        print(*cell, f"{100 * result['auroc']:.2f}, {result['seconds']:.1f} s", flush=True)


if __name__ == "__main__":
    main()

"""Measures answers marked as likely right, before any guarantee.

    python -m benchmarks.likely ARRAYS CELLS [--seeds 20] [--labels 100 200 400] [--asked]
    python -m benchmarks.likely_tables CELLS

ARRAYS is a folder of ``.npz`` files with ``image``, ``text`` and ``target`` (CLIP's logit scale is
100). A *cell* is a set, a label count and a seed. The seed draws the rows with a label. With
``--asked`` the seed draws half of the rows, and ``vilu triage`` asks for labels of some drawn rows,
in rounds of 50. ``vilu_plus`` is fitted on the labels as in ``vilu triage``, and judges all rows
without a label.

A cell is a file in the folder CELLS. The file has the uncertainties and failures for
cross-fitted labels and for the rows without a label. ``choose_answer`` chooses the kind of answers,
at a 5 % risk. Cells with an existing file are left out. All sets are measured for a seed before the
next seed begins.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

import vilu
from benchmarks.answers import Arrays
from vilu.calibration.answer_choice import choose_answer
from vilu.metrics.counts import Ints
from vilu.predictors.contract.cross_fit import cross_fitted, labelled_folds
from vilu.predictors.contract.held_out import JudgedAnswers
from vilu.scoring.score import score
from vilu.triage.choose import choose_rows_to_fit

MAX_RISK = 0.05
CHOOSING_SETS = ("caltech66", "food9", "pets_in123", "proto_dtd")
TEST_SETS = ("proto_ucf101", "proto_oxfordpets", "cifar10", "cars_text")
SUFFIX = "_b32"
ROUND = 50


class Cell(NamedTuple):
    """A set, a label count, and the seed that draws the rows with a label."""

    name: str
    n_labels: int
    seed: int

    def file(self, folder: Path) -> Path:
        """Return the path of the cell's file."""
        return folder / f"{self.name}-{self.n_labels}-{self.seed}.npz"


class JudgedCell(NamedTuple):
    """Answers of the chosen kind: cross-fitted labels, and rows without a label."""

    held_out: JudgedAnswers
    unlabelled: JudgedAnswers

    def save(self, path: Path) -> None:
        """Write a cell's file. An incomplete file never has this name."""
        unfinished = path.with_suffix(".tmp.npz")
        np.savez_compressed(
            unfinished,
            held_out_uncertainty=self.held_out.uncertainty,
            held_out_failure=self.held_out.failure,
            uncertainty=self.unlabelled.uncertainty,
            failure=self.unlabelled.failure,
        )
        unfinished.rename(path)

    @classmethod
    def load(cls, path: Path) -> JudgedCell:
        """Read a cell's file."""
        with np.load(path, allow_pickle=False) as arrays:
            held_out = JudgedAnswers(arrays["held_out_uncertainty"], arrays["held_out_failure"])
            others = JudgedAnswers(arrays["uncertainty"], arrays["failure"])
            return cls(held_out, others)


def random_rows(arrays: Arrays, cell: Cell) -> Ints:
    """Draw the rows with a label by the seed."""
    return shuffled(arrays, cell)[: cell.n_labels]


def asked_rows(arrays: Arrays, cell: Cell) -> Ints:
    """Return the rows whose label ``vilu triage`` would ask for, in one half of the rows."""
    order = shuffled(arrays, cell)
    fit_side = np.sort(order[: len(order) // 2])
    all_rows = np.arange(len(order))
    source = arrays.labelled(all_rows)
    zero_shot = vilu.MCM()
    uncertainty = zero_shot.predict_uncertainty(source)
    chosen = np.empty(0, dtype=np.int64)
    while True:
        free = np.setdiff1d(fit_side, chosen)
        n = min(ROUND, cell.n_labels - len(chosen))
        rows_to_add = choose_rows_to_fit(source, free, uncertainty, n, cell.seed)
        chosen = np.append(chosen, rows_to_add)
        if len(chosen) >= cell.n_labels:
            return chosen
        labelled = source.take(chosen)
        predictor = vilu.ViLUPlus(seed=cell.seed)
        predictor.fit(labelled)
        uncertainty = predictor.predict_uncertainty(source)


def shuffled(arrays: Arrays, cell: Cell) -> Ints:
    """Return all rows in a cell's random order."""
    rng = np.random.default_rng([cell.seed, cell.n_labels])
    return rng.permutation(len(arrays.target))


def measure(arrays: Arrays, cell: Cell, chosen: Ints) -> JudgedCell:
    """Fit on the chosen rows' labels, and judge all rows without a label."""
    all_rows = np.arange(len(arrays.target))
    rest = np.setdiff1d(all_rows, chosen)
    labelled = arrays.labelled(chosen)
    unlabelled = arrays.labelled(rest)  # the labels are only used to judge the answers
    predictor = vilu.ViLUPlus(seed=cell.seed)
    predictor.fit(labelled)
    folds = labelled_folds(labelled)
    predictor.held_out_ = cross_fitted(predictor, labelled, folds)
    choice = choose_answer(predictor, labelled, MAX_RISK)
    judge = predictor.judging(choice.answer)
    outcomes = score(judge, unlabelled)
    held_out = predictor.held_out_.of_kind(choice.answer)
    others = JudgedAnswers(outcomes.uncertainty, outcomes.failure)
    return JudgedCell(held_out, others)


def cells(seeds: int, labels: Sequence[int]) -> Iterator[Cell]:
    """Yield all cells, seed by seed."""
    for seed in range(seeds):
        for name in (*CHOOSING_SETS, *TEST_SETS):
            for n_labels in labels:
                yield Cell(name, n_labels, seed)


def main() -> None:
    """Measure the cells without a file."""
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("arrays", type=Path)
    parser.add_argument("cells", type=Path)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--labels", type=int, nargs="+", default=[100, 200, 400])
    parser.add_argument("--asked", action="store_true", help="labels that a triage asks for")
    arguments = parser.parse_args()
    rows_of = asked_rows if arguments.asked else random_rows
    warnings.simplefilter("ignore")
    logging.getLogger("vilu").setLevel(logging.ERROR)
    arguments.cells.mkdir(parents=True, exist_ok=True)
    for cell in cells(arguments.seeds, arguments.labels):
        path = cell.file(arguments.cells)
        if path.exists():
            continue
        arrays = Arrays.load(arguments.arrays / f"{cell.name}{SUFFIX}.npz")
        rows = rows_of(arrays, cell)
        judged = measure(arrays, cell, rows)
        judged.save(path)
        print(path.name, flush=True)


if __name__ == "__main__":
    main()

"""Measures the gain of a method's own answers over zero-shot answers and over plain baselines.

    python -m benchmarks.answers ARRAYS CELLS.jsonl [--divisions 5] [--labels 1 5 16 0]
    python -m benchmarks.answer_summary CELLS.jsonl SUMMARY.json.xz
    python -m benchmarks.answer_tables SUMMARY.json.xz

ARRAYS is a folder of ``.npz`` files with ``image``, ``text`` and ``target`` (CLIP's logit scale is
100). A seed divides each set into halves. Methods are fitted on labels from the first half, with a
given number of labels per class (0: all labels). The tests are on the second half:

- ``mcm``: zero-shot answers, no fit.
- ``zero_shot``, ``adapted``: a single ViLU+ fit, which judges zero-shot answers, or adapted
  answers.
- ``chosen``: ``zero_shot`` or ``adapted``, chosen by ``choose_answer`` at a 5 % risk.
- ``adapted_images``, ``chosen_images``: like ``adapted`` and ``chosen``, but the fit also gets the
  images of the first half, without labels.
- ``probe``: the linear probe's answers, judged by the probe.
- ``linear_probe_cv``, ``gda_and_zero_shot``, ``tip_adapter``: the method's own answers, judged by
  the method.
- ``mix``, ``pool``: logits and linear probe together, see ``benchmarks.mixes``.

A *cell* is a set, a label count and a division. Every cell is a line of CELLS.jsonl. For every
method, the line has the uncertainty rank and the failure of each row in the second half, and the
certified rules' results. For a rule, the labels are divided into halves, stratified by class.
The first label half fits the method, and the second label half calibrates the rule (``ltt``, 95 %).
The rule is tested on the second half of the set. A fit gets no images of calibration rows.

Cells already in the file are left out. All sets are measured for a division before the next
division begins.
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
import torch

import vilu
from benchmarks.mixes import experts, fit_weights, judged_by_mixes, linear_probe
from vilu.calibration.answer_choice import choose_answer
from vilu.embeddings.source import SAME_TEXT_COSINE
from vilu.metrics.counts import Floats, Ints
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.contract.held_out import JudgedAnswers
from vilu.predictors.contract.predictor import FailurePredictor

ANSWERS = {
    "mcm": "zero-shot, MCM",
    "zero_shot": "zero-shot, ViLU+",
    "adapted": "adapted, ViLU+",
    "chosen": "chosen, ViLU+",
    "zero_shot_images": "zero-shot, ViLU+ with images",
    "adapted_images": "adapted, ViLU+ with images",
    "chosen_images": "chosen, ViLU+ with images",
    "probe": "linear probe's own",
    "linear_probe_cv": "`linear_probe_cv`, own",
    "gda_and_zero_shot": "`gda_and_zero_shot`, own",
    "tip_adapter": "`tip_adapter`, own",
    "mix": "mix of probabilities",
    "pool": "pool of log probabilities",
}
"""Maps a method to the name in the tables."""

BENCH_PREDICTORS = ("linear_probe_cv", "gda_and_zero_shot", "tip_adapter")
"""Predictors in ``vilu_bench`` that are measured with their own answers."""

RISKS = (0.05, 0.1, 0.2)
RISK_OF_CHOICE = RISKS[0]
LABELS = (1, 5, 16, 0)
LEFT_OUT = "words"  # this set is left out, because the candidates are words, not classes


class Cell(NamedTuple):
    """A set, the labels per class (0: all), and the seed of a division."""

    name: str
    n_labels: int
    division: int


@dataclass(frozen=True)
class Arrays:
    """A set's embeddings and targets."""

    image: Floats
    text: Floats
    target: Ints

    @classmethod
    def load(cls, path: Path) -> Arrays:
        """Read a file. Candidates with equal texts become one candidate."""
        with np.load(path) as arrays:
            image = arrays["image"].astype(np.float32)
            text = arrays["text"].astype(np.float32)
            target = arrays["target"]
        unit = text / np.linalg.norm(text, axis=1, keepdims=True)
        first_of_text = (unit @ unit.T >= SAME_TEXT_COSINE).argmax(axis=1)
        kept, candidate = np.unique(first_of_text, return_inverse=True)
        return cls(image, text[kept], candidate[target])

    def labelled(self, rows: Ints) -> vilu.Embeddings:
        """Return the embeddings at ``rows``, with labels."""
        return vilu.Embeddings(self.image[rows], self.text, target=self.target[rows])

    def images(self, rows: Ints) -> vilu.Embeddings:
        """Return the embeddings at ``rows``, without labels."""
        return vilu.Embeddings(self.image[rows], self.text)


def draw_per_class(target: Ints, rows: Ints, n: int, rng: np.random.Generator) -> Ints:
    """Draw at most ``n`` random rows per class from ``rows``. If n is 0, return all ``rows``."""
    if n == 0:
        return np.sort(rows)
    drawn_rows = []
    for label in np.unique(target[rows]):
        rows_of_class = rows[target[rows] == label]
        shuffled = rng.permutation(rows_of_class)
        drawn_rows.append(shuffled[:n])
    all_rows = np.concatenate(drawn_rows)
    return np.sort(all_rows)


def split_in_halves(target: Ints, rows: Ints, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Divide ``rows`` into two halves with equal shares of every class."""
    shuffled = rng.permutation(rows)
    rows_by_class = shuffled[np.argsort(target[shuffled], kind="stable")]
    return np.sort(rows_by_class[0::2]), np.sort(rows_by_class[1::2])


class FitAnswers(NamedTuple):
    """Every method's answers for some rows, with times and notes of the fits."""

    judged: dict[str, JudgedAnswers]
    seconds: dict[str, float]  # each method's fit time. For chosen answers, the choice is included.
    notes: dict[str, Any]


def measure(
    arrays: Arrays, fit_rows: Ints, unlabelled_rows: Ints, new_rows: Ints, seed: int
) -> FitAnswers:
    """Fit all methods, and judge ``new_rows``. ``unlabelled_rows`` have no labels in the fit."""
    train = arrays.labelled(fit_rows)
    images = arrays.images(unlabelled_rows)
    new_data = arrays.labelled(new_rows)
    judged = {"mcm": outcomes_of(vilu.MCM(), new_data)}
    seconds = {"mcm": 0.0}
    notes: dict[str, Any] = {}
    for suffix, unlabelled in (("", None), ("_images", images)):
        start = time.perf_counter()
        plus = vilu.ViLUPlus(seed=seed).fit(train, unlabelled=unlabelled)
        time_fitted = time.perf_counter()
        choice = choose_answer(plus, train, RISK_OF_CHOICE, unlabelled=unlabelled)
        time_chosen = time.perf_counter()
        judged[f"zero_shot{suffix}"] = outcomes_of(plus, new_data)
        judged[f"adapted{suffix}"] = outcomes_of(plus.judging("adapted"), new_data)
        judged[f"chosen{suffix}"] = judged[f"{choice.answer}{suffix}"]
        seconds[f"zero_shot{suffix}"] = time_fitted - start
        seconds[f"adapted{suffix}"] = time_fitted - start
        seconds[f"chosen{suffix}"] = time_chosen - start
        notes[f"choice{suffix}"] = (choice.answer, choice.reason)
    start = time.perf_counter()
    probe = linear_probe().fit(train)
    time_fitted = time.perf_counter()
    weights = fit_weights(train, arrays.target[fit_rows], seed)
    time_mixed = time.perf_counter()
    judged["probe"] = outcomes_of(probe, new_data)
    judged |= judged_by_mixes(experts(probe, new_data), weights, arrays.target[new_rows])
    seconds |= {"probe": time_fitted - start, "mix": time_mixed - start, "pool": time_mixed - start}
    for name in BENCH_PREDICTORS:
        start = time.perf_counter()
        baseline = vilu.PREDICTORS[name](answer="adapted").fit(train)
        seconds[name] = time.perf_counter() - start
        judged[name] = outcomes_of(baseline, new_data)
    notes |= {"mix": weights.mix, "pool": weights.pool.tolist()}
    notes["cross_fitted"] = weights.cross_fitted
    return FitAnswers(judged, seconds, notes)


def outcomes_of(predictor: FailurePredictor, new: vilu.Embeddings) -> JudgedAnswers:
    """Score all rows, and return uncertainties and failures."""
    outcomes = vilu.score(predictor, new)
    return JudgedAnswers(outcomes.uncertainty, outcomes.failure)


def certified_rules(
    calibration: JudgedAnswers, new: JudgedAnswers
) -> list[dict[str, float | None]]:
    """Certify a rule per risk. Return coverage and risk on new rows (None if none is accepted)."""
    rules = []
    for max_risk in RISKS:
        outcomes = Outcomes(*calibration)
        rule = vilu.certify(outcomes, max_risk=max_risk)
        accepted = rule.accept(new.uncertainty)
        risk = None
        if accepted.any():
            risk = float(new.failure[accepted].mean())
        coverage = float(accepted.mean())
        rules.append({"coverage": coverage, "risk": risk})
    return rules


class Division(NamedTuple):
    """The rows of a cell: both halves of the set, and the labelled rows in the first half."""

    first: Ints
    second: Ints
    labelled: Ints
    fit_half: Ints  # half of the labelled rows, for the fits
    calibration_half: Ints

    @classmethod
    def of(cls, target: Ints, cell: Cell) -> Division:
        """Draw the rows with the division's seed. More labels include the fewer labels."""
        rng = np.random.default_rng(cell.division)
        order = rng.permutation(len(target))
        middle = len(order) // 2
        first = np.sort(order[:middle])
        labelled = draw_per_class(target, first, cell.n_labels, rng)
        # A separate generator, so that equal labelled rows have equal halves.
        rng_of_halves = np.random.default_rng([cell.division, 1])
        fit_half, calibration_half = split_in_halves(target, labelled, rng_of_halves)
        second = np.sort(order[middle:])
        return cls(first, second, labelled, fit_half, calibration_half)


def results_of(arrays: Arrays, rows: Division, seed: int) -> dict[str, Any]:
    """Compute a cell's results for the line in the file."""
    fit_on_all = measure(arrays, rows.labelled, rows.first, rows.second, seed)
    unlabelled_rows = np.setdiff1d(rows.first, rows.calibration_half)
    rows_to_judge = np.concatenate([rows.calibration_half, rows.second])
    fit_on_half = measure(arrays, rows.fit_half, unlabelled_rows, rows_to_judge, seed)
    n = len(rows.calibration_half)
    methods = {}
    for name, judged in fit_on_all.judged.items():
        u, failure = fit_on_half.judged[name]
        calibration = JudgedAnswers(u[:n], failure[:n])
        new = JudgedAnswers(u[n:], failure[n:])
        _, rank = np.unique(judged.uncertainty, return_inverse=True)
        methods[name] = {
            "rank": rank.tolist(),
            "failure": "".join(map(str, judged.failure)),
            "certified": certified_rules(calibration, new),
            "seconds": fit_on_all.seconds[name],
        }
    return {
        "n": len(arrays.target),
        "n_classes": len(arrays.text),
        "n_labelled": len(rows.labelled),
        "rows": rows.second.tolist(),
        "methods": methods,
        "notes": fit_on_all.notes,
        "notes_of_half": fit_on_half.notes,
    }


def cells_in(path: Path) -> set[Cell]:
    """Read the cells of a file."""
    if not path.exists():
        return set()
    cells = set()
    text = path.read_text()
    for line in text.splitlines():
        cell_line = json.loads(line)
        cell = Cell(cell_line["name"], cell_line["n_labels"], cell_line["division"])
        cells.add(cell)
    return cells


def planned_cells(names: Sequence[str], labels: Sequence[int], divisions: int) -> Iterator[Cell]:
    """Yield all cells, division by division."""
    for division in range(divisions):
        for name in names:
            for n_labels in labels:
                yield Cell(name, n_labels, division)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the missing cells, and add each cell to the file."""
    parser = argparse.ArgumentParser(description="What adapted answers gain: measurement.")
    parser.add_argument("arrays", type=Path, help="folder of .npz files")
    parser.add_argument("cells", type=Path, help="JSON lines, one for each cell")
    parser.add_argument("--divisions", type=int, default=5)
    parser.add_argument("--labels", type=int, nargs="+", default=LABELS, help="0: all")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore", UserWarning)  # the warnings are about classes with few rows
    torch.set_num_threads(1)
    sets = {}
    for path in sorted(options.arrays.glob("*.npz")):
        if not path.name.startswith(LEFT_OUT):
            sets[path.stem] = Arrays.load(path)
    present = cells_in(options.cells)
    measured: dict[tuple[str, int, bytes], dict[str, Any]] = {}
    for cell in planned_cells(list(sets), options.labels, options.divisions):
        if cell in present:
            continue
        start = time.perf_counter()
        arrays = sets[cell.name]
        rows = Division.of(arrays.target, cell)
        # If no class has more labels, two label counts give the same rows.
        key = (cell.name, cell.division, rows.labelled.tobytes())
        if key not in measured:
            measured[key] = results_of(arrays, rows, cell.division)
        with options.cells.open("a") as file:
            line = json.dumps({**cell._asdict(), **measured[key]})
            file.write(line + "\n")
        print(*cell, f"{time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()

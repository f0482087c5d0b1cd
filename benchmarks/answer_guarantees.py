"""Whether guarantees hold for adapted and for given answers.

    python -m benchmarks.answer_guarantees [--calibrations 10000]
    python -m benchmarks.answer_guarantees --arrays ARRAYS [--divisions 2] [--calibrations 200]

A predictor's scored rows are a population, so the risk is known at every threshold. 500 calibration
rows are drawn from the population with replacement, and a rule is made at a 5 % risk with 95 %
confidence (``ltt``). A rule is *broken* if more than 5 % of the accepted answers in the population
are wrong. At most 5 % of the rules may be broken. The output has the share of broken rules, a
one-sided 95 % bound on this share (Clopper and Pearson), and the mean coverage.

Without ``--arrays`` the data are simulated: 20 Gaussian classes, noisy class means as texts, and a
population with 25,000 rows. With ``--arrays`` a seed divides every set into halves. Methods are
fitted on 16 labels per class from the first half, and the second half is the population. For given
answers the labels are divided: the probe is fitted on one half, and ViLU+ on the second half.

Three kinds of answers are judged:

- ``adapted, vilu_plus`` and ``adapted, linear_probe``: the method's own answers.
- ``given``: a linear probe's answers, judged by ViLU+. The probe and ViLU+ are fitted on separate
  rows.

Each population is measured twice: without out-of-distribution rows, and with out-of-distribution
rows as 20 % of all rows. These rows are images from a second world or set, outside the classes. The
label there is ``(outside)``, so every answer is wrong.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import vilu
from benchmarks.answers import LEFT_OUT, Arrays, Cell, Division, split_in_halves
from benchmarks.mixes import BATCH, linear_probe
from vilu.calibration.thresholds import upper_bound
from vilu.metrics.counts import Floats, Ints
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.contract.held_out import JudgedAnswers
from vilu.predictors.contract.predictor import FailurePredictor

MAX_RISK = 0.05
MAX_SHARE_BROKEN = 0.05
"""Share of the rules that may be broken."""

N_CALIBRATION = 500
OUTSIDE_SHARE = 0.2
LABELS = 16

K = 20
DIM = 64
N_FIT = 1_000
N_POPULATION = 20_000
IMAGE_NOISE = 0.28
TEXT_NOISE = 0.1
"""Standard deviation of every coordinate. Class means have unit norm."""


class World:
    """Gaussian image classes, with a noisy text for each."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        directions = self.rng.normal(size=(K, DIM))
        self.mean = self._unit(directions)
        noise = self.rng.normal(size=(K, DIM))
        self.text = self._unit(self.mean + TEXT_NOISE * noise)

    def draw(self, n: int) -> tuple[Floats, Ints]:
        """Draw images (n, D), and return the images with the classes (n,)."""
        target = self.rng.integers(K, size=n)
        noise = IMAGE_NOISE * self.rng.normal(size=(n, DIM))
        return self._unit(self.mean[target] + noise), target

    @staticmethod
    def _unit(rows: Floats) -> Floats:
        normed: Floats = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return normed


class Problem(NamedTuple):
    """Rows to fit on and a population, labels included."""

    text: Floats
    fit: tuple[Floats, Ints]  # rows for the fit of methods that judge their own answers
    fit_of_judge: tuple[Floats, Ints]  # rows to fit the method that judges given answers
    answer_fit_rows: tuple[Floats, Ints]  # rows to fit the model that answers
    population: tuple[Floats, Ints]
    outside: Floats  # images outside the classes, a fifth of all rows in the population

    def data(self, rows: tuple[Floats, Ints], answer: Ints | None = None) -> vilu.Embeddings:
        """Return the labelled rows as a source, with the given answers if there are any."""
        image, target = rows
        columns = {}
        if answer is not None:
            columns = {"answer": answer}
        return vilu.Embeddings(image, self.text, target=target, columns=columns)

    @property
    def everything(self) -> tuple[Floats, Ints]:
        """The population's rows, then the images outside the classes."""
        image, target = self.population
        of_no_class = np.full(len(self.outside), vilu.OUTSIDE)
        return np.concatenate([image, self.outside]), np.concatenate([target, of_no_class])


def simulated_problem(seed: int = 0) -> Problem:
    """Simulate a problem. A second world provides the images outside the classes."""
    world = World(seed)
    second_world = World(seed + 1)
    n_images = n_outside(N_POPULATION)
    outside, _ = second_world.draw(n_images)
    fit = world.draw(N_FIT)
    answer_fit_rows = world.draw(N_FIT)
    population = world.draw(N_POPULATION)
    return Problem(world.text, fit, fit, answer_fit_rows, population, outside)


def n_outside(n: int) -> int:
    """Return how many rows to add to n rows: the added rows are then ``OUTSIDE_SHARE`` of all."""
    return round(n * OUTSIDE_SHARE / (1 - OUTSIDE_SHARE))


def real_problem(name: str, sets: dict[str, Arrays], division: int) -> Problem:
    """Make a set's problem. The next set provides the images outside the classes."""
    arrays = sets[name]
    cell = Cell(name, LABELS, division)
    rows = Division.of(arrays.target, cell)
    rng = np.random.default_rng([division, 2])
    fit_of_judge, answer_fit_rows = split_in_halves(arrays.target, rows.labelled, rng)
    names = list(sets)
    next_name = names[(names.index(name) + 1) % len(names)]
    images = sets[next_name].image
    n = n_outside(len(rows.second))
    # a small set has fewer than n images, so images are drawn with replacement
    drawn = rng.integers(len(images), size=n)

    def labelled(index: Ints) -> tuple[Floats, Ints]:
        return arrays.image[index], arrays.target[index]

    return Problem(
        arrays.text,
        labelled(rows.labelled),
        labelled(fit_of_judge),
        labelled(answer_fit_rows),
        labelled(rows.second),
        images[drawn],
    )


def answers_of(predictor: FailurePredictor, data: vilu.Embeddings) -> Ints:
    """Return each row's most likely candidate (N,), by the predictor's posterior."""
    parts = [predictor.log_posterior(batch).argmax(dim=1) for batch in data.batches(BATCH)]
    answers = torch.cat(parts)
    return answers.numpy()


def judged_kinds(problem: Problem, seed: int) -> Iterator[tuple[str, JudgedAnswers]]:
    """Yield each kind of answers, for the population and the images outside the classes."""
    everything = problem.data(problem.everything)
    own = {
        "adapted, vilu_plus": vilu.ViLUPlus(seed=seed, answer="adapted"),
        "adapted, linear_probe": linear_probe(),
    }
    for name, predictor in own.items():
        train = problem.data(problem.fit)
        predictor.fit(train)
        yield name, _judged(predictor, everything)
    answer_train = problem.data(problem.answer_fit_rows)
    another = linear_probe()
    another.fit(answer_train)
    judge_train = problem.data(problem.fit_of_judge)
    given_answers = answers_of(another, judge_train)
    given_train = problem.data(problem.fit_of_judge, given_answers)
    all_given_answers = answers_of(another, everything)
    given_all = problem.data(problem.everything, all_given_answers)
    plus = vilu.ViLUPlus(seed=seed, answer="given")
    plus.fit(given_train)
    yield "given", _judged(plus, given_all)


def _judged(predictor: FailurePredictor, data: vilu.Embeddings) -> JudgedAnswers:
    outcomes = vilu.score(predictor, data)
    return JudgedAnswers(outcomes.uncertainty, outcomes.failure)


class BrokenRules(NamedTuple):
    """How many rules there are, how many are broken, and the mean coverage."""

    n: int
    n_broken: int
    coverage: float  # mean over the rules

    def __str__(self) -> str:
        share = self.n_broken / self.n
        bound = upper_bound(self.n_broken, self.n, 0.05)
        return f"{100 * self.coverage:.1f} | {100 * share:.2f} (≤ {100 * bound:.2f}) | {self.n:,}"


def calibrate_often(population: JudgedAnswers, n_rules: int, seed: int) -> BrokenRules:
    """Calibrate ``n_rules`` times, and measure the rules on the population."""
    rng = np.random.default_rng(seed)
    order = population.uncertainty.argsort(kind="stable")
    uncertainty = population.uncertainty[order]
    n_wrong_up_to_row = population.failure[order].cumsum()
    n_wrong_before = np.concatenate([[0], n_wrong_up_to_row])
    n_broken = 0
    coverages = []
    for _ in range(n_rules):
        rows = rng.integers(len(order), size=N_CALIBRATION)
        calibration = Outcomes(population.uncertainty[rows], population.failure[rows])
        rule = vilu.certify(calibration, max_risk=MAX_RISK)
        if rule.threshold is None:
            coverages.append(0.0)
            continue
        # the rows with floor < u <= threshold are accepted
        first = 0
        if rule.floor is not None:
            first = int(np.searchsorted(uncertainty, rule.floor, side="right"))
        end = int(np.searchsorted(uncertainty, rule.threshold, side="right"))
        n_accepted = end - first
        n_wrong = n_wrong_before[end] - n_wrong_before[first]
        n_broken += bool(n_wrong > MAX_RISK * n_accepted)
        coverages.append(n_accepted / len(order))
    coverage = float(np.mean(coverages))
    return BrokenRules(n_rules, n_broken, coverage)


def both_populations(problem: Problem, judged: JudgedAnswers) -> dict[str, JudgedAnswers]:
    """Return the population alone, and the population with the images outside the classes."""
    n = len(problem.population[1])
    within = JudgedAnswers(judged.uncertainty[:n], judged.failure[:n])
    return {"0 %": within, "20 %": judged}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a JSON line for every answer kind, outside share, set and division."""
    parser = argparse.ArgumentParser(description="Guarantees of adapted and given answers.")
    parser.add_argument("--arrays", type=Path, help="folder of .npz files; without: simulated")
    parser.add_argument("--divisions", type=int, default=2)
    parser.add_argument("--calibrations", type=int, default=10_000)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore", UserWarning)  # the warnings are about classes with few rows
    torch.set_num_threads(1)
    total: dict[tuple[str, str], list[BrokenRules]] = {}
    for name, division, problem in problems(options.arrays, options.divisions):
        for kind, judged in judged_kinds(problem, division):
            populations = both_populations(problem, judged)
            for share, population in populations.items():
                broken = calibrate_often(population, options.calibrations, division)
                total.setdefault((kind, share), []).append(broken)
                accuracy = 1 - float(population.failure.mean())
                facts = {"set": name, "division": division, "answers": kind, "outside": share}
                counts = broken._asdict()
                print(json.dumps({**facts, "accuracy": accuracy, **counts}), flush=True)
    print("| answers | outside | certified at 5 % | broken | rules |\n|---|---|---|---|---|")
    for (kind, share), parts in total.items():
        n = sum(part.n for part in parts)
        n_broken = sum(part.n_broken for part in parts)
        coverage = float(np.mean([part.coverage for part in parts]))
        print(f"| {kind} | {share} | {BrokenRules(n, n_broken, coverage)} |")


def problems(folder: Path | None, divisions: int) -> Iterator[tuple[str, int, Problem]]:
    """Yield the simulated problem, or the problems of all sets, division by division."""
    if folder is None:
        yield "simulated", 0, simulated_problem()
        return
    sets = {}
    for path in sorted(folder.glob("*.npz")):
        if not path.name.startswith(LEFT_OUT):
            sets[path.stem] = Arrays.load(path)
    for division in range(divisions):
        for name in sets:
            yield name, division, real_problem(name, sets, division)


if __name__ == "__main__":
    main()

"""Do intervals of error rates hold? ``python -m benchmarks.estimate [SET.npz ...]``.

A simulated world has 3,000 rows. 100 rows (or ``--labels``) are drawn at random and labelled. A row
is wrong with probability p, and f is a prediction of p. "Held" is the share of 1,000 draws with an
interval that contains the world's error rate. The nominal confidence is 95 %. "Width" is
the mean interval width, divided by the mean width of the exact interval (Clopper-Pearson) from the
labels alone. ``plain normal`` is the usual normal interval from the labels alone.

- calibrated: f = p. Three quarters of the rows are almost surely right, a quarter almost surely
  wrong.
- blind: 5 % of the rows are wrong, and f is not informative.
- rare: 3 % of the rows are wrong, and f predicts two wrong rows in three.
- too sure: for 4 % of the rows f = 99.9 %, and 80 % are wrong there.
- misled: for 5 % of the rows f = 95 %, and 10 % are wrong there. For the rest f = 0, and 3 % are
  wrong.
- smooth: f = p = u^3 with u uniform.

In a set (arrays ``image``, ``text``, ``target``), ``vilu_plus`` is fitted on a random half. 100
rows from the second half are labelled, 20 times at random. The error rate among zero-shot answers
is estimated.
"""

from __future__ import annotations

import argparse
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

import vilu
from vilu.calibration.thresholds import lower_bound, upper_bound
from vilu.metrics.counts import Floats, Ints

ROWS, LABELS, DRAWS, SEEDS = 3_000, 100, 1_000, 20


def calibrated(u: Floats) -> tuple[Floats, Floats]:
    """Return the probability that a row is wrong, and the prediction, from uniform numbers (N,)."""
    p = np.where(u < 0.75, 0.02, 0.9)
    return p, p


def blind(u: Floats) -> tuple[Floats, Floats]:
    """Return probabilities and predictions, like ``calibrated``."""
    return np.full(len(u), 0.05), u


def rare(u: Floats) -> tuple[Floats, Floats]:
    """Return probabilities and predictions, like ``calibrated``."""
    p = np.where(u < 0.02, 0.95, 0.01)
    return p, p


def too_sure(u: Floats) -> tuple[Floats, Floats]:
    """Return probabilities and predictions, like ``calibrated``."""
    return np.where(u < 0.04, 0.8, 0.005), np.where(u < 0.04, 0.999, 0.005)


def misled(u: Floats) -> tuple[Floats, Floats]:
    """Return probabilities and predictions, like ``calibrated``."""
    return np.where(u < 0.05, 0.1, 0.03), np.where(u < 0.05, 0.95, 0.0)


def smooth(u: Floats) -> tuple[Floats, Floats]:
    """Return probabilities and predictions, like ``calibrated``."""
    return u**3, u**3


WORLDS: dict[str, Callable[[Floats], tuple[Floats, Floats]]] = {
    "calibrated": calibrated,
    "blind": blind,
    "rare": rare,
    "too sure": too_sure,
    "misled": misled,
    "smooth": smooth,
}


class IntervalCoverage:
    """How often an interval contained the truth, and the sum of the widths."""

    def __init__(self) -> None:
        self.n = 0
        self.n_held = 0
        self.width = 0.0

    def add(self, low: float, high: float, truth: float) -> None:
        """Count an interval."""
        self.n += 1
        self.n_held += low <= truth <= high
        self.width += high - low

    def in_words(self, plain: IntervalCoverage) -> str:
        """Format the share of draws, the share's exact 95 % interval, and the width."""
        low = lower_bound(self.n_held, self.n, 0.025)
        high = upper_bound(self.n_held, self.n, 0.025)
        held = f"held {self.n_held / self.n:.1%} ({low:.1%} to {high:.1%})"
        return f"{held}, width {self.width / plain.width:.2f}"


def estimate_often(
    probability: Floats, failure: Ints, draws: int, labels: int, random: np.random.Generator
) -> dict[str, IntervalCoverage]:
    """Estimate the rows' error rate ``draws`` times, each time from ``labels`` random labels."""
    held = {name: IntervalCoverage() for name in ("predictions", "plain exact", "plain normal")}
    for _ in range(draws):
        add_estimate(held, probability, failure, labels, random)
    return held


def add_estimate(
    held: dict[str, IntervalCoverage],
    probability: Floats,
    failure: Ints,
    labels: int,
    random: np.random.Generator,
) -> None:
    """Estimate the error rate once, from ``labels`` random labels, and add the intervals."""
    known = np.full(len(failure), -1)
    labelled = random.permutation(len(failure))[:labels]
    known[labelled] = failure[labelled]
    truth = float(failure.mean())
    outcomes = vilu.Outcomes(probability, known, is_probability=True)
    (error_rate,) = vilu.estimate(outcomes)
    held["predictions"].add(error_rate.low, error_rate.high, truth)
    held["plain exact"].add(*error_rate.plain, truth)
    share = float(failure[labelled].mean())
    half = 1.96 * math.sqrt(share * (1 - share) / labels)
    held["plain normal"].add(share - half, share + half, truth)


def world_lines(names: list[str], seed: int, draws: int, labels: int) -> Iterator[str]:
    """Yield lines for every world. Every draw has new rows."""
    for name in names:
        world = WORLDS[name]
        random = np.random.default_rng(seed)
        held = {way: IntervalCoverage() for way in ("predictions", "plain exact", "plain normal")}
        for _ in range(draws):
            ranks = random.random(ROWS)
            probability, predicted = world(ranks)
            is_wrong = random.random(ROWS) < probability
            failure = is_wrong.astype(np.int64)
            add_estimate(held, predicted, failure, labels, random)
        yield f"{name}, {labels} labels of {ROWS:,} rows, {draws:,} draws"
        for way, counted in held.items():
            yield f"  {way}: {counted.in_words(held['plain exact'])}"


def set_line(path: Path, seed: int, seeds: int, labels: int) -> str:
    """Return a line for a set with real embeddings."""
    arrays = np.load(path, allow_pickle=False)
    image = arrays["image"].astype(np.float32)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(image))
    half = len(order) // 2
    halves = []
    for rows in (order[:half], order[half:]):
        target = arrays["target"][rows]
        data = vilu.Embeddings(image[rows], arrays["text"], target=target, logit_scale=100.0)
        halves.append(data)
    fit_rows, rest = halves
    predictor = vilu.ViLUPlus()
    predictor.fit(fit_rows)
    outcomes = vilu.score(predictor, rest)
    random = np.random.default_rng(seed + 1)
    held = estimate_often(outcomes.uncertainty, outcomes.failure, seeds, labels, random)
    words = held["predictions"].in_words(held["plain exact"])
    return f"{path.stem}: {len(rest):,} rows, {outcomes.failure.mean():.1%} wrong: {words}"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="Whether intervals of error rates hold.")
    parser.add_argument("sets", nargs="*", type=Path)
    parser.add_argument("--world", choices=WORLDS, action="append")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--labels", type=int, default=LABELS)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    worlds = options.world or list(WORLDS)
    if not options.sets:
        for line in world_lines(worlds, options.seed, options.draws, options.labels):
            print(line, flush=True)
    for path in options.sets:
        print(set_line(path, options.seed, options.seeds, options.labels), flush=True)


if __name__ == "__main__":
    main()

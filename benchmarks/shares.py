"""Whether guarantees hold if some pictures are outside the classes.

    python -m benchmarks.shares [ARRAYS]

A calibration has 2,000 rows, at a 5 % risk and 95 % confidence. The rows are drawn from worlds with
a known risk: simulated worlds, and with ARRAYS (a folder of .npz files with image, text, target)
pots of real scores. Rows are drawn from a pot with replacement. For each world and
out-of-distribution share, a line has the best threshold's coverage. Then the line has the mean
coverage, divided by the best threshold's coverage, and how often the guarantee is broken. These two
numbers are given for three kinds of calibration rows:

- calibration rows with this share (plain ``ltt``),
- calibration rows, a fifth of them out of distribution, and the share is stated
  (``--outside-share``),
- calibration rows without any out-of-distribution row, as a warning.

In a further world, "edge", the error rate is just above 5 % everywhere, so every certificate is a
broken guarantee. With ``--compare ltt bonferroni_holm ...`` the worlds have no out-of-distribution
rows, and one world has confident mistakes. Then our procedures are compared with MAPIE's procedures
(``pip install mapie``).
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import vilu
from benchmarks.thresholds import PREDICTORS, Rate
from vilu.calibration.rules import Rule
from vilu.calibration.thresholds import PROCEDURES, lower_bound, upper_bound
from vilu.metrics.counts import Floats, Ints, tie_counts
from vilu.outcomes.outcomes import Outcomes

N_CALIBRATION, RISK, DELTA, OOD_SHARE_OF_DRAWS = 2000, 0.05, 0.05, 0.2
SHARES = (0.0, 0.1, 0.3, 0.5)


@dataclass
class Population:
    """A large pot with rows inside the classes, and a large pot with out-of-distribution rows."""

    u: Floats
    wrong: Ints
    ood_scores: Floats

    def __post_init__(self) -> None:
        order = np.argsort(self.u)
        self.u, self.wrong, self.ood_scores = (
            self.u[order],
            self.wrong[order],
            np.sort(self.ood_scores),
        )
        n_wrong_up_to_row = np.cumsum(self.wrong)
        self.wrong_below = np.concatenate([[0], n_wrong_up_to_row])

    def rates(self, t: Floats, share: float) -> tuple[Floats, Floats]:
        """Return each threshold's share of accepted rows, and share of accepted wrong rows."""
        below = np.searchsorted(self.u, t, side="right")
        foreign = (
            share * np.searchsorted(self.ood_scores, t, side="right") / max(len(self.ood_scores), 1)
        )
        inside = (1 - share) / len(self.u)
        return foreign + inside * below, foreign + inside * self.wrong_below[below]

    def best(self, share: float) -> float:
        """Return the coverage at the laxest threshold with a small enough risk."""
        thresholds = np.unique(np.r_[self.u, self.ood_scores])
        accepted, wrong = self.rates(thresholds, share)
        return float(accepted[wrong <= RISK * accepted].max(initial=0.0))

    def of(self, rule: Rule, share: float) -> tuple[float, float]:
        """Return a rule's coverage and risk."""
        interval = np.array(rule.thresholds[""].interval)
        accepted, wrong = self.rates(interval, share)
        coverage = float(accepted[1] - accepted[0])
        return coverage, float(wrong[1] - wrong[0]) / coverage if coverage else 0.0

    def draw(self, rng: np.random.Generator, share: float) -> Outcomes:
        """Draw calibration rows with replacement. Out-of-distribution rows have a random count."""
        n = int(rng.binomial(N_CALIBRATION, share))
        rows = rng.integers(len(self.u), size=N_CALIBRATION - n)
        u = np.r_[self.u[rows], rng.choice(self.ood_scores, n)]
        outside = np.arange(N_CALIBRATION) >= N_CALIBRATION - n
        failure = np.r_[self.wrong[rows], np.ones(n, int)]
        return Outcomes(u, failure, outside=outside)


def simulated_populations(rng: np.random.Generator, n: int = 400_000) -> dict[str, Population]:
    """Make pots by predictors that do and do not recognise out-of-distribution rows, and edge."""
    u = rng.beta(0.5, 2, n)
    is_wrong = rng.random(n) < 0.9 * u**2
    f = is_wrong.astype(int)
    far_scores = rng.beta(9, 1.5, n)
    near_scores = rng.beta(4, 1.5, n)
    return {
        "told apart": Population(u, f, far_scores),
        "half told apart": Population(u, f, near_scores),
    }


def edge_population(share: float, n: int = 400_000) -> Population:
    """Make uninformative scores. The error rate up to every threshold is 5.01 % or barely more."""
    rate = (0.0501 - share) / (1 - share)
    wrong = np.zeros(n, int)
    n_wrong = int(np.ceil(n * rate))
    even_steps = np.arange(n_wrong) / rate
    positions = np.floor(even_steps)
    wrong_rows = positions.astype(int)
    wrong[wrong_rows] = 1  # evenly, beginning with the first
    even = np.arange(n) / n
    return Population(even, wrong, even)


def real_population(folder: Path, inside: str, outside: str, *, joint: bool) -> Population:
    """Make a pot of CLIP scores: one minus the largest class probability.

    With ``joint``, everyday words are candidates, too.
    """
    with (
        np.load(folder / f"{inside}_b32.npz") as data,
        np.load(folder / f"{outside}_b32.npz") as other,
    ):
        text, target = data["text"].astype(np.float32), data["target"]
        images = data["image"].astype(np.float32), other["image"].astype(np.float32)
    k = len(text)
    if joint:
        with np.load(folder / "words_b32.npz") as words:
            text = np.concatenate([text, words["text"].astype(np.float32)])
    scores = []
    for image in images:
        logits = 100 * image @ text.T
        p = np.exp(logits - logits.max(1, keepdims=True))
        scores.append((p[:, :k] / p.sum(1, keepdims=True)).astype(np.float64))
    answer = scores[0].argmax(1)
    return Population(1 - scores[0].max(1), (answer != target).astype(int), 1 - scores[1].max(1))


def replay(
    pot: Population, share: float, drawn: float, stated: float | None, draws: int, seed: int
) -> tuple[float, float]:
    """Return the mean coverage, and the share of broken guarantees."""
    rng, coverage, broken = np.random.default_rng([seed, int(100 * share)]), 0.0, 0
    for _ in range(draws):
        calibration = pot.draw(rng, drawn)
        rule = vilu.certify(calibration, max_risk=RISK, confidence=1 - DELTA, outside_share=stated)
        found, risk = pot.of(rule, share)
        coverage, broken = coverage + found, broken + (risk > RISK)
    return coverage / draws, broken / draws


def line(name: str, pot: Population, share: float, draws: int, seed: int) -> str:
    """Format the line for a world and a share, with 95 % bounds on the broken guarantees."""
    best = pot.best(share)
    cells = [f"{name} | {share:.0%} | {best:.1%}"]
    ways = (
        [(share, None), (0.0, None)]
        if share == 0
        else [(share, None), (OOD_SHARE_OF_DRAWS, share), (0.0, None)]
    )
    for drawn, stated in ways:
        coverage, broken = replay(pot, share, drawn, stated, draws, seed)
        bound = upper_bound(round(broken * draws), draws, 0.05)
        ratio = f"{coverage / best:.2f}" if best else "–"
        cells.append(f"{ratio}, broken {broken:.2%} (≤ {bound:.1%})")
    return "| " + " | ".join(cells) + " |"


def confident_mistakes_rate(u: Floats) -> Floats:
    """Return error rates: 50 % in the most trusted 4 % of rows, 1 % in the next 60 %, then 50 %."""
    rate_of_others = np.where(u < 0.64, 0.01, 0.5)
    return np.where(u < 0.04, 0.5, rate_of_others)


RATES: dict[str, Rate] = {
    **PREDICTORS,
    "confident mistakes": confident_mistakes_rate,
    "at the edge": lambda u: np.full_like(u, 0.0501),
}
"""Error rates by uncertainty quantile: worlds in ``benchmarks.thresholds`` and two more."""


def certified_interval(method: str, u: Floats, f: Ints) -> tuple[float, float] | None:
    """Return the interval certified by a procedure, ours or MAPIE's, at 5 % and delta 0.1."""
    if method in PROCEDURES:
        counts = tie_counts(u, f)
        threshold = PROCEDURES[method](counts, RISK, 0.1)
        if threshold is None:
            return None
        floor, limit = threshold.interval
        return max(floor, 0.0), limit
    from mapie.risk_control import BinaryClassificationController

    controller = BinaryClassificationController(
        predict_function=lambda confidence: np.stack([1 - confidence, confidence], axis=1),
        risk="precision",
        target_level=1 - RISK,
        confidence_level=0.9,
        list_predict_params=np.linspace(0.95, 0, 96),
        fwer_method=method,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MAPIE warns about fixed sequences and missing thresholds
        controller.calibrate(1 - u, 1 - f)
    valid = np.asarray(controller.valid_predict_params)
    return (0.0, float(1 - valid.min())) if len(valid) else None


def compare_procedures(draws: int, method: str) -> None:
    """Print coverage and broken guarantees in every world of ``RATES``, at 5 % and delta 0.1."""
    grid = (np.arange(1_000_000) + 0.5) / 1_000_000
    for name, rate in RATES.items():
        rates = rate(grid)
        cumulated = np.cumsum(rates)
        sums = np.concatenate([[0.0], cumulated]) / len(grid)
        for n in (150, 600, 2000, 10_000):
            rng, coverage, broken = np.random.default_rng(n), [], 0
            for _ in range(draws):
                u = rng.random(n)
                is_wrong = rng.random(n) < rate(u)
                f = is_wrong.astype(int)
                ends = certified_interval(
                    method, (np.floor(10 * u) + 1) / 10 if name == "tied" else u, f
                ) or (0.0, 0.0)
                if name == "tied":  # a score is the upper end of its tenth
                    ends = tuple(np.floor(10 * np.array(ends) + 1e-6) / 10)
                low, high = (round(min(end, 1.0) * len(grid)) for end in ends)
                coverage.append((high - low) / len(grid))
                broken += bool(high > low and sums[high] - sums[low] > RISK * coverage[-1])
            bounds = lower_bound(broken, draws, 0.025), upper_bound(broken, draws, 0.025)
            error = np.std(coverage) / np.sqrt(draws)
            print(
                f"| {name} | {n:,} | {method} | {draws:,} | {broken / draws:.1%} "
                f"({bounds[0]:.1%} to {bounds[1]:.1%}) | "
                f"{np.mean(coverage):.1%} ± {error:.1%} |",
                flush=True,
            )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description="Whether guarantees hold where some pictures are out-of-distribution rows."
    )
    parser.add_argument("arrays", nargs="?", type=Path)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument(
        "--compare",
        nargs="+",
        help="only the worlds without out-of-distribution rows, with these procedures",
    )
    options = parser.parse_args()
    if options.compare:
        for method in options.compare:
            compare_procedures(options.draws, method)
        return
    rng = np.random.default_rng(0)
    worlds: dict[str, Callable[[float], Population]] = {
        **{name: lambda _, pot=pot: pot for name, pot in simulated_populations(rng).items()},  # type: ignore[misc]
        "edge": edge_population,
    }
    if options.arrays is not None:
        for inside, outside in (("caltech66", "proto_dtd"), ("food9", "caltech66")):
            for joint in (False, True):
                pot = real_population(options.arrays, inside, outside, joint=joint)
                score = "joint pool" if joint else "mcm"
                name = f"{inside}, {score}, out-of-distribution rows of {outside}"
                worlds[name] = lambda _, pot=pot: pot  # type: ignore[misc]
    for seed, (name, world) in enumerate(worlds.items()):
        for share in (0.0, 0.01, 0.03) if name == "edge" else SHARES:
            print(line(name, world(share), share, options.draws, seed), flush=True)


if __name__ == "__main__":
    main()

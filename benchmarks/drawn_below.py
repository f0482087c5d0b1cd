"""Tests on rows drawn up to a limit: does the guarantee hold, and how much do 300 labels accept?

    python -m benchmarks.drawn_below simulate [--draws 10000] [--worlds flat ...]
    python -m benchmarks.drawn_below measure build/chains [--draws 4]

``simulate``: Each row of a world has a rank, uniform in [0, 1). A world has a claimed and a true
error rate at every rank. 500 rows from the fit side choose the limit. The calibration side has
2,000 rows. 300 rows are drawn from this side up to the limit, and the answers are wrong with the
true error rate. A draw is *broken* if the certified interval's true risk is above 5 %. At most 5 %
of the draws may be broken. The output has the share of broken draws, a one-sided 95 % bound on this
share (Clopper and Pearson), and the mean share of accepted answers. The worlds:

- ``flat``: every answer is wrong with probability 5.01 %, so every certificate is broken.
- ``honest``: the claimed error rate is the true error rate, and rises to 50 %.
- ``too sure``: the true error rate is twice the claimed error rate.
- ``trusted``: 6 % of the most trusted tenth are wrong, then 1 %, then more and more.
- ``few``: ``honest``, but the limit is chosen from 40 rows, and the calibration side has 400 rows.
- ``tied``: ``too sure`` with scores that have ten values.
- ``same rows``: ``too sure``, but the limit is chosen from the calibration side, like the drawn
  rows. No command does this. The result shows why the fit side must choose the limit.

``measure``: The scores are from ``vilu_plus`` for adapted answers, after a fit on 200 labels from
the fit side. ``python -m benchmarks.procedures chains`` has written the scores, in a file for every
set and seed. 300 labels from the calibration side are tested at a 5 % risk and 95 % confidence:
once the labels are drawn up to the limit, and once uniformly among all rows. Coverage and risk are
measured on the whole calibration side. All rows on the fit side choose the limit, because the files
do not name the rows used in the fit. ``vilu next`` leaves out the rows used in the fit. The output
has means over fits and draws. For the difference's interval (t, 95 %), a fit's mean is one number.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, Literal

import numpy as np
from scipy import stats

import vilu
from vilu.calibration.thresholds import learn_then_test, upper_bound
from vilu.metrics.counts import Floats, Ints, tie_counts
from vilu.triage.choose import choose_limit_of_draw

MAX_RISK: Final = 0.05
DELTA: Final = 0.05
N_LABELS: Final = 300
N_TO_FIT: Final = 200

RANKS: Final = (np.arange(100_000) + 0.5) / 100_000
"""Ranks at which the true risk is computed."""


# Simulation.


@dataclass(frozen=True)
class World:
    """Claimed (ascending) and true error rates (M,) at all ranks, and the row counts."""

    claimed_rate: Floats
    true_rate: Floats
    n_fit: int = 500
    n_calibration: int = 2_000
    by_same_rows: bool = False

    @cached_property
    def _errors(self) -> Floats:
        """(M,) sums of the true error rates up to every rank."""
        return np.cumsum(self.true_rate)

    def risk(self, start: int, stop: int) -> float:
        """Compute the true risk if the ranks ``start`` ... ``stop`` - 1 are accepted."""
        errors_below = float(self._errors[start - 1]) if start else 0.0
        return (float(self._errors[stop - 1]) - errors_below) / (stop - start)


def _worlds() -> dict[str, World]:
    """Make the simulated worlds, by name."""
    rising = 0.5 * RANKS**3
    doubled = np.minimum(2 * rising, 1)
    trusted = np.where(RANKS < 0.1, 0.06, 0.01 + rising)
    ten_values = np.ceil(10 * RANKS) / 10
    constant_rate = np.full(len(RANKS), 0.0501)
    return {
        "flat": World(claimed_rate=0.04 * RANKS, true_rate=constant_rate),
        "honest": World(claimed_rate=rising, true_rate=rising),
        "too sure": World(claimed_rate=rising, true_rate=doubled),
        "trusted": World(claimed_rate=rising, true_rate=trusted),
        "few": World(claimed_rate=rising, true_rate=rising, n_fit=40, n_calibration=400),
        "tied": World(claimed_rate=0.5 * ten_values**3, true_rate=doubled),
        "same rows": World(claimed_rate=rising, true_rate=doubled, by_same_rows=True),
    }


WORLDS: Final = _worlds()


def simulate_draw(world: World, rng: np.random.Generator) -> tuple[float, float]:
    """Draw once. Return the share and true risk of accepted answers, (0, 0) if none are."""
    rank = rng.integers(len(RANKS), size=world.n_calibration)
    uncertainty = world.claimed_rate[rank]
    scores_to_choose = world.claimed_rate[rng.integers(len(RANKS), size=world.n_fit)]
    if world.by_same_rows:
        scores_to_choose = uncertainty
    limit, _ = choose_limit_of_draw(scores_to_choose, N_LABELS, MAX_RISK, DELTA)
    rows_up_to_limit = np.flatnonzero(uncertainty <= limit)
    drawn_rows = rng.permutation(rows_up_to_limit)[:N_LABELS]
    is_wrong = rng.random(len(drawn_rows)) < world.true_rate[rank[drawn_rows]]
    failure = is_wrong.astype(np.int64)
    floor, threshold = certified_interval(uncertainty[drawn_rows], failure)
    start = int(np.searchsorted(world.claimed_rate, floor, side="right"))
    stop = int(np.searchsorted(world.claimed_rate, threshold, side="right"))
    if start == stop:
        return 0.0, 0.0
    return (stop - start) / len(RANKS), world.risk(start, stop)


def certified_interval(uncertainty: Floats, failure: Ints) -> tuple[float, float]:
    """Return the interval (floor, threshold) certified by the drawn labels.

    If there is none, both numbers are -inf.
    """
    nothing = (-math.inf, -math.inf)
    if not len(uncertainty):
        return nothing
    counts = tie_counts(uncertainty, failure)
    best = learn_then_test(counts, MAX_RISK, DELTA)
    return nothing if best is None else best.interval


def simulate(names: Iterable[str], n_draws: int) -> None:
    """Print a line for every world."""
    print("world | draws | broken | 95 % bound | accepted")
    for name in names:
        world = WORLDS[name]
        rng = np.random.default_rng(0)
        shares = []
        n_broken = 0
        for _ in range(n_draws):
            share, risk = simulate_draw(world, rng)
            shares.append(share)
            n_broken += risk > MAX_RISK
        bound = upper_bound(n_broken, n_draws, 0.05)
        broken = n_broken / n_draws
        print(
            f"{name} | {n_draws} | {broken:.4f} | {bound:.4f} | {np.mean(shares):.3f}", flush=True
        )


# Real embeddings.


@dataclass(frozen=True)
class DrawResult:
    """Results of a draw's certified interval, on the whole calibration side."""

    coverage: float
    risk: float


def test_rows(uncertainty: Floats, failure: Ints, rows: Ints) -> DrawResult:
    """Test the labels of ``rows`` (M,), drawn from all rows (N,) on the calibration side."""
    floor, threshold = certified_interval(uncertainty[rows], failure[rows])
    is_accepted = (uncertainty > floor) & (uncertainty <= threshold)
    if not is_accepted.any():
        return DrawResult(coverage=0.0, risk=0.0)
    coverage = float(is_accepted.mean())
    risk = float(failure[is_accepted].mean())
    return DrawResult(coverage, risk)


@dataclass(frozen=True)
class Fit:
    """A fit's tests: for every draw with labels up to the limit, and with uniform labels."""

    hindsight: float
    drawn: list[DrawResult]
    uniform: list[DrawResult]

    @classmethod
    def of(cls, path: Path, n_draws: int) -> Fit:
        """Draw labels ``n_draws`` times for a fit from a file."""
        with np.load(path) as arrays:
            of_fit = int(np.flatnonzero(arrays["n_fit"] == N_TO_FIT)[0])
            uncertainty = arrays["u"][of_fit]
            failure = arrays["wrong"][of_fit].astype(np.int64)
            is_calibration = arrays["cal"]
        limit, _ = choose_limit_of_draw(uncertainty[~is_calibration], N_LABELS, MAX_RISK, DELTA)
        uncertainty = uncertainty[is_calibration]
        failure = failure[is_calibration]
        drawn = []
        uniform = []
        for seed in range(n_draws):
            rng = np.random.default_rng(seed)
            order = rng.permutation(len(uncertainty))
            below = order[uncertainty[order] <= limit]
            drawn_below = test_rows(uncertainty, failure, below[:N_LABELS])
            drawn_anywhere = test_rows(uncertainty, failure, order[:N_LABELS])
            drawn.append(drawn_below)
            uniform.append(drawn_anywhere)
        hindsight = vilu.metrics.coverage_at_risk(uncertainty, failure, MAX_RISK)
        return cls(hindsight, drawn, uniform)


def mean_coverage(tests: Iterable[DrawResult]) -> float:
    """Average the coverage over tests."""
    return float(np.mean([test.coverage for test in tests]))


def n_broken(fits: Iterable[Fit], kind: Literal["drawn", "uniform"]) -> int:
    """Count tests with a risk above 5 % among the accepted answers."""
    return sum(test.risk > MAX_RISK for fit in fits for test in getattr(fit, kind))


def measure(folder: Path, n_draws: int) -> None:
    """Print a line for every set in a folder of fits."""
    by_set: dict[str, list[Fit]] = {}
    for path in sorted(folder.glob("*.npz")):
        name, _, _ = path.stem.rpartition("_")
        by_set.setdefault(name, []).append(Fit.of(path, n_draws))
    print("| set (fits × draws) | best in hindsight | uniform | drawn | difference | broken |")
    print("|---|---|---|---|---|---|")
    for name, fits in by_set.items():
        gains = [mean_coverage(fit.drawn) - mean_coverage(fit.uniform) for fit in fits]
        hindsight = float(np.mean([fit.hindsight for fit in fits]))
        uniform_coverages = [mean_coverage(fit.uniform) for fit in fits]
        drawn_coverages = [mean_coverage(fit.drawn) for fit in fits]
        uniform = float(np.mean(uniform_coverages))
        drawn = float(np.mean(drawn_coverages))
        print(
            f"| {name} ({len(fits)} × {n_draws}) | {hindsight:.1%} | {uniform:.1%} | {drawn:.1%} "
            f"| {np.mean(gains):+.1%} ± {half_width(np.array(gains)):.1%} "
            f"| {n_broken(fits, 'uniform')}, {n_broken(fits, 'drawn')} |"
        )


def half_width(values: Floats) -> float:
    """Return half the width of a mean's 95 % interval (t)."""
    n = len(values)
    if n < 2:
        return math.nan
    return float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / math.sqrt(n))


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate, or measure."""
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=summary)
    commands = parser.add_subparsers(dest="command", required=True)
    simulation = commands.add_parser("simulate")
    simulation.add_argument("--draws", type=int, default=10_000)
    simulation.add_argument("--worlds", nargs="+", default=list(WORLDS))
    measuring = commands.add_parser("measure")
    measuring.add_argument("folder", type=Path)
    measuring.add_argument("--draws", type=int, default=4)
    options = parser.parse_args(arguments)
    if options.command == "simulate":
        simulate(options.worlds, options.draws)
    else:
        measure(options.folder, options.draws)


if __name__ == "__main__":
    main()

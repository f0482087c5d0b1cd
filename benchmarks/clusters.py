"""Do guarantees hold on rows that come in clusters? ``python -m benchmarks.clusters``.

The worlds are simulated. The rows in a cluster have similar uncertainties. A row with uncertainty u
is wrong with probability P(u). With probability sqrt(rho) a draw for the whole cluster decides
whether the row is wrong, else a separate draw for the row. So the failures of two rows in a cluster
with equal u have the correlation rho. In the world "rising", P(u) is 0.7 u^6, and 10 % of all
answers are wrong. In "waves", the accepted rows' error rate crosses 5 % three times as the
threshold rises. In "flat", 5.1 % of the answers are wrong at every u, so every rule that accepts
rows is broken.

Every line summarises 500 calibrations at a 5 % risk and 95 % confidence. A rule is "broken" if the
true error rate among accepted rows is above 5 %. "rows" is ``vilu.certify``, with rows as
independent draws. "majority" and "ratio" are ``vilu.certify_clusters``. Intervals are exact 95 %
intervals.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import special

import vilu
from vilu.calibration.clusters import correlation, majority_outcomes
from vilu.calibration.thresholds import lower_bound, upper_bound
from vilu.metrics.counts import Floats, Ints

MAX_RISK = 0.05
DRAWS = 500
CORRELATIONS = (0.0, 0.1, 0.3, 0.6)

ALIKE = 0.8
"""Correlation between uncertainties in a cluster, before they become uniform numbers."""

TRUTH_CLUSTERS = 40_000
"""Number of clusters that give the true error rate for majority answers."""

WAVES = ((0.3, 0.02), (0.5, 0.15), (0.8, 0.0), (1.0, 0.5))
"""The steps of P(u) in the world "waves": the end of each step, and P(u) on the step."""

FLAT = 0.051
"""P(u) in the world "flat"."""


@dataclass(frozen=True)
class World:
    """Clusters with ``fewest`` to ``most`` rows, where all sizes are equally likely."""

    name: str
    n_clusters: int
    fewest: int
    most: int

    def wrong_probability(self, uncertainty: Floats) -> Floats:
        """Compute P(u) for uncertainties (N,)."""
        if self.name == "rising":
            probability: Floats = 0.7 * uncertainty**6
            return probability
        if self.name == "flat":
            return np.full(len(uncertainty), FLAT)
        ends, values = np.array(WAVES).T
        steps: Floats = values[np.searchsorted(ends, uncertainty)]
        return steps

    def risk(self, threshold: float) -> float:
        """Compute the true error rate for rows with an uncertainty of at most ``threshold``."""
        grid = np.linspace(0, threshold, 20_001)
        middle = (grid[1:] + grid[:-1]) / 2  # every uncertainty in [0, 1] is equally likely
        probability = self.wrong_probability(middle)
        return float(probability.mean())

    def draw(
        self, random: np.random.Generator, rho: float, n_clusters: int
    ) -> tuple[Floats, Ints, Ints]:
        """Draw rows. Return uncertainty (N,), failure (N,) and cluster index (N,)."""
        size = random.integers(self.fewest, self.most + 1, size=n_clusters)
        index = np.arange(n_clusters)
        cluster = np.repeat(index, size)
        n = len(cluster)
        of_cluster = random.standard_normal(n_clusters)[cluster]
        of_row = random.standard_normal(n)
        normal = np.sqrt(ALIKE) * of_cluster + np.sqrt(1 - ALIKE) * of_row
        uncertainty = special.ndtr(normal)
        shares_fate = random.random(n) < np.sqrt(rho)
        fate_of_cluster = random.random(n_clusters)[cluster]
        fate_of_row = random.random(n)
        fate = np.where(shares_fate, fate_of_cluster, fate_of_row)
        is_wrong = fate < self.wrong_probability(uncertainty)
        failure = is_wrong.astype(np.int64)
        return uncertainty, failure, cluster


WORLDS = (
    World("rising", n_clusters=400, fewest=10, most=10),
    World("rising", n_clusters=400, fewest=1, most=5),
    World("rising", n_clusters=100, fewest=40, most=40),
    World("waves", n_clusters=1_500, fewest=3, most=3),
    World("flat", n_clusters=400, fewest=10, most=10),
    World("rising", n_clusters=600, fewest=10, most=30),
)


class MajorityRisk:
    """True error rate of the majority answers, estimated from many clusters."""

    def __init__(self, world: World, rho: float, seed: int) -> None:
        random = np.random.default_rng(seed)
        uncertainty, failure, cluster = world.draw(random, rho, TRUTH_CLUSTERS)
        names = [str(index) for index in cluster]
        rows = vilu.Outcomes(uncertainty, failure)
        clusters = majority_outcomes(rows, names)
        order = np.argsort(clusters.uncertainty)
        self.uncertainty = clusters.uncertainty[order]
        self.n_wrong = np.cumsum(clusters.failure[order])

    def __call__(self, threshold: float) -> float:
        """Return the error rate among clusters with a score of at most ``threshold``."""
        n_accepted = int(np.searchsorted(self.uncertainty, threshold, side="right"))
        return float(self.n_wrong[n_accepted - 1] / n_accepted)


@dataclass
class Tally:
    """Results for a kind of calibration."""

    broken: int = 0
    nothing: int = 0
    coverage: float = 0.0

    def add(self, rule: vilu.Rule, true_risk: float) -> None:
        """Count a calibration."""
        self.nothing += not rule.feasible
        self.coverage += rule.coverage
        self.broken += rule.feasible and true_risk > MAX_RISK

    def in_words(self, draws: int) -> str:
        """Format the shares of the calibrations, and the mean accepted share."""
        low = lower_bound(self.broken, draws, 0.025)
        high = upper_bound(self.broken, draws, 0.025)
        return (
            f"broken {self.broken / draws:.1%} ({low:.1%} to {high:.1%}), nothing accepted "
            f"{self.nothing / draws:.1%}, accepts {self.coverage / draws:.1%}"
        )


WAYS = ("rows", "majority", "ratio")
"""Kinds of calibration, named for the unit that is drawn or the risk that is bounded."""


class Simulation:
    """Calibrations in a world with a given correlation."""

    def __init__(self, world: World, rho: float, seed: int) -> None:
        self.world = world
        self.rho = rho
        self.random = np.random.default_rng(seed)
        self.majority_risk = MajorityRisk(world, rho, seed + 1)
        self.tallies = {way: Tally() for way in WAYS}
        self.correlations: list[float] = []

    def run(self, draws: int) -> None:
        """Calibrate ``draws`` times, and count the results."""
        for _ in range(draws):
            self._calibrate()

    def _calibrate(self) -> None:
        world = self.world
        uncertainty, failure, cluster = world.draw(self.random, self.rho, world.n_clusters)
        outcomes = vilu.Outcomes(uncertainty, failure)
        names = [str(index) for index in cluster]
        rows = vilu.certify(outcomes, max_risk=MAX_RISK)
        risk_of_rows = world.risk(rows.threshold or 0.0)
        self.tallies["rows"].add(rows, risk_of_rows)
        accepted = rows.accept(uncertainty)
        correlation_of_accepted = correlation(failure[accepted], cluster[accepted])
        self.correlations.append(correlation_of_accepted.value)
        majority = vilu.certify_clusters(outcomes, names, "majority", max_risk=MAX_RISK)
        true_risk = 0.0
        if majority.threshold is not None:
            true_risk = self.majority_risk(majority.threshold)
        self.tallies["majority"].add(majority, true_risk)
        ratio = vilu.certify_clusters(
            outcomes, names, "ratio", max_risk=MAX_RISK, largest=world.most
        )
        risk_of_ratio = world.risk(ratio.threshold or 0.0)
        self.tallies["ratio"].add(ratio, risk_of_ratio)

    def lines(self, draws: int) -> Iterator[str]:
        """Yield a line for the world, then a line for each kind of calibration."""
        world = self.world
        sizes = f"{world.n_clusters} clusters of {world.fewest} to {world.most} rows"
        among = f"among accepted rows {np.nanmean(self.correlations):.2f} (mean)"
        yield f"{world.name}, {sizes}, correlation {self.rho}: {among}"
        for way, tally in self.tallies.items():
            yield f"  {way}: {tally.in_words(draws)}"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="Whether guarantees hold on clusters.")
    parser.add_argument("--world", type=int, choices=range(len(WORLDS)))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draws", type=int, default=DRAWS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    worlds = WORLDS if options.world is None else WORLDS[options.world : options.world + 1]
    for world in worlds:
        for rho in CORRELATIONS:
            simulation = Simulation(world, rho, options.seed)
            simulation.run(options.draws)
            lines = simulation.lines(options.draws)
            print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()

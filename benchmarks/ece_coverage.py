"""Does the interval of the ECE contain the truth as often as the nominal confidence?

    python -m benchmarks.ece_coverage [--streams 500] [--percentile]

The failure rate of each predictor is known at every stated probability. Some predictors are
calibrated, with a true error of 0. Some are not. Test sets have four sizes, and bins are
of both kinds. For each case a line has the truth, the mean estimate, how often the interval is
above and below the truth, and the interval's mean width. With ``--percentile``, the intervals are
percentiles of resampled rows, for comparison.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import special

from vilu.metrics.bootstrap import bootstrap_interval
from vilu.metrics.counts import Floats, TieCounts, tie_counts
from vilu.metrics.reliability import BinnedError, Binning, ece_kernel

SIZES = (60, 180, 1000, 10_000)
MANY = 1_000_000


class World(NamedTuple):
    """The probabilities stated by a predictor, and the failure rate at each stated probability."""

    draw: Callable[[np.random.Generator, int], Floats]
    rate: Callable[[Floats], Floats]


def _beta(a: float, b: float) -> Callable[[np.random.Generator, int], Floats]:
    return lambda rng, n: rng.beta(a, b, n).clip(1e-6, 1 - 1e-6)


def _moved(slope: float, shift: float) -> Callable[[Floats], Floats]:
    return lambda p: np.asarray(special.expit(slope * special.logit(p) + shift))


WORLDS = {
    "calibrated, uniform": World(_beta(1, 1), lambda p: p),
    "calibrated, mostly low": World(_beta(0.5, 2), lambda p: p),
    "calibrated, failures rare": World(_beta(0.3, 10), lambda p: p),
    "a little too low": World(_beta(0.7, 1.3), _moved(1, 0.3)),
    "far too low": World(_beta(0.7, 1.3), _moved(1, 1)),
    "a little too sure": World(_beta(0.7, 1.3), _moved(0.7, 0)),
    "far too sure": World(_beta(0.3, 0.5), _moved(0.3, 0)),
    "wavy": World(_beta(1, 1), lambda p: (p + 0.06 * np.sin(40 * p)).clip(0, 1)),
    "one number, wrong by 0.1": World(
        lambda rng, n: np.full(n, 0.3),  # noqa: ARG005
        lambda p: np.full(len(p), 0.4),
    ),
}


class Plain:
    """The ECE as a kernel without a special interval, so that rows are resampled."""

    def __init__(self, binning: Binning) -> None:
        self.binning = binning

    def __call__(self, counts: TieCounts) -> Floats:
        """Compute the error for each sample in ``counts``."""
        return ece_kernel(counts, binning=self.binning)


@dataclass(frozen=True)
class Coverage:
    """Shares of test sets with an interval that misses the truth, and means over all test sets."""

    truth: float
    estimate: float
    above: float
    below: float
    width: float

    def __str__(self) -> str:
        return (
            f"truth {self.truth:6.2%}, estimate {self.estimate:6.2%}, "
            f"interval above {self.above:5.1%}, "
            f"below {self.below:5.1%}, width {self.width:6.2%}"
        )


def truth_of(world: World, binning: Binning, seed: int = 0) -> float:
    """Compute the error on a million rows, with the failure rates in place of failures."""
    rng = np.random.default_rng(seed)
    drawn = world.draw(rng, MANY)
    p = np.sort(drawn)
    if binning == "width":
        edges = np.arange(1, 15) / 15
        index = np.searchsorted(edges, p)
    else:
        first = np.searchsorted(p, p)  # equal probabilities get the same index, and so one bin
        index = first * 15 // MANY
    excess = world.rate(p) - p
    excess_of_bin = np.bincount(index, weights=excess, minlength=15)
    error_of_bin = np.abs(excess_of_bin)
    return float(error_of_bin.sum() / MANY)


def coverage_of(
    world: World,
    binning: Binning,
    n: int,
    streams: int,
    *,
    draws: int = 500,
    percentile: bool = False,
) -> Coverage:
    """Evaluate the intervals of ``streams`` test sets with n rows."""
    truth, rng = truth_of(world, binning), np.random.default_rng([n, streams])
    kernel = BinnedError(binning=binning)
    plain = Plain(binning)
    ends = np.empty((streams, 3))
    for stream in range(streams):
        p = world.draw(rng, n)
        failure = (rng.random(n) < world.rate(p)).astype(int)
        if percentile:
            ends[stream] = bootstrap_interval(plain, p, failure, n_resamples=draws)
        else:
            counts = tie_counts(p, failure)
            ends[stream] = kernel(counts), *kernel.interval(counts, draws, 0.95, stream)
    estimate, low, high = ends.T
    return Coverage(
        truth,
        float(estimate.mean()),
        float((truth < low - 1e-12).mean()),
        float((truth > high + 1e-12).mean()),
        float((high - low).mean()),
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ece_coverage")
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--percentile", action="store_true")
    given = parser.parse_args()
    binnings: tuple[Binning, ...] = ("width", "mass")
    for binning in binnings:
        for name, world in WORLDS.items():
            for n in SIZES:
                found = coverage_of(world, binning, n, given.streams, percentile=given.percentile)
                print(f"{binning:<6}{name:<28}{n:>7,}  {found}", flush=True)


if __name__ == "__main__":
    main()

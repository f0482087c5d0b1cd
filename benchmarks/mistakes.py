"""Do floors help against confident mistakes? ``python -m benchmarks.mistakes build/chains``.

The population are all rows of a set, with the scores of ``vilu_plus`` after the last fit in a chain
(``python -m benchmarks.procedures chains``). *Mistakes*: 4 % of all answers are made wrong, and all
of these are among the most trusted tenth, or the most trusted 30 %. A few were wrong before.
Calibration rows are drawn with replacement, so the true risk is known. ``ltt`` is run twice on the
same rows, without floors and with the floors for this row count. The output has a line per set and
kind of mistakes: the mean accepted share of the population, and the share of draws whose true risk
is above the target.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple
from unittest import mock

import numpy as np

from benchmarks.procedures import chain_paths
from vilu.calibration import thresholds
from vilu.metrics.counts import Floats, Ints, tie_counts

DELTA: Final = 0.05
SHARE_OF_MISTAKES: Final = 0.04
MISTAKES_AMONG: Final = (None, 0.1, 0.3)
"""The mistakes are among this share of the answers, the most trusted ones. None: no mistakes."""

WITHOUT_FLOORS: Final = thresholds.FLOOR_PLANS[-1:]


class Measured(NamedTuple):
    """Means over draws: the accepted share of the population, and whether the risk is too high."""

    accepted: float
    broken: float


def with_mistakes(uncertainty: Floats, failure: Ints, among: float | None, seed: int) -> Ints:
    """Return the labels (N,) with mistakes among the most trusted answers."""
    if among is None:
        return failure
    n = len(uncertainty)
    trusted = np.argsort(uncertainty, kind="stable")[: int(among * n)]
    rng = np.random.default_rng([seed, 1])
    mistakes = rng.permutation(trusted)[: int(SHARE_OF_MISTAKES * n)]
    labels = failure.copy()
    labels[mistakes] = 1
    return labels


def measure(
    uncertainty: Floats, failure: Ints, n_rows: int, n_draws: int, max_risk: float
) -> Measured:
    """Calibrate on ``n_rows`` rows again and again, and measure on the population (N,)."""
    rng = np.random.default_rng(0)
    accepted = []
    broken = []
    for _ in range(n_draws):
        rows = rng.integers(len(uncertainty), size=n_rows)
        counts = tie_counts(uncertainty[rows], failure[rows])
        threshold = thresholds.learn_then_test(counts, max_risk, DELTA)
        if threshold is None:
            accepted.append(0.0)
            broken.append(False)
            continue
        low, high = threshold.interval
        is_accepted = (uncertainty > low) & (uncertainty <= high)
        accepted.append(float(is_accepted.mean()))
        broken.append(bool(failure[is_accepted].mean() > max_risk))
    return Measured(float(np.mean(accepted)), float(np.mean(broken)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line per set and kind of mistakes."""
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--max-risk", type=float, default=0.05)
    options = parser.parse_args(arguments)
    print("chain | mistakes among | accepted without / with floors | broken without / with floors")
    for path in chain_paths(options.folder):
        with np.load(path) as arrays:
            uncertainty = arrays["u"][-1]
            failure = arrays["wrong"][-1].astype(np.int64)
        for among in MISTAKES_AMONG:
            labels = with_mistakes(uncertainty, failure, among, seed=0)
            settings = (options.rows, options.draws, options.max_risk)
            with_floors = measure(uncertainty, labels, *settings)
            with mock.patch.object(thresholds, "FLOOR_PLANS", WITHOUT_FLOORS):
                without = measure(uncertainty, labels, *settings)
            print(
                f"{path.stem} | {among} | {without.accepted:.3f} / {with_floors.accepted:.3f} | "
                f"{without.broken:.3f} / {with_floors.broken:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()

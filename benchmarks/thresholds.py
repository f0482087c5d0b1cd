"""At which thresholds fixed-sequence testing should start: ``python -m benchmarks.thresholds``.

The output has the certified threshold's mean coverage over 150 calibrations for seven simulated
predictors, with several lists of starts. A start is a share of the calibration rows, with a share
of delta. The same list must suit all predictors: some have wrong answers among the most trusted
answers, some reach the target at a small coverage only, and some at full coverage. vilu uses
``START_SHARES`` and ``LARGEST_SHARE_AT_ALL_ROWS`` from ``vilu.calibration.thresholds``.
"""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import numpy as np
from scipy import special

from vilu.calibration import thresholds
from vilu.metrics.counts import Floats, tie_counts

DRAWS, DELTA = 150, 0.05
Rate = Callable[[Floats], Floats]

PREDICTORS: dict[str, Rate] = {
    "even": lambda u: u**2,
    "steep": lambda u: 0.015 + 0.98 * special.expit(12 * (u - 0.6)),
    "unlucky top": lambda u: np.where(u < 0.02, 0.3, 0.02 + 0.6 * np.clip(u - 0.3, 0, 1)),
    "weak": lambda u: 0.03 + 0.5 * u,
    "easy": lambda u: 0.02 + 0.05 * u**2,
    "flat": lambda u: np.full_like(u, 0.03),
    "tied": lambda u: 0.01 + 0.9 * (np.floor(10 * u) / 10) ** 1.3,
}
"""Function from the uncertainty quantile u to the failure rate."""

SEQUENCE_SETTINGS = {
    "where possible": (((0.0, 1.0),), 0.0),
    "1/4": (((1 / 4, 1.0),), 0.0),
    "1/16, 1/4": (((1 / 16, 0.5), (1 / 4, 0.5)), 0.0),
    "1/8, 1/2": (((1 / 8, 0.5), (1 / 2, 0.5)), 0.0),
    "1/16, 1/4, all": (thresholds.START_SHARES, thresholds.LARGEST_SHARE_AT_ALL_ROWS),
    "even weights": (((1 / 16, 0.5), (1 / 4, 0.5)), 1 / 3),
}
"""``START_SHARES``, and ``LARGEST_SHARE_AT_ALL_ROWS``."""


def mean_coverage(rate: Rate, *, tied: bool, n: int, max_risk: float) -> float:
    """Return the thresholds' mean coverage over many calibrations."""
    rng, coverages = np.random.default_rng(0), []
    for _ in range(DRAWS):
        u = rng.random(n)
        is_wrong = rng.random(n) < rate(u)
        failure = is_wrong.astype(int)
        counts = tie_counts(np.floor(10 * u) if tied else u, failure)
        threshold = thresholds.learn_then_test(counts, max_risk, DELTA)
        coverages.append(0.0 if threshold is None else threshold.coverage)
    return float(np.mean(coverages))


def main() -> None:
    """Print a line per predictor, size and target."""
    print(
        f"{'predictor':12} {'rows':>6} {'risk':>5}  "
        + "  ".join(f"{name:>15}" for name in SEQUENCE_SETTINGS)
    )
    for name, rate in PREDICTORS.items():
        for n in (100, 400, 2000, 10_000):
            for max_risk in (0.05, 0.1):
                cells = []
                for starts, whole in SEQUENCE_SETTINGS.values():
                    with mock.patch.multiple(
                        thresholds, START_SHARES=starts, LARGEST_SHARE_AT_ALL_ROWS=whole
                    ):
                        coverage = mean_coverage(rate, tied=name == "tied", n=n, max_risk=max_risk)
                    cells.append(coverage)
                print(
                    f"{name:12} {n:6} {max_risk:5.2f}  "
                    + "  ".join(f"{cell:15.3f}" for cell in cells),
                    flush=True,
                )


if __name__ == "__main__":
    main()

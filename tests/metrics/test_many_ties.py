"""Test a hundred million equal scores as counts.

``python -m tests.metrics.test_many_ties`` runs them as rows.
"""

from __future__ import annotations

import math
import sys
import time

import numpy as np
import pytest

from vilu import metrics
from vilu.metrics.catalog import METRICS
from vilu.metrics.counts import TieCounts, tie_counts

N = 10**8
EXPECTED = {"auroc": 0.5, "aurc": 0.1, "fpr95": 0.95, "aupr_success": 0.9, "aupr_failure": 0.1}
EXPECTED["excess_aurc"] = 0.1 - (
    0.1 + 0.9 * math.log(0.9)
)  # Geifman et al. (2019): the best curve with 10 % wrong answers


def test_a_hundred_million_equal_scores_as_counts() -> None:
    """No product of two counts may overflow int64.

    All equal scores are one operating point, so the curves are straight.
    """
    few, many = (
        TieCounts(np.array([0.3]), *(np.array([n * k]) for k in (9, 1))) for n in (10_000, N // 10)
    )
    for name, metric in METRICS.items():
        value = float(metric.kernel(many))
        assert value == pytest.approx(float(metric.kernel(few)), rel=1e-3, nan_ok=True), name
        assert name not in EXPECTED or value == pytest.approx(EXPECTED[name], rel=1e-6), name


def test_blocks_of_rows_have_the_counts_of_the_whole() -> None:
    rng = np.random.default_rng(0)
    scores, failure = rng.integers(40, size=1_000) / 40, rng.integers(2, size=1_000)
    whole = tie_counts(scores, failure)
    parts = tie_counts(scores, failure, block_rows=64)
    for name in ("value", "correct", "wrong"):
        assert np.array_equal(getattr(parts, name), getattr(whole, name))
        assert getattr(parts, name).dtype == getattr(whole, name).dtype


if __name__ == "__main__":
    import resource

    scores, failure = np.full(N, 0.3), np.zeros(N)
    failure[::10] = 1
    given = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in ("auroc", "aurc", "ece"):
        start = time.monotonic()
        value = getattr(metrics, name)(scores, failure)
        more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - given) / 2**20
        said = (
            f"{name}: {value:.6f}, {time.monotonic() - start:.1f} s, {more:.2f} GiB more at most\n"
        )
        sys.stdout.write(said)

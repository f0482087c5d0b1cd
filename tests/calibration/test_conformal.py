"""Test online conformal p-values, against hand-worked numbers and brute force."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from vilu.calibration.monitor.martingale import ReferenceValues, count_in_earlier_values


def brute(before: list[float], values: list[float], uniform: list[float]) -> list[float]:
    """Return the p-values from their definition, one row at a time."""
    seen, found = list(before), []
    for value, u in zip(values, uniform, strict=True):
        greater, equal = sum(x > value for x in seen), sum(x == value for x in seen)
        found.append((greater + u * (equal + 1)) / (len(seen) + 1))
        seen.append(value)
    return found


def test_worked_by_hand() -> None:
    """The calibration values are 1, 2, 2 and 4. Then 2, 5 and 2 arrive, with U = 1/2."""
    reference = ReferenceValues.of(np.array([1.0, 2.0, 2.0, 4.0]))
    p = reference.p_values(np.array([2.0, 5.0, 2.0]), np.full(3, 0.5))
    # First value: one of 4 is greater and two are equal, so p = (1 + 3/2) / 5. Second value: none
    # is greater, so p = (1/2) / 6. Third value: two of 6 are greater and three are equal, so p = (2
    # + 4/2) / 7.
    assert p.tolist() == pytest.approx([2.5 / 5, 0.5 / 6, 4 / 7], abs=1e-15)


@pytest.mark.parametrize("ties", [0, 1, 5])
def test_batches_of_any_size_equal_brute_force(ties: int) -> None:
    rng = np.random.default_rng(ties)
    values = rng.normal(size=230).round(ties) if ties < 5 else rng.normal(size=230)
    uniform = rng.random(200)
    expected = brute(values[:30].tolist(), values[30:].tolist(), uniform.tolist())
    for size in (1, 7, 64, 200):
        reference = ReferenceValues.of(values[:30])
        parts = [
            reference.p_values(values[30 + i : 30 + i + size], uniform[i : i + size])
            for i in range(0, 200, size)
        ]
        assert np.concatenate(parts).tolist() == pytest.approx(expected, abs=1e-15)
        assert reference.n == 230
        distinct, counts = np.unique(values, return_counts=True)
        table = reference.value_counts()
        assert np.array_equal(table[0], distinct)
        assert np.array_equal(table[1], counts)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 31, 32, 33, 100])
def test_counts_of_earlier_values(n: int) -> None:
    values = np.random.default_rng(n).integers(0, 8, n).astype(float)
    greater, equal = count_in_earlier_values(values)
    assert greater.tolist() == [int((values[:i] > values[i]).sum()) for i in range(n)]
    assert equal.tolist() == [int((values[:i] == values[i]).sum()) for i in range(n)]


def test_sorted_runs_stay_few() -> None:
    """A thousand single additions must leave about log2(1000) sorted runs, so that a look-up stays
    cheap.
    """
    reference = ReferenceValues()
    for value in np.random.default_rng(0).random(1000):
        reference.p_values(np.array([value]), np.array([0.5]))
    assert len(reference.runs) <= 11
    assert [len(run) for run in reference.runs] == sorted(
        (len(run) for run in reference.runs), reverse=True
    )


def test_uniform_and_independent_under_exchangeability_even_with_ties() -> None:
    """If rows are exchangeable, two neighbouring p-values must be independent and uniform.

    The p-values come from many short streams.
    """
    rng = np.random.default_rng(1)
    pairs = []
    for _ in range(2000):
        values = rng.integers(0, 3, 8).astype(float)
        pairs.append(ReferenceValues.of(values[:6]).p_values(values[6:], rng.random(2)))
    first, second = np.array(pairs).T
    assert stats.kstest(first, "uniform").pvalue > 1e-3
    assert stats.kstest(second, "uniform").pvalue > 1e-3
    table = np.histogram2d(first, second, bins=4, range=[(0, 1), (0, 1)])[0]
    assert stats.chisquare(table.ravel()).pvalue > 1e-3


def test_p_values_against_a_fixed_reference_are_not_independent() -> None:
    """If the reference has 6 fixed rows, a stream's p-values depend on each other.

    So the reference must grow.
    """
    rng = np.random.default_rng(2)
    first, second = [], []
    for _ in range(2000):
        values = rng.random(8)
        reference = values[:6]
        for found, value in ((first, values[6]), (second, values[7])):
            found.append(
                ReferenceValues.of(reference).p_values(np.array([value]), rng.random(1))[0]
            )
    assert stats.pearsonr(first, second).pvalue < 1e-6

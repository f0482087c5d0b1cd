"""A monitor's state between batches: the tests with the evidence so far, and the saved form."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Final, Literal, Self

import numpy as np
from pydantic import Field, FiniteFloat, model_validator

from vilu.artifacts.documents import FrozenModel
from vilu.calibration.monitor.audit import TestName
from vilu.calibration.monitor.martingale import (
    HISTOGRAM_SETTINGS,
    WEALTH_SHARES,
    Martingale,
    ReferenceValues,
)
from vilu.calibration.monitor.status import Test
from vilu.metrics.counts import Floats, Ints

LEVEL_PARTS: Final[dict[TestName, int]] = {
    "scores": 2,
    "acceptance": 1,
    "answers": 1,
    "audit": 1,
    "outside": 1,
    "review": 1,
}
"""How many parts of the false-alarm probability each test gets.

A test with p parts gets the share p / s, where s is the sum of the parts over all tests in use. So
unused tests take nothing.
"""


@dataclass
class ShiftTest:
    """Test for exchangeable values, with the evidence so far. Every row has a single value."""

    test: Test
    reference: ReferenceValues  # the values for calibration rows, and for all tested rows
    martingale: Martingale = field(default_factory=Martingale)  # bets on the tested rows

    def update(self, values: Floats, row_numbers: Ints, seed: int) -> None:
        """Test the next values (B,), in the rows numbered ``row_numbers`` (B,).

        ``seed`` is the seed for the random numbers that break ties.
        """
        test_number = list(LEVEL_PARTS).index(self.test.name)
        generator = np.random.PCG64([seed, test_number])
        # A value's random number does not depend on how values are divided into batches. Otherwise
        # the evidence would depend on the division, and a user could choose a division with a
        # convenient result.
        generator.advance(self.martingale.n)
        rng = np.random.Generator(generator)
        uniform_numbers = rng.random(len(values))
        p = self.reference.p_values(values, uniform_numbers)
        log_wealth = self.martingale.update(p)
        self.test = self.test.after(log_wealth, row_numbers)

    def with_saved_state(
        self, test: Test, wealth: Wealth | None, values: Floats, counts: Ints, n_tested: int
    ) -> ShiftTest:
        """Return this test after ``n_tested`` tested rows, from saved parts.

        Raises a ValueError if the saved values do not belong to ``n_tested`` rows.

        Args:
            test: The saved test.
            wealth: The saved wealth. None before the first row.
            values: Distinct values in the reference.
            counts: How often each value occurs.
            n_tested: Number of tested rows. Calibration rows do not count.
        """
        martingale = Martingale()
        if wealth is not None:
            martingale = wealth.martingale()
        reference = ReferenceValues.of(values, counts)
        n_expected = self.reference.n + n_tested
        has_valid_values = bool(np.isfinite(values).all() and (counts >= 1).all())
        if not has_valid_values or reference.n != n_expected:
            raise ValueError(f"{test.name} must hold {n_expected} numbers")
        if martingale.n != n_tested:
            raise ValueError(f"{test.name} has bet on {martingale.n} rows")
        return ShiftTest(test, reference, martingale)


Count = Annotated[int, Field(ge=0)]
"""Type for a field with a number of rows, answers or hashes."""

NumberPerBet = Annotated[
    tuple[FiniteFloat, ...], Field(min_length=len(WEALTH_SHARES), max_length=len(WEALTH_SHARES))
]
"""Type for a field with one number for each bet."""

CellCounts = tuple[Annotated[FiniteFloat, Field(ge=0)], ...]
"""Counts of p-values in a histogram's cells. Earlier p-values have a smaller weight."""


class Wealth(FrozenModel):
    """Saved form of a ``Martingale`` with at least one row.

    The fields are named like the attributes of ``Martingale``, where L_t is defined.
    """

    n: Annotated[int, Field(ge=1)]  # number of rows so far
    growth: NumberPerBet  # each bet's L_t: the sum of its log densities over all rows
    started: NumberPerBet  # each bet's log sum_s share_s exp(-L_{s-1}), over its starts s
    counts: tuple[CellCounts, ...]  # for each histogram bet

    @classmethod
    def of(cls, martingale: Martingale) -> Wealth | None:
        """Return a martingale's saved form, or None before the first row."""
        if not martingale.n:
            return None
        return cls(
            n=martingale.n,
            growth=tuple(martingale.growth.tolist()),
            started=tuple(martingale.started.tolist()),
            counts=tuple(tuple(cells.tolist()) for cells in martingale.counts),
        )

    def martingale(self) -> Martingale:
        """Return the saved martingale."""
        growth = np.array(self.growth)
        started = np.array(self.started)
        counts = [np.array(cells) for cells in self.counts]
        return Martingale(n=self.n, growth=growth, started=started, counts=counts)

    @model_validator(mode="after")
    def _check_cells(self) -> Self:
        n_cells_saved = [len(cells) for cells in self.counts]
        n_cells_expected = [n_cells for n_cells, _ in HISTOGRAM_SETTINGS]
        if n_cells_saved != n_cells_expected:
            raise ValueError("the histograms have other cells")
        return self


class State(FrozenModel):
    """Monitor state without the calibration and without the monitored values."""

    kind: Literal["monitor"] = "monitor"
    fingerprint: str  # ``Monitor.fingerprint``, a digest over the calibration and the settings
    rows: Count  # number of monitored rows
    unscored: Count  # number of monitored rows without an uncertainty
    accepted: Count  # number of accepted rows among the monitored rows
    tests: tuple[Test, ...]
    wealth: dict[str, Wealth | None]  # by test, for each ``ShiftTest``, None before the first row
    audited: tuple[Count, Count]  # how many answers were audited, and how many were wrong
    remembered: tuple[Count, Count]  # how many hashes there are for rows, and for labels
    # for each rate: the row count, and the count of rows with the event, such as a review
    counted: dict[str, tuple[Count, Count]]

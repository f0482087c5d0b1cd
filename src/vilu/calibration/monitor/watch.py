"""State of a monitor between batches: its tests with their evidence, and how they are saved."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Final, Literal, Self

import numpy as np
from pydantic import Field, FiniteFloat, model_validator

from vilu.artifacts.documents import Model
from vilu.calibration.monitor.audit import TestName
from vilu.calibration.monitor.martingale import HISTOGRAMS, SHARES, Martingale, Reference
from vilu.calibration.monitor.status import Test
from vilu.metrics.counts import Floats, Ints

PARTS: Final[dict[TestName, int]] = {
    "scores": 2,
    "acceptance": 1,
    "answers": 1,
    "audit": 1,
    "outside": 1,
    "review": 1,
}
"""Parts of the probability of a false alarm that a test gets.

A test with p parts gets the share p / s, where s is the sum of the parts of all tests in use. So
unused tests take nothing.
"""


@dataclass
class Watch:
    """Test of whether one number per row stays exchangeable, with its evidence so far."""

    test: Test
    reference: Reference
    martingale: Martingale = field(default_factory=Martingale)

    def update(self, values: Floats, rows: Ints, seed: int) -> None:
        """Test the next values (B,) of the rows with the numbers ``rows`` (B,)."""
        generator = np.random.PCG64([seed, list(PARTS).index(self.test.name)])
        # Every value has its own random number, however the values are divided into batches.
        # Otherwise the evidence would depend on the division, and a user could choose a division
        # with a convenient result.
        generator.advance(self.martingale.n)
        uniform = np.random.Generator(generator).random(len(values))
        p = self.reference.p_values(values, uniform)
        self.test = self.test.after(self.martingale.update(p), rows)

    def resumed(
        self, test: Test, wealth: Wealth | None, values: Floats, counts: Ints, n: int
    ) -> Watch:
        """This watch as it was after n rows, from its saved parts.

        Raises a ValueError if the values are not those of n rows.

        Args:
            test: The saved test.
            wealth: The saved wealth; None before the first row.
            values: Distinct values of the reference.
            counts: How often each of the values occurred.
            n: Number of rows after the calibration rows.
        """
        martingale = Martingale()
        if wealth is not None:
            martingale = wealth.martingale()
        reference = Reference.of(values, counts)
        n_expected = self.reference.n + n
        are_valid = bool(np.isfinite(values).all() and (counts >= 1).all())
        if not are_valid or reference.n != n_expected:
            raise ValueError(f"{test.name} must hold {n_expected} numbers")
        if martingale.n != n:
            raise ValueError(f"{test.name} has bet on {martingale.n} rows")
        return Watch(test, reference, martingale)


# Types of fields: a number of rows, answers or hashes; and one number for every bet.
Count = Annotated[int, Field(ge=0)]
Bets = Annotated[tuple[FiniteFloat, ...], Field(min_length=len(SHARES), max_length=len(SHARES))]


class Wealth(Model):
    """Saved form of a ``Martingale`` that has at least one row, with its fields."""

    n: Annotated[int, Field(ge=1)]
    growth: Bets
    started: Bets
    counts: tuple[tuple[Annotated[FiniteFloat, Field(ge=0)], ...], ...]

    @classmethod
    def of(cls, martingale: Martingale) -> Wealth | None:
        """The saved form of a martingale; None before its first row."""
        if not martingale.n:
            return None
        return cls(
            n=martingale.n,
            growth=tuple(martingale.growth.tolist()),
            started=tuple(martingale.started.tolist()),
            counts=tuple(tuple(cells.tolist()) for cells in martingale.counts),
        )

    def martingale(self) -> Martingale:
        """The martingale with these numbers."""
        return Martingale(
            n=self.n,
            growth=np.array(self.growth),
            started=np.array(self.started),
            counts=[np.array(cells) for cells in self.counts],
        )

    @model_validator(mode="after")
    def _check_cells(self) -> Self:
        n_cells_saved = [len(cells) for cells in self.counts]
        n_cells_expected = [n_cells for n_cells, _ in HISTOGRAMS]
        if n_cells_saved != n_cells_expected:
            raise ValueError("the histograms have other cells")
        return self


class State(Model):
    """State of a monitor without its calibration and without the monitored values."""

    kind: Literal["monitor"] = "monitor"
    fingerprint: str  # of the monitor: its calibration and settings
    rows: Count  # number of rows monitored
    unscored: Count  # number of these rows without an uncertainty
    accepted: Count  # number of these rows that are accepted
    tests: tuple[Test, ...]
    wealth: dict[str, Wealth | None]  # for every ``Watch``; None before its first row
    audited: tuple[Count, Count]  # numbers of audited answers, and of wrong ones among them
    remembered: tuple[Count, Count]  # number of hashes of rows, and number of hashes of labels
    # for every rate: number of all rows, and number of the rows that the rate counts
    counted: dict[str, tuple[Count, Count]]

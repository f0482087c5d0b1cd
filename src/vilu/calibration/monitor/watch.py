"""What a monitor keeps between rows: its tests with their evidence, and the document of all of it."""

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
"""Parts of the probability of a false alarm; those of tests that do not run go to the others."""


@dataclass
class Watch:
    """A test of whether one number per row stays exchangeable."""

    test: Test
    reference: Reference
    martingale: Martingale = field(default_factory=Martingale)

    def update(self, values: Floats, rows: Ints, seed: int) -> None:
        """Take in the next values (B,), which are of these rows of the stream."""
        generator = np.random.PCG64([seed, list(PARTS).index(self.test.name)])
        generator.advance(
            self.martingale.n
        )  # one draw a value: batches of any size see the same numbers
        uniform = np.random.Generator(generator).random(len(values))
        self.test = self.test.after(
            self.martingale.update(self.reference.p_values(values, uniform)), rows
        )

    def resumed(
        self, test: Test, wealth: Wealth | None, values: Floats, counts: Ints, n: int
    ) -> Watch:
        """The same after n rows."""
        found = Watch(
            test,
            Reference.of(values, counts),
            Martingale() if wealth is None else wealth.martingale(),
        )
        expected = self.reference.n + n
        if not np.isfinite(values).all() or (counts < 1).any() or found.reference.n != expected:
            raise ValueError(f"{test.name} must hold {expected} numbers")
        if found.martingale.n != n:
            raise ValueError(f"{test.name} has bet on {found.martingale.n} rows")
        return found


Count = Annotated[int, Field(ge=0)]
Bets = Annotated[tuple[FiniteFloat, ...], Field(min_length=len(SHARES), max_length=len(SHARES))]


class Wealth(Model):
    """A martingale after its first row; see there."""

    n: Annotated[int, Field(ge=1)]
    growth: Bets
    started: Bets
    counts: tuple[tuple[Annotated[FiniteFloat, Field(ge=0)], ...], ...]

    @classmethod
    def of(cls, martingale: Martingale) -> Wealth | None:
        """What there is to keep of it."""
        if not martingale.n:
            return None
        sums = {"growth": martingale.growth.tolist(), "started": martingale.started.tolist()}
        return cls.model_validate(
            {"n": martingale.n, **sums, "counts": [n.tolist() for n in martingale.counts]}
        )

    def martingale(self) -> Martingale:
        """What was kept."""
        return Martingale(
            self.n,
            np.array(self.growth),
            np.array(self.started),
            [np.array(one) for one in self.counts],
        )

    @model_validator(mode="after")
    def _check_cells(self) -> Self:
        if [len(cells) for cells in self.counts] != [cells for cells, _ in HISTOGRAMS]:
            raise ValueError("the histograms have other cells")
        return self


class State(Model):
    """All of a monitor but its calibration and the values that came.

    ``audited``: answers, and wrong ones.
    """

    kind: Literal["monitor"] = "monitor"
    fingerprint: str
    rows: Count
    unscored: Count
    accepted: Count
    tests: tuple[Test, ...]
    wealth: dict[str, Wealth | None]
    audited: tuple[Count, Count]
    remembered: tuple[Count, Count]  # hashes of rows, and of labels
    counted: dict[str, tuple[Count, Count]]  # rows, and those that a rate is of

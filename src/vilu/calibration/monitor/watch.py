"""What a monitor keeps between rows: its tests with their evidence, and a document of them."""

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
        # One draw a value, wherever a batch begins: else a user who feeds smaller batches would get
        # other evidence, and could look for the division that suits.
        generator.advance(self.martingale.n)
        uniform = np.random.Generator(generator).random(len(values))
        p = self.reference.p_values(values, uniform)
        self.test = self.test.after(self.martingale.update(p), rows)

    def resumed(
        self, test: Test, wealth: Wealth | None, values: Floats, counts: Ints, n: int
    ) -> Watch:
        """The same after n rows."""
        martingale = Martingale()
        if wealth is not None:
            martingale = wealth.martingale()
        reference = Reference.of(values, counts)
        expected = self.reference.n + n
        are_counted = bool(np.isfinite(values).all() and (counts >= 1).all())
        if not are_counted or reference.n != expected:
            raise ValueError(f"{test.name} must hold {expected} numbers")
        if martingale.n != n:
            raise ValueError(f"{test.name} has bet on {martingale.n} rows")
        return Watch(test, reference, martingale)


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
        """The numbers of a martingale; None before its first row."""
        if not martingale.n:
            return None
        return cls(
            n=martingale.n,
            growth=tuple(martingale.growth.tolist()),
            started=tuple(martingale.started.tolist()),
            counts=tuple(tuple(cells.tolist()) for cells in martingale.counts),
        )

    def martingale(self) -> Martingale:
        """The martingale that it was made of."""
        counts = [np.array(cells) for cells in self.counts]
        return Martingale(self.n, np.array(self.growth), np.array(self.started), counts)

    @model_validator(mode="after")
    def _check_cells(self) -> Self:
        sizes = [len(cells) for cells in self.counts]
        expected = [n_cells for n_cells, _ in HISTOGRAMS]
        if sizes != expected:
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

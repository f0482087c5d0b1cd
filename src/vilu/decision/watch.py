"""One number per row, watched: its conformal p-values, and a test martingale on them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np

from vilu.decision.conformal import Reference
from vilu.decision.martingale import Martingale
from vilu.decision.monitor_status import Test, TestName
from vilu.metrics.counts import Floats, Ints

PARTS: Final[dict[TestName, int]] = {"scores": 2, "acceptance": 1, "answers": 1, "audit": 1}
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
        generator.advance(self.martingale.n)  # one draw a value: batches of any size see the same numbers
        uniform = np.random.Generator(generator).random(len(values))
        self.test = self.test.after(self.martingale.update(self.reference.p_values(values, uniform)), rows)

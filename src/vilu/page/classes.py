"""Which answers go wrong: a line for every class that the model answers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vilu.decision.binomial import lower_bound, upper_bound
from vilu.metrics.counts import Ints
from vilu.outcomes import Outcomes
from vilu.page.choice import Choice

MAX_CLASSES = 100
"""Lines of the table at most."""

DELTA = 0.025
"""On either side of a 95 % interval."""


@dataclass(frozen=True)
class Rate:
    """k of n, with its 95 % Clopper-Pearson interval."""

    k: int
    n: int

    @property
    def value(self) -> float | None:
        """The share k / n; None where n is 0."""
        return self.k / self.n if self.n else None

    @property
    def low(self) -> float:
        """Lower end, P[Bin(n, low) >= k] = 0.025."""
        return lower_bound(self.k, self.n, DELTA)

    @property
    def high(self) -> float:
        """Upper end, P[Bin(n, high) <= k] = 0.025."""
        return upper_bound(self.k, self.n, DELTA)


@dataclass(frozen=True)
class ClassRow:
    """One answer of the model.

    Attributes:
        name: Of the class.
        failures: How often the answer is wrong where it is given.
        accepted: How often it is accepted.
        accepted_failures: How often it is wrong among the accepted.
    """

    name: str
    failures: Rate
    accepted: Rate
    accepted_failures: Rate


def class_rows(outcomes: Outcomes, choice: Choice) -> tuple[list[ClassRow], int]:
    """The classes that are answered, most wrong answers first, and how many more there are than are listed.

    Rows without a known failure or an uncertainty are left out, as in every metric; none where there are no classes.
    """
    names, said = outcomes.class_names, outcomes.prediction
    if names is None or said is None:
        return [], 0
    rows = outcomes.evaluable & (said >= 0)

    def count(these: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Ints:
        return np.bincount(said[rows & these], minlength=len(names))

    wrong = outcomes.failure == 1
    n, k, m, j = count(rows), count(wrong), count(choice.accepted), count(choice.accepted & wrong)
    answered = sorted(np.flatnonzero(n).tolist(), key=lambda c: (-k[c], -n[c], c))
    found = [
        ClassRow(names[c], Rate(int(k[c]), int(n[c])), Rate(int(m[c]), int(n[c])), Rate(int(j[c]), int(m[c])))
        for c in answered[:MAX_CLASSES]
    ]
    return found, len(answered) - len(found)

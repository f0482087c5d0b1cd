"""Conformal p-values on line: where each new value stands among all that came before it.

p_t = (#{i < t: x_i > x_t} + U_t (#{i < t: x_i = x_t} + 1)) / t, U_t uniform on (0, 1) (Vovk, Gammerman and Shafer,
Algorithmic Learning in a Random World, 2005, ch. 2 and 7). If the values are exchangeable, p_1, p_2, ... are
independent and uniform, ties or not. That holds for a reference that grows with every value; p-values against a fixed
reference share its errors, so they are not independent, and bets on them win without a shift.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from vilu.metrics.counts import Floats, Ints


@dataclass
class Run:
    """Distinct values in rising order, and how many values are at most each."""

    values: Floats
    up_to: Ints

    def __len__(self) -> int:
        return len(self.values)

    @property
    def n(self) -> int:
        """Values, repeated ones as often as they came."""
        return int(self.up_to[-1])

    @classmethod
    def of(cls, values: Floats, counts: Ints) -> Run:
        """The run of values, in any order, that came so often each."""
        distinct, place = np.unique(values, return_inverse=True)
        total = np.zeros(len(distinct), np.int64)
        np.add.at(total, place, counts)
        return cls(distinct, np.cumsum(total))

    def counts(self) -> Ints:
        """How often each value came."""
        return np.diff(self.up_to, prepend=0)

    def compare(self, values: Floats) -> tuple[Ints, Ints]:
        """Per value how many of the run are greater, and how many equal."""
        padded = np.concatenate([[0], self.up_to])
        up_to = padded[np.searchsorted(self.values, values, "right")]
        below = padded[np.searchsorted(self.values, values, "left")]
        return self.n - up_to, up_to - below


@dataclass
class Reference:
    """All values so far, in sorted runs of falling length: a new one costs O(log^2 n), and repeats cost no memory."""

    runs: list[Run] = field(default_factory=list)

    @classmethod
    def of(cls, values: Floats, counts: Ints | None = None) -> Reference:
        """What holds these values, each once or as often as ``counts`` says."""
        reference = cls()
        reference.add(values, counts)
        return reference

    @property
    def n(self) -> int:
        """Values so far."""
        return sum(run.n for run in self.runs)

    def add(self, values: Floats, counts: Ints | None = None) -> None:
        """Take values in, each once or as often as ``counts`` says."""
        if not len(values):
            return
        run = Run.of(values, np.ones(len(values), np.int64) if counts is None else counts)
        while self.runs and len(self.runs[-1]) <= len(run):
            last = self.runs.pop()
            run = Run.of(np.concatenate([last.values, run.values]), np.concatenate([last.counts(), run.counts()]))
        self.runs.append(run)

    def table(self) -> tuple[Floats, Ints]:
        """Distinct values in rising order, and how often each came."""
        if not self.runs:
            return np.empty(0), np.empty(0, np.int64)
        every = Run.of(
            np.concatenate([run.values for run in self.runs]), np.concatenate([run.counts() for run in self.runs])
        )
        return every.values, every.counts()

    def p_values(self, values: Floats, uniform: Floats) -> Floats:
        """(B,) p-values of new values in the order of their arrival, which are then taken in.

        Args:
            values: (B,) finite.
            uniform: (B,) in [0, 1), one for each value, independent of everything.
        """
        greater, equal = earlier(values)
        for run in self.runs:
            more, same = run.compare(values)
            greater, equal = greater + more, equal + same
        before = self.n + np.arange(len(values))
        self.add(values)
        return (greater + uniform * (equal + 1)) / (before + 1)


def earlier(values: Floats) -> tuple[Ints, Ints]:
    """Per value how many of those before it are greater, and how many equal, in O(B log^2 B).

    Blocks of 1, 2, 4, ... values: those of every odd block are looked up among those of the block before it.
    """
    n = len(values)
    greater, equal = np.zeros(n, np.int64), np.zeros(n, np.int64)
    rank = np.unique(values, return_inverse=True)[1].astype(np.int64)
    place = np.arange(n)
    width = 1
    while width < n:
        pair, odd = place // (2 * width), (place // width) % 2 == 1
        # one sorted array of all even blocks: the block is the leading part of the key
        key = pair * n + rank
        left = np.sort(key[~odd])
        asked = key[odd]
        up_to = np.searchsorted(left, asked, "right")
        below = np.searchsorted(left, asked, "left")
        # where an odd block has values, its even one is full
        greater[odd] += (pair[odd] + 1) * width - up_to
        equal[odd] += up_to - below
        width *= 2
    return greater, equal

"""A threshold whose guarantee may be looked at after every label: evidence valid at any time.

For a fixed threshold t the accepted answers whose labels come one after another are independent
draws, wrong with probability R(t). A bet of b in (0, 1] on "the error rate is above r" multiplies
its wealth by

    1 - b (wrong - r) / (1 - r),    whose mean is at most 1 where R(t) >= r,

so k wrong of m leave (1 - b)^k (1 + b r / (1 - r))^(m - k). The mean over a few bets is E(t), and
P[E(t) ever reaches 1 / a] <= a where R(t) >= r (Ville 1939). So "label until it certifies" is no
trick: the same level is good for every look. An exact binomial test repeated at every look is not.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field

from vilu.artifacts.documents import Model
from vilu.calibration.thresholds import MAX_ROWS, first_enough
from vilu.errors import DataError
from vilu.metrics.counts import Floats, Ints
from vilu.validation import require_between

BETS: Final = ((0.95, 0.4), (0.8, 0.25), (0.6, 0.2), (0.35, 0.15))
"""Bets b with their shares of the first wealth:

72 answers without an error show 5 % at 95 % (the exact test: 59).
"""

STARTS: Final = ((8, 0.1), (16, 0.1), (32, 0.2), (64, 0.6))
"""Where sequences of thresholds begin, and their shares of the level.

The unit is one ``STEPS``-th of the rows that may be accepted.
"""

STEPS: Final = 64
GROWTH: Final = 1.02
"""Beyond these every threshold accepts so many times as many rows as the one before it."""


@np.errstate(under="ignore")  # what is small beside the others is 0
def log_evidence(wrong: ArrayLike, accepted: ArrayLike, max_risk: float) -> Floats:
    """(...) log E against "the error rate is above ``max_risk``".

    ``wrong`` of the ``accepted`` labels are of wrong answers.

    Examples:
        >>> import math
        >>> from vilu.calibration.anytime import log_evidence
        >>> [int(n) for n in range(65, 75) if log_evidence(0, n, 0.05) >= math.log(20)][0]
        72
    """
    bet, share = np.array(BETS).T
    k = np.asarray(wrong, dtype=np.float64)[..., None]
    m = np.asarray(accepted, dtype=np.float64)[..., None]
    # In logarithms: after thousands of labels the wealth itself leaves the range of float64.
    lost = k * np.log1p(-bet)
    won = (m - k) * np.log1p(bet * max_risk / (1 - max_risk))
    # A mean of bets that gain nothing on average gains nothing either, so Ville's inequality
    # holds for it. The best bet in hindsight has no such mean and reaches 1 / a too often.
    evidence: Floats = np.logaddexp.reduce(np.log(share) + lost + won, axis=-1)
    return evidence


def flawless_labels(max_risk: float, delta: float) -> int:
    """Fewest labels, none of them wrong, that show the risk at one threshold with this level."""

    def evidence_of(n_labels: int) -> float:
        return float(log_evidence(0, n_labels, max_risk))

    # Without an error every bet wins each time, so the evidence rises and can be bisected.
    return bisect_left(range(MAX_ROWS), -math.log(delta), key=evidence_of)


def level_of(attempt: int, delta: float) -> float:
    """Level of predictor number k = ``attempt`` (from 1): delta / (k (k + 1)).

    All of them add up to delta.
    """
    # How many predictors there will be is not known: equal shares would need their number, and
    # the full level for each would break the guarantee of the first that is lucky (union bound).
    return delta / (attempt * (attempt + 1))


def grid_of(uncertainty: Floats, limit: float) -> Floats:
    """(G,) thresholds: 64 in equal steps through the scores (N,) up to a limit, and more beyond it.

    They are chosen from scores alone.
    """
    # The grid is fixed before the labels. Thresholds that are chosen by labels would stand where
    # these labels happen to be right, and no test at a fixed threshold allows for that.
    ordered = np.sort(uncertainty)
    inside = int(np.searchsorted(ordered, limit, side="right"))
    if not inside:
        raise DataError(f"no score is at most {limit:.6g}, so nothing could be accepted.")
    counts = [math.ceil(inside * step / STEPS) for step in range(1, STEPS + 1)]
    while counts[-1] < len(ordered):
        counts.append(min(math.ceil(counts[-1] * GROWTH), len(ordered)))
    grid: Floats = ordered[np.array(counts) - 1]
    return grid


class Draw(Model):
    """What is fixed before the labels of a draw are looked at, as it is saved.

    ``Looks`` tests it.
    """

    grid: tuple[float, ...]  # thresholds, ascending
    delta: float = Field(gt=0, lt=1)  # level
    limit: float  # labels are of rows up to this uncertainty

    @classmethod
    def of(cls, looks: Looks) -> Self:
        """That of looks with a limit."""
        return cls(grid=tuple(looks.grid.tolist()), delta=looks.delta, limit=looks.limit)

    def looks(self, max_risk: float) -> Looks:
        """What its labels are asked."""
        return Looks(np.array(self.grid), max_risk, self.delta, self.limit)


@dataclass(frozen=True)
class Looks:
    """What labels say of a grid of thresholds, however often it is asked.

    H_t, "the error rate at t is above max_risk", is rejected where E(t) >= 1 / level. Sequences
    from strict to lax begin at ``STARTS``, each with its share of ``delta``, and one that reaches
    the next beginning hands its level on. A true H_t is met with the levels since the true one
    before it, which add up to at most delta, and Ville's inequality holds for every level at all
    times: P[ever certifying a t with R(t) > max_risk] <= delta.

    Args:
        grid: (G,) thresholds, ascending, fixed before the labels (``grid_of``).
        max_risk: The error rate among accepted answers, in (0, 1).
        delta: The level, in (0, 1).
        limit: Labels are of rows up to this uncertainty, so no threshold beyond it is tested.

    Source: ours, of Ville (1939) and Wiens, A fixed sequence Bonferroni procedure (2003).

    Examples:
        >>> import numpy as np
        >>> from vilu.calibration.anytime import Looks
        >>> looks = Looks(np.linspace(0.01, 0.64, 64), 0.05, 0.05)
        >>> looks.certified(np.full(90, 0.005), np.zeros(90, int))
        63
        >>> print(looks.certified(np.full(50, 0.005), np.zeros(50, int)))
        None
    """

    grid: Floats
    max_risk: float
    delta: float
    limit: float = math.inf

    def __post_init__(self) -> None:
        require_between("max_risk", self.max_risk)
        require_between("delta", self.delta)
        if len(self.grid) < STEPS or (np.diff(self.grid) < 0).any():
            raise DataError(
                f"a grid has {STEPS} thresholds at least, ascending. Got "
                f"{np.asarray(self.grid).tolist()}."
            )

    @property
    def last(self) -> int:
        """Place of the laxest threshold that can be tested."""
        return int(np.searchsorted(self.grid, self.limit, side="right")) - 1

    def counts(self, uncertainty: Floats, failure: Ints) -> tuple[Ints, Ints]:
        """(G,) wrong and (G,) accepted labels at every threshold."""
        inside = uncertainty <= self.grid[:, None]
        return (inside & (failure == 1)).sum(axis=1), inside.sum(axis=1)

    def certified(self, uncertainty: Floats, failure: Ints) -> int | None:
        """Position of the laxest threshold that is certified by the labels (N,) so far.

        None where none is.
        """
        return self._certified(*self.counts(uncertainty, failure))

    def can_certify(self, uncertainty: Floats) -> bool:
        """Whether so many labels (N,) could certify anything: with fewer a look is none."""
        # as if all were right, so that the answer does not depend on what the labels are
        _, accepted = self.counts(uncertainty, np.zeros(len(uncertainty), dtype=np.int64))
        return self._certified(np.zeros_like(accepted), accepted) is not None

    def _certified(self, wrong: Ints, accepted: Ints) -> int | None:
        starts = dict(STARTS)
        level = 0.0
        laxest = None
        # Labels are of rows up to the limit: of what lies beyond it there is no random sample.
        evidence = log_evidence(wrong, accepted, self.max_risk)[: self.last + 1]
        for index, log_e in enumerate(evidence.tolist()):
            level += self.delta * starts.get(index + 1, 0.0)
            is_rejected = level > 0 and log_e >= -math.log(level)
            if is_rejected:
                # The level goes on to the next threshold in full: a sequence errs only if it
                # rejects the first true H_t that it meets, so it risks its level once (Wiens 2003).
                laxest = index
            else:
                # H_t may be true, and the level was risked on it. Tested on with the same level,
                # the sequence could err twice, and all levels together would exceed delta.
                level = 0.0
        return laxest

    def more_needed(self, uncertainty: Floats, failure: Ints) -> int | None:
        """About how many more labels would certify a threshold, if errors go on as so far.

        They are of rows up to the limit. Before the first label: if none is wrong. None where no
        number would do.
        """
        wrong, accepted = self.counts(uncertainty, failure)
        share = np.minimum(np.arange(1, len(self.grid) + 1) / (self.last + 1), 1.0)
        rate = np.minimum(wrong / np.maximum(accepted, 1), 1.0)

        def is_enough(more: int) -> bool:
            grown = accepted + np.floor(more * share).astype(np.int64)
            # Rounded up, so that the number is not too small; 3.0000000001 errors are 3.
            grown_wrong = np.ceil(rate * grown - 1e-9).astype(np.int64)
            return self._certified(grown_wrong, grown) is not None

        if is_enough(0):
            return 0
        return first_enough(is_enough, 1)

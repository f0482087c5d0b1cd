"""Thresholds whose certificate may be tested again after every label: anytime-valid evidence.

Fix a threshold t. The accepted answers are labelled one after another. They are independent draws,
and each is wrong with probability R(t). A bet b in (0, 1] against "the error rate is above r"
multiplies its wealth at every label by

    1 - b (wrong - r) / (1 - r),    whose mean is at most 1 where R(t) >= r.

After m labels, k of them of wrong answers, the wealth is

    (1 - b)^k (1 + b r / (1 - r))^(m - k).

E(t) is the mean wealth of several bets. Where R(t) >= r, the probability that E(t) ever reaches
1 / a is at most a (Ville 1939). So labelling may go on until a threshold is certified, and every
look uses the same level. An exact binomial test that is repeated at every look would not be valid.
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
"""Bets b, each with its share of the initial wealth.

With these bets 72 right answers and no wrong one certify a risk of 5 % with confidence 95 %. The
exact test for a single look needs 59.
"""

STARTS: Final = ((8, 0.1), (16, 0.1), (32, 0.2), (64, 0.6))
"""For each sequence: number of the threshold at which it starts, from 1, and share of the level.

The first ``STEPS`` thresholds accept equal steps of the rows that may be accepted.
"""

STEPS: Final = 64
"""Number of thresholds up to the limit of a grid."""

GROWTH: Final = 1.02
"""Beyond the limit, the number of rows that a threshold accepts, relative to the one before it."""


@np.errstate(under="ignore")  # a term far smaller than the others is rounded to 0
def log_evidence(wrong: ArrayLike, accepted: ArrayLike, max_risk: float) -> Floats:
    """Log evidence (...) against "the error rate is above ``max_risk``": log E.

    ``accepted`` is the number of labels so far, ``wrong`` the number of wrong answers among them.

    Examples:
        >>> import math
        >>> from vilu.calibration.anytime import log_evidence
        >>> [int(n) for n in range(65, 75) if log_evidence(0, n, 0.05) >= math.log(20)][0]
        72
    """
    bet, share = np.array(BETS).T
    k = np.asarray(wrong, dtype=np.float64)[..., None]
    m = np.asarray(accepted, dtype=np.float64)[..., None]
    # In logarithms, because after thousands of labels the wealth is outside the range of float64.
    lost = k * np.log1p(-bet)
    won = (m - k) * np.log1p(bet * max_risk / (1 - max_risk))
    # The mean wealth of the bets has an expectation of at most 1, so Ville's inequality holds for
    # it. The wealth of the bet that is best in hindsight would reach 1 / a too often.
    evidence: Floats = np.logaddexp.reduce(np.log(share) + lost + won, axis=-1)
    return evidence


def flawless_labels(max_risk: float, delta: float) -> int:
    """Smallest number of labels that certify one threshold at level delta if no answer is wrong."""

    def evidence_of(n_labels: int) -> float:
        return float(log_evidence(0, n_labels, max_risk))

    # Without a wrong answer every bet wins at every label. So the evidence rises and bisection is
    # possible.
    return bisect_left(range(MAX_ROWS), -math.log(delta), key=evidence_of)


def level_of(attempt: int, delta: float) -> float:
    """Level for predictor number k = ``attempt`` (from 1): delta / (k (k + 1)).

    The levels of infinitely many predictors add up to delta.
    """
    # The number of predictors is not known in advance, so delta cannot be divided equally. With all
    # of delta for each, the probability of any wrong certificate could exceed delta (union bound).
    return delta / (attempt * (attempt + 1))


def grid_of(uncertainty: Floats, limit: float) -> Floats:
    """Thresholds (G,) from scores (N,): 64 at equal steps in rank up to a limit, and more beyond.

    The thresholds depend on scores alone.
    """
    # The grid is fixed before any label is seen. Thresholds that depend on labels would favour
    # scores where the labels happen to be right, and the test of a fixed threshold would be wrong.
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
    """Saved settings of a draw of rows to label, fixed before any label is seen.

    ``Looks`` makes the tests with these settings.
    """

    grid: tuple[float, ...]  # thresholds, ascending
    delta: float = Field(gt=0, lt=1)  # level
    limit: float  # only rows up to this uncertainty are labelled

    @classmethod
    def of(cls, looks: Looks) -> Self:
        """The settings of the tests ``looks``."""
        return cls(grid=tuple(looks.grid.tolist()), delta=looks.delta, limit=looks.limit)

    def looks(self, max_risk: float) -> Looks:
        """The tests of the thresholds for a maximal risk."""
        return Looks(np.array(self.grid), max_risk, self.delta, self.limit)


@dataclass(frozen=True)
class Looks:
    """Tests of a grid of thresholds, which may be repeated after every label.

    The hypothesis H_t, "the error rate at t is above max_risk", is rejected where E(t) >= 1 /
    level. Thresholds are tested from strict to lax. Sequences start at ``STARTS``, each with its
    share of ``delta``. A sequence that reaches the start of the next sequence adds its level to
    that of the next sequence.

    1. The level at a true H_t is made of the shares that started after the true H_t before it.
    2. So the levels at all true H_t add up to at most delta.
    3. Ville's inequality holds for every level at all times. So

           P[ever certifying a t with R(t) > max_risk] <= delta.

    Args:
        grid: Thresholds (G,), ascending, fixed before the labels (``grid_of``).
        max_risk: Largest error rate among accepted answers, in (0, 1).
        delta: The level, in (0, 1).
        limit: Only rows up to this uncertainty are labelled, so no larger threshold is tested.

    Source: our combination of Ville (1939) and Wiens, A fixed sequence Bonferroni procedure (2003).

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
        """Index of the laxest threshold that can be tested."""
        return int(np.searchsorted(self.grid, self.limit, side="right")) - 1

    def counts(self, uncertainty: Floats, failure: Ints) -> tuple[Ints, Ints]:
        """Numbers (G,) of wrong answers and (G,) of labels that every threshold accepts."""
        inside = uncertainty <= self.grid[:, None]
        return (inside & (failure == 1)).sum(axis=1), inside.sum(axis=1)

    def certified(self, uncertainty: Floats, failure: Ints) -> int | None:
        """Index of the laxest threshold that the labels (N,) so far certify; None: no threshold."""
        return self._certified(*self.counts(uncertainty, failure))

    def can_certify(self, uncertainty: Floats) -> bool:
        """Whether labels of these rows (N,) would certify a threshold if all answers were right.

        With fewer labels a test can certify nothing, so it does not count as a look.
        """
        # the answers are taken for right, so that the result does not depend on the labels
        _, accepted = self.counts(uncertainty, np.zeros(len(uncertainty), dtype=np.int64))
        return self._certified(np.zeros_like(accepted), accepted) is not None

    def _certified(self, wrong: Ints, accepted: Ints) -> int | None:
        starts = dict(STARTS)
        level = 0.0
        laxest = None
        # Only rows up to the limit are labelled. There is no random sample of rows beyond it.
        evidence = log_evidence(wrong, accepted, self.max_risk)[: self.last + 1]
        for index, log_e in enumerate(evidence.tolist()):
            level += self.delta * starts.get(index + 1, 0.0)
            is_rejected = level > 0 and log_e >= -math.log(level)
            if is_rejected:
                # The next threshold is tested at the full level. A sequence makes an error only if
                # it rejects the first true H_t that it meets, so its level counts once (Wiens).
                laxest = index
            else:
                # H_t may be true, and its test has used up the level. If the same level were used
                # again, the levels at true hypotheses could add up to more than delta.
                level = 0.0
        return laxest

    def more_needed(self, uncertainty: Floats, failure: Ints) -> int | None:
        """About how many more labels would certify a threshold, if the error rates stay the same.

        The labels are of rows up to the limit. Without any label so far, no answer is assumed to be
        wrong. None if no number of labels would be enough.
        """
        wrong, accepted = self.counts(uncertainty, failure)
        share = np.minimum(np.arange(1, len(self.grid) + 1) / (self.last + 1), 1.0)
        rate = np.minimum(wrong / np.maximum(accepted, 1), 1.0)

        def is_enough(more: int) -> bool:
            grown = accepted + np.floor(more * share).astype(np.int64)
            # Rounded up, so that the estimate is not too small. The tolerance 1e-9 keeps a
            # float64 like 3.0000000001 at 3.
            grown_wrong = np.ceil(rate * grown - 1e-9).astype(np.int64)
            return self._certified(grown_wrong, grown) is not None

        if is_enough(0):
            return 0
        return first_enough(is_enough, 1)

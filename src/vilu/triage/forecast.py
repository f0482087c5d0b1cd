"""Forecast of how many photos could be accepted, before anybody gives the labels for it.

The labels are simulated, as if none were given yet. Of the photos up to the planned limit, as many
as a triage would draw get an answer that is wrong with the probability that the predictor gives.
These probabilities may all be too low or too high, so each simulation multiplies them by one random
factor. The simulated labels are tested after every round, as the labels of the guarantee will be.

A predictor gets better with labels. So the upper end of a range that is not 0 is at least the share
of photos up to which the mean probability is at most a multiple of the risk (``BEFORE_LABELS``,
``AFTER_LABELS``).

The ranges are estimates, not guarantees. How often they held is in docs/triage.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, Self

import numpy as np

from vilu.artifacts.documents import Model
from vilu.calibration.closed_set import AnyLooks
from vilu.metrics.counts import Floats, Ints
from vilu.triage.trial import Trial

BUDGETS: Final = (100, 200, 400)
"""Numbers of labels in all for which a forecast is made."""

SEED: Final = 0
"""Seed of the simulations."""

SIMULATIONS: Final = 60
"""Number of simulations for every number of labels."""

SPREAD: Final = 0.7
"""Standard deviation of the logarithm of the random factor of the probabilities."""

RANGE_QUANTILES: Final = (0.1, 0.9)
"""Quantiles of the simulated shares that are the ends of a range."""

BEFORE_LABELS: Final = 1.5
"""Multiple of the risk for the upper end of a range, while no label was given."""

AFTER_LABELS: Final = 1.2
"""The same multiple for a predictor that was fitted on labels."""

ROUND: Final = 50
"""Number of labels between two simulated tests."""

RISKS: Final = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3)
"""Risks among which the least risk that labels can show is looked for, ascending."""

FEWEST_TO_FIT: Final = 50
MOST_TO_FIT: Final = 100
"""Before the first draw there is a fit-side label for every class, but at least 50, at most 100."""

SHARE_WORTH_A_DRAW: Final = 0.3
"""If the limit includes a smaller share of the photos, labels to fit on are asked for first."""

ENOUGH_TO_FIT: Final = 200
"""Number of fit-side labels after which photos are drawn whatever share the limit includes."""

LooksOf = Callable[[Trial, Floats, float, float], AnyLooks]
"""Makes the tests of a trial from the scores of its photos, the risk and the level."""


def is_enough_to_fit(trial: Trial, n_fit_labels: int, n_classes: int) -> bool:
    """Whether a predictor is fitted on enough labels, so that calibration photos are drawn.

    A predictor that is fitted on more labels can accept more photos. So a draw waits for labels to
    fit on, unless the limit already includes a large share of the photos.
    """
    if n_fit_labels < min(max(n_classes, FEWEST_TO_FIT), MOST_TO_FIT):
        return False
    return trial.share >= SHARE_WORTH_A_DRAW or n_fit_labels >= ENOUGH_TO_FIT


class Expected(Model):
    """Range of the share of photos that could be accepted with some number of labels.

    Attributes:
        n_labels: Number of labels in all.
        lowest: Lower end of the range.
        highest: Upper end of the range.
    """

    n_labels: int
    lowest: float
    highest: float

    def __str__(self) -> str:
        low = round(100 * self.lowest)
        high = round(100 * self.highest)
        return str(high) if low == high else f"{low} to {high}"

    def at_least(self, share: float) -> Self:
        """The range with neither end below a share that is accepted already."""
        lowest = max(self.lowest, share)
        highest = max(self.highest, share)
        return self.model_copy(update={"lowest": lowest, "highest": highest})


class Forecast(Model):
    """What the photos of a folder can show at the risk that is asked for.

    Attributes:
        n_photos: Number of photos.
        max_risk: Largest error rate that is allowed among the accepted answers.
        expected: Ranges for numbers of labels, ascending.
        least_risk: Least risk (of ``RISKS``) that the most labels of ``expected`` can show; None if
            they can show none of these risks.
    """

    n_photos: int
    max_risk: float
    expected: tuple[Expected, ...]
    least_risk: float | None

    @classmethod
    def of(  # noqa: PLR0913 - one keyword per fact
        cls,
        uncertainty: Floats,
        *,
        n_photos: int,
        n_classes: int,
        n_fit_labels: int,
        most_fit_labels: int,
        n_labels: int,
        max_risk: float,
        level: float,
        looks_of: LooksOf,
        share_accepted: float = 0.0,
    ) -> Self:
        """Make the forecast from scores, and from what is guaranteed already.

        Args:
            uncertainty: (M,) probabilities of failure of the calibration photos.
            n_photos: Number of all photos.
            n_classes: Number of classes.
            n_fit_labels: Number of labels that the predictor was fitted on.
            most_fit_labels: Number of labels to fit on that there can be in all.
            n_labels: Number of labels that were given.
            max_risk: Largest error rate that is allowed among the accepted answers.
            level: Level of the next test.
            looks_of: The tests of a trial (``PhotoSplit.looks_before_labels``).
            share_accepted: Share of the photos that the guarantee in force accepts.
        """
        scores = np.sort(uncertainty[np.isfinite(uncertainty)])
        budgets = _budgets(n_labels, n_photos)
        expected: list[Expected] = []
        least = None
        if len(scores):
            world = _World(scores, n_classes, n_fit_labels, most_fit_labels, looks_of)
            for n in budgets:
                expected.append(world.expected(n, max_risk, level).at_least(share_accepted))
            if budgets:
                least = world.least_risk(budgets[-1], level)
        return cls(n_photos=n_photos, max_risk=max_risk, expected=tuple(expected), least_risk=least)

    @property
    def can_be_shown(self) -> bool:
        """Whether any of the numbers of labels may get a photo accepted."""
        return any(expected.highest > 0 for expected in self.expected)

    def __str__(self) -> str:
        if not self.expected:
            return ""
        numbers = " / ".join(f"{expected.n_labels:,}" for expected in self.expected)
        most = f"{self.expected[-1].n_labels:,}"
        target = f"a risk of {100 * self.max_risk:.3g}%"
        if self.can_be_shown:
            shares = " / ".join(map(str, self.expected))
            text = (
                f"With {numbers} labels in all, about {shares} % of the photos could be accepted "
                f"at {target} (an estimate)."
            )
        else:
            text = f"With up to {most} labels in all, probably nothing can be accepted at {target}."
        is_out_of_reach = self.least_risk is None or self.least_risk > self.max_risk
        if self.can_be_shown and is_out_of_reach:
            return text  # few simulations show the risk, so another risk is no advice
        return f"{text} {self._least_risk_in_words(most)}"

    def _least_risk_in_words(self, most: str) -> str:
        if self.least_risk is None:
            return (
                f"With so many labels not even a risk of {RISKS[-1]:.0%} can be shown here: add "
                "photos."
            )
        if self.least_risk <= self.max_risk:
            return (
                f"The least risk that {most} labels can show here is about {self.least_risk:.0%}."
            )
        return (
            f"They could show a risk of about {self.least_risk:.0%}: give "
            f"--max-risk {self.least_risk}."
        )


def _budgets(n_labels: int, n_photos: int) -> list[int]:
    """Numbers of labels in all, at least one round beyond the number that was given.

    They are below the number of photos. None is left if a further round would label every photo.
    """
    least = n_labels + ROUND
    if least >= n_photos:
        return []
    fixed_budgets = [n for n in BUDGETS if least <= n < n_photos]
    if fixed_budgets:
        return fixed_budgets
    added_budgets = [n_labels + n for n in BUDGETS if n_labels + n < n_photos]
    return added_budgets or [least]


class _World:
    """Photos whose answers are wrong with the probabilities of a predictor."""

    def __init__(
        self,
        scores: Floats,
        n_classes: int,
        n_fit_labels: int,
        most_fit_labels: int,
        looks_of: LooksOf,
    ) -> None:
        self.scores = scores  # (M,) ascending
        self.most_fit_labels = most_fit_labels
        self.n_classes = n_classes
        self.n_fit_labels = n_fit_labels
        self.looks_of = looks_of
        self.rng = np.random.default_rng(SEED)

    def plan(self, max_risk: float, level: float) -> Trial:
        """The plan of the predictor's test."""
        return Trial.plan(
            n_fit=self.n_fit_labels,
            scores=self.scores,
            n_answered=0,
            max_risk=max_risk,
            delta=level,
        )

    def n_to_draw(self, trial: Trial, n_labels: int) -> int:
        """How many of ``n_labels`` labels in all are left to draw after those to fit on."""
        n_fit = max(self.n_fit_labels, FEWEST_TO_FIT)
        while not is_enough_to_fit(trial, n_fit, self.n_classes):
            n_fit += ROUND
        n_fit = min(n_fit, self.most_fit_labels)
        n_below_limit = int((self.scores <= trial.limit).sum())
        return max(0, min(n_labels - n_fit, n_below_limit))

    def expected(self, n_labels: int, max_risk: float, level: float) -> Expected:
        """Range of the share of photos that could be accepted with ``n_labels`` labels in all."""
        trial = self.plan(max_risk, level)
        n_drawn = self.n_to_draw(trial, n_labels)
        looks = self.looks_of(trial, self.scores, max_risk, level)
        if not n_drawn:
            return Expected(n_labels=n_labels, lowest=0.0, highest=0.0)
        shares = [self._simulated_share(looks, n_drawn) for _ in range(SIMULATIONS)]
        lowest, highest = np.quantile(shares, RANGE_QUANTILES)
        if highest == 0:
            return Expected(n_labels=n_labels, lowest=0.0, highest=0.0)
        multiple = AFTER_LABELS if self.n_fit_labels else BEFORE_LABELS
        n_up_to = np.arange(1, len(self.scores) + 1)
        mean_up_to = np.cumsum(self.scores) / n_up_to
        is_below = mean_up_to <= multiple * max_risk
        # The mean rises from photo to photo, so this is the share of the first photos.
        reachable = float(is_below.mean())
        return Expected(
            n_labels=n_labels, lowest=float(lowest), highest=max(float(highest), reachable)
        )

    def _simulated_share(self, looks: AnyLooks, n_drawn: int) -> float:
        """The share of the photos that simulated labels certify, tested after every round."""
        below_limit = np.flatnonzero(self.scores <= looks.limit)
        rows: Ints = self.rng.permutation(below_limit)[:n_drawn]
        factor = math.exp(self.rng.normal(0.0, SPREAD))
        probability = np.minimum(factor * self.scores[rows], 1.0)
        failure = (self.rng.random(len(rows)) < probability).astype(np.int64)
        threshold = -math.inf
        for end in _ends_of_rounds(n_drawn):
            certified = looks.certified(self.scores[rows[:end]], failure[:end])
            if certified is not None:
                threshold = max(threshold, float(looks.grid[certified]))
        return float((self.scores <= threshold).mean())

    def least_risk(self, n_labels: int, level: float) -> float | None:
        """The least of ``RISKS`` that so many labels in all can show if no answer is wrong."""
        for risk in RISKS:
            trial = self.plan(risk, level)
            if not trial.likely:
                continue
            looks = self.looks_of(trial, self.scores, risk, level)
            # The end of every round is tried. If all photos of a folder get a label, none is left
            # for the guarantee, so fewer labels can show more.
            for end in _ends_of_rounds(self.n_to_draw(trial, n_labels)):
                if looks.can_certify(self._evenly_spread_scores(trial.limit, end)):
                    return risk
        return None

    def _evenly_spread_scores(self, limit: float, n: int) -> Floats:
        """``n`` scores up to a limit, in equal steps of rank."""
        below_limit = self.scores[self.scores <= limit]
        rank = np.linspace(0, len(below_limit) - 1, n)
        spread: Floats = below_limit[rank.round().astype(np.int64)]
        return spread


def _ends_of_rounds(n_drawn: int) -> list[int]:
    """Numbers of labels after which the test is made, if ``n_drawn`` labels come in rounds."""
    return [*range(ROUND, n_drawn, ROUND), n_drawn]

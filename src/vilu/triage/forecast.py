"""Forecasts how many photos could be accepted, before anybody gives the labels.

The labels are simulated, as if no label were given yet. The simulation draws as many photos up to
the planned uncertainty limit as a triage would draw. Each drawn photo gets a simulated label. The
label says "wrong" with the predictor's failure probability. These probabilities may all be too low
or too high, so each simulation multiplies all probabilities by the same random factor. The
simulated labels are tested after every round, like real labels.

A predictor gets better with more labels. The simulation does not include this effect. So the upper
end of a range may be raised if it is not 0. The photos with the lowest probabilities are taken, as
long as their mean probability is at most a multiple of the risk (``MULTIPLE_BEFORE_LABELS``,
``MULTIPLE_AFTER_LABELS``). The upper end is at least the share of these photos.

The ranges are estimates, not guarantees. docs/triage.md reports how often the ranges held.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, Self

import numpy as np

from vilu.artifacts.documents import FrozenModel
from vilu.calibration.closed_set import AnyThresholdTests
from vilu.metrics.counts import Floats, Ints
from vilu.triage.trial import Trial

LABEL_BUDGETS: Final = (100, 200, 400)
"""Total label counts for forecasts."""

SEED: Final = 0
"""Seed for the simulations."""

N_SIMULATIONS: Final = 60
"""How many simulations run for every label count."""

LOG_FACTOR_SPREAD: Final = 0.7
"""The logarithm of the probabilities' random factor has this standard deviation."""

RANGE_QUANTILES: Final = (0.1, 0.9)
"""The ends of a range are these quantiles of the simulated shares."""

MULTIPLE_BEFORE_LABELS: Final = 1.5
"""The upper end of a range uses this multiple of the risk, if no label was given yet."""

MULTIPLE_AFTER_LABELS: Final = 1.2
"""As ``MULTIPLE_BEFORE_LABELS``, but for a predictor after a fit on labels."""

LABELS_PER_ROUND: Final = 50
"""How many labels lie between two simulated tests."""

RISKS: Final = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3)
"""Risks to try, ascending, for the least risk that labels can show."""

MIN_LABELS_BEFORE_DRAW: Final = 50
"""The first draw needs at least this many fit-side labels, even if there are fewer classes."""

MAX_LABELS_BEFORE_DRAW: Final = 100
"""The first draw needs one fit-side label per class, but at most this many labels."""

SHARE_WORTH_A_DRAW: Final = 0.3
"""If a smaller share of photos is up to the limit, labels to fit on are asked for first."""

LABELS_ENOUGH_FOR_DRAW: Final = 200
"""With this many fit-side labels, photos are drawn even if few photos are up to the limit."""

MakeTests = Callable[[Trial, Floats, float, float], AnyThresholdTests]
"""Makes a trial's tests from the photo scores, the risk and the level."""


def is_enough_to_fit(trial: Trial, n_fit_labels: int, n_classes: int) -> bool:
    """Return whether the predictor was fitted on enough labels to draw calibration photos.

    With more labels to fit on, a predictor can accept more photos. So a draw waits for a required
    number. It waits longer if only a small share of the photos is up to the uncertainty limit, but
    at most for ``LABELS_ENOUGH_FOR_DRAW`` labels.
    """
    # one label per class, but not below the minimum and not above the maximum
    n_required = min(max(n_classes, MIN_LABELS_BEFORE_DRAW), MAX_LABELS_BEFORE_DRAW)
    if n_fit_labels < n_required:
        return False
    return trial.share >= SHARE_WORTH_A_DRAW or n_fit_labels >= LABELS_ENOUGH_FOR_DRAW


class ExpectedShare(FrozenModel):
    """Range for the share of accepted photos, with a certain label count.

    Attributes:
        n_labels: Total label count.
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

    def raised_to(self, share: float) -> Self:
        """Raise both range ends to at least ``share``, the share accepted already."""
        lowest = max(self.lowest, share)
        highest = max(self.highest, share)
        return self.model_copy(update={"lowest": lowest, "highest": highest})


class Forecast(FrozenModel):
    """How many photos in a folder could be accepted at a risk, for several label counts.

    Attributes:
        n_photos: Number of photos.
        max_risk: The risk: largest allowed error rate among the accepted answers.
        expected: Ranges for several label counts, the smallest count first.
        least_risk: The smallest risk in ``RISKS`` that the largest label count can show, or None
            if so many labels show none of ``RISKS``.
    """

    n_photos: int
    max_risk: float
    expected: tuple[ExpectedShare, ...]
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
        make_tests: MakeTests,
        share_accepted: float = 0.0,
    ) -> Self:
        """Make the forecast from scores and from the guarantee in force.

        Args:
            uncertainty: (M,) failure probabilities of the calibration photos.
            n_photos: Number of all photos.
            n_classes: Number of classes.
            n_fit_labels: How many labels the predictor was fitted on.
            most_fit_labels: Largest possible number of labels to fit on.
            n_labels: Label count so far.
            max_risk: Largest allowed error rate among the accepted answers.
            level: Level for the next test.
            make_tests: Makes a trial's tests (``PhotoSplit.tests_before_labels``).
            share_accepted: Share of photos accepted by the guarantee in force.
        """
        scores = np.sort(uncertainty[np.isfinite(uncertainty)])
        budgets = _label_budgets(n_labels, n_photos)
        expected: list[ExpectedShare] = []
        least_risk = None
        if len(scores) and budgets:
            simulation = _Simulation(scores, n_classes, n_fit_labels, most_fit_labels, make_tests)
            for n in budgets:
                share = simulation.expected_share(n, max_risk, level)
                expected.append(share.raised_to(share_accepted))
            least_risk = simulation.least_risk(budgets[-1], level)
        return cls(
            n_photos=n_photos,
            max_risk=max_risk,
            expected=tuple(expected),
            least_risk=least_risk,
        )

    @property
    def can_accept_photos(self) -> bool:
        """Whether any photo may be accepted with any of these label counts."""
        return any(expected.highest > 0 for expected in self.expected)

    def __str__(self) -> str:
        if not self.expected:
            return ""
        numbers = " / ".join(f"{expected.n_labels:,}" for expected in self.expected)
        most_labels = f"{self.expected[-1].n_labels:,}"
        target = f"a risk of {100 * self.max_risk:.3g}%"
        if self.can_accept_photos:
            shares = " / ".join(map(str, self.expected))
            text = (
                f"With {numbers} labels in all, about {shares} % of the photos could be accepted "
                f"at {target} (an estimate)."
            )
        else:
            text = (
                f"With up to {most_labels} labels in all, probably nothing can be accepted at "
                f"{target}."
            )
        is_out_of_reach = self.least_risk is None or self.least_risk > self.max_risk
        if self.can_accept_photos and is_out_of_reach:
            return text  # a few simulations show the risk, so no other risk is advised
        return f"{text} {self._least_risk_in_words(most_labels)}"

    def _least_risk_in_words(self, most_labels: str) -> str:
        """Write a sentence on the least possible risk with ``most_labels`` labels."""
        if self.least_risk is None:
            return (
                f"With so many labels not even a risk of {RISKS[-1]:.0%} can be shown here: add "
                "photos."
            )
        if self.least_risk <= self.max_risk:
            return (
                f"The least risk that {most_labels} labels can show here is about "
                f"{self.least_risk:.0%}."
            )
        return (
            f"They could show a risk of about {self.least_risk:.0%}: give "
            f"--max-risk {self.least_risk}."
        )


def _label_budgets(n_labels: int, n_photos: int) -> list[int]:
    """Return total label counts for forecasts, ascending.

    Each count is at least one round larger than the label count so far, and smaller than the
    photo count. The list is empty if one more round would label every photo.

    Args:
        n_labels: Label count so far.
        n_photos: Number of photos.
    """
    smallest = n_labels + LABELS_PER_ROUND
    if smallest >= n_photos:
        return []
    budgets = [n for n in LABEL_BUDGETS if smallest <= n < n_photos]
    if budgets:
        return budgets
    # All numbers in ``LABEL_BUDGETS`` are too small or too large, so they are added to the labels
    # so far.
    sums = [n_labels + n for n in LABEL_BUDGETS]
    sums_below_n_photos = [total for total in sums if total < n_photos]
    return sums_below_n_photos or [smallest]


class _Simulation:
    """Simulates photo labels. Each answer is wrong with the predictor's probability.

    Args:
        scores: (M,) failure probabilities of the calibration photos, ascending.
        n_classes: Number of classes.
        n_fit_labels: How many labels the predictor was fitted on.
        most_fit_labels: Largest possible number of labels to fit on.
        make_tests: Makes a trial's tests.
    """

    def __init__(
        self,
        scores: Floats,
        n_classes: int,
        n_fit_labels: int,
        most_fit_labels: int,
        make_tests: MakeTests,
    ) -> None:
        self.scores = scores
        self.most_fit_labels = most_fit_labels
        self.n_classes = n_classes
        self.n_fit_labels = n_fit_labels
        self.make_tests = make_tests
        self.rng = np.random.default_rng(SEED)

    def plan(self, max_risk: float, level: float) -> Trial:
        """Plan the predictor's test."""
        return Trial.plan(
            n_fit=self.n_fit_labels,
            scores=self.scores,
            n_answered=0,
            max_risk=max_risk,
            delta=level,
        )

    def n_to_draw(self, trial: Trial, n_labels: int) -> int:
        """Return how many of ``n_labels`` are for the guarantee, after the labels to fit on."""
        n_fit = max(self.n_fit_labels, MIN_LABELS_BEFORE_DRAW)
        while not is_enough_to_fit(trial, n_fit, self.n_classes):
            n_fit += LABELS_PER_ROUND
        n_fit = min(n_fit, self.most_fit_labels)
        n_up_to_limit = int((self.scores <= trial.limit).sum())
        return max(0, min(n_labels - n_fit, n_up_to_limit))

    def expected_share(self, n_labels: int, max_risk: float, level: float) -> ExpectedShare:
        """Compute the range for the share of accepted photos with ``n_labels`` labels."""
        trial = self.plan(max_risk, level)
        n_drawn = self.n_to_draw(trial, n_labels)
        tests = self.make_tests(trial, self.scores, max_risk, level)
        if not n_drawn:
            return ExpectedShare(n_labels=n_labels, lowest=0.0, highest=0.0)
        shares = [self._simulated_share(tests, n_drawn) for _ in range(N_SIMULATIONS)]
        lowest, highest = np.quantile(shares, RANGE_QUANTILES)
        if highest == 0:
            return ExpectedShare(n_labels=n_labels, lowest=0.0, highest=0.0)
        multiple = MULTIPLE_AFTER_LABELS if self.n_fit_labels else MULTIPLE_BEFORE_LABELS
        # for each photo, the mean probability over this photo and all photos with lower scores
        mean_probability = np.cumsum(self.scores) / np.arange(1, len(self.scores) + 1)
        # The scores are ascending, so this is True for the first photos and False for the rest.
        has_low_mean = mean_probability <= multiple * max_risk
        share_with_low_mean = float(has_low_mean.mean())
        highest = max(float(highest), share_with_low_mean)
        return ExpectedShare(n_labels=n_labels, lowest=float(lowest), highest=highest)

    def _simulated_share(self, tests: AnyThresholdTests, n_drawn: int) -> float:
        """Simulate labels and tests. Return the share of photos up to the certified threshold."""
        rows_up_to_limit = np.flatnonzero(self.scores <= tests.limit)
        drawn_rows: Ints = self.rng.permutation(rows_up_to_limit)[:n_drawn]
        drawn_scores = self.scores[drawn_rows]
        # the predictor's probabilities may all be too low or too high by this factor
        log_factor = self.rng.normal(0.0, LOG_FACTOR_SPREAD)
        probability_factor = math.exp(log_factor)
        failure_probability = np.minimum(probability_factor * drawn_scores, 1.0)
        is_wrong = self.rng.random(len(drawn_rows)) < failure_probability
        failure = is_wrong.astype(np.int64)
        threshold = -math.inf
        for n_so_far in _label_counts_at_tests(n_drawn):
            scores_so_far = drawn_scores[:n_so_far]
            failure_so_far = failure[:n_so_far]
            index = tests.index_of_laxest_certified_threshold(scores_so_far, failure_so_far)
            if index is not None:
                threshold = max(threshold, float(tests.grid[index]))
        return float((self.scores <= threshold).mean())

    def least_risk(self, n_labels: int, level: float) -> float | None:
        """Return the least risk in ``RISKS`` that ``n_labels`` right answers can show.

        None if so many labels show none of ``RISKS``.
        """
        for risk in RISKS:
            trial = self.plan(risk, level)
            if not trial.likely:
                continue
            tests = self.make_tests(trial, self.scores, risk, level)
            # Every test is tried, not only the last test. If all photos in a folder had a label, no
            # photo would be left for the guarantee. So fewer labels can show more.
            n_drawn = self.n_to_draw(trial, n_labels)
            for n_so_far in _label_counts_at_tests(n_drawn):
                spread_scores = self._evenly_spread_scores(trial.limit, n_so_far)
                if tests.can_certify(spread_scores):
                    return risk
        return None

    def _evenly_spread_scores(self, limit: float, n: int) -> Floats:
        """Return ``n`` scores up to a limit, with evenly spaced ranks."""
        scores_up_to_limit = self.scores[self.scores <= limit]
        exact_ranks = np.linspace(0, len(scores_up_to_limit) - 1, n)
        rounded_ranks = exact_ranks.round()
        spread_scores: Floats = scores_up_to_limit[rounded_ranks.astype(np.int64)]
        return spread_scores


def _label_counts_at_tests(n_drawn: int) -> list[int]:
    """Return the label count at each test, if ``n_drawn`` labels come in rounds."""
    return [*range(LABELS_PER_ROUND, n_drawn, LABELS_PER_ROUND), n_drawn]

"""Replay a triage on stored scores, label by label, with a procedure from ``procedures``.

A *chain* has, for a set and a seed, the scores by predictors fitted on more and more labels. So a
procedure's replay takes a moment, while a triage would fit every predictor again. A replay takes
the steps of ``vilu.triage.run.advance``, and every requested label arrives before the next step. A
replay differs from a triage in three points. First, if no label count can certify anything, a
triage stops and a replay continues to draw. Second, a replay always judges adapted answers, without
a choice between adapted and zero-shot answers. Third, a chain's last fit has 500 labels, and from
then on a replay asks for no labels to fit on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from benchmarks.risk_tests import ExactLook, RiskTest
from vilu.calibration.anytime import N_THRESHOLDS_UP_TO_LIMIT, ThresholdTests
from vilu.metrics.counts import Floats, Ints
from vilu.triage.choose import choose_limit
from vilu.triage.fitting import (
    GROWTH_AFTER_TEST,
    GROWTH_FOR_CANDIDATE,
    GROWTH_FOR_UNLIKELY_CANDIDATE,
)
from vilu.triage.forecast import MIN_LABELS_BEFORE_DRAW
from vilu.triage.guarantee import Mask
from vilu.triage.run import CALIBRATION_INTERVAL, THRESHOLDS_PER_STEP
from vilu.triage.trial import Trial

MAX_RISK: Final = 0.05
DELTA: Final = 0.05

LABELS_PER_ROUND: Final = 50
LABELS_PER_LATER_ROUND: Final = 100
LABELS_BEFORE_LATER_ROUNDS: Final = 400
"""Labels in a round, labels in a later round, and the label count where later rounds begin."""

MAX_LABELS: Final = 1_200
"""A replay asks for at most so many labels, both sides together."""


@dataclass(frozen=True)
class Chain:
    """Scores for a set's calibration photos by predictors fitted on more and more labels.

    The photos are in random order.

    Attributes:
        name: Name of the set.
        seed: Seed for the sides, the order and the fits.
        n_classes: Number of classes.
        uncertainty: (F, M) uncertainties of M photos by F predictors.
        failure: (F, M) whether the judged answer is wrong.
        n_fit: (F,) labels in each predictor's fit, ascending. 0 is zero-shot.
        luck: (M,) uniform numbers for weighted draws.
    """

    name: str
    seed: int
    n_classes: int
    uncertainty: Floats
    failure: Ints
    n_fit: Ints
    luck: Floats

    @classmethod
    def load(cls, path: Path) -> Chain:
        """Read a chain written by ``python -m benchmarks.procedures chains``."""
        name, _, seed = path.stem.rpartition("_")
        with np.load(path) as arrays:
            calibration_rows = np.flatnonzero(arrays["cal"])
            order = calibration_rows[np.argsort(arrays["pos"][calibration_rows])]
            failure = arrays["wrong"][:, order].astype(np.int64)
            rng = np.random.default_rng(int(seed))
            luck = rng.random(len(order))
            return cls(
                name=name,
                seed=int(seed),
                n_classes=int(arrays["n_classes"]),
                uncertainty=arrays["u"][:, order],
                failure=failure,
                n_fit=arrays["n_fit"],
                luck=luck,
            )

    def in_another_order(self, number: int) -> Chain:
        """Return the chain with the photos in a random order. Number 0 is the present order."""
        if number == 0:
            return self
        rng = np.random.default_rng([self.seed, number])
        order = rng.permutation(len(self.luck))
        uncertainty = self.uncertainty[:, order]
        return replace(self, uncertainty=uncertainty, failure=self.failure[:, order])

    def fit_of(self, n_labels: int) -> int:
        """Return the index of the predictor fitted on the most labels up to ``n_labels``."""
        return int(np.searchsorted(self.n_fit, n_labels, side="right")) - 1


class LabelChoice(NamedTuple):
    """Two functions that choose the labels for a test.

    Both functions get a mask (M,) for drawn photos, a mask (M,) for photos with a label, and the
    end of the draws so far.

    Attributes:
        rows_for_test: Function that returns the rows with used labels.
        rows_missing: Function that returns the rows to label before any other row.
    """

    rows_for_test: Callable[[Mask, Mask, int], Ints]
    rows_missing: Callable[[Mask, Mask, int], Ints]


def rows_before_first_open(is_drawn: Mask, is_labelled: Mask, end: int) -> Ints:  # noqa: ARG001 - see LabelChoice
    """Return all drawn rows before the first drawn row without a label."""
    open_rows = np.flatnonzero(is_drawn & ~is_labelled)
    first_open = int(open_rows[0]) if len(open_rows) else len(is_drawn)
    return np.flatnonzero(is_drawn[:first_open])


def no_missing_rows(is_drawn: Mask, is_labelled: Mask, end: int) -> Ints:  # noqa: ARG001 - see LabelChoice
    """Return no row, because in a replay every requested label has arrived."""
    return np.zeros(0, np.int64)


def open_rows_before_end(is_drawn: Mask, is_labelled: Mask, end: int) -> Ints:
    """Return drawn rows without a label before the end of the draws so far."""
    return np.flatnonzero(is_drawn[:end] & ~is_labelled[:end])


def complete_rows_before_end(is_drawn: Mask, is_labelled: Mask, end: int) -> Ints:
    """Return all drawn rows before ``end``, or no row if one of these rows has no label."""
    if len(open_rows_before_end(is_drawn, is_labelled, end)):
        return np.zeros(0, np.int64)
    return np.flatnonzero(is_drawn[:end])


CHOICE_TO_FIRST_OPEN: Final = LabelChoice(rows_before_first_open, no_missing_rows)
CHOICE_TO_END_OF_DRAWS: Final = LabelChoice(complete_rows_before_end, open_rows_before_end)


class TestResult(NamedTuple):
    """The labels used by a test, and the certified threshold.

    Attributes:
        looks: Thresholds, risk, level and limit for the test.
        uncertainty: (N,) uncertainties of the counted photos.
        failure: (N,) whether the answers to the counted photos are wrong.
        certified_index: Index of the laxest certified threshold, None if none is certified.
    """

    looks: ThresholdTests
    uncertainty: Floats
    failure: Ints
    certified_index: int | None


def raise_limit_if_certified(trial: Trial, scores: Floats, test_result: TestResult) -> Trial:
    """Return the trial, with a higher limit if all thresholds up to the limit are certified."""
    if test_result.certified_index != test_result.looks.last_tested_index:
        return trial
    return trial.with_raised_limit(THRESHOLDS_PER_STEP, scores)


MAX_LIMIT_FACTOR: Final = 1.5
"""A limit that follows the labels includes at most this multiple of the photos before."""

PRIOR_WRONG: Final = 0.5
"""This number is added to both counts of wrong answers, seen and expected, before the division."""

MIN_LIMIT_INDEX: Final = 7
"""A limit that follows the labels is at least the threshold with this index."""


def follow_labels(trial: Trial, scores: Floats, test_result: TestResult) -> Trial:
    """Return the trial with a new limit.

    For the new limit, predicted risks are multiplied by the count of wrong answers over the
    expected count.
    """
    ratio = (test_result.failure.sum() + PRIOR_WRONG) / (
        test_result.uncertainty.sum() + PRIOR_WRONG
    )
    n_labels = min(max(200, len(test_result.failure) + 100), len(scores))
    limit, _ = choose_limit(scores * ratio, n_labels, MAX_RISK, test_result.looks.delta / 2)
    limit = limit / ratio
    n_included = int((scores <= trial.limit).sum())
    n_largest = min(math.ceil(MAX_LIMIT_FACTOR * n_included), len(scores))
    limit = min(limit, float(np.sort(scores)[n_largest - 1]))
    index = int(np.searchsorted(trial.grid, limit))
    index = min(max(index, MIN_LIMIT_INDEX), len(trial.grid) - 1)
    is_lower = trial.grid[index] < trial.limit
    if is_lower and test_result.certified_index is not None:
        return trial
    return trial.model_copy(update={"limit": trial.grid[index]})


@dataclass(frozen=True)
class Procedure:
    """A test, and the rules for requesting labels.

    Attributes:
        test: The test for a predictor's thresholds.
        level_of: Function of k and the level for all predictors. The result is the level for
            predictor number k (from 1).
        planned_share: The limit is planned for this multiple of the level in ``Trial.plan``.
        label_choice: Chooses the labels for a test.
        move_limit: Function that moves the limit after a test.
        most_to_fit: Calibration labels are drawn only after there are enough labels to fit on: one
            per class, but at least 50, and at most this number.
        share_worth_a_draw: With fewer than ``enough_to_fit`` labels to fit on, calibration labels
            are drawn only if the limit includes at least this share of the photos.
        enough_to_fit: From this count of labels to fit on, ``share_worth_a_draw`` is ignored.
        candidate_part: Share of labels for the calibration side while a candidate is tested.
        worth_more: A candidate's limit must include this multiple of the photos accepted now.
        grown_before_a_look: An untested predictor is replaced by a new fit if the labels have grown
            by this factor.
    """

    test: RiskTest
    level_of: Callable[[int, float], float]
    planned_share: float
    label_choice: LabelChoice
    move_limit: Callable[[Trial, Floats, TestResult], Trial]
    most_to_fit: int
    share_worth_a_draw: float
    enough_to_fit: int
    candidate_part: float
    worth_more: float
    grown_before_a_look: float


@dataclass
class Trialled:
    """A predictor with a trial: the index of the fit in the chain, and the test plan."""

    fit: int
    trial: Trial
    has_handed_on: bool = False  # whether a part of the level was passed on

    @property
    def is_tested(self) -> bool:
        """Whether the predictor has had enough labels for a certificate."""
        return self.trial.level > 0


class Reached(NamedTuple):
    """The coverage and the risk reached at a label count.

    Attributes:
        n_labels: Labels on both sides.
        coverage: Accepted share of the calibration photos without a label.
        risk: Error rate among all accepted calibration photos.
    """

    n_labels: int
    coverage: float
    risk: float


@dataclass
class Replay:
    """A triage of a chain's photos by a procedure."""

    chain: Chain
    procedure: Procedure
    n_fit: int = 0
    n_tested: int = 0
    handed_on: float = 0.0
    end_of_draws: int = 0
    n_fit_of_last_candidate: int = 0
    present: Trialled | None = None
    candidate: Trialled | None = None
    threshold: float | None = None  # the present predictor's guaranteed threshold
    is_labelled: Mask = field(init=False)

    def __post_init__(self) -> None:
        self.is_labelled = np.zeros(len(self.chain.luck), np.bool_)

    def rounds(self) -> Iterator[Reached]:
        """Yield the result of every round, until there are enough labels or no photo is left."""
        while True:
            self.choose_predictor()
            test_result = self.run_test()
            if test_result is not None:
                self.keep_threshold(test_result)
            yield self.reached()
            n_left = MAX_LABELS - self.n_labels
            n_round = (
                LABELS_PER_ROUND
                if self.n_labels < LABELS_BEFORE_LATER_ROUNDS
                else LABELS_PER_LATER_ROUND
            )
            n_before = self.n_labels
            self.ask_for_labels(min(n_round, n_left), test_result)
            if self.n_labels == n_before:
                return

    @property
    def n_labels(self) -> int:
        """Labels on both sides."""
        return self.n_fit + int(self.is_labelled.sum())

    @property
    def under_test(self) -> Trialled | None:
        """The candidate. If there is no candidate, the present predictor."""
        return self.present if self.candidate is None else self.candidate

    def reached(self) -> Reached:
        """Return the guarantee's coverage and risk after the labels so far."""
        if self.present is None or self.threshold is None or self.is_labelled.all():
            return Reached(self.n_labels, 0.0, 0.0)
        is_accepted = self.chain.uncertainty[self.present.fit] <= self.threshold
        coverage = is_accepted[~self.is_labelled].mean()
        risk = self.chain.failure[self.present.fit][is_accepted].mean()
        return Reached(self.n_labels, float(coverage), float(risk))

    def share_accepted(self) -> float:
        """Return the share of all calibration photos accepted under the guarantee."""
        if self.present is None or self.threshold is None:
            return 0.0
        return float((self.chain.uncertainty[self.present.fit] <= self.threshold).mean())

    # The first step: which predictor is tested.

    def choose_predictor(self) -> None:
        """Take the newest predictor in the chain if there are enough new labels."""
        fit = self.chain.fit_of(self.n_fit)
        needs_labels = fit > 0
        if not needs_labels or self.n_fit < self.n_labels_for_a_new_fit():
            return
        if self.threshold is None:
            first_trial = self.plan(fit, least_share=0.0)
            self.present = Trialled(fit, first_trial)
            return
        least_share = min(self.procedure.worth_more * self.share_accepted(), 1.0)
        trial = self.plan(fit, least_share=least_share)
        self.n_fit_of_last_candidate = self.n_fit
        under_test = self.under_test
        has_far_more_labels = (
            under_test is not None
            and self.n_fit >= GROWTH_FOR_UNLIKELY_CANDIDATE * under_test.trial.n_fit
        )
        if trial.likely or has_far_more_labels:
            self.candidate = Trialled(fit, trial)

    def n_labels_for_a_new_fit(self) -> float:
        """Return from how many labels to fit on a new predictor is taken."""
        under_test = self.under_test
        if under_test is None:
            return 0
        looks_for_a_candidate = self.threshold is not None and self.candidate is None
        if looks_for_a_candidate:
            n_before = max(under_test.trial.n_fit, self.n_fit_of_last_candidate)
            return GROWTH_FOR_CANDIDATE * n_before
        if under_test.is_tested:
            return GROWTH_AFTER_TEST * under_test.trial.n_fit
        return self.procedure.grown_before_a_look * under_test.trial.n_fit

    def plan(self, fit: int, *, least_share: float) -> Trial:
        """Plan a predictor's test, from the scores alone."""
        n_answered = int(self.is_labelled.sum())
        delta = self.procedure.planned_share * self.next_level()
        return Trial.plan(
            n_fit=self.n_fit,
            scores=self.chain.uncertainty[fit],
            n_answered=n_answered,
            max_risk=MAX_RISK,
            delta=delta,
            least_share=least_share,
        )

    def next_level(self) -> float:
        """Return the next predictor's level: the level by number, plus the level passed on."""
        return self.procedure.level_of(self.n_tested + 1, DELTA) + self.handed_on

    # The second step: the labels certify a threshold.

    def is_drawn(self, under_test: Trialled) -> Mask:
        """Return a mask (M,) of the photos in a predictor's draw, with or without a label."""
        trial = under_test.trial
        uncertainty = self.chain.uncertainty[under_test.fit]
        planned_limit = trial.grid[N_THRESHOLDS_UP_TO_LIMIT - 1]
        probability = self.procedure.test.draw_probability(uncertainty, planned_limit)
        is_drawn: Mask = (uncertainty <= trial.limit) & (self.chain.luck < probability)
        return is_drawn

    def run_test(self) -> TestResult | None:
        """Test the thresholds of the predictor under test. Return None if there is no predictor."""
        under_test = self.under_test
        if under_test is None:
            return None
        test = self.procedure.test
        trial = under_test.trial
        is_drawn = self.is_drawn(under_test)
        rows = self.procedure.label_choice.rows_for_test(
            is_drawn, self.is_labelled, self.end_of_draws
        )
        uncertainty = self.chain.uncertainty[under_test.fit][rows]
        failure = self.chain.failure[under_test.fit][rows]
        level = trial.level or self.next_level()
        grid = np.array(trial.grid)
        looks = ThresholdTests(grid, MAX_RISK, level, trial.limit)
        no_failure = np.zeros_like(failure)
        can_certify = test.certified_index(looks, uncertainty, no_failure) is not None
        if can_certify and not under_test.is_tested:
            under_test.trial = trial.model_copy(update={"level": level})
            self.n_tested += 1
            self.handed_on = 0.0
        certified = test.certified_index(looks, uncertainty, failure)
        is_limit_certified = certified is not None and certified >= N_THRESHOLDS_UP_TO_LIMIT - 1
        if is_limit_certified and not under_test.has_handed_on:
            under_test.has_handed_on = True
            self.handed_on = test.handed_on * level
        return TestResult(looks, uncertainty, failure, certified)

    # The third step: keep a certified threshold that accepts more than before.

    def keep_threshold(self, test_result: TestResult) -> None:
        """Keep a laxer threshold. A candidate that accepts more becomes the present predictor."""
        if test_result.certified_index is None:
            return
        threshold = float(test_result.looks.grid[test_result.certified_index])
        if self.candidate is None:
            is_laxer = self.threshold is None or threshold > self.threshold
            if is_laxer:
                self.threshold = threshold
            return
        share = float((self.chain.uncertainty[self.candidate.fit] <= threshold).mean())
        if share > self.share_accepted():
            self.present = self.candidate
            self.candidate = None
            self.threshold = threshold

    # The last step: ask for labels.

    def ask_for_labels(self, n: int, test_result: TestResult | None) -> None:
        """Label ``n`` further photos, on the calibration side and on the fit side."""
        drawn: Ints = np.zeros(0, np.int64)
        waits_for_missing = False
        under_test = self.under_test
        if under_test is not None and test_result is not None:
            is_drawn = self.is_drawn(under_test)
            missing = self.procedure.label_choice.rows_missing(
                is_drawn, self.is_labelled, self.end_of_draws
            )
            drawn = missing[:n]
            waits_for_missing = len(missing) > 0
            n_draws = self.n_to_draw(under_test.trial, n)
            if n_draws and not waits_for_missing:
                drawn = self.draw_rows(under_test, test_result, n_draws)
        self.is_labelled[drawn] = True
        is_held_up = waits_for_missing and self.threshold is None
        if not is_held_up:
            n_left = int(self.chain.n_fit[-1]) - self.n_fit
            self.n_fit += min(n - len(drawn), n_left)

    def draw_rows(self, under_test: Trialled, test_result: TestResult, n: int) -> Ints:
        """Move the limit, and draw the next ``n`` photos up to the limit."""
        scores = self.chain.uncertainty[under_test.fit]
        under_test.trial = self.procedure.move_limit(under_test.trial, scores, test_result)
        is_open = self.is_drawn(under_test) & ~self.is_labelled
        rows = np.flatnonzero(is_open)[:n]
        if len(rows):
            self.end_of_draws = max(self.end_of_draws, int(rows[-1]) + 1)
        return rows

    def n_to_draw(self, trial: Trial, n: int) -> int:
        """Return how many of the next ``n`` labels are calibration labels."""
        if self.candidate is not None:
            return int(n * self.procedure.candidate_part)
        if self.threshold is not None:
            return n // CALIBRATION_INTERVAL
        return n if self.is_ready_to_draw(trial) else 0

    def is_ready_to_draw(self, trial: Trial) -> bool:
        """Return whether calibration labels are drawn for a predictor without a guarantee."""
        if self.n_fit == self.chain.n_fit[-1]:
            return True
        n_wanted = min(
            max(self.chain.n_classes, MIN_LABELS_BEFORE_DRAW), self.procedure.most_to_fit
        )
        is_possible = trial.likely and self.n_fit >= n_wanted
        is_worth_it = trial.share >= self.procedure.share_worth_a_draw
        return is_possible and (is_worth_it or self.n_fit >= self.procedure.enough_to_fit)


def exact_look(chain: Chain, n_labels: int, test: ExactLook, planned_share: float) -> float:
    """Return an exact look's coverage: half the labels to fit on, half drawn up to the limit.

    If a chain's last fit has fewer labels than half, the others are drawn. The limit is planned for
    the level times ``planned_share``.
    """
    n_fit = min(n_labels // 2, int(chain.n_fit[-1]))
    fit = chain.fit_of(n_fit)
    scores = chain.uncertainty[fit]
    trial = Trial.plan(n_fit, scores, n_labels - n_fit, MAX_RISK, planned_share * DELTA)
    rows = np.flatnonzero(scores <= trial.limit)[: n_labels - n_fit]
    grid = np.array(trial.grid)
    looks = ThresholdTests(grid, MAX_RISK, DELTA, trial.limit)
    certified = test.certified_index(looks, scores[rows], chain.failure[fit][rows])
    if certified is None:
        return 0.0
    is_open = np.ones(len(scores), np.bool_)
    is_open[rows] = False
    if not is_open.any():
        return 0.0
    return float((scores[is_open] <= looks.grid[certified]).mean())

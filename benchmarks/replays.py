"""Replay of a triage on stored scores, label by label, with a procedure of ``procedures``.

A *chain* has, for a set and a seed, the scores of predictors fitted on more and more labels. So a
replay of a procedure takes a moment, while a triage would fit every predictor again. A replay takes
the steps of ``vilu.triage.run.advance``, and every requested label arrives before the next step. A
replay differs from a triage in two points. First, if no number of labels can certify anything, a
triage stops and a replay continues to draw. Second, a replay always judges adapted answers, without
a choice between adapted and zero-shot answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from benchmarks.risk_tests import ExactLook, RiskTest
from vilu.calibration.anytime import STEPS, Looks
from vilu.metrics.counts import Floats, Ints
from vilu.triage.choose import choose_limit
from vilu.triage.fitting import (
    GROWTH_AFTER_TEST,
    GROWTH_FOR_CANDIDATE,
    GROWTH_FOR_UNLIKELY_CANDIDATE,
)
from vilu.triage.forecast import FEWEST_TO_FIT
from vilu.triage.guarantee import Mask
from vilu.triage.run import CALIBRATION_PART, THRESHOLDS_PER_STEP
from vilu.triage.trial import Trial

MAX_RISK: Final = 0.05
DELTA: Final = 0.05

ROUND: Final = 50
LATER_ROUND: Final = 100
MANY: Final = 400
"""Labels of a round, labels of a later round, and the number of labels where later rounds begin."""

MOST_LABELS: Final = 800


@dataclass(frozen=True)
class Chain:
    """Scores of a set's calibration photos by predictors fitted on more and more labels.

    The photos are in random order.

    Attributes:
        name: Name of the set.
        seed: Seed of the sides, of the order and of the fits.
        n_classes: Number of classes.
        uncertainty: (F, M) uncertainties of the M photos by each of the F predictors.
        failure: (F, M) whether the judged answer is wrong.
        n_fit: (F,) number of labels in the fit of each predictor, ascending; 0: zero-shot.
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
            return cls(
                name=name,
                seed=int(seed),
                n_classes=int(arrays["n_classes"]),
                uncertainty=arrays["u"][:, order],
                failure=arrays["wrong"][:, order].astype(np.int64),
                n_fit=arrays["n_fit"],
                luck=np.random.default_rng(int(seed)).random(len(order)),
            )

    def in_another_order(self, number: int) -> Chain:
        """The chain with the photos in another random order; number 0 is the present order."""
        if number == 0:
            return self
        rng = np.random.default_rng([self.seed, number])
        order = rng.permutation(len(self.luck))
        uncertainty = self.uncertainty[:, order]
        return replace(self, uncertainty=uncertainty, failure=self.failure[:, order])

    def fit_of(self, n_labels: int) -> int:
        """Index of the predictor fitted on the most labels up to ``n_labels``."""
        return int(np.searchsorted(self.n_fit, n_labels, side="right")) - 1


class Counting(NamedTuple):
    """Two functions that choose the labels for a test.

    Both functions get a mask (M,) of the drawn photos, a mask (M,) of the photos with a label, and
    the end of the draws so far.

    Attributes:
        counted: Function that returns the rows with used labels.
        missing: Function that returns the rows to label before any other row.
    """

    counted: Callable[[Mask, Mask, int], Ints]
    missing: Callable[[Mask, Mask, int], Ints]


def before_first_open(is_drawn: Mask, answered: Mask, end: int) -> Ints:  # noqa: ARG001 - see Counting
    """All drawn rows before the first drawn row without a label."""
    open_rows = np.flatnonzero(is_drawn & ~answered)
    first_open = int(open_rows[0]) if len(open_rows) else len(is_drawn)
    return np.flatnonzero(is_drawn[:first_open])


def nothing_missing(is_drawn: Mask, answered: Mask, end: int) -> Ints:  # noqa: ARG001 - see Counting
    """No row, because in a replay every requested label has arrived."""
    return np.zeros(0, np.int64)


def open_before_end(is_drawn: Mask, answered: Mask, end: int) -> Ints:
    """Drawn rows without a label before the end of the draws so far."""
    return np.flatnonzero(is_drawn[:end] & ~answered[:end])


def complete_before_end(is_drawn: Mask, answered: Mask, end: int) -> Ints:
    """All drawn rows before the end of the draws; no row while a label of these rows is missing."""
    if len(open_before_end(is_drawn, answered, end)):
        return np.zeros(0, np.int64)
    return np.flatnonzero(is_drawn[:end])


TO_FIRST_OPEN: Final = Counting(before_first_open, nothing_missing)
TO_END_OF_DRAWS: Final = Counting(complete_before_end, open_before_end)


class Counted(NamedTuple):
    """The labels used by a test, and the certified threshold.

    Attributes:
        looks: Thresholds, risk, level and limit of the test.
        uncertainty: (N,) uncertainties of the counted photos.
        failure: (N,) whether the answers to the counted photos are wrong.
        certified: Index of the laxest certified threshold; None if no threshold is certified.
    """

    looks: Looks
    uncertainty: Floats
    failure: Ints
    certified: int | None


def further(trial: Trial, scores: Floats, counted: Counted) -> Trial:
    """The trial, with a higher limit if all thresholds up to the limit are certified."""
    if counted.certified != counted.looks.last:
        return trial
    return trial.with_raised_limit(THRESHOLDS_PER_STEP, scores)


LARGEST_STEP: Final = 1.5
"""A limit that follows the labels includes at most this multiple of the photos before."""

PRIOR: Final = 0.5
"""This number is added to the seen and the expected number of wrong answers before the division."""

STRICTEST: Final = 7
"""A limit that follows the labels is at least the threshold with this index."""


def follow(trial: Trial, scores: Floats, counted: Counted) -> Trial:
    """The trial with a new limit.

    For the new limit, predicted risks are multiplied by the number of wrong answers over the
    expected number.
    """
    ratio = (counted.failure.sum() + PRIOR) / (counted.uncertainty.sum() + PRIOR)
    n_labels = min(max(200, len(counted.failure) + 100), len(scores))
    limit, _ = choose_limit(scores * ratio, n_labels, MAX_RISK, counted.looks.delta / 2)
    limit = limit / ratio
    n_included = int((scores <= trial.limit).sum())
    n_largest = min(math.ceil(LARGEST_STEP * n_included), len(scores))
    limit = min(limit, float(np.sort(scores)[n_largest - 1]))
    index = int(np.searchsorted(trial.grid, limit))
    index = min(max(index, STRICTEST), len(trial.grid) - 1)
    is_lower = trial.grid[index] < trial.limit
    if is_lower and counted.certified is not None:
        return trial
    return trial.model_copy(update={"limit": trial.grid[index]})


@dataclass(frozen=True)
class Procedure:
    """A test, and the rules for requesting labels.

    Attributes:
        test: The test of a predictor's thresholds.
        level_of: Function of k and the level of all predictors. The result is the level of
            predictor number k (from 1).
        planned_share: The limit is planned for this multiple of the level of ``Trial.plan``.
        counting: Chooses the labels for a test.
        move_limit: Function that moves the limit after a test.
        most_to_fit: Calibration labels are drawn only after there are enough labels to fit on: one
            per class, but at least 50, and at most this number.
        share_worth_a_draw: With fewer than ``enough_to_fit`` labels to fit on, calibration labels
            are drawn only if the limit includes at least this share of the photos.
        enough_to_fit: From this number of labels to fit on, ``share_worth_a_draw`` is ignored.
        candidate_part: Share of the labels for the calibration side while a candidate is tested.
        worth_more: A candidate's limit must include this multiple of the photos accepted now.
        grown_before_a_look: An untested predictor is replaced by a new fit if the labels have grown
            by this factor.
    """

    test: RiskTest
    level_of: Callable[[int, float], float]
    planned_share: float
    counting: Counting
    move_limit: Callable[[Trial, Floats, Counted], Trial]
    most_to_fit: int
    share_worth_a_draw: float
    enough_to_fit: int
    candidate_part: float
    worth_more: float
    grown_before_a_look: float


@dataclass
class Tested:
    """A predictor with a trial: the index of the fit in the chain, and the plan of the test."""

    fit: int
    trial: Trial
    has_handed_on: bool = False  # whether a part of the level was passed on

    @property
    def is_tested(self) -> bool:
        """Whether the predictor has had enough labels for a certificate."""
        return self.trial.level > 0


class Reached(NamedTuple):
    """The coverage and the risk reached with a number of labels.

    Attributes:
        n_labels: Number of labels of both sides.
        coverage: Accepted share of the calibration photos without a label.
        risk: Error rate of all accepted calibration photos.
    """

    n_labels: int
    coverage: float
    risk: float


@dataclass
class Replay:
    """A triage of the photos of a chain by a procedure."""

    chain: Chain
    procedure: Procedure
    n_fit: int = 0
    n_tested: int = 0
    handed_on: float = 0.0
    end_of_draws: int = 0
    n_fit_of_last_candidate: int = 0
    present: Tested | None = None
    candidate: Tested | None = None
    threshold: float | None = None  # the guaranteed threshold of the present predictor
    answered: Mask = field(init=False)

    def __post_init__(self) -> None:
        self.answered = np.zeros(len(self.chain.luck), np.bool_)

    def rounds(self) -> Iterator[Reached]:
        """Yield the result of every round, until there are enough labels or no photo is left."""
        while True:
            self.choose_predictor()
            counted = self.test()
            if counted is not None:
                self.keep(counted)
            yield self.reached()
            n_left = MOST_LABELS - self.n_labels
            n_round = ROUND if self.n_labels < MANY else LATER_ROUND
            n_before = self.n_labels
            self.ask(min(n_round, n_left), counted)
            if self.n_labels == n_before:
                return

    @property
    def n_labels(self) -> int:
        """Number of labels of both sides."""
        return self.n_fit + int(self.answered.sum())

    @property
    def tested(self) -> Tested | None:
        """The candidate; if there is no candidate, the present predictor."""
        return self.present if self.candidate is None else self.candidate

    def reached(self) -> Reached:
        """The coverage and the risk of the guarantee after the labels so far."""
        if self.present is None or self.threshold is None or self.answered.all():
            return Reached(self.n_labels, 0.0, 0.0)
        is_accepted = self.chain.uncertainty[self.present.fit] <= self.threshold
        coverage = is_accepted[~self.answered].mean()
        risk = self.chain.failure[self.present.fit][is_accepted].mean()
        return Reached(self.n_labels, float(coverage), float(risk))

    def share_accepted(self) -> float:
        """Share of all calibration photos accepted under the guarantee."""
        if self.present is None or self.threshold is None:
            return 0.0
        return float((self.chain.uncertainty[self.present.fit] <= self.threshold).mean())

    # The first step: which predictor is tested.

    def choose_predictor(self) -> None:
        """Take the newest predictor of the chain if there are enough new labels."""
        fit = self.chain.fit_of(self.n_fit)
        needs_labels = fit > 0
        if not needs_labels or self.n_fit < self.n_labels_for_a_new_fit():
            return
        if self.threshold is None:
            self.present = Tested(fit, self.plan(fit, least_share=0.0))
            return
        least_share = min(self.procedure.worth_more * self.share_accepted(), 1.0)
        trial = self.plan(fit, least_share=least_share)
        self.n_fit_of_last_candidate = self.n_fit
        tested = self.tested
        has_far_more_labels = (
            tested is not None and self.n_fit >= GROWTH_FOR_UNLIKELY_CANDIDATE * tested.trial.n_fit
        )
        if trial.likely or has_far_more_labels:
            self.candidate = Tested(fit, trial)

    def n_labels_for_a_new_fit(self) -> float:
        """From this number of labels to fit on, a new predictor is taken."""
        tested = self.tested
        if tested is None:
            return 0
        looks_for_a_candidate = self.threshold is not None and self.candidate is None
        if looks_for_a_candidate:
            n_before = max(tested.trial.n_fit, self.n_fit_of_last_candidate)
            return GROWTH_FOR_CANDIDATE * n_before
        if tested.is_tested:
            return GROWTH_AFTER_TEST * tested.trial.n_fit
        return self.procedure.grown_before_a_look * tested.trial.n_fit

    def plan(self, fit: int, *, least_share: float) -> Trial:
        """The plan of a predictor's test, from the scores alone."""
        n_answered = int(self.answered.sum())
        return Trial.plan(
            n_fit=self.n_fit,
            scores=self.chain.uncertainty[fit],
            n_answered=n_answered,
            max_risk=MAX_RISK,
            delta=self.procedure.planned_share * self.next_level(),
            least_share=least_share,
        )

    def next_level(self) -> float:
        """Level of the next predictor: the level by number, plus the level passed on."""
        return self.procedure.level_of(self.n_tested + 1, DELTA) + self.handed_on

    # The second step: the labels certify a threshold.

    def is_drawn(self, tested: Tested) -> Mask:
        """(M,) mask of the photos in the draw for a predictor, with or without a label."""
        trial = tested.trial
        uncertainty = self.chain.uncertainty[tested.fit]
        planned_limit = trial.grid[STEPS - 1]
        probability = self.procedure.test.draw_probability(uncertainty, planned_limit)
        is_drawn: Mask = (uncertainty <= trial.limit) & (self.chain.luck < probability)
        return is_drawn

    def test(self) -> Counted | None:
        """Test the thresholds of the tested predictor; None if there is no predictor."""
        tested = self.tested
        if tested is None:
            return None
        test = self.procedure.test
        trial = tested.trial
        is_drawn = self.is_drawn(tested)
        rows = self.procedure.counting.counted(is_drawn, self.answered, self.end_of_draws)
        uncertainty = self.chain.uncertainty[tested.fit][rows]
        failure = self.chain.failure[tested.fit][rows]
        level = trial.level or self.next_level()
        looks = Looks(np.array(trial.grid), MAX_RISK, level, trial.limit)
        can_certify = test.certified(looks, uncertainty, np.zeros_like(failure)) is not None
        if can_certify and not tested.is_tested:
            tested.trial = trial.model_copy(update={"level": level})
            self.n_tested += 1
            self.handed_on = 0.0
        certified = test.certified(looks, uncertainty, failure)
        is_limit_certified = certified is not None and certified >= STEPS - 1
        if is_limit_certified and not tested.has_handed_on:
            tested.has_handed_on = True
            self.handed_on = test.handed_on * level
        return Counted(looks, uncertainty, failure, certified)

    # The third step: keep a certified threshold that accepts more than before.

    def keep(self, counted: Counted) -> None:
        """Keep a laxer threshold; a candidate that accepts more becomes the present predictor."""
        if counted.certified is None:
            return
        threshold = float(counted.looks.grid[counted.certified])
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

    def ask(self, n: int, counted: Counted | None) -> None:
        """Label ``n`` further photos, of the calibration side and of the fit side."""
        drawn: Ints = np.zeros(0, np.int64)
        waits_for_missing = False
        tested = self.tested
        if tested is not None and counted is not None:
            is_drawn = self.is_drawn(tested)
            missing = self.procedure.counting.missing(is_drawn, self.answered, self.end_of_draws)
            drawn = missing[:n]
            waits_for_missing = len(missing) > 0
            n_draws = self.n_to_draw(tested.trial, n)
            if n_draws and not waits_for_missing:
                drawn = self.draw(tested, counted, n_draws)
        self.answered[drawn] = True
        is_held_up = waits_for_missing and self.threshold is None
        if not is_held_up:
            n_left = int(self.chain.n_fit[-1]) - self.n_fit
            self.n_fit += min(n - len(drawn), n_left)

    def draw(self, tested: Tested, counted: Counted, n: int) -> Ints:
        """Move the limit, and draw the next ``n`` photos up to the limit."""
        scores = self.chain.uncertainty[tested.fit]
        tested.trial = self.procedure.move_limit(tested.trial, scores, counted)
        rows = np.flatnonzero(self.is_drawn(tested) & ~self.answered)[:n]
        if len(rows):
            self.end_of_draws = max(self.end_of_draws, int(rows[-1]) + 1)
        return rows

    def n_to_draw(self, trial: Trial, n: int) -> int:
        """The number of calibration labels among the next ``n`` labels."""
        if self.candidate is not None:
            return int(n * self.procedure.candidate_part)
        if self.threshold is not None:
            return n // CALIBRATION_PART
        return n if self.is_ready_to_draw(trial) else 0

    def is_ready_to_draw(self, trial: Trial) -> bool:
        """Whether calibration labels are drawn for a predictor without a guarantee."""
        if self.n_fit == self.chain.n_fit[-1]:
            return True
        n_wanted = min(max(self.chain.n_classes, FEWEST_TO_FIT), self.procedure.most_to_fit)
        is_possible = trial.likely and self.n_fit >= n_wanted
        is_worth_it = trial.share >= self.procedure.share_worth_a_draw
        return is_possible and (is_worth_it or self.n_fit >= self.procedure.enough_to_fit)


def one_look(chain: Chain, n_labels: int, test: ExactLook, planned_share: float) -> float:
    """Coverage of an exact look: half of the labels to fit on, half drawn up to the limit.

    The limit is planned for the multiple ``planned_share`` of the level.
    """
    n_fit = n_labels // 2
    fit = chain.fit_of(n_fit)
    scores = chain.uncertainty[fit]
    trial = Trial.plan(n_fit, scores, n_labels - n_fit, MAX_RISK, planned_share * DELTA)
    rows = np.flatnonzero(scores <= trial.limit)[: n_labels - n_fit]
    looks = Looks(np.array(trial.grid), MAX_RISK, DELTA, trial.limit)
    certified = test.certified(looks, scores[rows], chain.failure[fit][rows])
    if certified is None:
        return 0.0
    is_open = np.ones(len(scores), np.bool_)
    is_open[rows] = False
    return float((scores[is_open] <= looks.grid[certified]).mean())

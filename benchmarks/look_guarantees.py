"""Whether guarantees hold with a look after every round, for several predictors in turn.

    python -m benchmarks.look_guarantees [--runs 10000] [--photos 2000] [--worlds all ...]

A run is a folder with 2,000 calibration photos (``--photos``) in a random order. The labels arrive
in twelve rounds of 50. As in a triage, a predictor's test is planned from the scores alone. The
predictor is tested after every round, on the labels of all photos before the first photo without a
label. The next predictor's turn comes one round after a certificate, or after six rounds without a
certificate. So the time of the turn depends on the labels, as in a triage.

A run is *broken* if at any time a certified threshold has a risk above 5 % in the world. At most 5
% of the runs may be broken. The output has the share of broken runs, a one-sided 95 % bound on this
share (Clopper and Pearson), and the mean number of certified limits. The worlds:

- ``all``: 5.1 % of every predictor's answers are wrong, at every uncertainty.
- ``beyond``: in the more trusted half, 1 % of the answers are wrong, and in the less trusted half,
  40 %. So the risk is above 5 % if more than 56 % of the photos are accepted.
- ``later``: the first predictor has 1 % wrong answers, and all later predictors have 5.1 %.
- ``trusted``: in the most trusted tenth, 6 % of the answers are wrong, and elsewhere 1 %.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Final

import numpy as np

from vilu.calibration.anytime import N_THRESHOLDS_UP_TO_LIMIT, ThresholdTests, level_of
from vilu.calibration.thresholds import upper_bound
from vilu.metrics.counts import Floats, Ints
from vilu.outcomes.outcomes import Outcomes
from vilu.triage.guarantee import N_POSITIONS, GuaranteeProgress, PhotoSplit
from vilu.triage.run import state_after_test, trial_with_raised_limit
from vilu.triage.state import TriageState
from vilu.triage.trial import Trial

MAX_RISK: Final = 0.05
DELTA: Final = 0.05
N_ROUNDS: Final = 12
ROUND: Final = 50
PATIENCE: Final = 6
"""Rounds without a certificate until the next predictor's turn."""

N_PREDICTORS: Final = 4
CLAIMED: Final = 0.04
"""Largest uncertainty. This value is low, so that plans accept a large share."""


def error_rates(world: str, number: int, quantile: Floats) -> Floats:
    """Return the probability (N,) of a wrong answer at these uncertainty quantiles (N,)."""
    if world == "all":
        return np.full(len(quantile), 0.051)
    if world == "beyond":
        return np.where(quantile <= 1 / 2, 0.01, 0.4)
    if world == "later":
        return np.full(len(quantile), 0.01 if number == 0 else 0.051)
    if world == "trusted":
        return np.where(quantile <= 0.1, 0.06, 0.01)
    raise ValueError(f"no world is called {world!r}.")


class Predictor:
    """Scores and failures of all photos, and every threshold's risk in the world."""

    def __init__(self, world: str, number: int, luck: Floats, rng: np.random.Generator) -> None:
        n_photos = len(luck)
        quantile = (np.arange(n_photos) + 0.5) / n_photos
        rates = error_rates(world, number, quantile)
        rank = rng.permutation(n_photos)
        self.sorted_uncertainty = CLAIMED * quantile
        uncertainty = self.sorted_uncertainty[rank]
        # all predictors have the same ``luck``, so photos hard for one predictor are hard for all
        failure = (luck < rates[rank]).astype(np.int64)
        self.outcomes = Outcomes(uncertainty, failure, is_probability=True)
        self.mean_rates = np.cumsum(rates) / np.arange(1, n_photos + 1)

    def risk(self, threshold: float) -> float:
        """Return a threshold's risk in the world."""
        n_accepted = int((threshold >= self.sorted_uncertainty).sum())
        return float(self.mean_rates[n_accepted - 1])


def tested(
    state: TriageState, trial: Trial, outcomes: Outcomes, split: PhotoSplit
) -> GuaranteeProgress:
    """Test a trial, without an estimate of how many labels are still needed."""
    rows = split.counted_rows(outcomes.uncertainty, trial.limit)
    level = trial.level or level_of(state.n_tested + 1, DELTA)
    grid = np.array(trial.grid)
    looks = ThresholdTests(grid, MAX_RISK, level, trial.limit)
    counted = outcomes.take(rows)
    certified = looks.index_of_laxest_certified_threshold(counted.uncertainty, counted.failure)
    nothing: Ints = np.zeros(0, np.int64)
    return GuaranteeProgress(
        looks, rows, counted, nothing, certified, n_more_labels=None, n_photos_left=0
    )


def plan(state: TriageState, outcomes: Outcomes, n_answered: int) -> Trial:
    """Plan a predictor's test from the scores alone."""
    level = level_of(state.n_tested + 1, DELTA)
    return Trial.plan(
        n_fit=0,
        scores=outcomes.uncertainty,
        n_answered=n_answered,
        max_risk=MAX_RISK,
        delta=level,
    )


def run(world: str, n_photos: int, rng: np.random.Generator) -> tuple[bool, int]:
    """Simulate a run. Return whether the run is broken, and the number of certified limits."""
    none = np.zeros(n_photos, np.bool_)
    luck = rng.random(n_photos)
    predictors = [Predictor(world, number, luck, rng) for number in range(N_PREDICTORS)]
    position = rng.permutation(n_photos) * (N_POSITIONS // n_photos)
    answered = none.copy()
    split = PhotoSplit(
        is_usable=~none,
        is_calibration=~none,
        random_position=position,
        is_labelled=answered,
        is_answered=answered,
        is_skipped=none,
        has_given_label=none,
        has_open_request=none,
    )
    state = TriageState(settings={})
    number = 0
    n_waited = 0
    n_certified = 0
    is_broken = False
    for _ in range(N_ROUNDS):
        predictor = predictors[number]
        outcomes = predictor.outcomes
        trial = state.trial or plan(state, outcomes, int(answered.sum()))
        progress = tested(state, trial, outcomes, split)
        state = state_after_test(state, trial, progress)
        n_waited += 1
        if progress.certified_index is not None:
            is_broken |= predictor.risk(progress.threshold) > MAX_RISK
        is_limit_certified = (
            progress.certified_index is not None
            and progress.certified_index >= N_THRESHOLDS_UP_TO_LIMIT - 1
        )
        n_certified += int(is_limit_certified)
        is_over = is_limit_certified or n_waited > PATIENCE
        if is_over and number + 1 < N_PREDICTORS:
            number += 1
            n_waited = 0
            state = state.model_copy(update={"trial": None})
            continue
        trial = trial_with_raised_limit(state.trial or trial, progress, outcomes.uncertainty)
        state = state.with_trial(trial)
        answered[split.unanswered_rows(outcomes.uncertainty, trial.limit)[:ROUND]] = True
    return is_broken, n_certified


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line for every world."""
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--photos", type=int, default=2_000)
    parser.add_argument("--worlds", nargs="+", default=["all", "beyond", "later", "trusted"])
    options = parser.parse_args(arguments)
    print("world | runs | broken | 95 % bound | certified limits")
    for world in options.worlds:
        rng = np.random.default_rng(0)
        n_broken = 0
        n_certified = 0
        for _ in range(options.runs):
            is_broken, certified = run(world, options.photos, rng)
            n_broken += is_broken
            n_certified += certified
        share = n_broken / options.runs
        bound = upper_bound(n_broken, options.runs, 0.05)
        mean = n_certified / options.runs
        print(f"{world} | {options.runs} | {share:.4f} | {bound:.4f} | {mean:.2f}", flush=True)


if __name__ == "__main__":
    main()

"""Compares a triage's forecasts with outcomes: ``python -m benchmarks.forecasts CHAINS``.

CHAINS is a folder written by ``python -m benchmarks.procedures chains``. The default procedure is
replayed on every chain, in many random photo orders. So a set and a label count have a distribution
of outcomes, over fits and orders. The tables show

1. how wide the middle 80 % of a set's outcomes are. A narrower forecast for the set cannot hold in
   80 % of the cases.
2. how often two forecasts held, and how wide the forecasts were: the forecast before any label, and
   the forecast after the first 50 labels.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from benchmarks.procedures import DEFAULT_PROCEDURE, chain_paths, coverage_at
from benchmarks.replays import DELTA, MAX_RISK, Chain, Replay
from vilu.calibration.anytime import level_of
from vilu.metrics.counts import Floats
from vilu.triage.forecast import LABEL_BUDGETS, Forecast
from vilu.triage.guarantee import PhotoSplit

MIDDLE_QUANTILES: Final = (0.1, 0.9)
"""The quantiles at the ends of the middle 80 %."""

TOLERANCE: Final = 0.02
"""A forecast holds if the outcome is at most this far outside: readers see whole percents."""

STAGES: Final = {"without a label": 0, "after 50 labels": 1}
"""Maps a stage to the index of the fit in a chain: the forecast is made from this fit."""


class JudgedForecast(NamedTuple):
    """A forecast for a chain and a label count.

    Attributes:
        width: Upper end minus lower end.
        share_held: Share of outcomes within the forecast.
    """

    width: float
    share_held: float


def outcomes_of(chain: Chain, n_orders: int) -> dict[int, Floats]:
    """Replay a chain, and return the coverages (n_orders,) reached at each label count."""
    coverages_of_budget = defaultdict(list)
    for number in range(n_orders):
        shuffled_chain = chain.in_another_order(number)
        replay = Replay(shuffled_chain, DEFAULT_PROCEDURE)
        curve = list(replay.rounds())
        for n_labels in LABEL_BUDGETS:
            coverage = coverage_at(curve, n_labels)
            coverages_of_budget[n_labels].append(coverage)
    return {n_labels: np.array(coverages) for n_labels, coverages in coverages_of_budget.items()}


def forecast_of(path: Path, chain: Chain, stage: int) -> Forecast:
    """Make a triage's forecast from a given fit in a chain."""
    with np.load(path) as arrays:
        n_photos = len(arrays["cal"])
    n_fit = int(chain.n_fit[stage])
    level = level_of(1, DELTA)
    return Forecast.of(
        chain.uncertainty[stage],
        n_photos=n_photos,
        n_classes=chain.n_classes,
        n_fit_labels=n_fit,
        most_fit_labels=n_photos - len(chain.luck),
        n_labels=n_fit,
        max_risk=MAX_RISK,
        level=level,
        make_tests=PhotoSplit.tests_before_labels,
    )


def judge_forecast(forecast: Forecast, outcomes: dict[int, Floats]) -> dict[int, JudgedForecast]:
    """Return, for each label count, the forecast's width, and how often the forecast held."""
    judged_forecasts = {}
    for expected in forecast.expected:
        if expected.n_labels not in outcomes:
            continue
        outcome = outcomes[expected.n_labels]
        is_above = outcome >= expected.lowest - TOLERANCE
        is_below = outcome <= expected.highest + TOLERANCE
        width = expected.highest - expected.lowest
        share = float((is_above & is_below).mean())
        judged_forecasts[expected.n_labels] = JudgedForecast(width, share)
    return judged_forecasts


def show(paths: Sequence[Path], n_orders: int) -> None:
    """Replay all chains, and print both tables."""
    coverages_of_set: dict[tuple[str, int], list[Floats]] = defaultdict(list)
    judged_forecasts: dict[tuple[str, int], list[JudgedForecast]] = defaultdict(list)
    for path in paths:
        chain = Chain.load(path)
        outcomes = outcomes_of(chain, n_orders)
        for n_labels, coverages in outcomes.items():
            coverages_of_set[chain.name, n_labels].append(coverages)
        for stage, index in STAGES.items():
            for n_labels, one in judge_forecast(forecast_of(path, chain, index), outcomes).items():
                judged_forecasts[stage, n_labels].append(one)
    print("| set | labels | mean | width of the middle 80 % |\n|---|---|---|---|")
    widths = defaultdict(list)
    for (name, n_labels), parts in sorted(coverages_of_set.items()):
        coverages = np.concatenate(parts)
        low, high = np.quantile(coverages, MIDDLE_QUANTILES)
        widths[n_labels].append(high - low)
        print(f"| {name} | {n_labels} | {coverages.mean():.2f} | {high - low:.2f} |")
    for n_labels, widths_of_sets in widths.items():
        print(f"{n_labels} labels: median width of the middle 80 % {np.median(widths_of_sets):.2f}")
    print("\n| forecast | labels | ranges | held | median width |\n|---|---|---|---|---|")
    for (stage, n_labels), ranges in judged_forecasts.items():
        held = np.mean([one.share_held for one in ranges])
        width = np.median([one.width for one in ranges])
        print(f"| {stage} | {n_labels} | {len(ranges)} | {held:.2f} | {width:.2f} |")
    for stage in STAGES:
        ranges = [
            one for (name, _), some in judged_forecasts.items() if name == stage for one in some
        ]
        held = np.mean([one.share_held for one in ranges])
        width = np.median([one.width for one in ranges])
        print(f"| {stage} | all | {len(ranges)} | {held:.2f} | {width:.2f} |")


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare forecasts with outcomes."""
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--orders", type=int, default=40)
    parser.add_argument("--sets", nargs="+", help="Names of sets; by default all.")
    options = parser.parse_args(arguments)
    paths = chain_paths(options.folder)
    if options.sets:
        paths = [path for path in paths if path.stem.rpartition("_")[0] in options.sets]
    show(paths, options.orders)


if __name__ == "__main__":
    main()

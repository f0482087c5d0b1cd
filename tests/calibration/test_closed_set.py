"""Test guarantees about photos without a label, by brute force and in simulated folders."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from benchmarks.closed_folder import WORLDS, Folder, exact_tail, look_results
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import logsumexp

import vilu
from vilu.calibration.anytime import N_THRESHOLDS_UP_TO_LIMIT, threshold_grid
from vilu.calibration.closed_set import (
    PRIOR_A,
    PRIOR_RELATIVE_MEAN,
    ClosedCounts,
    ClosedPhotos,
    ClosedSetTests,
    SavedClosedSetTests,
    level_shares,
    log_evidence,
)
from vilu.errors import DataError, UsageError
from vilu.metrics.counts import Floats

RISK = 0.05
DELTA = 0.05
NONE = np.zeros(0)
NO_LABEL = np.zeros(0, np.int64)


def looks_of(photos: Floats, grid: Floats, *, max_risk: float = RISK) -> ClosedSetTests:
    """Return the tests for photos without labels set aside."""
    closed = ClosedCounts.of(grid, photos, aside_scores=NONE, aside_failure=NO_LABEL)
    return ClosedSetTests(grid, max_risk, DELTA, closed)


def product_of_bets(labels: list[bool], n_photos: int, total: int) -> float:
    """Return the evidence against exactly ``total`` wrong answers, one label at a time."""
    prior_right = PRIOR_A / (PRIOR_RELATIVE_MEAN * RISK) - PRIOR_A
    wealth = 1.0
    n_wrong = 0
    for n_drawn, is_wrong in enumerate(labels):
        mean = (total - n_wrong) / (n_photos - n_drawn)
        bet = (PRIOR_A + n_wrong) / (PRIOR_A + prior_right + n_drawn)
        right_factor = (1 - bet) / (1 - mean) if mean < 1 else math.inf
        wrong_factor = bet / mean if mean > 0 else math.inf
        wealth *= wrong_factor if is_wrong else right_factor
        n_wrong += is_wrong
    return wealth


@given(st.lists(st.booleans(), max_size=20), st.integers(0, 10))
def test_evidence_is_the_least_product_of_bets(labels: list[bool], beyond: int) -> None:
    n_photos = 25
    wrong = sum(labels)
    total = wrong + beyond
    totals = range(total, n_photos + 1)
    # A total is impossible if the labels show more right answers than the total allows.
    possible = [total for total in totals if total <= n_photos - (len(labels) - wrong)]
    least = min((product_of_bets(labels, n_photos, total) for total in possible), default=math.inf)
    found = float(np.exp(log_evidence(wrong, len(labels), n_photos, total, RISK)))
    assert found == pytest.approx(least, rel=1e-9)


def chance(wrong: int, drawn: int, n_photos: int, total: int) -> float:
    """Return the hypergeometric probability for ``wrong`` wrong answers."""
    ways = math.comb(total, wrong) * math.comb(n_photos - total, drawn - wrong)
    return ways / math.comb(n_photos, drawn)


@pytest.mark.parametrize("total", [0, 1, 7, 30, 40])
def test_the_mean_evidence_against_the_truth_is_at_most_one(total: int) -> None:
    n_photos = 40
    for drawn in range(n_photos + 1):
        possible = range(max(0, drawn - (n_photos - total)), min(drawn, total) + 1)
        mean = 0.0
        for wrong in possible:
            evidence = math.exp(float(log_evidence(wrong, drawn, n_photos, total, RISK)))
            mean += chance(wrong, drawn, n_photos, total) * evidence
        assert mean <= 1 + 1e-9


def test_at_the_edges_evidence_is_nothing_or_certainty() -> None:
    # Without a label there is no evidence.
    assert log_evidence(0, 0, 50, 3, RISK) == pytest.approx(0)
    # 3 wrong answers cannot be among the 2 photos that are left. The next draw would have a mean
    # above 1.
    assert log_evidence(0, 48, 50, 3, RISK) == math.inf
    # All wrong answers are among the labels, so no further wrong answer was expected.
    assert log_evidence(3, 20, 50, 3, RISK) <= 0
    assert log_evidence(50, 50, 50, 50, RISK) <= 0


@pytest.mark.parametrize(("drawn", "total"), [(3, 2), (4, 5), (6, 1), (5, 7)])
def test_the_exact_tail_counts_all_draws(drawn: int, total: int) -> None:
    n_photos = 8
    photos = [1] * total + [0] * (n_photos - total)
    draws = [sum(draw) for draw in itertools.combinations(photos, drawn)]
    for wrong in range(drawn + 1):
        share = np.mean([n_wrong <= wrong for n_wrong in draws])
        assert exact_tail(wrong, drawn, n_photos, total) == pytest.approx(share, abs=1e-12)
    # Eight photos cannot have nine wrong answers.
    assert exact_tail(0, drawn, n_photos, n_photos + 1) == 0


@pytest.mark.parametrize("max_risk", [0.2, 0.4])
def test_no_total_breaks_the_guarantee_in_any_order(max_risk: float) -> None:
    """The exact probability that a certificate is ever false must be at most ``DELTA``.

    There is one threshold, and every label is a look.
    """
    n_photos = 30
    photos = np.zeros(n_photos)
    looks = looks_of(photos, np.zeros(N_THRESHOLDS_UP_TO_LIMIT), max_risk=max_risk)
    certified = np.zeros((n_photos + 1, n_photos + 1), np.bool_)
    for drawn in range(n_photos + 1):
        for wrong in range(drawn + 1):
            failure = np.arange(drawn) < wrong
            at = looks.index_of_laxest_certified_threshold(photos[:drawn], failure.astype(np.int64))
            certified[drawn, wrong] = at is not None
    assert certified.any()
    for total in range(n_photos + 1):
        assert _ever_broken(certified, total, max_risk) <= DELTA + 1e-12


def _ever_broken(certified: np.ndarray, total: int, max_risk: float) -> float:
    """Return the probability that a certificate is ever false.

    It is computed from the probability that each number of wrong answers has after each label.
    """
    n_photos = len(certified) - 1
    broken = 0.0
    at = {0: 1.0}  # probability for each number of wrong answers while no certificate was false
    for drawn in range(n_photos):
        after: dict[int, float] = {}
        for wrong, probability in at.items():
            n_left = n_photos - drawn
            p_wrong = (total - wrong) / n_left
            for more, p in ((1, p_wrong), (0, 1 - p_wrong)):
                after[wrong + more] = after.get(wrong + more, 0.0) + probability * p
        at = {}
        for wrong, probability in after.items():
            tolerated = math.floor(max_risk * (n_photos - drawn - 1))
            is_false = total - wrong > tolerated
            if certified[drawn + 1, wrong] and is_false:
                broken += probability
            else:
                at[wrong] = probability
    return broken


def test_shares_add_up_to_the_level() -> None:
    assert level_shares(N_THRESHOLDS_UP_TO_LIMIT).sum() <= 1
    assert level_shares(100_000).sum() == pytest.approx(1, abs=1e-4)
    assert (level_shares(500) > 0).all()


def test_a_threshold_adds_the_evidence_of_laxer_ones() -> None:
    photos = np.linspace(0, 1, 2_000)
    grid = threshold_grid(photos, 1.0)
    looks = looks_of(photos, grid)
    drawn = photos[::20]
    at = looks.index_of_laxest_certified_threshold(drawn, np.zeros(100, np.int64))
    assert at == len(grid) - 1
    # Worked by hand: the laxest threshold has only its own evidence.
    n_left = 1_900
    total = math.floor(RISK * n_left) + 1
    evidence = float(log_evidence(0, 100, 2_000, total, RISK)) + math.log(
        level_shares(N_THRESHOLDS_UP_TO_LIMIT)[-1]
    )
    assert evidence >= math.log(1 / DELTA)
    # If the answers at the top are wrong, the certified threshold is below them.
    failure = np.zeros(100, np.int64)
    failure[-12:] = 1
    lower = looks.index_of_laxest_certified_threshold(drawn, failure)
    assert lower is None or grid[lower] < drawn[-12]


def test_labels_aside_count_but_prove_nothing() -> None:
    photos = np.linspace(0, 1, 500)
    grid = threshold_grid(photos, 1.0)
    drawn = photos[::5]
    right = np.zeros(100, np.int64)
    aside = photos[1::5]
    all_right = ClosedCounts.of(grid, photos, aside, np.zeros(100, np.int64))
    looks = ClosedSetTests(grid, RISK, DELTA, all_right)
    _, n_drawn = looks.count_wrong_and_accepted(drawn, right)
    assert looks.count_unlabelled(n_drawn)[-1] == 300
    # Without a draw nothing is shown, even if many photos have a label.
    assert looks.index_of_laxest_certified_threshold(NONE, NO_LABEL) is None
    # If fewer photos have no label, they may hold fewer wrong answers. So the same draw shows less.
    beside_none = looks_of(photos, grid)
    assert _most_evidence(looks, drawn, right) < _most_evidence(beside_none, drawn, right)
    # Wrong answers set aside are known, so they are no longer among the photos without a label.
    some_wrong = ClosedCounts.of(grid, photos, aside, (np.arange(100) % 10 == 0).astype(np.int64))
    of_wrong = ClosedSetTests(grid, RISK, DELTA, some_wrong)
    assert _most_evidence(of_wrong, drawn, right) > _most_evidence(looks, drawn, right)


def _most_evidence(looks: ClosedSetTests, drawn: Floats, failure: np.ndarray) -> float:
    """Return a test's evidence for the laxest threshold."""
    wrong, n_drawn = looks.count_wrong_and_accepted(drawn, failure)
    n_left = looks.count_unlabelled(n_drawn)[-1]
    tolerated = wrong[-1] + looks.photo_counts.aside_wrong[-1] + math.floor(RISK * n_left)
    photos = looks.photo_counts.photos[-1]
    terms = log_evidence(wrong[-1], n_drawn[-1], photos, tolerated + 1, RISK)
    return float(logsumexp(terms))


def test_nothing_is_certified_when_no_photo_is_left() -> None:
    photos = np.linspace(0, 1, 80)
    looks = looks_of(photos, threshold_grid(photos, 1.0))
    assert looks.index_of_laxest_certified_threshold(photos, np.zeros(80, np.int64)) is None


def test_what_more_labels_would_show_is_shown() -> None:
    photos = np.linspace(0, 1, 1_000)
    grid = threshold_grid(photos, 0.6)
    looks = ClosedSetTests(grid, RISK, DELTA, looks_of(photos, grid).photo_counts, limit=0.6)
    order = np.random.default_rng(0).permutation(photos[photos <= 0.6])
    right = np.zeros(len(order), np.int64)
    more = looks.n_more_labels_needed(order[:30], right[:30])
    assert more is not None
    assert looks.index_of_laxest_certified_threshold(order[:30], right[:30]) is None
    assert not looks.can_certify(order[:30])
    # Shares are rounded down to whole labels.
    enough = order[: 30 + more + N_THRESHOLDS_UP_TO_LIMIT]
    at = looks.index_of_laxest_certified_threshold(enough, right[: len(enough)])
    assert at is not None
    assert grid[at] <= 0.6
    assert looks.can_certify(enough)
    assert looks.n_more_labels_needed(order[:60], np.ones(60, np.int64)) is None


@pytest.mark.parametrize("n_photos", [1_000, 20_000, 500_000])
def test_a_large_folder_needs_hardly_more_labels_than_a_small_one(n_photos: int) -> None:
    photos = np.linspace(0, 1, n_photos)
    looks = looks_of(photos, threshold_grid(photos, 1.0))
    none = np.zeros(0)
    more = looks.n_more_labels_needed(none, none.astype(np.int64))
    assert more is not None
    # Without an end, a likelihood ratio with all of the level needs 68 right labels. The level is
    # shared here.
    assert 68 <= more <= 100


def test_a_saved_draw_gives_the_same_tests() -> None:
    photos = np.linspace(0, 1, 300)
    grid = threshold_grid(photos, 0.5)
    looks = ClosedSetTests(grid, RISK, DELTA, looks_of(photos, grid).photo_counts, limit=0.5)
    draw = SavedClosedSetTests.of(looks)
    again = SavedClosedSetTests.model_validate_json(draw.model_dump_json()).tests(RISK)
    assert again.photo_counts == looks.photo_counts
    assert again.grid.tolist() == looks.grid.tolist()
    assert (again.limit, again.delta) == (looks.limit, looks.delta)


@pytest.mark.parametrize("bad", [{"max_risk": 0.0}, {"delta": 1.0}])
def test_settings_that_cannot_be(bad: dict[str, float]) -> None:
    grid = np.linspace(0, 1, N_THRESHOLDS_UP_TO_LIMIT)
    closed = ClosedCounts.of(grid, grid, NONE, NO_LABEL)
    with pytest.raises(UsageError, match=next(iter(bad))):
        ClosedSetTests(grid, **{"max_risk": RISK, "delta": DELTA, **bad}, photo_counts=closed)
    with pytest.raises(DataError, match="ascending"):
        ClosedSetTests(grid[::-1], RISK, DELTA, closed)
    with pytest.raises(DataError, match="for each of the 65"):
        ClosedSetTests(np.linspace(0, 1, N_THRESHOLDS_UP_TO_LIMIT + 1), RISK, DELTA, closed)


@pytest.mark.parametrize("world", WORLDS)
def test_picks_to_fit_on_do_not_break_the_guarantee(world: str) -> None:
    n_folders = 30
    n_broken = 0
    for seed in range(n_folders):
        seen = look_results(Folder(world, 200, seed, max_risk=0.2))
        n_broken += seen["bets"].broken
    assert n_broken <= most_expected(n_folders)


@pytest.mark.slow
@pytest.mark.parametrize("n_photos", [50, 200, 1_000])
@pytest.mark.parametrize("world", WORLDS)
def test_no_world_breaks_the_guarantee_more_often_than_allowed(world: str, n_photos: int) -> None:
    n_folders = 300
    n_broken = {"bets": 0, "one look": 0}
    for seed in range(n_folders):
        seen = look_results(Folder(world, n_photos, seed, max_risk=0.2))
        for test in n_broken:
            n_broken[test] += seen[test].broken
    assert max(n_broken.values()) <= most_expected(n_folders)


def most_expected(n: int) -> float:
    """Return the mean broken count plus three standard deviations.

    Each rule among n is broken with probability ``DELTA``.
    """
    return DELTA * n + 3 * math.sqrt(DELTA * (1 - DELTA) * n)


def test_a_rule_about_new_rows_is_saved_as_earlier_versions_saved_it() -> None:
    outcomes = vilu.Outcomes(np.linspace(0, 1, 100), np.zeros(100))
    rule = vilu.certify(outcomes, max_risk=RISK)
    assert not {"about", "closed"} & rule.model_dump().keys()
    closed = ClosedPhotos(pictures=(1, 2), files=3)
    of_folder = rule.model_copy(update={"about": "folder", "closed": closed})
    assert vilu.Rule.model_validate_json(of_folder.model_dump_json()) == of_folder
    assert "of 2 pictures (3 files) of one folder" in str(of_folder)
    assert closed.covers(np.array([2, 3])).tolist() == [True, False]

"""Test thresholds with a stated risk, against scipy's binomial and hand-worked cases."""

from __future__ import annotations

import math
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import vilu
from tests.conftest import few
from vilu.calibration import thresholds
from vilu.calibration.thresholds import (
    conformal_risk_control,
    coverage_first,
    learn_then_test,
)
from vilu.errors import DataError, InfeasibleError, UsageError
from vilu.metrics.counts import tie_counts
from vilu.outcomes.outcomes import Outcomes


def counts(blocks: list[tuple[int, int]]):
    """Return tie counts for blocks of (right, wrong) answers, the most trusted block first."""
    u = np.repeat(np.arange(len(blocks)), [sum(block) for block in blocks])
    f = np.concatenate([np.r_[np.zeros(right), np.ones(wrong)] for right, wrong in blocks])
    return tie_counts(u, f)


@given(st.integers(1, 400), st.data(), st.floats(0.001, 0.999))
def test_tail_is_the_binomials(m: int, data: st.DataObject, risk: float) -> None:
    k = data.draw(st.integers(0, m))
    found = thresholds.binomial_tail(np.array([k]), np.array([m]), risk)[0]
    assert found == pytest.approx(stats.binom.cdf(k, m, risk), rel=1e-9, abs=1e-300)


@given(st.integers(1, 400), st.data(), st.floats(0.001, 0.5))
def test_bounds_are_clopper_pearson(m: int, data: st.DataObject, delta: float) -> None:
    k = data.draw(st.integers(0, m))
    exact = stats.binomtest(k, m).proportion_ci(1 - 2 * delta, method="exact")
    assert thresholds.upper_bound(k, m, delta) == pytest.approx(exact.high, abs=1e-9)
    assert thresholds.lower_bound(k, m, delta) == pytest.approx(exact.low, abs=1e-9)


@pytest.mark.parametrize(
    ("risk", "delta", "rows"), [(0.05, 0.05, 59), (0.1, 0.1, 22), (0.5, 0.5, 1), (0.01, 0.05, 299)]
)
def test_rows_without_error(risk: float, delta: float, rows: int) -> None:
    assert thresholds.n_right_needed(risk, delta) == rows
    assert (1 - risk) ** rows <= delta * (1 + 1e-9)
    assert rows == 1 or (1 - risk) ** (rows - 1) > delta


def test_accepted_needed_is_enough_and_one_less_is_not() -> None:
    for wrong, risk in ((0, 0.05), (1, 0.05), (7, 0.01), (40, 0.3)):
        m = thresholds.n_accepted_needed(wrong, risk, 0.05)
        assert stats.binom.cdf(wrong, m, risk) <= 0.05 < stats.binom.cdf(wrong, m - 1, risk)
    # (0.95)^93 + 93 (0.05) (0.95)^92 = 0.0499
    assert thresholds.n_accepted_needed(1, 0.05, 0.05) == 93
    assert thresholds.n_accepted_needed(0, 1e-14, 0.05) is None


@pytest.mark.parametrize(
    ("risk", "rows"), [(0.05, 19), (0.1, 9), (0.03, 33), (1 / 49, 48), (0.5, 1)]
)
def test_rows_for_mean(risk: float, rows: int) -> None:
    assert thresholds.n_rows_for_mean_risk(risk) == rows
    assert 1 / (rows + 1) <= risk * (1 + 1e-9)
    assert 1 / rows > risk


def by_hand_beginnings(
    n: int, starts, whole: float, risk: float, level: float
) -> list[tuple[int, int, float]]:
    """Return each sequence's first rows: the fewest rows, the best number, and the level.

    The rows must be enough to begin near every place.
    """

    def most(m: int, at: float) -> int:
        return max((k for k in range(m) if stats.binom.cdf(k, m, risk) <= at), default=-1)

    most_of_all = most(n - 1, whole * level)
    found = [(n, n, stats.binom.cdf(most_of_all, n - 1, risk))] if most_of_all > 0 else []
    left = level - sum(one for *_, one in found)
    for at, share in starts:
        least = next(m for m in range(int(np.ceil(n * at)) - 1, n) if most(m, left * share) >= 0)
        best = next(m for m in range(least, n) if most(m, left * share) > most(m - 1, left * share))
        found.append((least + 1, best + 1, left * share))
    return found


def by_hand_fallback(
    labels: list[list[int]], starts, whole: float, risk: float, delta: float
) -> int:
    """Return how many scores above a floor are certified by one threshold at a time.

    ``labels`` has the labels of the rows at each score.
    """
    tested = {}
    ends = list(accumulate(map(len, labels)))
    for least, best, share in by_hand_beginnings(ends[-1], starts, whole, risk, delta):
        place = min(
            (i for i, m in enumerate(ends) if m >= least), key=lambda i: (abs(ends[i] - best), -i)
        )
        tested[place] = tested.get(place, 0) + share
    certified, level, accepted, wrong = 0, 0.0, 0, 0
    for place, rows in enumerate(labels):
        accepted, wrong = accepted + len(rows), wrong + sum(rows)
        level += tested.get(place, 0.0)
        if place in tested and stats.binom.cdf(wrong - all(rows), accepted - 1, risk) > level:
            level = 0.0  # the row at which a sequence begins is no trial
        certified = place if place in tested and level else certified
        if level and (wrong >= accepted or stats.binom.cdf(wrong, accepted, risk) > level):
            level = 0.0
        certified = place + 1 if level else certified
    return certified


def by_hand_ltt(u, f, risk: float, delta: float) -> tuple[float, float] | None:
    """Return the interval that accepts most, computed with lists. The rows must be enough to begin
    everywhere.
    """
    scores = sorted(set(u.tolist()))
    labels = [f[u == score].astype(int).tolist() for score in scores]
    floors, floor_level, starts = (1 / 32, 1 / 16, 1 / 8, 1 / 4), 0.01, ((1 / 4, 0.5), (1 / 2, 0.5))
    if len(u) < 500:
        floors, floor_level, starts = (1 / 8, 1 / 4), 0.05, ((2 / 3, 1.0),)
    level = (1 - floor_level * len(floors)) * delta
    first = by_hand_fallback(labels, ((1 / 16, 0.3), (1 / 4, 0.7)), 1 / 4, risk, level)
    found = [(sum(map(len, labels[:first])), -np.inf, scores[first - 1])] if first else []
    for share in floors:
        floor = next(
            i for i, m in enumerate(accumulate(map(len, labels))) if m >= np.ceil(len(u) * share)
        )
        rest = by_hand_fallback(labels[floor + 1 :], starts, 0, risk, floor_level * delta)
        inside = labels[floor + 1 : floor + 1 + rest]
        found += [(sum(map(len, inside)), scores[floor], scores[floor + rest])] if rest else []
    return max(found, key=lambda one: one[0])[1:] if found else None


@pytest.mark.parametrize("least", [300, 500])
@pytest.mark.parametrize("seed", few(range(8), 1))
def test_learn_then_test_against_one_threshold_at_a_time(seed: int, least: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(least, least + 100))
    u = np.round(rng.beta(0.6, 1.5, n), 2 if seed % 2 else 9)
    slope = 0.6 if least == 500 else 0.3  # few rows certify only a smaller risk
    rate = u if seed % 4 < 2 else np.where(u <= np.quantile(u, 0.05), 0.9, slope * u)
    f = rng.random(n) < rate
    c = tie_counts(u, f)
    found = learn_then_test(c, 0.1, 0.1)
    ends = found and found.interval
    assert ends == by_hand_ltt(u, f, 0.1, 0.1)
    assert found is None or (found.floor is not None) == (seed % 4 >= 2)


def test_few_rows_have_one_sequence_at_full_level() -> None:
    # 60 rows are needed, because the last row is not random.
    assert learn_then_test(counts([(1, 0)] * 59), 0.05, 0.05) is None
    assert learn_then_test(counts([(1, 0)] * 60), 0.05, 0.05).threshold == 59
    assert learn_then_test(counts([(1, 0)] * 58 + [(0, 1)] + [(1, 0)] * 6), 0.05, 0.05) is None
    # The first 59 rows are right. So R is shown for scores below the 60th row, whatever the label
    # there. If the 60th row is included, no laxer threshold is certified.
    last_wrong = counts([(1, 0)] * 59 + [(0, 1)] + [(1, 0)] * 5)
    assert learn_then_test(last_wrong, 0.05, 0.05).threshold == 58
    rows = Outcomes(np.arange(65), np.r_[np.zeros(59), 1, np.zeros(5)])
    rule = vilu.certify(rows, max_risk=0.05)
    assert (rule.n_accepted, rule.n_wrong) == (59, 0)


@pytest.mark.parametrize(("risk", "n"), [(0.05, 60), (0.01, 300), (0.2, 15), (0.5, 6)])
def test_a_tied_score_is_not_certified_by_its_only_row_here(risk: float, n: int) -> None:
    """If a score has a single row, that row must not certify the score.

    There are two scores, one right and one wrong, and the risk over all rows is just above the
    target. The probability over all counts is exact.
    """
    broken = 0.0
    for wrong in range(1, n):
        found = learn_then_test(counts([(n - wrong, 0), (0, wrong)]), risk, 0.05)
        broken += stats.binom.pmf(wrong, n, 1.0001 * risk) * (
            found is not None and found.threshold == 1
        )
    assert broken <= 0.05


def test_a_tied_block_is_accepted_or_left_out() -> None:
    assert learn_then_test(counts([(100, 0), (200, 100)]), 0.05, 0.05).threshold == 0
    assert learn_then_test(counts([(100, 60)]), 0.05, 0.05) is None


@given(st.floats(1e-9, 1))
def test_a_bound_is_never_rounded_to_the_side_that_guarantees_more(share: float) -> None:
    above, below = (
        float(thresholds.percent(share, 2, to)[:-1]) / 100 for to in (math.ceil, math.floor)
    )
    assert share - 1e-4 - 1e-9 <= below <= share + 1e-9
    assert share - 1e-9 <= above <= min(share + 1e-4, 2 * share) + 1e-9


def test_a_guarantee_in_words_is_the_guarantee() -> None:
    rows = Outcomes(np.arange(7000), np.zeros(7000))
    told = [str(vilu.certify(rows, max_risk=risk, confidence=0.999)) for risk in (0.05, 0.001)]
    assert all("with confidence 99.9% at most" in one for one in told)
    assert [one.split("at most ")[1].split()[0] for one in told] == ["5.00%", "0.10%"]
    bound = vilu.certify(rows, min_coverage=0.5, confidence=0.97)
    assert bound.risk_bound * 100 <= float(str(bound).split("at most ")[1].split("%")[0])


def test_a_good_model_is_accepted_as_a_whole_whatever_the_order() -> None:
    # 3 % are wrong, and the wrong answers come first. So the sequences that begin at 1/16 and 1/4
    # fail.
    assert learn_then_test(counts([(0, 1)] * 30 + [(1, 0)] * 970), 0.05, 0.05).threshold == 999


def test_an_unlucky_beginning_ends_one_sequence_only() -> None:
    # 5 answers are wrong among the first 70 of 1,000. So the sequence from 1/16 fails, and the
    # sequence from 1/4 goes on.
    c = counts([(65, 5), *[(1, 0)] * 930])
    found = learn_then_test(c, 0.05, 0.05)
    assert found.threshold == len(c.value) - 1


def test_few_rows_have_two_floors() -> None:
    """Of 320 rows, half of the 20 most trusted are wrong, the next 220 are right, and 80 wrong."""
    rows = [(1, 1)] * 10 + [(1, 0)] * 220 + [(0, 1)] * 80
    found = learn_then_test(counts(rows), 0.05, 0.05)
    assert found is not None
    # 1/8 of the rows is 40, so the floor is the 40th row. It is the 20th of the right ones.
    assert found.floor == 29
    # The level is 0.05 * 0.05 = 0.0025. Bin(201, 0.05) is at most 1 with probability 0.0004,
    # Bin(202, 0.05) at most 2 with 0.0021, and Bin(203, 0.05) at most 3 with 0.0081. So two of the
    # wrong answers are accepted, too.
    assert (found.threshold, found.n_accepted, found.n_wrong) == (231, 202, 2)


@pytest.mark.parametrize(("n", "n_review"), [(300, 38), (499, 63), (500, 63), (600, 75)])
def test_floors_begin_with_enough_rows_and_do_not_end(n: int, n_review: int) -> None:
    """The 36 most trusted answers are wrong, and the floor at 1/8 is above them."""
    rows = [(0, 1)] * 36 + [(1, 0)] * (n - 36)
    found = learn_then_test(counts(rows), 0.05, 0.05)
    assert found is not None
    assert found.floor is not None
    assert found.n_accepted == n - n_review
    assert found.n_wrong == 0


def test_fewer_rows_have_no_floor() -> None:
    assert learn_then_test(counts([(0, 1)] * 36 + [(1, 0)] * 263), 0.05, 0.05) is None


@pytest.mark.parametrize(("n", "n_review"), [(869, 109), (870, 55)])
def test_many_rows_have_a_floor_at_a_sixteenth(n: int, n_review: int) -> None:
    """The 54 most trusted answers are wrong: from 870 rows on the floor at 1/16 is above them."""
    found = learn_then_test(counts([(0, 1)] * 54 + [(1, 0)] * (n - 54)), 0.05, 0.05)
    assert found is not None
    assert found.n_accepted == n - n_review


def test_what_lies_above_confident_mistakes_is_accepted() -> None:
    """If the most trusted answers are often wrong, the answers above a floor must be accepted.

    Among 2,000 rows, half the 80 most trusted are wrong, then 1 % of the next 1,200, and most
    others.
    """
    c = counts([(1, 1)] * 40 + [(99, 1)] * 12 + [(1, 4)] * 144)
    found = learn_then_test(c, 0.05, 0.1)
    # 1/32 of the rows is 62.5, so the floor is the 32nd pair. Above the floor, 8 + 12 = 20 answers
    # among 1,216 are wrong.
    assert found.floor == 31
    assert found.threshold >= 51
    inside = slice(32, int(found.threshold) + 1)
    assert stats.binom.cdf(c.wrong[inside].sum(), c.size[inside].sum(), 0.05) <= 0.001
    labels = np.concatenate(
        [np.r_[np.zeros(r), np.ones(w)] for r, w in zip(c.correct, c.wrong, strict=True)]
    )
    rows = Outcomes(np.repeat(c.value, c.size), labels)
    rule = vilu.certify(rows, max_risk=0.05, confidence=0.9)
    assert (rule.floor, rule.threshold) == (31, found.threshold)
    assert rule.n_accepted == c.size[inside].sum()
    scores = [0.0, 31.0, 31.5, rule.threshold, rule.threshold + 1, np.nan]
    assert rule.accept(scores).tolist() == [False, False, True, True, False, False]
    assert rule.reasons([31.0, 32.0, 1e9]) == ["below_floor", None, "above_threshold"]
    assert "leaves the most trusted for review" in str(rule)
    assert type(rule).model_validate_json(rule.model_dump_json()) == rule


def test_conformal_risk_control_by_hand() -> None:
    # (k + 1) / (n + 1) <= 0.2 with n = 9, so k <= 1.
    c = counts([(1, 0), (0, 1), (2, 0), (0, 1), (4, 0)])
    found = conformal_risk_control(c, 0.2, 0.05)
    assert (found.threshold, found.risk_bound) == (2, 0.2)
    assert conformal_risk_control(c, 0.05, 0.05) is None


def test_coverage_first_bounds_both() -> None:
    c = counts([(1, 0)] * 80 + [(0, 1)] * 20)
    found = coverage_first(c, 0.5, 0.1)
    accepted = found.n_accepted
    assert stats.binomtest(accepted, 100).proportion_ci(0.9, method="exact").low >= 0.5
    assert stats.binomtest(accepted - 1, 100).proportion_ci(0.9, method="exact").low < 0.5
    assert found.risk_bound == pytest.approx(1 - 0.05 ** (1 / (accepted - 1)))  # none is wrong
    assert coverage_first(c, 0.99, 0.05) is None


def test_public_selector() -> None:
    u = np.r_[np.linspace(0, 0.5, 300), np.linspace(0.5, 1, 100)]
    f = np.r_[np.zeros(300), np.ones(100)]
    selector = vilu.certify(Outcomes(u, f), max_risk=0.05, confidence=0.95)
    assert selector.feasible
    assert 0.5 <= selector.threshold < 0.55  # about 5 % of the accepted answers may be wrong
    assert selector.risk_bound == 0.05
    accepted = selector.accept(
        np.array([0.1, selector.threshold, np.nextafter(selector.threshold, 1), np.nan])
    )
    assert accepted.tolist() == [True, True, False, False]
    assert selector.coverage == pytest.approx(np.mean(u <= selector.threshold))
    assert type(selector).model_validate_json(selector.model_dump_json()) == selector


def why(
    blocks: list[tuple[int, int]], max_risk: float, method: str = "ltt", confidence: float = 0.95
):
    """Return why no answer in the (right, wrong) blocks is accepted, and the number needed."""
    c = counts(blocks)
    u, f = (
        np.repeat(c.value, c.size),
        np.concatenate([np.r_[np.zeros(r), np.ones(w)] for r, w in blocks]),
    )
    found = vilu.certify(Outcomes(u, f), max_risk=max_risk, method=method, confidence=confidence)
    assert (found.feasible, found.threshold, found.coverage, found.risk_bound) == (
        False,
        None,
        0.0,
        None,
    )
    assert not found.accept([0.0]).any()
    return found.thresholds[""].why, found.thresholds[""].n_needed


def test_too_few_rows_say_how_many_must_be_accepted_and_right() -> None:
    """300 accepted answers are needed, whatever the scores.

    ln 0.05 / ln 0.99 = 298.07, so 299 are needed, and one more because the last row is not random.
    """
    told, needed = why([(1, 0)] * 40 + [(0, 1)] * 140, 0.01)
    assert told == (
        "a risk of 1.00% needs 300 accepted answers without a wrong one, but there are 180 rows, "
        "of which the 40 most trusted are right"
    )
    assert needed == 300
    assert why([(0, 1)] * 180, 0.01) == (told.replace("the 40", "the 0"), 300)
    assert why([(1, 0)] * 60 + [(0, 1)] * 120, 0.0001)[1] == 29_957


def test_so_many_rows_are_enough_where_all_are_accepted_and_right() -> None:
    for risk, n in ((0.01, 300), (0.05, 60), (0.3, 10)):
        assert vilu.certify(Outcomes(np.arange(n), np.zeros(n)), max_risk=risk).n_accepted == n
        assert why([(1, 0)] * (n - 1), risk)[1] == n


def test_enough_rows_with_too_many_wrong_are_told_so() -> None:
    """If too many answers are wrong at every score, the text must not ask for more rows.

    In the first case, 300 rows are right in nine out of ten cases at every score.
    """
    told, needed = why([(9, 1)] * 30, 0.01)
    assert told.endswith("these scores do not single out answers with an error rate below 1.00%")
    assert needed is None
    # 1 answer is wrong among the 90 most trusted, and then all are wrong. With one wrong answer 93
    # are needed.
    told, needed = why([(89, 1), *[(0, 1)] * 100], 0.05)
    assert (
        told
        == "of the 90 most trusted answers 1 is wrong, and with so many wrong answers a risk of "
        "5.00% needs at least 93 accepted answers"
    )
    assert needed is None
    # At level 0.05, 60 right answers would be enough. With 1,000 rows the level is first divided
    # among three thresholds.
    told, needed = why([(60, 0), *[(0, 1)] * 940], 0.05)
    assert (
        told
        == "of the 60 most trusted answers 0 are wrong. For a threshold that was fixed before the "
        "labels came this would be enough. But the labels choose among several thresholds, so more "
        "of them are needed"
    )
    assert needed is None


def test_a_mean_of_few_rows() -> None:
    told, needed = why([(1, 0)] * 10, 0.05, "crc")
    assert (told, needed) == ("a mean risk of 5.00% needs at least 19 rows, and there are 10", 19)
    assert (
        vilu.certify(Outcomes(np.arange(19), np.zeros(19)), max_risk=0.05, method="crc").n_accepted
        == 19
    )
    assert why([(5, 5), (20, 0)], 0.05, "crc") == (
        "5 of the most trusted answers, equal in score, are wrong",
        None,
    )
    with pytest.raises(InfeasibleError, match="At least 19 rows are needed"):
        vilu.certify(Outcomes(np.arange(18), np.zeros(18)), max_risk=0.05, method="selection")
    rows = Outcomes(np.arange(19), np.zeros(19))
    assert vilu.certify(rows, max_risk=0.05, method="selection").accept([-1.0]).all()


def test_a_coverage_alone_takes_so_many_rows() -> None:
    """0.8^n <= 0.05 / 2, so n = 17."""
    few = vilu.certify(Outcomes(np.arange(16), np.zeros(16)), min_coverage=0.8)
    assert few.thresholds[""].n_needed == 17
    assert vilu.certify(Outcomes(np.arange(17), np.zeros(17)), min_coverage=0.8).feasible


def test_groups_say_what_each_takes() -> None:
    """Two groups share delta: ln 0.025 / ln 0.95 = 71.9, so 72 are needed, and one more."""
    groups = ["a"] * 200 + ["b"] * 30
    found = vilu.certify(Outcomes(np.arange(230), np.zeros(230)), max_risk=0.05, groups=groups)
    assert found.thresholds["a"].threshold is not None
    assert found.thresholds["(other)"].n_needed == 73


def test_groups_share_delta_and_the_small_are_together() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(["a", "b", "c", "d"], [400, 300, 20, 25])
    u = rng.random(len(groups))
    f = (rng.random(len(groups)) < np.where(groups == "a", 0.02, 0.5 * u)).astype(int)
    selector = vilu.certify(Outcomes(u, f), max_risk=0.1, groups=groups.tolist())
    assert set(selector.thresholds) == {"a", "b", "(other)"}
    assert selector.thresholds["(other)"].n == 45
    # By itself, each group is certified at a third of delta.
    alone = vilu.certify(Outcomes(u[:400], f[:400]), max_risk=0.1, confidence=1 - 0.05 / 3)
    assert selector.thresholds["a"].threshold == alone.threshold
    limit = {name: one.threshold for name, one in selector.thresholds.items()}
    names = ["a", "b", "c", "never seen"]
    expected = [(limit.get(name, limit["(other)"]) or -1) >= 0.3 for name in names]
    assert selector.accept([0.3] * 4, names).tolist() == expected
    with pytest.raises(UsageError, match="threshold per group"):
        _ = selector.threshold
    with pytest.raises(UsageError, match="needs the group of each"):
        selector.accept(u)
    # A number would silently get the threshold for the other groups.
    for numbers in (
        range(len(u)),
        np.zeros(len(u), int),
    ):
        with pytest.raises(DataError, match="groups must hold texts"):
            selector.accept(u, numbers)


def test_groups_of_their_own_have_enough_rows_for_their_share_of_delta() -> None:
    # There are 20 classes without errors, with 90 rows each. Alone each class needs 60 rows. At a
    # twentieth of delta it needs 117 + 1.
    groups = np.repeat([f"class {i:02d}" for i in range(20)], 90).tolist()
    rng = np.random.default_rng(0)
    selector = vilu.certify(
        Outcomes(rng.random(1800), np.zeros(1800)), max_risk=0.05, groups=groups
    )
    assert selector.coverage == 1
    # Three classes have their own threshold, and the others share one: 0.95^89 is at most 0.05 / 4,
    # but more than 0.05 / 5.
    assert sorted(one.n for one in selector.thresholds.values()) == [90, 90, 90, 1530]


def test_a_least_coverage_is_that_of_all_groups_together() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(["a", "b"], 1000)
    u = rng.random(2000)
    f = (groups == "b") & (u > 0.5)
    outcomes = Outcomes(u, f.astype(int))
    free = vilu.certify(outcomes, max_risk=0.05, groups=groups.tolist())
    assert free.thresholds["b"].coverage < 0.6 < free.coverage
    assert (
        vilu.certify(outcomes, max_risk=0.05, min_coverage=0.6, groups=groups.tolist()).coverage
        == free.coverage
    )
    assert not vilu.certify(
        outcomes, max_risk=0.05, min_coverage=0.9, groups=groups.tolist()
    ).feasible
    many = np.r_[np.repeat("big", 600), np.repeat([f"small {i}" for i in range(100)], 4)].tolist()
    alone = vilu.certify(Outcomes(rng.random(1000), np.zeros(1000)), min_coverage=0.8, groups=many)
    assert set(alone.thresholds) == {"big", "(other)"}
    assert min(one.coverage for one in alone.thresholds.values()) >= 0.8


@pytest.mark.parametrize("none", [None, math.nan, 3])
def test_a_group_that_is_no_text_is_refused_wherever_it_stands(none: object) -> None:
    outcomes = Outcomes(np.arange(400), np.zeros(400))
    with pytest.raises(DataError, match="in row 250"):
        vilu.certify(outcomes, max_risk=0.05, groups=["a", "b"] * 125 + [none] * 150)


def test_groups_without_an_order_and_letters_of_a_word_are_none() -> None:
    rule = vilu.certify(
        Outcomes(np.arange(400), np.zeros(400)), max_risk=0.05, groups=["a", "b"] * 200
    )
    for groups in ({"a", "b"}, {"a": "b", "b": "a"}, "ab"):
        for ask in (rule.accept, rule.reasons):
            with pytest.raises(DataError, match="groups must be a list of texts"):
                ask([0.1, 0.2], groups)
    assert rule.accept([0.1, 500], (name for name in "ab")).tolist() == [True, False]


def test_groups_by_prediction_are_names() -> None:
    outcomes = Outcomes(
        [0.1] * 110, [0] * 110, prediction=[0] * 80 + [1] * 30, class_names=["cat", "dog"]
    )
    assert set(vilu.certify(outcomes, max_risk=0.05, groups="prediction").thresholds) == {
        "cat",
        "(other)",
    }
    with pytest.raises(DataError, match="what was answered"):
        vilu.certify(Outcomes([0.1], [0]), max_risk=0.05, groups="prediction")


@pytest.mark.parametrize(("n", "percent"), [(100, 55), (200, 56)])
def test_a_coverage_that_is_reached_to_the_row_is_no_less(n: int, percent: int) -> None:
    """Coverage must be compared exactly: 0.55 * 100 is 55.00000000000001 in floating point."""
    k = n * percent // 100
    right = np.arange(n) < k
    rows = Outcomes(~right, ~right)
    found = vilu.certify(rows, max_risk=0.1, min_coverage=percent / 100)
    assert found.n_accepted == k
    assert not vilu.certify(rows, max_risk=0.1, min_coverage=(percent + 1) / 100).feasible


def test_all_rows_are_all_answers_at_any_stated_shares() -> None:
    """If all rows are accepted, coverage must be 1, although the weights add up to n only up to
    rounding.
    """
    rng = np.random.default_rng(0)
    target = rng.integers(0, 3, 1000)
    rows = Outcomes(
        rng.random(1000),
        np.zeros(1000),
        prediction=target,
        target=target,
        class_names=["a", "b", "c"],
    )
    for _ in range(20):
        shares = dict(zip("abc", rng.dirichlet([5, 5, 5]).tolist(), strict=True))
        found = vilu.certify(rows, max_risk=0.1, class_shares=shares, min_coverage=1.0)
        assert found.n_accepted == 1000, found


def test_coverage_that_the_risk_does_not_allow() -> None:
    u = np.linspace(0, 1, 400)
    outcomes = Outcomes(u, (u > 0.5).astype(int))
    both = vilu.certify(outcomes, max_risk=0.05, min_coverage=0.9)
    assert not both.feasible
    assert "less than the 90.0% asked for" in both.thresholds[""].why
    assert vilu.certify(outcomes, max_risk=0.05, min_coverage=0.4).feasible


def test_rows_that_cannot_be_used_are_left_out() -> None:
    u = np.r_[np.linspace(0, 1, 100), np.nan, 0.5]
    outcomes = Outcomes(u, np.r_[np.zeros(100), 1, -1], reason=[None] * 100 + ["nonfinite", None])
    assert vilu.certify(outcomes, max_risk=0.05).n == 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "what is to be guaranteed"),
        ({"max_risk": 0.0}, "max_risk must be in"),
        ({"max_risk": 0.1, "confidence": 1.0}, "confidence must be in"),
        ({"min_coverage": 0.0}, "min_coverage must be in"),
        ({"max_risk": 0.1, "method": "guess"}, "one of 'ltt', 'crc', 'selection'. Got 'guess'"),
        ({"max_risk": 0.1, "method": "anytime"}, "one of 'ltt', 'crc', 'selection'. Got 'anytime'"),
    ],
)
def test_targets_that_cannot_be(arguments: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        vilu.certify(Outcomes([0.1, 0.2], [0, 1]), **arguments)


def test_nothing_to_calibrate_on() -> None:
    with pytest.raises(DataError, match="None of the 2 rows"):
        vilu.certify(Outcomes([0.1, 0.2], [-1, -1]), max_risk=0.1)


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.1, 0.2, 0.5]), st.integers(0, 1)),
        min_size=1,
        max_size=120,
    ),
    st.data(),
)
def test_the_order_of_rows_does_not_matter(
    rows: list[tuple[float, int]], data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(rows))
    first, second = (
        vilu.certify(Outcomes(*zip(*some, strict=True)), max_risk=0.2, confidence=0.9)
        for some in (rows, shuffled)
    )
    assert first == second

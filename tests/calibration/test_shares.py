"""Test guarantees for stated shares: out-of-distribution rows, and classes.

The expected values come from hand-worked products and from simulated calibrations.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import vilu
from tests.conftest import few
from vilu.calibration.shares import (
    BET_SIZES,
    Strata,
    level_without_floor,
    n_rows_needed_in_stratum,
    read_shares,
    weighted_learn_then_test,
)
from vilu.calibration.thresholds import upper_bound
from vilu.errors import DataError, UsageError
from vilu.outcomes.outcomes import Outcomes

RISK, DELTA, DRAWS = 0.05, 0.1, 400


def inside(rng: np.random.Generator, n: int):
    """Draw u ~ Beta(1/2, 2). An answer is wrong with probability 0.9 u^2."""
    u = rng.beta(0.5, 2, n)
    return u, (rng.random(n) < 0.9 * u**2).astype(int)


def ood_rows(rng: np.random.Generator, n: int):
    return rng.beta(6, 1.5, n), np.ones(n, int)


def rows_of(rng: np.random.Generator, n_inside: int, n_outside: int) -> Outcomes:
    (u, f), (v, g) = inside(rng, n_inside), ood_rows(rng, n_outside)
    outside = np.r_[np.zeros(n_inside, bool), np.ones(n_outside, bool)]
    return Outcomes(np.r_[u, v], np.r_[f, g], outside=outside)


def truth(share: float, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the accepted share, and the error rate among accepted rows, at thresholds."""
    right = stats.beta.cdf(t, 0.5, 2)
    mean_square = stats.beta(0.5, 2).expect(lambda u: u**2)
    wrong = 0.9 * mean_square * stats.beta.cdf(t, 2.5, 2)  # E[u^2; u <= t]
    foreign = stats.beta.cdf(t, 6, 1.5)
    accepted = share * foreign + (1 - share) * right
    return accepted, (share * foreign + (1 - share) * wrong) / accepted


def three_binomials(u, wrong, outside, t: float, share: float, delta: float) -> float:
    """Return the simple bound: three Clopper-Pearson bounds, at delta / 3 each.

    They bound the accepted out-of-distribution rows, the wrong rows inside and the right rows
    inside.
    """
    n_o, n_i = outside.sum(), (~outside).sum()
    foreign = upper_bound(int((outside & (u <= t)).sum()), int(n_o), delta / 3) if n_o else 1.0
    bad = upper_bound(int((~outside & (u <= t) & wrong).sum()), int(n_i), delta / 3)
    k = int((~outside & (u <= t) & ~wrong).sum())
    good = float(stats.beta.ppf(delta / 3, k, n_i - k + 1)) if k else 0.0
    return (share * foreign + (1 - share) * bad) / (share * foreign + (1 - share) * (bad + good))


@pytest.mark.parametrize("seed", few(range(6), 1))
def test_evidence_is_the_mean_of_products_one_row_at_a_time(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rows_of(rng, 150, 50)
    u = np.round(rows.uncertainty, 2 if seed % 2 else 9)
    weight = Strata(rows, 0.1, None).weight
    assert weight.mean() == pytest.approx(1)
    point = weighted_learn_then_test(u, rows.failure == 1, weight, 0.15, 0.2)
    expected, most = None, -1.0
    floors = [
        -np.inf,
        *(np.sort(u)[math.ceil(len(u) * at) - 1] for at in (1 / 32, 1 / 16, 1 / 8, 1 / 4)),
    ]
    for floor, level in zip(floors, [0.2 * 0.96, *[0.2 * 0.01] * 4], strict=True):
        here = None
        for t in np.unique(u)[np.unique(u) > floor]:
            taken = (u > floor) & (u <= t)
            products = [
                math.prod(
                    1 - bet / (0.85 * weight.max()) * v * (w - 0.15)
                    for v, w in zip(weight[taken], rows.failure[taken], strict=True)
                )
                for bet in BET_SIZES
            ]
            if np.mean(products) >= 1 / level:
                here = (floor, t)
        if here and weight[(u > here[0]) & (u <= here[1])].sum() > most:
            expected, most = here, weight[(u > here[0]) & (u <= here[1])].sum()
    found = point and point.interval
    assert expected is not None
    assert found == expected


@pytest.mark.parametrize("share", few([0.3, 0.1, 0.5], 1))
@pytest.mark.parametrize("drawn", few([0.2, 0.4], 1))
def test_the_guarantee_for_a_stated_share_of_ood_images_holds(share: float, drawn: float) -> None:
    """The rule must keep its level and accept at least 80 % of what the best threshold accepts.

    A rule without out-of-distribution rows must break the guarantee, so the stated share is needed.
    """
    rng, n = np.random.default_rng(int(100 * share + 10 * drawn)), 2000
    grid = np.linspace(1e-4, 1, 20_000)
    accepted, risk = truth(share, grid)
    best = accepted[risk <= RISK].max()
    coverage, broken, naive = [], 0, 0
    for _ in range(DRAWS // 5):
        rows = rows_of(rng, int(n * (1 - drawn)), int(n * drawn))
        rule = vilu.certify(rows, max_risk=RISK, confidence=1 - DELTA, outside_share=share)
        found = truth(share, np.array([rule.threshold]))
        coverage.append(found[0][0])
        broken += found[1][0] > RISK
        closed = vilu.certify(rows.take(~rows.outside), max_risk=RISK, confidence=1 - DELTA)
        naive += truth(share, np.array([closed.threshold]))[1][0] > RISK
    draws = DRAWS // 5
    assert broken / draws <= DELTA + 3 * np.sqrt(DELTA * (1 - DELTA) / draws)
    assert np.mean(coverage) >= 0.8 * best
    assert naive / draws > DELTA + 3 * np.sqrt(DELTA * (1 - DELTA) / draws)
    assert f"for up to {share:.1%} of out-of-distribution images" in str(rule)


@pytest.mark.parametrize("n_outside", few([50, 400], 1))
def test_at_the_edge_a_stated_share_is_rarely_certified(n_outside: int) -> None:
    """If scores say nothing and the reweighted error rate is just above the target, every
    certificate is wrong.

    So certificates must be as rare as delta.
    """
    rng, share, certified = np.random.default_rng(n_outside), 0.03, 0
    for _ in range(2 * DRAWS):
        u = rng.random(1000 + n_outside)
        outside = np.arange(len(u)) >= 1000
        wrong = outside | (rng.random(len(u)) < (0.0501 - share) / (1 - share))
        rows = Outcomes(u, wrong.astype(int), outside=outside)
        certified += vilu.certify(
            rows, max_risk=RISK, confidence=1 - DELTA, outside_share=share
        ).feasible
    assert certified / (2 * DRAWS) <= DELTA


def test_more_is_certified_than_by_three_binomials() -> None:
    """At one threshold fixed before, the test must certify more often than three binomial bounds.

    There are 500 rows inside and 50 outside, at a share of 0.2. In truth 1.5 % of the accepted rows
    are wrong.
    """
    rng, ours, theirs, draws = np.random.default_rng(5), 0, 0, 300
    assert truth(0.2, np.array([0.3]))[1][0] == pytest.approx(0.0148, abs=0.0001)
    for _ in range(draws):
        rows = rows_of(rng, 500, 50)
        u = np.where(rows.uncertainty <= 0.3, 0.0, 1.0)
        point = weighted_learn_then_test(
            u, rows.failure == 1, Strata(rows, 0.2, None).weight, RISK, 0.05
        )
        ours += point is not None and point.threshold == 0
        theirs += (
            three_binomials(rows.uncertainty, rows.failure == 1, rows.outside, 0.3, 0.2, 0.05)
            <= RISK
        )
    assert ours > 1.5 * theirs


def test_strata_that_lack_rows_are_named() -> None:
    rng = np.random.default_rng(0)
    rule = vilu.certify(rows_of(rng, 800, 0), max_risk=RISK, outside_share=0.2)
    needed = n_rows_needed_in_stratum(0.2, RISK, level_without_floor(0.05), is_all_wrong=True)
    assert not rule.feasible
    assert rule.thresholds[""].why == (
        f"too few rows for the stated shares: (outside) has 0 and needs {needed} at least"
    )
    # The mean over bets of exp(n bet (0.05 / 0.95) (0.8 / 0.2)) must first exceed 1 / (0.96 *
    # 0.05).
    growth = [
        np.mean([math.exp(n * bet * 4 * 0.05 / 0.95) for bet in BET_SIZES])
        for n in (needed - 1, needed)
    ]
    assert growth[0] < 1 / (0.96 * 0.05) <= growth[1]
    assert vilu.certify(rows_of(rng, 8000, needed + 60), max_risk=RISK, outside_share=0.2).feasible
    assert vilu.certify(rows_of(rng, 800, 0), max_risk=RISK, outside_share=0.0).feasible


def classes_of(rng: np.random.Generator, sizes: list[int]) -> Outcomes:
    """Return rows in three classes. The last class is wrong in half the cases, at any score."""
    target = np.repeat(np.arange(3), sizes)
    u = rng.random(len(target))
    f = rng.random(len(target)) < np.where(target == 2, 0.5, 0.01)
    return Outcomes(u, f.astype(int), target=target, class_names=["cat", "cup", "dog"])


def test_the_guarantee_is_for_the_classes_as_they_are_stated() -> None:
    rng = np.random.default_rng(1)
    rows = classes_of(rng, [900, 900, 200])  # 5.9 % wrong
    few = vilu.certify(rows, max_risk=RISK, class_shares={"cat": 0.7, "cup": 0.29, "dog": 0.01})
    assert few.coverage > 0.9  # 1.5 % wrong at these shares
    assert "at the stated shares of 3 classes" in str(few)
    assert not vilu.certify(
        rows, max_risk=RISK, class_shares={"cat": 0.4, "cup": 0.4, "dog": 0.2}
    ).feasible
    rare = vilu.certify(
        classes_of(rng, [900, 900, 3]),
        max_risk=RISK,
        class_shares={"cat": 0.5, "dog": 0.5, "cup": 0},
    )
    assert "dog has 3 and needs" in str(rare.thresholds[""].why)
    with pytest.raises(UsageError, match=r"no share is stated of 1 of the 3 classes: 'cup'\."):
        vilu.certify(rows, max_risk=RISK, class_shares={"cat": 0.5, "dog": 0.5})
    assert type(few).model_validate_json(few.model_dump_json()) == few


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"outside_share": 1.0, "max_risk": 0.1}, "outside_share must be in"),
        ({"outside_share": 0.1, "min_coverage": 0.5}, "stated shares take a max_risk"),
        ({"outside_share": 0.1, "max_risk": 0.1, "method": "crc"}, "stated shares take a max_risk"),
        (
            {"outside_share": 0.1, "max_risk": 0.1, "groups": "prediction"},
            "stated shares take a max_risk",
        ),
        ({"class_shares": {"cat": 0.5}, "max_risk": 0.1}, "must add up to 1"),
        (
            {"class_shares": {"cat": 1.5, "cup": -0.5}, "max_risk": 0.1},
            "share of 'cat' must be a number in",
        ),
        (
            {"class_shares": {"cat": "0.5", "cup": 0.5}, "max_risk": 0.1},
            "share of 'cat' must be a number in .*'0.5'",
        ),
        ({"class_shares": {"cow": 1.0}, "max_risk": 0.1}, "none of the 3 classes"),
    ],
)
def test_shares_that_cannot_be(arguments: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        vilu.certify(classes_of(np.random.default_rng(2), [50, 50, 50]), **arguments)


def test_ood_images_need_a_stated_share_beside_classes() -> None:
    rows = Outcomes([0.1, 0.2], [0, 1], target=[0, -2], class_names=["cat"])
    with pytest.raises(UsageError, match="1 of these rows are of none of the classes"):
        vilu.certify(rows, max_risk=0.1, class_shares={"cat": 1.0})
    with pytest.raises(DataError, match="class of every row"):
        vilu.certify(
            Outcomes([0.1, 0.2], [0, 1], target=[0, -1], class_names=["cat"]),
            max_risk=0.1,
            class_shares={"cat": 1.0},
        )


def test_the_least_coverage_is_that_at_the_stated_shares() -> None:
    """Coverage must be counted at the stated shares.

    Half the rows are out of distribution. If their stated share is 30 %, at most a quarter may be
    accepted. Inside, all answers are accepted.
    """
    rng = np.random.default_rng(5)
    u = np.r_[rng.uniform(0, 0.5, 500), rng.uniform(0.5, 1, 500)]
    rows = Outcomes(u, np.r_[np.zeros(500, int), np.ones(500, int)], outside=np.arange(1000) >= 500)
    rule = vilu.certify(rows, max_risk=0.1, outside_share=0.3, min_coverage=0.69)
    assert 0.5 <= rule.n_accepted / rule.n < 0.69  # with the calibration rows as they are mixed
    accepted = 0.7 + 0.3 * np.mean(rule.accept(u)[500:])
    short = vilu.certify(rows, max_risk=0.1, outside_share=0.3, min_coverage=0.8)
    assert not short.feasible
    assert f"at {accepted:.1%} coverage at most" in str(short.thresholds[""].why)


def test_shares_are_read(tmp_path: Path) -> None:
    file = tmp_path / "shares.csv"
    file.write_text('class,share\ncat,0.25\n"cup, blue",0.75\n')
    assert read_shares(file) == {"cat": 0.25, "cup, blue": 0.75}
    for content, message in (
        ("name,share\ncat,1\n", "must have the columns"),
        ("class,share\ncat,1\ncat,1\n", "twice"),
        ("class,share\ncat,many\n", "must be a number"),
        ("class,share\ncat,0,25\n", "line 2: '25' after '0' is in none of the columns"),
        ("class,share\ncaf\xe9,1\n", "no CSV file in UTF-8"),
        (f"class,share\n{'x' * 200_000},1\n", "no CSV file in UTF-8"),
    ):
        file.write_text(content, encoding="latin-1")
        with pytest.raises(DataError, match=message):
            read_shares(file)

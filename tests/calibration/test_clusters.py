"""Test guarantees about clusters: numbers worked by hand, and simulations."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from benchmarks import clusters as benchmark
from hypothesis import given, settings
from hypothesis import strategies as st

import vilu
from tests.conftest import few
from vilu.calibration.anytime import log_evidence
from vilu.calibration.cluster_bets import LabelledRows, ratio_threshold
from vilu.calibration.clusters import (
    correlation,
    correlation_warning,
    majority_outcomes,
    ratio_rows,
)
from vilu.errors import DataError, UsageError
from vilu.outcomes.outcomes import Outcomes


def names_of(cluster: np.ndarray) -> list[str]:
    return [str(index) for index in cluster]


def bursts(n_clusters: int, size: int, seed: int = 0) -> tuple[Outcomes, list[str]]:
    """Return bursts with equal uncertainties. Each burst is right or wrong as a whole."""
    random = np.random.default_rng(seed)
    cluster = np.repeat(np.arange(n_clusters), size)
    uncertainty = random.random(n_clusters)[cluster]
    failure = random.random(n_clusters)[cluster] < uncertainty**4
    jitter = 1e-6 * random.random(len(cluster))
    return Outcomes(uncertainty + jitter, failure), names_of(cluster)


# --- majority -------------------------------------------------------------------------------


def test_majority_answer_of_a_cluster_and_its_score_by_hand() -> None:
    rows = Outcomes(
        uncertainty=[0.1, 0.2, 0.6, 0.4, 0.2, 0.5],
        failure=[0, 0, 1, 1, 0, -1],
        prediction=[3, 3, 5, 1, 2, 4],
    )
    clusters = majority_outcomes(rows, ["a", "a", "a", "b", "b", "c"])
    assert clusters.ids == ("a", "b", "c")
    np.testing.assert_allclose(clusters.uncertainty, [0.3, 0.3, 0.5])
    # Cluster a: two rows answer 3. Cluster b: each answer has one row, so the more trusted answer 2
    # is taken. Cluster c has no label.
    assert clusters.prediction is not None
    assert clusters.prediction.tolist() == [3, 2, 4]
    assert clusters.failure.tolist() == [0, 0, -1]


def test_half_of_the_rows_wrong_makes_a_cluster_wrong() -> None:
    rows = Outcomes([0.1, 0.1, 0.2, 0.2, 0.2], [0, 1, 0, 0, 1])
    clusters = majority_outcomes(rows, ["a", "a", "b", "b", "b"])
    assert clusters.failure.tolist() == [1, 0]


def test_rows_without_an_uncertainty_do_not_vote() -> None:
    rows = Outcomes(
        [math.nan, math.nan, 0.2, math.nan],
        [1, 1, 0, 1],
        prediction=[1, 1, 2, 1],
        reason=["zero_norm", "zero_norm", None, "zero_norm"],
    )
    clusters = majority_outcomes(rows, ["a", "a", "a", "b"])
    assert clusters.ids == ("a",)
    assert clusters.prediction is not None
    assert (clusters.prediction.tolist(), clusters.failure.tolist()) == ([2], [0])


def test_majority_rule_is_the_binomial_rule_of_the_clusters() -> None:
    outcomes, names = bursts(300, size=4)
    rule = vilu.certify_clusters(outcomes, names, "majority", max_risk=0.1)
    per_cluster = vilu.certify(majority_outcomes(outcomes, names), max_risk=0.1)
    assert rule.n == 300
    assert (rule.threshold, rule.n_wrong) == (per_cluster.threshold, per_cluster.n_wrong)
    assert "of the accepted clusters have a wrong majority answer" in str(rule)


def test_majority_rule_accepts_all_rows_of_a_cluster_or_none() -> None:
    outcomes, names = bursts(300, size=4)
    rule = vilu.certify_clusters(outcomes, names, "majority", max_risk=0.1)
    limit = rule.threshold
    assert limit is not None
    uncertainty = [limit - 0.1, limit + 0.05, limit - 0.1, limit + 0.2, math.nan]
    accepted = rule.accept(uncertainty, clusters=["a", "a", "b", "b", "a"])
    assert accepted.tolist() == [True, True, False, False, False]


def test_rows_of_the_fit_are_compared_with_rows_not_with_clusters() -> None:
    outcomes, names = bursts(300, size=4)
    # 5 of 1,200 rows are few. 5 of 300 clusters would be more than 1 %.
    outcomes = replace(outcomes, provenance={"n_seen_in_fit": 5})
    with pytest.warns(UserWarning, match="at least 5 of these rows") as caught:
        rule = vilu.certify_clusters(outcomes, names, "majority", max_risk=0.1)
    assert (len(caught), rule.feasible) == (1, True)


# --- ratio ----------------------------------------------------------------------------------


def aside_at(scores: np.ndarray, largest: int) -> LabelledRows:
    """Return clusters with the largest size and one score each, which fix the starts."""
    cluster = np.repeat(np.arange(len(scores)), largest)
    return LabelledRows(scores[cluster], np.zeros_like(cluster), cluster, largest_cluster=largest)


@given(st.integers(1, 200), st.integers(0, 2**32 - 1), st.floats(0.01, 0.3))
@settings(max_examples=30, deadline=None)
def test_clusters_of_one_row_have_the_evidence_of_single_rows(
    n: int, seed: int, max_risk: float
) -> None:
    random = np.random.default_rng(seed)
    failure = (random.random(n) < max_risk / 3).astype(np.int64)
    uncertainty = np.arange(n, dtype=np.float64)
    evidence = log_evidence(failure.cumsum(), np.arange(1, n + 1), max_risk)
    delta = 0.05
    rows = LabelledRows(uncertainty, failure, np.arange(n), largest_cluster=1)
    threshold = ratio_threshold(rows, aside_at(uncertainty[::10] + 0.5, 1), max_risk, delta)
    if threshold.threshold is None:
        return
    # A certified threshold must have at least the evidence for the whole level.
    assert evidence[int(threshold.threshold)] >= -math.log(delta) - 1e-9


def test_flawless_clusters_of_the_largest_size_count_like_rows() -> None:
    # With the bets, 72 right answers certify 5 % (``vilu.calibration.anytime``). A tenth of the
    # clusters, rounded up, is set aside. So 71 clusters are tested if there are 79, and 72 if there
    # are 80.
    def accepted_of(n_clusters: int) -> int:
        cluster = np.repeat(np.arange(n_clusters), 3)
        outcomes = Outcomes(np.full(len(cluster), 0.5), np.zeros(len(cluster)))
        names = names_of(cluster)
        rule = vilu.certify_clusters(outcomes, names, "ratio", max_risk=0.05, largest=3)
        return rule.n_accepted

    assert (accepted_of(79), accepted_of(80)) == (0, 216)


def test_wrong_rows_of_one_cluster_count_by_hand() -> None:
    # One accepted cluster has 2 wrong rows, and 299 clusters have 2 right rows. With r = 5 % and M
    # = 2, the bet b has the factor 1 - b 2 (1 - r) / ((1 - r) 2) = 1 - b for the wrong cluster, and
    # 1 + b r / (1 - r) for each right cluster.
    bet, share = np.array([(0.95, 0.4), (0.8, 0.25), (0.6, 0.2), (0.35, 0.15)]).T
    wealth = (share * (1 - bet) * (1 + bet * 0.05 / 0.95) ** 299).sum()
    cluster = np.repeat(np.arange(300), 2)
    failure = (cluster == 299).astype(np.int64)
    rows = LabelledRows(np.arange(600.0), failure, cluster, largest_cluster=2)
    # All sequences start where everything is accepted. If the level is just above 1 / wealth,
    # everything is accepted. If it is just below, nothing is accepted.
    aside = aside_at(np.full(30, 599.0), 2)
    assert ratio_threshold(rows, aside, 0.05, 1.001 / wealth).n_accepted == 600
    assert ratio_threshold(rows, aside, 0.05, 0.999 / wealth).n_accepted == 0


def test_a_score_before_the_start_is_not_certified() -> None:
    # 300 clusters have one row each, and are right up to the score 250. The level is enough there,
    # and not beyond.
    failure = (np.arange(300) > 250).astype(np.int64)
    enough = log_evidence(0, 251, 0.05)
    not_enough = log_evidence(1, 252, 0.05)
    delta = math.exp(-float(enough + not_enough) / 2)
    rows = LabelledRows(np.arange(300.0), failure, np.arange(300), largest_cluster=1)

    def accepted_of(start: float) -> int:
        return ratio_threshold(rows, aside_at(np.full(30, start), 1), 0.05, delta).n_accepted

    assert accepted_of(250.0) == 251
    assert accepted_of(250.5) == 0


def test_a_sequence_that_reaches_the_next_start_hands_on_its_level() -> None:
    # 800 clusters have one row each, and the last 16 are wrong, so the evidence is least at the
    # end. Sequences start at 25, 50, 70 and 90 %. Only all levels together are enough to accept
    # everything.
    failure = (np.arange(800) >= 784).astype(np.int64)
    rows = LabelledRows(np.arange(800.0), failure, np.arange(800), largest_cluster=1)
    enough = math.exp(-float(log_evidence(16, 800, 0.05)))
    assert enough < 0.05
    aside = aside_at(np.linspace(0, 800, 30), 1)
    assert ratio_threshold(rows, aside, 0.05, 1.001 * enough).n_accepted == 800
    assert ratio_threshold(rows, aside, 0.05, 0.999 * enough).n_accepted == 799


def test_labels_of_the_clusters_that_fix_the_starts_do_not_matter() -> None:
    outcomes, names = bursts(300, size=3)
    rows, aside = ratio_rows(outcomes, np.ones(900, dtype=np.bool_), names, largest_cluster=3)
    assert (rows.n_clusters, aside.n_clusters) == (270, 30)
    is_aside = np.isin(np.repeat(np.arange(300), 3), aside.cluster)
    turned = Outcomes(outcomes.uncertainty, np.where(is_aside, 1, outcomes.failure))
    first, second = (
        vilu.certify_clusters(labelled, names, "ratio", max_risk=0.1, largest=3)
        for labelled in (outcomes, turned)
    )
    assert first.feasible
    assert first == second


def test_clusters_of_many_rows_of_which_few_are_doubtful_are_accepted() -> None:
    # As in pages with many words, nearly every cluster has an accepted row long before the evidence
    # is enough.
    random = np.random.default_rng(0)
    cluster = np.repeat(np.arange(450), random.integers(10, 31, size=450))
    uncertainty = random.random(len(cluster))
    failure = random.random(len(cluster)) < 0.9 * uncertainty**11  # 7.5 % in all
    rule = vilu.certify_clusters(
        Outcomes(uncertainty, failure), names_of(cluster), "ratio", max_risk=0.05, largest=30
    )
    # 0.9 u^11 / 12 is 5 % at u = 0.963.
    assert 0.8 < rule.coverage < 0.963


def test_a_bound_far_above_the_sizes_certifies_nothing() -> None:
    outcomes, names = bursts(400, size=3)
    close = vilu.certify_clusters(outcomes, names, "ratio", max_risk=0.1, largest=3)
    far = vilu.certify_clusters(outcomes, names, "ratio", max_risk=0.1, largest=30)
    assert close.feasible
    assert not far.feasible
    assert "a smaller bound on the size of a cluster help" in str(far.thresholds[""].why)


def test_clusters_above_the_bound_are_left_for_review() -> None:
    outcomes, names = bursts(300, size=3)
    rule = vilu.certify_clusters(outcomes, names, "ratio", max_risk=0.1, largest=3)
    uncertainty = [0.01] * 5
    clusters = ["large"] * 4 + ["small"]
    assert rule.accept(uncertainty, clusters=clusters).tolist() == [False] * 4 + [True]
    assert rule.reasons(uncertainty, clusters=clusters) == ["large_cluster"] * 4 + [None]
    assert "of clusters of up to 3 rows" in str(rule)


def test_without_a_bound_the_largest_cluster_sets_it() -> None:
    outcomes, names = bursts(300, size=3)
    names[3] = names[0]  # one cluster with four rows, and one with two
    rule = vilu.certify_clusters(outcomes, names, "ratio", max_risk=0.1)
    assert rule.clusters is not None
    assert (rule.clusters.largest, rule.clusters.n, rule.n) == (4, 270, 810)


def test_the_cluster_that_sets_the_bound_counts_only_against_a_threshold() -> None:
    # 100 clusters have one right row each. The last cluster has two rows and sets the bound.
    cluster = np.append(np.arange(100), [100, 100])
    uncertainty = np.full(102, 0.5)

    bet, share = np.array([(0.95, 0.4), (0.8, 0.25), (0.6, 0.2), (0.35, 0.15)]).T
    wealth_of_bet = share * (1 + bet * 0.05 / (2 * 0.95)) ** 100

    def accepted(last_failure: int, level: float) -> int:
        failure = np.append(np.zeros(100, np.int64), [last_failure, last_failure])
        rows = LabelledRows(uncertainty, failure, cluster, largest_cluster=2, sizing_cluster=100)
        return ratio_threshold(rows, aside_at(np.full(30, 0.5), 2), 0.05, level).n_accepted

    for last_failure, wealth in ((0, wealth_of_bet.sum()), (1, (wealth_of_bet * (1 - bet)).sum())):
        assert accepted(last_failure, 1.001 / wealth) == 102
        assert accepted(last_failure, 0.999 / wealth) == 0


def test_without_a_bound_the_order_of_rows_does_not_matter() -> None:
    random = np.random.default_rng(0)
    cluster = np.repeat(np.arange(120), 3)
    uncertainty = random.random(120)[cluster]
    failure = random.random(120)[cluster] < 0.6 * uncertainty**6
    outcomes = Outcomes(uncertainty, failure)
    rules = set()
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(cluster))
        names = names_of(cluster[order])
        rule = vilu.certify_clusters(outcomes.take(order), names, "ratio", max_risk=0.15)
        rules.add((rule.threshold, rule.n_accepted, rule.n_wrong))
    assert len(rules) == 1


def test_simulated_ratio_where_wrong_clusters_set_the_bound() -> None:
    # 86 clusters have 19 or 20 rows. Only the rows in the larger clusters are wrong, 5.02 % of all
    # rows. So a threshold is wrongly certified for clusters of up to 20 rows. If a guarantee is
    # broken in 5 % of all draws, more than 16 broken ones among 150 have a probability of 0.1 %.
    random = np.random.default_rng(0)
    broken = 0
    for draw in range(150):
        is_large = random.random(86) < 0.0478
        cluster = np.repeat(np.arange(86), np.where(is_large, 20, 19))
        names = [f"{draw} {index}" for index in cluster]
        outcomes = Outcomes(np.full(len(cluster), 0.5), is_large[cluster])
        rule = vilu.certify_clusters(outcomes, names, "ratio", max_risk=0.05)
        assert rule.clusters is not None
        broken += rule.feasible and rule.clusters.largest == 20
    assert broken <= 2  # without the largest cluster, about 13 would be broken


def test_too_few_clusters_say_how_many_are_needed() -> None:
    outcomes, names = bursts(40, size=10)
    rule = vilu.certify_clusters(outcomes, names, "ratio", max_risk=0.05)
    assert not rule.feasible
    assert "40 clusters of 10.0 labelled rows on average are too few" in str(
        rule.thresholds[""].why
    )
    assert "needs 81 at least" in str(rule.thresholds[""].why)


@pytest.mark.parametrize("risk", ["majority", "ratio"])
def test_the_order_of_rows_does_not_matter(risk: str) -> None:
    outcomes, names = bursts(300, size=3)
    order = np.random.default_rng(1).permutation(len(names))
    in_order = [names[row] for row in order]
    first = vilu.certify_clusters(outcomes, names, risk, max_risk=0.1)
    second = vilu.certify_clusters(outcomes.take(order), in_order, risk, max_risk=0.1)
    assert first == second


# --- saved rules and refusals ---------------------------------------------------------------


@pytest.mark.parametrize("risk", ["majority", "ratio"])
def test_a_saved_rule_about_clusters_is_the_same(risk: str) -> None:
    outcomes, names = bursts(300, size=3)
    rule = vilu.certify_clusters(outcomes, names, risk, max_risk=0.1)
    assert vilu.Rule.model_validate_json(rule.model_dump_json()) == rule


def test_a_rule_about_single_rows_is_saved_as_before() -> None:
    rule = vilu.certify(bursts(300, size=1)[0], max_risk=0.1)
    assert "clusters" not in rule.model_dump()


def test_what_is_no_guarantee_about_clusters_is_refused() -> None:
    outcomes, names = bursts(100, size=2)
    with pytest.raises(UsageError, match="largest_cluster is for the cluster_risk"):
        vilu.certify_clusters(outcomes, names, "majority", max_risk=0.1, largest=2)
    with pytest.raises(UsageError, match="largest_cluster must be"):
        vilu.certify_clusters(outcomes, names, "ratio", max_risk=0.1, largest=0)
    with pytest.raises(UsageError, match="risk must be"):
        vilu.certify_clusters(outcomes, names, "median", max_risk=0.1)
    with pytest.raises(
        DataError, match=r"cluster must have one entry per uncertainty \(200\). Got 199"
    ):
        vilu.certify_clusters(outcomes, names[:-1], "ratio", max_risk=0.1)
    with pytest.raises(DataError, match="row 0 has no cluster"):
        vilu.certify_clusters(outcomes, ["", *names[1:]], "ratio", max_risk=0.1)
    with pytest.raises(DataError, match="no cluster of up to 1 rows"):
        vilu.certify_clusters(outcomes, names, "ratio", max_risk=0.1, largest=1)
    rule = vilu.certify_clusters(outcomes, names, "majority", max_risk=0.5)
    with pytest.raises(UsageError, match="needs the cluster of each of 3 rows"):
        rule.accept([0.1, 0.2, 0.3])


# --- correlation ----------------------------------------------------------------------------


def test_correlation_by_hand() -> None:
    # The means are 1, 0.5, 0, 0 and 0.375 overall. B = 2 (0.390625 + 0.015625 + 2 * 0.140625) / 3 =
    # 0.4583, W = 0.5 / 4 and n_0 = (8 - 16 / 8) / 3 = 2, so (B - W) / (B + W) = 4 / 7.
    failure = np.array([1, 1, 1, 0, 0, 0, 0, 0])
    among = correlation(failure, np.array([0, 0, 1, 1, 2, 2, 3, 3]))
    assert among.value == pytest.approx(4 / 7)
    assert among.n_effective == pytest.approx(8 / (1 + 4 / 7))


def test_correlation_of_whole_and_of_independent_clusters() -> None:
    cluster = np.repeat(np.arange(500), 4)
    random = np.random.default_rng(0)
    whole = (random.random(500) < 0.3)[cluster].astype(np.int64)
    alone = (random.random(2000) < 0.3).astype(np.int64)
    assert correlation(whole, cluster).value == pytest.approx(1.0)
    assert correlation(whole, cluster).n_effective == pytest.approx(500)
    # For rho = 0 the standard error is sqrt(2 / (m (m - 1) k)) = 0.018 (Donner 1986).
    assert abs(correlation(alone, cluster).value) < 4 * 0.018


@pytest.mark.parametrize(
    ("failure", "cluster"), [([0, 0, 0], [0, 0, 1]), ([0, 1, 0], [0, 1, 2]), ([0, 1], [0, 0])]
)
def test_correlation_that_cannot_be_estimated_is_not_a_number(
    failure: list[int], cluster: list[int]
) -> None:
    among = correlation(np.array(failure), np.array(cluster))
    assert math.isnan(among.value)
    assert among.n_effective == len(failure)


def test_warning_says_what_correlated_rows_are_worth() -> None:
    outcomes, names = bursts(500, size=4)
    everything = np.ones(len(outcomes), dtype=np.bool_)
    words = correlation_warning(outcomes, names, everything)
    assert words is not None
    assert "2,000 rows of 500 clusters" in words
    assert "say as much as 500 independent rows" in words
    alone = correlation_warning(outcomes, names_of(np.arange(len(names))), everything)
    assert alone is None


# --- simulated ------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", few(benchmark.CORRELATIONS, 2))
def test_simulated_guarantees_hold_for_every_correlation(rho: float) -> None:
    # The benchmark has 500 calibrations. Here are 60. If a guarantee is broken in 5 % of all draws,
    # more than 9 broken ones among 60 have a probability of 0.1 %.
    world = benchmark.World("rising", n_clusters=300, fewest=5, most=5)
    simulation = benchmark.Simulation(world, rho, seed=3)
    simulation.run(60)
    tallies = simulation.tallies
    for way in ("majority", "ratio"):
        assert tallies[way].broken <= 9
    assert tallies["ratio"].coverage > 0


def test_simulated_ratio_where_the_risk_crosses_the_bar_three_times() -> None:
    # If a guarantee is broken in 5 % of all draws, more than 9 broken ones among 60 have a
    # probability of at most 0.1 %.
    world = benchmark.World("waves", n_clusters=1_000, fewest=3, most=3)
    random = np.random.default_rng(4)
    thresholds = []
    for _ in range(60):
        uncertainty, failure, cluster = world.draw(random, 0.3, world.n_clusters)
        rule = vilu.certify_clusters(
            Outcomes(uncertainty, failure), names_of(cluster), "ratio", max_risk=0.05, largest=3
        )
        thresholds.append(rule.threshold or 0.0)
    broken = sum(world.risk(threshold) > 0.05 for threshold in thresholds)
    assert broken <= 9
    assert max(thresholds) > 0.3  # the world's first step, up to which 2 % are wrong

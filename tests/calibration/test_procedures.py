"""Test the compared procedures on kept scores: the tests keep their level, and replays end."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from benchmarks import forecasts, mistakes, procedures
from benchmarks.replays import MAX_LABELS, Chain, Reached, Replay
from benchmarks.risk_tests import Bets, PlannedLooks, WeightedBets, boundaries

from tests.builders.bench_fakes import make_store
from vilu.calibration.anytime import N_THRESHOLDS_UP_TO_LIMIT, SEQUENCE_STARTS, ThresholdTests

RISK = 0.3
LABELS = 12
ALL_FAILURES = np.array(list(itertools.product((0, 1), repeat=LABELS)))
N_WRONG = ALL_FAILURES.sum(axis=1)


def probability_of_any_certificate(n_accepted: tuple[int, ...], bounds: tuple[int, ...]) -> float:
    """Return the probability over all label sequences. Each label is wrong with probability
    ``RISK``.
    """
    wrong_so_far = ALL_FAILURES.cumsum(axis=1)
    wrong_at_looks = wrong_so_far[:, np.array(n_accepted) - 1]
    is_certified = (wrong_at_looks <= np.array(bounds)).any(axis=1)
    probability = RISK**N_WRONG * (1 - RISK) ** (LABELS - N_WRONG)
    return float(probability[is_certified].sum())


@pytest.mark.parametrize("n_accepted", [(4, 8, 12), (6, 7, 12), (12,), (3, 3, 9)])
def test_planned_looks_spend_at_most_their_level(n_accepted: tuple[int, ...]) -> None:
    levels = (0.05, 0.12, 0.2)[-len(n_accepted) :]
    bounds = boundaries(n_accepted, levels, RISK)
    for look in range(1, len(n_accepted) + 1):
        spent = probability_of_any_certificate(n_accepted[:look], bounds[:look])
        assert spent <= levels[look - 1] + 1e-12  # sums in float64
        one_more = (*bounds[: look - 1], bounds[look - 1] + 1)
        # No bound can be larger, so the whole level is used, as far as whole numbers allow.
        assert probability_of_any_certificate(n_accepted[:look], one_more) > levels[look - 1]


def test_a_flawless_run_passes_at_the_first_planned_look() -> None:
    test = PlannedLooks(SEQUENCE_STARTS, 0.0, growth=1.3, first_share=0.4, decay=0.7, n_looks=5)
    looks = ThresholdTests(
        np.linspace(0.01, 0.64, N_THRESHOLDS_UP_TO_LIMIT), 0.05, 0.05, limit=0.64
    )
    first = test.numbers(looks)[0]
    uncertainty = np.full(first, 0.005)
    right = np.zeros(first, dtype=np.int64)
    assert test.certified_index(looks, uncertainty, right) == N_THRESHOLDS_UP_TO_LIMIT - 1
    assert test.certified_index(looks, uncertainty[1:], right[1:]) is None
    right[0] = 1
    assert test.certified_index(looks, uncertainty, right) is None


def test_weighted_bets_win_nothing_where_the_risk_is_as_large_as_allowed() -> None:
    test = WeightedBets(SEQUENCE_STARTS, 0.0, floor=0.25)
    uncertainty = np.array([0.0, 0.01, 0.04, 0.09, 0.16])
    probability = test.draw_probability(uncertainty, planned_limit=0.16)
    assert probability == pytest.approx([0.25, 0.25, 0.5, 0.75, 1.0])
    factor_if_right = np.exp(test.log_factors(probability, np.zeros(5, np.int64), RISK))
    factor_if_wrong = np.exp(test.log_factors(probability, np.ones(5, np.int64), RISK))
    assert (factor_if_wrong > 0).all()
    edge = np.array([0.1, 0.5, 0.2, 0.3, 0.4])  # error rates with the mean RISK
    for rates, largest_mean in ((edge, 1.0), (edge + 0.1, 1.0), (edge - 0.1, 2.0)):
        wrong = probability * rates
        right = probability * (1 - rates)
        mean = (wrong @ factor_if_wrong + right @ factor_if_right + (1 - probability).sum()) / 5
        assert (mean <= largest_mean + 1e-12).all()
    assert (mean > 1).all()  # below the risk the bets win


def test_bets_with_the_constants_of_triage_certify_what_triage_does() -> None:
    rng = np.random.default_rng(0)
    looks = ThresholdTests(np.linspace(0.002, 0.2, 100), 0.05, 0.05, limit=0.18)
    certified = []
    for rate in (0.0, 0.01, 0.02, 0.03):
        uncertainty = rng.random(300) * 0.18
        failure = (rng.random(300) < rate).astype(np.int64)
        expected = looks.index_of_laxest_certified_threshold(uncertainty, failure)
        assert (
            Bets(SEQUENCE_STARTS, handed_on=0.0).certified_index(looks, uncertainty, failure)
            == expected
        )
        certified.append(expected)
    assert certified[0] is not None


def easy_chain(tmp_path: Path) -> Path:
    """Write a chain with 4,000 photos. The most uncertain fifth is marked as wrong."""
    rng = np.random.default_rng(0)
    n = 4_000
    rank = np.linspace(0, 1, n)
    wrong = rank > 0.8
    uncertainty = np.where(wrong, rank, 0.02 * rank)
    np.savez(
        tmp_path / "easy_0.npz",
        u=np.tile(uncertainty, (11, 1)),
        wrong=np.tile(wrong, (11, 1)),
        n_fit=np.arange(0, 501, 50),
        cal=rng.random(n) < 0.5,
        pos=rng.permutation(n).astype(np.uint64),
        n_classes=10,
    )
    return tmp_path / "easy_0.npz"


@pytest.mark.parametrize("name", procedures.PROCEDURES)
def test_every_procedure_certifies_an_easy_set(tmp_path: Path, name: str) -> None:
    chain = Chain.load(easy_chain(tmp_path))
    curve = list(Replay(chain, procedures.PROCEDURES[name]).rounds())
    n_labels = [point.n_labels for point in curve]
    assert n_labels == sorted(n_labels)
    assert n_labels[-1] <= MAX_LABELS
    assert curve[-1].coverage > 0.4  # four fifths are right, and hundreds of them are labelled
    assert max(point.risk for point in curve) <= 0.05


def reached_from(*n_labels: int, coverage: float = 0.46) -> np.ndarray:
    """Return a seed's coverages for each of ``n_labels``, which are 0 with fewer labels."""
    counts = np.array(procedures.COMPARED_COUNTS)
    return np.array([np.where(counts >= n, coverage, 0.0) for n in n_labels])


def test_half_way_is_half_of_the_coverage_of_random_labels() -> None:
    early = {"food9": reached_from(300, 300)}  # random labels reach 0.92 on food9
    late = {"food9": reached_from(600, 600)}
    never = {"food9": reached_from(300, 300, coverage=0.45)}
    assert procedures.half_way_counts(early, ["food9"]).tolist() == [300]
    assert procedures.mean_ratio(early, late, ["food9"]) == 0.5
    assert procedures.mean_ratio(late, early, ["food9"]) == 2
    # "before" gets half-way with more than 1,200 labels. So the true ratio is below 300 / 1,200.
    assert procedures.mean_ratio(early, never, ["food9"]) == 0.25
    assert procedures.mean_ratio(never, early, ["food9"]) == 8
    assert procedures.mean_ratio(never, never, ["food9"]) == 1


def test_half_way_is_that_of_the_mean_over_seeds() -> None:
    # one seed in two reaches 0.92 at 300 labels, so the mean is 0.46 there
    half_of_the_seeds = {"food9": reached_from(300, 900, coverage=0.92)}
    assert procedures.half_way_counts(half_of_the_seeds, ["food9"]).tolist() == [300]


def test_the_interval_of_a_ratio_takes_the_same_seeds_from_both() -> None:
    some = {"food9": reached_from(*range(200, 1_000, 50))}
    later = {"food9": reached_from(*range(1_150, 350, -50))}
    assert procedures.ratio_interval(some, some, ["food9"]) == (1, 1)
    low, high = procedures.ratio_interval(some, later, ["food9"])
    ratio = procedures.mean_ratio(some, later, ["food9"])
    assert 0 < low < ratio < high
    one_seed = {"food9": reached_from(300)}
    assert np.isnan(procedures.ratio_interval(one_seed, one_seed, ["food9"])).all()


def test_a_seed_is_the_mean_of_its_orders(tmp_path: Path) -> None:
    chain = Chain.load(easy_chain(tmp_path))
    coverages = iter([0.2, 0.4, 0.9])

    def replay_chain(_: Chain) -> list[Reached]:
        return [Reached(100, next(coverages), 0.01)]

    table = procedures.coverages_of([chain], 3, replay_chain)
    assert table.of_set["easy"][:, procedures.column_of(50)] == [0]
    assert table.of_set["easy"][:, procedures.column_of(400)] == pytest.approx([0.5])
    assert table.largest_risk == 0.01


def test_chains_are_taken_up_again_and_replayed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = make_store(tmp_path / "clothing", 40, 0)
    out = tmp_path / "chains"
    command = ["chains", str(store), "--out", str(out), "--seeds", "1", "--first-seed", "3"]
    procedures.main(command)
    assert capsys.readouterr().out.splitlines() == [str(out / "clothing_3.npz")]
    (out / "clothing_4.partial.npz").touch()  # of a killed run
    procedures.main(command)
    assert not capsys.readouterr().out
    procedures.main(["replay", str(out), "--names", "default"])
    shown = capsys.readouterr().out
    assert "1 sets, 1 replays" in shown
    assert "| default |" in shown
    assert "At 400 labels, by set" in shown
    procedures.main(["replay", str(out), "--names", "default", "--orders", "3"])
    shown = capsys.readouterr().out
    assert "1 sets, 3 replays" in shown
    assert "| clothing | mean ratio |" in shown
    assert "clothing (1)" in shown  # several orders for one chain are not several seeds
    forecasts.main([str(out), "--orders", "2"])
    shown = capsys.readouterr().out
    assert "without a label" in shown
    assert "after 50 labels" in shown


def test_floors_help_against_confident_mistakes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    easy_chain(tmp_path)
    mistakes.main([str(tmp_path), "--draws", "5"])
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[1:]]
    accepted = {line[1]: [float(share) for share in line[2].split(" / ")] for line in lines}
    assert accepted["None"][0] > 0.7  # four fifths of the answers are right
    without_floors, with_floors = accepted["0.1"]
    assert without_floors == 0
    assert with_floors > 0.3

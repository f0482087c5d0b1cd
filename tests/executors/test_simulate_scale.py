"""The simulation for a plan, compared with cases that can be computed by hand."""

from __future__ import annotations

import math

import pytest
from benchmarks.simulate_scale import ATTEMPTS, Plan, Replay, main, parse, summary

from vilu.artifacts.documents import append_to_log
from vilu.store.job import MAX_ATTEMPTS


@pytest.mark.parametrize(("parts", "workers"), [(1, 1), (10, 3), (12, 4), (413, 32), (3, 8)])
def test_without_failures_it_is_the_number_of_rounds(parts, workers):
    outcome = Replay(Plan(parts, workers, (90.0,), start=30.0, price=2.0), 0).run()
    rounds = math.ceil(parts / workers)
    assert outcome.hours == pytest.approx((30 + rounds * 90) / 3600)
    assert (outcome.wasted, outcome.deaths, outcome.set_aside) == (0, 0, 0)
    assert outcome.cost == pytest.approx(outcome.hours * workers * 2)


def test_a_poison_part_costs_three_deaths_and_nothing_else():
    assert ATTEMPTS == MAX_ATTEMPTS
    outcome = Replay(Plan(5, 1, (60.0,), poison=1.0), 0).run()
    assert (outcome.set_aside, outcome.deaths, outcome.wasted) == (5, 15, 1.0)
    assert 0 < outcome.hours < 15 * 60 / 3600


def test_three_deaths_set_any_part_aside():
    """After three deaths, a part must be set aside.

    An attempt at a part with length T survives with probability q = e^(-rT). The share that is set
    aside is (1 - q)^3.
    """
    outcome = Replay(Plan(4000, 1, (3600.0,), death_hours=1.0), 0).run()
    share = (1 - math.exp(-1)) ** 3
    assert outcome.set_aside / 4000 == pytest.approx(
        share, abs=4 * math.sqrt(share * (1 - share) / 4000)
    )


def test_lost_work_is_what_the_exponential_law_says():
    """The lost work must agree with the exponential law.

    A part with length T and failure rate r takes (e^(rT) - 1)/r on average, and T is useful.
    """
    hour, rate = 3600.0, 0.5
    plan = Plan(4000, 1, (hour,), preemption_hours=1 / rate)
    outcome = Replay(plan, 1).run()
    expected = (math.exp(rate) - 1) / rate
    sd = 1.0  # hours per part: for these numbers the deviation is below one
    assert outcome.hours / 4000 == pytest.approx(expected, abs=4 * sd / math.sqrt(4000))
    assert outcome.wasted == pytest.approx(1 - 1 / expected, abs=0.03)


def test_preemption_waits_are_not_paid_and_stragglers_are():
    plan = Plan(200, 1, (600.0,), preemption_hours=1.0, preemption_wait=900.0, price=1.0)
    outcome = Replay(plan, 0).run()
    assert outcome.deaths > 0
    assert outcome.cost == pytest.approx(outcome.hours - outcome.deaths * 0.25)
    slow = Replay(Plan(10, 1, (60.0,), stragglers=1.0, straggler_factor=3.0), 0).run()
    assert slow.hours == pytest.approx(10 * 180 / 3600)


def test_seeds_repeat_and_quantiles_are_in_order():
    plan = Plan(50, 4, (50.0, 70.0), death_hours=1.0)
    assert Replay(plan, 3).run() == Replay(plan, 3).run()
    assert all(low <= middle <= high for low, middle, high in summary(plan, 9).values())


def test_times_come_from_the_log(tmp_path, capsys):
    for part, seconds in (
        (0, 11.0),
        (1, 30.0),
        (0, 10.0),
    ):  # one part was done twice: the last time counts
        append_to_log(tmp_path, part=part, seconds=seconds)
    with (tmp_path / "log.jsonl").open("a") as cut:
        cut.write('{"part": 2, "sec')
    options = ["--parts", "8", "--workers", "2", "--receipts", str(tmp_path)]
    assert parse(options)[0].seconds == (10.0, 30.0)
    assert parse([*options, "--seconds", "40"])[0].seconds == (20.0, 60.0)
    assert main([*options, "--seeds", "3"])["set_aside"] == 0
    assert "hours" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="has no times"):
        main(["--parts", "1", "--workers", "1", "--receipts", str(tmp_path / "none")])
    with pytest.raises(SystemExit):
        parse(["--parts", "1", "--workers", "1"])

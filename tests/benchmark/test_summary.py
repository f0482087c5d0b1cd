from __future__ import annotations

from inspect import unwrap

import numpy as np
import pytest

from tests.builders.bench_fakes import config
from vilu.metrics import METRICS, Interval, auroc, bootstrap_interval, paired_bootstrap
from vilu.metrics.bootstrap import Quantity
from vilu.metrics.counts import Floats
from vilu.outcomes.results import ResultRow
from vilu_bench.studies.board import Board
from vilu_bench.studies.cells import Cell
from vilu_bench.studies.parts import RANKING_METRICS
from vilu_bench.studies.ranking import Standing, ranking_text, standings, summarise
from vilu_bench.studies.result import CellResult, Refusal, bootstrap_metrics

ROWS = "00c0ffee" * 4
"""This names the test rows, and its number seeds the resamples."""


def interval(per_seed: Floats, confidence: float) -> Interval:
    return Quantity.over_seeds(per_seed.mean(axis=1), per_seed).interval(confidence)


def mean_draws(per_seed: Floats) -> Floats:
    return Quantity.over_seeds(per_seed.mean(axis=1), per_seed).draws


def sample(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    failure = (rng.random(n) < 0.4).astype(np.int64)
    return np.round(rng.normal(size=n) + failure, 1), failure


def test_one_seed_gives_the_intervals_of_the_metrics_room() -> None:
    uncertainty, failure = sample(150, 0)
    values = bootstrap_metrics(uncertainty, failure, 300, ROWS)
    for row, name in enumerate(RANKING_METRICS):
        expected = unwrap(bootstrap_interval)(
            name, uncertainty, failure, n_resamples=300, seed=int(ROWS, 16)
        )
        found = interval(values[row : row + 1], 0.95)
        assert (found.ci_low, found.ci_high) == (expected.ci_low, expected.ci_high)


def test_one_seed_gives_the_paired_bootstrap_of_the_metrics_room() -> None:
    a, failure = sample(150, 0)
    b = a + np.random.default_rng(1).normal(size=150)
    values_a, values_b = (bootstrap_metrics(u, failure, 300, ROWS)[:1] for u in (a, b))
    expected = unwrap(paired_bootstrap)("auroc", a, b, failure, n_resamples=300, seed=int(ROWS, 16))
    point_a, point_b = (np.array([auroc(u, failure)]) for u in (a, b))
    found = (
        Quantity.over_seeds(point_a, values_a) - Quantity.over_seeds(point_b, values_b)
    ).difference(0.95)
    assert tuple(found) == pytest.approx(tuple(expected), abs=1e-15)


def test_resamples_are_those_of_the_rows_whatever_the_scores() -> None:
    """Each value must be the metric on rows drawn by a generator that knows only the rows' name."""
    uncertainty, failure = sample(40, 2)
    values = bootstrap_metrics(uncertainty, failure, 25, ROWS)
    rng = np.random.default_rng(int(ROWS, 16))
    right, wrong = np.flatnonzero(failure == 0), np.flatnonzero(failure == 1)
    draws = [rows[rng.integers(len(rows), size=(25, len(rows)))] for rows in (right, wrong)]
    for b in range(25):
        rows = np.concatenate([draw[b] for draw in draws])
        assert values[0, b] == pytest.approx(auroc(uncertainty[rows], failure[rows]), abs=1e-12)


def test_many_rows_are_resampled_in_blocks() -> None:
    rng = np.random.default_rng(0)
    uncertainty, failure = rng.normal(size=3000), (rng.random(3000) < 0.5).astype(np.int64)
    # 2^18 counts are fewer than 200 x 3000.
    values = bootstrap_metrics(uncertainty, failure, 200, ROWS)
    expected = unwrap(bootstrap_interval)(
        "auroc", uncertainty, failure, n_resamples=200, seed=int(ROWS, 16)
    )
    assert interval(values[:1], 0.95).ci_low == expected.ci_low


def test_without_failures_nothing_is_defined() -> None:
    assert np.isnan(bootstrap_metrics(np.arange(5.0), np.zeros(5, np.int64), 10, ROWS)).all()


def test_mean_over_seeds_resamples_the_seeds() -> None:
    """With a constant c_s per seed, values must be means over S draws.

    Their mean is c, and their variance var(c) / S.
    """
    constants = np.array([0.5, 0.6, 0.8, 0.9])
    per_seed = np.repeat(constants[:, None], 20_000, axis=1)
    means = mean_draws(per_seed)
    deviation = constants.std() / 2
    assert means.mean() == pytest.approx(0.7, abs=5 * deviation / np.sqrt(20_000))
    assert means.std() == pytest.approx(deviation, rel=5 / np.sqrt(2 * 20_000))
    assert np.array_equal(mean_draws(per_seed), means)
    assert np.array_equal(mean_draws(per_seed[:1]), per_seed[0])


def test_seeds_that_share_rows_keep_the_variance_of_the_rows() -> None:
    """Five runs with the same scores must count as one run.

    If each run resampled its rows apart, the interval would be too narrow.
    """
    uncertainty, failure = sample(150, 3)
    once = bootstrap_metrics(uncertainty, failure, 400, ROWS)[:1]
    assert interval(np.repeat(once, 5, axis=0), 0.95)[1:] == interval(once, 0.95)[1:]


def test_standings_by_hand() -> None:
    contests = [
        {"a": 0.9, "b": 0.8, "c": 0.7},  # ranks 1 2 3
        {"a": 0.8, "b": 0.8, "c": 0.9},  # ranks 2.5 2.5 1
        {"a": 0.8, "b": 0.8},  # ranks 1.5 1.5, half a win each
        {"c": 0.5},
    ]
    assert standings(contests) == (
        Standing("c", 2.0, pytest.approx(5 / 3), 3),
        Standing("a", 1.5, pytest.approx(5 / 3), 3),
        Standing("b", 0.5, 2.0, 3),
    )
    assert standings([]) == ()


def test_standings_against_scipy() -> None:
    from scipy.stats import rankdata

    rng = np.random.default_rng(0)
    values = rng.integers(6, size=(50, 8)) / 10
    found = {
        s.method: s for s in standings([{f"m{i}": v for i, v in enumerate(row)} for row in values])
    }
    ranks = np.stack([rankdata(-row) for row in values])
    best = values == values.max(axis=1, keepdims=True)
    wins = (best / best.sum(axis=1, keepdims=True)).sum(axis=0)
    for i in range(8):
        assert found[f"m{i}"].mean_rank == pytest.approx(ranks[:, i].mean(), abs=1e-12)
        assert found[f"m{i}"].wins == pytest.approx(wins[i], abs=1e-12)


def result(
    cell: Cell, values: dict[str, float | None], refused: Refusal | None = None
) -> CellResult:
    rows = tuple(
        ResultRow(
            cell.method,
            cell.data,
            cell.setting,
            cell.seed,
            metric,
            value,
            None,
            None,
            100,
            40,
            0.6,
            0,
            0,
            METRICS[metric].convention,
            why=None if value is not None else "not a probability",
        )
        for metric, value in values.items()
    )
    return CellResult(
        fingerprint="f",
        decided_by={},
        method=cell.method,
        data=cell.data,
        setting=cell.setting,
        seed=cell.seed,
        test_rows="r",
        results=() if refused else rows,
        refused=refused,
    )


METHODS = {"mcm": {}, "lvu": {}, "vilu": {"seeds": 1}, "margin": {}}


@pytest.fixture
def made() -> tuple:
    """Return four methods on one block with two seeds.

    mcm runs once, vilu runs on one seed, and margin is refused.
    """
    small = config(
        data={"one": {"stores": {"train": "a", "test": "b"}}},
        settings={"all": {"kind": "labels"}},
        methods=METHODS,
        metrics=["auroc", "fpr95", "ece"],
    )
    cells = [
        Cell("mcm", "one", "all", 0),
        Cell("mcm", "one", "all", 1, same_as=Cell("mcm", "one", "all", 0)),
    ]
    cells += [Cell("lvu", "one", "all", seed) for seed in (0, 1)]
    cells += [
        Cell("vilu", "one", "all", 0),
        Cell("margin", "one", "all", 0),
        Cell("margin", "one", "all", 1),
    ]
    no = Refusal(error="DataError", reason="it needs two candidates")
    results = {
        cells[0]: result(cells[0], {"auroc": 0.7, "fpr95": 0.5, "ece": 0.1}),
        cells[2]: result(cells[2], {"auroc": 0.8, "fpr95": 0.4, "ece": None}),
        cells[3]: result(cells[3], {"auroc": 0.9, "fpr95": 0.2, "ece": None}),
        cells[4]: result(cells[4], {"auroc": 0.75, "fpr95": 0.6, "ece": 0.2}),
        cells[5]: result(cells[5], {}, no),
        cells[6]: result(cells[6], {}, no),
    }
    rng = np.random.default_rng(0)
    noise = 0.01 * rng.normal(size=40)
    bootstrap = {
        cell: np.stack([found.value("auroc") + noise, found.value("fpr95") - noise])
        for cell, found in results.items()
        if found.refused is None
    }
    return small, cells, results, bootstrap


def test_summary_by_hand(made: tuple) -> None:
    small, cells, results, bootstrap = made
    summary = summarise(Board(small, cells, results, bootstrap.__getitem__))
    (block,) = summary.blocks
    lines = {line.method: line for line in block.lines}
    assert [(line.method, line.rank, line.n_runs) for line in block.lines] == [
        ("lvu", 1, 2),
        ("vilu", 2, 1),
        ("mcm", 3, 1),
    ]
    assert lines["lvu"].values == {
        "auroc": pytest.approx(0.85),
        "fpr95": pytest.approx(0.3),
        "ece": None,
    }
    assert lines["mcm"].values["ece"] == 0.1
    assert block.refused == {"margin": "it needs two candidates"}
    assert (block.n, block.n_failures) == ((100,), (40,))
    # The seed is the only one that vilu was to run.
    assert block.contests == {0: {"lvu": 0.8, "vilu": 0.75, "mcm": 0.7}}
    assert [(s.method, s.wins, s.mean_rank, s.contests) for s in summary.standings] == [
        ("lvu", 1.0, 1.0, 1),
        ("vilu", 0.0, 2.0, 1),
        ("mcm", 0.0, 3.0, 1),
    ]
    # The noise is the same for all methods, as on the same rows. So differences are exact on the
    # seeds that both methods have.
    assert [(line.against, pytest.approx(line.gap.difference)) for line in block.lines] == [
        ("vilu", 0.05),
        ("lvu", -0.05),
        ("lvu", -0.15),
    ]
    assert (lines["vilu"].gap.ci_low, lines["vilu"].gap.ci_high) == pytest.approx((-0.05, -0.05))
    # On its two seeds, lvu less mcm is 0.1 and 0.2. So the mean over two draws is 0.1, 0.15 or 0.2.
    assert (lines["mcm"].gap.ci_low, lines["mcm"].gap.ci_high) == pytest.approx(
        (-0.2, -0.1), abs=0.006
    )
    assert lines["mcm"].gap.p_value == pytest.approx(2 / 41)
    # There is one row per metric and run. The shared run counts once.
    assert len(summary.results) == 3 * 4


def test_table_says_what_was_found(made: tuple) -> None:
    small, cells, results, bootstrap = made
    text = ranking_text(small, summarise(Board(small, cells, results, bootstrap.__getitem__)))
    assert "one, all (all labels): 100 answers, 40 wrong" in text
    assert "no result: margin: it needs two candidates" in text
    (line,) = [line for line in text.splitlines() if line.startswith("2  vilu")]
    assert line.split()[:4] == ["2", "vilu", "1", "75.0"]
    assert "-5.00 [-5.00, -5.00]" in line
    (standing,) = [line for line in text.splitlines() if line.startswith("lvu")]
    assert standing.split() == ["lvu", "1", "1.0", "1", "of", "1", "85.0"]


def test_a_block_without_any_result(made: tuple) -> None:
    small, cells, results, _ = made
    alone = [cell for cell in cells if cell.method == "margin"]
    summary = summarise(Board(small, alone, results, {}.__getitem__))
    assert summary.blocks[0].lines == ()
    assert summary.standings == ()
    assert "no result: margin" in ranking_text(small, summary)

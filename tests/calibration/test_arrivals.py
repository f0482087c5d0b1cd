"""Test rows and labels that arrive repeatedly, and rows whose order is not the order of arrival."""

from __future__ import annotations

import dataclasses
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest

import vilu
from vilu.artifacts.tables import read_table, write_table
from vilu.calibration.monitor.arrivals import SeenRows, admit_rows, refuse_sorted
from vilu.calibration.monitor.martingale import is_grouped, is_in_blocks, is_rising
from vilu.errors import DataError

NAMES = ("a", "b", "c", "d")


def draw(seed: int, n: int, *, named: bool = True, labelled: bool = False) -> vilu.Outcomes:
    rng = np.random.default_rng(seed)
    u, target = rng.random(n), rng.integers(4, size=n)
    failure = (rng.random(n) < u**2 / 2).astype(int)
    return vilu.Outcomes(
        u,
        failure if labelled else np.full(n, -1),
        prediction=np.where(failure == 1, (target + 1) % 4, target),
        target=target if labelled else None,
        ids=[f"{seed}/{row}" for row in rng.permutation(n)] if named else None,
        class_names=NAMES,
        method="toy",
    )


@pytest.fixture(scope="module")
def calibration() -> vilu.Outcomes:
    return draw(100, 1500, labelled=True)


def monitor_of(calibration: vilu.Outcomes) -> vilu.Monitor:
    return vilu.Monitor(calibration, vilu.certify(calibration, max_risk=0.1))


def save_and_resume(monitor: vilu.Monitor, calibration: vilu.Outcomes, path: Path) -> vilu.Monitor:
    monitor.save(path)
    return monitor_of(calibration).resume(path)


@pytest.mark.parametrize("named", [True, False])
def test_rows_that_come_again_are_not_counted_again(
    calibration: vilu.Outcomes, tmp_path: Path, named: bool
) -> None:
    """Repeated rows must leave the status as it was, to the last bit.

    The rows arrive in two orders, and the monitor is resumed from a saved state.
    """
    rows = draw(1, 300, named=named, labelled=True)
    monitor = monitor_of(calibration)
    once = monitor.update(rows)
    for again in (rows, rows.take(np.random.default_rng(0).permutation(300))):
        monitor = save_and_resume(monitor, calibration, tmp_path / "state.parquet")
        with pytest.warns(UserWarning, match="300 of 300 rows were monitored before"):
            assert monitor.update(again) == once
        assert monitor.repeated == 300
    assert monitor.update(draw(2, 300, named=named)).rows == 600


def test_rows_in_part_known_are_counted_in_part(calibration: vilu.Outcomes) -> None:
    rows = draw(1, 300)
    whole, parts = monitor_of(calibration), monitor_of(calibration)
    expected = whole.update(rows)
    parts.update(rows.take(np.arange(180)))
    twice = np.r_[100:300, 250:300]  # some rows are known, and some occur twice in one file
    with pytest.warns(UserWarning, match="130 of 250 rows were monitored before"):
        assert parts.update(rows.take(twice)) == expected


def test_another_score_or_answer_of_the_same_name_is_another_row(
    calibration: vilu.Outcomes,
) -> None:
    rows = draw(1, 100)
    monitor = monitor_of(calibration)
    monitor.update(rows)
    assert monitor.update(dataclasses.replace(rows, uncertainty=rows.uncertainty / 2)).rows == 200
    assert (
        monitor.update(dataclasses.replace(rows, prediction=(rows.prediction + 1) % 4)).rows == 300
    )


def test_names_that_come_every_day_are_other_rows_where_scores_are_tied(
    calibration: vilu.Outcomes,
) -> None:
    """If half the scores are 0 and names are used again every day, all new rows and labels must
    count.

    If a file has old and new rows, only the new rows must count.
    """

    def saturated(rows: vilu.Outcomes, ids: list[str] | None) -> vilu.Outcomes:
        return dataclasses.replace(
            rows, uncertainty=rows.uncertainty * (rows.uncertainty > 0.5), ids=ids
        )

    names = [f"frame_{row:04d}.jpg" for row in range(400)]
    days = [saturated(draw(10 + seed, 400, labelled=True), names) for seed in range(8)]
    monitor = monitor_of(saturated(calibration, None))
    for day, rows in enumerate(days, 1):
        status = monitor.update(rows)
        assert (status.verdict, status.rows, monitor.repeated) == ("holds", 400 * day, 0)
    assert status.audit.n == monitor.accepted
    more = dataclasses.replace(days[0], ids=[f"late_{row:04d}.jpg" for row in range(400)])
    for known, n in (
        (days[2], 3200),
        (days[2].take(np.arange(50)), 3200),
        (joined(days[1], more), 3600),
    ):
        with pytest.warns(UserWarning, match="were monitored before"):
            assert monitor.update(known).rows == n


def test_a_grown_file_counts_once_where_every_score_is_tied(
    calibration: vilu.Outcomes, tmp_path: Path
) -> None:
    """If names are unique, a row with a known name is an old row.

    So rows and labels must not count twice, not even after a saved state.
    """

    def rounded(rows: vilu.Outcomes) -> vilu.Outcomes:
        return dataclasses.replace(rows, uncertainty=rows.uncertainty.round(1))

    rows, coarse = rounded(draw(1, 600, labelled=True)), rounded(calibration)
    whole, parts = monitor_of(coarse), monitor_of(coarse)
    expected = whole.update(rows)
    parts.update(rows.take(np.arange(400)))
    parts = save_and_resume(parts, coarse, tmp_path / "state.parquet")
    with pytest.warns(UserWarning, match="400 of 600 rows were monitored before"):
        assert parts.update(rows) == expected
    with pytest.warns(UserWarning, match="labels were given before"):
        assert parts.audit(rows).audit == expected.audit
    late = monitor_of(coarse)
    late.audit(rows.take(np.arange(400)))
    with pytest.warns(UserWarning, match="labels were given before"):
        assert late.audit(rows).audit == expected.audit


def joined(one: vilu.Outcomes, other: vilu.Outcomes) -> vilu.Outcomes:
    columns = ("uncertainty", "failure", "prediction", "target", "outside")
    both = {name: (getattr(one, name), getattr(other, name)) for name in columns}
    whole = {name: None if pair[0] is None else np.concatenate(pair) for name, pair in both.items()}
    return dataclasses.replace(one, **whole, ids=[*one.ids, *other.ids])


def test_what_cannot_be_seen_is_counted(calibration: vilu.Outcomes) -> None:
    """If rows have no identifiers, or only row numbers, some repeated rows cannot be recognised.

    These are a part of a file, and scores that are equal by chance. The monitor must count them.
    """
    monitor = monitor_of(calibration)
    nameless = draw(1, 300, named=False)
    monitor.update(nameless)
    assert monitor.update(nameless.take(np.arange(299))).rows == 599
    few = dataclasses.replace(nameless.take(np.arange(30)), uncertainty=np.arange(30) % 15 / 15)
    assert monitor.update(few, in_order=True).rows == monitor.update(few, in_order=True).rows - 30
    before = monitor.rows
    for seed in (3, 4):  # other rows with the same numbers
        one = draw(seed, 50)
        flat = dataclasses.replace(
            one, ids=[str(row) for row in range(50)], uncertainty=np.full(50, 0.5)
        )
        monitor.update(dataclasses.replace(flat, prediction=np.zeros(50)))
    assert monitor.rows == before + 100


def test_numbers_of_rows_identify_no_labels(calibration: vilu.Outcomes) -> None:
    """Labels at the same row numbers on different days must all count.

    Every day ten rows are labelled. They have one score, one answer and the same row numbers.
    """
    monitor, labelled = monitor_of(calibration), np.arange(100) % 10 == 3
    for seed in range(11, 16):
        rows = draw(seed, 100, labelled=True)
        monitor.update(
            dataclasses.replace(
                rows,
                uncertainty=np.where(labelled, 0.125, rows.uncertainty),
                prediction=np.where(labelled, 0, rows.prediction),
                failure=np.where(labelled, rows.failure, -1),
                ids=[str(row) for row in range(100)],
            )
        )
    assert (monitor.status.audit.n, monitor.repeated) == (50, 0)


@pytest.mark.parametrize("named", [True, False])
def test_a_label_counts_once(calibration: vilu.Outcomes, tmp_path: Path, named: bool) -> None:
    labels = draw(1, 400, named=named, labelled=True)
    monitor = monitor_of(calibration)
    monitor.update(dataclasses.replace(labels, failure=np.full(400, -1)))
    once = monitor.audit(labels)
    assert once.audit is not None
    assert once.audit.n == monitor.accepted
    monitor = save_and_resume(monitor, calibration, tmp_path / "state.parquet")
    with pytest.warns(
        UserWarning, match=f"{monitor.accepted} of {monitor.accepted} labels were given before"
    ):
        assert monitor.audit(labels) == once
    at_once = monitor_of(calibration)
    at_once.update(labels)
    with pytest.warns(UserWarning, match="labels were given before"):
        assert at_once.audit(labels).audit.n == once.audit.n
    more = monitor.audit(draw(7, 100, named=named, labelled=True))
    assert more.audit.n > once.audit.n


def test_a_state_that_lost_rows_is_damaged(calibration: vilu.Outcomes, tmp_path: Path) -> None:
    monitor, path = monitor_of(calibration), tmp_path / "state.parquet"
    monitor.update(draw(1, 100))
    monitor.save(path)
    table, metadata = read_table(path, ("test",))
    write_table(
        path, {name: table[name].slice(0, len(table) - 1) for name in table.column_names}, metadata
    )
    with pytest.raises(DataError, match="does not hold the rows that were taken in"):
        monitor_of(calibration).resume(path)


def test_a_few_rows_are_looked_up_without_copying_the_calibration() -> None:
    rng, n = np.random.default_rng(0), 30_000
    uncertainty = rng.random(n)
    calibration = vilu.Outcomes(uncertainty, np.zeros(n), ids=[f"photo {i}" for i in range(n)])
    names, scores = ["photo 7", "photo 8", "new"], [uncertainty[7], 0.5, uncertainty[9]]
    rows = vilu.Outcomes(scores, [-1, -1, -1], ids=names)
    tracemalloc.start()
    try:
        with pytest.warns(UserWarning, match="^1 of 3 rows are calibration rows"):
            admit_rows(rows, calibration, None)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_memory_is_eight_bytes_a_row() -> None:
    seen, hashes = SeenRows(), np.random.default_rng(0).integers(-(2**63), 2**63, size=20_000)
    for start in range(0, 20_000, 7):
        seen.add(hashes[start : start + 7])
    seen.add(hashes[:500])
    assert np.array_equal(seen.hashes(), np.unique(hashes))
    assert len(seen.runs) <= 15
    assert sum(run.nbytes for run in seen.runs) == 8 * 20_000


def by_class(
    n: int, k: int, accuracy: float, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return targets in blocks, predictions that are right with the given accuracy, and
    uncertainties.
    """
    rng = np.random.default_rng(seed)
    target = np.sort(rng.integers(k, size=n))
    prediction = np.where(rng.random(n) < accuracy, target, rng.integers(k, size=n))
    return target, prediction, rng.random(n)


@pytest.mark.parametrize(
    ("n", "k", "accuracy"), [(600, 4, 0.6), (1135, 20, 0.5), (20_000, 10, 0.4), (900, 100, 0.6)]
)
def test_a_folder_of_classes_is_known_by_its_answers(n: int, k: int, accuracy: float) -> None:
    target, prediction, u = by_class(n, k, accuracy)
    assert is_grouped(prediction)
    assert not is_rising(u)
    shuffled = np.random.default_rng(1).permutation(n)
    assert not is_grouped(prediction[shuffled])
    rows = vilu.Outcomes(u, np.full(n, -1), prediction=prediction)
    with pytest.raises(DataError, match=r"sorted by their answer.*--shuffle.*--in-order"):
        refuse_sorted(rows)
    with pytest.raises(DataError, match="sorted by their right answer"):
        refuse_sorted(dataclasses.replace(rows, target=target))
    refuse_sorted(rows.take(shuffled))


def test_labels_in_blocks_are_an_order_only_where_chance_has_none() -> None:
    assert is_in_blocks(np.repeat([1, 0], [20, 20]))  # probability 2 / C(40, 20)
    assert not is_in_blocks(np.repeat([1, 0], [99, 1]))  # probability 1 / 50
    assert not is_in_blocks(np.arange(50))
    assert not is_in_blocks(np.repeat([1, 0, 1], [20, 20, 1]))


@pytest.mark.parametrize("reverse", [1, -1])
def test_rows_sorted_by_their_uncertainty(reverse: int) -> None:
    u = np.sort(np.random.default_rng(0).random(500))[::reverse]
    nearly = u + np.random.default_rng(1).normal(size=500) * 0.01
    assert is_rising(u)
    assert is_rising(nearly)
    with pytest.raises(DataError, match="sorted by their uncertainty"):
        refuse_sorted(vilu.Outcomes(u, np.full(500, -1)))
    assert not is_rising(np.full(500, 0.5))


def test_a_shift_is_no_order() -> None:
    """A shift must not be refused as a sorted file, because a monitor must see shifts.

    The test has sudden changes at several rows, and a slow drift.
    """
    rng = np.random.default_rng(0)
    for at in (30, 250, 500, 750, 990):
        before = np.arange(1000) < at
        prediction = np.where(before, rng.integers(0, 10, 1000), rng.integers(5, 10, 1000))
        u = np.where(before, rng.random(1000) * 0.5, 0.5 + rng.random(1000) * 0.5)
        refuse_sorted(vilu.Outcomes(u, np.full(1000, -1), prediction=prediction))
        one_kind_then_another = np.where(before, 3, 4)
        refuse_sorted(vilu.Outcomes(u, np.full(1000, -1), prediction=one_kind_then_another))
    drift = np.linspace(0, 1, 2000)
    mix = (rng.random(2000) < 0.2 + 0.6 * drift).astype(int)
    refuse_sorted(
        vilu.Outcomes(0.3 * drift + 0.7 * rng.random(2000), np.full(2000, -1), prediction=mix)
    )


def test_rows_in_random_order_pass() -> None:
    """Rows in random order must not be refused, also with rare classes and ties."""
    rng = np.random.default_rng(0)
    for _ in range(2000):
        n, k = int(rng.integers(1, 200)), int(rng.integers(1, 40))
        shares = rng.dirichlet(np.full(k, 0.2))
        u = rng.beta(0.5, 1, n).round(int(rng.integers(1, 9)))
        target, prediction = (rng.choice(k, n, p=shares) for _ in range(2))
        refuse_sorted(vilu.Outcomes(u, np.full(n, -1), prediction=prediction, target=target))


def test_nothing_is_taken_in_of_what_is_refused(calibration: vilu.Outcomes) -> None:
    monitor = monitor_of(calibration)
    _, prediction, u = by_class(400, 4, 0.9)
    rows = vilu.Outcomes(
        u, np.full(400, -1), prediction=prediction, class_names=NAMES, method="toy"
    )
    before = monitor.state()
    with pytest.raises(DataError, match="None of them was taken in"):
        monitor.update(rows)
    assert monitor.state() == before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert monitor.update(rows, in_order=True).rows == 400

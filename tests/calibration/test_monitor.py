"""Test the monitor: simulated false alarms and power, verdicts, refusals, and its state."""

from __future__ import annotations

import copy
import dataclasses
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import vilu
from tests.conftest import toy_embeddings
from vilu.artifacts.tables import read_table, write_table
from vilu.errors import DataError, InfeasibleError, ProvenanceError, StorageError, UsageError

NAMES = ("a", "b", "c")


def draw(
    rng: np.random.Generator, n: int, shift: float = 0.0, *, digits: int = 16, audited: float = 0.2
):
    """Return answers that are wrong with probability u^2 / 2.

    A shift moves u up, and moves the answers towards the last class.
    """
    u = rng.random(n)
    u = (u ** (1 / (1 + shift))).round(digits)
    failure = np.where(rng.random(n) < audited, rng.random(n) < u**2 / 2, -1)
    prediction = np.minimum((rng.random(n) + shift / 2) * 3, 2).astype(int)
    return vilu.Outcomes(
        u, failure.astype(int), prediction=prediction, class_names=NAMES, method="toy"
    )


def part(outcomes: vilu.Outcomes, rows: slice) -> vilu.Outcomes:
    columns = {
        name: getattr(outcomes, name)[rows] for name in ("uncertainty", "failure", "prediction")
    }
    return dataclasses.replace(outcomes, **columns)


@pytest.fixture(scope="module")
def calibration() -> vilu.Outcomes:
    return draw(np.random.default_rng(100), 2000, audited=1)


@pytest.fixture(scope="module")
def rule(calibration: vilu.Outcomes) -> vilu.Rule:
    return vilu.certify(calibration, max_risk=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("digits", [1, 16])
def test_false_alarms_are_as_rare_as_stated(digits: int) -> None:
    """Each test must raise false alarms within its level, with and without ties.

    Each of 300 streams has its own calibration and threshold.

    The audited answers keep the guarantee: their error rate is at most about 1/6, and the largest
    risk is 0.3. A rule that breaks the guarantee would be the calibration's failure, not a false
    alarm.
    """
    level, streams = 0.4, 300
    raised: dict[str, int] = dict.fromkeys(("any", "scores", "acceptance", "answers", "audit"), 0)
    for seed in range(streams):
        rng = np.random.default_rng([seed, digits])
        rows = draw(rng, 200, digits=digits, audited=1)
        rule = vilu.certify(rows, max_risk=0.3)
        monitor = vilu.Monitor(rows, rule, false_alarm=level, seed=seed)
        status = monitor.update(draw(rng, 600, digits=digits))
        tests = {test.name: test for test in status.tests}
        assert sum(test.level for test in status.tests) == pytest.approx(level)
        assert [tests[name].level for name in ("scores", "acceptance")] == pytest.approx(
            [level * 2 / 5, level / 5]
        )
        for name, test in tests.items():
            raised[name] += test.raised_at is not None
        raised["any"] += status.alarm
    levels = {
        "any": level,
        "scores": level * 2 / 5,
        **dict.fromkeys(("acceptance", "answers", "audit"), level / 5),
    }
    for name, share in levels.items():
        allowed = share + 3 * np.sqrt(share * (1 - share) / streams)
        assert raised[name] / streams <= allowed, (name, raised)
    assert raised["any"] > 0  # so the bound is not kept only because no test ever raises an alarm


def test_a_shift_is_seen_and_said(calibration: vilu.Outcomes, rule: vilu.Rule) -> None:
    rng = np.random.default_rng(0)
    monitor = vilu.Monitor(calibration, rule)
    before = monitor.update(draw(rng, 1500))
    assert (before.verdict, before.raised_at, before.alarm) == ("holds", None, False)
    after = monitor.update(draw(rng, 500, shift=0.6, audited=0))
    assert after.verdict == "shifted: guarantee void"
    assert after.raised_at is not None
    assert 1500 <= after.raised_at < 2000
    assert "uncertainties are no longer distributed" in after.reason
    assert "vilu calibrate" in after.advice
    raised = {test.name: test.raised_at for test in after.tests}
    assert raised["audit"] is None
    assert min(row for row in raised.values() if row is not None) == after.raised_at
    again = monitor.update(draw(rng, 500))
    assert again.raised_at == after.raised_at  # an alarm is never withdrawn
    assert str(again).startswith(f"shifted: guarantee void (since row {after.raised_at:,})")


@pytest.mark.parametrize("change", ["lower", "narrower", "wider"])
def test_other_changes_of_the_scores_are_seen(calibration: vilu.Outcomes, change: str) -> None:
    rng = np.random.default_rng(1)
    shapes = {"lower": (1, 1.7), "narrower": (2, 2), "wider": (0.6, 0.6)}
    new = vilu.Outcomes(rng.beta(*shapes[change], 600), np.full(600, -1))
    scores = dataclasses.replace(calibration, class_names=None, method=None)
    rule = vilu.certify(scores, max_risk=0.1)
    assert vilu.Monitor(scores, rule).update(new).verdict == "shifted: guarantee void"


def test_acceptance_and_answers_are_seen_alone(calibration: vilu.Outcomes) -> None:
    """If all scores are tied, only the answers can show a shift.

    If a rule has a threshold per class, the accepted share shows the shift, too.
    """
    rng = np.random.default_rng(2)
    flat = dataclasses.replace(calibration, uncertainty=np.full(len(calibration), 0.5))
    new = draw(rng, 800, shift=0.4, audited=0)
    rule = vilu.certify(flat, min_coverage=0.5)
    monitor = vilu.Monitor(flat, rule)
    status = monitor.update(dataclasses.replace(new, uncertainty=np.full(800, 0.5)))
    assert {t.name: t.raised_at is not None for t in status.tests} == {
        "scores": False,
        "acceptance": False,
        "answers": True,
        "audit": False,
    }
    per_class = vilu.certify(calibration, max_risk=0.1, groups="prediction")
    assert per_class.grouped_by == "prediction"
    status = vilu.Monitor(calibration, per_class).update(new)
    assert {t.name for t in status.tests if t.raised_at is not None} >= {"acceptance", "answers"}
    assert status.acceptance is not None
    assert status.acceptance.since == pytest.approx(
        per_class.accept(new.uncertainty, [NAMES[c] for c in new.prediction.tolist()]).mean()
    )


def test_a_broken_guarantee_is_seen_through_labels_alone(
    calibration: vilu.Outcomes, rule: vilu.Rule
) -> None:
    """If the scores stay the same, only labels can show a broken guarantee.

    30 % of the accepted answers are wrong. The rows first come without labels, and labels arrive
    late.
    """
    rng = np.random.default_rng(3)
    rows = draw(rng, 1000, audited=0)
    monitor = vilu.Monitor(calibration, rule)
    silent = monitor.update(rows)
    assert silent.verdict == "holds"
    assert silent.audit is not None
    assert (silent.audit.n, silent.audit.verdict) == (0, "not enough audited answers")
    assert f"label about {silent.audit.n_needed} more" in silent.advice
    known = dataclasses.replace(rows, failure=(rng.random(1000) < 0.3).astype(int))
    told = monitor.audit(known)
    accepted = rule.accept(rows.uncertainty)
    assert told.audit is not None
    assert (told.audit.n, told.audit.wrong) == (accepted.sum(), known.failure[accepted].sum())
    assert (told.verdict, told.raised_at, told.rows) == ("broken", 999, 1000)
    assert told.audit.lower > 0.1


def test_late_labels_break_no_kept_guarantee_whatever_their_order() -> None:
    """If a hard class is labelled first, the guarantee must not count as broken.

    Labels ordered by class, by errors or not at all must give the same status.
    """
    rng = np.random.default_rng(0)
    target = rng.integers(20, size=3000)
    failure = (rng.random(3000) < np.where(target == 0, 0.3, 0.012)).astype(int)  # 2.6 % overall
    rows = vilu.Outcomes(
        rng.random(3000), failure, target=target, ids=[f"{row}.jpg" for row in range(3000)]
    )
    before, late = rows.take(np.arange(2000)), rows.take(np.arange(2000, 3000))
    rule = vilu.certify(before, max_risk=0.05)
    found = []
    for order in (
        np.arange(1000),
        np.argsort(late.target, kind="stable"),
        np.argsort(-late.failure, kind="stable"),
    ):
        monitor = vilu.Monitor(before, rule)
        monitor.update(dataclasses.replace(late, failure=np.full(1000, -1), target=None))
        found.append(monitor.audit(late.take(order)))
    assert found[0].verdict == "holds"
    assert found[0].audit is not None
    assert found[0].audit.wrong > 15
    assert found[0] == found[1] == found[2]


def test_a_kept_guarantee_is_said(calibration: vilu.Outcomes, rule: vilu.Rule) -> None:
    rng = np.random.default_rng(4)
    rows = dataclasses.replace(draw(rng, 1500), failure=(rng.random(1500) < 0.02).astype(int))
    status = vilu.Monitor(calibration, rule).update(rows)
    assert status.audit is not None
    assert (status.verdict, status.audit.verdict) == ("holds", "holds so far")
    assert status.audit.upper < 0.1
    assert "keep the guarantee" in status.reason


def test_a_mean_over_calibrations_is_no_guarantee_to_audit(calibration: vilu.Outcomes) -> None:
    crc = vilu.certify(calibration, max_risk=0.05, method="crc")
    monitor = vilu.Monitor(calibration, crc)
    status = monitor.update(draw(np.random.default_rng(5), 400))
    assert status.audit is None
    assert "audit" not in {test.name for test in status.tests}
    with pytest.raises(UsageError, match=r"bounds a mean \(crc\)"):
        monitor.audit(draw(np.random.default_rng(6), 10))


def test_rows_without_an_uncertainty_are_left_out_and_counted(
    calibration: vilu.Outcomes, rule: vilu.Rule
) -> None:
    rng = np.random.default_rng(6)
    rows = draw(rng, 300)
    u = rows.uncertainty.copy()
    u[::3] = np.nan
    holes = dataclasses.replace(
        rows, uncertainty=u, reason=["nonfinite" if np.isnan(x) else None for x in u]
    )
    with_holes, without = (vilu.Monitor(calibration, rule) for _ in range(2))
    status = with_holes.update(holes)
    kept = np.isfinite(u)
    same = without.update(
        dataclasses.replace(
            rows, uncertainty=u[kept], failure=rows.failure[kept], prediction=rows.prediction[kept]
        )
    )
    assert (status.rows, status.unscored) == (300, 100)
    assert status.tests == same.tests
    assert status.acceptance == same.acceptance


@pytest.mark.parametrize("size", [1, 37, 500])
def test_neither_batches_nor_a_saved_state_change_the_result(
    calibration: vilu.Outcomes, rule: vilu.Rule, tmp_path: Path, size: int
) -> None:
    rng = np.random.default_rng(7)
    rows = draw(rng, 500, shift=0.15, digits=2)
    whole = vilu.Monitor(calibration, rule).update(rows)
    monitor = vilu.Monitor(calibration, rule)
    for start in range(0, 500, size):
        if start in {0, 37 * 5, 250}:
            monitor.save(tmp_path / "state.parquet")
            monitor = vilu.Monitor(calibration, rule).resume(tmp_path / "state.parquet")
        status = monitor.update(part(rows, slice(start, start + size)))
    assert status == whole
    assert monitor.rows == 500


def test_a_monitor_and_its_copies_keep_32_bytes_a_row(
    calibration: vilu.Outcomes, rule: vilu.Rule
) -> None:
    """A row must take 32 bytes: two hashes, the uncertainty and its count, with 8 bytes each.

    Copies must share this memory.
    """
    n_rows = 40_000
    rows = draw(np.random.default_rng(8), n_rows, audited=0)
    rows = dataclasses.replace(rows, ids=[f"{number}.jpg" for number in range(n_rows)])
    monitor = vilu.Monitor(calibration, rule)
    monitor.update(rows.take(np.arange(100)), in_order=True)
    tracemalloc.start()
    try:
        for start in range(100, n_rows, 2_100):
            monitor.update(rows.take(np.arange(start, start + 2_100)), in_order=True)
        copies = [copy.deepcopy(monitor, memo={id(calibration): calibration}) for _ in range(4)]
        n_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert n_bytes / n_rows < 40
    before = copies[0].status
    monitor.update(draw(np.random.default_rng(9), 500, shift=0.5, audited=0), in_order=True)
    assert copies[0].status == before
    assert monitor.rows == before.rows + 500


def test_a_state_of_something_else_is_refused(
    calibration: vilu.Outcomes, rule: vilu.Rule, tmp_path: Path
) -> None:
    path = tmp_path / "state.parquet"
    monitor = vilu.Monitor(calibration, rule)
    monitor.update(draw(np.random.default_rng(8), 100))
    monitor.save(path)
    other = [
        vilu.Monitor(calibration, rule, false_alarm=0.01),
        vilu.Monitor(calibration, rule, seed=1),
        vilu.Monitor(calibration, vilu.certify(calibration, max_risk=0.2)),
        vilu.Monitor(part(calibration, slice(0, 1000)), rule),
    ]
    for one in other:
        with pytest.raises(
            ProvenanceError,
            match="its calibration, probability of a false alarm, or seed is different",
        ):
            one.resume(path)
    with pytest.raises(UsageError, match="has seen 100 rows"):
        monitor.resume(path)
    with pytest.raises(UsageError, match=r"\.parquet file"):
        monitor.save(tmp_path / "state.csv")
    with pytest.raises(StorageError, match="does not exist"):
        vilu.Monitor(calibration, rule).resume(tmp_path / "none.parquet")
    calibration.save(tmp_path / "scores.parquet")
    with pytest.raises(DataError, match="not the state of a monitor"):
        vilu.Monitor(calibration, rule).resume(tmp_path / "scores.parquet")


def test_a_damaged_state_is_refused(
    calibration: vilu.Outcomes, rule: vilu.Rule, tmp_path: Path
) -> None:
    path = tmp_path / "state.parquet"
    monitor = vilu.Monitor(calibration, rule)
    monitor.update(draw(np.random.default_rng(9), 100))
    monitor.save(path)
    table, metadata = read_table(path, ("test",))
    columns = {name: table[name] for name in table.column_names}
    wealth = dict(metadata["wealth"])
    damages = [
        {"rows": 101},
        {"rows": -1},
        {"audited": [1, 2]},
        {"tests": metadata["tests"][:-1]},
        {"tests": [{**test, "level": 0.5} for test in metadata["tests"]]},
        {"wealth": {**wealth, "scores": None}},
        {"wealth": {**wealth, "scores": {**wealth["scores"], "growth": [0.0]}}},
        {"wealth": {**wealth, "scores": {**wealth["scores"], "counts": [[0.0]]}}},
        {"remembered": [1, 1]},
        {"surprise": 1},
    ]
    for damage in damages:
        write_table(path, columns, {**metadata, **damage})
        with pytest.raises(DataError, match="is damaged"):
            vilu.Monitor(calibration, rule).resume(path)
    last = max(row for row, test in enumerate(table["test"].to_pylist()) if test == "answers")
    short = {
        name: column.take([row for row in range(len(table)) if row != last])
        for name, column in columns.items()
    }
    write_table(path, short, metadata)
    with pytest.raises(DataError, match="answers must hold"):
        vilu.Monitor(calibration, rule).resume(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="not a readable"):
        vilu.Monitor(calibration, rule).resume(path)


def test_a_state_is_a_table_that_others_can_read(
    calibration: vilu.Outcomes, rule: vilu.Rule, tmp_path: Path
) -> None:
    monitor = vilu.Monitor(calibration, rule)
    rows = draw(np.random.default_rng(10), 50)
    monitor.update(rows)
    monitor.save(tmp_path / "state.parquet")
    frame = pq.read_table(tmp_path / "state.parquet").to_pydict()
    answers = {
        v: c
        for t, v, c in zip(frame["test"], frame["value"], frame["count"], strict=True)
        if t == "answers"
    }
    both = np.concatenate([calibration.prediction, rows.prediction])
    assert answers == {float(c): int((both == c).sum()) for c in range(3)}


def test_what_does_not_fit_is_refused(calibration: vilu.Outcomes, rule: vilu.Rule) -> None:
    rows = draw(np.random.default_rng(11), 10)
    monitor = vilu.Monitor(calibration, rule)
    with pytest.raises(ProvenanceError, match="method"):
        monitor.update(dataclasses.replace(rows, method="other"))
    with pytest.raises(ProvenanceError, match="class_names"):
        monitor.update(dataclasses.replace(rows, class_names=("a", "c", "b")))
    with pytest.raises(
        DataError, match="the calibration rows have answers, and these scores have none"
    ):
        monitor.update(dataclasses.replace(rows, prediction=None))
    assert monitor.rows == 0
    with pytest.raises(UsageError, match="false_alarm"):
        vilu.Monitor(calibration, rule, false_alarm=1.0)
    with pytest.raises(UsageError, match="seed"):
        vilu.Monitor(calibration, rule, seed=-1)
    with pytest.raises(DataError, match="none of the 1 calibration rows"):
        vilu.Monitor(vilu.Outcomes([np.nan], [0], reason=["nonfinite"]), rule)


def test_rows_of_which_nothing_is_guaranteed_are_not_watched(calibration: vilu.Outcomes) -> None:
    out_of_reach = vilu.certify(calibration, max_risk=1e-6)
    assert not out_of_reach.feasible
    for rule in (None, out_of_reach):
        with pytest.raises(InfeasibleError, match="no guarantee to watch"):
            vilu.Monitor(calibration, rule)


def test_a_csv_without_class_names_is_read_with_the_calibrations(
    calibration: vilu.Outcomes, tmp_path: Path
) -> None:
    per_class = vilu.certify(calibration, max_risk=0.1, groups="prediction")
    rows = draw(np.random.default_rng(15), 300)
    rows.save(tmp_path / "rows.csv")
    read = vilu.Outcomes.load(tmp_path / "rows.csv")
    assert read.class_names is None
    status = vilu.Monitor(calibration, per_class).update(read)
    assert status == vilu.Monitor(calibration, per_class).update(rows)
    assert status.acceptance is not None
    assert status.acceptance.since == pytest.approx(per_class.coverage, abs=0.1)


def test_calibration_rows_in_the_stream_are_told(
    calibration: vilu.Outcomes, rule: vilu.Rule
) -> None:
    rows = dataclasses.replace(calibration, ids=[f"row-{i}" for i in range(len(calibration))])
    monitor = vilu.Monitor(rows, rule)
    with pytest.warns(UserWarning, match="2000 of 2000 rows are calibration rows"):
        monitor.update(rows)
    # These rows have the same keys as the calibration rows, but other data, so there is no warning.
    monitor.update(dataclasses.replace(rows, uncertainty=rows.uncertainty / 2))


def test_without_a_rule_for_single_rows_there_is_nothing_to_audit(
    calibration: vilu.Outcomes,
) -> None:
    monitor = vilu.Monitor(calibration, vilu.certify(calibration, max_risk=0.1, method="selection"))
    status = monitor.update(draw(np.random.default_rng(12), 100))
    assert [test.name for test in status.tests] == ["scores", "answers"]
    assert sum(test.level for test in status.tests) == pytest.approx(0.05)
    assert status.audit is None
    with pytest.raises(UsageError, match="no guarantee to audit"):
        monitor.audit(draw(np.random.default_rng(12), 1))


def test_label_sets_have_no_error_rate_to_audit(tmp_path: Path) -> None:
    vilu.MCM().save(tmp_path)
    target = vilu.Target(label_sets="lac")
    vilu.calibrate_predictor(tmp_path, toy_embeddings(200), target)
    monitor = vilu.Monitor.of_folder(tmp_path)
    rows = vilu.score(vilu.load(tmp_path), toy_embeddings(50, seed=1, ids_from=1000))
    with pytest.raises(UsageError, match=r"only label sets\. Leave the labels out"):
        monitor.audit(rows)


def test_groups_that_the_caller_gave(calibration: vilu.Outcomes) -> None:
    groups = ["even" if i % 2 else "odd" for i in range(len(calibration))]
    rule = vilu.certify(calibration, max_risk=0.1, groups=groups)
    monitor = vilu.Monitor(calibration, rule, groups=groups)
    rows = draw(np.random.default_rng(13), 200)
    with pytest.raises(UsageError, match="needs the group of each"):
        monitor.update(rows)
    status = monitor.update(rows, groups[:200])
    assert status.acceptance is not None
    assert status.acceptance.since == rule.accept(rows.uncertainty, groups[:200]).mean()


def test_groups_of_rows_some_of_which_were_monitored_before(calibration: vilu.Outcomes) -> None:
    """If some rows were monitored before, ``groups`` must still have one group per given row.

    The groups may be an array.
    """
    groups = np.array(["even" if i % 2 else "odd" for i in range(len(calibration))])
    monitor = vilu.Monitor(
        calibration, vilu.certify(calibration, max_risk=0.1, groups=groups), groups=groups
    )
    rows = dataclasses.replace(
        draw(np.random.default_rng(13), 200), ids=[f"{i}.jpg" for i in range(200)]
    )
    monitor.update(rows.take(np.arange(150)), groups[:150])
    with pytest.raises(UsageError, match="the group of each of 200 rows"):
        monitor.update(rows, groups[:201])
    with pytest.warns(UserWarning, match="150 of 200 rows were monitored before"):
        assert monitor.update(rows, groups[:200]).rows == 200


def test_strata_are_part_of_the_fingerprint() -> None:
    """Rules that differ only in the out-of-distribution rows monitor other rates, so their
    fingerprints must differ.
    """
    u, f = np.linspace(0, 1, 400), np.r_[np.zeros(200, int), np.ones(200, int)]
    found = set()
    for outside in (np.arange(400) >= 300, np.arange(400) % 4 == 3):
        rows = vilu.Outcomes(u, np.where(outside, 1, f), outside=outside)
        rule = vilu.certify(
            vilu.Outcomes(u, f, outside=np.arange(400) >= 300), max_risk=0.3, outside_share=0.2
        )
        found.add(vilu.Monitor(rows, rule).fingerprint)
    assert len(found) == 2


def test_labels_below_a_limit_alone_are_compared_with_rows_below_it(tmp_path: Path) -> None:
    """If all calibration labels lie below a limit, they must be compared with new rows below this
    limit.

    A triage calibrates on a random sample below a limit, and its stream has all rows. At the end a
    real shift must raise an alarm.
    """
    level, streams, raised = 0.4, 100, 0
    for seed in range(streams):
        rng = np.random.default_rng(seed)
        rows = draw(rng, 500, audited=1)
        rows = rows.take(rows.uncertainty <= 0.4)
        rule = vilu.certify(rows, max_risk=0.1).model_copy(update={"method": "anytime"})
        monitor = vilu.Monitor(rows, rule, false_alarm=level, seed=seed)
        raised += monitor.update(draw(rng, 600, audited=0)).alarm
    assert raised <= streams * level + 3 * np.sqrt(streams * level * (1 - level))
    whole = vilu.Monitor(rows, rule.model_copy(update={"method": "ltt"})).update(
        draw(rng, 600, audited=0)
    )
    assert whole.alarm  # as a sample from all rows, the calibration would be void at once
    monitor.save(tmp_path / "state.parquet")
    again = vilu.Monitor(rows, rule, false_alarm=level, seed=seed).resume(
        tmp_path / "state.parquet"
    )
    assert again.status == monitor.status
    assert monitor.status.acceptance is None
    assert monitor.update(draw(rng, 3000, shift=1.0, audited=0)).alarm

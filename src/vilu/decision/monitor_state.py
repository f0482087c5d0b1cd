"""A monitor's state as a file, so that it goes on where it stopped: what came so far, and the wealth of its bets.

A Parquet table (test, value, count: how often each value came, calibration rows included) with the rest as JSON in its
metadata. The file belongs to one calibration, level and seed; another one is refused.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field, FiniteFloat, ValidationError, model_validator

from vilu.decision.conformal import Reference
from vilu.decision.martingale import HISTOGRAMS, SHARES, Martingale
from vilu.decision.monitor import Monitor
from vilu.decision.monitor_status import Test, TestName
from vilu.document import Model, explain
from vilu.errors import DataError, ProvenanceError, UsageError
from vilu.metrics.counts import Floats, Ints
from vilu.tables import read_column, read_table, table_suffix, write_table

Count = Annotated[int, Field(ge=0)]
Bets = Annotated[tuple[FiniteFloat, ...], Field(min_length=len(SHARES), max_length=len(SHARES))]


class Wealth(Model):
    """A martingale; see there."""

    n: Annotated[int, Field(ge=1)]
    growth: Bets
    started: Bets
    counts: tuple[tuple[Annotated[FiniteFloat, Field(ge=0)], ...], ...]

    @model_validator(mode="after")
    def _check_cells(self) -> Self:
        if [len(cells) for cells in self.counts] != [cells for cells, _ in HISTOGRAMS]:
            raise ValueError("the histograms have other cells")
        return self


class State(Model):
    """All of a monitor but its calibration and the values that came.

    Attributes:
        fingerprint: Of the monitor that it belongs to.
        wealth: Per test the martingale; None before its first row.
        audited: Audited answers, and how many of them are wrong.
    """

    kind: Literal["monitor"] = "monitor"
    fingerprint: str
    rows: Count
    unscored: Count
    accepted: Count
    tests: tuple[Test, ...]
    wealth: dict[str, Wealth | None]
    audited: tuple[Count, Count]


def save(monitor: Monitor, path: str | Path) -> None:
    """Write the state atomically.

    Raises:
        UsageError: If the file is not a ``.parquet`` file.
        StorageError: If the file system refuses.
    """
    import pyarrow as pa

    _require_parquet(path)
    tables = {name: watch.reference.table() for name, watch in monitor.watches.items()}
    columns = {
        "test": pa.array([name for name, (values, _) in tables.items() for _ in range(len(values))], pa.string()),
        "value": pa.array(np.concatenate([values for values, _ in tables.values()])),
        "count": pa.array(np.concatenate([counts for _, counts in tables.values()])),
    }
    write_table(path, columns, _state(monitor).model_dump(mode="json"))


def resume(monitor: Monitor, path: str | Path) -> None:
    """Bring a new monitor to where the saved one stopped.

    Raises:
        UsageError: If the file is not a ``.parquet`` file, or the monitor has seen rows.
        StorageError: If it cannot be opened.
        DataError: If it is no state, or a damaged one.
        ProvenanceError: If it belongs to another calibration, level or seed.
    """
    _require_parquet(path)
    if monitor.rows:
        raise UsageError(f"only a new monitor can go on from a state. This one has seen {monitor.rows} rows.")
    table, metadata = read_table(path, ("test",))
    if metadata.get("kind") != "monitor":
        raise DataError(f"{path} is not the state of a monitor. Give another file, or one that does not exist yet.")
    try:
        state = State.model_validate(metadata)
    except ValidationError as error:
        raise DataError(f"{path} is damaged: {explain(error)}. Restore it, or begin a new monitor.") from error
    if state.fingerprint != monitor.fingerprint:
        raise ProvenanceError(
            f"{path} belongs to the monitor {state.fingerprint}, this one is {monitor.fingerprint}: another "
            "calibration, probability of a false alarm, or seed. After a new calibration begin a new state."
        )
    name = np.asarray(read_column(path, table, "test", "string").to_pylist(), dtype=object)
    value = read_column(path, table, "value", "float64").fill_null(np.nan).to_numpy()
    count = read_column(path, table, "count", "int64").fill_null(0).to_numpy()
    _restore(monitor, state, {test: (value[name == test], count[name == test]) for test in monitor.watches}, path)


def _state(monitor: Monitor) -> State:
    tests = [watch.test for watch in monitor.watches.values()]
    audited = monitor.audited
    return State(
        fingerprint=monitor.fingerprint,
        rows=monitor.rows,
        unscored=monitor.unscored,
        accepted=monitor.accepted,
        tests=(*tests, *([] if monitor.audit_test is None else [monitor.audit_test])),
        wealth={name: _wealth(watch.martingale) for name, watch in monitor.watches.items()},
        audited=(0, 0) if audited is None else (audited.n, audited.wrong),
    )


def _wealth(martingale: Martingale) -> Wealth | None:
    if not martingale.n:
        return None
    return Wealth(
        n=martingale.n,
        growth=tuple(martingale.growth.tolist()),
        started=tuple(martingale.started.tolist()),
        counts=tuple(tuple(cells.tolist()) for cells in martingale.counts),
    )


def _restore(monitor: Monitor, state: State, values: dict[TestName, tuple[Floats, Ints]], path: str | Path) -> None:
    tests = {test.name: test for test in state.tests}
    levels = {test.name: test.level for test in monitor.status.tests}
    n, wrong = state.audited
    if tests.keys() != levels.keys() or state.wealth.keys() != monitor.watches.keys() or wrong > n:
        raise DataError(f"{path} is damaged: its tests are not {', '.join(levels)}. Begin a new monitor.")
    if any(tests[name].level != level for name, level in levels.items()):
        raise DataError(f"{path} is damaged: its tests have other levels. Begin a new monitor.")
    for name, watch in monitor.watches.items():
        column, count = values[name]
        wealth, calibrated = state.wealth[name], watch.reference.n
        watch.test, watch.reference = tests[name], Reference.of(column, count)
        if wealth is not None:
            counts = [np.array(cells) for cells in wealth.counts]
            watch.martingale = Martingale(wealth.n, np.array(wealth.growth), np.array(wealth.started), counts)
        expected_n = calibrated + state.rows - state.unscored
        if not np.isfinite(column).all() or (count < 1).any() or watch.reference.n != expected_n:
            raise DataError(f"{path} is damaged: {name} must hold {expected_n} numbers. Begin a new monitor.")
        if watch.martingale.n != state.rows - state.unscored:
            raise DataError(f"{path} is damaged: {name} has bet on {watch.martingale.n} rows. Begin a new monitor.")
    monitor.rows, monitor.unscored, monitor.accepted = state.rows, state.unscored, state.accepted
    if monitor.audited is not None:
        monitor.audited = replace(monitor.audited, n=n, wrong=wrong)
        monitor.audit_test = tests["audit"]


def _require_parquet(path: str | Path) -> None:
    if table_suffix(path) != ".parquet":
        raise UsageError(f"the state of a monitor is a .parquet file. Got {Path(path).name!r} instead.")

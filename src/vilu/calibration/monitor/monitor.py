"""Whether the promise still holds on the answers that come in."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from vilu.artifacts.documents import explain
from vilu.artifacts.hashing import digest
from vilu.artifacts.paths import claim_file
from vilu.artifacts.tables import read_column, read_table, table_suffix, write_table
from vilu.calibration.calibration import Calibration, promises
from vilu.calibration.label_sets import LabelSets
from vilu.calibration.monitor.arrivals import Seen, admit, refuse_sorted
from vilu.calibration.monitor.audit import Audit, TestName
from vilu.calibration.monitor.martingale import Reference
from vilu.calibration.monitor.rates import rates_of, strangers_in_words
from vilu.calibration.monitor.status import Acceptance, Audited, Status, Test, conclude
from vilu.calibration.monitor.watch import PARTS, State, Watch, Wealth
from vilu.calibration.rules import Rule, group_names
from vilu.calibration.shares import Strata
from vilu.callers import warn_caller
from vilu.errors import UNKNOWN, DataError, InfeasibleError, ProvenanceError, UsageError
from vilu.metrics.counts import Floats, Ints
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.persistence.files import PREDICTOR
from vilu.predictors.persistence.record import read_record
from vilu.validation import checked, require_at_least, require_between

if TYPE_CHECKING:
    import pyarrow as pa


class Monitor:
    """Watches whether new rows are still like those of a calibration, batch by batch.

    Args:
        calibration: The calibration rows; those without an uncertainty are left out.
        rule: What ``calibrate`` gave, or label sets. Of one that judges whole batches, and of label
            sets, there is nothing to audit.
        groups: N names of groups of the calibration rows, for a rule that was given its groups.
        false_alarm: Probability that any test ever raises an alarm without cause, in (0, 1).
        seed: Of the random numbers that break ties, at least 0; to be fixed before the first row.

    Attributes:
        rows: Rows monitored.
        unscored: How many of them have no uncertainty; they are left out.
        accepted: How many of them are accepted.
        repeated: Rows and labels that were given again, and left out; by this object.
        risk: Hash of the record of the calibration, which scores made with it carry; None without a
            record.

    Raises:
        UsageError: If ``false_alarm`` or ``seed`` is out of range.
        DataError: If no calibration row has an uncertainty.
        InfeasibleError: Without a rule, and of one that accepts nothing: there is no guarantee to
            watch.

    Examples:
        >>> import numpy as np, vilu
        >>> rng = np.random.default_rng(0)
        >>> calibration = vilu.Outcomes(rng.random(1000), np.zeros(1000))
        >>> monitor = vilu.Monitor(calibration, vilu.calibrate(calibration, max_risk=0.05))
        >>> monitor.update(vilu.Outcomes(rng.random(500), np.full(500, -1))).verdict
        'holds'
        >>> monitor.update(vilu.Outcomes(rng.random(500) ** 0.5, np.full(500, -1))).verdict
        'shifted: guarantee void'
    """

    @checked
    def __init__(
        self,
        calibration: Outcomes,
        rule: Rule | LabelSets | None = None,
        *,
        groups: Sequence[str] | None = None,
        false_alarm: float = 0.05,
        seed: int = 0,
    ) -> None:
        require_between("false_alarm", false_alarm)
        require_at_least("seed", seed, 0)
        if not promises(rule):
            raise InfeasibleError(
                "there is no guarantee to watch, because nothing was promised of these rows: give "
                "the rule that vilu.calibrate(outcomes, max_risk=0.05) makes of them."
            )
        if not np.isfinite(calibration.uncertainty).any():
            raise DataError(
                f"none of the {len(calibration)} calibration rows has an uncertainty. Calibrate "
                "again."
            )
        self.calibration = calibration
        self.false_alarm = false_alarm
        self.seed = int(seed)
        self.rule = rule if isinstance(rule, Rule) and not rule.needs_batch else None
        self.risk: str | None = None
        self.rows = self.unscored = self.accepted = self.repeated = 0
        self.monitored = Seen()
        self.labelled = Seen()
        # labels of a promise that may be looked at at any time are a random sample below a limit
        # alone
        u = np.unique(calibration.uncertainty[np.isfinite(calibration.uncertainty)])
        self.below = float(u[-1]) if self._is_partial and len(u) > 1 else np.inf
        columns = self._columns(calibration, self._accepted(calibration, groups))
        # rows of other shares than the calibration's are none that are drawn alike, and the promise
        # still holds
        values = {} if self.rule is not None and self.rule.reweighted else columns
        promise = self._promise()
        rates = rates_of(self.rule, calibration, false_alarm)
        names: list[TestName] = [*values, *(("audit",) if promise is not None else ()), *rates]
        parts = sum(PARTS[name] for name in names)
        tests = {name: Test(name=name, level=false_alarm * PARTS[name] / parts) for name in names}
        self.watches = {
            name: Watch(tests[name], Reference.of(column)) for name, column in values.items()
        }
        self.rates = rates_of(self.rule, calibration, false_alarm / max(parts, 1))
        self.rate_tests = {
            name: Test(name=name, level=audit.delta) for name, audit in self.rates.items()
        }
        self._coverage = (
            None
            if self.rule is None or self._is_partial
            else float(1 - columns["acceptance"].mean())
        )
        self.audited = None if promise is None else Audit(promise, tests["audit"].level)
        self.audit_test = tests.get("audit")
        self.fingerprint = self._fingerprint()

    @classmethod
    @checked
    def of_folder(cls, folder: str | Path, *, false_alarm: float = 0.05, seed: int = 0) -> Self:
        """A monitor of the calibration that ``vilu calibrate`` left in the folder of a predictor.

        Raises:
            InfeasibleError: If nothing was promised of the predictor, so that there is no guarantee
                to watch.
            DataError: If the folder holds no predictor, or its calibration is damaged.
            ProvenanceError: If a newer vilu wrote it.

        Examples:
            >>> import numpy as np, tempfile, vilu
            >>> rows = np.random.default_rng(0).normal(size=(200, 8))
            >>> rows /= np.linalg.norm(rows, axis=1, keepdims=True)
            >>> data = vilu.Embeddings(rows, np.eye(8), rows.argmax(axis=1))
            >>> with (
            ...     tempfile.TemporaryDirectory() as folder
            ... ):  # as `vilu fit` and `vilu calibrate` leave one
            ...     _ = vilu.MCM().save(folder)
            ...     _ = vilu.calibrate_predictor(folder, data, vilu.Target(max_risk=0.05))
            ...     monitor = vilu.Monitor.of_folder(folder)
            >>> len(monitor.calibration), monitor.rule.max_risk
            (200, 0.05)
        """
        calibration, guarantee = _guaranteed(Path(folder))
        monitor = cls(calibration.rows, guarantee, false_alarm=false_alarm, seed=seed)
        monitor.risk = calibration.fingerprint
        return monitor

    @checked
    def update(
        self, outcomes: Outcomes, groups: Sequence[str] | None = None, *, in_order: bool = False
    ) -> Status:
        """Take in the next rows, in the order of their arrival; those whose failure is known are audited too.

        Args:
            outcomes: Scores of the same predictor. Rows that were taken in before are left out, and
                counted in ``repeated``: they are known by identifier, uncertainty and answer, or
                without identifiers as a whole.
            groups: N names of groups, for a rule that was given its groups.
            in_order: Whether this is known to be the order of arrival; else rows that are sorted
                are refused.

        Warns:
            UserWarning: If some of them are calibration rows, or were taken in before.

        Raises:
            ProvenanceError: If they are scores of another predictor or calibration, or their
                candidates are others.
            DataError: If the calibration rows have answers, and these do not, or the rows lie
                sorted.
            UsageError: If groups are needed and not given.

        Examples:
            >>> import numpy as np, vilu
            >>> rng = np.random.default_rng(0)
            >>> calibration = vilu.Outcomes(rng.random(500), np.zeros(500))
            >>> monitor = vilu.Monitor(calibration, vilu.calibrate(calibration, max_risk=0.05))
            >>> status = monitor.update(
            ...     vilu.Outcomes(rng.random(300), np.full(300, -1))
            ... )  # labels are not needed
            >>> status.verdict, status.rows
            ('holds', 300)
        """
        outcomes = admit(outcomes, self.calibration, self.risk)
        accepted = self._accepted(outcomes, groups)
        hashes, new = self.monitored.new(outcomes)
        if not new.all():
            told = f"{np.count_nonzero(~new)} of {len(new)} rows were monitored before and are not counted again."
            warn_caller(told)
            outcomes = outcomes.take(new)
            accepted = accepted[new]
        if not in_order:
            refuse_sorted(outcomes)
        scored = np.isfinite(outcomes.uncertainty)
        watched = self._watched(outcomes)
        rows = self.rows + np.arange(len(outcomes))
        for name, column in self._columns(outcomes, accepted).items():
            if name in self.watches:
                self.watches[name].update(column, rows[watched], self.seed)
        self._take_rate("abstained", ~accepted[scored], rows[scored])
        self.rows += len(outcomes)
        self.unscored += int(np.count_nonzero(~scored))
        self.accepted += int(np.count_nonzero(accepted))
        self.repeated += int(np.count_nonzero(~new))
        self.monitored.add(hashes)
        self._take_labels(outcomes, accepted, rows)
        return self.status

    @checked
    def audit(
        self, outcomes: Outcomes, groups: Sequence[str] | None = None, *, in_order: bool = False
    ) -> Status:
        """Take in labels that have arrived later, of rows that were monitored before.

        A label counts once: of a row that was audited before, known as in ``update``, it is left
        out. In what order they lie means nothing: they are judged together, after the last of them;
        or, where they came ``in_order``, each by itself.

        Warns:
            UserWarning: If some were given before.

        Raises:
            UsageError: If there is no promise to audit, or groups are needed and not given.
            ProvenanceError: If they are scores of another predictor, or their candidates are
                others.

        Examples:
            >>> import numpy as np, vilu
            >>> rng = np.random.default_rng(0)
            >>> calibration = vilu.Outcomes(rng.random(500), np.zeros(500))
            >>> monitor = vilu.Monitor(calibration, vilu.calibrate(calibration, max_risk=0.05))
            >>> uncertainty, ids = rng.random(200), [f"{i}.jpg" for i in range(200)]
            >>> monitor.update(vilu.Outcomes(uncertainty, np.full(200, -1), ids=ids)).verdict
            'holds'
            >>> wrong = rng.random(200) < 0.2  # known later, and more than was promised
            >>> monitor.audit(vilu.Outcomes(uncertainty, wrong, ids=ids)).verdict
            'broken'
        """
        if self.audited is None:
            raise UsageError(
                "there is no promise to audit: the rule accepts nothing, judges whole batches, or "
                "bounds a mean (crc)."
            )
        outcomes = admit(outcomes, self.calibration, self.risk)
        rows = np.full(len(outcomes), max(self.rows - 1, 0))
        self._take_labels(
            outcomes, self._accepted(outcomes, groups), rows, slice(0 if in_order else -1, None)
        )
        return self.status

    @checked
    def save(self, path: str | Path) -> None:
        """Write what there is to go on from, as a ``.parquet`` file, atomically; only a state is replaced.

        Raises:
            UsageError: If the file has another suffix, or something else than a state lies there.
            StorageError: If the file system refuses.

        Examples:
            >>> import numpy as np, tempfile, vilu
            >>> rng = np.random.default_rng(0)
            >>> calibration = vilu.Outcomes(rng.random(500), np.zeros(500))
            >>> rule = vilu.calibrate(calibration, max_risk=0.05)
            >>> monitor = vilu.Monitor(calibration, rule)
            >>> _ = monitor.update(vilu.Outcomes(rng.random(300), np.full(300, -1)))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     monitor.save(f"{folder}/state.parquet")
            ...     tomorrow = vilu.Monitor(calibration, rule).resume(f"{folder}/state.parquet")
            >>> tomorrow.update(vilu.Outcomes(rng.random(200), np.full(200, -1))).rows
            500
        """
        import pyarrow as pa

        claim_file(path, "monitor state", overwrite=True)
        tables = {name: watch.reference.table() for name, watch in self.watches.items()}
        kept = [
            pa.table({"test": [name] * len(n), "value": v, "count": n})
            for name, (v, n) in tables.items()
        ]
        kept.append(
            pa.table({"value": pa.array([], pa.float64()), "count": pa.array([], pa.int64())})
        )
        for kind, seen in zip(KINDS, (self.monitored, self.labelled), strict=True):
            kept.append(
                pa.table({"test": pa.array([kind] * len(seen), pa.string()), "row": seen.hashes()})
            )
        whole = pa.concat_tables(kept, promote_options="default")
        columns = {name: whole[name].combine_chunks() for name in ("test", "value", "count", "row")}
        write_table(path, columns, self.state().model_dump(mode="json"))

    @checked
    def resume(self, path: str | Path) -> Self:
        """Go on where a monitor of the same calibration stopped.

        Raises:
            UsageError: If the file is not a ``.parquet`` file, or this monitor has seen rows.
            StorageError: If it cannot be opened.
            DataError: If it is no state, or a damaged one.
            ProvenanceError: If it belongs to another calibration, level or seed.

        Examples:
            >>> import numpy as np, tempfile, vilu
            >>> calibration = vilu.Outcomes(np.linspace(0, 1, 200), np.zeros(200))
            >>> rule = vilu.calibrate(calibration, max_risk=0.05)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     monitor = vilu.Monitor(calibration, rule)
            ...     _ = monitor.update(vilu.Outcomes([0.2, 0.7, 0.4], [-1, -1, -1]))
            ...     monitor.save(f"{folder}/state.parquet")
            ...     vilu.Monitor(calibration, rule).resume(f"{folder}/state.parquet").rows
            3
        """
        import pyarrow as pa

        _require_parquet(path)
        if self.rows:
            raise UsageError(
                f"only a new monitor can go on from a state. This one has seen {self.rows} rows."
            )
        table, state = _read_state(path)
        if state.fingerprint != self.fingerprint:
            raise ProvenanceError(
                f"{path} belongs to the monitor {state.fingerprint}, this one is "
                f"{self.fingerprint}: another calibration, probability of a false alarm, or seed. "
                "After a new calibration begin a new state."
            )
        name = np.asarray(read_column(path, table, "test", "string").to_pylist(), dtype=object)
        value = read_column(path, table, "value", "float64").fill_null(np.nan).to_numpy()
        count = read_column(path, table, "count", "int64").fill_null(0).to_numpy()
        try:
            self._restore(
                state, {test: (value[name == test], count[name == test]) for test in self.watches}
            )
            self._remember(
                state,
                *(
                    read_column(path, table, "row", "int64").filter(pa.array(name == kind))
                    for kind in KINDS
                ),
            )
        except ValueError as error:
            raise DataError(f"{path} is damaged: {error}. Begin a new monitor.") from error
        return self

    def state(self) -> State:
        """All but the calibration and the values that came.

        Examples:
            >>> import numpy as np, vilu
            >>> calibration = vilu.Outcomes(np.linspace(0, 1, 200), np.zeros(200))
            >>> monitor = vilu.Monitor(calibration, vilu.calibrate(calibration, max_risk=0.05))
            >>> _ = monitor.update(
            ...     vilu.Outcomes(
            ...         [0.2, np.nan, 0.4], [-1, -1, -1], reason=[None, "zero_norm", None]
            ...     )
            ... )
            >>> monitor.state().rows, monitor.state().unscored
            (3, 1)
        """
        return State(
            fingerprint=self.fingerprint,
            rows=self.rows,
            unscored=self.unscored,
            accepted=self.accepted,
            tests=tuple(self._tests()),
            wealth={name: Wealth.of(watch.martingale) for name, watch in self.watches.items()},
            audited=(0, 0) if self.audited is None else (self.audited.n, self.audited.wrong),
            remembered=(len(self.monitored), len(self.labelled)),
            counted={name: (rate.n, rate.wrong) for name, rate in self.rates.items()},
        )

    def _restore(self, state: State, values: Mapping[TestName, tuple[Floats, Ints]]) -> None:
        """Take over a state, with the values and counts of every test.

        A ValueError says what does not fit.
        """
        tests = {test.name: test for test in state.tests}
        (n, wrong) = state.audited
        levels = {test.name: test.level for test in self._tests()}
        if tests.keys() != levels.keys() or state.wealth.keys() != self.watches.keys() or wrong > n:
            raise ValueError(f"its tests are not {', '.join(levels)}")
        if state.counted.keys() != self.rates.keys() or any(
            k > m for m, k in state.counted.values()
        ):
            raise ValueError(f"its rates are not {', '.join(self.rates) or 'none'}")
        if any(tests[name].level != level for name, level in levels.items()):
            raise ValueError("its tests have other levels")
        n_scored = state.rows - state.unscored
        bets = {
            name: n_scored if self.below == np.inf else kept.n if kept else 0
            for name, kept in state.wealth.items()
        }
        self.watches = {
            name: watch.resumed(tests[name], state.wealth[name], *values[name], bets[name])
            for name, watch in self.watches.items()
        }
        self.rows = state.rows
        self.unscored = state.unscored
        self.accepted = state.accepted
        for name, rate in self.rates.items():
            seen, happened = state.counted[name]
            self.rates[name] = replace(rate, n=seen, wrong=happened)
            self.rate_tests[name] = tests[name]
        if self.audited is not None:
            self.audited = replace(self.audited, n=n, wrong=wrong)
            self.audit_test = tests["audit"]

    def _remember(
        self, state: State, monitored: pa.ChunkedArray, labelled: pa.ChunkedArray
    ) -> None:
        """Take over which rows were taken in; a ValueError says what does not fit."""
        for seen, rows, n in zip(
            (self.monitored, self.labelled),
            (monitored, labelled),
            state.remembered,
            strict=True,
        ):
            seen.add(rows.drop_null().to_numpy())
            if len(rows) != n or len(seen) != n:
                raise ValueError("it does not hold the rows that were taken in")

    @property
    def status(self) -> Status:
        """What there is to say now."""
        tests = self._tests()
        audited = None if self.audited is None else Audited.from_audit(self.audited)
        verdict, raised_at, reason, advice = conclude(tests, audited)
        strangers = self.rates.get("outside")
        stated = None if self.rule is None else self.rule.outside_share
        return Status(
            verdict=verdict,
            raised_at=raised_at,
            reason=reason,
            advice=advice,
            rows=self.rows,
            unscored=self.unscored,
            false_alarm=self.false_alarm,
            tests=tuple(tests),
            acceptance=self._acceptance(),
            audit=audited,
            present=None
            if strangers is None or stated is None
            else strangers_in_words(strangers, stated),
        )

    def _tests(self) -> list[Test]:
        watched = [watch.test for watch in self.watches.values()]
        audit = () if self.audit_test is None else (self.audit_test,)
        return [*watched, *audit, *self.rate_tests.values()]

    def _promise(self) -> float | None:
        """The promised error rate; None where nothing is accepted, or a mean over calibrations is all that is promised.

        Half of the thresholds of conformal risk control are above their target, so a rate above it
        breaks no promise.
        """
        if self.rule is None or not self.rule.feasible or self.rule.method == "crc":
            return None
        promise = self.rule.risk_bound if self.rule.max_risk is None else self.rule.max_risk
        return promise if promise is not None and 0 < promise < 1 else None

    def _accepted(self, outcomes: Outcomes, groups: Sequence[str] | None) -> NDArray[np.bool_]:
        """(N,) whether each answer is accepted; none without a rule."""
        if self.rule is None:
            return np.zeros(len(outcomes), dtype=np.bool_)
        if self.rule.grouped_by == "prediction":
            groups = group_names(outcomes)
        return self.rule.accept(outcomes.uncertainty, groups)

    def _columns(self, outcomes: Outcomes, accepted: NDArray[np.bool_]) -> dict[TestName, Floats]:
        """What is watched: numbers of the rows that can be compared with the calibration's."""
        watched = self._watched(outcomes)
        found: dict[TestName, Floats] = {"scores": outcomes.uncertainty[watched]}
        if self.rule is not None:
            found["acceptance"] = (~accepted[watched]).astype(np.float64)
        if self.calibration.class_names is not None and self.calibration.prediction is not None:
            if outcomes.prediction is None:
                raise DataError(
                    "the calibration rows say what was answered, these scores do not. Score them "
                    "again."
                )
            found["answers"] = outcomes.prediction[watched].astype(np.float64)
        return found

    @property
    def _is_partial(self) -> bool:
        return self.rule is not None and self.rule.method == "anytime"

    def _watched(self, outcomes: Outcomes) -> NDArray[np.bool_]:
        """(N,) rows with an uncertainty.

        Of a partial calibration, below its largest, where the others are alike.
        """
        return np.isfinite(outcomes.uncertainty) & (outcomes.uncertainty < self.below)

    def _take_labels(
        self,
        outcomes: Outcomes,
        accepted: NDArray[np.bool_],
        rows: Ints,
        judged: slice = slice(None),
    ) -> None:
        if self.audited is None or self.audit_test is None:
            return
        counts = accepted | (
            "outside" in self.rates
        )  # of a share of strangers every labelled row tells
        known = np.flatnonzero((outcomes.failure != UNKNOWN) & counts)
        hashes, new = self.labelled.new(outcomes.take(known), labels=True)
        if not new.all():
            told = f"{np.count_nonzero(~new)} of {len(new)} labels were given before and are not counted again."
            warn_caller(told)
        self.repeated += int(np.count_nonzero(~new))
        self.labelled.add(hashes)
        known = known[new]
        self._take_rate("outside", outcomes.outside[known], rows[known], judged)
        known = known[accepted[known]]
        wrong = outcomes.failure[known] == 1
        self.audit_test = self.audit_test.after(
            self.audited.path(wrong)[judged], rows[known][judged]
        )
        self.audited = self.audited.more(wrong)

    def _take_rate(
        self, name: TestName, happened: NDArray[np.bool_], rows: Ints, judged: slice = slice(None)
    ) -> None:
        """Count rows for a rate that is watched, if it is.

        The evidence is judged after some of them.
        """
        if name in self.rates:
            counts = happened.astype(np.int64)
            self.rate_tests[name] = self.rate_tests[name].after(
                self.rates[name].path(counts)[judged], rows[judged]
            )
            self.rates[name] = self.rates[name].more(counts)

    def _acceptance(self) -> Acceptance | None:
        n = self.rows - self.unscored
        since = self.accepted / n if n else None
        return (
            None
            if self._coverage is None
            else Acceptance(calibration=self._coverage, since=since, n=n)
        )

    def _fingerprint(self) -> str:
        """Of everything that decides what the same rows lead to."""
        content = hashlib.sha256()
        for watch in self.watches.values():
            for column in watch.reference.table():
                content.update(column.tobytes())
        if not self.watches:
            content.update(self.calibration.uncertainty.tobytes())
        if (
            self.rule is not None and self.rule.reweighted
        ):  # the rates depend on which rows are in which stratum
            rows = self.calibration.take(self.calibration.evaluable)
            content.update(
                Strata(rows, self.rule.outside_share, self.rule.class_shares).stratum.tobytes()
            )
        rule = None if self.rule is None else self.rule.model_dump(mode="json")
        return digest([content.hexdigest(), rule, self.false_alarm, self.seed, list(self.watches)])


def _guaranteed(folder: Path) -> tuple[Calibration, Rule | LabelSets]:
    """The calibration of a predictor, and what it promises; refused where that is nothing."""
    command = f"vilu calibrate {shlex.quote(str(folder))} STORE --max-risk 0.05"
    calibration = Calibration.find(folder)
    if calibration is None:
        read_record(folder / PREDICTOR)  # a folder without a predictor is another mistake
    elif calibration.guarantee is not None:
        return calibration, calibration.guarantee
    else:
        command = f"{command} --overwrite"
    raise InfeasibleError(
        f"there is no guarantee to watch, because nothing was promised of {folder}: "
        f"run `{command}` with labelled rows first."
    )


KINDS = ("rows seen", "labels seen")
"""Kinds of hashes in a state."""


def _read_state(path: str | Path) -> tuple[pa.Table, State]:
    table, metadata = read_table(path, ("test",))
    if metadata.get("kind") != "monitor":
        raise DataError(
            f"{path} is not the state of a monitor. Give another file, or one that does not exist "
            "yet."
        )
    try:
        return table, State.model_validate(metadata)
    except ValidationError as error:
        raise DataError(
            f"{path} is damaged: {explain(error)}. Restore it, or begin a new monitor."
        ) from error


def _require_parquet(path: str | Path) -> None:
    if table_suffix(path) != ".parquet":
        raise UsageError(
            f"the state of a monitor is a .parquet file. Got {Path(path).name!r} instead."
        )

"""Monitoring a guarantee on the rows and labels that arrive after the calibration."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from vilu.artifacts.documents import first_error
from vilu.artifacts.hashing import digest
from vilu.artifacts.paths import claim_file
from vilu.artifacts.tables import read_column, read_table, table_suffix, write_table
from vilu.calibration.calibration import Calibration, has_guarantee, require_new_row_guarantee
from vilu.calibration.label_sets import LabelSets
from vilu.calibration.monitor.arrivals import SeenRows, admit_rows, refuse_sorted
from vilu.calibration.monitor.audit import Audit, TestName
from vilu.calibration.monitor.martingale import ReferenceValues
from vilu.calibration.monitor.rates import make_rate_audits, ood_in_words
from vilu.calibration.monitor.status import Acceptance, Audited, Status, Test, conclude
from vilu.calibration.monitor.watch import LEVEL_PARTS, ShiftTest, State, Wealth
from vilu.calibration.rules import Rule, group_names
from vilu.calibration.shares import Strata
from vilu.callers import warn_caller
from vilu.errors import UNKNOWN, DataError, InfeasibleError, ProvenanceError, UsageError
from vilu.metrics.counts import Floats, Ints
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.persistence.description import read_description
from vilu.predictors.persistence.files import PREDICTOR, SavedModel, folder_of
from vilu.validation import checked, require_at_least, require_between

if TYPE_CHECKING:
    import pyarrow as pa


class Monitor:
    """Monitor that tests, batch by batch, whether new rows are still like the calibration rows.

    Args:
        calibration: The calibration rows. Rows without an uncertainty are left out.
        rule: A rule from ``certify``, or label sets. Label sets, and rules for whole batches,
            cannot be audited.
        groups: Group names for the N calibration rows. Needed if the rule was made with a list of
            groups.
        false_alarm: Probability, in (0, 1), that any test ever raises a false alarm.
        seed: Seed for the random numbers that break ties, at least 0. The seed must be chosen
            before the first row is seen.

    Attributes:
        rows: Number of monitored rows.
        unscored: Number of monitored rows without an uncertainty. The tests leave out these rows.
        accepted: Number of accepted rows among the monitored rows.
        repeated: Number of rows and labels that this monitor has left out, because they were given
            before. ``resume`` does not restore the number of an earlier monitor.
        risk: Hash of the saved calibration. None if the calibration is not saved. Scores with
            decisions by this calibration contain the same hash.

    Raises:
        UsageError: If ``false_alarm`` or ``seed`` is out of range.
        DataError: If no calibration row has an uncertainty.
        InfeasibleError: If there is no guarantee to monitor: no rule, or a rule that accepts
            nothing.
        ProvenanceError: If the rule is about a folder's photos or about clusters, not about single
            new rows.

    Examples:
        >>> import numpy as np, vilu
        >>> rng = np.random.default_rng(0)
        >>> calibration = vilu.Outcomes(rng.random(1000), np.zeros(1000))
        >>> monitor = vilu.Monitor(calibration, vilu.certify(calibration, max_risk=0.05))
        >>> unknown = np.full(500, -1)  # the failure of new rows
        >>> monitor.update(vilu.Outcomes(rng.random(500), unknown)).verdict
        'holds'
        >>> monitor.update(vilu.Outcomes(rng.random(500) ** 0.5, unknown)).verdict  # larger scores
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
        if not has_guarantee(rule):
            raise InfeasibleError(
                "there is no guarantee to watch, because nothing is guaranteed of these rows: give "
                "the rule that vilu.certify(outcomes, max_risk=0.05) makes of them."
            )
        require_new_row_guarantee(rule)
        if not np.isfinite(calibration.uncertainty).any():
            raise DataError(
                f"none of the {len(calibration)} calibration rows has an uncertainty. Calibrate "
                "again."
            )
        self.calibration = calibration
        self.false_alarm = false_alarm
        self.seed = int(seed)
        self.rule: Rule | None = None
        # Label sets accept no answers, and a rule for whole batches accepts no single rows.
        if isinstance(rule, Rule) and not rule.needs_batch:
            self.rule = rule
        self.risk: str | None = None
        self.rows = 0
        self.unscored = 0
        self.accepted = 0
        self.repeated = 0
        self.seen_rows = SeenRows()
        self.seen_labels = SeenRows()
        self.comparison_limit = self._find_comparison_limit()
        is_accepted = self._is_accepted(calibration, groups)
        values = self._values_by_test(calibration, is_accepted)
        self._coverage: float | None = None
        if self.rule is not None and not self._is_partial:
            self._coverage = float(1 - values["acceptance"].mean())  # the value is 0 if accepted
        if self.rule is not None and self.rule.reweighted:
            # The stated shares differ from the shares among the calibration rows. New rows with the
            # stated shares would raise an alarm although the guarantee holds. So no values are
            # compared.
            values = {}
        self._make_tests(values)
        self.fingerprint = self._fingerprint()

    def _make_tests(self, values: Mapping[TestName, Floats]) -> None:
        """Make all tests, each with a share of ``false_alarm``.

        ``values`` maps a test's name to the values for the calibration rows. The test compares new
        rows' values with these values.
        """
        guaranteed_risk = self._guaranteed_risk()
        names: list[TestName] = list(values)
        if guaranteed_risk is not None:
            names.append("audit")
        # Only the names of these audits are needed here. Their levels are computed below.
        rate_audits = make_rate_audits(self.rule, self.calibration, level=self.false_alarm)
        names += rate_audits.keys()
        # Every test can raise a false alarm. So the tests share the level: with the whole level for
        # each, the probability of any false alarm could exceed ``false_alarm`` (union bound).
        total_parts = sum(LEVEL_PARTS[name] for name in names)
        tests: dict[TestName, Test] = {}
        for name in names:
            tests[name] = Test(name=name, level=self.false_alarm * LEVEL_PARTS[name] / total_parts)
        self.shift_tests: dict[TestName, ShiftTest] = {}
        for name, values_of_test in values.items():
            reference = ReferenceValues.of(values_of_test)
            self.shift_tests[name] = ShiftTest(tests[name], reference)
        self.error_audit: Audit | None = None
        self.audit_test = tests.get("audit")
        if guaranteed_risk is not None:
            self.error_audit = Audit(limit=guaranteed_risk, delta=tests["audit"].level)
        # Without any test there are no parts, and ``max`` avoids a division by 0.
        self._make_rate_tests(level_of_part=self.false_alarm / max(total_parts, 1))

    def _make_rate_tests(self, level_of_part: float) -> None:
        """Make all audits of rates, and a test for each. Every rate gets one part of the level."""
        self.rate_audits = make_rate_audits(self.rule, self.calibration, level_of_part)
        self.rate_tests: dict[TestName, Test] = {}
        for name, rate_audit in self.rate_audits.items():
            self.rate_tests[name] = Test(name=name, level=rate_audit.delta)

    def _find_comparison_limit(self) -> float:
        """Return the comparison limit: only rows with a smaller uncertainty are compared.

        The limit is infinite if all rows are compared.
        """
        scores = self.calibration.uncertainty
        is_finite = np.isfinite(scores)
        distinct_scores = np.unique(scores[is_finite])
        # With the method "anytime", or with rows drawn below a limit, the labelled rows are a
        # random sample only up to the limit. Labelled rows beyond the limit were chosen by
        # somebody, so new rows are not like them. With a single distinct score, no row would be
        # below the limit, so there is no limit.
        if self._is_partial and len(distinct_scores) > 1:
            return float(distinct_scores[-1])
        return np.inf

    @classmethod
    @checked
    def of_folder(
        cls, folder: str | Path | SavedModel, *, false_alarm: float = 0.05, seed: int = 0
    ) -> Self:
        """Make a monitor for the calibration in a predictor's folder, or for a ``vilu.Selective``.

        Raises:
            InfeasibleError: If the predictor has no guarantee to monitor.
            DataError: If the folder holds no predictor, or if the calibration is damaged.
            ProvenanceError: If a newer version of vilu wrote the calibration.

        Examples:
            >>> import numpy as np, tempfile, vilu
            >>> image = np.random.default_rng(0).normal(size=(200, 8))
            >>> image /= np.linalg.norm(image, axis=1, keepdims=True)
            >>> text = np.eye(8)
            >>> target = image.argmax(axis=1)  # the nearest class, so all answers are right
            >>> data = vilu.Embeddings(image, text, target=target)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     _ = vilu.MCM().save(folder)
            ...     _ = vilu.calibrate_predictor(folder, data, vilu.Target(max_risk=0.05))
            ...     monitor = vilu.Monitor.of_folder(folder)
            >>> len(monitor.calibration), monitor.rule.max_risk
            (200, 0.05)
        """
        predictor_folder = folder_of(folder)
        calibration, guarantee = _load_guarantee(predictor_folder)
        monitor = cls(calibration.rows, guarantee, false_alarm=false_alarm, seed=seed)
        monitor.risk = calibration.fingerprint
        return monitor

    @checked
    def update(
        self, outcomes: Outcomes, groups: Sequence[str] | None = None, *, in_order: bool = False
    ) -> Status:
        """Monitor the next rows, in the order of their arrival.

        Rows with a known failure are also audited.

        Args:
            outcomes: Scores by the same predictor. Rows from earlier batches are left out and
                counted in ``repeated``. Such rows are recognised by identifier, uncertainty and
                answer. Rows without identifiers are recognised only as a whole batch.
            groups: Group names for the N rows. Needed if the rule was made with a list of groups.
            in_order: Whether the rows are known to be in the order of their arrival. If not, sorted
                rows are refused.

        Warns:
            UserWarning: If some of the rows are calibration rows, or were monitored before.

        Raises:
            ProvenanceError: If the scores are by another predictor or calibration, or if the
                candidates differ.
            DataError: If the rows are sorted, or if the rows lack answers and the calibration rows
                have answers.
            UsageError: If groups are needed and not given.

        Examples:
            >>> import numpy as np, vilu
            >>> rng = np.random.default_rng(0)
            >>> calibration = vilu.Outcomes(rng.random(500), np.zeros(500))
            >>> monitor = vilu.Monitor(calibration, vilu.certify(calibration, max_risk=0.05))
            >>> unknown = np.full(300, -1)  # labels are not needed
            >>> status = monitor.update(vilu.Outcomes(rng.random(300), unknown))
            >>> status.verdict, status.rows
            ('holds', 300)
        """
        outcomes = admit_rows(outcomes, self.calibration, self.risk)
        is_accepted = self._is_accepted(outcomes, groups)
        hashes, is_new = self.seen_rows.find_new(outcomes)
        if not is_new.all():
            warn_caller(
                f"{np.count_nonzero(~is_new)} of {len(is_new)} rows were monitored before and are "
                "not counted again.",
            )
            outcomes = outcomes.take(is_new)
            is_accepted = is_accepted[is_new]
        if not in_order:
            refuse_sorted(outcomes)
        is_scored = np.isfinite(outcomes.uncertainty)
        row_numbers = self.rows + np.arange(len(outcomes))
        compared_row_numbers = row_numbers[self._is_compared(outcomes)]
        for name, values in self._values_by_test(outcomes, is_accepted).items():
            if name in self.shift_tests:
                self.shift_tests[name].update(values, compared_row_numbers, self.seed)
        self._count_for_rate("review", ~is_accepted[is_scored], row_numbers[is_scored])
        self.rows += len(outcomes)
        self.unscored += int(np.count_nonzero(~is_scored))
        self.accepted += int(np.count_nonzero(is_accepted))
        self.repeated += int(np.count_nonzero(~is_new))
        self.seen_rows.add(hashes)
        self._audit_labels(outcomes, is_accepted, row_numbers)
        return self.status

    @checked
    def audit(
        self, outcomes: Outcomes, groups: Sequence[str] | None = None, *, in_order: bool = False
    ) -> Status:
        """Audit late labels of rows that were monitored before.

        A label counts once: if a row was audited before, the label is left out. Such rows are
        recognised as in ``update``. By default the order of the labels has no meaning, so the test
        looks at the evidence once, after the last label. With ``in_order`` the test looks at the
        evidence after every label.

        Warns:
            UserWarning: If some labels were given before.

        Raises:
            UsageError: If there is no guarantee to audit, or if groups are needed and not given.
            ProvenanceError: If the scores' predictor, calibration or candidates differ from the
                monitor's.

        Examples:
            >>> import numpy as np, vilu
            >>> rng = np.random.default_rng(0)
            >>> calibration = vilu.Outcomes(rng.random(500), np.zeros(500))
            >>> monitor = vilu.Monitor(calibration, vilu.certify(calibration, max_risk=0.05))
            >>> uncertainty = rng.random(200)
            >>> unknown = np.full(200, -1)  # -1: no label yet
            >>> ids = [f"{i}.jpg" for i in range(200)]
            >>> monitor.update(vilu.Outcomes(uncertainty, unknown, ids=ids)).verdict
            'holds'
            >>> failure = rng.random(200) < 0.2  # 20 % are wrong; at most 5 % were guaranteed
            >>> monitor.audit(vilu.Outcomes(uncertainty, failure, ids=ids)).verdict
            'broken'
        """
        if self.error_audit is None:
            raise UsageError(
                "there is no guarantee to audit: the rule judges whole batches, bounds a mean "
                "(crc), or allows every error rate, or there are only label sets. Leave "
                "the labels out."
            )
        outcomes = admit_rows(outcomes, self.calibration, self.risk)
        # An alarm is reported at the last monitored row.
        row_numbers = np.full(len(outcomes), max(self.rows - 1, 0))
        # Labels without an arrival order are tested together. If the evidence were tested after
        # every label, a difficult class at the beginning could raise an alarm, although all labels
        # together do not.
        all_labels = slice(None)
        last_label = slice(-1, None)
        tested_slice = all_labels if in_order else last_label
        is_accepted = self._is_accepted(outcomes, groups)
        self._audit_labels(outcomes, is_accepted, row_numbers, tested_slice)
        return self.status

    @checked
    def save(self, path: str | Path) -> None:
        """Write the state for ``resume`` into a ``.parquet`` file, atomically.

        An existing file is replaced only if the file is a monitor's state.

        Raises:
            UsageError: If the suffix is not ``.parquet``, or if an existing file is no such state.
            StorageError: If the file cannot be written.

        Examples:
            >>> import numpy as np, tempfile, vilu
            >>> rng = np.random.default_rng(0)
            >>> calibration = vilu.Outcomes(rng.random(500), np.zeros(500))
            >>> rule = vilu.certify(calibration, max_risk=0.05)
            >>> monitor = vilu.Monitor(calibration, rule)
            >>> unknown = np.full(300, -1)
            >>> _ = monitor.update(vilu.Outcomes(rng.random(300), unknown))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     monitor.save(f"{folder}/state.parquet")
            ...     tomorrow = vilu.Monitor(calibration, rule).resume(f"{folder}/state.parquet")
            >>> tomorrow.update(vilu.Outcomes(rng.random(300), unknown)).rows
            600
        """
        import pyarrow as pa

        claim_file(path, "monitor state", overwrite=True)
        # ``promote_options`` fills missing columns with null.
        whole_table = pa.concat_tables(self._tables_to_save(), promote_options="default")
        columns = {name: whole_table[name] for name in ("test", "value", "count", "row")}
        metadata = self.state().model_dump(mode="json")
        write_table(path, columns, metadata)

    def _tables_to_save(self) -> list[pa.Table]:
        """Make the tables with every test's values, and with the hashes for rows and labels."""
        import pyarrow as pa

        tables = []
        for name, shift_test in self.shift_tests.items():
            values, counts = shift_test.reference.value_counts()
            test_of_line = pa.repeat(name, len(counts))
            table = pa.table({"test": test_of_line, "value": values, "count": counts})
            tables.append(table)
        # without a test, this empty table still brings the columns "value" and "count"
        empty_columns = {"value": pa.array([], pa.float64()), "count": pa.array([], pa.int64())}
        empty_table = pa.table(empty_columns)
        tables.append(empty_table)
        # The hashes for seen rows and seen labels are in the same table. In lines with hashes, the
        # column "test" names the kind of hash.
        for kind, seen in ((ROWS_SEEN, self.seen_rows), (LABELS_SEEN, self.seen_labels)):
            hashes = seen.hashes()
            kind_of_line = pa.repeat(kind, len(hashes))
            table = pa.table({"test": kind_of_line, "row": hashes})
            tables.append(table)
        return tables

    @checked
    def resume(self, path: str | Path) -> Self:
        """Continue from a saved monitor state, if the monitor had the same calibration.

        Raises:
            UsageError: If the file is not a ``.parquet`` file, or if this monitor has already
                monitored rows.
            StorageError: If the file cannot be opened.
            DataError: If the file is no monitor state, or if the file is damaged.
            ProvenanceError: If the state belongs to another calibration, level or seed.

        Examples:
            >>> import numpy as np, tempfile, vilu
            >>> calibration = vilu.Outcomes(np.linspace(0, 1, 200), np.zeros(200))
            >>> rule = vilu.certify(calibration, max_risk=0.05)
            >>> monitor = vilu.Monitor(calibration, rule)
            >>> _ = monitor.update(vilu.Outcomes([0.2, 0.7, 0.4], [-1, -1, -1]))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     monitor.save(f"{folder}/state.parquet")
            ...     vilu.Monitor(calibration, rule).resume(f"{folder}/state.parquet").rows
            3
        """
        import pyarrow as pa

        _require_parquet(path)
        if self.rows:
            raise UsageError(
                "only a new monitor can continue from a saved state. This monitor has seen "
                f"{self.rows} rows."
            )
        table, state = _read_state(path)
        if state.fingerprint != self.fingerprint:
            raise ProvenanceError(
                f"{path} belongs to the monitor {state.fingerprint}, and this monitor is "
                f"{self.fingerprint}: its calibration, probability of a false alarm, or seed is "
                "different. After a new calibration begin a new state."
            )
        test_column = read_column(path, table, "test", "string")
        test_of_line = np.asarray(test_column.to_pylist(), dtype=object)
        # The columns "value" and "count" are null in the lines with hashes.
        value = _read_numbers(path, table, "value", "float64", in_place_of_null=np.nan)
        count = _read_numbers(path, table, "count", "int64", in_place_of_null=0)
        row_hash = read_column(path, table, "row", "int64")
        values: dict[TestName, tuple[Floats, Ints]] = {}
        for name in self.shift_tests:
            is_of_test = test_of_line == name
            values[name] = value[is_of_test], count[is_of_test]
        hashes_of_rows = row_hash.filter(pa.array(test_of_line == ROWS_SEEN))
        hashes_of_labels = row_hash.filter(pa.array(test_of_line == LABELS_SEEN))
        n_rows, n_labels = state.remembered
        try:
            self._restore(state, values)
            _add_saved_hashes(self.seen_rows, hashes_of_rows, n_rows)
            _add_saved_hashes(self.seen_labels, hashes_of_labels, n_labels)
        except ValueError as error:
            raise DataError(f"{path} is damaged: {error}. Begin a new monitor.") from error
        return self

    def state(self) -> State:
        """Return the monitor's state, without the calibration and the monitored values.

        Examples:
            >>> import numpy as np, vilu
            >>> calibration = vilu.Outcomes(np.linspace(0, 1, 200), np.zeros(200))
            >>> monitor = vilu.Monitor(calibration, vilu.certify(calibration, max_risk=0.05))
            >>> _ = monitor.update(vilu.Outcomes([0.2, 0.7, 0.4], [-1, -1, -1]))
            >>> monitor.state().rows, monitor.state().accepted
            (3, 3)
        """
        audited_counts = (0, 0)
        if self.error_audit is not None:
            audited_counts = (self.error_audit.n_audited, self.error_audit.n_wrong)
        wealth: dict[str, Wealth | None] = {}
        for name, shift_test in self.shift_tests.items():
            wealth[name] = Wealth.of(shift_test.martingale)
        rate_counts: dict[str, tuple[int, int]] = {}
        for name, audit in self.rate_audits.items():
            rate_counts[name] = (audit.n_audited, audit.n_wrong)
        return State(
            fingerprint=self.fingerprint,
            rows=self.rows,
            unscored=self.unscored,
            accepted=self.accepted,
            tests=tuple(self._tests()),
            wealth=wealth,
            audited=audited_counts,
            remembered=(len(self.seen_rows), len(self.seen_labels)),
            counted=rate_counts,
        )

    def _restore(self, state: State, values: Mapping[TestName, tuple[Floats, Ints]]) -> None:
        """Set this monitor to a saved state.

        ``values`` maps a test's name to the distinct values so far, and to each value's count.
        Raises a ValueError if the state does not fit.
        """
        self._require_tests(state)
        tests = {test.name: test for test in state.tests}
        self.shift_tests = self._saved_shift_tests(state, values)
        self.rows = state.rows
        self.unscored = state.unscored
        self.accepted = state.accepted
        for name, rate_audit in self.rate_audits.items():
            n_rows, n_events = state.counted[name]
            self.rate_audits[name] = replace(rate_audit, n_audited=n_rows, n_wrong=n_events)
            self.rate_tests[name] = tests[name]
        if self.error_audit is not None:
            n_audited, n_wrong = state.audited
            self.error_audit = replace(self.error_audit, n_audited=n_audited, n_wrong=n_wrong)
            self.audit_test = tests["audit"]

    def _saved_shift_tests(
        self, state: State, values: Mapping[TestName, tuple[Floats, Ints]]
    ) -> dict[TestName, ShiftTest]:
        """Return the shift tests from a saved state. ``values`` is as in ``_restore``."""
        tests = {test.name: test for test in state.tests}
        compares_all = self.comparison_limit == np.inf
        shift_tests: dict[TestName, ShiftTest] = {}
        for name, shift_test in self.shift_tests.items():
            wealth = state.wealth[name]
            if compares_all:
                n_compared = state.rows - state.unscored
            else:
                # Only the wealth says how many rows were compared.
                n_compared = 0 if wealth is None else wealth.n
            distinct_values, counts = values[name]
            shift_tests[name] = shift_test.with_saved_state(
                tests[name], wealth, distinct_values, counts, n_compared
            )
        return shift_tests

    def _require_tests(self, state: State) -> None:
        """Raise a ValueError if a state has different tests than this monitor, or wrong counts."""
        levels = {test.name: test.level for test in self._tests()}
        saved_levels = {test.name: test.level for test in state.tests}
        n_audited, n_wrong = state.audited
        has_same_tests = saved_levels.keys() == levels.keys()
        has_same_shift_tests = state.wealth.keys() == self.shift_tests.keys()
        if not has_same_tests or not has_same_shift_tests or n_wrong > n_audited:
            raise ValueError(f"its tests are not {', '.join(levels)}")
        has_same_rates = state.counted.keys() == self.rate_audits.keys()
        is_impossible = any(n_events > n_rows for n_rows, n_events in state.counted.values())
        if not has_same_rates or is_impossible:
            raise ValueError(f"its rates are not {', '.join(self.rate_audits) or 'none'}")
        if saved_levels != levels:
            raise ValueError("its tests have other levels")

    @property
    def status(self) -> Status:
        """Current status."""
        tests = self._tests()
        audited = None if self.error_audit is None else Audited.from_audit(self.error_audit)
        verdict, raised_at, reason, advice = conclude(tests, audited)
        ood_audit = self.rate_audits.get("outside")
        ood_text = None
        if ood_audit is not None and self.rule is not None and self.rule.outside_share is not None:
            ood_text = ood_in_words(ood_audit, self.rule.outside_share)
        acceptance = self._acceptance_shares()
        return Status(
            verdict=verdict,
            raised_at=raised_at,
            reason=reason,
            advice=advice,
            rows=self.rows,
            unscored=self.unscored,
            false_alarm=self.false_alarm,
            tests=tuple(tests),
            acceptance=acceptance,
            audit=audited,
            present=ood_text,
        )

    def _tests(self) -> list[Test]:
        """Return all tests, in the status's order."""
        tests = [shift_test.test for shift_test in self.shift_tests.values()]
        if self.audit_test is not None:
            tests.append(self.audit_test)
        return [*tests, *self.rate_tests.values()]

    def _guaranteed_risk(self) -> float | None:
        """Return the guaranteed largest error rate among accepted answers.

        None if nothing is accepted, or if the guarantee is only about a mean over calibrations. An
        error rate of 0 or 1 cannot be audited, and gives None too.
        """
        if self.rule is None or not self.rule.feasible:
            return None
        if self.rule.method == "crc":
            # Conformal risk control bounds the mean over calibrations. In about half of the
            # calibrations the risk is above the target. So an audit would raise alarms although the
            # guarantee holds.
            return None
        risk = self.rule.max_risk
        if risk is None:
            risk = self.rule.risk_bound
        if risk is None or not 0 < risk < 1:
            return None
        return risk

    def _is_accepted(self, outcomes: Outcomes, groups: Sequence[str] | None) -> NDArray[np.bool_]:
        """Return the mask (N,) of the accepted answers, False everywhere without a rule."""
        if self.rule is None:
            return np.zeros(len(outcomes), dtype=np.bool_)
        if self.rule.grouped_by == "prediction":
            groups = group_names(outcomes)
        return self.rule.accept(outcomes.uncertainty, groups)

    def _values_by_test(
        self, outcomes: Outcomes, is_accepted: NDArray[np.bool_]
    ) -> dict[TestName, Floats]:
        """Return values (M,) for the M compared rows, for each test that compares rows.

        ``is_accepted`` is the mask (N,) of the accepted answers.
        """
        is_compared = self._is_compared(outcomes)
        values: dict[TestName, Floats] = {"scores": outcomes.uncertainty[is_compared]}
        if self.rule is not None:
            values["acceptance"] = (~is_accepted[is_compared]).astype(np.float64)  # 0 if accepted
        if self.calibration.class_names is not None and self.calibration.prediction is not None:
            if outcomes.prediction is None:
                raise DataError(
                    "the calibration rows have answers, and these scores have none. Score the rows "
                    "again."
                )
            values["answers"] = outcomes.prediction[is_compared].astype(np.float64)
        return values

    @property
    def _is_partial(self) -> bool:
        """Whether the calibration rows are a random sample only up to some uncertainty."""
        return self.rule is not None and self.rule.is_partial

    def _is_compared(self, outcomes: Outcomes) -> NDArray[np.bool_]:
        """Return the mask (N,) of the rows to compare with the calibration rows.

        Rows without an uncertainty are not compared. If the calibration rows are a random sample
        only up to some uncertainty, rows from this uncertainty on are not compared either.
        """
        return np.isfinite(outcomes.uncertainty) & (outcomes.uncertainty < self.comparison_limit)

    def _audit_labels(
        self,
        outcomes: Outcomes,
        is_accepted: NDArray[np.bool_],
        row_numbers: Ints,
        tested_slice: slice = slice(None),
    ) -> None:
        """Audit the rows with a known failure, except rows from earlier audits.

        Args:
            outcomes: N rows.
            is_accepted: Mask (N,) of the accepted answers.
            row_numbers: (N,) If a row's label raises an alarm, the alarm is reported at the row
                with this number.
            tested_slice: Selects labels. The evidence is tested after each selected label.
        """
        if self.error_audit is None or self.audit_test is None:
            return
        is_counted = is_accepted
        if "outside" in self.rate_audits:
            # All labelled rows count for the out-of-distribution share.
            is_counted = np.ones(len(outcomes), dtype=np.bool_)
        labelled_rows = np.flatnonzero((outcomes.failure != UNKNOWN) & is_counted)
        if labelled_rows.size == 0:  # the usual case in a service, because labels arrive later
            return
        labelled_outcomes = outcomes.take(labelled_rows)
        hashes, is_new = self.seen_labels.find_new(labelled_outcomes, compare_failures=True)
        n_repeated = int(np.count_nonzero(~is_new))
        if n_repeated:
            warn_caller(
                f"{n_repeated} of {len(is_new)} labels were given before and are "
                "not counted again.",
            )
        self.repeated += n_repeated
        self.seen_labels.add(hashes)
        new_rows = labelled_rows[is_new]
        is_ood = outcomes.outside[new_rows]
        self._count_for_rate("outside", is_ood, row_numbers[new_rows], tested_slice)
        audited_rows = new_rows[is_accepted[new_rows]]
        is_wrong = outcomes.failure[audited_rows] == 1
        evidence = self.error_audit.log_wealth_after(is_wrong)
        reported_at = row_numbers[audited_rows]
        self.audit_test = self.audit_test.after(evidence[tested_slice], reported_at[tested_slice])
        self.error_audit = self.error_audit.with_answers(is_wrong)

    def _count_for_rate(
        self,
        name: TestName,
        is_event: NDArray[np.bool_],
        row_numbers: Ints,
        tested_slice: slice = slice(None),
    ) -> None:
        """Update a rate and the rate's test with M new rows. Unmonitored rates are ignored.

        Args:
            name: Rate name, such as "review".
            is_event: Mask (M,) of the rows with the counted event, such as rows left for review.
            row_numbers: (M,) If a row raises an alarm, the alarm is reported at the row with this
                number.
            tested_slice: Selects rows. The evidence is tested after each selected row.
        """
        if name not in self.rate_audits:
            return
        events = is_event.astype(np.int64)
        evidence = self.rate_audits[name].log_wealth_after(events)
        self.rate_tests[name] = self.rate_tests[name].after(
            evidence[tested_slice], row_numbers[tested_slice]
        )
        self.rate_audits[name] = self.rate_audits[name].with_answers(events)

    def _acceptance_shares(self) -> Acceptance | None:
        """Return the accepted shares, among the calibration rows and among the monitored rows.

        None if the share among the calibration rows is not known.
        """
        if self._coverage is None:
            return None
        n_scored = self.rows - self.unscored
        share = self.accepted / n_scored if n_scored else None
        return Acceptance(calibration=self._coverage, since=share, n=n_scored)

    def _fingerprint(self) -> str:
        """Return a digest of everything that determines the results, except new rows."""
        content_hash = hashlib.sha256()
        for shift_test in self.shift_tests.values():
            for values_or_counts in shift_test.reference.value_counts():
                content_hash.update(values_or_counts.tobytes())
        if not self.shift_tests:
            content_hash.update(self.calibration.uncertainty.tobytes())
        if self.rule is not None and self.rule.reweighted:
            # The rate audits depend on the strata of the rows.
            rows = self.calibration.take(self.calibration.evaluable)
            strata = Strata(rows, self.rule.outside_share, self.rule.class_shares)
            content_hash.update(strata.stratum.tobytes())
        rule = None if self.rule is None else self.rule.model_dump(mode="json")
        test_names = list(self.shift_tests)
        hash_of_values = content_hash.hexdigest()
        return digest([hash_of_values, rule, self.false_alarm, self.seed, test_names])


def _load_guarantee(folder: Path) -> tuple[Calibration, Rule | LabelSets]:
    """Load a predictor's calibration and guarantee. A missing guarantee is an InfeasibleError."""
    command = f"vilu calibrate {shlex.quote(str(folder))} STORE --max-risk 0.05"
    calibration = Calibration.find(folder)
    if calibration is None:
        read_description(folder / PREDICTOR)  # raises a better error if there is no predictor
    elif calibration.guarantee is not None:
        return calibration, calibration.guarantee
    else:
        command = f"{command} --overwrite"  # there is a calibration without a guarantee
    raise InfeasibleError(
        f"there is no guarantee to watch, because nothing is guaranteed of {folder}: "
        f"run `{command}` with labelled rows first."
    )


ROWS_SEEN = "rows seen"
"""Value in the column "test" of a saved state, in the lines with row hashes."""

LABELS_SEEN = "labels seen"
"""Value in the column "test" of a saved state, in the lines with label hashes."""


def _add_saved_hashes(seen: SeenRows, hashes: pa.ChunkedArray, n: int) -> None:
    """Add n saved hashes to the empty set ``seen``.

    Raises a ValueError if ``hashes`` does not hold n distinct hashes.
    """
    saved_hashes = hashes.drop_null().to_numpy()
    seen.add(saved_hashes)
    if len(hashes) != n or len(seen) != n:
        raise ValueError("it does not hold the rows that were taken in")


def _read_numbers(
    path: str | Path, table: pa.Table, name: str, column_type: str, *, in_place_of_null: float
) -> NDArray[Any]:
    """Read a number column from a saved state, with a number in place of null."""
    column = read_column(path, table, name, column_type)
    filled_column = column.fill_null(in_place_of_null)
    numbers: NDArray[Any] = filled_column.to_numpy()
    return numbers


def _read_state(path: str | Path) -> tuple[pa.Table, State]:
    """Read a monitor's saved state: the table with values and hashes, and the ``State``."""
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
            f"{path} is damaged: {first_error(error)}. Restore it, or begin a new monitor."
        ) from error


def _require_parquet(path: str | Path) -> None:
    """Refuse a path whose suffix is not ".parquet"."""
    if table_suffix(path) != ".parquet":
        raise UsageError(
            f"the state of a monitor is a .parquet file. Got {Path(path).name!r} instead."
        )

"""When a guarantee that was calibrated should be considered void: rows that shift, or a promise that is broken.

A guarantee of ``calibrate`` holds for rows that are drawn as the calibration rows were. Up to four tests watch that,
each with a share of the probability of a false alarm, so that their sum bounds it (Bonferroni):

- scores (2 parts): the uncertainty of each row among those of all rows before it, calibration rows included, as a
  conformal p-value, and a test martingale on these;
- acceptance (1 part): the same on "accepted or not";
- answers (1 part): the same on the zero-shot answer, where there are classes;
- audit (1 part): bets against "the error rate is at most what was promised" on accepted answers with known labels.

Exchangeable rows make every p-value uniform and independent of the earlier ones, so the shares of scores and answers
are exact for any distribution and any ties. That of acceptance is for a threshold that was not chosen on the rows that
it is compared on; how little the choice does is simulated in the tests. That of the audit is for a promise that is
kept; with the probability that its own confidence leaves, it is not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from vilu.decision import record
from vilu.decision.audit import Audit
from vilu.decision.calibrate import group_names
from vilu.decision.conformal import Reference
from vilu.decision.monitor_input import admit
from vilu.decision.monitor_status import Acceptance, Audited, Status, Test, TestName, conclude
from vilu.decision.record import Rule
from vilu.decision.selector import Selector
from vilu.decision.watch import PARTS, Watch
from vilu.errors import DataError, UsageError
from vilu.metrics.counts import Floats, Ints
from vilu.outcome_columns import UNKNOWN
from vilu.outcomes import Outcomes
from vilu.space import digest


class Monitor:
    """Watches whether new rows are still like those of a calibration, batch by batch.

    Args:
        calibration: The calibration rows; those without an uncertainty are left out.
        rule: What ``calibrate`` gave. Without one, or with one that judges whole batches, there is nothing to audit.
        groups: N names of groups of the calibration rows, for a rule that was given its groups.
        false_alarm: Probability that any test ever raises an alarm without cause, in (0, 1).
        seed: Of the random numbers that break ties, at least 0; to be fixed before the first row.

    Attributes:
        rows: Rows monitored.
        unscored: How many of them have no uncertainty; they are left out.
        accepted: How many of them are accepted.
        risk: Hash of the record of the calibration, which scores made with it carry; None without a record.

    Raises:
        UsageError: If ``false_alarm`` or ``seed`` is out of range.
        DataError: If no calibration row has an uncertainty.

    Example:
        >>> import numpy as np, vilu
        >>> rng = np.random.default_rng(0)
        >>> calibration = vilu.Outcomes(rng.random(1000), np.zeros(1000))
        >>> monitor = vilu.Monitor(calibration, vilu.calibrate(calibration, max_risk=0.05))
        >>> monitor.update(vilu.Outcomes(rng.random(500), np.full(500, -1))).verdict
        'holds'
        >>> monitor.update(vilu.Outcomes(rng.random(500) ** 0.5, np.full(500, -1))).verdict
        'shifted: guarantee void'
    """

    def __init__(
        self,
        calibration: Outcomes,
        rule: Rule | None = None,
        *,
        groups: Sequence[str] | None = None,
        false_alarm: float = 0.05,
        seed: int = 0,
    ) -> None:
        if not 0 < false_alarm < 1:
            raise UsageError(f"false_alarm must be in (0, 1). Got {false_alarm} instead.")
        if seed < 0:
            raise UsageError(f"seed must be at least 0. Got {seed} instead.")
        if not np.isfinite(calibration.uncertainty).any():
            raise DataError(f"none of the {len(calibration)} calibration rows has an uncertainty. Calibrate again.")
        self.calibration, self.false_alarm, self.seed = calibration, false_alarm, seed
        self.rule = rule if isinstance(rule, Selector) else None
        self.risk: str | None = None
        self.rows = self.unscored = self.accepted = 0
        values = self._columns(calibration, self._accepted(calibration, groups))
        promise = self._promise()
        names: list[TestName] = [*values, *(("audit",) if promise is not None else ())]
        parts = sum(PARTS[name] for name in names)
        tests = {name: Test(name=name, level=false_alarm * PARTS[name] / parts) for name in names}
        self.watches = {name: Watch(tests[name], Reference.of(column)) for name, column in values.items()}
        self._coverage = None if self.rule is None else float(1 - values["acceptance"].mean())
        self.audited = None if promise is None else Audit(promise, tests["audit"].level)
        self.audit_test = tests.get("audit")
        self.fingerprint = self._fingerprint()

    @classmethod
    def of_folder(cls, folder: str | Path, *, false_alarm: float = 0.05, seed: int = 0) -> Self:
        """A monitor of the calibration that ``vilu calibrate`` left in the folder of a predictor.

        Raises:
            DataError: If there is none, or it is damaged.
            ProvenanceError: If a newer vilu wrote it.
        """
        found = record.load(folder)
        monitor = cls(record.load_rows(folder, found), found.rule, false_alarm=false_alarm, seed=seed)
        monitor.risk = digest(found.model_dump(mode="json"))
        return monitor

    def update(self, outcomes: Outcomes, groups: Sequence[str] | None = None) -> Status:
        """Take in the next rows, in the order of their arrival; those whose failure is known are audited too.

        Args:
            outcomes: Scores of the same predictor.
            groups: N names of groups, for a rule that was given its groups.

        Warns:
            If some of them are calibration rows.

        Raises:
            ProvenanceError: If they are scores of another predictor or calibration, or their candidates are others.
            DataError: If the calibration rows have answers, and these do not.
            UsageError: If groups are needed and not given.
        """
        outcomes = admit(outcomes, self.calibration, self.risk)
        accepted = self._accepted(outcomes, groups)
        scored = np.isfinite(outcomes.uncertainty)
        rows = self.rows + np.arange(len(outcomes))
        for name, column in self._columns(outcomes, accepted).items():
            self.watches[name].update(column, rows[scored], self.seed)
        self.rows += len(outcomes)
        self.unscored += int(np.count_nonzero(~scored))
        self.accepted += int(np.count_nonzero(accepted))
        self._take_labels(outcomes, accepted, rows)
        return self.status

    def audit(self, outcomes: Outcomes, groups: Sequence[str] | None = None) -> Status:
        """Take in labels that have arrived later, of rows that were monitored before; each label once.

        Raises:
            UsageError: If there is no promise to audit, or groups are needed and not given.
            ProvenanceError: If they are scores of another predictor, or their candidates are others.
        """
        if self.audited is None:
            raise UsageError(
                "there is no promise to audit: the rule accepts nothing, judges whole batches, or bounds a mean (crc)."
            )
        outcomes = admit(outcomes, self.calibration, self.risk)
        rows = np.full(len(outcomes), max(self.rows - 1, 0))
        self._take_labels(outcomes, self._accepted(outcomes, groups), rows)
        return self.status

    def save(self, path: str | Path) -> None:
        """Write what there is to go on from, as a ``.parquet`` file, atomically.

        Raises:
            UsageError: If the file has another suffix.
            StorageError: If the file system refuses.
        """
        from vilu.decision.monitor_state import save

        save(self, path)

    def resume(self, path: str | Path) -> Self:
        """Go on where a monitor of the same calibration stopped.

        Raises:
            UsageError: If the file is not a ``.parquet`` file, or this monitor has seen rows.
            StorageError: If it cannot be opened.
            DataError: If it is no state, or a damaged one.
            ProvenanceError: If it belongs to another calibration, level or seed.
        """
        from vilu.decision.monitor_state import resume

        resume(self, path)
        return self

    @property
    def status(self) -> Status:
        """What there is to say now."""
        tests = [watch.test for watch in self.watches.values()]
        audited = None
        if self.audited is not None and self.audit_test is not None:
            tests.append(self.audit_test)
            audited = Audited.from_audit(self.audited)
        verdict, raised_at, reason, advice = conclude(tests, audited)
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
        )

    def _promise(self) -> float | None:
        """The promised error rate; None where nothing is accepted, or a mean over calibrations is all that is promised.

        Half of the thresholds of conformal risk control are above their target, so a rate above it breaks no promise.
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
        """What is watched: numbers of the rows that have an uncertainty."""
        scored = np.isfinite(outcomes.uncertainty)
        found: dict[TestName, Floats] = {"scores": outcomes.uncertainty[scored]}
        if self.rule is not None:
            found["acceptance"] = (~accepted[scored]).astype(np.float64)
        if self.calibration.class_names is not None and self.calibration.prediction is not None:
            if outcomes.prediction is None:
                raise DataError("the calibration rows say what was answered, these scores do not. Score them again.")
            found["answers"] = outcomes.prediction[scored].astype(np.float64)
        return found

    def _take_labels(self, outcomes: Outcomes, accepted: NDArray[np.bool_], rows: Ints) -> None:
        if self.audited is None or self.audit_test is None:
            return
        known = (outcomes.failure != UNKNOWN) & accepted
        wrong = outcomes.failure[known] == 1
        self.audit_test = self.audit_test.after(self.audited.path(wrong), rows[known])
        self.audited = self.audited.more(wrong)

    def _acceptance(self) -> Acceptance | None:
        n = self.rows - self.unscored
        since = self.accepted / n if n else None
        return None if self._coverage is None else Acceptance(calibration=self._coverage, since=since, n=n)

    def _fingerprint(self) -> str:
        """Of everything that decides what the same rows lead to."""
        content = hashlib.sha256()
        for watch in self.watches.values():
            for column in watch.reference.table():
                content.update(column.tobytes())
        rule = None if self.rule is None else self.rule.model_dump(mode="json")
        return digest([content.hexdigest(), rule, self.false_alarm, self.seed, list(self.watches)])

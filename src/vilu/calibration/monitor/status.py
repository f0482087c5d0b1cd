"""A monitor's status: the verdict, the tests behind the verdict, and advice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import attrgetter
from typing import Literal, NamedTuple

import numpy as np
from pydantic import Field

from vilu.artifacts.documents import FrozenModel
from vilu.calibration.monitor.audit import Audit, AuditVerdict, TestName
from vilu.calibration.thresholds import percent
from vilu.metrics.counts import Floats, Ints

Verdict = Literal["holds", "shifted: guarantee void", "broken"]
"""Verdicts that a monitor reaches.

"holds": no alarm. "broken": an alarm by the audit. "shifted: guarantee void": alarms, but no alarm
by the audit.
"""

# For each test, the meaning of an alarm, as a clause.
ALARM_MEANING = {
    "scores": "the uncertainties are no longer distributed as those of the calibration rows",
    "acceptance": "another share of the answers is accepted than of the calibration rows",
    "answers": "the model gives its answers in other proportions than on the calibration rows",
    "audit": "more of the accepted answers are wrong than was guaranteed",
    "outside": (
        "more of the pictures are of none of the classes than the guarantee was stated for"
    ),
    "review": "more answers are left for review than the stated shares explain",
}
ADVICE_AFTER_ALARM = (
    "Do not rely on the guaranteed risk for rows from there on. Collect labels of new rows, drawn "
    "at random, and run `vilu calibrate` on them; then begin a new monitor."
)


class Test(FrozenModel):
    """Test of the calibration's guarantee."""

    __test__ = False  # tells pytest that this is no test class

    # "scores", "acceptance" and "answers" test whether the rows are still like the calibration
    # rows. "audit" tests whether accepted answers are wrong too often. "outside" and "review" test
    # whether the shares are still the shares stated in the guarantee.
    name: TestName
    level: float = Field(gt=0, lt=1)  # probability that a false alarm is ever raised
    log_wealth: float = 0.0  # evidence now, a log wealth, with the alarm at log(1/level)
    peak: float = 0.0  # largest log wealth so far
    # number of the row with the alarm, 0 = first monitored row, None = no alarm
    raised_at: int | None = Field(default=None, ge=0)

    def after(self, log_wealth: Floats, row_numbers: Ints) -> Test:
        """Return the test after B more rows.

        ``log_wealth`` (B,) is the evidence after each of these rows, and ``row_numbers`` (B,) are
        the row numbers.
        """
        if not len(log_wealth):
            return self
        raised_at = self.raised_at
        # The alarm stays, even if the evidence falls again. Ville's inequality bounds the
        # probability that a false alarm is ever raised, so later rows need not confirm the alarm.
        indices_of_alarm = np.flatnonzero(log_wealth >= -math.log(self.level))
        if raised_at is None and len(indices_of_alarm):
            raised_at = int(row_numbers[indices_of_alarm[0]])
        return self.model_copy(
            update={
                "log_wealth": float(log_wealth[-1]),
                "peak": max(self.peak, float(log_wealth.max())),
                "raised_at": raised_at,
            }
        )

    def __str__(self) -> str:
        odds = f"odds {_odds(self.log_wealth)} against, at most {_odds(self.peak)}"
        raised = ""
        if self.raised_at is not None:
            raised = f", alarm at row {self.raised_at:,}"
        return f"{self.name:<10}  {odds}, alarm at {1 / self.level:,.0f}{raised}"


class Acceptance(FrozenModel):
    """Shares of accepted answers."""

    calibration: float  # share among the calibration rows
    since: float | None  # share among the monitored rows, None before the first row
    n: int  # number of monitored rows with an uncertainty


class Audited(FrozenModel):
    """Audit result for the labels so far. The bounds may be looked at after every label."""

    n: int  # number of audited accepted answers
    wrong: int  # number of wrong audited answers
    guarantee: float  # guaranteed largest error rate
    lower: float  # lower bound on the error rate
    upper: float  # upper bound on the error rate
    confidence: float  # 1 - delta, for each single bound
    verdict: AuditVerdict  # "holds so far", "not enough audited answers" or "broken"
    # about how many more audited answers lead to a verdict, None if no number is enough
    n_needed: int | None

    @classmethod
    def from_audit(cls, audit: Audit) -> Audited:
        """Make the result from an audit, with computed bounds."""
        return cls(
            n=audit.n_audited,
            wrong=audit.n_wrong,
            guarantee=audit.limit,
            lower=audit.lower,
            upper=audit.upper,
            confidence=1 - audit.delta,
            verdict=audit.verdict,
            n_needed=audit.n_more_needed(),
        )

    def __str__(self) -> str:
        lower = percent(self.lower, rounding=math.floor)
        confidence = percent(self.confidence, rounding=math.floor)
        bounds = f"rate {lower} to {percent(self.upper)}, each bound with confidence {confidence}"
        hint = ""
        if self.n_needed:
            hint = f"; about {self.n_needed} more would tell"
        return (
            f"{self.verdict}: {self.wrong} of {self.n} audited accepted answers are wrong "
            f"({bounds}; guaranteed: at most {percent(self.guarantee)}){hint}"
        )


class Status(FrozenModel):
    """State of a guarantee after some rows."""

    verdict: Verdict  # "holds" (no alarm so far), "shifted: guarantee void", or "broken"
    # number of the row with the first alarm (the first monitored row is 0), None = no alarm
    raised_at: int | None
    reason: str  # reason for the verdict, as a text
    advice: str  # advice for the next step, as a text
    rows: int  # number of monitored rows
    unscored: int  # number of monitored rows without an uncertainty, left out of the tests
    false_alarm: float  # bound on the probability that any test ever raises a false alarm
    tests: tuple[Test, ...]  # all tests, with ``false_alarm`` divided among the tests
    acceptance: Acceptance | None  # shares of accepted answers, None without a rule for single rows
    audit: Audited | None  # audit result, None without a guarantee for single answers
    # share of out-of-distribution images among labelled rows, as a text, None if no share was
    # stated
    present: str | None = None

    @property
    def alarm(self) -> bool:
        """Whether an alarm was raised. Do not rely on the guarantee after an alarm."""
        return self.raised_at is not None

    def __str__(self) -> str:
        since = "" if self.raised_at is None else f" (since row {self.raised_at:,})"
        lines = [f"{self.verdict}{since}: {self.reason}"]
        left_out = ""
        if self.unscored:
            left_out = f", {self.unscored:,} of them without an uncertainty and left out"
        lines.append(f"{self.rows:,} rows monitored{left_out}")
        lines += [f"  {test}" for test in self.tests]
        shares = self.acceptance
        if shares is not None and shares.since is not None:
            lines.append(
                f"accepted: {shares.since:.1%} of {shares.n:,}, {shares.calibration:.1%} before"
            )
        if self.audit is not None:
            lines.append(f"audit: {self.audit}")
        if self.present is not None:
            lines.append(f"outside: {self.present}")
        return "\n".join([*lines, self.advice])


def _odds(log_wealth: float) -> str:
    """Return the wealth as a text. A wealth of 10^6 or more is written as a power of ten."""
    if log_wealth < math.log(1e6):
        return f"{math.exp(log_wealth):,.3g}"
    return f"1e{log_wealth / math.log(10):.0f}"


class Alarm(NamedTuple):
    """Alarm by a test at a row."""

    row: int
    test: TestName


class Conclusion(NamedTuple):
    """Conclusion from all tests. The fields are the ``Status`` fields with the same names."""

    verdict: Verdict
    raised_at: int | None
    reason: str
    advice: str


def conclude(tests: Sequence[Test], audit: Audited | None) -> Conclusion:
    """Return the conclusion from the tests and the audit."""
    alarms = []
    for test in tests:
        if test.raised_at is not None:
            alarm_of_test = Alarm(row=test.raised_at, test=test.name)
            alarms.append(alarm_of_test)
    alarms.sort(key=attrgetter("row"))
    if alarms:
        first_alarm = alarms[0]
        is_broken = any(alarm.test == "audit" for alarm in alarms)
        verdict: Verdict = "broken" if is_broken else "shifted: guarantee void"
        reason = "; ".join(f"{ALARM_MEANING[alarm.test]} (row {alarm.row:,})" for alarm in alarms)
        return Conclusion(verdict, first_alarm.row, reason, ADVICE_AFTER_ALARM)
    if audit is None:
        advice = "Nothing to do; go on monitoring."
        reason = "no sign of a shift"
        return Conclusion("holds", raised_at=None, reason=reason, advice=advice)
    if audit.verdict == "holds so far":
        reason = "no sign of a shift, and the audited answers keep the guarantee"
        return Conclusion("holds", raised_at=None, reason=reason, advice="Go on monitoring.")
    n_to_label = "some"
    if audit.n_needed is not None:
        n_to_label = f"about {audit.n_needed} more"
    reason = "no sign of a shift; too few answers are audited to see the guarantee itself"
    advice = (
        f"Go on monitoring; to see the guarantee itself, label {n_to_label} accepted answers, "
        "drawn at random."
    )
    return Conclusion("holds", raised_at=None, reason=reason, advice=advice)

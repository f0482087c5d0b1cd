"""What a monitor says: the verdict, the tests behind it, and what to do next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import itemgetter
from typing import Literal

import numpy as np
from pydantic import Field

from vilu.artifacts.documents import Model
from vilu.calibration.monitor.audit import Audit, AuditVerdict, TestName
from vilu.calibration.thresholds import percent
from vilu.metrics.counts import Floats, Ints

Verdict = Literal["holds", "shifted: guarantee void", "broken"]

MEANING = {
    "scores": "the uncertainties are no longer distributed as those of the calibration rows",
    "acceptance": "another share of the answers is accepted than of the calibration rows",
    "answers": "the model gives its answers in other proportions than on the calibration rows",
    "audit": "more of the accepted answers are wrong than was guaranteed",
    "outside": (
        "more of the pictures are of none of the classes than the guarantee was stated for"
    ),
    "review": "more answers are left for review than the stated shares explain",
}
RECALIBRATE = (
    "Do not rely on the guaranteed risk for rows from there on. Collect labels of new rows, drawn "
    "at random, and run `vilu calibrate` on them; then begin a new monitor."
)


class Test(Model):
    """One test of the calibration's guarantee."""

    __test__ = False  # for pytest, which takes the name for its own

    # "scores", "acceptance" and "answers" ask whether the rows are still like those of the
    # calibration, "audit" whether accepted answers are wrong too often, "outside" and "review"
    # whether the present shares are those that a guarantee was stated for
    name: TestName
    level: float = Field(gt=0, lt=1)  # probability of a false alarm, ever
    log_wealth: float = 0.0  # evidence now; the alarm is at log(1/level)
    peak: float = 0.0  # largest evidence so far
    # row at which the alarm was raised, 0 = the first row monitored; None without
    raised_at: int | None = Field(default=None, ge=0)

    def after(self, log_wealth: Floats, rows: Ints) -> Test:
        """With the evidence after each of some further rows (B,)."""
        if not len(log_wealth):
            return self
        raised_at = self.raised_at
        # The first crossing stays, whatever the wealth does later: Ville's inequality bounds the
        # probability that it ever gets there, so an alarm needs no confirmation by later rows.
        reached = np.flatnonzero(log_wealth >= -math.log(self.level))
        if raised_at is None and len(reached):
            raised_at = int(rows[reached[0]])
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


class Acceptance(Model):
    """Shares of accepted answers."""

    calibration: float  # of the calibration rows
    since: float | None  # of the rows monitored; None before the first
    n: int  # rows monitored that have an uncertainty


class Audited(Model):
    """What the labels that have arrived say."""

    n: int  # audited accepted answers
    wrong: int  # how many of them are wrong
    guarantee: float  # the error rate that is guaranteed not to be exceeded
    # bound of the error rate from below, at all times together; ``confidence`` is of each bound
    lower: float
    upper: float  # the same from above
    confidence: float  # 1 - delta
    verdict: AuditVerdict  # "holds so far", "not enough audited answers" or "broken"
    # about how many more audited answers would tell; None where no number is known to
    n_needed: int | None

    @classmethod
    def from_audit(cls, audit: Audit) -> Audited:
        """The bounds in numbers."""
        return cls(
            n=audit.n,
            wrong=audit.wrong,
            guarantee=audit.limit,
            lower=audit.lower,
            upper=audit.upper,
            confidence=1 - audit.delta,
            verdict=audit.verdict,
            n_needed=audit.n_needed(),
        )

    def __str__(self) -> str:
        lower = percent(self.lower, 2, math.floor)
        confidence = percent(self.confidence, 2, math.floor)
        bounds = f"rate {lower} to {percent(self.upper)}, each bound with confidence {confidence}"
        more = ""
        if self.n_needed:
            more = f"; about {self.n_needed} more would tell"
        return (
            f"{self.verdict}: {self.wrong} of {self.n} audited accepted answers are wrong "
            f"({bounds}; guaranteed: at most {percent(self.guarantee)}){more}"
        )


class Status(Model):
    """The state of a guarantee after some rows."""

    verdict: Verdict  # "holds" (no alarm so far), "shifted: guarantee void", or "broken"
    # first row at which an alarm was raised, 0 = the first row monitored; None without
    raised_at: int | None
    reason: str  # why, in words
    advice: str  # what to do next
    rows: int  # rows monitored
    unscored: int  # how many of them have no uncertainty; they are left out
    # probability that any of the tests ever raises an alarm without cause is at most this
    false_alarm: float
    tests: tuple[Test, ...]  # each with its share of that
    acceptance: Acceptance | None  # shares of accepted answers; None without a rule for single rows
    audit: Audited | None  # what the labels say; None without a guarantee of single answers
    # what they say of the share of out-of-distribution images; None where none was stated
    present: str | None = None

    @property
    def alarm(self) -> bool:
        """Whether the guarantee should no longer be relied on."""
        return self.raised_at is not None

    def __str__(self) -> str:
        since = "" if self.raised_at is None else f" (since row {self.raised_at:,})"
        lines = [f"{self.verdict}{since}: {self.reason}"]
        unscored = ""
        if self.unscored:
            unscored = f", {self.unscored:,} of them without an uncertainty and left out"
        lines.append(f"{self.rows:,} rows monitored{unscored}")
        lines += [f"  {test}" for test in self.tests]
        accepted = self.acceptance
        if accepted is not None and accepted.since is not None:
            before = f"{accepted.calibration:.1%} before"
            lines.append(f"accepted: {accepted.since:.1%} of {accepted.n:,}, {before}")
        if self.audit is not None:
            lines.append(f"audit: {self.audit}")
        if self.present is not None:
            lines.append(f"outside: {self.present}")
        return "\n".join([*lines, self.advice])


def _odds(log_wealth: float) -> str:
    """Wealth as a number that can be read."""
    if log_wealth < math.log(1e6):
        return f"{math.exp(log_wealth):,.3g}"
    return f"1e{log_wealth / math.log(10):.0f}"


def conclude(tests: Sequence[Test], audit: Audited | None) -> tuple[Verdict, int | None, str, str]:
    """Verdict, row, reason and advice that follow from the tests."""
    alarms = []
    for test in tests:
        if test.raised_at is not None:
            alarms.append((test.raised_at, test.name))
    alarms.sort(key=itemgetter(0))
    if alarms:
        first, _ = alarms[0]
        is_broken = any(name == "audit" for _, name in alarms)
        verdict: Verdict = "broken" if is_broken else "shifted: guarantee void"
        reason = "; ".join(f"{MEANING[name]} (row {row:,})" for row, name in alarms)
        return verdict, first, reason, RECALIBRATE
    if audit is None:
        return "holds", None, "no sign of a shift", "Nothing to do; go on monitoring."
    if audit.verdict == "holds so far":
        reason = "no sign of a shift, and the audited answers keep the guarantee"
        return "holds", None, reason, "Go on monitoring."
    more = "some"
    if audit.n_needed is not None:
        more = f"about {audit.n_needed} more"
    reason = "no sign of a shift; too few answers are audited to see the guarantee itself"
    advice = (
        f"Go on monitoring; to see the guarantee itself, label {more} accepted answers, drawn at "
        "random."
    )
    return "holds", None, reason, advice

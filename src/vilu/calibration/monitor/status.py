"""What a monitor says: the verdict, the tests behind it, and what to do next."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    "audit": "more of the accepted answers are wrong than was promised",
    "outside": "more of the pictures are of none of the classes than the promise was stated for",
    "review": "more answers are left for review than the stated shares explain",
}
RECALIBRATE = (
    "Do not rely on the promised risk for rows from there on. Collect labels of new rows, drawn at "
    "random, and run `vilu calibrate` on them; then begin a new monitor."
)


class Test(Model):
    """One test of the calibration's guarantee."""

    __test__ = False  # for pytest, which takes the name for its own

    # "scores", "acceptance" and "answers" ask whether the rows are still like those of the
    # calibration, "audit" whether accepted answers are wrong too often, "outside" and "review"
    # whether the present shares are those that a promise was stated for
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
        reached = np.flatnonzero(log_wealth >= -math.log(self.level))
        first = int(rows[reached[0]]) if len(reached) else None
        return self.model_copy(
            update={
                "log_wealth": float(log_wealth[-1]),
                "peak": max(self.peak, float(log_wealth.max())),
                "raised_at": first if self.raised_at is None else self.raised_at,
            }
        )


class Acceptance(Model):
    """Shares of accepted answers."""

    calibration: float  # of the calibration rows
    since: float | None  # of the rows monitored; None before the first
    n: int  # rows monitored that have an uncertainty


class Audited(Model):
    """What the labels that have arrived say."""

    n: int  # audited accepted answers
    wrong: int  # how many of them are wrong
    promise: float  # the largest error rate that was promised
    # bound of the error rate from below, at all times together; ``confidence`` is of each bound
    lower: float
    upper: float  # the same from above
    confidence: float  # 1 - delta
    verdict: AuditVerdict  # "holds so far", "not enough audited answers" or "broken"
    n_needed: (
        int | None
    )  # about how many more audited answers would tell; None where no number is known to

    @classmethod
    def from_audit(cls, audit: Audit) -> Audited:
        """The bounds in numbers."""
        found = {
            name: getattr(audit, name)
            for name in ("n", "wrong", "promise", "lower", "upper", "verdict")
        }
        return cls(**found, confidence=1 - audit.delta, n_needed=audit.n_needed())

    def __str__(self) -> str:
        found = f"{self.wrong} of {self.n} audited accepted answers are wrong"
        ends = f"{percent(self.lower, 2, math.floor)} to {percent(self.upper)}"
        bounds = (
            f"rate {ends}, each bound with confidence {percent(self.confidence, 2, math.floor)}"
        )
        more = "" if not self.n_needed else f"; about {self.n_needed} more would tell"
        return (
            f"{self.verdict}: {found} ({bounds}; promised: at most {percent(self.promise)}){more}"
        )


class Status(Model):
    """The state of a guarantee after some rows."""

    verdict: Verdict  # "holds" (no alarm so far), "shifted: guarantee void", or "broken"
    raised_at: (
        int | None
    )  # first row at which an alarm was raised, 0 = the first row monitored; None without
    reason: str  # why, in words
    advice: str  # what to do next
    rows: int  # rows monitored
    unscored: int  # how many of them have no uncertainty; they are left out
    # probability that any of the tests ever raises an alarm without cause is at most this
    false_alarm: float
    tests: tuple[Test, ...]  # each with its share of that
    acceptance: Acceptance | None  # shares of accepted answers; None without a rule for single rows
    audit: Audited | None  # what the labels say; None without a promise
    present: str | None = (
        None  # what they say of the share of strangers, in words; None where none was stated
    )

    @property
    def alarm(self) -> bool:
        """Whether the guarantee should no longer be relied on."""
        return self.raised_at is not None

    def __str__(self) -> str:
        since = "" if self.raised_at is None else f" (since row {self.raised_at:,})"
        lines = [f"{self.verdict}{since}: {self.reason}"]
        unscored = (
            f", {self.unscored:,} of them without an uncertainty and left out"
            if self.unscored
            else ""
        )
        lines.append(f"{self.rows:,} rows monitored{unscored}")
        for test in self.tests:
            raised = "" if test.raised_at is None else f", alarm at row {test.raised_at:,}"
            odds = f"odds {_odds(test.log_wealth)} against, at most {_odds(test.peak)}, alarm at {1 / test.level:,.0f}"
            lines.append(f"  {test.name:<10}  {odds}{raised}")
        if self.acceptance is not None and self.acceptance.since is not None:
            shares = f"{self.acceptance.since:.1%} of {self.acceptance.n:,}, {self.acceptance.calibration:.1%} before"
            lines.append(f"accepted: {shares}")
        if self.audit is not None:
            lines.append(f"audit: {self.audit}")
        if self.present is not None:
            lines.append(f"outside: {self.present}")
        return "\n".join([*lines, self.advice])


def _odds(log_wealth: float) -> str:
    """Wealth as a number that can be read."""
    return (
        f"{math.exp(log_wealth):,.3g}"
        if log_wealth < math.log(1e6)
        else f"1e{log_wealth / math.log(10):.0f}"
    )


def conclude(tests: Sequence[Test], audit: Audited | None) -> tuple[Verdict, int | None, str, str]:
    """Verdict, row, reason and advice that follow from the tests."""
    raised = sorted((t for t in tests if t.raised_at is not None), key=lambda t: t.raised_at or 0)
    if raised:
        broken = any(test.name == "audit" for test in raised)
        reason = "; ".join(f"{MEANING[test.name]} (row {test.raised_at:,})" for test in raised)
        return (
            "broken" if broken else "shifted: guarantee void",
            raised[0].raised_at,
            reason,
            RECALIBRATE,
        )
    if audit is None:
        return "holds", None, "no sign of a shift", "Nothing to do; go on monitoring."
    if audit.verdict == "holds so far":
        return (
            "holds",
            None,
            "no sign of a shift, and the audited answers keep the promise",
            "Go on monitoring.",
        )
    more = "some" if audit.n_needed is None else f"about {audit.n_needed} more"
    advice = f"Go on monitoring; to see the promise itself, label {more} accepted answers, drawn at random."
    return (
        "holds",
        None,
        "no sign of a shift; too few answers are audited to see the promise itself",
        advice,
    )

"""A threshold, or one per group of rows, with what it promises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from vilu.document import Model
from vilu.errors import UsageError
from vilu.metrics.counts import Floats, real_vector

ALL, OTHER = "", "(other)"
"""Names of the group of all rows, and of the group of what has too few calibration rows for a group of its own."""

Promise = Literal["ltt", "sgr", "crc"]


class Certificate(Model):
    """A threshold and the calibration rows behind it.

    Attributes:
        threshold: Accept where the uncertainty is at most this; None: accept nothing.
        n: Calibration rows.
        n_accepted: How many of them the threshold accepts.
        n_wrong: How many of those are wrong.
        risk_bound: What is promised; None where nothing is accepted.
        why: Why nothing is accepted.
        n_needed: About how many calibration rows would be enough; None where it is enough, or no number is known to be.
    """

    threshold: float | None
    n: int = Field(ge=0)
    n_accepted: int = Field(ge=0)
    n_wrong: int = Field(ge=0)
    risk_bound: float | None
    why: str | None = None
    n_needed: int | None = None

    @property
    def coverage(self) -> float:
        """Share of the calibration rows that is accepted."""
        return self.n_accepted / self.n if self.n else 0.0


class Selector(Model):
    """Accepts answers whose uncertainty is at most a threshold, one for all rows or one per group.

    Attributes:
        method: "ltt", "sgr" or "crc".
        max_risk: The target; None where a coverage was asked for alone.
        min_coverage: Least coverage asked for; None for any.
        confidence: 1 - delta; with several groups the promises hold for all of them together with it.
        certificates: Per group; one group "" without groups.
        grouped_by: "prediction" (the zero-shot answer), "groups" (given by the caller), or None.
    """

    kind: Literal["threshold"] = "threshold"
    needs_batch: ClassVar[bool] = False

    method: Promise
    max_risk: float | None = Field(ge=0, le=1)
    min_coverage: float | None = Field(gt=0, le=1)
    confidence: float = Field(gt=0, lt=1)
    grouped_by: Literal["prediction", "groups"] | None = None
    certificates: dict[str, Certificate]

    @property
    def feasible(self) -> bool:
        """Whether anything is accepted."""
        return self.n_accepted > 0

    @property
    def n(self) -> int:
        """Calibration rows."""
        return sum(one.n for one in self.certificates.values())

    @property
    def n_accepted(self) -> int:
        """Calibration rows that are accepted."""
        return sum(one.n_accepted for one in self.certificates.values())

    @property
    def n_wrong(self) -> int:
        """Accepted calibration rows that are wrong."""
        return sum(one.n_wrong for one in self.certificates.values())

    @property
    def coverage(self) -> float:
        """Share of the calibration rows that is accepted."""
        return self.n_accepted / self.n

    @property
    def risk_bound(self) -> float | None:
        """What is promised; with groups the largest of their bounds."""
        bounds = [one.risk_bound for one in self.certificates.values() if one.risk_bound is not None]
        return max(bounds) if bounds else None

    @property
    def threshold(self) -> float | None:
        """Accept where the uncertainty is at most this; None: accept nothing.

        Raises:
            UsageError: If every group has its own.
        """
        if self.grouped_by is not None:
            raise UsageError("this selector has a threshold per group: see its certificates.")
        return self.certificates[ALL].threshold

    def thresholds(self, n: int, groups: Sequence[str] | None) -> Floats:
        """(N,) threshold of every row, -inf where its group accepts nothing; groups without their own are "(other)"."""
        if self.grouped_by is None:
            groups = [ALL] * n
        elif groups is None or len(groups) != n:
            raise UsageError(f"this selector has a threshold per group and needs the group of each of the {n} rows.")
        limits = {name: one.threshold for name, one in self.certificates.items()}
        other = limits.get(OTHER)
        found = [limits.get(name, other) for name in groups]
        return np.array([-np.inf if limit is None else limit for limit in found], dtype=np.float64)

    def accept(self, uncertainty: ArrayLike, groups: Sequence[str] | None = None) -> NDArray[np.bool_]:
        """(N,) whether each answer is accepted; one without an uncertainty (NaN) is not.

        Args:
            uncertainty: (N,) of the same predictor as the calibration rows.
            groups: N names of groups, where the selector has them.

        Raises:
            UsageError: If groups are needed and not given.
            DataError: If ``uncertainty`` is no vector of numbers.
        """
        scores = real_vector(uncertainty, "uncertainty")
        accepted: NDArray[np.bool_] = scores <= self.thresholds(len(scores), groups)
        return accepted

    def reasons(self, uncertainty: ArrayLike, groups: Sequence[str] | None = None) -> list[str | None]:
        """Per row why it is not accepted: "above_threshold", "not_certified" (its group accepts nothing); else None."""
        scores = real_vector(uncertainty, "uncertainty")
        limits = self.thresholds(len(scores), groups)
        return [
            None if score <= limit else "not_certified" if limit == -np.inf else "above_threshold"
            for score, limit in zip(scores.tolist(), limits.tolist(), strict=True)
        ]

    def __str__(self) -> str:
        lines = [self._promise()]
        if self.grouped_by is not None:
            lines += [f"  {name}: {describe(one)}" for name, one in self.certificates.items()]
        return "\n".join(lines)

    def _promise(self) -> str:
        bound = self.risk_bound
        if bound is None:
            return "nothing is accepted"
        sure = f"with confidence {self.confidence:.0%}" if self.method != "crc" else "on average"
        what = "of all answers are accepted and wrong" if self.method == "crc" else "of the accepted answers are wrong"
        found = f"{self.n_wrong} wrong of {self.n_accepted} accepted, of {self.n} calibration rows"
        return f"accepts {self.coverage:.1%}; {sure} at most {bound:.2%} {what} ({found})"


def describe(certificate: Certificate) -> str:
    """A certificate in words."""
    if certificate.threshold is None:
        return f"accepts nothing: {certificate.why}"
    found = f"{certificate.n_wrong} wrong of {certificate.n_accepted} accepted, of {certificate.n}"
    return f"uncertainty <= {certificate.threshold:.6g} accepts {certificate.coverage:.1%} ({found})"

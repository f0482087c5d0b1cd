"""Conformal selection: which answers of a whole batch to accept, so that few of the accepted ones are wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from vilu.artifacts.documents import Model
from vilu.calibration.rules import evaluable
from vilu.calibration.thresholds import percent, rows_for_mean
from vilu.calibration.units import CountedRows, count_once
from vilu.errors import InfeasibleError
from vilu.metrics.counts import Floats, Ints, real_vector
from vilu.outcomes.outcomes import Outcomes
from vilu.validation import require_between

MAX_ROWS = (
    10**6
)  # of a calibration; more would not move a p-value visibly, and they all stand in ``risk.json``


class BatchSelector(Model):
    """Accepts part of a batch such that E[share of wrong ones among the accepted] <= max_risk.

    The p-value of an answer is p = (1 + #{wrong calibration answers with u_i <= u}) / (1 + n), over
    all n calibration answers: how rarely an answer is wrong and trusted as much. Benjamini-Hochberg
    at level max_risk over the batch then bounds the mean share of wrong answers among the accepted
    (0 where none is), over draws of calibration rows and batch. The batch decides the threshold, so
    a row's decision depends on its neighbours, and rows must be judged together.

    Source: Jin & Candès, Selection by Prediction with Conformal p-values (2023), with "the answer
    is wrong" for null and their clipped score. With 1 + #wrong for 1 + n (Bates et al. 2023) the
    bound is max_risk times the share of wrong answers, and less is accepted.
    """

    kind: Literal["selection"] = "selection"
    needs_batch: ClassVar[bool] = True
    grouped_by: ClassVar[None] = None

    max_risk: float = Field(gt=0, lt=1)  # level of the false discovery rate
    n: int = Field(ge=1)  # calibration rows
    wrong: tuple[float, ...]  # uncertainties of the wrong ones, ascending
    # how many files and pictures they are; None where every file shows another picture
    counted: CountedRows | None = None

    def p_values(self, uncertainty: ArrayLike) -> Floats:
        """(N,) conformal p-values; NaN where there is no uncertainty."""
        scores = real_vector(uncertainty, "uncertainty")
        p: Floats = (1 + np.searchsorted(self.wrong, scores, side="right")) / (1 + self.n)
        return np.where(np.isnan(scores), np.nan, p)

    def accept(
        self,
        uncertainty: ArrayLike,
        groups: Sequence[str] | None = None,  # noqa: ARG002
    ) -> NDArray[np.bool_]:
        """(N,) which answers of this batch are accepted; one without an uncertainty is not, and does not count."""
        p = self.p_values(uncertainty)
        scored = np.isfinite(p)
        ordered = np.sort(p[scored])
        m = len(ordered)
        passed = np.flatnonzero(ordered <= self.max_risk * np.arange(1, m + 1) / max(m, 1))
        cut = ordered[passed[-1]] if len(passed) else -np.inf
        return scored & (p <= cut)

    def reasons(
        self, uncertainty: ArrayLike, groups: Sequence[str] | None = None
    ) -> list[str | None]:
        """Per row why it is not accepted: "not_selected"; else None."""
        return [
            None if accepted else "not_selected" for accepted in self.accept(uncertainty, groups)
        ]

    def __str__(self) -> str:
        counted = "" if self.counted is None else f": {self.counted}"
        return (
            f"accepts what it can of a batch, of which on average at most {percent(self.max_risk)} are wrong "
            f"({len(self.wrong)} wrong of {self.n} calibration rows{counted})"
        )


def drawn(n: int) -> Ints:
    """Places of the rows of n that a rule is made from: at random, as rows may lie sorted, and the same every time."""
    return np.argsort(np.random.PCG64([MAX_ROWS, n]).random_raw(n))[
        :MAX_ROWS
    ]  # a stream that NumPy never changes


def select(outcomes: Outcomes, *, max_risk: float) -> BatchSelector:
    """Conformal selection from at most a million calibration outcomes; see ``BatchSelector``.

    Rows of one ``picture`` count once, as wrong where any of them is.
    """
    require_between("max_risk", max_risk)
    rows, counted = count_once(outcomes, evaluable(outcomes))
    rows = rows[drawn(len(rows))]
    fewest = rows_for_mean(max_risk)
    if len(rows) < fewest:
        raise InfeasibleError(
            f"with {len(rows)} calibration rows no answer can be selected at a risk of {percent(max_risk)}: no p-value "
            f"is below 1 / {len(rows) + 1}. At least {fewest} rows are needed."
        )
    wrong = np.sort(outcomes.uncertainty[rows][outcomes.failure[rows] == 1])
    return BatchSelector(
        max_risk=max_risk, n=len(rows), wrong=tuple(wrong.tolist()), counted=counted
    )

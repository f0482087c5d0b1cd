"""Confusions that cost the most: the failures of a data set by their answers and their truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from vilu.errors import OUTSIDE, UNKNOWN, DataError, UsageError
from vilu.metrics.counts import Floats, Ints
from vilu.outcomes.outcomes import Outcomes
from vilu.report.explain.explain import Findings, first_lines
from vilu.report.explain.rows import class_name
from vilu.report.figures import probability
from vilu.validation import checked, require_between


@dataclass(frozen=True)
class Confusion:
    """Answers of one kind that are wrong in one way."""

    answer: str  # what was answered
    # what was true, or that the pictures were of none of the classes; without labels the strongest
    # competitor
    instead: str
    failures: float  # how many; without labels the sum of the probabilities of failure
    share: float  # of all failures
    uncertainty: float  # mean of their uncertainties, each row counting as much as it is a failure
    # how many of them are among the accepted answers; of tied rows at the threshold the expected
    # number
    accepted: float
    # ``accepted`` over the number of accepted answers: what they add to the selective risk
    risk: float

    def cells(self) -> tuple[str, ...]:
        """Its row of a table."""
        return (
            self.answer,
            self.instead,
            f"{self.failures:.1f}",
            f"{self.share:.1%}",
            f"{self.uncertainty:.3f}",
            f"{self.accepted:.1f}",
            f"{self.risk:.2%}",
        )


@dataclass(frozen=True)
class RiskMap(Findings):
    """Confusions, the costliest first."""

    kind: ClassVar[str] = "risk_map"

    rows: tuple[Confusion, ...]  # by ``risk``, falling, then by ``failures``
    coverage: float  # share of the answers that are accepted, the most trusted ones
    threshold: float  # largest uncertainty among them
    n: int  # rows counted
    failures: float  # of all of them: their number, or the sum of the probabilities
    risk: float  # selective risk at that coverage: the sum of ``risk`` over all confusions
    # whether failures were counted; else they are expected ones, and as good as the probabilities
    labelled: bool
    n_left_out: int  # rows without score, or without label where others have one

    def __str__(self) -> str:
        if self.labelled:
            instead = "true"
            failures = "failures"
            are = "are"
        else:
            instead = "competitor"
            failures = "expected failures"
            are = "are expected to be"
        left_out = ""
        if self.n_left_out:
            left_out = f"; {self.n_left_out:,} rows without score or label left out"
        head = (
            f"{self.failures:,.1f} {failures} in {self.n:,} answers{left_out}. "
            f"Of the {self.coverage:.0%} most trusted "
            f"(uncertainty up to {self.threshold:.4g}) {self.risk:.2%} {are} wrong."
        )
        measures = ("of all", "mean uncertainty", "accepted", "accepted risk")
        heading = ("answered", instead, failures, *measures)
        cells = [row.cells() for row in self.rows]
        return "\n".join([head, "", *first_lines(heading, cells, "confusions")])


@checked
def risk_map(
    outcomes: Outcomes, competitor: ArrayLike | None = None, *, coverage: float = 0.8
) -> RiskMap:
    """Confusions that cost the most accepted risk.

    The ceil(coverage N) answers of least uncertainty are accepted, as in
    ``vilu.metrics.risk_at_coverage``. With w_i the failure of row i, a_i whether (of ties: with
    what share) it is accepted and A = sum_i a_i, the confusion of answer j with truth k costs sum_i
    w_i a_i / A over its rows, and these add up to the selective risk. Where no row has a label, w_i
    is the probability of failure and the truth is replaced by ``competitor``.

    Args:
        outcomes: As from ``vilu.score``, with predictions and shared candidates.
        competitor: (N,) strongest candidate beside the answer, for outcomes without labels
            (``vilu.report.explain.competitors.strongest_competitor``).
        coverage: Share of answers to accept.

    Raises:
        UsageError: If the outcomes are of captions, which have no classes; if ``coverage`` is not
            in (0, 1]; if there are no labels and the uncertainty is no probability, or no
            competitors are given.
        DataError: If no row has a score and an answer.

    Examples:
        >>> import vilu
        >>> uncertainty, failure = [0.1, 0.2, 0.3, 0.4, 0.9], [0, 1, 0, 0, 1]
        >>> answers = {"prediction": [0, 0, 1, 1, 2], "target": [0, 1, 1, 1, 0]}
        >>> outcomes = vilu.Outcomes(
        ...     uncertainty, failure, **answers, class_names=["cat", "dog", "cup"]
        ... )
        >>> for row in vilu.risk_map(outcomes, coverage=0.8).rows:  # four of five are accepted
        ...     print(row.answer, "instead of", row.instead, row.accepted, row.risk)
        cat instead of dog 1.0 0.25
        cup instead of cat 0.0 0.0
    """
    if outcomes.provenance.get("pool_size") is not None:
        raise UsageError(
            "captions have no classes to confuse, so there is no risk map of them. Give class data."
        )
    require_between("coverage", coverage, "(0, 1]")
    prediction = _answers(outcomes)
    is_counted = np.isfinite(outcomes.uncertainty) & (prediction != UNKNOWN)
    is_judged = is_counted & (outcomes.failure != UNKNOWN)
    labelled = bool(is_judged.any())
    if labelled:
        is_counted = is_judged
    instead = _instead(outcomes, competitor, labelled=labelled)
    rows = np.flatnonzero(is_counted)
    if not len(rows):
        raise DataError(f"none of the {len(outcomes)} rows has both a score and an answer.")
    uncertainty = outcomes.uncertainty[rows]
    failure = outcomes.failure if labelled else _probability(outcomes)
    weight = failure[rows].astype(np.float64)
    accepted, threshold = acceptance(uncertainty, coverage)
    pairs = (prediction[rows], instead[rows])
    confusions = _confusions(pairs, uncertainty, weight, accepted, outcomes.class_names)
    return RiskMap(
        rows=tuple(sorted(confusions, key=_costliest_first)),
        coverage=coverage,
        threshold=threshold,
        n=len(rows),
        failures=float(weight.sum()),
        risk=float((weight * accepted).sum() / accepted.sum()),
        labelled=labelled,
        n_left_out=len(outcomes) - len(rows),
    )


def _answers(outcomes: Outcomes) -> Ints:
    """(N,) the zero-shot answers."""
    if outcomes.prediction is None:
        raise DataError(
            "a risk map needs the answers, and these outcomes have none. "
            "Score again with vilu score."
        )
    return outcomes.prediction


def _costliest_first(confusion: Confusion) -> tuple[float, float, str, str]:
    """The key that sorts confusions; ties go by their names."""
    return -confusion.risk, -confusion.failures, confusion.answer, confusion.instead


def _probability(outcomes: Outcomes) -> Floats:
    """(N,) the calibrated probability of failure, or else an uncertainty that is one."""
    probabilities = probability(outcomes)
    if probabilities is None:
        raise UsageError(
            "without labels failures are expected from probabilities, "
            f"and {outcomes.method} gives a score. "
            "Calibrate it (`vilu calibrate`), take vilu_plus, or give labels."
        )
    return probabilities


def _instead(outcomes: Outcomes, competitor: ArrayLike | None, *, labelled: bool) -> Ints:
    """(N,) the truth of each row; without labels its strongest competitor."""
    if labelled:
        if outcomes.target is None:
            raise DataError(
                "a risk map needs the right answers, "
                "and these outcomes have failures but no targets."
            )
        return np.where(outcomes.outside, OUTSIDE, outcomes.target)
    _probability(outcomes)
    if competitor is None:
        raise UsageError(
            "without labels a risk map needs the strongest competitor of every answer."
        )
    competitors = np.asarray(competitor, dtype=np.int64)
    if competitors.shape != outcomes.uncertainty.shape:
        raise DataError(
            f"competitor must have one entry per row ({len(outcomes)}). "
            f"Got shape {competitors.shape} instead."
        )
    return competitors


def acceptance(uncertainty: Floats, coverage: float) -> tuple[Floats, float]:
    """(N,) share of each row that is accepted, and the threshold.

    A share is 1 below the threshold and 0 above; tied rows at the threshold share what is left of
    ceil(coverage N).
    """
    # rounding first: 0.07 · 100 is a little more than 7
    n = int(np.ceil(np.round(len(uncertainty) * coverage, 9)))
    threshold = float(np.partition(uncertainty, n - 1)[n - 1])
    accepted = (uncertainty < threshold).astype(np.float64)
    tied = uncertainty == threshold
    accepted[tied] = (n - accepted.sum()) / np.count_nonzero(tied)
    return accepted, threshold


def _confusions(
    pairs: tuple[Ints, Ints],
    uncertainty: Floats,
    weight: Floats,
    accepted: Floats,
    names: Sequence[str] | None,
) -> list[Confusion]:
    """One entry per pair of answer and truth that has a failure in it."""
    distinct, inverse = np.unique(np.stack(pairs, axis=1), axis=0, return_inverse=True)
    group = inverse.ravel()
    n_groups = len(distinct)
    failures = np.bincount(group, weights=weight, minlength=n_groups).tolist()
    doubt = np.bincount(group, weights=weight * uncertainty, minlength=n_groups).tolist()
    cost = np.bincount(group, weights=weight * accepted, minlength=n_groups).tolist()
    confusions = []
    for number, (answer, instead) in enumerate(distinct.tolist()):
        n_failures = failures[number]
        if n_failures > 0:
            confusion = Confusion(
                answer=class_name(names, answer),
                instead=class_name(names, instead),
                failures=n_failures,
                share=float(n_failures / weight.sum()),
                uncertainty=doubt[number] / n_failures,
                accepted=cost[number],
                risk=float(cost[number] / accepted.sum()),
            )
            confusions.append(confusion)
    return confusions

"""A data set's failures, grouped by the wrong answer and the true class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from vilu.errors import OUTSIDE, UNKNOWN, DataError, UsageError
from vilu.metrics.counts import Floats, Ints
from vilu.outcomes.outcomes import Outcomes
from vilu.report.explain.explain import Findings, first_table_lines
from vilu.report.explain.rows import class_name
from vilu.report.figures import failure_probability_of
from vilu.validation import checked, require_between


@dataclass(frozen=True)
class Confusion:
    """The failures with the same wrong answer and the same true class.

    Without labels, the answer's strongest competitor takes the place of the true class. A row then
    counts as a fraction of a failure: the row's failure probability.
    """

    answer: str  # name of the answered class
    instead: str  # name of the true class, or "none of the classes"
    failures: float  # failure count. Without labels, the sum of the failure probabilities
    share: float  # ``failures`` divided by the failures in all confusions
    # mean uncertainty of the failures. Without labels, the mean over all rows of the confusion,
    # weighted by the failure probabilities.
    uncertainty: float
    # failure count among the accepted answers. For ties at the threshold, an expected count.
    accepted: float
    # share of the selective risk: ``accepted`` divided by the number of all accepted answers
    risk: float

    def cells(self) -> tuple[str, ...]:
        """Return the cells of this confusion's row in the printed table."""
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
    """All confusions. The confusion that adds most to the selective risk comes first."""

    kind: ClassVar[str] = "risk_map"

    rows: tuple[Confusion, ...]  # by descending ``risk``, then by descending ``failures``
    coverage: float  # share of accepted answers, which are the least uncertain answers
    threshold: float  # largest uncertainty of an accepted answer
    n: int  # number of counted rows
    failures: float  # failures in all counted rows. Without labels, the sum of the probabilities
    risk: float  # selective risk at this coverage, equal to the sum of ``risk`` over ``rows``
    # True: the failures were counted. False: failures are expected numbers, sums of probabilities.
    labelled: bool
    # rows without a score or answer and, if any row has a label, rows without a label
    n_left_out: int
    answer: str = "zero_shot"  # kind of judged answers, as in ``vilu.Outcomes``

    def __str__(self) -> str:
        if self.labelled:
            title_of_right_class = "true"
            failures = "failures"
            verb = "are"
        else:
            title_of_right_class = "competitor"
            failures = "expected failures"
            verb = "are expected to be"
        left_out = ""
        if self.n_left_out:
            left_out = f"; {self.n_left_out:,} rows without score or label left out"
        answers = "answers"
        if self.answer != "zero_shot":
            answers = f"{self.answer} answers"
        head = (
            f"{self.failures:,.1f} {failures} in {self.n:,} {answers}{left_out}. "
            f"Of the {self.coverage:.0%} most trusted "
            f"(uncertainty up to {self.threshold:.4g}) {self.risk:.2%} {verb} wrong."
        )
        measures = ("of all", "mean uncertainty", "accepted", "accepted risk")
        heading = ("answered", title_of_right_class, failures, *measures)
        cells = [row.cells() for row in self.rows]
        table_lines = first_table_lines(heading, cells, noun="confusions")
        return "\n".join([head, "", *table_lines])


@checked
def risk_map(
    outcomes: Outcomes, competitor: ArrayLike | None = None, *, coverage: float = 0.8
) -> RiskMap:
    """Find the confusions that add most to the risk among the accepted answers.

    Of N answers, the ceil(coverage * N) least uncertain answers are accepted, as in
    ``vilu.metrics.risk_at_coverage``. Every row i has a weight w_i and an acceptance a_i:

    - w_i is 1 for a failure and 0 for a success.
    - a_i is 1 for an accepted row and 0 for a rejected row. If a row's uncertainty equals the
      threshold, a_i is between 0 and 1, such that sum_i a_i = ceil(coverage * N).

    The confusion of answer j with truth k adds to the selective risk

        sum_i w_i a_i / sum_i a_i

    The first sum is over the rows i with answer j and truth k. The second sum is over all rows.

    If no row has a label, w_i is the failure probability, and ``competitor`` replaces the truth.

    Args:
        outcomes: As from ``vilu.score``, with predictions and shared candidates.
        competitor: (N,) strongest candidate except the answer. Needed only without labels. See
            ``vilu.report.explain.competitors.strongest_competitor``.
        coverage: Share of answers to accept.

    Raises:
        UsageError: If the outcomes are from captions, because captions have no classes. If
            ``coverage`` is not in (0, 1]. If there are no labels, and ``competitor`` is None or the
            outcomes have no failure probabilities.
        DataError: If no row has a score and an answer.

    Examples:
        >>> import vilu
        >>> outcomes = vilu.Outcomes(
        ...     uncertainty=[0.1, 0.2, 0.3, 0.4, 0.9],
        ...     failure=[0, 1, 0, 0, 1],
        ...     prediction=[0, 0, 1, 1, 2],  # "cat" instead of "dog", "cup" instead of "cat"
        ...     target=[0, 1, 1, 1, 0],
        ...     class_names=["cat", "dog", "cup"],
        ... )
        >>> risks = vilu.risk_map(outcomes, coverage=0.8)  # all rows but the last are accepted
        >>> [(row.answer, row.instead, row.risk) for row in risks.rows]  # 1 failure in 4 rows
        [('cat', 'dog', 0.25), ('cup', 'cat', 0.0)]
    """
    if outcomes.provenance.get("pool_size") is not None:
        raise UsageError(
            "captions have no classes to confuse, so there is no risk map of them. Give class data."
        )
    require_between("coverage", coverage, "(0, 1]")
    prediction = _judged_answers(outcomes)
    is_scored = np.isfinite(outcomes.uncertainty) & (prediction != UNKNOWN)
    is_scored_and_labelled = is_scored & (outcomes.failure != UNKNOWN)
    labelled = bool(is_scored_and_labelled.any())
    right_class = _true_or_competing_class(outcomes, competitor, labelled=labelled)
    # if any row has a label, only the rows with a label are counted
    rows = np.flatnonzero(is_scored_and_labelled if labelled else is_scored)
    if not len(rows):
        raise DataError(f"none of the {len(outcomes)} rows has both a score and an answer.")
    uncertainty = outcomes.uncertainty[rows]
    weight_of_all = outcomes.failure if labelled else _require_probability(outcomes)
    weight = weight_of_all[rows].astype(np.float64)
    accepted, threshold = acceptance(uncertainty, coverage)
    confusions = _confusions(
        prediction[rows],
        right_class[rows],
        uncertainty=uncertainty,
        weight=weight,
        accepted=accepted,
        names=outcomes.class_names,
    )
    return RiskMap(
        rows=tuple(sorted(confusions, key=_costliest_first)),
        coverage=coverage,
        threshold=threshold,
        n=len(rows),
        failures=float(weight.sum()),
        risk=float((weight * accepted).sum() / accepted.sum()),
        labelled=labelled,
        n_left_out=len(outcomes) - len(rows),
        answer=outcomes.answer,
    )


def _judged_answers(outcomes: Outcomes) -> Ints:
    """Return the judged answers (N,)."""
    if outcomes.prediction is None:
        raise DataError(
            "a risk map needs the answers, and these outcomes have none. "
            "Score again with vilu score."
        )
    return outcomes.prediction


def _costliest_first(confusion: Confusion) -> tuple[float, float, str, str]:
    """Return a sort key: descending risk, then descending failures, then ascending names."""
    return -confusion.risk, -confusion.failures, confusion.answer, confusion.instead


def _require_probability(outcomes: Outcomes) -> Floats:
    """Return calibrated failure probabilities (N,), or else uncertainties that are probabilities.

    UsageError if the outcomes have neither.
    """
    probabilities = failure_probability_of(outcomes)
    if probabilities is None:
        raise UsageError(
            "without labels, the number of failures is estimated from probabilities, "
            f"but {outcomes.method} gives a score that is no probability. "
            "Calibrate it (`vilu calibrate`), take vilu_plus, or give labels."
        )
    return probabilities


def _true_or_competing_class(
    outcomes: Outcomes, competitor: ArrayLike | None, *, labelled: bool
) -> Ints:
    """Return the true class (N,), or without labels the answer's strongest competitor."""
    if labelled:
        if outcomes.target is None:
            raise DataError(
                "a risk map needs the right answers, "
                "and these outcomes have failures but no targets."
            )
        return np.where(outcomes.outside, OUTSIDE, outcomes.target)
    _require_probability(outcomes)  # raises UsageError if there is no probability
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
    """Compute each row's acceptance (N,) between 0 and 1. Also return the threshold.

    Rows below the threshold have acceptance 1, and rows above the threshold have acceptance 0. Rows
    at the threshold have equal acceptances, such that all acceptances sum up to ceil(coverage * N).
    """
    # The product is rounded before the ceiling: in floating point, 0.07 · 100 is a little above 7.
    n_covered = np.round(len(uncertainty) * coverage, 9)
    n_accepted = int(np.ceil(n_covered))
    last_accepted = n_accepted - 1  # index in ascending order of uncertainty
    threshold = float(np.partition(uncertainty, last_accepted)[last_accepted])
    accepted = (uncertainty < threshold).astype(np.float64)
    is_tied = uncertainty == threshold
    accepted[is_tied] = (n_accepted - accepted.sum()) / np.count_nonzero(is_tied)
    return accepted, threshold


def _confusions(
    answer_of_row: Ints,
    right_class_of_row: Ints,
    *,
    uncertainty: Floats,
    weight: Floats,
    accepted: Floats,
    names: Sequence[str] | None,
) -> list[Confusion]:
    """Make a confusion for each pair of an answered class and a right class with a failure.

    Args:
        answer_of_row: (N,) answered class.
        right_class_of_row: (N,) true class. Without labels the strongest competitor.
        uncertainty: (N,) uncertainty.
        weight: (N,) 1 for a failure, 0 for a success. Without labels the failure probability.
        accepted: (N,) acceptance of each row, from ``acceptance``.
        names: Class names. None for classes without names.
    """
    pairs = np.stack([answer_of_row, right_class_of_row], axis=1)
    distinct_pairs, inverse = np.unique(pairs, axis=0, return_inverse=True)
    group = inverse.ravel()
    n_groups = len(distinct_pairs)
    failures = np.bincount(group, weights=weight, minlength=n_groups).tolist()
    uncertainty_sums = np.bincount(group, weights=weight * uncertainty, minlength=n_groups).tolist()
    accepted_failures = np.bincount(group, weights=weight * accepted, minlength=n_groups).tolist()
    confusions = []
    for number, (answer, right_class) in enumerate(distinct_pairs.tolist()):
        n_failures = failures[number]
        if n_failures > 0:
            confusion = Confusion(
                answer=class_name(names, answer),
                instead=class_name(names, right_class),
                failures=n_failures,
                share=float(n_failures / weight.sum()),
                uncertainty=uncertainty_sums[number] / n_failures,
                accepted=accepted_failures[number],
                risk=float(accepted_failures[number] / accepted.sum()),
            )
            confusions.append(confusion)
    return confusions

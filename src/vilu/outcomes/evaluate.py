"""From outcomes to results: every metric with its interval, and the comparison of two methods."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vilu.callers import warn_caller
from vilu.errors import UNKNOWN, DataError, ProvenanceError, UsageError
from vilu.metrics.bootstrap import (
    Interval,
    OwnInterval,
    intervals_of,
    paired_across,
    paired_bootstrap,
)
from vilu.metrics.catalog import METRICS, Kernel, Metric, Question, evaluated_metrics, get_metric
from vilu.metrics.counts import repeated_pictures, tie_counts
from vilu.outcomes.outcomes import Outcomes, Scores, Tallied, Tally, facts_of
from vilu.outcomes.results import ResultRow, ResultTable, name_of
from vilu.validation import checked, describe_value, require_at_least

MANY_REPEATS = 0.01  # share of rows whose picture another row shows: real data hold a few
FEW = 30  # with fewer wrong (or right) answers an interval says little
LISTED = 3  # sentences of a warning


@checked
def evaluate(
    outcomes: Tallied | Iterable[Tallied],
    *,
    metrics: Sequence[str] | None = None,
    n_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> ResultTable:
    """Metrics of one or several methods, over rows with both an uncertainty and a known failure.

    Args:
        outcomes: What was scored (``Outcomes``, or a ``ScoreFolder`` of any size); several may
            differ in method, data set, split and seed.
        metrics: Names of ``vilu.metrics.METRICS``; by default ``DEFAULT_METRICS`` and those that
            were added, of which those of a probability only where there is one: the calibrated
            ``failure_probability``, or else an uncertainty that is a probability; and those of the
            questions "within" and "outside" only where some rows are of none of the classes.
        n_resamples: Bootstrap resamples; 0 for no intervals.
        confidence: Coverage of the intervals, in (0, 1).
        seed: Seed of the resampling.

    Returns:
        One row per outcomes and metric. A metric that is undefined is None with the reason.

    Where rows show one picture (``Outcomes.picture``) their number and that of the pictures are
    told, and intervals are of the pictures: a set that stands twice has the interval of the set.

    Warns:
        UserWarning: If fewer than 30 answers are wrong, or right, or if more than 1 % of the rows
            show the picture of another one.

    Raises:
        DataError: If some outcomes have no row to evaluate.
        UsageError: If a metric is unknown or a setting cannot be.

    Examples:
        >>> import vilu
        >>> failure = [0, 1, 0, 1] * 20
        >>> mine = vilu.Outcomes([0.1, 0.2, 0.3, 0.4] * 20, failure, method="mine", dataset="pets")
        >>> other = vilu.Outcomes(
        ...     [0.4, 0.3, 0.2, 0.1] * 20, failure, method="other", dataset="pets"
        ... )
        >>> print(vilu.evaluate([mine, other], metrics=["auroc", "augrc"], n_resamples=0))
        pets: 80 answers, 40 wrong, accuracy 50.0 %
        method  AUROC  AUGRC
        mine    75.0   18.8
        other   25.0   31.2
        <BLANKLINE>
        in percent
        AUROC: ties count half
        AUGRC: trapezoids over distinct scores
    """
    tallies = _tallies(outcomes)
    if not tallies:
        raise UsageError("evaluate needs at least one set of outcomes. Got none.")
    require_at_least("n_resamples", n_resamples, 0)
    resampling = Resampling(n_resamples, confidence, seed)
    rows: list[ResultRow] = []
    scarce: list[str] = []
    repeated: list[str] = []
    for tally in tallies:
        rows += _rows(tally, _chosen_metrics(metrics, tally), resampling)
        scarce += _scarce(tally)
        repeated += _repeated(tally)
    if scarce:
        consequence = "intervals are wide" if n_resamples else "numbers rest on few answers"
        warn_caller(f"{consequence}: {_listed(scarce)}.")
    if repeated:
        message = f"rows of one picture are no independent answers: {_listed(repeated)}."
        if n_resamples:
            message += " Intervals are of the pictures."
        warn_caller(message)
    return ResultTable(tuple(rows))


def _listed(sentences: list[str]) -> str:
    """The first of them that differ, and how many more there are."""
    different = list(dict.fromkeys(sentences))
    listed = "; ".join(different[:LISTED])
    if len(different) <= LISTED:
        return listed
    return f"{listed}; and {len(different) - LISTED} more like these"


def _chosen_metrics(names: Sequence[str] | None, tally: Tally) -> dict[str, Metric]:
    """Those asked for; where nobody asked for any, those that say something of these rows."""
    if names is not None:
        return {name: get_metric(name) for name in names}
    metrics = {}
    for name in evaluated_metrics():
        metric = get_metric(name)
        if _has_meaning(metric, tally):
            metrics[name] = metric
    return metrics


def _has_meaning(metric: Metric, tally: Tally) -> bool:
    """Whether a metric that nobody asked for says something of these rows."""
    if metric.of_probability:
        return tally.probability is not None
    return metric.question == "failure" or tally.outside.n_failures > 0


def _tallies(outcomes: Tallied | Iterable[object]) -> list[Tally]:
    """What was scored, once or several times."""
    if isinstance(outcomes, Tallied):
        return [outcomes.tally()]
    tallies = []
    for item in outcomes:
        if not isinstance(item, Tallied):
            unfit: object = item
            if hasattr(outcomes, "shape"):  # an array is named as a whole
                unfit = outcomes
            raise UsageError(
                "evaluate takes vilu.Outcomes, which vilu.score gives, or a list of them. "
                f"Got {describe_value(unfit)}."
            )
        tallies.append(item.tally())
    return tallies


@dataclass(frozen=True)
class Comparison:
    """A metric of two methods on the same rows, and the paired bootstrap of its difference.

    What is undefined is NaN.
    """

    metric: str  # name of the metric
    method_a: str | None  # name of one method
    method_b: str | None  # name of the other
    value_a: float  # its metric
    value_b: float  # the other's
    difference: float  # ``value_a - value_b``
    ci_low: float  # lower end of its interval
    ci_high: float  # upper end
    p_value: float  # two-sided, of no difference
    n: int  # number of rows
    n_failures: int  # how many of them are wrong; of the question "outside", of none of the classes
    convention: str  # what was chosen where the literature differs
    why: str | None = None  # why the metric is undefined, if it is
    n_pictures: int | None = None  # how many pictures the rows show; None where as many as rows

    def __str__(self) -> str:
        metric = get_metric(self.metric)
        names = f"{metric.title}, {self.method_a or 'a'} against {self.method_b or 'b'}"
        if self.why is not None:
            return f"{names}: undefined, {self.why}"
        pictures = ""
        if self.n_pictures is not None:
            pictures = f" for {self.n_pictures} pictures"
        values = f"{metric.show(self.value_a)} against {metric.show(self.value_b)}"
        if metric.percent:
            values += " %"
        difference = metric.show(self.difference, "+")
        interval = metric.brackets(self.ci_low, self.ci_high, "+")
        answers = f"{self.n} answers{pictures}, {self.n_failures} {ASKED[metric.question]}"
        return (
            f"{names}: {values}, difference {difference} {interval}, "
            f"p = {self.p_value:.3g} ({answers})"
        )

    def to_dict(self) -> dict[str, object]:
        """Plain dictionary; None where undefined."""
        facts: dict[str, object] = asdict(self)
        for name, value in facts.items():
            if isinstance(value, float):
                facts[name] = _null(value)
        return facts


@checked
def compare(
    a: Outcomes,
    b: Outcomes,
    *,
    metric: str = "auroc",
    n_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Difference of a metric between two methods on the same rows, by paired bootstrap.

    Rows that either method could not score are left out for both. Rows of one picture are resampled
    together.

    Two methods may judge other answers to the same rows, such as the zero-shot and the adapted
    ones. Then only metrics of decisions are compared: coverage at a risk, risk at a coverage and
    AURC.

    Args:
        a: Outcomes of one method.
        b: Outcomes of the other, same rows.
        metric: A name of ``vilu.metrics.METRICS``.
        n_resamples: Bootstrap resamples.
        confidence: Coverage of the interval, in (0, 1).
        seed: Seed of the resampling.

    Raises:
        ProvenanceError: If the rows are not the same: other number, ids, or failures.
        DataError: If no row is left, or the metric needs probabilities and one of the two has none.
        UsageError: If the metric is unknown, a setting cannot be, or the answers are others and the
            metric is of their ranking alone.

    Examples:
        >>> import vilu
        >>> failure = [0, 1, 0, 1] * 20
        >>> a = vilu.Outcomes([0.1, 0.4, 0.2, 0.3] * 20, failure, method="a")
        >>> b = vilu.Outcomes([0.1, 0.2, 0.3, 0.4] * 20, failure, method="b")
        >>> names, numbers = str(vilu.compare(a, b, n_resamples=199)).split(", difference ")
        >>> print(names)
        AUROC, a against b: 100.0 against 75.0 %
        >>> print(numbers)
        +25.0 [+13.8, +35.9], p = 0.01 (80 answers, 40 wrong)
    """
    chosen = get_metric(metric)
    require_same_rows(a, b)
    if a.answer == b.answer:
        require_same_answers(a, b)
    elif not chosen.across_answers:
        raise UsageError(_other_answers(chosen, a, b))
    if chosen.of_probability:
        a = _as_probability(a, metric)
        b = _as_probability(b, metric)
    rows = a.evaluable & b.evaluable
    if chosen.question == "within":
        rows &= ~a.outside
    u_a, failure = _evaluable(a, rows)
    u_b, failure_b = _evaluable(b, rows)
    if chosen.question == "outside":
        failure = a.outside[rows].astype(np.int64)
    picture = _pictures(a, b, rows)
    how: dict[str, Any] = {
        "n_resamples": n_resamples,
        "confidence": confidence,
        "seed": seed,
        "picture": picture,
    }
    if a.answer == b.answer:
        failure_b = failure
        result = paired_bootstrap(metric, u_a, u_b, failure, **how)
    else:
        result = paired_across(chosen.kernel, (u_a, failure), (u_b, failure_b), **how)
    n = len(failure)
    n_failures = int(failure.sum())
    why = None
    if math.isnan(result.difference):
        why = _why(n, n_failures, chosen.question)
    n_pictures = None
    if picture is not None:
        n_pictures = int(picture.max()) + 1
    return Comparison(
        metric,
        method_a=a.method and name_of(a.method, a.answer),
        method_b=b.method and name_of(b.method, b.answer),
        value_a=float(chosen.kernel(tie_counts(u_a, failure))),
        value_b=float(chosen.kernel(tie_counts(u_b, failure_b))),
        difference=result.difference,
        ci_low=result.ci_low,
        ci_high=result.ci_high,
        p_value=result.p_value,
        n=n,
        n_failures=n_failures,
        convention=chosen.convention,
        why=why,
        n_pictures=n_pictures,
    )


def _other_answers(metric: Metric, a: Outcomes, b: Outcomes) -> str:
    """Why a metric cannot compare two kinds of answers, and which can."""
    across = [name for name, entry in METRICS.items() if entry.across_answers]
    return (
        f"{metric.title} says how well wrong answers are told from right ones. {_name(a)} judges "
        f"{a.answer} answers and {_name(b)} judges {b.answer} answers, so they are wrong in other "
        f"rows. Compare one of {', '.join(across)} instead."
    )


def _pictures(a: Outcomes, b: Outcomes, rows: NDArray[np.bool_]) -> NDArray[np.int64] | None:
    """Numbers of the pictures of some rows, as either of two methods knows them.

    None where no picture has two rows.
    """
    for outcomes in (a, b):
        if outcomes.picture is not None:
            picture = repeated_pictures(outcomes.picture[rows])
            if picture is not None:
                return picture
    return None


def _as_probability(outcomes: Outcomes, metric: str) -> Outcomes:
    """The outcomes with the probability of failure in place of the uncertainty.

    It is the calibrated one where there is one.
    """
    if outcomes.failure_probability is not None:
        return replace(outcomes, uncertainty=outcomes.failure_probability)
    if not outcomes.is_probability:
        raise DataError(
            f"{metric} needs failure probabilities, but the scores of {_name(outcomes)} are not."
        )
    return outcomes


class Resampling(NamedTuple):
    """How intervals are made: resamples (0: none), coverage, and the seed."""

    n: int
    confidence: float
    seed: int

    def describe(self, kernel: Kernel, source: Scores) -> str:
        """How the interval of a metric of these rows came about."""
        percent = f"{100 * self.confidence:g} %"
        how = f"{percent} stratified bootstrap, {self.n} resamples"
        if isinstance(kernel, OwnInterval):
            how = f"{percent}, {kernel.interval_note}, {self.n} draws"
        if source.n_pictures != source.n:
            how += " of pictures"
        return how


UNDEFINED = Interval(math.nan, math.nan, math.nan)


def _rows(tally: Tally, metrics: Mapping[str, Metric], how: Resampling) -> list[ResultRow]:
    """A row per metric, in their order."""
    scores = tally.scores
    if not scores.n:
        raise DataError(
            f"the outcomes of {_name(tally)} have no row to evaluate: {tally.n_unlabelled} have an "
            f"unknown failure and {tally.n_unusable} no uncertainty. Give labelled data."
        )
    intervals = _intervals(tally, metrics, how)
    n_pictures = None
    if scores.n_pictures != scores.n:
        n_pictures = scores.n_pictures
    facts = {
        **facts_of(tally),
        "n": scores.n,
        "n_failures": scores.n_failures,
        "accuracy": 1 - scores.n_failures / scores.n,
        "n_unlabelled": tally.n_unlabelled,
        "n_unusable": tally.n_unusable,
        "n_outside": tally.outside.n_failures,
        "n_pictures": n_pictures,
    }
    rows = []
    for name, metric in metrics.items():
        measured = intervals.get(name, UNDEFINED)
        source = tally.asked(metric) or scores
        why = None
        if math.isnan(measured.value):
            why = _why_undefined(metric, tally)
        interval = None
        if not math.isnan(measured.ci_low):
            interval = how.describe(metric.kernel, source)
        row = ResultRow(
            **facts,
            metric=name,
            value=_null(measured.value),
            ci_low=_null(measured.ci_low),
            ci_high=_null(measured.ci_high),
            convention="; ".join(filter(None, (metric.convention, source.note))),
            interval=interval,
            why=why,
        )
        rows.append(row)
    return rows


def _intervals(tally: Tally, metrics: Mapping[str, Metric], how: Resampling) -> dict[str, Interval]:
    """Metrics that have rows to be of; those of the same rows share their resamples."""
    sources: dict[int, Scores] = {}
    kernels: dict[int, dict[str, Kernel]] = {}
    for name, metric in metrics.items():
        source = tally.asked(metric)
        if source is not None:
            sources[id(source)] = source
            kernels.setdefault(id(source), {})[name] = metric.kernel
    intervals: dict[str, Interval] = {}
    for key, source in sources.items():
        intervals |= _measured(source, kernels[key], how)
    return intervals


def _why_undefined(metric: Metric, tally: Tally) -> str:
    source = tally.asked(metric)
    if source is None:
        return "the uncertainty is not a probability"
    return _why(source.n, source.n_failures, metric.question)


def _measured(
    source: Scores, kernels: Mapping[str, Kernel], how: Resampling
) -> dict[str, Interval]:
    """Metrics, with intervals unless one class is empty or no resample is wanted."""
    if how.n and 0 < source.n_failures < source.n:
        return intervals_of(
            source, kernels, n_resamples=how.n, confidence=how.confidence, seed=how.seed
        )
    if not source.n:
        return dict.fromkeys(kernels, UNDEFINED)
    counts = source.counts()
    measured = {}
    for name, kernel in kernels.items():
        measured[name] = Interval(float(kernel(counts)), math.nan, math.nan)
    return measured


def _null(value: float) -> float | None:
    if math.isnan(value):
        return None
    return value


def _evaluable(
    outcomes: Outcomes, rows: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    if not rows.any():
        n_known = np.count_nonzero(outcomes.failure != UNKNOWN)
        n_scored = np.count_nonzero(np.isfinite(outcomes.uncertainty))
        raise DataError(
            f"the outcomes of {_name(outcomes)} have no row to evaluate: of {len(outcomes)}, "
            f"{n_known} have a known failure and {n_scored} an uncertainty. Give labelled data."
        )
    return outcomes.uncertainty[rows], outcomes.failure[rows]


def require_same_rows(a: Outcomes, b: Outcomes) -> None:
    """Refuse outcomes of other rows: other number, ids, or marks of none of the classes."""
    names = f"{_name(a)} and {_name(b)}"
    if len(a) != len(b):
        raise ProvenanceError(
            f"{names} must be of the same rows. Got {len(a)} and {len(b)} rows instead."
        )
    if a.ids is not None and b.ids is not None:
        for row, (id_a, id_b) in enumerate(zip(a.ids, b.ids, strict=True)):
            if id_a != id_b:
                raise ProvenanceError(
                    f"{names} must be of the same rows. "
                    f"Row {row} is {id_a!r} in one and {id_b!r} in the other."
                )
    _require_equal(a, b, "marks of none of the classes", a.outside, b.outside)


def require_same_answers(a: Outcomes, b: Outcomes) -> None:
    """Refuse outcomes of other answers: their failures differ."""
    _require_equal(a, b, "failures", a.failure, b.failure)


def _require_equal(
    a: Outcomes, b: Outcomes, what: str, values_a: NDArray[Any], values_b: NDArray[Any]
) -> None:
    different = np.flatnonzero(values_a != values_b)
    if len(different):
        raise ProvenanceError(
            f"{_name(a)} and {_name(b)} must be of the same answers. {len(different)} {what} "
            f"differ, the first in row {different[0]}; score both on one data set with one "
            "backbone."
        )


def _repeated(tally: Tally) -> list[str]:
    """What to warn of: more than ``MANY_REPEATS`` of the rows show the picture of another one."""
    scores = tally.scores
    if scores.n_pictures >= (1 - MANY_REPEATS) * scores.n:
        return []
    return [f"the {scores.n} rows of {_name(tally)} show {scores.n_pictures} pictures"]


def _scarce(tally: Tally) -> list[str]:
    """What to warn of: fewer than ``FEW`` wrong, right or outside answers.

    Answers for one picture count once.
    """
    n_wrong, n_right = tally.scores.n_independent()
    kinds = {"wrong answers": n_wrong, "right answers": n_right}
    n_outside, _ = tally.outside.n_independent()
    if n_outside:
        n_wrong_within, _ = tally.within.n_independent()
        kinds["wrong answers within the classes"] = n_wrong_within
        kinds["pictures of none of the classes"] = n_outside
    return [f"{_name(tally)} has only {n} {kind}" for kind, n in kinds.items() if n < FEW]


ASKED = {
    "failure": "wrong",
    "within": "wrong within the classes",
    "outside": "of none of the classes",
}
"""What the positive rows of a question are."""


def _why(n: int, n_failures: int, question: Question) -> str:
    if n_failures == 0:
        return f"none of {n} answers is {ASKED[question]}"
    return f"all of {n} answers are {ASKED[question]}"


def _name(outcomes: Outcomes | Tally) -> str:
    name = "the scores"
    if outcomes.method is not None:
        name = name_of(outcomes.method, outcomes.answer)
    if outcomes.dataset:
        name += f" on {outcomes.dataset}"
    return name

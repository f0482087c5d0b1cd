"""Evaluation of outcomes: metrics with intervals, and the comparison of two methods."""

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
    observed_value,
    paired_across_answers,
    paired_bootstrap,
)
from vilu.metrics.catalog import METRICS, Kernel, Metric, Question, evaluated_metrics, get_metric
from vilu.metrics.counts import repeated_picture_numbers
from vilu.outcomes.outcomes import Outcomes, Scores, SupportsTally, Tally, identity_fields
from vilu.outcomes.results import ResultRow, ResultTable, scores_name
from vilu.validation import checked, describe_value, require_at_least

MAX_SHARE_OF_REPEATS = 0.01  # ``evaluate`` warns if more than this share of rows repeat a picture
MIN_ANSWERS_OF_EACH_KIND = 30  # ``evaluate`` warns if fewer answers are wrong, or fewer are right
MAX_SENTENCES = 3  # maximum number of sentences in a warning


@checked
def evaluate(
    outcomes: SupportsTally | Iterable[SupportsTally],
    *,
    metrics: Sequence[str] | None = None,
    n_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> ResultTable:
    """Compute metrics for one or more methods, over rows with an uncertainty and a known failure.

    Args:
        outcomes: One or several ``Outcomes`` or ``ScoreFolder``. The method, the data set, the
            split and the seed may differ.
        metrics: Names from ``vilu.metrics.METRICS``. By default these are ``DEFAULT_METRICS`` and
            all added metrics, with two exceptions. Metrics on probabilities are left out if there
            is no calibrated ``failure_probability`` and the uncertainty is not a probability.
            Metrics for the questions "within" and "outside" are left out if all rows belong to one
            of the classes.
        n_resamples: Number of bootstrap resamples. With 0 there are no intervals.
        confidence: Coverage of the intervals, in (0, 1).
        seed: Resampling seed.

    Returns:
        One row per set of outcomes and metric. If a metric is undefined, the value is None and
        the row has the reason.

    If several rows show the same picture (``Outcomes.picture``), the row count and the picture
    count are reported, and pictures are resampled in place of rows. Therefore the intervals do not
    change if every row in a data set is repeated.

    Warns:
        UserWarning: If fewer than 30 answers are wrong, if fewer than 30 are right, if more than
            1 % of the rows repeat a picture, or if the predictor was fitted on some of the rows.

    Raises:
        DataError: If some outcomes have no row to evaluate.
        UsageError: If a metric is unknown, or if a setting is out of range.

    Examples:
        >>> import vilu
        >>> failure = [0, 1, 0, 1] * 20
        >>> rising = [0.1, 0.2, 0.3, 0.4] * 20
        >>> falling = [0.4, 0.3, 0.2, 0.1] * 20
        >>> mine = vilu.Outcomes(rising, failure, method="mine", dataset="pets")
        >>> other = vilu.Outcomes(falling, failure, method="other", dataset="pets")
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
    few_answers_sentences: list[str] = []
    repeats_sentences: list[str] = []
    fitted_rows_sentences: list[str] = []
    for tally in tallies:
        rows += _result_rows(tally, _chosen_metrics(metrics, tally), resampling)
        few_answers_sentences += _warnings_of_few_answers(tally)
        repeats_sentences += _warnings_of_repeats(tally)
        if tally.n_seen_in_fit:
            fitted_rows_sentences.append(
                f"at least {tally.n_seen_in_fit} of them for {_scores_in_words(tally)}"
            )
    if fitted_rows_sentences:
        warn_caller(
            "the predictor was fitted on some of the rows that were scored: "
            f"{_join_sentences(fitted_rows_sentences)}. Numbers of such rows can be too good."
        )
    if few_answers_sentences:
        consequence = "intervals are wide" if n_resamples else "numbers rest on few answers"
        warn_caller(f"{consequence}: {_join_sentences(few_answers_sentences)}.")
    if repeats_sentences:
        unit = "cluster" if any(tally.has_clusters for tally in tallies) else "picture"
        warning = (
            f"rows of one {unit} are no independent answers: {_join_sentences(repeats_sentences)}."
        )
        if n_resamples:
            warning += f" Intervals are of the {unit}s."
        warn_caller(warning)
    return ResultTable(tuple(rows))


def _join_sentences(sentences: list[str]) -> str:
    """Join the first ``MAX_SENTENCES`` different sentences, and count the further sentences."""
    different_sentences = list(dict.fromkeys(sentences))
    text = "; ".join(different_sentences[:MAX_SENTENCES])
    if len(different_sentences) <= MAX_SENTENCES:
        return text
    return f"{text}; and {len(different_sentences) - MAX_SENTENCES} more like these"


def _chosen_metrics(names: Sequence[str] | None, tally: Tally) -> dict[str, Metric]:
    """Return the metrics in ``names``, or all suitable metrics if ``names`` is None."""
    if names is not None:
        return {name: get_metric(name) for name in names}
    metrics = {}
    for name in evaluated_metrics():
        metric = get_metric(name)
        if _is_suitable(metric, tally):
            metrics[name] = metric
    return metrics


def _is_suitable(metric: Metric, tally: Tally) -> bool:
    """Return whether a metric suits these rows. Such metrics are computed by default."""
    if metric.of_probability:
        return tally.probability is not None
    has_rows_outside = tally.outside.n_failures > 0
    return metric.question == "failure" or has_rows_outside


def _tallies(outcomes: SupportsTally | Iterable[object]) -> list[Tally]:
    """Count the rows of one or several ``Outcomes`` or ``ScoreFolder``."""
    if isinstance(outcomes, SupportsTally):
        return [outcomes.tally()]
    tallies = []
    for item in outcomes:
        if not isinstance(item, SupportsTally):
            wrong_value: object = item
            if hasattr(outcomes, "shape"):  # the message names the whole array
                wrong_value = outcomes
            raise UsageError(
                "evaluate takes vilu.Outcomes, which vilu.score gives, or a list of them. "
                f"Got {describe_value(wrong_value)}."
            )
        tally = item.tally()
        tallies.append(tally)
    return tallies


@dataclass(frozen=True)
class Comparison:
    """A metric for two methods on the same rows, and a paired bootstrap of the difference.

    Undefined numbers are NaN.
    """

    metric: str  # metric name
    method_a: str | None  # name of method a
    method_b: str | None  # name of method b
    value_a: float  # the metric for method a
    value_b: float  # the metric for method b
    difference: float  # ``value_a - value_b``
    ci_low: float  # lower end of the interval for the difference
    ci_high: float  # upper end of the interval for the difference
    p_value: float  # two-sided p-value of "there is no difference"
    n: int  # number of rows
    # number of rows with a wrong answer; for the question "outside", of rows outside all classes
    n_failures: int
    convention: str  # convention of the metric, where the literature has several
    why: str | None = None  # why the metric is undefined, if it is
    # number of pictures, or of clusters if these are known; None if none has two rows
    n_pictures: int | None = None

    def __str__(self) -> str:
        metric = get_metric(self.metric)
        names = f"{metric.title}, {self.method_a or 'a'} against {self.method_b or 'b'}"
        if self.why is not None:
            return f"{names}: undefined, {self.why}"
        pictures = ""
        if self.n_pictures is not None:
            pictures = f" for {self.n_pictures} pictures"
        unit = " %" if metric.percent else ""
        values = f"{metric.show(self.value_a)} against {metric.show(self.value_b)}{unit}"
        difference = metric.show(self.difference, "+")
        interval = metric.brackets(self.ci_low, self.ci_high, "+")
        answers = f"{self.n} answers{pictures}, {self.n_failures} {KIND_IN_WORDS[metric.question]}"
        return (
            f"{names}: {values}, difference {difference} {interval}, "
            f"p = {self.p_value:.3g} ({answers})"
        )

    def to_dict(self) -> dict[str, object]:
        """Return the comparison as a plain dictionary, with None for undefined numbers."""
        values_by_name: dict[str, object] = asdict(self)
        for name, value in values_by_name.items():
            if isinstance(value, float):
                values_by_name[name] = _none_for_nan(value)
        return values_by_name


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
    """Compare a metric between two methods on the same rows, by paired bootstrap.

    Rows that one method did not score are left out for both methods. Rows in the same cluster are
    resampled together. Without clusters, rows that show the same picture are.

    The two methods may judge different answers for the same rows, for example zero-shot and adapted
    answers. Then only metrics on decisions can be compared: coverage at a risk, risk at a coverage
    and AURC.

    Args:
        a: Outcomes for method a.
        b: Outcomes for method b on the same rows.
        metric: A name from ``vilu.metrics.METRICS``.
        n_resamples: Number of bootstrap resamples.
        confidence: Interval coverage, in (0, 1).
        seed: Resampling seed.

    Raises:
        ProvenanceError: If the row count, the ids, the failures or the rows outside differ.
        DataError: If no row is left, or if the metric needs probabilities and a method has none.
        UsageError: If the metric is unknown, if a setting is out of range, or if the methods judge
            different answers and the metric measures only how the answers are ranked.

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
    metric_to_compare = get_metric(metric)
    require_same_rows(a, b)
    same_answers_are_judged = a.answer == b.answer
    if same_answers_are_judged:
        require_same_answers(a, b)
    elif not metric_to_compare.across_answers:
        raise UsageError(_different_answers_message(metric_to_compare, a, b))
    if metric_to_compare.of_probability:
        a = _as_probability(a, metric)
        b = _as_probability(b, metric)
    rows = a.evaluable & b.evaluable
    if metric_to_compare.question == "within":  # only rows within the classes
        rows &= ~a.outside
    uncertainty_a, failure_a = _uncertainty_and_failure(a, rows)
    uncertainty_b, failure_b = _uncertainty_and_failure(b, rows)
    if metric_to_compare.question == "outside":  # a row outside all classes counts as a failure
        failure_a = a.outside[rows].astype(np.int64)
    picture = _pictures(a, b, rows)
    settings: dict[str, Any] = {
        "n_resamples": n_resamples,
        "confidence": confidence,
        "seed": seed,
        "picture": picture,
    }
    if same_answers_are_judged:
        failure_b = failure_a  # for the question "outside", only ``failure_a`` was replaced above
        result = paired_bootstrap(metric, uncertainty_a, uncertainty_b, failure_a, **settings)
    else:
        result = paired_across_answers(
            metric_to_compare.kernel,
            (uncertainty_a, failure_a),
            (uncertainty_b, failure_b),
            **settings,
        )
    n = len(failure_a)
    n_failures = int(failure_a.sum())
    why = None
    if math.isnan(result.difference):
        why = _why_only_one_kind(n, n_failures, metric_to_compare.question)
    n_pictures = None
    if picture is not None:
        n_pictures = int(picture.max()) + 1  # pictures are numbered from 0
    return Comparison(
        metric=metric,
        method_a=_method_name(a),
        method_b=_method_name(b),
        value_a=observed_value(metric_to_compare.kernel, uncertainty_a, failure_a),
        value_b=observed_value(metric_to_compare.kernel, uncertainty_b, failure_b),
        difference=result.difference,
        ci_low=result.ci_low,
        ci_high=result.ci_high,
        p_value=result.p_value,
        n=n,
        n_failures=n_failures,
        convention=metric_to_compare.convention,
        why=why,
        n_pictures=n_pictures,
    )


def _method_name(outcomes: Outcomes) -> str | None:
    """Name the method and the kind of judged answers, or return None without a method."""
    if not outcomes.method:
        return outcomes.method
    return scores_name(outcomes.method, outcomes.answer)


def _different_answers_message(metric: Metric, a: Outcomes, b: Outcomes) -> str:
    """Explain that this metric cannot compare two kinds of answers, and name metrics that can."""
    comparable = [name for name, entry in METRICS.items() if entry.across_answers]
    return (
        f"{metric.title} says how well wrong answers are told from right ones. "
        f"{_scores_in_words(a)} judges {a.answer} answers and {_scores_in_words(b)} judges "
        f"{b.answer} answers, so they are wrong in other rows. Compare one of "
        f"{', '.join(comparable)} instead."
    )


def _pictures(a: Outcomes, b: Outcomes, rows: NDArray[np.bool_]) -> NDArray[np.int64] | None:
    """Return the picture number for every row in the mask ``rows`` (N,), or None if none repeats.

    If clusters are known, these are cluster numbers. The numbers come from ``a`` if a number
    repeats in ``a``, and otherwise from ``b``.
    """
    for outcomes in (a, b):
        identities = outcomes.identities(rows)
        picture = repeated_picture_numbers(identities)
        if picture is not None:
            return picture
    return None


def _as_probability(outcomes: Outcomes, metric: str) -> Outcomes:
    """Return the outcomes with the failure probability in place of the uncertainty.

    A calibrated probability is preferred.
    """
    if outcomes.failure_probability is not None:
        return replace(outcomes, uncertainty=outcomes.failure_probability)
    if not outcomes.is_probability:
        raise DataError(
            f"{metric} needs failure probabilities, but the scores of {_scores_in_words(outcomes)} "
            "are not."
        )
    return outcomes


class Resampling(NamedTuple):
    """Settings for the intervals."""

    n: int  # number of resamples; 0: no intervals
    confidence: float  # interval coverage
    seed: int

    def describe(self, kernel: Kernel, scores: Scores, *, has_clusters: bool) -> str:
        """Say how a metric's interval for these rows is made.

        ``has_clusters`` says whether clusters are resampled, and not pictures.
        """
        percent = f"{100 * self.confidence:g} %"
        text = f"{percent} stratified bootstrap, {self.n} resamples"
        if isinstance(kernel, OwnInterval):
            text = f"{percent}, {kernel.interval_note}, {self.n} draws"
        pictures_repeat = scores.n_pictures != scores.n
        if not pictures_repeat:
            return text
        unit = "clusters" if has_clusters else "pictures"
        return f"{text} of {unit}"


UNDEFINED_INTERVAL = Interval(value=math.nan, ci_low=math.nan, ci_high=math.nan)
"""Result for an undefined metric."""


def _result_rows(
    tally: Tally, metrics: Mapping[str, Metric], resampling: Resampling
) -> list[ResultRow]:
    """Make one row per metric, in the order of ``metrics``."""
    scores = tally.scores
    if not scores.n:
        raise DataError(
            f"the outcomes of {_scores_in_words(tally)} have no row to evaluate: "
            f"{tally.n_unlabelled} have an unknown failure and {tally.n_unusable} no uncertainty. "
            "Give labelled data."
        )
    intervals = _intervals(tally, metrics, resampling)
    n_pictures = None
    if scores.n_pictures != scores.n:
        n_pictures = scores.n_pictures
    common_fields = {
        **identity_fields(tally),
        "n": scores.n,
        "n_failures": scores.n_failures,
        "accuracy": 1 - scores.n_failures / scores.n,
        "n_unlabelled": tally.n_unlabelled,
        "n_unusable": tally.n_unusable,
        "n_outside": tally.outside.n_failures,
        "n_pictures": n_pictures,
        "sample": tally.sample,
    }
    rows = []
    for name, metric in metrics.items():
        interval = intervals.get(name, UNDEFINED_INTERVAL)
        # ``rows_for`` returns None if the metric needs probabilities and there are none
        scores_of_metric = tally.rows_for(metric) or scores
        why = None
        if math.isnan(interval.value):
            why = _why_no_value(metric, tally)
        interval_text = None
        if not math.isnan(interval.ci_low):
            interval_text = resampling.describe(
                metric.kernel, scores_of_metric, has_clusters=tally.has_clusters
            )
        row = ResultRow(
            **common_fields,
            metric=name,
            value=_none_for_nan(interval.value),
            ci_low=_none_for_nan(interval.ci_low),
            ci_high=_none_for_nan(interval.ci_high),
            convention=tally.convention_of(metric),
            interval=interval_text,
            why=why,
        )
        rows.append(row)
    return rows


def _intervals(
    tally: Tally, metrics: Mapping[str, Metric], resampling: Resampling
) -> dict[str, Interval]:
    """Return the value and the interval for each metric, by name.

    Metrics on the same rows share the resamples. Metrics on probabilities are left out if there are
    no probabilities.
    """
    # Metrics on the same rows get the same object from ``rows_for``, so its ``id`` is the key.
    scores_by_id: dict[int, Scores] = {}
    kernels_by_id: dict[int, dict[str, Kernel]] = {}
    for name, metric in metrics.items():
        scores = tally.rows_for(metric)
        if scores is not None:
            scores_by_id[id(scores)] = scores
            kernels = kernels_by_id.setdefault(id(scores), {})
            kernels[name] = metric.kernel
    intervals: dict[str, Interval] = {}
    for scores_id, scores in scores_by_id.items():
        intervals |= _measure_metrics(scores, kernels_by_id[scores_id], resampling)
    return intervals


def _why_no_value(metric: Metric, tally: Tally) -> str:
    """Say why a metric has no value for these rows."""
    scores = tally.rows_for(metric)
    if scores is None:
        return "the uncertainty is not a probability"
    return _why_only_one_kind(scores.n, scores.n_failures, metric.question)


def _measure_metrics(
    scores: Scores, kernels: Mapping[str, Kernel], resampling: Resampling
) -> dict[str, Interval]:
    """Return the value for each metric, by name, and the interval if this can be computed.

    Intervals need ``resampling.n`` > 0, and both failures and successes.
    """
    has_failures_and_successes = 0 < scores.n_failures < scores.n
    if resampling.n and has_failures_and_successes:
        return intervals_of(
            scores,
            kernels,
            n_resamples=resampling.n,
            confidence=resampling.confidence,
            seed=resampling.seed,
        )
    if not scores.n:
        return dict.fromkeys(kernels, UNDEFINED_INTERVAL)
    counts = scores.counts()
    measured = {}
    for name, kernel in kernels.items():
        value = float(kernel(counts))
        measured[name] = Interval(value=value, ci_low=math.nan, ci_high=math.nan)
    return measured


def _none_for_nan(value: float) -> float | None:
    """Return the number, or None in place of NaN."""
    if math.isnan(value):
        return None
    return value


def _uncertainty_and_failure(
    outcomes: Outcomes, rows: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the uncertainties and failures in a row mask (N,). Refuse a mask without rows."""
    if not rows.any():
        n_known = np.count_nonzero(outcomes.failure != UNKNOWN)
        is_scored = np.isfinite(outcomes.uncertainty)
        n_scored = np.count_nonzero(is_scored)
        raise DataError(
            f"the outcomes of {_scores_in_words(outcomes)} have no row to evaluate: of "
            f"{len(outcomes)}, {n_known} have a known failure and {n_scored} an uncertainty. Give "
            "labelled data."
        )
    return outcomes.uncertainty[rows], outcomes.failure[rows]


def require_same_rows(a: Outcomes, b: Outcomes) -> None:
    """Refuse outcomes with different row counts, different ids, or different ``outside``."""
    names = f"{_scores_in_words(a)} and {_scores_in_words(b)}"
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
    _require_equal(
        a, b, values_name="marks of none of the classes", values_a=a.outside, values_b=b.outside
    )


def require_same_answers(a: Outcomes, b: Outcomes) -> None:
    """Refuse outcomes with different failures in rows that both methods scored.

    Different failures mean that different answers were judged. Other rows are not compared, because
    ``vilu.score`` gives no failure in a row that it cannot score.
    """
    are_scored = np.isfinite(a.uncertainty) & np.isfinite(b.uncertainty)
    failure_b = np.where(are_scored, b.failure, a.failure)
    _require_equal(a, b, values_name="failures", values_a=a.failure, values_b=failure_b)


def _require_equal(
    a: Outcomes,
    b: Outcomes,
    *,
    values_name: str,
    values_a: NDArray[Any],
    values_b: NDArray[Any],
) -> None:
    """Refuse outcomes with different values (N,) in some row."""
    differing_rows = np.flatnonzero(values_a != values_b)
    if len(differing_rows):
        raise ProvenanceError(
            f"{_scores_in_words(a)} and {_scores_in_words(b)} must be of the same answers. "
            f"{len(differing_rows)} {values_name} differ, the first in row {differing_rows[0]}; "
            "score both on one data set with one backbone."
        )


def _warnings_of_repeats(tally: Tally) -> list[str]:
    """Return one warning if more than ``MAX_SHARE_OF_REPEATS`` of the rows repeat a picture.

    Otherwise the list is empty.
    """
    scores = tally.scores
    if scores.n_pictures >= (1 - MAX_SHARE_OF_REPEATS) * scores.n:
        return []
    rows = f"the {scores.n} rows of {_scores_in_words(tally)}"
    if tally.has_clusters:
        return [f"{rows} are of {scores.n_pictures} clusters"]
    return [f"{rows} show {scores.n_pictures} pictures"]


def _warnings_of_few_answers(tally: Tally) -> list[str]:
    """Make one warning for each kind with fewer than ``MIN_ANSWERS_OF_EACH_KIND`` answers.

    The kinds are wrong answers and right answers. If some pictures are outside all classes, there
    are two more kinds: wrong answers within the classes, and pictures outside all classes. Several
    answers for one picture count once.
    """
    n_wrong, n_right = tally.scores.n_independent_answers()
    n_of_kind = {"wrong answers": n_wrong, "right answers": n_right}
    n_outside, _ = tally.outside.n_independent_answers()
    if n_outside:
        n_wrong_within, _ = tally.within.n_independent_answers()
        n_of_kind["wrong answers within the classes"] = n_wrong_within
        n_of_kind["pictures of none of the classes"] = n_outside
    warnings = []
    for kind, n in n_of_kind.items():
        if n < MIN_ANSWERS_OF_EACH_KIND:
            warnings.append(f"{_scores_in_words(tally)} has only {n} {kind}")
    return warnings


KIND_IN_WORDS = {
    "failure": "wrong",
    "within": "wrong within the classes",
    "outside": "of none of the classes",
}
"""Maps a metric's question to words for the rows that count as failures."""


def _why_only_one_kind(n: int, n_failures: int, question: Question) -> str:
    """Say why a metric is undefined: no row counts as a failure, or all rows do."""
    if n_failures == 0:
        return f"none of {n} answers is {KIND_IN_WORDS[question]}"
    return f"all of {n} answers are {KIND_IN_WORDS[question]}"


def _scores_in_words(outcomes: Outcomes | Tally) -> str:
    """Name the scores for messages, such as "mcm on pets"."""
    name = "the scores"
    if outcomes.method is not None:
        name = scores_name(outcomes.method, outcomes.answer)
    if outcomes.dataset:
        return f"{name} on {outcomes.dataset}"
    return name

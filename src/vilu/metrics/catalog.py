"""The metrics by name. Results record each metric's convention."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np

from vilu.errors import UsageError, did_you_mean
from vilu.metrics.counts import Floats, TieCounts
from vilu.metrics.ranking import aupr_kernel, auroc_kernel, fpr_at_tpr_kernel
from vilu.metrics.reliability import BinnedError, brier_kernel, log_loss_kernel
from vilu.metrics.selective import (
    augrc_kernel,
    aurc_kernel,
    coverage_at_risk_kernel,
    excess_aurc_kernel,
    naurc_kernel,
    risk_at_coverage_kernel,
)
from vilu.registry import REGISTER_FUNCTIONS, Catalogue

Kernel = Callable[[TieCounts], Floats]
"""Function from counts (..., G) to metric values (...)."""

Question = Literal["failure", "within", "outside"]
"""Question about a row, to be answered by the uncertainty (``Metric.question``)."""


@dataclass(frozen=True)
class Metric:
    """A metric with fixed conventions.

    Attributes:
        title: Column heading in tables.
        kernel: Function from counts (..., G) to metric values (...).
        convention: The chosen definition in words, where the literature has several definitions.
        of_probability: Whether the metric is defined only for failure probabilities.
        higher_is_better: Whether a higher value is better.
        percent: Whether tables show the metric in percent.
        wanted: "always": ``evaluate`` computes the metric, and tables show the metric.
            "evaluated": ``evaluate`` computes the metric, but tables show the metric only if the
            user chooses metrics. "chosen": the metric is computed only if the user chooses the
            metric.
        name: Name for choosing the metric.
        question: Question to be answered by the uncertainty. "failure": is the answer wrong?
            "within": is the answer wrong, among pictures of the classes only? "outside": does the
            picture show none of the classes? "within" and "outside" are evaluated only if some
            pictures show none of the classes.
        across_answers: Whether the metric can also compare different answers to the same rows. For
            example, this is possible for the risk at a coverage. A metric that only measures the
            ranking cannot do this, because different answers are wrong in different rows.

    Examples:
        >>> import vilu
        >>> wrong = vilu.metrics.Metric(
        ...     "Wrong", lambda counts: counts.n_wrong / counts.n, "share of wrong answers"
        ... )
        >>> wrong.show(0.125)  # in percent
        '12.5'
        >>> wrong.brackets(0.1, 0.15)
        '[10.0, 15.0]'
    """

    title: str
    kernel: Kernel
    convention: str
    of_probability: bool = False
    higher_is_better: bool = False
    percent: bool = True
    wanted: Literal["always", "evaluated", "chosen"] = "always"
    name: str = ""
    question: Question = "failure"
    across_answers: bool = False

    def show(self, value: float, sign: str = "") -> str:
        """Format a value for tables. ``sign="+"`` adds a sign to positive values."""
        if self.percent:
            return f"{100 * value:{sign}.1f}"
        return f"{value:{sign}.3g}"

    def brackets(self, low: float, high: float, sign: str = "") -> str:
        """Format an interval for tables."""
        return f"[{self.show(low, sign)}, {self.show(high, sign)}]"


def _for_question(question: Question, metric: Metric, convention: str) -> Metric:
    """Return a copy of ``metric`` for ``question``, with this convention and a longer title."""
    return replace(
        metric, title=f"{metric.title} {question}", convention=convention, question=question
    )


_AUROC = Metric("AUROC", auroc_kernel, "ties count half", higher_is_better=True)
_FPR95 = Metric("FPR95", fpr_at_tpr_kernel, "positive=correct, TPR 0.95, linear interpolation")
_AUROC_OUTSIDE = "pictures of none of the classes against those of the classes, ties count half"
# maps a risk to the title of the metric "coverage at this risk"
_COVERAGE_TITLES = {"0.01": "Cov@1%", "0.05": "Cov@5%", "0.1": "Cov@10%"}
# maps names to the built-in metrics. The copies in ``METRICS`` also have the names as attributes.
_BUILT_IN_METRICS = {
    "auroc": _AUROC,
    "fpr95": _FPR95,
    "auroc_within": _for_question(
        "within", _AUROC, f"pictures of the classes only, {_AUROC.convention}"
    ),
    "fpr95_within": _for_question(
        "within", _FPR95, f"pictures of the classes only, {_FPR95.convention}"
    ),
    "auroc_outside": _for_question("outside", _AUROC, _AUROC_OUTSIDE),
    "fpr95_outside": _for_question(
        "outside", _FPR95, "positive=picture of the classes, TPR 0.95, linear interpolation"
    ),
    "fpr95_failure": Metric(
        "FPR95-failure",
        partial(fpr_at_tpr_kernel, positive="failure", rule="first"),
        "positive=failure, first operating point with TPR >= 0.95",
        wanted="chosen",
    ),
    "aupr_failure": Metric(
        "AUPR-failure",
        partial(aupr_kernel, positive="failure"),
        "average precision",
        higher_is_better=True,
    ),
    "aupr_success": Metric(
        "AUPR-success",
        partial(aupr_kernel, positive="correct"),
        "average precision",
        higher_is_better=True,
        wanted="evaluated",
    ),
    "aurc": Metric(
        "AURC",
        aurc_kernel,
        "mean selective risk, expected over ties",
        wanted="evaluated",
        across_answers=True,
    ),
    "aurc_trapezoid": Metric(
        "AURC-trapezoid",
        partial(aurc_kernel, convention="trapezoid"),
        "trapezoids over distinct scores",
        wanted="chosen",
    ),
    "excess_aurc": Metric(
        "E-AURC",
        excess_aurc_kernel,
        "mean selective risk less the finite-sample optimum",
        wanted="evaluated",
    ),
    "naurc": Metric(
        "NAURC", naurc_kernel, "excess AURC over that of a random order", wanted="chosen"
    ),
    "augrc": Metric("AUGRC", augrc_kernel, "trapezoids over distinct scores"),
    "risk_at_coverage_0.8": Metric(
        "Risk@80%",
        partial(risk_at_coverage_kernel, coverage=0.8),
        "selective risk, expected over ties",
        wanted="evaluated",
        across_answers=True,
    ),
    **{
        f"coverage_at_risk_{risk}": Metric(
            title,
            partial(coverage_at_risk_kernel, risk=float(risk)),
            "largest coverage of a threshold, no guarantee",
            higher_is_better=True,
            wanted="always" if risk == "0.05" else "evaluated",
            across_answers=True,
        )
        for risk, title in _COVERAGE_TITLES.items()
    },
    "ece": Metric("ECE", BinnedError(), "binary, 15 bins of equal width", of_probability=True),
    "ece_mass": Metric(
        "ECE-mass",
        BinnedError(binning="mass"),
        "binary, 15 bins of equal mass",
        of_probability=True,
        wanted="evaluated",
    ),
    "brier": Metric(
        "Brier", brier_kernel, "of the failure probability", of_probability=True, wanted="evaluated"
    ),
    "log_loss": Metric(
        "log-loss",
        log_loss_kernel,
        "natural logarithm, probabilities at least 1e-12 from certainty",
        of_probability=True,
        wanted="evaluated",
    ),
}
METRICS = Catalogue[Metric]("metric", "vilu.metrics")
METRICS.registered.update(
    {name: replace(metric, name=name) for name, metric in _BUILT_IN_METRICS.items()}
)


def evaluated_metrics() -> list[str]:
    """Return the names of the metrics that ``evaluate`` computes by default.

    The built-in metrics come first, then the added metrics.
    """
    return [name for name, metric in METRICS.items() if metric.wanted != "chosen"]


DEFAULT_METRICS = tuple(
    name for name, metric in METRICS.registered.items() if metric.wanted != "chosen"
)
"""Names of the built-in metrics that ``evaluate`` computes by default.

A metric for probabilities is computed only if the uncertainty is a probability. Metrics for the
questions "within" and "outside" are computed only if some rows show none of the classes.
"""


def get_metric(name: str) -> Metric:
    """Return the metric called ``name``.

    Raises:
        UsageError: If there is no such metric. The message suggests the most similar name.
    """
    if name not in METRICS:
        hint = did_you_mean(name, METRICS)
        raise UsageError(f"no metric is called {name!r}.{hint} There are: {', '.join(METRICS)}.")
    return METRICS[name]


def add_metric(metric: Metric) -> None:
    """Add a metric in this process. The metric is evaluated and shown like the built-in metrics.

    Raises:
        UsageError: If the metric has no name, if another metric has the same name, or if the kernel
            does not return a single value per resample.
    """
    registered_metric = METRICS.registered.get(metric.name)
    is_same = registered_metric == metric  # the same metric may be added again
    is_name_taken = registered_metric is not None and not is_same
    if not metric.name or is_name_taken:
        raise UsageError(
            "a metric needs a name of its own, such as Metric(..., name='my_metric'). "
            f"Got {metric.name!r}; taken are: {', '.join(METRICS)}."
        )
    # The kernel is tested with two resamples of three scores.
    correct = np.array([[2, 1, 0], [1, 1, 1]])
    wrong = correct[:, ::-1]
    scores = np.array([0.0, 0.5, 1.0])
    trial_counts = TieCounts(scores, correct, wrong)
    trial_values = metric.kernel(trial_counts)
    shape = np.shape(trial_values)
    if shape != (2,):
        raise UsageError(
            f"the kernel of {metric.name} must give values (B,) for counts (B, G). "
            f"Got shape {shape}."
        )
    METRICS[metric.name] = metric


def _add_if_metric(candidate: object) -> bool:
    """Add ``candidate`` if it is a metric, and return whether it is a metric."""
    if not isinstance(candidate, Metric):
        return False
    add_metric(candidate)
    return True


REGISTER_FUNCTIONS["a vilu.metrics.catalog.Metric"] = _add_if_metric


def not_in_percent(metrics: Iterable[Metric]) -> str:
    """Return the text after "in percent" that names the metrics in other units.

    If all ``metrics`` are shown in percent, the text is "".
    """
    titles = [metric.title for metric in metrics if not metric.percent]
    if not titles:
        return ""
    return f", but for {', '.join(titles)}"

"""The metrics by name, each with the convention that goes into its result row."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np

from vilu.errors import UsageError, nearest
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
from vilu.registry import ADDERS, Catalogue

Kernel = Callable[[TieCounts], Floats]
Question = Literal["failure", "within", "outside"]


@dataclass(frozen=True)
class Metric:
    """A metric with all its choices made.

    Attributes:
        title: Heading of its column.
        kernel: Its value (...) from counts (..., G).
        convention: What was chosen where the literature differs.
        of_probability: Whether it has a meaning only for failure probabilities.
        higher_is_better: Which way is better.
        percent: Whether tables show it in percent; else as it is.
        wanted: "always": ``evaluate`` computes it, and its table has a column; "evaluated": a
            column only where metrics are chosen; "chosen": computed only then.
        name: What it is asked for by.
        question: "failure": whether an answer is wrong, of any picture; "within": the same, of
            pictures of the classes only; "outside": whether a picture is of none of the classes, in
            place of the failure. The latter two are evaluated where some pictures are.
        across_answers: Whether it also compares other answers to the same rows, as a risk at a
            coverage does. A metric of ranking alone says nothing there: fewer wrong answers are
            another task.

    Examples:
        >>> import vilu
        >>> wrong = vilu.metrics.Metric(
        ...     "Wrong", lambda counts: counts.n_wrong / counts.n, "share of wrong answers"
        ... )
        >>> wrong.show(0.125), wrong.show(0.02, sign="+"), wrong.brackets(0.1, 0.15)
        ('12.5', '+2.0', '[10.0, 15.0]')
        >>> vilu.metrics.METRICS["aurc"].convention
        'mean selective risk, expected over ties'
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
        """A value, or with the sign "+" a difference, as tables have it."""
        return f"{100 * value:{sign}.1f}" if self.percent else f"{value:{sign}.3g}"

    def brackets(self, low: float, high: float, sign: str = "") -> str:
        """An interval as tables have it."""
        return f"[{self.show(low, sign)}, {self.show(high, sign)}]"


def _asked(question: Question, metric: Metric, convention: str) -> Metric:
    """The same metric of another question."""
    return replace(
        metric, title=f"{metric.title} {question}", convention=convention, question=question
    )


_AUROC = Metric("AUROC", auroc_kernel, "ties count half", higher_is_better=True)
_FPR95 = Metric("FPR95", fpr_at_tpr_kernel, "positive=correct, TPR 0.95, linear interpolation")
_OUTSIDE = "pictures of none of the classes against those of the classes, ties count half"
_RISKS = {"0.01": "Cov@1%", "0.05": "Cov@5%", "0.1": "Cov@10%"}
_ENTRIES = {
    "auroc": _AUROC,
    "fpr95": _FPR95,
    "auroc_within": _asked("within", _AUROC, f"pictures of the classes only, {_AUROC.convention}"),
    "fpr95_within": _asked("within", _FPR95, f"pictures of the classes only, {_FPR95.convention}"),
    "auroc_outside": _asked("outside", _AUROC, _OUTSIDE),
    "fpr95_outside": _asked(
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
        for risk, title in _RISKS.items()
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
METRICS.here.update({name: replace(metric, name=name) for name, metric in _ENTRIES.items()})


def evaluated_metrics() -> list[str]:
    """What ``evaluate`` computes unless others are chosen: ours, then those that were added."""
    return [name for name, metric in METRICS.items() if metric.wanted != "chosen"]


DEFAULT_METRICS = tuple(name for name, metric in METRICS.here.items() if metric.wanted != "chosen")
"""What ``evaluate`` computes of ours.

Those of a probability only where the uncertainty is one, those of the questions "within" and
"outside" only where some rows are of none of the classes.
"""


def get_metric(name: str) -> Metric:
    """The metric of that name.

    Raises:
        UsageError: If there is none, naming the nearest.
    """
    if name not in METRICS:
        hint = nearest(name, METRICS)
        raise UsageError(f"no metric is called {name!r}.{hint} There are: {', '.join(METRICS)}.")
    return METRICS[name]


def add_metric(metric: Metric) -> None:
    """Make a metric one of those of this process: evaluated, shown and benchmarked like ours.

    Raises:
        UsageError: If it has no name, another metric has it, or the kernel does not give a value
            for each resample.
    """
    if not metric.name or METRICS.here.get(metric.name, metric) != metric:
        raise UsageError(
            "a metric needs a name of its own, such as Metric(..., name='my_metric'). "
            f"Got {metric.name!r}; taken are: {', '.join(METRICS)}."
        )
    counts = np.array([[2, 1, 0], [1, 1, 1]])  # two resamples of three scores
    trial = TieCounts(np.array([0.0, 0.5, 1.0]), counts, counts[:, ::-1])
    shape = np.shape(metric.kernel(trial))
    if shape != (2,):
        raise UsageError(
            f"the kernel of {metric.name} must give values (B,) for counts (B, G). "
            f"Got shape {shape}."
        )
    METRICS[metric.name] = metric


def _add(candidate: object) -> bool:
    if not isinstance(candidate, Metric):
        return False
    add_metric(candidate)
    return True


ADDERS["a vilu.metrics.catalog.Metric"] = _add


def but_for(metrics: Iterable[Metric]) -> str:
    """What follows "in percent" where some are not."""
    plain = [metric.title for metric in metrics if not metric.percent]
    return f", but for {', '.join(plain)}" if plain else ""

"""The metrics by name, each with the convention that goes into its result row."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from vilu.errors import UsageError
from vilu.metrics.calibration import brier_kernel, ece_kernel, log_loss_kernel
from vilu.metrics.counts import Floats, TieCounts
from vilu.metrics.ranking import aupr_kernel, auroc_kernel, fpr_at_tpr_kernel
from vilu.metrics.selective import (
    augrc_kernel,
    aurc_kernel,
    coverage_at_risk_kernel,
    excess_aurc_kernel,
    naurc_kernel,
    risk_at_coverage_kernel,
)

Kernel = Callable[[TieCounts], Floats]


@dataclass(frozen=True)
class Metric:
    """A metric with all its choices made.

    Attributes:
        title: Heading of its column.
        kernel: Its value (...) from counts (..., G).
        convention: What was chosen where the literature differs.
        of_probability: Whether it has a meaning only for failure probabilities.
        higher_is_better: Which way is better.
    """

    title: str
    kernel: Kernel
    convention: str
    of_probability: bool = False
    higher_is_better: bool = False


METRICS = {
    "auroc": Metric("AUROC", auroc_kernel, "ties count half", higher_is_better=True),
    "fpr95": Metric("FPR95", fpr_at_tpr_kernel, "positive=correct, TPR 0.95, linear interpolation"),
    "fpr95_failure": Metric(
        "FPR95-failure",
        partial(fpr_at_tpr_kernel, positive="failure", rule="first"),
        "positive=failure, first operating point with TPR >= 0.95",
    ),
    "aupr_failure": Metric(
        "AUPR-failure", partial(aupr_kernel, positive="failure"), "average precision", higher_is_better=True
    ),
    "aupr_success": Metric(
        "AUPR-success", partial(aupr_kernel, positive="correct"), "average precision", higher_is_better=True
    ),
    "aurc": Metric("AURC", aurc_kernel, "mean selective risk, expected over ties"),
    "aurc_trapezoid": Metric(
        "AURC-trapezoid", partial(aurc_kernel, convention="trapezoid"), "trapezoids over distinct scores"
    ),
    "excess_aurc": Metric("E-AURC", excess_aurc_kernel, "mean selective risk less the finite-sample optimum"),
    "naurc": Metric("NAURC", naurc_kernel, "excess AURC over that of a random order"),
    "augrc": Metric("AUGRC", augrc_kernel, "trapezoids over distinct scores"),
    "risk_at_coverage_0.8": Metric(
        "Risk@80%", partial(risk_at_coverage_kernel, coverage=0.8), "selective risk, expected over ties"
    ),
    "coverage_at_risk_0.01": Metric(
        "Cov@1%",
        partial(coverage_at_risk_kernel, risk=0.01),
        "largest coverage of a threshold, no guarantee",
        higher_is_better=True,
    ),
    "coverage_at_risk_0.05": Metric(
        "Cov@5%",
        partial(coverage_at_risk_kernel, risk=0.05),
        "largest coverage of a threshold, no guarantee",
        higher_is_better=True,
    ),
    "coverage_at_risk_0.1": Metric(
        "Cov@10%",
        partial(coverage_at_risk_kernel, risk=0.1),
        "largest coverage of a threshold, no guarantee",
        higher_is_better=True,
    ),
    "ece": Metric("ECE", ece_kernel, "binary, 15 bins of equal width", of_probability=True),
    "ece_mass": Metric(
        "ECE-mass", partial(ece_kernel, binning="mass"), "binary, 15 bins of equal mass", of_probability=True
    ),
    "brier": Metric("Brier", brier_kernel, "of the failure probability", of_probability=True),
    "log_loss": Metric(
        "log-loss",
        log_loss_kernel,
        "natural logarithm, probabilities at least 1e-12 from certainty",
        of_probability=True,
    ),
}

DEFAULT_METRICS = (
    "auroc",
    "fpr95",
    "aupr_failure",
    "aupr_success",
    "aurc",
    "excess_aurc",
    "augrc",
    "risk_at_coverage_0.8",
    "coverage_at_risk_0.01",
    "coverage_at_risk_0.05",
    "coverage_at_risk_0.1",
    "ece",
    "ece_mass",
    "brier",
    "log_loss",
)
"""What ``evaluate`` computes; those of a probability only where the uncertainty is one."""


def get_metric(name: str) -> Metric:
    """The metric of that name.

    Raises:
        UsageError: If there is none, naming the nearest.
    """
    if name not in METRICS:
        near = difflib.get_close_matches(name, METRICS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"no metric is called {name!r}.{hint} There are: {', '.join(METRICS)}.")
    return METRICS[name]

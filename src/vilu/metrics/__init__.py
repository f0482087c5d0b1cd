"""Metrics of failure prediction: functions of ``(uncertainty, failure)`` in float64, tie-aware, order-independent.

``failure`` is 1 where the frozen model is wrong, and a higher uncertainty means more likely wrong.
A metric that is undefined (one class only) is NaN; input that cannot be is a ``DataError``.
"""

from vilu.metrics.bootstrap import Difference, Interval, bootstrap_interval, paired_bootstrap
from vilu.metrics.catalog import DEFAULT_METRICS, METRICS, Metric
from vilu.metrics.ranking import aupr_failure, aupr_success, auroc, fpr_at_tpr, roc_curve_points
from vilu.metrics.reliability import brier, ece, log_loss
from vilu.metrics.selective import (
    augrc,
    aurc,
    coverage_at_risk,
    excess_aurc,
    naurc,
    risk_at_coverage,
    risk_coverage_curve,
)

__all__ = [
    "DEFAULT_METRICS",
    "METRICS",
    "Difference",
    "Interval",
    "Metric",
    "augrc",
    "aupr_failure",
    "aupr_success",
    "aurc",
    "auroc",
    "bootstrap_interval",
    "brier",
    "coverage_at_risk",
    "ece",
    "excess_aurc",
    "fpr_at_tpr",
    "log_loss",
    "naurc",
    "paired_bootstrap",
    "risk_at_coverage",
    "risk_coverage_curve",
    "roc_curve_points",
]

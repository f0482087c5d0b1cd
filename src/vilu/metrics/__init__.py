"""Metrics for failure prediction: functions of ``(uncertainty, failure)`` in float64.

``failure`` is 1 where the frozen model answers wrong. A higher ``uncertainty`` means that a wrong
answer is more likely. Ties are handled exactly, and no metric depends on the row order. An
undefined metric is NaN, for example AUROC if all answers are right. Invalid input raises a
``DataError``.

Each name is imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vilu.metrics.bootstrap import Difference as Difference
    from vilu.metrics.bootstrap import Interval as Interval
    from vilu.metrics.bootstrap import bootstrap_interval as bootstrap_interval
    from vilu.metrics.bootstrap import paired_bootstrap as paired_bootstrap
    from vilu.metrics.catalog import DEFAULT_METRICS as DEFAULT_METRICS
    from vilu.metrics.catalog import METRICS as METRICS
    from vilu.metrics.catalog import Metric as Metric
    from vilu.metrics.ranking import aupr_failure as aupr_failure
    from vilu.metrics.ranking import aupr_success as aupr_success
    from vilu.metrics.ranking import auroc as auroc
    from vilu.metrics.ranking import fpr_at_tpr as fpr_at_tpr
    from vilu.metrics.ranking import roc_curve_points as roc_curve_points
    from vilu.metrics.reliability import brier as brier
    from vilu.metrics.reliability import ece as ece
    from vilu.metrics.reliability import log_loss as log_loss
    from vilu.metrics.selective import augrc as augrc
    from vilu.metrics.selective import aurc as aurc
    from vilu.metrics.selective import coverage_at_risk as coverage_at_risk
    from vilu.metrics.selective import excess_aurc as excess_aurc
    from vilu.metrics.selective import naurc as naurc
    from vilu.metrics.selective import risk_at_coverage as risk_at_coverage
    from vilu.metrics.selective import risk_coverage_curve as risk_coverage_curve

# maps each module to the module's public names, separated by spaces
_NAMES_OF_MODULE = {
    "vilu.metrics.bootstrap": "Difference Interval bootstrap_interval paired_bootstrap",
    "vilu.metrics.catalog": "DEFAULT_METRICS METRICS Metric",
    "vilu.metrics.ranking": "aupr_failure aupr_success auroc fpr_at_tpr roc_curve_points",
    "vilu.metrics.reliability": "brier ece log_loss",
    "vilu.metrics.selective": (
        "augrc aurc coverage_at_risk excess_aurc naurc risk_at_coverage risk_coverage_curve"
    ),
}
_MODULE_OF_NAME = {
    name: module for module, names in _NAMES_OF_MODULE.items() for name in names.split()
}

__all__ = [*_MODULE_OF_NAME]  # noqa: PLE0604 - the keys are strings


if not TYPE_CHECKING:  # with ``__getattr__``, a type checker would accept every name

    def __getattr__(name: str) -> object:
        if name not in _MODULE_OF_NAME:
            raise AttributeError(f"module 'vilu.metrics' has no attribute {name!r}")
        value = getattr(importlib.import_module(_MODULE_OF_NAME[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)

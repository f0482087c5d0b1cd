"""The monitor with the tests of MAPIE (``pip install 'vilu[mapie]'``), for comparison on the same rows.

Exchangeability: ``OnlineMartingaleTest``, the simple jumper martingale. Audit: ``RiskMonitoring``,
an empirical Bernstein bound from below that holds at all times (Podkopaev and Ramdas, ICLR 2022);
it has no bound from above. Every row is compared with all before it, one by one, so this is for
thousands of rows; and there is no state to save.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from vilu.calibration.monitor.audit import Audit, AuditVerdict
from vilu.calibration.monitor.martingale import Reference
from vilu.calibration.monitor.monitor import Monitor
from vilu.calibration.monitor.status import Test
from vilu.calibration.monitor.watch import Watch
from vilu.errors import UsageError
from vilu.extras import import_extra
from vilu.metrics.counts import Floats, Ints


@dataclass
class JumperWatch(Watch):
    """MAPIE's p-values and its simple jumper martingale."""

    jumper: Any = None
    seen: list[float] = field(default_factory=list)

    def update(self, values: Floats, rows: Ints, seed: int) -> None:  # noqa: ARG002 - MAPIE has its own random numbers
        """Take in the next values."""
        wealth = np.empty(len(values))
        for place, value in enumerate(values.tolist()):
            p = self.jumper.compute_p_value(value, np.asarray(self.seen))
            wealth[place] = self.jumper.update_simple_jumper_martingale(p)
            self.seen.append(value)
        self.test = self.test.after(np.log(wealth), rows)


@dataclass(frozen=True)
class BernsteinAudit(Audit):
    """MAPIE's lower bound of the error rate."""

    monitoring: Any = None

    @property
    def lower(self) -> float:
        """Lower bound of the error rate."""
        return float(self.monitoring.online_risk_lower_bound_latest or 0.0)

    @property
    def upper(self) -> float:
        """There is none."""
        return 1.0

    @property
    def verdict(self) -> AuditVerdict:
        """What the answers so far show."""
        return "broken" if self.lower > self.promise else "not enough audited answers"

    def path(self, failure: Ints) -> Floats:
        """(B,) log(1/delta) where the bound is above the promise, else 0: MAPIE gives a bound and no wealth."""
        wrong = np.asarray(failure, dtype=np.int64)
        self.monitoring.update(np.zeros_like(wrong), wrong)
        bounds = self.monitoring.online_risk_lower_bound_sequence_history[self.n :]
        return np.where(bounds > self.promise, -math.log(self.delta), 0.0)

    def n_needed(self) -> int | None:
        """Not known."""
        return None


class MapieMonitor(Monitor):
    """``Monitor`` with the tests of MAPIE."""

    def _watch(self, test: Test, values: Floats) -> Watch:
        jumper = import_extra("mapie.exchangeability_testing", "mapie").OnlineMartingaleTest(
            test_method="jumper_martingale",
            test_level=test.level,
            warn=False,
            random_state=self.seed,
        )
        return JumperWatch(test, Reference.of(values), jumper=jumper, seen=np.sort(values).tolist())

    def _audit(self, promise: float, delta: float) -> Audit:
        error = import_extra("mapie.risk_control", "mapie").BinaryRisk(
            risk_occurrence=lambda y_true, y_pred: y_pred != y_true,
            risk_condition=lambda y_true, y_pred: np.full(len(y_true), True),  # noqa: ARG005 - MAPIE's signature
            higher_is_better=False,
        )
        # half of MAPIE's level is for a threshold that is estimated; ours is given
        monitoring = import_extra("mapie.exchangeability_testing", "mapie").RiskMonitoring(
            error, test_level=2 * delta, threshold=promise, warn=False
        )
        return BernsteinAudit(promise, delta, monitoring=monitoring)

    def save(self, path: str | Path) -> None:
        """Refused: the tests of MAPIE keep their state in memory."""
        raise UsageError(
            f"the tests of MAPIE keep no state, so {path} cannot be written. Leave it out."
        )

    def resume(self, path: str | Path) -> Self:
        """Refused, as ``save`` is."""
        raise UsageError(
            f"the tests of MAPIE keep no state, so {path} cannot be read. Leave it out."
        )

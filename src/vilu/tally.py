"""What an evaluation needs to know of some scores, whether each row is at hand or only how many there are of a kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from vilu.metrics.bootstrap import Interval
from vilu.metrics.catalog import Kernel
from vilu.metrics.counts import TieCounts


class Scores(Protocol):
    """Scores with known failures: ``metrics.bootstrap.Sample`` of rows, or ``metrics.histogram.Histogram``."""

    @property
    def n(self) -> int:
        """Number of rows."""

    @property
    def n_failures(self) -> int:
        """How many of them are wrong."""

    @property
    def note(self) -> str | None:
        """What to say beside the metrics; None where they are exact."""

    def counts(self) -> TieCounts:
        """What every metric is computed from."""

    def intervals(
        self, kernels: Mapping[str, Kernel], *, n_resamples: int, confidence: float, seed: int
    ) -> dict[str, Interval]:
        """Metrics with stratified percentile bootstrap intervals."""


@dataclass(frozen=True)
class Tally:
    """The rows of one method on one data set.

    Attributes:
        scores: The rows that have both an uncertainty and a known failure.
        n_unlabelled: Rows with an uncertainty whose failure is unknown.
        n_unusable: Rows without an uncertainty.
        probability: The same rows with a probability of failure in place of the uncertainty: the calibrated one, or the
            uncertainty itself where that is one; None where there is none.
        method: Name of the predictor.
        dataset: Name of the data set.
        split: Name of its part.
        seed: Seed of the predictor.
    """

    scores: Scores
    n_unlabelled: int
    n_unusable: int
    probability: Scores | None
    method: str | None = None
    dataset: str | None = None
    split: str | None = None
    seed: int | None = None


@runtime_checkable
class Tallied(Protocol):
    """What can be evaluated: ``Outcomes``, or a ``ScoreFolder``."""

    def tally(self) -> Tally:
        """The counts."""

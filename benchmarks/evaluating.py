"""Times metrics and intervals of many rows, and compares our metrics with other libraries.

The intervals for all default metrics are timed: for 100,000 rows from 1,000 resamples, and for ten
million rows from a histogram. The libraries are scikit-learn and, if installed, torch-uncertainty
(not a dependency here). All libraries get the same million rows, in turn. A library's result is the
shortest time.
"""

from __future__ import annotations

import importlib.util
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

import vilu
from vilu.metrics.histogram import Histogram
from vilu.outcomes.outcomes import Tally


def rows(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Make n rows. Return the probabilities, all different, and the failures."""
    rng = np.random.default_rng(0)
    failure = rng.random(n) < 0.3
    return 1 / (1 + np.exp(1 - 1.5 * failure - rng.normal(size=n))), failure.astype(np.int64)


@dataclass
class HistogramOutcomes:
    """Rows with a histogram made part by part, as for a folder of scores."""

    uncertainty: np.ndarray
    failure: np.ndarray
    part: int = 2**20

    def tally(self) -> Tally:
        """Make the histogram of all rows."""
        starts = range(0, len(self.failure), self.part)
        parts = (slice(start, start + self.part) for start in starts)
        histograms = (Histogram.of(self.uncertainty[part], self.failure[part]) for part in parts)
        whole = Histogram.total(histograms)
        empty = Histogram.empty()
        return Tally(whole, whole, empty, 0, 0, whole)


def seconds(run: Callable[[], object], repeats: int = 1) -> float:
    """Return the shortest time among several runs."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        elapsed = time.perf_counter() - start
        times.append(elapsed)
    return min(times)


def other_libraries(
    uncertainty: np.ndarray, failure: np.ndarray
) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Map a metric name to two functions, from vilu and from the other library."""
    from sklearn import metrics as theirs

    ours = vilu.metrics
    pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "auroc, scikit-learn": (
            lambda: ours.auroc(uncertainty, failure),
            lambda: theirs.roc_auc_score(failure, uncertainty),
        ),
        "aupr_failure, scikit-learn": (
            lambda: ours.aupr_failure(uncertainty, failure),
            lambda: theirs.average_precision_score(failure, uncertainty),
        ),
    }
    if importlib.util.find_spec("torch_uncertainty"):
        import torch
        from torch_uncertainty import metrics as uncertain  # type: ignore[import-not-found, unused-ignore]

        # Class 0 is the answer for every row. The probability of class 0 is high if the uncertainty
        # is low. Class 0 is right if there is no failure.
        doubt = torch.from_numpy(uncertainty / 2)
        probability, right = torch.stack([1 - doubt, doubt], dim=1), torch.from_numpy(failure)
        for name, metric_class, of in (
            ("aurc", uncertain.AURC, ours.aurc),
            ("augrc", uncertain.AUGRC, ours.augrc),
        ):

            def run(metric_class: type = metric_class) -> object:
                metric = metric_class()
                metric.update(probability, right)
                return metric.compute()

            pairs[f"{name}, torch-uncertainty"] = (lambda of=of: of(uncertainty, failure), run)  # type: ignore[misc]
    return pairs


def main() -> dict[str, float]:
    """Print and return seconds, and the other libraries' times divided by ours."""
    warnings.simplefilter("ignore")
    figures: dict[str, float] = {}
    uncertainty, failure = rows(10**5)
    outcomes = vilu.Outcomes(uncertainty, failure, is_probability=True)
    figures["evaluate_1e5_seconds"] = seconds(lambda: vilu.evaluate(outcomes, n_resamples=1_000))
    print(
        "evaluate, 100,000 rows, default metrics, 1,000 resamples: "
        f"{figures['evaluate_1e5_seconds']:.1f} s"
    )
    many = HistogramOutcomes(*rows(10**7))
    figures["evaluate_1e7_seconds"] = seconds(lambda: vilu.evaluate(many, n_resamples=1_000))
    print(
        "the same of 10,000,000 rows, counted and evaluated: "
        f"{figures['evaluate_1e7_seconds']:.1f} s"
    )
    million_rows = rows(10**6)
    functions = other_libraries(*million_rows)
    for name, (ours, theirs) in functions.items():
        our_seconds, their_seconds = seconds(ours, 3), seconds(theirs, 3)
        figures[f"times_{name.replace(', ', '_')}"] = their_seconds / our_seconds
        print(
            f"{name}, 1,000,000 rows: {their_seconds:.2f} s, ours {our_seconds:.2f} s: "
            f"{their_seconds / our_seconds:.1f} times"
        )
    return figures


if __name__ == "__main__":
    main()

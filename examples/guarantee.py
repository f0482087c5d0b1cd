"""At most 5 % of the accepted may be wrong: which threshold, and how many labels does it take?

`vilu.certify` finds the threshold. Too few labels guarantee nothing. With more labels, more answers
are accepted. The script also counts how often the guarantee is broken. The scores are simulated, so
the truth is known. An answer with the uncertainty u is wrong with the probability 0.6 u². If all
answers with u ≤ 0.5 are accepted, 5 % of them are wrong.
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

import vilu

BEST_THRESHOLD = 0.5
"""The threshold if the truth is known: 5 % of the accepted answers are wrong."""

BEST_COVERAGE = 0.5
"""The share of the answers up to this threshold. The uncertainty is uniform between 0 and 1."""


def labelled_answers(n: int, *, seed: int) -> vilu.Outcomes:
    """Simulate answers with an uncertainty and a known failure."""
    random = np.random.default_rng(seed)
    uncertainty = random.random(n)
    failure_probability = 0.6 * uncertainty**2
    failure = random.random(n) < failure_probability
    return vilu.Outcomes(uncertainty=uncertainty, failure=failure.astype(int))


def mean_coverage(n_labels: int) -> float:
    """Certify 20 rules, and return the mean share of the answers that they accept."""
    coverages = []
    for seed in range(20):
        outcomes = labelled_answers(n_labels, seed=seed)
        rule = vilu.certify(outcomes, max_risk=0.05, confidence=0.95)
        coverages.append(rule.coverage)
    return float(np.mean(coverages))


def main() -> Figure:
    """Certify thresholds with few labels and with many."""
    rule = vilu.certify(labelled_answers(50, seed=0), max_risk=0.05, confidence=0.95)
    (threshold,) = rule.thresholds.values()
    print(f"with 50 labels, nothing is guaranteed: at least {threshold.n_needed} labels are needed")
    assert not rule.feasible
    assert threshold.n_needed == 60  # 0.95 ** 59 is below 0.05, and one row sets the threshold

    coverage = {}
    for n_labels in (100, 500, 2_000, 20_000):
        coverage[n_labels] = mean_coverage(n_labels)
        print(
            f"with {n_labels:>6,} labels, {coverage[n_labels]:4.0%} of the answers are accepted "
            f"({BEST_COVERAGE:.0%} would be possible)"
        )
    assert coverage[100] < coverage[500] < coverage[2_000] < coverage[20_000] < BEST_COVERAGE
    assert coverage[20_000] > 0.45

    # A confidence of 95 % means that, on average, at most one guarantee in twenty is broken.
    is_broken = []
    for seed in range(1_000, 1_300):
        rule = vilu.certify(labelled_answers(1_000, seed=seed), max_risk=0.05)
        is_broken.append(rule.threshold is not None and rule.threshold > BEST_THRESHOLD)
    broken_share = np.mean(is_broken)
    print(f"of 300 guarantees, {broken_share:.1%} are broken (up to 5 % may be)")
    assert broken_share <= 0.08  # Three standard deviations above 5 % would be 8.8 %.

    # The other direction: the coverage is given, and `certify` bounds the risk.
    rule = vilu.certify(labelled_answers(2_000, seed=7), min_coverage=0.8, confidence=0.95)
    assert rule.risk_bound is not None
    print(
        f"if 80 % of the answers must be accepted, at most {rule.risk_bound:.1%} of them are wrong "
        "(the true risk is 12.8 % at 80 %)"
    )
    assert 0.128 < rule.risk_bound < 0.2
    return coverage_figure(coverage)


def coverage_figure(coverage: dict[int, float]) -> Figure:
    """Draw the share of accepted answers by the number of labels."""
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.add_subplot()
    accepted_percent = [100 * share for share in coverage.values()]
    axes.plot(list(coverage), accepted_percent, "o-")
    best_percent = 100 * BEST_COVERAGE
    axes.axhline(best_percent, color="black", linestyle="--")
    axes.annotate(
        "if the truth is known", (100, best_percent), xytext=(0, 4), textcoords="offset points"
    )
    axes.set(xscale="log", xlabel="labels")
    axes.set(ylim=(0, 60), ylabel="accepted answers (%)")
    axes.set_title("At most 5 % of the accepted are wrong")
    return figure


if __name__ == "__main__":
    main()

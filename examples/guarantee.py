"""At most 5 % of the accepted may be wrong: which threshold, and how many labels does it take?

Shows what `vilu.certify` guarantees, that too few labels guarantee nothing, what more labels
bring, and that the guarantee is kept as often as it says. The scores are simulated, so that the
truth is known: an answer with the uncertainty u is wrong with the probability 0.6 u², so that 5 %
of those accepted are wrong where u ≤ 0.5 is accepted.
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

import vilu

BEST = 0.5
"""The threshold of somebody who knows the truth, and the share of the answers that it accepts."""


def labelled(n: int, seed: int) -> vilu.Outcomes:
    """``n`` scored answers, of which somebody has said whether they are wrong."""
    random = np.random.default_rng(seed)
    uncertainty = random.random(n)
    return vilu.Outcomes(uncertainty, (random.random(n) < 0.6 * uncertainty**2).astype(int))


def main() -> Figure:
    """From 50 to 20,000 labels, then 300 times 1,000."""
    few = vilu.certify(labelled(50, seed=0), max_risk=0.05, confidence=0.95)
    (certificate,) = few.thresholds.values()
    print(f"50 labels: nothing is guaranteed, {certificate.n_needed} are needed at least")
    assert not few.feasible
    assert certificate.n_needed == 60  # 0.95 ** 59 is below 0.05, and one row sets the threshold

    mean = {}
    for n in (100, 500, 2_000, 20_000):
        found = [
            vilu.certify(labelled(n, seed), max_risk=0.05, confidence=0.95) for seed in range(20)
        ]
        mean[n] = float(np.mean([one.coverage for one in found]))
        print(
            f"{n:>6,} labels: {mean[n]:4.0%} of the answers are accepted, "
            f"of {BEST:.0%} that could be"
        )
    assert mean[100] < mean[500] < mean[2_000] < mean[20_000] < BEST
    assert mean[20_000] > 0.45

    # Once is luck. In one calibration of twenty the guarantee may be broken, and not oftener.
    thresholds = [
        vilu.certify(labelled(1_000, seed), max_risk=0.05).threshold for seed in range(1_000, 1_300)
    ]
    broken = np.mean([threshold is not None and threshold > BEST for threshold in thresholds])
    print(f"of 300 such guarantees {broken:.1%} are broken, where 5 % may be")
    assert broken <= 0.08  # three standard deviations above 5 % would be 8.8 %

    # The other way round: a share has to be accepted, and what can be said of its errors?
    asked = vilu.certify(labelled(2_000, seed=7), min_coverage=0.8, confidence=0.95)
    assert asked.risk_bound is not None
    print(
        f"who must accept 80 % has at most {asked.risk_bound:.1%} wrong ones (in truth 12.8 % at "
        "80 %)"
    )
    assert 0.128 < asked.risk_bound < 0.2
    return drawn(mean)


def drawn(mean: dict[int, float]) -> Figure:
    """What labels bring."""
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(list(mean), [100 * share for share in mean.values()], "o-")
    axes.axhline(100 * BEST, color="black", linestyle="--")
    axes.annotate(
        "who knows the truth", (100, 100 * BEST), xytext=(0, 4), textcoords="offset points"
    )
    axes.set(
        xscale="log",
        ylim=(0, 60),
        xlabel="labels",
        ylabel="accepted (%)",
        title="At most 5 % wrong",
    )
    return figure


if __name__ == "__main__":
    main()

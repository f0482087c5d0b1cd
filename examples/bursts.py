"""Photos come in bursts: what does the guarantee count, photos or bursts?

A camera takes 20 photos of every animal. All photos of a burst look alike, so their answers are
right or wrong together. ``vilu.certify`` counts every photo as a draw, and its guarantee is broken
too often. ``vilu.certify_clusters`` counts bursts. The bursts are simulated, so that the truth is
known: a photo with the uncertainty u is wrong with the probability 0.7 u^6.
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

import vilu
from vilu.calibration.clusters import correlation

N_BURSTS, SIZE, REPEATS = 150, 20, 60


def risk(threshold: float) -> float:
    """The true error rate of the photos with an uncertainty up to a threshold: 0.7 t^6 / 7."""
    return 0.1 * threshold**6


def bursts(seed: int) -> tuple[vilu.Outcomes, list[str]]:
    """Labelled photos of bursts, and the name of the burst of each."""
    random = np.random.default_rng(seed)
    burst = np.repeat(np.arange(N_BURSTS), SIZE)
    uncertainty = random.random(N_BURSTS)[burst]
    shares_fate = random.random(len(burst)) < 0.9
    fate = np.where(shares_fate, random.random(N_BURSTS)[burst], random.random(len(burst)))
    failure = (fate < 0.7 * uncertainty**6).astype(int)
    return vilu.Outcomes(uncertainty, failure), [f"burst {index}" for index in burst]


def main() -> Figure:
    """One calibration in words, and then 60."""
    outcomes, names = bursts(seed=0)
    by_photo = vilu.certify(outcomes, max_risk=0.05)
    accepted = by_photo.accept(outcomes.uncertainty)
    _, index = np.unique(names, return_inverse=True)
    print(f"by photos: {by_photo}")
    print(f"but these are {correlation(outcomes.failure[accepted], index[accepted])}")
    by_burst = vilu.certify_clusters(outcomes, names, "majority", max_risk=0.05)
    print(f"by bursts: {by_burst}")
    # 150 bursts show less than 3,000 photos would: a wrong row costs a whole cluster
    wrong_rows = vilu.certify_clusters(outcomes, names, "ratio", max_risk=0.1)
    print(f"wrong photos among the accepted: {wrong_rows}")

    thresholds: dict[str, list[float]] = {"photos": [], "bursts": []}
    for seed in range(1, REPEATS + 1):
        outcomes, names = bursts(seed)
        rows = vilu.certify(outcomes, max_risk=0.05)
        clusters = vilu.certify_clusters(outcomes, names, "majority", max_risk=0.05)
        thresholds["photos"].append(rows.threshold or 0.0)
        thresholds["bursts"].append(clusters.threshold or 0.0)
    broken = {}
    for counted, found in thresholds.items():
        broken[counted] = float(np.mean([risk(threshold) > 0.05 for threshold in found]))
        print(f"of {REPEATS} guarantees by {counted} {broken[counted]:.0%} are broken; 5 % may be")
    assert broken["photos"] > 0.15
    assert broken["bursts"] <= 0.1

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    axes.hist(list(thresholds.values()), bins=20, label=list(thresholds))
    axes.axvline(0.5 ** (1 / 6), color="black", linestyle="--", label="5 % are wrong")
    axes.set_xlabel("certified threshold")
    axes.set_ylabel("calibrations")
    axes.legend(title="counted as draws")
    return figure


if __name__ == "__main__":
    main()

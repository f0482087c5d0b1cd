"""Photos come in bursts: what does the guarantee count, photos or bursts?

A camera takes 20 photos of every animal. All photos of a burst look alike, so their answers are
right or wrong together. ``vilu.certify`` counts every photo as an independent draw, so its
guarantee is broken too often. ``vilu.certify_clusters`` counts bursts. The bursts are simulated, so
the truth is known. A photo with the uncertainty u is wrong with the probability 0.7 u^6.
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

import vilu
from vilu.calibration.clusters import correlation

N_BURSTS = 150
PHOTOS_PER_BURST = 20
N_CALIBRATIONS = 60


def true_risk(threshold: float) -> float:
    """Return the true share of wrong answers among photos up to a threshold: 0.7 t^6 / 7."""
    return 0.1 * threshold**6


def labelled_bursts(*, seed: int) -> tuple[vilu.Outcomes, list[str]]:
    """Simulate labelled photos, and name the burst of each photo."""
    random = np.random.default_rng(seed)
    burst = np.repeat(np.arange(N_BURSTS), PHOTOS_PER_BURST)
    n_photos = len(burst)
    uncertainty = random.random(N_BURSTS)[burst]
    # Nine photos in ten share one number, drawn once for their burst, so they are wrong together.
    # The others have a number of their own.
    follows_burst = random.random(n_photos) < 0.9
    draw_of_burst = random.random(N_BURSTS)[burst]
    draw_of_photo = random.random(n_photos)
    draw = np.where(follows_burst, draw_of_burst, draw_of_photo)
    failure = (draw < 0.7 * uncertainty**6).astype(int)
    burst_names = [f"burst {index}" for index in burst]
    return vilu.Outcomes(uncertainty=uncertainty, failure=failure), burst_names


def main() -> Figure:
    """Certify one calibration by photos and by bursts, then 60 of them."""
    outcomes, burst_names = labelled_bursts(seed=0)
    by_photo = vilu.certify(outcomes, max_risk=0.05)
    print(f"by photos: {by_photo}")
    accepted = by_photo.accept(outcomes.uncertainty)
    _, burst_index = np.unique(burst_names, return_inverse=True)
    together = correlation(failure=outcomes.failure[accepted], cluster=burst_index[accepted])
    print(f"the accepted photos are {together}")
    by_burst = vilu.certify_clusters(outcomes, clusters=burst_names, risk="majority", max_risk=0.05)
    print(f"by bursts: {by_burst}")
    # 150 bursts prove less than 3,000 independent photos would, so this target is laxer.
    wrong_photos = vilu.certify_clusters(outcomes, clusters=burst_names, risk="ratio", max_risk=0.1)
    print(f"wrong photos, with bursts as draws: {wrong_photos}")

    thresholds = certified_thresholds()
    broken_share = {}
    for counted, certified in thresholds.items():
        is_broken = [true_risk(threshold) > 0.05 for threshold in certified]
        broken_share[counted] = float(np.mean(is_broken))
        print(
            f"of {N_CALIBRATIONS} guarantees by {counted}, {broken_share[counted]:.0%} are broken "
            "(up to 5 % may be)"
        )
    assert broken_share["photos"] > 0.15
    assert broken_share["bursts"] <= 0.1
    return threshold_figure(thresholds)


def certified_thresholds() -> dict[str, list[float]]:
    """Repeat the calibration with new bursts, and collect the thresholds."""
    thresholds: dict[str, list[float]] = {"photos": [], "bursts": []}
    for seed in range(1, N_CALIBRATIONS + 1):
        outcomes, names = labelled_bursts(seed=seed)
        by_photo = vilu.certify(outcomes, max_risk=0.05)
        by_burst = vilu.certify_clusters(outcomes, clusters=names, risk="majority", max_risk=0.05)
        thresholds["photos"].append(by_photo.threshold or 0.0)
        thresholds["bursts"].append(by_burst.threshold or 0.0)
    return thresholds


def threshold_figure(thresholds: dict[str, list[float]]) -> Figure:
    """Draw how often each threshold was certified."""
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    axes.hist(list(thresholds.values()), bins=20, label=list(thresholds))
    axes.axvline(0.5 ** (1 / 6), color="black", linestyle="--", label="5 % are wrong")
    axes.set_xlabel("certified threshold")
    axes.set_ylabel("calibrations")
    axes.legend(title="counted")
    return figure


if __name__ == "__main__":
    main()

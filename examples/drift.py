"""The camera has changed: does what was guaranteed still hold, and what do I do?

`vilu.Monitor` compares new images with those of the calibration. It is quiet while they are alike.
It raises an alarm when they differ, without any label. Then new images are labelled, and a new
calibration gives a guarantee that holds again. The embeddings are simulated. Before the change half
of the images are blurred, and after it nine in ten are.
"""

from __future__ import annotations

import vilu
from example_data import simulated


def embeddings(n: int, *, seed: int, blurred: float, labelled: bool = True) -> vilu.Embeddings:
    """Simulate embeddings of ``n`` images. The share ``blurred`` of them is blurred."""
    image, text, label = simulated(n, seed=seed, blurred=blurred)
    # Every simulated day has ids of its own, because a monitor counts a repeated row once.
    ids = [f"{seed}/{index}" for index in range(n)]
    target = label if labelled else None
    return vilu.Embeddings(image, text, target=target, logit_scale=20.0, ids=ids)


def main() -> None:
    """Monitor the old camera and the new one, then calibrate again."""
    predictor = vilu.ViLUPlus(seed=0).fit(embeddings(600, seed=10, blurred=0.5))
    calibration = vilu.score(predictor, embeddings(1_000, seed=11, blurred=0.5))
    rule = vilu.certify(calibration, max_risk=0.05)
    print(f"the guarantee: {rule}")

    monitor = vilu.Monitor(calibration, rule)
    old_camera = embeddings(800, seed=12, blurred=0.5, labelled=False)
    status = monitor.update(vilu.score(predictor, old_camera))
    print(f"after 800 rows of the old camera, the monitor says: {status.verdict}")
    assert status.verdict == "holds"

    new_camera = embeddings(800, seed=13, blurred=0.9, labelled=False)
    status = monitor.update(vilu.score(predictor, new_camera))
    print(
        f"after 800 rows of the new camera, the monitor says: {status.verdict} "
        f"(alarm at row {status.raised_at})"
    )
    assert status.verdict == "shifted: guarantee void"
    assert status.raised_at is not None
    assert 800 <= status.raised_at < 1_200

    new_rule = calibrate_again(predictor)
    assert new_rule.coverage < rule.coverage - 0.2  # More answers go to review now.


def calibrate_again(predictor: vilu.ViLUPlus) -> vilu.Rule:
    """Certify a rule on labelled images of the new camera, and monitor it.

    The images must be drawn at random. The predictor stays as it is, without a new fit.
    """
    calibration = vilu.score(predictor, embeddings(1_500, seed=14, blurred=0.9))
    rule = vilu.certify(calibration, max_risk=0.05)
    print(f"the new guarantee: {rule}")
    assert rule.feasible

    later = vilu.score(predictor, embeddings(2_000, seed=15, blurred=0.9))
    accepted = rule.accept(later.uncertainty)
    risk = later.failure[accepted].mean()
    monitor = vilu.Monitor(calibration, rule)
    status = monitor.update(later)
    print(
        f"on later rows, {risk:.1%} of the accepted answers are wrong, "
        f"and the new monitor says: {status.verdict}"
    )
    assert risk < 0.06
    assert status.verdict == "holds"
    return rule


if __name__ == "__main__":
    main()

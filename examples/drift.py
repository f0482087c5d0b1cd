"""The camera has changed: does what was guaranteed still hold, and what do I do?

Shows `vilu.Monitor`: it says nothing while new images are like those of the calibration, raises an
alarm without any label when they no longer are, and after it labels of a few hundred new images
give a guarantee that holds again. The embeddings are simulated: half of the images were blurred,
now nine in ten are.
"""

from __future__ import annotations

import vilu
from example_data import simulated


def rows(n: int, *, seed: int, blurred: float = 0.5, labelled: bool = True) -> vilu.Embeddings:
    """Embeddings of images; the names of the rows tell the days apart."""
    image, text, label = simulated(n, seed=seed, blurred=blurred)
    return vilu.Embeddings(
        image,
        text,
        target=label if labelled else None,
        logit_scale=20.0,
        ids=[f"{seed}/{i}" for i in range(n)],
    )


def main() -> None:
    """Before, after, and after that."""
    predictor = vilu.ViLUPlus(seed=0).fit(rows(600, seed=10))
    calibration = vilu.score(predictor, rows(1_000, seed=11))
    rule = vilu.certify(calibration, max_risk=0.05)
    print(f"guaranteed: {rule}")

    monitor = vilu.Monitor(calibration, rule)
    quiet = monitor.update(vilu.score(predictor, rows(800, seed=12, labelled=False)))
    print(f"after 800 rows: {quiet.verdict}")
    assert quiet.verdict == "holds"

    status = monitor.update(vilu.score(predictor, rows(800, seed=13, blurred=0.9, labelled=False)))
    print(f"after 800 of the new camera: {status.verdict} since row {status.raised_at}")
    assert status.verdict == "shifted: guarantee void"
    assert status.raised_at is not None
    assert 800 <= status.raised_at < 1_200

    # What to do: label new images, drawn at random, calibrate on them, and begin a new monitor. No
    # new fit is needed.
    after = vilu.score(predictor, rows(1_500, seed=14, blurred=0.9))
    renewed = vilu.certify(after, max_risk=0.05)
    print(f"guaranteed anew: {renewed}")
    assert renewed.feasible
    assert renewed.coverage < rule.coverage - 0.2  # the same guarantee now costs more abstentions

    later = vilu.score(predictor, rows(2_000, seed=15, blurred=0.9))
    wrong = later.failure[renewed.accept(later.uncertainty)].mean()
    again = vilu.Monitor(after, renewed).update(later)
    print(
        f"on later rows {wrong:.1%} of the accepted are wrong, and the new monitor says: "
        f"{again.verdict}"
    )
    assert wrong < 0.06
    assert again.verdict == "holds"


if __name__ == "__main__":
    main()

"""I cannot review every doubtful image: which few classes may it show?

Instead of one answer every image gets a set of labels, which holds the right one for at least 90 %
of the images. A trusted answer stands alone; a doubtful one brings company.
"""

from __future__ import annotations

import json
from collections import Counter

import numpy as np

import vilu
from example_data import simulated


def main() -> None:
    """Calibrate sets, and count what they hold."""
    image, text, label = simulated(2400, seed=1)
    names = [f"class {number}" for number in range(len(text))]
    data = vilu.Embeddings(
        image=image, text=text, target=label, logit_scale=20.0, class_names=names
    )
    parts = data.split(fit=0.4, calibration=0.6, seed=0)
    model = vilu.Selective(vilu.ViLUPlus(seed=0)).fit(parts.fit)
    model.calibrate(parts.calibration, label_sets="lac", max_miss=0.1)

    image, _, label = simulated(3000, seed=2)
    outcomes = model.predict(image)
    sets = [json.loads(label_set or "[]") for label_set in outcomes.label_set or ()]
    holds = np.array([names[right] in one for right, one in zip(label, sets, strict=True)])
    sizes = Counter(map(len, sets))

    print(f"the right label is in {holds.mean():.1%} of the sets")
    for size in sorted(sizes):
        print(f"{sizes[size]:5} sets of {size}")
    alone = np.array([len(one) == 1 for one in sets])
    assert outcomes.prediction is not None
    right = np.equal(outcomes.prediction, label)
    print(f"answers that stand alone are right in {right[alone].mean():.1%}")

    assert 0.87 < holds.mean() < 0.95
    assert right[alone].mean() > right.mean()


if __name__ == "__main__":
    main()

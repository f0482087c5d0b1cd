"""I cannot review every doubtful image: which few classes may it show?

Every image gets a set of labels, not only one answer. At least 90 % of the sets contain the right
label, on average over many calibrations. With one calibration it can be a little less. The set of a
trusted answer has one label. The set of a doubtful answer has more.
"""

from __future__ import annotations

import json
from collections import Counter

import numpy as np

import vilu
from example_data import simulated


def main() -> None:
    """Calibrate label sets, and count how many contain the right label."""
    image, text, label = simulated(2400, seed=1)
    class_names = [f"class {index}" for index in range(len(text))]
    data = vilu.Embeddings(
        image=image, text=text, target=label, logit_scale=20.0, class_names=class_names
    )
    parts = data.split(fit=0.4, calibration=0.6, seed=0)
    model = vilu.Selective(vilu.ViLUPlus(seed=0))
    model.fit(parts.fit)
    model.calibrate(parts.calibration, label_sets="lac", max_miss=0.1)

    new_image, _, new_label = simulated(3000, seed=2)
    outcomes = model.predict(new_image)
    assert outcomes.label_set is not None
    label_sets = [json.loads(label_set or "[]") for label_set in outcomes.label_set]

    contains_label = []
    for index, label_set in zip(new_label, label_sets, strict=True):
        contains_label.append(class_names[index] in label_set)
    contained_share = np.mean(contains_label)
    print(f"{contained_share:.1%} of the sets contain the right label")

    size = np.array([len(label_set) for label_set in label_sets])
    n_sets_by_size = Counter(size.tolist())
    for n_labels, n_sets in sorted(n_sets_by_size.items()):
        print(f"{n_sets:5} sets have the size {n_labels}")

    assert outcomes.prediction is not None
    right = outcomes.prediction == new_label
    one_label = size == 1
    print(f"{right[one_label].mean():.1%} of the answers are right if the set has one label")

    assert 0.87 < contained_share < 0.95
    assert right[one_label].mean() > right.mean()


if __name__ == "__main__":
    main()

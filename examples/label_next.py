"""I can label forty images today: which ones?

Shows `next_labels` (as a command: `vilu next`). Half of what it asks for teaches, images that are
doubtful and different from one another. The other half, a random draw of what could be accepted,
vouches for a guarantee. The script also shows why the two may not be mixed. The embeddings are
simulated.
"""

from __future__ import annotations

import csv
import tempfile
from pathlib import Path

import numpy as np

import vilu
from example_data import simulated


def main() -> None:
    """From 54 labels to a list of 40 more."""
    image, text, label = simulated(1_200, seed=30)
    names = [f"class {i}" for i in range(len(text))]
    known = np.where(np.arange(len(label)) < 54, label, -1)  # -1: nobody has looked yet
    wrong = (image @ text.T).argmax(axis=1) != label

    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        ids = np.array([f"{i:04}" for i in range(len(label))])
        np.savez(home / "all.npz", image=image, text=text, target=known, ids=ids)
        store = vilu.import_arrays(
            home / "all.npz", home / "store", logit_scale=20.0, logit_bias=0.0, class_names=names
        )
        model = vilu.Selective(vilu.ViLUPlus(seed=0), answer="zero_shot")
        model.fit(store.take(np.arange(54)))
        table = model.next_labels(store, home / "next.csv", n=40, max_risk=0.2)
        with table.open(encoding="utf-8", newline="") as file:
            asked = list(csv.DictReader(file))

    rows = {
        stream: [int(row["path"]) for row in asked if row["stream"] == stream]
        for stream in ("fit", "calibration")
    }
    for stream, numbers in rows.items():
        print(
            f"{stream}: {len(numbers)} images, the model is wrong about "
            f"{wrong[numbers].mean():.0%} of them"
        )
    print(f"of all images it is wrong about {wrong.mean():.0%}")

    assert len(asked) == 40
    assert all(row["label"] == "" for row in asked)  # to be filled in
    # What teaches was chosen for being doubtful: an error rate measured on it would be far too
    # high, so it vouches for nothing. What vouches is drawn from what could be accepted, where
    # errors are rare.
    assert wrong[rows["fit"]].mean() > wrong.mean() + 0.1
    assert wrong[rows["calibration"]].mean() < wrong.mean()


if __name__ == "__main__":
    main()

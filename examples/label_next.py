"""I can label forty images today: which ones?

`next_labels` writes a list of images to label. The command is `vilu next`. Half of the images are
for the fit: their answers are doubtful, and the images differ from one another. The other half are
for the calibration: they are drawn at random from the answers that could be accepted. The script
also shows why the two halves must not be mixed. The embeddings are simulated.
"""

from __future__ import annotations

import csv
import tempfile
from pathlib import Path

import numpy as np

import vilu
from example_data import simulated

N_LABELLED = 54


def write_list(store: vilu.EmbeddingStore, output: Path) -> list[dict[str, str]]:
    """Fit on the labels so far, write the list of images to label, and return its rows."""
    model = vilu.Selective(vilu.ViLUPlus(seed=0), answer="zero_shot")
    model.fit(store.take(np.arange(N_LABELLED)))
    model.next_labels(store, output, n=40, max_risk=0.2)
    with output.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def main() -> None:
    """List 40 images to label, with 54 labels so far."""
    image, text, label = simulated(1_200, seed=30)
    class_names = [f"class {index}" for index in range(len(text))]
    target = label.copy()
    target[N_LABELLED:] = -1  # The label is unknown.

    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        ids = np.array([f"{index:04}" for index in range(len(image))])
        np.savez(home / "all.npz", image=image, text=text, target=target, ids=ids)
        store = vilu.import_arrays(
            home / "all.npz",
            home / "store",
            logit_scale=20.0,
            logit_bias=0.0,
            class_names=class_names,
        )
        rows_to_label = write_list(store, home / "next.csv")

    assert len(rows_to_label) == 40
    assert all(row["label"] == "" for row in rows_to_label)  # A person fills in the labels.

    # The simulation knows all labels, so the error rate of each half can be shown.
    zero_shot_answer = (image @ text.T).argmax(axis=1)
    wrong = zero_shot_answer != label
    risk = {}
    for stream in ("fit", "calibration"):
        indices = [int(row["path"]) for row in rows_to_label if row["stream"] == stream]
        risk[stream] = wrong[indices].mean()
        print(f"{stream}: {len(indices)} images, and {risk[stream]:.0%} of the answers are wrong")
    print(f"all images: {wrong.mean():.0%} of the answers are wrong")

    # The rows for the fit are doubtful, so their error rate is far too high for a guarantee. The
    # rows for the calibration come from answers that could be accepted, which are seldom wrong.
    assert risk["fit"] > wrong.mean() + 0.1
    assert risk["calibration"] < wrong.mean()


if __name__ == "__main__":
    main()

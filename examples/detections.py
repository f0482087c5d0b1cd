"""My detector draws boxes in COCO's format: which of them are right, so that nobody checks them?

Matches detections with annotated objects as COCO does, and certifies which boxes may be accepted.
The detector is made up, with declared noise: it misses every sixth object, its boxes are off by up
to a seventh, and beside every fourth object it sees one that is not there. Put your own two files
in their place. The guarantee speaks of boxes; objects without one are counted beside it.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import vilu
from vilu.tables.methods import AnswerProbe
from vilu.tables.sources import detection_answers

N_IMAGES = 900
BESIDE = np.array([250.0, 0.0, 0.0, 0.0])


def made_up(random: np.random.Generator) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Results and annotations in COCO's format, of up to five objects an image."""
    results: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    for image in range(N_IMAGES):
        for _ in range(random.integers(1, 6)):
            box = np.append(random.uniform(0, 400, size=2), random.uniform(30, 200, size=2))
            entry = {"image_id": image, "category_id": int(random.integers(1, 4))}
            objects.append({**entry, "bbox": box.tolist(), "iscrowd": int(random.random() < 0.02)})
            if random.random() > 1 / 6:
                clarity = random.random()
                moved = box + (1 - clarity) * random.uniform(-0.15, 0.15, size=4) * box[2:].max()
                moved[2:] = moved[2:].clip(5)
                score = 0.3 + 0.5 * clarity + 0.2 * random.random()
                results.append({**entry, "bbox": moved.tolist(), "score": score})
            if random.random() < 1 / 4:
                score = 0.3 + 0.3 * random.random()
                results.append({**entry, "bbox": (box + BESIDE).tolist(), "score": score})
    names = [{"id": 1, "name": "car"}, {"id": 2, "name": "bus"}, {"id": 3, "name": "person"}]
    images = [{"id": image} for image in range(N_IMAGES)]
    return results, {"images": images, "annotations": objects, "categories": names}


def main() -> None:
    """From two files to accepted boxes."""
    contents = made_up(np.random.default_rng(0))
    with tempfile.TemporaryDirectory() as place:
        files = [Path(place) / "results.json", Path(place) / "annotations.json"]
        for file, content in zip(files, contents, strict=True):
            file.write_text(json.dumps(content), encoding="utf-8")
        boxes = detection_answers(*files)
    table = vilu.open_table(boxes.columns)
    print(f"{len(table)} boxes, of which {boxes.n_known} are known as right or wrong (no crowds)")
    print(f"{boxes.missed_share:.0%} of the objects have no box, and no guarantee speaks of them")

    table = table[table.failure >= 0]  # on a crowd a box is neither right nor wrong
    image = np.array([int(name) for name in table.cluster or ()])
    fit, calibration, new = (table[image % 3 == part] for part in range(3))
    model = vilu.Selective(AnswerProbe()).fit(fit).calibrate(calibration, max_risk=0.05)
    accepted = np.array(model.predict(new).decision) == "accept"
    wrong = new.failure == 1
    print(f"of all boxes {wrong.mean():.0%} are wrong")
    print(f"accepted are {accepted.mean():.0%}, of which {wrong[accepted].mean():.1%} are wrong")

    assert wrong.mean() > 0.1
    assert accepted.mean() > 0.3
    assert wrong[accepted].mean() < 0.06


if __name__ == "__main__":
    main()

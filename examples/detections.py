"""My detector draws boxes in COCO's format: which of them are right, so that nobody checks them?

Boxes are matched with annotated objects as COCO does. The detector is simulated. It misses every
sixth object. Its boxes are off by up to 15 % of their longer side. Beside every fourth object it
draws a box without an object. Put your own two files in place of the simulated ones. The guarantee
covers boxes. Objects without a box are counted separately.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import vilu
from vilu.tables.methods import AnswerProbe
from vilu.tables.sources import detection_answers

N_IMAGES = 900
CATEGORIES = [{"id": 1, "name": "car"}, {"id": 2, "name": "bus"}, {"id": 3, "name": "person"}]


def detect(box: NDArray[np.float64], random: np.random.Generator) -> list[dict[str, Any]]:
    """Simulate what the detector draws for an object with this box: none, one or two boxes."""
    detections = []
    if random.random() > 1 / 6:
        clarity = random.random()
        shift = random.uniform(-0.15, 0.15, size=4) * box[2:].max()
        moved = box + (1 - clarity) * shift
        moved[2:] = moved[2:].clip(5)
        score = 0.3 + 0.5 * clarity + 0.2 * random.random()
        detections.append({"bbox": moved.tolist(), "score": score})
    if random.random() < 1 / 4:
        beside = box + np.array([250.0, 0.0, 0.0, 0.0])
        score = 0.3 + 0.3 * random.random()
        detections.append({"bbox": beside.tolist(), "score": score})
    return detections


def write_coco_files(results_file: Path, annotations_file: Path) -> None:
    """Write simulated results and annotations in COCO's format."""
    random = np.random.default_rng(0)
    results: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    for image in range(N_IMAGES):
        n_objects = random.integers(1, 6)
        for _ in range(n_objects):
            corner = random.uniform(0, 400, size=2)
            box = np.append(corner, random.uniform(30, 200, size=2))
            entry = {"image_id": image, "category_id": int(random.integers(1, 4))}
            is_crowd = int(random.random() < 0.02)
            objects.append({**entry, "bbox": box.tolist(), "iscrowd": is_crowd})
            results += [{**entry, **detection} for detection in detect(box, random)]
    images = [{"id": image} for image in range(N_IMAGES)]
    annotations = {"images": images, "annotations": objects, "categories": CATEGORIES}
    results_file.write_text(json.dumps(results), encoding="utf-8")
    annotations_file.write_text(json.dumps(annotations), encoding="utf-8")


def main() -> None:
    """Make a table from the two files, and accept boxes."""
    with tempfile.TemporaryDirectory() as temporary:
        results_file = Path(temporary) / "results.json"
        annotations_file = Path(temporary) / "annotations.json"
        write_coco_files(results_file, annotations_file)
        boxes = detection_answers(results=results_file, annotations=annotations_file)
    table = vilu.open_table(boxes.columns)
    n_boxes = len(table)
    print(f"of {n_boxes} boxes, {boxes.n_known} are right or wrong (the others are on crowds)")
    print(f"{boxes.missed_share:.0%} of the objects have no box: the guarantee does not cover them")

    table = table[table.failure >= 0]  # This leaves out the boxes on crowds.
    image = np.array([int(name) for name in table.cluster or ()])
    third = image % 3
    fit, calibration, new = table[third == 0], table[third == 1], table[third == 2]
    model = vilu.Selective(AnswerProbe())
    model.fit(fit)
    model.calibrate(calibration, max_risk=0.05)
    outcomes = model.predict(new)
    accepted = np.array(outcomes.decision) == "accept"
    wrong = new.failure == 1
    print(f"in the new images, {wrong.mean():.0%} of the boxes are wrong")
    risk = wrong[accepted].mean()
    print(
        f"{accepted.mean():.0%} of the boxes are accepted, "
        f"and {risk:.1%} of the accepted boxes are wrong"
    )
    assert wrong.mean() > 0.1
    assert accepted.mean() > 0.3
    assert risk < 0.06


if __name__ == "__main__":
    main()

"""Test that detections and annotations in COCO's format become a table of answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vilu.errors import DataError, UsageError
from vilu.tables.sources import Converted, detection_answers

Json = dict[str, Any]
CAT, DOG = 3, 7


def box(*edges: float, image: int = 1, category: int = CAT, **more: Any) -> Json:
    return {"image_id": image, "category_id": category, "bbox": list(edges), **more}


def truth(*annotations: Json, images: int = 2) -> Json:
    numbered = [
        {"id": number, "area": 1.0, "iscrowd": 0, **annotation}
        for number, annotation in enumerate(annotations, start=1)
    ]
    return {
        "images": [{"id": number} for number in range(1, images + 1)],
        "annotations": numbered,
        "categories": [{"id": CAT, "name": "cat"}, {"id": DOG, "name": "dog"}],
    }


def converted(folder: Path, results: Any, annotations: Any, **options: Any) -> Converted:
    files = [folder / "results.json", folder / "truth.json"]
    for file, content in zip(files, (results, annotations), strict=True):
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    return detection_answers(*files, **options)


def correct(folder: Path, results: Any, annotations: Any, **options: Any) -> list[int | None]:
    return converted(folder, results, annotations, **options).columns["correct"]


def test_half_an_overlap_is_enough(tmp_path: Path) -> None:
    results = [box(0, 0, 10, 5, score=0.9), box(0, 0, 10, 4, score=0.8, image=2)]
    known = truth(box(0, 0, 10, 10), box(0, 0, 10, 10, image=2))
    assert correct(tmp_path, results, known) == [1, 0]
    assert correct(tmp_path, results, known, min_iou=0.4) == [1, 1]


def test_the_surest_detection_takes_the_object(tmp_path: Path) -> None:
    results = [box(0, 0, 10, 10, score=0.5), box(0, 0, 10, 8, score=0.6)]
    assert correct(tmp_path, results, truth(box(0, 0, 10, 10))) == [0, 1]


def test_other_images_and_categories_do_not_match(tmp_path: Path) -> None:
    results = [box(0, 0, 9, 9, score=0.5, image=2), box(0, 0, 9, 9, score=0.5, category=DOG)]
    words = converted(tmp_path, results, truth(box(0, 0, 9, 9)))
    assert words.columns["correct"] == [0, 0]
    assert (words.n_wanted, words.n_missed) == (1, 1)


def test_a_crowd_takes_many_and_judges_none(tmp_path: Path) -> None:
    results = [box(5 * n, 0, 5, 5, score=0.5) for n in range(4)] + [box(99, 0, 5, 5, score=0.5)]
    known = truth(box(0, 0, 20, 20, iscrowd=1))
    table = converted(tmp_path, results, known)
    assert table.columns["correct"] == [None, None, None, None, 0]
    assert table.n_wanted == 0
    assert table.missed_share is None


def test_an_ignored_object_judges_one(tmp_path: Path) -> None:
    results = [box(0, 0, 9, 9, score=0.9), box(0, 0, 9, 9, score=0.8)]
    assert correct(tmp_path, results, truth(box(0, 0, 9, 9, ignore=1))) == [None, 0]


def test_an_object_that_counts_goes_before_a_better_ignored(tmp_path: Path) -> None:
    known = truth(box(0, 0, 10, 10, ignore=1), box(0, 0, 10, 6))
    assert correct(tmp_path, [box(0, 0, 10, 10, score=0.9)], known) == [1]


def test_columns_name_the_category_and_the_image(tmp_path: Path) -> None:
    results = [box(0, 0, 30, 10, score=0.9, image=2), box(15, 0, 30, 10, score=0.4, image=2)]
    columns = converted(tmp_path, results, truth()).columns
    assert columns["answer"] == columns["group"] == ["cat", "cat"]
    assert columns["cluster"] == ["2", "2"]
    assert columns["area"] == [300, 300]
    assert columns["flatness"] == [0.75, 0.75]
    assert columns["n_detections"] == [2, 2]
    assert columns["largest_overlap"] == pytest.approx([1 / 3, 1 / 3])  # 150 of 450


def random_boxes(random: np.random.Generator, n: int) -> list[Json]:
    """Return boxes on a coarse grid, so that equal overlaps and overlaps of exactly 0.5 occur."""
    boxes = []
    for _ in range(n):
        left, top = random.integers(0, 5, size=2).tolist()
        width, height = random.integers(3, 8, size=2).tolist()
        image = int(random.integers(1, 4))
        category = int(random.choice([CAT, DOG]))
        boxes.append(box(left, top, width, height, image=image, category=category))
    return boxes


@pytest.mark.parametrize("seed", range(20))
def test_verdicts_are_those_of_pycocotools(
    seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coco = pytest.importorskip("pycocotools.coco", reason="needs pycocotools, of vilu[dev]")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    random = np.random.default_rng(seed)
    objects = random_boxes(random, 60)
    for entry in objects:
        entry["iscrowd"] = int(random.random() < 0.1)
        entry["ignore"] = int(random.random() < 0.1)
        # pycocotools does not read ignore. It ignores objects with an area beyond its range.
        entry["area"] = 1e11 if entry["ignore"] else 1.0
    results = random_boxes(random, 90)
    for entry in results:
        entry["score"] = round(float(random.random()), 1)  # many are equal
    known = truth(*objects, images=3)
    ours = converted(tmp_path, results, known)

    annotated = coco.COCO()
    annotated.dataset = {"info": {}, **known}
    annotated.createIndex()
    evaluation = cocoeval.COCOeval(annotated, annotated.loadRes(results), "bbox")
    evaluation.params.iouThrs = np.array([0.5])
    evaluation.params.areaRng = [[0, 1e10]]
    evaluation.params.maxDets = [1_000]
    evaluation.evaluate()
    theirs: dict[int, int | None] = {}
    for cell in evaluation.evalImgs:
        if cell is None:
            continue
        for number, taken, is_ignored in zip(
            cell["dtIds"], cell["dtMatches"][0], cell["dtIgnore"][0], strict=True
        ):
            theirs[number] = None if is_ignored else int(taken > 0)
    assert ours.columns["correct"] == [theirs[number] for number in range(1, len(results) + 1)]
    assert {0, 1, None} == set(theirs.values())


ONE = [box(0, 0, 9, 9, score=0.9)]
KNOWN = truth(box(0, 0, 9, 9))
BAD = {
    "cut off": ('[{"image_id": 1', KNOWN, "results.json must be JSON in COCO's format"),
    "NaN": ('[{"image_id": 1, "category_id": 3, "bbox": [0, 0, NaN, 1], "score": 1}]', KNOWN, "0"),
    "deep": ("[" * 100_000, KNOWN, "results.json must be"),
    "no detections": ([], KNOWN, "at least one detection"),
    "no list": ({"image_id": 1}, KNOWN, "valid array"),
    "three numbers": ([box(0, 0, 9, score=0.9)], KNOWN, "0.bbox"),
    "negative side": ([box(0, 0, -9, 9, score=0.9)], KNOWN, "no side is negative"),
    "far away": ([box(0, 0, 1e300, 1e300, score=0.9)], KNOWN, "0.bbox"),
    "text score": ([box(0, 0, 9, 9, score="0.9")], KNOWN, "0.score"),
    "no score": ([box(0, 0, 9, 9)], KNOWN, "0.score: Field required"),
    "other category": ([box(0, 0, 9, 9, score=1, category=1)], KNOWN, "has category_id 1, which"),
    "other image": ([box(0, 0, 9, 9, score=1, image=9)], KNOWN, "has image_id 9, which"),
    "no annotations": (ONE, {"images": []}, "truth.json must be JSON in COCO's format"),
    "infinite object": (ONE, truth(box(0, 0, 9, float("inf"))), "truth.json"),
}


@pytest.mark.parametrize(("results", "annotations", "reason"), BAD.values(), ids=BAD.keys())
def test_bad_files_are_refused(tmp_path: Path, results: Any, annotations: Any, reason: str) -> None:
    with pytest.raises(DataError) as refusal:
        converted(tmp_path, results, annotations)
    assert reason in str(refusal.value)


def test_too_many_boxes_in_a_place_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at most 2,000 boxes of a category in an image"):
        converted(tmp_path, ONE * 2_001, KNOWN)


def test_a_wrong_overlap_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="min_iou"):
        converted(tmp_path, ONE, KNOWN, min_iou=0)

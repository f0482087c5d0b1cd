"""Every study from the paper in miniature, through the real command line.

The CLIP and SigLIP models have random weights and the real architectures at a reduced width. Every
data set has 64 images in its real layout. If files or lists allow it, most images are moved to the
class that a random model sees in them. Without this, a model would never be right, and a method
could learn nothing.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.benchmark.test_files import TABLE_7
from tests.builders.known_trees import make_tree, make_trees, wnids
from tests.builders.tiny_models import write_tiny
from tests.command import run, run_process
from vilu.backbones.catalog import load_backbone
from vilu.backbones.zeroshot import embed_class_names
from vilu.datasets.images import decode_image
from vilu.datasets.known import KNOWN, open_known
from vilu_bench.studies.load import load_configs

SMALL_REASONS = (
    *(
        "fewer than",
        "at least",
        "are others",
        "are not among them",
        "needs the column",
        "does not work on",
        "does not begin",
    ),
    *("have no row to evaluate", "both are needed"),
)
"""The messages with which methods refuse data that are too small or do not suit the method.

Random weights are right on other images on another machine, so a refusal may come or not.
"""


def answers(name: str, data: Path, models: Path) -> tuple[list[str], list[int]]:
    """Return the keys for all images in a data set, and a class that a model sees in each image.

    One image in four has SigLIP's answer, and the others have CLIP's answer.
    """
    images = open_known(name, data)
    records = list(images.records(0, len(images)))
    pictures = [decode_image(record.read()).image for record in records]
    seen = []
    for backbone in ("clip-vit-b32", "siglip-vit-b16"):
        model = load_backbone(backbone, models=models)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # random models hardly separate some names
            text = embed_class_names(model, images.class_names)
        pixels = torch.stack([model.preprocess(picture) for picture in pictures])
        seen.append((model.encode_images(pixels) @ text.T).argmax(dim=1).tolist())
    return [record.key for record in records], [seen[i % 4 == 2][i] for i in range(len(records))]


def move_to_what_is_seen(name: str, data: Path, models: Path) -> None:
    """Move three images in four to the folder for the class that a model sees in them."""
    home = next(data / folder for folder in KNOWN[name].folders if (data / folder).is_dir())
    folders = [str(i) for i in range(1000)] if name == "imagenet_v2" else wnids()
    for number, (key, label) in enumerate(zip(*answers(name, data, models), strict=True)):
        if number % 4 < 3:
            path = home / key
            target = path.parents[1] / folders[label] / f"{number}{path.suffix}"
            target.parent.mkdir(exist_ok=True)
            path.rename(target)


def list_as_what_is_seen(name: str, data: Path, models: Path) -> None:
    """Change the lists in the same way, if the data set has lists."""
    homes = [data / folder for folder in KNOWN[name].folders if (data / folder).is_dir()]
    (path,) = homes[0].glob("split_zhou_*.json")
    lists = json.loads(path.read_text())
    names = {label: raw for entries in lists.values() for _, label, raw in entries}
    seen = dict(zip(*answers(name, data, models), strict=True))
    kept: set[int] = set()
    for number, entry in enumerate(entry for entries in lists.values() for entry in entries):
        label = next(label for key, label in seen.items() if key.endswith(entry[0]))
        if number % 4 < 3 and entry[1] in kept:  # every class keeps an image
            entry[1:] = [label, names[label]]
        kept.add(entry[1])
    path.write_text(json.dumps(lists))


@pytest.fixture(scope="module")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Write the data sets and the models, and return their folders."""
    root = tmp_path_factory.mktemp("miniature")
    for name in TABLE_7:
        write_tiny(root / "models" / name, name.partition("-")[0], "open_clip")
    (root / "data").mkdir()
    make_trees(root / "data")
    for name, n_tars in {
        "cc3m": 3,
        "cc12m": 2,
        "laion400m": 2,
    }.items():  # the smoke form takes the first tar
        make_tree(name, root / "data", 64 * n_tars)
    for name in ("imagenet", "imagenet_v2", "imagenet_sketch"):
        move_to_what_is_seen(name, root / "data", root / "models")
    for name in (
        "eurosat",
        "stanford_cars",
        "oxford_pets",
        "flowers102",
        "caltech101",
        "dtd",
        "ucf101",
    ):
        list_as_what_is_seen(name, root / "data", root / "models")
    return root / "data", root / "models"


def words(miniature: tuple[Path, Path], output: Path, *more: object) -> tuple[object, ...]:
    data, models = miniature
    return (
        "benchmark",
        "paper",
        "--data",
        data,
        "--models",
        models,
        "-o",
        output,
        "--smoke",
        *more,
    )


@pytest.mark.slow
def test_every_study_runs_from_images_to_tables(
    miniature: tuple[Path, Path], tmp_path: Path
) -> None:
    text = run_process(*words(miniature, tmp_path, "--jobs", 2)).stdout
    output = tmp_path / "smoke"
    for config in load_configs(["paper"]):
        folder = output / "studies" / config.name
        assert f"=== {config.name} ===" in text
        for view in config.views:
            assert (folder / f"tables/{view.name}.tex").stat().st_size > 500
            if view.kind != "table":
                assert (folder / f"figures/{view.name}.svg").stat().st_size > 5000
        page = (folder / "README.md").read_text()
        assert page.count("| **") + page.count("| *") >= len(config.claims)
    cells = [json.loads(path.read_text()) for path in (output / "cells").rglob("*.json")]
    reasons = Counter(cell["refused"]["reason"] for cell in cells if cell["refused"])
    unexpected = [
        reason for reason in reasons if not any(words in reason for words in SMALL_REASONS)
    ]
    assert unexpected == []
    results = {(cell["data"], cell["method"]) for cell in cells if cell["results"]}
    everywhere = {name for config in load_configs(["paper"]) for name in config.data}
    assert {data for data, _ in results} == everywhere
    learned = Counter(method for _, method in results)
    assert learned["vilu"] >= 20
    assert sum(bool(cell["results"]) for cell in cells) > 0.8 * len(cells)
    before = {path: path.stat().st_mtime_ns for path in (output / "cells").rglob("*")}
    assert run(*words(miniature, tmp_path)).stdout == text
    assert {path: path.stat().st_mtime_ns for path in (output / "cells").rglob("*")} == before


@pytest.mark.slow
def test_a_dry_run_knows_the_miniature(miniature: tuple[Path, Path], tmp_path: Path) -> None:
    plans = json.loads(run(*words(miniature, tmp_path, "--dry-run", "--json")).stdout)
    assert [plan["name"] for plan in plans] == [config.name for config in load_configs(["paper"])]
    parts = {(part["data"], part["part"]): part for plan in plans for part in plan["parts"]}
    assert parts["dtd", "train"]["counted"] == "listing"
    assert (
        parts["cc12m", "pairs"]["counted"] == "catalogue"
    )  # without reading, the tars' sizes are unknown
    assert {part["state"] for part in parts.values()} == {"to embed"}
    assert sum(parts["dtd", role]["images"] for role in ("train", "validation", "test")) == 64
    assert not (tmp_path / "smoke").exists()

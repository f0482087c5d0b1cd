"""Write tiny trees in the real layout, for every data set in the catalogue.

``make_tree("dtd", root)`` writes the files that torchvision would have unpacked below ``root``,
with annotation files. For CoOp's seven sets it also writes a user's ``split_zhou_*.json``, which
lists the tiny tree. Equal arguments give equal images and lists. The images are real JPEGs that
show their class: a class is a hue and a number of stripes. Noise makes some images hard.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import numpy as np

from tests.builders import known_coop
from tests.builders.image_files import encode
from tests.builders.known_images import CLASSES, THREE, TWO, Row, lines, picture, rows, save
from tests.builders.pickle_files import python2_pickle

THINGS = [
    b"airplane",
    b"automobile",
    b"bird",
    b"cat",
    b"deer",
    b"dog",
    b"frog",
    b"horse",
    b"ship",
    b"truck",
]
DISHES = (
    "apple_pie",
    "baby_back_ribs",
    "baklava",
    "beef_carpaccio",
    "bibimbap",
    "caesar_salad",
    "cannoli",
)
DISHES += ("cheese_plate", "edamame", "french_fries", "hot_dog", "waffles")
SCENES = (
    "/a/abbey",
    "/a/airplane_cabin",
    "/a/apartment_building/outdoor",
    "/b/balcony/exterior",
    "/b/bar",
)
SCENES += (
    "/c/church/indoor",
    "/c/church/outdoor",
    "/d/dinette/home",
    "/k/kitchen",
    "/t/temple/east_asia",
)
SCENES += ("/u/underwater/coral_reef", "/y/yard")
PLANES = (
    "707-320",
    "727-200",
    "737-200",
    "A300B4",
    "An-12",
    "Cessna 172",
    "DH-82",
    "F-16A/B",
    "F/A-18",
    "MD-11",
)
PLANES += ("Spitfire", "Yak-42")


def make_tree(name: str, root: Path, n: int = 64, *, layout: str = "torchvision") -> Path:
    """Write a tiny data set with about ``n`` images, and return its folder.

    Args:
        name: Key in ``KNOWN``.
        root: Folder that holds all data sets.
        n: Number of images. A few less if each class must have ten.
        layout: "torchvision", or "coop" if CoOp has other folder names.
    """
    write, folders = TREES[name]
    home = root / folders[layout == "coop" and len(folders) > 1]
    home.mkdir(parents=True, exist_ok=True)
    write(home, n)
    return home


def make_trees(root: Path, n: int = 64, *, layout: str = "torchvision") -> Path:
    """Write a tree for every data set below one folder, and return the folder."""
    for name in TREES:
        make_tree(name, root, n, layout=layout)
    return root


# Official splits


def food101(home: Path, n: int) -> None:
    meta: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
    for row in rows(n, CLASSES, TWO):
        image = f"{DISHES[row.label]}/{1000 + row.position}"
        save(home / f"images/{image}.jpg", row)
        meta[row.split].setdefault(DISHES[row.label], []).append(image)
    for split, content in meta.items():
        lines(home / f"meta/{split}.json", [json.dumps(content)])
    lines(home / "meta/classes.txt", list(DISHES))


def sun397(home: Path, n: int) -> None:
    lists: dict[str, list[str]] = {"train": [], "test": []}
    for row in rows(n, CLASSES, TWO):
        image = (
            f"{SCENES[row.label]}/sun_{chr(97 + row.label)}{chr(97 + row.number)}xkfbpwqovpjwzh.jpg"
        )
        save(home / image.removeprefix("/"), row)
        lists[row.split].append(image)
    lines(home / "ClassName.txt", list(SCENES))
    lines(home / "Partitions/Training_01.txt", lists["train"])
    lines(home / "Partitions/Testing_01.txt", lists["test"])


def fgvc_aircraft(home: Path, n: int) -> None:
    lists: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for row in rows(n, CLASSES, THREE):
        save(home / f"images/{row.position:07d}.jpg", row)
        lists[row.split].append(f"{row.position:07d} {PLANES[row.label]}")
    lines(home / "variants.txt", list(PLANES))
    for split, file in (("train", "train"), ("validation", "val"), ("test", "test")):
        lines(home / f"images_variant_{file}.txt", lists[split])
    lines(home / "images_variant_trainval.txt", [*lists["train"], *lists["validation"]])


# ImageNet


def spread(n_classes: int = CLASSES) -> list[int]:
    """Return the labels that tiny trees use among the 1,000."""
    return [index * 83 for index in range(n_classes)]


def wnids() -> list[str]:
    return (
        resources.files("vilu_bench").joinpath("assets", "imagenet_wnids.txt").read_text().split()
    )


def imagenet(home: Path, n: int) -> None:
    for row in rows(n, CLASSES, TWO):
        wnid = wnids()[spread()[row.label]]
        name = (
            f"{wnid}_{row.number}" if row.split == "train" else f"ILSVRC2012_val_{row.position:08d}"
        )
        save(home / ("train" if row.split == "train" else "val") / wnid / f"{name}.JPEG", row)


def imagenet_v2(home: Path, n: int) -> None:
    """Write ten images per class, as in the real data set."""
    n_classes = max(n // 10, 1)
    for row in rows(10 * n_classes, n_classes, ("test",)):
        save(home / f"{spread(n_classes)[row.label]}/{row.label:02x}f{row.number:038x}.jpeg", row)


def imagenet_sketch(home: Path, n: int) -> None:
    for row in rows(n, CLASSES, ("test",)):
        save(home / wnids()[spread()[row.label]] / f"sketch_{row.number}.JPEG", row)


# Pickles and tars


def cifar(
    files: dict[str, tuple[str, ...]], labels: bytes, meta: str, key: bytes
) -> Callable[[Path, int], None]:
    """Return a function that writes CIFAR's pickles as Python 2 wrote them."""
    names = [b"thing_%d" % label for label in range(100)] if labels == b"fine_labels" else THINGS

    def write(home: Path, n: int) -> None:
        n_classes = min(len(names), CLASSES)
        dealt = list(rows(n, n_classes, TWO))
        for split, parts in files.items():
            mine = [row for row in dealt if row.split == split]
            for number, name in enumerate(parts):
                part = mine[number :: len(parts)]
                pixels = [
                    np.asarray(picture(row.label, row.number, (32, 32))).transpose(2, 0, 1)
                    for row in part
                ]
                content = {
                    b"data": np.stack(pixels).reshape(-1, 3072),
                    labels: [row.label for row in part],
                }
                (home / name).write_bytes(python2_pickle(content))
        (home / meta).write_bytes(python2_pickle({key: names}))

    return write


def caption(row: Row) -> str:
    words = (
        "red",
        "orange",
        "yellow",
        "lime",
        "green",
        "mint",
        "cyan",
        "sky",
        "blue",
        "violet",
        "magenta",
        "pink",
    )
    return f"{words[row.label]} stripes, picture {row.number}"


def tars(*files: str) -> Callable[[Path, int], None]:
    """Return a function that writes img2dataset's shards.

    Each sample has an image, a caption and facts.
    """

    def write(home: Path, n: int) -> None:
        dealt = list(rows(n, CLASSES, TWO))
        for number, file in enumerate(files):
            (home / file).parent.mkdir(parents=True, exist_ok=True)
            mine = dealt[number :: len(files)]
            with tarfile.open(home / file, "w") as tar:
                for position, row in enumerate(mine):
                    key = f"{number:05d}{position:04d}"
                    facts = json.dumps({"key": key, "status": "success"})
                    image = encode(picture(row.label, row.number), "JPEG", quality=90)
                    for ending, data in (
                        ("jpg", image),
                        ("json", facts.encode()),
                        ("txt", caption(row).encode()),
                    ):
                        info = tarfile.TarInfo(f"{key}.{ending}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
            stats = (home / file).with_name(f"{Path(file).stem}_stats.json")
            stats.write_text(json.dumps({"count": len(mine), "successes": len(mine)}))

    return write


CIFAR10 = {
    "train": tuple(f"data_batch_{number}" for number in range(1, 6)),
    "test": ("test_batch",),
}
CIFAR100 = {"train": ("train",), "test": ("test",)}

TREES: dict[str, tuple[Callable[[Path, int], None], tuple[str, ...]]] = {
    "imagenet": (imagenet, ("imagenet", "imagenet/images")),
    "cifar10": (
        cifar(CIFAR10, b"labels", "batches.meta", b"label_names"),
        ("cifar-10-batches-py",),
    ),
    "cifar100": (
        cifar(CIFAR100, b"fine_labels", "meta", b"fine_label_names"),
        ("cifar-100-python",),
    ),
    "sun397": (sun397, ("SUN397", "sun397/SUN397")),
    "fgvc_aircraft": (fgvc_aircraft, ("fgvc-aircraft-2013b/data", "fgvc_aircraft")),
    "eurosat": (known_coop.eurosat, ("eurosat",)),
    "stanford_cars": (known_coop.stanford_cars, ("stanford_cars",)),
    "food101": (food101, ("food-101",)),
    "oxford_pets": (known_coop.oxford_pets, ("oxford-iiit-pet", "oxford_pets")),
    "flowers102": (known_coop.flowers102, ("flowers-102", "oxford_flowers")),
    "caltech101": (known_coop.caltech101, ("caltech101", "caltech-101")),
    "dtd": (known_coop.dtd, ("dtd/dtd", "dtd")),
    "ucf101": (known_coop.ucf101, ("ucf101",)),
    "imagenet_v2": (
        imagenet_v2,
        (
            "imagenetv2-matched-frequency-format-val",
            "imagenetv2/imagenetv2-matched-frequency-format-val",
        ),
    ),
    "imagenet_sketch": (imagenet_sketch, ("sketch", "imagenet-sketch/images")),
    "cc3m": (tars("train/00000.tar", "train/00001.tar", "validation/00000.tar"), ("cc3m",)),
    "cc12m": (tars("00000.tar", "00001.tar"), ("cc12m",)),
    "laion400m": (tars("00000.tar", "00001.tar"), ("laion400m", "laion400m-data")),
}
"""The function that writes each tree, and the folder by torchvision's and by CoOp's conventions."""

"""Make tiny trees for the seven data sets whose CoOp lists ship with vilu.

Each tree has its own list.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy.io import savemat

from tests.builders.known_images import CLASSES, THREE, Row, lines, rows, save, write_list

PETS = (
    "Abyssinian",
    "american_bulldog",
    "basset_hound",
    "beagle",
    "Bengal",
    "Birman",
    "Bombay",
    "boxer",
)
PETS += ("British_Shorthair", "chihuahua", "Egyptian_Mau", "english_setter")
FLOWERS = (
    "pink primrose",
    "hard-leaved pocket orchid",
    "canterbury bells",
    "sweet pea",
    "english marigold",
)
FLOWERS += (
    "tiger lily",
    "moon orchid",
    "bird of paradise",
    "monkshood",
    "globe thistle",
    "snapdragon",
    "colt's foot",
)
CALTECH = {"Faces": "face", "Leopards": "leopard", "accordion": "accordion", "brain": "brain"}
CALTECH |= {
    name: name for name in ("car_side", "ceiling_fan", "cougar_body", "crab", "cup", "dollar_bill")
}
CALTECH |= {name: name for name in ("electric_guitar", "gerenuk")}
TEXTURES = (
    "banded",
    "blotchy",
    "braided",
    "bubbly",
    "bumpy",
    "chequered",
    "cobwebbed",
    "cracked",
    "crosshatched",
)
TEXTURES += ("crystalline", "dotted", "fibrous")
LAND = {
    "AnnualCrop": "Annual Crop Land",
    "Forest": "Forest",
    "HerbaceousVegetation": "Herbaceous Vegetation Land",
}
LAND |= {
    "Highway": "Highway or Road",
    "Industrial": "Industrial Buildings",
    "Pasture": "Pasture Land",
}
LAND |= {
    "PermanentCrop": "Permanent Crop Land",
    "Residential": "Residential Buildings",
    "River": "River",
}
LAND |= {"SeaLake": "Sea or Lake"}
CARS = (
    "AM General Hummer SUV 2000",
    "Acura RL Sedan 2012",
    "Acura TL Sedan 2012",
    "Acura TL Type-S 2008",
)
CARS += (
    "Audi RS 4 Convertible 2008",
    "Audi TTS Coupe 2012",
    "BMW M3 Coupe 2012",
    "Dodge Ram Pickup 1500 2009",
)
CARS += (
    "Ferrari 458 Italia Coupe 2012",
    "Ford GT Coupe 2006",
    "Jeep Patriot SUV 2012",
    "Suzuki Aerio Sedan 2007",
)
ACTIONS = (
    "ApplyEyeMakeup",
    "Archery",
    "BabyCrawling",
    "BalanceBeam",
    "BandMarching",
    "BaseballPitch",
    "Biking",
)
ACTIONS += ("BenchPress", "Bowling", "CliffDiving", "HandstandPushups", "YoYo")


def eurosat(home: Path, n: int) -> None:
    folders = list(LAND)
    entries = [
        (
            row,
            f"{folders[row.label]}/{folders[row.label]}_{row.number}.jpg",
            LAND[folders[row.label]],
        )
        for row in rows(n, len(LAND), THREE)
    ]
    write_list(home, "EuroSAT", "2750", entries)


def stanford_cars(home: Path, n: int) -> None:
    """Write cars. The year comes first in the list's class names, and last in the devkit's."""
    entries, marks = [], {"train": [], "test": []}
    for row in rows(n, CLASSES, THREE):
        part = "test" if row.split == "test" else "train"
        marks[part].append((f"{len(marks[part]) + 1:05d}.jpg", row.label + 1))
        *name, year = CARS[row.label].split()
        entries.append((row, f"cars_{part}/{marks[part][-1][0]}", " ".join([year, *name])))
    write_list(home, "StanfordCars", "", entries)
    (home / "devkit").mkdir()
    kind = [("fname", object), ("class", object)]
    for part, file in (
        ("train", "devkit/cars_train_annos.mat"),
        ("test", "cars_test_annos_withlabels.mat"),
    ):
        savemat(home / file, {"annotations": np.array(marks[part], dtype=kind)})
    savemat(home / "devkit/cars_meta.mat", {"class_names": np.array(CARS, dtype=object)})


def oxford_pets(home: Path, n: int) -> None:
    entries, marks = [], {"trainval": [], "test": []}
    for row in rows(n, CLASSES, THREE):
        image = f"{PETS[row.label]}_{row.number}"
        entries.append((row, f"{image}.jpg", PETS[row.label].lower()))
        marks["test" if row.split == "test" else "trainval"].append(f"{image} {row.label + 1} 1 1")
    write_list(home, "OxfordPets", "images", entries)
    for part, content in marks.items():
        lines(home / f"annotations/{part}.txt", content)


def flowers102(home: Path, n: int) -> None:
    dealt = list(rows(n, CLASSES, THREE))
    entries = [(row, f"image_{row.position:05d}.jpg", FLOWERS[row.label]) for row in dealt]
    write_list(home, "OxfordFlowers", "jpg", entries)
    savemat(home / "imagelabels.mat", {"labels": [row.label + 1 for row in dealt]})
    keys = {"train": "trnid", "validation": "valid", "test": "tstid"}
    ids = {
        key: [row.position for row in dealt if row.split == split] for split, key in keys.items()
    }
    savemat(home / "setid.mat", ids)


def caltech101(home: Path, n: int) -> None:
    """Write objects. No list names two of the folders."""
    folders = list(CALTECH)
    entries = [
        (row, f"{folders[row.label]}/image_{row.number:04d}.jpg", CALTECH[folders[row.label]])
        for row in rows(n, CLASSES, THREE)
    ]
    write_list(home, "Caltech101", "101_ObjectCategories", entries)
    for folder in ("BACKGROUND_Google", "Faces_easy"):
        save(home / "101_ObjectCategories" / folder / "image_0001.jpg", Row(0, 1, 1, "train"))


def dtd(home: Path, n: int) -> None:
    entries = [
        (
            row,
            f"{TEXTURES[row.label]}/{TEXTURES[row.label]}_{row.number:04d}.jpg",
            TEXTURES[row.label],
        )
        for row in rows(n, CLASSES, THREE)
    ]
    write_list(home, "DescribableTextures", "images", entries)
    for split, file in (("train", "train1"), ("validation", "val1"), ("test", "test1")):
        lines(home / f"labels/{file}.txt", [path for row, path, _ in entries if row.split == split])


def ucf101(home: Path, n: int) -> None:
    """Write actions. The class names in the list have underscores before capitals, as the folders
    do.
    """
    names = [
        "".join(f"_{c}" if c.isupper() else c for c in action).removeprefix("_")
        for action in ACTIONS
    ]
    entries = [
        (
            row,
            f"{names[row.label]}/v_{ACTIONS[row.label]}_g{row.number:02d}_c01.jpg",
            names[row.label],
        )
        for row in rows(n, CLASSES, THREE)
    ]
    write_list(home, "UCF101", "UCF-101-midframes", entries)

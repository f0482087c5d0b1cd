"""Every known data set on a tiny tree in its real layout, compared with torchvision's reader if
there is one.
"""

from __future__ import annotations

import io
from hashlib import blake2b, md5
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets as tv
from PIL import Image

from tests.builders.image_files import listed
from tests.builders.known_trees import TREES, make_trees, spread
from vilu.datasets.known import open_known


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return one folder with all data sets, by torchvision's conventions."""
    return make_trees(tmp_path_factory.mktemp("known"))


def files_of(samples: list[tuple[str, int]], root: Path) -> dict[str, int]:
    return {str(Path(path).relative_to(root)): label for path, label in samples}


def below(name: str, root: Path, split: str | None) -> dict[str, int | None]:
    """Return vilu's listing, by paths below ``root``."""
    dataset = open_known(name, root, split=split)
    folder = Path(dataset.source.split(" (")[0]).relative_to(root)
    return {str(folder / key): label for key, label in listed(dataset)}


def md5_of(path: Path) -> str:
    return md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def raw_names(name: str, root: Path) -> list[str]:
    return list(open_known(name, root, raw_names=True).class_names or ())


def test_imagenet_against_torchvision(root: Path) -> None:
    home = root / "imagenet"
    wnids = sorted(folder.name for folder in (home / "train").iterdir())
    torch.save(({wnid: (wnid,) for wnid in wnids}, []), home / "meta.bin")
    for split, part in (("train", "train"), ("test", "val")):
        theirs = tv.ImageNet(str(home), split=part)
        expected = {
            path: theirs.wnids[label] for path, label in files_of(theirs.samples, root).items()
        }
        table = open_known("imagenet", root).classes.data_names
        assert {
            path: table[label] for path, label in below("imagenet", root, split).items()
        } == expected
    assert [table.index(wnid) for wnid in wnids] == spread()
    names = open_known("imagenet", root).class_names
    assert (len(names), names[0], names[999]) == (1000, "tench", "toilet paper")
    assert raw_names("imagenet", root) == list(names)  # the data have codes, no names


@pytest.mark.parametrize("name", ["imagenet_v2", "imagenet_sketch"])
def test_imagenet_variants_against_torchvision(root: Path, name: str) -> None:
    home = root / TREES[name][1][0]
    theirs = tv.ImageFolder(str(home))  # it sorts "166" before "83"
    expected = {
        path: theirs.classes[label] for path, label in files_of(theirs.samples, root).items()
    }
    table = open_known(name, root).classes.data_names
    assert {path: table[label] for path, label in below(name, root, None).items()} == expected
    if name == "imagenet_v2":
        assert table == tuple(map(str, range(1000)))
        assert set(below(name, root, None).values()) == set(spread(6))


def test_shots_are_the_half_of_each_class_that_hashes_first(root: Path) -> None:
    for name, shots, rest in (("imagenet_v2", {5}, {5}), ("imagenet_sketch", {2, 3}, {3})):
        halves = {}
        for split in ("shots", "test"):
            halves[split] = {}
            for key, label in listed(open_known(name, root, split=split)):
                halves[split].setdefault(label, set()).add(key)
        assert {len(keys) for keys in halves["shots"].values()} == shots
        assert {len(keys) for keys in halves["test"].values()} == rest
        for label, keys in halves["shots"].items():
            both = sorted(
                keys | halves["test"][label],
                key=lambda k: blake2b(k.encode(), digest_size=8).digest(),
            )
            assert set(both[: len(keys)]) == keys
        assert listed(open_known(name, root, split="shots+test")) == listed(open_known(name, root))


@pytest.mark.parametrize(("name", "base"), [("cifar10", tv.CIFAR10), ("cifar100", tv.CIFAR100)])
def test_cifar_against_torchvision(root: Path, name: str, base: type[tv.CIFAR10]) -> None:
    def checksum(file: str) -> str:
        return md5_of(root / base.base_folder / file)

    class Tiny(base):
        train_list = [[file, checksum(file)] for file, _ in base.train_list]  # noqa: RUF012  torchvision's own form
        test_list = [[file, checksum(file)] for file, _ in base.test_list]  # noqa: RUF012
        meta = {**base.meta, "md5": checksum(base.meta["filename"])}  # noqa: RUF012

    for split in ("train", "test"):
        theirs, ours = Tiny(str(root), train=split == "train"), open_known(name, root, split=split)
        records = list(ours.records(0, len(ours)))
        assert [record.label for record in records] == theirs.targets
        pixels = [np.asarray(Image.open(io.BytesIO(record.read()))) for record in records]
        np.testing.assert_array_equal(np.stack(pixels), theirs.data)
    assert raw_names(name, root) == theirs.classes
    assert ours.source == f"{root / base.base_folder} (official split)"


def test_food101_against_torchvision(root: Path) -> None:
    for split in ("train", "test"):
        theirs = tv.Food101(str(root), split=split)
        expected = files_of(list(zip(theirs._image_files, theirs._labels, strict=True)), root)
        assert below("food101", root, split) == expected
    assert raw_names("food101", root) == theirs.classes
    assert open_known("food101", root).class_names[:2] == ("apple pie", "baby back ribs")


def test_fgvc_aircraft_against_torchvision(root: Path) -> None:
    for split, theirs_split in {
        "train": "train",
        "validation": "val",
        "train+validation": "trainval",
        "test": "test",
    }.items():
        theirs = tv.FGVCAircraft(str(root), split=theirs_split)
        expected = files_of(list(zip(theirs._image_files, theirs._labels, strict=True)), root)
        assert below("fgvc_aircraft", root, split) == expected
    assert raw_names("fgvc_aircraft", root) == theirs.classes


def test_sun397_against_torchvision(root: Path) -> None:
    theirs = tv.SUN397(str(root))
    expected = files_of(list(zip(theirs._image_files, theirs._labels, strict=True)), root)
    assert below("sun397", root, None) == expected
    assert raw_names("sun397", root) == theirs.classes
    names = open_known("sun397", root).class_names
    assert names[:4] == (
        "abbey",
        "airplane cabin",
        "outdoor apartment building",
        "exterior balcony",
    )
    dataset = open_known("sun397", root, split="test")
    assert dataset.source.endswith("SUN397 (official split)")
    listing = (root / "SUN397/Partitions/Testing_01.txt").read_text().split()
    assert {f"/{key}" for key, _ in listed(dataset)} == set(listing)


def test_dtd_against_torchvision(root: Path) -> None:
    for split, theirs_split in (("train", "train"), ("validation", "val"), ("test", "test")):
        theirs = tv.DTD(str(root), split=theirs_split)
        expected = files_of(list(zip(theirs._image_files, theirs._labels, strict=True)), root)
        assert below("dtd", root, split) == expected
    assert raw_names("dtd", root) == theirs.classes


def test_oxford_pets_against_torchvision(root: Path) -> None:
    for split, theirs_split in (("train+validation", "trainval"), ("test", "test")):
        theirs = tv.OxfordIIITPet(str(root), split=theirs_split)
        assert below("oxford_pets", root, split) == files_of(
            list(zip(theirs._images, theirs._labels, strict=True)), root
        )
    names = open_known("oxford_pets", root).class_names
    assert [name.title() for name in names] == theirs.classes
    assert raw_names("oxford_pets", root)[1] == "american_bulldog"


def test_flowers102_against_torchvision(root: Path) -> None:
    class Tiny(tv.Flowers102):
        _file_dict = {  # noqa: RUF012  torchvision's own form
            key: (file, md5_of(root / "flowers-102" / file) if key != "image" else "")
            for key, (file, _) in tv.Flowers102._file_dict.items()
        }

    for split, theirs_split in (("train", "train"), ("validation", "val"), ("test", "test")):
        theirs = Tiny(str(root), split=theirs_split)
        expected = files_of(list(zip(theirs._image_files, theirs._labels, strict=True)), root)
        assert below("flowers102", root, split) == expected
    assert raw_names("flowers102", root) == tv.Flowers102.classes[:12]


def test_stanford_cars_against_torchvision(root: Path) -> None:
    for split, theirs_split in (("train+validation", "train"), ("test", "test")):
        theirs = tv.StanfordCars(str(root), split=theirs_split)
        assert below("stanford_cars", root, split) == files_of(theirs._samples, root)
    turned = [" ".join([name.split()[-1], *name.split()[:-1]]) for name in theirs.classes]
    assert raw_names("stanford_cars", root) == turned


def test_caltech101_against_torchvision(root: Path) -> None:
    theirs = tv.Caltech101(str(root))
    folder = "caltech101/101_ObjectCategories"
    pairs = zip(theirs.y, theirs.index, strict=True)
    expected = {f"{folder}/{theirs.categories[y]}/image_{index:04d}.jpg" for y, index in pairs}
    expected = {path for path in expected if "Faces_easy" not in path}  # no CoOp list has these
    ours = below("caltech101", root, None)
    assert set(ours) == expected
    assert open_known("caltech101", root).class_names[:5] == (
        "face",
        "leopard",
        "accordion",
        "brain",
        "car side",
    )
    assert {path.split("/")[2]: label for path, label in ours.items()}["Leopards"] == 1


def test_eurosat_against_torchvision(root: Path) -> None:
    theirs = tv.EuroSAT(str(root))
    assert below("eurosat", root, None) == files_of(
        theirs.samples, root
    )  # CoOp keeps the folders' order
    assert open_known("eurosat", root).class_names[3] == "Highway or Road"


def test_ucf101_names(root: Path) -> None:
    assert raw_names("ucf101", root)[0] == "Apply_Eye_Makeup"
    assert open_known("ucf101", root).class_names[0] == "Apply Eye Makeup"

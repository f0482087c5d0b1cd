"""The catalogue, and its data sets opened by name, on tiny trees in their real layouts."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets as tv

from tests.builders.image_files import listed
from tests.builders.known_trees import TREES, make_tree, make_trees
from tests.builders.tar_files import outcomes
from vilu.datasets.catalog import open_dataset
from vilu.datasets.images import read_image
from vilu.datasets.known import KNOWN, open_known
from vilu.errors import DataError, UsageError

LISTED = [name for name in TREES if not KNOWN[name].captioned]
NAMES = (
    "imagenet cifar10 cifar100 sun397 fgvc_aircraft eurosat stanford_cars food101 oxford_pets "
    "flowers102 "
)
NAMES += "caltech101 dtd ucf101 imagenet_v2 imagenet_sketch cc3m cc12m laion400m"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return one folder with all data sets, by torchvision's conventions."""
    return make_trees(tmp_path_factory.mktemp("known"))


def test_the_catalogue_has_the_sets_of_the_paper() -> None:
    assert [name for name in KNOWN if name in TREES] == sorted(TREES) == sorted(NAMES.split())
    for name in TREES:
        assert KNOWN[name].captioned == (name in {"cc3m", "cc12m", "laion400m"})
    for name, entry in KNOWN.items():
        assert entry.name == name
        assert entry.url.startswith("https://")
        assert entry.template == "a photo of a {}."
        assert entry.coop_template is None or entry.coop_template.count("{}") == 1
        assert all(len(md5) == 32 and int(md5, 16) >= 0 for md5 in entry.archives.values())
        assert entry.how.endswith(".")
        assert all([entry.title, entry.licence, entry.reference, entry.folders, entry.marks])


def test_the_page_says_what_the_catalogue_says() -> None:
    page = (Path(__file__).parents[2] / "docs/datasets.md").read_text()
    table = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in page.splitlines()
        if "| `" in line[:4]
    ]
    shown = [row[0].strip("` ") for row in table]
    assert [name for name in shown if name in TREES] == list(TREES)
    for row, entry in zip(table, map(KNOWN.__getitem__, shown), strict=True):
        assert row[1] == ("captions" if entry.captioned else str(entry.n_classes))
        assert [
            int(number.replace(",", "")) for number in re.findall(r"[0-9,]{2,}", row[2])
        ] == list(entry.sizes.values())
        assert row[4:6] == [entry.licence, entry.coop_template or "–"]
        assert set(re.findall(r"`(.*?)`", row[6])) <= set(entry.folders)


def test_checksums_are_torchvisions() -> None:
    published = {
        md5 for _, md5 in (*tv.CIFAR10.train_list, *tv.CIFAR10.test_list, *tv.CIFAR100.train_list)
    }
    published |= {md5 for _, md5 in tv.CIFAR100.test_list}
    published |= {
        tv.CIFAR10.tgz_md5,
        tv.CIFAR100.tgz_md5,
        tv.CIFAR10.meta["md5"],
        tv.CIFAR100.meta["md5"],
    }
    published |= {tv.Food101._MD5, tv.DTD._MD5, tv.SUN397._DATASET_MD5}
    published |= {
        md5 for _, md5 in (*tv.Flowers102._file_dict.values(), *tv.OxfordIIITPet._RESOURCES)
    }
    published |= {md5 for _, md5 in tv.imagenet.ARCHIVE_META.values()}
    ours = {md5 for name in TREES for md5 in KNOWN[name].archives.values()}
    rest = ours - published
    assert published <= ours
    sources = "".join(Path(module.__file__).read_text() for module in (tv.caltech, tv.eurosat))
    assert len(rest) == 2
    assert all(md5 in sources for md5 in rest)


@pytest.mark.parametrize("name", LISTED)
def test_each_data_set_opens_decodes_and_has_one_class_table(root: Path, name: str) -> None:
    splits = [part for key in KNOWN[name].sizes for part in key.split("+")]
    if name in {"food101", "sun397"}:
        splits = list(KNOWN[name].official_sizes)
    parts = {split: open_known(name, root, split=split) for split in splits}
    whole = open_known(name, root)
    assert whole.captioned is False
    assert len({dataset.class_names for dataset in parts.values()}) == 1
    assert len({dataset.fingerprint for dataset in [*parts.values(), whole]}) == len(parts) + 1
    assert [pair for dataset in parts.values() for pair in listed(dataset)] == listed(whole)
    assert listed(open_known(name, root, split="+".join(splits))) == listed(whole)
    keys = [key for key, _ in listed(whole)]
    assert len(set(keys)) == len(keys) == (60 if name == "imagenet_v2" else 64)
    assert [record.key for record in whole.records(5, 9)] == keys[5:9]
    used = {label for _, label in listed(whole)}
    for split, dataset in parts.items():
        counts = np.bincount([label for _, label in listed(dataset)], minlength=max(used) + 1)
        assert split == "validation" or counts[sorted(used)].min() >= 2
    record = next(iter(parts["test"].records(0, 1)))
    assert read_image(record).image.size == ((32, 32) if name.startswith("cifar") else (48, 40))
    assert not any("_" in class_name for class_name in whole.class_names or ())
    assert isinstance(pickle.loads(pickle.dumps(whole)), type(whole))


@pytest.mark.parametrize("name", LISTED)
def test_the_layouts_of_torchvision_and_coop_are_one_data_set(
    root: Path, tmp_path: Path, name: str
) -> None:
    home = make_tree(name, tmp_path, layout="coop")
    whole = listed(open_known(name, root))
    for source in (tmp_path, home):
        assert listed(open_known(name, source)) == whole
    own = root / TREES[name][1][0]
    assert listed(open_known(name, own)) == whole
    assert listed(open_known(name, str(own.parent))) == whole


# Captions


@pytest.mark.parametrize(("name", "n_shards"), [("cc3m", 3), ("cc12m", 2), ("laion400m", 2)])
def test_captions_are_tars(root: Path, name: str, n_shards: int) -> None:
    dataset = open_known(name, root)
    assert (dataset.captioned, dataset.class_names, len(dataset)) == (True, None, n_shards)
    found = outcomes(dataset)
    assert len(found) == 64
    assert len({text for _, text in found}) == 64
    assert found[0][1] == "red stripes, picture 1"
    prefix = "train/" if name == "cc3m" else ""
    assert found[0][0] == f"{prefix}00000.tar#000000000"
    for options, word in (
        ({"split": "train"}, "--split"),
        ({"raw_names": True}, "raw_names"),
        ({"classes": root / "names.txt"}, "--classes"),
    ):
        with pytest.raises(UsageError, match=f"no classes and no splits. Leave {word}"):
            open_known(name, root, **options)


# Opening by name


def test_open_dataset_by_name(root: Path) -> None:
    by_name = open_dataset(root, dataset="dtd", split="test", limit=3)
    assert listed(by_name) == listed(open_known("dtd", root, split="test"))[:3]
    assert by_name.source == f"{root / 'dtd/dtd'} (split_zhou_DescribableTextures.json of the user)"
    assert open_dataset(root, dataset="ucf101", raw_names=True).class_names[0] == "Apply_Eye_Makeup"
    for options, message in (
        ({"raw_names": True}, "raw_names is for data sets of the catalogue"),
        ({"dataset": "dtd", "where": {"a": "b"}}, "--captions, --where and --root are for tables"),
        ({"dataset": "dtd", "captions": True}, "--captions, --where and --root are for tables"),
        ({"dataset": "oxford-pet"}, "no data set 'oxford-pet'. Did you mean 'oxford_pets'"),
        ({"dataset": "zzz"}, "There are: caltech101, cc12m"),
        ({"dataset": "dtd", "split": "val"}, r"has no split 'val'; it has test, train, validation"),
        (
            {"dataset": "food101", "split": "validation"},
            r"\(official split\) has no split 'validation'",
        ),
        ({"dataset": "cc3m", "limit": 3}, "does not work for tar files"),
    ):
        with pytest.raises(UsageError, match=message):
            open_dataset(root, **options)
    with pytest.raises(UsageError, match="is no folder"):
        open_known("dtd", root / "nowhere")


def test_names_of_the_user(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_text("".join(f"texture {label}\n" for label in range(12)))
    assert open_known("dtd", root, classes=file).class_names[11] == "texture 11"
    with pytest.raises(UsageError, match="Give raw_names or classes"):
        open_known("dtd", root, classes=file, raw_names=True)
    raw = open_known("ucf101", root).classes.data_names
    file.write_text("".join(f"{name}\tperson {label}\n" for label, name in enumerate(raw)))
    assert open_known("ucf101", root, classes=file).class_names[11] == "person 11"


def test_a_data_set_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "dtd").mkdir()
    with pytest.raises(
        DataError, match=r"there is no dtd/dtd or dtd with images in it.*dtd-r1\.0\.1\.tar\.gz"
    ):
        open_known("dtd", tmp_path)
    (tmp_path / "cc3m").mkdir()
    with pytest.raises(DataError, match="img2dataset"):
        open_known("cc3m", tmp_path)


def test_a_missing_file_is_the_error_of_its_row(tmp_path: Path) -> None:
    home = make_tree("dtd", tmp_path)
    before = open_known("dtd", tmp_path, split="test")
    (home / "images/banded/banded_0002.jpg").unlink()
    dataset = open_known("dtd", tmp_path, split="test")
    assert listed(dataset) == listed(before)
    assert dataset.fingerprint != before.fingerprint
    with pytest.raises(FileNotFoundError):
        next(dataset.records(0, 1)).read()
    assert read_image(next(dataset.records(1, 2))).image.size == (48, 40)

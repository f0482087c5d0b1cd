"""Split lists: the shipped lists, users' lists and hostile lists."""

from __future__ import annotations

import hashlib
import json
import lzma
import random
import re
from importlib import resources
from pathlib import Path

import pytest

from tests.builders.image_files import listed
from tests.builders.known_images import Row, save
from tests.builders.known_trees import make_tree, wnids
from vilu.datasets.known import KNOWN, open_known
from vilu.errors import DataError
from vilu_bench.known_datasets.layouts import clip_names
from vilu_bench.known_datasets.read import shipped_lists_of

FILES = {
    "eurosat": "EuroSAT",
    "stanford_cars": "StanfordCars",
    "oxford_pets": "OxfordPets",
    "flowers102": "OxfordFlowers",
    "caltech101": "Caltech101",
    "dtd": "DescribableTextures",
    "ucf101": "UCF101",
}
LIST = "split_zhou_DescribableTextures.json"


# The assets


def test_shipped_lists_have_the_published_sizes() -> None:
    for name in FILES:
        lists, entry = shipped_lists_of(name), KNOWN[name]
        assert {split: len(entries) for split, entries in lists.splits.items()} == dict(entry.sizes)
        assert len(lists.names_in_label_order()) == entry.n_classes
        assert {label for entries in lists.splits.values() for _, label in entries} == set(
            range(entry.n_classes)
        )
    assert sum(KNOWN["dtd"].sizes.values()) == 5640
    assert shipped_lists_of("stanford_cars").names_in_label_order()[13] == "2012 Audi TTS Coupe"


def test_the_asset_is_the_one_that_was_made() -> None:
    data = resources.files("vilu_bench").joinpath("assets", "coop_splits.txt.xz").read_bytes()
    assert len(data) < 300_000
    digest = hashlib.sha256(lzma.decompress(data)).hexdigest()
    assert digest == "ec864e62f34147873421a2e4daff436d7cdca4f4ca900c33eb29e78b7d2ffee2"


@pytest.mark.data
@pytest.mark.parametrize("name", FILES)
def test_the_asset_holds_every_entry_of_coops_lists(shared: Path, name: str) -> None:
    lists = json.loads((shared / f"data/splits/split_zhou_{FILES[name]}.json").read_text())
    ours = shipped_lists_of(name)
    names = ours.names_in_label_order()
    for key, split in (("train", "train"), ("val", "validation"), ("test", "test")):
        found = [[path, label, names[label]] for path, label in ours.splits[split]]
        assert sorted(found) == sorted(lists[key])


@pytest.mark.data
def test_clip_names_are_those_by_index(shared: Path) -> None:
    names = json.loads((shared / "data/splits/imagenet_class_names.json").read_text())
    expected = [names[str(label)] for label in range(1000)]
    assert (
        (expected[657], expected[836])
        == (expected[744], expected[837])
        == ("missile", "sunglasses")
    )
    expected[744], expected[836] = "projectile", "sunglass"
    assert expected == list(clip_names())
    assert len(set(expected)) == 1000


def test_wnids_are_sorted_and_timms() -> None:
    import timm

    file = Path(timm.__file__).parent / "data/_info/imagenet_synsets.txt"
    assert wnids() == sorted(set(wnids())) == file.read_text().split()


# The list in use


def test_without_a_list_of_the_user_the_shipped_one_is_used(tmp_path: Path) -> None:
    home = make_tree("dtd", tmp_path)
    (home / LIST).unlink()
    dataset = open_known("dtd", tmp_path, split="validation")
    assert dataset.source.endswith("dtd (CoOp list shipped with vilu)")
    assert (len(dataset), len(dataset.class_names)) == (1128, 47)
    assert ("images/banded/banded_0024.jpg", 0) in listed(dataset)


def test_a_list_in_any_order_is_one_data_set(tmp_path: Path) -> None:
    home = make_tree("dtd", tmp_path)
    before = open_known("dtd", tmp_path)
    lists = json.loads((home / LIST).read_text())
    for entries in lists.values():
        random.Random(0).shuffle(entries)
    (home / LIST).write_text(json.dumps(dict(reversed(lists.items()))))
    after = open_known("dtd", tmp_path)
    assert listed(after) == listed(before)
    assert (after.fingerprint, after.class_names) == (before.fingerprint, before.class_names)


def test_labels_are_those_of_the_list_whatever_comes_first(tmp_path: Path) -> None:
    """Labels must follow the list, whatever class comes first.

    The real test list for Stanford Cars begins with class 180. If labels followed the first
    appearance, they would differ.
    """
    home = make_tree("stanford_cars", tmp_path)
    lists = json.loads((home / "split_zhou_StanfordCars.json").read_text())
    lists["test"].reverse()
    (home / "split_zhou_StanfordCars.json").write_text(json.dumps(lists))
    tables = {
        split: open_known("stanford_cars", tmp_path, split=split).class_names
        for split in ("train", "test")
    }
    assert tables["train"] == tables["test"]
    for split, key in (("train", "train"), ("test", "test")):
        expected = {path: name for path, _, name in lists[key]}
        assert {
            key: tables[split][label]
            for key, label in listed(open_known("stanford_cars", tmp_path, split=split))
        } == expected


@pytest.mark.parametrize(("name", "file"), [("food101", "Food101"), ("sun397", "SUN397")])
def test_food101_and_sun397_take_the_list_of_the_user(tmp_path: Path, name: str, file: str) -> None:
    home = make_tree(name, tmp_path)
    assert open_known(name, tmp_path).source.endswith("(official split)")
    official = listed(open_known(name, tmp_path, split="test"))
    prefix = "images/" if name == "food101" else ""
    images = [key.removeprefix(prefix) for key, _ in official]
    lists = {
        "train": [],
        "val": [[images[0], 0, "first_thing"]],
        "test": [[images[1], 1, "second thing"]],
    }
    (home / f"split_zhou_{file}.json").write_text(json.dumps(lists))
    dataset = open_known(name, tmp_path, split="validation+test")
    assert listed(dataset) == [(f"{prefix}{images[0]}", 0), (f"{prefix}{images[1]}", 1)]
    assert dataset.class_names == ("first thing", "second thing")
    assert dataset.source == f"{home} (split_zhou_{file}.json of the user)"
    assert listed(open_known(name, tmp_path)) == listed(dataset)
    with pytest.raises(DataError, match=r"split 'train' of .* has no image"):
        open_known(name, tmp_path, split="train")
    (home / f"split_zhou_{file}.json").write_text('{"train": []}')
    with pytest.raises(DataError, match=f"split_zhou_{file}.json: it names no class"):
        open_known(name, tmp_path)


def test_coop_keeps_the_lists_of_sun397_beside_its_images(tmp_path: Path) -> None:
    home = make_tree("sun397", tmp_path, layout="coop")
    for file in (home / "ClassName.txt", *(home / "Partitions").iterdir()):
        file.rename(tmp_path / "sun397" / file.name)
    dataset = open_known("sun397", tmp_path)
    assert (len(dataset), dataset.source) == (64, f"{home} (official split)")
    lists = {"train": [["a/abbey/sun_abxkfbpwqovpjwzh.jpg", 0, "abbey"]], "val": [], "test": []}
    (tmp_path / "sun397/split_zhou_SUN397.json").write_text(json.dumps(lists))
    assert listed(open_known("sun397", tmp_path / "sun397", split="train")) == [
        ("a/abbey/sun_abxkfbpwqovpjwzh.jpg", 0)
    ]


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("sun397", "Partitions/Testing_01.txt"),
        ("sun397", "ClassName.txt"),
        ("food101", "meta/test.json"),
        ("fgvc_aircraft", "images_variant_val.txt"),
    ],
)
def test_a_missing_list_is_named_with_what_to_do(tmp_path: Path, name: str, gone: str) -> None:
    home = make_tree(name, tmp_path)
    (home / gone).unlink()
    with pytest.raises(
        DataError,
        match=f"has no .*{re.escape(Path(gone).name)}.*nothing says which image.*Download",
    ):
        open_known(name, tmp_path)


def test_a_link_that_leads_nowhere_is_not_passed_over(tmp_path: Path) -> None:
    home = make_tree("dtd", tmp_path)
    (home / LIST).unlink()
    (home / LIST).symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(DataError, match="No such file"):
        open_known("dtd", tmp_path)


# Hostile lists

GOOD = ["banded/1.jpg", 0, "banded"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (["../../etc/passwd", 0, "banded"], "must be relative, plain, and stay below its folder"),
        (["/etc/passwd", 0, "banded"], "must be relative"),
        (["C:\\x.jpg", 0, "banded"], "must be relative"),
        (["a\\..\\..\\x.jpg", 0, "banded"], "must be relative"),
        (["banded//1.jpg", 0, "banded"], "must be relative, plain"),
        (["./banded/1.jpg", 0, "banded"], "must be relative, plain"),
        (["a\x1b[2J.jpg", 0, "banded"], "must be relative, plain"),
        (["a\ud800.jpg", 0, "banded"], "must be relative, plain"),
        (["a\0.jpg", 0, "banded"], "must be relative"),
        (["x" * 2000, 0, "banded"], "must be relative, plain"),
        (["", 0, "banded"], "must be relative"),
        (["2.jpg", -1, "banded"], "expected .relative path, class index, class name.; found"),
        (["2.jpg", "0", "banded"], "expected .relative path"),
        (["2.jpg", True, "banded"], "expected .relative path"),
        (["2.jpg", 0.0, "banded"], "expected .relative path"),
        (["2.jpg", 0], "expected .relative path"),
        (["2.jpg", 0, None], "expected .relative path"),
        ({"path": "2.jpg"}, "expected .relative path"),
        ("2.jpg", "expected .relative path"),
        (["2.jpg", 0, "blotchy"], "label 0 is 'blotchy' here and 'banded' before"),
        (["2.jpg", 1, "banded"], "'banded' is label 1 here and label 0 before"),
        (["2.jpg", 1, " "], "class name ' ' must be text"),
        (["2.jpg", 1, "a\nb"], "must be text"),
        (GOOD, "'banded/1.jpg' is listed more than once"),
    ],
)
def test_entries_that_cannot_be_are_refused_by_file_and_number(
    tmp_path: Path, entry: object, message: str
) -> None:
    home = make_tree("dtd", tmp_path, n=12)
    (home / LIST).write_text(
        json.dumps({"train": [GOOD], "val": [], "test": [["t.jpg", 0, "banded"], entry]})
    )
    with pytest.raises(DataError, match=rf"{LIST}, test entry 2 \(counting from 1\): .*{message}"):
        open_known("dtd", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as JSON"),
        (b"{", "cannot be read as JSON"),
        (b"\xff\xfe{}", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b"[" + b"9" * 5000 + b"]", "cannot be read as JSON"),
        (b"[]", "expected an object of lists; found list"),
        (b'{"train": [], "train": []}', "a key occurs twice in an object"),
        (b'{"train": {}}', "expected lists named train, val and test; found 'train': dict"),
        (b'{"trian": []}', "found 'trian'"),
        (
            b'{"train": [["a.jpg", 1, "a"]]}',
            "labels must be 0 to K - 1, each with images; 0 has none",
        ),
        (b'{"train": [["a.jpg", 0, "a"], ["b.jpg", 1000000000000, "b"]]}', "1 has none"),
    ],
)
def test_files_that_are_no_list_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    home = make_tree("dtd", tmp_path, n=12)
    (home / LIST).write_bytes(content)
    with pytest.raises(DataError, match=f"{LIST}: .*{message}") as told:
        open_known("dtd", tmp_path)
    assert str(told.value).count("Mend it") == 1


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        (
            "fgvc_aircraft",
            "images_variant_test.txt",
            "../0000001 707-320\n",
            "test entry 1 .*must be relative",
        ),
        (
            "fgvc_aircraft",
            "images_variant_test.txt",
            "1 Concorde\n",
            "test entry 1 .*'Concorde' is none of the 12",
        ),
        (
            "fgvc_aircraft",
            "images_variant_test.txt",
            "0000001 707-320\n",
            "'0000001.jpg' is listed more than once",
        ),
        (
            "fgvc_aircraft",
            "variants.txt",
            "a\na\n",
            "variants.txt: 'a' is label 1 here and label 0",
        ),
        ("fgvc_aircraft", "variants.txt", "\n", "variants.txt: it names no class"),
        (
            "food101",
            "meta/test.json",
            '{"waffles": 3}',
            "expected a list of paths per class; 'waffles' has int",
        ),
        (
            "food101",
            "meta/test.json",
            '{"waffles": [3]}',
            "test entry 1 .*expected a path below images/; found 3",
        ),
        (
            "food101",
            "meta/test.json",
            '{"waffles": ["../../x"]}',
            "test entry 1 .*must be relative",
        ),
        (
            "sun397",
            "Partitions/Testing_01.txt",
            "/a/abbey/../../../x.jpg\n",
            "test entry 1 .*is none of the 12",
        ),
        (
            "sun397",
            "Partitions/Testing_01.txt",
            "//a/abbey/x.jpg\n",
            "test entry 1 .*is none of the 12",
        ),
        ("sun397", "Partitions/Testing_01.txt", "\xff\n", "Testing_01.txt: .*"),
        ("sun397", "ClassName.txt", "/a/abbey\nabbey\n", "is none of the 2 classes"),
    ],
)
def test_hostile_official_lists(
    tmp_path: Path, name: str, file: str, content: str, message: str
) -> None:
    home = make_tree(name, tmp_path)
    (home / file).write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=message):
        open_known(name, tmp_path)


# ImageNet's folders


def test_a_flat_folder_of_validation_images_is_refused_with_what_to_do(tmp_path: Path) -> None:
    home = make_tree("imagenet", tmp_path)
    for file in (home / "val").glob("*/*"):
        file.rename(home / "val" / file.name)
    for folder in (home / "val").glob("n*"):
        folder.rmdir()
    with pytest.raises(
        DataError, match=r"images without class folders \(ILSVRC2012_val_.*devkit.*torchvision"
    ):
        open_known("imagenet", tmp_path, split="test")
    assert len(open_known("imagenet", tmp_path, split="train")) == 36


def test_folders_that_are_no_class_are_refused(tmp_path: Path) -> None:
    home = make_tree("imagenet", tmp_path)
    save(home / "val/n99999999/1.JPEG", Row(0, 1, 1, "test"))
    with pytest.raises(
        DataError,
        match=r"n99999999 is no class: expected the 1000 folders n01440764, \.\.\. Move it",
    ):
        open_known("imagenet", tmp_path, split="test")
    v2 = make_tree("imagenet_v2", tmp_path)
    save(v2 / "007/1.jpeg", Row(0, 1, 1, "test"))
    with pytest.raises(DataError, match="007 is no class"):
        open_known("imagenet_v2", tmp_path)


def test_a_split_of_imagenet_that_is_not_unpacked(tmp_path: Path) -> None:
    home = make_tree("imagenet", tmp_path)
    (home / "train").rename(home / "training")
    assert len(open_known("imagenet", tmp_path, split="test")) == 28
    with pytest.raises(
        DataError, match=r"train is missing\. Unpack it there, or choose another split"
    ):
        open_known("imagenet", tmp_path)
    (home / "train").mkdir()
    with pytest.raises(
        DataError, match=r"holds nothing; expected a folder per class\. Unpack the archive"
    ):
        open_known("imagenet", tmp_path)

"""Out-of-distribution images, named by folders, labels, prompt names or numbers, in every
layout.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import vilu
from tests.builders.image_files import encode, picture
from tests.builders.store_fakes import FakeBackbone
from tests.builders.tar_files import tar_bytes
from tests.datasets.test_cifar import cifar
from vilu.datasets.base import ImageDataset
from vilu.datasets.catalog import open_dataset
from vilu.errors import DataError, ProvenanceError, UsageError
from vilu.store.embed import embed
from vilu.store.inspect import inspect

PICTURES = [encode(picture(size=(8, 8), seed=seed), "PNG") for seed in range(6)]
LABELS = ("cat", "moth", "sea_lion", "cat", "moth", "sea_lion")


def labels(images: ImageDataset) -> list[int | None]:
    return [record.label for record in images.records(0, len(images))]


def folder(root: Path) -> Path:
    for i, (data, label) in enumerate(zip(PICTURES, LABELS, strict=True)):
        path = root / "photos" / label / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root / "photos"


def table(root: Path, values: list, name: str = "t.parquet") -> Path:
    source = root / name
    if source.suffix == ".parquet":
        pq.write_table(pa.table({"image": PICTURES, "label": values}), source)
    else:
        folder(root)
        rows = [
            f"photos/{label}/{i}.png,{value}"
            for i, (label, value) in enumerate(zip(LABELS, values, strict=True))
        ]
        source.write_text("\n".join(["path,label", *rows]))
    return source


def classes(root: Path, *lines: str) -> Path:
    (root / "classes.txt").write_text("\n".join(lines))
    return root / "classes.txt"


def test_a_folder(tmp_path: Path) -> None:
    images = open_dataset(folder(tmp_path), outside=["moth"])
    assert images.class_names == ("cat", "sea lion")
    assert images.classes.data_names == ("cat", "sea_lion")
    assert labels(images) == [0, 0, -2, -2, 1, 1]
    assert open_dataset(folder(tmp_path), outside=["moth", "sea lion"]).class_names == ("cat",)
    assert labels(open_dataset(folder(tmp_path), outside=["moth"], limit=3)) == [0, 0, -2]
    for copy in (
        {"outside": ["moth"]},
        {"limit": 3},
        {"outside": ["moth"], "limit": 3},
    ):  # as executors send it
        images = open_dataset(folder(tmp_path), **copy)
        assert labels(pickle.loads(pickle.dumps(images))) == labels(images)


def test_a_classes_file_may_leave_them_out(tmp_path: Path) -> None:
    source = folder(tmp_path)
    for lines in (
        ("cat\ta cat", "sea_lion\ta seal"),
        ("cat\ta cat", "moth\ta moth", "sea_lion\ta seal"),
    ):
        images = open_dataset(source, classes=classes(tmp_path, *lines), outside=["moth"])
        assert images.class_names == ("a cat", "a seal")
        assert labels(images) == [0, 0, -2, -2, 1, 1]
    assert open_dataset(
        source, classes=classes(tmp_path, "cat", "sea lion"), outside=["moth"]
    ).class_names == (
        "cat",
        "sea lion",
    )
    with pytest.raises(DataError, match=r"leaves out classes of the data: 'moth'.*--outside"):
        open_dataset(source, classes=classes(tmp_path, "cat", "sea lion"))


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_a_table(tmp_path: Path, name: str) -> None:
    images = open_dataset(table(tmp_path, list(LABELS), name), outside=["moth", "sea_lion"])
    assert (images.class_names, labels(images)) == (("cat",), [0, -2, -2, 0, -2, -2])
    numbers = table(tmp_path, [0, 1, 7, -2, 1, 0], name)
    images = open_dataset(numbers, classes=classes(tmp_path, "cat", "dog"), outside=["7"])
    assert (images.class_names, labels(images)) == (("cat", "dog"), [0, 1, -2, -2, 1, 0])
    images = open_dataset(numbers, classes=classes(tmp_path, "cat", "dog"), outside=["7", "cat"])
    assert (images.class_names, labels(images)) == (("dog",), [-2, 0, -2, -2, 0, -2])
    with pytest.raises(DataError, match=r"row 2 .counting from 0. has label 7.*--outside"):
        open_dataset(numbers, classes=classes(tmp_path, "cat", "dog"))


def test_tars(tmp_path: Path) -> None:
    values = ("0", "1", "-2", "9", "", "8")
    entries = [
        entry
        for i, (data, value) in enumerate(zip(PICTURES, values, strict=True))
        for entry in ((f"{i}.png", data), *([(f"{i}.cls", value.encode())] if value else []))
    ]
    (tmp_path / "0.tar").write_bytes(tar_bytes(*entries))
    images = open_dataset(
        tmp_path / "0.tar", classes=classes(tmp_path, "cat", "dog"), outside=["9", "cat"]
    )
    assert images.class_names == ("dog",)
    assert labels(images) == [
        -2,
        0,
        -2,
        -2,
        None,
        None,
    ]  # the last image is bad, since 8 is not named
    assert images.shard_fingerprint(0, 1)
    with pytest.raises(UsageError, match="no class or label '1' for --outside"):
        open_dataset(tmp_path / "0.tar", classes=classes(tmp_path, "cat", "dog"), outside=["1"])


def test_cifar(tmp_path: Path) -> None:
    cifar(tmp_path, 10)
    whole = open_dataset(tmp_path, split="test")
    images = open_dataset(tmp_path, split="test", outside=["class_5", "class 6"])
    assert len(images.class_names) == len(whole.class_names) - 2
    for before, after in zip(labels(whole), labels(images), strict=True):
        name = whole.class_names[before]
        assert after == -2 if name in {"class 5", "class 6"} else images.class_names[after] == name


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (
            ["mouth"],
            "no class or label 'mouth' for --outside; it has cat, moth, sea_lion. "
            "Did you mean 'moth'",
        ),
        (["cat", "moth", "sea lion"], "leaves none of the 3 classes"),
        ([""], "no class or label ''"),
    ],
)
def test_names_that_there_are_not(tmp_path: Path, names: list[str], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        open_dataset(folder(tmp_path), outside=names)


def test_without_classes_nothing_is_outside(tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.png").write_bytes(PICTURES[0])
    with pytest.raises(UsageError, match="has no classes, so nothing can be outside"):
        open_dataset(tmp_path / "flat", outside=["cat"])


def stored(images: ImageDataset, output: Path, **settings: object) -> vilu.EmbeddingStore:
    return embed(images, FakeBackbone(), output, names=images.class_names, **settings)


def test_a_store_says_which_rows_are_outside(tmp_path: Path) -> None:
    store = stored(open_dataset(folder(tmp_path), outside=["moth"]), tmp_path / "store")
    assert store.target.tolist() == [0, 0, -1, -1, 1, 1]
    assert store.outside.tolist() == [False, False, True, True, False, False]
    assert store.manifest.outside == ("moth",)
    failure = next(store.batches(8)).failure.tolist()
    assert failure[2:4] == [1, 1]
    taken = store.take([3, 0])
    assert (taken.target.tolist(), taken.outside.tolist()) == ([-1, 0], [True, False])
    report = inspect(tmp_path / "store", deep=True)
    assert not report.problems
    assert report.labels == {"inside": 4, "outside": 2, "unknown": 0}
    assert "labels       4 inside (66.7%), 2 outside (33.3%); outside are 'moth'" in str(report)


def test_going_on_with_other_names_is_refused(tmp_path: Path) -> None:
    source = folder(tmp_path)
    stored(open_dataset(source, outside=["moth"]), tmp_path / "store")
    with pytest.raises(ProvenanceError, match=r"outside was \['moth'\] and is now \[\]"):
        stored(open_dataset(source), tmp_path / "store")
    with pytest.raises(ProvenanceError, match=r"outside was \['moth'\] and is now \['cat'\]"):
        stored(open_dataset(source, outside=["cat"]), tmp_path / "store")
    stored(open_dataset(source, outside=["moth", "moth"]), tmp_path / "store")

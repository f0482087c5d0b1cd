from __future__ import annotations

import errno
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders.image_files import (
    encode,
    listed,
    picture,
    write_parquet,
)
from vilu.datasets.catalog import open_dataset
from vilu.datasets.images import read_image
from vilu.errors import DataError, StorageError


def png(i: int) -> bytes:
    return encode(picture(size=(8, 8), seed=i), "PNG")


# Parquet with bytes


def columns(n: int) -> dict:
    return {
        "image": pa.array([png(i) for i in range(n)]),
        "label": pa.array([i % 3 for i in range(n)], pa.int32()),
        "split": pa.array([["train", "validation", "test"][i % 3] for i in range(n)]),
        "key": pa.array([f"k{i}" for i in range(n)]),
    }


NAMES = {"class_names": "ant,red_fox,zebra"}


def test_parquet_of_bytes(tmp_path):
    source = write_parquet(tmp_path, columns(9), NAMES, row_group_size=4)
    dataset = open_dataset(source, split="validation+test")
    assert dataset.class_names == ("ant", "red fox", "zebra")
    assert listed(dataset) == [("k1", 1), ("k2", 2), ("k4", 1), ("k5", 2), ("k7", 1), ("k8", 2)]
    assert [record.read() for record in dataset.records(0, 99)] == [
        png(i) for i in (1, 2, 4, 5, 7, 8)
    ]


@pytest.mark.parametrize("kind", [pa.large_binary(), pa.binary_view()])
def test_other_types_of_bytes(tmp_path, kind):
    source = write_parquet(tmp_path, {"image": pa.array([png(0)]).cast(kind)})
    record = next(open_dataset(source).records(0, 1))
    assert (record.key, record.label, record.read()) == ("0", None, png(0))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_part_of_a_parquet_file_equals_a_slice_of_the_whole(tmp_path_factory, data):
    n = data.draw(st.integers(0, 90))
    chosen = data.draw(st.lists(st.sampled_from(["train", "test", None]), min_size=n, max_size=n))
    folder = tmp_path_factory.mktemp("parts")
    source = write_parquet(
        folder,
        {
            "image": pa.array([b"%d" % i for i in range(n)], pa.binary()),
            "split": pa.array(chosen, pa.string()),
        },
        row_group_size=data.draw(st.integers(1, 100)),
    )
    split = data.draw(st.sampled_from([None, *sorted({name for name in chosen if name})]))
    expected = [i for i, name in enumerate(chosen) if split in {None, name}]
    dataset = open_dataset(source, split=split)
    assert len(dataset) == len(expected)
    start, stop = data.draw(st.integers(0, n)), data.draw(st.integers(0, n + 5))
    part = [(record.key, record.read()) for record in dataset.records(start, stop)]
    assert part == [(str(i), b"%d" % i) for i in expected[start:stop]]


def test_hugging_face_struct_and_class_label(tmp_path):
    (tmp_path / "beside.png").write_bytes(png(7))
    image = [
        {"bytes": png(0), "path": "0.png"},
        {"bytes": None, "path": "beside.png"},
        {"bytes": None, "path": None},
    ]
    image += [{"bytes": None, "path": "/etc/passwd"}, None, {"bytes": b"", "path": "beside.png"}]
    info = {
        "info": {
            "features": {
                "label": {"names": ["cat", "dog"], "_type": "ClassLabel"},
                "image": {"_type": "Image"},
            }
        }
    }
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    source = write_parquet(
        tmp_path,
        {"image": pa.array(image, kind), "label": pa.array([1, 0, None, 0, 0, 0])},
        {"huggingface": json.dumps(info)},
    )
    dataset = open_dataset(source)
    assert dataset.class_names == ("cat", "dog")
    assert listed(dataset) == [("0", 1), ("1", 0), ("2", None), ("3", 0), ("4", 0), ("5", 0)]
    good, beside, *bad, empty = dataset.records(0, 6)
    assert (good.read(), beside.read(), empty.read()) == (png(0), png(7), b"")
    for record in bad:
        with pytest.raises(OSError, match=r"no image|below its folder"):
            record.read()


def test_parquet_string_labels_are_numbered_over_the_whole_file(tmp_path):
    for kind in (
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int8(), pa.string()),
    ):
        labels = pa.array(["b", "10", None, "c", "9"]).cast(kind)
        split = pa.array(["x", "x", "x", "x", "y"])
        source = write_parquet(
            tmp_path, {"image": pa.array([b"x"] * 5), "target": labels, "split": split}
        )
        dataset = open_dataset(source, split="x")
        assert dataset.class_names == ("10", "9", "b", "c")
        assert [label for _, label in listed(dataset)] == [2, 0, None, 3]


def test_parquet_labels_of_other_types(tmp_path):
    images = pa.array([b"x", b"y"])
    for labels in ([1.0, float("nan")], [1.0, None]):
        source = write_parquet(tmp_path, {"image": images, "label": labels}, NAMES)
        assert [label for _, label in listed(open_dataset(source))] == [1, None]
    source = write_parquet(tmp_path, {"image": images, "label": pa.nulls(2)}, NAMES)
    assert [label for _, label in listed(open_dataset(source))] == [None, None]
    for labels in (
        [0.5, 1.0],
        [True, False],
        [[0], [1]],
        pa.array([0, 1], pa.timestamp("s")),
        [b"a", b"b"],
    ):
        with pytest.raises(DataError, match="whole numbers or strings"):
            open_dataset(write_parquet(tmp_path, {"image": images, "label": labels}, NAMES))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 3], r"row 2 .*label 3.*0 to 2"),
        ([0, -1, 2], r"row 1 .*label -1"),
        ([2**40, 0, 0], "row 0"),
    ],
)
def test_parquet_labels_out_of_range(tmp_path, labels, message):
    source = write_parquet(tmp_path, {"image": pa.array([b"x"] * 3), "label": labels}, NAMES)
    with pytest.raises(DataError, match=message):
        open_dataset(source)


@pytest.mark.parametrize(
    "metadata",
    [
        {"class_names": "a,,b"},
        {"class_names": b"caf\xe9"},
        {"huggingface": "{"},
        {"huggingface": "[]"},
        {"huggingface": '{"info": {"features": {"label": {"names": "ab"}}}}'},
        {"huggingface": '{"info": {"features": {"label": {"names": [1]}}}}'},
        None,
    ],
)
def test_damaged_class_names_in_the_schema(tmp_path, metadata):
    source = write_parquet(tmp_path, {"image": pa.array([b"x"]), "label": [0]}, metadata)
    with pytest.raises(DataError, match="names"):
        open_dataset(source)


def test_missing_or_repeated_keys(tmp_path):
    for keys, message in (
        (["a", None], "row 1 .*has no 'key'"),
        (["a", "a"], "'a' occurs more than once"),
    ):
        with pytest.raises(DataError, match=message):
            open_dataset(write_parquet(tmp_path, {"image": pa.array([b"x"] * 2), "key": keys}))


def test_numbers_can_be_keys(tmp_path):
    source = write_parquet(tmp_path, {"image": pa.array([b"x"] * 2), "key": [7, 5]})
    assert [key for key, _ in listed(open_dataset(source))] == ["7", "5"]


def test_parquet_without_images_or_with_text_for_images(tmp_path):
    for found in ({"label": [1]}, {"image": ["text"]}, {"image": [1]}):
        with pytest.raises(DataError, match=f"no column of images.*Found: {next(iter(found))}"):
            open_dataset(write_parquet(tmp_path, found))


def test_damaged_parquet(tmp_path):
    source = write_parquet(tmp_path, columns(40), NAMES, row_group_size=10, compression="none")
    whole = source.read_bytes()
    for damaged in (whole[:-100], b"PAR1" + b"x" * 100 + b"PAR1", b"", b"x" * 500):
        source.write_bytes(damaged)
        with pytest.raises(DataError, match="cannot be read"):
            open_dataset(source)
    source.write_bytes(whole[:4] + bytes(60) + whole[64:])  # the first page of images
    with pytest.raises(DataError, match="cannot be read on"):
        list(open_dataset(source).records(0, 40))


@pytest.mark.parametrize("change", ["shorter", "other images", "other images meanwhile"])
def test_a_file_that_changed_since_it_was_opened_gives_no_images(tmp_path, change):
    """Labels and keys of one file must not get the images of another file."""
    settings = {"row_group_size": 10, "compression": "none", "use_dictionary": False}
    source = write_parquet(tmp_path, columns(40), NAMES, **settings)
    n_bytes = source.stat().st_size
    dataset = open_dataset(source)
    assert len(list(dataset.records(0, 10))) == 10
    records = dataset.records(10, 20)
    if change == "other images meanwhile":
        next(records)
    if change == "shorter":
        os.truncate(source, n_bytes // 3)
    else:
        images = pa.array([png(39 - i) for i in range(40)])
        write_parquet(tmp_path, columns(40) | {"image": images}, NAMES, **settings)
    with pytest.raises(DataError, match=r"set\.parquet changed while it was read.*--overwrite"):
        list(records)


def test_a_disk_that_goes_away_is_an_error_of_ours(tmp_path, monkeypatch):
    source = write_parquet(tmp_path, columns(40), NAMES)
    dataset = open_dataset(source)
    stat = Path.stat

    def refuse(path, **options):
        if path == source:
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(StorageError, match=r"cannot read .*set\.parquet: Stale file handle"):
        list(dataset.records(0, 40))


def test_strings_that_are_not_utf8(tmp_path):
    text = pa.array([b"caf\xe9"]).view(pa.string())
    source = write_parquet(tmp_path, {"image": pa.array([b"x"]), "label": text})
    with pytest.raises(DataError, match="cannot be read as a table"):
        open_dataset(source)


def test_fingerprint_of_a_parquet_file(tmp_path):
    source = write_parquet(tmp_path, columns(9), NAMES)
    os.utime(source, ns=(0, 10**18))
    first = open_dataset(source).fingerprint
    assert open_dataset(source).fingerprint == first
    splits = {
        open_dataset(source, split=split).fingerprint for split in ("train", "test", "test+train")
    }
    assert len(splits | {first}) == 4
    os.utime(source, ns=(0, 10**18 + 1))
    assert open_dataset(source).fingerprint != first


def test_a_row_group_is_streamed(tmp_path):
    n, size = 8192, 10_000
    noise = np.random.default_rng(0).bytes(size)
    table = pa.table({"image": pa.array([noise[i:] + noise[:i] for i in range(n)])})
    pq.write_table(table, tmp_path / "set.parquet", row_group_size=n, use_dictionary=False)
    del table
    dataset = open_dataset(tmp_path / "set.parquet")
    before, most = pa.total_allocated_bytes(), 0
    for record in dataset.records(0, n):
        assert len(record.read()) == size
        most = max(most, pa.total_allocated_bytes() - before)
    page = 1024 * size
    assert (
        page < most < 3 * page
    )  # one compressed page, one page, a batch: the whole group has 8 pages


def test_parts_in_order_read_the_file_once(tmp_path, monkeypatch):
    source = write_parquet(
        tmp_path, {"image": pa.array([b"%d" % i for i in range(300)])}, row_group_size=300
    )
    opened = []
    whole = pq.ParquetFile
    monkeypatch.setattr(
        pq, "ParquetFile", lambda *args, **options: opened.append(1) or whole(*args, **options)
    )
    dataset = open_dataset(source)
    opened.clear()
    expected = [b"%d" % i for i in range(300)]
    read = [
        record.read()
        for start in range(0, 300, 70)
        for record in dataset.records(start, start + 70)
    ]
    assert (read, len(opened)) == (expected, 1)
    assert [record.read() for record in dataset.records(70, 140)] == expected[70:140]
    first, second = dataset.records(140, 210), dataset.records(140, 210)  # side by side
    assert [(a.read(), b.read()) for a, b in zip(first, second, strict=True)] == [
        (x, x) for x in expected[140:210]
    ]
    copy = pickle.loads(pickle.dumps(dataset))
    assert [record.read() for record in copy.records(290, 300)] == expected[290:]


@pytest.mark.data
def test_clothing(shared):
    source = shared / "data/clothing.parquet"
    whole = open_dataset(source)
    assert len(whole) == 3781
    assert whole.class_names == (
        *("dress", "hat", "longsleeve", "outwear", "pants"),
        *("shirt", "shoes", "shorts", "skirt", "t-shirt"),
    )
    sizes = {
        split: len(open_dataset(source, split=split)) for split in ("train", "validation", "test")
    }
    assert sizes == {"train": 3068, "validation": 341, "test": 372}
    for record in open_dataset(source, split="validation+test", limit=40).records(20, 40):
        image = read_image(record)
        assert min(image.width, image.height) <= 224
        assert 0 <= record.label < 10

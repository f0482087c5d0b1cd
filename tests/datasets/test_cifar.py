from __future__ import annotations

import os
import pickle
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders.image_files import (
    listed,
)
from tests.builders.pickle_files import python2_pickle
from vilu.datasets.catalog import open_dataset
from vilu.datasets.images import decode_image, read_image
from vilu.errors import DataError, UsageError
from vilu_bench.known_datasets.cifar import read_pickle

# CIFAR


def cifar(root: Path, kind: int, *, encoding: str = "python3", n: int = 3) -> np.ndarray:
    """Write a folder in the real archives' layout, and return the pixels in its test split."""
    folder = root / {10: "cifar-10-batches-py", 100: "cifar-100-python"}[kind]
    folder.mkdir(parents=True)
    names = {10: [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], 100: ["train", "test"]}[
        kind
    ]
    rng = np.random.default_rng(0)
    for number, name in enumerate(names):
        data = rng.integers(0, 256, (n, 3072), dtype=np.uint8)
        labels = [(number + i) % kind for i in range(n)]
        content = {
            b"data": data,
            b"labels" if kind == 10 else b"fine_labels": labels,
            b"filenames": [b"x.png"] * n,
        }
        write = (
            python2_pickle
            if encoding == "python2"
            else lambda value: pickle.dumps(value, protocol=2)
        )
        (folder / name).write_bytes(write(content))
    key, meta = (b"label_names", "batches.meta") if kind == 10 else (b"fine_label_names", "meta")
    (folder / meta).write_bytes(
        pickle.dumps({key: [b"class_%d" % i for i in range(kind)]}, protocol=2)
    )
    return data


@pytest.mark.parametrize("encoding", ["python2", "python3"])
@pytest.mark.parametrize("kind", [10, 100])
def test_cifar_gives_its_pixels_back(tmp_path, kind, encoding):
    pixels = cifar(tmp_path, kind, encoding=encoding)
    folder = next(tmp_path.iterdir())
    for source in (tmp_path, folder):
        dataset = open_dataset(source, split="test")
        assert len(dataset.class_names) == kind
        assert dataset.class_names[1] == "class 1"
        records = list(dataset.records(0, 99))
        start = 5 if kind == 10 else 1
        assert [record.label for record in records] == [start, start + 1, start + 2]
        assert records[2].key == ("test_batch/2" if kind == 10 else "test/2")
        for record, expected in zip(records, pixels, strict=True):
            image = read_image(record).image
            np.testing.assert_array_equal(
                np.asarray(image), expected.reshape(3, 32, 32).transpose(1, 2, 0)
            )


def test_cifar_splits_parts_and_fingerprints(tmp_path):
    cifar(tmp_path, 10)
    train, test, both = (open_dataset(tmp_path, split=split) for split in ("train", "test", None))
    assert (len(train), len(test), len(both)) == (15, 3, 18)
    assert len({train.fingerprint, test.fingerprint, both.fingerprint}) == 3
    keys = [key for key, _ in listed(both)]
    assert len(set(keys)) == 18
    assert [record.key for record in both.records(2, 16)] == keys[2:16]
    with pytest.raises(UsageError, match="no split 'val'; it has test, train"):
        open_dataset(tmp_path, split="val")
    cifar(tmp_path, 100)
    with pytest.raises(DataError, match="more than one data set"):
        open_dataset(tmp_path)


def test_cifar_array_in_fortran_order(tmp_path):
    cifar(tmp_path, 100)
    data = np.asfortranarray(np.arange(2 * 3072, dtype=np.int64).astype(np.uint8).reshape(2, 3072))
    (tmp_path / "cifar-100-python/test").write_bytes(
        pickle.dumps({"data": data, "fine_labels": [0, 1]}, protocol=2)
    )
    second = list(open_dataset(tmp_path, split="test").records(0, 2))[1]
    found = np.asarray(decode_image(second.read()).image)
    np.testing.assert_array_equal(found.transpose(2, 0, 1).ravel(), data[1])


class Payload:
    def __init__(self, call, *arguments):
        self.call = (call, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "payload",
    [
        Payload(os.system, "touch pwned"),
        Payload(eval, "open('pwned', 'w')"),
        Payload(subprocess.Popen, ["touch", "pwned"]),
        Payload(getattr, "x", "upper"),
        np.float64(1.0),
        np.zeros(2, dtype=object),
    ],
)
def test_a_pickle_can_run_nothing(tmp_path, monkeypatch, payload):
    monkeypatch.chdir(tmp_path)
    cifar(tmp_path, 100)
    content = {"data": payload, "fine_labels": [0]}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "cifar-100-python/test").write_bytes(pickle.dumps(content, protocol=protocol))
        with pytest.raises(DataError):
            open_dataset(tmp_path, split="test")
    assert not (tmp_path / "pwned").exists()


def test_a_pickle_cannot_nest_tuples_without_end(tmp_path):
    """A pickle with deeply nested tuples must be refused.

    As a dictionary key, each tuple would hash the next one, until the C stack overflows.
    """
    cifar(tmp_path, 100)
    (tmp_path / "cifar-100-python/test").write_bytes(b"\x80\x02})" + b"\x85" * 300_000 + b"K\x01s.")
    with pytest.raises(DataError, match=r"holds 30000\d tuples"):
        open_dataset(tmp_path, split="test")


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        {},
        {"data": np.zeros((2, 3072), np.uint8)},
        {"data": np.zeros((2, 3072), np.uint8), "fine_labels": [0]},
        {"data": np.zeros((2, 3072), np.uint8), "fine_labels": [0, 100]},
        {"data": np.zeros((2, 3072), np.uint8), "fine_labels": [0, -1]},
        {"data": np.zeros((2, 3072), np.uint8), "fine_labels": [0, "1"]},
        {"data": np.zeros((2, 3071), np.uint8), "fine_labels": [0, 1]},
        {"data": np.zeros((2, 3072), np.int8), "fine_labels": [0, 1]},
        {"data": np.zeros((2, 3, 1024), np.uint8), "fine_labels": [0, 1]},
        {"data": np.zeros((0, 3072), np.uint8), "fine_labels": []},
    ],
)
def test_cifar_files_with_other_content_are_refused(tmp_path, content):
    cifar(tmp_path, 100)
    (tmp_path / "cifar-100-python/test").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(DataError, match="test"):
        open_dataset(tmp_path, split="test")


def test_a_pickle_cannot_ask_for_a_memo_of_gigabytes(tmp_path):
    """A pickle that names a huge memo slot must be refused.

    Python reserves room for every slot below the named one, which is 64 GB here.
    """
    file = tmp_path / "damaged"
    for slot in (b"r\xff\xff\xff\xff", b"p4294967295\n", b"r\x05\x00\x00\x00"):
        file.write_bytes(b"\x80\x02}" + slot + b".")
        with pytest.raises(
            DataError, match=r"refused: it stores an object in memo slot .* after 2 opcodes"
        ):
            read_pickle(file)
    file.write_bytes(b"\x80\x02}r\x01\x00\x00\x00.")
    assert read_pickle(file) == {}


@pytest.mark.parametrize(
    "found", [b"S'\\q'\n.", b"S'\\777'\n.", b"(dS'\\q'\nI1\ns.", b"}S'data\\8'\nNs."]
)
@pytest.mark.parametrize("action", ["error", "ignore", "always", "default", "once"])
def test_an_escape_that_python_guesses_at_is_damage(tmp_path, found, action):
    """An invalid escape sequence must be refused under every warning filter.

    Hypothesis found this case. pickle only warns, so the program's filter decided the outcome.
    """
    file = tmp_path / "damaged"
    file.write_bytes(found)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter(action)
        with pytest.raises(
            DataError, match=r"damaged was refused: invalid (octal )?escape sequence"
        ):
            read_pickle(file)
    assert not said


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_damaged_pickles_are_data_errors(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cifar")
    cifar(folder, 100, n=1)
    file = folder / "cifar-100-python/test"
    content = bytearray(file.read_bytes())
    head = [i for i in range(len(content)) if i < 150 or i > len(content) - 80]
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.sampled_from(head))] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    try:
        dataset = open_dataset(folder, split="test")
    except DataError:
        return
    assert np.asarray(read_image(next(dataset.records(0, 1))).image).shape == (32, 32, 3)

from __future__ import annotations

import os
import pickle
import tarfile
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.builders.image_files import encode, picture
from tests.builders.tar_files import PICTURE, entry, outcomes, pair, tar_bytes, write_shard
from vilu.datasets.base import POSITIONS_PER_SHARD, ShardedDataset
from vilu.datasets.catalog import open_dataset
from vilu.datasets.files import MAX_FILE_BYTES
from vilu.datasets.images import MAX_CAPTION_BYTES, BadImage
from vilu.datasets.tar import TarShards, expand_braces, split_name
from vilu.errors import UsageError


def shard_outcomes(folder: Path, *entries) -> list[tuple[str, str]]:
    return outcomes(open_dataset(write_shard(folder, tar_bytes(*entries))))


# Samples that are read


def test_pairs_in_the_order_of_the_shards(tmp_path):
    write_shard(tmp_path, tar_bytes(*pair("b", "second"), *pair("a", " first\n")), "00.tar")
    write_shard(tmp_path, tar_bytes(*pair("d/c", "third")), "01.tar")
    dataset = open_dataset(tmp_path)
    assert isinstance(dataset, ShardedDataset)
    assert (len(dataset), dataset.captioned, dataset.class_names) == (2, True, None)
    assert outcomes(dataset) == [
        ("00.tar#b", "second"),
        ("00.tar#a", "first"),
        ("01.tar#d/c", "third"),
    ]
    assert outcomes(dataset, 1, 9) == [("01.tar#d/c", "third")]
    assert [record.position for record in dataset.records(0, 2)] == [0, 1, 2**32]
    assert next(dataset.records(1, 2)).read() == PICTURE


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_formats_of_tar_files(tmp_path, format):  # noqa: A002
    keys = ["a/b/c", "été", "d" * 90] + ["long/" * 30 + "x"] * (format != tarfile.USTAR_FORMAT)
    entries = [member for key in keys for member in pair(key, key[:9])]
    dataset = open_dataset(write_shard(tmp_path, tar_bytes(*entries, format=format)))
    assert outcomes(dataset) == [(f"0.tar#{key}", key[:9]) for key in keys]


def test_what_else_is_in_a_sample_is_not_looked_at(tmp_path):
    entries = [
        entry("d", tarfile.DIRTYPE),
        ("README", b"no key"),
        ("d/._a.jpg", b"no key"),
        ("d/a.json", b"{"),
        ("d/a.JPG", PICTURE),
        ("d/a.png", b"the second image"),
        ("d/a.TXT", b"text"),
        entry("d/a.npy", tarfile.SYMTYPE, "/etc/passwd"),
    ]
    assert shard_outcomes(tmp_path, *entries) == [("0.tar#d/a", "text")]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jpg", ("a", "jpg")),
        ("a.b.c.JPG", ("a", "b.c.jpg")),
        ("x.y/a.jpg", ("x.y/a", "jpg")),
        ("./a.", ("./a", "")),
        (".jpg", None),
        ("x.y/a", None),
        ("", None),
    ],
)
def test_the_rule_of_keys(name, expected):
    assert split_name(name) == expected


@given(st.text("ab./", max_size=12))
def test_the_rule_of_keys_is_webdatasets(name):
    """A key must follow webdataset's documented rule, here written as a search.

    The rule is: the last slash, then the first dot after it, with a character between them.
    """
    base = name.rfind("/") + 1
    dot = name.find(".", base)
    expected = (name[:dot], name[dot + 1 :]) if dot > base else None
    assert split_name(name) == expected


@pytest.mark.parametrize("names", ["cat\ndog\n", "1\tdog\n0\tcat\n"])
def test_labels_instead_of_captions(tmp_path, names):
    labels = [b"1", b" 0\n", None, b"2", b"-1", b"cat", b"", b"0" * 40, b"\xff"]
    entries = []
    for i, label in enumerate(labels):
        entries += [(f"{i}.png", PICTURE), (f"{i}.txt", b"unused")] + (
            [] if label is None else [(f"{i}.cls", label)]
        )
    classes = tmp_path / "classes.txt"
    classes.write_text(names)
    dataset = open_dataset(write_shard(tmp_path, tar_bytes(*entries)), classes=classes)
    assert (dataset.class_names, dataset.captioned) == (("cat", "dog"), False)
    expected = ["1", "0", "None"] + ["text:bad_label"] * 6
    assert outcomes(dataset) == [(f"0.tar#{i}", found) for i, found in enumerate(expected)]
    assert all(record.caption is None for record in dataset.records(0, 1))


# Faults in a sample


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([("a.png", PICTURE)], "text:missing_caption"),
        ([("a.txt", b"x")], "open:missing_image"),
        ([("a.json", b"x")], "open:missing_image"),
        ([("a.big.png", PICTURE), ("a.txt", b"x")], "open:missing_image"),
        ([("a.png", PICTURE), ("a.txt", b"caf\xe9")], "text:bad_text"),
        ([("a.png", PICTURE), ("a.txt", b"")], "text:empty_text"),
        ([("a.png", PICTURE), ("a.txt", b" \0\x1b\n")], "text:empty_text"),
        ([("a.png", PICTURE), ("a.txt", b"x" * (2**20 + 1))], "text:too_large"),
        ([("a.png", PICTURE), ("a.png", PICTURE), ("a.txt", b"x")], "open:duplicate"),
        ([("a.png", PICTURE), ("a.txt", b"x"), ("a.TXT", b"y")], "open:duplicate"),
        ([entry("a.png", tarfile.SYMTYPE, "/etc/passwd"), ("a.txt", b"x")], "open:not_a_file"),
        ([entry("a.png", tarfile.LNKTYPE, "../b"), ("a.txt", b"x")], "open:not_a_file"),
        ([("a.png", PICTURE), entry("a.txt", tarfile.CHRTYPE)], "open:not_a_file"),
        ([("a.png", PICTURE), entry("a.txt", tarfile.FIFOTYPE)], "open:not_a_file"),
        ([("a.png", b"no image"), ("a.txt", b"x")], "open:unidentified"),
        ([("a.png", b""), ("a.txt", b"x")], "open:empty"),
    ],
)
def test_a_sample_that_cannot_be_used_is_one_error_and_no_other_suffers(
    tmp_path, entries, expected
):
    found = shard_outcomes(tmp_path, *pair("0"), *entries, *pair("z"))
    assert found == [("0.tar#0", "a picture"), ("0.tar#a", expected), ("0.tar#z", "a picture")]


@pytest.mark.parametrize("key", ["../../evil", "/etc/evil", "a/../../evil", "C:\\evil", "C:evil"])
def test_names_that_lead_out_of_the_shard(tmp_path, key):
    assert shard_outcomes(tmp_path, *pair(key), *pair("z"))[0] == (f"0.tar#{key}", "open:bad_path")


def test_names_that_lead_out_are_not_passed_over_where_they_have_no_key(tmp_path):
    names = ["/etc/passwd", "..\\evil.png", "../.png"]
    found = shard_outcomes(tmp_path, *((name, PICTURE) for name in names), *pair("z"))
    assert found == [
        *((f"0.tar#{name}", "open:bad_path") for name in names),
        ("0.tar#z", "a picture"),
    ]


def test_interleaved_samples_are_errors_as_a_whole(tmp_path):
    (a, at), (b, bt) = pair("a"), pair("b")
    expected = [("0.tar#a", "open:interleaved"), ("0.tar#b", "open:interleaved")]
    assert shard_outcomes(tmp_path, a, b, at, bt, *pair("c")) == [
        *expected,
        ("0.tar#c", "a picture"),
    ]
    assert shard_outcomes(tmp_path, a, at, b, bt, a, at) == [expected[0], ("0.tar#b", "a picture")]


def test_members_that_are_too_large(tmp_path):
    picture_of = {"a": bytes(MAX_FILE_BYTES + 1), "b": PICTURE, "c": PICTURE}
    caption_of = {"a": b"x", "b": b"x" * (MAX_CAPTION_BYTES + 1), "c": b"x"}
    entries = []
    for key, content in picture_of.items():
        entries += [(f"{key}.png", content), (f"{key}.txt", caption_of[key])]
    assert shard_outcomes(tmp_path, *entries) == [
        ("0.tar#a", "open:too_large"),
        ("0.tar#b", "text:too_large"),
        ("0.tar#c", "x"),
    ]


def test_names_that_are_not_text_stay_apart(tmp_path):
    entries = [*pair("a\udcff"), *pair("a\udcfe")]
    found = outcomes(
        open_dataset(write_shard(tmp_path, tar_bytes(*entries, format=tarfile.GNU_FORMAT)))
    )
    assert found == [("0.tar#a\\xff", "a picture"), ("0.tar#a\\xfe", "a picture")]


# Data sets


def test_the_order_and_position_of_a_shard_do_not_depend_on_the_part(tmp_path):
    for i in range(4):
        write_shard(
            tmp_path,
            tar_bytes(*(m for j in range(i) for m in pair(f"{j}", f"{i} {j}"))),
            f"{i}.tar",
        )
    write_shard(tmp_path, b"", "4.tar")
    dataset = open_dataset(tmp_path)
    whole = [(record.key, record.position) for record in dataset.records(0, 5)]
    parts = [
        (record.key, record.position) for i in range(5) for record in dataset.records(i, i + 1)
    ]
    assert whole == parts
    assert [position for _, position in whole] == [
        (i * POSITIONS_PER_SHARD) + j for i in range(4) for j in range(i)
    ] + [4 << 32]
    assert len(dict(whole)) == len(whole)


def test_worker_processes_get_the_same_records(tmp_path):
    write_shard(tmp_path, tar_bytes(*pair("a"), ("b.png", PICTURE)))
    dataset = open_dataset(tmp_path)
    copy = pickle.loads(pickle.dumps(dataset))
    assert (outcomes(copy), copy.fingerprint) == (outcomes(dataset), dataset.fingerprint)
    good, bad = (pickle.loads(pickle.dumps(record)) for record in dataset.records(0, 1))
    assert (good.read(), good.caption()) == (PICTURE, "a picture")
    for call in (bad.read, bad.caption):
        with pytest.raises(BadImage) as caught:
            call()
        assert pickle.loads(pickle.dumps(caught.value)).kind == "missing_caption"


def test_records_are_read_by_many_threads(tmp_path):
    blobs = [encode(picture(size=(8, 8), seed=i), "PNG") for i in range(200)]
    entries = [
        member
        for i, blob in enumerate(blobs)
        for member in ((f"{i}.png", blob), (f"{i}.txt", b"%d" % i))
    ]
    dataset = open_dataset(write_shard(tmp_path, tar_bytes(*entries)))
    with ThreadPoolExecutor(8) as pool:
        found = list(
            pool.map(lambda record: (record.read(), record.caption()), dataset.records(0, 1))
        )
    assert found == [(blob, str(i)) for i, blob in enumerate(blobs)]


def test_a_shard_that_shrinks_while_in_use(tmp_path):
    path = write_shard(tmp_path, tar_bytes(*pair("a"), *pair("b")))
    records = list(open_dataset(path).records(0, 1))
    os.truncate(path, 512 + len(PICTURE) - 1)
    with pytest.raises(OSError, match="shorter"):
        records[0].read()
    path.unlink()
    with pytest.raises(FileNotFoundError):
        records[1].read()


def test_fingerprints(tmp_path):
    def fingerprints(dataset: ShardedDataset) -> tuple[str, str, str]:
        return dataset.fingerprint, dataset.shard_fingerprint(0, 1), dataset.shard_fingerprint(1, 2)

    paths = [write_shard(tmp_path, tar_bytes(*pair("a")), name) for name in ("0.tar", "1.tar")]
    for path in paths:
        os.utime(path, ns=(0, 10**18))
    names, first, second = fingerprints(open_dataset(tmp_path))
    assert fingerprints(open_dataset(str(tmp_path / "{0..1}.tar"))) == (names, first, second)
    os.utime(paths[1], ns=(0, 10**18 + 1))
    assert fingerprints(open_dataset(tmp_path))[:2] == (names, first)
    assert fingerprints(open_dataset(tmp_path))[2] != second
    paths[1].write_bytes(tar_bytes(("a.png", bytes(20_000))))
    os.utime(paths[1], ns=(0, 10**18))
    assert fingerprints(open_dataset(tmp_path))[2] != second
    dataset = open_dataset(tmp_path)
    paths[0].unlink()
    assert dataset.shard_fingerprint(0, 1) != first
    classes = tmp_path / "classes.txt"
    found = {names, open_dataset(tmp_path).fingerprint}
    for text in ("a\nb", "b\na", "x\ta\ny\tb"):
        classes.write_text(text)
        found.add(open_dataset(paths[1], classes=classes).fingerprint)
    assert len(found) == 5


def test_shards_in_folders_are_named_below_what_they_share(tmp_path):
    for name in ("x/0.tar", "y/0.tar", "y/a#b.tar"):
        write_shard(tmp_path, tar_bytes(*pair("k")), name)
    paths = [tmp_path / name for name in ("x/0.tar", "y/0.tar", "y/a#b.tar")]
    dataset = TarShards("here", paths)
    assert [key for key, _ in outcomes(dataset)] == ["x/0.tar#k", "y/0.tar#k", "y/a%23b.tar#k"]
    with pytest.raises(UsageError, match=r"x/0\.tar is named more than once"):
        TarShards("here", [*paths, paths[0]])


def test_ten_thousand_shards_are_listed_without_touching_one():
    tracemalloc.start()
    paths = [Path(name) for name in expand_braces("nowhere/{00000..09999}.tar")]
    dataset = TarShards("nowhere", paths)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(dataset) == 10_000
    assert peak < 50e6
    (record,) = dataset.records(9_999, 10_000)
    assert (record.key, record.position) == ("09999.tar", 9_999 * POSITIONS_PER_SHARD)


def test_what_shards_cannot_be_asked_for(tmp_path):
    path = write_shard(tmp_path, tar_bytes(*pair("a")))
    classes = tmp_path / "classes.txt"
    classes.write_text("a\nb\n")
    for options, message in (
        ({"limit": 1}, "fewer shards"),
        ({"split": "train"}, "no splits"),
        ({"where": {"a": "b"}}, "--where"),
        ({"captions": True, "classes": classes}, "not both"),
    ):
        with pytest.raises(UsageError, match=message):
            open_dataset(path, **options)
    assert outcomes(open_dataset(path, captions=True)) == [("0.tar#a", "a picture")]

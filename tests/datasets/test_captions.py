from __future__ import annotations

import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.builders.image_files import encode, listed, picture, write_parquet
from tests.builders.tar_files import outcomes
from vilu.datasets.base import ImageRecord
from vilu.datasets.catalog import open_dataset
from vilu.datasets.images import (
    MAX_CAPTION_BYTES,
    BadImage,
    decode_caption,
    read_caption,
    read_image,
)
from vilu.errors import DataError, UsageError

PICTURES = [encode(picture(size=(8, 8), seed=i), "PNG") for i in range(8)]
CAPTIONS = [" a red\nfox ", "a\u0301", "", None, "\u200b \0", "x"]
"""Captions, where the third to the fifth cannot be used."""
EXPECTED = [
    "a red\nfox",
    "a\u0301",
    "text:empty_text",
    "text:missing_caption",
    "text:empty_text",
    "x",
]


def kind(data: bytes | None) -> str:
    with pytest.raises(BadImage) as caught:
        decode_caption(data)
    assert (caught.value.stage, bool(str(caught.value))) == ("text", True)
    return caught.value.kind


# One caption


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (None, "missing_caption"),
        (b"", "empty_text"),
        (b" \t\r\n", "empty_text"),
        (b"\0\0", "empty_text"),
        ("\ufeff\u200b\u3000\x7f".encode(), "empty_text"),
        (b"caf\xe9", "bad_text"),
        (b"\xed\xa0\x80", "bad_text"),  # a lone surrogate
        (b"\xff\xfea\0", "bad_text"),  # UTF-16
        (b"\xc0\xaf", "bad_text"),  # an overlong encoding
        (b"x" * (MAX_CAPTION_BYTES + 1), "too_large"),
    ],
)
def test_captions_that_cannot_be_used(data, expected):
    assert kind(data) == expected


@given(st.text())
def test_captions_are_kept_as_written_but_for_outer_blanks(text):
    data = text.encode()
    visible = text.removeprefix("\ufeff").strip()
    if any(character.isalnum() for character in visible):
        assert decode_caption(data) == visible
    elif not visible:
        assert kind(data) == "empty_text"


def test_a_caption_at_the_limit_and_of_signs_that_are_new():
    assert decode_caption(b"x" * MAX_CAPTION_BYTES) == "x" * MAX_CAPTION_BYTES
    assert (
        decode_caption("\U0001fadf".encode()) == "\U0001fadf"
    )  # new in Unicode 16, so older tables have no category for it
    assert decode_caption(b"a\0b") == "a\0b"


def test_reading_the_caption_of_a_record():
    def fail() -> str:
        raise PermissionError(13, "Permission denied")

    assert read_caption(ImageRecord("a", None, bytes, lambda: "x")) == "x"
    for caption, expected in ((None, "missing_caption"), (fail, "read_error")):
        with pytest.raises(BadImage) as caught:
            read_caption(ImageRecord("a", None, bytes, caption))
        assert (caught.value.stage, caught.value.kind) == ("text", expected)


# Tables


def test_parquet_with_captions(tmp_path):
    for column in ("caption", "Text"):
        source = write_parquet(
            tmp_path, {"image": pa.array(PICTURES[:6]), column: CAPTIONS}, row_group_size=4
        )
        dataset = open_dataset(source)
        assert (dataset.captioned, dataset.class_names, len(dataset)) == (True, None, 6)
        assert outcomes(dataset) == [(str(i), found) for i, found in enumerate(EXPECTED)]
        assert outcomes(dataset, 4, 99) == [("4", "text:empty_text"), ("5", "x")]
        assert outcomes(pickle.loads(pickle.dumps(dataset))) == outcomes(dataset)


def test_tables_of_paths_with_captions(tmp_path):
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(PICTURES[i])
    paths = [f"{i}.png" for i in range(6)]
    source = write_parquet(tmp_path, {"path": paths, "caption": CAPTIONS})
    dataset = open_dataset(source)
    assert (dataset.captioned, dataset.class_names) == (True, None)
    assert outcomes(dataset) == list(zip(paths, EXPECTED, strict=True))
    assert outcomes(dataset, 4, 99) == [("4.png", "text:empty_text"), ("5.png", "x")]
    rows = [f'{i}.png,"{"" if text is None else text}"\n' for i, text in enumerate(CAPTIONS)]
    csv = tmp_path / "set.csv"
    csv.write_bytes(b"\xef\xbb\xbfpath,caption\n" + "".join(rows).encode() + b"0.png ,caf\xe9\n")
    expected = [
        "text:empty_text" if text == "text:missing_caption" else text for text in EXPECTED
    ]  # CSV has no null
    found = open_dataset(csv)
    assert outcomes(found)[:6] == list(zip(paths, expected, strict=True))
    with pytest.raises(BadImage, match="UTF-8"):
        read_caption(list(found.records(0, 7))[6])


@pytest.mark.parametrize(
    "type_",
    [
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.binary_view(),
        pa.dictionary(pa.int8(), pa.string()),
    ],
)
def test_types_of_captions(tmp_path, type_):
    captions = pa.array(["a", None, "a"]).cast(type_)
    source = write_parquet(tmp_path, {"image": pa.array(PICTURES[:3]), "caption": captions})
    assert [found for _, found in outcomes(open_dataset(source))] == [
        "a",
        "text:missing_caption",
        "a",
    ]


def test_a_caption_that_is_not_utf8_costs_its_own_row_only(tmp_path):
    captions = pa.array([b"a", b"caf\xe9", b"b"]).view(pa.string())
    source = write_parquet(tmp_path, {"image": pa.array(PICTURES[:3]), "caption": captions})
    assert [found for _, found in outcomes(open_dataset(source))] == ["a", "text:bad_text", "b"]


def test_several_captions_in_one_row_are_refused(tmp_path):
    source = write_parquet(tmp_path, {"image": pa.array(PICTURES[:1]), "caption": [["a", "b"]]})
    with pytest.raises(DataError, match="'caption': text is expected, one per row"):
        open_dataset(source)


def test_labels_go_before_captions_unless_captions_are_asked_for(tmp_path):
    columns = {"image": pa.array(PICTURES[:2]), "label": ["cat", "dog"], "caption": ["x", "y"]}
    source = write_parquet(tmp_path, columns)
    labelled, captioned = open_dataset(source), open_dataset(source, captions=True)
    assert (labelled.class_names, labelled.captioned, listed(labelled)) == (
        ("cat", "dog"),
        False,
        [("0", 0), ("1", 1)],
    )
    assert [record.caption for record in labelled.records(0, 2)] == [None, None]
    assert (captioned.class_names, captioned.captioned) == (None, True)
    assert outcomes(captioned) == [("0", "x"), ("1", "y")]
    assert {record.label for record in captioned.records(0, 2)} == {None}
    assert labelled.fingerprint != captioned.fingerprint
    csv = tmp_path / "set.csv"
    csv.write_text("path,label,caption\n0.png,1,x\n")
    assert open_dataset(csv, captions=True).captioned  # the numbers then need no names
    for columns in ({"caption": ["x"]}, {"caption": ["x"], "label": pa.nulls(1)}):
        named = write_parquet(
            tmp_path, {"image": pa.array(PICTURES[:1]), **columns}, {"class_names": "a,b"}
        )
        assert (open_dataset(named).class_names, open_dataset(named).captioned) == (
            ("a", "b"),
            False,
        )


def test_a_classes_file_makes_a_captioned_table_unlabelled(tmp_path):
    source = write_parquet(tmp_path, {"image": pa.array(PICTURES[:1]), "caption": ["x"]})
    classes = tmp_path / "classes.txt"
    classes.write_text("a\nb\n")
    dataset = open_dataset(source, classes=classes)
    assert (dataset.captioned, dataset.class_names, listed(dataset)) == (
        False,
        ("a", "b"),
        [("0", None)],
    )
    with pytest.raises(UsageError, match="not both"):
        open_dataset(source, classes=classes, captions=True)


def test_captions_that_are_not_there(tmp_path):
    source = write_parquet(tmp_path, {"image": pa.array(PICTURES[:1]), "label": ["x"]})
    with pytest.raises(
        UsageError,
        match=r"no column of captions: expected one of caption, text.*Found: image, label",
    ):
        open_dataset(source, captions=True)
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat/0.png").write_bytes(PICTURES[0])
    assert open_dataset(tmp_path).captioned is False
    with pytest.raises(UsageError, match="has no captions"):
        open_dataset(tmp_path, captions=True)


def test_limit_keeps_captions(tmp_path):
    source = write_parquet(tmp_path, {"image": pa.array(PICTURES[:3]), "caption": ["x", "y", "z"]})
    first = open_dataset(source, limit=2)
    assert (first.captioned, outcomes(first)) == (True, [("0", "x"), ("1", "y")])


def test_fingerprint_of_a_table_of_paths_follows_its_captions(tmp_path):
    found = set()
    for captions in (["x", "y"], ["x", "yy"], ["xy", ""], ["x", None], ["x", ""], ["", "xy"]):
        source = write_parquet(
            tmp_path, {"path": ["a.png", "b.png"], "caption": pa.array(captions, pa.string())}
        )
        found.add(open_dataset(source).fingerprint)
    assert len(found) == 6


def test_captions_stay_in_arrow(tmp_path):
    """Captions must stay in Arrow, so a million short captions cost only their bytes and offsets.

    A Python string for each caption would cost much more.
    """
    n = 20_000
    text = np.random.default_rng(0).bytes(10).hex()
    table = pa.table({"image": pa.array([b"x"] * n), "caption": [f"{text} {i}" for i in range(n)]})
    pq.write_table(table, tmp_path / "set.parquet")
    dataset = open_dataset(tmp_path / "set.parquet")
    assert isinstance(dataset._captions, pa.Array)
    assert dataset._captions.nbytes < n * 40


# Choosing rows


def where_table(folder):
    columns = {
        "image": pa.array(PICTURES[:6]),
        "label": ["a", "b", "a", "b", "a", "c"],
        "vendor": ["google", "twitter", "google", None, "google", ""],
        "size": [1, 1, 2, 2, 1, None],
        "split": ["train", "train", "test", "test", "test", "test"],
        "tags": [["x"]] * 6,
    }
    return write_parquet(folder, columns)


def test_where_keeps_the_rows_that_hold_the_values(tmp_path):
    source = where_table(tmp_path)

    def keys(**options) -> list[int]:
        dataset = open_dataset(source, **options)
        assert dataset.class_names == ("a", "b", "c")  # numbered over the whole file
        found = [int(key) for key, _ in listed(dataset)]
        assert [record.read() for record in dataset.records(0, 9)] == [PICTURES[i] for i in found]
        return found

    assert keys(where={"vendor": "google"}) == [0, 2, 4]
    assert keys(where={"vendor": "google", "size": "1"}) == [0, 4]
    assert keys(where={"size": "1", "vendor": "google"}, split="test") == [4]
    assert keys(where={"vendor": ""}) == [5]
    assert keys(where={"label": "b"}) == [1, 3]
    assert keys(where={"vendor": "google"}, limit=2) == [0, 2]
    assert keys(where={}) == keys() == list(range(6))


def test_where_that_keeps_nothing_lists_what_there_is(tmp_path):
    source = where_table(tmp_path)
    for where, split, message in (
        (
            {"seller": "x"},
            None,
            r"no column 'seller' for --where; it has image, label, vendor, size, split, tags",
        ),
        (
            {"vendor": "apple"},
            None,
            r"no row with vendor=apple; column 'vendor' has google, twitter, ''",
        ),
        (
            {"size": "1", "vendor": "apple"},
            None,
            r"vendor=apple among those chosen so far; .* google, twitter\.",
        ),
        ({"vendor": "google"}, "train", None),
        (
            {"vendor": "twitter"},
            "test",
            r"vendor=twitter among those chosen so far; column 'vendor' has google, ''",
        ),
        ({"image": "x"}, None, "chosen by their images"),
    ):
        if message is None:
            assert len(open_dataset(source, where=where, split=split)) == 1
            continue
        with pytest.raises(UsageError, match=message):
            open_dataset(source, where=where, split=split)
    with pytest.raises(DataError, match=r"'tags': text is expected"):
        open_dataset(source, where={"tags": "x"})
    many = write_parquet(tmp_path, {"image": pa.array([b"x"] * 30), "n": range(30)})
    with pytest.raises(UsageError, match=r"'n' has 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, \.\.\."):
        open_dataset(many, where={"n": "x"})


def test_where_in_csv(tmp_path):
    csv = tmp_path / "set.tsv"
    csv.write_bytes(
        b"path\tVendor\tcaption\n0.png\tgoogle\tx\n1.png\ttwitter\ty\n2.png\tgoogle\tz\n"
    )
    dataset = open_dataset(csv, where={"Vendor": "google"})
    assert [record.caption() for record in dataset.records(0, 9)] == ["x", "z"]
    assert listed(open_dataset(csv, where={"caption": "y"})) == [("1.png", None)]
    assert listed(open_dataset(csv, where={"path": "2.png"})) == [("2.png", None)]
    fingerprints = {
        open_dataset(csv, where=where).fingerprint
        for where in (None, {"Vendor": "google"}, {"caption": "y"})
    }
    assert len(fingerprints) == 3
    with pytest.raises(
        UsageError, match="no column 'vendor' for --where; it has path, Vendor, caption"
    ):
        open_dataset(csv, where={"vendor": "google"})
    csv.write_bytes(b"path\ta\ta\n0.png\t1\t2\n")
    with pytest.raises(DataError, match=r"Repeated: a. The first row has '1' and '2'"):
        open_dataset(csv, where={"a": "1"})


def test_where_is_part_of_the_fingerprint(tmp_path):
    source = where_table(tmp_path)
    plain = open_dataset(source).fingerprint
    assert open_dataset(source, where={}).fingerprint == plain
    both = [
        open_dataset(source, where=where).fingerprint
        for where in ({"size": "1", "vendor": "google"},) * 2
    ]
    turned = open_dataset(source, where={"vendor": "google", "size": "1"}).fingerprint
    other = open_dataset(source, where={"vendor": "google", "size": "2"}).fingerprint
    assert both == [turned, turned]
    assert len({plain, turned, other}) == 3


def test_where_needs_a_table(tmp_path):
    (tmp_path / "0.png").write_bytes(PICTURES[0])
    with pytest.raises(UsageError, match="--where chooses rows of a CSV or Parquet file"):
        open_dataset(tmp_path, where={"vendor": "google"})


@pytest.mark.data
def test_emoji(shared):
    source = shared / "data/emoji_captions.parquet"
    whole = open_dataset(source)
    assert (len(whole), whole.captioned, whole.class_names) == (3282, True, None)
    google = open_dataset(source, where={"vendor": "google"})
    assert len(google) == len(open_dataset(source, where={"vendor": "twitter"})) == 1641
    people = open_dataset(source, where={"vendor": "google", "category": "People & Body"})
    assert 0 < len(people) < 1641
    texts = [read_caption(record) for record in whole.records(0, 3282)]
    assert (len(set(texts)), texts[0]) == (1640, "hash key")
    record = next(google.records(1640, 1641))
    assert record.key.startswith("google/")
    assert min(read_image(record).image.size) == 64

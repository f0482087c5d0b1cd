"""Damaged and hostile shards: intact samples must be kept, and one record must say why there are
no more.
"""

from __future__ import annotations

import bz2
import gzip
import io
import os
import tarfile
import tracemalloc

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.builders.tar_files import PICTURE, outcomes, pair, raw_header, tar_bytes, write_shard
from vilu.datasets.catalog import open_dataset
from vilu.datasets.images import BadImage
from vilu.datasets.tar_members import MAX_HEADER_BYTES, read_members

KEYS = ("a", "b" * 150, "c")  # the second has an extension header
WHOLE = tar_bytes(*(member for key in KEYS for member in pair(key)))
END = len(WHOLE.rstrip(b"\0")) // 512 * 512 + 512  # the end of the last padding


def shard_outcomes(folder, data):
    return outcomes(open_dataset(write_shard(folder, data)))


def ends_of_pairs() -> list[int]:
    """Return the position after each caption's last byte, as tarfile finds it."""
    with tarfile.open(fileobj=io.BytesIO(WHOLE)) as tar:
        return [member.offset_data + member.size for member in tar if member.name.endswith(".txt")]


@given(st.integers(0, len(WHOLE) - 1))
@example(0)
@example(1)
@example(511)
@example(512)
@example(END)
@example(END + 511)
@example(END + 512)
@settings(max_examples=150, deadline=None)
def test_every_cut_keeps_what_is_whole_and_is_one_error(tmp_path_factory, cut):
    found = shard_outcomes(tmp_path_factory.mktemp("cut"), WHOLE[:cut])
    whole = [
        (f"0.tar#{key}", "a picture")
        for key, end in zip(KEYS, ends_of_pairs(), strict=True)
        if end <= cut
    ]
    broken = cut < END + 512  # one block from the end mark is enough
    kind = "bad_shard" if 0 < cut < 512 else "truncated_shard"
    assert found == whole + [("0.tar", f"open:{kind}")] * broken


@given(st.integers(0, END - 1), st.integers(1, 255))
@settings(max_examples=150, deadline=None)
def test_no_changed_byte_loses_a_sample_silently(tmp_path_factory, at, change):
    """If a byte changes, no sample may be lost silently.

    The sample's pixels and text can differ. Otherwise the pair is kept, or an error stands for it.
    """
    data = bytearray(WHOLE)
    data[at] ^= change
    found = shard_outcomes(tmp_path_factory.mktemp("changed"), bytes(data))
    keys = [key for key, _ in found]
    assert len(set(keys)) == len(keys)
    good = [outcome for _, outcome in found if ":" not in outcome]
    assert len(good) == 3 or len(found) > len(good)


def test_an_empty_shard_has_no_samples(tmp_path):
    assert shard_outcomes(tmp_path, tar_bytes()) == []
    assert shard_outcomes(tmp_path, b"") == [("0.tar", "open:truncated_shard")]


@pytest.mark.parametrize(
    "data",
    [b"no tar at all", b"x" * 2000, gzip.compress(WHOLE), bz2.compress(WHOLE)],
    ids=["words", "long", "gzip", "bzip2"],
)
def test_what_is_no_tar_file_is_one_error(tmp_path, data):
    assert shard_outcomes(tmp_path, data) == [("0.tar", "open:bad_shard")]


def test_a_compressed_shard_names_the_program(tmp_path):
    write_shard(tmp_path, gzip.compress(WHOLE))
    (record,) = open_dataset(tmp_path).records(0, 1)
    with pytest.raises(BadImage, match=r"compressed.*gunzip"):
        record.read()


def test_shards_that_are_gone_or_no_files(tmp_path):
    write_shard(tmp_path, WHOLE, "0.tar")
    write_shard(tmp_path, WHOLE, "1.tar")
    os.mkfifo(tmp_path / "2.tar")  # no reader may wait for a writer
    (tmp_path / "3.tar").mkdir()
    dataset = open_dataset(str(tmp_path / "{0..3}.tar"))
    (tmp_path / "0.tar").unlink()
    found = outcomes(dataset)
    assert found[0] == ("0.tar", "open:bad_shard")
    assert found[1:4] == [(f"1.tar#{key}", "a picture") for key in KEYS]
    assert found[4:] == [("2.tar", "open:bad_shard"), ("3.tar", "open:bad_shard")]


def test_a_damaged_header_in_the_middle_is_not_the_end(tmp_path):
    data = bytearray(WHOLE)
    with tarfile.open(fileobj=io.BytesIO(WHOLE)) as tar:
        data[tar.getmembers()[4].offset + 3] ^= 1  # the picture in the third pair
    found = shard_outcomes(tmp_path, bytes(data))
    assert found == [
        *((f"0.tar#{key}", "a picture") for key in KEYS[:2]),
        ("0.tar", "open:bad_shard"),
    ]


def test_what_was_appended_by_cat_is_not_lost_silently(tmp_path):
    other = tar_bytes(*pair("z"))
    found = shard_outcomes(tmp_path, WHOLE + other)
    assert found == [*((f"0.tar#{key}", "a picture") for key in KEYS), ("0.tar", "open:bad_shard")]
    assert len(shard_outcomes(tmp_path, WHOLE + bytes(30_000))) == 3


@pytest.mark.parametrize("n_pairs", [0, 2, 3])
def test_a_download_that_reserved_its_file_is_a_cut(tmp_path, n_pairs):
    """A download program may reserve a whole file as zeros, and stop before the end."""
    whole = tar_bytes(*(member for key in KEYS[:n_pairs] for member in pair(key)))
    members = whole[: len(whole.rstrip(b"\0")) // 512 * 512 + 512 if n_pairs else 0]
    kept = [(f"0.tar#{key}", "a picture") for key in KEYS[:n_pairs]]
    assert shard_outcomes(tmp_path, members + bytes(2**20)) == kept  # padding for a tape
    found = shard_outcomes(tmp_path, members + bytes(2**20 + 512))
    assert found == [*kept, ("0.tar", "open:truncated_shard")]


def test_a_cut_names_the_byte_where_the_file_ends(tmp_path):
    dataset = open_dataset(write_shard(tmp_path, WHOLE[: END - 7]))
    *_, cut = dataset.records(0, 1)
    with pytest.raises(BadImage, match=f"ends at byte {END - 7};"):
        cut.read()


def test_a_cut_sample_is_part_of_the_cut(tmp_path):
    for key, kind in (("a.png", "image"), ("a.txt", "caption")):
        data = tar_bytes((key, b"x" * 100), ("z.json", b"x"))[: 512 + 512 + 512]
        assert shard_outcomes(tmp_path, data) == [("0.tar", "open:truncated_shard")], kind
    classes = tmp_path / "classes.txt"
    classes.write_text("a\nb\n")
    data = tar_bytes(("a.png", PICTURE), ("a.cls", b"1"), ("b.png", PICTURE), ("b.cls", b"0"))
    at = data.rindex(b"b.cls")
    found = outcomes(open_dataset(write_shard(tmp_path, data[: at + 512]), classes=classes))
    assert found == [("0.tar#a", "1"), ("0.tar", "open:truncated_shard")]


# False headers


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K", b"X"])
def test_extension_headers_are_not_read_into_memory(tmp_path, kind):
    """An extension header must not be read into memory.

    A sparse file with 2 GiB claims to be one extension header.
    """
    path = write_shard(tmp_path, tar_bytes(*pair("a")).rstrip(b"\0"))
    start = -(-path.stat().st_size // 512) * 512
    with path.open("r+b") as file:
        file.seek(start)
        file.write(raw_header(b"bomb", 2**31, kind))
        file.truncate(start + 512 + 2**31)
    tracemalloc.start()
    found = outcomes(open_dataset(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == [("0.tar#a", "a picture"), ("0.tar", "open:bad_shard")]
    assert peak < 8 * MAX_HEADER_BYTES


def test_a_chain_of_extension_headers_is_no_recursion(tmp_path):
    link = raw_header(b"link", 2, b"L") + b"n\0".ljust(512, b"\0")
    assert shard_outcomes(tmp_path, link * 20_000 + WHOLE)[1:] == [
        (f"0.tar#{key}", "a picture") for key in KEYS[1:]
    ]  # the first picture has the name "n", so its caption is alone


def body(*fields: bytes) -> bytes:
    """Return a pax header's records."""
    out = b""
    for field in fields:
        length = len(field) + 2
        while length != len(b"%d %s\n" % (length, field)):
            length = len(b"%d %s\n" % (length, field))
        out += b"%d %s\n" % (length, field)
    return out


def pax(content: bytes, kind: bytes = b"x") -> bytes:
    return raw_header(b"pax", len(content), kind) + content.ljust(
        -(-len(content) // 512) * 512, b"\0"
    )


@pytest.mark.parametrize(
    "content",
    [
        body(b"size=-1"),
        body(b"size=1e3"),
        body(b"size=" + b"9" * 5000),
        body(b"path=" + b"x" * 2000 + b".png"),
        b"5 a=b\n",
        b"99999 a=b\n",
        b"0 a=b\n",
        b"x",
        b"6 a=b\n7",
    ],
)
def test_damaged_pax_headers(tmp_path, content):
    data = tar_bytes(*pair("a")).rstrip(b"\0")
    data += bytes(-len(data) % 512) + pax(content) + raw_header(b"b.png", 0, b"0") + bytes(1024)
    assert shard_outcomes(tmp_path, data) == [("0.tar#a", "a picture"), ("0.tar", "open:bad_shard")]


def test_pax_headers_that_are_right(tmp_path):
    comment = pax(body(b"comment=x"), b"g")
    picture = raw_header(b"y.png", 0, b"0") + PICTURE.ljust(-(-len(PICTURE) // 512) * 512, b"\0")
    named = pax(body(b"mtime=1.5", b"path=k.png", b"size=%d" % len(PICTURE))) + picture
    text = raw_header(b"k.txt", 4, b"0") + b"text".ljust(512, b"\0")
    assert shard_outcomes(tmp_path, comment + named + text + bytes(1024)) == [("0.tar#k", "text")]
    renaming = pax(body(b"path=k.png"), b"g")
    assert shard_outcomes(tmp_path, renaming + named + text + bytes(1024)) == [
        ("0.tar", "open:bad_shard")
    ]


def test_a_size_beyond_the_file_is_a_cut(tmp_path):
    huge = body(b"size=" + b"9" * 19)
    for data in (pax(huge) + raw_header(b"a.png", 0, b"0"), raw_header(b"a.png", 8**11 - 1, b"0")):
        assert shard_outcomes(tmp_path, data + bytes(1024)) == [("0.tar", "open:truncated_shard")]
    negative = bytearray(raw_header(b"a.png", 0, b"0"))
    negative[124:136] = b"\xff" * 12  # -1 in base 256
    negative[148:156] = b" " * 8
    negative[148:156] = b"%06o\0 " % sum(negative)
    assert shard_outcomes(tmp_path, bytes(negative) + bytes(1024)) == [("0.tar", "open:bad_shard")]


def test_sparse_members_are_no_files_and_what_follows_is_found(tmp_path):
    old = bytearray(raw_header(b"a.png", 512, b"S", b"ustar  \0"))
    old[482] = 1
    old[148:156] = b" " * 8
    old[148:156] = b"%06o\0 " % sum(old)
    map_blocks = bytes(504) + b"\1" + bytes(7) + bytes(512)
    text = raw_header(b"a.txt", 1, b"0") + b"x".ljust(512, b"\0")
    sparse = bytes(old) + map_blocks + b"d" * 512 + text
    rest = tar_bytes(*pair("z"))
    assert shard_outcomes(tmp_path, sparse + rest) == [
        ("0.tar#a", "open:not_a_file"),
        ("0.tar#z", "a picture"),
    ]
    assert shard_outcomes(tmp_path, sparse[:1200]) == [("0.tar", "open:truncated_shard")]
    new = pax(
        body(
            b"GNU.sparse.major=1",
            b"GNU.sparse.minor=0",
            b"GNU.sparse.name=a.png",
            b"GNU.sparse.realsize=9999",
        )
    )
    new += raw_header(b"GNUSparseFile.0/a.png", 512, b"0") + b"d" * 512 + text
    assert shard_outcomes(tmp_path, new + rest) == [
        ("0.tar#a", "open:not_a_file"),
        ("0.tar#z", "a picture"),
    ]


def test_a_shard_of_too_many_members():
    found = read_members(io.BytesIO(WHOLE), len(WHOLE), max_members=4)
    names = [next(found).name for _ in range(4)]
    assert {name.split(".")[0] for name in names} == {*KEYS[:2]}
    with pytest.raises(BadImage, match="more than 4 members") as caught:
        next(found)
    assert caught.value.kind == "bad_shard"


@given(
    st.lists(st.tuples(st.text(max_size=200), st.binary(max_size=1200)), max_size=8),
    st.sampled_from([1, 2]),
)
@settings(max_examples=100, deadline=None)
def test_members_are_those_of_tarfile(entries, format):  # noqa: A002
    data = tar_bytes(
        *(("x" + name.replace("\0", ""), content) for name, content in entries), format=format
    )
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [(m.offset_data, m.size) for m in tar.getmembers() if m.isreg()]
    found = list(read_members(io.BytesIO(data), len(data)))
    assert [(member.start, member.size) for member in found] == expected
    assert all(member.is_file for member in found)

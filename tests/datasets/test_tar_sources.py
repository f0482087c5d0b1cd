"""The tar files that a folder, a name or a pattern means."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.builders.tar_files import PICTURE, outcomes, pair, tar_bytes, write_shard
from vilu.datasets.catalog import open_dataset
from vilu.datasets.folder import FolderDataset
from vilu.datasets.tar import expand_braces
from vilu.errors import DataError, UsageError


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("plain", ["plain"]),
        ("{a,b}", ["a", "b"]),
        ("{a,}x", ["ax", "x"]),
        ("x{08..11}y", ["x08y", "x09y", "x10y", "x11y"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{1..010}", [f"{i:03}" for i in range(1, 11)]),
        ("{0..2}", ["0", "1", "2"]),
        ("{3..1}", ["3", "2", "1"]),
        ("{5..5}", ["5"]),
        ("{a,b}{1..2}", ["a1", "a2", "b1", "b2"]),
    ],
)
def test_braces_as_in_the_shell(pattern, names):
    assert expand_braces(pattern) == names


@given(
    st.lists(
        st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(1, 4)), min_size=1, max_size=3
    )
)
def test_ranges_are_nested_loops(ranges):
    pattern = "-".join(f"{{{a:0{width}}..{b:0{width}}}}" for a, b, width in ranges)

    def numbers(a: int, b: int, width: int) -> list[str]:
        written = [f"{a:0{width}}", f"{b:0{width}}"]
        pad = max(map(len, written)) if any(w[0] == "0" and len(w) > 1 for w in written) else 0
        count = [i for i in range(31) if min(a, b) <= i <= max(a, b)]
        return [str(i).rjust(pad, "0") for i in (count if a <= b else reversed(count))]

    assert expand_braces(pattern) == [
        "-".join(row) for row in itertools.product(*(numbers(*r) for r in ranges))
    ]


@pytest.mark.parametrize(
    "pattern", ["{a", "a}", "{a,{b,c}}", "{x}", "{}", "{a..c}", "{-1..2}", "{1..2..3}", "{1.. 2}"]
)
def test_braces_that_mean_nothing(tmp_path, pattern):
    with pytest.raises(UsageError, match="braces"):
        open_dataset(f"{tmp_path}/{pattern}.tar")


@pytest.mark.parametrize("pattern", ["{0..99999999999}", "{0..999}{0..999}{0..9}", "{0..1000000}"])
def test_braces_that_mean_too_much(pattern):
    with pytest.raises(UsageError, match="more than 1000000"):
        expand_braces(pattern)


def test_a_folder_one_file_and_patterns(tmp_path):
    for i in range(3):
        write_shard(tmp_path, tar_bytes(*pair(str(i))), f"s-{i:02}.tar")
    write_shard(tmp_path, b"unrelated", "s-00.parquet")
    write_shard(tmp_path, b"unrelated", ".s-09.tar")
    keys = [f"s-{i:02}.tar#{i}" for i in range(3)]

    def found(source: str | Path) -> list[str]:
        return [key for key, _ in outcomes(open_dataset(source))]

    assert found(tmp_path) == keys
    assert found(tmp_path / "s-01.tar") == keys[1:2]
    assert found(f"{tmp_path}/s-{{00..02}}.tar") == found(tmp_path / "s-{00,01,02}.tar") == keys
    assert found(f"{tmp_path}/s-{{02..00}}.tar") == keys[::-1]
    assert (
        open_dataset(f"{tmp_path}/s-{{02..00}}.tar").fingerprint
        != open_dataset(tmp_path).fingerprint
    )
    assert (
        open_dataset(tmp_path).fingerprint
        == open_dataset(f"{tmp_path}/s-{{00..02}}.tar").fingerprint
    )
    write_shard(tmp_path, tar_bytes(*pair("x")), "{odd}.tar")
    assert found(tmp_path / "{odd}.tar") == ["{odd}.tar#x"]


def test_a_pattern_longer_than_any_name(tmp_path):
    names = [f"{'n' * 30}{i}.tar" for i in range(20)]
    for name in names:
        write_shard(tmp_path, tar_bytes(), name)
    assert len(open_dataset(f"{tmp_path}/{{{','.join(names)}}}")) == 20


def test_a_pattern_names_what_is_missing(tmp_path):
    write_shard(tmp_path, tar_bytes(), "0.tar")
    with pytest.raises(
        UsageError, match=r"names 10 shards; 9 are not there, the first is .*1\.tar"
    ):
        open_dataset(tmp_path / "{0..9}.tar")
    write_shard(tmp_path, b"", "0.txt")
    with pytest.raises(UsageError, match=r"ending in \.tar.*0\.txt"):
        open_dataset(tmp_path / "0.{tar,txt}")
    with pytest.raises(UsageError, match="named more than once"):
        open_dataset(tmp_path / "{0,0}.tar")
    with pytest.raises(UsageError, match="does not exist"):
        open_dataset(tmp_path / "9.tar")


@pytest.mark.parametrize(
    "source", ["pipe:curl x/{0..9}.tar", "http://x/{0..9}.tar", "s3://x/0.tar", "gs:0.tar"]
)
def test_urls_and_commands_are_refused(source):
    for given_source in (source, Path(source)):
        with pytest.raises(UsageError, match="nothing is downloaded and no command is run"):
            open_dataset(given_source)


@pytest.mark.parametrize("other", ["cat/0.png", "0.png"])
def test_a_folder_that_could_mean_two_things(tmp_path, other):
    write_shard(tmp_path, PICTURE, other)
    assert isinstance(open_dataset(tmp_path), FolderDataset)
    write_shard(tmp_path, PICTURE, "backup.tar.gz")
    assert isinstance(open_dataset(tmp_path), FolderDataset)
    write_shard(tmp_path, tar_bytes(*pair("a")), "a.tar")
    with pytest.raises(UsageError, match=r"holds tar files and .*unclear"):
        open_dataset(tmp_path)
    assert len(open_dataset(tmp_path / "a.tar")) == 1


@pytest.mark.parametrize("name", ["0.tar.gz", "0.tgz", "0.tar.zst", "0.TAR.XZ"])
def test_compressed_shards_say_what_to_do(tmp_path, name):
    path = write_shard(tmp_path, b"x", name)
    for source in (path, tmp_path, str(path).replace("0", "{0..1}")):
        with pytest.raises(DataError, match=r"is compressed.*gunzip"):
            open_dataset(source)

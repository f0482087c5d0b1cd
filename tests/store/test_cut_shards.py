"""Shards that are cut short or empty, through the command line: they must be named, left out
from every count, and never taken for complete.
"""

from __future__ import annotations

import json
import os

import pytest

from tests.builders.store_fakes import FakeBackbone, picture
from tests.builders.tar_files import tar_bytes
from tests.command import run
from vilu.store.inspect import inspect
from vilu.store.reader import CaptionStore
from vilu.text import plural

N = 6


def pairs(start, stop):
    return [
        (f"{k:03d}.{kind}", content)
        for k in range(start, stop)
        for kind, content in (("png", picture(k)), ("txt", f"picture {k}".encode()))
    ]


WHOLE = [tar_bytes(*pairs(N * shard, N * shard + N)) for shard in range(3)]
CUT = WHOLE[1][: len(WHOLE[1]) // 2]


@pytest.fixture
def model(monkeypatch):
    found = FakeBackbone()
    monkeypatch.setattr("vilu.store.job._load", lambda spec: found)
    return found


@pytest.fixture
def tars(tmp_path):
    for number, content in enumerate(WHOLE):
        (tmp_path / f"{number}.tar").write_bytes(content)
    return tmp_path


def embed(tars, *options, code=0):
    return run(
        "embed", tars / "{0..2}.tar", "-o", tars / "s", "--part-size", 1, *options, code=code
    ).stderr


def receipts(tars):
    return [json.loads(path.read_text()) for path in sorted((tars / "s/receipts").iterdir())]


@pytest.mark.parametrize(
    ("content", "kind", "kept", "said"),
    [
        (CUT, "truncated_shard", 3, "the shard ends inside '009"),
        (b"<html>not found</html>" * 100, "bad_shard", 0, "this is no tar file"),
        (b"", "truncated_shard", 0, "the shard ends at byte 0"),
    ],
)
def test_a_bad_shard_ends_in_exit_code_3_until_it_is_allowed(
    model, tars, content, kind, kept, said
):
    (tars / "1.tar").write_bytes(content)
    first = embed(tars, "--max-error-rate", 1, code=3)
    for words in (
        "1 of 3 shards",
        "an unknown number of images is lost",
        "1.tar",
        said,
        "--allow-bad-shards",
    ):
        assert words in first
    assert f"The other {2 * N + kept} images are kept" in first
    assert not (tars / "s/manifest.json").exists()
    assert [receipt["errors"] for receipt in receipts(tars)] == [{}, {kind: 1}, {}]
    n_images = model.n_images
    assert embed(tars, "--max-error-rate", 1, code=3).splitlines()[-1] == first.splitlines()[-1]
    allowed = embed(tars, "--allow-bad-shards")
    assert "warning: 1 of 3 shards cannot be read to the end" in allowed
    assert "1.tar" in allowed
    assert f"{2 * N + kept} embeddings, 0 bad images, 1 bad shard; next:" in allowed
    assert model.n_images == n_images
    assert len(CaptionStore(tars / "s")) == 2 * N + kept
    report = inspect(tars / "s", deep=True)
    assert (report.problems, report.errors) == ([], {kind: 1})


def test_a_shard_that_was_replaced_costs_its_part_and_the_store_is_whole(model, tars):
    (tars / "1.tar").write_bytes(CUT)
    embed(tars, code=3)
    before = {path.name: path.read_bytes() for path in (tars / "s/receipts").iterdir()}
    model.batches.clear()
    (tars / "1.tar").write_bytes(WHOLE[1])
    assert "18 embeddings, 0 bad images;" in embed(tars)
    assert model.n_images == N
    changed = {
        path.name
        for path in (tars / "s/receipts").iterdir()
        if before[path.name] != path.read_bytes()
    }
    assert changed == {"00001.json"}


def test_what_the_shards_have_lost_is_no_part_of_the_share_of_bad_images(model, tars):
    (tars / "1.tar").write_bytes(CUT)
    (tars / "2.tar").write_bytes(
        tar_bytes(*pairs(12, 17), ("017.png", b"x"), ("017.txt", b"no picture"))
    )
    assert "1 of 15 images (6.67%)" in embed(
        tars, "--allow-bad-shards", code=3
    )  # the shards have 6 + 3 + 6 images, so not 16
    assert "1 bad image, 1 bad shard; next:" in embed(
        tars, "--allow-bad-shards", "--max-error-rate", 0.08
    )


def test_many_bad_shards_are_counted_and_some_named(model, tars):
    for number in range(8):
        (tars / f"{number}.tar").write_bytes(b"x" * 600)
    said = run("embed", tars / "{0..7}.tar", "-o", tars / "s", code=3).stderr
    assert "8 of 8 shards" in said
    assert "4.tar" in said
    assert "5.tar" not in said
    assert "and 3 more" in said


def test_a_shard_that_may_not_be_read_is_a_bad_one(model, tars):
    (tars / "1.tar").unlink()
    (tars / "1.tar").mkdir()
    assert "cannot read the shard" in embed(tars, code=3)
    os.rmdir(tars / "1.tar")  # noqa: PTH106


@pytest.mark.parametrize(
    ("members", "kind", "n_bad"),
    [
        ([*pairs(0, 6), ("000.txt", b"again")], "interleaved", 1),
        ([pairs(0, 6)[0], *pairs(0, 6)], "duplicate", 1),
        ([member for kind in (0, 1) for member in pairs(0, 6)[kind::2]], "interleaved", 6),
    ],
)
def test_samples_that_do_not_stand_together_are_counted_one_by_one(
    model, tars, members, kind, n_bad
):
    """The number of scattered samples is known, so ``--max-error-rate`` decides on them."""
    (tars / "0.tar").write_bytes(tar_bytes(*members))
    assert f"{n_bad} of 18 images" in (said := embed(tars, code=3))
    assert f"{kind} {n_bad}" in said
    assert f"{18 - n_bad} embeddings, {plural(n_bad, 'bad image')};" in embed(
        tars, "--max-error-rate", 1
    )

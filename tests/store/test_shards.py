"""Stores from shards: counts that only reading shows, resuming, and shards that were replaced."""

from __future__ import annotations

import json
import logging
from collections import namedtuple
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.builders.store_fakes import NAMES, FakeBackbone, picture, shards, tree
from tests.store.test_inspect import vouch
from vilu.datasets.base import POSITIONS_PER_SHARD
from vilu.errors import DataError, ProvenanceError
from vilu.progress import reporting
from vilu.store.embed import embed
from vilu.store.inspect import inspect
from vilu.store.reader import EmbeddingStore

LENGTHS = (3, 0, 5, 1, 7)
SETTINGS = {"names": NAMES, "batch_size": 4, "part_size": 2}


def run(data, output, backbone=None, **settings):
    names = {"names": ()} if data.captions else {}
    return embed(data, backbone or FakeBackbone(), output, **SETTINGS | names | settings)


def read(root, kind, part):
    return pq.read_table(root / f"{kind}/{kind}_{part:05d}.parquet").to_pydict()


def test_what_a_store_holds(tmp_path):
    backbone = FakeBackbone()
    store = run(shards(*LENGTHS), tmp_path, backbone)
    assert backbone.batches == [
        3,
        4,
        2,
        4,
        3,
    ]  # parts with 3 + 0, 5 + 1 and 7 images, in batches with 4
    assert [np.load(path).shape[0] for path in sorted((tmp_path / "img_emb").iterdir())] == [
        3,
        6,
        7,
    ]
    assert read(tmp_path, "metadata", 1)["position"] == [
        2 * POSITIONS_PER_SHARD + k for k in range(5)
    ] + [3 * POSITIONS_PER_SHARD]
    assert read(tmp_path, "metadata", 2)["key"] == [f"04.tar#{k}" for k in range(7)]
    assert store.target.tolist() == [k % 3 for n in LENGTHS for k in range(n)]
    manifest, before = (
        json.loads((tmp_path / name).read_text()) for name in ("manifest.json", "run.json")
    )
    assert (manifest["n_in"], manifest["n_ok"], manifest["parts"], manifest["shards"]) == (
        16,
        16,
        3,
        5,
    )
    assert (before["n_in"], before["shards"], before["fingerprint"]) == (
        0,
        5,
        manifest["fingerprint"],
    )
    receipts = [json.loads(path.read_text()) for path in sorted((tmp_path / "receipts").iterdir())]
    assert [(r["start"], r["stop"], r["n_in"]) for r in receipts] == [
        (0, 2, 3),
        (2, 4, 6),
        (4, 5, 7),
    ]
    assert [r["source"] for r in receipts] == [
        shards(*LENGTHS).shard_fingerprint(r["start"], r["stop"]) for r in receipts
    ]


@pytest.mark.parametrize("captions", [False, True])
def test_inspect_counts_them(tmp_path, captions):
    run(shards(*LENGTHS, captions=captions), tmp_path)
    report = inspect(tmp_path, deep=True)
    assert (report.sealed, report.problems, report.n_in, report.n_ok) == (True, [], 16, 16)
    assert "16 from 5 shards in 3 of 3 parts" in str(report)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "receipts/00001.json").unlink()
    report = inspect(tmp_path, deep=True)
    assert (report.problems, report.n_in, report.parts_done) == ([], 10, 2)


@pytest.mark.parametrize("lost", [0, 2, 5])
def test_inspect_finds_an_image_that_is_not_there(tmp_path, lost):
    """``inspect`` must find a missing image, although the receipt agrees.

    A missing image leaves a gap in the positions, or a shard does not begin at its first position.
    """
    run(shards(*LENGTHS), tmp_path)
    name = "metadata/metadata_00001.parquet"
    table = pq.read_table(tmp_path / name)
    positions = table["position"].to_pylist()
    positions[lost] = 3 * POSITIONS_PER_SHARD + 1 if lost == 5 else positions[lost] + 100
    order = table.set_column(0, table.schema.field(0), [positions])
    pq.write_table(order, tmp_path / name)
    vouch(tmp_path, name, part=1)
    (problem,) = inspect(tmp_path, deep=True).problems
    assert "does not hold every image of its shards once" in problem


def test_ten_shards_make_a_part_unless_said_otherwise(tmp_path):
    run(shards(*[1] * 23), tmp_path, part_size=None)
    assert json.loads((tmp_path / "run.json").read_text())["part_size"] == 10
    assert len(list((tmp_path / "receipts").iterdir())) == 3


def test_bad_images_have_a_share_of_the_images_counted(tmp_path):
    data = shards(*LENGTHS)
    data.shards[2][1] = data.shards[4][0] = b""
    with pytest.raises(DataError, match=r"2 of 16 images \(12.50%\).*--max-error-rate 0.125"):
        run(data, tmp_path, max_error_rate=0.12)
    store = run(data, tmp_path, max_error_rate=0.125)
    assert (len(store), store.manifest.errors) == (14, {"empty": 2})
    assert read(tmp_path, "errors", 1)["position"] == [2 * POSITIONS_PER_SHARD + 1]
    assert inspect(tmp_path, deep=True).problems == []


def test_resuming_does_what_is_missing(tmp_path):
    run(shards(*LENGTHS), tmp_path)
    before = tree(tmp_path)
    (tmp_path / "receipts/00001.json").unlink()
    data, backbone = shards(*LENGTHS), FakeBackbone()
    run(data, tmp_path, backbone)
    assert (backbone.n_images, {position >> 32 for position in data.reads}) == (6, {2, 3})
    assert tree(tmp_path) == before


def test_a_shard_that_was_replaced_costs_its_part(tmp_path, caplog):
    run(shards(*LENGTHS), tmp_path)
    before = tree(tmp_path)
    data, backbone = shards(*LENGTHS), FakeBackbone()
    data.shards[3] = [picture(7), picture(8)]
    data.versions[3] = 1
    with caplog.at_level(logging.WARNING, "vilu"):
        store = run(data, tmp_path, backbone)
    assert caplog.messages == ["part 1 is done again: its shards have changed"]
    assert (backbone.n_images, len(store), store.manifest.n_in) == (7, 17, 17)
    changed = {name for name, content in tree(tmp_path).items() if before[name] != content}
    assert all("00001" in name or name == "manifest.json" for name in changed)
    run(data, tmp_path / "fresh")
    assert tree(tmp_path / "fresh") == {
        k: v for k, v in tree(tmp_path).items() if not k.startswith("fresh")
    }


def test_a_shard_that_changes_while_it_is_read_seals_no_mixture(tmp_path):
    data = shards(*LENGTHS)

    class Meanwhile(FakeBackbone):
        def encode_images(self, pixels):
            if len(self.batches) == 2:  # the second part, whose first batch is read
                data.versions[2] = 1
            return super().encode_images(pixels)

    with pytest.raises(DataError, match="shards of part 1 changed while they were read"):
        run(data, tmp_path, Meanwhile())
    assert sorted(path.name for path in (tmp_path / "receipts").iterdir()) == ["00000.json"]
    assert not (tmp_path / "manifest.json").exists()
    store = run(data, tmp_path)
    assert len(store) == 16
    assert inspect(tmp_path, deep=True).problems == []


def test_other_shards_are_other_inputs(tmp_path):
    run(shards(*LENGTHS), tmp_path)
    with pytest.raises(ProvenanceError, match="shards was 5 and is now 6"):
        run(shards(*LENGTHS, 1), tmp_path)


def test_room_is_not_asked_for_where_nobody_knows_how_much(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 10**9, 0))
    assert len(run(shards(*LENGTHS), tmp_path)) == 16


def test_shards_without_images_are_a_store_without_rows(tmp_path):
    with pytest.warns(UserWarning, match="has no images"):
        store = run(shards(0, 0, 0), tmp_path)
    assert (len(store), store.manifest.parts) == (0, 2)
    assert len(EmbeddingStore(tmp_path)) == 0


def test_progress_has_no_end_but_counts(tmp_path):
    class Recorder:
        steps = 0

        def start(self, description, total, unit):
            self.total = (description, total, unit)
            return self

        def advance(self, steps, note=""):
            self.steps += steps

        def finish(self, task):
            pass

    recorder = Recorder()
    with reporting(recorder):
        run(shards(*LENGTHS), tmp_path)
    assert (recorder.total, recorder.steps) == (("embed", None, "images"), 16)


@pytest.mark.parametrize("change", ["none", "back", "outside"])
def test_wrong_positions_are_a_bug_of_the_data_set(tmp_path, change):
    data = shards(3, 3)
    records = data.records

    def wrong(start, stop):
        for i, record in enumerate(records(start, stop)):
            place = {"none": None, "back": 0, "outside": 5 * POSITIONS_PER_SHARD}[change]
            yield replace(record, position=place) if i == 2 else record

    data.records = wrong
    with pytest.raises(ValueError, match="expected larger ones from 0 to"):
        run(data, tmp_path)
    assert not list((tmp_path / "receipts").iterdir())

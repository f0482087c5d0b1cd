"""Test the images behind a benchmark's embeddings.

Fewer images may be embedded, and only by the model that was asked for.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.builders.bench_fakes import config
from tests.builders.store_fakes import DIM, FakeBackbone, dataset, picture
from tests.builders.tar_files import pair, tar_bytes, write_shard
from tests.builders.versions import raise_version
from vilu.datasets.base import ShardedDataset
from vilu.datasets.catalog import open_dataset
from vilu.errors import ProvenanceError, UsageError
from vilu.store.reader import EmbeddingStore
from vilu_bench.studies import stores
from vilu_bench.studies.load import shrink_config
from vilu_bench.studies.parts import Data
from vilu_bench.studies.stores import cut_images, find_stores, make_stores, open_images


def test_evenly_spaced_images() -> None:
    images = dataset(10)
    some = cut_images(images, 4, None)
    assert [record.key for record in some.records(0, 4)] == [images.keys[i] for i in (0, 2, 5, 7)]
    assert [record.key for record in some.records(1, 3)] == [images.keys[i] for i in (2, 5)]
    assert list(some.records(4, 4)) == []
    assert some.fingerprint != images.fingerprint


def test_tar_files_are_limited_by_number(tmp_path: Path) -> None:
    for number in range(3):
        write_shard(tmp_path, tar_bytes(*pair(f"a{number}"), *pair(f"b{number}")), f"{number}.tar")
    images = open_dataset(tmp_path)
    assert cut_images(images, None, None) is cut_images(images, 1, 3) is images
    some = cut_images(images, 1, 2)
    assert isinstance(some, ShardedDataset)
    assert [record.key for record in some.records(0, len(some))] == [
        *("0.tar#a0", "0.tar#b0"),
        *("1.tar#a1", "1.tar#b1"),
    ]
    assert some.shard_fingerprint(0, 2) == images.shard_fingerprint(0, 2)
    assert some.fingerprint not in {images.fingerprint, cut_images(images, None, 1).fingerprint}
    with pytest.raises(UsageError, match=r"limit cannot be used. Give shards = N"):
        cut_images(images, 1, None)


def test_a_newer_version_finds_the_stores_of_an_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(tmp_path / "data", tar_bytes(*pair("a")), "0.tar")
    entry = {"source": "data", "captions": True}
    chosen = config(data={"one": entry}, settings={"all": {"kind": "labels"}})
    before = find_stores(chosen, [("one", "train")], tmp_path, tmp_path)
    raise_version(monkeypatch)
    assert find_stores(chosen, [("one", "train")], tmp_path, tmp_path) == before


def test_a_small_run_reads_one_tar_file(tmp_path: Path) -> None:
    for number in range(3):
        write_shard(tmp_path / "data", tar_bytes(*pair(f"a{number}")), f"{number}.tar")
    chosen = shrink_config(
        config(
            data={"one": {"source": "data", "captions": True}}, settings={"all": {"kind": "labels"}}
        )
    )
    with open_images(chosen.data["one"], "train", tmp_path) as images:
        assert len(images) == 1
    shifted = Data(source="data", captions=True, shift={"kinds": ["blur"]})
    with (
        pytest.raises(UsageError, match="in tar files, whose images cannot be shifted"),
        open_images(shifted, "train", tmp_path),
    ):
        pass


def test_everyday_words_are_kept_where_they_are_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
        (tmp_path / "data" / "train" / name / "a.png").write_bytes(picture(0))
    monkeypatch.setattr(stores, "load_backbone", lambda _name, models: FakeBackbone())
    monkeypatch.setattr(stores, "everyday_words", lambda: ("sofa", "bus", "moon"))
    made = {}
    for negatives in (False, True):
        chosen = config(
            data={"one": {"source": "data", "negatives": negatives}},
            settings={"all": {"kind": "labels"}},
        )
        (made[negatives],) = make_stores(
            chosen, [("one", "train")], tmp_path, tmp_path / "out"
        ).values()
    assert "negatives" not in EmbeddingStore(made[False]).columns
    assert EmbeddingStore(made[True]).column("negatives", torch.arange(3)).shape == (3, DIM)


def test_embeddings_of_other_weights_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a named model is replaced in its folder, embeddings from the old model must be refused."""
    write_shard(tmp_path / "data", tar_bytes(*pair("a"), *pair("b")))
    chosen = config(
        data={"one": {"source": "data", "captions": True}}, settings={"all": {"kind": "labels"}}
    )
    weights = {"now": "8x8"}
    monkeypatch.setattr(
        stores, "load_backbone", lambda _name, models: FakeBackbone(preprocess=weights["now"])
    )
    made = make_stores(chosen, [("one", "train")], tmp_path, tmp_path / "out", models=tmp_path)
    assert (
        make_stores(chosen, [("one", "train")], tmp_path, tmp_path / "out", models=tmp_path) == made
    )
    weights["now"] = "9x9"
    with pytest.raises(ProvenanceError, match="9x9"):
        make_stores(chosen, [("one", "train")], tmp_path, tmp_path / "out", models=tmp_path)
    assert make_stores(chosen, [("one", "train")], tmp_path, tmp_path / "out") == made

"""``open_source`` must recognize every kind of folder, and refuse an argument that has no
meaning for it.
"""

from __future__ import annotations

import pytest

from tests.builders.pair_files import LAYOUTS, SPACE, unit_pairs, write_shards, write_store
from tests.builders.store_fakes import NAMES, FakeBackbone, dataset
from vilu.artifacts.documents import write_json
from vilu.embeddings.pairs import Pools
from vilu.errors import DataError, StorageError, UsageError
from vilu.store.embed import embed
from vilu.store.laion import LaionPairs
from vilu.store.reader import CaptionStore, EmbeddingStore, open_source

N = 30
CAPTIONS = [f"caption {i}" for i in range(N)]


@pytest.fixture
def classes(tmp_path):
    embed(dataset(5), FakeBackbone(), tmp_path / "classes", names=NAMES)
    return tmp_path / "classes"


@pytest.fixture
def captions(tmp_path):
    write_store(tmp_path / "captions", *unit_pairs(N), CAPTIONS)
    return tmp_path / "captions"


def test_a_store_of_classes(classes):
    source = open_source(classes)
    assert isinstance(source, EmbeddingStore)
    assert len(source) == 5
    for choice in ({"pools": Pools(2)}, {"fold": "train"}):
        with pytest.raises(UsageError, match="store of classes: there are no captions"):
            open_source(classes, **choice)


def test_a_store_of_captions(captions):
    source = open_source(str(captions))
    assert isinstance(source, CaptionStore)
    assert (source.pools, source.space, len(source)) == (Pools(), SPACE, N)
    half = open_source(captions, pools=Pools(2, "text_to_image"), fold="train")
    assert half.pools == Pools(2, "text_to_image")
    assert list(half.ids) == list(CaptionStore(captions, fold="train").ids)
    assert 0 < len(half) < N


def test_stores_know_their_logit_scale(classes, captions):
    for root in (classes, captions):
        with pytest.raises(UsageError, match="Leave logit_scale out"):
            open_source(root, logit_scale=100.0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_and_pairs_take_a_logit_scale(tmp_path, layout):
    write_shards(tmp_path, *unit_pairs(N), layout, [10, 20])
    source = open_source(tmp_path, pools=Pools(5), logit_scale=50.0)
    assert isinstance(source, LaionPairs)
    assert (source.pools, source.space.logit_scale, len(source)) == (Pools(5), 50.0, N)
    with pytest.raises(UsageError, match=r"Give logit_scale.*100 for OpenAI's CLIP"):
        open_source(tmp_path)
    with pytest.raises(UsageError, match="logit_scale must be a positive finite number"):
        open_source(tmp_path, logit_scale=-1.0)


@pytest.mark.parametrize("logit_scale", [None, 100.0])
def test_folders_that_are_none_of_these(tmp_path, logit_scale):
    (tmp_path / "photo.png").touch()
    with pytest.raises(
        DataError, match=r"Found photo.png. Expected a store, or img_emb/.*images.npy \+ texts.npy"
    ):
        open_source(tmp_path, logit_scale=logit_scale)
    with pytest.raises(DataError, match="is no folder"):
        open_source(tmp_path / "photo.png", logit_scale=logit_scale)


def test_stores_that_are_not_whole(classes, captions):
    for root in (classes, captions):
        (root / "manifest.json").unlink()
        with pytest.raises(DataError, match="not complete"):
            open_source(root)
        write_json(root / "run.json", {})
        with pytest.raises(StorageError, match=r"run.json is damaged"):
            open_source(root)

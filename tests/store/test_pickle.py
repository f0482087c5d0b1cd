"""Sources on disk in another process: a source is pickled as its path, and refused if its files
have changed since.
"""

from __future__ import annotations

import copy
import io
import multiprocessing
import os
import pickle
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import vilu
from tests.builders.pair_files import unit_pairs, write_shards, write_store
from tests.builders.store_fakes import NAMES, FakeBackbone, dataset
from vilu.embeddings.pairs import Pools, PseudoCaptions
from vilu.errors import ProvenanceError, StorageError
from vilu.store.embed import embed
from vilu.store.laion import LaionPairs
from vilu.store.reader import CaptionStore, EmbeddingStore

CAPTIONS = [f"picture {i}" for i in range(60)]


def classes(root):
    embed(
        dataset(40),
        FakeBackbone(),
        root,
        names=NAMES,
        part_size=10,
        max_error_rate=1,
        overwrite=root.exists(),
    )
    return EmbeddingStore(root)


def captions(root):
    shutil.rmtree(root, ignore_errors=True)
    write_store(root, *unit_pairs(60), CAPTIONS)
    return CaptionStore(root, Pools(4, seed=3), "train")


def shards(root):
    write_shards(root, *unit_pairs(60), sizes=(30, 30))
    return LaionPairs(root, Pools(6), logit_scale=20.0, logit_bias=1.0)


SOURCES = {"classes": classes, "captions": captions, "shards": shards}


@pytest.fixture(params=SOURCES)
def source(request, tmp_path):
    return SOURCES[request.param](tmp_path / request.param)


def scores(source):
    """Return all results that a source is used for, in any process."""
    found = vilu.score(vilu.MCM(), source)
    return found.uncertainty, list(found.ids), found.failure


def require_equal(mine, theirs):
    np.testing.assert_array_equal(mine[0], theirs[0])
    assert mine[1] == theirs[1]
    np.testing.assert_array_equal(mine[2], theirs[2])


def test_what_comes_back_is_the_same_source(source):
    other = pickle.loads(pickle.dumps(source))
    assert type(other) is type(source)
    assert (other.path, other.pool_size, other.space) == (
        source.path,
        source.pool_size,
        source.space,
    )
    require_equal(scores(other), scores(source))
    assert len(pickle.dumps(source)) < 1000
    require_equal(scores(copy.deepcopy(source)), scores(source))


def test_a_relative_path_is_found_from_another_folder(tmp_path, monkeypatch):
    classes(tmp_path / "s")
    monkeypatch.chdir(tmp_path)
    content = pickle.dumps(EmbeddingStore("s"))
    monkeypatch.chdir("/")
    assert len(pickle.loads(content)) == 40


def test_views_of_a_store_pickle_too(tmp_path):
    store = classes(tmp_path / "s")
    taken = store.take(torch.tensor([30, 2, 17]), classes=torch.tensor([2, 0]))
    require_equal(scores(pickle.loads(pickle.dumps(taken))), scores(taken))
    mixed = PseudoCaptions([store], Pools(5))
    require_equal(scores(pickle.loads(pickle.dumps(mixed))), scores(mixed))
    assert list(pickle.loads(pickle.dumps(store.ids))) == list(store.ids)
    found = pickle.loads(pickle.dumps(vilu.score(vilu.MCM(), store)))
    shutil.rmtree(tmp_path / "s")
    assert len(list(found.ids)) == 40


@pytest.mark.parametrize("make", [captions, shards])
def test_rows_that_were_left_out_stay_out(make, tmp_path):
    """Rows that were left out must stay out in every form.

    The forms are a pickled source, a copy, a source among others, and a source that loses more
    rows.
    """
    store = make(tmp_path / "s")
    first, last = np.arange(len(store)) == 3, np.arange(len(store)) == 5
    fewer = store.without(first)
    for other in (
        pickle.loads(pickle.dumps(fewer)),
        copy.copy(fewer),
        copy.deepcopy(copy.deepcopy(fewer)),
    ):
        assert torch.equal(other.usable_rows, fewer.usable_rows)
        require_equal(scores(other), scores(fewer))
    none = fewer.without(last)
    assert torch.equal(none.pair_rows, store.without(first | last).pair_rows)
    assert torch.equal(none.usable_rows, store.without(first | last).usable_rows)
    assert len(PseudoCaptions([none], 2)) == len(store) - 2


def test_a_spawned_process_reads_it_and_looks_for_damage_itself(tmp_path):
    sources = {name: make(tmp_path / name) for name, make in SOURCES.items()}
    expected = {name: scores(source) for name, source in sources.items()}
    path = tmp_path / "classes/img_emb/img_emb_00002.npy"
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        require_equal(pool.submit(scores, sources["captions"]).result(), expected["captions"])
        require_equal(pool.submit(scores, sources["shards"]).result(), expected["shards"])
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        with pytest.raises(StorageError, match=r"img_emb_00002.npy is damaged"):
            pool.submit(scores, sources["classes"]).result()
        content[-1] ^= 1
        path.write_bytes(content)
        require_equal(pool.submit(scores, sources["classes"]).result(), expected["classes"])


def test_joblib_and_loky(tmp_path):
    joblib, cloudpickle = pytest.importorskip("joblib"), pytest.importorskip("cloudpickle")
    store, buffer = classes(tmp_path / "s"), io.BytesIO()
    joblib.dump(store, buffer)
    buffer.seek(0)
    require_equal(scores(joblib.load(buffer)), scores(store))
    require_equal(
        scores(pickle.loads(cloudpickle.dumps(store))), scores(store)
    )  # as loky sends it to workers


def test_a_store_that_became_another_one_is_refused(tmp_path):
    content = pickle.dumps(classes(tmp_path / "s"))
    embed(dataset(41), FakeBackbone(), tmp_path / "s", names=NAMES, part_size=10, overwrite=True)
    with pytest.raises(
        ProvenanceError, match=r"s has changed since it was pickled: its fingerprint was \w+ and is"
    ):
        pickle.loads(content)


def test_a_store_that_was_made_again_from_the_same_is_the_same(tmp_path):
    content = pickle.dumps(classes(tmp_path / "s"))
    classes(tmp_path / "s")
    assert len(pickle.loads(content)) == 40


def test_shards_of_another_time_or_size_are_refused(tmp_path):
    content = pickle.dumps(shards(tmp_path / "s"))
    pickle.loads(content)
    os.utime(tmp_path / "s/text_emb/text_emb_0001.npy", (1, 1))
    with pytest.raises(ProvenanceError, match="has changed"):
        pickle.loads(content)


def test_a_store_that_is_gone_is_told_as_ever(tmp_path):
    content = pickle.dumps(classes(tmp_path / "s"))
    shutil.rmtree(tmp_path / "s")
    with pytest.raises(vilu.errors.DataError, match="no embedding store"):
        pickle.loads(content)


def test_a_folder_of_scores(tmp_path):
    store = classes(tmp_path / "s")
    folder = vilu.score_parts(vilu.MCM(), store, tmp_path / "scores")
    content = pickle.dumps(folder)
    np.testing.assert_array_equal(
        pickle.loads(content).outcomes().uncertainty, folder.outcomes().uncertainty
    )
    vilu.score_parts(vilu.MaxLogit(), store, tmp_path / "scores", overwrite=True)
    with pytest.raises(ProvenanceError, match="scores has changed since it was pickled"):
        pickle.loads(content)
    assert isinstance(folder.path, Path)

"""Bytes that disagree with the receipt: every reader must notice them at its first reading, and
embedding again must repair them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import vilu
from tests.builders.pair_files import unit_pairs, write_store
from tests.builders.store_fakes import NAMES, FakeBackbone, dataset, tree
from vilu.artifacts.documents import write_json
from vilu.embeddings.pairs import Pools
from vilu.errors import ProvenanceError, StorageError
from vilu.report.explain.explain import explain
from vilu.store import ledger
from vilu.store.embed import ExtraColumns, embed
from vilu.store.inspect import inspect
from vilu.store.reader import CaptionStore, EmbeddingStore

N = 70
SETTINGS = {
    "names": NAMES,
    "part_size": 20,
    "columns": ExtraColumns(
        features=True, views=2, prompts=("a {}.", "the {}!"), negatives=("sea",)
    ),
}


def make(root, backbone=None, **settings):
    return embed(
        dataset(N, bad={3: b""}),
        backbone or FakeBackbone(),
        root,
        max_error_rate=0.1,
        **SETTINGS | settings,
    )


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("store") / "s"
    make(root)
    return root


@pytest.fixture
def root(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "s"))


def flip(path, at=-3):
    """Flip one bit and keep the file's size."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def swap(first, second):
    a, b = first.read_bytes(), second.read_bytes()
    assert len(a) == len(b)
    first.write_bytes(b)
    second.write_bytes(a)


def read_all(root):
    store = EmbeddingStore(root)
    rows = torch.arange(len(store))
    return (
        store.image_rows(rows),
        [store.column(name, rows) for name in sorted(store.columns)],
        list(store.ids),
    )


USED = [
    *(
        "img_emb/img_emb_00000.npy",
        "img_emb/img_emb_00002.npy",
        "features/features_00001.npy",
        "views/views_00001.npy",
    ),
    *("metadata/metadata_00001.parquet", "text_emb/classes.npy"),
    *(
        f"columns/{name}.npy"
        for name in ("prompts", "text_features", "image_projection", "text_projection", "negatives")
    ),
]


@pytest.mark.parametrize("name", USED)
def test_a_flipped_bit_in_any_file_that_is_read(root, name):
    flip(root / name)
    with pytest.raises(
        StorageError, match=rf"{name} is damaged: its SHA-256 is not .* `vilu embed`"
    ):
        read_all(root)
    assert (
        f"{root / name} is damaged: its SHA-256 is not the one"
        in inspect(root, deep=True).problems[0]
    )


def test_every_file_of_a_part_is_under_its_receipt_or_the_class_table(root):
    """Every array and metadata file must be covered by a receipt or by the class table.

    If a file is missing in ``USED``, the tests above would not notice it. Only error tables have no
    reader.
    """
    read = {path.relative_to(root).as_posix() for path in root.rglob("*.npy")} | {
        path.relative_to(root).as_posix() for path in (root / "metadata").iterdir()
    }
    assert {name.split("/")[0] for name in read} == {name.split("/")[0] for name in USED}
    vouched = {
        name
        for path in (root / "receipts").iterdir()
        for name in json.loads(path.read_text())["files"]
    }
    classes = json.loads((root / "classes.json").read_text())
    assert read <= vouched | {classes["text_emb"]} | {
        f"columns/{name}.npy" for name in classes["columns"]
    }
    assert {path.relative_to(root).as_posix() for path in (root / "errors").iterdir()} <= vouched


def test_errors_of_images_are_compared_by_those_who_look_at_them(root):
    flip(root / "errors/errors_00000.parquet", 20)
    read_all(root)
    assert any(
        "errors_00000.parquet is damaged" in problem
        for problem in inspect(root, deep=True).problems
    )


@pytest.mark.parametrize("folder", ["img_emb", "features", "views"])
def test_parts_whose_files_were_swapped(root, folder):
    swap(*(root / folder / f"{folder}_0000{number}.npy" for number in (1, 2)))
    with pytest.raises(StorageError, match=f"{folder}_00001.npy"):
        read_all(root)


@pytest.fixture(params=["flipped", "swapped"])
def damaged(request, tmp_path):
    """Return a store whose image vectors were changed after it was written. All parts have 20
    rows.
    """
    embed(dataset(60), FakeBackbone(), tmp_path / "d", names=NAMES, part_size=20)
    files = [tmp_path / f"d/img_emb/img_emb_0000{number}.npy" for number in (1, 2)]
    flip(files[0], 500) if request.param == "flipped" else swap(*files)
    return EmbeddingStore(tmp_path / "d")


USES = {
    "score": lambda store: vilu.score(vilu.MCM(), store),
    "score in parts": lambda store: vilu.score_parts(
        vilu.MCM(), store, store.path.parent / "scores"
    ),
    "explain": lambda store: explain(vilu.MCM(), store),
    "fit": lambda store: vilu.ViLU(epochs=1, hidden=(4,)).fit(store),
    "take": lambda store: store.take(torch.arange(25, 30)).image_rows(torch.arange(5)),
}


@pytest.mark.parametrize("use", USES)
def test_whoever_uses_the_rows_is_refused(damaged, use):
    with pytest.raises(StorageError, match=r"img_emb_00001\.npy is damaged"):
        USES[use](damaged)


@pytest.mark.parametrize(
    "change", [{"n_in": 21, "n_error": 2, "errors": {"empty": 2}}, {"n_error": 0, "errors": {}}]
)
def test_counts_of_a_receipt_that_was_written_anew(root, change):
    """If a receipt has other counts and a new seal, the store must be refused.

    A person who knows the format can seal a receipt. The manifest and the run still have the old
    counts.
    """
    path = root / "receipts/00000.json"
    receipt = json.loads(path.read_text()) | change
    write_json(path, receipt | {"n_ok": receipt["n_in"] - receipt["n_error"]})
    with pytest.raises(
        (StorageError, ProvenanceError), match=r"receipts/00000.json|has \(shape|seals other"
    ):
        EmbeddingStore(root)


def test_counts_of_shards_are_the_manifests(tmp_path):
    from tests.builders.store_fakes import shards

    embed(shards(3, 4), FakeBackbone(), tmp_path, names=NAMES, part_size=1)
    path = tmp_path / "receipts/00001.json"
    write_json(
        path, json.loads(path.read_text()) | {"n_in": 9, "n_error": 5, "errors": {"empty": 5}}
    )
    with pytest.raises(ProvenanceError, match="seals other parts"):
        EmbeddingStore(tmp_path)


def test_captions_and_their_vectors(tmp_path):
    captions = [f"picture {i}" for i in range(30)]
    write_store(tmp_path, *unit_pairs(30), captions)
    flip(tmp_path / "text_emb/text_emb_00001.npy")
    store = CaptionStore(tmp_path, Pools(6))
    with pytest.raises(StorageError, match=r"text_emb_00001\.npy is damaged"):
        vilu.score(vilu.MCM(), store)
    flip(tmp_path / "metadata/metadata_00002.parquet", 30)
    with pytest.raises(StorageError, match=r"metadata_00002\.parquet is damaged"):
        CaptionStore(tmp_path, Pools(2), "train")


@pytest.fixture
def hashed(monkeypatch):
    """Return a list that gets the name of every file that is hashed."""
    names, lock = [], threading.Lock()

    def count(path):
        with lock:
            names.append(path.name)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr(ledger, "file_hash", count)
    return names


def test_each_file_is_read_once_in_a_process_when_a_row_of_it_is_asked_for(root, hashed):
    store = EmbeddingStore(root)
    assert not any(name.startswith(("img_emb", "features", "views")) for name in hashed)
    store.image_rows(torch.tensor([0, 45]))
    assert [name for name in hashed if "emb" in name] == ["img_emb_00000.npy", "img_emb_00002.npy"]
    for _ in range(2):
        read_all(root)
    assert len(hashed) == len(set(hashed)) == 4 * 4 + 6


def test_a_file_that_was_written_since_is_read_again(root, hashed):
    read_all(root)
    del hashed[:]
    path = root / "img_emb/img_emb_00001.npy"
    path.write_bytes(path.read_bytes())
    read_all(root)
    assert hashed == ["img_emb_00001.npy"]
    before = path.stat()
    flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # ctime still shows the change
    with pytest.raises(StorageError, match=r"img_emb_00001\.npy is damaged"):
        read_all(root)


def test_threads_that_ask_at_once_read_it_once(root, hashed):
    store, rows = EmbeddingStore(root), torch.arange(N - 1)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: store.image_rows(rows), range(16)))
    assert all(torch.equal(one, found[0]) for one in found)
    assert sorted(name for name in hashed if "img" in name) == [
        f"img_emb_0000{number}.npy" for number in range(4)
    ]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_process_that_was_forked_while_a_thread_hashed_goes_on(root):
    with ledger._single_thread_lock:
        child = os.fork()
        if not child:
            os._exit(0 if len(read_all(root)[0]) == N - 1 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_process_that_was_forked_while_a_thread_opened_a_part_goes_on(root, monkeypatch):
    store, opened, begun, end = (
        EmbeddingStore(root),
        np.lib.format.open_memmap,
        threading.Event(),
        threading.Event(),
    )

    def slow(*args, **kwargs):
        begun.set()
        end.wait()
        return opened(*args, **kwargs)

    with ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(np.lib.format, "open_memmap", slow)
        pool.submit(store.image_rows, torch.tensor([0]))
        begun.wait()
        monkeypatch.setattr(np.lib.format, "open_memmap", opened)
        child = os.fork()
        if not child:
            signal.alarm(10)
            os._exit(0 if len(store.image_rows(torch.tensor([N - 2]))) == 1 else 1)
        status = os.waitpid(child, 0)[1]
        end.set()
    assert os.waitstatus_to_exitcode(status) == 0


def test_embedding_again_mends_a_damaged_part_and_says_so(root, caplog):
    before, backbone = tree(root), FakeBackbone()
    flip(root / "img_emb/img_emb_00001.npy", 400)
    flip(root / "columns/prompts.npy")
    with caplog.at_level(logging.WARNING, "vilu"):
        make(root, backbone)
    assert [message.split(":")[0] for message in caplog.messages] == [
        "the class texts are made again",
        "part 1 is done again",
    ]
    assert backbone.n_images == 20 * 3  # two views for each image
    assert tree(root) == before


def test_of_many_drivers_none_reads_all_bytes(root, hashed):
    """If many drivers share a store, none may read all bytes.

    Without this rule, each driver would read the whole store. A reader must still notice the
    damage.
    """
    flip(root / "img_emb/img_emb_00001.npy", 400)
    del hashed[:]
    store = make(root, shared=True)
    assert not any("img" in name for name in hashed)
    with pytest.raises(StorageError, match=r"img_emb_00001\.npy is damaged"):
        store.image_rows(torch.arange(N - 1))


def test_values_are_those_of_a_plain_reading(root):
    rows, columns, _ = read_all(root)
    plain = np.concatenate([np.load(path) for path in sorted((root / "img_emb").iterdir())])
    assert np.array_equal(rows.numpy(), plain.astype(np.float32))
    assert len(columns) == 7

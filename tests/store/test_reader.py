"""``EmbeddingStore``: the same rows as in memory, a refusal for files that do not fit, and no
crash on damage.
"""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
import weakref
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.builders.pair_files import reseal
from tests.builders.store_fakes import DIM, NAMES, FakeBackbone, dataset, tree
from tests.conftest import in_memory
from vilu.artifacts.disk import file_hash
from vilu.artifacts.documents import write_document, write_json
from vilu.errors import DataError, ProvenanceError, StorageError, ViLUError
from vilu.store.embed import embed
from vilu.store.mapped import MappedArrays
from vilu.store.reader import EmbeddingStore

N = 23
SHARED_FOLDER = [HealthCheck.function_scoped_fixture]


def make(root, n=N, part_size=10, **keywords):
    return embed(
        dataset(n, **keywords),
        FakeBackbone(),
        root,
        names=NAMES,
        part_size=part_size,
        max_error_rate=1,
    )


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("store") / "s"
    make(root, bad={3: b"", 14: b"x"}, unlabelled=[5])
    return root


@pytest.fixture
def root(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "s"))


def concatenated(root):
    return np.concatenate([np.load(path) for path in sorted((root / "img_emb").iterdir())]).astype(
        np.float32
    )


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_rows_are_those_of_the_concatenated_parts(tmp_path_factory, data):
    n = data.draw(st.integers(1, 12), label="n")
    bad = data.draw(st.sets(st.integers(0, n - 1)), label="bad")
    root = tmp_path_factory.mktemp("store")
    store = make(
        root, n, data.draw(st.integers(1, 13), label="part_size"), bad=dict.fromkeys(bad, b"")
    )
    rows = concatenated(root)
    assert len(store) == len(rows) == n - len(bad)
    index = data.draw(
        st.lists(st.integers(0, max(len(rows) - 1, 0)), max_size=30 if len(rows) else 0),
        label="index",
    )
    found = store.image_rows(torch.tensor(index, dtype=torch.int64))
    assert found.dtype == torch.float32
    assert np.array_equal(found.numpy(), rows[np.array(index, dtype=np.int64)])
    good = [i for i in range(n) if i not in bad]
    assert store.target.tolist() == [i % 3 for i in good]
    assert [store.ids[i] for i in index] == [f"img/{good[i]:04d}.png" for i in index]


def test_it_is_the_source_that_embeddings_in_memory_are(original):
    store = EmbeddingStore(original)
    memory = in_memory(store, torch.arange(len(store)))
    assert (
        (len(store), store.n_candidates, store.pool_size) == (len(memory), 3, None) == (21, 3, None)
    )
    assert (
        (store.space, store.class_names)
        == (memory.space, memory.class_names)
        == (FakeBackbone().space, NAMES)
    )
    assert list(store.ids) == list(memory.ids)
    assert store.target.dtype == torch.int64
    assert store.status.dtype == np.uint8
    assert not store.status.any()
    for mine, theirs in zip(store.batches(8), memory.batches(8), strict=True):
        for name in ("image", "text", "target", "index", "logits", "failure"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
        assert (mine.logit_scale, mine.logit_bias) == (10.0, 0.0)


def test_unknown_labels_have_no_failure(original):
    store = EmbeddingStore(original)
    (batch,) = store.batches(100)
    unknown = list(store.ids).index("img/0005.png")
    assert batch.target[unknown] == batch.failure[unknown] == -1
    assert (batch.target == -1).sum() == 1


def test_ids_are_a_sequence(original):
    ids = EmbeddingStore(original).ids
    every = list(ids)
    assert ids[-1] == every[-1] == "img/0022.png"
    assert ids[7:12] == every[7:12]
    assert ids[::-2] == every[::-2]
    assert "img/0003.png" not in ids
    with pytest.raises(IndexError):
        ids[len(ids)]


def test_files_are_let_go_of_with_the_store(original):
    """A store's files must be closed when the store goes, without a garbage collection.

    The folder may be on a disk that a user wants to unmount.
    """
    store = EmbeddingStore(original)
    assert len(store.ids[:]) == len(store)
    next(store.batches(4))
    gone = weakref.ref(store.ids)
    gc.disable()
    try:
        del store
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("index", [[-1], [0, 21]])
def test_rows_out_of_range(original, index):
    with pytest.raises(IndexError, match="0 to 20"):
        EmbeddingStore(original).image_rows(torch.tensor(index))


def test_more_parts_than_are_kept_open():
    rows = np.arange(12, dtype=np.float32).reshape(6, 2)
    opened = []

    def open_part(name, number):
        opened.append(number)
        return rows[2 * number : 2 * number + 2]

    parts = MappedArrays(np.array([0, 2, 4, 6]), {"image": (2,)}, open_part, max_open_parts=1)
    index = torch.arange(6).roll(1)
    assert np.array_equal(parts.take("image", index).numpy(), rows[index.numpy()])
    assert np.array_equal(parts.take("image", index).numpy(), rows[index.numpy()])
    assert opened == [0, 1, 2, 0, 1, 2]


OPEN_SPARSE = """
import resource, sys
from vilu.store.reader import EmbeddingStore
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
store = EmbeddingStore(sys.argv[1])
print(len(store), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_opening_reads_no_vector(tmp_path):
    """Opening a store must not read its vectors.

    The only part is replaced by a sparse file with 1 GiB. If opening read it, the peak memory would
    show it.
    """
    n, dim = 2**17, 4096
    embed(dataset(5), FakeBackbone(dim=dim), tmp_path, names=NAMES)
    np.lib.format.open_memmap(
        tmp_path / "img_emb/img_emb_00000.npy", mode="w+", dtype="<f2", shape=(n, dim)
    ).flush()
    table = pq.read_table(tmp_path / "metadata/metadata_00000.parquet")
    rows = pa.array(np.zeros(n, dtype=np.int64))
    columns = [table[name].combine_chunks().take(rows) for name in table.column_names]
    pq.write_table(
        pa.table(columns, schema=table.schema), tmp_path / "metadata/metadata_00000.parquet"
    )
    forge(tmp_path, n)
    done = subprocess.run(
        [sys.executable, "-c", OPEN_SPARSE, tmp_path], capture_output=True, text=True, check=True
    )
    n_rows, mebibytes = map(float, done.stdout.split())
    assert n_rows == n
    assert mebibytes < 128  # targets, labels and pyarrow's code: the vectors would add 1024


def forge(root, n):
    """Write documents for a store with one part and n images that agree with the files on disk."""
    from vilu.artifacts.documents import read_document
    from vilu.artifacts.hashing import digest
    from vilu.store.ledger import content_hash
    from vilu.store.manifest import Manifest, Receipt, Run, StoreInputs
    from vilu.store.parts import plan_parts

    old = read_document(root / "manifest.json", Manifest)
    fields = {name: getattr(old, name) for name in Run.model_fields} | {"n_in": n, "part_size": n}
    fields["fingerprint"] = digest(
        StoreInputs(
            **{name: fields[name] for name in StoreInputs.model_fields}
        ).fingerprint_fields()
    )
    run = Run(**fields)
    (part,) = plan_parts(run)
    info = {
        name: {"bytes": (root / name).stat().st_size, "sha256": "0" * 64} for name in part.files
    }
    info[part.metadata_file]["sha256"] = file_hash(
        root / part.metadata_file
    )  # opening reads only this file
    counts = {"n_in": n, "n_ok": n, "n_error": 0, "errors": {}}
    receipt = Receipt(
        fingerprint=run.fingerprint,
        part=0,
        start=0,
        stop=n,
        files=info,
        batch_size=1,
        **counts,
    )
    manifest = Manifest(
        **fields | counts, parts=1, classes=old.classes, content=content_hash([receipt])
    )
    for name, document in (
        ("run.json", run),
        (part.receipt_file, receipt),
        ("manifest.json", manifest),
    ):
        write_document(root / name, document)


def test_a_store_that_is_not_complete(root):
    (root / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"not complete.*`vilu embed`"):
        EmbeddingStore(root)


def test_a_folder_that_is_no_store(tmp_path):
    with pytest.raises(DataError, match="no embedding store"):
        EmbeddingStore(tmp_path / "nowhere")


def resize(path, change):
    content = path.read_bytes()
    path.write_bytes(content[:change] if change < 0 else content + b"\0" * change)


@pytest.mark.parametrize("change", [-1, -(10**9), 7])
@pytest.mark.parametrize("name", ["img_emb/img_emb_00001.npy", "metadata/metadata_00001.parquet"])
def test_a_file_of_another_length(root, name, change):
    resize(root / name, change)
    size = (root / name).stat().st_size
    with pytest.raises(
        StorageError, match=rf"{name} has {size} bytes, its receipt says \d+"
    ) as caught:
        EmbeddingStore(root)
    assert caught.value.exit_code == 7


@pytest.mark.parametrize(
    "name",
    ["img_emb/img_emb_00000.npy", "receipts/00002.json", "classes.json", "text_emb/classes.npy"],
)
def test_a_file_that_is_gone(root, name):
    (root / name).unlink()
    with pytest.raises(StorageError, match=name):
        EmbeddingStore(root)


def replace_array(root, array):
    """Write another array, and make the receipt and the seal agree with it."""
    path = root / "img_emb/img_emb_00000.npy"
    np.save(path, array, allow_pickle=True)
    edit(
        root / "receipts/00000.json",
        lambda receipt: receipt["files"]["img_emb/img_emb_00000.npy"].update(
            bytes=path.stat().st_size
        ),
    )


def edit(path, change):
    document = json.loads(path.read_text())
    change(document)
    write_json(path, document)


ROWS = np.ones((9, DIM))


@pytest.mark.parametrize(
    ("array", "found"),
    [
        (ROWS[:8].astype("<f2"), r"\(\(8, 16\)"),
        (ROWS[:, :8].astype("<f2"), r"\(\(9, 8\)"),
        (ROWS.astype("<f4"), "<f4"),
        (ROWS.astype(">f2"), ">f2"),
        (np.asfortranarray(ROWS).astype("<f2"), "False"),
        (ROWS[0].astype("<f2"), r"\(\(16,\)"),
        (np.array([{}] * 9, dtype=object), "Python objects"),
    ],
)
def test_an_array_that_is_not_what_the_documents_say(root, array, found):
    replace_array(root, array)
    with pytest.raises(StorageError, match=rf"img_emb_00000.npy .*{found}"):
        EmbeddingStore(root)


def test_a_pickle_is_not_run(root, tmp_path):
    import pickle

    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    path = root / "img_emb/img_emb_00000.npy"
    path.write_bytes(pickle.dumps(Payload()))
    edit(
        root / "receipts/00000.json",
        lambda r: r["files"]["img_emb/img_emb_00000.npy"].update(bytes=path.stat().st_size),
    )
    with pytest.raises(StorageError, match="damaged"):
        EmbeddingStore(root)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.slice(1), "has 8 rows, expected 9"),
        (lambda table: table.drop_columns(["label"]), "expected 'label: int32'"),
        (lambda table: table.set_column(2, "label", pa.array(["0"] * 9)), "label: string"),
        (
            lambda table: table.set_column(2, "label", pa.array([3] * 9, pa.int32())),
            "labels from 3 to 3.*3 classes",
        ),
        (
            lambda table: table.set_column(2, "label", pa.array([-3] * 9, pa.int32())),
            "labels from -3",
        ),
    ],
)
def test_metadata_that_do_not_fit_the_vectors(root, change, message):
    path = root / "metadata/metadata_00000.parquet"
    pq.write_table(change(pq.read_table(path)), path)
    reseal(root, "metadata/metadata_00000.parquet")
    with pytest.raises(StorageError, match=f"(?s)metadata_00000.parquet.*{message}"):
        EmbeddingStore(root)


def test_parts_of_another_run(root, tmp_path):
    make(tmp_path / "other", 30)
    for folder in ("img_emb", "metadata", "errors", "receipts"):
        for path in (tmp_path / "other" / folder).glob("*00000.*"):
            shutil.copy(path, root / folder)
    with pytest.raises(ProvenanceError, match=r"receipts/00000.json belongs to run"):
        EmbeddingStore(root)


def test_swapped_parts(root):
    a, b = root / "receipts/00000.json", root / "receipts/00001.json"
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    with pytest.raises(StorageError, match=r"00000\.json is damaged: it describes"):
        EmbeddingStore(root)


def test_a_part_done_again_under_an_old_seal(root):
    edit(
        root / "receipts/00001.json",
        lambda receipt: receipt["files"]["img_emb/img_emb_00001.npy"].update(sha256="0" * 64),
    )
    with pytest.raises(ProvenanceError, match="seals other parts"):
        EmbeddingStore(root)


def test_other_class_texts(root):
    resize(root / "text_emb/classes.npy", 0)
    content = bytearray((root / "text_emb/classes.npy").read_bytes())
    content[-1] ^= 1
    (root / "text_emb/classes.npy").write_bytes(content)
    with pytest.raises(StorageError, match=r"classes.npy is damaged: .* stated in classes.json"):
        EmbeddingStore(root)


@given(data=st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=SHARED_FOLDER)
def test_no_damage_ends_in_anything_but_an_error_of_ours(original, tmp_path, data):
    """If bytes in one file are replaced, the store must be refused with a ``ViLUError`` or be
    read in full.
    """
    root = tmp_path / "s"
    if not root.exists():
        shutil.copytree(original, root)
    name = data.draw(st.sampled_from(sorted(tree(original))))
    content = bytearray((original / name).read_bytes())
    where = data.draw(st.integers(0, len(content) - 1) | st.integers(0, min(130, len(content)) - 1))
    junk = data.draw(
        st.binary(min_size=1, max_size=8)
        | st.sampled_from([b"9", b"-1", b"99999999999", b"[", b'"'])
    )
    content[where : where + len(junk)] = junk
    (root / name).write_bytes(content)
    with suppress(ViLUError):
        store = EmbeddingStore(root)
        assert len(store.image_rows(torch.arange(len(store)))) == len(list(store.ids))
    shutil.copy(original / name, root / name)

"""``CaptionStore``: the same batches as in memory, folds by caption, and an order that reads few
blocks at a time.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vilu
from tests.builders.pair_files import DIM, SPACE, reseal, unit_pairs, write_shards, write_store
from tests.builders.store_fakes import NAMES, FakeBackbone, dataset
from tests.conftest import in_memory
from vilu.embeddings.checks import SHORT_POOL
from vilu.embeddings.memory import PairEmbeddings
from vilu.embeddings.pairs import Pools
from vilu.errors import DataError, ProvenanceError, StorageError, UsageError
from vilu.scoring.score import score
from vilu.store.embed import embed
from vilu.store.folds import fold_of, read_captions
from vilu.store.laion import LaionPairs
from vilu.store.mapped import BLOCK_ROWS, MappedArrays, shuffled_in_blocks
from vilu.store.reader import CaptionStore, EmbeddingStore

N, LOST = 53, (3, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29)  # part 2 has no row
IMAGE, TEXT = unit_pairs(N)
TEXT[[7, 31, 40]] = TEXT[12]
CAPTIONS = [f"a picture of {i}" for i in range(N)]
for twin in (7, 31, 40):
    CAPTIONS[twin] = f" {CAPTIONS[12]}  "
FEATURES = np.random.default_rng(5).standard_normal((N, 3))
KEPT = [i for i in range(N) if i not in LOST]
FIELDS = (
    "image",
    "text",
    "target",
    "index",
    "failure",
    "logits",
    "prediction",
    "target_log_probability",
)
CHOICES = [
    Pools(6),
    Pools(7, seed=None),
    Pools(14, direction="text_to_image"),
    Pools(6, hard=True, seed=3),
    Pools(21, direction="text_to_image", hard=True, near_duplicates=0.9),
]


@pytest.fixture
def root(tmp_path):
    write_store(tmp_path / "s", IMAGE, TEXT, CAPTIONS, features=FEATURES, lost=LOST)
    return tmp_path / "s"


def require_equal(mine, theirs):
    for name in FIELDS:
        assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
    assert torch.equal(mine.right, theirs.right)
    assert mine.columns.keys() == theirs.columns.keys()
    assert all(torch.equal(mine.columns[name], theirs.columns[name]) for name in mine.columns)
    assert (mine.logit_scale, mine.logit_bias) == (theirs.logit_scale, theirs.logit_bias)


@pytest.mark.parametrize("pools", CHOICES, ids=str)
def test_batches_are_those_of_the_same_pairs_in_memory(root, pools):
    """A store must give the same batches as the same pairs in memory.

    The 42 rows fill whole pools at every tested size.
    """
    store = CaptionStore(root, pools)
    columns = {"features": FEATURES[KEPT].astype("f2")}
    memory = PairEmbeddings(IMAGE[KEPT], TEXT[KEPT], pools, space=SPACE, columns=columns)
    assert len(store) == len(memory) == 42
    assert (store.n_candidates, store.pool_size, store.class_names, store.space) == (
        pools.size,
        pools.size,
        None,
        SPACE,
    )
    assert torch.equal(store.usable_rows, memory.usable_rows)
    assert not store.status.any()
    shuffled = [
        source.shuffled(source.usable_rows, torch.Generator().manual_seed(4))
        for source in (store, memory)
    ]
    assert torch.equal(*shuffled)
    asked = ("features",) if pools.direction == "image_to_text" else ()
    for rows in (None, shuffled[0]):
        for mine, theirs in zip(
            store.batches(4, rows=rows, columns=asked),
            memory.batches(4, rows=rows, columns=asked),
            strict=True,
        ):
            require_equal(mine, theirs)
    assert list(store.ids) == [f"{i:04d}" for i in KEPT]


def test_a_caption_that_asks_gets_no_features_of_its_picture(root):
    assert CaptionStore(root, Pools(2)).columns == {"features"}
    store = CaptionStore(root, Pools(2, "text_to_image"))
    assert not store.columns
    with pytest.raises(DataError, match="no column 'features'"):
        store.column("features", torch.arange(2))


@pytest.mark.parametrize("fold", ["train", "validation", "test"])
def test_a_fold_has_the_rows_of_its_captions_and_no_others(root, fold):
    chosen = [i for i in KEPT if fold_of(CAPTIONS[i]) == fold]
    store = CaptionStore(root, Pools(2), fold)
    assert len(store) == len(store.ids) == len(store.target) == len(chosen)
    assert (
        list(store.ids) == [store.ids[i] for i in range(len(store))] == [f"{i:04d}" for i in chosen]
    )
    assert store.ids[1:3] == [f"{i:04d}" for i in chosen[1:3]]
    assert torch.equal(
        store.picture_rows(torch.arange(len(store))), torch.from_numpy(IMAGE[chosen]).float()
    )
    assert torch.equal(
        store.caption_rows(torch.arange(len(store))), torch.from_numpy(TEXT[chosen]).float()
    )
    column = store.column("features", torch.arange(len(store)))
    assert torch.equal(column, torch.from_numpy(FEATURES[chosen].astype("f2")).float())
    for step in store.steps(2):
        rows = np.array(chosen)[step.index.numpy()]
        (alone,) = PairEmbeddings(IMAGE[rows], TEXT[rows], 2, space=SPACE).steps(2)
        assert torch.equal(step.logits, alone.logits)
        assert torch.equal(step.failure, alone.failure)


def test_folds_are_disjoint_and_complete(root):
    ids = [set(CaptionStore(root, fold=fold).ids) for fold in ("train", "validation", "test")]
    assert sum(map(len, ids)) == len(set().union(*ids)) == len(KEPT)
    twins = [{f"{i:04d}" for i in (7, 12, 31, 40)} <= fold for fold in ids]
    assert sum(twins) == 1  # equal captions are in one fold, with or without white space


def test_the_fold_is_the_hash_of_the_caption_and_nothing_else():
    captions = [f"caption {i} \N{SNOWMAN}" for i in range(20_000)]
    found = np.array([fold_of(caption) for caption in captions])
    expected = []
    for caption in captions:
        u = int(blake2b(caption.encode(), digest_size=8).hexdigest(), 16) / 16**16
        expected.append("test" if u >= 0.7 else "validation" if u >= 0.6 else "train")
    assert found.tolist() == expected
    for fold, share in (("train", 0.6), ("validation", 0.1), ("test", 0.3)):
        assert abs((found == fold).mean() - share) < 4 * np.sqrt(
            share * (1 - share) / len(captions)
        )


@pytest.mark.parametrize("hard", [False, True])
def test_rows_that_fill_no_last_pool_say_so(root, hard):
    store = CaptionStore(root, Pools(20, hard=hard))
    usable = store.usable_rows.numpy()
    assert len(usable) == len(set(usable.tolist())) == 40
    assert store.status.dtype == np.uint8
    assert np.flatnonzero(store.status).tolist() == sorted(set(range(42)) - set(usable.tolist()))
    assert set(store.status) == {0, SHORT_POOL}
    outcomes = score(vilu.MCM(), store)
    assert [reason for reason in outcomes.reason if reason] == ["short_pool"] * 2
    assert np.array_equal(np.isnan(outcomes.uncertainty), store.status == SHORT_POOL)
    assert (outcomes.failure[store.status == SHORT_POOL] == -1).all()


def test_less_than_a_pool_is_refused_when_it_matters(root):
    store = CaptionStore(root)
    assert len(store) == 42
    for use in (lambda: store.usable_rows, lambda: store.status, lambda: next(store.batches(8))):
        with pytest.raises(DataError, match="42 usable pairs, and a pool has 1024"):
            use()


def test_hard_pools_are_made_of_bounded_blocks(root, monkeypatch):
    monkeypatch.setattr("vilu.embeddings.pairs.MAX_HARD_ROWS", 13)
    asked = []
    take = MappedArrays.take
    monkeypatch.setattr(
        MappedArrays,
        "take",
        lambda self, name, rows: asked.append(len(rows)) or take(self, name, rows),
    )
    store = CaptionStore(root, Pools(6, hard=True))
    rows = store.usable_rows
    assert max(asked) == 12  # the largest multiple of a pool that fits
    assert sorted(rows.tolist()) == list(range(42))
    drawn = CaptionStore(root, Pools(6)).usable_rows
    for mine, plain in zip(rows.split(12), drawn.split(12), strict=True):
        assert sorted(mine.tolist()) == sorted(plain.tolist())


def test_rows_out_of_range(root):
    with pytest.raises(IndexError, match="0 to 41"):
        CaptionStore(root).picture_rows(torch.tensor([42]))
    with pytest.raises(DataError, match="no column 'views'"):
        CaptionStore(root).column("views", torch.arange(2))


def test_stores_of_classes_and_of_captions_are_told_apart(root, tmp_path):
    embed(dataset(5), FakeBackbone(), tmp_path / "classes", names=NAMES)
    with pytest.raises(DataError, match="has classes and no captions"):
        CaptionStore(tmp_path / "classes")
    with pytest.raises(DataError, match="has captions and no classes"):
        EmbeddingStore(root)


def test_an_unknown_fold(root):
    with pytest.raises(UsageError, match=r"'train', 'validation', 'test' or None\. Got 'dev'"):
        CaptionStore(root, fold="dev")


@pytest.mark.parametrize(
    "name", ["text_emb/text_emb_00001.npy", "img_emb/img_emb_00000.npy", "receipts/00002.json"]
)
def test_a_file_that_is_gone(root, name):
    (root / name).unlink()
    with pytest.raises(StorageError, match=name):
        CaptionStore(root)


def test_captions_of_another_shape(root):
    name = "text_emb/text_emb_00001.npy"
    np.save(root / name, np.ones((10, DIM + 1), "<f2"))
    with pytest.raises(StorageError, match="has 308 bytes, its receipt says 288"):
        CaptionStore(root)
    reseal(root, name)
    with pytest.raises(StorageError, match=r"text_emb_00001.npy .*\(10, 9\)"):
        CaptionStore(root)


def test_a_part_done_again_under_an_old_seal(root):
    path = root / "text_emb/text_emb_00001.npy"
    content = (root / "manifest.json").read_text()
    np.save(path, np.ones((10, DIM), "<f2"))
    reseal(root, "text_emb/text_emb_00001.npy")
    (root / "manifest.json").write_text(content)
    with pytest.raises(ProvenanceError, match="seals other parts"):
        CaptionStore(root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.slice(1), "has 9 rows, expected 10"),
        (lambda table: table.drop_columns(["caption"]), "no column caption"),
        (
            lambda table: table.set_column(8, "caption", pa.array(range(10))),
            "must hold strings. Got int64",
        ),
    ],
)
def test_captions_that_do_not_fit_the_vectors(root, change, message):
    name = "metadata/metadata_00001.parquet"
    pq.write_table(change(pq.read_table(root / name)), root / name)
    reseal(root, name)
    with pytest.raises((StorageError, UsageError, DataError), match=message):
        CaptionStore(root, fold="train")


def test_captions_that_are_no_text(tmp_path):
    offsets, data = pa.py_buffer(np.array([0, 2], "<i4").tobytes()), pa.py_buffer(b"\xff\xfe")
    broken = pa.StringArray.from_buffers(1, offsets, data)
    pq.write_table(pa.table({"caption": broken}), tmp_path / "m.parquet")
    with pytest.raises(StorageError, match="damaged"):
        list(read_captions(tmp_path / "m.parquet", ("caption",), 1))
    (tmp_path / "m.parquet").write_bytes(b"PAR1")
    with pytest.raises(StorageError, match="damaged"):
        list(read_captions(tmp_path / "m.parquet", ("caption",), 1))


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    image, text = unit_pairs(700)
    return LaionPairs(
        write_shards(tmp_path_factory.mktemp("many"), image, text, sizes=[70] * 10), logit_scale=1
    )


@given(n=st.integers(0, 700), seed=st.integers(0, 2**31), size=st.integers(1, 60))
@settings(max_examples=100, deadline=None)
def test_a_pass_has_every_row_once_and_stays_among_few_blocks(n, seed, size):
    rows = torch.randperm(700, generator=torch.Generator().manual_seed(seed))[:n]
    found = shuffled_in_blocks(rows, torch.Generator().manual_seed(seed), size)
    again = shuffled_in_blocks(rows, torch.Generator().manual_seed(seed), size)
    assert torch.equal(found, again)
    assert sorted(found.tolist()) == sorted(rows.tolist())
    n_blocks = -(-n // size)
    if n_blocks <= 8:
        assert torch.equal(
            found, rows[torch.randperm(n, generator=torch.Generator().manual_seed(seed))]
        )
        return
    block_of = {
        row: i
        for i, block in enumerate(rows.sort().values.tensor_split(n_blocks))
        for row in block.tolist()
    }
    visits = [block_of[row] for row in found.tolist()]
    first = {block: visits.index(block) for block in block_of.values()}
    last = {block: len(visits) - 1 - visits[::-1].index(block) for block in block_of.values()}
    for place in range(len(visits)):
        assert sum(first[block] <= place <= last[block] for block in first) <= 8


def test_a_batch_mixes_blocks():
    for n in (450, 700):  # 9 blocks form groups with 5 and 4, 14 blocks with 7 and 7
        found = shuffled_in_blocks(torch.arange(n), torch.Generator().manual_seed(0), 50)
        assert all(len({row // 50 for row in batch.tolist()}) >= 4 for batch in found.split(50))
        other = shuffled_in_blocks(torch.arange(n), torch.Generator().manual_seed(1), 50)
        assert not torch.equal(found, other)


def test_stores_are_shuffled_in_blocks(tmp_path):
    store = embed(dataset(40), FakeBackbone(), tmp_path / "s", names=NAMES, part_size=7)
    everyone = torch.arange(40)
    assert torch.equal(
        store.shuffled(everyone, torch.Generator().manual_seed(2)),
        in_memory(store, everyone).shuffled(everyone, torch.Generator().manual_seed(2)),
    )
    many = torch.arange(9 * BLOCK_ROWS)  # five blocks, then four
    halves = store.shuffled(many, torch.Generator().manual_seed(2)).split(5 * BLOCK_ROWS)
    blocks = [set((half // BLOCK_ROWS).unique().tolist()) for half in halves]
    assert (len(blocks[0]), len(blocks[1]), len(blocks[0] & blocks[1])) == (5, 4, 0)


def test_batches_are_read_ahead_but_not_far(many, monkeypatch):
    asked = []
    batch = type(many)._batch

    def counted(self, *arguments, **settings):
        asked.append(arguments)
        return batch(self, *arguments, **settings)

    monkeypatch.setattr(type(many), "_batch", counted)
    steps = many.steps(1, rows=torch.arange(700).repeat(10))
    monkeypatch.setattr(many, "pool_size", 100)
    taken = [next(steps) for _ in range(5)]
    steps.close()
    assert [step.index[0].item() for step in taken] == [0, 100, 200, 300, 400]
    assert len(asked) <= 5 + 3
    with pytest.raises(IndexError, match="0 to 699"):
        list(many.steps(1, rows=torch.arange(1000)))

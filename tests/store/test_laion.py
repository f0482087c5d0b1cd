"""``LaionPairs``: published layouts must give the same pairs as in memory, and files that do not
belong together must be refused.
"""

from __future__ import annotations

import errno
import os
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.builders.pair_files import DIM, LAYOUTS, unit_pairs, write_shards
from tests.store.test_pairs import require_equal
from vilu.embeddings.checks import NONFINITE, SHORT_POOL, ZERO_NORM, RowNumbers
from vilu.embeddings.memory import PairEmbeddings
from vilu.embeddings.pairs import Pools
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import DataError, ProvenanceError, StorageError, UsageError, ViLUError
from vilu.progress import reporting
from vilu.store.folds import fold_of
from vilu.store.laion import MAX_BLOCK_VALUES, LaionPairs
from vilu.store.mapped import MAX_OPEN_PARTS, MappedArrays
from vilu.store.unreadable import convert_damage_errors

N = 60
IMAGE, TEXT = unit_pairs(N, seed=1)
TEXT[[4, 50]] = TEXT[33]
SIZES = [3, 9, 0, 1, 8, 2, 7, 5, 4, 6, 10, 5]  # 12 shards, so 10 must sort after 9
SCALE = 30.0


def memory(image=IMAGE, text=TEXT, pools=None):
    return PairEmbeddings(image, text, pools or Pools(10), space=EmbeddingSpace(DIM, SCALE))


@pytest.mark.parametrize("direction", ["image_to_text", "text_to_image"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches_are_those_of_the_same_pairs_in_memory(tmp_path, layout, direction):
    pools = Pools(10, direction)
    source = LaionPairs(
        write_shards(tmp_path, IMAGE, TEXT, layout, SIZES), pools, logit_scale=SCALE
    )
    reference = memory(pools=pools)
    assert len(source) == N
    assert isinstance(source.ids, RowNumbers)
    assert (source.ids[7], source.ids[-1], len(source.ids)) == ("7", "59", N)
    assert source.space == reference.space
    assert not source.status.any()
    for mine, theirs in zip(source.batches(4), reference.batches(4), strict=True):
        require_equal(mine, theirs)


@pytest.mark.parametrize(
    ("image_type", "text_type"), [("<f4", "<f2"), (">f2", ">f4"), ("<f4", ">f4")]
)
def test_number_formats_and_byte_orders(tmp_path, image_type, text_type):
    image, text = unit_pairs(N, dtype="<f4")
    image, text = image.astype(image_type), text.astype(text_type)
    source = LaionPairs(
        write_shards(tmp_path, image, text, sizes=SIZES), Pools(10), logit_scale=SCALE
    )
    for mine, theirs in zip(source.steps(4), memory(image, text).steps(4), strict=True):
        require_equal(mine, theirs)


@pytest.fixture
def few_files():
    """Limit this process to 100 open files more than the parts that are kept open."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, before)
        next_one = os.dup(1)
        os.close(next_one)
        resource.setrlimit(resource.RLIMIT_NOFILE, (next_one + MAX_OPEN_PARTS + 100, before[1]))
        yield


@pytest.mark.usefixtures("few_files")
def test_shards_may_be_many_more_than_files_may_be_open(tmp_path):
    n = 400
    image, text = unit_pairs(n)
    shards = write_shards(tmp_path, image, text, sizes=[1] * n)  # two arrays each
    source = LaionPairs(shards, Pools(100), logit_scale=SCALE)
    for mine, theirs in zip(
        source.steps(100), memory(image, text, Pools(100)).steps(100), strict=True
    ):
        require_equal(mine, theirs)


def test_two_threads_may_let_go_of_what_they_have_read():
    parts = MappedArrays(
        np.arange(N + 1),
        {"image": (DIM,)},
        lambda _, number: IMAGE[number : number + 1],
        max_resident_bytes=2**17,
    )
    rows = torch.randint(N, (600, 10), generator=torch.Generator().manual_seed(0))
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = torch.stack(list(pool.map(partial(parts.take, "image"), rows)))
    finally:
        sys.setswitchinterval(before)
    assert torch.equal(found, torch.from_numpy(IMAGE).float()[rows])


def test_number_formats_that_differ_between_shards(tmp_path):
    image, text = unit_pairs(N, dtype="<f4")
    write_shards(tmp_path, image, text, sizes=[30, 30])
    np.save(tmp_path / "img_emb/img_emb_0001.npy", image[30:].astype(">f2"))
    source = LaionPairs(tmp_path, Pools(10), logit_scale=SCALE)
    expected = np.concatenate([image[:30], image[30:].astype("f2").astype("f4")])
    assert torch.equal(
        source.picture_rows(torch.arange(N).flip(0)), torch.from_numpy(expected[::-1].copy())
    )


def test_rows_that_are_not_of_unit_norm_are_normalised_and_said_once(tmp_path):
    rng = np.random.default_rng(2)
    image = IMAGE.astype("f4") * rng.uniform(0.5, 9, (N, 1)).astype("f4")
    image[5] = IMAGE[5]
    write_shards(tmp_path, image.astype("f2"), TEXT, sizes=SIZES)
    source = LaionPairs(tmp_path, Pools(10), logit_scale=SCALE)
    norms = np.linalg.norm(image.astype("f2").astype("f8"), axis=1)
    n_off = int((abs(norms - 1) > 1e-3).sum())
    assert n_off >= N - 3
    with pytest.warns(
        UserWarning, match=f"^{n_off} of 120 image and caption rows .*; they are normalised when"
    ) as said:
        assert not source.status.any()
    assert len(said) == 1
    with pytest.warns(UserWarning, match="not of unit norm"):
        reference = memory(image.astype("f2"))
    for mine, theirs in zip(
        source.batches(4), reference.batches(4), strict=True
    ):  # a warning would raise here
        require_equal(mine, theirs)
    assert torch.allclose(
        source.picture_rows(torch.arange(N)).norm(dim=1), torch.ones(N), atol=1e-3
    )


def test_rows_are_normalised_whether_or_not_all_were_looked_at(tmp_path):
    source = LaionPairs(write_shards(tmp_path, 2 * IMAGE, TEXT), Pools(10), logit_scale=SCALE)
    rows = source.picture_rows(torch.arange(N))
    assert torch.allclose(rows.norm(dim=1), torch.ones(N), atol=1e-6)


def test_unusable_rows_are_in_no_pool_and_say_why(tmp_path):
    image, text = IMAGE.copy(), TEXT.copy()
    image[3, 2], text[10, 0], image[11, 5] = np.nan, np.inf, -np.inf
    image[20], text[21], text[22] = 0, 0, 0
    image[22, 0] = np.nan
    source = LaionPairs(
        write_shards(tmp_path, image, text, sizes=SIZES), Pools(9), logit_scale=SCALE
    )
    assert source.status[[3, 10, 11, 22]].tolist() == [NONFINITE] * 4
    assert source.status[[20, 21]].tolist() == [ZERO_NORM] * 2
    assert len(source.usable_rows) == 54
    assert not (source.status == SHORT_POOL).any()
    good = [i for i in range(N) if i not in (3, 10, 11, 20, 21, 22)]
    assert sorted(source.usable_rows.tolist()) == good
    reference = memory(image[good], text[good], Pools(9))
    assert torch.equal(torch.tensor(good)[reference.usable_rows], source.usable_rows)
    for mine, theirs in zip(source.steps(4), reference.steps(4), strict=True):
        assert torch.equal(mine.logits, theirs.logits)
        assert torch.equal(mine.failure, theirs.failure)
    short = LaionPairs(tmp_path, Pools(50), logit_scale=SCALE)
    assert np.bincount(short.status, minlength=4).tolist() == [50, 4, 2, 4]


def test_opening_reads_headers_only_and_progress_is_shown(tmp_path):
    block = MAX_BLOCK_VALUES // DIM
    n = block + 10
    rows = np.resize(IMAGE, (n, DIM))
    write_shards(tmp_path, rows, rows, sizes=[n])
    steps = []

    class Watch:
        def start(self, description, total, unit):
            steps.append((description, total, unit))
            return self

        def advance(self, count, note=""):
            steps.append(count)

        def finish(self, task):
            pass

    with reporting(Watch()):
        source = LaionPairs(tmp_path, Pools(10), logit_scale=SCALE)
        assert steps == []
        assert len(source.usable_rows) == n // 10 * 10
        assert source.status is source.status
    assert steps[0] == ("Checking embeddings", 2 * n, "rows")
    assert (sum(steps[1:]), max(steps[1:])) == (2 * n, block)


def table(captions, name="caption", kind=None):
    return pa.table({"url": ["u"] * len(captions), name: pa.array(captions, kind or pa.string())})


CAPTIONS = [f"picture {i // 2}" if i % 7 else None for i in range(N)]


@pytest.mark.parametrize(("name", "kind"), [("caption", pa.string()), ("TEXT", pa.large_string())])
@pytest.mark.parametrize("layout", ["clip-retrieval", "laion"])
def test_folds(tmp_path, layout, name, kind):
    write_shards(tmp_path, IMAGE, TEXT, layout, SIZES, table(CAPTIONS, name, kind))
    seen = []
    for fold in ("train", "validation", "test"):
        chosen = [i for i, caption in enumerate(CAPTIONS) if fold_of(caption or "") == fold]
        source = LaionPairs(tmp_path, Pools(3), logit_scale=SCALE, fold=fold)
        assert list(source.ids) == source.ids[:] == [str(i) for i in chosen]
        assert isinstance(source.ids, RowNumbers)
        assert torch.equal(
            source.caption_rows(torch.arange(len(source))), torch.from_numpy(TEXT[chosen]).float()
        )
        assert len(source.status) == len(chosen)
        seen += chosen
    assert sorted(seen) == list(range(N))


def test_folds_take_the_status_of_their_rows(tmp_path):
    image = IMAGE.copy()
    image[::3] = np.nan
    write_shards(tmp_path, image, TEXT, sizes=SIZES, metadata=table(CAPTIONS))
    source = LaionPairs(tmp_path, Pools(2), logit_scale=SCALE, fold="train")
    assert [int(i) % 3 == 0 for i in source.ids] == (source.status == NONFINITE).tolist()


@pytest.mark.parametrize("metadata", [None, table(CAPTIONS, "text")])
def test_no_folds_without_captions(tmp_path, metadata):
    write_shards(tmp_path, IMAGE, TEXT, sizes=SIZES, metadata=metadata)
    with pytest.raises(UsageError, match="folds are made by caption"):
        LaionPairs(tmp_path, logit_scale=SCALE, fold="train")


def refused(error, message, root):
    with pytest.raises(error, match=message):
        LaionPairs(root, Pools(10), logit_scale=SCALE)


@pytest.fixture
def root(tmp_path):
    return write_shards(tmp_path, IMAGE, TEXT, sizes=[20, 20, 20], metadata=table(CAPTIONS))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "img_emb/img_emb_0001.npy",
            r"img_emb has no file with number 1, the partner of .*text_emb_0001.npy",
        ),
        (
            "text_emb/text_emb_0002.npy",
            r"text_emb has no file with number 2, the partner of .*img_emb_0002.npy",
        ),
        (
            "metadata/metadata_000.parquet",
            r"metadata has no file with number 0, the partner of .*img_emb_0000.npy",
        ),
    ],
)
def test_a_partner_that_is_missing(root, name, message):
    (root / name).unlink()
    refused(DataError, message, root)


def test_numbers_of_rows_that_differ(root):
    np.save(root / "text_emb/text_emb_0001.npy", TEXT[:19])
    refused(
        ProvenanceError,
        r"img_emb_0001.npy has 20, .*text_emb_0001.npy has 19, .*metadata_001.parquet has 20",
        root,
    )


def test_metadata_that_are_shorter(root):
    pq.write_table(table(CAPTIONS[:7]), root / "metadata/metadata_002.parquet")
    refused(ProvenanceError, r"text_emb_0002.npy has 20, .*metadata_002.parquet has 7", root)


def test_widths_that_differ(root):
    np.save(root / "text_emb/text_emb_0000.npy", np.ones((20, DIM + 1), "f2"))
    refused(
        ProvenanceError,
        rf"img_emb_0000.npy has width {DIM} and .*text_emb_0000.npy {DIM + 1}",
        root,
    )
    np.save(root / "text_emb/text_emb_0000.npy", TEXT[:20])
    for folder in ("img_emb", "text_emb"):
        np.save(root / f"{folder}/{folder}_0002.npy", np.ones((20, 3), "f2"))
    refused(ProvenanceError, rf"img_emb_0000.npy has width {DIM} and .*img_emb_0002.npy 3", root)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (IMAGE[:20].astype("f8"), "float64 of shape"),
        (np.ones((20, DIM), "i4"), "int32 of shape"),
        (np.ones((20, DIM), "c8"), "complex64"),
        (np.ones(20, "f2"), r"shape \(20,\)"),
        (np.ones((20, 2, DIM), "f2"), "float16 of shape"),
        (np.ones((20, 0), "f2"), r"shape \(20, 0\)"),
        (np.asfortranarray(IMAGE[:20]), "Fortran order"),
    ],
)
def test_arrays_that_are_no_embeddings(root, array, message):
    np.save(root / "img_emb/img_emb_0000.npy", array)
    refused(DataError, rf"img_emb_0000.npy .*{message}", root)


def test_damaged_files(root):
    path = root / "img_emb/img_emb_0000.npy"
    whole = path.read_bytes()
    for content in (
        b"",
        whole[:50],
        whole[:-1],
        whole.replace(b"(20, ", b"(2000000000, "),
        b"\x80\x04junk",
    ):
        path.write_bytes(content)
        refused(StorageError, r"img_emb_0000.npy is damaged", root)
    path.write_bytes(whole + b"\0")
    refused(StorageError, r"has 321 bytes of data, its header says 320", root)
    np.save(path, np.array([{}] * 20, dtype=object), allow_pickle=True)
    refused(StorageError, r"img_emb_0000.npy is damaged", root)
    path.write_bytes(whole)
    (root / "metadata/metadata_001.parquet").write_bytes(b"PAR1PAR1")
    refused(StorageError, r"metadata_001.parquet is damaged", root)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.EMFILE, "Too many open files. Raise the limit on open files: ulimit -n 4096."),
        (errno.EIO, "Input/output error."),
        (errno.EACCES, "Permission denied."),
    ],
)
def test_what_the_system_refuses_is_no_damage(root, code, message):
    with pytest.raises(StorageError) as told, convert_damage_errors(root, "Fetch it again."):
        raise OSError(code, os.strerror(code))
    assert str(told.value) == f"cannot read {root}: {message}"


def test_a_shard_that_changes_while_it_is_read(root):
    source = LaionPairs(root, Pools(10), logit_scale=SCALE)
    np.save(root / "img_emb/img_emb_0001.npy", IMAGE[:19])
    with pytest.raises(StorageError, match="changed while it was read"):
        source.picture_rows(torch.tensor([25]))


def test_names_that_do_not_say_their_partner(root):
    np.save(root / "img_emb/extra.npy", IMAGE)
    refused(DataError, r"extra.npy must be a file with a number", root)
    (root / "img_emb/extra.npy").rename(root / "img_emb/img_emb_1.npy")
    refused(DataError, r"img_emb_0001.npy and .*img_emb_1.npy have the same number", root)
    (root / "img_emb/img_emb_1.npy").unlink()
    os.mkfifo(root / "img_emb/img_emb_7.npy")  # opening it would wait forever
    refused(DataError, r"img_emb_7.npy must be a file", root)
    (root / "img_emb/img_emb_7.npy").rename(root / "img_emb/.img_emb_7.npy")
    (root / "img_emb/notes.txt").touch()
    assert len(LaionPairs(root, logit_scale=SCALE)) == N


def test_folders_that_hold_no_pairs(tmp_path):
    refused(DataError, "nowhere is no folder", tmp_path / "nowhere")
    refused(DataError, r"Found nothing. Expected a store, or img_emb/", tmp_path)
    (tmp_path / "img_emb").mkdir()
    refused(DataError, "Found img_emb. Expected", tmp_path)
    (tmp_path / "text_emb").mkdir()
    refused(DataError, "hold no .npy file", tmp_path)


def test_one_split_of_several_must_be_chosen(tmp_path):
    write_shards(tmp_path, IMAGE, TEXT, "split")
    assert len(LaionPairs(tmp_path, logit_scale=SCALE)) == N
    (tmp_path / "train").rename(tmp_path / "val")
    write_shards(tmp_path, IMAGE, TEXT, "split")
    refused(DataError, r"several splits. Give one of them: .*train, .*val", tmp_path)
    assert len(LaionPairs(tmp_path / "val", logit_scale=SCALE)) == N


def test_nothing_is_written_into_the_folder(root):
    before = sorted(root.rglob("*"))
    assert not LaionPairs(root, Pools(10), logit_scale=SCALE, fold=None).status.any()
    assert sorted(root.rglob("*")) == before


@given(data=st.data())
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_damage_ends_in_anything_but_an_error_of_ours(tmp_path_factory, root, data):
    """If bytes in one file are replaced, the shards must be refused with a ``ViLUError`` or be
    read in full.
    """
    path = data.draw(st.sampled_from(sorted(path for path in root.rglob("*") if path.is_file())))
    whole = path.read_bytes()
    content = bytearray(whole)
    where = data.draw(st.integers(0, len(content) - 1) | st.integers(0, min(130, len(content)) - 1))
    junk = data.draw(
        st.binary(min_size=1, max_size=8)
        | st.sampled_from([b"9", b"-1", b"99999999999", b"[", b'"'])
    )
    content[where : where + len(junk)] = junk
    Path(path).write_bytes(content)
    try:
        with warnings.catch_warnings(action="ignore"):
            source = LaionPairs(root, Pools(2), logit_scale=SCALE, fold="train")
            n_rows = sum(len(batch.index) for batch in source.batches(8))
        assert n_rows == (source.status == 0).sum()
    except ViLUError as error:
        assert str(root) in str(error)  # noqa: PT017 - either outcome is fine
    finally:
        path.write_bytes(whole)

"""``embed``: the store's content, resuming, bad images, refusals, interruptions and bounded
memory.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import threading
import time
import weakref
from collections import namedtuple
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests.builders.store_fakes import DIM, NAMES, FakeBackbone, FakeDataset, dataset, picture, tree
from vilu.artifacts.disk import host_hash
from vilu.artifacts.documents import write_json
from vilu.artifacts.paths import folder_entries
from vilu.datasets.catalog import open_dataset
from vilu.datasets.images import ImageLimits, decode_image
from vilu.errors import BusyError, DataError, ProvenanceError, StorageError, UsageError
from vilu.progress import reporting
from vilu.store import ledger
from vilu.store.embed import embed
from vilu.store.parts import StoreLedger
from vilu.store.reader import EmbeddingStore, open_source

HALF = 2**-11  # largest relative rounding error in float16
BAD = {2: b"", 5: b"<html>", 9: picture(9)[:200]}


def run(data, output, backbone=None, **settings):
    return embed(
        data,
        backbone or FakeBackbone(),
        output,
        **{"names": NAMES, "batch_size": 4, "part_size": 10} | settings,
    )


def expected_rows(data, indices):
    backbone = FakeBackbone()
    pixels = [backbone.preprocess(decode_image(data.blobs[i]).image) for i in indices]
    return torch.cat([backbone.encode_images(p[None]) for p in pixels]).numpy()


def test_what_a_store_holds(tmp_path):
    data = dataset(23, unlabelled=[4, 22])
    store = run(data, tmp_path / "s")
    shards = [np.load(path) for path in sorted((tmp_path / "s/img_emb").glob("*.npy"))]
    assert [shard.shape for shard in shards] == [(10, DIM), (10, DIM), (3, DIM)]
    assert all(shard.dtype == "<f2" and shard.flags.c_contiguous for shard in shards)
    np.testing.assert_allclose(
        np.concatenate(shards), expected_rows(data, range(23)), rtol=HALF, atol=1e-6
    )
    metadata = pq.read_table(tmp_path / "s/metadata/metadata_00001.parquet").to_pydict()
    assert metadata["position"] == list(range(10, 20))
    assert metadata["key"] == data.keys[10:20]
    assert metadata["width"] == [16 + i % 5 for i in range(10, 20)]
    assert set(metadata["height"]) == {18}
    assert (
        set(metadata["n_frames"]),
        set(metadata["flags"]),
        set(metadata["exif_orientation"]),
    ) == ({1}, {0}, {None})
    assert store.target.tolist() == [-1 if i in {4, 22} else i % 3 for i in range(23)]
    assert pq.read_table(tmp_path / "s/metadata/metadata_00000.parquet")["label"][4].as_py() is None


def test_a_store_begun_during_the_check_belongs_to_this_job(tmp_path, monkeypatch):
    run(dataset(23), tmp_path / "made")
    here = tmp_path / "here"
    here.mkdir()

    def then_it_begins(look):
        def seen(root):
            found = look(root)
            shutil.copytree(tmp_path / "made", here, dirs_exist_ok=True)
            return found

        return seen

    monkeypatch.setattr(ledger, "folder_entries", then_it_begins(folder_entries))
    monkeypatch.setattr(StoreLedger, "has_begun", then_it_begins(StoreLedger.has_begun))
    StoreLedger.check_folder(here)


def test_float32_keeps_every_bit(tmp_path):
    data = dataset(9)
    half, full = run(data, tmp_path / "h"), run(data, tmp_path / "f", dtype="float32")
    index = torch.arange(9)
    # One side has batches with 4 images, the other has batches with 1. The 192 products may be
    # summed in another order.
    np.testing.assert_allclose(
        full.image_rows(index).numpy(), expected_rows(data, range(9)), rtol=1e-5, atol=1e-6
    )
    assert torch.equal(full.image_rows(index).half().float(), half.image_rows(index))


def test_documents_say_what_made_the_store_and_no_path(tmp_path):
    backbone = FakeBackbone()
    data = dataset(12)
    run(data, tmp_path / "s", backbone, templates=("a {}.", "the {}."), split="train")
    manifest = json.loads((tmp_path / "s/manifest.json").read_text())
    assert manifest["space"]["weights"] == "w0"
    assert manifest["space"]["logit_scale"] == 10.0
    assert (manifest["dataset"], manifest["dataset_fingerprint"]) == ("pets", data.fingerprint)
    assert (manifest["n_in"], manifest["n_ok"], manifest["n_error"], manifest["parts"]) == (
        12,
        12,
        0,
        2,
    )
    assert (manifest["split"], manifest["dtype"], manifest["templates"]) == (
        "train",
        "float16",
        ["a {}.", "the {}."],
    )
    classes = json.loads((tmp_path / "s/classes.json").read_text())
    assert (classes["names"], classes["folders"]) == (list(NAMES), ["n01", "n02", "n03"])
    assert manifest["classes"] == classes["hash"]
    text = np.load(tmp_path / "s" / classes["text_emb"])
    prompts = FakeBackbone().encode_texts(["a dog.", "the dog."]).mean(0)
    np.testing.assert_allclose(text[1], prompts / prompts.norm(), atol=1e-6)
    assert backbone.n_texts == 6
    for path in (tmp_path / "s").rglob("*.json"):
        assert "/home/someone" not in path.read_text()
        assert str(tmp_path) not in path.read_text()


def test_bad_images_are_set_aside_and_counted(tmp_path):
    data = dataset(23, bad=BAD)
    store = run(data, tmp_path / "s", max_error_rate=0.5)
    manifest = store.manifest
    assert (manifest.n_in, manifest.n_ok, manifest.n_error) == (23, 20, 3)
    assert manifest.errors == {"empty": 1, "truncated": 1, "unidentified": 1}
    good = [i for i in range(23) if i not in BAD]
    assert list(store.ids) == [data.keys[i] for i in good]
    np.testing.assert_allclose(
        store.image_rows(torch.arange(20)), expected_rows(data, good), rtol=HALF, atol=1e-6
    )
    errors = pq.read_table(tmp_path / "s/errors/errors_00000.parquet").to_pylist()
    assert [row["position"] for row in errors] == [2, 5, 9]
    assert errors[1]["key"] == data.keys[5]
    assert (errors[1]["stage"], errors[1]["kind"], errors[1]["bytes"]) == (
        "open",
        "unidentified",
        6,
    )
    assert (errors[2]["stage"], errors[2]["exception"], errors[2]["bytes"]) == (
        "decode",
        "OSError",
        200,
    )
    assert all(row["message"] for row in errors)


def test_a_bad_image_leaves_its_place_in_the_batch_empty(tmp_path):
    backbone = FakeBackbone()
    run(dataset(23, bad=BAD), tmp_path / "s", backbone, max_error_rate=0.5)
    assert backbone.batches == [3, 3, 1, 4, 4, 2, 3]  # 4, 4, 2 | 4, 4, 2 | 3 positions


def test_unreadable_files_and_odd_names(tmp_path):
    data = dataset(4)
    data.keys[1] = "caf\udce9.png"  # a latin-1 file name as Python lists it
    data.unreadable = 3
    store = run(data, tmp_path / "s", max_error_rate=0.3)
    assert store.ids[1] == "caf\\udce9.png"
    (error,) = pq.read_table(tmp_path / "s/errors/errors_00000.parquet").to_pylist()
    assert (error["kind"], error["exception"], error["bytes"]) == (
        "read_error",
        "PermissionError",
        None,
    )


class Broken(FakeBackbone):
    def encode_images(self, pixels):
        rows = super().encode_images(pixels)
        rows[0], rows[1] = float("nan"), 0.0
        return rows


def test_embeddings_without_direction_become_errors(tmp_path):
    store = run(dataset(10), tmp_path / "s", Broken(), max_error_rate=0.9)
    assert store.manifest.errors == {"nonfinite": 3, "zero_norm": 3}
    errors = pq.read_table(tmp_path / "s/errors/errors_00000.parquet").to_pydict()
    assert errors["position"] == [0, 1, 4, 5, 8, 9]
    assert errors["kind"] == ["nonfinite", "zero_norm"] * 3
    assert set(errors["stage"]) == {"encode"}
    assert torch.isfinite(store.image_rows(torch.arange(4))).all()


def test_beyond_the_error_budget_nothing_is_lost(tmp_path):
    data = dataset(20, bad=BAD)
    with pytest.raises(
        DataError, match=r"3 of 20 images \(15.00%\).*--max-error-rate 0.15"
    ) as caught:
        run(data, tmp_path / "s", max_error_rate=0.1)
    assert caught.value.exit_code == 3
    assert all(
        kind in str(caught.value) for kind in ("empty 1", "truncated 1", "unidentified 1", "errors")
    )
    with pytest.raises(DataError, match="not complete"):
        EmbeddingStore(tmp_path / "s")
    backbone = FakeBackbone()
    store = run(data, tmp_path / "s", backbone, max_error_rate=0.15)  # exactly the error rate
    assert (len(store), backbone.n_images, backbone.n_texts) == (17, 0, 0)


def test_the_suggested_rate_is_enough(tmp_path):
    """The suggested rate must be enough despite rounding.

    29 images in 100 are bad. In floating point, 0.29 * 100 is less than 29.
    """
    data = dataset(100, bad=dict.fromkeys(range(29), b""))
    with pytest.raises(DataError, match=r"--max-error-rate 0.29\b"):
        run(data, tmp_path / "s", part_size=100, max_error_rate=0.28)
    assert len(run(data, tmp_path / "s", part_size=100, max_error_rate=0.29)) == 71


def test_on_error_raise_names_the_first_image(tmp_path):
    data = dataset(23, bad={15: b"<html>", 17: b""})
    with pytest.raises(DataError, match=r"img/0015.png: unidentified"):
        run(data, tmp_path / "s", on_error="raise")
    assert sorted(path.name for path in (tmp_path / "s/receipts").iterdir()) == ["00000.json"]
    run(data, tmp_path / "s", max_error_rate=0.2)
    with pytest.raises(DataError, match="2 of 23 images"):
        run(data, tmp_path / "s", on_error="raise")


@pytest.mark.parametrize(
    ("part", "damage"),
    [
        (0, "no receipt"),
        (1, "no metadata"),
        (1, "garbage receipt"),
        (1, "other run"),
        (2, "truncated"),
    ],
)
def test_only_damaged_parts_are_done_again(tmp_path, part, damage):
    root = tmp_path / "s"
    data = dataset(23, bad=BAD)
    run(data, root, max_error_rate=0.5)
    before = tree(root)
    receipt, vectors = root / f"receipts/{part:05d}.json", root / f"img_emb/img_emb_{part:05d}.npy"
    match damage:
        case "no receipt":
            receipt.unlink()
        case "truncated":
            vectors.write_bytes(vectors.read_bytes()[:-1])
        case "no metadata":
            (root / f"metadata/metadata_{part:05d}.parquet").unlink()
        case "garbage receipt":
            receipt.write_bytes(b"{")
        case "other run":
            write_json(receipt, {**json.loads(receipt.read_text()), "fingerprint": "0" * 32})
    backbone = FakeBackbone()
    run(data, root, backbone, max_error_rate=0.5)
    assert backbone.n_images == [7, 10, 3][part]
    assert tree(root) == before


def test_damaged_class_texts_are_made_again(tmp_path):
    data = dataset(12)
    run(data, tmp_path / "s")
    before = tree(tmp_path / "s")
    text = tmp_path / "s/text_emb/classes.npy"
    text.write_bytes(text.read_bytes()[:-4] + b"\0\0\0\0")
    backbone = FakeBackbone()
    run(data, tmp_path / "s", backbone)
    assert (backbone.n_texts, backbone.n_images) == (3, 0)
    assert tree(tmp_path / "s") == before


def test_a_complete_store_asks_the_model_for_nothing(tmp_path):
    data = dataset(12)
    run(data, tmp_path / "s")
    before, backbone = tree(tmp_path / "s"), FakeBackbone()
    store = run(data, tmp_path / "s", backbone)
    assert (len(store), backbone.n_images, backbone.n_texts) == (12, 0, 0)
    assert tree(tmp_path / "s") == before


def test_batch_size_and_workers_may_change_on_resume(tmp_path):
    data = dataset(23)
    run(data, tmp_path / "s")
    (tmp_path / "s/receipts/00001.json").unlink()
    backbone = FakeBackbone()
    run(data, tmp_path / "s", backbone, batch_size=5, workers=1)
    assert backbone.batches == [5, 5]
    assert json.loads((tmp_path / "s/receipts/00001.json").read_text())["batch_size"] == 5


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"templates": ("art of {}.",)}, "templates"),
        ({"names": ("cat", "hound", "car")}, "names"),
        ({"part_size": 11}, "part_size"),
        ({"dtype": "float32"}, "dtype"),
        ({"split": "test"}, "split"),
        ({"limits": ImageLimits(min_side=9)}, "limits.min_side"),
        ({"backbone": FakeBackbone(preprocess="9x9")}, "space.preprocess"),
        ({"backbone": FakeBackbone(weights="w1")}, "space.weights"),
        ({"data": dataset(24)}, "n_in"),
        ({"data": dataset(23, bad={3: picture(99)})}, "dataset_fingerprint"),
    ],
)
def test_other_inputs_are_refused_and_nothing_is_touched(tmp_path, change, field):
    run(dataset(23), tmp_path / "s")
    (tmp_path / "s/receipts/00001.json").unlink()
    before = tree(tmp_path / "s")
    settings = {"data": dataset(23), "backbone": FakeBackbone()} | change
    with pytest.raises(ProvenanceError, match=f"{field} was .* and is now .*--overwrite"):
        run(settings.pop("data"), tmp_path / "s", **settings)
    assert tree(tmp_path / "s") == before


def test_overwrite_replaces_the_store_and_nothing_else(tmp_path):
    run(dataset(23), tmp_path / "s")
    names = ("notes.txt", "errors/notes.txt", "img_emb/mean.npy", "metadata/mine_00001.parquet")
    for name in (*names, "columns/mine.npy", "text_emb/mine.npy"):
        mine = tmp_path / "s" / name
        mine.parent.mkdir(exist_ok=True)
        mine.write_text("mine")
        before = tree(tmp_path / "s")
        with pytest.raises(UsageError, match=re.escape(name)):
            run(dataset(5), tmp_path / "s", overwrite=True, dtype="float32")
        assert tree(tmp_path / "s") == before
        mine.unlink()
    run(dataset(5), tmp_path / "s", overwrite=True, dtype="float32")
    run(dataset(5), tmp_path / "fresh", dtype="float32")
    assert tree(tmp_path / "s") == tree(tmp_path / "fresh")


def test_overwrite_removes_nothing_where_the_new_settings_are_refused(tmp_path):
    run(dataset(23), tmp_path / "s")
    before = tree(tmp_path / "s")
    with pytest.raises(UsageError, match="template"):
        run(dataset(23), tmp_path / "s", overwrite=True, templates=["a photo of a {]"])
    assert tree(tmp_path / "s") == before
    assert len(EmbeddingStore(tmp_path / "s")) == 23


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_other_things_is_refused(tmp_path, overwrite):
    (tmp_path / "img_emb").mkdir()
    (tmp_path / "img_emb/precious.npy").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"'img_emb'.* no part of"):
        run(dataset(5), tmp_path, overwrite=overwrite)
    assert (tmp_path / "img_emb/precious.npy").read_bytes() == b"x"


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "s").write_bytes(b"")
    with pytest.raises(UsageError, match="is a file"):
        run(dataset(5), tmp_path / "s")


def test_leftovers_of_a_killed_process_are_removed_and_nothing_else(tmp_path):
    root = tmp_path / "s"
    run(dataset(5), root)
    nobody = f"{host_hash()}.{10**30}.0123abcd"  # no process has this number
    leftovers = [
        root / f".run.json.{nobody}.tmp",
        root / f"img_emb/.img_emb_00000.npy.{nobody}.tmp",
    ]
    others = [
        root / f".scores.parquet.{nobody}.tmp.gz",
        root / "img_emb/.mine.tmp",
        root / f".notes.txt.{nobody}.tmp",
    ]
    others.append(
        root / f"img_emb/.img_emb_00000.npy.{host_hash()}.{os.getpid()}.0123abcd.tmp"
    )  # this process still writes it
    for path in leftovers + others:
        path.write_bytes(b"half")
    run(dataset(5), root)
    assert not any(path.exists() for path in leftovers)
    assert all(path.exists() for path in others)


def test_one_driver_at_a_time(tmp_path):
    with (
        StoreLedger.lock_folder(tmp_path / "s"),
        pytest.raises(BusyError, match="another process") as caught,
    ):
        run(dataset(5), tmp_path / "s")
    assert caught.value.exit_code == 75
    assert len(run(dataset(5), tmp_path / "s")) == 5


def test_too_little_room_is_said_before_any_work(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    backbone = FakeBackbone()
    needed = int(23 * DIM * 2 * 1.05)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 10**9, needed - 1))
    with pytest.raises(StorageError, match="23 embeddings need"):
        run(dataset(23), tmp_path / "s", backbone)
    assert backbone.n_images == 0
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 10**9, needed))
    assert len(run(dataset(23), tmp_path / "s")) == 23


@pytest.mark.parametrize("failing", [0, 1, 2, 3, 4, 5, 6, 7, 10, 14, 15])
def test_a_full_disk_keeps_the_finished_parts(tmp_path, monkeypatch, failing):
    """If the disk is full, the finished parts must stay and the next run must do only the rest.

    The n-th file cannot be synced. The order is run.json, the texts, classes.json, three parts with
    four files each, manifest.json.
    """
    root, fsync, calls = tmp_path / "s", os.fsync, iter(range(10**6))

    def full(descriptor):
        if next(calls) == 2 * failing:  # every other call is for the folder
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    data, backbone = dataset(23), FakeBackbone()
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(StorageError, match="No space left") as caught:
            run(data, root)
    assert caught.value.exit_code == 7
    assert not list(root.rglob("*.tmp"))
    run(data, root, backbone)
    finished = max(0, failing - 3) // 4
    assert backbone.n_images == [23, 13, 3, 0][finished]


class Interrupted(FakeBackbone):
    def encode_images(self, pixels):
        if len(self.batches) == 5:
            raise KeyboardInterrupt
        return super().encode_images(pixels)


def test_an_interrupt_stops_the_threads_and_keeps_the_parts(tmp_path):
    data = dataset(23)
    run(data, tmp_path / "undisturbed")
    data.slow = 0.01
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "s", Interrupted())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vilu-decode")]
    assert [path.name for path in (tmp_path / "s/receipts").iterdir()] == ["00000.json"]
    backbone = FakeBackbone()
    run(data, tmp_path / "s", backbone)
    assert backbone.n_images == 13
    assert tree(tmp_path / "s") == tree(tmp_path / "undisturbed")


class Counting(FakeBackbone):
    """A backbone that counts the preprocessed images in memory.

    Its forward pass is slow, so decoding runs as far ahead as it may.
    """

    def __init__(self):
        super().__init__()
        self.alive = self.peak = 0
        self.lock = threading.Lock()

    def _count(self, step):
        with self.lock:
            self.alive += step
            self.peak = max(self.peak, self.alive)

    def preprocess(self, image):
        pixels = super().preprocess(image)
        self._count(1)
        weakref.finalize(pixels, self._count, -1)
        return pixels

    def encode_images(self, pixels):
        time.sleep(0.01)
        return super().encode_images(pixels)


@pytest.mark.parametrize("n", [60, 240])
def test_images_in_flight_do_not_grow_with_the_data(tmp_path, n):
    backbone = Counting()
    run(dataset(n), tmp_path / "s", backbone, batch_size=6, workers=3)
    # One batch is in the model. One batch and one image per thread are ahead. One more image is
    # being handed over.
    assert 6 < backbone.peak <= 6 + 6 + 3 + 1


def test_order_is_kept_when_later_images_are_ready_first(tmp_path):
    data = dataset(23)
    plain = run(data, tmp_path / "a")
    data.slow = 0.003
    slow = run(data, tmp_path / "b", workers=4)
    assert list(slow.ids) == data.keys
    assert torch.equal(plain.image_rows(torch.arange(23)), slow.image_rows(torch.arange(23)))


def test_a_link_to_itself_is_one_bad_row(tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(3):
        (tmp_path / f"photos/{number}.png").write_bytes(picture(number))
    (tmp_path / "photos/loop.png").symlink_to("loop.png")
    store = run(open_dataset(tmp_path / "photos"), tmp_path / "s", max_error_rate=0.5)
    assert list(store.bad_images()) == [("loop.png", "read_error")]
    assert len(store) == 3


def test_an_empty_data_set_is_a_valid_store(tmp_path):
    with pytest.warns(UserWarning, match="pets has no images"):
        store = run(dataset(0), tmp_path / "s")
    assert (len(store), list(store.batches(4)), list(store.ids)) == (0, [], [])
    assert store.image_rows(torch.arange(0)).shape == (0, DIM)


def test_a_part_without_a_good_image(tmp_path):
    data = dataset(12, bad=dict.fromkeys(range(10), b""))
    store = run(data, tmp_path / "s", max_error_rate=1)
    assert list(store.ids) == data.keys[10:]
    np.testing.assert_allclose(
        store.image_rows(torch.tensor([1, 0])), expected_rows(data, [11, 10]), rtol=HALF, atol=1e-6
    )


def test_progress_counts_every_image_once(tmp_path):
    class Recorder:
        def __init__(self):
            self.steps, self.note, self.finished = [], "", False

        def start(self, description, total, unit):
            self.total = (description, total, unit)
            return self

        def advance(self, steps, note=""):
            self.steps.append(steps)
            self.note = note

        def finish(self, task):
            self.finished = task is self

    data = dataset(23, bad=BAD)
    first, second = Recorder(), Recorder()
    with reporting(first):
        run(data, tmp_path / "s", max_error_rate=0.5)
    assert (first.total, sum(first.steps), first.finished) == (("embed", 23, "images"), 23, True)
    assert re.fullmatch(
        r"3 errors, (decoding waits for the model|the model waits for photos \d+% of the time)",
        first.note,
    )
    with reporting(second):
        run(data, tmp_path / "s", max_error_rate=0.5)
    assert second.steps == [1, 1, 1, 23]  # three parts whose bytes are checked, then the images


class Wide(FakeBackbone):
    def encode_images(self, pixels):
        return torch.cat([super().encode_images(pixels)] * 2, dim=1) / 2**0.5


def test_a_model_that_is_not_what_its_space_says(tmp_path):
    with pytest.raises(ProvenanceError, match=r"\(4, 32\).*width 16"):
        run(dataset(5), tmp_path / "s", Wide())


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"batch_size": 0}, UsageError, "batch_size must be at least 1"),
        ({"workers": 0}, UsageError, "workers must be at least 1"),
        ({"part_size": 0}, UsageError, "part_size"),
        ({"dtype": "bfloat16"}, UsageError, "dtype"),
        ({"max_error_rate": 1.5}, UsageError, "share from 0 to 1"),
        ({"max_error_rate": float("nan")}, UsageError, "share from 0 to 1"),
        ({"on_error": "ignore"}, UsageError, "'skip' or 'raise'"),
        ({"templates": "a photo of a {}."}, UsageError, "templates"),
        ({"templates": ("no place for a name",)}, UsageError, "exactly one {}"),
        ({"templates": ()}, UsageError, "at least one template"),
        ({"names": ("cat", "dog")}, DataError, "2 names for 3 classes"),
    ],
)
def test_settings_that_cannot_be(tmp_path, settings, error, message):
    with pytest.raises(error, match=message):
        run(dataset(5), tmp_path / "s", **settings)
    assert not (tmp_path / "s/run.json").exists()


def test_a_label_that_is_no_class(tmp_path):
    data = FakeDataset([picture(0)], [3])
    with pytest.raises(DataError, match="label 3, expected 0 to 2"):
        run(data, tmp_path / "s")


def test_no_names(tmp_path):
    data = dataset(3)
    data.class_names = None
    with pytest.raises(DataError, match="at least one class name"):
        run(data, tmp_path / "s", names=())
    assert not (tmp_path / "s").exists()


def test_decoding_threads_keep_to_one_core_and_the_model_does_not(tmp_path):
    class Asking(FakeBackbone):
        decoding, forward = set(), set()

        def preprocess(self, image):
            self.decoding.add(
                (torch.get_num_threads(), threading.current_thread() is threading.main_thread())
            )
            return super().preprocess(image)

        def encode_images(self, pixels):
            self.forward.add(torch.get_num_threads())
            return super().encode_images(pixels)

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        run(dataset(12), tmp_path / "s", Asking(), workers=2)
        assert (Asking.decoding, Asking.forward, torch.get_num_threads()) == ({(1, False)}, {3}, 3)
    finally:
        torch.set_num_threads(before)


def png_folder(root, *names):
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(seed))
    return root


CLASS_FOLDERS = ("a/1.png", "b/2.png")
SPLIT_FOLDERS = ("train/a/1.png", "train/b/2.png", "test/a/3.png")


@pytest.mark.parametrize(
    ("names", "split", "places"),
    [
        (CLASS_FOLDERS, None, ("store", "new/store", "a/../store")),
        (("1.png", "2.png"), None, ("store", "a/b/store")),
        (SPLIT_FOLDERS, "train", ("train/store", "test/store", "train/new/store")),
        (SPLIT_FOLDERS, "train", ("val", "val/store")),
    ],
)
def test_a_store_among_the_images_is_refused(tmp_path, names, split, places):
    """In the next run, a store in the folder of images would be a class."""
    images = png_folder(tmp_path / "images", *names)
    for data in (open_dataset(images, split=split), open_dataset(images, split=split, limit=1)):
        settings = {"names": data.class_names or NAMES}
        for place in places:
            with pytest.raises(UsageError, match=r"would change .*images.* outside .*images"):
                run(data, images / place, **settings)
            assert not (images / place).exists()


@pytest.mark.parametrize(
    ("names", "split", "place"),
    [
        (CLASS_FOLDERS, None, ".store"),
        (CLASS_FOLDERS, None, "a/store"),
        (CLASS_FOLDERS, None, "a/deep/store"),
        (SPLIT_FOLDERS, "train", "emb/train"),
        (SPLIT_FOLDERS, "train", "store"),
        (SPLIT_FOLDERS, "train", "train/a/store"),
    ],
)
def test_a_store_that_leaves_the_listing_as_it_is_may_lie_below_the_images(
    tmp_path, names, split, place
):
    images = png_folder(tmp_path / "images", *names)
    data = open_dataset(images, split=split)
    store = run(data, images / place, names=data.class_names)
    listed_again = open_dataset(images, split=split)
    assert (listed_again.fingerprint, len(store)) == (data.fingerprint, 2)
    assert len(run(listed_again, images / place, names=data.class_names)) == 2


def test_a_folder_that_may_not_be_searched_is_an_error_of_ours(tmp_path, monkeypatch):
    run(dataset(5), tmp_path / "s")
    is_file = Path.is_file

    def refuse(path):
        if "img_emb" in path.parts or path.name == "run.json":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(StorageError, match=r"cannot read .*run\.json: Permission denied"):
        EmbeddingStore(tmp_path / "s")
    with pytest.raises(StorageError, match=r"cannot read .*run\.json: Permission denied"):
        open_source(tmp_path / "s")
    monkeypatch.setattr(Path, "is_file", lambda path: path.name == "run.json" or refuse(path))
    with pytest.raises(StorageError, match=r"cannot read .*img_emb.*: Permission denied"):
        EmbeddingStore(tmp_path / "s")
    monkeypatch.setattr(Path, "is_file", is_file)
    exists = Path.exists

    def refuse_receipts(path):
        if "receipts" in path.parts:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return exists(path)

    monkeypatch.setattr(Path, "exists", refuse_receipts)
    with pytest.raises(StorageError, match=r"cannot read .*Permission denied.*receipts"):
        run(dataset(5), tmp_path / "s")


def test_a_damaged_run_is_repaired_as_its_message_says(tmp_path):
    run(dataset(23), tmp_path / "s")
    before = tree(tmp_path / "s")
    document = tmp_path / "s/run.json"
    document.write_text(document.read_text().replace('"cat"', '"cow"'))
    with pytest.raises(StorageError, match=r"again with --overwrite to repair it"):
        run(dataset(23), tmp_path / "s")
    run(dataset(23), tmp_path / "s", overwrite=True)
    assert tree(tmp_path / "s") == before
    manifest = tmp_path / "s/manifest.json"
    manifest.write_text(manifest.read_text().replace('"cat"', '"cow"'))
    with pytest.raises(StorageError, match=r"again to repair it"):
        EmbeddingStore(tmp_path / "s")
    run(dataset(23), tmp_path / "s")
    assert tree(tmp_path / "s") == before
